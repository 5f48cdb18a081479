import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from transformnet_lib import GRAY_WEIGHTS, Pipeline, TransformNet, model
from transformnet_lib.model import seeded_model
from transformnet_lib.pipeline import to_float


@pytest.fixture
def images():
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def exact(pipeline: Pipeline) -> TransformNet:
    model = TransformNet(pipeline)
    with torch.no_grad():
        model.mix.weight.copy_(torch.tensor(GRAY_WEIGHTS).view(1, 3, 1, 1))
    return model


def test_only_three_weights_are_learned_and_there_is_no_bias():
    assert [tuple(parameter.shape) for parameter in TransformNet().parameters()] == [(1, 3, 1, 1)]


@pytest.mark.parametrize("hflip", [True, False])
@pytest.mark.parametrize("vflip", [True, False])
@pytest.mark.parametrize("size", [(28, 28), (40, 17)])
def test_with_the_right_weights_it_equals_the_pipeline(images, hflip, vflip, size):
    steps = [v2.Resize(size, antialias=True), v2.Grayscale()]
    steps += [v2.RandomHorizontalFlip(p=1)] * hflip + [v2.RandomVerticalFlip(p=1)] * vflip
    expected = v2.Compose(steps)(images)
    output = exact(Pipeline(size=size, hflip=hflip, vflip=vflip))(images)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


def test_output_is_clamped_to_an_image(images):
    model = TransformNet()
    with torch.no_grad():
        model.mix.weight.fill_(5)
        assert model(images).max() == 1
        model.mix.weight.fill_(-5)
        assert model(images).min() == 0


def test_float64_stays_float64(images):
    assert TransformNet().double()(images.double()).dtype == torch.float64


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(3, 32, 32), torch.zeros(2, 1, 32, 32), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)],
)
def test_other_shapes_and_dtypes_are_refused_naming_them(wrong):
    with pytest.raises(ValueError, match=rf"expected float images .* got {str(wrong.dtype)[6:]}"):
        TransformNet()(wrong)


def test_seeded_model_repeats_and_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again, other = (seeded_model(seed).weights for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.rand(3), expected)


# The folded form


def sides(most: int):
    return st.tuples(*[st.integers(2, most)] * 4)


def differs(model: TransformNet, folded, images: torch.Tensor, as_float: torch.Tensor) -> float:
    return (model(as_float) - folded(images)).abs().max().item()


@settings(deadline=None)  # the first example pays for imports
@given(sides(64), st.booleans(), st.booleans(), st.integers(0, 99))
def test_the_folded_model_equals_the_eager_one_and_the_pipeline(sides, hflip, vflip, seed):
    height, width, *size = sides
    model = exact(Pipeline(tuple(size), hflip, vflip)).requires_grad_(False)
    pixels = torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(seed)).byte()
    images = to_float(pixels)
    folded = model.folded()
    assert differs(model, folded, images, images) <= 1e-6
    assert differs(model, folded, pixels, images) <= 1e-6
    assert differs(model.pipeline, folded, pixels, images) <= 1e-6


@settings(deadline=None, max_examples=40)
@given(sides(512), st.booleans(), st.booleans(), st.integers(0, 99))
def test_they_are_equal_for_large_images_and_any_weights(sides, hflip, vflip, seed):
    height, width, *size = sides
    model = seeded_model(seed, Pipeline(tuple(size), hflip, vflip)).double().requires_grad_(False)
    pixels = torch.randint(0, 256, (1, 3, height, width), generator=torch.Generator().manual_seed(seed)).byte()
    images = pixels.double() / 255
    assert differs(model, model.folded(), images, images) <= 1e-6
    assert differs(model, model.folded(), pixels, images) <= 1e-6


@pytest.mark.parametrize(("size", "hflip"), [((28, 28), True), ((28, 32), False), ((32, 32), True)])
def test_the_two_forms_of_the_left_product_agree(images, monkeypatch, size, hflip):
    folded = exact(Pipeline(size, hflip=hflip)).folded()
    expected = folded(images)
    _, right, clips = folded.fold(images)
    left = torch.zeros(size[0], 3 * 32)
    one = folded.fold(images[:1])[0]
    rows = torch.arange(size[0]).repeat_interleave(one["offsets"].diff())
    left[rows, one["input"].long()] = one["per_sample_weights"]
    monkeypatch.setattr(folded, "fold", lambda images: (left, right, clips))  # as on a GPU
    folded.kept.clear()
    torch.testing.assert_close(folded(images), expected, rtol=0, atol=1e-6)


def test_the_folded_output_is_clamped_and_keeps_the_images(images):
    before, pixels = images.clone(), (images * 255).byte()
    model = TransformNet()
    with torch.no_grad():
        model.mix.weight.fill_(5)
        assert model.folded()(images).max() == model.folded()(pixels).max() == 1
        model.mix.weight.fill_(-5)
        assert model.folded()(images).min() == model.folded()(pixels).min() == 0
    assert exact(Pipeline()).folded()(images + 1).max() == 1
    assert torch.equal(images, before)


def test_the_folded_model_needs_no_gradients_and_follows_the_dtype(images):
    assert not TransformNet().folded()(images).requires_grad
    assert TransformNet().double().folded()((images * 255).byte()).dtype == torch.float64


def test_batches_of_any_size_and_layout_are_taken(images):
    folded = TransformNet().folded()
    whole = folded(images)
    assert torch.equal(torch.cat([folded(batch) for batch in images.split(2)]), whole)
    assert torch.equal(folded(images.to(memory_format=torch.channels_last)), whole)
    assert folded(images[:0]).shape == (0, 1, 28, 28)


def test_what_is_kept_is_bounded(images):
    folded = TransformNet().folded()
    for side in range(2, 2 * model.KEPT_SHAPES):
        folded(images[..., :side])
        assert len(folded.kept) <= model.KEPT_SHAPES


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(3, 32, 32), torch.zeros(2, 1, 32, 32), torch.zeros(2, 3, 32, 32, dtype=torch.float64)],
)
def test_the_folded_model_refuses_other_shapes_and_dtypes(wrong):
    with pytest.raises(ValueError, match=rf"expected uint8 or float32 images .* got {str(wrong.dtype)[6:]}"):
        TransformNet().folded()(wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_folded_model_is_the_same_on_cuda(images):
    folded = exact(Pipeline()).folded()
    torch.testing.assert_close(folded(images.cuda()).cpu(), folded(images), rtol=0, atol=1e-6)


def test_a_folded_model_that_was_first_used_without_gradients_can_give_them():
    folded = exact(Pipeline()).folded()
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        folded(images)
    images.requires_grad_()
    folded(images).sum().backward()
    assert images.grad.abs().sum() > 0
