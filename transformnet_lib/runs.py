"""The run directory: the one thing that notebooks fill and the report reads.

A run is one training and the stages executed on it. `run.json` says what was done, with what, where and how it ended;
the other files hold results. Our own files are written whole or not at all. Reading one executes nothing, whoever made
it: JSON and CSV are checked against a schema, arrays and weights are loaded without pickle (`untrusted.py`), links are
not followed. Its texts are any: who shows one escapes it.
"""

import io
import itertools
import json
import os
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path

import fastjsonschema
import numpy as np
import pandas as pd
import torch

from .errors import ParameterError, RunError, one_line
from .files import check_path, drop_leftovers, locked, read_plain, write_atomic
from .machine import environment, git_commit
from .pipeline import Pipeline
from .untrusted import MAX_BYTES, MAX_TEXT_BYTES, is_amount, load_tensors, parse_json, parse_table, unpack_arrays

FORMAT = 2  # of the run directory; raised when a reader of the old one would go wrong
REFERENCE = Path(__file__).resolve().parents[1] / "report" / "reference"  # runs that are shipped with the project
SHIPPED_SIGN = "†"  # ends the label of a shipped run, so that no number of it passes for one measured here
ROUNDING = 1e-5  # of a pixel in [0, 1], when float32 values that were computed apart are compared

# In a kernel: the notebook that a command executes there. The stage's work alone is then "done", and the command makes
# it "complete" when the notebook has run to its end. Without a command the work is all.
EXECUTING = "TRANSFORMNET_EXECUTING"
COMMAND_LOCK = ".command.lock"  # held from a command's first cell to its last, and by whoever does a stage without one
TENSORBOARD = "tensorboard"  # a folder of event files; what else a stage writes is a file

# What each stage writes, and so what goes when the stage is made anew. A stage builds on those before it.
STAGE_FILES = {
    "train": ("history.csv", "weights.pt", "checkpoint.pt", TENSORBOARD),
    "compare": ("examples.npz",),
    "benchmark": ("benchmark.csv",),
    "study": ("seeds.csv", "peers.csv", "sizes.csv"),
}

RESULT_NUMBERS = {"compare": ("test_mse", "max_error")}  # that a complete stage's results hold

HISTORY_COLUMNS = {
    "epoch": "int",
    "train_mse": "float",
    "val_mse": "float",
    "epoch_seconds": "float",
    "red": "float",
    "green": "float",
    "blue": "float",
}
EXAMPLE_ARRAYS = {  # their dtype and rank
    "indices": ("int64", 1),
    "inputs": ("uint8", 4),
    "targets": ("float32", 4),
    "outputs": ("float32", 4),
}

_text = {"type": "string", "maxLength": 10_000}
_count = {"type": "integer", "minimum": 1}
_side = {"type": "integer", "minimum": 1, "maximum": 2**26}  # pixels; as many as an image file may have in all
# What has no schema of its own, parameters and results: plain values and lists of them, by name, not too deep
_scalar = {"type": ["string", "number", "boolean", "null"], "maxLength": 10_000}
_values = {"anyOf": [_scalar, {"type": "array", "items": _scalar, "maxItems": 100_000}]}


def _named(values: dict) -> dict:
    return {"type": "object", "patternProperties": {"^[\\s\\S]{1,100}$": values}, "additionalProperties": False}


