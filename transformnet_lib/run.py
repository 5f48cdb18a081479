"""The run directory: one training and the stages executed on it, read once into a frozen record.

One folder a stage: `parameters.json` is written first, `stage.json` last, and a stage is complete if and only if it is
there.
"""

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pydantic
import torch

from .benchmarking import SETTING_COLUMNS, Measurements
from .comparison import EXAMPLE_ARRAYS
from .dataset import CustomDataset
from .errors import ParameterError, RunError, one_line
from .files import check_path
from .libraries import LIBRARY_COLUMNS, libraries_table
from .measure import ROUND_COLUMNS
from .model import TransformNet
from .normal_equations import LeastSquares
from .pipeline import Pipeline
from .records import (
    Begun,
    Benchmark,
    BenchmarkResults,
    CompareResults,
    Comparison,
    Finished,
    NoResults,
    Record,
    Seeds,
    Stage,
    Study,
    Training,
    TrainResults,
    damaged,
    first_problem,
    parse_record,
    read_arrays,
    read_table,
    read_tensors,
)
from .resources import REFERENCE
from .seeds import SEED_COLUMNS
from .sizes import SIZE_COLUMNS, sizes_table
from .stage_folder import STAGES, is_complete, put_back
from .training import HISTORY_COLUMNS, TrainConfig

SHIPPED_SIGN = "†"  # ends the label of a shipped run, so that no number of it passes for one measured here


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
    seeds: Seeds | None
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


def read_run(run_dir: str | Path, *, stages: Sequence[str] = STAGES) -> Run:
    """Read a run: its training, and those of its later stages that are among `stages`.

    RunError, in one line, if there is no complete training, or a file of these is damaged or not ours.
    """
    path = checked_path(run_dir)
    put_back(path)
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


def is_current(run_dir: Path, name: str) -> bool:
    """Whether a complete stage was made with the run's present training."""
    training = parse_record(Begun, run_dir / "train" / "parameters.json").training
    return parse_record(Begun, run_dir / name / "parameters.json").training == training


def checked_path(run_dir: str | Path) -> Path:
    if not isinstance(run_dir, str | Path) or run_dir == "":
        raise ParameterError(f"run_dir: expected the path of a folder, got {run_dir!r}")
    check_path("run_dir", run_dir)
    return Path(run_dir)


def _why_untrained(path: Path) -> str:
    if not path.is_dir():
        return "this is a file, not a run's folder" if path.exists() else "there is no such folder"
    if (path / "run.json").exists():
        return "a run of an older version (run.json); remove it or take another folder"
    if (path / "train" / "parameters.json").exists():
        return "stage train is not complete (it was stopped, it failed, or it is at work)"
    return "the folder holds no run"


def _read_stage(folder: Path) -> Stage:
    """A complete stage: the records and files in its folder, whose name says which stage it is."""
    kind, read = CONTENTS[folder.name]
    begun, finished = parse_record(Begun, folder / "parameters.json"), parse_record(Finished, folder / "stage.json")
    try:
        results = kind.model_validate_json(json.dumps(finished.results))
    except pydantic.ValidationError as error:
        raise damaged(folder / "stage.json", f"results.{first_problem(error)}") from error
    try:
        return read(folder, dict(begun) | {"seconds": finished.seconds, "finished": finished.finished}, results)
    except pydantic.ValidationError as error:  # NaN among the parameters, which a JSON file may hold
        raise damaged(folder / "parameters.json", first_problem(error)) from error


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


def _benchmark(folder: Path, begun: dict, results: BenchmarkResults) -> Benchmark:
    rounds = read_table(folder / "rounds.csv", {"part": "str", **ROUND_COLUMNS})
    measured = Measurements(read_table(folder / "settings.csv", SETTING_COLUMNS), rounds)
    _derived(folder / "rounds.csv", lambda: measured.table)
    return Benchmark(**begun, **dict(results), measured=measured)


def _seeds(folder: Path, begun: dict, results: NoResults) -> Seeds:
    return Seeds(**begun, table=read_table(folder / "seeds.csv", SEED_COLUMNS))


def _study(folder: Path, begun: dict, results: NoResults) -> Study:
    libraries, sizes = (
        [read_table(folder / name, columns) for name, columns in tables.items()]
        for tables in (LIBRARY_TABLES, SIZE_TABLES)
    )
    return Study(
        **begun,
        libraries=_derived(folder / "library_rounds.csv", lambda: libraries_table(*libraries)),
        sizes=_derived(folder / "size_rounds.csv", lambda: sizes_table(*sizes)),
    )


def _derived(path: Path, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table that follows from rounds; RunError where none does."""
    try:
        return make()
    except (LookupError, TypeError, ValueError, ArithmeticError, ParameterError) as error:
        raise damaged(path, error) from error


CONTENTS = {  # of a stage's folder: the results in stage.json, and what reads its other files
    "train": (TrainResults, _training),
    "compare": (CompareResults, _comparison),
    "benchmark": (BenchmarkResults, _benchmark),
    "seeds": (NoResults, _seeds),
    "study": (NoResults, _study),
}
LIBRARY_TABLES = {"libraries.csv": LIBRARY_COLUMNS, "library_rounds.csv": ROUND_COLUMNS}
SIZE_TABLES = {"sizes.csv": SIZE_COLUMNS, "size_rounds.csv": {"size": "int", **ROUND_COLUMNS}}


def reference_run() -> Path:
    """The folder of the small run that is shipped with the project, for notebooks that are opened without one."""
    return REFERENCE / "paper-cpu-small"


def scratch_run(run_dir: str) -> Path:
    """`run_dir`; for "" a folder with the reference run's training, to try the later stages on, until Python ends."""
    if run_dir:
        return checked_path(run_dir)
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
