"""What a pipeline is, found out by asking it: chains of steps come out exactly, all else is refused with the reason."""

import random
import time

import kornia
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as steps

from transformnet_lib import Pipeline
from transformnet_lib.identification import MAX_PROBES, REASONS, NotSeparable, identify

NORMALIZE = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
IMAGENET = v2.Compose([v2.Resize(256), v2.CenterCrop(224), NORMALIZE])
GENERATOR = random.Random(0)
BICUBIC = v2.InterpolationMode.BICUBIC


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def assert_equal(transform, separable, *, tolerance: float = 1e-5) -> None:
    """On images that neither has seen."""
    images = noise(4, *separable.input_shape)
    images[0], images[1] = 0, 1
    expected = transform(images)
    spread = (expected.max() - expected.min()).item()
    assert (separable(images) - expected).abs().max().item() <= tolerance * spread
    assert (separable((images * 255).byte()) - transform((images * 255).byte() / 255)).abs().max() <= tolerance * spread


def refused(transform, shape=(3, 20, 24), **options) -> NotSeparable:
    start = time.monotonic()
    with pytest.raises(NotSeparable) as caught:
        identify(transform, shape, **options)
    assert time.monotonic() - start < 60
    assert str(caught.value).startswith(f"not foldable ({REASONS[caught.value.reason]}): ")
    return caught.value


# Chains of steps that fit


def test_the_papers_pipeline_has_the_matrices_that_are_known():
    pipeline = Pipeline()
    separable = identify(pipeline.compose(), (3, 32, 32))
    for axis, matrix in ((-2, separable.rows), (-1, separable.columns)):
        expected = pipeline.axis_matrix(32, axis, dtype=torch.float32)
        assert (matrix - expected).abs().max() < 1e-6
    assert torch.allclose(separable.mix, torch.tensor([[0.2989, 0.587, 0.114]]), atol=1e-6)
    assert separable.offset.abs().max() < 1e-6 and not separable.clamps
    assert (separable.verdict, separable.output_shape) == ("exact", (1, 28, 28))


def test_imagenets_takes_a_few_dozen_images_and_keeps_what_normalize_adds_apart():
    separable = identify(IMAGENET, (3, 375, 500))
    assert separable.probes <= 60
    assert_equal(IMAGENET, separable)
    std = torch.tensor((0.229, 0.224, 0.225))
    assert torch.allclose(separable.mix, torch.diag(1 / std), atol=1e-4)
    assert torch.allclose(separable.bias, -torch.tensor((0.485, 0.456, 0.406)) / std, atol=1e-4)


@st.composite
def chains(draw) -> list:
    """Steps of torchvision's v2, in any order that works."""
    chosen, coloured = [], True
    filters = (v2.InterpolationMode.NEAREST, v2.InterpolationMode.BILINEAR, BICUBIC)
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["resize", "crop", "pad", "hflip", "vflip", "blur", "grey", "order", "normalize"]))
        if kind == "resize":
            size = draw(st.lists(st.integers(2, 40), min_size=2, max_size=2))
            chosen.append(v2.Resize(size, interpolation=draw(st.sampled_from(filters)), antialias=draw(st.booleans())))
        elif kind == "crop":
            chosen.append(v2.CenterCrop(draw(st.integers(2, 40))))
        elif kind == "pad":
            mode = draw(st.sampled_from(["constant", "edge", "reflect", "symmetric"]))
            fill = draw(st.floats(0, 1)) if mode == "constant" else 0
            chosen.append(v2.Pad(1 if mode == "reflect" else draw(st.integers(1, 2)), fill=fill, padding_mode=mode))
        elif kind == "blur":
            sigma = draw(st.floats(0.3, 2))
            chosen.append(lambda x, sigma=sigma: steps.gaussian_blur(x, [3, 3], [sigma, sigma]))
        elif kind == "grey" and coloured:
            channels = draw(st.sampled_from([1, 3]))
            chosen.append(v2.Grayscale(channels))
            coloured = channels == 3
        elif kind == "order" and coloured:
            order = draw(st.permutations([0, 1, 2]))
            chosen.append(lambda x, order=order: x[..., order, :, :])
        elif kind == "normalize":
            chosen.append(v2.Normalize([draw(st.floats(-1, 1))], [draw(st.floats(0.1, 3))]))
        else:
            chosen.append(steps.horizontal_flip if kind == "hflip" else steps.vertical_flip)
    return chosen


