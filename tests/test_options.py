"""Defaults stand once, in the library: commands, notebooks and pages say the same."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import papermill
import pytest
import typer

from transformnet_lib import Pipeline, TrainConfig, benchmark_stage, compare_stage, seeds_stage, study_stage
from transformnet_lib.cli import app
from transformnet_lib.images import load_images
from transformnet_lib.report import NOTEBOOKS
from transformnet_lib.training import PRESETS

COMMANDS = typer.main.get_command(app).commands
DOCS = Path(__file__).parents[1] / "docs/notebooks"


def defaults(call) -> dict[str, object]:
    found = {name: each.default for name, each in inspect.signature(call).parameters.items()}
    return {name: value for name, value in found.items() if value is not inspect.Parameter.empty}


TRAIN = {
    **defaults(load_images),
    **{field.name: field.default for field in fields(TrainConfig)},
    **{name: value for name, value in defaults(Pipeline).items() if name != "size"},
    "output_size": Pipeline().size[0],
}
OF_STAGE = {
    "train": TRAIN, "compare": defaults(compare_stage), "benchmark": defaults(benchmark_stage),
    "seeds": defaults(seeds_stage), "study": defaults(study_stage), "explore": TRAIN,
}  # fmt: skip
# Where a notebook that is opened by hand takes a quicker look, or has something of its own
QUICK = {
    "train": {"device", "limit"}, "compare": {"indices"}, "seeds": {"seeds"}, "study": {"sizes"},
    "benchmark": {"batch_sizes", "small_batch_sizes", "num_workers", "seconds", "other_weights", "devices"},
    "explore": {"limit", "batch_size"},
}  # fmt: skip


@pytest.mark.parametrize("name", OF_STAGE)
def test_a_notebooks_defaults_are_the_librarys(name):
    library = OF_STAGE[name]
    for parameter, found in papermill.inspect_notebook(NOTEBOOKS / f"{name}.ipynb").items():
        if parameter in library and parameter not in QUICK[name]:
            value = eval(found["default"])
            stated = re.search(r"None: (.*)$", found["help"])
            if value is None and stated and library[parameter] is not None:  # None stands for the preset's value
                assert stated[1] in (f"{library[parameter]:g}", of_presets(parameter)), parameter
            else:
                assert value == library[parameter], parameter


def of_presets(parameter: str) -> str:
    """The values of both presets as a notebook says them; what is only rounding as 0."""
    return ", ".join(f"{name} {round(getattr(config, parameter), 9):g}" for name, config in PRESETS.items())


@pytest.mark.parametrize(
    ("command", "stage"), [("train", "train"), ("report", "train"), ("benchmark", "benchmark"), ("report", "benchmark")]
)
def test_the_help_of_a_command_says_the_librarys_defaults(command, stage):
    library, said = OF_STAGE[stage], {}
    for option in COMMANDS[command].params:
        if match := re.search(r"\[(.*)\]\.$", option.help or ""):
            said[option.name] = match[1]
    for name in {"batch_size"} & set(said) if stage == "benchmark" else set():  # repeatable; the list is one parameter
        said["batch_sizes"] = said.pop(name)
    told = {name: text for name, text in said.items() if name in library}
    assert len(told) >= 3
    for name, text in told.items():
        value = library[name]
        if isinstance(value, bool):
            assert text == {True: "yes", False: "no"}[value]
        elif isinstance(value, list | tuple):
            assert text in (", ".join(map(str, value)), "the run's own, and cuda")
        elif value is None:
            assert text in ("all", "the first image's shorter side")
        elif not (isinstance(value, str) or text.startswith("the preset's") or text.startswith("all that")):
            assert text == f"{value:g}", name
        elif text.startswith("the preset's"):
            same = len({getattr(config, name) for config in PRESETS.values()}) == 1
            assert text == (f"the preset's, {value:g}" if same else "the preset's"), name
        else:
            assert text.startswith((str(value), "all", "paper, precise")), name


@pytest.mark.parametrize("name", OF_STAGE)
def test_a_page_has_a_row_for_each_parameter(name):
    rows = "".join(re.findall(r"^\|(.*?)\|", (DOCS / f"{name}.md").read_text(), re.MULTILINE))
    parameters = set(papermill.inspect_notebook(NOTEBOOKS / f"{name}.ipynb"))
    assert parameters <= set(re.findall(r"`(\w+)`", rows))
