"""The notebooks as papermill runs them: every parameter is explained and checked; the files of presets fit."""

import papermill
import papermill.cli
import pytest
import yaml
from click.testing import CliRunner
from conftest import command, run_cells

from transformnet_lib import Pipeline, TrainConfig
from transformnet_lib.cli import full_sweep
from transformnet_lib.errors import TransformnetError
from transformnet_lib.report import NOTEBOOKS

STAGES = ("train", "compare", "benchmark", "seeds", "study")
WRONG = {"str": 5, "int": "many", "bool": "no", "list": "0, 1", "float": "high", "dict": "a=1"}  # for each type


def parameters(name: str) -> dict[str, dict]:
    return papermill.inspect_notebook(NOTEBOOKS / f"{name}.ipynb")


def wrong(type_name: str) -> object:
    """A value that none of the types in an annotation takes."""
    return next(value for kind, value in WRONG.items() if kind in type_name)


@pytest.mark.parametrize(
    ("name", "parameter", "type_name"),
    [
        (name, key, found["inferred_type_name"])
        for name in (*STAGES, "report")
        for key, found in parameters(name).items()
    ],
)
def test_a_value_of_the_wrong_type_is_one_clear_line_and_writes_nothing(
    name, parameter, type_name, tmp_path, monkeypatch, run
):
    monkeypatch.chdir(tmp_path)
    value = wrong(type_name)
    given = {"runs": [str(run.path)]} if name == "report" else {"run_dir": "r" if name == "train" else str(run.path)}
    with pytest.raises(TransformnetError, match=rf"{parameter}\b.*{value!r}") as caught:
        run_cells(name, **given | {parameter: value})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_help_notebook_is_a_manual_page_of_every_parameter(path):
    page = CliRunner().invoke(papermill.cli.papermill, ["--help-notebook", str(path)]).stdout
    for name, found in parameters(path.stem).items():
        default = found["default"]
        assert f"  {name}: {found['inferred_type_name']} (default {default})" in page
        assert f" {found['help']}\n" in page
        assert len(found["help"]) > 10 and not found["help"].endswith(".")


PRESETS = {"quick.yaml": "train", "paper.yaml": "train", "paper-benchmark.yaml": "benchmark"}


def test_each_file_of_presets_has_only_parameters_of_its_notebook_and_no_two_files_are_forgotten():
    assert {path.name for path in (NOTEBOOKS / "params").iterdir()} == set(PRESETS)
    for file, name in PRESETS.items():
        given = yaml.safe_load((NOTEBOOKS / "params" / file).read_text())
        assert set(given) <= set(parameters(name))
        assert f"papermill notebooks/{name}.ipynb" in (NOTEBOOKS / "params" / file).read_text().splitlines()[0]


def test_the_papers_presets_are_what_the_commands_do():
    train, timed = (
        yaml.safe_load((NOTEBOOKS / "params" / file).read_text()) for file in ("paper.yaml", "paper-benchmark.yaml")
    )
    config = TrainConfig.from_preset(train["preset"])
    for name in ("seed", "epochs", "batch_size", "lr", "min_delta", "patience"):
        assert train[name] == getattr(config, name)
    assert Pipeline(train["output_size"], train["hflip"], train["vflip"]) == Pipeline()
    assert (train["data"], train["limit"]) == ("auto", None)
    assert timed == {"run_dir": train["run_dir"]} | full_sweep()


@pytest.mark.slow
def test_a_refused_value_is_status_1_one_line_and_no_run(tmp_path):
    done = command("papermill", NOTEBOOKS / "train.ipynb", "trained.ipynb", "-p", "hflip", "true", "-p", "run_dir", "r",
                   cwd=tmp_path)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "ParameterError: hflip: expected True or False, got 'true'"
    assert [path.name for path in tmp_path.iterdir()] == ["trained.ipynb"]
