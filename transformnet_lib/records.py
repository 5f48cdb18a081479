"""What the files of a run hold: the records of its stages, and how each kind of file is read and checked.

Reading executes nothing: JSON and CSV are checked against records, arrays and weights are loaded without pickle. What
was read is not checked again. Its texts are any: who shows one escapes it.
"""

import csv
import io
import math
import zipfile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import pydantic
import safetensors.torch
import torch
from pydantic import (
    AwareDatetime,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
)

from .benchmarking import Measurements
from .dataset import CustomDataset
from .errors import RunError, one_line
from .files import read_file
from .model import TransformNet, weighted_model
from .normal_equations import LeastSquares
from .pipeline import Pipeline
from .training import TrainConfig

FORMAT = 4  # of the run directory; raised when a reader of the old one would go wrong
MAX_BYTES = 2**26  # 64 MiB; no file of a run is near it, packed or unpacked
MAX_TEXT_BYTES = 2**24  # 16 MiB, of JSON and CSV, which grow when they are parsed

# What a table's column holds, by the kinds that its module names. An empty field is a number that does not exist.
_Missing = pydantic.BeforeValidator(lambda field: "nan" if field == "" else field)
KINDS = {
    "int": Annotated[int, Field(ge=0, lt=2**63)],
    "count": Annotated[int, Field(ge=1, lt=2**63)],
    "float": Annotated[float, _Missing, pydantic.AfterValidator(lambda value: _finite(value))],
    "amount": Annotated[float, _Missing, pydantic.AfterValidator(lambda value: _finite(value, value >= 0))],
    "duration": Annotated[float, _Missing, pydantic.AfterValidator(lambda value: _finite(value, value > 0))],
    "loss": Annotated[float, _Missing],  # of an epoch: infinite in a training that diverges
    "bool": bool,
    "str": str,
}


def _finite(value: float, in_range: bool = True) -> float:
    if math.isinf(value):
        raise ValueError("expected a finite number")
    if not in_range and not math.isnan(value):
        raise ValueError(f"a number out of range, {value}")
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
    usable_cores: PositiveInt | None  # by the affinity of the process; not on macOS
    threads: PositiveInt
    os: str
    python: str
    torch: str
    torchvision: str
    cuda: str | None


class Begun(Record):
    """parameters.json: with what a stage was begun."""

    format: Literal[FORMAT]
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
    in_training: NonNegativeInt | None = None  # test images that are training images too; runs of before do not tell


class BenchmarkResults(Record):
    weights: tuple[FiniteFloat, FiniteFloat, FiniteFloat]  # of the model that was timed
    origin: Literal["training", "least squares"]  # where they are from


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
        return weighted_model(self.weights, self.pipeline)


class Comparison(Stage):
    """The `compare` stage: over all test images, and the examples (arrays as `EXAMPLE_ARRAYS`)."""

    test_mse: float
    max_error: float
    in_training: int | None
    examples: dict[str, np.ndarray]


class Benchmark(Stage):
    """The `benchmark` stage: what was measured, and with which weights."""

    measured: Measurements
    weights: tuple[float, float, float]
    origin: str

    @property
    def table(self) -> pd.DataFrame:
        """A row per part and setting: `TABLE_COLUMNS`."""
        return self.measured.table


class Seeds(Stage):
    """The `seeds` stage: a row per preset and seed, `SEED_COLUMNS`."""

    table: pd.DataFrame


class Study(Stage):
    """The `study` stage: other libraries and cost over size, with the times that follow from their rounds."""

    libraries: pd.DataFrame  # as `libraries_table` gives it
    sizes: pd.DataFrame  # as `sizes_table` gives it


def parse_record(kind: type[Record], path: Path) -> Record:
    """A JSON file as a record of this kind; RunError, naming the first field that is wrong."""
    try:
        return kind.model_validate_json(read_file(path, MAX_TEXT_BYTES))
    except pydantic.ValidationError as error:
        raise damaged(path, first_problem(error)) from error


def first_problem(error: pydantic.ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    if where == "format":
        return f"format {first['input']}, of another version; expected {FORMAT}"
    return f"{where}: {first['msg']}" if where else first["msg"]


def damaged(path: Path, reason: object) -> RunError:
    """What to raise for a file of a stage that does not hold what it should."""
    stage, run_dir = path.parent.name.removesuffix(".new"), path.parent.parent
    return RunError(
        f"{path}: damaged or not ours ({one_line(reason)[:500]}); put a good one back, or "
        f"`transformnet {stage} --run-dir {run_dir} --force` makes the stage again"
    )


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
        raise damaged(path, first_problem(error)) from error
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
