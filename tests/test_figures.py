"""What figures draw, read back from the SVG and the Axes."""

import base64
import io
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from matplotlib.container import ErrorbarContainer

from transformnet_lib import figures
from transformnet_lib.measure import Estimate


@pytest.fixture(autouse=True)
def style():
    figures.use_style()


def embedded(figure) -> list[np.ndarray]:
    """The pictures in a figure's SVG, RGBA."""
    svg = io.StringIO()
    figure.savefig(svg, format="svg")
    found = re.findall(r'xlink:href="data:image/png;base64,([^"]+)"', svg.getvalue())
    return [np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA")) for data in found]


@pytest.mark.parametrize(("size", "output"), [((32, 32), (28, 28)), ((48, 96), (20, 20))])
def test_compared_pictures_are_pixel_exact(size, output):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (3, *size), dtype=np.uint8)
    target = generator.random(output, dtype=np.float32)
    pictures = embedded(figures.comparison(image[None], target[None], {"a": target[None]}))[:2]
    for picture, pixels in zip(pictures, (image.transpose(1, 2, 0), np.round(target * 255)), strict=True):
        height, width = pixels.shape[:2]
        times = picture.shape[0] // height
        assert times >= 2 and picture.shape[:2] == (height * times, width * times)
        blocks = picture.reshape(height, times, width, times, 4)
        assert (blocks == blocks[:, :1, :, :1]).all()  # one colour a block
        np.testing.assert_array_equal(blocks[:, 0, :, 0, :3], np.broadcast_to(pixels.T, (3, width, height)).T)


def test_each_models_errors_have_a_scale_of_their_own():
    images, targets = np.zeros((2, 3, 4, 4), np.uint8), np.full((2, 2, 2), 0.5, np.float32)
    outputs = {"far": targets + 0.071, "near": targets + np.float32(3e-7)}
    notes = {"far": ["one", "two"], "near": ["three", "four"]}
    figure = figures.comparison(images, targets, outputs, rows=["Figure 1", "Figure 2"], notes=notes)
    *_, far, near = figure.axes  # the colour bars
    assert [text.get_text() for text in far.get_xticklabels()] == ["$-0.08$", "0", "$0.08$"]
    assert [text.get_text() for text in near.get_xticklabels()][2] == r"$3\times10^{-7}$"
    texts = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert texts == ["Figure 1", "one", "three", "Figure 2", "two", "four"]


def test_the_headline_has_a_bar_per_time_and_the_weights_of_each():
    times = {"slow": Estimate(1234.0, 1200.0, 1300.0, 9), "fast": Estimate(12.34, 12.0, 13.0, 9)}
    figure = figures.headline({"own": (0.3, 0.6, 0.1), "run": (0.3, 0.7, -0.1)}, times, unit="ms")
    left, right = figure.axes
    assert [bar.get_width() for bar in right.patches] == [1234.0, 12.34]
    assert [text.get_text() for text in right.texts] == ["1,234 ms", "12.3 ms"]
    assert [list(line.get_ydata()) for line in left.lines[:2]] == [[0.3, 0.6, 0.1], [0.3, 0.7, -0.1]]


@pytest.mark.parametrize("label", ["a$b", "$\\frac$", "_hidden", "$x$ <b>", "x" * 100, "^_{}"])
def test_a_label_is_drawn_as_it_is(label):
    history = pd.DataFrame({"epoch": [1, 2], "val_mse": [0.1, 0.01], "epoch_seconds": [1.0, 1.0]})
    figure, ax = plt.subplots()
    figures.history_curves(ax, {label: history}, "val_mse")
    figure.savefig(io.StringIO(), format="svg")
    (text,) = ax.get_legend().get_texts()
    assert text.get_text().replace("\n", "").replace(r"\$", "$").strip() == label


def test_axes_have_labels_with_units():
    history = pd.DataFrame({"epoch": [1, 2], "val_mse": [0.1, 0.01], "epoch_seconds": [1.0, 1.0]})
    ax = figures.history_curves(plt.subplots()[1], {"a": history}, "epoch_seconds")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "time of an epoch (s)")


def test_curves_differ_in_more_than_colour():
    history = pd.DataFrame({"epoch": [1, 2], "val_mse": [0.1, 0.01]})
    ax = figures.history_curves(plt.subplots()[1], dict.fromkeys("abcdefg", history), "val_mse")
    looks = {(line.get_marker(), line.get_linestyle()) for line in ax.get_lines()}
    assert len(looks) == 7


