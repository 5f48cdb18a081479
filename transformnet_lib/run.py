"""The run directory: one training and the stages executed on it, written stage by stage and read once.

One folder a stage: `parameters.json` is written first, `stage.json` last, and a stage is complete if and only if it is
there. Reading executes nothing: JSON and CSV are checked against records, arrays and weights are loaded without pickle.
What was read is not checked again. Its texts are any: who shows one escapes it.
"""

import atexit
import csv
import io
import json
import math
import shutil
import tempfile
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import pydantic
import safetensors.torch
import torch
from pydantic import AwareDatetime, ConfigDict, Field, FiniteFloat, JsonValue, NonNegativeFloat, PositiveInt

from .comparison import EXAMPLE_ARRAYS
from .dataset import CustomDataset
from .errors import ParameterError, RunError, one_line
from .files import check_path, drop_leftovers, is_leftover, locked, read_file, write_atomic
from .libraries import LIBRARY_COLUMNS
from .machine import environment, git_commit
from .model import TransformNet
from .normal_equations import LeastSquares
from .pipeline import Pipeline
from .resources import REFERENCE
from .seeds import SEED_COLUMNS
from .sizes import SIZE_COLUMNS
from .timing import BENCHMARK_COLUMNS
from .training import HISTORY_COLUMNS, TrainConfig

FORMAT = 3  # of the run directory; raised when a reader of the old one would go wrong
STAGES = ("train", "compare", "benchmark", "study")  # each builds on the training
STAGE_FILES = {  # all that is ever removed from a stage's folder
    "parameters.json", "history.csv", "weights.safetensors", "checkpoint.safetensors", "tensorboard", "examples.npz",
    "benchmark.csv", "seeds.csv", "libraries.csv", "sizes.csv", "stage.json", *(f"{name}.ipynb" for name in STAGES),
    ".ipynb_checkpoints", ".DS_Store",  # which JupyterLab and macOS leave where somebody looked
}  # fmt: skip
SHIPPED_SIGN = "†"  # ends the label of a shipped run, so that no number of it passes for one measured here
MAX_BYTES = 2**26  # 64 MiB; no file of a run is near it, packed or unpacked
MAX_TEXT_BYTES = 2**24  # 16 MiB, of JSON and CSV, which grow when they are parsed

# What a table's column holds, by the kinds that its module names. An empty field is a number that does not exist.
_Missing = pydantic.BeforeValidator(lambda field: "nan" if field == "" else field)
KINDS = {
    "int": Annotated[int, Field(ge=0, lt=2**63)],
    "float": Annotated[float, _Missing, pydantic.AfterValidator(lambda value: _finite(value))],
    "loss": Annotated[float, _Missing],  # of an epoch: infinite in a training that diverges
    "bool": bool,
    "str": str,
}


def _finite(value: float) -> float:
    if math.isinf(value):
        raise ValueError("expected a finite number")
    return value


