"""The whole, as a user runs it: the command line makes runs and report; papermill and nbconvert work by themselves."""

import ast
import base64
import json
import re
import shutil
import sys
from pathlib import Path

import bs4
import nbformat
import pypdf
import pytest
import refresh
from conftest import command, run_cells
from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
from test_export import SCRIPT
from test_export_chromium import BROWSER, browse, probed, violations
from typer.testing import CliRunner

import transformnet_lib
from transformnet_lib import paper, read_run
from transformnet_lib.cli import app
from transformnet_lib.errors import NotebookError, ParameterError, RunError, TransformnetError
from transformnet_lib.export import ExportError
from transformnet_lib.measure import Estimate
from transformnet_lib.report import NOTEBOOKS, check_executed, execute, make_report
from transformnet_lib.run import reference_run
from transformnet_lib.words import TEMPLATES
from transformnet_lib.words.filters import ratio, scientific, time


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
    stages_of = {"paper-cpu": ["train", "compare"], "precise-cpu": ["train", "compare", "benchmark", "seeds"]}
    for label, stages in stages_of.items():
        run = read_run(made / "runs" / label)
        assert (list(run.stages), run.unfinished) == (stages, {})
        for stage in stages:
            check_executed(run.path / stage / f"{stage}.ipynb")


def test_title_and_author_are_shown_as_they_were_given(page, made):
    assert page.find("h1").get_text() == "A <b>bold</b> $title$ #1"
    assert "Ada \\ Lovelace" in page.find("header").get_text()
    assert pypdf.PdfReader(made / "report/build/report.pdf").metadata.title == "A <b>bold</b> $title$ #1"


def test_the_sections_are_the_papers_and_ours(page):
    headings = [re.sub(r"\s+", " ", heading.get_text()).strip() for heading in page.find("main").find_all("h2")]
    assert [re.sub(r"^(\d+|A) ", "", heading) for heading in headings] == [
        "Abstract",
        "Model architecture and design",
        "Loss function",
        "Early stopping criterion",
        "Model vs. ground truth",
        "Runtime benchmark",
        "Training details",
        "Experiment tracking",
        "Does the model win?",
        "The paper's claims",
        "Conclusion",
        "References",
        "Provenance",
    ]


def test_figures_1_to_8_are_the_papers_in_both_formats(page, pdf_text):
    captions = [caption.get_text() for caption in page.find_all("figcaption")]
    first, *captions = captions
    assert first.startswith("Figures 1–5: Test images 0, 120, 240, 360 and 480: input")  # evenly spread over 600
    assert "Figures 1–5: Test images" in pdf_text
    assert page.find("section", class_="abstract").find("img")["alt"].startswith("Left, the three weights")
    wanted = ["Training MSE", "Validation MSE", "Time per epoch", "The three weights", "The largest weight error"]
    wanted += ["Speed-up on the CPU", "The speed-up of each combination"]
    for number, (start, caption) in enumerate(zip(wanted, captions, strict=True), 6):
        assert re.sub(r"\s+", " ", caption).startswith(f"Figure {number}: {start}")
        assert f"Figure {number}: {start}" in pdf_text
    assert "paper-cpu and precise-cpu were trained on cpu" in page.find("main").get_text()


@pytest.mark.skipif(not BROWSER, reason="no Chromium on the PATH")
def test_a_whole_report_loads_alone(made, tmp_path):
    page = (made / "report/build/report.html").read_text(encoding="utf-8")
    assert len(page) < 5_000_000
    path = tmp_path / "report.html"
    path.write_text(probed(page), encoding="utf-8")
    done = browse(path, tmp_path, "--window-size=500,900", "--dump-dom")
    maths, resources, fits, images = json.loads(re.search(r"<title>(\[.*?)</title>", done.stdout, re.DOTALL)[1])
    assert maths and all(maths) and images and all(images)
    assert resources == [] and fits
    assert "CONSOLE" not in done.stderr
    for theme, width in (("light", 1400), ("dark", 390)):
        assert violations(page.replace("<html ", f'<html data-theme="{theme}" '), tmp_path, width=width) == []


