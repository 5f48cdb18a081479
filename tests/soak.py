"""Faults at random moments: every command is killed, terminated and interrupted again and again, and must lose nothing.

`make soak` runs all of it, some minutes: `python tests/soak.py --faults 36 --seed 7`. A few faults are part of
`make test` (test_faults.py). After each fault all files of the run must be whole and hold what they held; the same
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

import numpy as np
import psutil
from PIL import Image

from transformnet_lib import CustomDataset, Run
from transformnet_lib.libraries import LIBRARY_COLUMNS
from transformnet_lib.report import check_executed
from transformnet_lib.seeds import SEED_COLUMNS
from transformnet_lib.sizes import SIZE_COLUMNS
from transformnet_lib.timing import BENCHMARK_COLUMNS
from transformnet_lib.training import HISTORY_COLUMNS

RUN = "r"  # the run directory, in the folder where the commands are given
COMMANDS = {  # in the order in which they build on each other
    "train": "train --run-dir r --device cpu --data folder:images --batch-size 4",
    "compare": "compare --run-dir r",
    "benchmark": "benchmark --run-dir r --device cpu --batch-size 64 --repeats 1",
    "study": "study --run-dir r --seeds 3 --size 500 --repeats 1",
    "report": "report --run r --out out",  # until its notebook is executed
    "export": "report --run r --out out",  # after that
}
STATUS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
KERNEL_SECONDS = 3  # by when a killed command's kernel must have ended; the next command waits that long for the lock

TABLES = {
    "history.csv": HISTORY_COLUMNS,
    "benchmark.csv": BENCHMARK_COLUMNS,
    "seeds.csv": SEED_COLUMNS,
    "libraries.csv": LIBRARY_COLUMNS,
    "sizes.csv": SIZE_COLUMNS,
}
TIMES = {  # the columns that hold times or follow from them, and what the machine was doing
    "epoch_seconds", "seconds", "q1", "q3", "noisy", "images_per_second", "sequential_seconds_per_image", "speedup",
    "setup_seconds", "load_average", "clock_mhz", "raw_seconds", "peak_mib",
}  # fmt: skip


def make_images(folder: Path, count: int = 600) -> None:
    """A small image folder, `images`, so that no command loses its time on making thousands."""
    for split, train in (("train", True), ("test", False)):
        (folder / "images" / split / "all").mkdir(parents=True)
        pictures = CustomDataset(data="photos", train=train, limit=count, cache=False).images.permute(0, 2, 3, 1)
        for i, picture in enumerate(pictures.numpy()):
            Image.fromarray(picture).save(folder / "images" / split / "all" / f"{i}.png")


def numbers(run: Run) -> dict:
    """All numbers of a run that are no times, by the library's own readers; what is not there yet is left out."""
    found = {}
    for name, columns in TABLES.items():
        if (run.path / name).exists():
            found[name] = run.read_table(name, columns).drop(columns=TIMES, errors="ignore").to_csv().splitlines()
    if (run.path / "weights.pt").exists():
        found["weights.pt"] = run.read_torch("weights.pt")["mix.weight"].flatten().tolist()
    if (run.path / "checkpoint.pt").exists():
        found["checkpoint.pt"] = run.read_torch("checkpoint.pt")["trained"].tolist()
    if (run.path / "examples.npz").exists():
        with np.load(run.path / "examples.npz", allow_pickle=False) as arrays:
            found["examples.npz"] = {name: array.tolist() for name, array in arrays.items()}
    for stage, record in run.info["stages"].items():
        if record["status"] == "complete":
            found[stage] = {"parameters": record["parameters"], "images": record["images"]["fingerprint"]}
            results = {name: value for name, value in record["results"].items() if name != "test_images"}  # has a path
            found[stage] |= _without_times(results)
    return found


def _without_times(found):
    if isinstance(found, list):
        return [_without_times(value) for value in found]
    if isinstance(found, dict):
        return {name: _without_times(value) for name, value in found.items() if name not in TIMES}
    return found