class Record(pydantic.BaseModel):
    """A frozen record, strict about types; JSON's lists become tuples."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )


class ImageRequest(Record):
    """What `load_images` was asked for, so that a run can load its other split."""

    data: str
    data_path: str
    limit: PositiveInt | None
    fit: str
    image_size: PositiveInt | None


class ImageSet(Record):
    """The images of a stage; `fingerprint` is the sha256 of shape and pixels."""

    source: Annotated[str, Field(pattern=r"(?s)^(photos|cifar10|folder:.*)$")]
    split: Literal["train", "test"]
    count: PositiveInt
    size: tuple[PositiveInt, PositiveInt]  # height and width in pixels
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    request: ImageRequest

    @classmethod
    def of(cls, dataset: CustomDataset) -> "ImageSet":
        return cls(
            source=dataset.source,
            split=dataset.split,
            count=len(dataset),
            size=tuple(dataset.images.shape[-2:]),
            fingerprint=dataset.fingerprint,
            request=ImageRequest(**dataset.request),
        )

    def __str__(self) -> str:
        return f"{self.count} of {self.source}, {self.fingerprint[:8]}"


class Environment(Record):
    """The machine a stage was made on; see `machine.environment`."""

    device: Literal["cpu", "cuda", "mps"]
    device_name: str
    cpu: str
    cores: PositiveInt | None
    threads: PositiveInt
    os: str
    python: str
    torch: str
    torchvision: str
    cuda: str | None


class Begun(Record):
    """parameters.json: with what a stage was begun."""

    format: Literal[3]
    training: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]  # the id of the training that the stage builds on
    parameters: dict[str, JsonValue]
    images: ImageSet
    environment: Environment
    commit: str
    started: AwareDatetime
    sittings: PositiveInt  # one more than the stage was stopped and continued


class Finished(Record):
    """stage.json: how a stage ended; `results` are those of its kind."""

    results: dict[str, JsonValue]
    seconds: NonNegativeFloat  # of the last sitting
    finished: AwareDatetime


class Stage(Begun):
    """A complete stage. What it was made with and what it found."""

    seconds: NonNegativeFloat
    finished: AwareDatetime


class Optimum(Record):
    """`LeastSquares` as stage.json has it."""

    weights: tuple[FiniteFloat, FiniteFloat, FiniteFloat]
    condition: NonNegativeFloat
    val_mse: NonNegativeFloat
    truth_val_mse: NonNegativeFloat
    images: PositiveInt
    seconds: NonNegativeFloat


class TrainResults(Record):
    best_epoch: PositiveInt
    no_gradient: bool
    setup_seconds: NonNegativeFloat
    initial_weights: tuple[FiniteFloat, FiniteFloat, FiniteFloat]
    least_squares: Optimum | None


class CompareResults(Record):
    test_mse: NonNegativeFloat
    max_error: NonNegativeFloat


class StudyResults(Record):
    test_images: ImageSet


class NoResults(Record):
    pass


class Training(Stage):
    """The `train` stage: what a `TrainResult` has, and how it was trained."""

    config: TrainConfig
    pipeline: Pipeline
    history: pd.DataFrame  # a row an epoch: `HISTORY_COLUMNS`
    weights: tuple[float, float, float]  # of the best epoch: red, green, blue
    best_epoch: int
    no_gradient: bool
    setup_seconds: float
    initial_weights: tuple[float, float, float]
    least_squares: LeastSquares | None  # None where the images do not determine it (grey ones)

    @property
    def best_val_mse(self) -> float:
        return float(self.history["val_mse"].iloc[self.best_epoch - 1])

    @property
    def model(self) -> TransformNet:
        """The trained model, on the CPU, in eval mode; a new one each time."""
        model = TransformNet(self.pipeline)
        with torch.no_grad():
            model.mix.weight.copy_(torch.tensor(self.weights).view(1, 3, 1, 1))
        return model.eval()


class Comparison(Stage):
    """The `compare` stage: over all test images, and the examples (arrays as `EXAMPLE_ARRAYS`)."""

    test_mse: float
    max_error: float
    examples: dict[str, np.ndarray]


class Benchmark(Stage):
    """The `benchmark` stage: a row a measured setting, `BENCHMARK_COLUMNS`."""

    table: pd.DataFrame


class Study(Stage):
    """The `study` stage: `SEED_COLUMNS`, `LIBRARY_COLUMNS` and `SIZE_COLUMNS`."""

    seeds: pd.DataFrame
    libraries: pd.DataFrame
    sizes: pd.DataFrame
    test_images: ImageSet  # of libraries and sizes


class Run(Record):
    """One run as it was read: a complete training, and each later stage that was made with it, else None.

    `label` names it in tables and legends: the folder's name, with SHIPPED_SIGN if the run came with the project.
    """

    path: Path
    label: str
    shipped: bool
    train: Training
    compare: Comparison | None
    benchmark: Benchmark | None
    study: Study | None
    unfinished: dict[str, str]  # stages that were begun and have no result of this training: why

    __eq__, __hash__ = object.__eq__, object.__hash__  # tables cannot be compared

    @property
    def stages(self) -> dict[str, Stage]:
        """The complete stages by name, in the order in which they are made."""
        return {name: getattr(self, name) for name in STAGES if getattr(self, name) is not None}

    @property
    def pipeline(self) -> Pipeline:
        """The ground truth that the run was trained for."""
        return self.train.pipeline

    @property
    def model(self) -> TransformNet:
        """The trained model, on the CPU, in eval mode; a new one each time."""
        return self.train.model

    def dataset(self, *, train: bool = False, data: str = "", data_path: str = "") -> CustomDataset:
        """The images that the run was trained on, or with `train=False` those to test it on, for its pipeline.

        `data` and `data_path` say where they lie now, if that has changed.
        """
        changes = {name: value for name, value in (("data", data), ("data_path", data_path)) if value}
        request = self.train.images.request.model_dump() | changes
        return CustomDataset(train=train, pipeline=self.pipeline, **request)


# Reading


def read_run(run_dir: str | Path, *, stages: Sequence[str] = STAGES) -> Run:
    """Read a run: its training, and those of its later stages that are among `stages`.

    RunError, in one line, if there is no complete training, or a file of these is damaged or not ours.
    """
    path = _checked(run_dir)
    _put_back(path)
    if not is_complete(path / "train"):
        raise RunError(f"{path}: {_why_untrained(path)}; `transformnet train --run-dir {path}` makes it")
    train = _read_stage(path / "train")
    made, unfinished = dict.fromkeys(STAGES[1:]), {}
    for name in (name for name in made if name in stages):
        folder = path / name
        if is_complete(folder):
            if is_current(path, name):
                made[name] = _read_stage(folder)
            else:
                unfinished[name] = "made with an earlier training"
        elif (folder / "parameters.json").exists():
            unfinished[name] = "it was stopped, it failed, or it is at work"
    label, shipped = label_of(path), is_shipped(path)
    return Run(path=path, label=label, shipped=shipped, train=train, unfinished=unfinished, **made)


def label_of(path: Path) -> str:
    """What names the run at `path` in tables and legends."""
    return one_line(path.resolve().name).replace(SHIPPED_SIGN, "?") + SHIPPED_SIGN * is_shipped(path)


def is_shipped(path: Path) -> bool:
    """Whether the run at `path` came with the project."""
    return path.resolve().parent == REFERENCE


def is_complete(folder: Path) -> bool:
    """Whether a stage's folder holds a finished stage."""
    try:
        return (folder / "stage.json").exists()
    except OSError as error:
        raise RunError(f"{folder}: cannot be read ({error.strerror})") from error