def intervals(ax, axis: int = 1) -> list[list[float]]:
    """The ends of the error bars on an axis (0: x, 1: y), container by container."""
    collections = [
        bars for container in ax.containers if isinstance(container, ErrorbarContainer) for bars in container[2]
    ]
    return [[*bar[:, axis]] for bars in collections for bar in bars.get_segments()]


def test_speedups_are_drawn_over_batch_sizes_with_their_intervals():
    """Rows with drop_last, of another device, of another part or without a time are not drawn."""
    columns = ["part", "method", "device", "batch_size", "shuffle", "drop_last", "speedup", "reason"]
    rows = [
        ("small", "fast", "cuda", 8, False, False, 5.0, ""),
        ("sweep", "fast", "cuda", 64, False, False, 20.0, ""),
        ("sweep", "fast", "cuda", 16, False, False, 10.0, ""),
        ("sweep", "fast", "cuda", 16, True, False, 9.0, ""),
        ("sweep", "fast", "cuda", 16, True, True, 99.0, ""),
        ("sweep", "fast", "cpu", 16, False, False, 98.0, ""),
        ("best", "fast", "cuda", 16, False, False, 97.0, ""),
        ("sweep", "reference", "cuda", 16, False, False, float("nan"), "not measured: why"),
        ("sweep", "batched", "cpu", 16, False, False, 2.0, ""),
        ("best", "copy", "cuda", 1, False, False, 50.0, ""),
        ("best", "copy", "cpu", 1, False, False, 96.0, ""),
    ]
    table = pd.DataFrame(rows, columns=columns)
    table = table.assign(speedup_low=table["speedup"] * 0.9, speedup_high=table["speedup"] * 1.2)
    ax = figures.speedup_curves(plt.subplots()[1], table, "cuda", title="a$b (cuda)")
    curves = [(each.get_label(), each[0].get_xydata().tolist()) for each in ax.containers]
    assert [line for _, line in curves] == [[[8, 5]], [[16, 10], [64, 20]], [[16, 9]], [[16, 2]]]  # one a part
    assert [label.partition(", ")[2] for label, _ in curves if not label.startswith("_")] == [
        "the fast method, in order", "the fast method, shuffled", "in batches (CPU)"
    ]  # fmt: skip
    assert intervals(ax) == [pytest.approx([speedup * 0.9, speedup * 1.2]) for speedup in (5, 10, 20, 9, 2)]
    lines = {line.get_label(): set(line.get_ydata()) for line in ax.get_lines() if len(line.get_ydata()) == 2}
    assert lines["copy: bytes moved once"] == {50} and lines["pipeline, image by image (CPU)"] == {1}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("batch size (images)", "speed-up over image by image (×)")


def test_bars_end_at_the_speedups_of_their_cells():
    names = ["model, rows", "folded, batches", "folded, batches, known weights"]
    bounds = [(0.8, 0.7, 1), (20.0, 18.0, 25.0), (19.0, 17.0, 22.0)]
    speedups = {name: Estimate(*each, 9) for name, each in zip(names, bounds, strict=True)}
    options = {"hatched": names[2:], "title": "the CPU"}
    ax = figures.speedup_bars(plt.subplots()[1], speedups, copy=50.0, **options)
    assert [bar.get_x() + bar.get_width() for bar in ax.patches] == pytest.approx([0.8, 20, 19])
    assert intervals(ax, 0) == [pytest.approx(each) for each in ([0.7, 1], [18, 25], [17, 22])]
    model, folded, known = (bar.get_facecolor() for bar in ax.patches)
    assert model != folded == known and [bool(bar.get_hatch()) for bar in ax.patches] == [False, False, True]
    assert [text.get_text().strip() for text in ax.texts] == ["0.8×", "20×", "19×", "copy 50×"]
    assert [label.get_text() for label in ax.get_yticklabels()] == names
    assert [set(line.get_xdata()) for line in ax.get_lines()[-2:]] == [{50}, {1}]
    alone = figures.speedup_bars(plt.subplots()[1], speedups, copy=None, **options)
    assert len(alone.texts) == 3


@pytest.mark.parametrize(
    ("low", "high", "shown"), [(0.5, 30, ["0.5", "1", "2", "5", "10", "20"]), (0.5, 3000, ["1", "10", "100", "1000"])]
)
def test_ticks_are_plain_numbers_that_do_not_meet(low, high, shown):
    ax = plt.figure().add_subplot()
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    figures._plain_log_ticks(ax.xaxis)
    assert [label.get_text() for label in ax.get_xticklabels()] == shown
