"""What rounds show: simulated noise whose truth is known, and hand-written clocks."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from transformnet_lib import measure as m
from transformnet_lib.errors import ParameterError
from transformnet_lib.measure import Estimate, estimate, ratio, rounds, verdict

TRIALS = 2000


def times(generator: np.random.Generator, count: int, *, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of two equal methods, `(TRIALS, count)` each: a drift of both, noise, and one wild round in ten."""
    drift = np.linspace(1, 1.5, count)
    both = []
    for _ in range(2):
        wild = generator.random((TRIALS, count)) < 0.05  # of each; so one round in ten has one
        slowed = np.where(wild, generator.uniform(1.5, 4, (TRIALS, count)), 1)
        both.append(drift * generator.lognormal(0, noise, (TRIALS, count)) * slowed)
    return both[0], both[1]


@pytest.mark.parametrize("count", [9, 10, 20, 30])
def test_an_interval_holds_the_true_ratio_and_equal_methods_are_rarely_called_different(count):
    mine, other = times(np.random.default_rng(count), count)
    found = [estimate(each) for each in other / mine]
    assert np.mean([each.low <= 1 <= each.high for each in found]) >= 0.94
    assert np.mean([verdict(each) in ("faster", "slower") for each in found]) <= 0.06


@pytest.mark.parametrize("noise", [0.02, 0.03, 0.05, 0.1])
def test_stopping_once_the_interval_is_narrow_keeps_both(noise):
    mine, other = times(np.random.default_rng(0), 30, noise=noise)
    found = []
    for each in other / mine:
        stops = (n for n in range(m.LEAST_ROUNDS + 1, 31) if n == 30 or estimate(each[:n]).precision <= m.PRECISION)
        found.append(estimate(each[: next(stops)]))
    assert np.mean([each.low <= 1 <= each.high for each in found]) >= 0.94
    assert np.mean([verdict(each) in ("faster", "slower") for each in found]) <= 0.06


def test_the_interval_is_that_of_the_order_alone():
    values = [5.0, 1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 1000.0]
    assert estimate(values) == Estimate(5.0, 2.0, 9.0, 9)
    assert 1 - 2 * binom.cdf(1, 9, 0.5) == pytest.approx(0.961, abs=1e-3)
    for n in range(9, 60):
        low = int(estimate(list(range(n))).low)  # its rank, from 0
        assert 1 - 2 * binom.cdf(low, n, 0.5) >= m.CONFIDENCE > 1 - 2 * binom.cdf(low + 1, n, 0.5)


def test_fewer_than_nine_rounds_are_refused_with_the_reason():
    with pytest.raises(ParameterError, match="expected at least 9 rounds, got 8: fewer do not bound a median"):
        estimate([1.0] * 8)
    with pytest.raises(ParameterError, match="rounds: expected a whole number from 9, got 5"):
        rounds({}, compared=[], seconds=1, least=5)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(1.1, 1.3, "faster"), (0.5, 0.9, "slower"), (0.9, 1.1, "open"), (0.98, 1.02, "equal"), (1.01, 1.02, "equal"),
     (1.01, 1.2, "faster"), (1.0, 1.2, "open"), (0.8, 1.0, "open")],
)  # fmt: skip
def test_the_interval_alone_decides(low, high, expected):
    assert verdict(Estimate(1.0, low, high, 9)) == expected


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the methods move: gives a function that makes one, whose passes take these seconds in turn."""
    now = [0.0]
    monkeypatch.setattr(m.time, "perf_counter", lambda: now[0])

    def method(*seconds: float):
        calls = iter(range(10**9))

        def run_pass() -> float:
            taken = seconds[next(calls) % len(seconds)]
            now[0] += taken
            return taken

        return run_pass

    return method


def test_a_ratio_is_that_within_rounds_whatever_drifts(clock):
    drift = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    methods = {"slow": clock(*(2 * each for each in drift)), "fast": clock(*drift)}
    table = rounds(methods, compared=[("fast", "slow")], seconds=0)
    assert list(table.columns) == list(m.ROUND_COLUMNS) and len(table) == 18
    assert ratio(table, "fast", "slow") == Estimate(2.0, 2.0, 2.0, 9)
    assert ratio(table, "slow", "fast").median == 0.5


def test_each_round_has_another_order_that_the_seed_draws(clock):
    methods = {name: clock(1.0) for name in "abcd"}
    orders = [rounds(methods, compared=[], seconds=0, seed=seed)["method"].tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    of_round = [tuple(orders[0][i : i + 4]) for i in range(0, 36, 4)]
    assert len(set(of_round)) > 4 and all(sorted(each) == list("abcd") for each in of_round)


def test_short_passes_are_repeated_within_a_turn(clock):
    table = rounds({"short": clock(0.002, 0.004), "long": clock(0.5)}, compared=[], seconds=0)
    by_method = table.groupby("method")
    assert by_method["passes"].unique().map(list).to_dict() == {"long": [1], "short": [4]}
    assert by_method["seconds"].first().to_dict() == {"long": 0.5, "short": 0.003}


def test_rounds_go_on_until_the_ratios_are_known_or_the_time_is_used(clock):
    noisy = [1.0, 1.5, 0.8, 1.2, 0.9, 1.4, 0.7, 1.1, 1.3, 0.6]

    def made(seconds: float, *of: float) -> int:
        return rounds({"a": clock(*of), "b": clock(1.0)}, compared=[("a", "b")], seconds=seconds)["round"].max()

    assert made(1000, 1.0) == 10  # known at once, from the round on that may stop
    assert made(60, *noisy) == 30  # two seconds a round
    assert made(5, *noisy) == 9  # the least


def test_rounds_that_lack_a_method_do_not_count():
    rows = [
        {"round": i, "method": name, "seconds": 1.0 + (name == "b"), "passes": 1} for i in range(10) for name in "ab"
    ]
    assert ratio(pd.DataFrame(rows[1:]), "a", "b") == Estimate(2.0, 2.0, 2.0, 9)
