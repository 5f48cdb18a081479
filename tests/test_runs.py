"""The run directory: what `runs.py` promises of writing, stages, locks and of files that are not ours."""

import csv
import gc
import io
import itertools
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import threading
import warnings
import zipfile
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformnet_lib.runs import (
    EXECUTING,
    HISTORY_COLUMNS,
    Run,
    describe_images,
    open_run,
    open_runs,
)

from transformnet_lib import files, runs
from transformnet_lib.errors import RunError
from transformnet_lib.pipeline import Pipeline

CPU = torch.device("cpu")
PARAMETERS = {"lr": 0.002, "seed": 0, "pipeline": Pipeline().to_dict()}
# Floats that few digits would not bring back: no finite binary fraction, the smallest there is, all 17 digits
HARD_FLOATS = [0.1 + 0.2, 5e-324, 2 / 3 * 1e-5, 1.7976931348623157e308]


def images(split: str = "train", count: int = 20, fingerprint: str = "ab" * 32) -> dict:
    request = {"data": "photos", "data_path": "data", "limit": count, "fit": "none", "image_size": None}
    known = {"source": "photos", "split": split, "count": count, "size": [32, 32], "fingerprint": fingerprint}
    return known | {"request": request}


def do(
    run: Run, name: str, parameters: dict | None = None, *, files: dict | None = None, force=False, **others
) -> bool:
    """Do one stage that writes `files` (name → bytes); whether there was something to do."""
    known = others.pop("images", images("train" if name == "train" else "test"))
    asked = PARAMETERS if name == "train" else {"indices": [4, 7]}
    with run.stage(name, parameters or asked, images=known, device=CPU, force=force) as results:
        if results is None:
            return False
        for file, content in (files or {}).items():
            run.write(file, content)
        results |= {"answer": 42} | ({"test_mse": 0.25, "max_error": 0.5} if name == "compare" else {})
    return True


def weights_file(**state) -> bytes:
    buffer = io.BytesIO()
    torch.save(state or {"mix.weight": torch.tensor([0.3, 0.6, 0.1]).reshape(1, 3, 1, 1)}, buffer)
    return buffer.getvalue()


def arrays_file(**changed) -> bytes:
    """An examples.npz of two images, with some of its arrays changed or, where None, left out."""
    arrays = {
        "indices": np.array([4, 7]),
        "inputs": np.arange(2 * 3 * 32 * 32, dtype=np.uint32).astype(np.uint8).reshape(2, 3, 32, 32),
        "targets": np.full((2, 1, 28, 28), 0.25, np.float32),
        "outputs": np.full((2, 1, 28, 28), 0.75, np.float32),
    } | changed
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: array for name, array in arrays.items() if array is not None})
    return buffer.getvalue()


HISTORY = (
    b"epoch,train_mse,val_mse,epoch_seconds,red,green,blue\n1,0.5,0.4,1.5,0.1,0.2,0.3\n2,0.25,0.2,1.25,0.2,0.3,0.4\n"
)


def make(path: Path, *, parameters: dict | None = None, test_images: dict | None = None) -> Run:
    """A run with the stages train and compare, its files written by hand."""
    run = Run(path)
    do(run, "train", parameters, files={"history.csv": HISTORY, "weights.pt": weights_file()})
    do(run, "compare", files={"examples.npz": arrays_file()}, images=test_images or images("test"))
    return run


@pytest.fixture
def made(tmp_path) -> Run:
    return make(tmp_path / "made")


def record(run: Run, stage: str = "train") -> dict:
    """A stage's record, read without the library."""
    return json.loads((run.path / "run.json").read_text("utf-8"))["stages"][stage]


