"""What the runs show of weights and training: one `RunFacts` per run."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from ..comparison import metrics_table, spread_indices
from ..methods import MAX_MSE
from ..normal_equations import LeastSquares
from ..pipeline import GRAY_WEIGHTS
from ..records import Comparison as ComparisonStage
from ..run import Run
from ..seeds import CHANGES, changed_name
from ..training import PRESETS, TrainConfig

CHANNELS = ("red", "green", "blue")
ROUNDING = 1e-6  # of a weight: below it, nothing but rounding is left
CLOSE = 1e-3
ALIKE = 1e-3  # MSE of pixels in [0, 1], 8 grey levels: below it pictures look alike
HALF_A_LEVEL = 0.5 / 255  # of a pixel: below it, an 8-bit picture is the same


@dataclass(frozen=True)
class Preset:
    """A run's preset and what of it was changed: other values than the preset's, and fewer images than there are."""

    name: str
    changes: dict[str, object]  # option → value
    limit: int | None

    @property
    def unchanged(self) -> bool:
        return not self.changes and self.limit is None


@dataclass(frozen=True)
class Training:
    """How a run was trained, and to which weights."""

    config: TrainConfig
    images: int  # trained on
    validation_images: int
    weights: tuple[float, float, float]
    initial_weights: tuple[float, float, float]
    error: float  # the largest difference of a weight from the pipeline's
    error_kind: str  # "rounding", "close" or "far"
    negative: list[str]  # channels whose weight is negative though the loss is small
    no_gradient: bool  # the outputs of the random start lie outside [0, 1], where the clamp is flat
    epochs: int
    best_epoch: int
    val_mse: float  # of the epoch restored
    lowest_val_mse: float  # of any epoch
    seconds: float  # of all epochs
    history: pd.DataFrame
    path: pd.DataFrame  # epoch (0: the random start), red, green, blue
    unsettled: "Unsettled | None"
    least_squares: LeastSquares | None  # of the same images; None where they do not determine it

    @property
    def ended_early(self) -> bool:
        return self.epochs < self.config.epochs

    @property
    def restored_lowest(self) -> bool:
        return self.val_mse <= self.lowest_val_mse


@dataclass(frozen=True)
class Unsettled:
    """A training whose limit of epochs came before its learning rate had fallen."""

    steps: int  # made
    needed_epochs: int


@dataclass(frozen=True)
class Example:
    """A compared test image."""

    index: int
    mse: float
    psnr_db: float
    ssim: float
    grey_levels: float  # the largest error of a pixel, of 255


@dataclass(frozen=True)
class Comparison:
    """A run's model against the pipeline, on all test images."""

    images: int
    mse: float
    grey_levels: float  # the largest error of a pixel, of 255
    in_training: int | None  # images that the run was also trained on; None where that is not known
    evenly_spaced: bool  # whether the examples are spread over all test images
    distance: str  # "equal" after rounding to 8 bits, "close", "far", "no gradient" or "undetermined"
    examples: list[Example]


@dataclass(frozen=True)
class Spread:
    """Median and range over seeds."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Seeds:
    """What a preset makes of its random starts."""

    preset: str
    seeds: int
    no_gradient: int
    error: Spread  # the largest difference of a weight from the least-squares optimum
    error_with_gradient: Spread | None  # of the starts that had one
    val_mse: Spread
    best_epoch: Spread
    seconds: Spread


@dataclass(frozen=True)
class Change:
    """A single change of the recipe, to what `precise` has, and what it makes of the first seed."""

    name: str  # one of `seeds.CHANGES`
    error: float  # the largest difference of a weight from the least-squares optimum
    epochs: int
    no_gradient: bool

    @property
    def repaired(self) -> bool:
        return self.error < CLOSE


@dataclass(frozen=True)
class WeightRow:
    """Weights with their validation MSE: a run's, the pipeline's ("truth") or the least-squares optimum's."""

    kind: str  # "run", "truth" or "least squares"
    label: str  # of the run whose training images they belong to
    of: str  # the same where there are several optima, which must be told apart
    weights: tuple[float, float, float]
    error: float  # the largest difference from the pipeline's
    val_mse: float | None
    seconds: float | None
    run: "RunFacts | None" = None
    optimum: LeastSquares | None = None


@dataclass(frozen=True)
class RunFacts:
    """One run: what it was trained with, and what its stages found."""

    label: str
    shipped: bool
    device: str
    device_name: str
    preset: Preset
    source: str  # of the images
    training: Training
    comparison: Comparison | None
    seeds: list[Seeds]
    changes: list[Change]  # of the recipe, one each, from the first of its seeds
    unchanged_error: float | None  # the recipe's own largest weight error from that seed
    seeds_table: pd.DataFrame | None
    stages: list[str]

    @property
    def first(self) -> dict[str, float]:
        """The first epoch's row of the history."""
        return self.training.history.iloc[0].to_dict()

    @property
    def last(self) -> dict[str, float]:
        return self.training.history.iloc[-1].to_dict()

    @property
    def repaired(self) -> bool:
        """Whether one change alone repairs the recipe."""
        return any(change.repaired for change in self.changes)

    @property
    def kind(self) -> str:
        """The kind of image source: photos, cifar10 or folder."""
        return self.source.partition(":")[0]


