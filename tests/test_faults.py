"""What goes wrong around a command: it says so in one line, and what was finished stays. docs/reliability.md lists it.

The longer form of the first test is `make soak`.
"""

import asyncio
import contextlib
import ctypes
import functools
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jupyter_client
import nbformat
import papermill
import psutil
import pytest
from soak import COMMANDS, RUN, STATUS, Soak, make_images
from transformnet_lib.runs import reference_run

from transformnet_lib import CustomDataset, Run, TrainConfig, cli, files, report, runs, train
from transformnet_lib.errors import Interrupted, NotebookError, RunError
from transformnet_lib.export import ExportError
from transformnet_lib.files import locked
from transformnet_lib.report import check_executed, export, forced_done, forced_over, make_report, make_runs, run_stage

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits are POSIX")
THE_ONE_BEFORE = '{"metadata": {"papermill": {}}}'  # a notebook that papermill executed
TRAIN = {"device": "cpu", "data": "photos", "limit": 300}


def images(folder: Path) -> CustomDataset:
    return CustomDataset(data=f"folder:{folder / 'images'}", train=True)


@posix
def test_faults_at_random_moments_of_a_training_lose_nothing(tmp_path):
    calm, folder = tmp_path / "calm", tmp_path / "disturbed"
    for place in (calm, folder):
        make_images(place)
    train(images(calm), TrainConfig(device="cpu", batch_size=4), run=Run(calm / RUN))
    soak = Soak(folder, calm, seed=0)
    work = Run(calm / RUN).stage_info("train")["seconds"]
    soak.disturb("train", len(STATUS), duration=None, work=work)  # each signal once
    assert (soak.faults.total(), soak.lost) == (len(STATUS), 0)


# Commands in trouble


def refused(process: subprocess.Popen) -> str:
    """The one line with which a command ended that failed."""
    _, told = process.communicate(timeout=120)
    assert process.returncode == 1, told
    assert "Traceback" not in told
    last = told.replace("\r", "\n").strip().splitlines()[-1].strip()
    assert last.startswith("error: ")
    return last


def start(folder: Path, arguments: str, before=None) -> subprocess.Popen:
    program = Path(sys.executable).parent / "transformnet"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [program, *arguments.split()], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=environment, preexec_fn=before,
    )  # fmt: skip


def until(process: subprocess.Popen, file: Path) -> None:
    while not file.exists():
        assert process.poll() is None
        time.sleep(0.01)


@posix
def test_a_run_folder_that_vanishes_is_one_line(tmp_path):
    make_images(tmp_path)
    process = start(tmp_path, COMMANDS["train"])
    until(process, tmp_path / "r/checkpoint.pt")
    (tmp_path / "r").rename(tmp_path / "elsewhere")
    assert "r/train.failed.ipynb: cannot be written (output folder ./r doesn't exist.)" in refused(process)
    assert not (tmp_path / "r").exists()
    assert Run(tmp_path / "elsewhere").read_torch("checkpoint.pt")["steps"]


