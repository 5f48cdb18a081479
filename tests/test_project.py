"""The project's own files agree with each other."""

import ast
import re
import sys
import tomllib
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.specifiers import SpecifierSet

from transformnet_lib.run import read_run, reference_run

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAME = re.compile(r"[\w.-]+")
# ipykernel is started as a program, jupyterlab by `make lab`, onnxruntime by who runs an exported model
NOT_IMPORTED = {"ipykernel", "jupyterlab", "onnxruntime"}


def test_environment_yml_installs_what_pyproject_says():
    wanted = {NAME.match(line)[0]: line for line in PROJECT["dependencies"]}
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert environment["channels"] == ["conda-forge"]
    assert pip == {"pip": ["-e .[test]"]}
    assert conda == [
        f"python{PROJECT['requires-python']}",
        "pip",
        wanted["torch"].replace("torch", "pytorch"),
        wanted["torchvision"],
    ]


def imported() -> set[str]:
    """The distributions that the library and the notebooks import, named as in pyproject.toml."""
    sources = [path.read_text() for path in (ROOT / "transformnet_lib").rglob("*.py")]
    cells = [cell for path in NOTEBOOKS for cell in nbformat.read(path, as_version=4).cells]
    modules = set()
    for source in [*sources, *(cell.source for cell in cells if cell.cell_type == "code")]:
        modules |= set(re.findall(r"lazy_loader\.load\(\"(\w+)", source))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                modules |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.partition(".")[0])
    others = modules - set(sys.stdlib_module_names) - {"transformnet_lib"}
    names = packages_distributions()
    return {names[module][0].lower().replace("_", "-") for module in others}


def test_each_dependency_is_used_and_each_import_declared():
    extras = PROJECT["optional-dependencies"]
    declared = {NAME.match(line)[0] for line in [*PROJECT["dependencies"], *extras["onnx"], *extras["peers"]]}
    assert imported() | NOT_IMPORTED == declared


def pins() -> dict[str, str]:
    """The versions in constraints.txt by distribution."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}


def test_constraints_pin_every_dependency_and_this_torch():
    pinned = pins()
    extras = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    for line in [*PROJECT["dependencies"], *extras]:
        assert NAME.match(line)[0] in [*pinned, PROJECT["name"]]
    assert (pinned["torch"], pinned["torchvision"]) == ("2.14.1", "0.29.1")


def test_the_pinned_versions_install_on_the_oldest_python_promised():
    installed = {each.name.lower().replace("_", "-"): each.metadata["Requires-Python"] for each in distributions()}
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    needs = {name: installed[name] for name in pins() if installed.get(name)}
    assert {name: need for name, need in needs.items() if not SpecifierSet(need).contains(oldest)} == {}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_are_executed_without_errors_progress_bars_or_paths(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"display_data", "execute_result", "stream"}
    for output in outputs:
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        assert output.get("name") != "stderr"  # where bars are drawn
        assert not re.search(r"(/home|/root|/Users|/tmp|\b[A-Z]:\\)", text)
    assert notebook.metadata.kernelspec.name == "python3"
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1


def test_the_reference_run_is_complete_and_small():
    run = read_run(reference_run())
    assert list(run.stages) == ["train", "compare", "benchmark", "seeds"]
    assert run.train.images.count == 2000
    assert sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file()) < 500_000


def test_export_imports_nothing_of_the_rest_of_the_library():
    for file in (ROOT / "transformnet_lib/export").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2 and not (node.module or "").startswith("transformnet_lib"), file.name
            elif isinstance(node, ast.Import):
                assert not any(name.name.startswith("transformnet_lib") for name in node.names), file.name
