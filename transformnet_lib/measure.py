"""Measuring methods against each other in rounds, and what such a measurement shows. Knows nothing of models.

In a round each method takes one turn. What is compared is the ratio within a round, since whatever else the machine
does in those seconds, a slow clock or another program, meets both methods alike. The median of these ratios has an
interval from their order alone, which no distribution of the noise can make wrong.
"""

import itertools
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
from scipy.stats import binom
from tqdm import tqdm

from .errors import ParameterError

LEAST_ROUNDS = 9  # fewer give no interval of CONFIDENCE that leaves out the wildest two
CONFIDENCE = 0.96  # of an interval; to look after each round whether it is narrow enough costs up to 2 % (simulated)
PRECISION = 0.03  # half an interval's width, as a part of its median: rounds end when each ratio is known so well
EQUAL = 0.03  # ratios within 1/1.03 and 1.03 make no difference to anybody
TURN_SECONDS = 0.01  # of a turn at least; shorter passes are repeated within it, since clocks and caches are coarse
ROUND_COLUMNS = {"round": "int", "method": "str", "seconds": "float", "passes": "int"}


@dataclass(frozen=True)
class Estimate:
    """A median, and an interval that holds the true one with a probability of at least CONFIDENCE."""

    median: float
    low: float
    high: float
    n: int  # values that it comes from

    @property
    def precision(self) -> float:
        """Half the interval's width, as a part of the median."""
        return (self.high - self.low) / 2 / abs(self.median)


def estimate(values: Sequence[float]) -> Estimate:
    """The median of independent `values` and its order-statistic interval, from the k-th smallest to the k-th largest.

    The true median lies below the k-th smallest if at least n - k + 1 of n values lie above it, and each does so with
    probability ½: a sum of binomial probabilities (Conover, Practical Nonparametric Statistics, 1999, section 3.2). k
    is the largest that keeps CONFIDENCE: 2 of 9 values (96.1 %). Raises ParameterError for fewer than LEAST_ROUNDS.
    """
    n = len(values)
    if n < LEAST_ROUNDS:
        raise ParameterError(f"expected at least {LEAST_ROUNDS} rounds, got {n}: fewer do not bound a median")
    k, ordered = _rank(n), np.sort(values)
    return Estimate(float(np.median(ordered)), float(ordered[k - 1]), float(ordered[n - k]), n)


@cache
def _rank(n: int) -> int:
    """k of `estimate` for n values."""
    return int(binom.ppf((1 - CONFIDENCE) / 2, n, 0.5))


def verdict(speedup: Estimate) -> str:
    """What the interval of a ratio (the other's seconds ÷ the method's) shows, and nothing but the interval."""
    if speedup.low >= 1 / (1 + EQUAL) and speedup.high <= 1 + EQUAL:
        return "equal"
    if speedup.low > 1:
        return "faster"
    return "slower" if speedup.high < 1 else "open"


def ratio(table: pd.DataFrame, method: str, other: str) -> Estimate:
    """How many times as fast as `other` a method is: the estimate of other's seconds ÷ its own, round by round.

    `table` has the columns ROUND_COLUMNS; rounds that lack one of the two do not count.
    """
    seconds = table.pivot(index="round", columns="method", values="seconds")
    return estimate((seconds[other] / seconds[method]).dropna().to_numpy())


def rounds(
    methods: Mapping[str, Callable[[], float]],
    *,
    compared: Sequence[tuple[str, str]],
    seconds: float,
    least: int = LEAST_ROUNDS,
    precision: float = PRECISION,
    seed: int = 0,
    title: str = "measure",
) -> pd.DataFrame:
    """Measure `methods` in rounds, each in an order drawn from `seed`: one row per round and method, `ROUND_COLUMNS`.

    A method does one pass and gives its wall time in seconds; in a turn it is called until TURN_SECONDS are full, and
    the row has the seconds per pass. At least `least` rounds are made. They go on until `seconds` (of all rounds) are
    used, or, from round LEAST_ROUNDS + 1 on, each ratio of `compared` is within `precision`. Raises ParameterError for
    fewer rounds than LEAST_ROUNDS.
    """
    if type(least) is not int or least < LEAST_ROUNDS:
        raise ParameterError(
            f"rounds: expected a whole number from {LEAST_ROUNDS}, got {least!r}: an interval needs them"
        )
    rows, order, start = [], list(methods), time.perf_counter()
    generator = random.Random(seed)
    with tqdm(desc=title, unit="round", leave=False) as bar:
        for number in itertools.count(1):
            generator.shuffle(order)
            rows += [{"round": number, "method": name, **turn(methods[name])} for name in order]
            table = pd.DataFrame(rows, columns=list(ROUND_COLUMNS))
            bar.update()
            if number < least:
                continue
            reached = max((ratio(table, *pair).precision for pair in compared), default=math.inf)
            bar.set_postfix_str(f"±{reached:.1%}")
            if time.perf_counter() - start >= seconds or (number > LEAST_ROUNDS and reached <= precision):
                return table


def turn(run_pass: Callable[[], float]) -> dict:
    """Passes until TURN_SECONDS are full: the seconds of one, and how many there were."""
    total, passes = 0.0, 0
    while total < TURN_SECONDS:
        total, passes = total + run_pass(), passes + 1
    return {"seconds": total / passes, "passes": passes}
