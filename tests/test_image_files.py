"""Image files of every kind, sound and damaged: each is read as documented or refused by name, and nothing else."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, features

from transformnet_lib import images
from transformnet_lib.errors import DataError
from transformnet_lib.images import IMAGE_SUFFIXES, decode_image, image_files, load_images
from transformnet_lib.inference import infer_folder

SIDE = 8  # pixels of most images here

# Pillow's modes that each format can hold; the last two of TIFF are refused
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "F"),
    "WEBP": ("RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I;16"),
}
REFUSED = ("I;16", "F")  # 8 bits would not hold them


def picture(mode: str, seed: int = 0, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    values = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), np.uint8)
    if mode == "I;16":
        return Image.fromarray(values[:, :, 0].astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(values[:, :, 0].astype(np.float32) / 255)
    return Image.fromarray(values).convert(mode)


def written(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def folder_of(root: Path, **files: bytes) -> Path:
    """An image folder with these files under train/, names with a dot in place of "__"."""
    (root / "train").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / "train" / name.replace("__", ".")).write_bytes(content)
    return root


def load(root: Path) -> np.ndarray:
    return load_images(f"folder:{root}", train=True).pixels.numpy()


def refusal(call) -> str:
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


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
    monkeypatch.setattr(images, "MAX_PIXELS", 2**20)  # a damaged size must not fill this machine's memory
    root = folder_of(tmp_path)
    ends = []  # (mode, whether it was read)

    @settings(max_examples=1000, derandomize=True, deadline=None, database=None)
    @given(image_bytes())
    def check(file):
        content, ending, mode = file
        path = root / "train" / f"a{ending}"
        path.write_bytes(content)
        try:
            with warnings.catch_warnings(action="ignore"):  # Pillow's, of damaged metadata
                pixels = load(root)
        except DataError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            ends.append((mode, False))
        else:
            assert pixels.dtype == np.uint8 and pixels.shape[:2] == (1, 3) and pixels.size <= 3 * 2**20
            assert mode is None or pixels.shape == (1, 3, SIDE, SIDE)
            ends.append((mode, True))
        path.unlink()

    check()
    assert len(ends) >= 1000
    for mode in {mode for modes in MODES.values() for mode in modes}:  # all of them came, and ended as documented
        assert {read for other, read in ends if other == mode} == {mode not in REFUSED}
    assert {read for mode, read in ends if mode is None} == {True, False}  # damage does not always hit what counts


# One by one


@pytest.mark.parametrize(("form", "mode"), [(form, mode) for form, modes in MODES.items() for mode in modes])
def test_every_kind_is_read_whatever_its_name(tmp_path, form, mode):
    path = tmp_path / "a.png"  # of another kind, mostly
    path.write_bytes(written(picture(mode), form))
    if mode in REFUSED:
        assert f"{path}: expected 8 bits a channel" in refusal(lambda: decode_image(path))
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


@pytest.mark.parametrize("content", [written(picture("RGB"), "GIF"), written(picture("RGB"), "ICO", sizes=[(8, 8)])])
def test_a_kind_that_is_not_ours_is_refused_under_any_name(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    assert f"{tmp_path / 'a.png'}: not a readable image" in refusal(lambda: decode_image(tmp_path / "a.png"))


def test_postscript_named_png_starts_no_interpreter(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(written(picture("RGB"), "EPS"))
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: started.append("gs"))
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "EPS"  # Pillow by itself would take it for what it is
    assert "not a readable image" in refusal(lambda: decode_image(tmp_path / "a.png"))
    assert started == []


def test_truncated_images_are_refused_though_a_program_may_have_allowed_them(tmp_path):
    assert not ImageFile.LOAD_TRUNCATED_IMAGES  # nor does any import of ours set it
    for form in MODES:
        content = written(picture("RGB", size=(64, 64)), form)
        (tmp_path / "a.png").write_bytes(content[: len(content) * 2 // 3])
        assert "not a readable image" in refusal(lambda: decode_image(tmp_path / "a.png"))


def test_every_format_can_be_decoded_here():
    assert all(features.check(name) for name in ("jpg", "webp", "zlib", "libtiff"))


# What lies in the folder


@pytest.fixture
def tree(tmp_path) -> Path:
    """An image folder of two images, and one beside it."""
    (tmp_path / "outside.png").write_bytes(written(picture("RGB", 9), "PNG"))
    (tmp_path / "tree/test").mkdir(parents=True)
    images = {"a__png": written(picture("RGB", 1), "PNG"), "b__png": written(picture("RGB", 2), "PNG")}
    return folder_of(tmp_path / "tree", **images)


def test_a_link_within_the_folder_is_followed(tree):
    (tree / "train/c.png").symlink_to("a.png")
    (tree / "test/t.png").symlink_to("../train/b.png")
    assert np.array_equal(load(tree)[2], load(tree)[0])
    assert load_images(f"folder:{tree}", train=False).pixels.shape[0] == 1


@pytest.mark.parametrize("target", ["../../outside.png", "/etc/passwd", "/dev/zero", "../../nothing.png"])
def test_a_link_that_leaves_the_folder_is_refused_by_name(tree, target):
    (tree / "train/c.png").symlink_to(target)
    told = refusal(lambda: load(tree))
    assert told.startswith(f"{tree / 'train/c.png'}: a link that leaves {tree}, to ")
    assert Path(target).name in told


def test_a_link_to_itself_is_refused_by_name(tree):
    (tree / "train/c.png").symlink_to("d.png")
    (tree / "train/d.png").symlink_to("c.png")
    assert refusal(lambda: load(tree)).startswith(f"{tree / 'train/c.png'}: a link that leads to itself")


@pytest.mark.parametrize(("scans", "read"), [(9, True), (200, False)])
def test_a_jpeg_that_goes_over_its_picture_again_and_again_is_refused(tmp_path, scans, read):
    content = written(picture("RGB", 1), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    again = content[:last] + content[last:-2] * (scans - content.count(b"\xff\xda") + 1) + content[-2:]
    assert again.count(b"\xff\xda") == scans
    root = folder_of(tmp_path / "tree", a__jpg=again)
    if read:
        load(root)
    else:
        assert refusal(lambda: load(root)) == f"{root / 'train/a.jpg'}: a JPEG of more than 100 scans; save it anew"


def test_a_split_that_leads_out_of_the_folder_is_refused(tree, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tree / "test").rmdir()
    (tree / "test").symlink_to(tmp_path / "elsewhere")
    told = refusal(lambda: load_images(f"folder:{tree}", train=False))
    assert told.startswith(f"{tree / 'test'}: a link that leaves {tree}, to {tmp_path / 'elsewhere'}")
    assert refusal(lambda: images.check_source(f"folder:{tree}")) == told


def test_the_folder_itself_may_be_a_link(tree, tmp_path):
    (tmp_path / "link").symlink_to(tree)
    assert np.array_equal(load(tmp_path / "link"), load(tree))


def test_a_link_to_a_folder_is_refused_and_not_left_out(tree):
    (tree / "train/class").mkdir()
    (tree / "train/class/again").symlink_to("..")  # which would have no end
    told = refusal(lambda: load(tree))
    assert told.startswith(f"{tree / 'train/class/again'}: a link to a folder")


def test_a_pipe_named_like_an_image_is_refused_and_not_waited_for(tree):
    os.mkfifo(tree / "train/c.png")
    assert refusal(lambda: load(tree)).startswith(f"{tree / 'train/c.png'}: expected an image file, got something else")


def test_a_folder_that_cannot_be_read_is_refused_and_not_left_out(tree, monkeypatch):
    (tree / "train/closed").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert refusal(lambda: load(tree)) == f"{tree / 'train/closed'}: cannot be read (Permission denied)"


def test_files_come_in_a_fixed_order_and_others_are_passed_over(tree):
    for name in ("B.PNG", "notes.txt", ".hidden.png", "sub/1.jpg"):
        (tree / "train" / name).parent.mkdir(exist_ok=True)
        (tree / "train" / name).touch()
    (tree / "train/thumbs.png").mkdir()
    names = [path.relative_to(tree / "train").as_posix() for path in image_files(tree / "train")]
    assert names == [".hidden.png", "B.PNG", "a.png", "b.png", "sub/1.jpg"]


# transformnet infer


@pytest.mark.parametrize("form", ["png", "npz"])
def test_infer_reads_every_kind(run, tmp_path, form):
    for kind, modes in MODES.items():
        for mode in set(modes) - set(REFUSED):
            content = written(picture(mode), kind)
            folder_of(tmp_path / "images", **{f"{kind}-{mode}__{kind.lower()[:4]}".replace("jpeg", "jpg"): content})
    wanted = len(list(image_files(tmp_path / "images")))
    assert wanted == sum(len(set(modes) - set(REFUSED)) for modes in MODES.values())
    assert infer_folder(run, tmp_path / "images", tmp_path / "out", form=form, device="cpu") == wanted


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("z__png", b""),
        ("z__png", written(picture("RGB"), "PNG")[:60]),
        ("z__jpg", written(picture("I;16"), "PNG")),
        ("z__png", written(picture("RGB"), "EPS")),
        ("z__bmp", b"BM" + bytes(range(200))),
    ],
)
def test_infer_names_the_file_it_cannot_read(run, tree, tmp_path, name, content):
    folder_of(tree, **{name: content})
    told = refusal(lambda: infer_folder(run, tree, tmp_path / "out", batch_size=1, device="cpu"))
    assert told.startswith(str(tree / "train" / name.replace("__", ".")))
    assert sorted(path.name for path in (tmp_path / "out/train").iterdir()) == ["a.png.png", "b.png.png"]  # done before


def test_infer_follows_no_link_out_of_its_folder_and_waits_for_no_pipe(run, tree, tmp_path):
    (tree / "train/c.png").symlink_to("/dev/zero")
    assert "a link that leaves" in refusal(lambda: infer_folder(run, tree, tmp_path / "out", device="cpu"))
    (tree / "train/c.png").unlink()
    os.mkfifo(tree / "train/c.png")
    assert "got something else" in refusal(lambda: infer_folder(run, tree, tmp_path / "out", device="cpu"))
