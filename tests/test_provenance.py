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
from transformnet_lib.findings import provenance
from transformnet_lib.findings.abstract import answer
from transformnet_lib.findings.numbers import report_numbers
from transformnet_lib.findings.places import places
from transformnet_lib.run import read_run, shipped_runs


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
        ("paper", {"batch_size": 32, "min_delta": 0.5, "epochs": 2}, Pipeline(vflip=False)),
    ],
)
def test_the_commands_ask_for_what_the_run_was_made_with(run, asked, preset, changes, pipeline):
    config = TrainConfig.from_preset(preset, device="cpu", **changes)
    made = altered(run, train={"config": config, "pipeline": pipeline}, compare={"parameters": {"indices": [1, 5]}})
    for command in provenance.run_commands(made):
        program, *arguments = split(command)
        done = CliRunner().invoke(app, arguments)
        assert program == "transformnet" and done.exit_code == 0, done.output
    (_, trained), (_, compared), (_, timed) = asked
    names = {field.name for field in fields(TrainConfig)} - {"preset"}
    assert config == TrainConfig.from_preset(preset, **{k: v for k, v in trained.items() if k in names})
    assert (trained["data"], trained["limit"]) == ("photos", 600)
    size = trained.get("output_size", 28)
    assert pipeline == Pipeline((size, size), trained.get("hflip", True), trained.get("vflip", True))
    assert compared["indices"] == [1, 5]
    for name in ("devices", "batch_sizes", "seconds"):
        assert timed[name] == run.benchmark.parameters[name]
    assert full_sweep()["seconds"] != timed["seconds"] and "rounds" not in timed  # the command's own is left out


def test_what_the_benchmark_was_asked_for_beyond_the_defaults_is_an_option(run):
    asked = {"rounds": 12, "seconds": 60.0, "precision": 0.01, "other_weights": {"a b": [0.3, 0.6, 0.1]}}
    made = altered(run, benchmark={"parameters": {"devices": ["cpu"], "batch_sizes": list(BATCH_SIZES), **asked}})
    assert split(provenance.run_commands(made)[-1]) == [
        "transformnet", "benchmark", "--run-dir", "small", "--device", "cpu", "--rounds", "12", "--precision", "0.01",
        "--beside", "a b",
    ]  # fmt: skip


def test_what_no_command_can_ask_for_is_said(run):
    made = altered(run, train={"config": TrainConfig(device="cpu", weight_decay=0.5)})
    assert provenance.run_commands(made)[0].endswith("# and, from Python: weight_decay=0.5")


def test_the_appendix_has_every_stage_and_what_it_was_asked_for(run):
    shown = altered(run, train={"seconds": 2.04}, compare={"seconds": 2.04, "sittings": 3})
    stages = provenance.stages_table([shown]).set_index("stage")
    assert list(stages.index) == ["train", "compare", "benchmark"]
    assert stages["seconds"].tolist()[:2] == ["2.0", "2.0 (the last of 3 sittings)"]
    assert "`small`, benchmark: " in provenance.stages_asked([run])
    assert "batch sizes 16 64; " in provenance.stages_asked([run])
    facts = provenance.training_table([run]).set_index("Fact")["small"]
    assert facts["training images, sha256"] == run.train.images.fingerprint[:16] + "…"
    assert facts["batch size (images)"] == "32" and facts["loss on clamped outputs"] == "no"


def test_runs_that_differ_are_told_apart_on_the_first_page(run):
    other = altered(run, label="other", train={"config": TrainConfig(device="cpu", seed=7)})
    assert "- **Seed:** 0 (`small`); 7 (`other`)." in provenance.first_page([run, other])
    assert "- **Seed:** 0." in provenance.first_page([run])


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
    here, there = places(both)
    assert (here.name, there.name) == ("the CPU of `small`", "CUDA device 7 of `server†`")
    assert "`server†` came with this project" in provenance.first_page(both)
    assert "came with this project" not in provenance.first_page([run])
    assert "the CPU of `small`" in answer(both).split(". ")[0]
    assert provenance.commands(both).splitlines()[-1] == (
        "transformnet report --run small --run report/reference/server"
    )
    assert "--run-dir server" not in provenance.commands(both)


# The numbers by name


def test_numbers_are_strict_json_and_those_of_the_runs(run):
    numbers = json.loads(json.dumps(report_numbers([run]), allow_nan=False))
    found = numbers["runs"]["small"]
    assert tuple(found["train"]["weights"]) == run.train.weights
    assert found["train"]["best_val_mse"] == run.train.best_val_mse
    assert [row["val_mse"] for row in found["train"]["history"]] == run.train.history["val_mse"].tolist()
    assert found["compare"]["test_mse"] == run.compare.test_mse
    assert found["stages"]["train"]["images"] == run.train.images.model_dump(mode="json")
    (place,) = places([run])
    cpu = numbers["places"]["cpu"]
    assert cpu["best"]["best"]["fast"]["seconds"] == place.best("fast")["seconds"]
    ratio, expected = cpu["against_pipeline"]["best"]["fast"]["in batches"], vars(place.against("fast", "batched"))
    assert {name: ratio[name] for name in expected} == expected
    assert cpu["rounds"]["sweep"]["rounds"] == 9 and cpu["rounds"]["workers"]["rounds"] == 0
    assert len(found["benchmark"]) == len(run.benchmark.table)
    assert found["train"]["preset"] == "precise"
    assert numbers["paper"]["table1"][0]["seconds"] == 0.4121
