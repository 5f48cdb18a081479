"""A run directory from a stranger: reading it runs nothing, takes bounded memory and refuses in one line what is wrong.

How its texts are shown is the report's affair (test_export_edges.py); here they only have to arrive as they are.
"""

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformnet_lib.runs import describe_images
from transformnet_lib.study import load_study

from transformnet_lib import Run, TrainConfig, load_dataset, load_model, open_runs, report, train, untrusted
from transformnet_lib.errors import RunError, TransformnetError
from transformnet_lib.findings import abstract, learning, provenance, speed, studies, table1
from transformnet_lib.findings.claims import claims_table
from transformnet_lib.findings.numbers import report_numbers
from transformnet_lib.findings.places import places
from transformnet_lib.libraries import LIBRARY_COLUMNS
from transformnet_lib.seeds import SEED_COLUMNS
from transformnet_lib.sizes import SIZE_COLUMNS
from transformnet_lib.timing import BENCHMARK_COLUMNS, load_benchmark, spread
from transformnet_lib.training import load_config, load_least_squares, load_training

# What reads each file
READERS = {
    "run.json": lambda run: run.info,
    "history.csv": Run.history,
    "weights.pt": Run.weights,
    "checkpoint.pt": lambda run: run.read_torch("checkpoint.pt"),
    "examples.npz": Run.examples,
    "benchmark.csv": load_benchmark,
    "seeds.csv": load_study,
    "libraries.csv": load_study,
    "sizes.csv": load_study,
}
TEN_GB = 10**10


def table(columns: dict, *rows: dict) -> bytes:
    """A CSV of rows that name what matters; what they leave out is empty."""
    lines = [",".join(columns), *(",".join(str(row.get(column, "")) for column in columns) for row in rows)]
    return ("\n".join(lines) + "\n").encode()


def seed_row(**changed) -> dict:
    known = {"preset": "paper", "seed": 0, "red": 0.3, "green": 0.6, "blue": 0.1, "weight_error": 0.01, "val_mse": 1e-3}
    return known | {"best_epoch": 2, "epochs": 6, "dead": False, "seconds": 1.5} | changed


def timed(**changed) -> dict:
    known = {"name": "Pillow", "way": "fast", "device": "cpu", "images": 100, "speedup": 2.0, "max_difference": 0.5}
    return known | {"peak_mib": 512.0} | spread([0.25, 0.5, 0.75]) | changed


@pytest.fixture(scope="module")
def original(run, train_set, tmp_path_factory) -> Path:
    """The small run with a study, written by hand."""
    path = tmp_path_factory.mktemp("original") / "stranger"
    shutil.copytree(run.path, path)
    copy = Run(path)
    asked = {"seeds": [0], "presets": ["paper"], "sizes": [100], "repeats": 3}
    with copy.stage("study", asked, images=describe_images(train_set), device=torch.device("cpu")) as results:
        copy.write("seeds.csv", table(SEED_COLUMNS, seed_row()))
        copy.write("libraries.csv", table(LIBRARY_COLUMNS, timed()))
        copy.write("sizes.csv", table(SIZE_COLUMNS, timed()))
        results["test_images"] = describe_images(train_set)
    return path


@pytest.fixture
def stranger(original, tmp_path) -> Run:
    return Run(shutil.copytree(original, tmp_path / "stranger"))


def refusal(run: Run, name: str, read=None) -> str:
    """The one line with which reading a file is refused; it names the file."""
    with pytest.raises(RunError) as caught:
        (read or READERS[name])(run)
    told = str(caught.value)
    assert f"{run.path}/{name}" in told and len(told) < 2000
    assert told.isprintable()  # so one line, and nothing that a terminal would obey
    return told


def read_all(run: Run) -> None:
    """Read all that notebooks and report read of a run."""
    open_runs([run.path])
    for read in (*READERS.values(), load_training, load_least_squares, load_config, load_model):
        read(run)


def show_all(run: Run) -> None:
    """Make all sentences and tables that the report has of a run."""
    for of_runs in (abstract.answer, abstract.closeness_of_each, learning.weights_table, learning.optimum,
                    learning.images_used, learning.devices_shown, provenance.report_date, provenance.first_page,
                    provenance.commands, provenance.training_table, provenance.stages_table, provenance.stages_asked,
                    table1.not_measured, abstract.subject, abstract.conclusion, claims_table,
                    report_numbers):  # fmt: skip
        of_runs([run])
    for of_run in (
        learning.weights_distance,
        learning.path_text,
        learning.stopping,
        learning.training,
    ):
        of_run(run)
    timed, study = places([run]), load_study(run)
    for place in timed:
        for of_place in (speed.baselines, speed.against_reference, speed.effects, speed.contributions,
                         speed.workers_effect, speed.noise):  # fmt: skip
            of_place(place)
        for path in place.paths:
            speed.fastest(place, path), speed.wins_from(place, path)
    speed.effects_table(timed)
    for group in table1.table1_groups(timed):
        table1.table1(group), table1.table1_caption(group, [run])
    studies.seeds_table(study["seeds"]), studies.seeds_text(study["seeds"])
    (
        studies.libraries_table(study["libraries"]),
        studies.libraries_text(study["libraries"]),
        studies.sizes_text(study["sizes"]),
    )
    studies.sizes_table(study["sizes"])
    learning.example_caption([run], 0)


