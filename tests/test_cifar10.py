"""CIFAR-10, read from a tiny archive in its format and downloaded from a server on this machine."""

import hashlib
import http.server
import io
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise, refusal
from torchvision.datasets import CIFAR10

from transformnet_lib import cifar10, cli
from transformnet_lib.cifar10 import check_cifar10, download_cifar10, read_cifar10
from transformnet_lib.images import load_images, resolve_source


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A tiny CIFAR-10 below tmp_path; gives what was put in: {split: (count, 3, 32, 32)}."""
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


# Reading


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar10_is_read_pixel_by_pixel(cifar, tmp_path, split):
    images = load_images("cifar10", train=split == "train", data_path=tmp_path)
    assert np.array_equal(images.pixels.numpy(), cifar[split])
    assert images.pixels.dtype == torch.uint8
    assert (images.source, images.split) == ("cifar10", split)


@pytest.mark.parametrize("call", [check_cifar10, lambda path: read_cifar10(path, train=True)])
def test_absent_cifar10_says_how_to_get_it(tmp_path, call):
    message = refusal(lambda: call(tmp_path / "none"))
    assert "none/cifar-10-batches-py is not there" in message
    assert f"`transformnet data cifar10 --data-path {tmp_path / 'none'}`" in message and "data=photos" in message


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
def test_damaged_or_incomplete_cifar10_is_refused(cifar, tmp_path, damage, name):
    damage(tmp_path / CIFAR10.base_folder / name)
    message = refusal(lambda: read_cifar10(tmp_path, train=True))
    assert "is damaged or incomplete (an md5 differs)" in message and "`transformnet data cifar10" in message


def test_cifar10_that_may_not_be_read_is_refused(cifar, tmp_path, monkeypatch):
    def fail(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", fail)
    assert "damaged or incomplete" in refusal(lambda: read_cifar10(tmp_path, train=True))


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_nothing_is_unpickled_before_every_md5_was_checked(cifar, tmp_path, monkeypatch):
    payload = pickle.dumps(Payload(tmp_path / "executed"))
    first, last = (tmp_path / CIFAR10.base_folder / name for name in ("data_batch_1", "test_batch"))
    first.write_bytes(payload)
    refusal(lambda: read_cifar10(tmp_path, train=True))
    # The first file as listed, the last one damaged
    listed = [["data_batch_1", hashlib.md5(payload).hexdigest()], *CIFAR10.train_list[1:]]
    monkeypatch.setattr(CIFAR10, "train_list", listed)
    flip_a_bit(last)
    refusal(lambda: read_cifar10(tmp_path, train=True))
    assert not (tmp_path / "executed").exists()
    pickle.loads(payload)
    assert (tmp_path / "executed").is_dir()  # so it would have been seen


def test_auto_takes_cifar10_where_it_lies_and_photos_elsewhere(cifar, tmp_path):
    assert resolve_source("auto", tmp_path) == "cifar10"
    assert resolve_source("auto", tmp_path / "elsewhere") == "photos"
    assert resolve_source("photos", tmp_path) == "photos"
    assert load_images(train=False, data_path=tmp_path).source == "cifar10"


# Downloading


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content` with the faults that a test sets."""

    def do_GET(self):
        server = self.server
        server.paths.append(self.path)
        self.send_response(server.status)
        if server.missing is not None:  # else the end of the connection is the end of the file
            self.send_header("Content-Length", str(len(server.content) + server.missing))
        self.end_headers()
        self.wfile.write(server.content)
        if server.stalls:
            server.ended.wait(60)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(cifar, tmp_path, monkeypatch):
    """CIFAR-10's host on this machine, serving `cifar` packed; `server.paths` lists what was asked for."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(tmp_path / CIFAR10.base_folder, CIFAR10.base_folder)
    shutil.rmtree(tmp_path / CIFAR10.base_folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as host:
        host.content, host.status, host.missing, host.paths = packed.getvalue(), 200, 0, []
        host.stalls, host.ended = False, threading.Event()
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1")
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{host.server_port}/cifar-10-python.tar.gz")
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(host.content).hexdigest())
        thread = threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield host
        host.ended.set()
        host.shutdown()
        thread.join()


def names(folder: Path) -> list[str]:
    """Everything below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_what_is_downloaded_can_be_read_and_is_not_downloaded_again(server, cifar, tmp_path):
    folder = download_cifar10(tmp_path / "new")
    assert folder == tmp_path / "new" / CIFAR10.base_folder
    assert np.array_equal(read_cifar10(tmp_path / "new", train=True).numpy(), cifar["train"])
    assert len(names(tmp_path / "new")) == 9  # the archive, the folder and its seven files
    (tmp_path / "new" / CIFAR10.filename).unlink()  # the folder alone will do
    download_cifar10(tmp_path / "new")
    assert server.paths == ["/cifar-10-python.tar.gz"]