def test_a_folder_that_takes_the_name_of_a_run_at_work_gets_nothing_of_it(notebook, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "train.ipynb").write_text("of the other")
    (tmp_path / "r").mkdir()
    notebook(f"import os; os.rename(run_dir, run_dir + '.away'); os.rename({str(other)!r}, run_dir)")
    with pytest.raises(RunError, match="r: no longer the folder that it was when the work began"):
        run_stage("train", tmp_path / "r", {})
    assert (tmp_path / "r/train.ipynb").read_text() == "of the other"
    assert Run(tmp_path / "r.away").record("train")["status"] == "done"


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_torch_is_loaded_ends_the_command_at_once_in_one_line(tmp_path, number):
    code = f"""
import atexit, os, sys
from transformnet_lib.cli import main

atexit.register(print, "unwound")  # which torch's C++ does not survive at some places, and an exit at once leaves out
def strike(event, of):
    if event == "import" and of[0] == "torch.distributed":
        os.kill(os.getpid(), {int(number)})

sys.addaudithook(strike)
sys.argv[1:] = ["compare", "--run-dir", "r"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "interrupted\n")


@posix
@pytest.mark.parametrize("sign", [runs.COMMAND_LOCK, "history.csv"], ids=["before the kernel starts", "at work"])
def test_a_closed_terminal_ends_the_command_with_status_129(tmp_path, sign):
    import fcntl  # these three are POSIX's
    import pty
    import termios

    make_images(tmp_path, 60)
    master, terminal = pty.openpty()
    program = Path(sys.executable).parent / "transformnet"
    process = subprocess.Popen(
        [program, *COMMANDS["train"].split()], cwd=tmp_path, stdin=terminal, stdout=terminal, stderr=terminal,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(terminal)
    until(process, tmp_path / "r" / sign)
    os.close(master)  # which sends SIGHUP, and makes every write to the terminal fail
    assert process.wait(60) == 129


@posix
def test_a_killed_kernel_is_one_line_and_the_same_command_goes_on(tmp_path):
    make_images(tmp_path)
    process = start(tmp_path, COMMANDS["train"])
    until(process, tmp_path / "r/history.csv")
    kernel = next(child for child in psutil.Process(process.pid).children() if "ipykernel" in " ".join(child.cmdline()))
    kernel.send_signal(signal.SIGKILL)
    assert "train: the kernel died (out of memory, or killed); see r/train.failed.ipynb" in refused(process)
    run = Run(tmp_path / "r")
    assert run.record("train")["status"] == "started" and (run.path / "train.failed.ipynb").exists()
    saved = (run.path / "history.csv").read_text()
    train(images(tmp_path), TrainConfig(device="cpu", batch_size=4), run=run)
    assert (run.path / "history.csv").read_text().startswith(saved)


@posix
def test_a_kernel_whose_command_is_gone_before_it_has_started_ends(tmp_path):
    code = "import json, os; from transformnet_lib.report import kernel_arguments as arguments\n"
    code += "print(json.dumps([os.getpid(), arguments()]))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    command, arguments = json.loads(told)
    launcher = [sys.executable, "-m", "ipykernel_launcher", "-f", tmp_path / "connection.json", *arguments]
    with subprocess.Popen(launcher, env=os.environ | {"JPY_PARENT_PID": str(command)}) as kernel:
        try:
            assert kernel.wait(30) == 1
        finally:
            kernel.kill()


@posix
def test_a_full_disk_is_one_line_and_earlier_results_stay(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "r")
    before = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}

    def little_space():
        resource.setrlimit(resource.RLIMIT_FSIZE, (7000, 7000))  # bytes a file: run.json fits, examples do not

    line = refused(start(tmp_path, "compare --run-dir r --index 7 --force", little_space))
    assert "cannot be written (File too large)" in line
    assert {path: path.read_bytes() for path in before} == before
    Run(tmp_path / "r").require("train", "compare", "benchmark")


@posix
def test_a_folder_that_may_only_be_read_is_one_line_and_stays_as_it_is(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "r")
    before = sorted((tmp_path / "r").rglob("*"))
    (tmp_path / "r").chmod(0o555)

    def as_others():  # root may write everywhere, unless it gives up that capability: man capabilities, man prctl
        if sys.platform == "linux":
            pr_capbset_drop, cap_dac_override = 24, 1
            ctypes.CDLL(None).prctl(pr_capbset_drop, cap_dac_override, 0, 0, 0)

    try:
        line = refused(start(tmp_path, "compare --run-dir r --index 7 --force", as_others))
        assert line == "error: r/compare.failed.ipynb: cannot be written (Permission denied)"
        assert sorted((tmp_path / "r").rglob("*")) == before
    finally:
        (tmp_path / "r").chmod(0o755)


def test_a_folder_in_which_a_command_works_is_refused_to_another(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    with locked(tmp_path / "r", runs.COMMAND_LOCK):
        with pytest.raises(RunError, match="r: in use by another command"):
            run_stage("train", tmp_path / "r", TRAIN)
        with pytest.raises(RunError, match="r: in use by another command"):
            make_report([reference_run().path], tmp_path / "r", title=None, author=None)
    assert [path.name for path in (tmp_path / "r").iterdir()] == [runs.COMMAND_LOCK]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("train", TRAIN | {"device": "tpu"}),
        ("train", TRAIN | {"data": "folder:nowhere"}),
        ("train", TRAIN | {"lr": -1}),
        ("train", TRAIN | {"limit": 0}),
        ("compare", {}),
        ("benchmark", {"batch_sizes": [0], "small_batch_sizes": [], "num_workers": [0], "repeats": 1}),
    ],
)
def test_what_can_be_told_before_leaves_no_folder(tmp_path, name, parameters):
    with pytest.raises(runs.ParameterError if name == "benchmark" else report.errors.TransformnetError):
        run_stage(name, tmp_path / "r", parameters)
    assert not (tmp_path / "r").exists()


# Notebooks that fail after their stage was done

AFTER_THE_STAGE = {
    "an error": ("raise ValueError('no figure')", "train: ValueError: no figure (see"),
    "an exit": ("import sys; sys.exit(0)", "code cell 4 of 5 failed"),
    "a quiet exit": ("get_ipython().kernel.do_shutdown(False); import os; os._exit(0)", "the kernel died"),
    "a kill": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "the kernel died"),
    "a timeout": ("import time; time.sleep(60)", "timed out"),
}


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """Answers a function that puts a notebook in place of `train`'s: it leaves a complete stage, then runs a cell."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(report, "NOTEBOOKS", folder)
    monkeypatch.setattr(report, "check_stage", lambda name, parameters: None)
    execute = functools.partial(papermill.execute_notebook, execution_timeout=4)
    monkeypatch.setattr(report.papermill, "execute_notebook", execute)
    finished = reference_run().path / "run.json"

    copied = f"""
from pathlib import Path
record = Path({str(finished)!r}).read_text().replace('"status": "complete"', '"status": "done"', 1)
Path(run_dir, "run.json").write_text(record)"""

    def put(then: str, *, name: str = "train", done: str = copied, parameter: str = "run_dir"):
        cells = [nbformat.v4.new_code_cell(source) for source in (f"{parameter} = ''", done, then, "1")]
        cells[0].metadata["tags"] = ["parameters"]
        metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), folder / f"{name}.ipynb")

    return put


