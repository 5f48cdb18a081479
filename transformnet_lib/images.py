"""Images in: `photos` (from scikit-image), CIFAR-10 or a folder of image files, as uint8 `(count, 3, height, width)`.

What it does not do: download anything (see `cifar10.py`).
"""

import hashlib
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PLANAR_CONFIGURATION, SAMPLEFORMAT, TiffImageFile
from torch import Tensor

from .cifar10 import CIFAR10_FOLDER, check_cifar10, read_cifar10
from .errors import DataError, ParameterError
from .files import check_path
from .pipeline import MAX_SIZE

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
# Pillow's names for these. Pillow goes by a file's content, and would start Ghostscript for an EPS file named .png.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM")
MAX_PIXELS = 2**26  # of one image file, 67 megapixels; more is refused before it is decoded
MAX_SCANS = 100  # of a progressive JPEG, which usually has ten; a scan of few bytes takes as long as a whole picture
FITS = ("none", "crop")


@dataclass(frozen=True)
class Images:
    """The images of one split: `pixels` uint8 `(count, 3, height, width)`, and what they are.

    `source` is the resolved name ("photos", "cifar10", "folder:PATH"); `fingerprint` is the sha256 of the shape and
    the pixels: two runs used the same images if theirs are equal.
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


def hashes(pixels: Tensor) -> Tensor:
    """A number per image, equal for equal ones: 8 bytes of BLAKE2 of its pixels, int64 (n,)."""
    digests = (hashlib.blake2b(np.ascontiguousarray(image), digest_size=8).digest() for image in pixels.numpy())
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64)


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

    `data` is "photos", "cifar10" (in `data_path`), "folder:PATH" or "auto": CIFAR-10 if it is in `data_path`, else
    photos. `limit` keeps the first `limit` images of a seeded permutation, the same for every run. With `fit="crop"`
    the images of a folder are centre-cropped and resized to `image_size` pixels a side (default: the shorter side of
    the split's first image; a run's test images take the size of its training images).
    Raises DataError if images are missing or unusable, ParameterError if a parameter is.
    """
    if type(train) is not bool:
        raise ParameterError(f"train: expected True or False, got {train!r}")
    split = "train" if train else "test"
    source = _checked_source(data, data_path, limit=limit, fit=fit, image_size=image_size)
    if source.startswith("folder:"):
        pixels = _folder(Path(source.removeprefix("folder:")), split, limit, fit, image_size)
    else:
        pixels = read_cifar10(data_path, train=train) if source == "cifar10" else _photos(split)
        pixels = pixels[_kept_indices(len(pixels), limit)] if limit else pixels
    return Images(pixels, source, split)


def resolve_source(data: str, data_path: str | Path = "data") -> str:
    """Return `data` with "auto" decided: "cifar10" if it is in `data_path`, else "photos"."""
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
    """Raise what `load_images` would raise for its parameters and for missing splits, without reading an image."""
    source = _checked_source(data, data_path, **options)
    if source.startswith("folder:"):
        for split in ("train", "test"):
            _split_folder(Path(source.removeprefix("folder:")), split)
    if source == "cifar10":
        check_cifar10(data_path)


def _checked_source(
    data: str, data_path: str | Path, *, limit: int | None = None, fit: str = "none", image_size: int | None = None
) -> str:
    """The source as `resolve_source` gives it; ParameterError unless the parameters fit it and each other."""
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
        problem = f"has no folder {split}/" if root.is_dir() else "is not a folder"
        raise DataError(f"folder:{root}: {root} {problem}; expected {root}/train/ and {root}/test/ with images in them")
    _refuse_if_outside(root / split, root.resolve())
    return root / split


def image_files(folder: Path, root: Path | None = None) -> Iterator[Path]:
    """The image files below `folder`, in a fixed order; never holds more names than one directory has.

    Image files are those whose names end in one of `IMAGE_SUFFIXES`. A link to a file is followed if it stays below
    `root` (default: `folder`). DataError for a link that does not, a link to a folder, a pipe or device named like an
    image, and a folder that cannot be read: nothing is left out silently.
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


def _kept_indices(count: int, limit: int | None) -> np.ndarray:
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
        picks = rng.permutation(sum(counts))[: 3 * quota // 2]  # a few of which will be near-constant
        level = np.searchsorted(np.cumsum(counts), picks, side="right")
        candidates = np.empty((len(picks), 3, PHOTO_SIDE, PHOTO_SIDE), np.uint8)
        for k, view in enumerate(windows):
            position = picks[level == k] - sum(counts[:k])
            candidates[level == k] = view[np.unravel_index(position, view.shape[:2])]
        spans = np.ptp(candidates.reshape(len(candidates), -1), axis=1)
        crops.append(candidates[spans >= PHOTO_MIN_RANGE][:quota])
    return torch.from_numpy(np.concatenate(crops)[rng.permutation(PHOTO_COUNT[split])])


def _folder(root: Path, split: str, limit: int | None, fit: str, image_size: int | None) -> Tensor:
    """Images below `root/split`, sorted by path, decoded to RGB by Pillow."""
    folder = _split_folder(root, split)
    files = sorted(image_files(folder, root))
    if not files:
        raise DataError(f"folder:{root}: no images in {folder}; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    files = [files[i] for i in _kept_indices(len(files), limit)]
    first = decode_image(files[0])
    side = image_size or min(first.shape[1:])
    shape = first.shape if fit == "none" else (3, side, side)
    needed_bytes, free_bytes = len(files) * math.prod(shape), psutil.virtual_memory().available
    if needed_bytes > free_bytes:
        raise DataError(
            f"folder:{root}: {len(files):,} images of {shape[2]}×{shape[1]} pixels need {needed_bytes / 1e9:.1f} GB of "
            f'memory, {free_bytes / 1e9:.1f} GB are free; use limit, or fit="crop" with a small image_size'
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

    The format is known from the content, not from the name. Grey, palette, CMYK and YCbCr images become RGB; alpha is
    dropped and the colours under it stay; of an animation or several pages the first is taken; 16-bit colours are
    reduced to 8 bits; the orientation in EXIF is not applied. Raises DataError, naming the file, for 16-bit and float
    grey without alpha, for more than `MAX_PIXELS` or `MAX_SCANS` (before anything is decoded), for a format other than
    `IMAGE_FORMATS` and for a damaged file.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{path}: {image.width}×{image.height} pixels are more than {MAX_PIXELS:,} in all")
            if image.format in ("JPEG", "MPO") and _scans(image) > MAX_SCANS:
                raise DataError(f"{path}: a JPEG of more than {MAX_SCANS} scans; save it again with fewer")
            if image.mode.startswith(("I", "F")):  # Pillow would clip these to black and white
                raise DataError(f"{path}: expected 8 bits per channel, got Pillow's mode {image.mode}; save it with 8")
            if image.format == "TIFF" and _misread(image):
                raise DataError(
                    f"{path}: a TIFF of a kind that Pillow misreads; save it with unsigned 8 bits per channel"
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
    """Whether a TIFF holds signed samples, or 16-bit ones in planes: Pillow silently misreads both."""
    signed, planes = (image.tag_v2.get(tag) for tag in (SAMPLEFORMAT, PLANAR_CONFIGURATION))
    return 2 in (signed or ()) or (planes == 2 and max(image.tag_v2.get(BITSPERSAMPLE, (8,))) > 8)


def _scans(image: Image.Image) -> int:
    """How many scans a JPEG has; each begins with a marker that no compressed data can contain."""
    image.fp.seek(0)
    return sum(chunk.count(b"\xff\xda") for chunk in iter(lambda: image.fp.read(2**20), b""))
