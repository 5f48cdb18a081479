"""Images and geometry of one's own, from a folder to the report: 96×120 pixels to 64×80 without flips."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_cells
from PIL import Image

from transformnet_lib import Pipeline, Run, read_run
from transformnet_lib.images import decode_image
from transformnet_lib.inference import export_onnx, image_files, infer_folder
from transformnet_lib.pipeline import to_float

OWN = Pipeline([64, 80], hflip=False, vflip=False)


def make_folder(root: Path, height: int, width: int, count: int) -> Path:
    """Soft coloured shapes, so that the colours go up and down together as in photographs but not quite."""
    rng = np.random.RandomState(0)
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        for i in range(count):
            light = rng.randint(0, 256, (6, 6, 1)) * 0.7 + rng.randint(0, 256, (6, 6, 3)) * 0.3
            picture = Image.fromarray(light.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
            picture.save(root / split / f"{i:03}.png")
    return root


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> tuple[Run, dict[str, str]]:
    """A run on such images, made by the notebooks, and what each of them and the report showed."""
    folder = tmp_path_factory.mktemp("own")
    run_dir, pictures = str(folder / "run"), make_folder(folder / "pictures", 96, 120, 70)
    geometry = {"output_size": [64, 80], "hflip": False, "vflip": False}
    of_notebook = {
        "train": {"data": f"folder:{pictures}", "preset": "precise", "limit": 60, "epochs": 400, **geometry},
        "compare": {},
        "benchmark": {"devices": ["cpu"], "batch_sizes": [16], "small_batch_sizes": [1], "num_workers": [0]},
        "seeds": {"seeds": 1},
        "study": {"sizes": [50]},
    }
    texts = {}
    with pytest.MonkeyPatch.context() as patch:
        shown = []
        patch.setattr("transformnet_lib.display.display", lambda form, **_: shown.append(getattr(form, "data", form)))
        for name, parameters in of_notebook.items():
            run_cells(name, run_dir=run_dir, **parameters)
            texts[name] = str(shown)
            shown.clear()
        run_cells("report", runs=[run_dir])
        texts["report"] = str(shown)
    return read_run(run_dir), texts


def test_notebooks_and_report_tell_the_sizes_and_no_flips(own):
    run, texts = own
    assert run.pipeline == OWN and run.train.images.size == (96, 120)
    for name, text in texts.items():
        assert not re.search(r"(28|32)×(28|32)|horizontal flip|vertical flip|upside", text), name
    assert "resize to 64×80 → grayscale" in texts["report"] and "96×120 pixels" in texts["report"]


def test_model_folded_infer_and_onnx_agree_with_the_pipeline(own, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
    run, _ = own
    folder = Path(run.train.images.source.removeprefix("folder:")) / "test"
    files = list(image_files(folder))
    images = torch.from_numpy(np.stack([decode_image(file) for file in files]))
    model, truth = run.model, OWN(to_float(images))
    with torch.inference_mode():
        eager, folded = model(to_float(images)), model.folded()(images)
    assert (eager - truth).abs().max() < 1e-3  # so few images that the training does not settle
    assert (folded - eager).abs().max() < 1e-6
    infer_folder(run, folder, tmp_path / "out", form="npz", device="cpu")
    (shard,) = (np.load(path) for path in (tmp_path / "out").glob("*.npz"))
    assert shard["names"].tolist() == [file.name for file in files]
    assert np.abs(shard["outputs"] - eager.numpy()).max() < 1e-6
    session = onnxruntime.InferenceSession(export_onnx(run, tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": to_float(images).numpy()})
    assert np.abs(found - eager.numpy()).max() < 1e-5


def test_every_stage_takes_the_geometry(own):
    run, _ = own
    examples = run.compare.examples
    assert (examples["inputs"].shape, examples["outputs"].shape) == ((5, 3, 96, 120), (5, 1, 64, 80))
    assert run.compare.max_error < 1e-3
    table = run.benchmark.table
    assert (table["reason"] == "").all() and table["mse"].max() < 1e-6
    ours = run.study.libraries.set_index("method")["max_difference"]
    assert ours["torchvision v2, batches"] < 1e-3
    assert ours["TransformNet, fast"] < 0.5
    assert ours["Pillow, image by image"] < 3  # grey levels: it would be over 100 if it flipped
    assert (run.study.sizes["reason"] == "").all()


def make(*arguments: str) -> subprocess.CompletedProcess:
    """What `make` would do."""
    root = Path(__file__).parents[1]
    return subprocess.run(["make", "--no-print-directory", "-n", *arguments], cwd=root, capture_output=True, text=True)


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("HFLIP=no", "HFLIP: expected 0 or 1, got no"),
        ("FORCE=yes", "FORCE: expected 0 or 1, got yes"),
    ],
)
def test_what_make_does_not_understand_is_refused(given, message):
    done = make("report", given)
    assert done.returncode and not done.stdout
    assert message in done.stderr


@needs_make
@pytest.mark.parametrize(
    ("given", "options"),
    [
        ([], ""),
        (["OUTPUT_SIZE=64", "HFLIP=0", "VFLIP=0"], "--output-size '64' --no-hflip --no-vflip"),
        (["HFLIP=1"], "--hflip"),
        (["FORCE=1"], "--force"),
        (["FORCE=0"], ""),
        (["DEVICE=cpu cuda", "TITLE=it's $x"], "--device 'cpu' --device 'cuda' --title 'it'\\''s $x'"),
        (["ARGS=--limit 5", "SEED=1"], "--seed '1' --limit 5"),
        (["TITEL=x"], "--titel 'x'"),  # which the command refuses, with a suggestion
    ],
)
def test_make_report_takes_the_geometry(given, options):
    _, _, arguments = make("report", *given).stdout.partition(".venv/bin/transformnet report")
    assert sorted(arguments.split()) == sorted(options.split())
