"""Find out what an image pipeline is by asking it: `identify` sends images through it and reads off its matrices.

Resizes of any filter, crops, pads, flips, blurs, grey, channel orders, Normalize and any chain of them come out,
whoever wrote them; for what is not of `Separable`'s form it says why. Nothing of the pipeline's code is looked at.

How: an image of impulses so far apart that no two meet in an output pixel (a comb) reads off many entries of a matrix
at once; where impulses rise along the image, their answer tells where they stand. Combs are taken apart until each
is wider than the filter reaches. What came out is then compared with the pipeline on images that it was not made from.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import TransformnetError
from .pipeline import to_float
from .separable import Form, Rounding, Separable

TOLERANCE = 1e-5  # of the output's range, between what was identified and the pipeline; float32 rounds by 1e-6
MAX_PROBES = 150  # images
MAX_SECONDS = 60  # of all calls
MAX_CALL_SECONDS = 2  # of the first call, with one image; some fifty follow
# Grey levels by which rounding within a pipeline may change a pixel of a photograph. Bilinear resizes of bytes reach
# 1.0; bicubic ones, which saturate between their two passes, 5.0.
MAX_LEVELS = 6.0
PERIODS = (8, 24, 48, 96, 192)  # pixels between the impulses of a comb, each a multiple of the one before it
NEGLIGIBLE = 1e-5  # of the largest entry of a matrix; what is smaller may be rounding
BASE, SWING = 0.5, 0.4  # probes stay this near to grey: what clamps at black and white is linear there
CHUNK_BYTES = 2**26  # of images in one call
REPEATS, REPEATS_IF_DRAWN = 3, 32  # of one image; one flip in two is missed by 32 once in two thousand million

REASONS = {
    "fails": "it fails on such images",
    "output": "its output is no batch of float images",
    "not finite": "its output is not finite",
    "in place": "it changes the images that it is given",
    "slow": "it is too slow to be asked",
    "random": "random: equal images give different outputs",
    "batch": "an image's output depends on the other images of the batch",
    "constant": "its output does not depend on the image",
    "not linear": "not linear",
    "not separable": "linear, but rows, columns and channels do not separate",
    "too wide": "its filter reaches too far",
    "rounding": "it rounds more than was accepted",
}


class NotSeparable(TransformnetError):
    """A pipeline is not of `Separable`'s form: `reason` is a key of REASONS, the message the evidence."""

    def __init__(self, reason: str, evidence: str):
        self.reason = reason
        super().__init__(f"not foldable ({REASONS[reason]}): {evidence}")


def identify(
    transform: Callable,
    shape: tuple[int, int, int],
    *,
    form: Form = "float32",
    max_levels: float = MAX_LEVELS,
    max_probes: int = MAX_PROBES,
    seed: int = 0,
) -> Separable:
    """Find out what `transform` does to images of `shape` (channels, height, width); NotSeparable if that has no form.

    `transform` maps float32 images in [0, 1], (n, C, H, W), or one of them, (C, H, W), to float images (n, K, h, w). If
    it is really called with uint8 tensors or PIL images, say so by `form`: the matrices are those of its float form,
    which is compared with it as it is called, and refused if a pixel differs by more than `max_levels`.

    >>> str(identify(lambda images: (images.flip(-1) - 0.5) / 0.25, (3, 8, 6)))
    'exact (3×8×6 → 3×8×6; residual 0.0e+00 of the range, 32 probe images)'
    """
    probe = _Probe(transform, shape, max_probes, seed)
    try:
        separable = _identified(probe)
    except NotSeparable as refusal:
        if refusal.reason in ("batch", "not linear", "not separable", "too wide"):
            probe.check_repeats(REPEATS_IF_DRAWN)  # what seems to be that may be chance
        raise
    return separable if form == "float32" else _compared(probe, separable, form, max_levels)


