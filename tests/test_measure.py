"""What rounds show: simulated noise whose truth is known, and hand-written clocks."""

import itertools
import math
import os
import sys

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from transformnet_lib import measure as m
from transformnet_lib.errors import ParameterError
from transformnet_lib.measure import Estimate, estimate, ratio, rounds, seconds_of

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
    tables = (pd.DataFrame({"mine": m, "other": o}) for m, o in zip(mine, other, strict=True))
    found = [ratio(table, "mine", "other") for table in tables]
    assert np.mean([each.low <= 1 <= each.high for each in found]) >= 0.94
    assert np.mean([each.verdict in ("faster", "slower") for each in found]) <= 0.06


@pytest.mark.parametrize("noise", [0.02, 0.03, 0.05, 0.1])
def test_stopping_once_the_interval_is_narrow_keeps_both(noise):
    mine, other = times(np.random.default_rng(0), 30, noise=noise)
    found = []
    for each in other / mine:
        stops = (n for n in range(m.LEAST_ROUNDS + 1, 31) if n == 30 or estimate(each[:n]).precision <= m.PRECISION)
        found.append(estimate(each[: next(stops)]))
    assert np.mean([each.low <= 1 <= each.high for each in found]) >= 0.94
    assert np.mean([each.verdict in ("faster", "slower") for each in found]) <= 0.06
    for trial in range(20):  # `rounds` itself stops there too
        methods = {"mine": iter(mine[trial]).__next__, "other": iter(other[trial]).__next__}
        limit = float(mine[trial].sum() + other[trial].sum()) - 1e-9  # seconds: used up by the 30th round
        asked = {"seconds": limit, "estimates": lambda seconds: [ratio(seconds, "mine", "other")], "repeat": False}
        assert ratio(seconds_of(rounds(methods, **asked)), "mine", "other") == found[trial]


def test_the_interval_is_that_of_the_order_alone():
    values = [5.0, 1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 1000.0]
    assert estimate(values) == Estimate(5.0, 2.0, 9.0, 9)
    assert 1 - 2 * binom.cdf(1, 9, 0.5) == pytest.approx(0.961, abs=1e-3)
    assert estimate(list(range(10))) == Estimate(4.5, 1, 8, 10)
    assert estimate(list(range(17))) == Estimate(8, 3, 13, 17)  # the fifth would do for 95 %
    assert Estimate(2.0, 1.5, 2.7, 9).precision == pytest.approx(0.3)
    for n in range(9, 60):
        low = int(estimate(list(range(n))).low)  # its rank, from 0
        assert 1 - 2 * binom.cdf(low, n, 0.5) >= m.CONFIDENCE > 1 - 2 * binom.cdf(low + 1, n, 0.5)


def test_fewer_than_nine_rounds_are_refused_with_the_reason():
    with pytest.raises(ParameterError, match="expected at least 9 rounds, got 8: fewer do not bound a median"):
        estimate([1.0] * 8)
    with pytest.raises(ParameterError, match="rounds: expected a whole number from 9, got 5"):
        rounds({}, seconds=1, least=5)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(1.1, 1.3, "faster"), (0.5, 0.9, "slower"), (0.9, 1.1, "open"), (0.98, 1.02, "equal"), (1.01, 1.02, "equal"),
     (1.01, 1.2, "faster"), (1.0, 1.2, "open"), (0.8, 1.0, "open"), (0.971, 1.03, "equal"), (0.97, 1.03, "open"),
     (0.971, 1.031, "open")],
)  # fmt: skip
def test_the_interval_alone_decides(low, high, expected):
    assert Estimate(1.0, low, high, 9).verdict == expected


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
    table = rounds(methods, seconds=0)
    assert list(table.columns) == list(m.ROUND_COLUMNS) and len(table) == 18
    assert ratio(seconds_of(table), "fast", "slow") == Estimate(2.0, 2.0, 2.0, 9)
    assert ratio(seconds_of(table), "slow", "fast").median == 0.5
    found = m.summary(seconds_of(table), "slow")
    assert found.loc["fast"].tolist() == [9, 5.0, 5.0, 5.0, 2.0, 2.0, 2.0]  # at the pace of the slow one's median
    assert found.loc["slow"].tolist() == [9, 10.0, 4.0, 16.0, 1.0, 1.0, 1.0]
    assert m.summary(seconds_of(table)).loc["fast", ["seconds", "low", "high"]].tolist() == [5.0, 2.0, 8.0]
    assert m.summary(seconds_of(table))["speedup"].isna().all()


