"""The image sources: `photos` and folders, and what is asked of them."""

import hashlib
import math
import shutil
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import tifffile
import torch
from conftest import noise, refusal, save
from PIL import Image, ImageFile
from torchvision.datasets import ImageFolder

from transformnet_lib.dataset import split_indices
from transformnet_lib.errors import DataError, ParameterError
from transformnet_lib.images import PHOTOS, Images, load_images
from transformnet_lib.pipeline import MAX_SIZE

# What `photos` gives on every machine; if one of these moves, no older run can be compared with a new one.
PHOTO_FINGERPRINTS = {
    "train": "ea951e4d176e125c93849b495533891e94e40dfb570779b172f5ceeacfdfc0ed",
    "test": "bded9f26d2823d831d8512f82bf50224d0df03c46866eaced98dc2862f3a79ac",
}


# photos


@pytest.fixture(scope="module")
def photos():
    """Both splits, made with the network cut off."""

    def no_network(*arguments):
        raise OSError("the test has no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", no_network)
        return {split: load_images("photos", train=split == "train") for split in ("train", "test")}


@pytest.mark.parametrize(("split", "count"), [("train", 50_000), ("test", 10_000)])
def test_photos_are_as_many_and_as_large_as_cifar10(photos, split, count):
    images = photos[split]
    assert images.pixels.shape == (count, 3, 32, 32)
    assert images.pixels.dtype == torch.uint8
    assert (images.source, images.split, len(images)) == ("photos", split, count)


@pytest.mark.parametrize("split", ["train", "test"])
def test_photos_are_the_same_bytes_on_every_machine(photos, split):
    pixels = photos[split].pixels.numpy()
    plain = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    assert plain == PHOTO_FINGERPRINTS[split]
    assert photos[split].fingerprint == PHOTO_FINGERPRINTS[split]


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_photo_crop_is_nearly_constant(photos, split):
    pixels = photos[split].pixels.flatten(1)
    assert int((pixels.amax(1).int() - pixels.amin(1).int()).min()) >= 64


def test_no_test_crop_is_a_training_crop(photos):
    train, test = ({row.tobytes() for row in photos[split].pixels.numpy()} for split in ("train", "test"))
    assert len(train) > 45_000 and len(test) > 9_000
    assert not train & test


def averaged(photo: np.ndarray, factor: int) -> np.ndarray:
    """The means of the photograph's squares of `factor` pixels a side, those at its end cut off by it."""
    starts = [np.arange(0, side, factor) for side in photo.shape[:2]]
    sums = np.add.reduceat(np.add.reduceat(photo.astype(np.int64), starts[0], axis=0), starts[1], axis=1)
    rows, columns = (np.diff([*start, side]) for start, side in zip(starts, photo.shape[:2], strict=True))
    return sums / np.outer(rows, columns)[:, :, None]


def shows(photo: np.ndarray, crop: np.ndarray) -> bool:
    """Whether `crop` (32, 32, 3) is a region of `photo`, but for rounding."""
    corners = photo[: photo.shape[0] - 31, : photo.shape[1] - 31, 0]
    return any(
        (abs(photo[y : y + 32, x : x + 32] - crop) <= 1).all()
        for y, x in np.argwhere(abs(corners - crop[0, 0, 0]) <= 1)
        if (abs(photo[y, x : x + 32] - crop[0]) <= 1).all()
    )


def test_each_split_shows_its_own_photographs(photos):
    import skimage.data

    def photograph(name):
        picture = getattr(skimage.data, name)()
        return picture[0] if isinstance(picture, tuple) else picture

    reduced = {
        split: {name: [averaged(photograph(name), factor) for factor in (2, 4, 8)] for name in PHOTOS[split]}
        for split in ("train", "test")
    }
    assert not set(reduced["train"]) & set(reduced["test"])
    for split in ("train", "test"):
        shown = set()
        for crop in photos[split].pixels[:8].permute(0, 2, 3, 1).numpy():
            found = [name for name, levels in reduced[split].items() if any(shows(level, crop) for level in levels)]
            assert len(found) == 1
            shown.add(found[0])
        assert len(shown) >= 3  # they are mixed


