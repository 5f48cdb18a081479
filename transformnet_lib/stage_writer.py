"""Writing one stage of a run: `stage` gives a StageWriter to whoever does the work, if there is any to do."""

import io
import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors.torch
import torch

from .dataset import CustomDataset
from .errors import ParameterError, RunError
from .files import drop_leftovers, locked, write_atomic
from .machine import environment, git_commit
from .records import FORMAT, Begun, Environment, Finished, ImageSet, Record, parse_record, read_table
from .run import checked_path, read_run
from .stage_folder import check_place, empty, is_complete, remove, settle

TIMED = ("benchmark", "study")  # stages whose results are times


class StageWriter:
    """A stage at work: the folder that its files go to, and the `results` to put into stage.json."""

    def __init__(self, folder: Path, force: bool):
        self.folder, self.force, self.results = folder, force, {}

    def write(self, name: str, content: bytes) -> None:
        """Write one of the stage's files, whole or not at all."""
        try:
            write_atomic(self.folder / name, content)
        except OSError as error:
            raise RunError(
                f"{self.folder / name}: cannot be written ({error.strerror}); the old file is kept"
            ) from error

    def write_record(self, name: str, record: Record) -> None:
        self.write(name, (record.model_dump_json(indent=2) + "\n").encode())

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """Write a DataFrame as CSV, floats in full precision."""
        self.write(name, table.to_csv(index=False).encode())

    def write_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write tensors as safetensors."""
        contiguous = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        self.write(name, safetensors.torch.save(contiguous))

    def write_arrays(self, name: str, **arrays: np.ndarray) -> None:
        """Write arrays as compressed npz."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        self.write(name, buffer.getvalue())

    def read_table(self, name: str, columns: dict[str, str]) -> pd.DataFrame | None:
        """The table that an earlier sitting left, or None."""
        return self.earlier(name, lambda path: read_table(path, columns))

    def earlier(self, name: str, read: Callable) -> object | None:
        """What an earlier sitting left, as `read` reads it; None for nothing, and with force for what is damaged."""
        path = self.folder / name
        try:
            return read(path) if path.exists() else None
        except RunError:
            if self.force:
                return None
            raise


@contextmanager
def stage(
    run_dir: str | Path,
    name: str,
    parameters: dict,
    *,
    dataset: CustomDataset,
    device: torch.device,
    force: bool = False,
) -> Iterator[StageWriter | None]:
    """Do one stage of a run, alone: `with stage(…) as writer: if writer: do the work, fill writer.results`.

    Gives None where the stage is complete with the same parameters and images. One that was stopped goes on in its
    folder; RunError if that was begun with other parameters, images or PyTorch. `force` makes the stage again whatever
    the run holds: beside a complete one, in `<name>.new`, which takes its place when it is complete. A stage made with
    an earlier training is made again without being asked. A folder that holds anybody's own files is refused.
    """
    if type(force) is not bool:  # papermill's -p turns "no" into a true string
        raise ParameterError(f"force: expected True or False, got {force!r}")
    path = checked_path(run_dir)
    with locked(path):
        drop_leftovers(path)
        settle(path)
        training = uuid.uuid4().hex if name == "train" else read_run(path, stages=["train"]).train.training
        begun = Begun(
            format=FORMAT,
            training=training,
            parameters=json.loads(json.dumps(parameters)),  # as they will be read back
            images=ImageSet.of(dataset),
            environment=Environment(**environment(device)),
            commit=git_commit(),
            started=now(),
            sittings=1,
        )
        folder, new = path / name, path / f"{name}.new"
        before = _begun(folder, force)
        if is_complete(folder) and not force and (name == "train" or before.training == training):
            if differing := _differences(before, begun):
                raise RunError(
                    f"{path}: stage {name} was made with other parameters ({differing}); "
                    "give those of before, take another run_dir (RUNS_DIR=), or make it again by force=True (--force, "
                    "FORCE=1)"
                )
            yield None
            return
        check_place(path, name)
        if force and is_complete(folder):
            folder, before = new, _begun(new, force)
        if before and not is_complete(folder):
            begun = _continued(path, name, before, begun, force)
        if begun.sittings == 1:
            empty(folder)
        writer = StageWriter(folder, force)
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"{folder}: cannot be written ({error.strerror})") from error
        drop_leftovers(folder)
        writer.write_record("parameters.json", begun)
        start = time.perf_counter()
        yield writer
        finished = Finished(
            results=json.loads(json.dumps(writer.results)), seconds=time.perf_counter() - start, finished=now()
        )
        if folder != new:
            remove(new)  # the mark, or what was begun beside a stage that is now made again
        writer.write_record("stage.json", finished)
        settle(path)


def _begun(folder: Path, force: bool) -> Begun | None:
    """With what a stage was begun; None if it was not. RunError if that is damaged, unless it shall be made again."""
    path = folder / "parameters.json"
    if not is_complete(folder) and not path.exists():
        return None
    try:
        return parse_record(Begun, path)
    except RunError:
        if force:
            return None
        raise


def _continued(path: Path, name: str, before: Begun, begun: Begun, force: bool) -> Begun:
    """What a stopped stage goes on with, or `begun` where it shall begin again."""
    if name != "train" and before.training != begun.training:
        return begun  # made with an earlier training
    differing = _differences(before, begun)
    # Times of two machines in one table would be compared
    names = ("torch", "cpu", "device_name", "threads") if name in TIMED else ("torch",)
    old, new = ({name: getattr(each.environment, name) for name in names} for each in (before, begun))
    differing = differing or "; ".join(f"{name}: {old[name]} → {new[name]}" for name in names if old[name] != new[name])
    # Who makes a stage again wants nothing in it of an older version, or of another machine's times
    if force and (differing or (before.commit, before.environment) != (begun.commit, begun.environment)):
        return begun
    if differing:
        raise RunError(
            f"{path}: stage {name} was begun with other parameters ({differing}); "
            "give those of before, take another run_dir (RUNS_DIR=), or begin again by force=True (--force, FORCE=1)"
        )
    return before.model_copy(update={"sittings": before.sittings + 1})


def _differences(before: Begun, begun: Begun) -> str:
    """What differs between two beginnings, in words; "" for nothing. Where the images lie does not count."""
    old, new = dict(before.parameters), dict(begun.parameters)
    if before.images.fingerprint != begun.images.fingerprint:
        old["images"], new["images"] = str(before.images), str(begun.images)
    return "; ".join(f"{key}: {old.get(key)!r} → {new.get(key)!r}" for key in old | new if old.get(key) != new.get(key))


def now() -> datetime:
    """The time in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0)
