"""The folders of a run's stages: which are complete, what may be removed, and how one takes another's place."""

import shutil
from pathlib import Path

from .errors import RunError
from .files import is_leftover, locked

STAGES = ("train", "compare", "benchmark", "seeds", "study")  # each builds on the training
STAGE_FILES = {  # all that is ever removed from a stage's folder
    "parameters.json", "history.csv", "weights.safetensors", "checkpoint.safetensors", "images.safetensors",
    "tensorboard", "examples.npz",
    "settings.csv", "rounds.csv", "benchmark.csv", "seeds.csv", "libraries.csv", "library_rounds.csv", "sizes.csv",
    "size_rounds.csv", "stage.json", *(f"{name}.ipynb" for name in STAGES),
    ".ipynb_checkpoints", ".DS_Store",  # which JupyterLab and macOS leave where somebody looked
}  # fmt: skip


def is_complete(folder: Path) -> bool:
    """Whether a stage's folder holds a finished stage."""
    try:
        return (folder / "stage.json").exists()
    except OSError as error:
        raise RunError(f"{folder}: cannot be read ({error.strerror})") from error


def check_place(run_dir: Path, name: str) -> None:
    """Raise RunError if a stage cannot be made in `run_dir`: an older version's run is there, or somebody's files."""
    if (run_dir / "run.json").exists():
        raise RunError(
            f"{run_dir}: holds a run of an older version (run.json); remove it to make the run again, or take another "
            "run_dir"
        )
    for folder in (run_dir / name, run_dir / f"{name}.new"):
        _ours(folder)


def settle(path: Path) -> None:
    """Put stages that were made again in their places, also after a kill in just that: two renames, in this order."""
    try:
        for name in STAGES:
            folder, new, old = path / name, path / f"{name}.new", path / f"{name}.old"
            if is_complete(new):
                if folder.exists():
                    remove(old)
                    folder.rename(old)
                new.rename(folder)
            if folder.exists() or not is_complete(old):
                remove(old)
            else:
                old.rename(folder)
    except OSError as error:
        raise RunError(f"{path}: {error.filename} cannot be moved or removed ({error.strerror})") from error


def put_back(path: Path) -> None:
    """The same for a reader: only where a kill left a stage without its folder."""
    if any(is_complete(path / f"{name}.old") and not (path / name).exists() for name in STAGES):
        with locked(path):
            settle(path)


def _ours(folder: Path) -> list[Path]:
    """What a stage has in its folder, in the order to remove it; RunError if anything else is there.

    Removed in this order it is no complete stage from the first moment, and still one of ours to the last.
    """
    try:
        entries = list(folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise RunError(f"{folder}: cannot be read ({error.strerror})") from error
    names = {entry.name for entry in entries if not is_leftover(entry)}
    others = sorted(names - STAGE_FILES) or (names and not names & {"parameters.json", "stage.json"} and sorted(names))
    if others:
        raise RunError(
            f"{folder}: holds {others[0]!r}, which is not a run's; take another run_dir, or move it elsewhere"
        )
    first, last = "stage.json", "parameters.json"
    return sorted(entries, key=lambda entry: (entry.name != first, entry.name == last))


def empty(folder: Path) -> None:
    """Remove what a stage has in its folder."""
    try:
        for entry in _ours(folder):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    except OSError as error:
        raise RunError(f"{folder}: {error.filename} cannot be removed ({error.strerror})") from error


def remove(folder: Path) -> None:
    """Remove a stage's folder, if it is there."""
    empty(folder)
    if folder.exists():
        folder.rmdir()


def mark_for_remaking(run_dir: Path, name: str) -> None:
    """Note that a stage is to be made again, by the folder that this is done in beside a complete one."""
    try:
        (run_dir / f"{name}.new").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{run_dir}: cannot be written ({error.strerror})") from error


def is_marked(run_dir: Path, name: str) -> bool:
    """Whether a stage is to be made again, or was stopped in that."""
    return (run_dir / f"{name}.new").is_dir()
