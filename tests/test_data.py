"""The images and the ground truth: what `data.py` and `pipeline.py` promise, against plain versions written here."""

import gzip
import hashlib
import http.server
import io
import math
import os
import pickle
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import tifffile
import torch
from PIL import Image, ImageFile
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms import v2

from transformnet_lib import cli, data
from transformnet_lib.data import CustomDataset, load_images, resolve_source, split_indices
from transformnet_lib.errors import DataError, ParameterError
from transformnet_lib.pipeline import GRAY_WEIGHTS, MAX_SIZE, Pipeline, to_float

# What `photos` gives on every machine; if one of these moves, no older run can be compared with a new one.
PHOTO_FINGERPRINTS = {
    "train": "ea951e4d176e125c93849b495533891e94e40dfb570779b172f5ceeacfdfc0ed",
    "test": "bded9f26d2823d831d8512f82bf50224d0df03c46866eaced98dc2862f3a79ac",
}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Random bytes; as `(height, width, 3)` an image in Pillow's order."""
    return np.random.RandomState(seed).randint(0, 256, shape, np.uint8)


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def refusal(call, kind=DataError) -> str:
    """The message with which `call` is refused: one line, that of an error of ours."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


# The pipeline


def written_out(images: torch.Tensor, size: tuple[int, int], hflip: bool, vflip: bool) -> torch.Tensor:
    """The transforms as a user of torchvision would write them."""
    flips = [v2.RandomHorizontalFlip(p=1)] * hflip + [v2.RandomVerticalFlip(p=1)] * vflip
    return v2.Compose([v2.Resize(size, antialias=True), v2.Grayscale(), *flips])(images)


def test_the_default_pipeline_is_that_of_the_paper():
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = v2.Grayscale()(v2.Resize((28, 28), antialias=True)(images))
    assert torch.equal(Pipeline()(images), plain[:, :, range(27, -1, -1)][:, :, :, range(27, -1, -1)])
    assert str(Pipeline()) == "resize to 28×28 → grayscale → horizontal flip → vertical flip"


@pytest.mark.parametrize("size", [(28, 28), (16, 16), (20, 12), (1, 5), (48, 40)])
@pytest.mark.parametrize("hflip", [True, False])
@pytest.mark.parametrize("vflip", [True, False])
def test_any_pipeline_equals_torchvisions_transforms(size, hflip, vflip):
    images = torch.rand(3, 3, 32, 36, generator=torch.Generator().manual_seed(0))
    pipeline = Pipeline(size, hflip, vflip)
    assert torch.equal(pipeline(images), written_out(images, size, hflip, vflip))
    assert torch.equal(pipeline(images[0]), written_out(images[0], size, hflip, vflip))
    assert pipeline.flip_axes == {(1, 1): (-1, -2), (1, 0): (-1,), (0, 1): (-2,), (0, 0): ()}[hflip, vflip]
    assert Pipeline(**pipeline.to_dict()) == pipeline


def test_the_gray_weights_are_those_of_torchvision():
    primaries = torch.eye(3).reshape(3, 3, 1, 1).expand(3, 3, 28, 28)
    gray = Pipeline()(primaries)
    torch.testing.assert_close(gray, torch.tensor(GRAY_WEIGHTS).reshape(3, 1, 1, 1).expand_as(gray), rtol=0, atol=1e-6)


def test_one_number_means_a_square():
    assert Pipeline(20).size == (20, 20)
    assert Pipeline([20, 10]).size == (20, 10)


@pytest.mark.parametrize("size", [0, -1, MAX_SIZE + 1, 28.0, True, None, "28", (28,), (28, 28, 3), (28, 2.5), (0, 28)])
def test_a_size_that_is_none_is_refused(size):
    assert "size: expected one or two whole numbers from 1 to 4096" in refusal(lambda: Pipeline(size), ParameterError)


@pytest.mark.parametrize("name", ["hflip", "vflip"])
def test_a_flip_is_true_or_false(name):
    assert f"{name}: expected True or False, got 1" in refusal(lambda: Pipeline(**{name: 1}), ParameterError)


def test_bytes_become_floats_from_0_to_1_and_floats_stay():
    every = torch.arange(256, dtype=torch.uint8)
    assert to_float(every).dtype == torch.float32
    assert np.array_equal(to_float(every).numpy(), np.arange(256, dtype=np.float32) / np.float32(255))
    assert every[255] == 255  # the given bytes stay as they are
    floats = torch.rand(3)
    assert to_float(floats) is floats


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
        split: {name: [averaged(photograph(name), factor) for factor in (2, 4, 8)] for name in data.PHOTOS[split]}
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


# cifar10


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A tiny archive in CIFAR-10's format below tmp_path; gives what was put in: {split: (count, 3, 32, 32)}."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    pixels = {"train": noise(20, 3, 32, 32, seed=1), "test": noise(6, 3, 32, 32, seed=2)}

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    batches = [(f"data_batch_{i + 1}", pixels["train"][4 * i : 4 * i + 4]) for i in range(5)]
    listed = [
        [name, write(name, {"data": part.reshape(len(part), -1), "labels": [0] * len(part)})]
        for name, part in [*batches, ("test_batch", pixels["test"])]
    ]
    monkeypatch.setattr(CIFAR10, "train_list", listed[:5])
    monkeypatch.setattr(CIFAR10, "test_list", listed[5:])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": write("batches.meta", {"label_names": ["cat"]})})
    return pixels


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar10_is_read_pixel_by_pixel(cifar, tmp_path, split):
    images = load_images("cifar10", train=split == "train", data_path=tmp_path)
    assert np.array_equal(images.pixels.numpy(), cifar[split])
    assert images.pixels.dtype == torch.uint8
    assert (images.source, images.split) == ("cifar10", split)


def test_absent_cifar10_says_how_to_get_it(tmp_path):
    message = refusal(lambda: load_images("cifar10", train=True, data_path=tmp_path / "none"))
    assert "none/cifar-10-batches-py is not there" in message
    assert f"`transformnet data cifar10 --data-path {tmp_path / 'none'}`" in message and "data=photos" in message
    assert not (tmp_path / "none").exists()


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_4", "test_batch", "batches.meta"])
@pytest.mark.parametrize("train", [True, False])
def test_a_flipped_bit_in_cifar10_is_refused(cifar, tmp_path, name, train):
    path = tmp_path / CIFAR10.base_folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    message = refusal(lambda: load_images("cifar10", train=train, data_path=tmp_path))
    assert "is damaged or incomplete (an md5 differs)" in message and "`transformnet data cifar10" in message


def test_nothing_is_unpickled_before_every_md5_was_checked(cifar, tmp_path, monkeypatch):
    payload = pickle.dumps(Payload(tmp_path / "executed"))
    pickle.loads(payload)
    (tmp_path / "executed").rmdir()  # so it would be seen
    first, last = (tmp_path / CIFAR10.base_folder / name for name in ("data_batch_1", "test_batch"))
    first.write_bytes(payload)
    refusal(lambda: load_images("cifar10", train=True, data_path=tmp_path))
    # The first file as listed, the last one damaged
    listed = [["data_batch_1", hashlib.md5(payload).hexdigest()], *CIFAR10.train_list[1:]]
    monkeypatch.setattr(CIFAR10, "train_list", listed)
    last.write_bytes(last.read_bytes()[:-1])
    refusal(lambda: load_images("cifar10", train=True, data_path=tmp_path))
    assert not (tmp_path / "executed").exists()


def test_a_missing_batch_is_refused(cifar, tmp_path):
    (tmp_path / CIFAR10.base_folder / "data_batch_5").unlink()
    assert "damaged or incomplete" in refusal(lambda: load_images("cifar10", train=True, data_path=tmp_path))


def test_a_batch_of_another_shape_is_refused_unread(cifar, tmp_path):
    small = pickle.dumps({"data": noise(4, 100), "labels": [0] * 4}, protocol=2)
    (tmp_path / CIFAR10.base_folder / "data_batch_3").write_bytes(small)
    assert "damaged or incomplete" in refusal(lambda: load_images("cifar10", train=True, data_path=tmp_path))


def test_cifar10_that_may_not_be_read_is_refused(cifar, tmp_path, monkeypatch):
    def fail(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", fail)
    assert "damaged or incomplete" in refusal(lambda: load_images("cifar10", train=True, data_path=tmp_path))


def test_auto_takes_cifar10_where_it_lies_and_photos_elsewhere(cifar, tmp_path):
    assert resolve_source("auto", tmp_path) == "cifar10"
    assert resolve_source("auto", tmp_path / "elsewhere") == "photos"
    assert resolve_source("photos", tmp_path) == "photos"
    assert resolve_source("folder:x", tmp_path) == "folder:x"
    assert load_images(train=False, data_path=tmp_path).source == "cifar10"
    assert load_images(train=False, data_path=tmp_path / "elsewhere", limit=1).source == "photos"


# download_cifar10


@pytest.fixture
def server(cifar, tmp_path, monkeypatch):
    """CIFAR-10's host on this machine, serving `cifar` packed; `server.paths` lists what was asked for."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(tmp_path / CIFAR10.base_folder, CIFAR10.base_folder)
    shutil.rmtree(tmp_path / CIFAR10.base_folder)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.paths.append(self.path)
            self.server.asked = self.headers
            self.send_response(self.server.status)
            if self.server.lacking is not None:  # else the end of the connection is the end of the file
                self.send_header("Content-Length", str(len(self.server.content) + self.server.lacking))
            if self.server.encoding:
                self.send_header("Content-Encoding", self.server.encoding)
            self.end_headers()
            self.wfile.write(self.server.content)
            if self.server.stalls:
                self.server.ended.wait(60)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as host:
        host.content, host.status, host.lacking, host.paths = packed.getvalue(), 200, 0, []
        host.encoding = None
        host.stalls, host.ended = False, threading.Event()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(data, "CIFAR10_URL", f"http://127.0.0.1:{host.server_port}/cifar-10-python.tar.gz")
        monkeypatch.setattr(data, "CIFAR10_BYTES", len(host.content), raising=False)
        monkeypatch.setattr(data, "CIFAR10_MD5", hashlib.md5(host.content).hexdigest())
        thread = threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield host
        host.ended.set()
        host.shutdown()
        thread.join()


