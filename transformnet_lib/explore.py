"""The widgets of explore.ipynb: something to move, and what changes with it.

Each function gives a widget that shows something before anybody touches it. `display.show_figure(…, widget=…)` puts it
into a notebook beside the picture for where no widgets run. Nothing here writes, and no server starts by itself.
"""

import html
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ipywidgets as widgets
import matplotlib.pyplot as plt
import mistune
import numpy as np
import pandas as pd
import torch

from .dataset import CustomDataset
from .errors import TransformnetError
from .facts import report_facts
from .figures import distance_curves, error_colours, history_curves, loss_contours, png
from .images import decode_image
from .model import TransformNet
from .normal_equations import mse_of
from .pipeline import Pipeline, to_float
from .resized import ResizedImages
from .run import Run, label_of, read_runs, reference_run
from .stage_folder import is_complete
from .training import TrainConfig, Trainer
from .words import Words
from .words.filters import scientific

CHANNELS = ("red", "green", "blue")
DIRECTIONS = ("flattest", "middle", "steepest")
MOST_IMAGES = 10_000  # whose MSE follows the sliders: 30 ms a change; more would lag behind the hand
STEP = 0.001  # of a weight's slider
REACHES = (1.0, 0.1, 0.01)  # of the error map's colours
UPLOAD = ".bmp,.jpeg,.jpg,.png,.ppm,.tif,.tiff,.webp"


class Pictures(widgets.VBox):
    """Input, ground truth, output and error beside each other, and how far the colours of the error reach."""

    def __init__(self, redraw: Callable[..., None]):
        self.titles = [widgets.HTML() for _ in range(4)]
        self.images = [widgets.Image(format="png") for _ in range(4)]
        self.reach = widgets.Dropdown(options=REACHES, value=0.1, description="error up to")
        self.reach.observe(redraw, "value")
        layout = {"flex": "0 0 auto", "align_items": "flex-start", "margin": "0 8px 0 0"}  # each at its own size
        columns = [widgets.VBox(pair, layout=layout) for pair in zip(self.titles, self.images, strict=True)]
        super().__init__([widgets.HBox(columns, layout={"flex_flow": "row wrap"}), self.reach])

    def draw(self, image: torch.Tensor, target: torch.Tensor, output: torch.Tensor) -> None:
        """Show an image uint8 `(3, h, w)` with target and output, float `(h, w)`."""
        target, output = target.numpy(), output.numpy()
        errors = output - target
        shown = [image.permute(1, 2, 0).numpy(), target, output, error_colours(errors, self.reach.value)]
        for title, widget, name, picture in zip(
            self.titles, self.images, ("input", "ground truth", "output", "error"), shown, strict=True
        ):
            title.value = f"{name}, {picture.shape[0]}×{picture.shape[1]}"
            widget.value = png(picture)


def weight_sliders(dataset: CustomDataset, presets: Mapping[str, Sequence[float]], example: int = 0) -> widgets.Widget:
    """Three sliders for the weights; with them change an image's output and error, and the MSE over the data set.

    `presets` are weights (red, green, blue) by name, to choose from; the first is what it starts with. Of a data set
    with cached targets the first `MOST_IMAGES` images are used.
    """
    images, targets = dataset.images[:MOST_IMAGES], dataset.targets[:MOST_IMAGES].flatten()
    resized = dataset.pipeline.flip(dataset.pipeline.resize(to_float(images)))
    colours = resized.transpose(0, 1).flatten(1).contiguous()
    size = (len(images), *dataset.pipeline.size)
    limit = max(1.0, *(abs(weight) for weights in presets.values() for weight in weights))
    preset = widgets.Dropdown(options=list(presets), description="weights of")
    sliders = [
        widgets.FloatSlider(min=-limit, max=limit, step=STEP, readout_format=".3f", description=name)
        for name in CHANNELS
    ]
    number = widgets.IntSlider(example, max=len(images) - 1, description="image")
    text = widgets.HTML()

    def draw(_=None) -> None:
        # The page rounds what it is told to the sliders' step and tells it back: then the preset's own weight is meant
        weights = torch.tensor(
            [
                weight if abs(slider.value - weight) < 0.6 * STEP else slider.value
                for slider, weight in zip(sliders, presets[preset.value], strict=True)
            ]
        )
        outputs = torch.mv(colours.mT, weights).clamp_(0, 1)
        i = number.value
        pictures.draw(images[i], targets.view(size)[i], outputs.view(size)[i])
        squared = outputs.sub_(targets).square_()
        text.value = (
            f"MSE of this image: <b>{scientific(squared.view(size)[i].mean().item())}</b>; "
            f"of {len(images):,} images: <b>{scientific(squared.mean().item())}</b>"
        )

    def choose(_=None) -> None:
        for slider, weight in zip(sliders, presets[preset.value], strict=True):
            slider.value = weight
        draw()

    pictures = Pictures(draw)
    preset.observe(choose, "value")
    for slider in [*sliders, number]:
        slider.observe(draw, "value")
    choose()
    return widgets.VBox([preset, *sliders, number, pictures, text])