def edit(run: Run, path: str, value: object) -> None:
    """Set the entry of run.json at a path like "stages.train.status"; the ellipsis drops it."""
    info = json.loads((run.path / "run.json").read_text())
    *parents, last = path.split(".")
    inner = info
    for key in parents:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    (run.path / "run.json").write_text(json.dumps(info))


def test_the_run_that_the_others_are_made_of_is_sound(stranger):
    read_all(stranger)
    show_all(stranger)


# Code


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def torch_file(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["weights.pt", "checkpoint.pt", "examples.npz"])
@pytest.mark.parametrize("kind", ["torch", "pickle", "array"])
def test_code_in_a_file_does_not_run(stranger, tmp_path, name, kind):
    executed = tmp_path / "executed"
    payload = Payload(executed)
    objects = io.BytesIO()
    np.savez(objects, **dict.fromkeys(("indices", "inputs", "targets", "outputs"), np.array([payload], object)))
    content = {
        "torch": torch_file({"mix.weight": payload}),
        "pickle": pickle.dumps(payload),
        "array": objects.getvalue(),
    }
    (stranger.path / name).write_bytes(content[kind])
    refusal(stranger, name)
    with pytest.raises(TransformnetError):
        read_all(stranger)
    assert not executed.exists()
    pickle.loads(content["pickle"])  # so it would have been seen
    assert executed.is_dir()


def test_a_checkpoint_with_code_is_not_gone_on_with(train_set, tmp_path):
    run, config = Run(tmp_path / "run"), TrainConfig(device="cpu", epochs=1)
    train(train_set, config, run=run)
    edit(run, "stages.train.status", "started")
    (run.path / "checkpoint.pt").write_bytes(torch_file({"format": Payload(tmp_path / "executed")}))
    refusal(run, "checkpoint.pt", lambda run: train(train_set, config, run=run))
    assert not (tmp_path / "executed").exists()


# Where a file leads


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "kind", ["/etc/passwd", "/dev/zero", "/dev/stdin", "itself elsewhere", "nothing", "pipe", "folder"]
)
def test_links_pipes_and_devices_are_neither_followed_nor_waited_for(stranger, tmp_path, name, kind):
    path = stranger.path / name
    path.rename(tmp_path / "elsewhere")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"itself elsewhere": tmp_path / "elsewhere", "nothing": tmp_path / "none"}.get(kind, kind))
    assert "cannot be read (expected a plain file" in refusal(stranger, name)


@pytest.mark.parametrize("path", ["/etc", "../../../etc", "~", "//host/share", "C:\\Windows", "file:///etc"])
def test_paths_in_the_record_are_only_where_images_are_looked_for(stranger, path):
    edit(stranger, "stages.train.images.request.data", f"folder:{path}")
    edit(stranger, "stages.train.images.request.data_path", path)
    edit(stranger, "stages.train.images.source", f"folder:{path}")
    before = sorted(stranger.path.parent.rglob("*"))
    read_all(stranger)
    with pytest.raises(TransformnetError, match="folder:"):
        load_dataset(stranger)
    assert sorted(stranger.path.parent.rglob("*")) == before


# Where a stage's writing leads


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_notebook_is_not_written_through_a_link_or_into_a_pipe(stranger, tmp_path, monkeypatch, kind):
    victim, unfinished = tmp_path / "victim.txt", stranger.path / "compare.failed.ipynb"
    victim.write_text("mine")
    unfinished.symlink_to(victim) if kind == "link" else os.mkfifo(unfinished)
    (stranger.path / "compare.ipynb").symlink_to(victim)
    cells = [nbformat.v4.new_code_cell("run_dir = ''", metadata={"tags": ["parameters"]})]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), tmp_path / "compare.ipynb")
    monkeypatch.setattr(report, "NOTEBOOKS", tmp_path)
    report.run_stage("compare", stranger.path, {})
    assert victim.read_text() == "mine"
    written = stranger.path / "compare.ipynb"
    assert "run_dir" in written.read_text() and not written.is_symlink() and not unfinished.exists()


@pytest.mark.parametrize("name", ["compare.failed.ipynb", "compare.ipynb"])
def test_a_folder_in_place_of_a_notebook_is_one_line(stranger, tmp_path, monkeypatch, name):
    (stranger.path / name).mkdir()
    monkeypatch.setattr(report, "check_executed", lambda path: None)
    monkeypatch.setattr(report, "_interruptibly", lambda name, work: (stranger.path / f"{name}.failed.ipynb").touch())
    with pytest.raises(TransformnetError, match=rf"{name}: cannot be written \(Is a directory\)"):
        report.run_stage("compare", stranger.path, {})


