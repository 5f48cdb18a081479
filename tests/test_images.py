"""The image sources: what `photos` and folders give, and what is asked of them."""

import hashlib
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import noise, refusal, save
from torchvision.datasets import ImageFolder

from transformnet_lib.errors import ParameterError
from transformnet_lib.images import PHOTOS, Images, check_source, image_files, load_images
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
def test_photos_are_the_same_bytes_on_every_machine(photos, split, count):
    images = photos[split]
    assert (images.source, images.split, len(images)) == ("photos", split, count)
    assert images.pixels.dtype == torch.uint8 and images.pixels.shape == (count, 3, 32, 32)  # as CIFAR-10
    pixels = images.pixels.numpy()
    plain = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    assert plain == images.fingerprint == PHOTO_FINGERPRINTS[split]


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_photo_crop_is_nearly_constant(photos, split):
    pixels = photos[split].pixels.flatten(1)
    assert int((pixels.amax(1).int() - pixels.amin(1).int()).min()) >= 64


def test_no_test_crop_is_a_training_crop(photos):
    train, test = ({row.tobytes() for row in photos[split].pixels.numpy()} for split in ("train", "test"))
    assert len(train) > 45_000 and len(test) > 9_000
    assert not train & test and not set(PHOTOS["train"]) & set(PHOTOS["test"])


# folder


def load_folder(root: Path, train: bool = True, **options) -> np.ndarray:
    return load_images(f"folder:{root}", train=train, **options).pixels.numpy()


def chw(pixels: np.ndarray) -> np.ndarray:
    return pixels.transpose(2, 0, 1)


def test_a_folder_is_read_in_the_order_of_its_paths(tree):
    (tree / "train/thumbs.png").mkdir()
    order = [3, 2, 4, 1, 6, 0, 5]  # a/deep/z a/y a-b/x b/10 b/2 b/x last
    assert np.array_equal(load_folder(tree), [chw(noise(9, 7, 3, seed=i)) for i in order])
    images = load_images(f"folder:{tree}", train=False)
    assert np.array_equal(images.pixels.numpy(), chw(noise(9, 7, 3, seed=99))[None])
    assert (images.source, images.split, images.pixels.dtype) == (f"folder:{tree}", "test", torch.uint8)


def test_image_files_come_in_a_fixed_order_and_others_are_passed_over(tree):
    (tree / "train/.hidden.png").touch()
    names = [path.relative_to(tree / "train").as_posix() for path in image_files(tree / "train")]
    assert names == [
        ".hidden.png", "last.png", "a/y.PNG", "a/deep/z.png", "a-b/x.png", "b/10.png", "b/2.png", "b/x.png"
    ]  # fmt: skip


def test_an_image_folder_is_read_as_torchvision_reads_it(tmp_path):
    for i, name in enumerate(["dog/3.jpg", "cat/1.jpeg", "cat/0.png", "dog/20.bmp", "cat/2.webp", "eel/0.tiff"]):
        save(tmp_path / "train" / name, noise(8, 8, 3, seed=i))
    plain = [chw(np.asarray(image)) for image, _ in ImageFolder(tmp_path / "train")]
    assert np.array_equal(load_folder(tmp_path), plain)


@pytest.mark.parametrize("call", [check_source, lambda source: load_images(source, train=False)])
def test_a_missing_folder_or_split_is_named(tree, call):
    shutil.rmtree(tree / "test")
    assert f"{tree} has no folder test/; expected {tree}/train/ and" in refusal(lambda: call(f"folder:{tree}"))
    assert f"{tree / 'none'} is not a folder" in refusal(lambda: call(f"folder:{tree / 'none'}"))


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "train/class").mkdir(parents=True)
    (tmp_path / "train/notes.txt").write_text("not an image")
    message = refusal(lambda: load_folder(tmp_path))
    assert f"no images in {tmp_path / 'train'}" in message and ".jpg" in message


def test_mixed_sizes_name_the_file_that_differs(tree):
    save(tree / "train/b/odd.png", noise(7, 9, 3))
    message = refusal(lambda: load_folder(tree))
    assert message.startswith(f"{tree / 'train/b/odd.png'}: expected 7×9 pixels")
    assert "got 9×7" in message and 'fit="crop"' in message


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
    save(tmp_path / "train/1.png", first)
    save(tmp_path / "train/2.png", noise(30, 20, 3))
    pixels = load_folder(tmp_path, fit="crop")
    assert pixels.shape == (2, 3, 8, 8)
    assert np.array_equal(pixels[0], chw(first[:, 2:10]))


def test_images_that_do_not_fit_into_memory_are_refused(tree, monkeypatch):
    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    message = refusal(lambda: load_folder(tree))
    assert "7 images of 7×9 pixels need 0.0 GB of memory, 0.0 GB are free; use limit" in message