def test_a_kept_archive_is_unpacked_again_where_the_folder_is_missing_or_damaged(server, cifar, tmp_path):
    folder = download_cifar10(tmp_path)
    shutil.rmtree(folder)
    download_cifar10(tmp_path)
    (tmp_path / "mine").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    (folder / "data_batch_2").unlink()
    (folder / "data_batch_2").symlink_to(tmp_path / "mine")
    download_cifar10(tmp_path)
    assert np.array_equal(read_cifar10(tmp_path, train=True).numpy(), cifar["train"])
    assert (folder / "notes.txt").read_text() == (tmp_path / "mine").read_text() == "mine"
    assert len(server.paths) == 1


def flip(server) -> None:
    server.content = server.content[:-1] + bytes([server.content[-1] ^ 1])


def end_early(server) -> None:
    server.content, server.missing = server.content[: len(server.content) // 2], None


def stall(server) -> None:
    server.content, server.missing, server.stalls = server.content[:500], 100_000, True


def shut_down(server) -> None:
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (flip, "hash"),
        (end_early, "hash"),
        (lambda server: setattr(server, "missing", 100), "IncompleteRead"),
        (stall, "timed out"),
        (lambda server: setattr(server, "status", 404), "404"),
        (shut_down, "refused"),
    ],
    ids=["a bit flipped", "ends early", "connection broken", "stalls", "no page", "host down"],
)
def test_a_download_that_fails_is_one_line_and_leaves_an_older_archive_as_it_was(
    server, tmp_path, monkeypatch, fault, reason
):
    monkeypatch.setattr(cifar10, "DOWNLOAD_TIMEOUT", 0.5)
    (tmp_path / CIFAR10.filename).write_bytes(b"an older one")
    fault(server)
    message = refusal(lambda: download_cifar10(tmp_path))
    assert message.startswith(f"CIFAR-10: download from {CIFAR10.url} failed: ") and reason in message
    assert message.endswith("; try again, or use data=photos")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {CIFAR10.filename: b"an older one"}


def test_a_server_that_keeps_sending_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "CIFAR10_BYTES", 999)
    assert "the server sent more than the archive's 999 bytes" in refusal(lambda: download_cifar10(tmp_path))
    assert names(tmp_path) == []


def test_a_damaged_archive_is_downloaded_again(server, tmp_path):
    (tmp_path / CIFAR10.filename).write_bytes(server.content[:500])
    download_cifar10(tmp_path)
    assert len(server.paths) == 1


def test_the_reason_is_the_systems_own(tmp_path, monkeypatch):
    def unknown(*arguments, **options):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert refusal(lambda: download_cifar10(tmp_path)) == (
        f"CIFAR-10: download from {CIFAR10.url} failed: [Errno -3] Temporary failure in name resolution; "
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


def test_a_full_disk_leaves_nothing_half_and_keeps_the_archive(server, tmp_path):
    with no_room_beyond(1000):
        assert "File too large" in refusal(lambda: download_cifar10(tmp_path))
        assert names(tmp_path) == []
    (tmp_path / CIFAR10.filename).write_bytes(server.content)
    with no_room_beyond(1000):
        assert "File too large" in refusal(lambda: download_cifar10(tmp_path))
    assert names(tmp_path) == [CIFAR10.filename]
    download_cifar10(tmp_path)
    assert len(server.paths) == 1  # the second time it needs no network


def test_a_file_in_the_place_of_the_folder_is_one_line(server, tmp_path):
    (tmp_path / "file").touch()
    assert "Not a directory" in refusal(lambda: download_cifar10(tmp_path / "file"))
    assert server.paths == []


def test_the_command_ends_in_one_line_and_status_1(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["transformnet", "data", "cifar10", "--data-path", str(tmp_path)])
    flip(server)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    streams = capsys.readouterr()
    assert ended.value.code == 1 and streams.out == ""
    assert "0%|" in streams.err and "Traceback" not in streams.err  # the progress bar
    last = streams.err.replace("\r", "\n").splitlines()[-1]
    assert last.startswith(f"error: CIFAR-10: download from {CIFAR10.url} failed: ")


STALLED = """
import sys
from torchvision.datasets import CIFAR10
from transformnet_lib import cli
CIFAR10.url = sys.argv.pop(1)
cli.main()
"""


def test_ctrl_c_while_downloading_leaves_nothing(server, tmp_path):
    stall(server)
    arguments = [sys.executable, "-c", STALLED, CIFAR10.url, "data", "cifar10", "--data-path", tmp_path / "data"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        # pooch's name for what is not yet whole; it makes the file, and then asks
        while not (list(tmp_path.glob("data/tmp*")) and server.paths):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode != 0 and "Traceback" not in errors
    assert names(tmp_path / "data") == []


def test_torchvision_names_the_folder_as_we_do():
    assert CIFAR10.base_folder == cifar10.CIFAR10_FOLDER
