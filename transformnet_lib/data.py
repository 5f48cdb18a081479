"""Images in: where they come from, how they are held (uint8, once), and the data set made of them.

What it does not do: download anything unless `download_cifar10` is called.
"""

import hashlib
import math
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pooch
import psutil
import torch
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PLANAR_CONFIGURATION, SAMPLEFORMAT, TiffImageFile
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, get_worker_info
from tqdm import tqdm

from .errors import DataError, ParameterError
from .files import check_path
from .pipeline import MAX_SIZE, Pipeline, to_float

# The photographs of the `photos` source, all inside the scikit-image wheel; no photograph is in both splits.
PHOTOS = {
    "train": ("astronaut", "hubble_deep_field", "immunohistochemistry", "retina", "stereo_motorcycle"),
    "test": ("chelsea", "coffee", "rocket"),
}
PHOTO_COUNT = {"train": 50_000, "test": 10_000}  # as many as CIFAR-10 has
PHOTO_SIDE = 32  # pixels
PHOTO_REDUCTIONS = (2, 4, 8)  # a crop shows 64, 128 or 256 pixels of its photograph
PHOTO_MIN_RANGE = 64  # crops whose values span less than this, of 255, are near-constant and skipped

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
# Pillow's names of these. It tells a file's kind by its content, and would start Ghostscript for an EPS named .png.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM")
MAX_PIXELS = 2**26  # of one image file, 67 megapixels; more is refused before it is decoded
MAX_SCANS = 100  # of a progressive JPEG, which usually has ten; each takes the time of a picture, and some bytes

# https://www.cs.toronto.edu/~kriz/cifar.html; the md5 is the one torchvision checks (torchvision/datasets/cifar.py)
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"
CIFAR10_BYTES = 170_498_071  # of the archive
CIFAR10_FOLDER = "cifar-10-batches-py"  # in which the archive unpacks
DOWNLOAD_TIMEOUT = 60  # seconds without a byte

TARGET_BATCH = 2048  # images a step when targets are computed; bounds the float copy to 25 MB for 32×32
FITS = ("none", "crop")


@dataclass(frozen=True)
class Images:
    """The images of one split: `pixels` uint8 `(count, 3, height, width)`, and what they are.

    `source` is the resolved name ("photos", "cifar10", "folder:PATH"); `fingerprint` is the sha256 of the shape and
    the pixels, so that two runs can be told to have used the same images.
    """

    pixels: Tensor
    source: str
    split: str

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(tuple(self.pixels.shape)).encode())
        digest.update(np.ascontiguousarray(self.pixels.numpy()))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.pixels)


def load_images(
    data: str = "auto",
    *,
    train: bool,
    data_path: str | Path = "data",
    limit: int | None = None,
    fit: str = "none",
    image_size: int | None = None,
) -> Images:
    """Load one split of an image source.

    `data` is "photos", "cifar10" (in `data_path`), "folder:PATH" or "auto": CIFAR-10 if it lies in `data_path`, else
    photos. `limit` keeps the first so many images of a seeded permutation, the same for every run. With `fit="crop"`
    the images of a folder are centre-cropped and resized to `image_size` pixels a side (default: the shorter side of
    the split's first; a run's test images take the size of its training images).
    Raises DataError for images that are missing or not usable, ParameterError for a parameter that is not.
    """
    if type(train) is not bool:
        raise ParameterError(f"train: expected True or False, got {train!r}")
    split = "train" if train else "test"
    source = _checked_source(data, data_path, limit=limit, fit=fit, image_size=image_size)
    if source.startswith("folder:"):
        pixels = _folder(Path(source.removeprefix("folder:")), split, limit, fit, image_size)
    else:
        every = _cifar10(Path(data_path), train) if source == "cifar10" else _photos(split)
        pixels = every[_chosen(len(every), limit)] if limit else every
    return Images(pixels, source, split)


