"""The wheel is whole: installed with no clone around, it trains, reports and infers."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command, cwd: Path) -> subprocess.CompletedProcess:
    """Run a command in `cwd` to its end, as somebody would who has no clone."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", ROOT, "--wheel-dir", folder, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory, wheel) -> Path:
    """The commands of an environment that has the wheel, and this environment's packages except the project."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A .pth file in a folder that a .pth file names is not read: so an editable install of the project is not seen
    (packages / "others.pth").write_text(str(Path(torch.__file__).parents[1]))
    found = run(python, "-c", "import transformnet_lib; print(transformnet_lib.__file__)", cwd=folder).stdout
    assert found.strip() == str(packages / "transformnet_lib/__init__.py")
    return folder / "bin"


def test_the_wheel_holds_every_file_of_the_project_that_the_commands_need(wheel):
    folders = ("transformnet_lib", "notebooks/*.ipynb", "notebooks/params", "report/reference")
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", *folders, cwd=ROOT).stdout.split()
    held = {name.removeprefix("transformnet_lib/shipped/") for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in held if ".dist-info/" not in name} == set(files)


def test_the_installed_wheel_trains_reports_and_infers(installed, tmp_path):
    few = ("--device", "cpu", "--preset", "paper", "--data", "photos", "--limit", 200, "--epochs", 1)
    run(installed / "transformnet", "train", "--run-dir", "runs/paper-cpu", *few, cwd=tmp_path)
    shipped = run(
        installed / "python", "-c", "from transformnet_lib.run import *; print(reference_run())", cwd=tmp_path
    )
    done = run(installed / "transformnet", "report", "--run", shipped.stdout.strip(), cwd=tmp_path)
    assert done.stdout.split() == [f"report/build/report.{kind}" for kind in ("html", "pdf", "json")]
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (40, 30)).save(images / "black.png")
    run(installed / "transformnet", "infer", "runs/paper-cpu", "--images", images, "--out", "results", cwd=tmp_path)
    with Image.open(tmp_path / "results/black.png.png") as result:
        assert result.size == (28, 28)


def test_the_installed_wheel_has_the_reference_run(installed, tmp_path):
    code = "import transformnet_lib; (run,) = transformnet_lib.read_runs([]); print(run.label, *run.stages)"
    assert (
        run(installed / "python", "-c", code, cwd=tmp_path).stdout == "paper-cpu-small† train compare benchmark seeds\n"
    )