def tree(folder: Path) -> dict:
    """All below a folder, with the files' content."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def compare_again(run: Run, *, force: bool = False) -> None:
    record, examples = run.stage_info("compare"), run.examples()
    with run.stage(
        "compare", record["parameters"], images=record["images"], device=torch.device("cpu"), force=force
    ) as results:
        assert results is None or force
        if results is not None:
            run.write_arrays("examples.npz", **examples)
            results.update(record["results"])


@pytest.mark.parametrize("place", [".train.ready", ".train.anew", ".compare.anew", ".benchmark.ready"])
@pytest.mark.parametrize("kind", ["a link", "a link within", "a folder within", "a pipe", "a file"])
def test_a_stage_takes_nothing_through_a_folder_for_making_anew(stranger, original, tmp_path, place, kind):
    victim, folder = shutil.copytree(original, tmp_path / "victim"), stranger.path / place
    name = {"train": "checkpoint.pt", "compare": "examples.npz", "benchmark": "benchmark.csv"}[place.split(".")[1]]
    if kind == "a link":
        folder.symlink_to(victim)
    elif kind == "a pipe":
        os.mkfifo(folder)
    elif kind == "a file":
        folder.write_text("x")
    else:
        shutil.copytree(original, folder)
        (folder / name).unlink()
        (folder / name).symlink_to(victim / name) if kind == "a link within" else (folder / name).mkdir()
    before = tree(victim)
    for force in (False, True):
        with pytest.raises(RunError, match=rf"{place}.*: expected a plain f(ile|older), got ") as caught:
            compare_again(stranger, force=force)
        assert str(caught.value).isprintable()
    assert tree(victim) == before


@pytest.mark.parametrize("name", ["tensorboard", "tensorboard/events", "history.csv", ".lock", "run.json"])
def test_a_stage_writes_nothing_through_a_link(stranger, tmp_path, name):
    victim = tmp_path / "victim"
    if name == "tensorboard":
        victim.mkdir()
    else:
        victim.write_text("mine")
    (stranger.path / name).unlink(missing_ok=True) if name != "tensorboard" else shutil.rmtree(stranger.path / name)
    (stranger.path / name).symlink_to(victim)
    with pytest.raises(
        RunError, match=rf"stranger/{name}: .*expected a plain" if name != ".lock" else "cannot be written"
    ):
        compare_again(stranger, force=True)
    assert tree(victim) == {} if name == "tensorboard" else victim.read_text() == "mine"
    assert (stranger.path / name).is_symlink()


def test_a_sound_run_of_a_stranger_can_be_gone_on_with(stranger):
    compare_again(stranger)
    compare_again(stranger, force=True)
    read_all(stranger)


# Texts

HOSTILE = [
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "[click](javascript:alert(1)) ![](https://example.org/x.png)",
    "$\\input{/etc/passwd}$ `code` | cell | **bold**",
    '#import "@preview/x:1.0.0"; #read("/etc/passwd")',
    "{{ 7 * 7 }} {% raw %} %(name)s {0}",
    "line\r\nbreak\x00\x1b[2J\u202e\ufeff",
    "x" * 10_000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_arrives_as_it_is(stranger, text):
    images, machine = "stages.train.images.request.", "stages.train.environment."
    places = [images + "data_path", images + "fit", "stages.train.commit", "stages.train.parameters.preset"]
    places += [machine + name for name in ("cpu", "device_name", "os", "torch", "torchvision", "python")]
    for place in places:
        edit(stranger, place, text)
    read_all(stranger)
    stage = stranger.stage_info("train")
    assert stage["commit"] == stage["environment"]["cpu"] == load_config(stranger).preset == text


def test_a_text_that_is_endless_is_refused(stranger):
    edit(stranger, "stages.train.commit", "x" * 10_001)
    refusal(stranger, "run.json")


def test_a_record_too_large_to_be_ours_is_refused_before_it_is_taken_apart(stranger):
    edit(stranger, "stages.train.parameters.many", 600_000 * [0])
    assert "bytes, more than 1,048,576" in refusal(stranger, "run.json")


def test_no_folder_passes_for_a_shipped_run(stranger):
    stranger.path.rename(stranger.path.with_name("cpu†"))
    assert Run(stranger.path.with_name("cpu†")).label == "cpu?"


def test_what_a_terminal_would_obey_is_not_in_a_message(stranger):
    edit(stranger, "stages.train.status", "failed")
    edit(stranger, "stages.train.why", "\x1b]0;title\x07\x1b[2Jgone\r\nand more")
    with pytest.raises(RunError) as caught:
        stranger.history()
    assert "gone and more" in str(caught.value) and str(caught.value).isprintable()


# JSON


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_record_that_is_not_plain_utf8_is_refused(stranger, encoding):
    path = stranger.path / "run.json"
    path.write_bytes(path.read_text().encode(encoding))
    assert "damaged or not ours: " in refusal(stranger, "run.json")


@pytest.mark.parametrize(
    "value",
    ["NaN", "Infinity", "-Infinity", "1e999", "1" * 400, "1" * 5000, str(2**63), '"\\ud800"', "[" * 5000 + "]" * 5000,
     "[" * 500 + "]" * 500, '{"a":' * 8 + "1" + "}" * 8, "[[1]]", '{"' + "k" * 101 + '": 1}', '{"a": 1, "a": 2}'],
)  # fmt: skip
@pytest.mark.parametrize("place", ["parameters", "results"])
def test_json_that_no_run_has_is_refused(stranger, place, value):
    edit(stranger, f"stages.train.{place}.new", "PLACE")
    path = stranger.path / "run.json"
    path.write_text(path.read_text().replace('"PLACE"', value))
    assert "damaged or not ours: " in refusal(stranger, "run.json")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("stages.train.seconds", "1"),
        ("stages.train.seconds", True),
        ("stages.train.images.count", 2.0),
        ("stages.train.images.count", "600"),
        ("stages.train.images.size", [32.0, 32]),
        ("stages.train.images.size", [0, 32]),
        ("stages.train.images.size", [2**40, 1]),
        ("stages.train.images.source", "photos<script>"),
        ("stages.train.images.source", "cifar10/../.."),
        ("stages.train.images.fingerprint", "ab" * 32 + "\n"),
        ("stages.train.environment.threads", 0),
        ("stages.train.environment.cores", -1),
        ("stages.train.environment.device", "tpu<b>"),
        ("stages.train.environment.cuda", {"a": 1}),
        ("stages.train.started", "yesterday"),
        ("stages.train.finished", "2026-13-41T00:00:00+00:00"),
        ("stages.train.finished", "2026-11-23T14:47:01+00:00\n"),
        ("stages.train.finished", ...),
        ("stages.train.results", ...),
        ("stages.train.seconds", ...),
    ],
)
def test_values_of_the_wrong_kind_are_refused(stranger, path, value):
    edit(stranger, path, value)
    refusal(stranger, "run.json", Run.history)


@pytest.mark.parametrize(
    ("read", "path", "value"),
    [
        (load_config, "parameters.lr", -1),
        (load_config, "parameters.lr", "0.1"),
        (load_config, "parameters.epochs", 0),
        (load_config, "parameters.seed", -1),
        (load_config, "parameters.val_fraction", 1),
        (load_config, "parameters.whiten", "yes"),
        (load_config, "parameters.decay_steps", 0),
        (load_config, "parameters.device", ["cpu"]),
        (load_config, "parameters.patience", ...),
        (load_model, "parameters.pipeline", {"size": [28, 28], "hflip": "yes", "vflip": True}),
        (load_training, "results.best_epoch", "1"),
        (load_training, "results.dead", 0),
        (load_training, "results.setup_seconds", -1.0),
        (load_training, "results.initial_weights", [1.0, 2.0]),
        (load_training, "results.initial_weights", [1.0, 2.0, "3"]),
        (load_least_squares, "results.least_squares", [1]),
        (load_least_squares, "results.least_squares", {"weights": [0.1, 0.2, 0.3]}),
        (load_least_squares, "results.least_squares.weights", [0.1, 0.2]),
        (load_least_squares, "results.least_squares.weights", ["0.1", "0.2", "0.3"]),
        (load_least_squares, "results.least_squares.images", "600"),
        (load_least_squares, "results.least_squares.images", 600.5),
        (load_least_squares, "results.least_squares.condition", "7"),
        (load_least_squares, "results.least_squares.val_mse", -1.0),
        (load_least_squares, "results.least_squares.new", 1),
    ],
)  # fmt: skip
def test_a_training_that_could_not_have_been_is_refused(stranger, read, path, value):
    edit(stranger, f"stages.train.{path}", value)
    refusal(stranger, "run.json", read)


def test_a_history_of_more_epochs_than_asked_for_is_refused(stranger):
    edit(stranger, "stages.train.parameters.epochs", 1)
    with pytest.raises(RunError, match="epochs, more than the 1 of the parameters"):
        load_training(stranger)


def test_an_error_larger_than_the_largest_is_refused(stranger):
    edit(stranger, "stages.compare.results", {"test_mse": 0.9, "max_error": 0.07})
    with pytest.raises(RunError, match="a test_mse above the square of max_error"):
        stranger.require("compare")


def test_weights_that_are_not_those_of_the_history_are_refused(stranger):
    weights = stranger.weights()["mix.weight"]
    stranger.write_torch("weights.pt", {"mix.weight": weights.roll(1, 1).contiguous()})
    with pytest.raises(RunError, match=r"stranger: weights\.pt and history\.csv have other weights for epoch"):
        load_training(stranger)


def test_a_best_epoch_without_a_loss_is_refused(stranger):
    history = stranger.history()
    history.loc[history["epoch"] == stranger.stage_info("train")["results"]["best_epoch"], "val_mse"] = np.nan
    stranger.write_table("history.csv", history)
    assert "the best epoch, " in refusal(stranger, "history.csv", load_training)


@pytest.mark.parametrize("value", [-1e-3, "0.1", True, None, ...])
@pytest.mark.parametrize("name", ["test_mse", "max_error"])
def test_a_comparison_with_a_wrong_number_is_refused(stranger, name, value):
    edit(stranger, f"stages.compare.results.{name}", value)
    assert f"expected a number {name}, from 0" in refusal(stranger, "run.json", Run.examples)


# Arrays and tensors


def arrays_of(run: Run, **changed) -> bytes:
    with np.load(run.path / "examples.npz") as known:
        arrays = dict(known) | changed
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: array for name, array in arrays.items() if array is not None})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"indices": np.array([4, 3, 2, 1, 0])}, "indices of the stage's parameters, [0, 120, 240, 360, 480]"),
        ({"inputs": np.zeros((5, 3, 16, 16), np.uint8)}, "inputs: expected shape (5, 3, 32, 32), got (5, 3, 16, 16)"),
        ({"inputs": np.zeros((5, 1, 32, 32), np.uint8)}, "inputs: expected shape"),
        ({"targets": np.zeros((5, 1, 28, 27), np.float32)}, "targets: expected shape"),
        ({"outputs": np.zeros((4, 1, 28, 28), np.float32)}, "outputs: expected shape"),
        ({"outputs": np.full((5, 1, 28, 28), np.nan, np.float32)}, "outputs: expected values from 0 to 1"),
        ({"targets": np.full((5, 1, 28, 28), 7, np.float32)}, "targets: expected values from 0 to 1"),
        ({"targets": np.zeros((5, 1, 28, 28), np.float32)}, "more than max_error in run.json"),
        ({"more": np.zeros(3)}, "expected the arrays"),
        ({"../../outside": np.zeros(3)}, "expected the arrays"),
        ({"inputs": None, "/tmp/inputs": np.zeros(3)}, "expected the arrays"),
    ],
)  # fmt: skip
def test_examples_that_could_not_have_been_are_refused(stranger, changed, told):
    (stranger.path / "examples.npz").write_bytes(arrays_of(stranger, **changed))
    assert told in refusal(stranger, "examples.npz")


def test_examples_of_no_image_are_refused(stranger):
    edit(stranger, "stages.compare.parameters.indices", [])
    none = {"indices": np.zeros(0, np.int64), "inputs": np.zeros((0, 3, 32, 32), np.uint8)}
    none |= dict.fromkeys(("targets", "outputs"), np.zeros((0, 1, 28, 28), np.float32))
    (stranger.path / "examples.npz").write_bytes(arrays_of(stranger, **none))
    refusal(stranger, "examples.npz")


def declared(shape: tuple, dtype: str) -> bytes:
    """An .npy file that says it holds `shape` and holds next to nothing."""
    buffer = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + bytes(100)


def zipped(packed: bytes, *, says: int | None = None, **files: bytes) -> bytes:
    """A zip's files with some changed (name's end → content); `says`: the size the directory gives for each of them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(packed)) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            changed = [content for end, content in files.items() if entry.filename.endswith(end.replace("__", "."))]
            new.writestr(entry.filename, changed[0] if changed else old.read(entry))
            if changed and says:
                new.infolist()[-1].file_size = says
    return buffer.getvalue()