def is_current(run_dir: Path, name: str) -> bool:
    """Whether a complete stage was made with the run's present training."""
    training = parse_record(Begun, run_dir / "train" / "parameters.json").training
    return parse_record(Begun, run_dir / name / "parameters.json").training == training


def _checked(run_dir: str | Path) -> Path:
    if not isinstance(run_dir, str | Path) or run_dir == "":
        raise ParameterError(f"run_dir: expected the path of a folder, got {run_dir!r}")
    check_path("run_dir", run_dir)
    return Path(run_dir)


def _why_untrained(path: Path) -> str:
    if not path.is_dir():
        return "there is no such folder"
    if (path / "run.json").exists():
        return "a run of an older version (run.json); remove it or take another folder"
    if (path / "train" / "parameters.json").exists():
        return "stage train is not complete (it was stopped, it failed, or it is at work)"
    return "the folder holds no run"


def parse_record(kind: type[Record], path: Path) -> Record:
    """A JSON file as a record of this kind; RunError, naming the first field that is wrong."""
    try:
        return kind.model_validate_json(read_file(path, MAX_TEXT_BYTES))
    except pydantic.ValidationError as error:
        raise damaged(path, _first(error)) from error


def _first(error: pydantic.ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]


def damaged(path: Path, reason: object) -> RunError:
    """What to raise for a file of a stage that does not hold what it should."""
    stage, run_dir = path.parent.name.removesuffix(".new"), path.parent.parent
    return RunError(
        f"{path}: damaged or not ours ({one_line(reason)[:500]}); put a good one back, or "
        f"`transformnet {stage} --run-dir {run_dir} --force` makes the stage again"
    )


