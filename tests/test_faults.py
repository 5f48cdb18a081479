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
from collections.abc import Callable, Iterator
from pathlib import Path

import jupyter_client
import nbformat
import papermill
import psutil
import pytest
import soak
from handmade import Killed, content, do
from soak import COMMANDS, RUN, STATUS, Change, Soak, make_images

from transformnet_lib import CustomDataset, TrainConfig, cli, files, read_run, report, stage_writer, train_stage
from transformnet_lib.errors import Interrupted, NotebookError, RunError, TransformnetError
from transformnet_lib.export import ExportError
from transformnet_lib.files import locked
from transformnet_lib.report import check_executed, export, make_report, make_runs, run_stage
from transformnet_lib.run import reference_run
from transformnet_lib.stage_folder import is_complete, is_marked

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits are POSIX")
THE_ONE_BEFORE = '{"metadata": {"papermill": {"parameters": {}}}}'  # a notebook that papermill executed
TRAIN = {"device": "cpu", "data": "photos", "limit": 300}
SWEEP = {"batch_sizes": [16], "small_batch_sizes": [], "num_workers": [0], "seconds": 0.0}


@pytest.fixture(scope="module")
def images() -> CustomDataset:
    return CustomDataset(data="photos", train=True, limit=20)


# Real commands, real signals


@posix
@pytest.mark.slow
def test_faults_at_random_moments_of_a_training_lose_nothing(tmp_path):
    calm, folder = tmp_path / "calm", tmp_path / "disturbed"
    for place in (calm, folder):
        make_images(place)
    images = CustomDataset(data=f"folder:{calm / 'images'}", train=True)
    work = train_stage(calm / RUN, images, TrainConfig(device="cpu", batch_size=4)).train.seconds
    mine = Soak(folder, calm, seed=0)
    mine.disturb("train", 2, duration=None, work=work)
    assert (mine.faults.total(), mine.lost) == (2, 0)


DISTURBED = {  # a command; what shows that it is at work, and that its work is done
    "benchmark": (COMMANDS["benchmark"], "r/benchmark/rounds.csv", "r/benchmark/stage.json"),
    "report": ("report --run r --out out", "out/report.failed.ipynb", "out/report.ipynb"),
    "train again": (f"{COMMANDS['train']} --force", "r/train.new/parameters.json", "r/train/stage.json"),
}
CHOSEN = [  # all commands, some moments and signals together; `make soak` draws the pairs at random
    ("benchmark", "work", signal.SIGKILL), ("report", "end", signal.SIGINT), ("train again", "work", signal.SIGKILL),
]  # fmt: skip


@posix
@pytest.mark.slow
@pytest.mark.parametrize(("name", "moment", "number"), CHOSEN)
def test_a_disturbed_command_is_completed_by_the_same_command(name, moment, number, run, tmp_path):
    make_images(tmp_path, 60)
    arguments, working, done = DISTURBED[name]
    shutil.copytree(run.path, tmp_path / "r")
    if name == "benchmark":
        shutil.rmtree(tmp_path / "r/benchmark")
    change = Change(tmp_path / (working if moment == "work" else done))
    process, until = soak.start(tmp_path, arguments), time.monotonic() + 300
    while process.poll() is None and time.monotonic() < until and not change.seen():
        time.sleep(0.005)
    status, said = soak.strike(process, number)
    assert status in {STATUS[number]} | ({0, -number} if moment != "work" else set()), said
    assert is_complete(tmp_path / "r/train")  # the old one, until the new one is whole
    soak.finish(tmp_path, arguments)
    if name == "report":
        check_executed(tmp_path / "out/report.ipynb")
    made = read_run(tmp_path / "r")
    if name == "train again":
        assert made.train.training != run.train.training
        assert set(made.unfinished.values()) == {"made with an earlier training"}
        check_executed(tmp_path / "r/train/train.ipynb")
    else:
        assert not made.unfinished
    left = [path for path in tmp_path.rglob("*") if path.suffix in (".part", ".new", ".old")]
    assert not left + list(tmp_path.rglob("*.failed.ipynb"))