@pytest.mark.parametrize(("then", "message"), AFTER_THE_STAGE.values(), ids=AFTER_THE_STAGE)
def test_a_notebook_that_fails_after_its_stage_makes_the_stage_fail(notebook, tmp_path, then, message):
    run = Run(tmp_path / "r")
    run.path.mkdir()
    (run.path / "train.ipynb").write_text(THE_ONE_BEFORE)
    notebook(then)
    with pytest.raises(NotebookError) as caught:
        run_stage("train", run.path, {})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert run.record("train")["status"] == "done" and message in run.record("train")["why"]
    assert "run_dir" in (run.path / "train.failed.ipynb").read_text()
    assert (run.path / "train.ipynb").read_text() == THE_ONE_BEFORE
    with pytest.raises(RunError, match="stage train is not complete"):
        make_report([run.path], tmp_path / "out", title=None, author=None)
    assert not (tmp_path / "out").exists()


def test_a_notebook_that_does_not_reach_the_disk_does_not_take_its_name(notebook, tmp_path, monkeypatch):
    run = Run(tmp_path / "r")
    run.path.mkdir()
    (run.path / "train.ipynb").write_text(THE_ONE_BEFORE)
    notebook("1")
    fsync = os.fsync

    def failing(handle):
        unfinished = run.path / "train.failed.ipynb"
        if unfinished.exists() and os.path.samestat(os.fstat(handle), unfinished.stat()):
            raise OSError(5, "Input/output error")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(NotebookError, match=r"train\.failed\.ipynb: cannot be written \(Input/output error\)"):
        run_stage("train", run.path, {})
    assert (run.path / "train.ipynb").read_text() == THE_ONE_BEFORE
    assert run.record("train")["status"] == "done"


