"""The whole, as a user runs it: the command line makes runs and report; papermill and nbconvert work by themselves."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import bs4
import nbformat
import pypdf
import pytest

from transformnet_lib import Run, paper
from transformnet_lib.errors import NotebookError, ParameterError, RunError
from transformnet_lib.findings.text import scientific
from transformnet_lib.report import NOTEBOOKS, check_executed, execute, make_report

BIN = Path(sys.executable).parent


def command(*arguments, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run one of the environment's commands in `cwd`; OpenMP kept to one thread, since tests may share the cores."""
    program, *rest = map(str, arguments)
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([BIN / program, *rest], cwd=cwd, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A folder in which `transformnet report` was run on a few images."""
    folder = tmp_path_factory.mktemp("made")
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent / "audit"), os.environ.get("PYTHONPATH")]))
    done = command(
        "transformnet", "report", "--device", "cpu", "--data", "photos", "--limit", 2000, "--repeats", 2,
        "--title", "A <b>bold</b> $title$ #1", "--author", "Ada \\ Lovelace", cwd=folder,
        PYTHONPATH=path, TRANSFORMNET_AUDIT=str(folder / "network.log"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["report/build/report.html", "report/build/report.pdf"]
    return folder


@pytest.fixture(scope="session")
def page(made) -> bs4.BeautifulSoup:
    return bs4.BeautifulSoup((made / "report/build/report.html").read_text(), "html.parser")


@pytest.fixture(scope="session")
def pdf_text(made) -> str:
    reader = pypdf.PdfReader(made / "report/build/report.pdf")
    return re.sub(r"\s+", " ", " ".join(page.extract_text() for page in reader.pages))


def test_no_process_of_the_report_asks_another_machine_for_anything(made):
    events = [line.split("\t") for line in (made / "network.log").read_text().splitlines()]
    assert len({process for process, *_ in events}) > 6  # the command and the kernels of its notebooks
    asked = [ast.literal_eval(arguments)[0] for _, _, arguments in events]
    hosts = {address[0] if isinstance(address, tuple) else address for address in asked}
    assert "127.0.0.1" in hosts
    local = (None, "", "127.0.0.1", "::1", "localhost")
    assert [host for host in hosts if host not in local and not host.startswith("/")] == []  # or a path


def test_each_run_has_its_stages_and_notebooks(made):
    for label, stages in (("cpu", {"train", "compare", "benchmark"}), ("cpu-precise", {"train", "compare"})):
        run = Run(made / "runs" / label)
        assert {name for name, stage in run.info["stages"].items() if stage["status"] == "complete"} == stages
        for stage in stages:
            check_executed(run.path / f"{stage}.ipynb")


def test_title_and_author_are_shown_as_they_were_given(page, made):
    assert page.find("h1").get_text() == "A <b>bold</b> $title$ #1"
    assert "Ada \\ Lovelace" in page.find("header").get_text()
    assert pypdf.PdfReader(made / "report/build/report.pdf").metadata.title == "A <b>bold</b> $title$ #1"


def test_the_sections_are_the_papers_and_ours(page):
    headings = [re.sub(r"\s+", " ", heading.get_text()).strip() for heading in page.find("main").find_all("h2")]
    assert [re.sub(r"^\w+ ", "", heading) if heading != "Abstract" else heading for heading in headings] == [
        "Abstract",
        "Model architecture and design",
        "Loss function",
        "Early stopping criterion",
        "Model vs. ground truth",
        "Runtime benchmark",
        "Training details",
        "Experiment tracking",
        "Does the model win?",
        "Provenance",
    ]


def test_figures_1_to_8_are_the_papers_in_both_formats(page, pdf_text):
    captions = [caption.get_text() for caption in page.find_all("figcaption")]
    wanted = ["Test image 0"] + [f"Test image {i}" for i in range(1, 5)]
    wanted += ["Training MSE", "Validation MSE", "Time of an epoch", "The three weights", "Speed-up on cpu"]
    wanted += ["How the speed-up comes about on cpu"]
    for number, (start, caption) in enumerate(zip(wanted, captions, strict=True), 1):
        assert re.sub(r"\s+", " ", caption).startswith(f"Figure {number}: {start}")
        assert f"Figure {number}: {start}" in pdf_text
    assert "All runs were trained on one device, cpu" in captions[5]


def test_every_figure_has_alt_text(page):
    assert all(len(image["alt"]) > 20 for image in page.find("main").find_all("img"))


def test_table_1_has_48_rows_with_the_papers_seconds(page, pdf_text):
    table = next(table for table in page.find_all("table") if "Table 1" in table.get_text())
    rows = [[cell.get_text() for cell in row.find_all(["td", "th"])] for row in table.find("tbody").find_all("tr")]
    published = paper.table1().sort_values("device", kind="stable")  # measured first, and "cpu" sorts before "cuda"
    assert [row[4] for row in rows] == [f"{seconds:.4f}" for seconds in published["seconds"]]
    assert [row[0] for row in rows] == published["device"].tolist()
    measured = re.compile(r"\d+\.\d{3,4} \[\d+\.\d{3,4}, \d+\.\d{3,4}\]\*?")
    assert all(measured.fullmatch(cell) for row in rows if row[0] == "cpu" for cell in (row[6], row[8]))
    for seconds in published["seconds"]:
        assert f"{seconds:.4f}" in pdf_text


def test_the_first_page_says_what_was_measured_where(made, page):
    text = page.find("main").get_text()
    stage = Run(made / "runs/cpu").stage_info("train")
    for fact in ("photos", stage["environment"]["cpu"], stage["environment"]["torch"], stage["commit"][:12]):
        assert fact in text
    assert stage["started"][:10] in text


def test_numbers_in_prose_come_from_the_run_files(made, page):
    run = Run(made / "runs/cpu-precise")
    results = run.stage_info("compare")["results"]
    abstract = page.find(class_="abstract").get_text()
    assert f"the MSE is {scientific(results['test_mse'])}" in abstract


def test_the_page_needs_no_other_host(page):
    for tag in page.find_all(True):
        for name in ("src", "srcset", "data", "poster", "action"):
            assert not str(tag.get(name, "")).startswith(("http", "//"))
        if tag.name == "link":
            assert tag["href"] == "data:,"
    assert page.find("script") is None
    assert not re.search(r"url\(\s*['\"]?(https?:)?//|@import", page.find("style").get_text())


def test_the_same_command_again_only_reads_what_is_complete(made):
    before = (made / "runs/cpu/benchmark.csv").stat().st_mtime_ns
    done = command("transformnet", "benchmark", "--run-dir", "runs/cpu", "--device", "cpu", "--device", "cuda",
                   "--repeats", 2, cwd=made)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (made / "runs/cpu/benchmark.csv").stat().st_mtime_ns == before


def test_other_parameters_are_one_line_and_leave_the_run_as_it_is(made):
    before = (made / "runs/cpu/run.json").read_bytes()
    done = command("transformnet", "train", "--run-dir", "runs/cpu", "--data", "photos", "--limit", 300, cwd=made)
    assert done.returncode == 1
    assert "made with other parameters" in done.stderr
    assert "Traceback" not in done.stderr
    assert (made / "runs/cpu/run.json").read_bytes() == before


def test_papermill_and_nbconvert_work_by_themselves(tmp_path):
    notebook = tmp_path / "trained.ipynb"
    done = command("papermill", NOTEBOOKS / "train.ipynb", notebook, "-p", "limit", 300, "-p", "epochs", 2,
                   "-p", "run_dir", "r", "-p", "device", "cpu", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(Run(tmp_path / "r").history()) == 2
    for name in ("html", "pdf"):
        done = command("jupyter", "nbconvert", "--to", f"transformnet-{name}", notebook, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert notebook.with_suffix(f".{name}").stat().st_size > 10_000


def test_ctrl_c_ends_in_one_line_and_the_same_command_goes_on(tmp_path):
    arguments = [
        BIN / "transformnet",
        "train",
        "--run-dir",
        "r",
        "--device",
        "cpu",
        "--data",
        "photos",
        "--limit",
        "5000",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # A process group of its own, as a terminal gives it
    with subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment,
                          start_new_session=True) as process:  # fmt: skip
        while not (tmp_path / "r/history.csv").exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.replace("\r", "\n").splitlines()[-1] == "train: interrupted; the same command goes on where it stopped"
    assert "Traceback" not in told
    stage = Run(tmp_path / "r").info["stages"]["train"]
    assert stage["status"] == "failed" and "interrupted" in stage["why"]
    assert subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True).returncode == 0
    Run(tmp_path / "r").require("train")


def test_a_title_that_cannot_be_set_is_refused_before_the_work(tmp_path):
    done = command("transformnet", "report", "--title", "Report \U0001f389", "--limit", 300, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        1,
        "error: no font in the PDF has '\U0001f389' (U+1F389), used in the title block\n",
    )
    assert list(tmp_path.iterdir()) == []


# Notebooks that fail


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """Put a notebook of one cell in place of the project's; answers a function that executes it."""
    monkeypatch.setattr("transformnet_lib.report.NOTEBOOKS", tmp_path)

    def run_cell(source: str) -> None:
        cells = [nbformat.v4.new_code_cell(part) for part in source.split("\n---\n")]
        metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), tmp_path / "bad.ipynb")
        execute("bad", tmp_path / "out" / "bad.ipynb", {})

    return run_cell


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise ValueError('what went wrong')", r"^bad: ValueError: what went wrong \(see .*bad.failed.ipynb\)$"),
        (
            "from transformnet_lib.errors import DataError\nraise DataError('x.png: broken')",
            r"^bad: x.png: broken \(see",
        ),
        ("import os; os._exit(1)", "bad: the kernel died"),
        ("import sys; sys.exit(0)\n---\n1", "bad|was not executed"),
    ],
)
def test_a_notebook_that_does_not_run_to_its_end_is_an_error(failing, tmp_path, source, message):
    with pytest.raises(NotebookError, match=message):
        failing(source)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bad.failed.ipynb"]


