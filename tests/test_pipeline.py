"""The ground truth against torchvision's transforms, written out here."""

import numpy as np
import pytest
import torch
from conftest import refusal
from torchvision.transforms import v2

from transformnet_lib.errors import ParameterError
from transformnet_lib.pipeline import GRAY_WEIGHTS, MAX_SIZE, Pipeline, to_float


def written_out(images: torch.Tensor, size: tuple[int, int], hflip: bool, vflip: bool) -> torch.Tensor:
    """The transforms as a user of torchvision would write them."""
    flips = [v2.RandomHorizontalFlip(p=1)] * hflip + [v2.RandomVerticalFlip(p=1)] * vflip
    return v2.Compose([v2.Resize(size, antialias=True), v2.Grayscale(), *flips])(images)


def test_the_default_pipeline_is_that_of_the_paper():
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = v2.Grayscale()(v2.Resize((28, 28), antialias=True)(images))
    assert torch.equal(Pipeline()(images), plain[:, :, range(27, -1, -1)][:, :, :, range(27, -1, -1)])
    assert str(Pipeline()) == "resize to 28×28 → grayscale → horizontal flip → vertical flip"


@pytest.mark.parametrize("size", [(28, 28), (16, 16), (20, 12), (1, 5), (48, 40)])
@pytest.mark.parametrize("hflip", [True, False])
@pytest.mark.parametrize("vflip", [True, False])
def test_any_pipeline_equals_torchvisions_transforms(size, hflip, vflip):
    images = torch.rand(3, 3, 32, 36, generator=torch.Generator().manual_seed(0))
    pipeline = Pipeline(size, hflip, vflip)
    assert torch.equal(pipeline(images), written_out(images, size, hflip, vflip))
    assert torch.equal(pipeline(images[0]), written_out(images[0], size, hflip, vflip))
    assert pipeline.flip_axes == {(1, 1): (-1, -2), (1, 0): (-1,), (0, 1): (-2,), (0, 0): ()}[hflip, vflip]
    assert Pipeline(**pipeline.to_dict()) == pipeline


@pytest.mark.parametrize("size", [(28, 28), (20, 12), (1, 5), (48, 40)])
@pytest.mark.parametrize(("hflip", "vflip"), [(True, False), (False, True)])
def test_the_geometry_is_that_of_the_pipeline_before_the_colours_are_mixed(size, hflip, vflip):
    images = torch.rand(3, 3, 32, 36, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pipeline = Pipeline(size, hflip, vflip)
    colours = pipeline.flip(pipeline.resize(images))
    assert torch.equal(v2.Grayscale()(colours), pipeline(images))
    rows, columns = (pipeline.axis_matrix(images.shape[axis], axis, dtype=torch.float64) for axis in (-2, -1))
    torch.testing.assert_close(rows @ images @ columns.T, colours, rtol=0, atol=1e-12)


def test_the_gray_weights_are_those_of_torchvision():
    primaries = torch.eye(3).reshape(3, 3, 1, 1).expand(3, 3, 28, 28)
    gray = Pipeline()(primaries)
    torch.testing.assert_close(gray, torch.tensor(GRAY_WEIGHTS).reshape(3, 1, 1, 1).expand_as(gray), rtol=0, atol=1e-6)


def test_one_number_means_a_square():
    assert Pipeline(20).size == (20, 20)
    assert Pipeline([20, 10]).size == (20, 10)


@pytest.mark.parametrize("size", [0, -1, MAX_SIZE + 1, 28.0, True, None, "28", (28,), (28, 28, 3), (28, 2.5), (0, 28)])
def test_a_size_that_is_none_is_refused(size):
    assert "size: expected one or two whole numbers from 1 to 4096" in refusal(lambda: Pipeline(size), ParameterError)


@pytest.mark.parametrize("name", ["hflip", "vflip"])
def test_a_flip_is_true_or_false(name):
    assert f"{name}: expected True or False, got 1" in refusal(lambda: Pipeline(**{name: 1}), ParameterError)


def test_bytes_become_floats_from_0_to_1_and_floats_stay():
    every = torch.arange(256, dtype=torch.uint8)
    assert to_float(every).dtype == torch.float32
    assert np.array_equal(to_float(every).numpy(), np.arange(256, dtype=np.float32) / np.float32(255))
    assert every[255] == 255  # the given bytes stay as they are
    floats = torch.rand(3)
    assert to_float(floats) is floats
