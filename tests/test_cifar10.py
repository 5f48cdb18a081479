"""CIFAR-10 read and downloaded, from a server on this machine."""

import gzip
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
from transformnet_lib.images import load_images, resolve_source


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
        monkeypatch.setattr(cifar10, "CIFAR10_URL", f"http://127.0.0.1:{host.server_port}/cifar-10-python.tar.gz")
        monkeypatch.setattr(cifar10, "CIFAR10_BYTES", len(host.content), raising=False)
        monkeypatch.setattr(cifar10, "CIFAR10_MD5", hashlib.md5(host.content).hexdigest())
        thread = threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield host
        host.ended.set()
        host.shutdown()
        thread.join()


def test_a_download_can_be_read(server, cifar, tmp_path):
    folder = cifar10.download_cifar10(tmp_path / "new")
    assert folder == tmp_path / "new" / CIFAR10.base_folder
    assert server.paths == ["/cifar-10-python.tar.gz"]
    images = load_images(train=True, data_path=tmp_path / "new")
    assert images.source == "cifar10" and np.array_equal(images.pixels.numpy(), cifar["train"])


def test_what_is_there_is_not_downloaded_again(server, tmp_path):
    cifar10.download_cifar10(tmp_path)
    cifar10.download_cifar10(tmp_path)
    (tmp_path / CIFAR10.filename).unlink()  # the folder alone will do
    cifar10.download_cifar10(tmp_path)
    assert len(server.paths) == 1


def test_a_kept_archive_is_unpacked_again_where_the_folder_is_missing_or_damaged(server, cifar, tmp_path):
    folder = cifar10.download_cifar10(tmp_path)
    shutil.rmtree(folder)
    cifar10.download_cifar10(tmp_path)
    (folder / "data_batch_2").write_bytes(b"damaged")
    cifar10.download_cifar10(tmp_path)
    assert np.array_equal(load_images("cifar10", train=True, data_path=tmp_path).pixels.numpy(), cifar["train"])
    assert len(server.paths) == 1


def test_a_server_that_keeps_sending_is_given_up_and_leaves_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "CIFAR10_BYTES", len(server.content) - 1, raising=False)
    told = refusal(lambda: cifar10.download_cifar10(tmp_path))
    assert f"more than the archive's {len(server.content) - 1:,} bytes" in told
    assert list(tmp_path.rglob("*")) == []


def test_an_answer_that_is_packed_does_not_expand(server, tmp_path):
    server.content = gzip.compress(bytes(1_000_000))
    server.encoding = "gzip"
    told = refusal(lambda: cifar10.download_cifar10(tmp_path))
    assert "more than the archive" in told and server.asked["Accept-Encoding"] == "identity"
    assert list(tmp_path.rglob("*")) == []


def test_a_damaged_archive_is_downloaded_again(server, tmp_path):
    (tmp_path / CIFAR10.filename).write_bytes(b"half of it")
    cifar10.download_cifar10(tmp_path)
    assert len(server.paths) == 1


def test_a_download_with_the_wrong_hash_leaves_nothing(server, tmp_path):
    server.content = server.content[:-1] + bytes([server.content[-1] ^ 1])
    message = refusal(lambda: cifar10.download_cifar10(tmp_path))
    assert "download from http://127.0.0.1" in message and "hash" in message
    assert list(tmp_path.rglob("*")) == []


def test_a_broken_connection_leaves_nothing(server, tmp_path):
    server.lacking = 100
    assert "download from http://127.0.0.1" in refusal(lambda: cifar10.download_cifar10(tmp_path))
    assert list(tmp_path.rglob("*")) == []


def test_a_download_that_ends_early_without_a_word_leaves_nothing(server, tmp_path):
    server.content, server.lacking = server.content[: len(server.content) // 2], None
    assert "hash" in refusal(lambda: cifar10.download_cifar10(tmp_path))
    assert list(tmp_path.rglob("*")) == []


def stall(server) -> None:
    server.content, server.lacking, server.stalls = server.content[:500], 100_000, True


def test_a_download_that_stalls_is_given_up_and_leaves_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "DOWNLOAD_TIMEOUT", 0.2)
    stall(server)
    assert "failed: " in (told := refusal(lambda: cifar10.download_cifar10(tmp_path))) and "timed out" in told
    assert list(tmp_path.rglob("*")) == []


