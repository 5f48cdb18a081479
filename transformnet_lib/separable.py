"""A pipeline as four matrices: what `identify` finds a pipeline to be, and what can then be done in its place."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from .errors import ParameterError
from .pipeline import to_float

Form = Literal["float32", "uint8", "pil"]  # of the images that a pipeline is called with


@dataclass(frozen=True)
class Rounding:
    """How far a pipeline, called with images of bytes, is from its own form without rounding, in grey levels.

    A grey level is 1/255 of what a channel of the output ranges over when the image's pixels range over [0, 1].
    """

    form: Form
    max_levels: float
    mean_levels: float
    images: int


@dataclass(frozen=True, eq=False)
class Separable:
    """A pipeline for images (channels C, H, W) as matrices, all float32:

        y[k] = Σ_c mix[k, c] · (rows · x[c] · columnsᵀ) + offset[k],   clamped to bounds[:, k]

    `rows` (h, H), `columns` (w, W), `mix` (K, C), `offset` (K, h, w), `bounds` (2, K), infinite where nothing is
    clamped. `residual` is the largest difference from the pipeline on images that it was not made from, as part of the
    output's range; `probes` how many images were sent through it. `rounding` compares with what is really called, where
    that is not float images.

    Called on images (n, C, H, W), uint8 or float in [0, 1], it gives the output (n, K, h, w), float32, by two matrix
    products a channel: the plain form that faster ones are tested against.
    """

    rows: Tensor
    columns: Tensor
    mix: Tensor
    offset: Tensor
    bounds: Tensor
    residual: float
    probes: int
    rounding: Rounding | None = None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.mix.shape[1], self.rows.shape[1], self.columns.shape[1]

    @property
    def output_shape(self) -> tuple[int, int, int]:
        return tuple(self.offset.shape)

    @property
    def verdict(self) -> Literal["exact", "exact up to rounding"]:
        return "exact" if self.rounding is None else "exact up to rounding"

    @cached_property  # so that a device is waited for once
    def clamps(self) -> bool:
        return bool(self.bounds.isfinite().any())

    @cached_property
    def bias(self) -> Tensor | None:
        """The offset as one number per channel (K,), where it is the same in all pixels, else None."""
        bias = self.offset.mean((1, 2))
        scale = max(1.0, self.offset.abs().max().item())
        return bias if (self.offset - bias[:, None, None]).abs().max() <= 1e-6 * scale else None

    @property
    def fingerprint(self) -> str:
        """The sha256 of the matrices. Those of one pipeline identified on two machines may differ in a last digit."""
        digest = hashlib.sha256()
        for tensor in (self.rows, self.columns, self.mix, self.offset, self.bounds):
            digest.update(repr(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device) -> "Separable":
        """The same with its matrices on `device`."""
        names = ("rows", "columns", "mix", "offset", "bounds")
        moved = replace(self, **{name: getattr(self, name).to(device) for name in names})
        moved.__dict__["clamps"] = self.clamps
        return moved

    def undone(self, outputs: Tensor) -> Tensor:
        """Outputs (n, K, h, w) as pictures in [0, 1]: 0 for what a black image gives in a pixel, 1 for a white one's.

        So Normalize is undone. Where both give the same, as in what was padded, it is 0.
        """
        gain = self.mix.sum(1)[:, None, None] * (self.rows.sum(1)[:, None] * self.columns.sum(1))
        seen = gain.abs() > 1e-6 * gain.abs().max()
        return torch.where(seen, (outputs - self.offset) / gain.where(seen, torch.ones(())), 0.0)

    def __call__(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or tuple(images.shape[1:]) != self.input_shape:
            expected = ", ".join(map(str, self.input_shape))
            raise ParameterError(f"expected images of shape (n, {expected}), got {tuple(images.shape)}")
        x = to_float(images).to(torch.float32)
        rows, columns, mix, offset, bounds = (
            tensor.to(x.device) for tensor in (self.rows, self.columns, self.mix, self.offset, self.bounds)
        )
        early = len(mix) < mix.shape[1]  # fewer channels, less work
        x = mixed(x, mix) if early else x
        y = rows @ x @ columns.T
        y = (y if early else mixed(y, mix)) + offset
        return y.clamp(*bounds[:, :, None, None]) if self.clamps else y

    def __str__(self) -> str:
        shape = "×".join(map(str, self.input_shape)) + " → " + "×".join(map(str, self.output_shape))
        return f"{self.verdict} ({shape}; residual {self.residual:.1e} of the range, {self.probes} probe images)"


def mixed(images: Tensor, mix: Tensor) -> Tensor:
    """The channels of images (n, C, h, w) summed with the weights `mix` (K, C): (n, K, h, w)."""
    return torch.einsum("kc,nchw->nkhw", mix, images)