def test_a_download_can_be_read(server, cifar, tmp_path):
    folder = data.download_cifar10(tmp_path / "new")
    assert folder == tmp_path / "new" / CIFAR10.base_folder
    assert server.paths == ["/cifar-10-python.tar.gz"]
    images = load_images(train=True, data_path=tmp_path / "new")
    assert images.source == "cifar10" and np.array_equal(images.pixels.numpy(), cifar["train"])


def test_what_is_there_is_not_downloaded_again(server, tmp_path):
    data.download_cifar10(tmp_path)
    data.download_cifar10(tmp_path)
    (tmp_path / CIFAR10.filename).unlink()  # the folder alone will do
    data.download_cifar10(tmp_path)
    assert len(server.paths) == 1


def test_a_kept_archive_is_unpacked_again_where_the_folder_is_missing_or_damaged(server, cifar, tmp_path):
    folder = data.download_cifar10(tmp_path)
    shutil.rmtree(folder)
    data.download_cifar10(tmp_path)
    (folder / "data_batch_2").write_bytes(b"damaged")
    data.download_cifar10(tmp_path)
    assert np.array_equal(load_images("cifar10", train=True, data_path=tmp_path).pixels.numpy(), cifar["train"])
    assert len(server.paths) == 1


def test_a_server_that_keeps_sending_is_given_up_and_leaves_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CIFAR10_BYTES", len(server.content) - 1, raising=False)
    told = refusal(lambda: data.download_cifar10(tmp_path))
    assert f"more than the archive's {len(server.content) - 1:,} bytes" in told
    assert list(tmp_path.rglob("*")) == []


