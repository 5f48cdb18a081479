"""What `make notebooks` keeps and drops, so that a second run without changes leaves no difference."""

import copy
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from refresh import CLOCK, normalise

from transformnet_lib.report import NOTEBOOKS

COMPUTING = ("train", "compare", "benchmark", "seeds", "study")  # the others show what they read from files


def executed(source: str, text: str, *tags: str):
    outputs = [new_output("stream", name="stderr", text="100%"), new_output("display_data", {"text/plain": text})]
    return new_code_cell(source, outputs=outputs, execution_count=1, metadata={"tags": list(tags), "execution": {}})


def texts(notebook) -> list[list[str]]:
    return [[output.data["text/plain"] for output in cell.outputs] for cell in notebook.cells]


def test_a_clocks_output_is_kept_while_its_source_is_the_same():
    before = new_notebook(cells=[executed("time()", "1 s", CLOCK), executed("2 + 2", "4")])
    normalise(before, None)
    after = new_notebook(cells=[executed("time()", "9 s", CLOCK), executed("2 + 2", "4")])
    normalise(after, before)
    assert texts(after) == [["1 s"], ["4"]]
    for one, other in zip(before.cells, after.cells, strict=True):
        other.id = one.id
    assert nbformat.writes(after) == nbformat.writes(before)


def test_a_changed_clock_and_every_other_output_are_taken_anew():
    before = new_notebook(cells=[executed("time()", "1 s", CLOCK), executed("value", "4")])
    after = new_notebook(cells=[executed("time() # changed", "9 s", CLOCK), executed("value", "5")])
    normalise(after, copy.deepcopy(before))
    assert texts(after) == [["9 s"], ["5"]]


@pytest.mark.parametrize("name", COMPUTING)
def test_what_nbval_compares_has_no_more_digits_than_every_machine_agrees_on(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code" and CLOCK not in cell.metadata.get("tags", []):
            for output in cell.outputs:
                assert not re.search(r"\d\.\d{5,}", output.get("data", {}).get("text/plain", "")), cell.id
