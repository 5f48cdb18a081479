"""The run directory: a stage is whole or is not there, whatever is killed, and nobody's own files are touched."""

import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade import FLOATS, PARAMETERS, TEXT, Killed, content, do, stop

from transformnet_lib import (
    CustomDataset,
    Pipeline,
    TrainConfig,
    files,
    read_run,
    read_runs,
    run,
    scratch_run,
    stage_writer,
)
from transformnet_lib.errors import ParameterError, RunError
from transformnet_lib.files import locked
from transformnet_lib.run import reference_run
from transformnet_lib.stage_folder import STAGES
from transformnet_lib.stage_writer import StageWriter


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(stage_writer, "git_commit", lambda: "a commit")
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)


@pytest.fixture(scope="module")
def images() -> CustomDataset:
    return CustomDataset(data="photos", train=True, limit=20)


@pytest.fixture(scope="module")
def others() -> CustomDataset:
    return CustomDataset(data="photos", train=True, limit=19)


@pytest.fixture(scope="module")
def original(images, tmp_path_factory) -> Path:
    """A run with all stages; tests only copy it."""
    path = tmp_path_factory.mktemp("runs") / "original"
    for name in STAGES:
        do(path, name, images)
    return path


@pytest.fixture
def path(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "r")


# The life of a stage


def test_parameters_come_first_and_a_stage_is_complete_when_stage_json_is_there(images, tmp_path, monkeypatch):
    written, write = [], StageWriter.write
    monkeypatch.setattr(StageWriter, "write", lambda *given: written.append(given[1]) or write(*given))
    for name in STAGES:
        assert do(tmp_path / "r", name, images)
        assert written[0] == "parameters.json" and written.index("stage.json") == len(written) - 1 > 1
        written.clear()
        assert not do(tmp_path / "r", name, images)
        assert getattr(read_run(tmp_path / "r"), name).sittings == 1 and not written


def test_a_run_is_read_as_it_was_written(original, images):
    read = read_run(original)
    assert (list(read.stages), read.unfinished, read.shipped, read.label) == (list(STAGES), {}, False, "original")
    assert read.train.config == TrainConfig(device="cpu") and read.pipeline == Pipeline()
    assert read.model.weights == read.train.weights == (0.5, 0.0, 1.0) and read.train.best_val_mse == 1e300
    assert read.train.least_squares.weights == (1, 2, 3) and read.compare.test_mse == 0.25
    np.testing.assert_array_equal(read.compare.examples["inputs"], images.images[[3, 1]])
    assert read.dataset(train=True).fingerprint == images.fingerprint
    assert (read.benchmark.weights, read.benchmark.origin) == ((0.5, 0.2, 0.3), "training")
    for row in (read.benchmark.table.iloc[0], read.study.sizes.iloc[0], read.study.libraries.iloc[0]):
        assert row[["rounds", "seconds", "low", "high"]].tolist() == [9, 0.5, 0.2, 0.8]
        assert row["method"] == "fast" and row["reason"] == ""
    assert read.benchmark.measured.rounds["seconds"].tolist() == [k * 0.1 for k in range(1, 10)]
    assert math.isnan(read.benchmark.table["mse"].item()) and read.study.sizes["peak_mib"].item() == 0.1
    tables = [(run.HISTORY_COLUMNS, read.train.history), (run.SEED_COLUMNS, read.seeds.table)]
    expected = {"int": (1, 2), "count": (1, 2), "loss": (math.inf, 1e300), "bool": (True, False), "str": (TEXT, "")}
    for columns, table in tables:
        assert list(table.columns) == list(columns)
        for name, kind in columns.items():
            first, second = table[name]
            assert (first, second) == expected[kind] if kind in expected else first in FLOATS and math.isnan(second)


def test_reading_writes_nothing(path, images):
    stop(path, "compare", images, force=True)
    (path / ".lock").unlink(missing_ok=True)
    before = content(path)
    read_run(path)
    assert content(path) == before and not (path / ".lock").exists()


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("complete", [True, False])
def test_other_parameters_or_images_are_refused_naming_them_and_taken_with_force(name, complete, path, images, others):
    if not complete:
        shutil.rmtree(path / name)
        stop(path, name, images)
    before, (key, old) = content(path), next(iter(PARAMETERS[name].items()))
    for dataset, changes, said in (
        (images, {key: "x"}, f"{key}: {old!r} → 'x'"),
        (others, {}, "images: '20 of photos"),
    ):
        with pytest.raises(RunError, match=r"with other parameters .*--force") as caught:
            do(path, name, dataset, **changes)
        assert said in str(caught.value)
    with pytest.raises(ParameterError, match="force: expected True or False, got 'no'"):
        do(path, name, images, force="no")
    assert content(path) == before
    assert do(path, name, others, force=True)
    assert (path / name / "stage.json").exists() and not (path / f"{name}.new").exists()