def refusal(call) -> str:
    """The message of the RunError with which `call` is refused: one line, not endless."""
    with pytest.raises(RunError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 2000
    return message


def listing(folder: Path) -> dict:
    """All below a folder, with content and time of the last change."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
    }


def test_a_full_disk_is_a_run_error_and_keeps_the_old_file(made, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = refusal(lambda: made.write("history.csv", b"new"))
    assert str(made.path / "history.csv") in message and "No space left" in message
    assert (made.path / "history.csv").read_bytes() == HISTORY


# Stages


def test_a_complete_stage_says_what_was_done_with_what_and_where(tmp_path):
    before = datetime.now().astimezone()
    run = Run(tmp_path / "new" / "run")
    assert do(run, "train")
    known = record(run)
    assert known["status"] == "complete" and known["results"] == {"answer": 42}
    assert known["parameters"] == PARAMETERS and known["images"] == images()
    assert known["environment"]["device"] == "cpu" and known["environment"]["torch"] == torch.__version__
    started, finished = (datetime.fromisoformat(known[key]) for key in ("started", "finished"))
    assert (started - before).total_seconds() > -1 and 0 <= (finished - started).total_seconds() < 60
    assert 0 <= known["seconds"] < 60
    assert run.has("train") and not run.has("compare")
    assert run.label == "run" and run.pipeline == Pipeline()
    assert run.stage_info("train") == known


def test_a_complete_stage_is_not_done_again(made):
    before = listing(made.path)
    assert not do(made, "train") and not do(made, "compare")
    assert listing(made.path) == before


def test_tuples_and_lists_are_the_same_parameter(tmp_path):
    run = make(tmp_path / "run")
    assert not do(run, "compare", {"indices": (4, 7)})


@pytest.mark.parametrize("name", ["train", "compare"])
def test_other_parameters_are_refused_and_named(made, name):
    asked = (PARAMETERS | {"lr": 0.1, "new": "x"}) if name == "train" else {"indices": [3]}
    before = listing(made.path)
    message = refusal(lambda: do(made, name, asked))
    assert str(made.path) in message and f"stage {name}" in message and "--force" in message
    assert ("lr: 0.002 → 0.1" in message and "new: None → 'x'" in message) == (name == "train")
    assert ("indices: [4, 7] → [3]" in message) == (name == "compare")
    assert "seed" not in message  # only what differs
    assert listing(made.path) == before


@pytest.mark.parametrize("change", [{"fingerprint": "cd" * 32, "count": 21}, {"fingerprint": "cd" * 32}])
def test_other_images_are_refused_and_named(made, change):
    message = refusal(lambda: do(made, "train", images=images() | change))
    assert "images: '20 of photos, abababab' → " in message
    assert refusal(lambda: do(made, "compare", images=images("test") | change))


def test_the_same_images_from_another_place_are_the_same(made):
    moved = images() | {"source": "folder:x", "request": images()["request"] | {"data_path": "elsewhere"}}
    assert not do(made, "train", images=moved)


def test_force_makes_a_stage_anew_and_keeps_the_others(made):
    old = record(made, "compare")
    history = (made.path / "history.csv").read_bytes()
    assert do(made, "compare", {"indices": [3]}, force=True)
    assert record(made, "compare")["parameters"] == {"indices": [3]} != old["parameters"]
    assert not (made.path / "examples.npz").exists()  # made by the old one only
    assert made.has("train") and (made.path / "history.csv").read_bytes() == history


def test_force_on_train_drops_all_that_builds_on_it(made):
    do(made, "benchmark", {"sizes": [1]}, files={"benchmark.csv": b"x"})
    made.write("checkpoint.pt", b"x")
    (made.path / "tensorboard").mkdir()
    (made.path / "tensorboard" / "events").write_text("x")
    for name in ("train.ipynb", "compare.ipynb", "benchmark.failed.ipynb"):
        (made.path / name).write_text('{"metadata": {"papermill": {}}}')
    own = {"mine.ipynb", "study.ipynb"}  # the latter like a stage's, but papermill never executed it
    for name in own:
        (made.path / name).write_text('{"metadata": {}}')
    assert do(made, "train", PARAMETERS | {"seed": 1}, force=True)
    assert set(made.info["stages"]) == {"train"}
    assert {path.name for path in made.path.iterdir() if not path.name.endswith(".lock")} == own | {"run.json"}
    assert record(made)["parameters"]["seed"] == 1


class Killed(BaseException):
    """Nothing in the library catches it."""


def force_train(run: Run, error: BaseException | None = None, seed: int = 1, file: bytes = HISTORY) -> None:
    """Make the training anew, other than `make`'s; it writes a file, and then ends or fails."""
    with run.stage("train", PARAMETERS | {"seed": seed}, images=images(), device=CPU, force=True) as results:
        if results is None:
            return
        if not (run.path / "checkpoint.pt").exists():
            run.write("checkpoint.pt", b"epoch 1")
        if error:
            raise error
        run.write("history.csv", file)
        run.write("weights.pt", weights_file())
        results["answer"] = 43


@pytest.mark.parametrize("error", [RunError("no space left"), KeyboardInterrupt(), Killed()])
def test_old_results_stay_until_a_forced_stage_is_complete(made, error, monkeypatch):
    before = {path: content for path, content in listing(made.path).items() if path.is_file()}
    with pytest.raises(type(error)), monkeypatch.context() as patch:
        if isinstance(error, Killed):  # who is killed writes no more
            patch.setattr(Run, "_write_info", lambda run, info, write=Run._write_info: (
                write(run, info) if info["stages"]["train"]["status"] == "started" else None))  # fmt: skip
        force_train(made, error)
    assert {path: listing(made.path)[path] for path in before} == before
    made.require("train", "compare")
    assert made.path.name == "made"


@pytest.mark.parametrize(
    ("error", "seed", "commit", "left"),
    [
        (KeyboardInterrupt(), 1, "abc", b"epoch 1"),
        (KeyboardInterrupt(), 2, "abc", None),  # another training: what is left belongs to the one before
        (KeyboardInterrupt(), 1, "def", None),  # it is to be made anew by the code of now
        (RunError("the loss is nan"), 1, "abc", None),  # it would only fail again
    ],
)
def test_a_forced_stage_that_was_stopped_goes_on_when_it_is_forced_again(made, error, seed, commit, left, monkeypatch):
    monkeypatch.setattr(runs, "git_commit", lambda: "abc")
    with pytest.raises(type(error)):
        force_train(made, error)
    monkeypatch.setattr(runs, "git_commit", lambda: commit)
    with made.stage("train", PARAMETERS | {"seed": seed}, images=images(), device=CPU, force=True):
        assert made.path.name == ".train.anew"
        file = made.path / "checkpoint.pt"
        assert (file.read_bytes() if file.exists() else None) == left
    assert record(made)["parameters"]["seed"] == seed and set(made.info["stages"]) == {"train"}
    assert not list(made.path.glob(".train*"))


def test_a_forced_stage_takes_the_olds_place_only_when_its_notebook_has_ended(made, monkeypatch):
    before = {path: content for path, content in listing(made.path).items() if path.is_file()}

    def force(run: Run) -> None:
        with monkeypatch.context() as patch:
            patch.setenv(EXECUTING, "train")
            force_train(run)
            assert run.path.name == ".train.anew" and run.has("train")  # where the rest of the notebook reads it

    force(Run(made.path))
    made.end("train", "a cell failed", forced=True)
    assert {path: content for path, content in listing(made.path).items() if path in before} == before
    made.require("train", "compare")
    do(made, "compare")  # another command
    (made.path / ".train.anew/checkpoint.pt").write_bytes(b"gone on with")
    force(Run(made.path))
    (made.path / "train.ipynb").write_bytes(b"of the old training")
    (made.path / ".train.anew/train.ipynb").write_bytes(b"of the new training")
    made.end("train", forced=True)
    assert (made.path / "checkpoint.pt").read_bytes() == b"gone on with"
    assert record(made)["parameters"]["seed"] == 1 and made.has("train") and not made.has("compare")
    assert (made.path / "train.ipynb").read_bytes() == b"of the new training"
    assert not list(made.path.glob(".train*"))


def test_a_forced_stage_does_not_go_on_with_another_training(made):
    def compare(error=None):
        with made.stage("compare", {"indices": [2]}, images=images("test"), device=CPU, force=True) as results:
            left = (made.path / "examples.npz").exists()
            made.write("examples.npz", arrays_file())
            if error:
                raise error
            results |= {"test_mse": 0.1, "max_error": 0.1}
            return left

    with pytest.raises(KeyboardInterrupt):
        compare(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        compare(KeyboardInterrupt())
    force_train(made)
    assert compare() is False


@pytest.mark.parametrize("killed_before", range(24))  # 0: the new record is written; 23: the last folder is removed
def test_a_kill_while_a_stage_takes_the_olds_place_is_made_good_by_the_next_command(tmp_path, killed_before):
    run = make(tmp_path / "run")
    (run.path / "tensorboard").mkdir()
    (run.path / "tensorboard" / "old").write_text("x")
    file, calls = HISTORY.replace(b"0.25", b"0.125"), itertools.count()

    def until(real):
        def step(*arguments, **options):
            if next(calls) == 5 + killed_before:  # the five before are of the stage itself
                raise Killed
            return real(*arguments, **options)

        return step

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        for owner, name in ((os, "replace"), (Path, "replace"), (Path, "rename"), (Path, "unlink"), (shutil, "rmtree")):
            patch.setattr(owner, name, until(getattr(owner, name)))
        force_train(run, file=file)
    with suppress(RunError):  # not complete, just then
        assert run.history()["train_mse"].tolist() in ([0.5, 0.25], [0.5, 0.125])
    do(run, "compare")
    assert run.history()["train_mse"].tolist() == [0.5, 0.125 if killed_before else 0.25]
    assert record(run)["parameters"]["seed"] == (1 if killed_before else 0)
    if killed_before:
        assert not (run.path / "tensorboard").exists() and not list(run.path.glob(".train*"))


@pytest.mark.parametrize("state", ["anew", "ready"])
def test_a_damaged_record_beside_a_stage_made_anew_is_no_dead_end(made, state):
    waiting = Run(made.path / f".compare.{state}")
    shutil.copytree(made.path, waiting.path)
    (made.path / "run.json").write_text('{"format": 2, "sta')
    told = refusal(lambda: do(made, "compare", force=True))
    assert "run.json: damaged or not ours" in told and f"`transformnet train --run-dir {made.path} --force`" in told
    assert waiting.path.exists()
    force_train(made)
    assert list(made.info["stages"]) == ["train"] and not list(made.path.glob(".compare*"))


def test_a_training_that_lacks_a_file_is_named_when_a_stage_is_made_anew_on_it(made):
    (made.path / "weights.pt").unlink()
    assert f"{made.path / 'weights.pt'}: cannot be read or written" in refusal(lambda: do(made, "compare", force=True))


@pytest.mark.parametrize(("owner", "name"), [(Path, "unlink"), (Path, "rename"), (Path, "replace"), (shutil, "rmtree")])
def test_a_file_that_cannot_be_moved_as_a_stage_takes_the_olds_place_is_one_line_and_made_good(
    made, owner, name, monkeypatch
):
    def failing(path, *arguments, **options):
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        real = made._finish_exchange
        with made.stage("compare", {"indices": [5]}, images=images("test"), device=CPU, force=True) as results:
            made.write("examples.npz", arrays_file())
            results |= {"test_mse": 0.125, "max_error": 0.5}
            patch.setattr(made, "_finish_exchange", lambda: None)
        patch.setattr(owner, name, failing)
        assert "cannot be moved or removed (Input/output error); mend that" in refusal(real)
    made.settle()
    assert made.stage_info("compare")["results"]["test_mse"] == 0.125
    assert not list(made.path.glob(".compare*"))


@pytest.mark.parametrize("other", [True, False], ids=["another", "none"])
def test_a_stage_writes_nothing_into_another_folder_that_takes_its_runs_name(made, tmp_path, other):
    told = pytest.raises(RunError, match="made: no longer the folder that it was when the work began")
    with told, made.stage("benchmark", {}, images=images("test"), device=CPU):
        made.path.rename(tmp_path / "elsewhere")
        if other:
            make(tmp_path / "made")
        before = listing(tmp_path)
        made.write("benchmark.csv", b"of the one elsewhere")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("damage", [b"{", b'{"format": 2, "stages": {"train": 3}}'])
def test_a_damaged_folder_of_a_forced_stage_is_made_anew(made, damage):
    with pytest.raises(KeyboardInterrupt):
        force_train(made, KeyboardInterrupt())
    (made.path / ".train.anew" / "run.json").write_bytes(damage)
    force_train(made)
    assert record(made)["parameters"]["seed"] == 1


def test_what_a_killed_process_had_begun_to_write_is_cleared_away_by_the_next_command(made):
    (made.path / ".transformnet-history.csv.x1y2.part").write_bytes(b"half")
    (made.path / "mine.part").write_bytes(b"not ours")
    do(made, "benchmark", {}, files={"benchmark.csv": b"x"})
    assert not (made.path / ".transformnet-history.csv.x1y2.part").exists() and (made.path / "mine.part").exists()


@pytest.mark.parametrize("results", [{}, {"test_mse": "low", "max_error": 0.1}, {"test_mse": 0.1, "max_error": None}])
def test_a_comparison_without_its_numbers_is_refused(made, results):
    info = made.info
    info["stages"]["compare"]["results"] = results
    (made.path / "run.json").write_text(json.dumps(info))
    assert "run.json: results of compare: expected a number" in refusal(lambda: made.stage_info("compare"))


@pytest.mark.parametrize("content", [b"{", b'{"format": 0, "stages": {}}'])
def test_force_on_train_is_the_way_out_of_a_damaged_record(made, content):
    (made.path / "run.json").write_bytes(content)
    assert "run.json" in refusal(lambda: do(made, "compare", force=True))
    assert "run.json" in refusal(lambda: do(made, "train"))
    assert do(made, "train", force=True)
    assert set(made.info["stages"]) == {"train"} and not (made.path / "examples.npz").exists()


def test_force_where_nothing_was_done_yet_just_does_it(tmp_path):
    assert do(Run(tmp_path / "run"), "train", force=True)


def fail_with(run: Run, error: BaseException) -> None:
    with pytest.raises(type(error)), run.stage("train", PARAMETERS, images=images(), device=CPU) as results:
        results["half"] = 1
        run.write("history.csv", b"partial")
        run.write("checkpoint.pt", b"partial")
        raise error


@pytest.mark.parametrize(
    ("error", "why"),
    [(ValueError("the loss is nan"), "the loss is nan"), (KeyboardInterrupt(), "interrupted")],
)
def test_a_failure_is_recorded_with_its_reason_and_the_same_call_goes_on(tmp_path, error, why):
    run = Run(tmp_path / "run")
    fail_with(run, error)
    known = record(run)
    assert (known["status"], known["why"]) == ("failed", why) and "results" not in known
    assert not run.has("train")
    message = refusal(run.history)
    assert "stage train is not complete" in message and why in message and "transformnet train --run-dir" in message
    with run.stage("train", PARAMETERS, images=images(), device=CPU) as results:
        assert results == {}
        assert (run.path / "checkpoint.pt").read_bytes() == b"partial"  # to go on from
    assert record(run)["status"] == "complete" and "why" not in record(run)
    assert record(run)["seconds"] >= known["seconds"] and record(run)["started"] == known["started"]
    assert (known["sittings"], record(run)["sittings"]) == (1, 2)


def test_a_failed_stage_with_other_parameters_is_refused(tmp_path):
    run = Run(tmp_path / "run")
    fail_with(run, ValueError("no"))
    assert "seed: 0 → 1" in refusal(lambda: do(run, "train", PARAMETERS | {"seed": 1}))


def test_a_reason_of_many_lines_is_told_in_one(tmp_path):
    run = Run(tmp_path / "run")
    fail_with(run, ValueError("Traceback:\n  here\n" + "and there\n" * 10_000))
    assert "Traceback: here and there" in refusal(run.history)


def test_seconds_add_up_over_attempts(tmp_path, monkeypatch):
    run = Run(tmp_path / "run")
    clock = iter([10.0, 15.0, 100.0, 102.0])
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    fail_with(run, ValueError("no"))
    assert record(run)["seconds"] == 5
    with run.stage("train", PARAMETERS, images=images(), device=CPU):
        assert record(run)["seconds"] == 5  # what a killed process leaves
    assert record(run)["seconds"] == 7


@pytest.mark.parametrize("name", ["compare", "benchmark"])
@pytest.mark.parametrize("force", [True, False])
def test_a_later_stage_needs_a_trained_run(tmp_path, name, force):
    run = Run(tmp_path / "run")
    assert "stage train: the folder holds no run" in refusal(lambda: do(run, name, force=force))
    fail_with(run, ValueError("the loss is nan"))
    assert "stage train is not complete (the loss is nan)" in refusal(lambda: do(run, name, force=force))


@pytest.mark.parametrize("read", [Run.history, Run.weights, Run.examples, lambda run: run.pipeline])
def test_reading_what_was_not_made_says_what_makes_it(tmp_path, read):
    message = refusal(lambda: read(Run(tmp_path / "none")))
    assert "there is no such folder; `transformnet " in message and f"--run-dir {tmp_path / 'none'}`" in message
    assert not (tmp_path / "none").exists()


def test_require_names_the_stage_that_lacks(made):
    made.require("train", "compare")
    message = refusal(lambda: made.require("train", "benchmark"))
    assert "stage benchmark: not run yet; `transformnet benchmark --run-dir" in message


def test_a_training_without_a_record_is_not_continued(tmp_path):
    run = Run(tmp_path / "run")
    fail_with(run, ValueError("no"))
    (run.path / "run.json").unlink()  # whose checkpoint this is, nobody knows
    message = refusal(lambda: do(run, "train"))
    assert "holds history.csv, checkpoint.pt, but no record" in message and "--force" in message
    assert (run.path / "checkpoint.pt").read_bytes() == b"partial"
    assert do(run, "train", force=True)
    assert not (run.path / "checkpoint.pt").exists()


# Two at once, and one that was killed

HOLDER = """
import sys, time, torch
from transformnet_lib.runs import Run
import json
parameters, images = json.loads(sys.argv[2])
with Run(sys.argv[1]).stage("train", parameters, images=images, device=torch.device("cpu")):
    print("started", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process in the middle of the stage train of tmp_path/held."""
    arguments = [str(tmp_path / "held"), json.dumps([PARAMETERS, images()])]
    root = str(Path(runs.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert process.stdout.readline() == "started\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_run_is_written_by_one_process_and_a_killed_stage_can_be_made(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.2)
    run = Run(tmp_path / "held")
    before = (run.path / "run.json").read_bytes()
    for force in (False, True):
        message = refusal(lambda force=force: do(run, "train", force=force))
        assert f"{run.path}: in use by another command" in message
    assert (run.path / "run.json").read_bytes() == before
    assert do(Run(tmp_path / "other"), "train")  # another run is free

    holder.kill()
    holder.wait()
    assert record(run)["status"] == "started"
    assert not run.has("train")
    assert "stage train is not complete (it was stopped, or is at work)" in refusal(run.history)
    assert "stage train is not complete" in refusal(lambda: do(run, "compare"))
    assert do(run, "train") and run.has("train")


def test_nobody_else_does_a_stage_while_a_command_executes_its_notebook(made, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    before = made.info
    with made.command():  # whose kernel is done with the stage, and shows what it made
        for force in (False, True):
            assert "in use by another command" in refusal(lambda force=force: do(made, "train", force=force))
        with monkeypatch.context() as patch:
            patch.setenv(EXECUTING, "compare")
            assert not do(made, "compare")  # the command's own kernel
        assert made.info == before
    assert do(made, "train", PARAMETERS | {"seed": 1}, force=True)


def test_a_command_waits_for_the_kernel_of_one_that_was_killed(tmp_path, holder):
    ending = threading.Timer(0.5, holder.kill)
    ending.start()
    assert do(Run(tmp_path / "held"), "train")
    ending.join()


def test_a_run_can_be_read_while_it_is_written(made):
    with made.stage("benchmark", {}, images=images("test"), device=CPU):
        assert len(Run(made.path).history()) == 2


# run.json


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"\0" * 100, b"[]", b"null", b"3", b"{}", b"[" * 100_000, b'{"format": 1}'],
)
def test_a_damaged_record_is_refused(made, content):
    (made.path / "run.json").write_bytes(content)
    assert str(made.path / "run.json") in refusal(lambda: made.info)
    refusal(made.history)
    refusal(lambda: do(made, "train"))
    assert (made.path / "run.json").read_bytes() == content


@pytest.mark.parametrize("version", [0, 1, "2", None])
def test_another_format_version_is_named(made, version):
    info = json.loads((made.path / "run.json").read_text())
    (made.path / "run.json").write_text(json.dumps(info | {"format": version}))
    message = refusal(lambda: made.info)
    assert f"format {version!r}; this version reads format 2" in message and "make the run again" in message


def changed(info: dict, path: str, value: object) -> dict:
    """`info` with the entry at a path like "stages.train.status" set, or dropped where value is `changed`."""
    info = json.loads(json.dumps(info))
    *parents, last = path.split(".")
    inner = info
    for key in parents:
        inner = inner[key]
    if value is changed:
        del inner[last]
    else:
        inner[last] = value
    return info


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("unknown", 1),
        ("stages", []),
        ("stages.unknown", {}),
        ("stages.train", None),
        ("stages.train.unknown", 1),
        ("stages.train.status", "ended"),
        ("stages.train.status", ["complete"]),
        ("stages.train.status", changed),
        ("stages.train.parameters", []),
        ("stages.train.parameters", changed),
        ("stages.train.seconds", -1),
        ("stages.train.seconds", "1"),
        ("stages.train.commit", "x" * 100_000),
        ("stages.train.results", [1]),
        ("stages.train.environment.cpu", changed),
        ("stages.train.environment.threads", "2"),
        ("stages.train.images.unknown", 1),
        ("stages.train.images.count", 0),
        ("stages.train.images.count", 2.5),
        ("stages.train.images.split", "val"),
        ("stages.train.images.size", [32]),
        ("stages.train.images.fingerprint", "../../etc"),
        ("stages.train.images.request.unknown", 1),
        ("stages.train.images.request.limit", "all"),
        ("stages.train.images.request.data", changed),
    ],
)
def test_unknown_keys_and_wrong_types_in_the_record_are_refused(made, path, value):
    info = json.loads((made.path / "run.json").read_text())
    (made.path / "run.json").write_text(json.dumps(changed(info, path, value)))
    assert f"{made.path}/run.json: damaged or not ours: " in refusal(made.history)


@pytest.mark.parametrize("value", [changed, None, [], {}, {"size": 2.5}, {"size": [0, 1]}, {"colour": True}])
def test_a_record_without_a_usable_pipeline_is_refused(made, value):
    info = changed(json.loads((made.path / "run.json").read_text()), "stages.train.parameters.pipeline", value)
    (made.path / "run.json").write_text(json.dumps(info))
    if value == {}:  # every field has a default
        assert made.pipeline == Pipeline()
    else:
        assert "no usable pipeline" in refusal(lambda: made.pipeline)


# Tables


def test_a_table_without_rows_is_refused(made):
    made.write_table("history.csv", made.history().head(0))
    assert f"{made.path}/history.csv: damaged or not ours: has no rows" in refusal(made.history)


def test_tables_keep_every_digit(made):
    history = pd.DataFrame({"epoch": range(1, 5), **dict.fromkeys(list(HISTORY_COLUMNS)[1:], HARD_FLOATS)})
    made.write_table("history.csv", history)
    assert made.history()["val_mse"].tolist() == HARD_FLOATS
    assert made.history()["epoch"].tolist() == [1, 2, 3, 4]
    with open(made.path / "history.csv", newline="") as file:  # so do other readers
        assert [float(row["train_mse"]) for row in csv.DictReader(file)] == HARD_FLOATS


def test_tables_keep_texts_truths_and_what_is_missing(made):
    columns = {"path": "str", "shuffle": "bool", "batch_size": "int", "seconds": "float"}
    table = pd.DataFrame(
        {
            "path": ["fast", 'says "no", and\nends'],
            "shuffle": pd.array([True, False], "boolean"),
            "batch_size": pd.array([16, 2**60], "Int64"),
            "seconds": [1.5, math.nan],
        }
    )
    made.write_table("benchmark.csv", table)
    pd.testing.assert_frame_equal(made.read_table("benchmark.csv", columns), table, check_dtype=False)


HEADER = b"epoch,train_mse,val_mse,epoch_seconds,red,green,blue\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"epoch,train_mse,val_mse\n1,2,3\n",
            "epoch_seconds, red, green, blue; got epoch, train_mse, val_mse",
        ),
        (b"train_mse,epoch,val_mse,epoch_seconds\n1,2,3,4\n", "expected columns"),
        (HEADER.replace(b"\n", b",more\n") + b"1,2,3,4,5\n", "expected columns"),
        (HEADER + b"1,2,3,4,5,6,7,8\n", "row 1: expected 7 fields, got 8"),
        (HEADER + b"1,2,3,4,5,6,7\n1,2,3,4,5,6,7,8\n", "row 2: expected 7 fields, got 8"),
        (HEADER + b"1,2,3,4,5,6,7\n2,2,3\n", "row 2: expected 7 fields, got 3"),
        (HEADER + b"1,2,3,4,5,6,7\n\n", "row 2: expected 7 fields, got 0"),
        (HEADER + b"1,2,3,4,5,6,0.7", "the last row is cut"),  # was it 0.789?
        (HEADER, "has no rows"),
        (HEADER + b"one,2,3,4,5,6,7\n", "epoch: expected a whole number from 0, got 'one'"),
        (HEADER + b"1.5,2,3,4,5,6,7\n", "epoch: expected a whole number"),
        (HEADER + b"-1,2,3,4,5,6,7\n", "epoch: expected a whole number"),
        (HEADER + b",2,3,4,5,6,7\n", "epoch: expected a whole number"),
        (HEADER + b"99999999999999999999999,2,3,4,5,6,7\n", "epoch: expected a whole number"),
        (HEADER + "１,2,3,4,5,6,7\n".encode(), "epoch: expected a whole number"),
        (HEADER + b"1,low,3,4,5,6,7\n", "train_mse: expected a number, got 'low'"),
        (HEADER + b"1,1_0,3,4,5,6,7\n", "train_mse: expected a number"),
        (HEADER + b"1,=1+1,3,4,5,6,7\n", "train_mse: expected a number"),
        (HEADER + b"1,\"=cmd|'/c calc'!A1\",3,4,5,6,7\n", "train_mse: expected a number"),
        (HEADER + b"1,null,3,4,5,6,7\n", "train_mse: expected a number, got 'null'"),
        (HEADER + b"1,\x00,3,4,5,6,7\n", "train_mse: expected a number"),
        (HEADER + b"1,True,3,4,5,6,7\n", "train_mse: expected a number"),
        (HEADER + b"1,2,3,-4,5,6,7\n", "expected epoch_seconds, train_mse and val_mse from 0"),
        (HEADER + b"1,2,3,,5,6,7\n", "expected epoch_seconds, train_mse and val_mse from 0"),
        (HEADER + b"1,2,3,inf,5,6,7\n", "expected epoch_seconds, train_mse and val_mse from 0"),
        (HEADER + b"1,-2,3,4,5,6,7\n", "expected epoch_seconds, train_mse and val_mse from 0"),
        (HEADER + b"2,2,3,4,5,6,7\n1,2,3,4,5,6,7\n", "expected the epochs 1 to 2, one a row, in order"),
        (HEADER + b"1,2,3,4,5,6,7\n1,2,3,4,5,6,7\n", "expected the epochs 1 to 2"),
        (HEADER + b"1,2,3,4,5,6,7\n3,2,3,4,5,6,7\n", "expected the epochs 1 to 2"),
        (HEADER + b'1,"2,3,4\n', "damaged or not ours"),
        (HEADER + b"1," + b"2" * 2_000_000 + b",3,4,5,6,7\n", "train_mse: expected a number that float64 can hold"),
        (HEADER + b"1,2,3,1e999,5,6,7\n", "epoch_seconds: expected a number that float64 can hold"),
        (b"," * 1_000_000, "expected columns"),
        (b"", "expected columns"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "damaged or not ours"),
        (b"\0" * 100_000, "history.csv"),
    ],
)
def test_a_history_that_is_not_ours_is_refused(made, content, message):
    (made.path / "history.csv").write_bytes(content)
    told = refusal(made.history)
    assert f"{made.path}/history.csv: " in told and message in told


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(b"")
@given(st.binary(max_size=40) | st.text("0129.,-\"'ex\n\0", max_size=40).map(lambda text: HEADER + text.encode()))
def test_no_bytes_of_a_history_raise_anything_else(made, content):
    (made.path / "history.csv").write_bytes(content)
    try:
        table = made.history()
    except RunError as error:
        assert "\n" not in str(error)
    else:
        assert list(table.columns) == list(HISTORY_COLUMNS)


