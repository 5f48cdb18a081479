"""The run directory: the one thing that notebooks fill and the report reads.

A run is one training and the stages executed on it. `run.json` says what was done, with what, where and how it ended;
the other files hold results. Our own files are written whole or not at all. Reading one executes nothing: JSON and
CSV are checked against a schema, arrays and weights are loaded without pickle.
"""

import io
import json
import os
import shutil
import tempfile
import time
import weakref
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import fastjsonschema
import filelock
import numpy as np
import pandas as pd
import torch

from .errors import ParameterError, RunError
from .machine import environment, git_commit
from .pipeline import Pipeline

FORMAT = 2  # of the run directory; raised when a reader of the old one would go wrong
MAX_BYTES = 2**26  # 64 MiB; no file of a run is near it, so a larger one is refused unread
LOCK_SECONDS = 3  # how long to wait for a run in use; a killed command's kernel ends within a second or two

# What each stage writes, and so what goes when the stage is made anew. A stage builds on those before it.
STAGE_FILES = {
    "train": ("history.csv", "weights.pt", "checkpoint.pt", "tensorboard"),
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
_images = {
    "type": "object",
    "required": ["source", "split", "count", "size", "fingerprint", "request"],
    "additionalProperties": False,
    "properties": {
        "source": {"type": "string", "maxLength": 10_000, "pattern": "^(photos|cifar10|folder:)"},
        "split": {"enum": ["train", "test"]},
        "count": {"type": "integer", "minimum": 1},
        "size": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
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
_stage = {
    "type": "object",
    "required": ["status", "parameters", "images", "environment", "commit", "started"],
    "additionalProperties": False,
    "properties": {
        "status": {"enum": ["started", "complete", "failed"]},
        "parameters": {"type": "object"},
        "images": _images,
        "environment": {
            "type": "object",
            "required": ["device", "device_name", "cpu", "cores", "threads", "os", "torch", "torchvision", "python"],
            "properties": {"device": _text, "device_name": _text, "cpu": _text, "threads": {"type": "integer"}},
        },
        "commit": _text,
        "started": _text,
        "finished": _text,
        "seconds": {"type": "number", "minimum": 0},
        "why": _text,
        "results": {"type": "object"},
    },
}
SCHEMA = {
    "type": "object",
    "required": ["format", "stages"],
    "additionalProperties": False,
    "properties": {
        "format": {"const": FORMAT},
        "stages": {"type": "object", "propertyNames": {"enum": list(STAGE_FILES)}, "additionalProperties": _stage},
    },
}
check_schema = fastjsonschema.compile(SCHEMA)


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path` whole or not at all: beside it, flushed to the disk, then renamed over it."""
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)  # mkstemp's 0600 would keep colleagues from reading a shared run
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def reference_run() -> "Run":
    """The small run that is committed with the project, for notebooks that are opened without one."""
    return Run(Path(__file__).resolve().parents[1] / "report" / "reference" / "cpu-small")


def open_run(run_dir: str) -> "Run":
    """The run at `run_dir`; for "" a throw-away copy of the reference run's training, to try the later stages on."""
    if run_dir:
        return Run(run_dir)
    reference = reference_run()
    reference.require("train")
    scratch = Path(tempfile.mkdtemp(prefix="transformnet-"))
    run = Run(scratch / reference.label)
    weakref.finalize(run, shutil.rmtree, scratch, ignore_errors=True)
    run.path.mkdir()
    for file in ("history.csv", "weights.pt"):
        shutil.copy(reference.path / file, run.path)
    info = reference.info
    run._write_info(info | {"stages": {"train": info["stages"]["train"]}})
    return run


def open_runs(run_dirs: Sequence[str | Path]) -> "list[Run]":
    """The runs at `run_dirs`, or the reference run if there are none, if they can stand in one report.

    Each must be trained; all must share the pipeline and the test images, and have different labels (folder names).
    Raises RunError otherwise.
    """
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
                f"({first})"
            )
    compared = [run for run in runs if run.has("compare")]
    for run in compared:
        shown = [each.stage_info("compare")["parameters"].get("indices") for each in (compared[0], run)]
        if shown[0] != shown[1]:
            raise RunError(f"{run.path}: shows other examples ({shown[1]}) than {compared[0].path} ({shown[0]})")
    return runs


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

    `label` names the run in tables and legends: the folder's name.
    """

    def __init__(self, run_dir: str | Path):
        if not isinstance(run_dir, str | Path) or run_dir == "":
            raise ParameterError(f"run_dir: expected the path of a folder, got {run_dir!r}")
        self.path = Path(run_dir)
        self.label = self.path.resolve().name

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    # Reading

    @property
    def info(self) -> dict:
        """The content of run.json, checked; before the first stage an empty record."""
        if not (self.path / "run.json").exists():
            return _empty_info()
        try:
            info = json.loads(self._read("run.json"))
            if isinstance(info, dict) and info.get("format") != FORMAT:
                raise RunError(
                    f"{self.path}/run.json: format {info.get('format')!r}; this version reads format {FORMAT}: "
                    "make the run again (force=True, --force), or use the version that made it"
                )
            check_schema(info)
        except (ValueError, RecursionError, fastjsonschema.JsonSchemaException) as error:
            raise RunError(f"{self.path}/run.json: damaged or not ours: {_line(error)}") from error
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
        record = self.info["stages"].get(name)
        if record is None:
            found = "not run yet" if (self.path / "run.json").exists() else "the folder holds no run"
            raise RunError(f"{self.path}: stage {name}: {found}; `transformnet {name} --run-dir {self.path}` makes it")
        if record["status"] != "complete":
            why = _line(record.get("why", "it was interrupted"))
            raise RunError(
                f"{self.path}: stage {name} is not complete ({why}); "
                f"`transformnet {name} --run-dir {self.path}` with the same parameters makes it"
            )
        for number in RESULT_NUMBERS.get(name, ()):
            if type(record.get("results", {}).get(number)) not in (int, float):
                raise RunError(f"{self.path}/run.json: results of {name}: expected a number {number}")
        return record

    def require(self, *names: str) -> None:
        """Raise RunError unless all these stages are complete."""
        for name in names:
            self.stage_info(name)

    def has(self, name: str) -> bool:
        """Whether this stage is complete."""
        return self.info["stages"].get(name, {}).get("status") == "complete"

    def history(self) -> pd.DataFrame:
        """One row an epoch: epoch (from 1), train_mse, val_mse, epoch_seconds; weights after it: red, green, blue."""
        self.require("train")
        return self.read_table("history.csv", HISTORY_COLUMNS)

    def weights(self) -> dict[str, torch.Tensor]:
        """The best weights as a state_dict, on the CPU."""
        self.require("train")
        state = self.read_torch("weights.pt")
        shapes = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
        if shapes != {"mix.weight": (1, 3, 1, 1)} or not state["mix.weight"].is_floating_point():
            raise RunError(f"{self.path}/weights.pt: expected only mix.weight (1, 3, 1, 1), float, got {_line(shapes)}")
        if not state["mix.weight"].isfinite().all():
            got = state["mix.weight"].flatten().tolist()
            raise RunError(f"{self.path}/weights.pt: expected finite weights, got {got}; train anew with --force")
        return state

    def examples(self) -> dict[str, np.ndarray]:
        """The compared images: indices (n,), inputs uint8 (n, 3, h, w), targets and outputs float32 (n, 1, h, w)."""
        self.require("compare")
        content = io.BytesIO(self._read("examples.npz"))
        try:
            unpacked = sum(entry.file_size for entry in zipfile.ZipFile(content).infolist())
            if unpacked > MAX_BYTES:
                raise RunError(
                    f"{self.path}/examples.npz: {unpacked:,} bytes unpacked, more than {MAX_BYTES:,}, so not ours"
                )
            with np.load(content, allow_pickle=False) as archive:
                arrays = {name: np.asarray(archive[name]) for name in EXAMPLE_ARRAYS}
        except RunError:
            raise
        except Exception as error:  # zipfile and NumPy raise many kinds
            raise RunError(f"{self.path}/examples.npz: damaged or not ours: {_line(error)}") from error
        for name, (dtype, rank) in EXAMPLE_ARRAYS.items():
            found = arrays[name]
            if found.dtype != dtype or found.ndim != rank or len(found) != len(arrays["indices"]):
                raise RunError(
                    f"{self.path}/examples.npz: {name}: expected {dtype} of rank {rank}, one row an index, "
                    f"got {found.dtype} {found.shape}"
                )
        return arrays

    def read_table(self, name: str, columns: dict[str, str]) -> pd.DataFrame:
        """Read a CSV whose columns must be exactly `columns` (name → "int", "float", "bool" or "str")."""
        kinds = {"int": "Int64", "bool": "boolean", "str": "str"}
        try:
            table = pd.read_csv(
                io.BytesIO(self._read(name)),
                dtype={column: kinds[kind] for column, kind in columns.items() if kind != "float"},
                # Python's float, since older pandas' parser may miss the last digit
                converters={column: _float for column, kind in columns.items() if kind == "float"},
            )
        except (ValueError, TypeError, OverflowError) as error:  # pandas' ParserError is a ValueError
            raise RunError(f"{self.path}/{name}: damaged or not ours: {_line(error)}") from error
        if list(table.columns) != list(columns):
            got = _line(", ".join(table.columns))
            raise RunError(f"{self.path}/{name}: expected columns {', '.join(columns)}; got {got}")
        if not isinstance(table.index, pd.RangeIndex):  # pandas took the first column for row names
            raise RunError(f"{self.path}/{name}: damaged or not ours: rows with more fields than columns")
        if table.empty:
            raise RunError(f"{self.path}/{name}: has no rows")
        return table

    def read_torch(self, name: str) -> dict:
        """Read a file of tensors and plain values; anything that would need code to load is refused."""
        try:
            state = torch.load(io.BytesIO(self._read(name)), map_location="cpu", weights_only=True)
        except RunError:
            raise
        except Exception as error:  # torch.load raises many kinds, and long texts
            raise RunError(f"{self.path}/{name}: not a file of ours ({type(error).__name__})") from error
        if not isinstance(state, dict):
            raise RunError(f"{self.path}/{name}: expected named tensors, got {type(state).__name__}")
        return state

    def _read(self, name: str) -> bytes:
        path = self.path / name
        try:
            if path.stat().st_size > MAX_BYTES:
                raise RunError(f"{path}: larger than {MAX_BYTES:,} bytes, so not a file of ours")
            return path.read_bytes()
        except OSError as error:
            raise RunError(f"{path}: cannot be read ({error.strerror})") from error

    # Writing

    def write(self, name: str, content: bytes) -> None:
        """Write one of the run's files, whole or not at all."""
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

        return SummaryWriter(str(self.path / "tensorboard"), purge_step=next_epoch)

    @contextmanager
    def stage(
        self, name: str, parameters: dict, *, images: dict, device: torch.device, force: bool = False
    ) -> Iterator[dict | None]:
        """Hold the run's lock and do one stage: `with run.stage(…) as results: if results is not None: do the work`.

        Gives None where the stage is complete already with the same parameters and images. Otherwise gives a dict:
        what the body puts in it lands in run.json under "results" when the stage is complete. Whatever escapes the
        body marks the stage failed, with the reason, and goes on. Other parameters or images than those recorded are
        a RunError, or with `force` the stage is made anew (and, if it is `train`, all that builds on it is dropped).
        """
        if type(force) is not bool:  # papermill's -p turns "no" into a true string
            raise ParameterError(f"force: expected True or False, got {force!r}")
        parameters = json.loads(json.dumps(parameters))  # as they will be read back
        with self._lock():
            if name != "train":
                self.require("train")
            if force:
                self._discard(name)
            info = self.info
            record = info["stages"].get(name)
            if record:
                self._refuse_if_other(name, record, parameters, images)
                if record["status"] == "complete":
                    yield None
                    return
            elif left := [file for file in STAGE_FILES[name] if (self.path / file).exists()]:
                raise RunError(  # work of an unknown origin must not be continued
                    f"{self.path}: holds {', '.join(left)}, but no record of the stage {name}; "
                    "take another run_dir, or force=True (--force) to make it anew"
                )
            seconds_before = record.get("seconds", 0) if record else 0
            record = {
                "status": "started",
                "parameters": parameters,
                "images": images,
                "environment": environment(device),
                "commit": git_commit(),
                "started": _now(),
                "seconds": seconds_before,
            }
            info["stages"][name] = record
            self._write_info(info)
            start, results = time.perf_counter(), {}
            try:
                yield results
                record |= {"status": "complete", "results": results}
            except BaseException as error:
                why = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
                record |= {"status": "failed", "why": why[:2000]}
                raise
            finally:
                record |= {"finished": _now(), "seconds": seconds_before + time.perf_counter() - start}
                self._write_info(info)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        lock = filelock.FileLock(self.path / ".lock", timeout=LOCK_SECONDS)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except filelock.Timeout as error:
            raise RunError(f"{self.path}: in use by another command; wait for it, or take another run_dir") from error
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror})") from error
        try:
            yield
        finally:
            lock.release()

    def _refuse_if_other(self, name: str, record: dict, parameters: dict, images: dict) -> None:
        same_images = record["images"]["fingerprint"] == images["fingerprint"]  # wherever they lie by now
        old = record["parameters"] | {"images": _brief(record["images"])}
        new = parameters | {"images": old["images"] if same_images else _brief(images)}
        if differing := differences(old, new):
            raise RunError(
                f"{self.path}: stage {name} was made with other parameters ({differing}); "
                "take another run_dir, or force=True (--force) to make it anew"
            )

    def _discard(self, name: str) -> None:
        """Drop a stage's record, then its files; every other stage builds on `train` and goes with it."""
        try:
            info = self.info
        except RunError:  # damaged, or of another format: making the training anew is the way out
            if name != "train":
                raise
            info = _empty_info()
        dropped = list(STAGE_FILES) if name == "train" else [name]
        info["stages"] = {stage: record for stage, record in info["stages"].items() if stage not in dropped}
        self._write_info(info)  # first, so that no record is left whose files are gone
        for path in [self.path / file for stage in dropped for file in STAGE_FILES[stage]]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _write_info(self, info: dict) -> None:
        check_schema(info)  # never write what could not be read back
        self.write("run.json", (json.dumps(info, indent=2, ensure_ascii=False) + "\n").encode())


def _empty_info() -> dict:
    """What run.json says of a run before its first stage."""
    return {"format": FORMAT, "stages": {}}


def differences(old: dict, new: dict) -> str:
    """What differs between two dicts of plain values, in words: "lr: 0.1 → 0.2; …", or "" for nothing."""
    return "; ".join(f"{key}: {old.get(key)!r} → {new.get(key)!r}" for key in old | new if old.get(key) != new.get(key))


def _float(text: str) -> float:
    return float(text or "nan")


def _line(text: object) -> str:
    """`text` as one line of an error message: no line breaks, and not endless."""
    return " ".join(str(text).split())[:200]


def _brief(images: dict) -> str:
    return f"{images['count']} of {images['source']}, {images['fingerprint'][:8]}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