def test_a_stopped_stage_goes_on_but_not_with_another_pytorch(images, tmp_path, monkeypatch):
    path = tmp_path / "r"
    assert stop(path, "train", images) == path / "train"
    with pytest.raises(RunError, match=r"r: stage train is not complete \(it was stopped, it failed, or it is at work"):
        read_run(path)
    with monkeypatch.context() as patch, pytest.raises(RunError, match=r"torch: .* → 1\.0"):
        patch.setattr(torch, "__version__", "1.0")
        do(path, "train", images)
    stop(path, "train", images)
    assert do(path, "train", images)
    assert read_run(path).train.sittings == 3


@pytest.mark.parametrize("changes", [{}, {"indices": [7]}], ids=["alike", "other parameters"])
@pytest.mark.parametrize("complete", [True, False])
def test_a_stage_of_an_earlier_training_counts_as_not_made_and_is_made_again(complete, changes, path, images):
    if not complete:
        shutil.rmtree(path / "compare")
        stop(path, "compare", images)
    do(path, "train", images, force=True)
    read = read_run(path)
    assert list(read.stages) == ["train"] and read.unfinished["benchmark"] == "made with an earlier training"
    assert do(path, "compare", images, weight=0.75, **changes)
    read = read_run(path)
    assert (read.compare.sittings, read.compare.max_error) == (1, 0.75)


@pytest.mark.parametrize("name", STAGES)
def test_the_old_result_stays_until_the_new_one_is_whole_and_a_second_force_goes_on_with_that(name, path, images):
    before = content(path / name)
    assert stop(path, name, images, force=True) == path / f"{name}.new"
    assert content(path / name) == before and not do(path, name, images)
    for sittings in (2, 1):  # goes on; another time from the start
        assert do(path, name, images, force=True)
        assert getattr(read_run(path, stages=[name]), name).sittings == sittings


@pytest.mark.parametrize("differs", ["commit", "machine", "parameters", "record"])
def test_a_second_force_of_other_code_machine_or_parameters_begins_afresh(differs, path, images, monkeypatch):
    folder = stop(path, "compare", images, force=True)
    if differs == "commit":
        monkeypatch.setattr(stage_writer, "git_commit", lambda: "another")
    if differs == "machine":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    if differs == "record":
        (folder / "parameters.json").write_bytes(b"{")
    assert do(path, "compare", images, force=True, **{"indices": [7]} if differs == "parameters" else {})
    assert read_run(path).compare.sittings == 1 and not (path / "compare/history.csv").exists()


def test_what_was_begun_beside_a_stage_is_dropped_when_that_is_made_in_its_place(path, images):
    stop(path, "compare", images, force=True)
    do(path, "train", images, force=True)
    do(path, "compare", images)
    assert not (path / "compare.new").exists()


def test_no_training_and_an_old_format_are_one_line(images, tmp_path):
    path = tmp_path / "r"
    for said in ("there is no such folder", "the folder holds no run"):
        with pytest.raises(RunError, match=rf"r: {said}; `transformnet train --run-dir .*r` makes it"):
            read_run(path)
        path.mkdir(exist_ok=True)
    with pytest.raises(RunError, match="the folder holds no run"):
        do(path, "compare", images, force=True)
    (path / "run.json").write_text("{}")
    for call in (read_run, lambda path: do(path, "train", images, force=True)):
        with pytest.raises(
            RunError,
            match=r"a run of an older version \(run\.json\); remove it( to make the run again,)? or take another",
        ):
            call(path)
    for wrong in ("", None, 3):
        with pytest.raises(ParameterError, match="run_dir: expected the path of a folder"):
            read_run(wrong)


@pytest.mark.parametrize("umask", [0o027, 0o002])
def test_new_files_have_the_users_permissions(umask, images, tmp_path):
    before = os.umask(umask)
    try:
        do(tmp_path / "r", "train", images)
    finally:
        os.umask(before)
    for entry in [tmp_path / "r", *(tmp_path / "r").rglob("*")]:
        assert entry.stat().st_mode & 0o777 == (0o777 if entry.is_dir() else 0o666) & ~umask, entry


def test_one_process_at_a_time_writes_and_others_read(path, images):
    with locked(path):
        read_run(path)
        with pytest.raises(RunError, match="r: in use by another command; wait for it, or take another folder"):
            do(path, "compare", images, force=True)


# Kills


