"""The stages, end to end: read back as they were made; one that was stopped ends as if nothing had been."""

import copy
import dataclasses
import errno
import itertools
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import altered
from handmade import Killed, content
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from transformnet_lib import (
    CustomDataset,
    Run,
    TrainConfig,
    benchmark_stage,
    compare_stage,
    measure,
    read_run,
    seeds,
    seeds_stage,
    stages,
    study_stage,
    train,
    train_stage,
)
from transformnet_lib.comparison import metrics_table
from transformnet_lib.errors import DataError, Interrupted, ParameterError, RunError
from transformnet_lib.machine import resolve_device
from transformnet_lib.stage_writer import StageWriter
from transformnet_lib.training import Trainer

SAME = ["epoch", "train_mse", "val_mse", "red", "green", "blue"]  # of the history, whatever the clock says
CONFIGS = {  # a dozen epochs; the learning rate of `precise` falls until the eighth, `paper` jumps about
    "paper": TrainConfig.from_preset("paper", device="cpu", epochs=12, batch_size=64, lr=0.1, patience=12),
    "precise": TrainConfig.from_preset("precise", device="cpu", epochs=12, batch_size=64, decay_steps=70),
}


@pytest.fixture(scope="module")
def undisturbed(train_set, tmp_path_factory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return {name: train_stage(folder / name, train_set, config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def few() -> CustomDataset:
    """Test images enough to be measured."""
    return CustomDataset(data="photos", train=False, limit=100)


@pytest.fixture
def path(undisturbed, tmp_path) -> Path:
    """A trained run to make the other stages of."""
    return shutil.copytree(undisturbed["precise"].path, tmp_path / "r")


def continued(path: Path, dataset: CustomDataset, preset: str = "precise", **options) -> Run:
    """The same call again; in the next second, for which TensorBoard names its files."""
    time.sleep(1 - time.time() % 1)
    return train_stage(path, dataset, CONFIGS[preset], **options)


def assert_as_undisturbed(run: Run, undisturbed: Run) -> None:
    """Same weights and history to the last bit, the same results, and one continuous curve in TensorBoard."""
    assert len(run.train.history) == 12 and run.train.history[SAME].equals(undisturbed.train.history[SAME])
    for name in ("weights", "best_epoch", "no_gradient", "initial_weights"):
        assert getattr(run.train, name) == getattr(undisturbed.train, name)
    assert run.train.least_squares.weights == undisturbed.train.least_squares.weights
    events = EventAccumulator(str(run.path / "train/tensorboard"), size_guidance={"scalars": 0}).Reload()
    history = run.train.history
    assert sorted(events.Tags()["scalars"]) == sorted(list(history)[1:])
    for name in events.Tags()["scalars"]:
        curve = [(event.step, event.value) for event in events.Scalars(name)]
        assert curve == list(zip(history["epoch"], history[name].astype("float32"), strict=True))


# train


@pytest.mark.parametrize("preset", CONFIGS)
def test_a_training_is_read_back_as_it_was_trained(preset, train_set, undisturbed):
    run, result = undisturbed[preset], train(train_set, CONFIGS[preset])
    assert run.train.config == CONFIGS[preset] and run.pipeline == train_set.pipeline
    assert run.model.weights == result.model.weights
    assert run.train.history[SAME].equals(result.history[SAME])
    assert run.train.best_epoch == result.best_epoch < 12 or preset == "precise"
    assert run.dataset(train=True).fingerprint == train_set.fingerprint != run.dataset().fingerprint
    assert_as_undisturbed(run, run)


def test_what_is_complete_is_only_read(run, train_set, test_set, monkeypatch):
    before = content(run.path)
    for owner, name in ((stages, "_train"), (stages, "compare"), (stages, "benchmark")):
        monkeypatch.setattr(owner, name, None)
    again = train_stage(run.path, train_set, TrainConfig.from_preset("precise", device="cpu", batch_size=32))
    assert again.train.history.equals(run.train.history) and list(again.stages) == ["train"]
    assert compare_stage(run.path, test_set).compare.test_mse == run.compare.test_mse
    table = benchmark_stage(run.path, test_set, **run.benchmark.parameters).benchmark.table
    assert table.equals(run.benchmark.table) and content(run.path) == before


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize(("epochs", "saved"), [(0, "no epoch is yet"), (5, "all epochs so far are")])
def test_ctrl_c_within_an_epoch_loses_only_that(preset, epochs, saved, train_set, undisturbed, tmp_path, monkeypatch):
    path, step = tmp_path / "r", Trainer.step

    def interrupted(self, batch):
        if len(self.history) == epochs and self.steps % 9 == 4:  # in the middle of an epoch
            raise KeyboardInterrupt
        step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(Interrupted) as caught:
        patch.setattr(Trainer, "step", interrupted)
        train_stage(path, train_set, CONFIGS[preset])
    said = str(caught.value)
    assert said == f"interrupted: {saved} saved in {path / 'train'}; run the same command or cell again to go on"
    assert caught.value._render_traceback_() == [said]  # JupyterLab shows no more than that
    run = continued(path, train_set, preset)
    assert run.train.sittings == 2
    assert_as_undisturbed(run, undisturbed[preset])


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("name", "count"),
    [("checkpoint.safetensors", 3), ("checkpoint.safetensors", 12), ("history.csv", 1), ("weights.safetensors", 1)],
)
def test_a_kill_between_any_two_writes_does_no_harm(
    name, count, before, preset, train_set, undisturbed, tmp_path, monkeypatch
):
    write, counted = StageWriter.write, itertools.count(1)

    def killed(self, written, text):
        last = written == name and next(counted) == count
        if not (last and before):
            write(self, written, text)
        if last:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StageWriter, "write", killed)
        train_stage(tmp_path / "r", train_set, CONFIGS[preset])
    assert_as_undisturbed(continued(tmp_path / "r", train_set, preset), undisturbed[preset])


def interrupt_after(epochs: int, path: Path, dataset: CustomDataset, **options) -> None:
    """Interrupt a training in `path` after so many epochs."""
    run_epoch = Trainer.run_epoch

    def until(self):
        if len(self.history) == epochs:
            raise KeyboardInterrupt
        return run_epoch(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "run_epoch", until)
        train_stage(path, dataset, CONFIGS["precise"], **options)


def test_a_forced_training_that_was_stopped_is_continued_when_forced_again(path, train_set, undisturbed):
    before = read_run(path).train
    interrupt_after(4, path, train_set, force=True)
    assert read_run(path).train.training == before.training
    run = continued(path, train_set, force=True)
    assert run.train.sittings == 2 and run.train.training != before.training
    assert_as_undisturbed(run, undisturbed["precise"])


def test_a_training_without_gradient_killed_after_its_last_epoch_is_still_called_so(train_set, tmp_path, monkeypatch):
    config = TrainConfig(device="cpu", seed=3)  # which starts with three negative weights
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("transformnet_lib.training._refuse_if_not_finite", lambda trainer: 1 / 0)
        train_stage(tmp_path / "r", train_set, config)
    assert train_stage(tmp_path / "r", train_set, config).train.no_gradient


DAMAGES: dict[str, Callable[[dict], object]] = {
    "no optimiser": lambda state: [state.pop(name) for name in list(state) if name.startswith("optimizer.")],
    "no weights": lambda state: state.pop("trained"),
    "weights of another shape": lambda state: state.update(trained=torch.zeros(4)),
    "a history of another form": lambda state: state.update(history=torch.zeros(7)),
    "another generator": lambda state: state.update(generator=torch.zeros(3)),
    "no counts": lambda state: state.update(counts=torch.zeros(2, dtype=torch.int64)),
    "endless patience": lambda state: state.update(stopping=torch.full((2,), torch.inf, dtype=torch.float64)),
    "junk": lambda state: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("place", ["train", "train.new"])
def test_a_damaged_checkpoint_is_one_line_and_force_begins_again(damage, place, train_set, undisturbed, tmp_path, path):
    if place == "train":
        path = tmp_path / "new"
    interrupt_after(2, path, train_set, force=place == "train.new")
    checkpoint = path / place / "checkpoint.safetensors"
    state = safetensors.torch.load_file(checkpoint)
    DAMAGES[damage](state)
    checkpoint.write_bytes(b"junk" if damage == "junk" else safetensors.torch.save(state))
    if place == "train":
        with pytest.raises(
            RunError, match=r"^.*checkpoint\.safetensors: damaged .*transformnet train --run-dir .*--force"
        ):
            train_stage(path, train_set, CONFIGS["precise"])
    assert_as_undisturbed(continued(path, train_set, force=True), undisturbed["precise"])


def test_other_images_in_the_same_data_set_are_noticed(train_set, tmp_path):
    interrupt_after(1, tmp_path / "r", train_set)
    changed = copy.deepcopy(train_set)
    changed.images[0] = 0
    with pytest.raises(RunError, match=r"begun with other parameters \(images: "):
        train_stage(tmp_path / "r", changed, CONFIGS["precise"])


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(train_set, undisturbed, tmp_path, monkeypatch):
    path, fsync, calls = tmp_path / "r", os.fsync, itertools.count()

    def full(handle):
        if next(calls) == 4:  # parameters.json and three epochs
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch, pytest.raises(RunError, match=r"written \(No space left on device\)"):
        patch.setattr(os, "fsync", full)
        train_stage(path, train_set, CONFIGS["precise"])
    assert len(safetensors.torch.load_file(path / "train/checkpoint.safetensors")["history"]) == 3
    assert not list(path.rglob("*.part"))
    assert_as_undisturbed(continued(path, train_set), undisturbed["precise"])


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is POSIX")
def test_a_file_that_may_not_grow_keeps_the_last_checkpoint_and_says_so(train_set, undisturbed, tmp_path):
    interrupt_after(2, tmp_path / "r", train_set)
    before = (tmp_path / "r/train/checkpoint.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # bytes: parameters.json fits, a checkpoint does not
    try:
        with pytest.raises(RunError, match=r"cannot be written \(File too large\)"):
            train_stage(tmp_path / "r", train_set, CONFIGS["precise"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "r/train/checkpoint.safetensors").read_bytes() == before
    assert_as_undisturbed(continued(tmp_path / "r", train_set), undisturbed["precise"])


# What cannot be done is refused before anything is written


@pytest.mark.parametrize("force", [True, False])
def test_what_is_out_of_range_is_refused_and_nothing_is_written(force, path, train_set, test_set):
    before, few = content(path), CustomDataset(data="photos", train=True, limit=4)
    small = CustomDataset(data="photos", train=False, limit=20)
    small.images = small.images[:, :, :-1]
    wrong = [
        lambda: train_stage(path, few, CONFIGS["precise"], force=force),
        lambda: train_stage(path, train_set, TrainConfig(device="gpu"), force=force),
        lambda: compare_stage(path, test_set, [600], force=force),
        lambda: benchmark_stage(path, small, force=force),
        *[
            lambda wrong=wrong: benchmark_stage(path, test_set, **wrong, force=force)
            for wrong in ({"devices": ["tpu"]}, {"devices": "cpu"}, {"batch_sizes": [0]}, {"rounds": 8})
        ],
        *[
            lambda wrong=wrong: seeds_stage(path, train_set, **wrong, force=force)
            for wrong in ({"seeds": 0}, {"presets": ["best"]})
        ],
        *[
            lambda wrong=wrong: study_stage(path, test_set, **wrong, force=force)
            for wrong in ({"rounds": 8}, {"sizes": [0]})
        ],
    ]
    for call in wrong:
        with pytest.raises((ParameterError, DataError)):
            call()
    assert content(path) == before


def test_a_forced_training_that_fails_keeps_what_is_there(path, undisturbed):
    grey = CustomDataset(data="photos", train=True, limit=100)
    grey.images[:] = grey.images[:, :1]
    with pytest.raises(DataError, match="the training images are grey"):
        train_stage(path, grey, CONFIGS["precise"], force=True)
    assert read_run(path).train.training == undisturbed["precise"].train.training


@pytest.mark.parametrize("work", [compare_stage, benchmark_stage, seeds_stage, study_stage])
def test_a_later_stage_needs_a_training(work, test_set, tmp_path):
    with pytest.raises(RunError, match="there is no such folder; `transformnet train --run-dir"):
        work(tmp_path / "r", test_set)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("force", [True, False])
def test_damage_in_one_stage_does_not_keep_another_from_being_made(force, path, train_set, few):
    compare_stage(path, few)
    for name in ("parameters.json", "examples.npz"):
        (path / "compare" / name).write_bytes(b"junk")
    assert train_stage(path, train_set, CONFIGS["precise"], force=force).train
    assert benchmark_stage(path, few, **QUICK, force=force).benchmark
    with pytest.raises(RunError, match=r"compare/parameters\.json: damaged"):
        read_run(path)
    assert compare_stage(path, few, force=True).compare
    assert read_run(path).compare


# compare, benchmark, study

QUICK = {"devices": ["cpu"], "batch_sizes": [16], "num_workers": [], "small_batch_sizes": [], "seconds": 0.0}


def test_a_comparison_is_read_back(run):
    examples = run.compare.examples
    assert examples["indices"].tolist() == [0, 120, 240, 360, 480]  # none asked for: spread over all 600
    assert metrics_table(examples)["mse"].max() < 1e-10 and run.compare.test_mse < 1e-10


def test_test_images_that_were_trained_on_are_counted(path, train_set):
    few = CustomDataset(data="photos", train=False, limit=100)
    assert compare_stage(path, few).compare.in_training == 0
    few.images[[3, 50, 99]] = train_set.images[[0, 5, 5]]
    few.targets = few.compute_targets()
    assert compare_stage(path, few, force=True).compare.in_training == 3
    (path / "train" / "images.safetensors").unlink()  # as in a run of before
    assert compare_stage(path, few, force=True).compare.in_training is None


def test_a_benchmark_is_read_back_in_full_precision(run):
    table = run.benchmark.table
    reference = table[(table["part"] == "sweep") & (table["method"] == "reference") & (table["reason"] == "")]
    rounds = run.benchmark.measured.rounds_of("sweep")
    last = rounds.groupby(["method", "round"])["seconds"].last()
    pipeline = sum(last[name] for name in rounds["method"].unique() if name.startswith("sequential")) / 600
    for _, row in reference.iterrows():
        speedup = (pipeline / (last[row["name"]] / row["images"])).median()
        assert row["speedup"] == pytest.approx(speedup, rel=1e-12)
        assert row["seconds"] == pytest.approx(row["images"] * pipeline.median() / speedup, rel=1e-12)


def test_auto_is_measured_under_the_devices_own_name(path, few):
    run = benchmark_stage(path, few, **QUICK | {"devices": ["auto", str(resolve_device("auto"))]})
    assert run.benchmark.parameters["devices"] == [str(resolve_device("auto"))]


@pytest.fixture
def short_turns(monkeypatch):
    monkeypatch.setattr(measure, "TURN_SECONDS", 1e-9)


@pytest.mark.parametrize("force", [True, False])
def test_an_interrupted_benchmark_goes_on_after_its_last_round(force, path, few, monkeypatch, short_turns):
    folder = path / "benchmark"
    if force:
        benchmark_stage(path, few, **QUICK)
        before = content(folder)
    write, saved = StageWriter.write_table, []

    def stop_at_the_third(self, name, table):
        write(self, name, table)
        saved.append(name)
        if saved.count("rounds.csv") == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StageWriter, "write_table", stop_at_the_third)
        benchmark_stage(path, few, **QUICK, force=force)
    rows = (path / ("benchmark.new" if force else "benchmark") / "rounds.csv").read_text()
    assert not force or content(folder) == before
    run = benchmark_stage(path, few, **QUICK, force=force)
    assert (folder / "rounds.csv").read_text().startswith(rows) and run.benchmark.sittings == 2
    table = run.benchmark.table
    assert (table["rounds"] == 9).all() and set(table["part"]) == {"sweep", "best", "one thread", "factors"}


@pytest.mark.parametrize(
    ("preset", "mse", "optimum", "expected"),
    [("precise", 1e-12, True, "training"), ("precise", 0.1, True, "least squares"), ("precise", 0.1, False, "training"),
     ("paper", 1e-12, True, "least squares"), ("paper", 1e-12, False, "training")],
)  # fmt: skip
def test_the_weights_that_are_timed_are_those_worth_it(preset, mse, optimum, expected, undisturbed):
    run = undisturbed["precise"]
    history = run.train.history.assign(val_mse=mse)
    config = dataclasses.replace(run.train.config, preset=preset)
    changed = {"config": config, "history": history} | ({} if optimum else {"least_squares": None})
    weights, origin = stages.timed_weights(altered(run, train=changed))
    assert origin == expected
    assert weights == (run.train.weights if origin == "training" else run.train.least_squares.weights)


def test_a_run_of_the_recipe_times_the_optimum_and_its_own_weights(undisturbed, tmp_path, few, short_turns):
    path = shutil.copytree(undisturbed["paper"].path, tmp_path / "p")
    run = benchmark_stage(path, few, **QUICK, other_weights={"other": [0.3, 0.58, 0.1]})
    assert (run.benchmark.weights, run.benchmark.origin) == (run.train.least_squares.weights, "least squares")
    beside = run.benchmark.table.query("part == 'best' and weights != ''")
    assert set(beside["weights"]) == {"known", "p", "other"}
    assert run.benchmark.parameters["other_weights"] == {"other": [0.3, 0.58, 0.1]}


SEED_RESULTS = ["preset", "seed", "red", "green", "blue", "val_mse", "best_epoch", "epochs", "no_gradient"]


def test_seeds_interrupted_after_any_of_them_make_only_what_is_missing(path, train_set, monkeypatch):
    finish, made = seeds.finish, []

    def interrupted(trainer):
        made.append((trainer.config.preset, trainer.config.seed))
        if len(made) == 3:
            raise KeyboardInterrupt
        return finish(trainer)

    monkeypatch.setattr(seeds, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        seeds_stage(path, train_set, seeds=2)
    assert read_run(path).unfinished == {"seeds": "it was stopped, it failed, or it is at work"}
    run = seeds_stage(path, train_set, seeds=2)
    assert made == [("paper", 0), ("paper", 1), ("precise", 0), ("precise", 0), ("precise", 1), *[("paper", 0)] * 3]
    assert run.seeds.sittings == 2
    whole = seeds.study_seeds(train_set, seeds=(0, 1))
    assert run.seeds.table[SEED_RESULTS].to_numpy().tolist() == whole[SEED_RESULTS].to_numpy().tolist()


def test_more_seeds_are_added_and_fewer_are_there_already(path, train_set, monkeypatch):
    finish, made = seeds.finish, []
    monkeypatch.setattr(seeds, "finish", lambda trainer: made.append(trainer.config.seed) or finish(trainer))
    seeds_stage(path, train_set, seeds=1, presets=["paper"])
    more = seeds_stage(path, train_set, seeds=3, presets=["paper"])
    assert made == [0, 0, 0, 0, 1, 2] and more.seeds.table["seed"].tolist() == made  # with the changes once, from 0
    assert seeds_stage(path, train_set, seeds=2, presets=["paper"]).seeds.parameters["seeds"] == [0, 1, 2]
    assert made == [0, 0, 0, 0, 1, 2] and not list(path.glob("*.new"))
    others = CustomDataset(data="photos", limit=100)
    with pytest.raises(RunError, match=r"seeds was made with other parameters .*images: "):
        seeds_stage(path, others, seeds=4, presets=["paper"])  # trainings on other images are no more of the same
    with pytest.raises(RunError, match="seeds was made with other parameters"):
        seeds_stage(path, train_set, seeds=[7], presets=["paper"])
    with pytest.raises(RunError, match="seeds was made with other parameters"):
        seeds_stage(path, train_set, seeds=5, presets=["precise"])


STUDY = {"sizes": [50, 100]}


def test_a_study_killed_after_any_table_measures_only_what_is_missing(path, few, monkeypatch, short_turns):
    write, written = StageWriter.write, []

    def killed(last):
        def call(self, name, text):
            write(self, name, text)
            written.append(name)
            if written.count(name) == last.get(name):
                raise Killed

        return call

    for last in ({"library_rounds.csv": 4}, {"libraries.csv": 1}, {"sizes.csv": 1}):
        written.clear()
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(StageWriter, "write", killed(last))
            study_stage(path, few, **STUDY)
    before = content(path / "study")
    run = study_stage(path, few, **STUDY)
    done = content(path / "study")
    assert all(done[name] == before[name] for name in ("library_rounds.csv", "libraries.csv"))
    assert done["size_rounds.csv"].startswith(before["size_rounds.csv"]) and run.study.sittings == 4
    assert (run.study.libraries["rounds"] == 9).all() and (run.study.sizes["rounds"] == 9).all()
    assert run.study.sizes["images"].unique().tolist() == [50, 100]
    with pytest.raises(RunError, match=r"sizes: \[50, 100\] → \[50\]"):
        study_stage(path, few, sizes=[50])