def test_every_link_within_the_report_leads_somewhere(made, page):
    ids = {tag["id"] for tag in page.find_all(id=True)}
    targets = [a["href"] for a in page.find_all("a") if a["href"].startswith("#")]
    assert len(targets) > 30 and {target[1:] for target in targets} <= ids
    pdf = pypdf.PdfReader(made / "report/build/report.pdf")
    links = [
        annotation.get_object()["/Dest"]
        for sheet in pdf.pages
        for annotation in sheet.get("/Annots", [])
        if "/Dest" in annotation.get_object()
    ]
    assert len(links) == len(page.find("main").find_all("a", href=re.compile("^#")))
    beside = [link["href"] for link in page.find(class_="beside").find_all("a")]
    assert beside == ["report.pdf", "report.json"]
    assert all((made / "report/build" / name).is_file() for name in beside)


def test_every_figure_and_table_is_cited(page):
    floats = {each["id"] for each in page.find_all(id=re.compile("^(fig|tab)-"))}
    assert len(floats) > 12 and floats <= {link["href"][1:] for link in page.find("main").find_all("a")}


def test_every_figure_has_alt_text(page):
    assert all(len(image["alt"]) > 20 for image in page.find("main").find_all("img"))


def test_table_1_has_the_papers_times_beside_ours(page, pdf_text):
    table = next(table for table in page.find_all("table") if "Table 1" in table.get_text())
    blocks = [
        [[cell.get_text() for cell in row.find_all(["td", "th"])] for row in part.find_all("tr")]
        for part in table.find_all("tbody")
    ]
    kinds = [heading for ((heading,), *_) in blocks]
    assert kinds[0] == "CPU, shuffled, drop_last" and kinds[7] == "CUDA, in order" and len(kinds) == 8
    rows = [row for _, *rows in blocks for row in rows]
    assert all(row[3:] == ["–"] * 8 for row in rows[24:])
    rows, published = rows[:24], paper.table1().query("device == 'cpu'")
    assert [row[1] for row in rows] == [f"{1000 * seconds:.1f}" for seconds in published["seconds"]]
    for row in rows:
        assert [re.fullmatch(r"\d+\.\d", row[column])[0] in pdf_text for column in (1, 3, 6)]
        assert all(re.fullmatch(r"\d+(\.\d)? %", row[column]) for column in (4, 7))
    for block in table.find_all("tbody"):
        times = {cell.get_text() for cell in block.find_all("strong")}
        assert len(times) == 3 if block.find(string=re.compile("CPU")) else 1  # the paper's, reference and fast
    note = table.find_parent(class_="table").find_next("p").get_text()
    assert "24 settings on cuda in run precise-cpu have no time (not measured: no CUDA device)" in note


def test_the_first_page_says_what_was_measured_where(made, page):
    text = page.find("main").get_text()
    stage = read_run(made / "runs/paper-cpu").train
    for fact in ("photos", stage.environment.cpu, stage.environment.torch, stage.commit[:12]):
        assert fact in text
    assert stage.started.date().isoformat() in text


def test_numbers_in_prose_come_from_the_run_files(made, page):
    compared = read_run(made / "runs/paper-cpu").compare
    abstract = re.sub(r"\s+", " ", page.find(class_="abstract").get_text())
    assert f"the worst pixel is off by {scientific(255 * compared.max_error)} of 255 grey levels" in abstract
    assert "every pixel of 600 test images is right to within half a grey level" in abstract


def test_the_page_needs_no_other_host(page):
    for tag in page.find_all(True):
        for name in ("src", "srcset", "data", "poster", "action"):
            assert not str(tag.get(name, "")).startswith(("http", "//"))
        if tag.name == "link":
            assert tag["href"] == "data:,"
    assert [script.get_text() for script in page.find_all("script")] == [SCRIPT]
    assert not re.search(r"url\(\s*['\"]?(https?:)?//|@import", page.find("style").get_text())


def test_the_same_command_again_only_reads_what_is_complete(made):
    files = [made / "runs/precise-cpu/benchmark" / name for name in ("rounds.csv", "stage.json", "benchmark.ipynb")]
    before = [file.stat().st_mtime_ns for file in files]
    done = command("transformnet", "benchmark", "--run-dir", "runs/precise-cpu", "--device", "cpu", "--device", "cuda",
                   "--seconds", 0, "--beside", "runs/paper-cpu", cwd=made)  # fmt: skip
    shown = "benchmark: was complete in runs/precise-cpu/benchmark, with its notebook benchmark.ipynb\n"
    assert (done.returncode, done.stdout) == (0, shown), done.stderr
    assert [file.stat().st_mtime_ns for file in files] == before