def test_a_notebook_that_is_interrupted_after_its_stage_makes_the_stage_unfinished(notebook, tmp_path, monkeypatch):
    notebook("1")
    execute = report.execute

    def interrupted(*arguments, **options):
        execute(*arguments, **options)
        raise Interrupted("train: interrupted")

    monkeypatch.setattr(report, "execute", interrupted)
    (tmp_path / "r").mkdir()
    with pytest.raises(Interrupted):
        run_stage("train", tmp_path / "r", {})
    assert Run(tmp_path / "r").record("train")["why"].endswith("run to the end: train: interrupted")


def train_interrupted(run: Run, *, times: int = 1) -> None:
    """Run the stage `train`, and press Ctrl-C so many times when the file "asleep" is in its folder."""

    def press_ctrl_c():
        while not (run.path / "asleep").exists():
            time.sleep(0.01)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    run.path.mkdir()
    presser = threading.Thread(target=press_ctrl_c)
    presser.start()
    with pytest.raises(Interrupted):
        run_stage("train", run.path, {})
    presser.join()


@posix
@pytest.mark.parametrize(
    ("owner", "name"),
    [(report.AsyncKernelManager, "start_kernel"), (jupyter_client.AsyncKernelClient, "wait_for_ready")],
    ids=["no process yet", "no answer yet"],
)
def test_a_kernel_is_ended_that_has_not_yet_started_when_its_command_is_interrupted(
    notebook, tmp_path, monkeypatch, owner, name
):
    run, real = Run(tmp_path / "r"), getattr(owner, name)

    async def slow(*arguments, **options):
        (run.path / "asleep").touch()
        await asyncio.sleep(2)
        await real(*arguments, **options)

    monkeypatch.setattr(owner, name, slow)
    notebook("open(run_dir + '/executed', 'w').close()")
    before = psutil.Process().children()
    train_interrupted(run)
    _, alive = psutil.wait_procs(set(psutil.Process().children()) - set(before), timeout=3)
    assert not alive and not (run.path / "executed").exists()


@posix
def test_an_interrupt_that_comes_as_the_notebooks_thread_starts_ends_its_kernel(notebook, tmp_path, monkeypatch):
    run, real = Run(tmp_path / "r"), threading.Thread.start
    before = psutil.Process().children()

    def interrupted(thread):
        real(thread)
        if thread.name.endswith("(thread)"):
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    notebook("open(run_dir + '/executed', 'w').close()")
    run.path.mkdir()
    with pytest.raises(Interrupted):
        run_stage("train", run.path, {})
    _, alive = psutil.wait_procs(set(psutil.Process().children()) - set(before), timeout=3)
    assert not alive and not (run.path / "executed").exists()


@posix
def test_an_interrupt_that_comes_between_two_cells_is_repeated(notebook, tmp_path, monkeypatch):
    run, sent = Run(tmp_path / "r"), []
    interrupt = report.AsyncKernelManager.interrupt_kernel

    async def lost_at_first(manager):
        sent.append(manager)
        if len(sent) > 1:
            await interrupt(manager)

    monkeypatch.setattr(report.AsyncKernelManager, "interrupt_kernel", lost_at_first)
    monkeypatch.setattr(report, "INTERRUPT_SECONDS", 0.5)
    notebook("import time; open(run_dir + '/asleep', 'w').close(); time.sleep(60)")
    train_interrupted(run)
    assert len(sent) == 2 and "KeyboardInterrupt" in (run.path / "train.failed.ipynb").read_text()
    assert run.record("train")["why"].startswith("its notebook did not run to the end: train: interrupted")