def test_an_answer_that_is_packed_does_not_expand(server, tmp_path):
    server.content = gzip.compress(bytes(1_000_000))
    server.encoding = "gzip"
    told = refusal(lambda: data.download_cifar10(tmp_path))
    assert "more than the archive" in told and server.asked["Accept-Encoding"] == "identity"
    assert list(tmp_path.rglob("*")) == []


def test_a_damaged_archive_is_downloaded_again(server, tmp_path):
    (tmp_path / CIFAR10.filename).write_bytes(b"half of it")
    data.download_cifar10(tmp_path)
    assert len(server.paths) == 1


def test_a_download_with_the_wrong_hash_leaves_nothing(server, tmp_path):
    server.content = server.content[:-1] + bytes([server.content[-1] ^ 1])
    message = refusal(lambda: data.download_cifar10(tmp_path))
    assert "download from http://127.0.0.1" in message and "hash" in message
    assert list(tmp_path.rglob("*")) == []


def test_a_broken_connection_leaves_nothing(server, tmp_path):
    server.lacking = 100
    assert "download from http://127.0.0.1" in refusal(lambda: data.download_cifar10(tmp_path))
    assert list(tmp_path.rglob("*")) == []


def test_a_download_that_ends_early_without_a_word_leaves_nothing(server, tmp_path):
    server.content, server.lacking = server.content[: len(server.content) // 2], None
    assert "hash" in refusal(lambda: data.download_cifar10(tmp_path))
    assert list(tmp_path.rglob("*")) == []


def stall(server) -> None:
    server.content, server.lacking, server.stalls = server.content[:500], 100_000, True


def test_a_download_that_stalls_is_given_up_and_leaves_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 0.2)
    stall(server)
    assert "failed: " in (told := refusal(lambda: data.download_cifar10(tmp_path))) and "timed out" in told
    assert list(tmp_path.rglob("*")) == []


