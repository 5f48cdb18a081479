"""Shared fixtures: a small real run and a report as the command makes it, each made once a session; closed figures."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from soak import heed_signals

from transformnet_lib import CustomDataset, Run, TrainConfig, benchmark_stage, compare_stage, read_run, train_stage
from transformnet_lib.errors import DataError
from transformnet_lib.report import NOTEBOOKS

BIN = Path(sys.executable).parent

collect_ignore = ["audit"]  # a sitecustomize for other processes; a system's own may be imported already

heed_signals()
torch.set_num_threads(1)  # two threads that wait for a busy core are ten times slower than one


@pytest.fixture(scope="session")
def train_set() -> CustomDataset:
    return CustomDataset(data="photos", train=True, limit=600)


@pytest.fixture(scope="session")
def test_set() -> CustomDataset:
    return CustomDataset(data="photos", train=False, limit=600)


@pytest.fixture(scope="session")
def run(tmp_path_factory, train_set, test_set) -> Run:
    """A run with the preset `precise` and the stages train, compare and benchmark; tests only read it.

    Processes that share the tests make it once between them.
    """
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "small"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            make_run(path, train_set, test_set)
    return read_run(path)


def make_run(path: Path, train_set: CustomDataset, test_set: CustomDataset) -> None:
    train_stage(path, train_set, TrainConfig.from_preset("precise", device="cpu", batch_size=32))
    compare_stage(path, test_set)
    sweep = {"batch_sizes": [16, 64], "small_batch_sizes": [1], "num_workers": [0], "seconds": 0.0}
    benchmark_stage(path, test_set, devices=["cpu", "cuda"], **sweep)


def altered(run: Run, *, label: str = "", **stages: dict | None) -> Run:
    """`run` as if its stages held other facts, or were not made: `altered(run, compare={"test_mse": 0.3})`."""
    changed = {"label": label or run.label}
    for name, facts in stages.items():
        changed[name] = None if facts is None else getattr(run, name).model_copy(update=facts)
    return run.model_copy(update=changed)


def command(*arguments, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run one of the environment's commands in `cwd`; OpenMP kept to one thread, since tests may share the cores."""
    program, *rest = map(str, arguments)
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([BIN / program, *rest], cwd=cwd, capture_output=True, text=True, env=environment)


def run_cells(name: str, **parameters) -> dict:
    """Run the code cells of a notebook here, without a kernel, up to the first error; gives its variables."""
    names = {"__name__": "__main__"}
    for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
            if "parameters" in cell.metadata.get("tags", []):
                names |= parameters
    return names


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A folder in which `transformnet report` was run on a few images."""
    folder = tmp_path_factory.mktemp("made")
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent / "audit"), os.environ.get("PYTHONPATH")]))
    done = command(
        "transformnet", "report", "--device", "cpu", "--data", "photos", "--limit", 600, "--epochs", 100,
        "--seconds", 0, "--title", "A <b>bold</b> $title$ #1", "--author", "Ada \\ Lovelace", cwd=folder,
        PYTHONPATH=path, TRANSFORMNET_AUDIT=str(folder / "network.log"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"report/build/report.{kind}" for kind in ("html", "pdf", "json")]
    return folder


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Random bytes; as `(height, width, 3)` an image in Pillow's order."""
    return np.random.RandomState(seed).randint(0, 256, shape, np.uint8)


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def refusal(call, kind=DataError) -> str:
    """The message with which `call` is refused: one line, that of an error of ours."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def tree(tmp_path):
    """An image folder of 7 PNG training images, 9×7 (height 9), in two classes and beside them, and a test image."""
    names = ["b/x.png", "b/10.png", "a/y.PNG", "a/deep/z.png", "a-b/x.png", "last.png", "b/2.png"]
    for i, name in enumerate(names):
        save(tmp_path / "train" / name, noise(9, 7, 3, seed=i))
    save(tmp_path / "test" / "t" / "1.png", noise(9, 7, 3, seed=99))
    (tmp_path / "train" / "notes.txt").write_text("not an image")
    return tmp_path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: item.path.stem not in ("test_report", "test_faults"))


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")
