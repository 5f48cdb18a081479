"""The figures: each function takes data and Axes, draws, labels units, and returns the Axes; nothing is saved here.

One style for all (`use_style`), sized for a 160 mm text column. Colours are Okabe and Ito's (2008), told apart by
colour-blind readers, and every line differs from the others in its dash or marker too, for print in black and white.
"""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, ScalarFormatter
from PIL import Image
from torch import Tensor

from .measure import Estimate
from .separable import Separable
from .words.filters import decimals, times

TEXT_WIDTH = 6.3  # inches, 160 mm

# Okabe and Ito, "Color Universal Design" (2008), https://jfly.uni-koeln.de/color/; yellow left out: too pale on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
CHANNEL_COLOURS = ("#D55E00", "#009E73", "#0072B2")  # of red, green and blue: vermilion, bluish green, blue
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))

UNITS = {"train_mse": "training MSE", "val_mse": "validation MSE", "epoch_seconds": "time of an epoch (s)"}
DRAWN_PIXELS = 320  # about; a picture's pixels are repeated to so many, so that no viewer can blur what they look like


def use_style() -> None:
    """Set Matplotlib's defaults for every figure of the report."""
    plt.rcParams.update(
        {
            "figure.figsize": (TEXT_WIDTH, 2.8),
            "figure.constrained_layout.use": True,
            "font.family": ["STIXGeneral", "DejaVu Sans"],  # a serif near the text's; the second has what it lacks
            "mathtext.fontset": "stix",
            "font.size": 10,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#DDDDDD",
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.4,
            "lines.markersize": 4.5,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "axes.prop_cycle": plt.cycler(color=COLOURS),
            "svg.hashsalt": "transformnet",  # without it equal figures get different ids
            "image.interpolation": "none",  # the SVG holds the array as it is, not resampled to the figure's dots
        }
    )


def error_scale(errors: np.ndarray) -> float:
    """The largest absolute error rounded up to one significant digit: the limit of the error maps' colours.

    >>> error_scale(np.array([0.034, -0.012]))
    0.04
    """
    largest = float(np.abs(errors).max())
    if largest == 0:
        return 1.0
    digit = 10 ** math.floor(math.log10(largest))
    return float(f"{math.ceil(largest / digit) * digit:.1g}")