@posix
@pytest.mark.slow
def test_a_killed_kernel_is_one_line_and_the_same_command_is_completed(tmp_path):
    make_images(tmp_path, 200)
    process = start(tmp_path, COMMANDS["train"], until="r/train/checkpoint.safetensors")
    kernel = next(child for child in soak.kernels_of(process) if "ipykernel" in " ".join(child.cmdline()))
    kernel.send_signal(signal.SIGKILL)
    assert "train: the kernel died (out of memory, or killed); see r/train.failed.ipynb" in refused(process)
    soak.finish(tmp_path, COMMANDS["train"])
    assert read_run(tmp_path / "r").train.sittings == 2 and not (tmp_path / "r/train.failed.ipynb").exists()


# Commands in trouble


def start(folder: Path, arguments: str, before: Callable | None = None, *, until: str = "") -> subprocess.Popen:
    """Give a command, which calls `before` first, and wait until a file is there."""
    program = Path(sys.executable).parent / "transformnet"
    process = subprocess.Popen(
        [program, *arguments.split()], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=before,
    )  # fmt: skip
    while until and not (folder / until).exists():
        assert process.poll() is None
        time.sleep(0.01)
    return process


def refused(process: subprocess.Popen) -> str:
    """The one line with which a command ended that failed."""
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert "Traceback" not in said
    last = said.replace("\r", "\n").strip().splitlines()[-1].strip()
    assert last.startswith("error: ")
    return last


@posix
@pytest.mark.slow
def test_a_run_folder_that_vanishes_is_one_line(tmp_path):
    make_images(tmp_path, 200)
    process = start(tmp_path, COMMANDS["train"], until="r/train/checkpoint.safetensors")
    (tmp_path / "r").rename(tmp_path / "elsewhere")
    assert "r/train.failed.ipynb: cannot be written (output folder ./r doesn't exist.)" in refused(process)
    assert not (tmp_path / "r").exists() and (tmp_path / "elsewhere/train/checkpoint.safetensors").exists()


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
@pytest.mark.slow
@pytest.mark.parametrize("sign", ["train.failed.ipynb", "train/checkpoint.safetensors"], ids=["starting", "at work"])
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
    while not (tmp_path / "r" / sign).exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.close(master)  # which sends SIGHUP, and makes every write to the terminal fail
    assert process.wait(60) == 129


@pytest.mark.slow
def test_a_command_whose_messages_nobody_reads_any_more_ends(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "r")
    process = start(tmp_path, "compare --run-dir r --force")
    process.stderr.close()  # as `2>&1 | head` does
    try:
        assert process.wait(60) == 1
    finally:
        process.kill()


@posix
@pytest.mark.slow
def test_a_kernel_whose_command_is_gone_before_it_has_started_ends(tmp_path):
    code = "import json, os; from transformnet_lib.report import kernel_arguments as arguments\n"
    code += "print(json.dumps([os.getpid(), arguments()]))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    command, arguments = json.loads(said)
    launcher = [sys.executable, "-m", "ipykernel_launcher", "-f", tmp_path / "connection.json", *arguments]
    with subprocess.Popen(launcher, env=os.environ | {"JPY_PARENT_PID": str(command)}) as kernel:
        try:
            assert kernel.wait(30) == 1
        finally:
            kernel.kill()


@posix
@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["a full disk", "a folder that may only be read"])
def test_a_folder_that_cannot_be_written_is_one_line_and_stays_as_it_is(trouble, run, tmp_path):
    path = shutil.copytree(run.path, tmp_path / "r")
    before = content(path)

    def little_space():
        resource.setrlimit(resource.RLIMIT_FSIZE, (7000, 7000))  # bytes a file: parameters.json fits, examples do not

    def as_others():  # root may write everywhere, unless it gives up that capability: man capabilities, man prctl
        if sys.platform == "linux":
            pr_capbset_drop, cap_dac_override = 24, 1
            ctypes.CDLL(None).prctl(pr_capbset_drop, cap_dac_override, 0, 0, 0)

    full = trouble == "a full disk"
    path.chmod(0o755 if full else 0o555)
    try:
        line = refused(start(tmp_path, "compare --run-dir r --index 7 --force", little_space if full else as_others))
    finally:
        path.chmod(0o755)
    said = "cannot be written (File too large)" if full else "r/compare.failed.ipynb: cannot be written (Permission d"
    assert said in line
    assert before.items() <= content(path).items() and list(read_run(path).stages) == ["train", "compare", "benchmark"]


