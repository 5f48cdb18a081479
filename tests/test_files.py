"""Files written whole or not at all."""

import itertools
import os
from contextlib import suppress
from pathlib import Path

import pytest

from transformnet_lib import read_run
from transformnet_lib.errors import ParameterError, RunError
from transformnet_lib.files import PREFIX, SUFFIX, drop_leftovers, write_atomic, write_together
from transformnet_lib.images import resolve_source


@pytest.mark.parametrize("broken", ["os.replace", "os.fsync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_content_and_nothing_beside_it(tmp_path, monkeypatch, broken, error):
    write_atomic(tmp_path / "file", b"old")

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(broken, fail)
    with pytest.raises(type(error)):
        write_atomic(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def noted(*arguments, name=name, real=real):
            calls.append(name)
            real(*arguments)

        monkeypatch.setattr(os, name, noted)
    write_atomic(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace"]
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
@pytest.mark.parametrize("asked", [read_run, lambda path: resolve_source("auto", path)])
def test_a_path_that_cannot_be_looked_up_is_one_line(name, asked):
    with pytest.raises(ParameterError, match="no usable path"):
        asked(name)


def test_a_folder_source_may_have_a_name_as_long_as_folders_may():
    assert resolve_source("folder:" + "x" * 255)
    with pytest.raises(ParameterError, match=r"data: x+: no usable path \(File name too long\)"):
        resolve_source("folder:" + "x" * 256)


def test_a_leftover_that_cannot_be_removed_is_one_line(tmp_path, monkeypatch):
    (tmp_path / f"{PREFIX}a.x{SUFFIX}").touch()

    def refused(path):
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(RunError, match=r"a\.x\.part: cannot be removed \(Operation not permitted\)"):
        drop_leftovers(tmp_path)


def test_a_name_as_long_as_it_may_be_is_written(tmp_path):
    write_atomic(tmp_path / ("图" * 85), b"x")  # 255 bytes
    assert [path.name for path in tmp_path.iterdir()] == ["图" * 85]


def test_files_written_together_are_all_new_or_all_old(tmp_path, monkeypatch):
    files = {tmp_path / "page": b"new", tmp_path / "pdf": b"new"}
    for file in files:
        file.write_bytes(b"old")
    fsync, calls = os.fsync, itertools.count()

    def full(handle):
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", full)
        write_together(files)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys(files, b"old")
    write_together(files)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("there", [True, False])
def test_files_written_together_stay_all_old_if_one_cannot_be_replaced(tmp_path, there):
    if there:
        (tmp_path / "page").write_bytes(b"old")
    (tmp_path / "pdf").mkdir()  # as good as a file that another program holds open on Windows
    with pytest.raises(OSError):
        write_together({tmp_path / "page": b"new", tmp_path / "pdf": b"new"})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["page"] * there + ["pdf"]
    assert not there or (tmp_path / "page").read_bytes() == b"old"


def test_only_what_is_surely_ours_is_cleared_away(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, suppress(RuntimeError):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # who is killed clears nothing away
        write_atomic(tmp_path / "history.csv", b"half")
    (ours,) = tmp_path.iterdir()
    (tmp_path / ".ubuntu.iso.part").write_bytes(b"another program's")
    (tmp_path / ".transformnet-folder.part").mkdir()
    (tmp_path / ".transformnet-link.part").symlink_to(tmp_path / ".ubuntu.iso.part")
    others = set(tmp_path.iterdir()) - {ours}
    drop_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == others and len(others) == 3
