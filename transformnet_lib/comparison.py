"""Model against ground truth: the compared examples and their metrics."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import skimage
import torch

from .dataset import CustomDataset
from .errors import ParameterError
from .machine import resolve_device
from .model import TransformNet
from .pipeline import to_float

EXAMPLE_ARRAYS = {  # the compared images (n, …): their dtype and rank
    "indices": ("int64", 1),
    "inputs": ("uint8", 4),
    "targets": ("float32", 4),
    "outputs": ("float32", 4),
}
SSIM_WINDOW = 7  # pixels; scikit-image's default, smaller for images that are smaller


def metrics(target: np.ndarray, output: np.ndarray) -> dict[str, float]:
    """How far `output` is from `target`, both float `(height, width)` in [0, 1].

    mse; psnr_db = 10 log10(1 / mse), infinite for equal images; ssim (Wang et al. 2004, uniform window, NaN for images
    under 3 pixels a side); max_error, the largest absolute difference of a pixel.
    """
    mse = float(skimage.metrics.mean_squared_error(target, output))
    window = min(SSIM_WINDOW, *target.shape)
    window -= 1 - window % 2  # odd
    return {
        "mse": mse,
        "psnr_db": float(skimage.metrics.peak_signal_noise_ratio(target, output, data_range=1))
        if mse
        else float("inf"),
        "ssim": float(skimage.metrics.structural_similarity(target, output, data_range=1, win_size=window))
        if window >= 3
        else np.nan,
        "max_error": float(np.abs(target - output).max()),
    }


def metrics_table(examples: dict[str, np.ndarray]) -> pd.DataFrame:
    """One row an example: image (its index) and its metrics."""
    rows = zip(examples["indices"].tolist(), examples["targets"], examples["outputs"], strict=True)
    return pd.DataFrame([{"image": i, **metrics(target[0], output[0])} for i, target, output in rows])


def spread_indices(count: int, shown: int = 5) -> list[int]:
    """Positions of `shown` examples, evenly spread over `count` images: neighbours may be alike, or of one class.

    >>> spread_indices(10_000)
    [0, 2000, 4000, 6000, 8000]
    """
    return sorted({count * i // shown for i in range(shown)})


def check_indices(indices: Sequence[int], count: int) -> list[int]:
    """Return `indices` as a list, without any those of `spread_indices`.

    Raises ParameterError unless all are positions among `count` images.
    """
    listed = list(indices) if isinstance(indices, list | tuple | range) else None
    if listed == []:
        return spread_indices(count)
    if listed is None or any(type(i) is not int or not 0 <= i < count for i in listed):
        raise ParameterError(f"indices: expected a list of whole numbers from 0 to {count - 1}, got {indices!r}")
    return listed


def compare(
    model: TransformNet, dataset: CustomDataset, indices: Sequence[int] = (), *, device: str = "auto"
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Run `model` on all of `dataset`, which must have cached targets.

    Returns the examples at `indices` (arrays as `EXAMPLE_ARRAYS`; without any, those of `spread_indices`) and, over
    all images, test_mse and max_error.
    """
    indices = check_indices(indices, len(dataset))
    where = resolve_device(device)
    model = model.to(where).eval()
    with torch.inference_mode():
        outputs = torch.cat([model(to_float(chunk.to(where))).cpu() for chunk in dataset.images.split(2048)])
    errors = (outputs - dataset.targets).double()
    examples = {
        "indices": np.array(indices),
        "inputs": dataset.images[indices].numpy(),
        "targets": dataset.targets[indices].numpy(),
        "outputs": outputs[indices].numpy(),
    }
    return examples, {"test_mse": errors.square().mean().item(), "max_error": errors.abs().max().item()}
