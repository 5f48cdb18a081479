"""Checks of parameters: each raises ParameterError, in one line, for a value that is none of its kind."""

from .errors import ParameterError

FLOAT32_MAX = 3.4028234663852886e38


def check_whole(name: str, value: object, least: int) -> None:
    """A whole number from `least` to 2**63 - 1."""
    if type(value) is not int or not least <= value < 2**63:
        raise ParameterError(f"{name}: expected a whole number from {least}, below 2**63, got {value!r}")


def check_number(name: str, value: object) -> None:
    """A number from 0 that float32 can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= FLOAT32_MAX:
        raise ParameterError(f"{name}: expected a number from 0, below {FLOAT32_MAX:.1e}, got {value!r}")


def check_list(name: str, values: object, least: int) -> None:
    """A list of whole numbers from `least` to 2**31 - 1, each once: what is measured twice would be one row."""
    if not isinstance(values, list | tuple | range) or any(
        type(value) is not int or not least <= value < 2**31 for value in values
    ):
        raise ParameterError(f"{name}: expected a list of whole numbers from {least}, got {values!r:.200}")
    if len(set(values)) < len(values):
        raise ParameterError(f"{name}: expected each number once, got {values!r:.200}")
