"""The data set of image and target pairs, its split, and a loader that fetches whole batches."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, get_worker_info

from .errors import DataError, ParameterError
from .images import Images, load_images
from .pipeline import Pipeline, to_float

TARGET_BATCH = 2048  # images a step when targets are computed; bounds the float copy to 25 MB for 32×32


def _absolute(source: str) -> str:
    """A folder source with its absolute path, valid in any working directory; others as they are."""
    kind, _, path = source.partition(":")
    return f"{kind}:{Path(path).resolve()}" if kind == "folder" else source


class CustomDataset(Dataset):
    """Pairs of an image and the pipeline's output for it.

    `dataset[i]` is `(image, target)`: float32 in [0, 1], `(3, height, width)` and `(1, *pipeline.size)`. Images are
    held once, as uint8 (`dataset.images`). With `cache` the targets are computed once, in batches, and held as float32
    (`dataset.targets`, 157 MB for 50,000); without it each is computed when its pair is asked for. The other parameters
    are those of `load_images`.
    """

    def __init__(
        self,
        data_path: str | Path = "data",
        train: bool = True,
        cache: bool = True,
        *,
        data: str = "auto",
        limit: int | None = None,
        fit: str = "none",
        image_size: int | None = None,
        pipeline: Pipeline | None = None,
    ):
        if type(cache) is not bool:
            raise ParameterError(f"cache: expected True or False, got {cache!r}")
        images = load_images(data, train=train, data_path=data_path, limit=limit, fit=fit, image_size=image_size)
        # What was asked for, from which a run loads its other split
        self.request = {
            "data": _absolute(images.source),
            "data_path": str(data_path),
            "limit": limit,
            "fit": fit,
            "image_size": images.pixels.shape[-1] if fit == "crop" else None,  # also where it was the first image's
        }
        self.source, self.split = images.source, images.split
        self.images = images.pixels
        self.pipeline = pipeline or Pipeline()
        self.targets = self.compute_targets() if cache else None

    @property
    def fingerprint(self) -> str:
        """The sha256 of the images as they are now: a run notices if somebody changed them."""
        return Images(self.images, self.source, self.split).fingerprint

    def compute_targets(self) -> Tensor:
        """The pipeline's output for every image, float32 `(count, 1, *pipeline.size)` in [0, 1]."""
        return torch.cat([self.pipeline(to_float(chunk)) for chunk in self.images.split(TARGET_BATCH)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image = to_float(self.images[i])
        return image, self.pipeline(image) if self.targets is None else self.targets[i]


def check_pairs(dataset: CustomDataset) -> None:
    """Raise DataError, naming the image, unless `dataset` holds images in [0, 1] and finite targets of their shape.

    What `load_images` gives always passes; a subclass, or tensors set by hand, may not.
    """
    images, targets = dataset.images, dataset.targets
    if images.ndim != 4 or images.shape[1] != 3:
        raise DataError(f"images: expected shape (count, 3, height, width), got {tuple(images.shape)}")
    if images.dtype != torch.uint8:
        if not images.is_floating_point():
            raise DataError(f"images: expected uint8, or floats in [0, 1], got {_dtype(images)}")
        _refuse_outside("image", images)
    if targets is not None:
        shape = (len(images), 1, *dataset.pipeline.size)
        if targets.shape != shape or targets.dtype != torch.float32:
            raise DataError(f"targets: expected float32 {shape}, got {_dtype(targets)} {tuple(targets.shape)}")
        _refuse_outside("target", targets)


def _refuse_outside(what: str, values: Tensor) -> None:
    for start in range(0, len(values), TARGET_BATCH):
        flat = values[start : start + TARGET_BATCH].flatten(1)
        wrong = ~((flat >= 0) & (flat <= 1))  # NaN is neither
        if wrong.any():
            i = wrong.any(1).nonzero()[0].item()
            raise DataError(f"{what} {start + i}: expected values from 0 to 1, got {flat[i][wrong[i]][0].item()}")


def _dtype(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def split_indices(count: int, *, val_fraction: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Shuffle range(count) with its own generator and split it into training and validation indices.

    >>> [len(part) for part in split_indices(50_000)]
    [45000, 5000]
    """
    val_count = round(count * val_fraction)
    if not 1 <= val_count < count:
        raise ParameterError(
            f"expected at least one training and one validation image, got {count} images in all, of which "
            f"{val_fraction:.0%} are to validate; take more images"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[val_count:], order[:val_count]


class BatchIndices(Sampler[slice | Tensor]):
    """What to fetch for each batch of `count` rows: slices in order, or with `shuffle` the parts of a permutation.

    Each pass draws a new permutation from `generator`. Each row is in exactly one batch; `drop_last` leaves out a last
    batch that is smaller than the others.
    """

    def __init__(self, count: int, *, batch_size: int, shuffle: bool, drop_last: bool, generator: torch.Generator):
        if type(batch_size) is not int or batch_size < 1:
            raise ParameterError(f"batch_size: expected a whole number from 1, got {batch_size!r}")
        self.batch_size, self.shuffle, self.generator = batch_size, shuffle, generator
        self.used = count - count % batch_size if drop_last else count
        self.count = count

    def __len__(self) -> int:
        return -(-self.used // self.batch_size)

    def __iter__(self) -> Iterator[slice | Tensor]:
        if self.shuffle and self.used:  # what is split is never empty: it would give one empty batch
            # The whole set is permuted before the rest is dropped, so that each pass drops other rows.
            yield from torch.randperm(self.count, generator=self.generator)[: self.used].split(self.batch_size)
        else:
            for start in range(0, self.used, self.batch_size):
                yield slice(start, min(start + self.batch_size, self.used))


class BatchDataset(TensorDataset):
    """Tensors of equal length from which a whole batch is fetched at once, by a slice or an index tensor (n,).

    Returns a tuple of the tensors' rows. Those of a slice are views, so they must not be changed in place.
    """

    def __getitem__(self, index: slice | Tensor) -> tuple[Tensor, ...]:
        if isinstance(index, Tensor):  # index_select takes a quarter of tensor[index]'s time
            return tuple([tensor.index_select(0, index) for tensor in self.tensors])
        rows = tuple([tensor[index] for tensor in self.tensors])
        # A worker would send a view with all of its tensor behind it.
        return rows if get_worker_info() is None else tuple([tensor.clone() for tensor in rows])


def batch_loader(
    *tensors: Tensor,
    batch_size: int,
    shuffle: bool = False,
    drop_last: bool = False,
    seed: int = 0,
    num_workers: int = 0,
    **options,
) -> DataLoader:
    """A DataLoader over tensors of equal length (count, …) that fetches a batch in one step, not row by row.

    Gives a tuple of the tensors' rows for each batch, as `DataLoader(TensorDataset(*tensors), …)` does, many times
    faster: it costs little more than copying the rows. Shuffling draws from a generator of the loader's own, seeded
    with `seed`; the order differs from pass to pass. Without `shuffle` and workers the rows are views of the tensors:
    don't change them in place. `options` (`pin_memory`, …) are DataLoader's.
    Raises ParameterError if the tensors' lengths differ, or a number is out of range.

    >>> images, targets = torch.zeros(10, 3, 32, 32, dtype=torch.uint8), torch.zeros(10, 1, 28, 28)
    >>> [len(image) for image, target in batch_loader(images, targets, batch_size=4, shuffle=True)]
    [4, 4, 2]
    """
    lengths = [len(tensor) for tensor in tensors]
    if not lengths or len(set(lengths)) > 1:
        raise ParameterError(f"expected tensors of equal length, got {', '.join(map(str, lengths)) or 'none'}")
    if type(num_workers) is not int or num_workers < 0:
        raise ParameterError(f"num_workers: expected a whole number from 0, got {num_workers!r}")
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        BatchDataset(*tensors),
        sampler=BatchIndices(
            lengths[0], batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, generator=generator
        ),
        batch_size=None,  # the sampler makes the batches
        collate_fn=tuple,  # which leaves a tuple as it is
        num_workers=num_workers,
        generator=generator,
        **options,
    )
