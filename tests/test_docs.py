"""The docs hold: links resolve, commands and targets exist, and every Python snippet runs as printed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import papermill
import pytest
import torch
import typer
from PIL import Image

from transformnet_lib import CustomDataset, cli
from transformnet_lib.inference import export_onnx, infer_folder
from transformnet_lib.report import NOTEBOOKS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = typer.main.get_command(cli.app).commands


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a language, those within list items too."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return ["".join(line.removeprefix(indent) for line in body.splitlines(True)) for indent, body in found]


def anchors(text: str) -> set[str]:
    """The headings' anchors as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text):
        target, _, anchor = "".join(link).partition("#")
        if target.startswith("http"):
            continue
        file = page.parent / target if target else page
        assert file.exists(), f"{named(page)}: {target}"
        assert not anchor or anchor in anchors(file.read_text()), f"{named(page)}: {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_options_targets_and_files_that_are_named_exist(page):
    text = page.read_text()
    shown = "\n".join(blocks(text, "sh") + re.findall(r"`([^`\n]+)`", text)).replace("\\\n", " ")
    for name, rest in re.findall(r"\btransformnet[ ]+([a-z]\w*)([^\n|&;]*)", shown):
        assert name in COMMANDS, f"{named(page)}: transformnet {name}"
        command = COMMANDS[name]
        options = {option for parameter in getattr(command, "commands", {"": command}).values()
                   for each in parameter.params for option in (*each.opts, *each.secondary_opts)}  # fmt: skip
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", rest.partition("#")[0]):
            assert option in options | {"--help"}, f"{named(page)}: transformnet {name} {option}"
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z]+)", shown, re.MULTILINE):
        assert re.search(rf"^([a-z]+ )*{target}( [a-z]+)*:", makefile, re.MULTILINE), f"{named(page)}: make {target}"
    for file in re.findall(r"\b(?:notebooks|docs|benchmarks)/[\w/.-]+\.\w+", shown):
        assert (ROOT / file).exists(), f"{named(page)}: {file}"


def test_each_notebook_has_a_page_that_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for notebook in NOTEBOOKS.glob("*.ipynb"):
        page = ROOT / "docs/notebooks" / f"{notebook.stem}.md"
        assert page.exists()
        assert f"]({named(page)})" in readme


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "notebooks"], ids=named)
def test_a_notebooks_page_names_its_parameters(page):
    text = page.read_text()
    for parameter in papermill.inspect_notebook(NOTEBOOKS / f"{page.stem}.ipynb"):
        assert f"`{parameter}`" in text, parameter


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run) -> Path:
    """What the snippets expect to find: a trained run, a folder of images, results of infer and export."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(run.path, folder / "runs/precise-cpu")
    pixels = np.random.RandomState(0).randint(0, 256, (150, 32, 32, 3), np.uint8)
    for i, picture in enumerate(pixels):
        (folder / f"images/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"images/{'ab'[i % 2]}/{i}.png")
    infer_folder(run, folder / "images", folder / "results-npz", form="npz", device="cpu")
    export_onnx(run, folder / "transformnet.onnx")
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page.read_text(), "python")], ids=named)
def test_the_snippets_run_as_printed(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        CustomDataset.__init__, "__kwdefaults__", CustomDataset.__init__.__kwdefaults__ | {"limit": 500}
    )
    names = {"__name__": "__main__"}
    for number, snippet in enumerate(blocks(page.read_text(), "python"), 1):
        if "onnxruntime" in snippet:
            pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
        if not torch.cuda.is_available():
            snippet = snippet.replace('"cuda"', '"cpu"')
        exec(compile(snippet, f"{named(page)}, snippet {number}", "exec"), names)
    if page.name == "use.md":
        assert names["grey"].shape[1:] == (1, 28, 28)
        assert names["loss"].isfinite()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the snippets ran on the CPU")
def test_the_snippets_of_use_md_ran_on_cuda(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {"__name__": "__main__"}
    for snippet in blocks((ROOT / "docs/use.md").read_text(), "python"):
        exec(snippet, names)
        if "loss" in names:
            break
    assert names["loss"].device.type == "cuda"


def tiles(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "docs/tiles.py", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ)


def test_tiles_are_cut_the_same_each_time_and_no_photograph_is_in_both_splits(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(5):
        pixels = np.random.RandomState(i).randint(0, 256, (250, 300, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"p{i}.png")
    for out in ("one", "two"):
        done = tiles("photos", out, "--side", 40, "--count", 6, "--test", "p1", "p4", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{Path('two/train')}: 18 tiles", f"{Path('two/test')}: 12 tiles"]
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png"))
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    assert {file.name[:2] for file in files if file.parts[0] == "test"} == {"p1", "p4"}
    assert CustomDataset(train=True, data=f"folder:{tmp_path / 'one'}").images.shape == (18, 3, 40, 40)
    done = tiles("photos", "three", "--test", "q", cwd=tmp_path)
    assert done.returncode == 2 and "both splits need one" in done.stderr
