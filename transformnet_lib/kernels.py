"""A `Separable` applied on the CPU in one pass: every row and column that counts is read once, and nothing is kept.

A row of the output is the sum of a few rows of the image, and a pixel of it the sum of a few pixels of that: most
entries of the matrices are 0. numba compiles the loops when they are first used, about a second for each dtype, and
keeps them on disk where it may. The loops hold no lock of Python, and a batch is shared out among as many threads as
PyTorch has.
Where numba is not installed, `apply` is the plain form.
"""

import functools
import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .separable import Separable

WIDEST = 96  # entries in a row of a matrix; wider rows are as good as dense, and matrix products do those
FAST_MATH = {"contract", "reassoc", "nsz"}  # sums may be taken in any order; infinite bounds stay infinite


@dataclass(frozen=True, eq=False)
class Bands:
    """A `Separable` as the loops read it: of each row of a matrix its first entry's place and all up to the last."""

    row_first: np.ndarray  # (h,)
    row_taps: np.ndarray  # (h, R)
    left: int  # the first column of the image that is read
    width: int  # columns that are read
    column_first: np.ndarray  # (w,), counted from `left`
    column_taps: np.ndarray  # (T, w)
    mix: np.ndarray  # (K, C)
    offset: np.ndarray  # (K, h, w)
    bounds: np.ndarray  # (2, K)
    clamps: bool

    @classmethod
    def of(cls, separable: Separable) -> "Bands":
        row_first, row_taps = _banded(separable.rows.numpy())
        column_first, column_taps = _banded(separable.columns.numpy())
        left = int(column_first.min())
        return cls(
            row_first=row_first,
            row_taps=row_taps,
            left=left,
            width=int(column_first.max()) + column_taps.shape[1] - left,
            column_first=column_first - left,
            column_taps=np.ascontiguousarray(column_taps.T),
            # Copies: torch moves a tensor that it sends to another process, and a view would stay behind
            mix=separable.mix.numpy().copy(),
            offset=separable.offset.numpy().copy(),
            bounds=separable.bounds.numpy().copy(),
            clamps=separable.clamps,
        )

    @property
    def widest(self) -> int:
        return max(self.row_taps.shape[1], self.column_taps.shape[0])


def _banded(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row the place of its first entry, int64, and as many entries from there on as the widest row has."""
    used = matrix != 0
    some = used.any(1)
    first = np.where(some, used.argmax(1), 0)
    last = np.where(some, matrix.shape[1] - 1 - used[:, ::-1].argmax(1), 0)
    count = int((last - first).max()) + 1
    first = np.minimum(first, matrix.shape[1] - count)
    return first, np.take_along_axis(matrix, first[:, None] + np.arange(count), 1)


def apply(bands: Bands, images: Tensor) -> Tensor:
    """The output (n, K, h, w), float32, for images (n, C, H, W) on the CPU, uint8 or float32 in [0, 1]."""
    loops = _loops()
    images = images.contiguous()
    mix = bands.mix / np.float32(255) if images.dtype == torch.uint8 else bands.mix
    output = torch.empty((len(images), *bands.offset.shape))
    source, target = images.numpy(), output.numpy()

    def work(part: slice) -> None:
        loops(
            source[part], mix, bands.row_first, bands.row_taps, bands.left, bands.width, bands.column_first,
            bands.column_taps, bands.offset, bands.bounds, bands.clamps, target[part],
        )  # fmt: skip

    threads = min(torch.get_num_threads(), len(images))
    if threads <= 1:
        work(slice(None))
    else:
        ends = [len(images) * i // threads for i in range(threads + 1)]
        list(_pool(threads).map(work, map(slice, ends, ends[1:])))
    return output


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="transformnet")


if hasattr(os, "register_at_fork"):  # a child has the pool without its threads, which would never do their work
    os.register_at_fork(after_in_child=_pool.cache_clear)


def available() -> bool:
    """Whether numba is there."""
    return importlib.util.find_spec("numba") is not None


@functools.cache
def _loops():
    """The compiled loops; numba is imported here, since that takes half a second."""
    from numba import njit

    options = {"nogil": True, "fastmath": FAST_MATH, "boundscheck": False}
    try:
        return njit(_separable, cache=True, **options)
    except RuntimeError:  # no folder that may be written to
        return njit(_separable, **options)


def _separable(
    images, mix, row_first, row_taps, left, width, column_first, column_taps, offset, bounds, clamps, output
):
    count, channels = images.shape[:2]
    outputs, height, wide = offset.shape
    early = outputs < channels  # mixed with the rows, there are fewer columns to be done
    lanes = outputs if early else channels
    line = np.empty(width, np.float32)  # one row after the rows' matrix
    pixels = np.empty(wide, np.float32)  # the same after the columns'
    for n in range(count):
        for i in range(height):
            for k in range(outputs):
                for j in range(wide):
                    output[n, k, i, j] = offset[k, i, j]
            for lane in range(lanes):
                for q in range(width):
                    line[q] = 0
                for c in range(channels if early else 1):
                    channel = c if early else lane
                    share = mix[lane, c] if early else np.float32(1)
                    for t in range(row_taps.shape[1]):
                        factor = share * row_taps[i, t]
                        row = images[n, channel, row_first[i] + t]
                        for q in range(width):
                            line[q] += factor * row[left + q]
                for j in range(wide):
                    pixels[j] = column_taps[0, j] * line[column_first[j]]
                for t in range(1, column_taps.shape[0]):
                    for j in range(wide):
                        pixels[j] += column_taps[t, j] * line[column_first[j] + t]
                for k in range(outputs):
                    share = (np.float32(1) if k == lane else np.float32(0)) if early else mix[k, lane]
                    if share != 0:
                        target = output[n, k, i]
                        for j in range(wide):
                            target[j] += share * pixels[j]
            if clamps:
                for k in range(outputs):
                    target = output[n, k, i]
                    for j in range(wide):
                        target[j] = min(max(target[j], bounds[0, k]), bounds[1, k])