@posix
@pytest.mark.parametrize(("times", "seconds"), [(1, 0.3), (2, 600)], ids=["after a while", "at a second Ctrl-C"])
def test_a_kernel_that_answers_no_interrupt_is_killed(notebook, tmp_path, monkeypatch, times, seconds):
    run = Run(tmp_path / "r")

    monkeypatch.setattr(report, "INTERRUPT_SECONDS", seconds)
    patient = functools.partial(report.papermill.execute_notebook, execution_timeout=None)
    monkeypatch.setattr(report.papermill, "execute_notebook", patient)  # or nbclient would end the cell after 4 s
    notebook(
        "import os, signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "with open(run_dir + '/kernel', 'w') as file: file.write(str(os.getpid()))\n"
        "open(run_dir + '/asleep', 'w').close()\ntime.sleep(60)"
    )
    train_interrupted(run, times=times)
    assert run.record("train")["why"].startswith("its notebook did not run to the end: train: interrupted")
    kernel = int((run.path / "kernel").read_text())
    _, alive = psutil.wait_procs([psutil.Process(kernel)] if psutil.pid_exists(kernel) else [], timeout=5)
    assert not alive


def test_a_stage_that_was_complete_before_stays_so_when_a_later_notebook_fails(notebook, tmp_path):
    shutil.copytree(reference_run().path, tmp_path / "r")
    before = (tmp_path / "r/run.json").read_bytes()
    notebook("1", done="raise ValueError('no')")
    with pytest.raises(NotebookError, match="ValueError: no"):
        run_stage("train", tmp_path / "r", {})
    assert (tmp_path / "r/run.json").read_bytes() == before


def test_a_report_whose_notebook_fails_leaves_the_old_report_as_it_is(notebook, tmp_path):
    old = {tmp_path / f"report.{suffix}": THE_ONE_BEFORE.encode() for suffix in ("html", "pdf", "ipynb")}
    for file, content in old.items():
        file.write_bytes(content)
    left = tmp_path / ".transformnet-report.pdf.x.part"  # by a killed export
    left.write_bytes(b"half")
    notebook("raise ValueError('no figure')", name="report", done="1", parameter="runs")
    with pytest.raises(NotebookError, match="report: ValueError: no figure"):
        make_report([reference_run().path], tmp_path, title=None, author=None)
    assert not left.exists()
    assert {file: file.read_bytes() for file in old} == old


def test_a_full_disk_leaves_page_and_pdf_both_old(tmp_path, monkeypatch):
    notebook = tmp_path / "report.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title")]), notebook)
    old = [file.read_bytes() for file in export(notebook, tmp_path)]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Another")]), notebook)
    fsync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch, pytest.raises(ExportError, match=r"report\.pdf cannot be written"):
        patch.setattr(os, "fsync", full)
        export(notebook, tmp_path)
    assert [(tmp_path / f"report.{suffix}").read_bytes() for suffix in ("html", "pdf")] == old
    assert len(list(tmp_path.iterdir())) == 3
    assert [file.read_bytes() for file in export(notebook, tmp_path)] != old


# Places that are not a command's own, or look like something else


@pytest.mark.parametrize("force", [False, True])
def test_somebodys_own_notebook_is_neither_replaced_nor_removed(notebook, tmp_path, force):
    notebook("1")
    folder = tmp_path / "notebooks"
    before = (folder / "train.ipynb").read_bytes()
    with pytest.raises(NotebookError, match=r"train\.ipynb: not executed by a command, so not replaced"):
        run_stage("train", folder, {"force": force})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"train.ipynb": before}
    (folder / "report.ipynb").write_bytes(before)
    with pytest.raises(NotebookError, match=r"report\.ipynb: not executed by a command"):
        make_report([reference_run().path], folder, title=None, author=None)
    assert (folder / "report.ipynb").read_bytes() == before