def _read_stage(folder: Path) -> Stage:
    """A complete stage: the records and files in its folder, whose name says which stage it is."""
    kind, read = CONTENTS[folder.name]
    begun, finished = parse_record(Begun, folder / "parameters.json"), parse_record(Finished, folder / "stage.json")
    try:
        results = kind.model_validate_json(json.dumps(finished.results))
    except pydantic.ValidationError as error:
        raise damaged(folder / "stage.json", f"results.{_first(error)}") from error
    try:
        return read(folder, dict(begun) | {"seconds": finished.seconds, "finished": finished.finished}, results)
    except pydantic.ValidationError as error:  # NaN among the parameters, which a JSON file may hold
        raise damaged(folder / "parameters.json", _first(error)) from error


def _training(folder: Path, begun: dict, results: TrainResults) -> Training:
    parameters = dict(begun["parameters"])
    try:
        pipeline = Pipeline(**parameters.pop("pipeline"))
        config = TrainConfig(**parameters)
    except (KeyError, TypeError, ParameterError) as error:
        raise damaged(folder / "parameters.json", f"parameters: {error}") from error
    history = read_table(folder / "history.csv", HISTORY_COLUMNS)
    if history["epoch"].tolist() != list(range(1, len(history) + 1)) or results.best_epoch > len(history):
        raise damaged(folder / "history.csv", "expected the epochs from 1 on, one a row, with the best among them")
    weights = read_tensors(folder / "weights.safetensors").get("mix.weight", torch.empty(0))
    if weights.shape != (1, 3, 1, 1) or weights.dtype != torch.float32 or not weights.isfinite().all():
        raise damaged(folder / "weights.safetensors", "expected mix.weight (1, 3, 1, 1), float32, finite")
    optimum = results.least_squares and LeastSquares(**dict(results.least_squares))
    return Training(
        **begun,
        **dict(results) | {"least_squares": optimum},
        config=config,
        pipeline=pipeline,
        history=history,
        weights=tuple(weights.flatten().tolist()),
    )


def _comparison(folder: Path, begun: dict, results: CompareResults) -> Comparison:
    examples = read_arrays(folder / "examples.npz", EXAMPLE_ARRAYS)
    (_, *image), (_, *target), (_, *output) = (examples[name].shape for name in ("inputs", "targets", "outputs"))
    if image != [3, *begun["images"].size] or target != output or target[0] != 1 or not all(target):
        raise damaged(folder / "examples.npz", f"images {image}, targets {target} and outputs {output} do not fit")
    return Comparison(**begun, **dict(results), examples=examples)


def _benchmark(folder: Path, begun: dict, results: NoResults) -> Benchmark:
    return Benchmark(**begun, table=read_table(folder / "benchmark.csv", BENCHMARK_COLUMNS))


def _study(folder: Path, begun: dict, results: StudyResults) -> Study:
    tables = {name: read_table(folder / f"{name}.csv", columns) for name, columns in STUDY_TABLES.items()}
    return Study(**begun, **dict(results), **tables)


CONTENTS = {  # of a stage's folder: the results in stage.json, and what reads its other files
    "train": (TrainResults, _training),
    "compare": (CompareResults, _comparison),
    "benchmark": (NoResults, _benchmark),
    "study": (StudyResults, _study),
}
STUDY_TABLES = {"seeds": SEED_COLUMNS, "libraries": LIBRARY_COLUMNS, "sizes": SIZE_COLUMNS}