# Weights and arrays


def test_weights_come_back_as_they_were(made):
    weight = torch.tensor(HARD_FLOATS[:3], dtype=torch.float64).reshape(1, 3, 1, 1)
    made.write_torch("weights.pt", {"mix.weight": weight})
    assert list(made.weights()) == ["mix.weight"]
    assert torch.equal(made.weights()["mix.weight"], weight)


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", ["pickle", "torch", "torch, old format"])
def test_weights_that_bring_code_are_refused_and_the_code_does_not_run(made, tmp_path, kind):
    payload = {"mix.weight": Payload(tmp_path / "executed")}
    if kind == "pickle":
        (made.path / "weights.pt").write_bytes(pickle.dumps(payload, protocol=2))
    else:
        torch.save(payload, made.path / "weights.pt", _use_new_zipfile_serialization=kind == "torch")
    if kind != "pickle":  # it would work
        torch.load(made.path / "weights.pt", weights_only=False)
        (tmp_path / "executed").rmdir()
    message = refusal(made.weights)
    assert f"{made.path}/weights.pt: not a file of ours" in message
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "state",
    [
        {"mix.weight": torch.zeros(1, 3)},
        {"mix.weight": torch.zeros(3, 1, 1, 1)},
        {"mix.weight": torch.zeros(1, 3, 1, 1, dtype=torch.int64)},
        {"mix.weight": torch.zeros(1, 3, 1, 1, dtype=torch.complex64)},
        {"mix.weight": [0.3, 0.6, 0.1]},
        {"mix.weight": torch.zeros(1, 3, 1, 1), "mix.bias": torch.zeros(1)},
        {"another\nname": torch.zeros(1)},
        {f"layer{i}": torch.zeros(1) for i in range(1000)},
    ],
)
def test_weights_of_another_model_are_refused(made, state):
    (made.path / "weights.pt").write_bytes(weights_file(**state))
    said = refusal(made.weights)
    assert f"{made.path}/weights.pt: " in said
    assert (
        "expected only mix.weight (1, 3, 1, 1)" in said or "not a file of ours" in said
    )  # of a kind that ours have not