def test_an_unknown_parameter_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ParameterError, match="train: unknown parameter colour; it has run_dir, device"):
        execute("train", tmp_path / "out.ipynb", {"colour": "red"})
    assert list(tmp_path.iterdir()) == []


def test_a_partly_executed_notebook_is_not_exported(tmp_path):
    cells = [nbformat.v4.new_code_cell("1", execution_count=1), nbformat.v4.new_code_cell("2")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbformat.write(notebook, tmp_path / "part.ipynb")
    with pytest.raises(NotebookError, match="code cell 2 of 2 was not executed"):
        check_executed(tmp_path / "part.ipynb")


def test_a_report_needs_finished_runs(made, tmp_path):
    with pytest.raises(RunError, match="stage train: the folder holds no run"):
        make_report([tmp_path / "none"], tmp_path, title=None, author=None)
    shutil.copytree(made / "runs/cpu-precise", tmp_path / "precise")
    with pytest.raises(RunError, match="stage benchmark: not run yet"):
        make_report([tmp_path / "precise"], tmp_path, title=None, author=None)
    info = json.loads((tmp_path / "precise/run.json").read_text())
    info["stages"]["train"]["status"] = "started"
    (tmp_path / "precise/run.json").write_text(json.dumps(info))
    with pytest.raises(RunError, match="stage train is not complete"):
        make_report([tmp_path / "precise"], tmp_path, title=None, author=None)