def test_somebodys_own_notebook_is_refused_before_the_runs_of_a_report_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "run_stage", lambda *arguments: pytest.fail("a stage was begun"))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/benchmark.ipynb").write_text("{}")
    sweep = {"batch_sizes": [16], "small_batch_sizes": [], "num_workers": [0], "repeats": 1}
    with pytest.raises(NotebookError, match=r"cpu/benchmark\.ipynb: not executed by a command"):
        make_runs(["cpu"], tmp_path, train=TRAIN, benchmark=sweep, force=False)
    (tmp_path / "report.ipynb").write_text("{}")
    with pytest.raises(NotebookError, match=r"report\.ipynb: not executed by a command"):
        cli.report(device=["cpu"], data="photos", runs_dir=tmp_path / "runs", out=tmp_path)


@pytest.mark.parametrize("name", ["-r", "{run_dir}", "http:"])
def test_a_run_may_have_a_name_that_papermill_would_take_for_something_else(notebook, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    notebook("1")
    run_stage("train", Path(name), {})
    check_executed(Path(name, "train.ipynb"))
    assert [path.name for path in Path(name).glob("*.ipynb")] == ["train.ipynb"]


# Commands that make all anew


def test_a_forced_command_that_was_stopped_forces_only_what_it_had_not_yet_made(tmp_path, monkeypatch):
    given, records, number = [], {}, itertools.count(1)

    def stage(name, run_dir, parameters):
        given.append((run_dir.name, name, parameters["force"]))
        if parameters["force"]:
            if len(given) == stopped_at:
                raise Interrupted("stopped")
            records[run_dir.name, name] = {"results": next(number)}

    monkeypatch.setattr(report, "run_stage", stage)
    monkeypatch.setattr(Run, "record", lambda run, name: records.get((run.label, name)))
    options = {
        "train": {"data": "photos", "limit": 300},
        "benchmark": {"batch_sizes": [16], "small_batch_sizes": [], "num_workers": [0], "repeats": 1},
    }
    make = functools.partial(make_runs, ["cpu"], tmp_path, **options)
    todo = [("cpu", "train"), ("cpu", "compare"), ("cpu", "benchmark"), ("cpu-precise", "train")]
    todo.append(("cpu-precise", "compare"))
    for label, name in todo[1:]:
        records[label, name] = {"results": 0}
    stopped_at = 5
    with pytest.raises(Interrupted):
        make(force=True)
    assert given == [(*stage, True) for stage in todo]
    stopped_at = None
    given.clear()
    make(force=True)  # the same command again
    assert given == [(*stage, stage == todo[-1]) for stage in todo]
    given.clear()
    make(force=True, presets=["paper"])  # another
    assert given == [(*stage, True) for stage in todo[:3]]
    given.clear()
    make(force=True, presets=["paper"])  # whose report did not come about
    assert given == [(*stage, False) for stage in todo[:3]]
    given.clear()
    with monkeypatch.context() as patch:
        patch.setattr(report, "git_commit", lambda: "another")
        make(force=True, presets=["paper"])  # by other code
    assert given == [(*stage, True) for stage in todo[:3]]
    given.clear()
    forced_done(tmp_path)
    make(force=True, presets=["paper"])  # it had ended, so this is a new one
    assert given == [(*stage, True) for stage in todo[:3]]


def test_a_forced_command_that_was_killed_as_a_stage_took_the_olds_place_does_not_make_it_again(
    run, tmp_path, monkeypatch
):
    made = Run(tmp_path / "cpu")
    shutil.copytree(run.path, made.path)
    given = []

    def stage(name, run_dir, parameters):
        given.append((name, parameters["force"]))
        if name == "compare" and len(given) == 2:
            anew = Run(made.path / ".compare.anew")
            shutil.copytree(run.path, anew.path)
            info = anew.info
            info["stages"]["compare"]["started"] = runs.now()
            anew._write_info(info)
            raise SystemExit

    monkeypatch.setattr(report, "run_stage", stage)
    sweep = {"batch_sizes": [16], "small_batch_sizes": [], "num_workers": [0], "repeats": 1}
    for ended in (pytest.raises(SystemExit), contextlib.nullcontext()):
        with ended:
            make_runs(["cpu"], tmp_path, presets=["paper"], train=TRAIN, benchmark=sweep, force=True)
    assert given == [("train", True), ("compare", True), ("train", True), ("compare", False), ("benchmark", True)]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "[" * 100_000,
        None,
        '{"request": [1], "before": 3}',
        '{"request": [1], "before": []}',
        '{"before": [{}]}',
    ],
)
def test_a_note_of_a_forced_command_that_cannot_be_read_is_none(tmp_path, content):
    note = tmp_path / report.FORCED
    os.mkfifo(note) if content is None else note.write_text(content)
    assert forced_over(tmp_path, [1], [None]) == [None]