@pytest.mark.parametrize("says", [None, 2**32 - 2, TEN_GB])
def test_examples_that_declare_ten_gigabytes_are_refused_before_the_memory_is_taken(stranger, monkeypatch, says):
    taken = []
    real = np.ndarray
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: taken.append(real))
    content = zipped(
        (stranger.path / "examples.npz").read_bytes(), says=says, inputs__npy=declared((TEN_GB, 1, 1, 1), "|u1")
    )
    (stranger.path / "examples.npz").write_bytes(content)
    told = refusal(stranger, "examples.npz")
    assert ("are more than its" if says is None else "bytes unpacked, more than 67,108,864") in told
    assert taken == []


def pickled(code: bytes) -> bytes:
    """A file of torch's whose pickle is `code`."""
    return zipped(torch_file({"mix.weight": torch.zeros(1, 3, 1, 1)}), data__pkl=b"\x80\x02" + code + b".")


def doubled_tuple(between: bytes = b"", levels: int = 60) -> bytes:
    """The pickle of a tuple of twice the same tuple of twice the same, and so on."""
    gets = [b"h" + bytes([i]) for i in range(levels)]
    return b")q\x00" + b"".join(get + get + b"\x86" + between + b"q" + bytes([i + 1]) for i, get in enumerate(gets))