def test_the_slower_of_two_methods_never_shows_the_larger_speed_up():
    generator = np.random.default_rng(3)
    for count in (9, 10, 13):
        table = pd.DataFrame(generator.lognormal(0, 0.5, (count, 12)), columns=list("abcdefghijkl"))
        found = m.summary(table, "a").drop("a")
        assert ratio(table, "b", "a").n == count
        assert found.sort_values("seconds")["speedup"].is_monotonic_decreasing
        assert (found["low"] <= found["seconds"]).all() and (found["seconds"] <= found["high"]).all()
        np.testing.assert_allclose(table["a"].median() / found["seconds"], found["speedup"])


def test_each_round_has_another_order_that_the_seed_draws(clock):
    methods = {name: clock(1.0) for name in "abcd"}
    orders = [rounds(methods, seconds=0, seed=seed)["method"].tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    of_round = [tuple(orders[0][i : i + 4]) for i in range(0, 36, 4)]
    assert len(set(of_round)) > 4 and all(sorted(each) == list("abcd") for each in of_round)


def test_what_belongs_together_takes_its_turns_side_by_side_in_random_order(clock):
    methods = {f"{kind}{i}": clock(1.0) for kind in "ab" for i in range(3)}
    order = rounds(methods, seconds=0, together=lambda name: name[0])["method"].tolist()
    of_round = [order[i : i + 6] for i in range(0, 54, 6)]
    assert all(len({name[0] for name in each[:3]}) == 1 for each in of_round)
    assert {each[0][0] for each in of_round} == {"a", "b"} and len(set(map(tuple, of_round))) > 4


def test_short_passes_are_repeated_within_a_turn(clock):
    table = rounds({"short": clock(0.002, 0.004), "long": clock(0.5)}, seconds=0)
    by_method = table.groupby("method")
    assert by_method["passes"].unique().map(list).to_dict() == {"long": [1], "short": [4]}
    assert by_method["seconds"].first().to_dict() == {"long": 0.5, "short": 0.003}


def test_rounds_go_on_until_the_ratios_are_known_or_the_time_is_used(clock):
    noisy = [1.0, 1.5, 0.8, 1.2, 0.9, 1.4, 0.7, 1.1, 1.3, 0.6]

    def made(seconds: float, *of: float, **options) -> int:
        methods = {"a": clock(*of), "b": clock(1.0)}
        asked = {"estimates": lambda seconds: [ratio(seconds, "a", "b")]} | options
        return rounds(methods, seconds=seconds, **asked)["round"].max()

    assert made(1000, 1.0) == 10  # known at once, from the round on that may stop
    assert made(60, *noisy) == 30  # two seconds a round
    assert made(5, *noisy) == 9  # the least
    assert made(5, *noisy, least=12) == 12
    both = {"estimates": lambda seconds: [ratio(seconds, "b", "b"), ratio(seconds, "a", "b")]}
    assert made(60, *noisy, **both) == 30  # until all are
    assert made(100, 1.0, precision=0.0) == 10 and made(30, *noisy, precision=0.9) == 10
    assert made(30, 1.0, estimates=lambda seconds: []) == 15  # nothing asked for: the time


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"seconds": -1}, "seconds: expected a number from 0 to 1e\\+09, got -1"),
     ({"seconds": "5"}, "seconds: expected a number from 0 to 1e\\+09, got '5'"),
     ({"seconds": 10**400}, "seconds: expected a number from 0 to 1e\\+09, got 1000"),
     ({"seconds": 1, "precision": math.nan}, "precision: expected a number from 0 to 1e\\+09, got nan")],
)  # fmt: skip
def test_limits_that_are_none_are_refused(wrong, message):
    with pytest.raises(ParameterError, match=message):
        rounds({}, **wrong)


@pytest.mark.parametrize(
    "error", [RuntimeError("lost\nmore"), OSError("lost"), ParameterError("lost"), MemoryError("lost")]
)
def test_a_method_that_fails_in_a_round_has_a_reason_and_the_others_go_on(clock, error):
    good, calls = clock(1.0), itertools.count(1)

    def fails() -> float:
        if next(calls) == 4:
            raise error
        return good()

    table = rounds({"good": good, "bad": fails}, seconds=0)
    bad = table[table["method"] == "bad"]
    assert bad["round"].tolist() == [1, 2, 3, 4] and bad["reason"].tolist() == ["", "", "", "not measured: lost"]
    assert m.reasons_of(table) == {"bad": "not measured: lost"} and list(seconds_of(table)) == ["good"]
    assert len(seconds_of(table)) == 9


def test_an_error_of_the_program_itself_is_no_reason(clock):
    with pytest.raises(TypeError):
        rounds({"bad": lambda: None + 1}, seconds=0)