def read_table(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """A CSV file whose columns are exactly `columns` (name → one of `KINDS`) and that has rows."""
    try:
        reader = csv.DictReader(io.StringIO(read_file(path, MAX_TEXT_BYTES).decode(), newline=""), strict=True)
        if list(reader.fieldnames or []) != list(columns):
            raise ValueError(f"expected the columns {', '.join(columns)}")
        rows = _rows_of(tuple(columns.items())).validate_python(list(reader))
        if not rows:
            raise ValueError("no rows")
    except pydantic.ValidationError as error:
        raise damaged(path, _first(error)) from error
    except (ValueError, csv.Error) as error:
        raise damaged(path, error) from error
    return pd.DataFrame(rows, columns=list(columns))


def _rows_of(columns: tuple[tuple[str, str], ...]) -> pydantic.TypeAdapter:
    from typing_extensions import TypedDict

    row = TypedDict("row", {name: KINDS[kind] for name, kind in columns})
    row.__pydantic_config__ = ConfigDict(extra="forbid")
    return pydantic.TypeAdapter(list[row])


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file."""
    content = read_file(path, MAX_BYTES)
    try:
        return safetensors.torch.load(content)
    except Exception as error:  # anything, by bytes that are none
        raise damaged(path, error) from error


def read_arrays(path: Path, kinds: dict[str, tuple[str, int]]) -> dict[str, np.ndarray]:
    """The arrays of an npz file that holds exactly `kinds` (name → dtype and rank), equally many entries in each."""
    content = read_file(path, MAX_BYTES)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES:,} bytes unpacked")
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files}
        if {name: (str(array.dtype), array.ndim) for name, array in arrays.items()} != kinds:
            raise ValueError(f"expected the arrays {', '.join(kinds)}")
        if len({len(array) for array in arrays.values()}) != 1 or not len(arrays[next(iter(kinds))]):
            raise ValueError("expected equally many of each")
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError("expected finite values")
    except Exception as error:  # anything, by bytes that are none
        raise damaged(path, error) from error
    return arrays


# Several runs


def reference_run() -> Path:
    """The folder of the small run that is shipped with the project, for notebooks that are opened without one."""
    return REFERENCE / "paper-cpu-small"


def scratch_run(run_dir: str) -> Path:
    """`run_dir`; for "" a folder with the reference run's training, to try the later stages on, until Python ends."""
    if run_dir:
        return _checked(run_dir)
    scratch = Path(tempfile.mkdtemp(prefix="transformnet-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    path = scratch / reference_run().name
    shutil.copytree(reference_run() / "train", path / "train")
    return path


def read_runs(run_dirs: Sequence[str | Path]) -> list[Run]:
    """The runs at `run_dirs`, or the reference run if there are none, if they can stand in one report.

    All must share the pipeline and the test images, and have different labels (folder names). RunError otherwise.
    """
    if not isinstance(run_dirs, list | tuple):
        raise ParameterError(f"runs: expected a list of run directories, got {run_dirs!r}")
    runs = [read_run(run_dir) for run_dir in run_dirs or [reference_run()]]
    for run in runs:
        if (same := next(other for other in runs if other.label == run.label)) is not run:
            raise RunError(f"{run.path} and {same.path}: two runs named {run.label}; rename one of the folders")
        if run.pipeline != runs[0].pipeline:
            raise RunError(f"{run.path}: another pipeline ({run.pipeline}) than {runs[0].path} ({runs[0].pipeline})")
    tested = [(run, name) for run in runs for name in ("compare", "benchmark") if name in run.stages]
    for run, name in tested:
        first, images = (each.stages[stage].images for each, stage in (tested[0], (run, name)))
        if (first.source, first.count, first.fingerprint) != (images.source, images.count, images.fingerprint):
            raise RunError(
                f"{run.path}: other test images of {name} ({images}) than of {tested[0][1]} in {tested[0][0].path} "
                f"({first}); `transformnet {name} --run-dir {run.path} --force` makes it again on those of now"
            )
    compared = [run for run in runs if run.compare]
    for run in compared:
        shown = [each.compare.examples["indices"].tolist() for each in (compared[0], run)]
        if shown[0] != shown[1]:
            raise RunError(f"{run.path}: shows other examples ({shown[1]}) than {compared[0].path} ({shown[0]})")
    return runs


def shipped_runs(runs: Sequence[Run]) -> list[Run]:
    """The runs shipped with the project that show a kind of device `runs` lack, on the same pipeline and test images.

    So that a report of a machine without a GPU can show one beside it. Shipped runs without a benchmark don't count.
    """
    kinds = {run.train.environment.device for run in runs}
    tested = [run.benchmark.images.fingerprint for run in runs if run.benchmark]
    shipped = [read_run(path) for path in sorted(REFERENCE.iterdir()) if is_complete(path / "train")]
    return [
        run
        for run in shipped
        if run.benchmark
        and run.train.environment.device not in kinds
        and run.pipeline == runs[0].pipeline
        and run.benchmark.images.fingerprint in tested
    ]


# Writing


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
    path = _checked(run_dir)
    with locked(path):
        drop_leftovers(path)
        _settle(path)
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
                    "take another run_dir, or force=True (--force) to make it again"
                )
            yield None
            return
        check_place(path, name)
        if force and is_complete(folder):
            folder, before = new, _begun(new, force)
        if before and not is_complete(folder):
            begun = _continued(path, name, before, begun, force)
        if begun.sittings == 1:
            _empty(folder)
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
            _remove(new)  # the mark, or what was begun beside a stage that is now made again
        writer.write_record("stage.json", finished)
        _settle(path)


def check_place(run_dir: Path, name: str) -> None:
    """Raise RunError if a stage cannot be made in `run_dir`: an older version's run is there, or somebody's files."""
    if (run_dir / "run.json").exists():
        raise RunError(f"{run_dir}: holds a run of an older version (run.json); remove it, or take another run_dir")
    for folder in (run_dir / name, run_dir / f"{name}.new"):
        _ours(folder)


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
    if not differing and before.environment.torch != begun.environment.torch:
        differing = f"torch: {before.environment.torch} → {begun.environment.torch}"
    # Who makes a stage again wants nothing in it of an older version, or of another machine's times
    if force and (differing or (before.commit, before.environment) != (begun.commit, begun.environment)):
        return begun
    if differing:
        raise RunError(
            f"{path}: stage {name} was begun with other parameters ({differing}); "
            "take another run_dir, or force=True (--force) to begin again"
        )
    return before.model_copy(update={"sittings": before.sittings + 1})


def _differences(before: Begun, begun: Begun) -> str:
    """What differs between two beginnings, in words; "" for nothing. Where the images lie does not count."""
    old, new = dict(before.parameters), dict(begun.parameters)
    if before.images.fingerprint != begun.images.fingerprint:
        old["images"], new["images"] = str(before.images), str(begun.images)
    return "; ".join(f"{key}: {old.get(key)!r} → {new.get(key)!r}" for key in old | new if old.get(key) != new.get(key))


def _settle(path: Path) -> None:
    """Put stages that were made again in their places, also after a kill in just that: two renames, in this order."""
    try:
        for name in STAGES:
            folder, new, old = path / name, path / f"{name}.new", path / f"{name}.old"
            if is_complete(new):
                if folder.exists():
                    _remove(old)
                    folder.rename(old)
                new.rename(folder)
            if folder.exists() or not is_complete(old):
                _remove(old)
            else:
                old.rename(folder)
    except OSError as error:
        raise RunError(f"{path}: {error.filename} cannot be moved or removed ({error.strerror})") from error


def _put_back(path: Path) -> None:
    """The same for a reader: only where a kill left a stage without its folder."""
    if any(is_complete(path / f"{name}.old") and not (path / name).exists() for name in STAGES):
        with locked(path):
            _settle(path)


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


def _empty(folder: Path) -> None:
    """Remove what a stage has in its folder."""
    try:
        for entry in _ours(folder):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    except OSError as error:
        raise RunError(f"{folder}: {error.filename} cannot be removed ({error.strerror})") from error


def _remove(folder: Path) -> None:
    """Remove a stage's folder, if it is there."""
    _empty(folder)
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


def now() -> datetime:
    """The time in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0)
