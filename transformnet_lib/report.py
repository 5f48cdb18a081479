"""Running the notebooks and making the report: papermill executes, nbconvert exports.

A stage counts as done only when every code cell of its notebook ran, none shows an error, and run.json says complete:
papermill's own metadata alone can say "completed" after a dead kernel.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import lazy_loader
import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_core.utils import ensure_event_loop
from nbclient.exceptions import DeadKernelError
from nbconvert.exporters.exporter import Exporter

from . import errors
from .data import check_source
from .errors import ExportError, Interrupted, NotebookError, ParameterError
from .export import HTMLReportExporter, PDFReportExporter
from .machine import available_devices, resolve_device
from .runs import Run, open_runs, write_atomic
from .timing import check_sweep
from .training import TrainConfig

papermill = lazy_loader.load("papermill")  # whose import binds a socket, to see whether there is IPv6

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
KERNEL_ARGUMENTS = ["--log-level=40"]  # errors only; else each start warns that it listens on a local port
STAGES = ("train", "compare", "benchmark")
EXPORTERS: dict[str, type[Exporter]] = {"html": HTMLReportExporter, "pdf": PDFReportExporter}


def execute(name: str, output: Path, parameters: dict) -> None:
    """Execute `notebooks/<name>.ipynb` with `parameters` into `output`, in the working directory.

    Raises ParameterError for one that the notebook doesn't have, Interrupted after Ctrl-C, and NotebookError, with the
    cell's own error line, if any cell fails or is not reached. What was executed until then is kept as
    `<name>.failed.ipynb` beside `output`, which stays as it was.
    """
    source = NOTEBOOKS / f"{name}.ipynb"
    if not source.exists():
        raise NotebookError(f"{source}: no such notebook; install the project from its clone (pip install -e .)")
    known = papermill.inspect_notebook(source)
    if unknown := [key for key in parameters if key not in known]:
        raise ParameterError(f"{name}: unknown parameter {', '.join(unknown)}; it has {', '.join(known)}")
    unfinished = output.with_name(f"{output.stem}.failed.ipynb")
    logging.getLogger("papermill").setLevel(logging.ERROR)  # "Executing notebook with kernel" is no news
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _interruptibly(
            name,
            lambda **hooks: papermill.execute_notebook(
                source,
                unfinished,
                parameters,
                progress_bar={"desc": name, "leave": False},
                extra_arguments=KERNEL_ARGUMENTS,
                shutdown_kernel="immediate",  # nothing is left to do then, and Python takes a second to unload all
                **hooks,
            ),
        )
    except papermill.exceptions.PapermillExecutionError as error:
        reason = (error.evalue or "no message").splitlines()[0]
        if not hasattr(errors, error.ename):  # not one of ours, so its message alone may not say what it is
            reason = f"{error.ename}: {reason}"
        raise NotebookError(f"{name}: {reason} (see {unfinished})") from error
    except DeadKernelError as error:
        raise NotebookError(f"{name}: the kernel died (out of memory, or killed); see {unfinished}") from error
    except (papermill.exceptions.PapermillException, TimeoutError) as error:
        raise NotebookError(f"{name}: {str(error).splitlines()[0]}; see {unfinished}") from error
    except OSError as error:
        raise NotebookError(f"{error.filename or output}: cannot be written ({error.strerror})") from error
    check_executed(unfinished)
    unfinished.replace(output)


def _interruptibly(name: str, work: Callable[..., object]) -> None:
    """Call `work` with options for nbclient; Ctrl-C then interrupts the running cell, as JupyterLab's button does.

    So the cell can save what it has. In the main thread nbclient would kill the kernel instead; in another it sets no
    signal handlers.
    """
    kernels, failures = [], []
    ready = threading.Event()  # a kernel that is interrupted while it starts would leave nbclient waiting for it

    class Manager(AsyncKernelManager):
        def __init__(self, **options):
            super().__init__(**options)
            kernels.append(self)

    def thread() -> None:
        try:
            work(kernel_manager_class=Manager, on_notebook_start=lambda **_: ready.set())
        except BaseException as error:
            failures.append(error)
        finally:
            ensure_event_loop().close()  # the one nbclient made for this thread; it leaves it open

    worker = threading.Thread(target=thread, daemon=True)  # a second Ctrl-C ends us, and the kernel with us
    worker.start()
    try:
        worker.join()
    except KeyboardInterrupt as interrupt:
        if ready.is_set():
            asyncio.run(kernels[0].interrupt_kernel())
            worker.join()
        raise Interrupted(f"{name}: interrupted; the same command goes on where it stopped") from interrupt
    if failures:
        raise failures[0]


def check_executed(path: Path) -> None:
    """Raise NotebookError unless every code cell of the notebook at `path` was executed without an error."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code" and cell.source]
    for i, cell in enumerate(cells, 1):
        if cell.execution_count is None:
            raise NotebookError(f"{path}: code cell {i} of {len(cells)} was not executed")
        if any(output.output_type == "error" for output in cell.outputs):
            raise NotebookError(f"{path}: code cell {i} of {len(cells)} failed")