def test_no_methods_make_no_rounds():
    assert rounds({}, seconds=0).empty


def test_rounds_that_were_stopped_are_taken_up_again(clock):
    saved = []
    whole = rounds({name: clock(1.0) for name in "abc"}, seconds=0)

    def save(table):
        saved.append(table)
        if len(saved) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rounds({name: clock(1.0) for name in "abc"}, seconds=0, save=save)
    made = rounds({name: clock(1.0) for name in "abc"}, seconds=0, done=saved[-1], save=saved.append)
    assert made["method"].tolist() == whole["method"].tolist()  # in the order of one that was not stopped
    assert [table["round"].max() for table in saved] == list(range(1, 10))
    assert len(rounds({"a": None, "b": None, "c": None}, seconds=0, done=made)) == 27  # nothing to do


# Disturbance


@pytest.fixture
def system(monkeypatch):
    """Counters that a test moves: gives a dict of what each turn adds to them."""
    adds, counted = dict.fromkeys(("cpu_seconds", "switches", "waiting_seconds", "stolen_seconds"), 0.0), {}
    turns = itertools.count()

    def counters():
        if next(turns) % 2:  # at the end of a turn
            for name, value in adds.items():
                counted[name] = counted.get(name, 0.0) + (value() if callable(value) else value)
        return {name: counted.get(name, 0.0) for name in adds}

    monkeypatch.setattr(m, "counters", counters)
    return adds


@pytest.mark.parametrize("name", ["waiting_seconds", "stolen_seconds"])
def test_a_disturbed_round_is_measured_again_once_and_the_last_attempt_counts(clock, system, name):
    waits = iter([0.0, 0.3, 0.0, 0.4, *[0.0] * 100])
    system[name] = lambda: next(waits)
    seconds = clock(*map(float, range(1, 100)))
    table = rounds({"a": seconds}, seconds=1000, estimates=lambda seconds: [], precision=0)
    attempts = table.groupby("round")["attempt"].max()
    assert attempts[attempts == 2].index.tolist() == [2]  # 0.4 s of a turn of 4 s are a tenth, not more
    assert m.disturbed_rounds(table).loc[2].tolist() == [True, False]
    assert seconds_of(table)["a"].loc[2] == 3.0


def test_a_disturbed_round_is_not_measured_again_where_time_is_short(clock, system):
    system["waiting_seconds"] = 0.5
    table = rounds({"a": clock(1.0)}, seconds=0)
    assert table["attempt"].max() == 1 and m.disturbed_rounds(table).all()
    table = rounds({"a": clock(1.0)}, seconds=11)
    assert table.groupby("round")["attempt"].max().tolist() == [2, 2, *[1] * 7]  # nine are needed, and two are left
    assert rounds({"a": clock(1.0)}, seconds=100, repeat=False)["attempt"].max() == 1


def test_short_passes_count_as_often_as_they_were_made(clock, system):
    system["waiting_seconds"] = 0.0005
    table = rounds({"a": clock(0.001)}, seconds=0.1499)
    assert table["passes"].unique().tolist() == [10] and table["round"].max() == 15
    assert not m.disturbed_rounds(table).any()  # a twentieth of ten passes, half of one


def test_what_the_system_does_not_tell_disturbs_nothing(clock, system):
    system["waiting_seconds"] = system["stolen_seconds"] = math.nan
    assert not m.disturbed_rounds(rounds({"a": clock(1.0)}, seconds=0)).any()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells them")
def test_the_system_counts(monkeypatch):
    before = m.counters()
    sum(range(3_000_000))
    after = m.counters()
    assert after["cpu_seconds"] > before["cpu_seconds"] and all(after[name] >= before[name] for name in before)
    files = {"/proc/stat": "cpu  1 2 3 4 5 6 7 800 0 0\n", "/proc/pressure/cpu": "some avg10=0.00 total=2500000\n"}
    monkeypatch.setattr(m.Path, "read_text", lambda self: files[str(self)])
    told = m.counters()
    assert told["waiting_seconds"] == 2.5
    assert told["stolen_seconds"] == 800 / os.sysconf("SC_CLK_TCK") / os.cpu_count()
    monkeypatch.setattr(m.Path, "read_text", lambda self: "nothing")
    assert math.isnan(m.counters()["waiting_seconds"]) and math.isnan(m.counters()["stolen_seconds"])


def test_rounds_that_lack_a_method_do_not_count():
    table = pd.DataFrame({"a": [1.0] * 10, "b": [math.nan, *[2.0] * 9]})
    assert ratio(table, "a", "b") == Estimate(2.0, 2.0, 2.0, 9)