def test_other_parameters_are_refused_and_leave_the_run_as_it_is(made):
    def content() -> dict:
        return {path: path.read_bytes() for path in (made / "runs/paper-cpu/train").iterdir() if path.is_file()}

    before = content()
    with pytest.raises(RunError, match="made with other parameters"):
        run_cells("train", run_dir=str(made / "runs/paper-cpu"), data="photos", limit=300)
    assert content() == before


def test_papermill_and_nbconvert_work_by_themselves_with_a_file_of_parameters_from_any_folder(tmp_path):
    notebook = tmp_path / "trained.ipynb"
    done = command("papermill", NOTEBOOKS / "train.ipynb", notebook, "-f", NOTEBOOKS / "params/quick.yaml",
                   "-p", "seed", 3, "-p", "limit", 300, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "unknown parameter" not in done.stderr
    trained = read_run(tmp_path / "runs/quick-look").train
    assert (trained.config.preset, trained.config.epochs, trained.config.seed) == ("precise", 3, 3)
    assert trained.images.count == 300
    for name in ("html", "pdf"):
        done = command("jupyter", "nbconvert", "--to", f"transformnet-{name}", notebook, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert notebook.with_suffix(f".{name}").stat().st_size > 10_000


def refused(*arguments) -> str:
    """The error that `transformnet report` ends with."""
    error = CliRunner().invoke(app, ["report", *map(str, arguments)]).exception
    assert isinstance(error, TransformnetError | ExportError)
    return str(error)


def test_a_title_that_cannot_be_set_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = "no font in the PDF has '\U0001f389' (U+1F389), used in the title block"
    assert refused("--title", "Report \U0001f389", "--limit", 300) == message
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def run_cell(tmp_path, monkeypatch):
    """Answers a function that executes a notebook of one cell, or more, put in place of the project's."""
    monkeypatch.setattr("transformnet_lib.report.NOTEBOOKS", tmp_path)

    def run_cell(source: str) -> None:
        cells = [nbformat.v4.new_code_cell(part) for part in source.split("\n---\n")]
        metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), tmp_path / "bad.ipynb")
        execute("bad", tmp_path / "out" / "bad.ipynb", {})

    return run_cell


# The kernel


@pytest.fixture
def no_kernelspec(monkeypatch):
    """Whoever asks for a kernelspec finds none."""

    def none(manager, name):
        raise NoSuchKernel(name)

    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", none)


def test_a_notebook_runs_in_this_python_with_this_library_whatever_lies_around(
    run_cell, no_kernelspec, tmp_path, monkeypatch
):
    (tmp_path / "clone/transformnet_lib").mkdir(parents=True)
    for name in ("transformnet_lib/__init__", "tqdm"):
        (tmp_path / f"clone/{name}.py").write_text("raise ImportError('of the working directory')")
    monkeypatch.chdir(tmp_path / "clone")
    monkeypatch.delenv("PYTHONPATH", raising=False)  # which would come first
    run_cell(
        f"import sys, tqdm, transformnet_lib\nassert sys.executable == {sys.executable!r}\n"
        f"assert transformnet_lib.__file__ == {transformnet_lib.__file__!r}"
    )


def test_the_notebooks_are_refreshed_in_this_python(no_kernelspec, tmp_path, monkeypatch):
    cells = [nbformat.v4.new_code_cell("import sys; sys.executable")]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), tmp_path / "one.ipynb")
    monkeypatch.setattr(refresh, "committed", lambda path: None)
    refresh.refresh(tmp_path / "one.ipynb")
    (cell,) = nbformat.read(tmp_path / "one.ipynb", as_version=4).cells
    assert cell.outputs[0].data["text/plain"] == repr(sys.executable)


