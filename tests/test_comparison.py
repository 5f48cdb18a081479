import numpy as np
import pytest
import torch

from transformnet_lib import TransformNet
from transformnet_lib.comparison import compare, metrics
from transformnet_lib.errors import ParameterError
from transformnet_lib.figures import error_scale


def test_metrics_of_a_known_error():
    target = np.linspace(0, 0.5, 28 * 28).reshape(28, 28)
    found = metrics(target, target + 0.1)
    assert found["mse"] == pytest.approx(0.01)
    assert found["psnr_db"] == pytest.approx(20)
    assert found["max_error"] == pytest.approx(0.1)
    assert 0 < found["ssim"] < 1


def test_equal_images_have_infinite_psnr_and_ssim_1():
    target = np.random.default_rng(0).random((28, 28))
    assert metrics(target, target.copy()) == {"mse": 0, "psnr_db": np.inf, "ssim": 1, "max_error": 0}


@pytest.mark.parametrize(("side", "defined"), [(2, False), (3, True), (6, True)])
def test_small_images_have_ssim_where_it_is_defined(side, defined):
    target = np.random.default_rng(0).random((side, side))
    assert np.isfinite(metrics(target, 1 - target)["ssim"]) == defined


def test_examples_are_the_images_asked_for(test_set):
    model = TransformNet()
    examples, totals = compare(model, test_set, [4, 2], device="cpu")
    images, targets = (torch.stack(part) for part in zip(*(test_set[i] for i in (4, 2)), strict=True))
    assert examples["inputs"].dtype == np.uint8
    np.testing.assert_array_equal(examples["inputs"], (images * 255).round().byte().numpy())
    np.testing.assert_array_equal(examples["targets"], targets.numpy())
    np.testing.assert_allclose(examples["outputs"], model(images).detach().numpy(), atol=1e-6)
    everything = torch.stack([test_set[i][0] for i in range(len(test_set))])
    errors = model(everything).detach() - test_set.targets
    assert totals["test_mse"] == pytest.approx(errors.square().mean().item(), rel=1e-5)
    assert totals["max_error"] == pytest.approx(errors.abs().max().item(), rel=1e-5)


@pytest.mark.parametrize("indices", [0, [-1], [600], [0.5], ["0"], 3])
def test_indices_that_are_no_test_images_are_refused(test_set, indices):
    with pytest.raises(ParameterError, match="indices: expected a list of whole numbers from 0 to 599"):
        compare(TransformNet(), test_set, indices)


@pytest.mark.parametrize(("largest", "scale"), [(0.034, 0.04), (0.05, 0.05), (1e-8, 1e-8), (0.91, 1.0), (0.0, 1.0)])
def test_the_error_scale_is_the_largest_error_rounded_up(largest, scale):
    assert error_scale(np.array([[-largest, largest / 2]])) == pytest.approx(scale)