@contextmanager
def killed_before(step: int) -> Iterator[None]:
    """A process that is killed before the given step that changes the disk: from then on it changes nothing."""
    steps = itertools.count()

    def dying(real: Callable) -> Callable:
        def call(*arguments, **options):
            if ".lock" not in str(arguments[0]) and next(steps) >= step:
                raise Killed
            return real(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync"):
            patch.setattr(os, name, dying(getattr(os, name)))
        yield


KILLED = {
    "a first": {"name": "study"},
    "a forced": {"name": "compare", "force": True},
    "a forced training": {"name": "train", "force": True},
    "one of an earlier training": {"name": "benchmark"},
    "one in place of a marked": {"name": "compare"},
}


@pytest.mark.parametrize("what", KILLED)
def test_a_kill_at_any_step_leaves_a_whole_result_and_the_same_call_completes_the_work(what, path, images, tmp_path):
    if what == "a first":
        shutil.rmtree(path / "study")
    if what == "one in place of a marked":
        stop(path, "compare", images, force=True)
    if what.startswith("one"):
        do(path, "train", images, force=True)
    before = read_run(path)
    (path / "train/tensorboard").mkdir()
    (path / "train/tensorboard/events").write_text("1")
    name = KILLED[what]["name"]
    for step in itertools.count():
        mine = shutil.copytree(path, tmp_path / str(step))
        try:
            with killed_before(step):
                do(mine, images=images, weight=0.75, **KILLED[what])
            break
        except Killed:
            pass
        read = read_run(mine)
        retrained = read.train.training != before.train.training
        assert set(read.stages) == {"train"} if retrained else set(read.stages) >= set(before.stages)
        do(mine, images=images, weight=0.75, **KILLED[what])
        done = read_run(mine, stages=[name])
        assert (done.train.weights[0] if name == "train" else 0.75) == 0.75 and name in done.stages
        assert not [entry for entry in content(mine) if entry.endswith((".old", ".new", ".part"))], step
        shutil.rmtree(mine)
    assert step > 10  # else it was not killed where it matters


def test_a_reader_puts_back_what_a_kill_left_under_another_name(path):
    for name in ("train", "compare"):
        (path / name).rename(path / f"{name}.old")
    with locked(path), pytest.raises(RunError, match="in use by another command"):
        read_run(path)
    assert list(read_run(path).stages) == list(STAGES) and not list(path.glob("*.old"))


# Somebody's own files


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize(
    ("mine", "said"),
    [
        (["train/cat/1.jpg", "test/cat/2.jpg"], "train: holds 'cat', which is not a run's"),
        (["train/train.ipynb"], "train: holds 'train.ipynb', which is not a run's"),
        (["train/parameters.json", "train/cat/1.jpg"], "train: holds 'cat'|train/parameters.json: damaged"),
        (["train/.git/config"], "train: holds '.git'"),
        (["train.old/1.jpg"], "train.old: holds '1.jpg'"),
        (["train.new/cat/1.jpg"], "train.new: holds 'cat'"),
        (["train"], r"train: cannot be read \(Not a directory\)"),
    ],
)
def test_a_folder_with_somebodys_own_files_is_refused_and_nothing_of_it_touched(mine, said, force, images, tmp_path):
    for name in mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = content(tmp_path)
    with pytest.raises(RunError, match=said):
        do(tmp_path, "train", images, force=force)
    with pytest.raises(RunError, match=r"the folder holds no run|stage train is not complete"):
        read_run(tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["train", "compare"])
def test_a_file_that_somebody_put_into_a_stage_is_not_removed_with_it(name, path, images):
    (path / name / "notes.txt").write_text("mine")
    assert not do(path, name, images)
    before = content(path)
    with pytest.raises(RunError, match=rf"{name}: holds 'notes\.txt', which is not a run's.*move it elsewhere"):
        do(path, name, images, force=True)
    assert content(path) == before


def test_a_run_dir_that_is_a_file_is_one_line(images, tmp_path):
    (tmp_path / "r").write_text("mine")
    for call, place in itertools.product((read_run, lambda path: do(path, "train", images)), ("r", "r/below")):
        with pytest.raises(RunError, match=f"{place}: "):
            call(tmp_path / place)


# Several runs


def test_no_run_means_the_reference_run_and_a_scratch_run_is_a_copy_of_its_training():
    (reference,) = read_runs([])
    assert (reference.path, reference.label, reference.shipped) == (reference_run(), "paper-cpu-small†", True)
    scratch = read_run(scratch_run(""))
    assert (
        list(scratch.stages) == ["train"] and not scratch.shipped and scratch.model.weights == reference.model.weights
    )
    assert scratch_run("r") == Path("r")
    with pytest.raises(ParameterError, match="runs: expected a list of run directories, got 'r'"):
        read_runs("r")


def test_runs_that_cannot_stand_in_one_report_are_refused(path, images, others, tmp_path):
    other = shutil.copytree(path, tmp_path / "other")
    assert [read.label for read in read_runs([other, path])] == ["other", "r"]
    shutil.copytree(path, tmp_path / "below/r")
    with pytest.raises(RunError, match=r"below/r and .*/r: two runs named r; rename one of the folders"):
        read_runs([path, tmp_path / "below/r"])
    do(other, "benchmark", others, force=True)
    with pytest.raises(RunError, match=r"other: other test images of benchmark \(19 of photos, .*--force"):
        read_runs([path, other])
    do(other, "train", images, force=True, pipeline=Pipeline((20, 20)).to_dict())
    with pytest.raises(RunError, match=r"other: another pipeline \(resize to 20×20"):
        read_runs([path, other])


def test_runs_that_show_other_examples_are_refused(path, tmp_path):
    other = shutil.copytree(path, tmp_path / "other")
    with np.load(other / "compare/examples.npz") as arrays:
        np.savez(other / "compare/examples.npz", **{**arrays, "indices": np.array([5, 6])})
    with pytest.raises(RunError, match=r"other: shows other examples \(\[5, 6\]\) than .*r \(\[3, 1\]\)"):
        read_runs([path, other])