def enlarged(image: np.ndarray) -> np.ndarray:
    """An image `(h, w, …)` with every pixel repeated to a block, all blocks of one size."""
    times = max(1, DRAWN_PIXELS // max(image.shape[:2]))
    return image.repeat(times, axis=0).repeat(times, axis=1)


def grey(image: np.ndarray) -> np.ndarray:
    """A float image `(h, w)` in [0, 1] as the 8-bit grey picture that it is to the eye: uint8 `(h, w, 3)`."""
    return np.repeat(np.round(image * 255).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def name_of(label: str, *, width: int = 40) -> str:
    """A run's label as Matplotlib draws it literally, in lines of at most `width` characters.

    It would take `$` for maths and leave a leading `_` out of legends.
    """
    text = "\n".join(textwrap.wrap(label, width)[:3]).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def comparison(
    images: np.ndarray,
    targets: np.ndarray,
    outputs: Mapping[str, np.ndarray],
    *,
    rows: Sequence[str] = (),
    notes: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """Draw examples below each other: the input, the ground truth, and for each model its output and its error.

    `images` uint8 (n, 3, h, w); `targets` and each of `outputs` float (n, h, w) in [0, 1]. Pixels are drawn as they
    are; an error is output minus ground truth, on colours up to the model's largest. `rows` names the examples, `notes`
    says something below each output of a model.
    """
    n, columns = len(images), 2 + 2 * len(outputs)
    tile = TEXT_WIDTH / (columns + 0.4)  # inches
    height = n * (tile * max(targets.shape[1] / targets.shape[2], images.shape[2] / images.shape[3]) + 0.2) + 0.8
    figure, axes = plt.subplots(n, columns, figsize=(TEXT_WIDTH, height), squeeze=False)
    figure.get_layout_engine().set(h_pad=0.01, w_pad=0.02, hspace=0, wspace=0)
    for ax in axes.flat:
        ax.set_axis_off()
    size = "{}×{}".format
    axes[0, 0].set_title(f"input\n{size(*images.shape[2:])}", fontsize=9)
    axes[0, 1].set_title(f"ground truth\n{size(*targets.shape[1:])}", fontsize=9)
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        axes[i, 0].imshow(enlarged(image.transpose(1, 2, 0)))
        axes[i, 1].imshow(enlarged(grey(target)))
    for ax, text in zip(axes[:, 0], rows, strict=False):
        ax.text(-0.08, 0.5, text, transform=ax.transAxes, rotation=90, va="center", ha="right", fontsize=9)
    for k, (label, output) in enumerate(outputs.items()):
        shown, errors = axes[:, 2 + 2 * k], axes[:, 3 + 2 * k]
        shown[0].set_title(f"model\n{name_of(label, width=15)}", fontsize=9)
        errors[0].set_title("error\n(model − truth)", fontsize=9)
        scale = error_scale(output - targets)
        for i in range(n):
            shown[i].imshow(enlarged(grey(output[i])))
            drawn = errors[i].imshow(enlarged(output[i] - targets[i]), cmap="PuOr", vmin=-scale, vmax=scale)
            if notes:
                text = {"va": "top", "ha": "center", "fontsize": 7.5}
                shown[i].text(0.5, -0.04, notes[label][i], transform=shown[i].transAxes, **text)
        bar = figure.colorbar(
            drawn, ax=list(errors), ticks=[-scale, 0, scale], location="bottom", shrink=0.9, aspect=14, pad=0.01
        )
        digit, exponent = (int(part) for part in f"{scale:.0e}".split("e"))
        text = rf"{digit}\times10^{{{exponent}}}" if exponent < -3 else f"{scale:g}"
        bar.set_ticklabels([f"$-{text}$", "0", f"${text}$"], fontsize=8)
        bar.ax.tick_params(length=2)
        bar.outline.set_visible(False)
    return figure


def headline(weights: Mapping[str, Sequence[float]], times: Mapping[str, Estimate], *, unit: str) -> Figure:
    """The picture that says it: the three weights of each of `weights`, the truth first, and bars of `times`."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(TEXT_WIDTH, 2.2), width_ratios=(1, 1.6))
    for k, (label, values) in enumerate(weights.items()):
        style = {"color": ("black", *COLOURS[1:])[k], "marker": ("_", *MARKERS)[k], "markersize": 13 if k == 0 else 5}
        left.plot(range(3), values, linestyle="none", label=name_of(label, width=24), zorder=3 - k, **style)
    left.axhline(0, color="#555555", linewidth=0.8)
    left.set_xticks(range(3), ["red", "green", "blue"])
    left.set_xlim(-0.5, 2.5)
    left.set_ylabel("weight")
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.14), handletextpad=0.2, labelspacing=0.2)
    positions = np.arange(len(times))[::-1]
    medians = np.array([each.median for each in times.values()])
    spread = [[each.median - each.low for each in times.values()], [each.high - each.median for each in times.values()]]
    colours = ["#999999" if k < 2 else COLOURS[k - 2] for k in range(len(times))]
    right.barh(positions, medians, color=colours, height=0.65)
    right.errorbar(medians, positions, xerr=spread, linestyle="none", color="black", linewidth=1, capsize=2)
    for position, each in zip(positions, times.values(), strict=True):
        text = f"{each.median:,.{decimals(each.median)}f} {unit}"
        right.text(each.high + medians.max() * 0.02, position, text, va="center", fontsize=9)
    right.set_yticks(positions, list(times), fontsize=9)
    right.set_xlim(0, max(each.high for each in times.values()) * 1.22)
    right.set_xticks([])
    right.spines["bottom"].set_visible(False)
    right.grid(visible=False)
    return figure


def picture_pairs(axes: np.ndarray, pairs: list[tuple[Tensor, Tensor]]) -> np.ndarray:
    """Draw image and target of each pair below each other; `axes` has two rows, `pairs` are a data set's items."""
    for column, (image, target) in zip(axes.T, pairs, strict=True):
        column[0].imshow(enlarged(image.permute(1, 2, 0).numpy()))
        column[1].imshow(enlarged(grey(target[0].numpy())))
        for ax in column:
            ax.set_axis_off()
    return axes


def pipeline_matrices(axes: Sequence[Axes], separable: Separable) -> None:
    """A pipeline's matrices on three axes: rows, columns and mix, blue above 0 and orange below."""
    names = ("rows", "columns", "mix")
    labels = (("input row", "output row"), ("input column", "output column"), ("input channel", "output channel"))
    for ax, name, (x, y) in zip(axes, names, labels, strict=True):
        matrix = getattr(separable, name).numpy()
        largest = float(np.abs(matrix).max())
        ax.imshow(matrix, cmap="PuOr", vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest")
        ax.set(title=f"{name} ({matrix.shape[0]}×{matrix.shape[1]})", xlabel=x, ylabel=y)
        ax.grid(False)
        if name == "mix":
            ax.set_xticks(range(matrix.shape[1]))
            ax.set_yticks(range(matrix.shape[0]))
            for (k, c), value in np.ndenumerate(matrix):
                light = abs(value) > 0.6 * largest
                ax.text(c, k, f"{value:.3g}", ha="center", va="center", color="white" if light else "black", fontsize=8)


def history_curves(ax: Axes, histories: Mapping[str, pd.DataFrame], column: str) -> Axes:
    """Draw one column of each run's history over the epochs, a line a run; MSE on a logarithmic axis."""
    for k, (label, history) in enumerate(histories.items()):
        style = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}
        ax.plot(history["epoch"], history[column], linestyle=DASHES[k % len(DASHES)], label=name_of(label), **style)
    if column != "epoch_seconds":
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    ax.set_xlabel("epoch")
    ax.set_ylabel(UNITS[column])
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend()
    return ax


def weight_paths(ax: Axes, path: pd.DataFrame, optimum: Sequence[float], *, label: str = "") -> Axes:
    """Draw the three weights after each epoch of one training, and dotted lines where the optimum has them.

    `path` has the columns epoch (0 is the start), red, green, blue; `optimum` is (red, green, blue); `label`
    names the training.
    """
    ax.set_title(name_of(label))
    for k, (name, best) in enumerate(zip(("red", "green", "blue"), optimum, strict=True)):
        colour = CHANNEL_COLOURS[k]
        ax.axhline(best, color=colour, linestyle=":", linewidth=1.2)
        ax.plot(path["epoch"], path[name], color=colour, marker=MARKERS[k], linestyle=DASHES[k], label=name)
    ax.set_xlabel("epoch (0: the random start)")
    ax.set_ylabel("weight")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend()
    return ax


def seed_errors(ax: Axes, seeds: pd.DataFrame) -> Axes:
    """Draw each training's largest weight error against its seed, a marker a preset; a cross: zero gradient.

    `seeds` has the columns of `seeds.SEED_COLUMNS`.
    """
    for k, (preset, rows) in enumerate(seeds.groupby("preset")):
        ax.plot(rows["seed"], rows["weight_error"], linestyle="none", color=COLOURS[k], marker=MARKERS[k], label=preset)
    if (stuck := seeds[seeds["no_gradient"]]).size:
        style = {"linestyle": "none", "color": "black", "marker": "x", "markersize": 8}
        ax.plot(stuck["seed"], stuck["weight_error"], label="no gradient", **style)
    ax.set_yscale("log")
    ax.set_xlabel("seed")
    ax.set_ylabel("largest weight error")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def size_curves(ax: Axes, sizes: pd.DataFrame) -> Axes:
    """Draw each method's seconds against the number of images, both logarithmic; bars span the intervals.

    `sizes` is as `sizes.sizes_table` gives it, its methods named for a reader.
    """
    for k, (method, rows) in enumerate(sizes[sizes["reason"] == ""].groupby("method", sort=False)):
        spread = [rows["seconds"] - rows["low"], rows["high"] - rows["seconds"]]
        style = {"color": COLOURS[k], "marker": MARKERS[k], "linestyle": DASHES[k], "capsize": 2}
        ax.errorbar(rows["images"].astype(int), rows["seconds"], yerr=spread, label=method, **style)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("images")
    ax.set_ylabel("time (s)")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def speedup_curves(ax: Axes, table: pd.DataFrame, device: str, *, title: str) -> Axes:
    """Draw the speed-up over the pipeline run image by image against the batch size, for one device of `table`.

    `table` has the columns `benchmarking.TABLE_COLUMNS`; rows with drop_last are left out. Above the dashed line at 1 a
    method beats the pipeline run image by image; above the black line, the pipeline run in batches. The dotted line is
    the copy: the images' bytes moved once. Bars span the intervals.
    """
    measured = table[(table["reason"] == "") & ~table["drop_last"].astype(bool)]
    curves = measured[measured["part"].isin(["sweep", "small"])]

    def draw(rows: pd.DataFrame, label: str, **style) -> None:
        for k, (_, line) in enumerate(rows.groupby("part")):  # none joins what was measured in different rounds
            line = line.sort_values("batch_size")
            spread = [line["speedup"] - line["speedup_low"], line["speedup_high"] - line["speedup"]]
            style["label"] = "" if k else label
            ax.errorbar(line["batch_size"].astype(int), line["speedup"], yerr=spread, capsize=2, **style)

    of_device = curves[curves["device"] == device]
    names = {"fast": "model, the fast method", "reference": "model, the paper's method"}
    for k, (method, name) in enumerate(names.items()):
        for shuffle, rows in of_device[of_device["method"] == method].groupby("shuffle"):
            draw(
                rows,
                color=COLOURS[k],
                marker=MARKERS[k],
                markerfacecolor="white" if shuffle else None,
                linestyle="--" if shuffle else "-",
                label=f"{name}, {'shuffled' if shuffle else 'in order'}",
            )
    draw(curves[curves["method"] == "batched"], color="black", marker="x", label="pipeline, in batches (CPU)")
    ax.axhline(1, color="#555555", linestyle="--", linewidth=1.2, label="pipeline, image by image (CPU)")
    bound = measured[(measured["part"] == "best") & (measured["method"] == "copy") & (measured["device"] == device)]
    if len(bound):
        ax.axhline(
            bound["speedup"].iloc[0], color="#555555", linestyle=":", linewidth=1.4, label="copy: bytes moved once"
        )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("batch size (images)")
    ax.set_ylabel("speed-up over image by image (×)")
    ax.set_title(name_of(title))
    ax.xaxis.set_major_locator(FixedLocator(sorted(curves.loc[curves["method"] == "batched", "batch_size"].unique())))
    ax.xaxis.set_minor_locator(NullLocator())
    _plain_log_ticks(ax.yaxis)
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def speedup_bars(
    ax: Axes, speedups: Mapping[str, Estimate], *, hatched: Sequence[str] = (), copy: float | None, title: str
) -> Axes:
    """Draw the speed-up of each combination of network, loader and storage, by its name, on a logarithmic axis.

    The first word of a name gives the colour; those `hatched` are hatched. `copy` is the speed-up of moving the bytes
    once.
    """
    kinds = list(dict.fromkeys(name.partition(",")[0] for name in speedups))
    colours = [COLOURS[kinds.index(name.partition(",")[0]) % len(COLOURS)] for name in speedups]
    hatches = ["////" if name in hatched else "" for name in speedups]
    cells = pd.DataFrame([vars(each) for each in speedups.values()])
    rows = np.arange(len(cells))
    style = {"color": colours, "hatch": hatches, "edgecolor": "white", "height": 0.7}
    ax.barh(rows, cells["median"] - 0.5, left=0.5, **style)
    spread = [cells["median"] - cells["low"], cells["high"] - cells["median"]]
    ax.errorbar(cells["median"], rows, xerr=spread, linestyle="none", color="black", linewidth=1, capsize=2)
    for row, cell in enumerate(cells.itertuples()):
        ax.text(cell.high * 1.08, row, times(cell.median), va="center", fontsize=9)
    if copy is not None:
        ax.axvline(copy, color="#555555", linestyle=":", linewidth=1.4)
        ax.text(copy, -0.9, f"copy {times(copy)} ", ha="right", va="center", fontsize=9, color="#555555")
    ax.axvline(1, color="#555555", linestyle="--", linewidth=1.2)
    ax.set_xscale("log")
    ax.set_xlim(0.5, 3 * max(cells["high"].max(), copy or 1))
    _plain_log_ticks(ax.xaxis)
    ax.set_yticks(rows, list(speedups), fontsize=9)
    ax.set_ylim(-1.5, len(cells) - 0.4)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("speed-up over image by image (×)")
    ax.set_title(name_of(title))
    return ax


def _plain_log_ticks(axis: Axis) -> None:
    """Ticks at 1, 2, 5, 10, … written as plain numbers; over more than two decades, where those would meet, 1, 10, …"""
    low, high = axis.get_view_interval()
    digits = (1, 2, 5) if high < 100 * low else (1,)
    ticks = [digit * 10.0**power for power in range(-3, 6) for digit in digits]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:g}")
    )  # matplotlib's own gives all as many decimals


def png(values: np.ndarray, *, side: int = 168) -> bytes:
    """A picture as PNG, its pixels enlarged to squares, about `side` pixels wide; a larger one is reduced to that.

    `values` is uint8 `(h, w, 3)`, or float `(h, w)` in [0, 1] for grey. A few milliseconds, where a Matplotlib figure
    takes a hundred, so that it can follow a slider.
    """
    picture = Image.fromarray(values if values.dtype == np.uint8 else np.round(255 * values).astype(np.uint8))
    longest = max(picture.size)
    factor = side // longest if longest <= side else side / longest
    size = [max(1, round(pixels * factor)) for pixels in picture.size]
    file = io.BytesIO()
    picture.resize(size, Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BOX).save(file, "png")
    return file.getvalue()


def error_colours(errors: np.ndarray, scale: float) -> np.ndarray:
    """Errors `(h, w)` as uint8 `(h, w, 3)` colours, those of `comparison`: from -scale, orange, to +scale, purple."""
    return plt.get_cmap("PuOr")((errors / scale + 1) / 2, bytes=True)[..., :3]


def loss_contours(ax: Axes, curvatures: tuple[float, float], paths: Mapping[str, np.ndarray]) -> Axes:
    """Draw the loss a x² + b y², (a, b) = `curvatures`, as one contour a power of ten, and trainings' paths over it.

    Each path is `(steps, 2)`, relative to the optimum (the cross), from the start (the large marker) on. Both axes have
    the same scale, so that a valley looks as narrow as it is.
    """
    for k, (label, path) in enumerate(paths.items()):
        style = {
            "color": COLOURS[k % len(COLOURS)],
            "marker": MARKERS[k % len(MARKERS)],
            "markevery": [0],
            "markersize": 8 - 2 * k,
        }
        ax.plot(*path.T, linestyle=DASHES[k % len(DASHES)], linewidth=1.1, label=label, **style)
    ax.plot(0, 0, color="black", marker="+", markersize=11, zorder=3)
    points = np.concatenate([*paths.values(), [[0, 0]]])
    low, high = points.min(0), points.max(0)
    # A tenth beyond the paths, and neither axis so short beside the other that nothing can be seen along it
    half = np.maximum(0.6 * (high - low), 0.6 * (high - low).max() / [1.6, 3.5])
    (left, bottom), (right, top) = (low + high) / 2 - half, (low + high) / 2 + half
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    highest = curvatures[0] * max(left**2, right**2) + curvatures[1] * max(bottom**2, top**2)
    levels = np.arange(-6, math.ceil(math.log10(highest)) + 1)
    for power, grey in zip(levels[::-1], np.linspace(0.6, 1, len(levels)), strict=True):
        axes_lengths = 2 * np.sqrt(10.0**power / np.asarray(curvatures))  # a contour of a quadratic is an ellipse
        ax.add_patch(Ellipse((0, 0), *axes_lengths, facecolor=str(grey), edgecolor="#999999", linewidth=0.5, zorder=0))
    ax.grid(visible=False)
    return ax


def distance_curves(ax: Axes, distances: Mapping[str, np.ndarray]) -> Axes:
    """Draw how far a training's weights are from the optimum, a line a direction, over its steps."""
    for k, (label, distance) in enumerate(distances.items()):
        ax.plot(np.abs(distance), color=COLOURS[k], linestyle=DASHES[k], linewidth=0.8, label=label)
    ax.set_yscale("log")
    ax.set_xlabel("step (0: the random start)")
    return ax


def training_progress(
    axes: Sequence[Axes], history: Sequence[dict], initial: Sequence[float], optimum: Sequence[float]
) -> Sequence[Axes]:
    """Draw a training so far on two cleared Axes: both MSEs, and the weights from the `initial` ones on.

    `history` has the epochs' rows, with the weights after each; `optimum` is (red, green, blue).
    """
    left, right = axes
    left.clear()
    right.clear()
    table = pd.DataFrame(history)
    for k, (column, label) in enumerate({"train_mse": "training", "val_mse": "validation"}.items()):
        left.plot(table["epoch"], table[column], color=COLOURS[k], marker=MARKERS[k], linestyle=DASHES[k], label=label)
    left.set_yscale("log")
    left.set_xlabel("epoch")
    left.set_ylabel("MSE")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend()
    start = pd.DataFrame([[0, *initial]], columns=["epoch", "red", "green", "blue"])
    weight_paths(right, pd.concat([start, table[start.columns]], ignore_index=True), optimum)
    return axes
