"""The widgets of explore.ipynb without a browser, and how they are put into a notebook."""

import datetime
import io

import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image
from refresh import normalise
from tensorboard import manager

from transformnet_lib import (
    GRAY_WEIGHTS,
    CustomDataset,
    Pipeline,
    TrainConfig,
    TransformNet,
    read_run,
    train,
    train_stage,
)
from transformnet_lib.dataset import split_indices
from transformnet_lib.display import WIDGET, show_figure, show_live_figure, show_table, show_text
from transformnet_lib.explore import (
    Landscape,
    RecordedTrainer,
    RunChooser,
    apply_both,
    image_explorer,
    landscape_explorer,
    mse_table,
    runs_figure,
    tensorboard_button,
    weight_sliders,
)
from transformnet_lib.figures import error_colours, png
from transformnet_lib.pipeline import to_float
from transformnet_lib.resized import ResizedImages
from transformnet_lib.run import reference_run
from transformnet_lib.words.filters import scientific

THIRDS = (1 / 3, 1 / 3, 1 / 3)


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def parts(widget) -> dict:
    """All widgets inside `widget` by description, the others by class and place."""
    found = {}

    def visit(part):
        name = getattr(part, "description", "") or f"{type(part).__name__} {len(found)}"
        found[name] = part
        for child in getattr(part, "children", ()):
            visit(child)

    visit(widget)
    return found


def images_in(widget) -> list[bytes]:
    return [part.value for part in parts(widget).values() if type(part).__name__ == "Image"]


def text_of(widget) -> str:
    return " ".join(part.value for part in parts(widget).values() if type(part).__name__ == "HTML")


def uploaded(name: str, content: bytes) -> dict:
    now = datetime.datetime.now(datetime.UTC)
    return {"name": name, "type": "", "size": len(content), "content": memoryview(content), "last_modified": now}


def test_a_slider_changes_output_error_and_mse(test_set):
    widget = weight_sliders(test_set, {"thirds": THIRDS, "ground truth": GRAY_WEIGHTS}, example=3)
    before, text = images_in(widget), text_of(widget)
    parts(widget)["red"].value = 0.9
    after = images_in(widget)
    assert [old != new for old, new in zip(before, after, strict=True)] == [False, False, True, True]
    assert text_of(widget) != text


def test_the_mse_under_the_sliders_is_that_of_the_model(test_set):
    weights = (0.9, 0.8, -0.3)  # so that pixels clip
    widget = weight_sliders(test_set, {"wild": weights})
    model = TransformNet(test_set.pipeline)
    model.load_state_dict({"mix.weight": torch.tensor(weights).view(1, 3, 1, 1)})
    with torch.inference_mode():
        errors = model(to_float(test_set.images)) - test_set.targets
    assert f"of 600 images: <b>{scientific(errors.square().mean().item())}</b>" in text_of(widget)
    assert f"of this image: <b>{scientific(errors[0].square().mean().item())}</b>" in text_of(widget)
    assert mse_table(test_set, {"wild": weights})["MSE"][0] == scientific(errors.square().mean().item())


def test_a_preset_is_exact_though_the_page_rounds_it_to_the_sliders_step(test_set):
    widget = weight_sliders(test_set, {"thirds": THIRDS, "ground truth": GRAY_WEIGHTS})
    parts(widget)["weights of"].value = "ground truth"
    for name, weight in zip(("red", "green", "blue"), GRAY_WEIGHTS, strict=True):
        parts(widget)[name].value = round(weight, 3)  # what the page tells back
    assert "×10⁻¹⁶" in text_of(widget)
    parts(widget)["red"].value = 0.300  # one step by hand
    assert "×10⁻¹⁶" not in text_of(widget)


def test_weights_beyond_one_fit_the_sliders(test_set):
    widget = weight_sliders(test_set, {"wild": (2.5, -3.0, 0.0)})
    assert parts(widget)["green"].value == -3.0