def test_a_file_without_names_is_not_ours(made):
    torch.save(torch.zeros(1, 3, 1, 1), made.path / "weights.pt")
    assert "expected named tensors, got Tensor" in refusal(made.weights)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04garbage", weights_file()[:-100], arrays_file()])
def test_a_file_that_is_none_of_torchs_is_refused(made, content):
    (made.path / "weights.pt").write_bytes(content)
    assert f"{made.path}/weights.pt: " in refusal(made.weights)


def test_examples_come_back_as_they_were(made):
    arrays = made.examples()
    assert arrays["indices"].tolist() == [4, 7]
    assert np.array_equal(arrays["inputs"].ravel(), np.arange(2 * 3 * 32 * 32) % 256)
    assert (arrays["targets"] == 0.25).all() and (arrays["outputs"] == 0.75).all()
    made.write_arrays("examples.npz", **arrays)
    assert all(np.array_equal(arrays[name], again) for name, again in made.examples().items())


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def zipped(content: bytes) -> bytes:
    """A zip archive with `content` under the name of each array."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("indices", "inputs", "targets", "outputs"):
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        arrays_file(targets=None),
        arrays_file(indices=np.array(3)),
        arrays_file(indices=np.array([4.0, 7.0])),
        arrays_file(indices=np.array([4, 7, 9])),
        arrays_file(inputs=np.zeros((2, 3, 32), np.uint8)),
        arrays_file(inputs=np.zeros((2, 3, 32, 32), np.float32)),
        arrays_file(targets=np.zeros((1, 1, 28, 28), np.float32)),
        arrays_file(outputs=np.full((2, 1, 28, 28), "x")),
        arrays_file()[:-30],
        zipped(b"garbage"),
        zipped(npy(np.zeros(1000))[:-10]),
        npy(np.zeros(3)),
        b"PK\x03\x04garbage",
        b"garbage",
        b"",
    ],
)
def test_examples_that_are_not_ours_are_refused(made, content):
    (made.path / "examples.npz").write_bytes(content)
    assert f"{made.path}/examples.npz: " in refusal(made.examples)


def test_examples_that_unpack_to_more_than_a_run_holds_are_refused(made):
    (made.path / "examples.npz").write_bytes(arrays_file(inputs=np.zeros((2**14, 2**12, 1, 1), np.uint8)))
    assert (made.path / "examples.npz").stat().st_size < 100_000
    assert "bytes unpacked, more than 67,108,864" in refusal(made.examples)


def test_examples_that_bring_code_are_refused_and_the_code_does_not_run(made, tmp_path):
    objects = np.empty((2, 1, 1, 1), object)
    objects[:] = Payload(tmp_path / "executed")
    for content in (arrays_file(targets=objects), pickle.dumps(Payload(tmp_path / "executed"))):
        (made.path / "examples.npz").write_bytes(content)
        refusal(made.examples)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("run.json", lambda run: run.info),
        ("history.csv", Run.history),
        ("weights.pt", Run.weights),
        ("examples.npz", Run.examples),
    ],
)
def test_a_file_too_large_to_be_ours_is_refused_unread(made, monkeypatch, name, read):
    path = made.path / name
    kept = path.read_bytes()
    most = 2**24 if path.suffix in (".json", ".csv") else 2**26
    with open(path, "r+b") as file:
        file.truncate(most + 1)  # a hole, which takes no room
    reads, real = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: (reads.append(self.name), real(self))[1])
    assert f"{path}: larger than {most:,} bytes" in refusal(lambda: read(made))
    assert name not in reads
    path.write_bytes(kept)
    read(made)


@pytest.mark.parametrize(("name", "read"), [("history.csv", Run.history), ("weights.pt", Run.weights)])
def test_a_file_that_is_gone_is_named(made, name, read):
    (made.path / name).unlink()
    told = refusal(lambda: read(made))
    assert f"{made.path / name}: is missing, though run.json says that train made it" in told
    assert f"`transformnet train --run-dir {made.path} --force` makes it anew" in told
    (made.path / name).mkdir()
    assert f"{made.path / name}: cannot be read" in refusal(lambda: read(made))


def test_a_run_whose_record_is_gone_says_the_way_out(made):
    (made.path / "run.json").unlink()
    told = refusal(made.history)
    assert "stage train: no record of it in run.json, though history.csv, weights.pt" in told
    assert f"put run.json back, or `transformnet train --run-dir {made.path} --force` makes the run anew" in told


def test_a_folder_that_cannot_be_listed_is_one_line(made, monkeypatch):
    (made.path / "tensorboard").mkdir()

    def failing(path, pattern):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(Path, "glob", failing)
    told = refusal(lambda: do(made, "compare", force=True))
    assert told == f"{made.path / 'tensorboard'}: cannot be read (Input/output error)"


# Folders


def test_reading_writes_nothing(made):
    before = listing(made.path)
    made.path.chmod(0o555)
    try:
        run = Run(made.path)
        run.require("train", "compare")
        assert (len(run.history()), len(run.weights()), len(run.examples())) == (2, 1, 4)
        assert run.info["format"] == runs.FORMAT and run.pipeline == Pipeline()
        assert open_runs([run.path])[0].label == "made"
        refusal(lambda: run.require("benchmark"))
        assert listing(made.path) == before
    finally:
        made.path.chmod(0o755)


def test_a_file_where_the_folder_should_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"{path}: cannot be written" in refusal(lambda path=path: do(Run(path), "train"))
        assert "there is no such folder" in refusal(Run(path).history)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_copied_run_is_the_same_run(made, tmp_path):
    shutil.copytree(made.path, tmp_path / "copy")
    copy = Run(tmp_path / "copy")
    assert copy.label == "copy" and copy.info == made.info
    assert not do(copy, "compare")


def test_images_are_described_as_the_record_wants_them(tmp_path):
    from PIL import Image

    from transformnet_lib.dataset import CustomDataset

    (tmp_path / "train").mkdir()
    Image.new("RGB", (7, 9)).save(tmp_path / "train" / "a.png")
    dataset = CustomDataset(data=f"folder:{tmp_path}")
    described = describe_images(dataset)
    assert described == {
        "source": f"folder:{tmp_path}",
        "split": "train",
        "count": 1,
        "size": [9, 7],
        "fingerprint": dataset.fingerprint,
        "request": dataset.request,
    }
    assert do(Run(tmp_path / "run"), "train", images=described)


# open_run, open_runs


def test_an_open_run_without_a_name_is_a_throw_away_copy_of_the_reference(made, monkeypatch):
    monkeypatch.setattr(runs, "reference_run", lambda: Run(made.path))
    before = listing(made.path)
    run = open_run("")
    assert run.label == "made" and run.path != made.path
    assert run.has("train") and not run.has("compare")  # the later stages are there to be tried
    pd.testing.assert_frame_equal(run.history(), made.history())
    assert torch.equal(run.weights()["mix.weight"], made.weights()["mix.weight"])
    assert do(run, "compare", {"indices": [9]}, files={"examples.npz": arrays_file()})
    assert do(run, "train", PARAMETERS | {"seed": 5}, force=True)
    assert listing(made.path) == before
    path = run.path
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del run
        gc.collect()
    assert not path.exists()


def test_an_open_run_with_a_name_is_that_run(made):
    assert open_run(str(made.path)).path == made.path


def test_open_runs_takes_the_reference_where_none_is_named(made, monkeypatch):
    monkeypatch.setattr(runs, "reference_run", lambda: Run(made.path))
    assert [run.path for run in open_runs([])] == [made.path]


def test_open_runs_keeps_the_order(tmp_path):
    paths = [make(tmp_path / name).path for name in ("b", "a", "c")]
    assert [run.path for run in open_runs(paths)] == paths


def test_open_runs_refuses_a_run_that_is_not_trained(made, tmp_path):
    assert str(tmp_path / "none") in refusal(lambda: open_runs([made.path, tmp_path / "none"]))


def test_open_runs_refuses_two_of_one_name(made, tmp_path):
    other = make(tmp_path / "elsewhere" / "made")
    message = refusal(lambda: open_runs([made.path, other.path]))
    assert str(made.path) in message and str(other.path) in message and "two runs named made; rename" in message
    assert "two runs named made" in refusal(lambda: open_runs([made.path, made.path]))


def test_open_runs_refuses_another_pipeline(made, tmp_path):
    other = make(tmp_path / "other", parameters=PARAMETERS | {"pipeline": Pipeline(14, vflip=False).to_dict()})
    message = refusal(lambda: open_runs([made.path, other.path]))
    assert f"{other.path}: another pipeline (resize to 14×14 → grayscale → horizontal flip)" in message


def test_open_runs_refuses_other_test_images(made, tmp_path):
    other = make(tmp_path / "other", test_images=images("test", fingerprint="cd" * 32))
    message = refusal(lambda: open_runs([made.path, other.path]))
    assert (
        f"{other.path}: other test images of compare (20 of photos, cdcdcdcd) than of compare in {made.path}" in message
    )
    fresh = Run(tmp_path / "fresh")  # one that is only trained stands beside any
    do(fresh, "train", files={"history.csv": HISTORY, "weights.pt": weights_file()})
    assert len(open_runs([fresh.path, made.path])) == 2


def test_open_runs_refuses_a_benchmark_of_other_images_than_the_comparison(made):
    do(made, "benchmark", {"sizes": [1]}, images=images("test", fingerprint="cd" * 32))
    message = refusal(lambda: open_runs([made.path]))
    assert "other test images of benchmark (20 of photos, cdcdcdcd) than of compare" in message