def test_a_stage_is_complete_only_when_its_notebook_has_ended(run, tmp_path, monkeypatch):
    stopped = Run(tmp_path / "r")
    stopped.path.mkdir()
    runs._copy_training(run, stopped)

    def killed(path):
        raise SystemExit  # as a second Ctrl-C, or a kill: nobody marks anything

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(report, "check_executed", killed)
        run_stage("compare", stopped.path, {})
    assert stopped.record("compare")["status"] == "done" and not (stopped.path / "compare.ipynb").exists()
    with pytest.raises(RunError, match=r"compare is not complete \(its notebook did not run to the end\)"):
        make_report([stopped.path], tmp_path / "out", title=None, author=None)
    began = stopped.record("compare")["started"], (stopped.path / "examples.npz").stat().st_mtime_ns
    run_stage("compare", stopped.path, {})
    assert (stopped.record("compare")["started"], (stopped.path / "examples.npz").stat().st_mtime_ns) == began
    stopped.require("compare")
    assert (stopped.path / "compare.ipynb").exists()


def test_a_forced_training_whose_notebook_fails_loses_nothing(run, tmp_path, monkeypatch):
    shutil.copytree(run.path, tmp_path / "r")
    forced, old = Run(tmp_path / "r"), run.record("train")
    asked = {name: old["parameters"][name] for name in ("preset", "epochs")} | TRAIN | {"seed": 5, "force": True}
    asked["limit"] = run.stage_info("train")["images"]["request"]["limit"]
    before = {path: path.read_bytes() for path in forced.path.rglob("*") if path.is_file()}

    def failing(path):
        raise NotebookError("the last cell failed")

    with monkeypatch.context() as patch, pytest.raises(NotebookError, match="the last cell failed"):
        patch.setattr(report, "check_executed", failing)
        run_stage("train", forced.path, asked)
    assert {path: path.read_bytes() for path in before} == before
    run_stage("train", forced.path, asked)
    assert forced.record("train")["parameters"]["seed"] == 5
    check_executed(forced.path / "train.ipynb")
    assert not forced.has("compare") and not list(forced.path.glob(".train*"))


def test_a_forced_command_that_is_killed_before_it_marks_its_stage_leaves_old_results_and_notebook(
    run, tmp_path, monkeypatch
):
    shutil.copytree(run.path, tmp_path / "r")
    forced = Run(tmp_path / "r")
    (forced.path / "compare.ipynb").write_text(THE_ONE_BEFORE)
    before = {path: path.read_bytes() for path in forced.path.rglob("*") if path.is_file()}

    def killed(run, name, *, forced):
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Run, "end", killed)
        run_stage("compare", forced.path, {"indices": [5], "force": True})
    assert {path: path.read_bytes() for path in before} == before
    run_stage("compare", forced.path, {"indices": [5], "force": True})
    assert forced.stage_info("compare")["parameters"]["indices"] == [5]
    check_executed(forced.path / "compare.ipynb")
    assert {path.name for path in forced.path.glob(".*")} == {".lock", ".command.lock"}