@given(chains(), st.integers(8, 40), st.integers(8, 40))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_chain_of_steps_comes_out(chain, height, width):
    try:
        separable = identify(v2.Compose(chain), (3, height, width))
    except NotSeparable as refusal:  # what pads and then picks single pixels may pick none of the image
        assert refusal.reason == "constant"
        return
    assert separable.probes <= MAX_PROBES and separable.residual <= 1e-5
    assert_equal(v2.Compose(chain), separable)


def padded_after(images):
    return F.pad(NORMALIZE(images), (3, 1, 2, 0))


def sobel(images):
    kernel = torch.tensor([[[[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]]])
    return F.conv2d(images.mean(1, keepdim=True), kernel, padding=1)


FITTING = {
    "offset by pixel": (padded_after, (3, 40, 30)),
    "sums to zero": (sobel, (3, 60, 70)),
    "wide blur": (lambda x: steps.gaussian_blur(x, [23, 23], [5.0, 5.0]), (3, 90, 100)),
    "down by 8, bicubic": (v2.Compose([v2.Resize((30, 40), BICUBIC), v2.Grayscale()]), (3, 240, 320)),
    "up": (v2.Resize((90, 100)), (3, 20, 30)),
    "rolled around": (lambda x: steps.gaussian_blur(x.roll(5, -1), [3, 3], [1.0, 1.0]).roll(-9, -2), (3, 60, 70)),
    "one channel in": (v2.Resize((10, 10)), (1, 30, 30)),
    "five channels in": (lambda x: x[:, [4, 0, 2]].flip(-1), (5, 30, 30)),
    "two out of three": (lambda x: x[:, 1:], (3, 30, 30)),
    "single images": (lambda x: steps.resize(x, [9, 8]) if x.ndim == 3 else 1 / 0, (3, 30, 30)),
    "kornia": (kornia.augmentation.Normalize(torch.tensor([0.5] * 3), torch.tensor([0.2] * 3)), (3, 20, 24)),
    "kornia, many": (
        lambda x: kornia.filters.gaussian_blur2d(
            kornia.geometry.transform.hflip(kornia.color.rgb_to_bgr(kornia.geometry.transform.resize(x, (12, 14)))),
            (3, 3), (1.0, 1.0),
        ), (3, 40, 50),
    ),
    "always flips": (v2.RandomHorizontalFlip(1.0), (3, 20, 24)),
    "float64 inside": (lambda x: x.double().flip(-1).float(), (3, 20, 24)),
}  # fmt: skip


@pytest.mark.parametrize("name", FITTING)
def test_what_fits_comes_out(name):
    transform, shape = FITTING[name]
    separable = identify(transform, shape)
    assert separable.probes <= MAX_PROBES
    if name != "single images":
        assert_equal(transform, separable)


@pytest.mark.parametrize("after", [None, NORMALIZE])
def test_what_is_clamped_is_clamped_in_each_channel(after):
    def transform(images):
        clamped = steps.resize(images, [20, 24], interpolation=BICUBIC).clamp(0, 1)
        return clamped if after is None else after(clamped)

    separable = identify(transform, (3, 40, 50))
    assert separable.clamps and separable.bounds.isfinite().all()
    speckles = (noise(4, 3, 40, 50) > 0.5).float()
    assert (separable(speckles) - transform(speckles)).abs().max() < 5e-5


def test_one_side_may_be_clamped():
    separable = identify(lambda x: (1.2 * x - 0.1).clamp_min(0), (3, 20, 24))
    assert separable.bounds[0].eq(0).all() and separable.bounds[1].isinf().all()


def test_the_global_generators_are_used_by_nobody_but_the_pipeline():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    identify(lambda x: x.flip(-1), (3, 20, 24))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()


# What is really called works on bytes


@pytest.mark.parametrize("form", ["uint8", "pil"])
@pytest.mark.parametrize(("filter", "most"), [(v2.InterpolationMode.BILINEAR, 1.01), (BICUBIC, 6)])
@pytest.mark.parametrize("normalized", [False, True])
def test_rounding_is_measured_in_grey_levels(form, filter, most, normalized):
    after = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), NORMALIZE] if normalized else []
    transform = v2.Compose([v2.Resize((20, 24), filter), *after])
    separable = identify(transform, (3, 50, 60), form=form)
    assert separable.verdict == "exact up to rounding" and separable.rounding.form == form
    assert 0.1 < separable.rounding.mean_levels < 0.5 < separable.rounding.max_levels <= most
    assert separable.clamps is (filter is BICUBIC)


def test_a_bicubic_resize_of_large_bytes_is_accepted():
    """Between its passes it saturates, on noise by more than the limit; photographs are compared."""
    assert 2 < identify(v2.Resize((256, 341), BICUBIC), (3, 375, 500), form="uint8").rounding.max_levels <= 6


