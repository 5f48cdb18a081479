import inspect
import subprocess
import sys
from pathlib import Path

import papermill
import pytest
from typer.testing import CliRunner

from transformnet_lib import cli, report, run
from transformnet_lib.errors import Interrupted, TransformnetError
from transformnet_lib.export import ExportError
from transformnet_lib.report import NOTEBOOKS

COMMAND = Path(sys.executable).parent / "transformnet"


def call(*arguments: str | bytes) -> subprocess.CompletedProcess:
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (cli.train, {}),
        (cli.compare, {"index": "indices"}),
        (cli.benchmark, {"device": "devices", "batch_size": "batch_sizes", "beside": "other_weights"}),
        (cli.seeds, {}),
        (cli.study, {"size": "sizes"}),
    ],
)
def test_each_command_has_its_notebooks_parameters_as_options(command, names):
    options = {names.get(name, name) for name in inspect.signature(command).parameters}
    parameters = set(papermill.inspect_notebook(NOTEBOOKS / f"{command.__name__}.ipynb"))
    assert options == parameters - {"num_workers", "small_batch_sizes"}  # whose sweeps are the notebook's to choose


@pytest.mark.parametrize("arguments", [["train", "--run-dir"], ["report", "--run"], ["report", "--out"], ["export"]])
def test_an_empty_path_is_not_taken_for_the_working_directory(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, [*arguments, ""])
    assert done.exit_code == 2 and "expected a path, got an empty text" in done.output
    assert not list(tmp_path.iterdir())


def test_help_does_not_load_torch():
    code = "import sys, transformnet_lib.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert "report" in CliRunner().invoke(cli.app, ["--help"]).stdout


def test_importing_the_library_does_not_load_torch_but_names_all():
    code = "import sys, transformnet_lib as t; assert 'torch' not in sys.modules; print(*t.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"TransformNet", "CustomDataset", "EarlyStopping", "TrainConfig", "train", "benchmark", "Run", "Pipeline",
            "test_inference_time"} <= set(done.stdout.split())  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--run-dir", "r", "--device", "tpu"], "device: expected cpu, cuda, cuda:N, mps or auto, got 'tpu'"),
        (["train", "--run-dir", "r", "--data", "folder:nowhere"], "nowhere is not a folder"),
        (["compare", "--run-dir", "r"], "r: there is no such folder"),
        (["report", "--run", "r"], "r: there is no such folder"),
        (["report", "--run", "r", "--limit", "5"], "--limit: only for making runs"),
        (["report", "--device", "cpu", "--device", "tpu"], "device: expected cpu"),
        (["report", "--rounds", "8"], "rounds: expected a whole number from 9, got 8: fewer do not bound a median"),
        (["report", "--limit", "0"], "limit: expected a whole number from 1"),
        (["report", "--preset", "best"], "preset: expected one of paper, precise, got 'best'"),
        (["report", "--data", "folder:nowhere"], "nowhere is not a folder; expected nowhere/train/ and nowhere/test/"),
        (["train", "--run-dir", "r", "--data", "folder:im\udcff"], "data: expected a path in UTF-8, got 'im\\udcff'"),
        (["report", "--data-path", "d\udcff"], "data_path: expected a path in UTF-8, got 'd\\udcff'"),
        (["report", "--run", "r\udcff"], "run_dir: expected a path in UTF-8, got 'r\\udcff'"),
        (["compare", "--run-dir", "r\udcff"], "run_dir: expected a path in UTF-8, got 'r\\udcff'"),
        (["report", "--run", "r", "--out", "o\udcff"], "out: expected a path in UTF-8, got 'o\\udcff'"),
        (["data", "cifar10", "--data-path", "d\udcff"], "data_path: expected a path in UTF-8, got 'd\\udcff'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    error = CliRunner().invoke(cli.app, arguments).exception
    assert isinstance(error, TransformnetError) and message in str(error)
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_one_line_and_a_status_other_than_0(tmp_path):
    done = call("train", "--run-dir", tmp_path / "r", "--data", b"folder:im\xff")
    assert done.returncode == 1
    assert done.stderr == ("error: data: expected a path in UTF-8, got 'im\\udcff'; rename the folder\n")


@pytest.mark.parametrize("form", [TransformnetError, ExportError, Interrupted])
def test_what_a_message_quotes_cannot_break_its_line_or_obey_the_terminal(monkeypatch, capsys, form):
    def refuse():
        raise form("a\nb\x1b[2J.png: not a readable image\r\n")

    monkeypatch.setattr(cli, "app", refuse)
    monkeypatch.setattr(cli.os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == (130 if form is Interrupted else 1)
    assert capsys.readouterr().err.strip().removeprefix("error: ") == "a b\ufffd[2J.png: not a readable image"


def test_a_message_does_not_quote_without_end():
    told = str(TransformnetError("r/run.json: not " + 10**6 * "x"))
    assert told.startswith("r/run.json: not xx") and told.endswith("x …") and len(told) < 6000


def test_unknown_options_are_refused():
    done = CliRunner().invoke(cli.app, ["train", "--run-dir", "r", "--colour", "red"])
    assert done.exit_code == 2 and "--colour" in done.output


def test_a_report_says_its_answer_and_how_good_its_times_are(monkeypatch, tmp_path, capsys):
    def make_report(runs, out, **options):
        (tmp_path / "report.json").write_text(
            '{"answer": "Yes. And more.", "places": [{"run": "r", "device": "cpu", "precision": 0.173}]}'
        )
        return [tmp_path / "report.json"]

    monkeypatch.setattr(report, "make_runs", lambda *_, **__: [])
    monkeypatch.setattr(report, "make_report", make_report)
    monkeypatch.setattr(run, "shipped_runs", lambda made: [])
    cli.report(runs_dir=tmp_path, out=tmp_path)
    assert capsys.readouterr().err == "Yes. And more.\nr, cpu: speed-ups of the sweep are good to ±17 %\n"


def test_a_report_hands_its_options_to_the_stages(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(report, "run_stage", lambda name, run_dir, given: asked.append((name, run_dir.name, given)))
    monkeypatch.setattr(report, "make_report", lambda made, out, **front: sys.exit(3))
    monkeypatch.setattr(run, "read_runs", lambda made: [])
    monkeypatch.setattr(run, "shipped_runs", lambda made: [])
    images = tmp_path / "images"
    for split in ("train", "test"):
        (images / split).mkdir(parents=True)
    arguments = ["report", "--device", "cpu", "--data", f"folder:{images}", "--output-size", "64", "--no-hflip",
                 "--preset", "precise", "--limit", "60", "--epochs", "4", "--rounds", "11", "--study"]  # fmt: skip
    assert CliRunner().invoke(cli.app, arguments).exit_code == 3
    assert [name for name, _, _ in asked] == ["train", "compare", "benchmark", "seeds", "study"]
    assert {label for _, label, _ in asked} == {"precise-cpu"}
    wanted = {"device": "cpu", "data": f"folder:{images}", "output_size": 64, "hflip": False, "preset": "precise",
              "limit": 60, "epochs": 4}  # fmt: skip
    assert asked[0][2] == wanted
    assert asked[2][2]["rounds"] == asked[4][2]["rounds"] == 11 and asked[3][2]["seeds"] == 20
    assert asked[2][2]["other_weights"] == {}
