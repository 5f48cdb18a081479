"""`fold`: a module that stands in for an image pipeline and is faster, proved equal, without any training.

A size of images is folded when it is asked for, or once enough images of that size came by to pay for it. Where folding
is refused, or is not faster, the pipeline itself runs, and a warning says so once.
"""

import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import kernels
from .errors import ParameterError
from .identification import MAX_LEVELS, NotSeparable, identify
from .machine import seconds_for
from .separable import Separable

PAYS_BACK = 256  # images of one size after which it is folded unasked: to identify it costs as much as some fifty
TIMED_IMAGES = 8  # in one timed pass of the pipeline and of what it was folded to
TIMED_PASSES = 5  # of each, in turns; the fastest counts

Key = tuple[tuple[int, int, int], torch.dtype]  # the shape of an image and the dtype of its batch


class FoldedTransform(nn.Module):
    """Does what `transform` does to batches of images (n, C, H, W), or to one image (C, H, W), faster.

    `transform` is any callable of such tensors, float32 in [0, 1] or uint8. The output is float32, or uint8 where the
    pipeline gives that; of uint8 images it may differ from the pipeline's by `max_levels` grey levels, for it does not
    round in between. It is on the device of the images. Gradients flow to the images, if these ask for them.

    The first `after` images of a size go through the pipeline itself. Then the size is folded, which takes as long as
    some fifty images; `prepare` does it at once. `refused` says, by size and dtype, what is not folded, and why.

    >>> flipped = FoldedTransform(lambda images: images.flip(-1) - 0.5)
    >>> flipped(torch.zeros(4, 3, 8, 8)).shape
    torch.Size([4, 3, 8, 8])
    """

    def __init__(self, transform: Callable, *, max_levels: float = MAX_LEVELS, after: int = PAYS_BACK):
        super().__init__()
        if not callable(transform):
            raise ParameterError(f"transform: expected something to call on images, got {transform!r:.100}")
        self.transform, self.max_levels, self.after = transform, max_levels, after
        self.met: Counter[Key] = Counter()
        self.folded: dict[Key, _Folded] = {}
        self.refused: dict[Key, str] = {}

    def prepare(self, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Separable:
        """Fold now for images of `shape` (C, H, W) and `dtype`: what they are, verified. Raises NotSeparable.

        If the pipeline itself is as fast, it goes on to run, and a warning says so.
        """
        key = tuple(shape), dtype
        if dtype not in (torch.float32, torch.uint8):
            raise ParameterError(f"dtype: expected torch.float32 or torch.uint8, got {dtype}")
        form = "uint8" if dtype == torch.uint8 else "float32"
        separable = identify(self.transform, key[0], form=form, max_levels=self.max_levels)
        folded = _Folded(separable, rounds=self._example(key).dtype == torch.uint8)
        ours, theirs = self._timed(folded, key)
        if ours < theirs:
            self.folded[key] = folded
        else:
            self._refuse(key, f"it would take {ours:.2g} s where the transform takes {theirs:.2g} s")
        return separable

    def _example(self, key: Key) -> Tensor:
        shape, dtype = key
        with torch.no_grad():
            return self.transform(torch.zeros(1, *shape, dtype=dtype))

    def _timed(self, folded: "_Folded", key: Key) -> tuple[float, float]:
        """Seconds for a few images, folded and by the pipeline: the fastest of several passes in turns."""
        shape, dtype = key
        images = torch.randint(0, 256, (TIMED_IMAGES, *shape), dtype=torch.uint8)
        images = images if dtype == torch.uint8 else images / 255
        fastest = [float("inf")] * 2
        with torch.no_grad():
            folded(images)  # compiles
            for _ in range(TIMED_PASSES):
                for i, method in enumerate((folded, self.transform)):
                    fastest[i] = min(fastest[i], seconds_for(lambda method=method: method(images)))
        return fastest[0], fastest[1]

    def _refuse(self, key: Key, reason: str) -> None:
        self.refused[key] = reason
        shape, dtype = "×".join(map(str, key[0])), str(key[1]).removeprefix("torch.")
        warnings.warn(f"{dtype} images of {shape} go through the transform itself: {reason}", stacklevel=2)

    def forward(self, images: Tensor) -> Tensor:
        # What it looks up changes from call to call. A decorator would load the compiler, which writes to the disk
        run = torch.compiler.disable(self.run) if torch.compiler.is_compiling() else self.run
        return run(images)

    def run(self, images: Tensor) -> Tensor:
        """Folded if this size is, else through the pipeline."""
        if not isinstance(images, Tensor):
            raise ParameterError(
                f"expected a tensor of images, got {type(images).__name__}; v2.functional.pil_to_tensor makes one of a "
                "PIL image"
            )
        key = tuple(images.shape[-3:]), images.dtype
        folded = self.folded.get(key)
        if folded is None and key not in self.refused and images.ndim in (3, 4):
            self.met[key] += len(images) if images.ndim == 4 else 1
            if self.met[key] > self.after:
                try:
                    self.prepare(*key)
                except (NotSeparable, ParameterError) as error:
                    self._refuse(key, str(error))
                folded = self.folded.get(key)
        if folded is None:
            return self.transform(images)
        return folded(images) if images.ndim == 4 else folded(images[None])[0]


class _Folded:
    """A pipeline for one size and dtype of images (n, C, H, W)."""

    def __init__(self, separable: Separable, rounds: bool):
        self.separable, self.rounds = separable, rounds  # to bytes, as the pipeline does
        bands = kernels.Bands.of(separable)
        self.bands = bands if kernels.available() and bands.widest <= kernels.WIDEST else None
        self.moved: dict[torch.device, Separable] = {}  # to devices other than the CPU

    def __call__(self, images: Tensor) -> Tensor:
        needs_gradient = images.requires_grad and torch.is_grad_enabled()
        if self.bands and images.device.type == "cpu" and not needs_gradient:
            output = kernels.apply(self.bands, images)
        else:
            output = self.plain(images)
        return output.mul_(255).round_().clamp_(0, 255).to(torch.uint8) if self.rounds else output

    def plain(self, images: Tensor) -> Tensor:
        """By matrix products, on the images' device."""
        device = images.device
        if device.type != "cpu" and device not in self.moved:
            self.moved[device] = self.separable.to(device)
        separable = self.moved.get(device, self.separable)
        if device.type == "meta" or not torch.is_autocast_enabled(device.type):  # there is none on meta
            return separable(images)
        with torch.autocast(device.type, enabled=False):  # it would multiply in bfloat16
            return separable(images)


def fold(
    transform: Callable,
    *shapes: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    max_levels: float = MAX_LEVELS,
) -> FoldedTransform:
    """A faster module in place of `transform`, ready for images of `shapes` (C, H, W); others are folded as they come.

    Raises NotSeparable, with the evidence, if `transform` cannot be folded for one of them.

    >>> fold(torch.round, (3, 32, 32))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    transformnet_lib.identification.NotSeparable: not foldable (not linear): ...
    """
    folded = FoldedTransform(transform, max_levels=max_levels)
    for shape in shapes:
        folded.prepare(shape, dtype)
    return folded