def reported(folder: Path) -> dict:
    """What a report of the run says in numbers that are no times: report.json, without what is a time by its nature."""
    run = json.loads((folder / "out/report.json").read_text())["runs"][RUN]
    stages = {
        name: {key: stage[key] for key in ("status", "parameters")} | {"images": stage["images"]["fingerprint"]}
        for name, stage in run["stages"].items()
    }
    learned = {part: _without_times(run[part]) for part in ("train", "least_squares", "compare")}
    rows = {"benchmark": run["benchmark"]} | {name: run["study"][name] for name in ("seeds", "peers", "sizes")}
    return {"stages": stages} | learned | _without_times(rows)


def page(folder: Path) -> bytes:
    return (folder / "report.html").read_bytes()


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


class Soak:
    """A folder in which commands are disturbed, beside one, `calm`, in which the same commands were left alone."""

    def __init__(self, folder: Path, calm: Path, *, seed: int):
        self.folder, self.calm, self.random = folder, calm, random.Random(seed)
        self.signals = itertools.cycle(self.random.sample(list(STATUS), len(STATUS)))
        self.signal = next(self.signals)  # the next one; the same again until it has hit
        self.run = Run(folder / RUN)
        self.faults: Counter[str] = Counter()
        self.saved: dict[str, set[str]] = {name: set() for name in TABLES}  # lines of the run's CSV files
        self.lost = 0
        self.slowest_kernel = 0.0  # seconds from a command's end to that of its kernel

    def start(self, name: str, folder: Path | None = None) -> subprocess.Popen:
        program = Path(sys.executable).parent / "transformnet"
        # A process group of its own, as a terminal gives it
        return subprocess.Popen(
            [program, *COMMANDS[name].split()], cwd=folder or self.folder, text=True, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def finish(self, name: str, folder: Path | None = None) -> None:
        """Give a command and let it finish."""
        process = self.start(name, folder)
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, f"{name}: status {process.returncode}: {told[-2000:]}"

    def disturb(self, name: str, count: int, *, duration: float | None, work: float) -> None:
        """Give the command and disturb it until `count` faults have hit; then let it finish, and compare.

        A fault hits at any moment of the command's `duration`, or, each other time and where that is None, of the
        seconds that its own `work` takes. A command that gets done before is given again from the start.
        """
        before = self.folder.with_name(f"before-{name}")
        shutil.copytree(self.folder, before)
        hit = 0
        while hit < count:
            anywhere = duration is not None and hit % 2 == 0
            if self.strike(name, self.random.uniform(0, duration if anywhere else work), at_work=not anywhere):
                hit += 1
                self.check(name)
            else:
                self.compare(name)
                shutil.rmtree(self.folder)
                shutil.copytree(before, self.folder)
                self.saved = {table: set() for table in TABLES}
        self.finish(name)
        self.check(name)
        self.compare(name)
        shutil.rmtree(before)

    def strike(self, name: str, moment: float, *, at_work: bool) -> bool:
        """Give a command and send it a signal after `moment` seconds (of its work); whether it was still at it."""
        out = self.folder / "out"
        first = {"report": out / "report.failed.ipynb", "export": out / "report.ipynb"}
        last = dict.fromkeys(first, out / "report.json")
        begun = _Change(first.get(name, self.run.path / "run.json"))
        over = _Change(last.get(name, self.run.path / f"{name}.ipynb"))
        complete = self.complete()
        process = self.start(name)
        while at_work and process.poll() is None and not begun.seen():
            time.sleep(0.005)
        with suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        number, kernels, working, late = self.signal, kernels_of(process), begun.seen(), over.seen()
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
        if process.returncode == 0:
            return False
        if late:  # all was done, and only Python's end was disturbed
            self.finish(name)
            return False
        self.signal = next(self.signals)
        ended = time.monotonic()
        _, alive = psutil.wait_procs(kernels, timeout=KERNEL_SECONDS)
        assert not alive, f"{name}: {alive} still there {KERNEL_SECONDS} s after the command"
        self.slowest_kernel = max(self.slowest_kernel, time.monotonic() - ended)
        label = f"{signal.Signals(number).name} at {moment:.2f} s of {name}{' at work' * at_work}"
        print(f"{label}: status {process.returncode}", flush=True)
        self.faults[name] += 1
        # Only while Python starts and ends, a signal ends it as it ends any program
        expected = {STATUS[number]} if working and not over.seen() else {STATUS[number], -number}
        assert process.returncode in expected, f"{label}: {process.returncode}: {told}"
        if process.returncode == STATUS[number] and number != signal.SIGKILL:
            assert "Traceback" not in told, f"{label}: {told}"
            assert "interrupted" in told.replace("\r", "\n").splitlines()[-1], f"{label}: {told}"
        now = self.complete()
        assert all(now.get(stage) == started for stage, started in complete.items()), f"{label}: {complete} → {now}"
        return True

    def complete(self) -> dict[str, str]:
        """The complete stages, and when each was started."""
        stages = self.run.info["stages"].items()
        return {stage: record["started"] for stage, record in stages if record["status"] == "complete"}

    def check(self, name: str) -> None:
        """All that lies in the run is whole; saved lines that are gone or no longer the same count as lost."""
        there, calm = numbers(self.run), numbers(Run(self.calm / RUN))
        for table in TABLES.keys() & there.keys():
            assert there[table] == calm[table][: len(there[table])], f"{name}: {table} differs from the undisturbed one"
        for notebook in self.folder.rglob("*.ipynb"):
            if not notebook.stem.endswith(".failed"):
                check_executed(notebook)
        for table, lines in self.saved.items():
            file = self.run.path / table
            now = set(file.read_text().splitlines()) if file.exists() else set()
            self.lost += len(lines - now)
            self.saved[table] = now

    def compare(self, name: str) -> None:
        """What the command made is what it makes when nothing disturbs it."""
        calm = numbers(Run(self.calm / RUN))
        for part, found in numbers(self.run).items():
            assert found == calm[part], f"{name}: {part} differs from the undisturbed one"
        left = [path for path in self.folder.rglob("*") if path.name.endswith(".part") or ".failed." in path.name]
        assert not left, f"{name}: {left}"
        assert name in ("report", "export") or self.run.has(name)
        if name in ("report", "export"):
            calm = reported(self.calm)
            for part, found in reported(self.folder).items():
                assert found == calm[part], f"{name}: {part} in report.json differs from the undisturbed one"


class _Change:
    """Whether a file has been written since now."""

    def __init__(self, file: Path):
        self.file = file
        self.old = self._modified()

    def seen(self) -> bool:
        return self._modified() not in (self.old, None)

    def _modified(self) -> int | None:
        return self.file.stat().st_mtime_ns if self.file.exists() else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=36, help="how many, shared among the six commands [36]")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments and signals [the time]")
    options = parser.parse_args(arguments)
    print(f"seed {options.seed}", flush=True)
    heed_signals()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        folder, calm = Path(scratch) / "disturbed", Path(scratch) / "calm"
        for place in (folder, calm):
            make_images(place)
        soak = Soak(folder, calm, seed=options.seed)
        durations, works = {}, {}
        for name in list(COMMANDS)[:-1]:
            start = time.time()
            soak.finish(name, calm)
            durations[name] = time.time() - start
        for name, record in Run(calm / RUN).info["stages"].items():
            works[name] = record["seconds"]
        executed = (calm / "out/report.ipynb").stat().st_mtime
        works["export"] = start + durations["report"] - executed
        durations["export"], works["report"] = durations["report"], durations["report"] - works["export"]
        for i, name in enumerate(COMMANDS):
            count = options.faults // len(COMMANDS) + (i < options.faults % len(COMMANDS))
            soak.disturb(name, count, duration=durations[name], work=works[name])
        COMMANDS["again"] = "report --run r --out again"
        soak.finish("again")
        assert page(folder / "out") == page(folder / "again"), "the page differs from one that nothing disturbed"
    hit = ", ".join(f"{name} {count}" for name, count in soak.faults.items())
    print(f"{soak.faults.total()} faults injected ({hit}), {soak.lost} results lost")
    print(f"a kernel ended at most {soak.slowest_kernel:.1f} s after its command")
    sys.exit(1 if soak.lost else 0)


if __name__ == "__main__":
    main()