def test_model_and_pipeline_agree_on_any_image_size_and_flips():
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pipeline = Pipeline((13, 29), hflip=False, vflip=True)
    target, output = apply_both(GRAY_WEIGHTS, image, pipeline)
    assert target.shape == output.shape == (13, 29)
    torch.testing.assert_close(output, target, atol=1e-6, rtol=0)
    assert not torch.equal(target, apply_both(GRAY_WEIGHTS, image, Pipeline((13, 29), hflip=True, vflip=True))[0])


def test_the_image_explorer_follows_size_and_flips(test_set):
    widget = image_explorer(THIRDS, test_set.images[1], Pipeline())
    before = images_in(widget)
    parts(widget)["width"].value = 60
    assert "ground truth, 28×60" in text_of(widget)
    turned = images_in(widget)
    assert turned != before
    parts(widget)["hflip"].value = False
    assert images_in(widget)[1] != turned[1]


def test_an_uploaded_image_is_shown_and_another_file_refused_in_one_line(test_set):
    widget = image_explorer(THIRDS, test_set.images[1], Pipeline())
    file = io.BytesIO()
    Image.new("RGB", (31, 17), "red").save(file, "png")
    upload = parts(widget)["your image"]
    upload.value = (uploaded("red.png", file.getvalue()),)
    assert "input, 17×31" in text_of(widget)
    before = images_in(widget)
    upload.value = (uploaded("../notes.txt", b"no picture"),)
    assert "notes.txt: not a readable image" in text_of(widget) and "/tmp" not in text_of(widget)
    assert images_in(widget) == before


def test_the_landscape_is_the_loss_without_the_clamp(train_set):
    resized = ResizedImages(train_set, torch.device("cpu"))
    train_indices, _ = split_indices(len(train_set))
    landscape = Landscape.of(resized.moments(train_indices))
    np.testing.assert_allclose(landscape.optimum, GRAY_WEIGHTS, atol=1e-6)
    assert list(landscape.curvatures) == sorted(landscape.curvatures)
    colours = resized.inputs[:, train_indices].flatten(1).double().numpy()
    targets = resized.targets[train_indices].flatten().double().numpy()
    for weights in np.random.default_rng(0).uniform(-1, 1, (5, 3)):
        loss = np.mean((weights @ colours - targets) ** 2)
        assert np.sum(landscape.curvatures * landscape.along([weights]) ** 2) == pytest.approx(loss, rel=1e-6)


def test_a_recorded_training_is_the_training_with_its_weights_after_each_step(train_set):
    config = TrainConfig.from_preset("paper", device="cpu", epochs=3, batch_size=100)
    trainer = RecordedTrainer(train_set, config)
    while not trainer.finished:
        trainer.run_epoch()
    history = train(train_set, config).history
    assert len(trainer.path) == 1 + 3 * 6  # 540 training images
    assert trainer.path[0] == trainer.initial_weights
    for epoch in (1, 2, 3):
        assert trainer.path[6 * epoch] == tuple(history.loc[epoch - 1, ["red", "green", "blue"]])


def test_another_seed_draws_another_landscape(train_set):
    resized = ResizedImages(train_set, torch.device("cpu"))
    landscape = Landscape.of(resized.moments(split_indices(len(train_set))[0]))
    widget = landscape_explorer(train_set, resized, landscape, seed=0, batch_size=64, epochs=2)
    before = images_in(widget)
    parts(widget)["seed"].value = 3  # a start without gradient, whose path has no length
    assert images_in(widget) != before


def test_runs_are_listed_compared_and_refused_where_they_do_not_go_together(tmp_path, train_set):
    other = CustomDataset(data="photos", limit=600, pipeline=Pipeline(14))
    for name, images in (("a", train_set), ("small", other)):
        config = TrainConfig.from_preset("paper", device="cpu", epochs=1)
        train_stage(tmp_path / "runs" / name, images, config)
    (tmp_path / "runs" / "notes").mkdir()
    chooser = RunChooser([read_run(reference_run())], str(tmp_path / "runs"))
    assert [label for label, _ in chooser.choice.options] == ["paper-cpu-small†", "a", "small"]
    assert "paper-cpu-small† (preset paper)" in chooser.text.value
    chooser.choice.value = (str(tmp_path / "runs/a"),)
    assert "a (preset paper)" in chooser.text.value and "paper-cpu-small" not in chooser.text.value
    before = chooser.picture.value
    chooser.choice.value = (str(tmp_path / "runs/a"), str(tmp_path / "runs/small"))
    assert "another pipeline" in chooser.text.value
    assert chooser.picture.value == before