def doubled_list(levels: int = 60) -> list:
    found = []
    for _ in range(levels):
        found = [found, found]
    return found


def called(name: str, *arguments: bytes) -> bytes:
    """The pickle of a dict that holds what a call gives."""
    return b"}X\x01\x00\x00\x00ac" + name.replace(".", "\n").encode() + b"\n(" + b"".join(arguments) + b"tRs"


TEN_GB_PICKLED = b"\x8a\x05" + (10**10).to_bytes(5, "little")
LONG_KEYS = b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(60_000))
HEX = b"X\x10\x00\x00\x00aaaaaaaaaaaaaaaa"
for _ in range(27):  # each doubles the one before
    HEX = b"c_codecs\nencode\n" + HEX + b"X\x03\x00\x00\x00hex\x86R"
HOSTILE_PICKLES = {
    "ten gigabytes from a constructor": (called("torch.Tensor", TEN_GB_PICKLED), "torch Tensor in a pickle"),
    "ten gigabytes of zeros": (called("builtins.bytearray", TEN_GB_PICKLED), "builtins bytearray in a pickle"),
    "ten gigabytes of storage": (called("torch.ByteStorage", TEN_GB_PICKLED), "a call of torch ByteStorage"),
    "storage called by another name": (b"ctorch\nByteStorage\nq\x000}h\x00)Rs", "POP in a pickle"),
    "a dict of a tensor's rows": (called("collections.OrderedDict", b"K\x01"), "an OrderedDict made of something"),
    "storage from the memo": (b"ctorch\nByteStorage\nq\x00)R", "a call of torch ByteStorage"),
    "text that doubles": (b"}X\x01\x00\x00\x00a" + HEX + b"s", "_codecs encode in a pickle"),
    "a key that takes for ever": (doubled_tuple() + b"}h\x3cK\x01s", "a tuple that is used again"),
    "a key behind a second start": (doubled_tuple(b"\x80\x02") + b"}h\x3cK\x01s", "PROTO in a pickle"),
    "a second start": (b"}\x80\x02", "PROTO in a pickle"),
    "a key that is a tuple": (b"}K\x01\x85K\x01s", "keys of the kinds tuple"),
    "keys that are tuples": (b"}(K\x01K\x01K\x01\x85K\x01u", "keys of the kinds int, tuple"),
    "keys of one hash": (b"}(" + LONG_KEYS + b"u", "a pickle of 780,006 bytes"),
    "what is no value": (called("torch.Size"), "torch Size in a pickle"),
}