def image_explorer(weights: Sequence[float], image: torch.Tensor, pipeline: Pipeline) -> widgets.Widget:
    """Pipeline and model on any image (upload one), at any output size and flips.

    It starts with `image`, uint8 `(3, h, w)`, and the size and flips of `pipeline`.
    """
    upload = widgets.FileUpload(accept=UPLOAD, description="your image")
    height, width = (
        widgets.IntSlider(value, min=1, max=512, description=name)
        for name, value in zip(("height", "width"), pipeline.size, strict=True)
    )
    hflip, vflip = (
        widgets.Checkbox(pipeline.hflip, description="hflip"),
        widgets.Checkbox(pipeline.vflip, description="vflip"),
    )
    text = widgets.HTML()
    shown = image

    def draw(_=None) -> None:
        chosen = Pipeline((height.value, width.value), hflip.value, vflip.value)
        target, output = apply_both(weights, shown, chosen)
        pictures.draw(shown, target, output)
        errors = output - target
        text.value = (
            f"{chosen}: MSE <b>{scientific(errors.square().mean().item())}</b>, largest error of a pixel "
            f"<b>{scientific(255 * errors.abs().max().item())}</b> of 255 grey levels"
        )

    def take(_) -> None:
        nonlocal shown
        file = upload.value[0]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, Path(file["name"]).name)
            path.write_bytes(file["content"])
            try:
                shown = torch.from_numpy(decode_image(path).copy())
            except TransformnetError as error:
                text.value = html.escape(str(error).replace(os.path.join(folder, ""), ""), quote=False)
                return
        draw()

    pictures = Pictures(draw)
    upload.observe(take, "value")
    for control in (height, width, hflip, vflip):
        control.observe(draw, "value")
    draw()
    return widgets.VBox([upload, height, width, widgets.HBox([hflip, vflip]), pictures, text])


