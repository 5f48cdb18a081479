"""Read small files whole, write files whole or not at all, and let one process at a time write a folder."""

import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from .errors import ParameterError, RunError

LOCK_SECONDS = 3  # how long to wait for a folder in use; the kernel of a killed command ends within a second or two
PREFIX, SUFFIX = ".transformnet-", ".part"  # how the name of a file begins and ends that is still being written
NAME_CHARACTERS = 50  # of its own name between them; a file system allows 255 bytes, and a character takes up to 4


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


def read_file(path: Path, max_bytes: int) -> bytes:
    """The content of a file of at most `max_bytes`; RunError for anything else, such as a pipe, which would block."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise RunError(f"{path}: cannot be read (expected a file, got a folder or a device)")
        if status.st_size > max_bytes:
            raise RunError(f"{path}: expected at most {max_bytes:,} bytes, got {status.st_size:,}: not a file of ours")
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
    Permissions are those of any new file (the user's umask).
    """
    beside = {}
    try:
        for path, content in contents.items():
            part = f"{PREFIX}{path.name[:NAME_CHARACTERS]}.{uuid.uuid4().hex[:8]}{SUFFIX}"
            beside[path] = (parts or path.parent) / part
            with beside[path].open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _replace_all(beside)
    except BaseException:
        for part in beside.values():
            part.unlink(missing_ok=True)
        raise


def _replace_all(beside: dict[Path, Path]) -> None:
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
        for part in filter(is_leftover, folder.glob(f"{PREFIX}*{SUFFIX}")):
            part.unlink()
    except OSError as error:
        raise RunError(f"{error.filename or folder}: cannot be removed ({error.strerror}); remove it") from error


def is_leftover(path: Path) -> bool:
    """Whether a killed process had begun to write this."""
    named = path.name.startswith(PREFIX) and path.name.endswith(SUFFIX)
    return named and path.is_file() and not path.is_symlink()


@contextmanager
def locked(folder: Path, name: str = ".lock") -> Iterator[None]:
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