@pytest.mark.parametrize("name", ["weights.pt", "checkpoint.pt"])
@pytest.mark.parametrize("kind", HOSTILE_PICKLES)
def test_a_pickle_that_would_fill_the_memory_or_take_for_ever_is_refused_unread(stranger, name, kind, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch reads it"))
    code, reason = HOSTILE_PICKLES[kind]
    (stranger.path / name).write_bytes(pickled(code))
    assert f"not a file of ours (ValueError: {reason})" in refusal(stranger, name)


@pytest.mark.parametrize("name", ["DATA.PKL", "data.PKL", "data.pkl/x", "constants.pkl", "data/x"])
def test_only_files_that_torch_saves_are_handed_to_it(stranger, name):
    buffer = io.BytesIO()
    with zipfile.ZipFile(stranger.path / "weights.pt") as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            changed = entry.filename.replace("data.pkl", name)
            new.writestr(
                changed, HOSTILE_PICKLES["ten gigabytes of zeros"][0] if ".pkl" in changed else old.read(entry)
            )
    (stranger.path / "weights.pt").write_bytes(buffer.getvalue())
    assert f"(ValueError: a file archive/{name})" in refusal(stranger, "weights.pt")


@pytest.mark.parametrize("evil", ["a stream of the old kind", "a zip of its own"])
def test_torch_reads_no_other_file_than_the_one_checked(stranger, evil):
    ours = (stranger.path / "weights.pt").read_bytes()
    if evil == "a stream of the old kind":  # torch looks at the first bytes, zipfile at the last
        buffer = io.BytesIO()
        torch.save({"mix.weight": torch.ones(1, 3, 1, 1)}, buffer, _use_new_zipfile_serialization=False)
        content = buffer.getvalue() + ours
    else:  # torch goes where the end says the directory is; zipfile to the one before the end, which is as long
        content = zipped(torch_file({"mix.weight": torch.ones(1, 3, 1, 1)})) + zipped(ours)
    found = torch.load(io.BytesIO(content), weights_only=True)
    assert found["mix.weight"].flatten().tolist() == [1, 1, 1]  # so it would have been seen
    expected = stranger.weights()["mix.weight"].tolist()
    (stranger.path / "weights.pt").write_bytes(content)
    assert stranger.weights()["mix.weight"].tolist() == expected


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of a sparse tensor
@pytest.mark.parametrize("name", ["weights.pt", "checkpoint.pt"])
@pytest.mark.parametrize(
    "kind",
    [
        "packed",
        "says ten gigabytes",
        "a view of ten gigabytes",
        "a sparse tensor",
        "more values than memory",
        "more text than memory",
    ],
)
def test_tensors_that_would_fill_the_memory_or_take_for_ever_are_refused(stranger, name, kind):
    ours = torch_file({"mix.weight": torch.zeros(1, 3, 1, 1)})
    if kind == "packed":
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(ours)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
            for entry in old.infolist():
                new.writestr(entry.filename, bytes(2**25) if entry.filename.endswith("data/0") else old.read(entry))
        content = buffer.getvalue()
    elif kind == "says ten gigabytes":
        content = zipped(ours, says=TEN_GB, **{"data/0": bytes(12)})
    else:
        states = {
            "a view of ten gigabytes": torch.zeros(1).expand(TEN_GB),
            "a sparse tensor": torch.zeros(9).to_sparse(),
            "more values than memory": doubled_list(),
            "more text than memory": ["x" * 9000] * 20_000,
        }
        content = torch_file({"mix.weight": states[kind]})
    (stranger.path / name).write_bytes(content)
    assert "not a file of ours (ValueError" in refusal(stranger, name)


def test_a_checkpoint_of_nested_parameters_is_refused_before_it_is_shown(train_set, tmp_path):
    run, config = Run(tmp_path / "run"), TrainConfig(device="cpu", epochs=1)
    train(train_set, config, run=run)
    edit(run, "stages.train.status", "started")
    state = run.read_torch("checkpoint.pt")
    run.write_torch("checkpoint.pt", state | {"made_for": {"lr": [[[[0.1]]]]}})
    assert "checkpoint.pt: damaged" in refusal(run, "checkpoint.pt", lambda run: train(train_set, config, run=run))


# Tables


def change(run: Run, name: str, row: int, **fields) -> None:
    """Write other fields into a row of a table, as text, without a check."""
    lines = (run.path / name).read_text().splitlines()
    header, values = lines[0].split(","), lines[row].split(",")
    for column, value in fields.items():
        values[header.index(column)] = str(value)
    lines[row] = ",".join(values)
    (run.path / name).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"repeats": 0}, "row 3: repeats: 0, but raw_seconds give 2"),
        ({"seconds": 0}, "row 3: seconds: 0"),
        ({"seconds": -1}, "row 3: seconds: expected a number from 0, got -1.0"),
        ({"seconds": "inf"}, "row 3: seconds: expected a number from 0, got inf"),
        ({"seconds": ""}, "row 3: seconds: nan, but raw_seconds give"),
        ({"q1": 1e6}, "row 3: q1: 1000000.0, but raw_seconds give"),
        ({"q3": 1e-9}, "row 3: q3: 1e-09, but raw_seconds give"),
        ({"raw_seconds": ""}, "row 3: raw_seconds: expected numbers"),
        ({"raw_seconds": "0.1 =1+1"}, "row 3: raw_seconds: expected numbers"),
        ({"raw_seconds": "0 0", "seconds": 0, "q1": 0, "q3": 0}, "row 3: expected seconds, images and speed-up"),
        ({"images": 0}, "row 3: expected seconds, images and speed-up"),
        ({"batch_size": 0}, "row 3: expected a batch size from 1"),
        ({"batch_size": -16}, "batch_size: expected a whole number from 0, got '-16'"),
        ({"speedup": 1000}, "row 3: speedup: 1000.0, but its times give"),
        ({"speedup": ""}, "row 3: expected seconds, images and speed-up"),
        ({"sequential_seconds_per_image": ""}, "row 3: speedup: "),
        ({"device": "<script>"}, "row 3: device: expected cpu, cuda, cuda:N or mps, got '<script>'"),
        ({"device": "cuda:99999"}, "row 3: device: expected"),
        ({"shuffle": "yes"}, "shuffle: expected True or False, got 'yes'"),
        ({"noisy": ""}, "noisy: expected True or False, got ''"),
        ({"mse": 0.5}, "row 3: has a time, though its mse, 0.5, exceeds 0.01"),
        ({"images_per_second": 1}, "row 3: images_per_second: other than its images and seconds give"),
        ({"load_average": -1}, "row 3: load_average: expected a number from 0, got -1.0"),
        ({"clock_mhz": "null"}, "clock_mhz: expected a number, got 'null'"),
        ({"reason": "too slow"}, "row 3: has a time and a reason why there is none"),
        ({"path": "sequential", "batch_size": 1, "shuffle": False, "drop_last": False}, "a setting twice"),
    ],
)  # fmt: skip
def test_a_benchmark_row_that_could_not_have_been_measured_is_refused(stranger, fields, told):
    change(stranger, "benchmark.csv", 3, **fields)
    assert told in refusal(stranger, "benchmark.csv")