_plain = _named({"anyOf": [_values, _named({"anyOf": [_values, _named(_values)]})]})
_images = {
    "type": "object",
    "required": ["source", "split", "count", "size", "fingerprint", "request"],
    "additionalProperties": False,
    "properties": {
        "source": {"type": "string", "maxLength": 10_000, "pattern": "^(photos|cifar10|folder:[\\s\\S]*)$"},
        "split": {"enum": ["train", "test"]},
        "count": _count,
        "size": {"type": "array", "items": _side, "minItems": 2, "maxItems": 2},
        "fingerprint": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        "request": {
            "type": "object",
            "required": ["data", "data_path", "limit", "fit", "image_size"],
            "additionalProperties": False,
            "properties": {
                "data": _text,
                "data_path": _text,
                "limit": {"type": ["integer", "null"]},
                "fit": _text,
                "image_size": {"type": ["integer", "null"]},
            },
        },
    },
}
_time = {"type": "string", "format": "time", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$"}
_stage = {
    "type": "object",
    "required": ["status", "parameters", "images", "environment", "commit", "started"],
    "additionalProperties": False,
    "properties": {
        "status": {"enum": ["started", "done", "complete", "failed"]},
        "parameters": _plain,
        "images": _images,
        "environment": {
            "type": "object",
            "required": ["device", "device_name", "cpu", "cores", "threads", "os", "torch", "torchvision", "python"],
            "properties": {
                "device": {"enum": ["cpu", "cuda", "mps"]},
                "cores": {"type": ["integer", "null"], "minimum": 1},
                "threads": _count,
                **dict.fromkeys(("device_name", "cpu", "os", "torch", "torchvision", "python"), _text),
            },
            "additionalProperties": _scalar,
        },
        "commit": _text,
        "started": _time,
        "finished": _time,
        "seconds": {"type": "number", "minimum": 0},
        "sittings": _count,
        "why": _text,
        "results": _plain,
    },
}
SCHEMA = {
    "$schema": "http://json-schema.org/draft-04/schema#",  # in which 2.0 is no integer
    "type": "object",
    "required": ["format", "stages"],
    "additionalProperties": False,
    "properties": {
        "format": {"enum": [FORMAT]},
        "stages": {
            "type": "object",
            "properties": {name: {"$ref": "#/definitions/stage"} for name in STAGE_FILES},
            "additionalProperties": False,
        },
    },
    "definitions": {"stage": _stage},
}
check_schema = fastjsonschema.compile(SCHEMA, formats={"time": lambda text: bool(datetime.fromisoformat(text))})
check_plain = fastjsonschema.compile({"$schema": SCHEMA["$schema"], **_plain})


def reference_run() -> "Run":
    """The small run that is committed with the project, for notebooks that are opened without one."""
    return Run(REFERENCE / "cpu-small")


def open_run(run_dir: str) -> "Run":
    """The run at `run_dir`; for "" a throw-away copy of the reference run's training, to try the later stages on."""
    if run_dir:
        return Run(run_dir)
    reference = reference_run()
    reference.require("train")
    scratch = Path(tempfile.mkdtemp(prefix="transformnet-"))
    run = Run(scratch / reference.path.name)
    weakref.finalize(run, shutil.rmtree, scratch, ignore_errors=True)
    run.path.mkdir()
    _copy_training(reference, run)
    return run


def _copy_training(source: "Run", target: "Run") -> None:
    """What the stages after `train` read of a run, into an empty folder."""
    for file in ("history.csv", "weights.pt"):
        shutil.copy(source.path / file, target.path)
    info = source.info
    target._write_info(info | {"stages": {"train": info["stages"]["train"]}})


def open_runs(run_dirs: Sequence[str | Path]) -> "list[Run]":
    """The runs at `run_dirs`, or the reference run if there are none, if they can stand in one report.

    Each must be trained; all must share the pipeline and the test images, and have different labels (folder names).
    Raises RunError otherwise.
    """
    if not isinstance(run_dirs, list | tuple):
        raise ParameterError(f"runs: expected a list of run directories, got {run_dirs!r}")
    runs = [Run(run_dir) for run_dir in run_dirs] or [reference_run()]
    for run in runs:
        run.require("train")
        if (same := next(other for other in runs if other.label == run.label)) is not run:
            raise RunError(f"{run.path} and {same.path}: two runs named {run.label}; rename one of the folders")
        if run.pipeline != runs[0].pipeline:
            raise RunError(f"{run.path}: another pipeline ({run.pipeline}) than {runs[0].path} ({runs[0].pipeline})")
    tested = [(run, stage) for run in runs for stage in ("compare", "benchmark") if run.has(stage)]
    for run, stage in tested:
        first, other = (_brief(each.stage_info(of)["images"]) for each, of in (tested[0], (run, stage)))
        if first != other:
            raise RunError(
                f"{run.path}: other test images of {stage} ({other}) than of {tested[0][1]} in {tested[0][0].path} "
                f"({first}); `transformnet {stage} --run-dir {run.path} --force` makes it anew on those of now"
            )
    compared = [run for run in runs if run.has("compare")]
    for run in compared:
        shown = [each.stage_info("compare")["parameters"].get("indices") for each in (compared[0], run)]
        if shown[0] != shown[1]:
            raise RunError(f"{run.path}: shows other examples ({shown[1]}) than {compared[0].path} ({shown[0]})")
    return runs


def shipped_runs(runs: "Sequence[Run]") -> "list[Run]":
    """The runs shipped with the project that show a kind of device `runs` lack, on the same pipeline and test images.

    So that a report of a machine without a GPU can show one beside it. Shipped runs without a benchmark don't count.
    """
    kinds = {_kind(run) for run in runs}
    tested = [run.stage_info("benchmark")["images"]["fingerprint"] for run in runs if run.has("benchmark")]

    def fits(run: Run) -> bool:
        return (
            run.has("train")
            and run.has("benchmark")
            and _kind(run) not in kinds
            and run.pipeline == runs[0].pipeline
            and run.stage_info("benchmark")["images"]["fingerprint"] in tested
        )

    return [run for run in (Run(path.parent) for path in sorted(REFERENCE.glob("*/run.json"))) if fits(run)]


def _kind(run: "Run") -> str:
    """The kind of device that a run was made on: "cpu", "cuda" or "mps"."""
    return run.stage_info("train")["environment"]["device"].partition(":")[0]


def describe_images(dataset) -> dict:
    """What `run.json` says of a data set's images."""
    return {
        "source": dataset.source,
        "split": dataset.split,
        "count": len(dataset),
        "size": list(dataset.images.shape[-2:]),
        "fingerprint": dataset.fingerprint,
        "request": dataset.request,
    }


class Run:
    """One run directory. `Run(path)` may not exist yet; what is read from it is checked, and missing is a RunError.

    `label` names the run in tables and legends: the folder's name, with SHIPPED_SIGN if the run came with the project
    (`shipped`) and so was made on another machine.
    """

    def __init__(self, run_dir: str | Path):
        if not isinstance(run_dir, str | Path) or run_dir == "":
            raise ParameterError(f"run_dir: expected the path of a folder, got {run_dir!r}")
        check_path("run_dir", run_dir)
        self.path = Path(run_dir)
        self._held: tuple[Path, os.stat_result] | None = None  # the folder as it was when its first lock was taken
        self.shipped = self.path.resolve().parent == REFERENCE
        self.label = one_line(self.path.resolve().name).replace(SHIPPED_SIGN, "?") + SHIPPED_SIGN * self.shipped

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    # Reading

    @property
    def info(self) -> dict:
        """The content of run.json, checked; before the first stage an empty record."""
        if not os.path.lexists(self.path / "run.json"):
            return _empty_info()
        try:
            info = parse_json(self._read("run.json"))
            if isinstance(info, dict) and info.get("format") != FORMAT:
                found = _line(repr(info.get("format")))
                raise RunError(
                    f"{self.path}/run.json: format {found}; this version reads format {FORMAT}: "
                    "make the run again (force=True, --force), or use the version that made it"
                )
            check_schema(info)
        except (ValueError, RecursionError, fastjsonschema.JsonSchemaException) as error:
            raise RunError(
                f"{self.path}/run.json: damaged or not ours: {_line(error)}; put back a good one, or make the run anew "
                f"(`transformnet train --run-dir {self.path} --force`)"
            ) from error
        return info

    @property
    def pipeline(self) -> Pipeline:
        """The ground truth this run was trained for."""
        try:
            return Pipeline(**self.stage_info("train")["parameters"]["pipeline"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{self.path}/run.json: no usable pipeline among the parameters of train") from error

    def stage_info(self, name: str) -> dict:
        """The record of a complete stage; RunError if the stage is not complete."""
        info = self.info
        record = info["stages"].get(name)
        if record is None:
            self.require_settled()  # else a kill that left the old record dropped would pass for a stage never made
            found = "the folder holds no run" if self.path.is_dir() else "there is no such folder"
            found = "not run yet" if (self.path / "run.json").exists() else found
            how = f"`transformnet {name} --run-dir {self.path}` makes it"
            if not info["stages"] and (left := self._files_of("train")):
                found = f"no record of it in run.json, though {left} lies there"
                how = f"put run.json back, or `transformnet train --run-dir {self.path} --force` makes the run anew"
            raise RunError(f"{self.path}: stage {name}: {found}; {how}")
        if not _counts(name, record):
            reasons = {"done": "its notebook did not run to the end", "started": "it was stopped, or is at work"}
            why = _line(record.get("why", reasons.get(record["status"], "it failed")))
            raise RunError(
                f"{self.path}: stage {name} is not complete ({why}); "
                f"`transformnet {name} --run-dir {self.path}` with the same parameters makes it"
            )
        if missing := [key for key in ("results", "seconds", "finished") if key not in record]:
            raise RunError(f"{self.path}/run.json: stage {name} is complete, but has no {', '.join(missing)}")
        for number in RESULT_NUMBERS.get(name, ()):
            if not is_amount(record["results"].get(number)):
                raise RunError(f"{self.path}/run.json: results of {name}: expected a number {number}, from 0")
        if name == "compare" and record["results"]["test_mse"] > (record["results"]["max_error"] + ROUNDING) ** 2:
            raise RunError(f"{self.path}/run.json: results of compare: a test_mse above the square of max_error")
        return record

    def _files_of(self, name: str) -> str:
        """What a stage writes, as far as it is there."""
        return ", ".join(file for file in STAGE_FILES[name] if (self.path / file).exists())

    def record(self, name: str) -> dict | None:
        """What run.json says of a stage, complete or not; None if that is nothing, or damaged."""
        with suppress(RunError):
            return self.info["stages"].get(name)

    def require(self, *names: str) -> None:
        """Raise RunError unless all these stages are complete."""
        for name in names:
            self.stage_info(name)

    def require_settled(self) -> None:
        """Raise RunError if a stage that was made anew has not yet wholly taken the old one's place, after a kill."""
        for name in STAGE_FILES:
            anew, ready = (Run(self.path / f".{name}.{state}") for state in ("anew", "ready"))
            if ready.path.exists() or (anew.record(name) or {}).get("status") == "complete":
                raise RunError(
                    f"{self.path}: stage {name} was made anew, and stopped before it took the old one's place; "
                    f"`transformnet {name} --run-dir {self.path}` with the same parameters finishes that"
                )

    def has(self, name: str) -> bool:
        """Whether this stage is complete."""
        return _counts(name, self.info["stages"].get(name))

    def history(self) -> pd.DataFrame:
        """One row an epoch: epoch (from 1), train_mse, val_mse, epoch_seconds; weights after it: red, green, blue."""
        self.require("train")
        table = self.read_table("history.csv", HISTORY_COLUMNS)
        if table["epoch"].tolist() != list(range(1, len(table) + 1)):
            raise RunError(f"{self.path}/history.csv: expected the epochs 1 to {len(table)}, one a row, in order")
        if not table["epoch_seconds"].map(is_amount).all() or (table[["train_mse", "val_mse"]] < 0).any(axis=None):
            raise RunError(f"{self.path}/history.csv: expected epoch_seconds, train_mse and val_mse from 0")
        return table

    def weights(self) -> dict[str, torch.Tensor]:
        """The best weights as a state_dict, on the CPU."""
        self.require("train")
        state = self.read_torch("weights.pt")
        shapes = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
        if shapes != {"mix.weight": (1, 3, 1, 1)} or not state["mix.weight"].is_floating_point():
            raise RunError(f"{self.path}/weights.pt: expected only mix.weight (1, 3, 1, 1), float, got {_line(shapes)}")
        if not state["mix.weight"].float().isfinite().all():  # as the model holds them
            got = state["mix.weight"].flatten().tolist()
            raise RunError(f"{self.path}/weights.pt: expected finite weights, got {got}; train anew with --force")
        return state

    def examples(self) -> dict[str, np.ndarray]:
        """The compared images: indices (n,), inputs uint8 (n, 3, h, w), targets and outputs float32 (n, 1, h, w)."""
        record, path = self.stage_info("compare"), self.path / "examples.npz"
        content = self._read("examples.npz")
        try:
            arrays = unpack_arrays(content, EXAMPLE_ARRAYS)
        except Exception as error:  # zipfile and NumPy raise many kinds
            raise RunError(f"{path}: damaged or not ours: {_line(error)}") from error
        indices, (height, width) = record["parameters"].get("indices"), record["images"]["size"]
        if not isinstance(indices, list) or not indices or arrays["indices"].tolist() != indices:
            got = _line(arrays["indices"].tolist())
            raise RunError(f"{path}: expected the indices of the stage's parameters, {_line(indices)}, got {got}")
        shapes = {
            "inputs": (len(indices), 3, height, width),
            "targets": (len(indices), 1, *self.pipeline.size),
            "outputs": (len(indices), 1, *self.pipeline.size),
        }
        for name, shape in shapes.items():
            if arrays[name].shape != shape:
                raise RunError(f"{path}: {name}: expected shape {shape}, got {arrays[name].shape}")
        for name in ("targets", "outputs"):
            if not ((arrays[name] > -ROUNDING) & (arrays[name] < 1 + ROUNDING)).all():  # NaN is neither
                raise RunError(f"{path}: {name}: expected values from 0 to 1")
        shown, most = np.abs(arrays["targets"] - arrays["outputs"]).max(), record["results"]["max_error"]
        if shown > most + ROUNDING:
            raise RunError(f"{path}: an example is off by {shown:.3g}, more than max_error in run.json, {most:.3g}")
        return arrays

    def read_table(self, name: str, columns: dict[str, str]) -> pd.DataFrame:
        """Read a CSV whose columns must be exactly `columns` (name → "int", "float", "bool" or "str").

        Whole numbers are not negative. Only floats can be missing, which is NaN.
        """
        content = self._read(name)
        try:
            return parse_table(content, columns)
        except Exception as error:  # csv has its own
            raise RunError(f"{self.path}/{name}: damaged or not ours: {_line(error)}") from error

    def read_torch(self, name: str) -> dict:
        """Read a file of tensors and plain values; anything that would need code to load is refused."""
        content = self._read(name)
        try:
            state = load_tensors(content)
        except Exception as error:  # torch.load raises many kinds, and long texts
            reason = f"ValueError: {error}" if type(error) is ValueError else type(error).__name__
            raise RunError(f"{self.path}/{name}: not a file of ours ({_line(reason)})") from error
        if not isinstance(state, dict):
            raise RunError(f"{self.path}/{name}: expected named tensors, got {type(state).__name__}")
        return state

    def _read(self, name: str) -> bytes:
        path = self.path / name
        stage = next((stage for stage, files in STAGE_FILES.items() if name in files), None)
        if stage and not os.path.lexists(path):
            raise RunError(
                f"{path}: is missing, though run.json says that {stage} made it; put it back, or "
                f"`transformnet {stage} --run-dir {self.path} --force` makes it anew"
            )
        return read_plain(path, MAX_TEXT_BYTES if path.suffix in (".json", ".csv") else MAX_BYTES)

    # Writing

    def write(self, name: str, content: bytes) -> None:
        """Write one of the run's files, whole or not at all."""
        if self._held:
            self.require_place()
        try:
            write_atomic(self.path / name, content)
        except OSError as error:
            raise RunError(f"{self.path / name}: cannot be written ({error.strerror}); the old file is kept") from error

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """Write a DataFrame as CSV, floats in full precision."""
        self.write(name, table.to_csv(index=False).encode())

    def write_torch(self, name: str, state: dict) -> None:
        """Write tensors and plain values so that `read_torch` accepts them."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.write(name, buffer.getvalue())

    def write_arrays(self, name: str, **arrays: np.ndarray) -> None:
        """Write named arrays as compressed npz."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        self.write(name, buffer.getvalue())

    def summary_writer(self, next_epoch: int):
        """TensorBoard's SummaryWriter; events from `next_epoch` on, left by an interrupted run, are purged."""
        from torch.utils.tensorboard import SummaryWriter  # here, since only training needs it: 0.5 s

        return SummaryWriter(str(self.path / TENSORBOARD), purge_step=next_epoch)

    @contextmanager
    def stage(
        self, name: str, parameters: dict, *, images: dict, device: torch.device, force: bool = False
    ) -> Iterator[dict | None]:
        """Hold the run's locks and do one stage: `with run.stage(…) as results: if results is not None: do the work`.

        Gives None where the stage is complete already with the same parameters and images. Otherwise gives a dict:
        what the body puts in it lands in run.json under "results" when the stage is complete. Whatever escapes the
        body marks the stage failed, with the reason, and goes on. Other parameters or images than those recorded are
        a RunError.

        With `force` the stage is made anew, whatever the run holds. That happens in a folder of its own,
        `.<name>.anew`, which `path` names meanwhile, and in a kernel of a command from then on. When the stage is
        complete it takes the old one's place, and if it is `train`, all that was built on the old one goes too; until
        then the old results stay, also if the new stage or its notebook fails. One that was stopped goes on there when
        it is forced again with the same parameters and images, by the same commit on the same machine.
        """
        if type(force) is not bool:  # papermill's -p turns "no" into a true string
            raise ParameterError(f"force: expected True or False, got {force!r}")
        parameters = json.loads(json.dumps(parameters))  # as they will be read back
        # The kernel has a lock of its own, since it can outlive a command that is killed, by a second or two
        with nullcontext() if os.environ.get(EXECUTING) == name else self.command(), self._lock():
            if force and name == "train" and self._damaged():
                self._drop_anew()  # what was made anew cannot take a place in a run whose record is lost
            self._finish_exchange()
            if name != "train":
                self.require("train")
            if not force:
                with self._doing(name, parameters, images, device) as results:
                    yield results
                return
            place, self.path = self.path, self._begin_anew(name, parameters, images, device)
            try:
                with self._doing(name, parameters, images, device) as results:
                    yield results
            except BaseException:
                self.path = place
                raise
            if os.environ.get(EXECUTING) != name:  # else it is `end` that goes on, when the notebook has ended
                self.path = place
                self._finish_exchange()

    @contextmanager
    def _doing(self, name: str, parameters: dict, images: dict, device: torch.device) -> Iterator[dict | None]:
        """Do a stage in the folder that `path` names, recording how it went."""
        info = self.info
        record = info["stages"].get(name)
        if record:
            self._refuse_if_other(name, record, parameters, images)
            if record["status"] in ("done", "complete"):
                if not _counts(name, record):
                    self._write_info(info | {"stages": info["stages"] | {name: record | {"status": "complete"}}})
                yield None
                return
        elif left := self._files_of(name):
            raise RunError(  # work of an unknown origin must not be continued
                f"{self.path}: holds {left}, but no record of the stage {name}; "
                "take another run_dir, or force=True (--force) to make it anew"
            )
        before = record or {}
        seconds_before = before.get("seconds", 0)
        record = {
            "status": "started",
            "parameters": parameters,
            "images": images,
            "environment": environment(device),
            "commit": git_commit(),
            "started": before.get("started", now()),
            "seconds": seconds_before,
            "sittings": before.get("sittings", 0) + 1,  # it was stopped and gone on with one time fewer
        }
        info["stages"][name] = record
        self._write_info(info)
        start, results = time.perf_counter(), {}
        try:
            yield results
            record |= {"status": "done" if os.environ.get(EXECUTING) == name else "complete", "results": results}
        except BaseException as error:
            why = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
            record |= {"status": "failed", "why": why[:2000]}
            raise
        finally:
            record |= {"finished": now(), "seconds": seconds_before + time.perf_counter() - start}
            self._write_info(info)

    @contextmanager
    def command(self) -> Iterator[None]:
        """Keep all others from doing a stage meanwhile: what a notebook shows and `end` completes is its own work."""
        with self._hold(COMMAND_LOCK):
            yield

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with self._hold(".lock"):
            try:
                self._refuse_links()
            except OSError as error:
                raise RunError(f"{error.filename or self.path}: cannot be read ({error.strerror})") from error
            drop_leftovers(self.path)
            yield

    @contextmanager
    def _hold(self, lock: str) -> Iterator[None]:
        before = self._held
        if before:
            self.require_place()
        with locked(self.path, lock):
            self._held = before or (self.path, self.path.stat())
            try:
                yield
            finally:
                self._held = before

    def require_place(self) -> None:
        """Raise RunError unless the folder whose lock is held still bears its name: another is not ours to write."""
        place, then = self._held
        if not (place.exists() and os.path.samestat(place.stat(), then)):
            raise RunError(f"{place}: no longer the folder that it was when the work began, which was moved or removed")

    def _refuse_links(self) -> None:
        """Raise RunError if what a stage reads, moves or replaces is a link, a pipe or of another kind than its own.

        A run from a stranger could lead it to other files of the user.
        """
        for folder in self._making():
            _expect(folder, stat.S_ISDIR)
        for folder in (self.path, *self._making()):
            for name in ("run.json", *itertools.chain(*map(_files, STAGE_FILES))):
                _expect(folder / name, stat.S_ISDIR if name == TENSORBOARD else stat.S_ISREG)
            for file in (folder / TENSORBOARD).glob("*"):
                _expect(file, stat.S_ISREG)

    def end(self, name: str, why: str = "", *, forced: bool = False) -> None:
        """Mark a stage whose work is done complete, since its notebook ran to the end, or say why that did not.

        One that was `forced` then takes the old one's place, together with its notebook, which lies in `.<name>.anew`.
        """
        with self._lock():
            run = Run(self.path / f".{name}.anew") if forced else self
            info = run.info
            record = info["stages"].get(name)
            if record and record["status"] == "done":
                record.pop("why", None)
                record |= (
                    {"why": f"its notebook did not run to the end: {why}"[:2000]} if why else {"status": "complete"}
                )
                run._write_info(info)
            self._finish_exchange()

    def settle(self) -> None:
        """Finish what a killed command left half done, and `require_settled` refuses."""
        if any(os.path.lexists(folder) for folder in self._making()):
            with self.command(), self._lock():
                self._finish_exchange()

    def _making(self) -> list[Path]:
        """The folders in which stages are made anew, and wait to take the old ones' place."""
        return [self.path / f".{stage}.{state}" for stage in STAGE_FILES for state in ("anew", "ready")]

    def _begin_anew(self, name: str, parameters: dict, images: dict, device: torch.device) -> Path:
        """The folder to make a stage anew in: as the same stage left it that was stopped, else fresh."""
        anew = Run(self.path / f".{name}.anew")
        try:
            if not (anew._stopped(name, parameters, images, device) and (name == "train" or anew._trained_as(self))):
                shutil.rmtree(anew.path, ignore_errors=True)
                anew.path.mkdir()
                if name != "train":
                    _copy_training(self, anew)
        except OSError as error:
            place = error.filename2 or error.filename or anew.path
            raise RunError(f"{place}: cannot be read or written ({error.strerror})") from error
        return anew.path

    def _damaged(self) -> bool:
        try:
            return self.info is None
        except RunError:
            return True

    def _drop_anew(self) -> None:
        for stage, state in itertools.product(STAGE_FILES, ("anew", "ready")):
            if stage != "train":
                shutil.rmtree(self.path / f".{stage}.{state}", ignore_errors=True)

    def _stopped(self, name: str, parameters: dict, images: dict, device: torch.device) -> bool:
        """Whether this stage was stopped here, or only its notebook did not end; the same of the same code and machine.

        Who makes a stage anew wants nothing of an older version, and of another machine's times, in it.
        """
        record = self.record(name)
        stopped = record and (
            record["status"] in ("started", "done") or record.get("why", "").startswith("interrupted")
        )
        made_by = (record["commit"], record["environment"]) if stopped else None
        return made_by == (git_commit(), environment(device)) and not self._differing(record, parameters, images)

    def _trained_as(self, other: "Run") -> bool:
        return self.record("train") == other.record("train")

    def _finish_exchange(self) -> None:
        """Put a stage that was made anew, and is complete, in the old one's place; also after a kill amid just that."""
        try:
            for name in STAGE_FILES:
                anew, ready = (Run(self.path / f".{name}.{state}") for state in ("anew", "ready"))
                if (anew.record(name) or {}).get("status") == "complete":
                    self._discard(name)
                    anew.path.rename(ready.path)  # from here on what lies in place is new
                if record := ready.record(name):
                    for file in (*STAGE_FILES[name], f"{name}.ipynb"):
                        if (ready.path / file).exists():
                            (ready.path / file).replace(self.path / file)
                    info = self.info
                    info["stages"][name] = record
                    self._write_info(info)
                if ready.path.exists():
                    shutil.rmtree(ready.path)
        except OSError as error:
            raise RunError(
                f"{self.path}: {error.filename} cannot be moved or removed ({error.strerror}); mend that, and the "
                "run's next command puts what was made anew in its place"
            ) from error

    def _differing(self, record: dict, parameters: dict, images: dict) -> str:
        """What differs from a stage's record, in words; "" for nothing. The images' place does not count."""
        same_images = record["images"]["fingerprint"] == images["fingerprint"]
        old = record["parameters"] | {"images": _brief(record["images"])}
        return differences(old, parameters | {"images": old["images"] if same_images else _brief(images)})

    def _refuse_if_other(self, name: str, record: dict, parameters: dict, images: dict) -> None:
        if differing := self._differing(record, parameters, images):
            raise RunError(
                f"{self.path}: stage {name} was made with other parameters ({differing}); "
                "take another run_dir, or force=True (--force) to make it anew"
            )

    def _discard(self, name: str) -> None:
        """Drop a stage's record, then its files and notebooks; with `train` all stages go."""
        try:
            info = self.info
        except RunError:  # damaged, or of another format: making the training anew is the way out
            if name != "train":
                raise
            info = _empty_info()
        dropped = list(STAGE_FILES) if name == "train" else [name]
        info["stages"] = {stage: record for stage, record in info["stages"].items() if stage not in dropped}
        self._write_info(info)  # first, so that no record is left whose files are gone
        for path in [self.path / file for stage in dropped for file in _files(stage)]:
            if path.name.removesuffix(".ipynb") in dropped and not is_executed(path):
                continue  # somebody's own
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _write_info(self, info: dict) -> None:
        content = (json.dumps(info, indent=2, ensure_ascii=False) + "\n").encode()
        check_schema(parse_json(content))  # never write what could not be read back
        self.write("run.json", content)


def _counts(name: str, record: dict | None) -> bool:
    """Whether a stage is complete, or done in the kernel that executes its notebook."""
    status = record["status"] if record else None
    return status == "complete" or (status == "done" and os.environ.get(EXECUTING) == name)


def _files(stage: str) -> tuple[str, ...]:
    """What goes with a stage: what it writes, and its notebooks."""
    return *STAGE_FILES[stage], f"{stage}.ipynb", f"{stage}.failed.ipynb"


def is_executed(notebook: Path) -> bool:
    """Whether papermill executed a notebook, as it did all of a run's: it leaves its mark. False where none lies."""
    try:
        return "papermill" in json.loads(read_plain(notebook, MAX_BYTES))["metadata"]
    except (RunError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _expect(path: Path, kind: Callable[[int], bool]) -> None:
    """Raise RunError unless what lies at `path`, if anything, is of a `kind`: stat.S_ISREG or stat.S_ISDIR."""
    if os.path.lexists(path) and not kind(path.lstat().st_mode):
        expected = "folder" if kind is stat.S_ISDIR else "file"
        raise RunError(f"{path}: expected a plain {expected}, got a link or something else; remove it")


def _empty_info() -> dict:
    """What run.json says of a run before its first stage."""
    return {"format": FORMAT, "stages": {}}


def differences(old: dict, new: dict) -> str:
    """What differs between two dicts of plain values, in words: "lr: 0.1 → 0.2; …", or "" for nothing."""
    return "; ".join(f"{key}: {old.get(key)!r} → {new.get(key)!r}" for key in old | new if old.get(key) != new.get(key))


def _line(text: object) -> str:
    """`text` as one line of an error message, and not endless."""
    return one_line(text)[:500]


def _brief(images: dict) -> str:
    return f"{images['count']} of {_line(images['source'])}, {images['fingerprint'][:8]}"


def now() -> str:
    """The time in UTC, to the second, as run.json has it: such texts sort as the times do."""
    return datetime.now(UTC).isoformat(timespec="seconds")