def resolve_source(data: str, data_path: str | Path = "data") -> str:
    """Return `data` with "auto" decided: "cifar10" if it lies in `data_path`, else "photos"."""
    if not isinstance(data_path, str | Path):
        raise ParameterError(f"data_path: expected the path of a folder, got {data_path!r}")
    check_path("data_path", data_path)
    if data == "auto":
        return "cifar10" if (Path(data_path) / CIFAR10_FOLDER).is_dir() else "photos"
    if data not in ("photos", "cifar10") and not (isinstance(data, str) and data.startswith("folder:")):
        raise ParameterError(f"data: expected auto, photos, cifar10 or folder:PATH, got {data!r}")
    check_path("data", data.removeprefix("folder:"))
    return data


def check_limit(limit: int | None) -> None:
    """ParameterError unless `limit` is None or a whole number from 1."""
    if limit is not None and (type(limit) is not int or not 1 <= limit < 2**63):
        raise ParameterError(f"limit: expected a whole number from 1, or none for all images, got {limit!r}")


def check_source(data: str = "auto", data_path: str | Path = "data", **options) -> None:
    """Raise what `load_images` would of its parameters and of splits that are not there, without reading an image."""
    source = _checked_source(data, data_path, **options)
    if source.startswith("folder:"):
        for split in ("train", "test"):
            _split_folder(Path(source.removeprefix("folder:")), split)
    if source == "cifar10" and not (Path(data_path) / CIFAR10_FOLDER).is_dir():
        raise _no_cifar10(Path(data_path), "is not there")


def _checked_source(
    data: str, data_path: str | Path, *, limit: int | None = None, fit: str = "none", image_size: int | None = None
) -> str:
    """The source as `resolve_source` gives it, if the parameters fit it and each other."""
    check_limit(limit)
    if image_size is not None and not (type(image_size) is int and 1 <= image_size <= MAX_SIZE):
        raise ParameterError(f"image_size: expected a whole number from 1 to {MAX_SIZE}, or none, got {image_size!r}")
    if fit not in FITS:
        raise ParameterError(f"fit: expected one of {', '.join(FITS)}, got {fit!r}")
    source = resolve_source(data, data_path)
    if fit != "none" and not source.startswith("folder:"):
        raise ParameterError(f"fit: only for images of a folder, whose sizes may differ; {source} needs none")
    if image_size is not None and fit == "none":
        raise ParameterError(f'image_size: only with fit="crop", got {image_size} with fit="none"')
    return source


def _split_folder(root: Path, split: str) -> Path:
    """The folder of one split; DataError if it is not there, or not below `root`."""
    if not (root / split).is_dir():
        missing = f"has no folder {split}/" if root.is_dir() else "is not a folder"
        raise DataError(f"folder:{root}: {root} {missing}; expected {root}/train/ and {root}/test/ with images in them")
    _refuse_if_outside(root / split, root.resolve())
    return root / split


def image_files(folder: Path, root: Path | None = None) -> Iterator[Path]:
    """The image files below `folder`, in a fixed order, without holding more names than one directory has.

    Files count by the ends of their names (`IMAGE_SUFFIXES`). A link to a file is followed if it stays below `root`
    (default: `folder`). DataError for one that does not, for a link to a folder, for an image that is no file (a pipe,
    a device, a link to nothing) and for a folder that cannot be read: nothing is left out in silence.
    """
    inside = (root or folder).resolve()
    for parent, directories, names in os.walk(folder, onerror=_refuse_unreadable):
        directories.sort()
        for path in (Path(parent, name) for name in directories):
            if path.is_symlink():
                raise DataError(f"{path}: a link to a folder, which is not followed; put the folder in its place")
        for path in (Path(parent, name) for name in sorted(names)):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                _refuse_if_outside(path, inside)
                if not path.is_file():
                    raise DataError(f"{path}: expected an image file, got something else; take it out of the folder")
                yield path