def test_a_row_noisier_or_calmer_than_its_quartiles_is_refused(stranger):
    noisy = stranger.read_table("benchmark.csv", BENCHMARK_COLUMNS)["noisy"].iloc[2]
    change(stranger, "benchmark.csv", 3, noisy=not noisy)
    assert f"row 3: noisy: {not noisy}, but its quartiles say otherwise" in refusal(stranger, "benchmark.csv")


def test_rows_of_other_repeats_than_asked_for_are_refused(stranger):
    edit(stranger, "stages.benchmark.parameters.repeats", 5)
    assert "has rows of other repeats than the stage's parameters ask for" in refusal(stranger, "benchmark.csv")


@pytest.mark.parametrize("row", [1, 2, -1])
def test_a_benchmark_that_lacks_a_row_is_refused(stranger, row):
    lines = (stranger.path / "benchmark.csv").read_text().splitlines(keepends=True)
    del lines[row]
    (stranger.path / "benchmark.csv").write_text("".join(lines))
    assert "lacks 1 of" in refusal(stranger, "benchmark.csv")


@pytest.mark.parametrize(("row", "name"), [(1, "sequential"), (2, "batched")])
def test_a_benchmark_without_a_time_of_the_pipeline_is_refused(stranger, row, name):
    empty = dict.fromkeys(("seconds", "q1", "q3", "speedup", "raw_seconds"), "")
    lines = (stranger.path / "benchmark.csv").read_text().splitlines()
    rows = [i for i, line in enumerate(lines) if line.startswith(name)]
    assert row == rows[0] or name == "batched"
    for i in rows:
        change(stranger, "benchmark.csv", i, repeats=0, reason="not measured: why", **empty)
    assert f"has no time of the pipeline ({name})" in refusal(stranger, "benchmark.csv")


