"""The appendix: facts of each run, and commands that make it again; and the numbers by name."""

import json
import re
import shlex
import shutil
from dataclasses import fields

import pytest
from conftest import altered
from typer.testing import CliRunner

import transformnet_lib.run
from transformnet_lib import Pipeline, Run, TrainConfig
from transformnet_lib.benchmarking import BATCH_SIZES
from transformnet_lib.cli import app, full_sweep
from transformnet_lib.facts import as_json, report_facts
from transformnet_lib.facts.commands import run_commands
from transformnet_lib.pipeline import check_size
from transformnet_lib.run import read_run, shipped_runs
from transformnet_lib.words import Words
from transformnet_lib.words.filters import plain


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, dict]]:
    """What the commands ask of each stage, instead of doing it: name and notebook parameters."""
    found = []
    monkeypatch.setattr("transformnet_lib.report.run_stage", lambda name, run_dir, given: found.append((name, given)))
    return found


def split(command: str) -> list[str]:
    """The words of a command line, which may be continued on other lines."""
    return shlex.split(command.replace("\\\n", " "))


@pytest.mark.parametrize(
    ("preset", "changes", "pipeline"),
    [
        ("paper", {}, Pipeline()),
        ("precise", {"seed": 3, "epochs": 1, "lr": 0.05, "patience": 2}, Pipeline((20, 20), hflip=False)),
        ("precise", {}, Pipeline((48, 64))),
        ("paper", {"batch_size": 32, "min_delta": 0.5, "epochs": 2}, Pipeline(vflip=False)),
    ],
)
def test_the_commands_ask_for_what_the_run_was_made_with(run, asked, preset, changes, pipeline):
    config = TrainConfig.from_preset(preset, device="cpu", **changes)
    made = altered(run, train={"config": config, "pipeline": pipeline}, compare={"parameters": {"indices": [1, 5]}})
    for command in run_commands(made):
        program, *arguments = split(command)
        done = CliRunner().invoke(app, arguments)
        assert program == "transformnet" and done.exit_code == 0, done.output
    (_, trained), (_, compared), (_, timed) = asked
    names = {field.name for field in fields(TrainConfig)} - {"preset"}
    assert config == TrainConfig.from_preset(preset, **{k: v for k, v in trained.items() if k in names})
    assert (trained["data"], trained["limit"]) == ("photos", 600)
    size = trained.get("output_size", 28)
    assert pipeline == Pipeline(check_size("output_size", size), trained.get("hflip", True), trained.get("vflip", True))
    assert compared["indices"] == [1, 5]
    for name in ("devices", "batch_sizes", "seconds"):
        assert timed[name] == run.benchmark.parameters[name]
    assert full_sweep()["seconds"] != timed["seconds"] and "rounds" not in timed  # the command's own is left out


def test_what_the_benchmark_was_asked_for_beyond_the_defaults_is_an_option(run):
    asked = {"rounds": 12, "seconds": 60.0, "precision": 0.01, "other_weights": {"a b": [0.3, 0.6, 0.1]}}
    made = altered(run, benchmark={"parameters": {"devices": ["cpu"], "batch_sizes": list(BATCH_SIZES), **asked}})
    assert split(run_commands(made)[-1]) == [
        "transformnet", "benchmark", "--run-dir", "small", "--device", "cpu", "--rounds", "12", "--precision", "0.01",
        "--beside", "a b",
    ]  # fmt: skip


def test_a_stage_on_other_images_than_the_trainings_names_them(run, asked):
    elsewhere = run.compare.images.model_copy(update={"source": "folder:/other"})
    commands = run_commands(altered(run, compare={"images": elsewhere}))
    assert ["--data" in split(command) for command in commands] == [True, True, False]
    assert split(commands[1])[4:6] == ["--data", "folder:/other"]


@pytest.mark.parametrize(("limit", "kept"), [(None, None), (600, 600), (601, None)])
def test_a_limit_beyond_the_images_there_are_changes_nothing(run, limit, kept):
    images = run.train.images
    request = images.request.model_copy(update={"limit": limit})
    images = images.model_copy(update={"request": request})
    assert images.count == 600
    (facts,) = report_facts([altered(run, train={"images": images})]).runs
    assert facts.preset.limit == kept


def test_what_no_command_can_ask_for_is_said(run):
    made = altered(run, train={"config": TrainConfig(device="cpu", weight_decay=0.5)})
    assert run_commands(made)[0].endswith("# and, from Python: weight_decay=0.5")


