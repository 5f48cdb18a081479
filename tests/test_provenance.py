"""The appendix: facts of each run, and commands that make it again; and the numbers by name."""

import json
import re
import shlex
import shutil
from dataclasses import fields

import pytest
from typer.testing import CliRunner

from transformnet_lib import CustomDataset, Pipeline, Run, TrainConfig, runs, train
from transformnet_lib.cli import app, full_sweep
from transformnet_lib.comparison import compare_run
from transformnet_lib.findings import provenance
from transformnet_lib.findings.abstract import answer
from transformnet_lib.findings.numbers import report_numbers
from transformnet_lib.findings.places import places
from transformnet_lib.training import load_config, load_training


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
def test_the_commands_ask_for_what_the_run_was_made_with(tmp_path, asked, preset, changes, pipeline):
    run = Run(tmp_path / "a run")
    config = TrainConfig.from_preset(preset, device="cpu", **changes)
    train(CustomDataset(data="photos", train=True, limit=300, pipeline=pipeline), config, run=run)
    compare_run(run, CustomDataset(data="photos", train=False, limit=300, pipeline=pipeline), [1, 5])
    for command in provenance.run_commands(run):
        program, *arguments = split(command)
        done = CliRunner().invoke(app, arguments)
        assert program == "transformnet" and done.exit_code == 0, done.output
    (_, trained), (_, compared) = asked
    names = {field.name for field in fields(TrainConfig)} - {"preset"}
    assert config == TrainConfig.from_preset(preset, **{k: v for k, v in trained.items() if k in names})
    assert (trained["data"], trained["limit"]) == ("photos", 300)
    size = trained.get("output_size", 28)
    assert pipeline == Pipeline((size, size), trained.get("hflip", True), trained.get("vflip", True))
    assert compared["indices"] == [1, 5]


def test_the_benchmarks_command_names_what_is_not_its_default(run, asked):
    (command,) = (line for line in provenance.run_commands(run) if line.startswith("transformnet benchmark"))
    CliRunner().invoke(app, split(command)[1:])
    ((_, given),) = asked
    parameters = run.stage_info("benchmark")["parameters"]
    assert {name: given[name] for name in ("devices", "batch_sizes", "repeats")} == {
        name: parameters[name] for name in ("devices", "batch_sizes", "repeats")
    }
    assert full_sweep()["repeats"] != parameters["repeats"]


def test_what_no_command_can_ask_for_is_said(tmp_path, train_set):
    run = Run(tmp_path / "r")
    train(train_set, TrainConfig(device="cpu", epochs=1, weight_decay=0.5), run=run)
    assert provenance.run_commands(run)[0].endswith("# and, from Python: weight_decay=0.5")


def test_the_appendix_has_every_stage_and_what_it_was_asked_for(run):
    stages = provenance.stages_table([run]).set_index("stage")
    assert provenance._duration({"seconds": 2.04, "sittings": 1}) == "2.0"
    assert provenance._duration({"seconds": 2.04, "sittings": 3}) == "2.0 in 3 sittings"
    assert list(stages.index) == ["train", "compare", "benchmark"]
    assert "`small`, benchmark: " in provenance.stages_asked([run])
    assert "batch sizes 16 64; " in provenance.stages_asked([run])
    facts = provenance.training_table([run]).set_index("Fact")["small"]
    train_images = run.stage_info("train")["images"]
    assert facts["training images, sha256"] == train_images["fingerprint"][:16] + "…"
    assert facts["batch size (images)"] == "32" and facts["loss on clamped outputs"] == "no"


def test_runs_that_differ_are_told_apart_on_the_first_page(run, tmp_path, train_set):
    other = Run(tmp_path / "other")
    train(train_set, TrainConfig(device="cpu", epochs=1, seed=7), run=other)
    assert "- **Seed:** 0 (`small`); 7 (`other`)." in provenance.first_page([run, other])
    assert "- **Seed:** 0." in provenance.first_page([run])


# Shipped runs


@pytest.fixture
def shipped(run, tmp_path, monkeypatch) -> Run:
    """A copy of the run as if it had come with the project, from another kind of device."""
    folder = tmp_path / "reference" / "server"
    shutil.copytree(run.path, folder)
    info = json.loads((folder / "run.json").read_text())
    for stage in info["stages"].values():
        stage["environment"] |= {"device": "cuda", "device_name": "Some GPU"}
    info["stages"]["benchmark"]["parameters"]["devices"] = ["cuda:7"]
    (folder / "run.json").write_text(json.dumps(info))
    benchmark = (folder / "benchmark.csv").read_text()
    (folder / "benchmark.csv").write_text(
        re.sub("^(reference|fast|folded|floor),cpu", r"\1,cuda:7", benchmark, flags=re.M)
    )
    monkeypatch.setattr(runs, "REFERENCE", tmp_path / "reference")
    return Run(folder)


def test_a_shipped_run_joins_where_its_kind_of_device_is_missing(run, shipped):
    assert [found.path for found in runs.shipped_runs([run])] == [shipped.path]
    assert runs.shipped_runs([run, shipped]) == []


@pytest.mark.parametrize("change", ["images", "pipeline", "no benchmark"])
def test_a_shipped_run_that_does_not_fit_stays_out(run, shipped, change):
    info = json.loads((shipped.path / "run.json").read_text())
    if change == "images":
        info["stages"]["benchmark"]["images"]["fingerprint"] = "0" * 64
    elif change == "pipeline":
        info["stages"]["train"]["parameters"]["pipeline"]["hflip"] = False
    else:
        del info["stages"]["benchmark"]
    (shipped.path / "run.json").write_text(json.dumps(info))
    assert runs.shipped_runs([run]) == []


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
    trained = load_training(run)
    found = numbers["runs"]["small"]
    assert tuple(found["train"]["weights"]) == trained.model.weights
    assert found["train"]["best_val_mse"] == trained.best_val_mse
    assert [row["val_mse"] for row in found["train"]["history"]] == run.history()["val_mse"].tolist()
    assert found["compare"]["test_mse"] == run.stage_info("compare")["results"]["test_mse"]
    assert found["stages"]["train"]["images"] == run.stage_info("train")["images"]
    (place,) = places([run])
    cpu = numbers["places"]["cpu"]
    assert cpu["fastest"]["fast"]["seconds"] == place.best("fast")["seconds"]
    ratio = cpu["against_pipeline"]["fast"]["batched"]["ratio"]
    assert ratio == place.best("fast")["speedup"] / place.baseline("batched")["speedup"]
    assert len(found["benchmark"]) == len(place.table)
    assert found["train"]["preset"] == load_config(run).preset
    assert numbers["paper"]["table1"][0]["seconds"] == 0.4121
