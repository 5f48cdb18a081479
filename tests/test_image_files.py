"""Image files of every kind, sound and damaged: each is read as documented or refused by name, and nothing else."""

import io
import math
import struct
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from conftest import refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from transformnet_lib.errors import DataError
from transformnet_lib.images import IMAGE_SUFFIXES, decode_image
from transformnet_lib.inference import infer_folder

SIDE = 8  # pixels of most images here

# Pillow's modes that each format can hold; the last three of TIFF are refused
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"),
    "WEBP": ("RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I;16"),
}
REFUSED = ("I;16", "I", "F")  # 8 bits would not hold them


def picture(mode: str, seed: int = 0, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    values = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), np.uint8)
    if mode == "I;16":
        return Image.fromarray(values[:, :, 0].astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(values[:, :, 0].astype(np.int32) * 257)
    if mode == "F":
        return Image.fromarray(values[:, :, 0].astype(np.float32) / 255)
    return Image.fromarray(values).convert(mode)


def written(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


# Whatever the bytes


SOUND = [(form, mode) for form, modes in MODES.items() for mode in modes]


@st.composite
def image_bytes(draw) -> tuple[bytes, str, str | None]:
    """A file's content, the end of its name, and the mode of what it shows; None for one that is damaged."""
    damage = draw(st.sampled_from(["none", "none", "none", "cut", "flipped", "overwritten", "inserted", "random"]))
    ending = draw(st.sampled_from(IMAGE_SUFFIXES))  # any: names lie
    if damage == "random":
        return draw(st.binary(max_size=200)), ending, None
    form, mode = draw(st.sampled_from(SOUND))
    content = written(picture(mode, draw(st.integers(0, 3))), form)
    if damage == "none":
        return content, ending, mode
    at = draw(st.integers(0, min(64, len(content) - 1)) | st.integers(0, len(content) - 1))  # often in the head
    if damage == "cut":
        return content[:at], ending, None
    if damage == "flipped":
        return content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :], ending, None
    new = draw(st.sampled_from([b"\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0", bytes(4)]) | st.binary(max_size=8))
    return content[:at] + new + content[at + len(new) * (damage == "overwritten") :], ending, None


def test_any_file_is_read_as_rgb_or_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "transformnet_lib.images.MAX_PIXELS", 2**20
    )  # a damaged size must not fill this machine's memory
    ends = []  # (mode, whether it was read)

    @settings(max_examples=1000, derandomize=True, deadline=None, database=None)
    @given(image_bytes())
    def check(file):
        content, ending, mode = file
        path = tmp_path / f"a{ending}"
        path.write_bytes(content)
        try:
            with warnings.catch_warnings(action="ignore"):  # Pillow's, of damaged metadata
                pixels = decode_image(path)
        except DataError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            ends.append((mode, False))
        else:
            assert pixels.dtype == np.uint8 and pixels.shape[0] == 3 and pixels.size <= 3 * 2**20
            assert mode is None or pixels.shape == (3, SIDE, SIDE)
            ends.append((mode, True))
        path.unlink()

    check()
    assert len(ends) >= 1000
    for mode in {mode for modes in MODES.values() for mode in modes}:  # all of them came, and ended as documented
        assert {read for other, read in ends if other == mode} == {mode not in REFUSED}
    assert {read for mode, read in ends if mode is None} == {True, False}  # damage does not always hit what counts


# One by one


@pytest.mark.parametrize(("form", "mode"), SOUND)
def test_every_kind_is_read_whatever_its_name(tmp_path, form, mode):
    path = tmp_path / "a.png"  # of another kind, mostly
    path.write_bytes(written(picture(mode), form))
    if mode in REFUSED:  # Pillow would make them black and white
        assert refusal(lambda: decode_image(path)).startswith(
            f"{path}: expected 8 bits per channel, got Pillow's mode "
        )
    else:
        with Image.open(path) as image:
            wanted = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(decode_image(path), wanted)


def test_alpha_is_dropped_and_the_colours_under_it_stay(tmp_path):
    image = picture("RGB")
    colours = np.asarray(image).transpose(2, 0, 1)
    image.putalpha(Image.fromarray(np.eye(SIDE, dtype=np.uint8) * 255))
    for form in ("PNG", "TIFF"):
        (tmp_path / "a.png").write_bytes(written(image, form))
        assert np.array_equal(decode_image(tmp_path / "a.png"), colours)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_of_an_animation_or_several_pages_the_first_counts(tmp_path, form):
    first, *rest = (picture("RGB", seed) for seed in range(3))
    options = {"lossless": True} if form == "WEBP" else {}
    (tmp_path / "a.png").write_bytes(written(first, form, save_all=True, append_images=rest, **options))
    with Image.open(tmp_path / "a.png") as image:
        assert image.n_frames == 3
    assert np.array_equal(decode_image(tmp_path / "a.png"), np.asarray(first).transpose(2, 0, 1))