def test_the_appendix_has_every_stage_and_what_differs_between_runs(run):
    other = altered(run, label="other", train={"config": TrainConfig(device="cpu", seed=7)}, compare={"sittings": 3})
    report = report_facts([run, other])
    assert [(stage.run, stage.name) for stage in report.stages[:3]] == [
        ("small", "train"), ("small", "compare"), ("small", "benchmark")
    ]  # fmt: skip
    assert [stage.continued for stage in report.stages] == [False] * 4 + [True, False]
    different = {fact.name: fact.values for fact in report.different_settings}
    assert different["seed"] == [0, 7] and "cpu" not in different
    same = {fact.name: fact.values[0] for fact in report.same_settings}
    assert same["training_fingerprint"] == run.train.images.fingerprint[:16] and same["limit"] == 600
    text = plain(Words(report)("provenance"))
    assert "max. epochs 30" in text and "seed" not in text
    assert "(the last of 3 sittings)" in Words(report)("provenance", "stages")
    assert "| seed | 0 | 7 |" in Words(report)("provenance", "table")


# Shipped runs


@pytest.fixture
def shipped(run, tmp_path, monkeypatch) -> Run:
    """A copy of the run as if it had come with the project, from another kind of device."""
    folder = tmp_path / "reference" / "server"
    shutil.copytree(run.path, folder)
    for path in folder.glob("*/parameters.json"):
        begun = json.loads(path.read_text())
        begun["environment"] |= {"device": "cuda", "device_name": "Some GPU"}
        path.write_text(json.dumps(begun))
    for table in (folder / "benchmark/settings.csv", folder / "benchmark/rounds.csv"):  # fast,cpu and fast cpu 16
        table.write_text(re.sub(r"\b(reference|fast|copy)([, ])cpu\b", r"\1\2cuda:7", table.read_text()))
    monkeypatch.setattr(transformnet_lib.run, "REFERENCE", tmp_path / "reference")
    return read_run(folder)


def test_a_shipped_run_joins_where_its_kind_of_device_is_missing(run, shipped):
    assert [found.path for found in shipped_runs([run])] == [shipped.path]
    assert shipped_runs([run, shipped]) == []


@pytest.mark.parametrize("change", ["images", "pipeline", "no benchmark"])
def test_a_shipped_run_that_does_not_fit_stays_out(run, shipped, change):
    if change == "images":
        images = run.benchmark.images.model_copy(update={"fingerprint": "0" * 64})
        run = altered(run, benchmark={"images": images})
    elif change == "pipeline":
        run = altered(run, train={"pipeline": Pipeline(hflip=False)})
    else:
        shutil.rmtree(shipped.path / "benchmark")
    assert shipped_runs([run]) == []


def test_everything_of_a_shipped_run_is_marked(run, shipped):
    assert (shipped.label, run.label) == ("server†", "small")
    both = [run, shipped]
    report = report_facts(both)
    here, there = report.places
    assert (here.title, there.title) == ("small (cpu)", "server† (cuda:7)")
    say = Words(report)
    assert (say.names.where(here), say.names.where(there)) == ("the CPU of `small`", "CUDA device 7 of `server†`")
    assert "came with this project" in say("provenance")
    assert "came with this project" not in Words(report_facts([run]))("provenance")
    assert report.quickest.run == "small"
    times = [row.split("|")[4] for row in say("table1", "table", table=report.table1[0]).splitlines()[2:]]
    assert sum("†" in time for time in times) == 8 and sum(time.strip(" *†")[:1].isdigit() for time in times) == 16
    assert report.commands.splitlines()[-1] == "transformnet report --run small --run report/reference/server"
    assert "--run-dir server" not in report.commands


# The numbers by name


def test_numbers_are_strict_json_and_those_of_the_runs(run):
    report = report_facts([run])
    numbers = json.loads(json.dumps(as_json(report), allow_nan=False))
    (found,) = numbers["runs"]
    assert tuple(found["training"]["weights"]) == run.train.weights
    assert found["training"]["val_mse"] == run.train.best_val_mse
    assert [row["val_mse"] for row in found["training"]["history"]] == run.train.history["val_mse"].tolist()
    assert found["comparison"]["mse"] == run.compare.test_mse
    assert numbers["stages"][0]["images"] == run.train.images.model_dump(mode="json")
    (cpu,) = numbers["places"]
    fast = cpu["methods"][1]
    expected = report.places[0].methods[1]
    assert fast["best"]["seconds"]["median"] == expected.best.seconds.median
    assert fast["over"]["batched"]["low"] == expected.over["batched"].low
    assert cpu["rounds"]["sweep"]["rounds"] == 9 and cpu["rounds"]["workers"]["rounds"] == 0
    assert len(cpu["table"]) == len(run.benchmark.table)
    assert found["preset"]["name"] == "precise"
    assert numbers["table1"][0]["blocks"][4]["rows"][0]["paper_milliseconds"] == pytest.approx(412.1)
