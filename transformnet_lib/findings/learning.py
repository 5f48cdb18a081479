"""What the runs say of weights and training."""

import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd

from ..comparison import metrics_table
from ..normal_equations import LeastSquares
from ..pipeline import GRAY_WEIGHTS, Pipeline
from ..run import Run
from ..training import PRESETS, TrainConfig
from .text import code, counted, escape, listed, scientific, seconds_text

CHANNELS = ("red", "green", "blue")

SMALL_MSE = 1e-3  # of pixels in [0, 1], 8 grey levels: below it pictures look alike

# What the reader must know of each kind of image source.
SOURCES = {
    "photos": (
        "crops of 32×32 pixels from photographs that come with scikit-image, cut at three scales; training and test "
        "crops are from different photographs, so the two differ more than two samples of one collection would. They "
        "are not the CIFAR-10 images [[5]](#ref-5) of the paper"
    ),
    "cifar10": "CIFAR-10 [[5]](#ref-5), the images that the paper used",
    "folder": (
        "image files of the user's own, as they lay in that folder's train/ and test/, where the paper used the "
        "archive of CIFAR-10 [[5]](#ref-5)"
    ),
}


def weights_distance(run: Run) -> str:
    """How far a run's weights are from the ground truth's."""
    trained = run.train
    away = np.abs(np.subtract(trained.weights, GRAY_WEIGHTS)).max()
    if trained.no_gradient:
        return (
            f"{code(run.label)} had no gradient: its outputs lie outside [0, 1], where the clamp is flat, "
            f"and the weights stay up to {scientific(away)} from the ground truth's."
        )
    if away < 1e-6:
        quality = "the ground truth's to rounding"
    elif away < 1e-3:
        quality = "close to the ground truth's"
    else:
        quality = "not the ground truth's"
    negative = [name for name, weight in zip(CHANNELS, trained.weights, strict=True) if weight < 0]
    odd = (
        f" A negative {listed(negative)} is no grey anybody would choose. In photographs the three colours are so "
        "alike that too much of one makes up for too little of another, and the loss hardly tells."
        if negative and trained.best_val_mse < SMALL_MSE
        else ""
    )
    return (
        f"The weights of {code(run.label)} are {quality}: the largest difference is {scientific(away)}. They are those "
        f"of epoch {trained.best_epoch} of {len(trained.history)}, with a validation MSE of "
        f"{scientific(trained.best_val_mse)}.{odd}{unsettled(run)}"
    )


def weights_table(runs: Sequence[Run], *, digits: int = 7) -> pd.DataFrame:
    """The learned weights beside those of the ground truth and the least-squares optimum of the training images.

    Weights have `digits` decimals.
    """

    def row(name: str, weights: Sequence[float], val_mse: float | None, epoch: str, seconds: float | None) -> tuple:
        mse = "–" if val_mse is None else scientific(val_mse, 3)
        time = "–" if seconds is None else seconds_text(seconds)
        return name, *(f"{weight:.{digits}f}".replace("-", "−") for weight in weights), mse, epoch, time

    optima = _optima(runs)
    rows = [] if optima else [row("ground truth, ITU-R BT.601", GRAY_WEIGHTS, None, "–", None)]
    for optimum, label in optima.items():
        of_run = f" ({label})" if rows else ""
        rows.append(row(f"ground truth, ITU-R BT.601{of_run}", GRAY_WEIGHTS, optimum.truth_val_mse, "–", None))
        rows.append(row(f"least squares{of_run}", optimum.weights, optimum.val_mse, "–", optimum.seconds))
    for run in runs:
        trained = run.train
        epoch = f"{trained.best_epoch} of {len(trained.history)}"
        name = f"{run.label} (preset {run.train.config.preset})"
        seconds = trained.history["epoch_seconds"].sum()
        rows.append(row(name, trained.weights, trained.best_val_mse, epoch, seconds))
    return pd.DataFrame(rows, columns=["Weights", "red", "green", "blue", "validation MSE", "epoch", "time"])