def apply_both(weights: Sequence[float], image: torch.Tensor, pipeline: Pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pipeline, and a TransformNet with these weights, make of an image uint8 `(3, h, w)`: float `(h, w)`."""
    model = TransformNet(pipeline)
    model.load_state_dict({"mix.weight": torch.tensor(weights, dtype=torch.float32).view(1, 3, 1, 1)})
    values = to_float(image)[None]
    with torch.inference_mode():
        return pipeline(values)[0, 0], model(values)[0, 0]


def mse_table(dataset: CustomDataset, weights: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """Weights by name, and the MSE of the model with them over a data set."""
    resized = ResizedImages(dataset, torch.device("cpu"), keep=False)
    rows = [
        (
            name,
            *(f"{weight:.3f}" for weight in choice),
            scientific(mse_of(resized, choice, torch.arange(len(dataset)))),
        )
        for name, choice in weights.items()
    ]
    return pd.DataFrame(rows, columns=["Weights", *CHANNELS, "MSE"])


class RecordedTrainer(Trainer):
    """A training on the CPU that keeps the weights after each step: `path`, from the random start on."""

    def __init__(self, dataset: CustomDataset, config: TrainConfig, *, resized: ResizedImages | None = None):
        super().__init__(dataset, config, resized=resized)
        self.path = [self.initial_weights]

    def step(self, batch: torch.Tensor) -> None:
        super().step(batch)
        self.path.append(tuple(self.weights().tolist()))


@dataclass(frozen=True)
class Landscape:
    """The loss over the weights, before the clamp: a bowl around the optimum, from the second moments of the colours.

    With C = E[x xᵀ] = Q Λ Qᵀ and u = Qᵀ(w − optimum) it is Σ λ u² plus a constant: the columns of Q are its main
    directions, the flattest first, and λ (`curvatures`) says how steep it is along each.
    """

    optimum: np.ndarray  # (3,): red, green, blue
    curvatures: np.ndarray  # (3,), ascending
    directions: np.ndarray  # (3, 3), a column a direction

    @classmethod
    def of(cls, moments: torch.Tensor) -> "Landscape":
        """From E[z zᵀ], z = (red, green, blue, target), as `ResizedImages.moments` gives it."""
        colours, products = moments[:3, :3].numpy(), moments[:3, 3].numpy()
        curvatures, directions = np.linalg.eigh(colours)
        signs = np.sign(directions[np.abs(directions).argmax(0), range(3)])  # LAPACK leaves them open
        return cls(np.linalg.solve(colours, products), curvatures, directions * signs)

    def along(self, weights: Sequence[Sequence[float]]) -> np.ndarray:
        """Weights `(n, 3)` as distances from the optimum along the three directions, `(n, 3)`."""
        return (np.asarray(weights) - self.optimum) @ self.directions

    def table(self) -> pd.DataFrame:
        """One row a direction: its weights, and how steep the loss is along it."""
        rows = pd.DataFrame(self.directions.T, columns=CHANNELS).map("{:.2f}".format)
        rows.insert(0, "direction", DIRECTIONS)
        return rows.assign(curvature=[scientific(value, 3) for value in self.curvatures])


def trained_paths(
    dataset: CustomDataset,
    resized: ResizedImages,
    *,
    seed: int,
    presets: Sequence[str] = ("paper", "precise"),
    **changes,
) -> dict[str, np.ndarray]:
    """Train each preset from one seed on the CPU; its weights after each step, `(steps + 1, 3)`."""
    paths = {}
    for preset in presets:
        config = TrainConfig.from_preset(preset, device="cpu", seed=seed, **changes)
        trainer = RecordedTrainer(dataset, config, resized=resized)
        while not trainer.finished:
            trainer.run_epoch()
        paths[preset] = np.array(trainer.path)
    return paths


def landscape_figure(landscape: Landscape, paths: Mapping[str, np.ndarray]) -> plt.Figure:
    """The loss over its flattest and steepest direction, as it is and whitened, and what is left along each."""
    figure = plt.figure(figsize=(6.3, 5))
    top, bottom = figure.subfigures(2, 1)
    along = {name: landscape.along(path) for name, path in paths.items()}
    ends = [0, 2]  # the flattest and the steepest
    ax = top.subplots()
    loss_contours(ax, landscape.curvatures[ends], {name: path[:, ends] for name, path in along.items()})
    ax.set(title="the loss over the weights", xlabel="along the flattest direction", ylabel="along the steepest")
    ax.legend(frameon=True)
    whitened, *curves = bottom.subplots(1, 1 + len(paths), width_ratios=[0.8] + [1] * len(paths))
    scaled = {name: (path * np.sqrt(landscape.curvatures))[:, ends] for name, path in along.items()}
    loss_contours(whitened, (1, 1), scaled)
    whitened.set(title="whitened", xlabel="flattest", ylabel="steepest")
    for ax, (name, path) in zip(curves, along.items(), strict=True):
        if ax is not curves[0]:
            ax.sharey(curves[0])
        distance_curves(ax, dict(zip(DIRECTIONS, path.T, strict=True))).set_title(name)
    curves[0].set_ylabel("distance from the optimum")
    curves[0].legend()
    return figure


def landscape_explorer(
    dataset: CustomDataset, resized: ResizedImages, landscape: Landscape, *, seed: int, **changes
) -> widgets.Widget:
    """`landscape_figure` of trainings from the seed that is chosen."""
    chosen = widgets.IntSlider(seed, min=0, max=max(19, seed), description="seed", continuous_update=False)
    picture = widgets.Image(format="png")

    def draw(_=None) -> None:
        paths = trained_paths(dataset, resized, seed=chosen.value, **changes)
        picture.value = figure_png(landscape_figure(landscape, paths))

    chosen.observe(draw, "value")
    draw()
    return widgets.VBox([chosen, picture])


def figure_png(figure: plt.Figure) -> bytes:
    """The figure as PNG, closed."""
    file = io.BytesIO()
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return file.getvalue()


class RunChooser:
    """Finished runs to compare: a list to choose from, over their `table` of weights; and their `curves`.

    The list holds `runs`, which are chosen first, and what lies in `runs_dir`.
    """

    def __init__(self, runs: Sequence[Run], runs_dir: str):
        given = [str(run.path) for run in runs]
        found = sorted(str(path) for path in Path(runs_dir).glob("*") if is_complete(path / "train"))
        options = [(label_of(Path(path)), path) for path in dict.fromkeys([*given, *found])]
        self.choice = widgets.SelectMultiple(
            options=options, value=given, description="runs", rows=min(8, len(options) + 1)
        )
        self.text, self.picture = widgets.HTML(), widgets.Image(format="png")
        self.choice.observe(self.draw, "value")
        self.draw()
        self.table, self.curves = widgets.VBox([self.choice, self.text]), widgets.VBox([self.picture])

    def draw(self, _=None) -> None:
        if not self.choice.value:
            self.text.value = "Choose a run."
            return
        try:
            runs = read_runs(self.choice.value)
            table = mistune.html(Words(report_facts(runs))("weights", "table", digits=7))
            figure = runs_figure(runs)
        except TransformnetError as error:
            self.text.value = html.escape(str(error), quote=False)
            return
        self.text.value = f'<div class="jp-RenderedHTMLCommon">{table}</div>'
        self.picture.value = figure_png(figure)


def runs_figure(runs: Sequence[Run]) -> plt.Figure:
    """The validation MSE and the time of an epoch over the epochs, a line a run."""
    figure, axes = plt.subplots(1, 2)
    histories = {run.label: run.train.history for run in runs}
    for ax, column in zip(axes, ("val_mse", "epoch_seconds"), strict=True):
        history_curves(ax, histories, column)
    return figure


def tensorboard_button(logdir: str) -> widgets.Widget:
    """A button that starts TensorBoard on the runs below `logdir`, or on the reference run where there are none.

    The same as `%tensorboard --logdir …`, which would start a server wherever the notebook is executed. The server
    ends with the kernel.
    """
    button = widgets.Button(description="start TensorBoard", icon="line-chart", layout={"width": "max-content"})
    output = widgets.Output()

    def start(_) -> None:
        from tensorboard import manager, notebook  # here: 0.3 s, and only who presses the button needs it

        found = any(Path(logdir).glob("**/events.out.tfevents.*"))
        folder = logdir if found else str(reference_run().parent)
        # A kernel's PATH need not have the environment that it runs in
        os.environ.setdefault("TENSORBOARD_BINARY", shutil.which("tensorboard", path=Path(sys.executable).parent) or "")
        output.clear_output()
        with output:
            started = manager.start(["--logdir", folder])
            if isinstance(started, manager.StartLaunched | manager.StartReused):
                notebook.display(port=started.info.port, height=700)
            else:
                print(f"TensorBoard did not start: {started}")

    button.on_click(start)
    return widgets.VBox([button, output])