def test_a_folder_in_which_a_report_is_made_is_refused_to_another(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    with locked(tmp_path / "r"), pytest.raises(RunError, match="r: in use by another command"):
        make_report([reference_run()], tmp_path / "r", title=None, author=None)
    assert not content(tmp_path / "r")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *[("train", TRAIN | wrong) for wrong in ({"device": "tpu"}, {"data": "folder:no"}, {"lr": -1}, {"limit": 0})],
        ("compare", {}),
        ("benchmark", SWEEP | {"batch_sizes": [0]}),
    ],
)
def test_what_is_refused_by_its_parameters_leaves_no_folder(tmp_path, name, parameters):
    with pytest.raises(TransformnetError):
        run_stage(name, tmp_path / "r", parameters)
    assert not (tmp_path / "r").exists()


# Notebooks that fail, or that somebody else wrote


@pytest.fixture
def notebook(tmp_path, monkeypatch) -> Iterator[Callable]:
    """Gives a function that puts a notebook in place of `train`'s: it leaves a complete stage, then runs a cell."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(report, "NOTEBOOKS", folder)
    monkeypatch.setattr(report, "check_stage", lambda name, parameters: None)
    execute = functools.partial(papermill.execute_notebook, execution_timeout=4)
    monkeypatch.setattr(report.papermill, "execute_notebook", execute)
    copied = (
        f"import shutil; shutil.copytree({str(reference_run() / 'train')!r}, run_dir + '/train', dirs_exist_ok=True)"
    )

    def put(then: str, *, name: str = "train", done: str = copied, parameter: str = "run_dir"):
        cells = [nbformat.v4.new_code_cell(source) for source in (f"{parameter} = ''\nforce = False", done, then, "1")]
        cells[0].metadata["tags"] = ["parameters"]
        metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), folder / f"{name}.ipynb")

    return put


AFTER_THE_STAGE = {
    "an error": ("raise ValueError('no figure')", "train: ValueError: no figure (see"),
    "an exit": ("import sys; sys.exit(0)", "code cell 4 of 5 failed"),
    "a quiet exit": ("get_ipython().kernel.do_shutdown(False); import os; os._exit(0)", "the kernel died"),
    "a kill": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "the kernel died"),
    "a timeout": ("import time; time.sleep(60)", "timed out"),
}


@pytest.mark.parametrize(
    ("then", "message"),
    [pytest.param(*AFTER_THE_STAGE[name], id=name, marks=[] if name in ("an error", "a kill") else pytest.mark.slow)
     for name in AFTER_THE_STAGE],
)  # fmt: skip
def test_a_notebook_that_fails_after_its_stage_is_executed_again_and_the_stage_is_not(
    notebook, tmp_path, then, message
):
    path = tmp_path / "r"
    (path / "train").mkdir(parents=True)
    shutil.copy(reference_run() / "train/parameters.json", path / "train")
    (path / "train/train.ipynb").write_text(THE_ONE_BEFORE)
    (path / "train/parameters.json").touch()  # else the folder would not be a run's
    notebook(then)
    with pytest.raises(NotebookError) as caught:
        run_stage("train", path, {})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert is_complete(path / "train") and (path / "train/train.ipynb").read_text() == THE_ONE_BEFORE
    assert "run_dir" in (path / "train.failed.ipynb").read_text()
    notebook("1", done="")
    assert run_stage("train", path, {})
    check_executed(path / "train/train.ipynb")
    assert not (path / "train.failed.ipynb").exists() and not run_stage("train", path, {})


def test_a_notebook_is_executed_again_only_if_it_is_missing_or_of_other_parameters(notebook, tmp_path):
    path = tmp_path / "r"
    notebook("1")
    assert run_stage("train", path, {}) and not run_stage("train", path, {})
    assert run_stage("train", path, {"force": True}) and not run_stage("train", path, {"force": False})
    (path / "train/train.ipynb").unlink()
    assert run_stage("train", path, {}) and not run_stage("train", path, {})
    (path / "train/train.ipynb").rename(tmp_path / "executed.ipynb")
    nbformat.write(nbformat.v4.new_notebook(), path / "train/train.ipynb")  # somebody's, who looked for a place
    with pytest.raises(NotebookError, match=r"train/train\.ipynb: not executed by a command, so not replaced; move it"):
        run_stage("train", path, {})
    (tmp_path / "executed.ipynb").rename(path / "train/train.ipynb")
    shutil.copytree(path, tmp_path / "moved")
    assert run_stage("train", tmp_path / "moved", {})


def test_a_stage_of_an_earlier_training_is_executed_again(notebook, images, tmp_path):
    for name in ("train", "compare"):
        do(tmp_path / "r", name, images)
    notebook("1", name="compare", done="")
    assert run_stage("compare", tmp_path / "r", {}) and not run_stage("compare", tmp_path / "r", {})
    do(tmp_path / "r", "train", images, force=True)
    assert run_stage("compare", tmp_path / "r", {})


def test_a_notebook_that_does_not_reach_the_disk_does_not_take_its_name(notebook, tmp_path, monkeypatch):
    path, fsync = tmp_path / "r", os.fsync
    notebook("1")

    def failing(handle):
        unfinished = path / "train.failed.ipynb"
        if unfinished.exists() and os.path.samestat(os.fstat(handle), unfinished.stat()):
            raise OSError(5, "Input/output error")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(NotebookError, match=r"train\.failed\.ipynb: cannot be written \(Input/output error\)"):
        run_stage("train", path, {})
    assert is_complete(path / "train") and not (path / "train/train.ipynb").exists()


def test_a_report_whose_notebook_fails_leaves_the_old_report_as_it_is(notebook, tmp_path):
    old = {tmp_path / f"report.{suffix}": THE_ONE_BEFORE.encode() for suffix in ("html", "pdf", "ipynb")}
    for file, text in old.items():
        file.write_bytes(text)
    left = tmp_path / ".transformnet-report.pdf.x.part"  # by a killed export
    left.write_bytes(b"half")
    notebook("raise ValueError('no figure')", name="report", done="1", parameter="runs")
    with pytest.raises(NotebookError, match="report: ValueError: no figure"):
        make_report([reference_run()], tmp_path, title=None, author=None)
    assert not left.exists()
    assert {file: file.read_bytes() for file in old} == old


def test_a_full_disk_leaves_page_and_pdf_both_old(tmp_path, monkeypatch):
    notebook, fsync, calls = tmp_path / "report.ipynb", os.fsync, itertools.count()
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title")]), notebook)
    old = [file.read_bytes() for file in export(notebook, tmp_path)]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Another")]), notebook)

    def full(handle):
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch, pytest.raises(ExportError, match=r"report\.pdf cannot be written"):
        patch.setattr(os, "fsync", full)
        export(notebook, tmp_path)
    assert [(tmp_path / f"report.{suffix}").read_bytes() for suffix in ("html", "pdf")] == old
    assert len(list(tmp_path.iterdir())) == 3
    assert [file.read_bytes() for file in export(notebook, tmp_path)] != old


def test_somebodys_own_report_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "report.ipynb").write_text("{}")
    monkeypatch.setattr(report, "run_stage", lambda *arguments: pytest.fail("a stage was begun"))
    for call in (
        lambda: make_report([reference_run()], tmp_path, title=None, author=None),
        lambda: cli.report(device=["cpu"], data="photos", runs_dir=tmp_path / "runs", out=tmp_path),
    ):
        with pytest.raises(NotebookError, match=r"report\.ipynb: not executed by a command, so not replaced"):
            call()
    assert content(tmp_path) == {"report.ipynb": b"{}"}


@pytest.mark.parametrize("name", ["-r", "{run_dir}", "http:"])
def test_a_run_may_have_a_name_that_papermill_would_take_for_something_else(notebook, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    notebook("1")
    run_stage("train", Path(name), {})
    check_executed(Path(name, "train/train.ipynb"))
    assert [path.name for path in Path(name).rglob("*.ipynb")] == ["train.ipynb"]


def test_a_report_refuses_a_run_with_a_stage_that_is_not_complete(tmp_path):
    path = shutil.copytree(reference_run(), tmp_path / "r")
    (path / "compare/stage.json").unlink()
    with pytest.raises(
        RunError, match=r"r: stage compare is not complete \(it was stopped.*transformnet compare --run-d"
    ):
        make_report([path, reference_run()], tmp_path / "out", title=None, author=None)
    assert not (tmp_path / "out").exists()


# Kernels that are interrupted where it is awkward


def train_interrupted(path: Path, *, times: int = 1) -> None:
    """Run the stage `train`, and press Ctrl-C so many times when the file "asleep" is in its folder."""

    def press_ctrl_c():
        while not (path / "asleep").exists():
            time.sleep(0.01)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    path.mkdir()
    presser = threading.Thread(target=press_ctrl_c)
    presser.start()
    with pytest.raises(Interrupted):
        run_stage("train", path, {})
    presser.join()


@posix
@pytest.mark.parametrize("where", ["no process yet", "no answer yet", "no thread yet"])
def test_a_kernel_is_ended_that_has_not_yet_started_when_its_command_is_interrupted(
    where, notebook, tmp_path, monkeypatch
):
    path = tmp_path / "r"
    owner, name = {
        "no process yet": (report.AsyncKernelManager, "start_kernel"),
        "no answer yet": (jupyter_client.AsyncKernelClient, "wait_for_ready"),
        "no thread yet": (threading.Thread, "start"),
    }[where]
    real = getattr(owner, name)

    async def slow(*arguments, **options):
        (path / "asleep").touch()
        await asyncio.sleep(2)
        await real(*arguments, **options)

    def interrupted(thread):
        real(thread)
        if thread.name.endswith("(thread)"):
            raise KeyboardInterrupt

    notebook("open(run_dir + '/executed', 'w').close()")
    before = psutil.Process().children()
    monkeypatch.setattr(owner, name, interrupted if where == "no thread yet" else slow)
    if where == "no thread yet":
        with pytest.raises(Interrupted):
            run_stage("train", path, {})
    else:
        train_interrupted(path)
    _, alive = psutil.wait_procs(set(psutil.Process().children()) - set(before), timeout=3)
    assert not alive and not (path / "executed").exists()


@posix
def test_an_interrupt_that_comes_between_two_cells_is_repeated(notebook, tmp_path, monkeypatch):
    interrupt, sent = report.AsyncKernelManager.interrupt_kernel, []

    async def lost_at_first(manager):
        sent.append(manager)
        if len(sent) > 1:
            await interrupt(manager)

    monkeypatch.setattr(report.AsyncKernelManager, "interrupt_kernel", lost_at_first)
    monkeypatch.setattr(report, "INTERRUPT_SECONDS", 0.5)
    notebook("import time; open(run_dir + '/asleep', 'w').close(); time.sleep(60)")
    train_interrupted(tmp_path / "r")
    assert len(sent) >= 2 and "KeyboardInterrupt" in (tmp_path / "r/train.failed.ipynb").read_text()


@posix
@pytest.mark.parametrize(("times", "seconds"), [(1, 0.3), (2, 600)], ids=["after a while", "at a second Ctrl-C"])
def test_a_kernel_that_answers_no_interrupt_is_killed(notebook, tmp_path, monkeypatch, times, seconds):
    monkeypatch.setattr(report, "INTERRUPT_SECONDS", seconds)
    patient = functools.partial(report.papermill.execute_notebook, execution_timeout=None)
    monkeypatch.setattr(report.papermill, "execute_notebook", patient)  # or nbclient would end the cell after 4 s
    notebook(
        "import os, signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "with open(run_dir + '/kernel', 'w') as file: file.write(str(os.getpid()))\n"
        "open(run_dir + '/asleep', 'w').close()\ntime.sleep(60)"
    )
    train_interrupted(tmp_path / "r", times=times)
    kernel = int((tmp_path / "r/kernel").read_text())
    _, alive = psutil.wait_procs([psutil.Process(kernel)] if psutil.pid_exists(kernel) else [], timeout=5)
    assert not alive


# report --force


@pytest.fixture
def make(images, tmp_path, monkeypatch) -> Callable:
    """Gives a function that makes the runs of a report: real folders, no kernels. It can be killed in a stage."""
    monkeypatch.setattr(stage_writer, "git_commit", lambda: "a commit")
    number = itertools.count(1)

    def call(*, killed_in: int | None = None, before: bool = False, force: bool = True) -> list[tuple[str, str, bool]]:
        """The stages that were asked for, and whether by force."""
        asked = []

        def stage(name, run_dir, parameters):
            asked.append((run_dir.name, name, "force" in parameters))
            if before and len(asked) == killed_in:
                raise Killed
            do(run_dir, name, images, weight=float(next(number)), force="force" in parameters)
            if len(asked) == killed_in:
                raise Killed

        monkeypatch.setattr(report, "run_stage", stage)
        with contextlib.suppress(Killed):
            make_runs(["cpu"], tmp_path, train=TRAIN, benchmark=SWEEP, seeds={"seeds": 1}, force=force)
        return asked

    return call


ALL = [("paper-cpu", name) for name in ("train", "compare")]
ALL += [("precise-cpu", name) for name in ("train", "compare", "benchmark", "seeds")]


@pytest.mark.parametrize("there", [0, 3, 6], ids=["nothing", "half of it", "all"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("killed_in", range(1, 7))
def test_a_stopped_force_makes_only_what_it_had_not_yet_made_again(killed_in, before, there, make, tmp_path, capsys):
    if there:
        make(force=False, killed_in=there)
    asked = make(killed_in=killed_in, before=before)
    assert asked == [(*stage, True) for stage in ALL[:killed_in]]
    left = ALL[killed_in - before :]
    again = make()
    assert again == ([(*stage, stage in left) for stage in ALL] if left else [(*stage, True) for stage in ALL])
    assert not list(tmp_path.rglob("*.new"))
    for label in ("paper-cpu", "precise-cpu"):
        assert not read_run(tmp_path / label).unfinished
    assert (f"{len(left)} of 6 stages are left" in capsys.readouterr().err) == (0 < len(left) < 6)
    assert make() == [(*stage, True) for stage in ALL]  # that one had ended


@pytest.mark.parametrize("name", ["train", "benchmark"])
def test_a_stage_that_was_begun_again_by_itself_does_not_pass_for_a_stopped_force_of_all(name, make, tmp_path):
    make(force=False)
    (tmp_path / "precise-cpu" / f"{name}.new").mkdir()
    assert make() == [(*stage, True) for stage in ALL]


def test_marks_that_were_not_all_set_are_set(make, tmp_path, monkeypatch):
    make(force=False)
    mark, marks = report.mark_for_remaking, []

    def killed(run_dir, name):
        marks.append(name)
        if len(marks) == 3:
            raise Killed
        mark(run_dir, name)

    with monkeypatch.context() as patch:
        patch.setattr(report, "mark_for_remaking", killed)
        assert make() == []
    assert is_marked(tmp_path / "paper-cpu", "compare") and not is_marked(tmp_path / "precise-cpu", "train")
    assert make() == [(*stage, True) for stage in ALL]