def _optima(runs: Sequence[Run]) -> dict[LeastSquares, str]:
    """The least-squares optima of the runs' training images, each once, with the label of the first run that has it."""
    found = {}
    for run in runs:
        optimum = run.train.least_squares
        if optimum and all(optimum.weights != other.weights for other in found):
            found[optimum] = run.label
    return found


def optimum(runs: Sequence[Run]) -> str:
    """Where the least-squares optimum lies and how well the images determine it."""
    sentences = []
    for found, label in _optima(runs).items():
        away = np.abs(np.subtract(found.weights, GRAY_WEIGHTS)).max()
        sentences.append(
            f"The least-squares weights of the {found.images:,} training images of {code(label)} come in closed form "
            f"from one pass over them and lie within {scientific(away)} of the ground truth's. The condition number of "
            f"the colours is {found.condition:.3g}: the loss is that many times steeper along its steepest direction "
            "than along its flattest."
        )
    return " ".join(sentences)


def weight_path(run: Run) -> pd.DataFrame:
    """The weights over a training: epoch (0: the random start), red, green, blue."""
    trained = run.train
    start = pd.DataFrame([[0, *trained.initial_weights]], columns=["epoch", "red", "green", "blue"])
    return pd.concat([start, trained.history[start.columns]], ignore_index=True)


def path_text(run: Run) -> str:
    """Start and end of a run's weights, for those who cannot see the curves."""
    path = weight_path(run)
    first, last = (
        ", ".join(f"{name} {value:.3f}" for name, value in path.iloc[i].drop("epoch").items()) for i in (0, -1)
    )
    return f"{escape(run.label)} starts at {first} and ends epoch {path['epoch'].iloc[-1]:.0f} at {last}."


def preset_text(run: Run) -> str:
    """A run's preset, and what of it was changed: "`paper`, changed: epochs 3"."""
    changed = changes(run)
    return code(run.train.config.preset) + (f", changed: {', '.join(changed)}" if changed else "")


def changes(run: Run) -> list[str]:
    """What of its preset a run was made without: other values than the preset's, and fewer images than there are."""
    config = asdict(run.train.config)
    preset = asdict(PRESETS.get(config["preset"], TrainConfig()))
    free = ("preset", "device", "seed")  # no part of a recipe
    changed = [f"{name} {value}" for name, value in config.items() if name not in free and value != preset[name]]
    limit = run.train.images.request.limit
    return changed + ([] if limit is None else [f"{limit:,} images only"])


def shown_beside(runs: Sequence[Run]) -> list[Run]:
    """The runs that figures of limited width show: the first of each preset, the preset `paper` first, at most two."""
    first: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: run.shipped):
        first.setdefault(run.train.config.preset, run)
    return sorted(first.values(), key=lambda run: run.train.config.preset != "paper")[:2]


def left_out(runs: Sequence[Run], shown: Sequence[Run]) -> str:
    """Which runs a figure does not show; empty if it shows all."""
    others = [code(run.label) for run in runs if run not in shown]
    return f" Of {listed(others)} there is no room here: one run a preset is shown." if others else ""


def stopping(run: Run) -> str:
    """How early stopping was set and how it ended in this run."""
    config, trained = run.train.config, run.train
    count = len(trained.history)
    ended = f"stopped after {count} epochs" if count < config.epochs else f"was ended by the limit of {count} epochs"
    least = f"at least {config.min_delta:g}" if config.min_delta else "at all"
    settled = " (counted once the learning rate has fallen to 0)" if config.decay_steps else ""
    return (
        f"With the preset {preset_text(run)} ({code(run.label)}) an epoch is an improvement if the validation MSE "
        f"falls {least} below the best so far; after {config.patience} epochs in a row without one{settled}, or "
        f"{config.epochs} in all, training ends. It {ended}; the last improvement, whose weights were restored, "
        f"came in epoch {trained.best_epoch}. {_restored(run)}"
    )


def unsettled(run: Run) -> str:
    """Whether the limit of epochs came before the learning rate had fallen, and what to do; else empty."""
    config, count = run.train.config, len(run.train.history)
    images = run.train.images.count
    per_epoch = math.ceil((images - round(images * config.val_fraction)) / config.batch_size)
    if not config.decay_steps or count * per_epoch >= config.decay_steps:
        return ""
    needed = math.ceil(config.decay_steps / per_epoch) + config.patience + 1
    return (
        f" The training of {code(run.label)} ended before it had settled: its learning rate falls over "
        f"{config.decay_steps} steps, and {counted(count, 'epoch')} of so few images are {count * per_epoch}. "
        f"Train it again with `--epochs {needed}`, or on more images."
    )


