"""How numbers and names are written in Markdown: the filters that templates use."""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from ..errors import one_line
from ..measure import Estimate

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def seconds(value: float) -> Markup:
    """A time with three significant digits and its unit.

    >>> print(seconds(0.12345), seconds(12.345))
    123 ms 12.3 s
    """
    return Markup(f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s")


def time(value: Estimate) -> Markup:
    """A time in seconds with its interval, all with the median's unit and decimals.

    >>> print(time(Estimate(0.01309, 0.013, 0.01821, 9)))
    13.1 ms [13.0, 18.2]
    """
    unit, scale = ("ms", 1000) if value.median < 1 else ("s", 1)
    return _spread(value, scale, f" {unit}")


def spread(value: Estimate, scale: float = 1) -> Markup:
    """A number with its interval, all with as many decimals as show three digits of the median.

    >>> print(spread(Estimate(1.234, 1.1, 1.35, 9)))
    1.23 [1.10, 1.35]
    """
    return _spread(value, scale, "")


def _spread(value: Estimate, scale: float, unit: str) -> Markup:
    median, low, high = (each * scale for each in (value.median, value.low, value.high))
    digits = decimals(median)
    return Markup(f"{median:,.{digits}f}{unit} [{low:,.{digits}f}, {high:,.{digits}f}]")


def decimals(value: float) -> int:
    """How many decimals show three significant digits of `value`, so that its companions can be written alike.

    >>> decimals(163.0), decimals(13.1), decimals(0.0123)
    (0, 1, 4)
    """
    return max(0, 2 - int(np.floor(np.log10(abs(value))))) if value and np.isfinite(value) else 0


def times(value: float) -> Markup:
    """A ratio.

    >>> print(times(5.61), times(0.0312), times(2070))
    5.61× 0.031× 2,070×
    """
    return Markup(f"{_digits(value)}×")


def ratio(value: Estimate) -> Markup:
    """A ratio with its interval.

    >>> print(ratio(Estimate(5.61, 5.4, 5.9, 9)))
    5.61× [5.4, 5.9]
    """
    return Markup(f"{_digits(value.median)}× [{_digits(value.low)}, {_digits(value.high)}]")


def _digits(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.1 else f"{value:.2g}"


def percent(part: float) -> Markup:
    """A part of a whole, with one decimal below 10 %.

    >>> print(percent(0.0312), percent(0.18))
    3.1 % 18 %
    """
    return Markup(f"{100 * part:.{1 if part < 0.1 else 0}f} %")


def scientific(value: float, digits: int = 2) -> Markup:
    """A small quantity as people write it.

    >>> print(scientific(0.000123), scientific(0.0), scientific(0.25), scientific(250.4))
    1.2×10⁻⁴ 0 0.25 250
    """
    if value == 0 or not np.isfinite(value) or 0.01 <= abs(value) < 1000:
        return Markup(f"{value:.{digits}g}" if abs(value) < 10 else f"{value:.0f}")
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return Markup(f"{mantissa}×10{str(int(exponent)).translate(SUPERSCRIPTS)}")


def fixed(value: float, digits: int = 0) -> Markup:
    """A number with so many decimals.

    >>> print(fixed(-0.5, 2), fixed(1234.5))
    −0.50 1,234
    """
    return Markup(f"{value:,.{digits}f}".replace("-", "−"))


def short(value: float, digits: int = 3) -> Markup:
    """A number with at most so many significant digits.

    >>> print(short(0.002), short(443.21), short(1.8e-15))
    0.002 443 1.8×10⁻¹⁵
    """
    if 0 < abs(value) < 1e-4:
        return scientific(value)
    return Markup(f"{value:.{digits}g}".replace("-", "−"))


def counted(count: int, noun: str) -> Markup:
    """A number with its noun.

    >>> print(counted(1, "setting"), counted(8, "setting"))
    1 setting 8 settings
    """
    return Markup(f"{count:,} {noun}{'' if count == 1 else 's'}")


def listed(parts: Sequence[str]) -> Markup:
    """Parts as an enumeration, those that no filter made shown literally.

    >>> print(listed(["a", "b", "c"]))
    a, b and c
    """
    *first, last = [part if isinstance(part, Markup) else literal(str(part)) for part in parts] or [Markup()]
    return Markup(f"{', '.join(first)} and {last}") if first else last


def code(text: str) -> Markup:
    """`text` as a Markdown code span that shows it literally, whatever signs are in it.

    >>> print(code("cpu"), code("a`b$"))
    `cpu` ``a`b$``
    """
    text = _isolated(str(text)) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in (text[0], text[-1]) else ""
    return Markup(f"{fence}{space}{text}{space}{fence}")


def code_block(text: str) -> Markup:
    """`text` as a Markdown block of code, line by line as it is."""
    text = without_controls(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{fence}sh\n{text}\n{fence}")


def literal(text: str) -> Markup:
    """`text` as Markdown that shows it literally, on one line."""
    before, after = (" " if text[i : i + 1].isspace() else "" for i in (0, len(text) - 1))
    return Markup(before + re.sub(r"([\\`*_{}\[\]<>()#+.!|$~^&:-])", r"\\\1", _isolated(text)) + after)


def plain(markdown: str) -> str:
    """A sentence in Markdown, as these filters make it, for a terminal: on one line, without marks."""
    return re.sub(r"\\([!-/:-@\[-`{-~])|`", r"\1", one_line(markdown))


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


FILTERS = {
    each.__name__: each
    for each in (
        seconds, time, spread, times, ratio, percent, scientific, fixed, short, counted, listed, code, code_block
    )
}  # fmt: skip
