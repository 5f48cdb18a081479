"""Shared fixtures: a small real run, made once a session, and closed figures."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from soak import heed_signals

from transformnet_lib import CustomDataset, Run, TrainConfig, benchmark_stage, compare_stage, read_run, train_stage

BIN = Path(sys.executable).parent

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
    """A run with the preset `precise` and all stages but `study`; tests only read it."""
    path = tmp_path_factory.mktemp("runs") / "small"
    train_stage(path, train_set, TrainConfig.from_preset("precise", device="cpu", batch_size=32))
    compare_stage(path, test_set)
    sweep = {"batch_sizes": [16, 64], "small_batch_sizes": [1], "num_workers": [0, 1], "repeats": 2}
    benchmark_stage(path, test_set, devices=["cpu", "cuda"], **sweep)
    return read_run(path)


def command(*arguments, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run one of the environment's commands in `cwd`; OpenMP kept to one thread, since tests may share the cores."""
    program, *rest = map(str, arguments)
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([BIN / program, *rest], cwd=cwd, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A folder in which `transformnet report` was run on a few images."""
    folder = tmp_path_factory.mktemp("made")
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent / "audit"), os.environ.get("PYTHONPATH")]))
    done = command(
        "transformnet", "report", "--device", "cpu", "--data", "photos", "--limit", 2000, "--repeats", 2,
        "--title", "A <b>bold</b> $title$ #1", "--author", "Ada \\ Lovelace", cwd=folder,
        PYTHONPATH=path, TRANSFORMNET_AUDIT=str(folder / "network.log"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"report/build/report.{kind}" for kind in ("html", "pdf", "json")]
    return folder


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")