# folder


def load_folder(root: Path, train: bool = True, **options) -> np.ndarray:
    return load_images(f"folder:{root}", train=train, **options).pixels.numpy()


def chw(pixels: np.ndarray) -> np.ndarray:
    return pixels.transpose(2, 0, 1)


def test_a_folder_is_read_in_the_order_of_its_paths(tree):
    order = [3, 2, 4, 1, 6, 0, 5]  # a/deep/z a/y a-b/x b/10 b/2 b/x last
    assert np.array_equal(load_folder(tree), [chw(noise(9, 7, 3, seed=i)) for i in order])
    images = load_images(f"folder:{tree}", train=False)
    assert np.array_equal(images.pixels.numpy(), chw(noise(9, 7, 3, seed=99))[None])
    assert (images.source, images.split, images.pixels.dtype) == (f"folder:{tree}", "test", torch.uint8)


def test_an_image_folder_is_read_as_torchvision_reads_it(tmp_path):
    for i, name in enumerate(["dog/3.jpg", "cat/1.jpeg", "cat/0.png", "dog/20.bmp", "cat/2.webp", "eel/0.tiff"]):
        save(tmp_path / "train" / name, noise(8, 8, 3, seed=i))
    plain = [chw(np.asarray(image)) for image, _ in ImageFolder(tmp_path / "train")]
    assert np.array_equal(load_folder(tmp_path), plain)


def test_a_jpeg_shows_what_was_put_in(tmp_path):
    rows, columns = np.mgrid[0:32, 0:32]
    smooth = np.stack([8 * rows, 8 * columns, 255 - 4 * (rows + columns)], axis=2).astype(np.uint8)
    save(tmp_path / "train" / "a.jpg", smooth, quality=98)
    assert abs(load_folder(tmp_path)[0].astype(int) - chw(smooth)).max() <= 8


def test_a_missing_folder_is_named(tmp_path):
    message = refusal(lambda: load_folder(tmp_path / "none"))
    assert f"{tmp_path / 'none'} is not a folder" in message and f"{tmp_path / 'none'}/train/" in message


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_folder_without_a_split_is_refused(tree, split):
    shutil.rmtree(tree / split)
    assert f"has no folder {split}/" in refusal(lambda: load_folder(tree, train=split == "train"))


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "train" / "class").mkdir(parents=True)
    (tmp_path / "train" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "folder.png").mkdir()
    message = refusal(lambda: load_folder(tmp_path))
    assert f"no images in {tmp_path / 'train'}" in message and ".jpg" in message


def test_mixed_sizes_name_the_file_that_differs(tree):
    save(tree / "train" / "b" / "odd.png", noise(7, 9, 3))
    message = refusal(lambda: load_folder(tree))
    assert message.startswith(str(tree / "train" / "b" / "odd.png"))
    assert "expected 7×9 pixels" in message and "got 9×7" in message and 'fit="crop"' in message


def damaged(kind: str, content: bytes) -> bytes:
    return {
        "zero bytes": b"",
        "text": b"this is no image\n",
        "truncated": content[: len(content) // 2],
        "damaged": content[: len(content) // 2] + bytes(20) + content[len(content) // 2 + 20 :],
    }[kind]


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "tif", "webp", "ppm"])
@pytest.mark.parametrize("kind", ["zero bytes", "text", "truncated"])
def test_an_unreadable_image_is_named(tmp_path, ending, kind):
    save(tmp_path / "train" / "a.png", noise(32, 32, 3))
    path = save(tmp_path / "train" / f"b.{ending}", noise(32, 32, 3))
    path.write_bytes(damaged(kind, path.read_bytes()))
    message = refusal(lambda: load_folder(tmp_path))
    assert message.startswith(f"{path}: not a readable image")
    assert " at 0x" not in message


