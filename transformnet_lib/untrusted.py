"""Bytes from strangers as values: JSON, tables, arrays and tensors, without running anything that is in them.

What is not as these functions describe it they refuse with an exception of any kind, before it takes much more memory
or time than its own size. Texts are given as they are: who shows one escapes it.
"""

import csv
import io
import itertools
import json
import math
import pickletools
import re
import zipfile
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

MAX_BYTES = 2**26  # 64 MiB; no file of a run is near it, packed or unpacked, so a larger one is refused
MAX_TEXT_BYTES = 2**24  # 16 MiB; of tables, which grow when they are taken apart
MAX_JSON_BYTES = 2**20  # 1 MiB; it takes thirty times as much when it is taken apart; the shipped run.json has 5 KiB
MAX_ROWS = 100_000  # of a table; an empty one takes a hundred times its bytes
MAX_PICKLE_BYTES = 2**16  # 64 KiB; a checkpoint's has 2: what grows in it are tensors, which lie beside the pickle

TORCH_FILES = (
    r"[^/]+/(data\.pkl|data/[0-9]+|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id)"
)
# What torch.save needs for our files, of pickle's operations, names, names that are called, and kinds of dicts' keys
PICKLE_OPERATIONS = {
    "PROTO", "STOP", "MARK", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE", "BININT",
    "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "GLOBAL", "BINPERSID", "REDUCE",
}  # fmt: skip
PICKLE_CALLS = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"}
PICKLE_GLOBALS = PICKLE_CALLS | {"torch FloatStorage", "torch DoubleStorage", "torch ByteStorage"}
PICKLE_KEYS = {"str", "int"}


def parse_json(content: bytes) -> object:
    """JSON as its standard has it, ValueError otherwise: no NaN, no number beyond int64 or float64, only Unicode."""
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"{len(content):,} bytes, more than {MAX_JSON_BYTES:,}")

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is no number")

    def whole(text: str) -> int:
        if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
            raise ValueError(f"{text[:20]}… is too large a number")
        return int(text)

    def number(text: str) -> float:
        return float(text) if math.isfinite(float(text)) else refuse(text[:20])

    def once(pairs: list[tuple[str, object]]) -> dict:
        if len(named := dict(pairs)) < len(pairs):
            raise ValueError("a name twice")
        return named

    value = json.loads(
        content.decode(), parse_constant=refuse, parse_int=whole, parse_float=number, object_pairs_hook=once
    )
    json.dumps(value, ensure_ascii=False).encode()  # an escape may stand for half a character
    return value


def is_amount(value: object) -> bool:
    """Whether `value` is a finite number from 0; True and "1" are none."""
    return type(value) in (int, float) and 0 <= value < math.inf


def parse_table(content: bytes, columns: dict[str, str]) -> pd.DataFrame:
    """A CSV whose columns are exactly `columns` (name → "int", "float", "bool" or "str") and that has rows.

    Whole numbers are from 0. Only floats can be missing, which is NaN.
    """
    text = content.decode()
    header, *rows = _csv_rows(text) or [[]]
    if header != list(columns):
        raise ValueError(f"expected columns {', '.join(columns)}; got {', '.join(header)}")
    for i, row in enumerate(rows, 1):
        if len(row) != len(columns):
            raise ValueError(f"row {i}: expected {len(columns)} fields, got {len(row)}")
    if not text.endswith("\n"):
        raise ValueError("the last row is cut")
    if not rows:
        raise ValueError("has no rows")
    table = {}
    for (column, kind), fields in zip(columns.items(), zip(*rows, strict=True), strict=True):
        parse, dtype = FIELDS[kind]
        table[column] = pd.Series([parse(column, field) for field in fields], dtype=dtype)
    return pd.DataFrame(table)


def _csv_rows(text: str) -> list[list[str]]:
    usual = csv.field_size_limit(MAX_TEXT_BYTES)  # raw_seconds can be longer than csv's 128 KiB
    try:
        rows = list(itertools.islice(csv.reader(io.StringIO(text, newline=""), strict=True), MAX_ROWS + 1))
    finally:
        csv.field_size_limit(usual)
    if len(rows) > MAX_ROWS:
        raise ValueError(f"more than {MAX_ROWS:,} rows")
    return rows


def _whole(column: str, field: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}(\.0)?", field) or int(field.removesuffix(".0")) >= 2**63:
        raise ValueError(f"{column}: expected a whole number from 0, got {field!r}")
    return int(field.removesuffix(".0"))  # pandas writes it for a column that had gaps


def _number(column: str, field: str) -> float:
    if not re.fullmatch(r"-?(inf|[0-9]+(\.[0-9]*)?(e[-+]?[0-9]+)?)|", field):
        raise ValueError(f"{column}: expected a number, got {field!r}")
    value = float(field or "nan")
    if math.isinf(value) and not field.endswith("inf"):
        raise ValueError(f"{column}: expected a number that float64 can hold, got {field!r}")
    return value


def _truth(column: str, field: str) -> bool:
    if field not in ("True", "False"):
        raise ValueError(f"{column}: expected True or False, got {field!r}")
    return field == "True"


def _text(column: str, field: str) -> str:
    return field


FIELDS = {"int": (_whole, "Int64"), "float": (_number, "float64"), "bool": (_truth, "boolean"), "str": (_text, "str")}


