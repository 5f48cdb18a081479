import pytest
import torch
from torchvision.transforms import v2

from transformnet_lib import GRAY_WEIGHTS, Pipeline, TransformNet
from transformnet_lib.model import seeded_model


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