def test_a_name_that_is_not_found_is_one_line(tmp_path, monkeypatch):
    def unknown(*arguments, **options):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    told = refusal(lambda: data.download_cifar10(tmp_path))
    assert told == (
        f"CIFAR-10: download from {data.CIFAR10_URL} failed: [Errno -3] Temporary failure in name resolution; "
        "try again, or use data=photos"
    )


@contextmanager
def no_room_beyond(size: int):
    """No file can grow beyond `size` bytes: what a full disk is to a program."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", [CIFAR10.base_folder, ""], ids=["the batches' folder", "data_path"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_folder_to_unpack_into_is_refused_before_the_download(server, tmp_path, name, kind):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").mkdir()
    place = tmp_path / "data" / name if name else tmp_path / "file"
    place.symlink_to(tmp_path / ("elsewhere" if name else "nothing")) if kind == "link" else place.touch()
    told = refusal(lambda: data.download_cifar10(tmp_path / "data" if name else place))
    assert told == f"{place}: expected a folder, got something else; remove it, or take another --data-path"
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_pipe_in_the_place_of_the_archive_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / CIFAR10.filename)
    told = refusal(lambda: data.download_cifar10(tmp_path))
    assert told == f"{tmp_path / CIFAR10.filename}: expected a file, got something else; remove it"


def test_no_room_for_the_archive_leaves_nothing(server, tmp_path):
    with no_room_beyond(1000):
        told = refusal(lambda: data.download_cifar10(tmp_path))
    assert "download from http://127.0.0.1" in told and "File too large" in told
    assert list(tmp_path.rglob("*")) == []


def test_no_room_to_unpack_keeps_the_archive_and_the_next_call_needs_no_network(server, cifar, tmp_path):
    archive = tmp_path / CIFAR10.filename
    archive.write_bytes(server.content)
    (tmp_path / CIFAR10.base_folder).mkdir()
    (tmp_path / CIFAR10.base_folder / "notes.txt").write_text("mine")
    with no_room_beyond(1000):
        assert "File too large" in refusal(lambda: data.download_cifar10(tmp_path))
    assert [path.name for path in tmp_path.rglob("*.*")] == [archive.name, "notes.txt"]
    folder = data.download_cifar10(tmp_path)
    assert np.array_equal(load_images("cifar10", train=True, data_path=tmp_path).pixels.numpy(), cifar["train"])
    assert (folder / "notes.txt").read_text() == "mine" and server.paths == []


def test_a_failed_download_leaves_an_older_archive_as_it_was(server, tmp_path):
    (tmp_path / CIFAR10.filename).write_bytes(b"an older one")
    server.content = server.content[:-1]
    assert "hash" in refusal(lambda: data.download_cifar10(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {CIFAR10.filename: b"an older one"}


def hostile_archive(payload: bytes, outside: Path) -> bytes:
    """An archive like CIFAR-10's whose batches are `payload`, with names that lead out of the folder besides."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list] + [CIFAR10.meta["filename"]]
        for name in [*(f"{CIFAR10.base_folder}/{name}" for name in names), "../outside", str(outside)]:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return packed.getvalue()


