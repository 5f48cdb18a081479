"""Running the notebooks and making the report: papermill executes, nbconvert exports.

A notebook counts as executed only when every code cell of it ran and none shows an error: papermill's own metadata can
say "completed" after a dead kernel.
"""

import asyncio
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import lazy_loader
import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from jupyter_core.utils import ensure_event_loop
from nbclient.exceptions import DeadKernelError
from tqdm import tqdm

from . import errors
from .benchmarking import check_sweep, check_weights
from .display import NUMBERS
from .errors import Interrupted, NotebookError, ParameterError, RunError
from .export import ExportError, HTMLReportExporter, PDFReportExporter
from .files import drop_leftovers, locked, write_together
from .images import check_source
from .machine import available_devices, resolve_device
from .measure import LEAST_ROUNDS, check_rounds
from .pipeline import Pipeline
from .resources import NOTEBOOKS, PACKAGE
from .run import is_current, read_run, read_runs
from .stage_folder import check_place, is_complete, is_marked, mark_for_remaking
from .training import TrainConfig

papermill = lazy_loader.load("papermill")  # whose import binds a socket, to see whether there is IPv6

ROOT = PACKAGE.parent  # what must be on sys.path to import this library
INTERRUPT_SECONDS = 3  # after which a kernel that still runs is interrupted again
INTERRUPTS = 5  # after which it is killed; what it had finished is saved by then


class OwnKernelManager(AsyncKernelManager):
    """Starts kernels with this process's Python and library, whatever kernelspecs and clones lie around."""

    @property
    def kernel_spec(self) -> KernelSpec:
        launcher = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=launcher + kernel_arguments(), language="python")


def kernel_arguments() -> list[str]:
    """What a kernel of this process is started with."""
    root = ascii(str(ROOT)).replace("{", r"\x7b")  # jupyter_client fills in braces
    return [
        "--log-level=40",  # errors only; else each start warns that it listens on a local port
        # ipykernel looks each second whether its command is there; but not for one that was gone before the first look,
        # where orphans go to another process than 1, as in a desktop's session. So one that has just started looks too.
        f"--IPKernelApp.exec_lines=if not __import__('psutil').pid_exists({os.getpid()}): __import__('os')._exit(1)",
        # The working directory may be another clone, and this library need not be the installed one
        "--IPKernelApp.ignore_cwd=True",
        f"--IPKernelApp.exec_lines=__import__('sys').path.insert(0, {root}); __import__('transformnet_lib');"
        " __import__('sys').path.pop(0);",
    ]


def execute(
    name: str,
    output: Path,
    parameters: dict,
    *,
    unfinished: Path | None = None,
    doing: str = "",
) -> None:
    """Execute the project's notebook `<name>.ipynb` with `parameters` into `output`, in the working directory.

    Raises ParameterError for one that the notebook doesn't have, Interrupted after Ctrl-C, and NotebookError, with the
    cell's own error line, if any cell fails or is not reached. What was executed until then is kept as `unfinished`, by
    default `<name>.failed.ipynb` beside `output`, which stays as it was. `doing` is shown beside the progress bar
    instead of the name.
    """
    source = NOTEBOOKS / f"{name}.ipynb"
    known = papermill.inspect_notebook(_literal(source))
    if unknown := [key for key in parameters if key not in known]:
        raise ParameterError(f"{name}: unknown parameter {', '.join(unknown)}; it has {', '.join(known)}")
    unfinished = unfinished or output.with_name(f"{output.stem}.failed.ipynb")
    logging.getLogger("papermill").setLevel(logging.ERROR)  # "Executing notebook with kernel" is no news
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        unfinished.unlink(missing_ok=True)  # papermill would follow a link and wait for a pipe
        progress = CellProgress(doing or name)
        with progress.bar:
            _interruptibly(
                name,
                lambda **hooks: papermill.execute_notebook(
                    _literal(source),
                    _literal(unfinished),
                    parameters,
                    progress_bar=False,
                    on_cell_start=progress.start,
                    stderr_file=progress,
                    shutdown_kernel="immediate",  # nothing is left to do then, and Python takes a second to unload all
                    **hooks,
                ),
            )
        check_executed(unfinished)
        with unfinished.open("r+b") as file:
            os.fsync(file.fileno())  # papermill does not, so a power cut could leave the new name on half a notebook
        if not output.parent.is_dir():  # the folder of its stage
            raise NotebookError(f"{name}: the notebook ran to its end without making {output.parent}; see {unfinished}")
        unfinished.replace(output)
    except papermill.exceptions.PapermillExecutionError as error:
        reason = (error.evalue or "no message").splitlines()[0]
        if not hasattr(errors, error.ename):  # not one of ours, so its message alone may not say what it is
            reason = f"{error.ename}: {reason}"
        raise NotebookError(f"{name}: {reason} (see {unfinished})") from error
    except DeadKernelError as error:
        raise NotebookError(f"{name}: the kernel died (out of memory, or killed); see {unfinished}") from error
    except (papermill.exceptions.PapermillException, TimeoutError, RuntimeError) as error:  # RuntimeError: no kernel
        raise NotebookError(f"{name}: {str(error).splitlines()[0]}; see {unfinished}") from error
    except OSError as error:
        print(file=sys.stderr)  # papermill leaves its progress bar on the line
        place = Path(error.filename2 or error.filename or unfinished)
        raise NotebookError(f"{place}: cannot be written ({error.strerror or error})") from error