def test_the_librarys_folder_may_have_any_name_and_is_no_place_for_other_modules(run_cell, tmp_path, monkeypatch):
    root = tmp_path / "it's {prefix} \N{LATIN SMALL LETTER E WITH ACUTE}"
    (root / "transformnet_lib").mkdir(parents=True)
    (root / "transformnet_lib/__init__.py").write_text("")
    monkeypatch.setattr("transformnet_lib.report.ROOT", root)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    run_cell(
        "assert 'sys' not in globals() and 'transformnet_lib' not in globals()\n"
        f"import sys, transformnet_lib\nassert transformnet_lib.__path__ == [{str(root / 'transformnet_lib')!r}]\n"
        f"assert {str(root)!r} not in sys.path"
    )


# Notebooks that fail


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
def test_a_notebook_that_does_not_run_to_its_end_is_an_error(run_cell, tmp_path, source, message):
    with pytest.raises(NotebookError, match=message):
        run_cell(source)
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


HOSTILE = {  # what a stranger may have written into a run, and how it must be read
    "script": "<script>alert(1)</script>",
    "include": '#include "/etc/passwd" #import "@preview/x:1.0.0"',
    "maths": r"$\frac{1}{$ \input{x} $$",
    "markdown": "`` [x](javascript:alert) ![y](http://evil.example/y.png) **b** | # h",
    "right-to-left": "\u202eabc\x1b]0;obeyed\x07",
    "long": "long " * 1990,
}


@pytest.fixture(scope="module")
def hostile(made, tmp_path_factory) -> Path:
    """A folder with a run whose label and every free text are hostile, and its report."""
    folder = tmp_path_factory.mktemp("hostile")
    run = folder / "r <b>$x$ `y` #z _[1](u) {k} \\"  # its label; signs that turn text round are in the others
    shutil.copytree(made / "runs/precise-cpu", run)
    texts = list(HOSTILE.values())
    for path in run.glob("*/parameters.json"):
        begun = json.loads(path.read_text())
        begun["environment"] |= {"cpu": texts[0], "device_name": texts[1], "os": texts[2], "python": texts[3]}
        begun["environment"] |= {"torch": texts[4], "torchvision": texts[0]}
        begun["commit"] = texts[3]
        begun["images"]["source"] = f"folder:{texts[2]} {texts[0]} {texts[4]}"
        begun["images"]["request"] |= {"data": texts[1], "fit": texts[5]}
        path.write_text(json.dumps(begun))
    table = run / "benchmark/rounds.csv"
    reason = '"' + " ".join(texts[:5]).replace('"', '""') + '"'
    table.write_text(table.read_text().replace("not measured: no CUDA device", reason))
    make_report([run], folder / "one", title=" ".join(texts[:4]), author=texts[4])
    return folder


def test_hostile_strings_of_a_run_are_shown_as_they_are(hostile):
    page = bs4.BeautifulSoup((hostile / "one/report.html").read_text(), "html.parser")
    assert len(page.find_all("script")) == 1 and page.find("b") is None
    others = [a["href"] for a in page.find_all("a") if not a["href"].startswith("#")]
    assert others == ["report.pdf", "report.json"]
    assert all(image["src"].startswith("data:") for image in page.find_all("img"))
    text = re.sub(r"\s+", " ", page.find("main").get_text())
    for shown in (HOSTILE["script"], HOSTILE["include"], HOSTILE["maths"], HOSTILE["markdown"]):
        assert shown in text
    assert "r <b>$x$ `y` #z _[1](u) {k} \\" in text
    assert "\ufffdabc\ufffd]0;obeyed\ufffd" in text and "\u202e" not in str(page) and "\x1b" not in str(page)
    pdf = pypdf.PdfReader(hostile / "one/report.pdf")
    assert HOSTILE["script"] in pdf.metadata.title
    assert not [
        annotation.get_object()["/A"].get("/URI")
        for page in pdf.pages
        for annotation in page.get("/Annots", [])
        if "/A" in annotation.get_object()
    ]