def test_a_damaged_png_is_named(tmp_path):
    path = save(tmp_path / "train" / "a.png", noise(32, 32, 3))
    path.write_bytes(damaged("damaged", path.read_bytes()))
    assert refusal(lambda: load_folder(tmp_path)).startswith(f"{path}: not a readable image")


def of_mode(mode: str) -> tuple[Image.Image, np.ndarray]:
    """An image of one of Pillow's modes and the RGB values (height, width, 3) it stands for."""
    raw = noise(6, 8, {"LA": 2, "RGBA": 4, "CMYK": 4}.get(mode, 1), seed=5)
    if mode == "1":
        white = raw[:, :, 0] > 127
        return Image.fromarray(white), np.repeat(np.where(white, 255, 0)[:, :, None], 3, axis=2)
    image = Image.frombytes(mode, (8, 6), raw.tobytes())
    if mode == "P":
        palette = noise(256, 3, seed=6)
        image.putpalette(palette.tobytes())
        return image, palette[raw[:, :, 0]]
    if mode == "CMYK":
        inks = raw.astype(float) / 255
        return image, 255 * (1 - inks[:, :, :3]) * (1 - inks[:, :, 3:])
    return image, raw[:, :, :3] if mode == "RGBA" else np.repeat(raw[:, :, :1], 3, axis=2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("mode", "ending"),
    [("1", "png"), ("L", "png"), ("P", "png"), ("LA", "png"), ("RGBA", "png"), ("RGBA", "webp"), ("CMYK", "tif")],
)
def test_other_modes_become_rgb(tmp_path, mode, ending):
    image, expected = of_mode(mode)
    (tmp_path / "train").mkdir()
    image.save(tmp_path / "train" / f"a.{ending}", **({"lossless": True, "exact": True} if ending == "webp" else {}))
    with Image.open(tmp_path / "train" / f"a.{ending}") as written:
        assert written.mode == mode
    pixels = load_folder(tmp_path)[0]
    assert pixels.dtype == np.uint8
    assert abs(pixels - chw(expected)).max() <= (1 if mode == "CMYK" else 0)


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_becomes_rgb_without_a_warning(tmp_path):
    image, expected = of_mode("P")
    (tmp_path / "train").mkdir()
    image.save(tmp_path / "train" / "a.png", transparency=bytes(range(256)))
    assert np.array_equal(load_folder(tmp_path)[0], chw(expected))


def test_a_cmyk_jpeg_is_read(tmp_path):
    inks = np.repeat(np.array([[[0, 255, 255, 0], [255, 0, 0, 128]]], np.uint8), 8, axis=0).repeat(8, axis=1)
    (tmp_path / "train").mkdir()
    Image.frombytes("CMYK", (16, 8), inks.tobytes()).save(tmp_path / "train" / "a.jpg", quality=100, subsampling=0)
    pixels = load_folder(tmp_path)[0]
    assert abs(pixels[:, 4, 4].astype(int) - [255, 0, 0]).max() <= 3
    assert abs(pixels[:, 4, 12].astype(int) - [0, 127, 127]).max() <= 3