@pytest.mark.parametrize("killed_at", [".compare.anew", ".compare.ready"])
def test_a_report_refuses_a_run_whose_forced_stage_is_yet_to_take_its_place(run, tmp_path, killed_at):
    shutil.copytree(run.path, tmp_path / "r")
    stopped = Run(tmp_path / "r")
    anew = tmp_path / "r" / killed_at
    anew.mkdir()
    runs._copy_training(run, Run(anew))
    info = stopped.info
    Run(anew)._write_info(info)
    shutil.copy(stopped.path / "examples.npz", anew)
    info["stages"].pop("compare")
    stopped._write_info(info)  # so that nothing says that it had been there
    with pytest.raises(RunError, match="stage compare was made anew, and stopped before it took the old one's place"):
        make_report([stopped.path, run.path], tmp_path / "out", title=None, author=None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("killed_at", [".train.anew", ".train.ready"])
def test_a_stage_is_made_on_a_training_that_is_yet_to_take_the_olds_place(run, tmp_path, killed_at):
    stopped, anew = Run(tmp_path / "r"), Run(tmp_path / "r" / killed_at)
    anew.path.mkdir(parents=True)
    runs._copy_training(run, anew)
    stopped._write_info(runs._empty_info())  # the old training is dropped first
    with pytest.raises(RunError, match="stage train was made anew, and stopped before it took the old one's place"):
        stopped.weights()
    run_stage("compare", stopped.path, {})
    assert stopped.has("compare") and stopped.record("train") == run.record("train")
    assert not list(stopped.path.glob(".train.*"))


@pytest.mark.parametrize("then", ["", "raise ValueError('max() arg is an empty sequence')"], ids=["goes on", "fails"])
def test_a_run_that_changes_while_the_report_is_made_of_it_is_refused(notebook, tmp_path, then):
    shutil.copytree(reference_run().path, tmp_path / "r")
    (tmp_path / "out").mkdir()
    for name in ("ipynb", "html"):
        (tmp_path / f"out/report.{name}").write_text(THE_ONE_BEFORE)
    changed = f"""
from pathlib import Path
record = Path({str(tmp_path / "r/run.json")!r})
record.write_text(record.read_text().replace('"finished": "2', '"finished": "3'))
{then}"""
    notebook("1", name="report", done=changed, parameter="runs")
    with pytest.raises(RunError, match="r: changed while the report was made of it; give the same command again"):
        make_report([tmp_path / "r"], tmp_path / "out", title=None, author=None)
    for name in ("ipynb", "html"):
        assert (tmp_path / f"out/report.{name}").read_text() == THE_ONE_BEFORE


def test_a_forced_command_that_failed_makes_all_anew_when_it_is_given_again(tmp_path, monkeypatch):
    given, records, failing = [], {}, True

    def stage(name, run_dir, parameters):
        given.append((name, parameters["force"]))
        records[name] = {"results": len(given)}
        if failing and name == "compare":
            raise NotebookError("other images")

    monkeypatch.setattr(report, "run_stage", stage)
    monkeypatch.setattr(Run, "record", lambda run, name: records.get(name))
    sweep = {"batch_sizes": [16], "small_batch_sizes": [], "num_workers": [0], "repeats": 1}
    make = functools.partial(make_runs, ["cpu"], tmp_path, presets=["paper"], train=TRAIN, benchmark=sweep, force=True)
    with pytest.raises(NotebookError):
        make()
    assert not (tmp_path / report.FORCED).exists()
    failing = False
    make()
    assert given[2:] == [("train", True), ("compare", True), ("benchmark", True)]
