"""Files written whole or not at all, and folders that one process at a time may write."""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from .errors import ParameterError, RunError

LOCK_SECONDS = 3  # how long to wait for a run in use; a killed command's kernel ends within a second or two
OURS, PART = ".transformnet-", ".part"  # how the name of a file begins and ends that is still being written
MOST_SIGNS = 50  # of its own name between them; a file system allows 255 bytes, and a sign takes up to 4


def check_path(name: str, path: str | Path) -> None:
    """ParameterError for a path that cannot be looked up, or that is no UTF-8, so that no notebook could hold it."""
    try:
        str(path).encode()
        os.lstat(path)
    except UnicodeEncodeError as error:
        raise ParameterError(f"{name}: expected a path in UTF-8, got {str(path)!r}; rename the folder") from error
    except (FileNotFoundError, NotADirectoryError):
        pass  # not there yet; who needs it says so
    except (OSError, ValueError) as error:  # a name too long, a NUL
        raise ParameterError(f"{name}: {path}: no usable path ({getattr(error, 'strerror', error)})") from error


def read_plain(path: Path, most: int) -> bytes:
    """The content of a plain file of at most `most` bytes; RunError for anything else.

    Links are not followed, since they may lead anywhere, and pipes not waited for.
    """
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise RunError(f"{path}: cannot be read (expected a plain file, got a link, a folder or a device)")
        if found.st_size > most:
            raise RunError(f"{path}: larger than {most:,} bytes, so not a file of ours")
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from error


def write_atomic(path: Path, content: bytes, *, parts: Path | None = None) -> None:
    """Write `content` to `path` whole or not at all, as `write_together` does."""
    write_together({path: content}, parts=parts)


def write_together(contents: dict[Path, bytes], *, parts: Path | None = None) -> None:
    """Write files whole, and all or none of them: all beside their places, flushed to the disk, before one is renamed.

    A process that is killed meanwhile may leave what it wrote beside them; `drop_leftovers` clears that away. `parts`
    is a folder on the same disk to write them in instead, where their places are too many to be searched for that.
    """
    beside = {}
    try:
        for path, content in contents.items():
            # Of the name only its begin: with ours around it, it could be too long
            prefix = f"{OURS}{path.name[:MOST_SIGNS]}."
            handle, beside[path] = tempfile.mkstemp(dir=parts or path.parent, prefix=prefix, suffix=PART)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(beside[path], 0o644)  # mkstemp's 0600 would keep colleagues from reading a shared run
        _replace_all(beside)
    except BaseException:
        for left in beside.values():
            Path(left).unlink(missing_ok=True)
        raise


def _replace_all(beside: dict[Path, str]) -> None:
    """Rename files to their places; if one cannot be, those before it get their old content back."""
    replaced = {}
    try:
        for path, part in beside.items():
            old = path.read_bytes() if len(beside) > 1 and path.is_file() else None
            os.replace(part, path)
            replaced[path] = old
    except BaseException:
        for path, old in replaced.items():
            path.unlink() if old is None else write_atomic(path, old)
        raise


def drop_leftovers(folder: Path) -> None:
    """Delete what killed processes had begun to write in `folder`; for whoever alone writes there."""
    try:
        for left in folder.glob(f"{OURS}*{PART}"):
            if left.is_file() and not left.is_symlink():
                left.unlink()
    except OSError as error:
        raise RunError(f"{error.filename or folder}: cannot be removed ({error.strerror}); remove it") from error


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock `name` of `folder`, which is made if need be; RunError if another process holds it."""
    lock = filelock.FileLock(folder / name, timeout=LOCK_SECONDS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        raise RunError(f"{folder}: in use by another command; wait for it, or take another folder") from error
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        lock.release()