def png(header: tuple, rows: bytes) -> bytes:
    """A PNG file written by hand: width, height, bits and colour type, then its rows, a filter byte before each."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bit_colours_keep_their_upper_byte(tmp_path):
    deep = np.random.RandomState(0).randint(0, 65536, (5, 4, 3)).astype(">u2")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.png").write_bytes(png((4, 5, 16, 2), b"".join(b"\0" + row.tobytes() for row in deep)))
    assert np.array_equal(load_folder(tmp_path)[0], chw(deep >> 8))


@pytest.mark.parametrize(
    ("kind", "options"), [("uint16", {"photometric": "rgb", "planarconfig": "separate"}), ("int8", {})]
)
def test_a_tiff_that_pillow_misreads_is_refused(tmp_path, kind, options):
    shape = (3, 8, 8) if options else (8, 8)
    (tmp_path / "train").mkdir()
    tifffile.imwrite(tmp_path / "train/a.tif", np.arange(math.prod(shape)).reshape(shape).astype(kind), **options)
    with pytest.raises(DataError, match=r"a\.tif: a TIFF of a kind that Pillow misreads"):
        load_folder(tmp_path)


@pytest.mark.parametrize("options", [{}, {"planarconfig": "separate"}])
def test_other_tiffs_are_read(tmp_path, options):
    values = np.random.RandomState(0).randint(0, 256, (3, 6, 8), np.uint8)
    (tmp_path / "train").mkdir()
    given = values if options else values.transpose(1, 2, 0)
    tifffile.imwrite(tmp_path / "train/a.tif", given, photometric="rgb", **options)
    assert np.array_equal(load_folder(tmp_path)[0], values)


@pytest.mark.parametrize(
    ("ending", "mode"), [("16.png", "I;16"), ("16.tif", "I;16"), ("32.tif", "I"), ("float.tif", "F"), ("16.pgm", "I")]
)
def test_deep_grey_values_are_refused_and_not_turned_white(tmp_path, ending, mode):
    deep = (np.arange(64).reshape(8, 8) * 1000).astype(np.uint16)
    path = tmp_path / "train" / f"deep{ending}"
    path.parent.mkdir()
    if ending == "16.pgm":
        path.write_bytes(b"P5 8 8 65535\n" + deep.astype(">u2").tobytes())
    else:
        kinds = {"16.png": np.uint16, "16.tif": np.uint16, "32.tif": np.int32, "float.tif": np.float32}
        Image.fromarray(deep.astype(kinds[ending])).save(path)
    message = refusal(lambda: load_folder(tmp_path))
    assert message.startswith(f"{path}: expected 8 bits a channel") and f"mode {mode};" in message


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8193, 12_000, 60_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, side):
    loads = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: loads.append(self))
    path = tmp_path / "train" / "bomb.png"
    path.parent.mkdir()
    path.write_bytes(png((side, side, 8, 2), bytes(1000)))
    assert refusal(lambda: load_folder(tmp_path)).startswith(str(path))
    assert loads == []


def test_an_image_of_just_the_most_pixels_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("transformnet_lib.images.MAX_PIXELS", 63)
    save(tmp_path / "train" / "a.png", noise(9, 7, 3))
    assert load_folder(tmp_path).shape == (1, 3, 9, 7)
    save(tmp_path / "train" / "a.png", noise(8, 8, 3))
    assert "8×8 pixels are more than 63" in refusal(lambda: load_folder(tmp_path))


def test_crop_takes_the_centre_and_averages_it(tmp_path):
    wide, tall, exact = noise(8, 14, 3, seed=1), noise(20, 12, 3, seed=2), noise(4, 4, 3, seed=3)
    for name, pixels in (("1.png", wide), ("2.png", tall), ("3.png", exact)):
        save(tmp_path / "train" / name, pixels)
    pixels = load_folder(tmp_path, fit="crop", image_size=4)
    squares = (wide[:, 3:11], tall[4:16], exact)
    plain = [chw(square.reshape(4, len(square) // 4, 4, -1, 3).mean(axis=(1, 3))) for square in squares]
    assert abs(pixels - plain).max() <= 1
    assert np.array_equal(pixels[2], chw(exact))


def test_crop_takes_the_shorter_side_of_the_first_image_by_default(tmp_path):
    first = noise(8, 12, 3)
    save(tmp_path / "train" / "1.png", first)
    save(tmp_path / "train" / "2.png", noise(30, 20, 3))
    pixels = load_folder(tmp_path, fit="crop")
    assert pixels.shape == (2, 3, 8, 8)
    assert np.array_equal(pixels[0], chw(first[:, 2:10]))


# What is asked for


@pytest.mark.parametrize("source", ["CIFAR10", "", "photo", "folder", None, 3, Path("folder:x")])
def test_an_unknown_source_is_refused(source):
    message = refusal(lambda: load_images(source, train=True), ParameterError)
    assert f"data: expected auto, photos, cifar10 or folder:PATH, got {source!r}" in message


@pytest.mark.parametrize("limit", [0, -1, 1.0, True, "5"])
def test_a_limit_out_of_range_is_refused(tree, limit):
    message = refusal(lambda: load_folder(tree, limit=limit), ParameterError)
    assert "limit: expected a whole number from 1" in message and f"got {limit!r}" in message


def test_an_unknown_fit_is_refused(tree):
    message = refusal(lambda: load_folder(tree, fit="stretch"), ParameterError)
    assert "fit: expected one of none, crop, got 'stretch'" in message


@pytest.mark.parametrize("image_size", [0, -4, MAX_SIZE + 1, 4.0, True, (4, 8), "4"])
def test_an_image_size_out_of_range_is_refused(tree, image_size):
    message = refusal(lambda: load_folder(tree, fit="crop", image_size=image_size), ParameterError)
    assert "image_size: expected a whole number from 1 to 4096" in message


def test_a_limit_keeps_the_first_of_a_seeded_permutation(photos, cifar, tree):
    chosen = np.random.RandomState(0).permutation(10_000)[:5]
    some = load_images("photos", train=False, limit=5)
    assert np.array_equal(some.pixels.numpy(), photos["test"].pixels.numpy()[chosen])
    chosen = np.random.RandomState(0).permutation(20)[:8]
    some = load_images("cifar10", train=True, data_path=tree, limit=8)
    assert np.array_equal(some.pixels.numpy(), cifar["train"][chosen])
    chosen = np.random.RandomState(0).permutation(7)[:3]
    assert np.array_equal(load_folder(tree, limit=3), load_folder(tree)[chosen])
    assert np.array_equal(load_folder(tree, limit=2), load_folder(tree, limit=3)[:2])


def test_a_limit_does_not_touch_the_global_generators(tree):
    np.random.seed(0)
    before = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    load_folder(tree, limit=2)
    split_indices(20)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.random.get_rng_state(), before[1])


def test_a_limit_above_the_count_keeps_all(tree):
    every, kept = load_folder(tree), load_folder(tree, limit=1000)
    assert sorted(image.tobytes() for image in kept) == sorted(image.tobytes() for image in every)


def test_the_fingerprint_tells_images_apart(tree):
    def fingerprint(**options):
        return load_images(f"folder:{tree}", train=True, **options).fingerprint

    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint(limit=3), fingerprint(fit="crop")}) == 3
    path = tree / "train" / "last.png"
    pixels = noise(9, 7, 3, seed=5)
    before = fingerprint()
    pixels[4, 4, 1] ^= 1
    save(path, pixels)
    assert fingerprint() != before
    same = bytes(range(24))
    shapes = [(1, 3, 2, 4), (1, 3, 4, 2), (2, 3, 2, 2)]
    images = [Images(torch.tensor(list(same), dtype=torch.uint8).reshape(shape), "x", "train") for shape in shapes]
    assert len({each.fingerprint for each in images}) == 3


def test_fit_and_image_size_are_refused_where_they_would_do_nothing(tmp_path):
    with pytest.raises(ParameterError, match="fit: only for images of a folder"):
        load_images("photos", train=False, fit="crop")
    with pytest.raises(ParameterError, match=r"image_size: only with fit=.crop., got 20"):
        load_images("photos", train=False, image_size=20)


def test_images_that_do_not_fit_into_memory_are_refused(tmp_path, monkeypatch):
    save(tmp_path / "train/a.png", noise(32, 32, 3))
    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    told = refusal(lambda: load_images(f"folder:{tmp_path}", train=True))
    assert "1 images of 32×32 pixels need 0.0 GB of memory, 0.0 GB are free; use limit" in told