def test_the_orientation_in_exif_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image = picture("RGB", size=(4, 9))
    (tmp_path / "a.png").write_bytes(written(image, "PNG", exif=exif))
    assert np.array_equal(decode_image(tmp_path / "a.png"), np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize("form", ["GIF", "ICO", "EPS"])
def test_a_kind_that_is_not_ours_is_refused_under_any_name_and_starts_no_interpreter(tmp_path, monkeypatch, form):
    (tmp_path / "a.png").write_bytes(written(picture("RGB"), form))
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("PostScript was executed"))
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == form  # Pillow by itself would take it for what it is
    assert f"{tmp_path / 'a.png'}: not a readable image" in refusal(lambda: decode_image(tmp_path / "a.png"))


@pytest.mark.parametrize("form", MODES)
def test_an_unreadable_image_is_named(tmp_path, form):
    assert not ImageFile.LOAD_TRUNCATED_IMAGES  # nor does any import of ours set it
    path = tmp_path / "a.png"
    sound = written(picture("RGB", size=(64, 64)), form)
    for content in (sound[: len(sound) * 2 // 3], b"", b"this is no image\n"):
        path.write_bytes(content)
        message = refusal(lambda: decode_image(path))
        assert message.startswith(f"{path}: not a readable image") and " at 0x" not in message


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_becomes_rgb_without_a_warning(tmp_path):
    image = picture("P")
    (tmp_path / "a.png").write_bytes(written(image, "PNG", transparency=bytes(range(256))))
    assert np.array_equal(decode_image(tmp_path / "a.png"), np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def png(header: tuple, rows: bytes) -> bytes:
    """A PNG file written by hand: width, height, bits and colour type, then its rows, a filter byte before each."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bit_colours_keep_their_upper_byte(tmp_path):
    deep = np.random.RandomState(0).randint(0, 65536, (5, 4, 3)).astype(">u2")
    (tmp_path / "a.png").write_bytes(png((4, 5, 16, 2), b"".join(b"\0" + row.tobytes() for row in deep)))
    assert np.array_equal(decode_image(tmp_path / "a.png"), (deep >> 8).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("kind", "options", "read"),
    [
        ("uint8", {"photometric": "rgb", "planarconfig": "separate"}, True),
        ("uint16", {"photometric": "rgb", "planarconfig": "separate"}, False),
        ("int8", {}, False),
    ],
)
def test_a_tiff_that_pillow_misreads_is_refused(tmp_path, kind, options, read):
    values = np.arange(math.prod((3, 8, 8))).reshape(3, 8, 8).astype(kind)
    tifffile.imwrite(tmp_path / "a.tif", values if options else values[0], **options)
    if read:
        assert np.array_equal(decode_image(tmp_path / "a.tif"), values)
    else:
        message = refusal(lambda: decode_image(tmp_path / "a.tif"))
        assert message.startswith(f"{tmp_path / 'a.tif'}: a TIFF of a kind that Pillow misreads")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8193, 60_000])  # the second is one that Pillow refuses by itself
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, side):
    loads = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: loads.append(self))
    path = tmp_path / "bomb.png"
    path.write_bytes(png((side, side, 8, 2), bytes(1000)))
    assert refusal(lambda: decode_image(path)).startswith(str(path))
    assert loads == []


def test_an_image_of_just_the_most_pixels_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("transformnet_lib.images.MAX_PIXELS", SIDE * SIDE)
    (tmp_path / "a.png").write_bytes(written(picture("RGB"), "PNG"))
    assert decode_image(tmp_path / "a.png").shape == (3, SIDE, SIDE)
    (tmp_path / "a.png").write_bytes(written(picture("RGB", size=(SIDE + 1, SIDE)), "PNG"))
    assert "9×8 pixels are more than 64" in refusal(lambda: decode_image(tmp_path / "a.png"))


@pytest.mark.parametrize(("scans", "read"), [(9, True), (200, False)])
def test_a_jpeg_that_goes_over_its_picture_again_and_again_is_refused(tmp_path, scans, read):
    content = written(picture("RGB", 1), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    again = content[:last] + content[last:-2] * (scans - content.count(b"\xff\xda") + 1) + content[-2:]
    assert again.count(b"\xff\xda") == scans
    path = tmp_path / "a.jpg"
    path.write_bytes(again)
    if read:
        decode_image(path)
    else:
        assert refusal(lambda: decode_image(path)) == f"{path}: a JPEG of more than 100 scans; save it again with fewer"


# transformnet infer


@pytest.mark.parametrize("form", ["png", "npz"])
def test_infer_reads_every_kind(run, tmp_path, form):
    sound = [(kind, mode) for kind, mode in SOUND if mode not in REFUSED]
    (tmp_path / "images").mkdir()
    for kind, mode in sound:
        (tmp_path / "images" / f"{kind}-{mode}.png").write_bytes(written(picture(mode), kind))
    assert infer_folder(run, tmp_path / "images", tmp_path / "out", form=form, device="cpu") == len(sound)


@pytest.mark.parametrize("content", [b"", written(picture("I;16"), "PNG")])
def test_infer_names_the_file_it_cannot_read(run, tmp_path, content):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(written(picture("RGB"), "PNG"))
    (tmp_path / "images/z.png").write_bytes(content)
    message = refusal(lambda: infer_folder(run, tmp_path / "images", tmp_path / "out", batch_size=1, device="cpu"))
    assert message.startswith(f"{tmp_path / 'images/z.png'}: ")
    assert (tmp_path / "out/a.png.png").exists()  # done before
