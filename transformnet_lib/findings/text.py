"""How quantities are written."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
YES_NO = {True: "yes", False: "no"}


def seconds_text(seconds: float) -> str:
    """A time with three significant digits and its unit.

    >>> seconds_text(0.12345), seconds_text(12.345)
    ('123 ms', '12.3 s')
    """
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def spread_text(row: pd.Series) -> str:
    """A row's median with its quartiles: "127 ms [126 ms, 128 ms]"."""
    return f"{seconds_text(row['seconds'])} [{seconds_text(row['q1'])}, {seconds_text(row['q3'])}]"


def times_text(factor: float) -> str:
    """A ratio as "5.6×"."""
    return f"{factor:.3g}×" if factor >= 0.1 else f"{factor:.2g}×"


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
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
