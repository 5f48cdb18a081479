"""The yardstick for training: the weights that minimise the MSE, in closed form, without any training."""

import time
from dataclasses import dataclass

import torch

from .dataset import CustomDataset, split_indices
from .errors import DataError
from .pipeline import GRAY_WEIGHTS
from .resized import CHUNK, ResizedImages

MIN_COLOUR = 1e-9  # least ratio of the smallest to the largest eigenvalue of E[x xᵀ]; below it, no colour


@dataclass(frozen=True)
class LeastSquares:
    """The optimum `weights` (red, green, blue) and how well the images determine it."""

    weights: tuple[float, float, float]
    condition: float  # of E[x xᵀ]: its largest eigenvalue over its smallest; 1 were the colours not correlated
    val_mse: float  # of `weights`, over the validation images
    truth_val_mse: float  # of the ground truth's own weights, `GRAY_WEIGHTS`, over the same: what rounding leaves
    images: int  # training images the weights come from
    seconds: float


def least_squares(dataset: CustomDataset, *, val_fraction: float = 0.1, seed: int = 0) -> LeastSquares:
    """The weights w that minimise E[(wᵀx - y)²] over the training images: E[x xᵀ] w = E[x y], the normal equations.

    x are an image's colours after resize and flips, y its target. The images are parted as for a training with the same
    `val_fraction` and `seed`: the weights come from its training images, `val_mse` from its validation images. Each
    image is gone through once, in chunks, so the data may be of any size. The clamp is left out of the minimisation:
    targets lie in [0, 1], so near the optimum it does nothing.
    Raises DataError where the colours do not determine three weights.
    """
    return least_squares_of(
        ResizedImages(dataset, torch.device("cpu"), keep=False), val_fraction=val_fraction, seed=seed
    )


def least_squares_of(resized: ResizedImages, *, val_fraction: float = 0.1, seed: int = 0) -> LeastSquares:
    """As `least_squares`, of images that are resized already."""
    start = time.perf_counter()
    train, val = split_indices(len(resized.dataset), val_fraction=val_fraction, seed=seed)
    moments = resized.moments(train)
    colours, products = moments[:3, :3], moments[:3, 3]
    condition = condition_number(colours)
    weights = torch.linalg.solve(colours, products)
    weights = tuple(weights.tolist())
    return LeastSquares(
        weights,
        condition,
        val_mse=mse_of(resized, weights, val),
        truth_val_mse=mse_of(resized, GRAY_WEIGHTS, val),
        images=len(train),
        seconds=time.perf_counter() - start,
    )


def condition_number(colours: torch.Tensor) -> float:
    """The largest eigenvalue of E[x xᵀ] over the smallest; DataError if the colours span less than three dimensions."""
    eigenvalues = torch.linalg.eigvalsh(colours)
    if not eigenvalues[0] > MIN_COLOUR * eigenvalues[-1]:
        raise DataError(
            "the training images are grey or of too few colours: red, green and blue cannot be told apart, so no "
            "training can find their weights; use the preset paper, or images in colour"
        )
    return (eigenvalues[-1] / eigenvalues[0]).item()


def mse_of(resized: ResizedImages, weights: tuple[float, float, float], indices: torch.Tensor) -> float:
    """The MSE of the model with these weights over the images at `indices`, summed from the pixels' own errors.

    In float64 on the CPU: from the moments it would be a difference of numbers that agree in all their digits.
    """
    total = 0.0
    for chunk in indices.to(resized.index_device).split(CHUNK):
        values = torch.empty(4, len(chunk) * resized.pixels, device=resized.device)
        resized.gather(chunk, values[:3], values[3])
        values = values.cpu().double()
        errors = (values[:3].mT @ torch.tensor(weights, dtype=torch.float64)).clamp(0, 1) - values[3]
        total += errors.square().sum().item()
    return total / (len(indices) * resized.pixels)
