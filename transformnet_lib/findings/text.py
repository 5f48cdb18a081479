"""How quantities and names are written, in Markdown."""

import re
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import one_line
from ..measure import Estimate

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
METHOD_NAMES = {  # a row's method, as tables and figures name it
    "sequential": "pipeline, image by image",
    "batched": "pipeline, in batches",
    "reference": "model, the paper's method",
    "fast": "model, the fast method",
}
YES_NO = {True: "yes", False: "no"}


def seconds_text(seconds: float) -> str:
    """A time with three significant digits and its unit.

    >>> seconds_text(0.12345), seconds_text(12.345)
    ('123 ms', '12.3 s')
    """
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def spread_text(row: Mapping[str, float]) -> str:
    """A time's median with its interval, all with the median's unit and decimals.

    >>> spread_text({"seconds": 0.01309, "low": 0.013, "high": 0.01821})
    '13.1 ms [13.0, 18.2]'
    """
    unit, scale = ("ms", 1000) if row["seconds"] < 1 else ("s", 1)
    median, low, high = (row[name] * scale for name in ("seconds", "low", "high"))
    digits = decimals(median)
    return f"{median:.{digits}f} {unit} [{low:.{digits}f}, {high:.{digits}f}]"


def decimals(value: float) -> int:
    """How many decimals show three significant digits of `value`, so that its companions can be written alike.

    >>> decimals(163.0), decimals(13.1), decimals(0.0123)
    (0, 1, 4)
    """
    return max(0, 2 - int(np.floor(np.log10(abs(value))))) if value and np.isfinite(value) else 0


def times_text(factor: float) -> str:
    """A ratio as "5.6×".

    >>> times_text(5.61), times_text(0.0312), times_text(2070)
    ('5.61×', '0.031×', '2,070×')
    """
    if factor >= 1000:
        return f"{factor:,.0f}×"
    return f"{factor:.3g}×" if factor >= 0.1 else f"{factor:.2g}×"


def ratio_text(ratio: Estimate) -> str:
    """A ratio with its interval.

    >>> ratio_text(Estimate(5.61, 5.4, 5.9, 9))
    '5.61× [5.4, 5.9]'
    """
    low, high = (f"{end:,.0f}" if end >= 1000 else f"{end:.3g}" for end in (ratio.low, ratio.high))
    return f"{times_text(ratio.median)} [{low}, {high}]"


def percent(part: float) -> str:
    """A part of a whole, with two significant digits below 10 %.

    >>> percent(0.0312), percent(0.18)
    ('3.1 %', '18 %')
    """
    return f"{100 * part:.{1 if part < 0.1 else 0}f} %"


def scientific(value: float, digits: int = 2) -> str:
    """A small quantity as people write it.

    >>> scientific(0.000123), scientific(0.0), scientific(0.25), scientific(250.4)
    ('1.2×10⁻⁴', '0', '0.25', '250')
    """
    if value == 0 or not np.isfinite(value) or 0.01 <= abs(value) < 1000:
        return f"{value:.{digits}g}" if abs(value) < 10 else f"{value:.0f}"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}×10{str(int(exponent)).translate(SUPERSCRIPTS)}"


def counted(count: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "setting"), counted(8, "setting")
    ('1 setting', '8 settings')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(parts: Sequence[str]) -> str:
    """Parts as an enumeration.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    *first, last = parts or [""]
    return f"{', '.join(first)} and {last}" if first else last


def code(text: str) -> str:
    """`text` as a Markdown code span that shows it literally, whatever signs are in it.

    >>> code("cpu"), code("a`b$")
    ('`cpu`', '``a`b$``')
    """
    text = _isolated(text) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in (text[0], text[-1]) else ""
    return f"{fence}{space}{text}{space}{fence}"


def code_block(text: str) -> str:
    """`text` as a Markdown block of code, line by line as it is."""
    text = without_controls(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}sh\n{text}\n{fence}"


def escape(text: str) -> str:
    """`text` as Markdown that shows it literally, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>()#+.!|$~^&:-])", r"\\\1", _isolated(text))


def without_controls(text: str) -> str:
    """`text`, its lines and spaces as they are, without signs that a terminal obeys or that turn round what follows."""
    return "".join(
        sign if sign == "\n" or unicodedata.category(sign) not in ("Cc", "Cf") else "\N{REPLACEMENT CHARACTER}"
        for sign in text
    )


def _isolated(text: str) -> str:
    """`text` on one line, so that what stands around it reads from left to right, also if it is Hebrew or Arabic.

    The signs around it are Unicode's isolates: https://www.unicode.org/reports/tr9/#Explicit_Directional_Isolates
    """
    text = one_line(text)
    turns = any(unicodedata.bidirectional(sign) in ("R", "AL", "AN") for sign in text)
    return f"\N{FIRST STRONG ISOLATE}{text}\N{POP DIRECTIONAL ISOLATE}" if turns else text


def device_text(device: str) -> str:
    """A device as a sentence names it, not to be taken for a run of the same name.

    >>> device_text("cpu"), device_text("cuda:1")
    ('the CPU', 'CUDA device 1')
    """
    kind, _, index = device.partition(":")
    name = {"cpu": "CPU", "cuda": "CUDA device", "mps": "MPS device"}.get(kind, kind)
    return f"{name} {index}" if index else f"the {name}"
