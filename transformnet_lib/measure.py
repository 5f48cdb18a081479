"""Measuring methods against each other in rounds, and what such a measurement shows. Knows nothing of models.

In a round each method takes one turn. What is compared is the ratio within a round, since whatever else the machine
does in those seconds, a slow clock or another program, meets both methods alike. The median of these ratios has an
interval from their order alone, which no distribution of the noise can make wrong.
"""

import itertools
import os
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from scipy.special import bdtr  # the binomial distribution; scipy.stats takes a second to import
from tqdm import tqdm

from .errors import ParameterError

LEAST_ROUNDS = 9  # fewer give no interval of CONFIDENCE that leaves out the wildest two
CONFIDENCE = 0.96  # of an interval; to look after each round whether it is narrow enough costs up to 2 % (simulated)
PRECISION = 0.03  # half an interval's width, as a part of its median: rounds end when each ratio is known so well
EQUAL = 0.03  # ratios within 1/1.03 and 1.03 make no difference to anybody
TURN_SECONDS = 0.01  # of a turn at least; shorter passes are repeated within it, since clocks and caches are coarse
MAX_SECONDS = 1e9  # thirty years
# A round is disturbed if programs had to wait for a processor, or the hypervisor took one away, for more than this
# part of its time.
DISTURBED = 0.1
# What ends a method's rounds with a reason, and not those of the others: a setting that cannot run, a lost device or no
# memory on it (both RuntimeErrors of PyTorch's), no memory, a process that cannot be started.
NOT_MEASURED = (ParameterError, RuntimeError, MemoryError, OSError)

# A row per round and method. Round 0 is before the first one: a row of it says why a method could not be set up.
ROUND_COLUMNS = {
    "round": "int",
    "attempt": "count",  # 2 if the round was disturbed and measured again; the last attempt counts
    "method": "str",
    "seconds": "duration",  # per pass; none where there is a reason
    "passes": "int",  # within the turn
    "cpu_seconds": "amount",  # processor time of this process during the turn, of all its threads
    "switches": "int",  # how often this process had to leave a processor to another one
    "waiting_seconds": "amount",  # in which any program, this one too, waited for a processor; none but on Linux
    "stolen_seconds": "amount",  # that the hypervisor took from this machine's processors; none but on Linux
    "reason": "str",  # why the method failed in this round; empty where it did not
}
SUMMARY_COLUMNS = ["rounds", "seconds", "low", "high", "speedup", "speedup_low", "speedup_high"]


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

    @property
    def verdict(self) -> str:
        """Of a ratio of speeds: "faster", "slower", "equal" (within EQUAL) or "open", by the interval alone."""
        if self.low >= 1 / (1 + EQUAL) and self.high <= 1 + EQUAL:
            return "equal"
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "open"


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
    return int(np.searchsorted(bdtr(np.arange(n), n, 0.5), (1 - CONFIDENCE) / 2))


def seconds_of(table: pd.DataFrame) -> pd.DataFrame:
    """Seconds per pass: a row per round, in its last attempt, and a column per method. Those that failed are left out.

    `table` has the columns ROUND_COLUMNS.
    """
    last = table[table["attempt"] == table.groupby("round")["attempt"].transform("max")]
    failed = table.loc[table["reason"] != "", "method"].unique()
    measured = last[~last["method"].isin(failed)]
    return measured.pivot(index="round", columns="method", values="seconds")


def ratio(seconds: pd.DataFrame, method: str, other: str) -> Estimate:
    """How many times as fast as `other` a method is: the estimate of other's seconds ÷ its own, round by round.

    `seconds` as `seconds_of` gives them; rounds that lack one of the two do not count.
    """
    return estimate((seconds[other] / seconds[method]).dropna().to_numpy())


def reasons_of(table: pd.DataFrame) -> dict[str, str]:
    """Why each method that failed did, by method; `table` has the columns ROUND_COLUMNS."""
    failed = table[table["reason"] != ""].drop_duplicates("method")
    return dict(zip(failed["method"], failed["reason"], strict=True))


