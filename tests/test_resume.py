"""Stop and go on: a training that is killed, interrupted or out of disk space loses at most the epoch it was in."""

import errno
import multiprocessing
import os
import pickle
import random
import resource
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformnet_lib.runs import HISTORY_COLUMNS

from transformnet_lib import CustomDataset, Run, TrainConfig, train
from transformnet_lib import runs as runs_module
from transformnet_lib.errors import Interrupted, ParameterError, RunError
from transformnet_lib.training import Trainer, load_training

COLUMNS = ["epoch", "train_mse", "val_mse", "red", "green", "blue"]  # of the history, times aside


def config(**changes) -> TrainConfig:
    """A training of a dozen epochs whose learning rate falls until the eighth."""
    return TrainConfig.from_preset("precise", device="cpu", epochs=12, batch_size=64, decay_steps=70, **changes)


@pytest.fixture(scope="module")
def undisturbed(train_set, tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("undisturbed") / "run")
    train(train_set, config(), run=run)
    return run


def go_on(run: Run, dataset: CustomDataset) -> None:
    """Train on in `run`, as somebody would who calls the same thing again."""
    next_second()
    train(dataset, config(), run=run)


def next_second() -> None:
    """Wait for it: TensorBoard names its files by the second, and sorts those of the same second at random."""
    time.sleep(1 - time.time() % 1)


def assert_as_undisturbed(run: Run, undisturbed: Run) -> None:
    """Same weights and history to the last bit, the same results, and one continuous curve in TensorBoard."""
    assert run.history()[COLUMNS].equals(undisturbed.history()[COLUMNS])
    assert torch.equal(run.weights()["mix.weight"], undisturbed.weights()["mix.weight"])
    ended, expected = (each.stage_info("train")["results"] for each in (run, undisturbed))
    for results in (ended, expected):
        results["setup_seconds"] = results["least_squares"]["seconds"] = 0
    assert ended == expected
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for name in COLUMNS[1:]:
        curve = [(event.step, event.value) for event in events.Scalars(name)]
        assert curve == list(zip(run.history()["epoch"], run.history()[name].astype("float32"), strict=True))


# Killed


def slow_training(folder: str, dataset: bytes) -> None:
    """What the killed process does: the training with steps slowed down, to be killed within epochs and between."""
    torch.set_num_threads(1)
    step = Trainer.step

    def slow_step(self, batch):
        time.sleep(0.012)
        step(self, batch)

    Trainer.step = slow_step
    train(pickle.loads(dataset), config(), run=Run(folder))


