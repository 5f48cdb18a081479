"""What figures draw, read back from the SVG and the Axes."""

import base64
import io
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import pytest

from transformnet_lib import figures


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
    shown, axes = plt.subplots(1, 4)
    figures.comparison(axes, image, target, {"a": target}, scale=0.1)
    pictures = embedded(shown)[:2]
    for picture, pixels in zip(pictures, (image.transpose(1, 2, 0), np.round(target * 255)), strict=True):
        height, width = pixels.shape[:2]
        times = picture.shape[0] // height
        assert times >= 2 and picture.shape[:2] == (height * times, width * times)
        blocks = picture.reshape(height, times, width, times, 4)
        assert (blocks == blocks[:, :1, :, :1]).all()  # one colour a block
        np.testing.assert_array_equal(blocks[:, 0, :, 0, :3], np.broadcast_to(pixels.T, (3, width, height)).T)


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