def summary(seconds: pd.DataFrame, baseline: str | None = None) -> pd.DataFrame:
    """Each method's time, and how many times as fast as `baseline` it is, with intervals: a row per method.

    `seconds` as `seconds_of` gives them. Columns: rounds, seconds, low, high; with a baseline that was measured also
    speedup, speedup_low, speedup_high. Without one, a time is the median of the method's own. With one it is the
    baseline's median ÷ the speed-up, so what the method takes while the machine runs at its median pace: then the
    slower of two methods never shows the larger speed-up, and the baseline's time ÷ a method's is the speed-up shown.
    """
    rows, anchor = {}, None
    if baseline in seconds:
        anchor = estimate(seconds[baseline].dropna().to_numpy())
    for method in seconds:
        time = estimate(seconds[method].dropna().to_numpy())
        rows[method] = {"rounds": time.n, "seconds": time.median, "low": time.low, "high": time.high}
        if anchor:
            times = ratio(seconds, method, baseline)
            rows[method] |= {"speedup": times.median, "speedup_low": times.low, "speedup_high": times.high}
            if method != baseline:
                paced = (anchor.median / each for each in (times.median, times.high, times.low))
                rows[method] |= dict(zip(("seconds", "low", "high"), paced, strict=True))
    return pd.DataFrame.from_dict(rows, orient="index", columns=SUMMARY_COLUMNS)


def stacked(*tables: pd.DataFrame) -> pd.DataFrame:
    """Tables of the same columns below each other; an empty one has no types to keep."""
    return pd.concat([each for each in tables if len(each)] or [tables[0]], ignore_index=True)


def disturbed_rounds(table: pd.DataFrame) -> pd.Series:
    """Whether each attempt at a round was disturbed, by the system's counters: a bool per (round, attempt).

    A lone switch or a moment's wait is no disturbance: waiting and stolen time count as parts of the turns' own.
    """
    turns = table[table["reason"] == ""]
    taken = turns[["waiting_seconds", "stolen_seconds"]].fillna(0).sum(axis=1)
    wall = turns["seconds"] * turns["passes"]
    by_round = pd.DataFrame({"taken": taken, "wall": wall}).groupby([turns["round"], turns["attempt"]]).sum()
    return by_round["taken"] > DISTURBED * by_round["wall"]


def check_rounds(least: int, seconds: float, precision: float) -> None:
    """Raise ParameterError for rounds that would not bound a median."""
    if type(least) is not int or least < LEAST_ROUNDS:
        raise ParameterError(
            f"rounds: expected a whole number from {LEAST_ROUNDS}, got {least!r}: fewer do not bound a median"
        )
    for name, value in (("seconds", seconds), ("precision", precision)):
        if type(value) not in (int, float) or not 0 <= value <= MAX_SECONDS:
            raise ParameterError(f"{name}: expected a number from 0 to {MAX_SECONDS:.0e}, got {value!r:.20}")


def rounds(
    methods: Mapping[str, Callable[[], float]],
    *,
    seconds: float,
    least: int = LEAST_ROUNDS,
    precision: float = PRECISION,
    estimates: Callable[[pd.DataFrame], Sequence[Estimate]] = lambda seconds: [],
    together: Callable[[str], Hashable] = lambda method: None,
    seed: int = 0,
    title: str = "measure",
    repeat: bool = True,
    done: pd.DataFrame | None = None,
    save: Callable[[pd.DataFrame], None] = lambda table: None,
) -> pd.DataFrame:
    """Measure `methods` in rounds, each in an order drawn from `seed`: one row per round and method, `ROUND_COLUMNS`.

    A method does one pass and gives its wall time in seconds; in a turn it is called until TURN_SECONDS are full, and
    the row has the seconds per pass. Methods for which `together` gives the same take their turns one after the other.
    One that fails gets a row with the reason, and no more turns.

    At least `least` rounds are made. They go on until `seconds` (of all turns) are used, or, from round
    LEAST_ROUNDS + 1 on, each of `estimates(seconds_of(table))` is within `precision`. With `repeat` a disturbed round
    is measured again, once, if `seconds` leave time for it. After each round `save` gets all rows so far; given as
    `done` to another call, they are not measured again. Raises ParameterError for fewer rounds than LEAST_ROUNDS.
    """
    check_rounds(least, seconds, precision)
    table = pd.DataFrame(columns=list(ROUND_COLUMNS)) if done is None else done
    before = int(table["round"].max()) if len(table) else 0
    if not methods:
        return table
    with tqdm(desc=title, unit="round", total=max(least, before), initial=before, leave=False) as bar:
        for number in itertools.count(before + 1):
            if not number <= least and _ended(table, seconds, precision, estimates, bar):
                return table
            for attempt in (1, 2):
                failed = set(table.loc[table["reason"] != "", "method"])
                order = _order([name for name in methods if name not in failed], together, (seed, number, attempt))
                if not order:
                    return table
                rows = [{"round": number, "attempt": attempt, **_turn(name, methods[name])} for name in order]
                made = pd.DataFrame(rows, columns=list(ROUND_COLUMNS))
                table = stacked(table, made)
                save(table)
                left = seconds - _used(table) - _used(made) * (1 + max(0, least - number))
                if not repeat or left < 0 or not disturbed_rounds(made).any():
                    break
            bar.total = max(bar.total, number)
            bar.update()