def unpack_arrays(content: bytes, kinds: dict[str, tuple[str, int]]) -> dict[str, np.ndarray]:
    """The arrays of an npz that holds exactly `kinds`: name → dtype and rank."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sorted(archive.namelist()) != sorted(f"{name}.npy" for name in kinds):
            raise ValueError(f"expected the arrays {', '.join(kinds)}, got {', '.join(archive.namelist())}")
        _refuse_if_large(archive.infolist())
        for entry in archive.infolist():
            with archive.open(entry) as file:  # NumPy takes the memory that a header asks for, whatever is behind it
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            wanted, rank = kinds[entry.filename.removesuffix(".npy")]
            if dtype != wanted or len(shape) != rank:
                raise ValueError(f"{entry.filename}: expected {wanted} of rank {rank}, got {dtype} {shape}")
            if math.prod(shape) * dtype.itemsize > entry.file_size:
                raise ValueError(f"{entry.filename}: {shape} are more than its {entry.file_size:,} bytes")
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return {name: np.asarray(archive[name]) for name in kinds}


def _refuse_if_large(entries: Sequence[zipfile.ZipInfo]) -> None:
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > MAX_BYTES:
        raise ValueError(f"{unpacked:,} bytes unpacked, more than {MAX_BYTES:,}")


def load_tensors(content: bytes) -> object:
    """What `torch.save` wrote of ours: float and uint8 tensors on the CPU and plain values, in dicts and lists."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        _refuse_if_large(archive.infolist())
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):  # torch.save never packs
            raise ValueError("a packed file")
        files = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    for name, file in files.items():
        if not re.fullmatch(TORCH_FILES, name):  # to torch DATA.PKL is data.pkl
            raise ValueError(f"a file {name}")
        if name.endswith("/data.pkl"):
            _check_pickle(file)
    checked = io.BytesIO()  # written anew: torch reads zips by other rules, so it could find other files in `content`
    with zipfile.ZipFile(checked, "w") as archive:
        for name, file in files.items():
            archive.writestr(name, file)
    checked.seek(0)
    value = torch.load(checked, map_location="cpu", weights_only=True)
    _refuse_if_not_plain(value, most=len(content))
    return value


def _check_pickle(pickled: bytes) -> None:
    """Raise ValueError unless torch's reader can follow this pickle in little time and memory.

    What it may import, `weights_only=True` bounds already; but among that are `bytearray(10**10)` and storages of any
    size, and a tuple of twice the same tuple of twice the same … takes time without end as soon as it is a dict's key.
    So a copy of its stack is kept, of the kinds of what would lie there.
    """
    if len(pickled) > MAX_PICKLE_BYTES:
        raise ValueError(f"a pickle of {len(pickled):,} bytes")
    stack: list[str] = []
    memo: dict[int, str] = {}
    for operation, argument, position in pickletools.genops(pickled):
        name = operation.name
        if name not in PICKLE_OPERATIONS or (name == "PROTO" and position > 0):
            raise ValueError(f"{name} in a pickle")
        if name.endswith("PUT"):
            memo[argument] = stack[-1]
        elif name.endswith("GET"):
            if memo[argument] == "tuple":
                raise ValueError("a tuple that is used again")
            stack.append(memo[argument])
        else:
            taken, items = [kind.name for kind in operation.stack_before], []
            if "mark" in taken:
                mark = len(stack) - 1 - stack[::-1].index("mark")
                items, taken = stack[mark + 1 :], taken[: taken.index("mark")]
                del stack[mark:]
            start = len(stack) - len(taken)
            if start < 0:
                raise ValueError(f"{name} of too little")
            taken = stack[start:]
            del stack[start:]
            keys = {"SETITEM": taken[1:2], "SETITEMS": items[::2]}.get(name, [])
            if not PICKLE_KEYS.issuperset(keys):
                raise ValueError(f"keys of the kinds {', '.join(keys)}")
            if name == "GLOBAL" and argument not in PICKLE_GLOBALS:
                raise ValueError(f"{argument} in a pickle")
            if name == "REDUCE" and taken[0] not in PICKLE_CALLS:
                raise ValueError(f"a call of {taken[0]}")
            if name == "REDUCE" and taken[0] == "collections OrderedDict" and taken[1] != "()":
                raise ValueError("an OrderedDict made of something")  # of a tensor it makes as many as that has rows
            if name == "EMPTY_TUPLE":
                stack.append("()")
                continue
            stack += [argument if name == "GLOBAL" else kind.name for kind in operation.stack_after]


def _refuse_if_not_plain(value: object, *, most: int) -> None:
    """Using a list again and again, a short pickle can stand for more values than there is memory for."""
    left, count = [value], 1
    while left:
        part = left.pop()
        if isinstance(part, dict | list | tuple):
            left += part.values() if isinstance(part, dict) else part
            count += len(part)
        elif isinstance(part, str):
            count += len(part)
        elif isinstance(part, torch.Tensor):
            plain = part.layout == torch.strided and part.device.type == "cpu"
            if not plain or part.numel() * part.element_size() > MAX_BYTES:
                raise ValueError(f"a tensor {tuple(part.shape)} that is not plain, or too large")
        elif not isinstance(part, int | float | None):
            raise ValueError(f"a {type(part).__name__}")
        if count > most:
            raise ValueError("more values than bytes")