def test_rounding_beyond_the_limit_is_refused():
    refusal = refused(v2.Resize((20, 24)), (3, 50, 60), form="uint8", max_levels=0.2)
    assert refusal.reason == "rounding" and "accepted: 0.2" in str(refusal)
    transform = v2.Compose([lambda x: x // 2 * 2 if x.dtype == torch.uint8 else x, v2.Resize((20, 24))])
    assert refused(transform, (3, 50, 60), form="uint8", max_levels=0.9).reason == "rounding"


# Everything else


def in_place(images):
    return images.mul_(0.5)


def counted(images, calls=[0]):  # noqa: B006
    calls[0] += 1
    return images * calls[0]


def slow(images):
    time.sleep(2.5)
    return images


def different(images):
    return images if images.shape[0] == 1 else images[1:]


HOSTILE = {
    "posterise": (lambda x: (x * 4).floor() / 4, "not linear"),
    "hue": (lambda x: steps.adjust_hue(x, 0.2), "not linear"),
    "contrast by its own": (lambda x: x / (x.amax((1, 2, 3), keepdim=True) + 0.1), "not linear"),
    "bright and clipped": (lambda x: (1.5 * x).clamp(0, 1), "not linear"),
    "rare kink": (lambda x: torch.where(x > 0.99, 0, x), "not linear"),
    "rotate": (lambda x: steps.rotate(x, 30), "not separable"),
    "image's mean off": (lambda x: x - x.mean((1, 2, 3), keepdim=True), "not separable"),
    "blur of one channel": (
        lambda x: torch.cat([steps.gaussian_blur(x[:, :1], [5, 5]), x[:, 1:]], 1), "not separable"
    ),
    "transposed": (lambda x: x.transpose(-1, -2), "not separable"),
    "jitter": (v2.ColorJitter(0.4), "random"),
    "crop": (v2.RandomCrop(8), "random"),
    "flip": (v2.RandomHorizontalFlip(), "random"),
    "seldom": (v2.RandomHorizontalFlip(0.2), "random"),
    "numpy": (lambda x: x * np.random.rand(), "random"),
    "own generator": (lambda x: x * GENERATOR.random(), "random"),
    "a counter": (counted, "random"),
    "noise": (lambda x: x + 0.1 * torch.randn_like(x), "random"),
    "batch's mean off": (lambda x: x - x.mean(), "batch"),
    "batch norm": (torch.nn.BatchNorm2d(3, affine=False), "batch"),
    "in place": (in_place, "in place"),
    "not a number": (lambda x: x / 0 - x / 0, "not finite"),
    "raises": (lambda x: 1 / 0, "fails"),
    "PIL alone": (v1.Compose([v1.Resize(8), v1.ToTensor()]), "fails"),
    "no callable": (3, "fails"),
    "constant": (torch.zeros_like, "constant"),
    "integers": (lambda x: (x * 255).byte(), "output"),
    "no tensor": (lambda x: x.numpy(), "output"),
    "fewer images": (different, "output"),
    "a number": (lambda x: x.mean((1, 2, 3)), "output"),
    "slow": (slow, "slow"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_does_not_fit_is_refused_with_the_right_reason(name):
    transform, reason = HOSTILE[name]
    assert refused(transform).reason == reason


def test_a_refusal_says_by_how_much_and_where():
    assert "differ by 0.25 of the output's range (channel 0, row" in str(refused(HOSTILE["posterise"][0]))
    assert "by 0." in str(refused(HOSTILE["rotate"][0])) and "(row " in str(refused(HOSTILE["rotate"][0]))
    assert "in place of ToTensor() write v2.ToImage()" in str(refused(HOSTILE["PIL alone"][0]))
    assert "ZeroDivisionError: division by zero" in str(refused(HOSTILE["raises"][0]))


def test_a_filter_wider_than_the_probes_allow_is_refused_and_allowed_more_is_found():
    transform = v2.Compose([v2.Resize((6, 300)), v2.Grayscale()])
    refusal = refused(transform, (3, 300, 300))
    assert refusal.reason == "too wide" and "rows" in str(refusal)
    assert_equal(transform, identify(transform, (3, 300, 300), max_probes=400))


def test_the_fingerprint_tells_pipelines_apart():
    first, again, other = (identify(v2.Resize((n, 10)), (3, 20, 24)).fingerprint for n in (9, 9, 8))
    assert first == again != other


def test_an_image_of_another_size_is_one_line():
    separable = identify(lambda x: x.flip(-1), (3, 20, 24))
    with pytest.raises(ValueError, match=r"expected images of shape \(n, 3, 20, 24\), got \(1, 3, 24, 20\)"):
        separable(torch.zeros(1, 3, 24, 20))