def test_a_name_that_is_not_found_is_one_line(tmp_path, monkeypatch):
    def unknown(*arguments, **options):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    told = refusal(lambda: cifar10.download_cifar10(tmp_path))
    assert told == (
        f"CIFAR-10: download from {cifar10.CIFAR10_URL} failed: [Errno -3] Temporary failure in name resolution; "
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
    told = refusal(lambda: cifar10.download_cifar10(tmp_path / "data" if name else place))
    assert told == f"{place}: expected a folder, got something else; remove it, or take another --data-path"
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_pipe_in_the_place_of_the_archive_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / CIFAR10.filename)
    told = refusal(lambda: cifar10.download_cifar10(tmp_path))
    assert told == f"{tmp_path / CIFAR10.filename}: expected a file, got something else; remove it"


def test_no_room_for_the_archive_leaves_nothing(server, tmp_path):
    with no_room_beyond(1000):
        told = refusal(lambda: cifar10.download_cifar10(tmp_path))
    assert "download from http://127.0.0.1" in told and "File too large" in told
    assert list(tmp_path.rglob("*")) == []


def test_no_room_to_unpack_keeps_the_archive_and_the_next_call_needs_no_network(server, cifar, tmp_path):
    archive = tmp_path / CIFAR10.filename
    archive.write_bytes(server.content)
    (tmp_path / CIFAR10.base_folder).mkdir()
    (tmp_path / CIFAR10.base_folder / "notes.txt").write_text("mine")
    with no_room_beyond(1000):
        assert "File too large" in refusal(lambda: cifar10.download_cifar10(tmp_path))
    assert [path.name for path in tmp_path.rglob("*.*")] == [archive.name, "notes.txt"]
    folder = cifar10.download_cifar10(tmp_path)
    assert np.array_equal(load_images("cifar10", train=True, data_path=tmp_path).pixels.numpy(), cifar["train"])
    assert (folder / "notes.txt").read_text() == "mine" and server.paths == []


def test_a_failed_download_leaves_an_older_archive_as_it_was(server, tmp_path):
    (tmp_path / CIFAR10.filename).write_bytes(b"an older one")
    server.content = server.content[:-1]
    assert "hash" in refusal(lambda: cifar10.download_cifar10(tmp_path))
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
        folder = cifar10.download_cifar10(tmp_path / "data")  # replaces them all
        assert payload not in {path.read_bytes() for path in folder.iterdir()}
        assert [path.name for path in tmp_path.iterdir()] == ["data"]
    else:
        server.content = hostile
        assert "hash" in refusal(lambda: cifar10.download_cifar10(tmp_path / "data"))
        assert [path.name for path in tmp_path.rglob("*")] == ["data"]
    pickle.loads(payload)  # so it would have been seen
    assert (tmp_path / "executed").is_dir()


def test_a_link_in_the_unpacked_folder_is_replaced_and_not_written_through(server, tmp_path):
    (tmp_path / "mine").write_text("mine")
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    (folder / "data_batch_1").symlink_to(tmp_path / "mine")
    cifar10.download_cifar10(tmp_path)
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
        last.startswith(f"error: CIFAR-10: download from {cifar10.CIFAR10_URL} failed: ")
        and "Traceback" not in told.err
    )


STALLED = """
import sys
from transformnet_lib import cli, cifar10
cifar10.CIFAR10_URL = sys.argv.pop(1)
cli.main()
"""


def test_ctrl_c_while_downloading_leaves_nothing(server, tmp_path):
    stall(server)
    arguments = [
        sys.executable,
        "-c",
        STALLED,
        cifar10.CIFAR10_URL,
        "data",
        "cifar10",
        "--data-path",
        tmp_path / "data",
    ]
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
    assert "404" in refusal(lambda: cifar10.download_cifar10(tmp_path))


def test_a_host_that_is_down_is_one_line(server, tmp_path):
    server.shutdown()
    server.server_close()
    message = refusal(lambda: cifar10.download_cifar10(tmp_path))
    assert cifar10.CIFAR10_URL in message and "refused" in message
    assert list(tmp_path.rglob("*")) == []


def test_cifar10_is_what_torchvision_says_it_is():
    assert (CIFAR10.url, CIFAR10.tgz_md5) == (cifar10.CIFAR10_URL, cifar10.CIFAR10_MD5)
    assert (cifar10.CIFAR10_FOLDER, Path(cifar10.CIFAR10_URL).name) == (CIFAR10.base_folder, CIFAR10.filename)
