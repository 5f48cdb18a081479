"""Images and geometry of one's own, from a folder to the report: 96×96 pixels to 64×64 without flips."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import bs4
import numpy as np
import pytest
import torch
from PIL import Image
from transformnet_lib.study import study_run

from transformnet_lib import CustomDataset, Pipeline, Run, TrainConfig, load_dataset, load_model, train
from transformnet_lib.comparison import compare_run
from transformnet_lib.errors import DataError, ParameterError
from transformnet_lib.images import decode_image
from transformnet_lib.inference import export_onnx, image_files, infer_folder
from transformnet_lib.pipeline import to_float
from transformnet_lib.timing import benchmark_run

BIN = Path(sys.executable).parent
OWN = Pipeline(64, hflip=False, vflip=False)


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
def own(tmp_path_factory) -> Path:
    """A folder in which `transformnet report` was run on such images."""
    folder = tmp_path_factory.mktemp("own")
    make_folder(folder / "pictures", 96, 96, 70)
    done = subprocess.run(
        [BIN / "transformnet", "report", "--device", "cpu", "--data", "folder:pictures", "--output-size", "64",
         "--no-hflip", "--no-vflip", "--preset", "precise", "--limit", "60", "--epochs", "400", "--repeats", "1"],
        cwd=folder, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def own_run(own) -> Run:
    return Run(own / "runs/cpu")


def test_the_report_tells_the_sizes_and_no_flips(own):
    page = bs4.BeautifulSoup((own / "report/build/report.html").read_text(), "html.parser").find("main")
    text = re.sub(r"\s+", " ", page.get_text(" "))
    assert "resize to 64×64 → grayscale" in text
    assert "96×96 pixels" in text
    for wrong in ("28×28", "32×32", "horizontal flip", "vertical flip", "upside"):
        assert wrong not in text, wrong
    assert (own / "report/build/report.pdf").stat().st_size > 50_000


def test_the_run_and_its_notebooks_have_the_geometry(own_run):
    assert own_run.pipeline == OWN
    assert own_run.stage_info("train")["images"]["size"] == [96, 96]
    examples = own_run.examples()
    assert (examples["inputs"].shape, examples["outputs"].shape) == ((5, 3, 96, 96), (5, 1, 64, 64))
    assert own_run.stage_info("compare")["results"]["max_error"] < 1e-3
    for name in ("train", "compare", "benchmark"):
        text = (own_run.path / f"{name}.ipynb").read_text()
        assert not re.search(r"(28|32)×(28|32)|upside down", text), name


def test_model_folded_infer_and_onnx_agree_with_the_pipeline(own, own_run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
    files = list(image_files(own / "pictures/test"))
    images = torch.from_numpy(np.stack([decode_image(file) for file in files]))
    model, truth = load_model(own_run), OWN(to_float(images))
    with torch.inference_mode():
        eager, folded = model(to_float(images)), model.folded()(images)
    assert (eager - truth).abs().max() < 1e-3  # so few images that the training does not settle
    assert (folded - eager).abs().max() < 1e-6
    infer_folder(own_run, own / "pictures/test", tmp_path / "out", form="npz", device="cpu")
    (shard,) = (np.load(path) for path in (tmp_path / "out").glob("*.npz"))
    assert shard["names"].tolist() == [file.name for file in files]
    assert np.abs(shard["outputs"] - eager.numpy()).max() < 1e-6
    session = onnxruntime.InferenceSession(
        export_onnx(own_run, tmp_path / "m.onnx"), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"images": to_float(images).numpy()})
    assert np.abs(found - eager.numpy()).max() < 1e-5


def test_the_study_takes_the_geometry_too(own_run):
    sets = [load_dataset(own_run, train=split) for split in (True, False)]
    study = study_run(own_run, *sets, seeds=1, sizes=[50], repeats=1)
    ours = study["libraries"].set_index("name")["max_difference"]
    assert ours["torchvision v2, batches"] < 1e-3
    assert ours["TransformNet, the fast way"] < 0.5
    assert ours["Pillow, image by image"] < 3  # grey levels: it would be over 100 if it flipped
    assert (study["sizes"]["reason"] == "").all()


def make(*arguments: str) -> subprocess.CompletedProcess:
    """What `make` would do."""
    root = Path(__file__).parents[1]
    return subprocess.run(["make", "--no-print-directory", "-n", *arguments], cwd=root, capture_output=True, text=True)


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("TITEL=Lab 3", "TITEL: no such option; there are DATA"),
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
    ],
)
def test_make_report_takes_the_geometry(given, options):
    _, _, arguments = make("report", *given).stdout.partition(".venv/bin/transformnet report")
    assert arguments.replace("\\\n", " ").split() == options.split()


def test_images_and_outputs_need_not_be_square(tmp_path):
    folder = make_folder(tmp_path / "wide", 40, 60, 80)
    sets = [
        CustomDataset(train=split, data=f"folder:{folder}", pipeline=Pipeline([20, 36], vflip=False))
        for split in (True, False)
    ]
    run = Run(tmp_path / "run")
    result = train(sets[0], TrainConfig.from_preset("precise", device="cpu", batch_size=8), run=run)
    assert max(abs(a - b) for a, b in zip(result.model.weights, (0.2989, 0.587, 0.114), strict=True)) < 1e-3
    assert compare_run(run, sets[1])["outputs"].shape == (5, 1, 20, 36)
    table = benchmark_run(
        run, sets[1], devices=["cpu"], batch_sizes=[8], small_batch_sizes=[], num_workers=[0], repeats=1
    )
    assert (table["reason"] == "").all()
    assert table["mse"].max() < 1e-6


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pipeline": lambda: Pipeline(0)}, ParameterError, "output_size: expected one or two whole numbers from 1"),
        ({"pipeline": lambda: Pipeline([64, 48, 3])}, ParameterError, "output_size: expected one or two whole numbers"),
        ({"image_size": 64}, ParameterError, 'image_size: only with fit="crop", got 64'),
        ({"mixed": True}, DataError, r"odd\.png: expected 20×20 pixels like .*, got 30×20; .* or use fit=.crop."),
    ],
)
def test_a_geometry_that_cannot_be_is_refused_by_name(tmp_path, options, error, message):
    folder = make_folder(tmp_path / "pictures", 20, 20, 5)
    if options.pop("mixed", False):
        Image.new("RGB", (30, 20)).save(folder / "train/odd.png")
    with pytest.raises(error, match=message):
        pipeline = options.pop("pipeline", Pipeline)()
        CustomDataset(train=True, data=f"folder:{folder}", pipeline=pipeline, **options)


def test_a_folder_of_mixed_sizes_is_cropped_to_the_size_asked_for(tmp_path):
    folder = make_folder(tmp_path / "pictures", 50, 80, 5)
    Image.new("RGB", (70, 90)).save(folder / "train/odd.png")
    dataset = CustomDataset(
        train=True, data=f"folder:{folder}", fit="crop", image_size=48, pipeline=Pipeline(24, hflip=False)
    )
    assert dataset.images.shape == (6, 3, 48, 48)
    assert dataset.targets.shape == (6, 1, 24, 24)