class CellProgress:
    """Shows in a terminal which cell of a notebook runs, and the bar that the cell itself draws on stderr."""

    def __init__(self, title: str):
        self.bar = tqdm(desc=title, bar_format="{desc}: cell {n_fmt} [{elapsed}]{postfix}", leave=False)

    def start(self, cell: nbformat.NotebookNode, cell_index: int) -> None:
        self.bar.n = cell_index + 1
        self.bar.set_postfix_str("")

    def write(self, text: str) -> None:
        """As a file, to which papermill writes the stderr of the kernel."""
        *_, last = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text))  # bars move the cursor
        if last.strip():
            self.bar.set_postfix_str(re.sub(r"\|.*\|", "", last).strip())  # without its drawing: there is no room

    def flush(self) -> None:
        """What is written is shown at once."""


def _literal(path: Path) -> str:
    """A path as papermill takes it as it is: it fills in braces, and takes one that begins with - for its output."""
    return os.path.join(os.curdir, path).replace("{", "{{").replace("}", "}}")


def _interruptibly(name: str, work: Callable[..., object]) -> None:
    """Call `work` with options for nbclient; Ctrl-C then interrupts the running cell, as JupyterLab's button does.

    So the cell can save what it has. In the main thread nbclient would kill the kernel instead; in another it sets no
    signal handlers. The handlers of other signals that raise KeyboardInterrupt work as Ctrl-C does.
    """
    kernels, failures = [], []
    ready = threading.Event()  # a kernel that is interrupted while it starts would leave nbclient waiting for it
    stopped = threading.Event()
    # Not Thread.join, which once interrupted calls a running thread finished: python/cpython issue 90882
    done = threading.Event()

    class Manager(OwnKernelManager):
        def __init__(self, **options):
            super().__init__(**options)
            kernels.append(self)

        async def start_kernel(self, **options):
            await super().start_kernel(**options)
            if stopped.is_set():  # meanwhile
                await self.shutdown_kernel(now=True)

    def thread() -> None:
        try:
            work(kernel_manager_class=Manager, on_notebook_start=lambda **_: ready.set())
        except BaseException as error:
            failures.append(error)
            with suppress(Exception):  # not held, as a rule
                tqdm.get_lock().release()  # which a bar keeps that cannot be written, and Python's end waits for
        finally:
            try:
                ensure_event_loop().close()  # the one nbclient made for this thread; it leaves it open
            finally:
                done.set()

    try:
        threading.Thread(target=thread, daemon=True).start()  # daemon: it may wait for ever for a killed kernel
        done.wait()
    except KeyboardInterrupt as interrupt:
        stopped.set()
        with suppress(KeyboardInterrupt):  # another one: no more patience
            for _ in range(INTERRUPTS):
                if ready.is_set() and not done.is_set():
                    with suppress(RuntimeError):  # the kernel has just ended
                        asyncio.run(kernels[0].interrupt_kernel())
                    done.wait(INTERRUPT_SECONDS)  # an interrupt that comes between two cells is lost
        if not done.is_set():
            # It only starts, or an interrupt hit its own code and cost its answer: nbclient would wait for ever
            for kernel in kernels:
                if kernel.provisioner:  # its manager is the thread's: of two that shut a kernel down, one fails
                    asyncio.run(kernel.provisioner.kill())
            with suppress(KeyboardInterrupt):
                done.wait(INTERRUPT_SECONDS)  # for nbclient to see that, and to clear up
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