def modified(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.exists() else None


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_a_training_killed_at_random_moments_ends_as_if_undisturbed(train_set, undisturbed, tmp_path):
    run, checkpoint = Run(tmp_path / "run"), tmp_path / "run" / "checkpoint.pt"
    processes = multiprocessing.get_context("forkserver")  # forks from a process that has imported all this once
    processes.set_forkserver_preload(["transformnet_lib.training", "torch.utils.tensorboard", __name__])
    moments = random.Random(0)
    kills = 0
    while True:
        process = processes.Process(target=slow_training, args=(str(run.path), pickle.dumps(train_set)))
        before = modified(checkpoint)
        next_second()
        process.start()
        while process.is_alive() and kills >= 2 and modified(checkpoint) == before:
            time.sleep(0.001)  # until it has got further, so that this ends
        process.join(moments.uniform(0, 0.15 if kills >= 2 else 0.3) if kills < 6 else None)
        process.kill()
        process.join()
        if run.has("train"):
            break
        kills += 1
        with pytest.raises(RunError, match="stage train is not complete"):
            run.history()
    assert kills >= 3  # six, unless the machine was so slow to kill that the training got done before
    assert_as_undisturbed(run, undisturbed)


@pytest.mark.parametrize("written", ["checkpoint.pt", "weights.pt", "history.csv"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("epoch", [3, 12])  # 12 is the last, after which no epoch writes anew what is missing
def test_a_kill_between_any_two_writes_does_no_harm(
    written, before, epoch, train_set, undisturbed, tmp_path, monkeypatch
):
    assert len(undisturbed.history()) == 12

    class Killed(BaseException):
        """Nothing in the library catches it."""

    run, write, count = Run(tmp_path / "run"), Run.write, 0

    def killed(self, name, content):
        nonlocal count
        count += name == written
        at_last = name == written and count == epoch
        if at_last and before:
            raise Killed
        write(self, name, content)
        if at_last:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "write", killed)
        train(train_set, config(), run=run)
    go_on(run, train_set)
    assert_as_undisturbed(run, undisturbed)


def test_a_dead_training_killed_after_its_last_epoch_is_still_called_dead(train_set, tmp_path, monkeypatch):
    run, dead = Run(tmp_path / "run"), TrainConfig.from_preset("paper", device="cpu", seed=3)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("transformnet_lib.training._refuse_if_not_finite", lambda trainer: 1 / 0)
        train(train_set, dead, run=run)
    assert train(train_set, dead, run=run).dead


# Interrupted


@pytest.mark.parametrize(("after", "saved"), [(0, "no epoch is yet saved"), (3, "the best weights so far are saved")])
def test_ctrl_c_saves_the_best_weights_and_says_how_to_go_on(
    after, saved, train_set, undisturbed, tmp_path, monkeypatch
):
    run, step = Run(tmp_path / "run"), Trainer.step

    def interrupted(self, batch):
        if len(self.history) == after and self.steps % 9 == 4:  # in the middle of an epoch
            raise KeyboardInterrupt
        step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(Interrupted) as caught:
        patch.setattr(Trainer, "step", interrupted)
        train(train_set, config(), run=run)
    said = str(caught.value)
    assert said == f"interrupted: {saved} in {run.path}; run the same command or cell again to go on"
    assert caught.value._render_traceback_() == [said]  # JupyterLab shows no more than that
    record = run.info["stages"]["train"]
    assert (record["status"], record["why"]) == ("failed", said)
    if after:
        best = undisturbed.history()["val_mse"][:after].idxmin()
        saved_weights = run.read_torch("weights.pt")["mix.weight"].flatten().tolist()
        assert saved_weights == undisturbed.history().loc[best, ["red", "green", "blue"]].tolist()
    go_on(run, train_set)
    assert_as_undisturbed(run, undisturbed)


# Refused


def interrupt_after(epochs: int, dataset: CustomDataset, run: Run) -> dict:
    """Interrupt a training in `run` after so many epochs, and return its checkpoint."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        run_epoch = Trainer.run_epoch

        def until(self):
            if len(self.history) == epochs:
                raise KeyboardInterrupt
            return run_epoch(self)

        patch.setattr(Trainer, "run_epoch", until)
        train(dataset, config(), run=run)
    return run.read_torch("checkpoint.pt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state["made_for"].update(images="0" * 64), "of another training \\(images: '0{64}' → '[0-9a-f]"),
        (lambda state: state["made_for"].update(torch="1.0"), "of another training \\(torch: '1.0' → "),
        (
            lambda state: state["made_for"].update(lr=0.5, seed=7),
            "of another training \\(seed: 7 → 0; lr: 0.5 → 0.1\\)",
        ),
        (lambda state: state["made_for"]["pipeline"].update(hflip=False), "of another training \\(pipeline: "),
        (lambda state: state.update(format=0), "format 0; this version goes on from format 2"),
        (lambda state: state.update(format=torch.zeros(3)), "format missing; this version goes on from format 2"),
        (lambda state: state.pop("format"), "format missing; this version goes on from format 2"),
        (lambda state: state.pop("optimizer"), "damaged \\(KeyError: 'optimizer'\\)"),
        (lambda state: state.update(trained=torch.zeros(4)), "damaged \\(RuntimeError: "),
        (lambda state: state.update(made_for=None), "damaged \\("),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_saying_what_differs(change, said, train_set, tmp_path):
    run = Run(tmp_path / "run")
    state = interrupt_after(1, train_set, run)
    change(state)
    run.write_torch("checkpoint.pt", state)
    with pytest.raises(RunError, match=rf"checkpoint\.pt: {said}.*force=True"):
        train(train_set, config(), run=run)
    assert len(train(train_set, config(), run=run, force=True).history) > 1


def test_other_images_in_the_same_data_set_are_noticed(train_set, tmp_path):
    run, changed = Run(tmp_path / "run"), pickle.loads(pickle.dumps(train_set))
    interrupt_after(1, train_set, run)
    changed.images[0] = 0
    with pytest.raises(RunError, match="made with other parameters \\(images: "):
        train(changed, config(), run=run)


def test_weights_that_are_not_finite_are_refused_on_reading(train_set, tmp_path):
    run = Run(tmp_path / "run")
    train(train_set, config(), run=run)
    beyond = torch.tensor([0.3, 1e300, 0.1], dtype=torch.float64)  # which is infinite as the model holds it
    run.write_torch("weights.pt", {"mix.weight": beyond.view(1, 3, 1, 1)})
    with pytest.raises(RunError, match=r"weights\.pt: expected finite weights, got \[0\.3.*, 1e\+300, 0\.1"):
        run.weights()
    run.write_torch("weights.pt", {"mix.weight": torch.tensor([0.3, float("nan"), 0.1]).view(1, 3, 1, 1)})
    with pytest.raises(RunError, match=r"weights\.pt: expected finite weights, got \[0\.3.*, nan, 0\.1"):
        load_training(run)


# Out of disk space


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(train_set, undisturbed, tmp_path, monkeypatch):
    run, fsync, calls = Run(tmp_path / "run"), os.fsync, 0

    def full(handle):
        nonlocal calls
        calls += 1
        if calls > 10:  # run.json, then three files an epoch: within the fourth epoch
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with (
        monkeypatch.context() as patch,
        pytest.raises(RunError, match=r"cannot be written \(No space left on device\)"),
    ):
        patch.setattr(runs_module.os, "fsync", full)
        train(train_set, config(), run=run)
    history = run.read_torch("checkpoint.pt")["history"]
    kept, expected = pd.DataFrame(history, columns=list(HISTORY_COLUMNS))[COLUMNS], undisturbed.history()[COLUMNS]
    assert kept.to_numpy().tolist() == expected[: len(kept)].to_numpy().tolist() and len(kept) == 3
    assert not [path for path in run.path.iterdir() if path.name.startswith(".checkpoint.pt")]
    go_on(run, train_set)
    assert_as_undisturbed(run, undisturbed)


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is POSIX")
def test_a_file_that_may_not_grow_keeps_the_last_checkpoint_and_says_so(train_set, undisturbed, tmp_path):
    run = Run(tmp_path / "run")
    interrupt_after(2, train_set, run)
    before = (run.path / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # bytes: run.json fits, a checkpoint does not
    try:
        with pytest.raises(RunError, match=r"cannot be written \(File too large\)"):
            train(train_set, config(), run=run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run.path / "checkpoint.pt").read_bytes() == before
    go_on(run, train_set)
    assert_as_undisturbed(run, undisturbed)


def test_what_cannot_be_trained_on_is_refused_before_anything_is_discarded(train_set, undisturbed):
    few = pickle.loads(pickle.dumps(train_set))
    few.images, few.targets = few.images[:4], few.targets[:4]
    with pytest.raises(ParameterError, match="at least one training and one validation image"):
        train(few, config(), run=undisturbed, force=True)
    assert len(undisturbed.history()) == 12
