"""Faults at random moments: every command is killed, terminated and interrupted again and again, and must lose nothing.

`make soak` runs all of it, some minutes: `python tests/soak.py --faults 36 --seed 7`. A few faults are among
the slow tests (test_faults.py). After each fault all files of the run must be whole and hold what they held; the same
command must then finish the work, with nothing measured again that was saved, no complete stage touched, and all
numbers that are no times equal to those of commands that nothing disturbed.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
from PIL import Image

from transformnet_lib import CustomDataset, read_run
from transformnet_lib.benchmarking import SETTING_COLUMNS
from transformnet_lib.measure import ROUND_COLUMNS
from transformnet_lib.records import read_table, read_tensors
from transformnet_lib.report import check_executed
from transformnet_lib.run import LIBRARY_TABLES, SIZE_TABLES
from transformnet_lib.seeds import SEED_COLUMNS
from transformnet_lib.stage_folder import STAGES, is_complete
from transformnet_lib.training import HISTORY_COLUMNS

RUN = "r"  # the run directory, in the folder where the commands are given
COMMANDS = {  # in the order in which they build on each other
    "train": "train --run-dir r --device cpu --data folder:images --batch-size 4",
    "compare": "compare --run-dir r",
    "benchmark": "benchmark --run-dir r --device cpu --batch-size 64 --seconds 0",
    "seeds": "seeds --run-dir r --seeds 3",
    "study": "study --run-dir r --size 500",
    "report": "report --run r --out out",  # until its notebook is executed
    "export": "report --run r --out out",  # after that
}
STATUS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
KERNEL_SECONDS = 3  # by when a killed command's kernel must have ended; the next command waits that long for the lock

TABLES = {
    "history.csv": HISTORY_COLUMNS,
    "rounds.csv": {"part": "str", **ROUND_COLUMNS},
    "settings.csv": SETTING_COLUMNS,
    "seeds.csv": SEED_COLUMNS,
    **LIBRARY_TABLES,
    **SIZE_TABLES,
}
CLOCKS = {"rounds.csv", "settings.csv", "library_rounds.csv", "size_rounds.csv"}  # which settings are in them too
TIMES = {"epoch_seconds", "seconds", "setup_seconds", "peak_mib"}  # columns of the others


def make_images(folder: Path, count: int = 600) -> None:
    """A small image folder, `images`, so that no command loses its time on making thousands."""
    for split, train in (("train", True), ("test", False)):
        (folder / "images" / split / "all").mkdir(parents=True)
        pictures = CustomDataset(data="photos", train=train, limit=count, cache=False).images.permute(0, 2, 3, 1)
        for i, picture in enumerate(pictures.numpy()):
            Image.fromarray(picture).save(folder / "images" / split / "all" / f"{i}.png")


def saved_rows(run_dir: Path) -> dict[str, pd.DataFrame]:
    """All rows that a run has saved so far, of unfinished stages too."""
    rows = {}
    for name, columns in TABLES.items():
        for file in run_dir.glob(f"*/{name}"):
            rows[name] = read_table(file, columns)
    for file in run_dir.glob("*/checkpoint.safetensors"):
        rows["checkpoint"] = pd.DataFrame(read_tensors(file)["history"], columns=list(HISTORY_COLUMNS))
    return rows


def facts(folder: Path) -> dict:
    """What a run, and a report of it, say in numbers that are no times."""
    run = read_run(folder / RUN)
    rows = {name: rows for name, rows in saved_rows(run.path).items() if name not in CLOCKS}
    found = {name: each.drop(columns=TIMES, errors="ignore").to_csv() for name, each in rows.items()}
    found |= {name: (stage.parameters, stage.images.fingerprint) for name, stage in run.stages.items()}
    found |= {"weights": run.train.weights, "best": run.train.best_epoch}
    if run.compare:
        found["examples"] = {name: array.tolist() for name, array in run.compare.examples.items()}
        found["errors"] = run.compare.test_mse, run.compare.max_error
    if (folder / "out/report.json").exists():
        reported = json.loads((folder / "out/report.json").read_text())["runs"][RUN]
        found["report"] = _without_times({part: reported[part] for part in ("train", "least_squares", "compare")})
    return found


def _without_times(found):
    if isinstance(found, list):
        return [_without_times(value) for value in found]
    if isinstance(found, dict):
        return {name: _without_times(value) for name, value in found.items() if name not in TIMES}
    return found


def kernels_of(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def heed_signals() -> None:
    """Have the commands we start take signals as a terminal's do, though nohup or a shell's `&` has us ignore some.

    Who ignores a signal bequeaths that; a handler that does nothing is not bequeathed.
    """
    for number in STATUS.keys() - {signal.SIGKILL}:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number is signal.SIGINT else lambda *_: None)


def start(folder: Path, arguments: str) -> subprocess.Popen:
    """Give a `transformnet` command, in a process group of its own, as a terminal gives it."""
    program = Path(sys.executable).parent / "transformnet"
    return subprocess.Popen(
        [program, *arguments.split()], cwd=folder, text=True, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(folder: Path, arguments: str) -> None:
    """Give a command and let it finish."""
    process = start(folder, arguments)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, f"{arguments}: status {process.returncode}: {said[-2000:]}"


def strike(process: subprocess.Popen, number: signal.Signals) -> tuple[int, str]:
    """Send a signal; the command's status and what it said. No kernel of it may be left, and all is one line."""
    kernels = kernels_of(process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(kernels, timeout=KERNEL_SECONDS)
    assert not alive, f"{alive} still there {KERNEL_SECONDS} s after the command"
    if process.returncode == STATUS[number] and number != signal.SIGKILL:
        assert "Traceback" not in said, said
        assert "interrupted" in said.replace("\r", "\n").splitlines()[-1], said
    return process.returncode, said


class Change:
    """Whether a file has been written since now."""

    def __init__(self, file: Path):
        self.file = file
        self.old = self._modified()

    def seen(self) -> bool:
        return self._modified() not in (self.old, None)

    def _modified(self) -> int | None:
        with suppress(FileNotFoundError):
            return self.file.stat().st_mtime_ns


class Soak:
    """A folder in which commands are disturbed, beside one, `calm`, in which the same commands were left alone."""

    def __init__(self, folder: Path, calm: Path, *, seed: int):
        self.folder, self.calm, self.random = folder, calm, random.Random(seed)
        self.signals = itertools.cycle(self.random.sample(list(STATUS), len(STATUS)))
        self.signal = next(self.signals)  # the next one; the same again until it has hit
        self.faults: Counter[str] = Counter()
        self.rows: dict[str, pd.DataFrame] = {}  # saved before the last fault
        self.lost = 0

    def disturb(self, name: str, count: int, *, duration: float | None, work: float) -> None:
        """Give the command and disturb it until `count` faults have hit; then let it finish, and compare.

        A fault hits at any moment of the command's `duration`, or, each other time and where that is None, of the
        seconds that its own `work` takes. A command that gets done before is given again from the start.
        """
        before = self.folder.with_name(f"before-{name}")
        shutil.copytree(self.folder, before)
        while self.faults[name] < count:
            anywhere = duration is not None and self.faults[name] % 2 == 0
            if self.hit(name, self.random.uniform(0, duration if anywhere else work), at_work=not anywhere):
                self.faults[name] += 1
                self.check(name)
            else:
                self.compare(name)
                shutil.rmtree(self.folder)
                shutil.copytree(before, self.folder)
                self.rows = {}
        finish(self.folder, COMMANDS[name])
        self.check(name)
        self.compare(name)
        shutil.rmtree(before)

    def hit(self, name: str, moment: float, *, at_work: bool) -> bool:
        """Give a command and send it a signal after `moment` seconds (of its work); whether it was still at it."""
        run, out = self.folder / RUN, self.folder / "out"
        first = {"report": out / "report.failed.ipynb", "export": out / "report.ipynb"}
        begun = Change(first.get(name, run / name / "parameters.json"))
        over = Change(out / "report.json" if name in first else run / name / f"{name}.ipynb")
        complete = self.complete()
        process = start(self.folder, COMMANDS[name])
        while at_work and process.poll() is None and not begun.seen():
            time.sleep(0.005)
        with suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        working, late = begun.seen(), over.seen()
        status, said = strike(process, self.signal)
        if status == 0:
            return False
        if late:  # all was done, and only Python's end was disturbed
            finish(self.folder, COMMANDS[name])
            return False
        label = f"{self.signal.name} at {moment:.2f} s of {name}{' at work' * at_work}"
        print(f"{label}: status {status}", flush=True)
        # Only while Python starts and ends, a signal ends it as it ends any program
        expected = {STATUS[self.signal]} | (set() if working and not over.seen() else {-self.signal})
        assert status in expected, f"{label}: {status}: {said}"
        self.signal = next(self.signals)
        assert complete.items() <= self.complete().items(), f"{label}: a complete stage was touched"
        return True

    def complete(self) -> dict[str, bytes]:
        """The complete stages, with their records."""
        folders = [self.folder / RUN / name for name in STAGES]
        return {folder.name: (folder / "parameters.json").read_bytes() for folder in folders if is_complete(folder)}

    def check(self, name: str) -> None:
        """All that lies in the run is whole; saved rows that are gone or no longer the same count as lost."""
        calm, now = saved_rows(self.calm / RUN), saved_rows(self.folder / RUN)
        for table, rows in ((table, rows) for table, rows in now.items() if table not in CLOCKS):
            same, expected = (each.drop(columns=TIMES, errors="ignore") for each in (rows, calm[table]))
            assert same.equals(expected.head(len(same))), f"{name}: {table} differs from the undisturbed one"
        for table, rows in self.rows.items():
            self.lost += 0 if table in now and rows.equals(now[table].head(len(rows))) else len(rows)
        self.rows = now
        for notebook in self.folder.rglob("*.ipynb"):
            if not notebook.stem.endswith(".failed"):
                check_executed(notebook)

    def compare(self, name: str) -> None:
        """What the command made is what it makes when nothing disturbs it."""
        calm, mine = facts(self.calm), facts(self.folder)
        for part, found in mine.items():
            assert found == calm[part], f"{name}: {part} differs from the undisturbed one"
        assert name in ("report", "export") or name in mine
        left = [path for path in self.folder.rglob("*") if path.suffix in (".part", ".new", ".old")]
        assert not left + list(self.folder.rglob("*.failed.ipynb")), f"{name}: {left}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=36, help="how many, shared among the commands [36]")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments and signals [the time]")
    options = parser.parse_args(arguments)
    print(f"seed {options.seed}", flush=True)
    heed_signals()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        folder, calm = Path(scratch) / "disturbed", Path(scratch) / "calm"
        for place in (folder, calm):
            make_images(place)
        soak, durations = Soak(folder, calm, seed=options.seed), {}
        for name in list(COMMANDS)[:-1]:
            begun = time.time()
            finish(calm, COMMANDS[name])
            durations[name] = time.time() - begun
        works = {name: stage.seconds for name, stage in read_run(calm / RUN).stages.items()}
        works["report"] = (calm / "out/report.ipynb").stat().st_mtime - begun
        durations["export"], works["export"] = durations["report"], durations["report"] - works["report"]
        for i, name in enumerate(COMMANDS):
            count = options.faults // len(COMMANDS) + (i < options.faults % len(COMMANDS))
            soak.disturb(name, count, duration=durations[name], work=works[name])
        finish(folder, "report --run r --out again")
        pages = [(folder / out / "report.html").read_bytes() for out in ("out", "again")]
        assert pages[0] == pages[1], "the page differs from one that nothing disturbed"
    hit = ", ".join(f"{name} {count}" for name, count in soak.faults.items())
    print(f"{soak.faults.total()} faults injected ({hit}), {soak.lost} results lost")
    sys.exit(1 if soak.lost else 0)


if __name__ == "__main__":
    main()