def check_stage(name: str, parameters: dict) -> None:
    """Refuse what the parameters of a stage rule out, before a kernel starts and anything is written."""
    if name == "train":
        resolve_device(parameters.get("device", "auto"))
        configs = {field.name: parameters[field.name] for field in fields(TrainConfig) if field.name in parameters}
        TrainConfig.from_preset(**{"preset": "paper"} | configs)
        of_pipeline = {"output_size": "size", "hflip": "hflip", "vflip": "vflip"}
        Pipeline(**{field: parameters[name] for name, field in of_pipeline.items() if name in parameters})
        names = ("data", "data_path", "limit", "fit", "image_size")
        check_source(**{name: parameters[name] for name in names if name in parameters})
    if name == "benchmark":
        names = ("batch_sizes", "small_batch_sizes", "num_workers", "rounds", "seconds", "precision")
        check_sweep(**{name: parameters[name] for name in names if name in parameters})
        check_weights(parameters.get("other_weights", {}))
    if name == "study":
        check_rounds(parameters.get("rounds", LEAST_ROUNDS), 0, 0)


def refuse_others(notebook: Path) -> None:
    """Raise NotebookError if a notebook that papermill did not execute, and so somebody's own, would be replaced."""
    if notebook.is_file() and not _papermill(notebook):
        raise NotebookError(f"{notebook}: not executed by a command, so not replaced; move it, or take another folder")


def _papermill(notebook: Path) -> dict:
    """What papermill noted in a notebook that it executed; empty where there is none, or somebody else's."""
    try:
        return json.loads(notebook.read_bytes())["metadata"]["papermill"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def run_stage(name: str, run_dir: Path, parameters: dict) -> bool:
    """Execute the notebook of one stage into its folder, so that the stage is complete; False if all of it was there.

    The notebook is the stage's attachment: one that is missing, or was executed with other parameters, is executed
    (and the stage refused by the library if it was made with others).
    """
    check_stage(name, parameters)
    if name != "train":
        read_run(run_dir, stages=["train"])  # else a kernel would start to say that it is not trained
    notebook = run_dir / name / f"{name}.ipynb"
    parameters = {"run_dir": str(run_dir), **parameters}
    complete = is_complete(run_dir / name) and not parameters.get("force") and is_current(run_dir, name)
    if complete and _but_force(_papermill(notebook).get("parameters")) == _but_force(parameters):
        return False
    refuse_others(notebook)
    if not complete:
        check_place(run_dir, name)  # before a kernel starts
    doing = f"{run_dir.name}: {name}" + " (complete: only its notebook)" * complete
    execute(name, notebook, parameters, unfinished=run_dir / f"{name}.failed.ipynb", doing=doing)
    return True


def _but_force(parameters: object) -> object:
    """Parameters without `force`, which changes nothing in what comes out."""
    return {**parameters, "force": None} if isinstance(parameters, dict) else None


def export(notebook: Path, out_dir: Path) -> list[Path]:
    """Export an executed notebook to `out_dir`: page, PDF and its numbers, named after it; returns the files.

    The numbers are what the notebook gave to `display.show_numbers`. Raises ExportError.
    """
    check_executed(notebook)
    # All are made before one is written, so that an error leaves no new page beside an old PDF.
    found = _numbers(notebook)
    others = ["pdf"] + ["json"] * (found is not None)
    page = HTMLReportExporter(beside=[f"{notebook.stem}.{name}" for name in others])
    bodies = {
        name: exporter.from_filename(str(notebook))[0]
        for name, exporter in (("html", page), ("pdf", PDFReportExporter()))
    }
    if found is not None:
        bodies["json"] = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    contents = {
        out_dir / f"{notebook.stem}.{name}": body if isinstance(body, bytes) else body.encode()
        for name, body in bodies.items()
    }
    try:
        write_together(contents)
    except OSError as error:
        names = ", ".join(file.name for file in contents)
        raise ExportError(f"{out_dir}: {names} cannot be written ({error.strerror}); old ones are kept") from error
    return list(contents)


def _numbers(notebook: Path) -> dict | None:
    """What a notebook gave to `display.show_numbers`; None if nothing."""
    for cell in nbformat.read(notebook, as_version=4).cells:
        for output in cell.get("outputs", []):
            if output.get("metadata", {}).get("transformnet", {}).get("numbers"):
                return output["data"][NUMBERS]
    return None


def weights_of(run_dirs: Sequence[Path]) -> dict[str, list[float]]:
    """The trained weights of runs, by their labels: red, green and blue."""
    runs = [read_run(run_dir, stages=["train"]) for run_dir in run_dirs]
    for run in runs:
        if (same := next(other for other in runs if other.label == run.label)) is not run:
            raise RunError(f"{run.path} and {same.path}: two runs named {run.label}; rename one of the folders")
    return {run.label: list(run.train.weights) for run in runs}


def make_runs(
    devices: Sequence[str],
    runs_dir: Path,
    *,
    presets: Sequence[str] = ("paper", "precise"),
    train: dict,
    benchmark: dict,
    seeds: dict,
    study: dict | None = None,
    force: bool,
) -> list[Path]:
    """Make the report's runs, `<runs_dir>/<preset>-<device>` for each device and preset.

    All have the stages train and compare. One of each device, of the preset `precise` if there is one, is timed: it has
    the stages benchmark, seeds and, unless None, study. What is complete is left as it is. `train`, `benchmark`,
    `seeds` and `study` are notebook parameters. With `force` all are made again; if that is stopped, the same call goes
    on with it.
    """
    devices = [str(resolve_device(device)) for device in devices] or available_devices()
    todo, run_dirs, others = [], [], {}
    timed = "precise" if "precise" in presets else presets[0]
    for device in devices:
        of_preset = {preset: runs_dir / f"{preset}-{device.replace(':', '')}" for preset in presets}
        run_dirs += of_preset.values()
        for preset, run_dir in of_preset.items():
            todo.append(("train", run_dir, {"device": device, "preset": preset, **train}))
            todo.append(("compare", run_dir, {}))
        run_dir = of_preset.pop(timed)
        others[run_dir] = list(of_preset.values())  # whose weights are timed beside its own
        # Where there is no CUDA device the CPU's run says so, row by row.
        kinds = [device] + ["cuda"] * (device == "cpu" and "cuda" not in available_devices())
        todo.append(("benchmark", run_dir, {"devices": kinds, **benchmark}))
        todo.append(("seeds", run_dir, seeds))
        todo += [("study", run_dir, study)] if study is not None else []
    for stage, _, parameters in todo:  # before the first long one
        check_stage(stage, parameters)
    if force:
        # What an earlier call has not yet made again is marked: the rest of the list
        marked = [is_marked(run_dir, stage) for stage, run_dir, _ in todo]
        done = marked.count(False) if any(marked) and marked == sorted(marked) else 0
        if done:
            left = len(todo) - done
            print(f"resuming the stopped --force: {left} of {len(todo)} stages are left", file=sys.stderr)
        for stage, run_dir, _ in todo[done:]:
            mark_for_remaking(run_dir, stage)
    complete = []
    for stage, run_dir, parameters in todo:
        again = {"force": True} if force and is_marked(run_dir, stage) else {}
        if stage == "benchmark":  # the others are trained by now
            parameters = parameters | {"other_weights": weights_of(others[run_dir])}
        if not run_stage(stage, run_dir, parameters | again):
            complete.append(f"{run_dir.name}/{stage}")
    if complete:
        print(f"already complete, left as they are: {', '.join(complete)}", file=sys.stderr)
    return run_dirs


def check_front(title: str | None, author: str | None) -> None:
    """Raise ExportError if a title block cannot be set, say for a character that no font has: before hours of work."""
    front = {"title": title or "Untitled", "author": author or "", "date": "2000-01-01"}
    shown = nbformat.v4.new_output("display_data", metadata={"transformnet": {"front": front}})
    cell = nbformat.v4.new_code_cell(outputs=[shown], execution_count=1)
    PDFReportExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))