@pytest.mark.slow
def test_the_same_runs_give_the_same_bytes(tmp_path):
    for name in ("first", "again"):
        make_report([reference_run()], tmp_path / name, title="A <b>bold</b> $title$ #1", author="Ada \\ Lovelace")
    for name in ("report.html", "report.pdf", "report.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


@pytest.mark.slow
def test_a_translation_needs_nothing_but_templates(tmp_path):
    words = tmp_path / "words"
    words.mkdir()
    labels = '{"Abstract": "Zusammenfassung", "Table": "Tabelle", "weight": "Gewicht"}'
    changes = {
        "names": {'language = "en"': 'language = "de"', "labels = {}": f"labels = {labels}"},
        "claims": {"[Table](#tab-claims) holds": "In [Tabelle](#tab-claims) steht,"},
    }
    for name, change in changes.items():
        template = (TEMPLATES / f"{name}.md.j2").read_text(encoding="utf-8")
        for english, german in change.items():
            assert template.count(english) == 1
            template = template.replace(english, german)
        (words / f"{name}.md.j2").write_text(template, encoding="utf-8")
    files = make_report([reference_run()], tmp_path / "out", title=None, author=None, words=words)
    page = bs4.BeautifulSoup(files[0].read_text(encoding="utf-8"), "html.parser")
    assert page.html["lang"] == "de" and page.find(id="abstract").get_text() == "Zusammenfassung"
    assert page.find("caption").get_text().startswith("Tabelle 1:")
    assert re.search(r"In Tabelle\s\d+ steht", page.get_text())
    pdf = pypdf.PdfReader(files[1])
    text = re.sub(r"\s+", " ", " ".join(sheet.extract_text() for sheet in pdf.pages))
    assert "Zusammenfassung" in text and "Tabelle 1:" in text and "Table 1:" not in text
    assert pdf.trailer["/Root"]["/Lang"] == "de"
    assert any(b"Gewicht" in base64.b64decode(image["src"].partition(",")[2]) for image in page.find_all("img"))


def test_report_json_has_the_numbers_that_the_page_shows(made, page):
    numbers = json.loads((made / "report/build/report.json").read_text())
    text = re.sub(r"\s+", " ", page.find("main").get_text())

    def estimate(found: dict) -> Estimate:
        return Estimate(*(found[name] for name in ("median", "low", "high", "n")))

    (place,) = numbers["places"]
    fast = next(method for method in place["methods"] if method["name"] == "fast")
    assert f"is fastest with batch size {fast['best']['batch_size']}" in text
    assert time(estimate(fast["best"]["seconds"])) in text
    over = fast["over"]["sequential"]
    assert (over["verdict"], estimate(over).verdict) == ("faster", "faster")
    assert f"{ratio(estimate(over))} as fast as the pipeline image by image" in text
    for run in numbers["runs"]:
        assert f"largest difference {scientific(run['training']['error'])}" in text, run["label"]
        assert f"{run['training']['best_epoch']} of {run['training']['epochs']}" in text
    for effect in fast["effects"]:
        assert ratio(estimate(effect["ratio"])) in text, effect["name"]
    for change in place["changes"]:
        assert ratio(estimate(change["ratio"])) in text


def test_an_output_folder_that_cannot_be_written_is_one_line(made, tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = refused("--run", made / "runs/precise-cpu", "--out", tmp_path / "file")
    assert message.startswith(f"{tmp_path / 'file'}: cannot be written")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.slow
def test_a_run_name_that_no_font_has_is_one_line_and_writes_no_report(tmp_path):
    shutil.copytree(reference_run(), tmp_path / "party \U0001f389")
    done = command("transformnet", "report", "--run", "party \U0001f389", "--out", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "no font in the PDF has '\U0001f389' (U+1F389), used in" in done.stderr.splitlines()[-1]
    assert not {path.suffix for path in (tmp_path / "out").iterdir()} & {".html", ".pdf", ".json"}


def test_a_report_needs_runs_that_have_every_stage_and_none_that_is_not_complete(tmp_path):
    for label in ("whole", "part"):
        shutil.copytree(reference_run(), tmp_path / label)
    runs = tmp_path / "whole", tmp_path / "part"
    (runs[1] / "benchmark/stage.json").unlink()  # as a kill leaves it
    assert "part: stage benchmark is not complete (it was stopped" in refused(
        "--run", runs[0], "--run", runs[1], "--out", tmp_path / "out"
    )
    shutil.rmtree(runs[1] / "benchmark")
    assert "part: stage benchmark: not run yet; `transformnet benchmark" in refused(
        "--run", runs[1], "--out", tmp_path / "out"
    )
    (runs[1] / "train/stage.json").unlink()
    assert "part: stage train is not complete" in refused("--run", runs[0], "--run", runs[1], "--out", tmp_path / "out")
    assert "none: there is no such folder" in refused("--run", tmp_path / "none", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