# Links, pipes and what else lies in a folder


def test_a_link_within_the_folder_is_followed_and_the_folder_may_be_one(tree, tmp_path):
    (tree / "train/z.png").symlink_to("last.png")
    (tree / "test/t/2.png").symlink_to("../../train/last.png")
    (tree / "link").symlink_to(".")
    images = load_folder(tree / "link")
    assert len(images) == 8 and np.array_equal(images[-1], images[-2])
    assert np.array_equal(load_folder(tree, train=False)[1], images[-1])


def to_itself(path: Path) -> None:
    path.symlink_to(path.with_name("other.png"))
    path.with_name("other.png").symlink_to(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: path.symlink_to("/etc/passwd"),
            "a link that leaves {root}, to /etc/passwd; put ",
        ),
        (lambda path: path.symlink_to("../../nothing.png"), "a link that leaves {root}, to "),
        (to_itself, "a link that leads to itself"),
        (lambda path: path.symlink_to(".."), "a link to a folder, which is not followed"),
        (os.mkfifo, "expected an image file, got something else"),
    ],
    ids=["out of the folder", "to nothing", "to itself", "to a folder", "a pipe"],
)
def test_a_link_or_pipe_named_like_an_image_is_refused_by_name(tree, make, message):
    path = tree / "train/new.png"
    make(path)
    assert refusal(lambda: load_folder(tree)).startswith(f"{path}: {message.format(root=tree)}")


def test_a_split_that_leads_out_of_the_folder_is_refused(tree, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.rmtree(tree / "test")
    (tree / "test").symlink_to(elsewhere)
    message = refusal(lambda: check_source(f"folder:{tree}"))
    assert message.startswith(f"{tree / 'test'}: a link that leaves {tree}, to {elsewhere}")


def test_a_folder_that_cannot_be_read_is_refused_and_not_left_out(tree, monkeypatch):
    real = os.scandir

    def scandir(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert refusal(lambda: load_folder(tree)) == f"{tree / 'train/a/deep'}: cannot be read (Permission denied)"


# What is asked for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[
            ({"data": source}, f"data: expected auto, photos, cifar10 or folder:PATH, got {source!r}")
            for source in ("CIFAR10", "", "folder", None, 3)
        ],
        *[
            ({"limit": limit}, f"limit: expected a whole number from 1, or none for all images, got {limit!r}")
            for limit in (0, -1, 1.0, True, "5")
        ],
        *[
            ({"fit": "crop", "image_size": size}, f"image_size: expected a whole number from 1 to {MAX_SIZE}")
            for size in (0, MAX_SIZE + 1, 4.0, True, (4, 8))
        ],
        ({"fit": "stretch"}, "fit: expected one of none, crop, got 'stretch'"),
        ({"data": "photos", "fit": "crop"}, "fit: only for images of a folder"),
        ({"image_size": 20}, 'image_size: only with fit="crop", got 20'),
        ({"train": "yes"}, "train: expected True or False, got 'yes'"),
    ],
)
def test_a_parameter_that_cannot_be_is_refused_by_name(tree, options, message):
    options = {"data": f"folder:{tree}", "train": True} | options
    assert message in refusal(lambda: load_images(**options), ParameterError)


def test_a_limit_keeps_the_first_of_a_seeded_permutation(photos, tree):
    chosen = np.random.RandomState(0).permutation(10_000)[:5]
    state = np.random.get_state()[1].copy()
    some = load_images("photos", train=False, limit=5)
    assert np.array_equal(some.pixels.numpy(), photos["test"].pixels.numpy()[chosen])
    chosen = np.random.RandomState(0).permutation(7)
    for limit in (3, 7, 1000):
        assert np.array_equal(load_folder(tree, limit=limit), load_folder(tree)[chosen[:limit]])
    assert np.array_equal(np.random.get_state()[1], state)  # the global generator is left alone


def test_the_fingerprint_tells_images_apart(tree):
    def fingerprint(**options):
        return load_images(f"folder:{tree}", train=True, **options).fingerprint

    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint(limit=3), fingerprint(fit="crop")}) == 3
    before = fingerprint()
    pixels = noise(9, 7, 3, seed=5)
    pixels[4, 4, 1] ^= 1
    save(tree / "train/last.png", pixels)
    assert fingerprint() != before
    values = torch.arange(24, dtype=torch.uint8)
    shapes = [(1, 3, 2, 4), (1, 3, 4, 2), (2, 3, 2, 2)]
    assert len({Images(values.reshape(shape), "x", "train").fingerprint for shape in shapes}) == 3