def _restored(run: Run) -> str:
    """Whether the restored epoch is that of the lowest validation MSE."""
    trained = run.train
    lowest = trained.history["val_mse"].min()
    if trained.best_val_mse <= lowest:
        return f"Its validation MSE, {scientific(lowest)}, is the lowest of all epochs."
    return (
        f"Its validation MSE is {scientific(trained.best_val_mse)}; a later epoch, too little better than the best so "
        f"far to count, had {scientific(lowest)}."
    )


def model_steps(pipeline: Pipeline) -> str:
    """What the model does, step by step, and which step is learned: a Markdown list."""
    axes = [name for name, flips in (("horizontally", pipeline.hflip), ("vertically", pipeline.vflip)) if flips]
    steps = [
        f"**Resize** to {pipeline.size[0]}×{pipeline.size[1]} pixels, bilinear and antialiased. Fixed.",
        "**Mix**: a 1×1 convolution without bias, from three channels to one. Learned.",
        *([f"**Flip** {listed(axes)}. Fixed."] if axes else []),
        "**Clamp** to $[0, 1]$, so that the output is an image. Fixed.",
    ]
    return "\n".join(f"- {step}" for step in steps)


def images_used(runs: Sequence[Run]) -> str:
    """Which images the runs saw, and whether they are the paper's; cites the report's reference 5."""
    sources = dict.fromkeys(run.train.images.source for run in runs)
    return " ".join(f"The images {code(source)} are {SOURCES[source.partition(':')[0]]}." for source in sources)


def training(run: Run) -> str:
    """The training's settings in a sentence."""
    config, images = run.train.config, run.train.images
    val = round(images.count * config.val_fraction)
    extras = [
        f"weight decay {config.weight_decay:g}",
        "the loss on clamped outputs" if config.clamp else "the loss on outputs before the clamp",
    ]
    if config.whiten:
        extras.append("the weights moved in decorrelated colour coordinates")
    if config.decay_steps:
        extras.append(f"the learning rate falling to 0 over {config.decay_steps} steps along half a cosine")
    return (
        f"Run {code(run.label)} (preset {preset_text(run)}) was trained on {images.count - val:,} images and "
        f"validated on {val:,}, with AdamW at a learning rate of {config.lr:g}, batch size {config.batch_size}, at "
        f"most {config.epochs} epochs, seed {config.seed}; {', '.join(extras)}."
    )


def history_text(histories: dict[str, pd.DataFrame], column: str) -> str:
    """First and last value of each run's curve, for those who cannot see it."""
    return " ".join(
        f"{escape(label)}: {scientific(history[column].iloc[0])} in epoch 1, {scientific(history[column].iloc[-1])} in "
        f"epoch {len(history)}."
        for label, history in histories.items()
    )


def devices_shown(runs: Sequence[Run]) -> str:
    """Which devices the training curves show; one alone is said to be alone."""
    where = {}
    for run in runs:
        there = run.train.environment
        where.setdefault(f"{there.device} ({escape(there.device_name)})", []).append(code(run.label))
    if len(where) == 1:
        return f"All runs were trained on one device, {next(iter(where))}: there is no other to compare with."
    return "; ".join(f"{listed(labels)} on {device}" for device, labels in where.items()) + "."


def example_caption(runs: Sequence[Run], i: int) -> str:
    """The caption of example `i`: which image, and its metrics for each run."""
    parts = []
    for run in runs:
        row = metrics_table(run.compare.examples).iloc[i]
        parts.append(
            f"{code(run.label)} (MSE {scientific(row['mse'])}, PSNR {row['psnr_db']:.1f} dB, SSIM {row['ssim']:.4f})"
        )
    index = runs[0].compare.examples["indices"][i]
    return f"Test image {index:,}: input, ground truth, and output and error of {listed(parts)}."