def run_stage(name: str, run_dir: Path, parameters: dict) -> None:
    """Execute the notebook of one stage into its run directory, and make sure that the stage is complete."""
    execute(name, run_dir / f"{name}.ipynb", {"run_dir": str(run_dir), **parameters})
    Run(run_dir).require(name)


def export(notebook: Path, out_dir: Path, formats: Sequence[str] = ("html", "pdf")) -> list[Path]:
    """Export an executed notebook to `out_dir`, named after it; returns the files. Raises ExportError."""
    check_executed(notebook)
    # All are made before one is written, so that an error leaves no new page beside an old PDF.
    bodies = {name: EXPORTERS[name]().from_filename(str(notebook))[0] for name in formats}
    files = [out_dir / f"{notebook.stem}.{name}" for name in formats]
    for file, body in zip(files, bodies.values(), strict=True):
        try:
            write_atomic(file, body if isinstance(body, bytes) else body.encode())
        except OSError as error:
            raise ExportError(f"{file}: cannot be written ({error.strerror})") from error
    return files


def make_runs(
    devices: Sequence[str],
    runs_dir: Path,
    *,
    presets: Sequence[str] = ("paper", "precise"),
    train: dict,
    benchmark: dict,
    study: dict | None = None,
    force: bool,
) -> list[Path]:
    """Make the report's runs: for each device `<runs_dir>/<device>` of the first preset, `<device>-<preset>` of others.

    The first has the stages train, compare, benchmark and, unless None, study; the others train and compare. What is
    complete already is left as it is. `train`, `benchmark` and `study` are notebook parameters.
    """
    # Refuse before the first long stage what can be told by then
    devices = [str(resolve_device(device)) for device in devices] or available_devices()
    configs = {name: train[name] for name in ("seed", "epochs") if name in train}
    for preset in presets:
        TrainConfig.from_preset(preset, **configs)
    check_source(train["data"], train.get("data_path", "data"), limit=train["limit"])
    check_sweep(**benchmark)
    run_dirs = []
    for device in devices:
        # Where there is no CUDA device the CPU's run says so, row by row.
        timed = [device] + ["cuda"] * (device == "cpu" and "cuda" not in available_devices())
        for preset in presets:
            first = preset == presets[0]
            stages = STAGES + ("study",) * (study is not None) if first else STAGES[:2]
            run_dir = runs_dir / (device.replace(":", "") + ("" if first else f"-{preset}"))
            of_stage = {
                "train": {"device": device, "preset": preset, **train},
                "compare": {},
                "benchmark": {"devices": timed, **benchmark},
                "study": study,
            }
            for stage in stages:
                run_stage(stage, run_dir, of_stage[stage] | {"force": force})
            run_dirs.append(run_dir)
    return run_dirs


def check_front(title: str | None, author: str | None) -> None:
    """Raise ExportError if a title block cannot be set, say for a character that no font has: before hours of work."""
    front = {"title": title or "Untitled", "author": author or "", "date": "2000-01-01"}
    shown = nbformat.v4.new_output("display_data", metadata={"transformnet": {"front": front}})
    cell = nbformat.v4.new_code_cell(outputs=[shown], execution_count=1)
    PDFReportExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))


def make_report(run_dirs: Sequence[Path], out_dir: Path, *, title: str | None, author: str | None) -> list[Path]:
    """Execute report.ipynb on finished runs and export it; returns [report.html, report.pdf]."""
    runs = open_runs(run_dirs)
    for stage in ("compare", "benchmark"):
        if not any(run.has(stage) for run in runs):
            runs[0].require(stage)
    notebook = out_dir / "report.ipynb"
    named = {name: text for name, text in (("title", title), ("author", author)) if text is not None}
    execute("report", notebook, {"runs": [str(run.path) for run in runs], **named})
    return export(notebook, out_dir)