@pytest.mark.parametrize("where", ["on the host", "in the folder"])
def test_nothing_of_a_hostile_archive_is_unpacked_or_unpickled(server, tmp_path, where):
    payload = pickle.dumps(Payload(tmp_path / "executed"))
    hostile = hostile_archive(payload, tmp_path / "absolute")
    if where == "in the folder":  # an older archive, and what it unpacks to
        (tmp_path / "data" / CIFAR10.base_folder).mkdir(parents=True)
        (tmp_path / "data" / CIFAR10.filename).write_bytes(hostile)
        for name in ("data_batch_1", "test_batch", "batches.meta"):
            (tmp_path / "data" / CIFAR10.base_folder / name).write_bytes(payload)
        folder = data.download_cifar10(tmp_path / "data")  # replaces them all
        assert payload not in {path.read_bytes() for path in folder.iterdir()}
        assert [path.name for path in tmp_path.iterdir()] == ["data"]
    else:
        server.content = hostile
        assert "hash" in refusal(lambda: data.download_cifar10(tmp_path / "data"))
        assert [path.name for path in tmp_path.rglob("*")] == ["data"]
    pickle.loads(payload)  # so it would have been seen
    assert (tmp_path / "executed").is_dir()


def test_a_link_in_the_unpacked_folder_is_replaced_and_not_written_through(server, tmp_path):
    (tmp_path / "mine").write_text("mine")
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    (folder / "data_batch_1").symlink_to(tmp_path / "mine")
    data.download_cifar10(tmp_path)
    assert (tmp_path / "mine").read_text() == "mine" and not (folder / "data_batch_1").is_symlink()


def test_the_command_ends_in_one_line_and_status_1(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["transformnet", "data", "cifar10", "--data-path", str(tmp_path)])
    server.content = server.content[:-1]
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr()
    assert ended.value.code == 1 and told.out == ""
    last = told.err.replace("\r", "\n").splitlines()[-1]
    assert (
        last.startswith(f"error: CIFAR-10: download from {data.CIFAR10_URL} failed: ") and "Traceback" not in told.err
    )


STALLED = """
import sys
from transformnet_lib import cli, data
data.CIFAR10_URL = sys.argv.pop(1)
cli.main()
"""


def test_ctrl_c_while_downloading_leaves_nothing(server, tmp_path):
    stall(server)
    arguments = [sys.executable, "-c", STALLED, data.CIFAR10_URL, "data", "cifar10", "--data-path", tmp_path / "data"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob("data/tmp*")):  # pooch's name for what is not yet whole
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert process.returncode != 0 and "Traceback" not in told
    assert list((tmp_path / "data").iterdir()) == []


def test_a_missing_page_is_refused(server, tmp_path):
    server.status = 404
    assert "404" in refusal(lambda: data.download_cifar10(tmp_path))


def test_a_host_that_is_down_is_one_line(server, tmp_path):
    server.shutdown()
    server.server_close()
    message = refusal(lambda: data.download_cifar10(tmp_path))
    assert data.CIFAR10_URL in message and "refused" in message
    assert list(tmp_path.rglob("*")) == []


# folder


@pytest.fixture
def tree(tmp_path):
    """An image folder of 7 PNG training images, 9×7 (height 9), in two classes and beside them, and a test image."""
    names = ["b/x.png", "b/10.png", "a/y.PNG", "a/deep/z.png", "a-b/x.png", "last.png", "b/2.png"]
    for i, name in enumerate(names):
        save(tmp_path / "train" / name, noise(9, 7, 3, seed=i))
    save(tmp_path / "test" / "t" / "1.png", noise(9, 7, 3, seed=99))
    (tmp_path / "train" / "notes.txt").write_text("not an image")
    return tmp_path


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
    monkeypatch.setattr(data, "MAX_PIXELS", 63)
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


def test_cifar10_is_what_torchvision_says_it_is():
    assert (CIFAR10.url, CIFAR10.tgz_md5) == (data.CIFAR10_URL, data.CIFAR10_MD5)
    assert (data.CIFAR10_FOLDER, Path(data.CIFAR10_URL).name) == (CIFAR10.base_folder, CIFAR10.filename)


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
    images = [data.Images(torch.tensor(list(same), dtype=torch.uint8).reshape(shape), "x", "train") for shape in shapes]
    assert len({each.fingerprint for each in images}) == 3


# CustomDataset


@pytest.mark.parametrize("cache", [True, False])
def test_items_are_float_pairs_from_0_to_1(cifar, tmp_path, cache):
    dataset = CustomDataset(tmp_path, True, cache)  # the assignment's call
    assert len(dataset) == 20
    for i in (0, 7, 19):
        image, target = dataset[i]
        assert image.shape == (3, 32, 32) and target.shape == (1, 28, 28)
        assert image.dtype == target.dtype == torch.float32
        assert np.array_equal(image.numpy(), cifar["train"][i].astype(np.float32) / np.float32(255))
        assert target.min() >= 0 and target.max() <= 1
        torch.testing.assert_close(target, written_out(image, (28, 28), True, True), rtol=0, atol=1e-6)


