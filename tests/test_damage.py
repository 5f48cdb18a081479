"""Whatever lies in a run's files: it is read, or refused in one line that names the file; nothing in it is executed."""

import csv
import io
import json
import math
import os
import pickle
import shutil
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from handmade import content, do
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transformnet_lib import CustomDataset, read_run, run
from transformnet_lib.errors import RunError
from transformnet_lib.records import MAX_BYTES
from transformnet_lib.stage_folder import STAGES

RECORDS = [f"{name}/{record}.json" for name in STAGES for record in ("parameters", "stage")]
TABLES = [
    "train/history.csv", "benchmark/settings.csv", "benchmark/rounds.csv", "seeds/seeds.csv",
    *(f"study/{name}" for name in run.LIBRARY_TABLES | run.SIZE_TABLES),
]  # fmt: skip
WEIGHTS, EXAMPLES = "train/weights.safetensors", "compare/examples.npz"
FILES = [*RECORDS, *TABLES, WEIGHTS, EXAMPLES]


@pytest.fixture(scope="module")
def images() -> CustomDataset:
    return CustomDataset(data="photos", train=True, limit=20)


@pytest.fixture(scope="module")
def original(images, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "original"
    for name in STAGES:
        do(path, name, images)
    return path


@pytest.fixture
def path(original, tmp_path, monkeypatch) -> Path:
    """A run of one's own; it is the working directory too, where a hostile file would leave a folder."""
    monkeypatch.chdir(shutil.copytree(original, tmp_path / "r"))
    yield tmp_path / "r"
    assert not Path("executed").exists()


def refusal(path: Path, name: str) -> str | None:
    """The line with which a run is refused for this file; None where it is read."""
    try:
        read = read_run(path)
    except RunError as error:
        said = str(error)
        assert said.isprintable() and len(said) < 2000 and f"{(path / name).parent}/" in said  # of this stage
        return said
    assert read.model.weights and read.stages and str(read.pipeline) and read.train.best_val_mse is not None
    assert min(stage.started for stage in read.stages.values())  # comparable
    return None


def replace(file: Path, by: str) -> None:
    file.unlink()
    {"a pipe": os.mkfifo, "a folder": os.mkdir, "nothing": lambda file: None}[by](file)


DAMAGES = {
    "missing": lambda file: replace(file, "nothing"),
    "a pipe": lambda file: replace(file, "a pipe"),
    "a folder": lambda file: replace(file, "a folder"),
    "empty": lambda file: file.write_bytes(b""),
    "junk": lambda file: file.write_bytes(bytes(range(256)) * 9),
    "zeros": lambda file: file.write_bytes(bytes(1000)),
    "truncated": lambda file: os.truncate(file, file.stat().st_size * 2 // 3),
    "huge": lambda file: os.truncate(file, MAX_BYTES + 1),  # sparse
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_one_line_and_force_is_the_way_out(name, damage, path, images):
    stage = Path(name).parent.name
    DAMAGES[damage](path / name)
    if (damage, Path(name).name) == ("missing", "stage.json"):  # as a stage that was stopped
        assert stage == "train" or stage in read_run(path).unfinished
    else:
        assert f"{path / name}: " in refusal(path, name)
    assert do(path, stage, images, force=True)
    for later in STAGES[1:] if stage == "train" else []:
        do(path, later, images)
    assert list(read_run(path).stages) == list(STAGES)


@pytest.mark.parametrize("name", RECORDS)
def test_json_that_no_run_has_is_refused(name, path):
    good = (path / name).read_bytes()
    changed = [
        good.replace(b"{", b'{"more": 1,', 1),
        good.replace(b'"started"', b'"start"'),
        good + b"{}",
        b"\0" + good,
        good.replace(b'"parameters": {', b'"parameters": {"more": NaN,', 1),
        good.replace(b'Z"', b'"'),  # a time of no zone cannot be compared
    ]
    no_record = [b"[" * 100_000, b'{"a":' * 100_000, b"NaN", b"1e999", b"[]", b"{}", good.decode().encode("utf-16")]
    for text in [*no_record, *(text for text in changed if text != good)]:
        (path / name).write_bytes(text)
        assert refusal(path, name), text[:50]


VALUES = [
    None, True, -1, 0, 2.5, 10**400, 1e999, math.nan, "", "x" * 9999, "\x1b[31m\n\u202e", [], [1], {}, {"a": 1},
    "2026-01-01T00:00:00", "9999-12-31T23:59:59-23:59", "photos", "cpu",
]  # fmt: skip


def places(record: object, *outer) -> Iterator[tuple]:
    """Where a record has values: keys and positions, from the outside in."""
    for key, value in record.items() if isinstance(record, dict) else enumerate(record):
        yield (*outer, key)
        if isinstance(value, dict | list):
            yield from places(value, *outer, key)


def any_change(path: Path, names: list[str], examples: int, change) -> None:
    """Change one of the files as `change(content, data)` does, again and again: it is one line, or read."""
    good = {name: (path / name).read_bytes() for name in names}

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.data())
    def check(data):
        name = data.draw(st.sampled_from(names))
        (path / name).write_bytes(change(good[name], data))
        try:
            refusal(path, name)
        finally:
            (path / name).write_bytes(good[name])

    check()


def with_a_value_changed(text: bytes, data) -> bytes:
    record = json.loads(text)
    *outer, last = data.draw(st.sampled_from(list(places(record))))
    inner = record
    for key in outer:
        inner = inner[key]
    inner[last] = data.draw(st.sampled_from(VALUES))
    return json.dumps(record).encode()


def with_bytes_changed(text: bytes, data) -> bytes:
    changed = bytearray(text)
    for _ in range(data.draw(st.integers(1, 4))):
        at, count = data.draw(st.integers(0, len(changed))), data.draw(st.sampled_from([0, 1, 1, 1, 8]))
        changed[at : at + count] = data.draw(st.binary(max_size=max(1, count)))
    return bytes(changed)


@pytest.mark.parametrize("examples", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_a_record_with_any_value_changed_is_one_line_or_read(examples, path):
    any_change(path, RECORDS, examples, with_a_value_changed)


@pytest.mark.parametrize("examples", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_a_file_with_any_bytes_changed_is_one_line_or_read(examples, path):
    any_change(path, FILES, examples, with_bytes_changed)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_another_form_is_refused(name, path):
    header, first, *_ = csv.reader(io.StringIO((path / name).read_text(), newline=""))
    number = next(i for i, value in enumerate(first) if value.replace(".", "").isdigit())
    wrong = [[header], [header, [*first, "1"]], [header, first[:-1]], [header[::-1], first[::-1]], [first, first]]
    wrong += [[[*header, "more"], [*first, "1"]], [[*header, header[0]], [*first, "1"]], [header[:-1], first[:-1]]]
    for value in ("x", "-1", str(2**63), "9" * 5000, "y" * 200_000, "\0", "1;1"):
        wrong.append([header, [*first[:number], value, *first[number + 1 :]]])
    for rows in wrong:
        with (path / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        assert refusal(path, name), str(rows)[-100:]


# Arrays and tensors


class Evil:
    """Whose unpickling leaves a folder behind."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def npy(array: np.ndarray, **header) -> bytes:
    """An array's file, whose header may say something else."""
    buffer = io.BytesIO()
    said = {"descr": "|O" if array.dtype.hasobject else array.dtype.str, "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(buffer, said | header)
    return buffer.getvalue() + (pickle.dumps(array) if array.dtype.hasobject else array.tobytes())


ONE = np.zeros((2, 1, 28, 28), np.float32)
ARRAYS = {"indices": np.array([3, 1]), "inputs": np.zeros((2, 3, 32, 32), np.uint8), "targets": ONE, "outputs": ONE}


def npz(method=zipfile.ZIP_STORED, **changes: bytes | np.ndarray | None) -> bytes:
    """An examples.npz with some arrays changed or, for None, left out."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, array in (ARRAYS | changes).items():
            if array is not None:
                archive.writestr(f"{name}.npy", array if isinstance(array, bytes) else npy(array))
    return buffer.getvalue()


def patched(old: str, new: str) -> bytes:
    """A zip file's entries, all with other flags or another compression: version, flags, method in hexadecimal."""
    return npz().replace(bytes.fromhex(old), bytes.fromhex(new))


HOSTILE_EXAMPLES = {
    "a pickle": lambda: pickle.dumps(Evil()),
    "a pickle for an array": lambda: npz(indices=pickle.dumps(Evil())),
    "a pickled array": lambda: npz(indices=np.array([Evil(), Evil()], dtype=object)),
    "an array too few": lambda: npz(outputs=None),
    "an array too many": lambda: npz(more=ONE),
    "another dtype": lambda: npz(outputs=ONE.astype(np.float64)),
    "another rank": lambda: npz(outputs=ONE[0]),
    "more of one": lambda: npz(outputs=ONE[[0, 0, 1]]),
    "no images": lambda: npz(**{name: array[:0] for name, array in ARRAYS.items()}),
    "not finite": lambda: npz(outputs=ONE + np.nan),
    "another height": lambda: npz(outputs=ONE[:, :, :9]),
    "two channels": lambda: npz(targets=ONE.repeat(2, axis=1), outputs=ONE.repeat(2, axis=1)),
    "no pixels": lambda: npz(targets=ONE[:, :, :0], outputs=ONE[:, :, :0]),
    "other images": lambda: npz(inputs=ARRAYS["inputs"][:, :, 1:]),
    "a bomb": lambda: npz(zipfile.ZIP_DEFLATED, outputs=np.zeros((50_000, 1, 28, 28), np.float32)),
    "ten terabytes": lambda: npz(outputs=npy(ONE, shape=(10**10, 1, 28, 28))),
    "more than there can be": lambda: npz(outputs=npy(ONE, shape=(2**62, 2**62, 28, 28))),
    "less than nothing": lambda: npz(outputs=npy(ONE, shape=(-2, 1, 28, 28))),
    "no dictionary": lambda: npz(outputs=npy(ONE).replace(b"{", b"(", 1)),
    "only brackets": lambda: npz(outputs=b"\x93NUMPY\x01\0\xe8\x03" + b"(" * 1000),
    "no tokens": lambda: npz(outputs=b"\x93NUMPY\x01\0\x04\0'''\n"),
    "unknown compression": lambda: patched("140000000000", "140000006300"),
    "encrypted": lambda: patched("140000000000", "140001000000"),
}


@pytest.mark.parametrize("kind", HOSTILE_EXAMPLES)
def test_hostile_examples_are_refused_and_take_no_memory(kind, path):
    (path / EXAMPLES).write_bytes(npz())
    assert refusal(path, EXAMPLES) is None
    (path / EXAMPLES).write_bytes(HOSTILE_EXAMPLES[kind]())
    tracemalloc.start()
    try:
        assert refusal(path, EXAMPLES)
        assert kind == "ten terabytes" or tracemalloc.get_traced_memory()[1] < 50 * 2**20  # those are only asked for
    finally:
        tracemalloc.stop()


def with_header(text: str | None = None, length: int | None = None, **said) -> bytes:
    """A safetensors file of three weights, whose header may say something else."""
    entry = {"dtype": "F32", "shape": [1, 3, 1, 1], "data_offsets": [0, 12]} | said
    text = text or json.dumps({"mix.weight": entry})
    return (length or len(text)).to_bytes(8, "little") + text.encode() + bytes(12)


THREE = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
HOSTILE_WEIGHTS = {
    "a pickle": pickle.dumps(Evil()),
    "another name": safetensors.torch.save({"weight": THREE}),
    "another shape": safetensors.torch.save({"mix.weight": THREE.view(3, 1, 1, 1)}),
    "another dtype": safetensors.torch.save({"mix.weight": THREE.double()}),
    "NaN": safetensors.torch.save({"mix.weight": THREE * math.nan}),
    "infinite": safetensors.torch.save({"mix.weight": THREE / 0}),
    "data beyond the end": with_header(data_offsets=[0, 2**40]),
    "data before the start": with_header(data_offsets=[-12, 0]),
    "ten terabytes": with_header(shape=[1, 3, 10**12, 1]),
    "more than there can be": with_header(shape=[2**62, 2**62]),
    "unknown dtype": with_header(dtype="F4"),
    "a header beyond the end": with_header(length=2**40),
    "a deep header": with_header("[" * 200_000),
}


@pytest.mark.parametrize("kind", HOSTILE_WEIGHTS)
def test_hostile_weights_are_refused(kind, path):
    (path / WEIGHTS).write_bytes(with_header())
    assert refusal(path, WEIGHTS) is None
    (path / WEIGHTS).write_bytes(HOSTILE_WEIGHTS[kind])
    assert refusal(path, WEIGHTS)


def test_reading_a_hostile_run_changes_nothing(path):
    (path / EXAMPLES).write_bytes(npz(indices=np.array([Evil(), Evil()], dtype=object)))
    before = content(path)
    assert refusal(path, EXAMPLES) and content(path) == before


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [("rounds.csv", "seconds", "0"), ("rounds.csv", "seconds", "-1"), ("rounds.csv", "attempt", "0"),
     ("settings.csv", "batch_size", "0"), ("settings.csv", "offered", "0"), ("settings.csv", "setup_seconds", "-1"),
     ("settings.csv", "setup_seconds", "inf"), ("settings.csv", "mse", "-0.5")],
)  # fmt: skip
def test_a_number_out_of_range_is_refused_at_the_door(name, column, value, path):
    table = pd.read_csv(path / "benchmark" / name, dtype=str, keep_default_na=False)
    table.loc[0, column] = value
    table.to_csv(path / "benchmark" / name, index=False)
    assert column in refusal(path, f"benchmark/{name}")