def _refuse_if_outside(path: Path, inside: Path) -> None:
    if not path.is_symlink():
        return
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # it leads to itself; what is raised then depends on Python's version
        raise DataError(f"{path}: a link that leads to itself; put an image in its place") from error
    if not target.is_relative_to(inside):
        raise DataError(f"{path}: a link that leaves {inside}, to {target}; put what it leads to in its place")


def _refuse_unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _chosen(count: int, limit: int | None) -> np.ndarray:
    """Indices of the images kept: all, or the first `limit` of a seeded permutation."""
    return np.arange(count) if limit is None else np.random.RandomState(0).permutation(count)[:limit]


def _photos(split: str) -> Tensor:
    """Cut the split's photographs into crops, the same bytes on every machine.

    Only integer arithmetic (Pillow's box reduction) and NumPy's frozen `RandomState` stream take part.
    """
    import skimage.data  # here, since no other source needs it and its import takes 0.3 s

    names = PHOTOS[split]
    rng = np.random.RandomState(0)
    crops = []
    for i, name in enumerate(names):
        photo = getattr(skimage.data, name)()
        photo = photo[0] if isinstance(photo, tuple) else photo  # the stereo pair: its left image
        windows = []
        for factor in PHOTO_REDUCTIONS:
            small = np.asarray(Image.fromarray(photo).reduce(factor))
            view = np.lib.stride_tricks.sliding_window_view(small, (PHOTO_SIDE, PHOTO_SIDE), axis=(0, 1))
            step = max(1, 4 // factor)  # 4 pixels of the photograph between neighbours where that can be had
            windows.append(view[::step, ::step])
        counts = [view.shape[0] * view.shape[1] for view in windows]
        quota = PHOTO_COUNT[split] * (i + 1) // len(names) - PHOTO_COUNT[split] * i // len(names)
        chosen = rng.permutation(sum(counts))[: 3 * quota // 2]  # a few of which will be near-constant
        level = np.searchsorted(np.cumsum(counts), chosen, side="right")
        candidates = np.empty((len(chosen), 3, PHOTO_SIDE, PHOTO_SIDE), np.uint8)
        for k, view in enumerate(windows):
            position = chosen[level == k] - sum(counts[:k])
            candidates[level == k] = view[np.unravel_index(position, view.shape[:2])]
        spans = np.ptp(candidates.reshape(len(candidates), -1), axis=1)
        crops.append(candidates[spans >= PHOTO_MIN_RANGE][:quota])
    return torch.from_numpy(np.concatenate(crops)[rng.permutation(PHOTO_COUNT[split])])


def _cifar10(data_path: Path, train: bool) -> Tensor:
    """CIFAR-10 as torchvision reads it; every file's md5 is checked before it is unpickled."""
    from torchvision.datasets import CIFAR10  # here, since its import takes longer than any other and few need it

    try:
        dataset = CIFAR10(data_path, train=train, download=False)
    except (RuntimeError, OSError) as error:
        there = (data_path / CIFAR10_FOLDER).is_dir()
        state = "is damaged or incomplete (an md5 differs)" if there else "is not there"
        raise _no_cifar10(data_path, state) from error
    return torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()


def _no_cifar10(data_path: Path, state: str) -> DataError:
    return DataError(
        f"CIFAR-10: {data_path / CIFAR10_FOLDER} {state}; get it with `transformnet data cifar10 --data-path "
        f"{data_path}`, or use data=photos"
    )


def download_cifar10(data_path: str | Path = "data") -> Path:
    """Download CIFAR-10 (170 MB) into `data_path`, check its hash, unpack it, and return its folder.

    Does nothing if it is there already. The archive, and then each file of it, takes its name when it is whole; the
    hash is checked before anything is unpacked. Raises DataError if the download fails or its hash differs.
    """
    check_path("data_path", data_path)
    folder = Path(data_path) / CIFAR10_FOLDER
    with suppress(DataError):
        _cifar10(Path(data_path), train=True)
        return folder
    kept = Path(data_path) / Path(CIFAR10_URL).name
    if kept.exists() and not kept.is_file():  # a pipe would be waited for
        raise DataError(f"{kept}: expected a file, got something else; remove it")
    for place in (Path(data_path), folder):  # before an hour of downloading
        if os.path.lexists(place) and (not place.is_dir() or (place == folder and place.is_symlink())):
            raise DataError(f"{place}: expected a folder, got something else; remove it, or take another --data-path")
    responses = []  # pooch leaves that of a failed download open
    bar = tqdm(
        total=CIFAR10_BYTES, unit="B", unit_scale=True, leave=False
    )  # pooch's own would stay, and be drawn again after an error

    def watch(response, **_) -> None:
        responses.append(response)
        chunks = response.iter_content
        response.iter_content = lambda chunk_size: _no_more_than_the_archive(chunks(chunk_size))

    try:
        archive = pooch.retrieve(
            CIFAR10_URL,
            known_hash=f"md5:{CIFAR10_MD5}",
            path=data_path,
            fname=kept.name,
            downloader=pooch.HTTPDownloader(
                progressbar=bar,
                timeout=DOWNLOAD_TIMEOUT,
                headers={"Accept-Encoding": "identity"},
                hooks={"response": watch},
            ),
        )
        with tempfile.TemporaryDirectory(dir=data_path, prefix=".unpacked-") as beside:
            # Not as `processor`: that skips an archive kept
            pooch.Untar(extract_dir=Path(beside).name)(archive, "download", None)
            folder.mkdir(exist_ok=True)
            for file in Path(beside, CIFAR10_FOLDER).iterdir():
                file.replace(folder / file.name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; pooch says ValueError for a wrong hash
        reason: BaseException = error
        while reason.__context__ is not None:  # requests wraps urllib3's error, and that the system's, in long texts
            reason = reason.__context__
        raise DataError(
            f"CIFAR-10: download from {CIFAR10_URL} failed: {reason}; try again, or use data=photos"
        ) from error
    finally:
        bar.close()
        for response in responses:
            response.close()
    _cifar10(Path(data_path), train=True)
    return folder


def _no_more_than_the_archive(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Pass on what comes, unpacked if the server packed it; ValueError once it is more than the archive."""
    count = 0
    for chunk in chunks:
        count += len(chunk)
        if count > CIFAR10_BYTES:
            raise ValueError(f"the server sent more than the archive's {CIFAR10_BYTES:,} bytes")
        yield chunk


def _folder(root: Path, split: str, limit: int | None, fit: str, image_size: int | None) -> Tensor:
    """Images below `root/split`, sorted by path, decoded to RGB by Pillow."""
    folder = _split_folder(root, split)
    files = sorted(image_files(folder, root))
    if not files:
        raise DataError(f"folder:{root}: no images in {folder}; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    files = [files[i] for i in _chosen(len(files), limit)]
    first = decode_image(files[0])
    side = image_size or min(first.shape[1:])
    shape = first.shape if fit == "none" else (3, side, side)
    needed, free = len(files) * math.prod(shape), psutil.virtual_memory().available
    if needed > free:
        raise DataError(
            f"folder:{root}: {len(files):,} images of {shape[2]}×{shape[1]} pixels need {needed / 1e9:.1f} GB of "
            f'memory, {free / 1e9:.1f} GB are free; use limit, or fit="crop" with a small image_size'
        )
    pixels = np.empty((len(files), *shape), np.uint8)

    def load(i: int) -> None:
        image = decode_image(files[i], side if fit == "crop" else None)
        if image.shape != shape:
            raise DataError(
                f"{files[i]}: expected {shape[2]}×{shape[1]} pixels like {files[0]}, got "
                f'{image.shape[2]}×{image.shape[1]}; make the sizes equal or use fit="crop" (--fit crop)'
            )
        pixels[i] = image

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the GIL
        for _ in pool.map(load, range(len(files))):
            pass
    return torch.from_numpy(pixels)


def decode_image(path: Path, crop_to: int | None = None) -> np.ndarray:
    """Read one image file as uint8 RGB `(3, height, width)`, centre-cropped and resized to `crop_to` if given.

    What a file is, its content says, not its name. Grey, palette, CMYK and YCbCr become RGB; alpha is dropped, the
    colours under it stay; of an animation or several pages the first counts; 16-bit colours are brought to 8 bits; the
    orientation in EXIF is not applied. DataError, naming the file, for 16-bit and float grey without alpha, for more
    than `MAX_PIXELS` or `MAX_SCANS` (before anything is decoded), for a kind that is none of `IMAGE_FORMATS` and for
    what is damaged.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{path}: {image.width}×{image.height} pixels are more than {MAX_PIXELS:,} in all")
            if image.format in ("JPEG", "MPO") and _scans(image) > MAX_SCANS:
                raise DataError(f"{path}: a JPEG of more than {MAX_SCANS} scans; save it anew")
            if image.mode.startswith(("I", "F")):  # Pillow would clip these to black and white
                raise DataError(f"{path}: expected 8 bits a channel, got Pillow's mode {image.mode}; save it with 8")
            if image.format == "TIFF" and _misread(image):
                raise DataError(
                    f"{path}: a TIFF of a kind that Pillow misreads; save it with unsigned 8 bits a channel"
                )
            image.info.pop("transparency", None)  # of a palette; Pillow would warn that RGB drops it
            rgb = image.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds
        raise DataError(f"{path}: not a readable image ({type(error).__name__}: {error})") from error
    if crop_to is not None:
        side = min(rgb.size)
        left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
        rgb = rgb.resize((crop_to, crop_to), Image.Resampling.BOX, box=(left, top, left + side, top + side))
    return np.asarray(rgb).transpose(2, 0, 1)


def _misread(image: TiffImageFile) -> bool:
    """Whether a TIFF holds signed samples, or 16-bit ones in planes: Pillow takes both for others, without a word."""
    signed, planes = (image.tag_v2.get(tag) for tag in (SAMPLEFORMAT, PLANAR_CONFIGURATION))
    return 2 in (signed or ()) or (planes == 2 and max(image.tag_v2.get(BITSPERSAMPLE, (8,))) > 8)


def _scans(image: Image.Image) -> int:
    """How many times a JPEG goes over its picture; each scan begins with a marker that no compressed data can hold."""
    image.fp.seek(0)
    return sum(chunk.count(b"\xff\xda") for chunk in iter(lambda: image.fp.read(2**20), b""))


def _absolute(source: str) -> str:
    """A folder source by its absolute path, to be found from any working directory; others as they are."""
    kind, _, path = source.partition(":")
    return f"{kind}:{Path(path).resolve()}" if kind == "folder" else source


class CustomDataset(Dataset):
    """Pairs of an image and what the pipeline makes of it, as the assignment gives them.

    `dataset[i]` is `(image, target)`: float32 in [0, 1], `(3, height, width)` and `(1, *pipeline.size)`. Images are
    held once, as uint8 (`dataset.images`). With `cache` the targets are computed once, in batches, and held as float32
    (`dataset.targets`, 157 MB for 50,000); without, one by one when asked for. The other parameters are those of
    `load_images`.
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
        loaded = load_images(data, train=train, data_path=data_path, limit=limit, fit=fit, image_size=image_size)
        # What was asked for, so that a run can load its other split
        self.request = {
            "data": _absolute(loaded.source),
            "data_path": str(data_path),
            "limit": limit,
            "fit": fit,
            "image_size": loaded.pixels.shape[-1] if fit == "crop" else None,  # also where it was the first image's
        }
        self.source, self.split = loaded.source, loaded.split
        self.images = loaded.pixels
        self.pipeline = pipeline or Pipeline()
        self.targets = self.compute_targets() if cache else None

    @property
    def fingerprint(self) -> str:
        """The sha256 of the images as they are now, so that a run notices if somebody changed them."""
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
    """Shuffle range(count) with its own generator and part it into training and validation indices.

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