@dataclass
class _Probe:
    """The pipeline, and its answers; each call is checked."""

    transform: Callable
    shape: tuple[int, int, int]
    max_probes: int
    seed: int
    count: int = 0  # images sent
    output_shape: tuple[int, ...] | None = None
    batches: bool | None = None  # whether it takes batches, or single images; None before the first call
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self):
        if not callable(self.transform):
            raise NotSeparable("fails", f"expected something to call on images, got {self.transform!r:.100}")
        if len(self.shape) != 3 or not all(type(side) is int and side > 0 for side in self.shape):
            raise NotSeparable("fails", f"expected a shape (channels, height, width), got {self.shape!r:.100}")
        self.generator = torch.Generator().manual_seed(self.seed)

    def noise(self, *shape: int) -> Tensor:
        """Uniform in [0, 1]."""
        return torch.rand(shape, generator=self.generator)

    def __call__(self, images: Tensor) -> Tensor:
        """The pipeline's output (n, K, h, w) for float32 images (n, C, H, W), in float64, some images at a time."""
        at_once = max(1, CHUNK_BYTES // (4 * images[0].numel()))
        return torch.cat([self.checked(chunk) for chunk in images.split(at_once)])

    def checked(self, images: Tensor) -> Tensor:
        self.count += len(images)
        given = images.clone()
        with torch.no_grad():
            output = self.answer(given)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            kind = str(output.dtype) if isinstance(output, Tensor) else type(output).__name__
            raise NotSeparable("output", f"expected a float tensor for float32 images, got {kind}")
        shape = self.output_shape or tuple(output.shape[1:])
        if output.ndim != 4 or len(output) != len(images) or tuple(output.shape[1:]) != shape:
            expected = f"({len(images)}, {', '.join(map(str, self.output_shape or 'Khw'))})"
            raise NotSeparable("output", f"expected {expected} for {len(images)} images, got {tuple(output.shape)}")
        self.output_shape = shape
        if not torch.equal(given, images):
            raise NotSeparable("in place", "after the call they are others; let it work on a copy")
        if not output.isfinite().all():
            raise NotSeparable("not finite", f"it holds {output[~output.isfinite()][0].item()} for images in [0, 1]")
        if (seconds := time.perf_counter() - self.started) > MAX_SECONDS:
            raise NotSeparable("slow", f"{self.count} images took {seconds:.0f} s")
        return output.as_subclass(Tensor).detach().cpu().double()

    def answer(self, images: Tensor) -> object:
        """What the pipeline gives for a batch; image by image, if it does not take one."""
        if self.batches is not False:
            try:
                output = self.transform(images)
            except Exception as error:
                if self.batches is None and (singly := self.singly(images)) is not None:
                    return singly
                said = f"called with float32 images of shape {tuple(images.shape)} it raised {type(error).__name__}"
                raise NotSeparable("fails", f"{said}: {error}") from error
            self.batches = True
            return output
        return self.singly(images)

    def singly(self, images: Tensor) -> Tensor | None:
        """The answers to single images (C, H, W); None if it does not take those either."""
        try:
            outputs = [self.transform(image) for image in images]
        except Exception as error:
            if self.batches is False:
                raise NotSeparable("fails", f"for a single image it raised {type(error).__name__}: {error}") from error
            if self.takes_only_pictures(images):
                raise NotSeparable(
                    "fails",
                    "it takes PIL images and has no form for float tensors, which torchvision's v2 has: in place of "
                    "ToTensor() write v2.ToImage(), v2.ToDtype(torch.float32, scale=True)",
                ) from error
            return None
        if not all(isinstance(output, Tensor) and output.shape == outputs[0].shape for output in outputs):
            raise NotSeparable("output", "expected a tensor for each image, all of one shape")
        self.batches = False
        return torch.stack(outputs)

    def takes_only_pictures(self, images: Tensor) -> bool:
        if self.shape[0] not in (1, 3):
            return False
        try:
            self.transform(_pictures(images[:1])[0])
        except Exception:
            return False
        return True

    def check_repeats(self, times: int) -> None:
        """Refuse a pipeline that gives different outputs for one image."""
        image = self.noise(1, *self.shape)
        first = self(image)
        for _ in range(times - 1):
            if not torch.allclose(self(image), first, rtol=1e-6, atol=1e-6):
                raise NotSeparable("random", "the same image sent again gave another output")


def _generators() -> tuple:
    """The states of the generators that a random pipeline draws from."""
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(np.random.get_state())


def _refuse(reason: str, differences: Tensor, what: str) -> None:
    """Raise NotSeparable, saying where, if `differences` (K, h, w), parts of the output's range, are too large."""
    worst = differences.max().item()
    if worst > TOLERANCE:
        k, i, j = np.unravel_index(differences.argmax().item(), differences.shape)
        raise NotSeparable(
            reason, f"{what} differ by {worst:.2g} of the output's range (channel {k}, row {i}, column {j})"
        )


def _identified(probe: _Probe) -> Separable:
    """The matrices of a pipeline, one after the other, from ever more images."""
    images, outputs = _linear(probe)
    grey = outputs[0]
    pattern = probe.noise(*probe.shape[1:])
    answers = _channels_alone(probe, grey, pattern)
    mix, *_ = _factors(answers.transpose(0, 1).flatten(2).flatten(0, 1))  # but for its scale
    mix = mix.view(answers.shape[1], answers.shape[0])
    rows, columns = (_scaled(_axis_matrix(probe, mix, grey, axis)) for axis in (0, 1))
    spread = rows @ pattern.double() @ columns.T
    mix = torch.einsum("ckhw,hw->kc", answers, spread) / spread.square().sum()
    offset = grey - BASE * mix.sum(1)[:, None, None] * (rows.sum(1)[:, None] * columns.sum(1))
    bounds = torch.tensor([[-torch.inf], [torch.inf]]).expand(2, len(mix))
    matrices = (matrix.float() for matrix in (rows, columns, mix, offset, bounds))
    return _verified(probe, Separable(*matrices, residual=0.0, probes=0), images, outputs)


def _linear(probe: _Probe) -> tuple[Tensor, Tensor]:
    """Images, the first of them grey, and their outputs, of a pipeline that is repeatable, and linear around grey."""
    before, start = _generators(), time.perf_counter()
    probe(probe.noise(1, *probe.shape))
    if (seconds := time.perf_counter() - start) > MAX_CALL_SECONDS:
        raise NotSeparable("slow", f"one image took {seconds:.1f} s, and some fifty would have to be sent")
    probe.check_repeats(REPEATS if _generators() == before else REPEATS_IF_DRAWN)
    grey = torch.full((1, *probe.shape), BASE)
    two = 2 * probe.noise(2, *probe.shape) - 1
    half = SWING / 2
    sums = grey + half * (two[:1] + two[1:]), grey + SWING * two[:1]
    images = torch.cat([grey, grey + half * two, *sums, 0 * grey, 1 + 0 * grey])
    outputs = probe(images)
    scale = (outputs.amax() - outputs.amin()).item()
    if scale <= 1e-12:
        raise NotSeparable("constant", f"{len(images)} images gave {outputs.flatten()[0].item():g} in every pixel")
    _refuse(
        "batch", (probe(images[1:2])[0] - outputs[1]).abs() / scale, "the outputs of an image alone and among others"
    )
    grey, one, other, both, twice, *_ = outputs
    _refuse("not linear", (one + other - both - grey).abs() / scale, "the output of a sum and the sum of the outputs")
    _refuse(
        "not linear", (2 * (one - grey) - (twice - grey)).abs() / scale, "outputs at twice the contrast and twice those"
    )
    return images, outputs


def _channels_alone(probe: _Probe, grey: Tensor, pattern: Tensor) -> Tensor:
    """What `pattern` (H, W) gives in each channel alone: (C, K, h, w), that is mix[k, c] times one picture (h, w)."""
    images = torch.full((probe.shape[0], *probe.shape), BASE)
    for c in range(probe.shape[0]):
        images[c, c] += SWING * pattern
    answers = (probe(images) - grey) / SWING
    *_, error = _factors(answers.flatten(2).flatten(0, 1))
    if error > 100 * TOLERANCE:
        raise NotSeparable("not separable", f"channels are resampled differently, by {error:.2g} of the largest answer")
    return answers


def _factors(matrix: Tensor) -> tuple[Tensor, Tensor, float]:
    """left (m,) and right (n,) whose outer product is nearest to `matrix`; the largest error over its largest entry.

    Of a matrix of rank one the largest row is the right factor but for rounding, which a step of the power method
    averages.
    """
    right = matrix[matrix.square().sum(1).argmax()]
    left = matrix @ right
    right = left @ matrix / left.square().sum().clamp_min(1e-300)
    left = matrix @ right / right.square().sum().clamp_min(1e-300)
    largest = matrix.abs().max().clamp_min(1e-300)
    return left, right, ((matrix - left[:, None] * right).abs().max() / largest).item()


def _scaled(matrix: Tensor) -> Tensor:
    """`matrix` with rows that sum to 1; for filters that sum to 0, with 1 as the largest sum of magnitudes.

    A factor can be in the mix as well as in the matrices: this is where it belongs.
    """
    middle = matrix.sum(1).median()
    plain = middle.abs() > 1e-3 * matrix.abs().max()
    return matrix / (middle if plain else matrix.abs().sum(1).max())


def _axis_matrix(probe: _Probe, mix: Tensor, grey: Tensor, axis: int) -> Tensor:
    """The matrix (output side, input side) of one axis, 0 for rows, but for its scale; float64."""
    side = probe.shape[1 + axis]
    ask = _Axis(probe, mix, grey, axis)
    at = torch.arange(side)
    height = 0.1 + 0.9 * at / side  # of impulses whose answer tells where they stand
    test = probe.noise(side)  # answered rightly by a matrix whose rows do not reach beyond a period
    period, (total, weighed, expected) = 1, ask(torch.stack([torch.ones(side), height, test]))
    combs = total[None]  # (period, output side): answers to impulses at r, r + period, r + 2 period, …
    place = _middle(total, weighed, side)  # in the input, of what an output row reads
    for wider in (*(p for p in PERIODS if p < side), side):
        # Each comb is taken apart: what is left of it are the impulses that are not in combs of their own
        new = torch.arange(period, wider)
        answers = ask((at % wider == new[:, None]).float())
        combs = torch.cat([combs.index_add(0, new % period, answers, alpha=-1), answers])
        period = wider
        if period == side:
            break
        # Where a filter's entries cancel, their sum does not tell where they are, but some of them do
        if (vague := total.abs() < 0.1 * combs.abs().sum(0)).any():
            some = torch.arange(0, period, max(1, period // 8))
            weighed = ask((at % period == some[:, None]) * height)
            weights = combs[some].square()
            middle = (weights * _middle(combs[some], weighed, side).nan_to_num()).sum(0) / weights.sum(0)
            place = torch.where(vague & middle.isfinite(), middle, place)
        matrix = _placed(combs, place.nan_to_num(), side)
        if (matrix @ test.double() - expected).abs().max() <= TOLERANCE * matrix.abs().sum(1).max():
            return matrix
    return _without_rounding(combs.T)


@dataclass
class _Axis:
    """Asks a pipeline for patterns along one axis: (m, side) in [0, 1] → (m, output side)."""

    probe: _Probe
    mix: Tensor
    grey: Tensor
    axis: int

    def __post_init__(self):
        channels, self.name = self.probe.shape[0], ("rows", "columns")[self.axis]
        # Along the other axis, so that filters that sum to 0 there do not hide everything
        self.across = 0.5 + 0.5 * self.probe.noise(self.probe.shape[2 - self.axis])
        self.basis = None  # the other axis's part of every answer
        # Where the mix can be undone, each channel carries a pattern of its own
        self.packed = len(self.mix) >= channels and torch.linalg.cond(self.mix).item() < 30
        self.unmix = torch.linalg.pinv(self.mix if self.packed else self.mix.sum(1, keepdim=True))

    def __call__(self, patterns: Tensor) -> Tensor:
        probe, count, lanes = self.probe, len(patterns), self.probe.shape[0] if self.packed else 1
        images = -(-count // lanes)
        if probe.count + images > probe.max_probes:
            raise NotSeparable(
                "too wide", f"to tell its {self.name} apart takes more than {probe.max_probes} images; raise max_probes"
            )
        patterns = torch.cat([patterns, patterns.new_zeros(images * lanes - count, patterns.shape[1])])
        lines = patterns.view(images, lanes, -1).expand(-1, probe.shape[0], -1)
        lines = lines[..., None] * self.across if self.axis == 0 else self.across[:, None] * lines[..., None, :]
        answers = torch.einsum("lk,nkhw->nlhw", self.unmix, (probe(BASE + SWING * lines) - self.grey) / SWING)
        answers = answers.flatten(0, 1)[:count]
        answers = answers if self.axis == 0 else answers.transpose(1, 2)  # (m, output side, other side)
        if self.basis is None:
            _, self.basis, _ = _factors(answers.flatten(0, 1))
        entries = answers @ self.basis / self.basis.square().sum().clamp_min(1e-300)
        errors = (answers - entries[..., None] * self.basis).abs().amax(0)
        worst = (errors.max() / answers.abs().max().clamp_min(1e-300)).item()
        if worst > 100 * TOLERANCE:
            place = np.unravel_index(errors.argmax().item(), errors.shape)
            row, column = place if self.axis == 0 else place[::-1]
            evidence = f"{self.name} are treated differently across the image, by {worst:.2g} of the largest answer"
            raise NotSeparable("not separable", f"{evidence} (row {row}, column {column})")
        return entries


def _middle(entries: Tensor, weighed: Tensor, side: int) -> Tensor:
    """Where impulses stand, from the answers to them and to impulses that rise along the axis; NaN where none is."""
    return ((weighed / entries - 0.1) / 0.9 * side).clamp(0, side - 1)


def _placed(combs: Tensor, place: Tensor, side: int) -> Tensor:
    """The matrix whose rows lie around `place` and within one period, from the answers to all combs of that period."""
    period, count = combs.shape
    # Modulo the period the middle is known from the answers themselves, as a mean on a circle
    turns = torch.exp(2j * torch.pi * torch.arange(period, dtype=torch.float64) / period)
    middle = (combs.abs().to(turns.dtype) * turns[:, None]).sum(0).angle() / (2 * torch.pi) * period
    place = place + (middle - place + period / 2) % period - period / 2
    first = (place.round().long() - period // 2)[:, None]  # of the period of input pixels that a row can read
    at = first + (torch.arange(period) - first) % period  # (output side, period): where the impulse of comb r stands
    inside = (at >= 0) & (at < side)
    entries = _without_rounding(combs.T)
    matrix = torch.zeros(count, side, dtype=combs.dtype)
    row = torch.arange(count)[:, None].expand_as(at)
    matrix[row[inside], at[inside]] = entries[inside]
    return matrix


def _without_rounding(matrix: Tensor) -> Tensor:
    return torch.where(matrix.abs() > NEGLIGIBLE * matrix.abs().max(), matrix, 0.0)


def _verified(probe: _Probe, separable: Separable, images: Tensor, outputs: Tensor) -> Separable:
    """`separable` with its residual, and with bounds if the pipeline clamps; NotSeparable if it is not the pipeline."""
    speckles = (probe.noise(1, *probe.shape) > 0.5).float()
    photos, noise = photographs(probe.shape) / 255, probe.noise(1, *probe.shape)
    extremes = _extremes(separable)
    tests = torch.cat([images, noise, speckles, photos, extremes])
    expected = torch.cat([outputs, probe(tests[len(images) :])])
    scale = (expected.amax() - expected.amin()).item()
    separable = _bounded(separable, separable(tests).double(), expected, TOLERANCE * scale)
    differences = (expected - separable(tests)).abs() / scale
    # Around grey the pipeline is linear, so if even there they differ it is not of this form
    _refuse("not separable", differences[:5].amax(0), "around grey its outputs and its matrices'")
    clamped = ", clamped or not," if separable.clamps else ""
    differences[-len(extremes) :] /= 10  # where all rounding adds up
    _refuse("not linear", differences.amax(0), f"at full contrast its outputs and its matrices'{clamped}")
    return replace(separable, residual=differences[: -len(extremes)].max().item(), probes=probe.count)


def _extremes(separable: Separable) -> Tensor:
    """The images (2 K, C, H, W) of black and white that drive a channel highest and lowest, where what clamps does."""
    row, column = (matrix[matrix.abs().sum(1).argmax()] for matrix in (separable.rows, separable.columns))
    weights = separable.mix[:, :, None, None] * row[:, None] * column
    return torch.cat([weights > 0, weights < 0]).float()


def _bounded(separable: Separable, given: Tensor, expected: Tensor, tolerance: float) -> Separable:
    """`separable` with the extremes of `expected` as bounds of the channels in which it goes beyond them."""
    low, high = expected.amin((0, 2, 3)), expected.amax((0, 2, 3))
    below, above = given.amin((0, 2, 3)) < low - tolerance, given.amax((0, 2, 3)) > high + tolerance
    bounds = torch.stack([torch.where(below, low, -torch.inf), torch.where(above, high, torch.inf)])
    return replace(separable, bounds=bounds.float())


def photographs(shape: tuple[int, int, int]) -> Tensor:
    """Two of scikit-image's photographs as images of `shape` in 0..255, repeated where they are too small."""
    import skimage.data  # here: its import takes 0.3 s

    photographs = []
    for photograph in (skimage.data.astronaut(), skimage.data.coffee()):
        pixels = torch.from_numpy(photograph.copy()).permute(2, 0, 1)
        repeats = [-(-wanted // there) for wanted, there in zip(shape, pixels.shape, strict=True)]
        photographs.append(pixels.repeat(repeats)[: shape[0], : shape[1], : shape[2]])
    return torch.stack(photographs)


def _pictures(images: Tensor) -> list[Image.Image]:
    """Images (n, C, H, W), uint8 or in [0, 1], as PIL's."""
    pixels = images if images.dtype == torch.uint8 else images.mul(255).round().to(torch.uint8)
    return [
        Image.fromarray(np.moveaxis(picture, 0, -1) if len(picture) > 1 else picture[0]) for picture in pixels.numpy()
    ]


def _compared(probe: _Probe, separable: Separable, form: Form, max_levels: float) -> Separable:
    """`separable` with how far it is from the pipeline as it is called, on photographs of bytes."""
    noise = torch.randint(0, 256, (2, *probe.shape), dtype=torch.uint8, generator=probe.generator)
    # What saturates shows on noise and speckles. They are not compared: a resize of bytes saturates between its passes
    # too, which on noise is worth 10 levels
    photos = photographs(probe.shape)
    images = torch.cat([photos, noise, (noise > 127) * 255]).to(torch.uint8)
    try:
        outputs = [probe.transform(image) for image in (_pictures(images) if form == "pil" else images)]
        expected = torch.stack([_as_tensor(output, separable.output_shape) for output in outputs]).double()
    except Exception as error:
        raise NotSeparable("fails", f"called with {form} images it raised {type(error).__name__}: {error}") from error
    level = separable.mix.abs().sum(1)[:, None, None] / 255  # in the output
    separable = _bounded(separable, separable(images).double(), expected, level.max().item())
    differences = ((expected - separable(images)).abs() / level)[: len(photos)]
    rounding = Rounding(form, differences.max().item(), differences.mean().item(), len(differences))
    if rounding.max_levels > max_levels:
        raise NotSeparable(
            "rounding",
            f"called with {form} images it differs from its form without rounding by {rounding.max_levels:.2f} grey "
            f"levels in a pixel, {rounding.mean_levels:.2f} on average; accepted: {max_levels}",
        )
    return replace(separable, rounding=rounding)


def _as_tensor(output: Image.Image | Tensor, shape: tuple[int, int, int]) -> Tensor:
    """An output as a float tensor of `shape`, bytes in [0, 1]."""
    if isinstance(output, Image.Image):
        pixels = torch.from_numpy(np.array(output))
        output = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels
    return to_float(output).reshape(shape)
