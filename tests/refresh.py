"""Execute the committed notebooks again, in place, and normalise what differs between machines: `make notebooks`.

Kept as they were: the outputs of cells tagged `nbval-ignore-output` (their numbers are clocks) if their source is
unchanged, so that a second run without changes leaves no difference.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from transformnet_lib.display import NUMBERS, WIDGET
from transformnet_lib.errors import NotebookError, TransformnetError
from transformnet_lib.files import write_atomic
from transformnet_lib.report import NOTEBOOKS, ROOT, OwnKernelManager

CLOCK = "nbval-ignore-output"


def committed(path: Path) -> NotebookNode | None:
    """The notebook as the last commit has it, or None."""
    name = path.relative_to(ROOT).as_posix()
    shown = subprocess.run(["git", "-C", str(ROOT), "show", f"HEAD:{name}"], capture_output=True, text=True)
    return nbformat.reads(shown.stdout, as_version=4) if shown.returncode == 0 else None


def normalise(notebook: NotebookNode, before: NotebookNode | None) -> None:
    """Drop progress bars, times, paths and widgets from `notebook`; unchanged clock cells keep their old outputs.

    A widget is nothing without its kernel, and the numbers by name would be most of the file; what stands beside them,
    for where they cannot be shown, is kept.
    """
    notebook.metadata.pop("widgets", None)
    clocks = {cell.source: cell.outputs for cell in before.cells if is_clock(cell)} if before else {}
    for cell in notebook.cells:
        for name in ("execution", "papermill"):
            cell.metadata.pop(name, None)
        if cell.cell_type == "code":
            cell.outputs = clocks.get(cell.source) if is_clock(cell) and clocks.get(cell.source) else cell.outputs
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                for form in (WIDGET, NUMBERS):
                    output.get("data", {}).pop(form, None)
    language = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"}  # without the version
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    notebook.metadata.update(language_info=language, kernelspec=kernel)


def is_clock(cell: NotebookNode) -> bool:
    return CLOCK in cell.metadata.get("tags", [])


def refresh(path: Path) -> None:
    """Execute the notebook at `path` and write it back normalised.

    It runs in an empty folder, so that no earlier run is read in place of the work.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, timeout=600, resources=resources, kernel_manager_class=OwnKernelManager)
        try:
            client.execute()
        except CellExecutionError as error:
            raise NotebookError(f"{path}: {error.ename}: {error.evalue}") from error
    normalise(notebook, committed(path))
    write_atomic(path, (nbformat.writes(notebook) + "\n").encode())


def main() -> None:
    os.environ["TQDM_DISABLE"] = "1"
    try:
        for path in sorted(NOTEBOOKS.glob("*.ipynb")):
            refresh(path)
            print(path.relative_to(ROOT))
    except TransformnetError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