def test_cached_targets_equal_uncached_ones_for_any_pipeline(tree):
    pipeline = Pipeline((5, 4), hflip=False)
    options = {"data": f"folder:{tree}", "pipeline": pipeline}
    cached, uncached = (CustomDataset(cache=cache, **options) for cache in (True, False))
    assert cached.targets.shape == (7, 1, 5, 4) and uncached.targets is None
    for (image, target), (same_image, same_target) in zip(cached, uncached, strict=False):
        assert torch.equal(image, same_image)
        torch.testing.assert_close(target, same_target, rtol=0, atol=1e-6)
        torch.testing.assert_close(target, written_out(image, (5, 4), False, True), rtol=0, atol=1e-6)


def test_targets_computed_in_batches_lack_and_repeat_none(cifar, tmp_path, monkeypatch):
    whole = CustomDataset(tmp_path).targets
    monkeypatch.setattr(data, "TARGET_BATCH", 3)
    torch.testing.assert_close(CustomDataset(tmp_path).targets, whole, rtol=0, atol=1e-6)


def test_the_test_split_is_the_other_one(cifar, tmp_path):
    dataset = CustomDataset(tmp_path, train=False)
    assert (dataset.source, dataset.split, len(dataset)) == ("cifar10", "test", 6)
    assert np.array_equal(dataset.images.numpy(), cifar["test"])


def test_images_are_held_once_as_bytes(cifar, tmp_path):
    dataset = CustomDataset(tmp_path, cache=False)
    assert dataset.images.dtype == torch.uint8
    held = [value for value in vars(dataset).values() if isinstance(value, torch.Tensor)]
    assert sum(value.untyped_storage().nbytes() for value in held) == 20 * 3 * 32 * 32


def test_a_limited_dataset_does_not_keep_the_whole(photos):
    dataset = CustomDataset(data="photos", train=False, limit=10, cache=False)
    assert dataset.images.untyped_storage().nbytes() == 10 * 3 * 32 * 32


def test_a_dataset_can_be_asked_for_again_from_its_request(tree):
    dataset = CustomDataset(tree, data=f"folder:{tree}", limit=4, fit="crop", image_size=5)
    again = CustomDataset(**dataset.request)
    assert again.fingerprint == dataset.fingerprint and again.request == dataset.request


def test_the_other_split_is_cropped_to_the_size_of_the_first(tmp_path):
    save(tmp_path / "train" / "1.png", noise(8, 12, 3))
    save(tmp_path / "test" / "1.png", noise(30, 20, 3))
    trained = CustomDataset(tmp_path, data=f"folder:{tmp_path}", fit="crop")
    assert CustomDataset(**trained.request, train=False).images.shape == trained.images.shape == (1, 3, 8, 8)


def test_the_request_says_what_auto_became(cifar, tmp_path):
    assert CustomDataset(tmp_path, cache=False).request["data"] == "cifar10"


# split_indices


@pytest.mark.parametrize(("count", "expected"), [(50_000, [45_000, 5_000]), (10, [9, 1]), (7, [6, 1])])
def test_a_split_parts_all_images_and_repeats_none(count, expected):
    parts = split_indices(count)
    assert [len(part) for part in parts] == expected
    assert sorted(torch.cat(parts).tolist()) == list(range(count))


def test_a_split_depends_on_its_seed_alone():
    torch.manual_seed(1)
    first = split_indices(100, seed=3)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, split_indices(100, seed=3), strict=True))
    assert not torch.equal(first[1], split_indices(100, seed=4)[1])
    assert first[1].tolist() != sorted(first[1].tolist())  # shuffled


@pytest.mark.parametrize(("count", "val_fraction"), [(0, 0.1), (1, 0.1), (4, 0.1), (10, 0.0), (10, 1.0), (1, 0.6)])
def test_too_few_images_for_a_split_are_refused(count, val_fraction):
    message = refusal(lambda: split_indices(count, val_fraction=val_fraction), ParameterError)
    assert f"at least one training and one validation image, got {count} images" in message


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