@pytest.mark.parametrize(
    ("name", "value"),
    [("repeats", 0), ("batch_sizes", []), ("batch_sizes", "16"), ("num_workers", [-1]), ("devices", 7),
     ("devices", ...), ("small_batch_sizes", [None]), ("new", 1)],
)  # fmt: skip
def test_a_benchmark_of_parameters_that_cannot_be_is_refused(stranger, name, value):
    edit(stranger, f"stages.benchmark.parameters.{name}", value)
    assert "parameters of benchmark: " in refusal(stranger, "run.json", load_benchmark)


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("seeds.csv", seed_row(preset="<b>"), "expected presets of ours"),
        ("seeds.csv", seed_row(best_epoch=0), "a best epoch among its epochs"),
        ("seeds.csv", seed_row(best_epoch=7), "a best epoch among its epochs"),
        ("seeds.csv", seed_row(seconds=-1), "seconds from 0"),
        ("seeds.csv", seed_row(val_mse=""), "seconds from 0"),
        ("seeds.csv", seed_row(red="inf"), "expected finite weights"),
        ("seeds.csv", seed_row(blue=""), "expected finite weights"),
        ("seeds.csv", seed_row(weight_error=-1), "weight_error"),
        ("seeds.csv", seed_row(dead="no"), "dead: expected True or False"),
        ("seeds.csv", seed_row(seed=1), "lacks 1 rows"),
        ("libraries.csv", timed(repeats=4), "row 1: repeats: 4, but raw_seconds give 3"),
        ("libraries.csv", timed(speedup=""), "row 1: expected seconds, images and speed-up above 0"),
        ("libraries.csv", timed(max_difference=-1), "row 1: max_difference: expected a number from 0"),
        ("libraries.csv", timed(device="tpu"), "row 1: device: expected cpu"),
        ("sizes.csv", timed(images=0), "row 1: expected seconds, images and speed-up above 0"),
        ("sizes.csv", timed(q3=0.1), "row 1: q3: 0.1, but raw_seconds give"),
        ("sizes.csv", {"device": "cpu", "images": 9, "repeats": 0, "reason": "none"}, "has no time at all"),
    ],
)  # fmt: skip
def test_a_study_that_could_not_have_been_is_refused(stranger, name, row, told):
    columns = {"seeds.csv": SEED_COLUMNS, "libraries.csv": LIBRARY_COLUMNS, "sizes.csv": SIZE_COLUMNS}[name]
    (stranger.path / name).write_bytes(table(columns, row))
    assert told in refusal(stranger, name)


@pytest.mark.parametrize("name", ["seeds.csv", "libraries.csv", "sizes.csv"])
def test_a_study_with_a_row_twice_is_refused(stranger, name):
    header, row = (stranger.path / name).read_text().splitlines()
    (stranger.path / name).write_text("\n".join([header, row, row]) + "\n")
    assert "has a row twice" in refusal(stranger, name)


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith(".csv")])
def test_a_table_cut_anywhere_is_refused(stranger, name):
    content = (stranger.path / name).read_bytes()
    head = content.index(b"\n") + 1
    for end in sorted({0, 1, head - 1, head, head + 1, len(content) // 2, len(content) - 2, len(content) - 1}):
        (stranger.path / name).write_bytes(content[:end])
        with pytest.raises(RunError, match="stranger"):
            (load_training if name == "history.csv" else READERS[name])(stranger)


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith(".csv")])
def test_a_table_of_endless_rows_is_refused(stranger, name, monkeypatch):
    monkeypatch.setattr(untrusted, "MAX_ROWS", 4)
    content = (stranger.path / name).read_bytes()
    (stranger.path / name).write_bytes(content + b"\n" * 9)
    assert f"{name}: damaged or not ours: more than 4 rows" in refusal(stranger, name)


# Anything at all


def leaves(value: object, path: tuple = ()) -> list[tuple]:
    """The path of each entry of nested dicts and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, part in inner for found in [(*path, key), *leaves(part, (*path, key))]]


odd_numbers = st.sampled_from([0, -1, 1, 2.5, -0.0, 1e-320, 1e308, 2**62, 4096, 10**6])
odd_values = (
    odd_numbers | st.sampled_from([None, True, "", "photos", "1", "\x1b[2J", [], [1], {}, {"a": 1}]) | st.text()
)


def test_a_record_with_any_entry_changed_is_refused_or_can_be_shown(original, tmp_path):
    run = Run(shutil.copytree(original, tmp_path / "stranger"))
    sound = json.loads((run.path / "run.json").read_text())
    ends = []

    @settings(max_examples=75, derandomize=True, deadline=None, database=None)
    @given(st.sampled_from(leaves(sound)), odd_values)
    def check(path, value):
        info = json.loads(json.dumps(sound))
        inner = info
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        (run.path / "run.json").write_text(json.dumps(info))
        try:
            read_all(run)
        except RunError as error:
            assert str(run.path) in str(error) and str(error).isprintable() and len(str(error)) < 2000
            ends.append("refused")
        else:
            show_all(run)
            ends.append("shown")

    check()
    assert ends.count("refused") > 25 and ends.count("shown") > 10


def test_a_file_with_any_bytes_changed_is_refused_or_read(original, tmp_path):
    run = Run(shutil.copytree(original, tmp_path / "stranger"))
    sound = {name: (run.path / name).read_bytes() for name in READERS}
    ends = []

    @settings(max_examples=300, derandomize=True, deadline=None, database=None)
    @given(st.sampled_from(sorted(READERS)), st.floats(0, 1), st.binary(max_size=6), st.booleans())
    def check(name, where, new, insert):
        content = sound[name]
        at = int(where * len(content))
        (run.path / name).write_bytes(content[:at] + new + content[at + (0 if insert else len(new)) :])
        try:
            READERS[name](run)
        except RunError as error:
            assert str(error).isprintable()
            ends.append("refused")
        else:
            ends.append("read")
        (run.path / name).write_bytes(content)

    check()
    assert ends.count("refused") > 100