def make_report(
    run_dirs: Sequence[Path],
    out_dir: Path,
    *,
    title: str | None,
    author: str | None,
    words: Path | None = None,
) -> list[Path]:
    """Execute report.ipynb on finished runs and export it; returns [report.html, report.pdf, report.json].

    `words` is a folder of templates in place of those shipped, one or all.

    A run with a stage that was begun and is not complete is refused, whatever the other runs have.
    """
    runs = read_runs(run_dirs)
    for run in runs:
        for name, why in run.unfinished.items():
            how = f"`transformnet {name} --run-dir {run.path}` with the same parameters makes it"
            raise RunError(f"{run.path}: stage {name} is not complete ({why}); {how}")
    for name in ("compare", "benchmark"):
        if not any(name in run.stages for run in runs):
            raise RunError(f"{runs[0].path}: stage {name}: not run yet; `transformnet {name} --run-dir {runs[0].path}`")
    notebook = out_dir / "report.ipynb"
    refuse_others(notebook)
    given = {"title": title, "author": author, "words": words and str(words.resolve())}
    named = {name: text for name, text in given.items() if text is not None}
    with locked(out_dir):
        drop_leftovers(out_dir)
        execute("report", notebook, {"runs": [str(run.path) for run in runs], **named})
        return export(notebook, out_dir)