def test_no_tensorboard_starts_before_the_button_is_pressed(tmp_path, monkeypatch):
    started = []
    failure = manager.StartExecFailed(os_error=OSError("none here"), explicit_binary=None)
    monkeypatch.setattr(manager, "start", lambda arguments: started.append(arguments) or failure)
    empty = tensorboard_button(str(tmp_path))
    (tmp_path / "runs/a/tensorboard").mkdir(parents=True)
    (tmp_path / "runs/a/tensorboard/events.out.tfevents.1").touch()
    button = tensorboard_button(str(tmp_path / "runs"))
    assert started == []
    parts(button)["start TensorBoard"].click()
    parts(empty)["start TensorBoard"].click()  # events below it by now
    assert started == [["--logdir", str(tmp_path / "runs")], ["--logdir", str(tmp_path)]]
    parts(tensorboard_button(str(tmp_path / "none")))["start TensorBoard"].click()
    assert started[2] == ["--logdir", str(reference_run().parent)]


def test_a_widget_is_one_more_form_of_an_output_and_not_committed(capsys, monkeypatch):
    shown = []
    monkeypatch.setattr("transformnet_lib.display.display", lambda bundle, **_: shown.append(bundle))
    widget = tensorboard_button("runs")
    show_text("*text*", widget=widget)
    show_figure(runs_figure([read_run(reference_run())]), label="fig-a", caption="b", alt="c", widget=widget)
    show_table(read_run(reference_run()).train.history, label="tab-a", caption="b", widget=widget)
    with_widget = [bundle for bundle in shown if WIDGET in bundle]
    forms = ["text/markdown", "image/svg+xml", "text/html"]
    assert [form in bundle for form, bundle in zip(forms, with_widget, strict=True)] == [True] * 3
    cell = new_code_cell("x", outputs=[new_output("display_data", data=bundle) for bundle in with_widget])
    notebook = new_notebook(cells=[cell], metadata={"widgets": {}})
    normalise(notebook, None)
    assert "widgets" not in notebook.metadata
    for form, output in zip(forms, notebook.cells[0].outputs, strict=True):
        assert WIDGET not in output.data and form in output.data


def test_a_live_figure_is_drawn_again_in_its_place(monkeypatch):
    class Shown:
        drawings = ()

        def update(self, bundle, **_):
            self.drawings += (bundle["image/svg+xml"],)

    shown = Shown()
    monkeypatch.setattr("transformnet_lib.display.display", lambda *_, **__: shown)
    figure = runs_figure([read_run(reference_run())])
    redraw = show_live_figure(figure, label="fig-a", caption="b", alt="c")
    redraw()
    figure.axes[0].set_title("grown")
    redraw()
    assert len(set(shown.drawings)) == 2


def test_png_keeps_pixels_apart_and_reduces_large_pictures():
    values = np.array([[0.0, 1.0], [0.25, 0.5]])
    enlarged = decoded(png(values, side=8))
    assert enlarged.shape == (8, 8)
    assert enlarged[::4, ::4].tolist() == [[0, 255], [64, 128]]
    assert decoded(png(np.zeros((300, 600, 3), np.uint8), side=100)).shape == (50, 100, 3)
    assert decoded(png(np.zeros((1, 600)), side=100)).shape == (1, 100)


def test_errors_are_orange_where_too_dark_and_purple_where_too_bright():
    red, green, blue = error_colours(np.array([[-0.1, 0.0, 0.1]]), 0.1)[0].T.astype(int)
    assert red[0] > blue[0] and blue[2] > red[2]
    assert max(abs(red[1] - blue[1]), abs(red[1] - green[1])) < 3