def _used(table: pd.DataFrame) -> float:
    """Seconds of all turns."""
    return float((table["seconds"] * table["passes"]).sum())


def _ended(table: pd.DataFrame, seconds: float, precision: float, estimates: Callable, bar: tqdm) -> bool:
    """Whether no more rounds are needed after the least; the bar shows how well the ratios are known."""
    reached = [each.precision for each in estimates(seconds_of(table))]
    if reached:
        bar.set_postfix_str(f"ratios within ±{np.median(reached):.1%} (median), ±{max(reached):.1%} (all)")
    precise = table["round"].max() > LEAST_ROUNDS and reached and max(reached) <= precision
    return bool(precise) or _used(table) >= seconds


def _order(methods: list[str], together: Callable[[str], Hashable], seed: tuple) -> list[str]:
    """The methods in an order drawn from `seed`, those that belong together side by side."""
    generator, groups = random.Random(repr(seed)), {}
    for method in methods:
        groups.setdefault(together(method), []).append(method)
    shuffled = list(groups.values())
    generator.shuffle(shuffled)
    for group in shuffled:
        generator.shuffle(group)
    return list(itertools.chain.from_iterable(shuffled))


def _turn(name: str, run_pass: Callable[[], float]) -> dict:
    """One turn's row: passes until TURN_SECONDS are full, and what the system counted meanwhile."""
    total, passes, before = 0.0, 0, counters()
    try:
        while total < TURN_SECONDS:
            total, passes = total + run_pass(), passes + 1
    except NOT_MEASURED as error:
        return failure(name, error)
    spent = {key: value - before[key] for key, value in counters().items()}
    return {"method": name, "seconds": total / passes, "passes": passes, **spent, "reason": ""}


def failure(name: str, error: Exception) -> dict:
    """The row of a method that failed: the reason in one line, and not endless."""
    reason = f"not measured: {(str(error) or type(error).__name__).splitlines()[0][:200]}"
    counted = dict.fromkeys(("seconds", "cpu_seconds", "waiting_seconds", "stolen_seconds"), float("nan"))
    return {"method": name, **counted, "passes": 0, "switches": 0, "reason": reason}


def counters() -> dict[str, float]:
    """What the system has counted so far; NaN for what it does not tell."""
    return {
        "cpu_seconds": time.process_time(),
        "switches": psutil.Process().num_ctx_switches().involuntary,
        "waiting_seconds": _waiting_seconds(),
        "stolen_seconds": _stolen_seconds(),
    }


def _waiting_seconds() -> float:
    """For how long any program has waited for a processor, since the start: kernel.org, accounting/psi."""
    try:
        line = Path("/proc/pressure/cpu").read_text().splitlines()[0]  # some avg10=0.00 … total=123
        return int(line.rpartition("total=")[2]) / 1e6
    except (OSError, ValueError, IndexError):
        return float("nan")


def _stolen_seconds() -> float:
    """Processor time that the hypervisor gave to others, per processor: man proc_stat."""
    try:
        fields = Path("/proc/stat").read_text().split(maxsplit=10)
        return int(fields[8]) / os.sysconf("SC_CLK_TCK") / (os.cpu_count() or 1)
    except (OSError, ValueError, IndexError):
        return float("nan")