def run_facts(run: Run) -> RunFacts:
    seeds, changed = None, {}
    if run.seeds:
        table = run.seeds.table
        changed = {change: table[table["preset"] == changed_name(change)] for change in CHANGES}
        seeds = table[~table["preset"].isin(map(changed_name, CHANGES))]
    return RunFacts(
        label=run.label,
        shipped=run.shipped,
        device=run.train.environment.device,
        device_name=run.train.environment.device_name,
        preset=_preset(run),
        source=run.train.images.source,
        training=_training(run),
        comparison=_comparison(run, run.compare) if run.compare else None,
        seeds=[] if seeds is None else [_seeds(preset, rows) for preset, rows in seeds.groupby("preset")],
        changes=[
            Change(change, *rows[["weight_error", "epochs", "no_gradient"]].iloc[0])
            for change, rows in changed.items()
            if rows["weight_error"].notna().any()
        ],
        unchanged_error=_unchanged_error(seeds),
        seeds_table=seeds,
        stages=list(run.stages),
    )


def _unchanged_error(seeds: pd.DataFrame | None) -> float | None:
    if seeds is None or (seeds["preset"] != "paper").all():
        return None
    error = seeds.loc[seeds["preset"] == "paper", "weight_error"].iloc[0]
    return None if math.isnan(error) else float(error)


def weight_rows(runs: Sequence[RunFacts]) -> list[WeightRow]:
    """The pipeline's weights and each optimum once, with its own validation images; then those of the runs."""
    optima: dict[LeastSquares, str] = {}
    for run in runs:
        optimum = run.training.least_squares
        if optimum and all(optimum.weights != other.weights for other in optima):
            optima[optimum] = run.label
    rows = [] if optima else [WeightRow("truth", "", "", GRAY_WEIGHTS, 0.0, None, None)]
    for optimum, label in optima.items():
        of, error = label if len(optima) > 1 else "", weight_error(optimum.weights)
        rows.append(WeightRow("truth", label, of, GRAY_WEIGHTS, 0.0, optimum.truth_val_mse, None))
        weights, mse = optimum.weights, optimum.val_mse
        rows.append(WeightRow("least squares", label, of, weights, error, mse, optimum.seconds, optimum=optimum))
    for run in runs:
        found = run.training
        rows.append(WeightRow("run", run.label, "", found.weights, found.error, found.val_mse, found.seconds, run))
    return rows


def _preset(run: Run) -> Preset:
    config = asdict(run.train.config)
    preset = asdict(PRESETS.get(config["preset"], TrainConfig()))
    free = ("preset", "device", "seed")  # no part of a recipe
    changes = {name: value for name, value in config.items() if name not in free and value != preset[name]}
    images = run.train.images
    limit = images.request.limit
    return Preset(config["preset"], changes, limit if limit == images.count else None)  # there may be fewer than asked


def _training(run: Run) -> Training:
    stage, config = run.train, run.train.config
    error = weight_error(stage.weights)
    validation = round(stage.images.count * config.val_fraction)
    small = stage.best_val_mse < ALIKE
    start = pd.DataFrame([[0, *stage.initial_weights]], columns=["epoch", *CHANNELS])
    return Training(
        config=config,
        images=stage.images.count - validation,
        validation_images=validation,
        weights=stage.weights,
        initial_weights=stage.initial_weights,
        error=error,
        error_kind="rounding" if error < ROUNDING else "close" if error < CLOSE else "far",
        negative=[name for name, weight in zip(CHANNELS, stage.weights, strict=True) if weight < 0 and small],
        no_gradient=stage.no_gradient,
        epochs=len(stage.history),
        best_epoch=stage.best_epoch,
        val_mse=stage.best_val_mse,
        lowest_val_mse=float(stage.history["val_mse"].min()),
        seconds=float(stage.history["epoch_seconds"].sum()),
        history=stage.history,
        path=pd.concat([start, stage.history[start.columns]], ignore_index=True),
        unsettled=_unsettled(config, stage.images.count - validation, len(stage.history)),
        least_squares=stage.least_squares,
    )


def weight_error(weights: Sequence[float]) -> float:
    """The largest difference of a weight from the pipeline's."""
    return float(np.abs(np.subtract(weights, GRAY_WEIGHTS)).max())


def _unsettled(config: TrainConfig, images: int, epochs: int) -> Unsettled | None:
    steps = math.ceil(images / config.batch_size)
    if not config.decay_steps or epochs * steps >= config.decay_steps:
        return None
    return Unsettled(epochs * steps, math.ceil(config.decay_steps / steps) + config.patience + 1)


def _comparison(run: Run, stage: ComparisonStage) -> Comparison:
    examples = [
        Example(int(row["image"]), row["mse"], row["psnr_db"], row["ssim"], 255 * row["max_error"])
        for _, row in metrics_table(stage.examples).iterrows()
    ]
    spread = spread_indices(stage.images.count)
    return Comparison(
        images=stage.images.count,
        mse=stage.test_mse,
        grey_levels=255 * stage.max_error,
        in_training=stage.in_training,
        evenly_spaced=[example.index for example in examples] == spread,
        distance=distance(run),
        examples=examples,
    )


def distance(run: Run) -> str:
    """A compared run's model against the pipeline: "equal" after rounding to 8 bits, "close", "far" or "no gradient".

    Or "undetermined": not far, but on images whose colours do not determine the weights, which thus may be any.
    """
    if run.train.no_gradient:
        return "no gradient"
    if run.compare.test_mse > MAX_MSE:
        return "far"
    if run.train.least_squares is None:
        return "undetermined"
    return "equal" if run.compare.max_error < HALF_A_LEVEL else "close"


def _seeds(preset: str, rows: pd.DataFrame) -> Seeds:
    others = rows[~rows["no_gradient"]]
    return Seeds(
        preset=preset,
        seeds=len(rows),
        no_gradient=int(rows["no_gradient"].sum()),
        error=_spread(rows["weight_error"]),
        error_with_gradient=_spread(others["weight_error"]) if len(others) else None,
        **{name: _spread(rows[name]) for name in ("val_mse", "best_epoch", "seconds")},
    )


def _spread(values: pd.Series) -> Spread:
    return Spread(float(values.median()), float(values.min()), float(values.max()))
