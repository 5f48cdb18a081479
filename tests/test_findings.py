"""Opposite measurements must give opposite sentences."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import altered

from transformnet_lib import Pipeline, Run, TrainConfig, paper
from transformnet_lib.benchmarking import KNOWN, PARTS, SETTING_COLUMNS, Measurements, Plan
from transformnet_lib.findings import abstract, learning, numbers, provenance, speed, studies, table1
from transformnet_lib.findings.claims import Claim, claims, claims_table
from transformnet_lib.findings.places import Place, machines, places
from transformnet_lib.findings.text import code, code_block, escape
from transformnet_lib.measure import LEAST_ROUNDS, ROUND_COLUMNS, failure, stacked
from transformnet_lib.methods import METHODS, NETWORKS

SIZES = (16, 64, 256)
COUNT = 1024  # images: drop_last drops none
DRIFT = np.linspace(0.96, 1.04, LEAST_ROUNDS)  # of the machine: an interval of ±3 % of every time, and of no ratio
WIDE = 1 + np.array([-4, 3, -2, 1, 0, -1, 2, -3, 4]) / 20  # a method's own noise: an interval of ±15 %
REASON = "not measured: no time"
SWEEP = ("sweep", "small")  # the parts that most tests need

NETWORK = {"pipeline": 0.08, "eager": 0.16, "folded": 0.02}
LOADER = {"rows": 1.5, "batches": 1.0}
STORAGE = {"float32": 1.0, "uint8": 0.8}
SECONDS = {
    "sequential": 1.0, "batched": 0.1, "reference": 0.2, "fast": 0.02, "copy": 0.005, "graph": 0.02, "pinned": 0.02,
    "resize": 0.05, "convolution": 0.04, "grayscale": 0.01, "flips": 0.005,
    **{
        name: NETWORK[each.network] * LOADER[each.loader] * STORAGE[each.storage]
        for name, each in METHODS.items()
        if name.startswith(NETWORKS)
    },
}  # fmt: skip


def benchmark(*, devices=("cpu",), small=(), workers=(), others=(KNOWN,), parts=PARTS, **methods) -> Measurements:
    """Nine rounds of each part, in which a pass over COUNT images takes the seconds of its method (SECONDS).

    `methods` changes these: to a number, one per round, a text (why it failed), None (it is not there), or a function
    of the setting that gives one of these. The others are `Plan`'s.
    """
    plan, made = Plan(devices, SIZES, small, workers, others, COUNT), Measurements.none()
    for part in parts:
        settings, turns = [], []
        for setting in PARTS[part](plan, made):
            seconds = (SECONDS | methods)[setting.method]
            seconds = seconds(setting) if callable(seconds) else seconds
            if seconds is None:
                continue
            settings.append(asdict(setting) | {"threads": 2, "setup_seconds": 0.004, "mse": 1e-14})
            turn = failure(setting.name, RuntimeError())
            if isinstance(seconds, str):
                turns.append(turn | {"round": 0, "reason": seconds})
                continue
            turn |= {"passes": 1, "reason": ""}
            seconds = seconds * DRIFT * setting.images / COUNT
            turns += [turn | {"round": i, "seconds": each} for i, each in enumerate(seconds, 1)]
        made = Measurements(
            stacked(made.settings, pd.DataFrame(settings, columns=list(SETTING_COLUMNS))),
            stacked(made.rounds, pd.DataFrame(turns, columns=["part", *ROUND_COLUMNS]).assign(part=part, attempt=1)),
        )
    return made


@pytest.fixture
def timed(run) -> Callable[..., Run]:
    """Answers a function that gives the run as if its benchmark had taken the times that `benchmark` is given."""
    return lambda **options: altered(run, benchmark={"measured": benchmark(**options)})


@pytest.fixture
def place(timed) -> Callable[..., Place]:
    """The same for the first device of that run."""
    return lambda **options: places([timed(**options)])[0]


# The fastest setting, and from which batch size on


def test_the_fastest_setting_is_named_with_its_interval_and_both_ratios(place):
    text = speed.fastest(place(reference=lambda s: 16 / s.batch_size + 0.001 * s.shuffle), "reference")
    assert "On the CPU, the model run the paper's way is fastest with batch size 256, in order, drop_last, of " in text
    assert "it takes 62.5 ms [60.6, 64.4] for 1,024 images (9 rounds)." in text
    assert text.endswith(
        "That is 16× [16, 16] as fast as the pipeline run image by image and 1.6× [1.6, 1.6] as fast as the pipeline "
        "run in batches of 16, on the CPU."
    )


@pytest.mark.parametrize(
    ("seconds", "verdict", "told"),  # the pipeline takes 0.1 s in batches
    [(0.05, "faster", "2× [2, 2] as fast as"), (0.2, "slower", "0.5× [0.5, 0.5] as fast as"),
     (0.101, "equal", "as fast (within ±3%: 0.99× [0.99, 0.99]) as"),
     (0.1 * WIDE, "open", "neither faster nor slower beyond doubt (1× [0.87, 1.18]) than")],
)  # fmt: skip
def test_every_comparison_says_what_the_interval_shows(timed, seconds, verdict, told):
    run = timed(reference=seconds, fast=None)
    (where,) = places([run])
    assert f"and {told} the pipeline run in batches of 16" in speed.fastest(where, "reference")
    assert f"and {told} the pipeline in batches." in speed.one_thread(where)
    first, conclusion = abstract.answer([run]).split(". ")[0], abstract.conclusion([run])[1]
    assert f", {'but' if verdict == 'slower' else 'and'} on the CPU they are " in first
    assert first.endswith(f"as fast as the pipeline run image by image and {told} the pipeline run in batches")
    assert f"it is {told} the pipeline in batches." in conclusion
    assert ("Speed is no reason to use it." in conclusion) is (verdict in ("slower", "equal"))
    found = numbers.report_numbers([run])["places"]["cpu"]["against_pipeline"]
    assert [found[part]["reference"]["in batches"]["verdict"] for part in found] == [verdict] * 2


def test_one_thread_has_rounds_of_its_own(place):
    where = place(fast=lambda s: 0.2 if s.part == "one thread" else 0.02)
    assert "50× [50, 50] as fast as the pipeline run image by image" in speed.fastest(where, "fast")
    assert "the model run the fast way is 5× [5, 5] as fast as the pipeline image by image and 0.5×" in (
        speed.one_thread(where)
    )


@pytest.mark.parametrize(("others", "told"), [(0.21 * WIDE, " 11 other"), (0.202, " 11 other"), (0.9, "")])
def test_settings_of_the_sweep_not_slower_beyond_doubt_are_counted(place, others, told):
    best = {"batch_size": 64, "shuffle": True, "drop_last": True}
    where = place(
        small=(8,),
        reference=lambda s: 0.2 if best.items() <= vars(s).items() else 0.001 if s.part == "small" else others,
    )
    told += " settings may be as fast." if told else ""
    swept = f"of the 12 settings swept over batch size, shuffle and drop_last.{told} Measured again"
    assert f"fastest with batch size 64, shuffled, drop_last, {swept}" in speed.fastest(where, "reference")


@pytest.mark.parametrize(
    ("seconds", "one_by_one", "in_batches"),
    [({8: 0.01, 16: 0.01, 64: 0.01, 256: 0.01}, "at every batch size measured, 8 included", "at every batch size"),
     ({8: 9, 16: 2.0, 64: 0.5, 256: 0.05}, "run image by image from batch size 64 on", "from batch size 256 on"),
     ({8: 9, 16: 2.0, 64: 3.0, 256: 4.0}, "does not beat", "does not beat"),
     ({8: 9, 16: 0.5, 64: 3.0, 256: 4.0}, "only at batch sizes 16", "does not beat"),
     ({8: 0.1, 16: 0.1, 64: 0.095 * WIDE, 256: 0.05}, "at every batch size", "from batch size 256 on")],
)  # fmt: skip
def test_from_which_batch_size_the_model_wins(place, seconds, one_by_one, in_batches):
    text = speed.wins_from(place(small=(8,), reference=lambda s: seconds[s.batch_size], parts=SWEEP), "reference")
    first, second = text.split(", and it ")
    assert first.startswith("With every shuffle and drop_last measured, the model run the paper's way on the CPU ")
    assert one_by_one in first and in_batches in second


@pytest.mark.parametrize("slow", [True, False])
def test_the_slowest_shuffle_decides_who_wins(place, slow):
    where = place(fast=lambda s: 2.0 if s.shuffle is slow and s.batch_size == 256 else 0.01, parts=SWEEP)
    assert "beats the pipeline run image by image only at batch sizes 16 and 64" in speed.wins_from(where, "fast")


def test_the_fast_method_is_compared_with_the_papers_over_all_settings(place):
    def text(noise) -> str:
        fast = {16: 0.1, 64: 0.05, 256: 0.02}
        return speed.against_reference(place(fast=lambda s: fast[s.batch_size] * noise, parts=SWEEP))

    assert "the fast method is 4× [4, 4] as fast as the paper's" in text(1)
    assert "the fast method is 4× [3.48, 4.71] as fast as the paper's" in text(WIDE)
    assert speed.against_reference(place(fast=None, parts=SWEEP)) == ""


def test_the_pipelines_own_times_stand_beside_the_papers(timed):
    (where,) = machines([timed(batched=0.05)])
    text = speed.baselines(where)
    assert "takes 1.00 s [0.97, 1.03] image by image for 1,024 images (the paper, on its machine: 0.7399 s" in text
    assert "and 50.0 ms [48.5, 51.5] in batches of 16, 20× [20, 20] as fast. Both run on the CPU." in text
    (where,) = machines([timed(sequential=REASON)])
    assert speed.baselines(where) == "On the machine of `small` the pipeline itself was not measured."


@pytest.mark.parametrize(
    ("fast", "told"),
    [(0.02, "after 4 images against the pipeline image by image and after 51 images against the pipeline in batches"),
     (0.2, "after 5 images against the pipeline image by image and never against the pipeline in batches"),
     (2.0, "never against the pipeline image by image and never against the pipeline in batches")],
)  # fmt: skip
def test_after_how_many_images_the_set_up_is_paid_back(place, fast, told):
    assert speed.set_up(place(fast=fast)).endswith(f"takes 4 ms once, paid back {told}.")


@pytest.mark.parametrize(
    ("factor", "told", "ratio"),
    [(1.0, "does not come from training", "as fast (within ±3%: 1× [1, 1]) as"),
     (0.5, "does not come from training", "2× [2, 2] as fast as"),
     (2.0, "depends on its weights", "0.5× [0.5, 0.5] as fast as"),
     (WIDE, "depends on its weights stays open", "neither faster nor slower beyond doubt (1× [0.87, 1.18]) than")],
)  # fmt: skip
def test_whether_the_speed_is_one_of_the_weights(place, factor, told, ratio):
    where = place(others=(KNOWN, "a|b"), fast=lambda s: 0.02 * (factor if s.weights == KNOWN else 1))
    text = speed.other_weights(where)
    head, _, rest = text.partition(": ")
    assert head.endswith(told) and head.startswith("Whether") is (factor is WIDE)
    assert rest == (
        f"with the pipeline's own, without any training, it is {ratio} with those trained; with those of `a|b` it is "
        "as fast (within ±3%: 1× [1, 1]) as with those trained."
    )
    assert speed.other_weights(place(others=())) == speed.other_weights(place(fast=REASON)) == ""


def test_whose_weights_were_timed_is_said(timed):
    run = timed()
    trained, optimum = (places([altered(run, benchmark={"origin": each})])[0] for each in ("training", "least squares"))
    mse = "their MSE on the images timed is 1.0×10⁻¹⁴."
    assert speed.accuracy(trained) == f"The weights timed are those of `small`, as they were trained: {mse}"
    assert f"`small`, of the least-squares optimum of its training images: {mse}" in speed.accuracy(optimum)


# Shuffle, drop_last, workers


@pytest.mark.parametrize(
    ("factor", "verdict", "interval"),
    [(1.5, "costs time", "1.50 {}[1.50, 1.50]"), (1.0, "makes no difference", "1.00 {}[1.00, 1.00]"),
     (0.5, "saves time", "0.50 {}[0.50, 0.50]"), (WIDE, "may or may not matter", "1.00 {}[0.85, 1.15]")],
)  # fmt: skip
def test_whether_shuffle_and_drop_last_matter(place, factor, verdict, interval):
    for name, other in (("shuffle", "drop_last"), ("drop_last", "shuffle")):
        where = place(reference=lambda s, name=name: 0.2 * (factor if getattr(s, name) else 1), fast=None, parts=SWEEP)
        text = speed.effects(where)
        of_method = f"(the time is {interval.format('times ')} for the model run the paper's way)"
        assert f"On the CPU, `{name}` {verdict} {of_method}." in text
        assert f"`{other}` makes no difference (the time is 1.00 times [1.00, 1.00] for" in text
        row = speed.effects_table([where]).set_index("setting").loc[name]
        assert row.tolist() == ["small", "cpu", "the paper's", interval.format(""), "9", verdict]


def test_an_effect_is_the_median_over_the_pairs_for_each_method(place):
    def reference(setting):
        return 0.4 if setting.shuffle and setting.batch_size == 16 else 0.2

    text = speed.effects(place(reference=reference, fast=lambda s: 0.03 if s.shuffle else 0.01, parts=SWEEP))
    assert (
        "`shuffle` makes no difference (the time is 1.00 times [1.00, 1.00] for the model run the paper's way); costs "
        "time (the time is 3.00 times [3.00, 3.00] for the model run the fast way)." in text
    )
    text = speed.effects(place(reference=lambda s: REASON if s.drop_last else 0.2, fast=None, parts=SWEEP))
    assert text.endswith("On the CPU, `drop_last` was not measured both with and without it.")


@pytest.mark.parametrize(
    ("one", "two", "told", "holds", "here"),
    [(2.0, 3.0, "raising `num_workers` makes it slower, as the paper", "holds", "raising it makes it slower"),
     (1.0, 3.0, "raising `num_workers` makes it slower, as the paper", "holds", "raising it makes it slower"),
     (0.5, 3.0, "raising `num_workers` helps, against the paper's", "does not hold", "raising it helps"),
     (1, 1.01, "raising `num_workers` makes no difference", "does not hold", "raising it makes no difference"),
     (WIDE, 2, "whether raising `num_workers` helps stays", "not clear here", "whether raising it matters is open")],
)  # fmt: skip
def test_whether_workers_help(timed, one, two, told, holds, here):
    run = timed(workers=(0, 1, 2), reference=lambda s: 0.2 * {0: 1, 1: one, 2: two}[s.num_workers])
    text = speed.workers_effect(places([run])[0])
    assert text.startswith(f"On the CPU, {told}")
    assert ": at batch size 256 a pass without any takes 200 ms [194, 206]; with 1 (" in text
    assert re.search(r"; with 1 \(.+\) it is .+ (as|than) without and with 2 \(.+\) it is .+ as without\. Start", text)
    assert (claims([run])[-1].verdict, claims([run])[-1].here) == (holds, {"cpu": here})


@pytest.mark.parametrize("workers", [(), (0, 1)])
def test_workers_that_were_not_measured_are_said_to_be_so(timed, workers):
    run = timed(workers=workers, reference=lambda s: REASON if s.part == "workers" and not s.num_workers else 0.2)
    assert "were not both measured" in speed.workers_effect(places([run])[0])
    claim = claims([run])[-1]
    assert (claim.untested, claim.verdict) == ("num_workers was not measured", "not tested here")


# Where the speed comes from


@pytest.mark.parametrize("noise", [1.0, WIDE])
def test_main_effects_are_the_factors_of_which_the_times_are_made(place, noise):
    where = place(**{name: SECONDS[name] * noise for name in SECONDS if name.startswith("folded")})
    found = where.factors().set_index(["factor", "before", "after"])
    assert found["ratio"].to_dict() == pytest.approx(
        {
            ("network", "pipeline", "eager"): 0.5, ("network", "eager", "folded"): 8.0,
            ("network", "pipeline", "folded"): 4.0, ("loader", "rows", "batches"): 1.5,
            ("storage", "float32", "uint8"): 1.25,
        }
    )  # fmt: skip
    assert found["verdict"].tolist() == ["slower", *["faster"] * 4]
    folded = found.loc[("network", "eager", "folded"), ["low", "high"]].tolist()
    assert folded == pytest.approx([8 / 1.15, 8 / 0.85] if noise is WIDE else [8, 8])
    table = speed.factors_table(where)
    assert table.iloc[0].tolist() == ["the pipeline → the model as it was trained", "0.5× [0.5, 0.5]", "slower"]
    assert table["Change"].iloc[-1] == "images stored as float32 → images stored as uint8"


def test_where_the_speed_comes_from_is_told_in_factors(timed):
    text, point = speed.contributions(places([timed()])[0]), abstract.conclusion([timed()])[2]
    assert text.startswith(
        "On the CPU, in batches of 16, in order, as a factor of speed and all else equal: the model as it was trained "
        "in place of the pipeline 0.5× [0.5, 0.5]; the folded model in place of the model as it was trained 8× [8, 8]; "
    )
    assert text.endswith(
        "Moving the same bytes once, with no work at all, takes 5.00 ms [4.85, 5.15]. The model as it was trained does "
        "the pipeline's steps, but for one: its 1×1 convolution takes 39 µs per image where the pipeline's weighted "
        "sum of three channels takes 9.8, 4× [4, 4] the time."
    )
    assert "all else equal: the model as it was trained in place of the pipeline 0.5×, the folded model in" in point


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.04, True), (0.01, False), (0.005, False), (0.01 * WIDE, False), (REASON, False)]
)
def test_the_convolution_is_the_reason_only_where_it_is_slower(place, seconds, told):
    where = place(convolution=seconds, copy=REASON)
    assert ("its 1×1 convolution takes" in speed.contributions(where)) is told
    assert "Moving the same bytes" not in speed.contributions(where)


def test_cells_have_the_speedups_in_their_order(place):
    where = place(devices=("cuda",), graph=0.018, pinned=0.017, fast=lambda s: 0.5 if s.weights else 0.016 * WIDE)
    shown, best = speed.cells(where).set_index("name"), "folded, graph, pinned, overlapped"
    assert shown["speedup"].is_monotonic_increasing and len(shown) == 16
    assert [shown.index[0], *shown.index[-2:]] == [f"{best}, known weights", "folded, batches, uint8", best]
    assert shown.loc["model, rows, float32"].tolist() == pytest.approx([1 / 0.24] * 3)
    assert shown.loc[best].tolist() == pytest.approx([1 / 0.016, 1 / 0.016 / 1.15, 1 / 0.016 / 0.85])
    where = place(**{"eager-rows-uint8": REASON})  # without a cell there are no main effects
    assert where.factors().empty and speed.factors_table(where).empty and speed.contributions(where) == ""
    assert len(speed.cells(where)) == 12  # of 13, with the known weights


# How good the times are


def test_how_good_the_times_are_is_said(timed):
    run = timed(reference=0.2 * WIDE, fast=None)
    assert "The speed-ups of the sweep are good to ±15 %." in abstract.answer([run])
    told = (
        "On the CPU the sweep took 9 rounds, and its speed-ups are good to ±15 % (half an interval, the median of the "
        "settings).{} Other programs took more than 10% of the processors' time in {} of the rounds that count, as far "
        "as the system tells."
    )
    assert speed.precision(places([run])[0]) == told.format("", "none")
    settings, rounds = run.benchmark.measured.settings, run.benchmark.measured.rounds
    disturbed = rounds.assign(stolen_seconds=rounds["seconds"].where(rounds["round"].isin([2, 3, 7]), 0) * 0.2)
    again = rounds[(rounds["round"] == 2) & (rounds["part"] == "sweep")].assign(attempt=2)
    measured = Measurements(settings, pd.concat([disturbed, again], ignore_index=True))
    (where,) = places([altered(run, benchmark={"measured": measured})])
    assert speed.precision(where) == told.format(" 1 disturbed round was measured again.", 2)


# Table 1


def test_table1_has_intervals_speedups_and_ratios_beside_the_papers_settings(place):
    shown = table1.table1([place(reference=0.25 * WIDE, fast=lambda s: REASON if s.shuffle else 0.05, parts=SWEEP)])
    published = paper.table1().query("device == 'cpu'")
    assert shown["The paper", "ms"].tolist() == [f"{1000 * seconds:.1f}" for seconds in published["seconds"]]
    batch = shown["", "Batch"]
    assert set(batch[shown["Reference", "ms"] != "–"]) == set(SIZES) and set(shown["", "Device"]) == {"cpu"}
    shuffled, *_, ordered = shown[batch == 64].drop(columns=["", "The paper"], level=0).to_numpy().tolist()
    assert shuffled == ["250 [219, 280]", "4.0", "–", "–", "–", "1,024"]
    assert ordered == ["250 [219, 280]", "4.0", "50.0 [48.5, 51.5]", "20.0", "5.0", "1,024"]


def test_times_of_a_shipped_run_carry_its_mark(timed):
    own = timed()
    shipped = own.model_copy(update={"shipped": True})
    for run, marked in ((own, False), (shipped, True)):
        shown = table1.table1(places([run]))
        times = [text for name in ("Reference", "Fast") for text in shown[name, "ms"] if text != "–"]
        assert len(times) == 24 and {text.endswith("†") for text in times} == {marked}


def test_devices_of_different_kinds_share_a_table1_and_others_do_not(timed):
    other = altered(timed(devices=("cuda:2",), parts=SWEEP), label="other")
    a, b, c = places([timed(devices=("cpu", "cuda:1"), parts=SWEEP), other])
    groups = table1.table1_groups([a, b, c])
    assert groups == [[a, b], [c]]
    assert table1.table1(groups[0])["", "Device"].tolist() == ["cpu"] * 24 + ["cuda"] * 24
    assert table1.table1([b, a])["", "Device"].tolist() == ["cuda"] * 24 + ["cpu"] * 24
    assert (table1.table1([b])["Reference", "ms"] != "–").sum() == 12
    assert "measured here (`small`) as medians" in table1.table1_caption(groups[0], [])


def test_where_nothing_could_be_measured_table1_has_the_papers_columns_alone(timed):
    run = timed(**dict.fromkeys(("reference", "fast"), "not measured: output differs (MSE 0.285, more than 0.01)"))
    assert places([run]) == []
    (group,) = table1.table1_groups([])
    shown = table1.table1(group)
    assert len(shown) == 48 and set(shown["Reference", "ms"]) == {"–"} and set(shown[" ", "Images"]) == {"–"}
    text = table1.table1_caption(group, [run])
    assert "12 settings on cpu in run `small` have no time (not measured\\: output differs)." in text
    assert text.endswith("The paper's times on cpu are 72.3 to 369.1 ms.")
    assert "no time of the model was taken. 12 settings on cpu" in abstract.answer([run])


def test_missing_times_fold_into_one_sentence_per_reason(timed):
    def seconds(setting):
        if setting.shuffle and setting.device == "cpu":
            return "not measured: a" if setting.drop_last else "not measured: b"
        return REASON if setting.device == "cuda" else 0.02

    run = timed(devices=("cpu", "cuda"), reference=seconds, fast=seconds, parts=SWEEP)
    assert table1.not_measured([run, altered(run, benchmark=None)]) == (
        "3 settings on cpu in run `small` have no time (not measured\\: a). 3 settings on cpu in run `small` have no "
        "time (not measured\\: b). 12 settings on cuda in run `small` have no time (not measured\\: no time). "
        "The paper's times on cuda are 50.3 to 412.1 ms."
    )
    assert table1.not_measured([timed(parts=SWEEP)]) == ""


# The paper's claims


def verdicts(runs) -> dict[str, str]:
    names = ("learns", "keeps the best", "beats image by image", "larger batches", "cuda", "workers")
    return dict(zip(names, (claim.verdict for claim in claims(runs)), strict=True))


def at_256(seconds):
    """At batch size 256, where drop_last fails, and 0.5 s elsewhere."""
    return lambda s: 0.5 if s.batch_size < 256 else REASON if s.drop_last else seconds


def on_cuda(seconds):
    return lambda s: 0.5 if s.device == "cpu" else seconds


@pytest.mark.parametrize(
    ("claim", "seconds", "verdict", "told"),
    [
        (2, 0.2, "holds", "5× to 5× by the medians; faster in 12 of 12 settings"),
        (2, lambda s: 32 / s.batch_size, "does not hold", "0.5× to 8× by the medians; faster in 8 and slower in 4"),
        (2, 1.01, "does not hold", "0.99× to 0.99× by the medians; equal in 12 of 12 settings"),
        (2, lambda s: WIDE if s.shuffle else 0.2, "not clear here", "faster in 6 and open in 6 of 12 settings"),
        (3, at_256(0.1), "holds", "cpu: 5× [5, 5] as fast at 256 as at 16 images"),
        (3, at_256(0.9), "does not hold", "cpu: 0.556× [0.556, 0.556] as fast at 256 as at 16 images"),
        (3, at_256(0.5), "does not hold", "cpu: 1× [1, 1] as fast at 256 as at 16 images"),
        (3, at_256(0.5 * WIDE), "not clear here", "cpu: 1× [0.87, 1.18] as fast at 256 as at 16 images"),
        (4, on_cuda(0.1), "holds", "cuda against cpu: 5× [5, 5] as fast, each at its best, within the same rounds"),
        (4, on_cuda(0.9), "does not hold", "cuda against cpu: 0.556× [0.556, 0.556] as fast, each at its best"),
        (4, on_cuda(0.5 * WIDE), "not clear here", "cuda against cpu: 1× [0.87, 1.18] as fast, each at its best"),
        (4, on_cuda(REASON), "not tested here", "not measured on CUDA"),
    ],
)  # fmt: skip
def test_opposite_times_give_opposite_verdicts_on_a_claim(timed, claim, seconds, verdict, told):
    devices = ("cpu", "cuda") if claim == 4 else ("cpu",)
    row = claims_table([timed(devices=devices, reference=seconds, parts=["sweep", "best"])]).iloc[claim]
    assert told in row["Here"] and row["Verdict"] == verdict


def test_the_fastest_of_all_runs_speaks_for_a_kind_of_device(timed):
    of_label = {"a": ("cpu", 0.5), "b": ("cpu", 0.2), "c": ("cuda", 0.1), "d": ("cuda", 0.4)}
    each = {label: timed(devices=(device,), reference=seconds) for label, (device, seconds) in of_label.items()}
    runs = [altered(run, label=label) for label, run in each.items()]
    (told,) = (claim := claims(runs)[4]).here.items()  # of different runs, each with ±3 %
    assert told == (
        "c (cuda) against b (cpu)", "2× [1.88, 2.12] as fast, each at its best, by the ends of the intervals"
    )  # fmt: skip
    assert claim.verdict == "holds"


@pytest.fixture
def paper_run(run) -> Run:
    """The run as if it were one of the paper's recipe, on all images."""
    images = run.train.images.model_copy(
        update={"request": run.train.images.request.model_copy(update={"limit": None})}
    )
    return altered(run, label="paper", train={"config": TrainConfig(device="cpu"), "images": images})


def test_the_recipes_claims_are_judged_by_runs_of_the_recipe_alone(run, paper_run):
    config = TrainConfig(device="cpu", min_delta=0.5)
    changed = altered(run, label="changed", train={"config": config})
    assert learning.changes(changed) == ["min_delta 0.5", "600 images only"]
    assert "changed: min_delta 0.5, 600 images only" in learning.preset_text(changed)
    assert verdicts([run, changed])["learns"] == verdicts([run, changed])["keeps the best"] == "not tested here"
    assert verdicts([run, paper_run])["learns"] == "holds"
    far = altered(paper_run, compare={"test_mse": 0.3, "max_error": 0.9})
    assert verdicts([run, far])["learns"] == "does not hold"


@pytest.mark.parametrize(
    ("losses", "holds", "told"),
    [([0.5, 0.4, 0.3, 0.3], "does not hold", "too little better"),
     ([0.5, 0.6, 0.7, 0.8], "holds", "is the lowest of all epochs"),
     (30 * [0.5], "not tested here", "ended by the limit of 30 epochs")],
)  # fmt: skip
def test_early_stopping_is_judged_where_it_ended_a_training(paper_run, losses, holds, told):
    history = pd.concat([paper_run.train.history.head(1)] * len(losses)).assign(val_mse=losses)
    run = altered(paper_run, train={"history": history, "best_epoch": 1})
    assert verdicts([run])["keeps the best"] == holds
    assert told in learning.stopping(run)
    if holds != "not tested here":
        shown = next(claim for claim in claims([run]) if "Early stopping" in claim.claim)
        assert list(shown.here) == ["paper"] and "restored" in shown.here["paper"]


def test_places_that_disagree_are_no_verdict_for_all():
    assert Claim("c", verdicts={"a": "holds", "b": "does not hold"}).verdict == "differs"
    assert Claim("c", verdicts={"a": "holds", "b": "not clear here"}).verdict == "differs"
    assert Claim("c", verdicts={"a": "holds", "b": "holds"}).verdict == "holds"
    assert Claim("c").verdict == "not tested here"


# Weights


def test_weights_are_judged_by_their_distance(run):
    assert "to rounding" in learning.weights_distance(run) or "close to" in learning.weights_distance(run)
    far = altered(run, label="far", train={"weights": (0.3, 0.6, 0.2)}, compare=None)
    stuck = altered(run, label="stuck", train={"no_gradient": True}, compare=None)
    assert "`far` are not the ground truth's" in learning.weights_distance(far)
    assert "`stuck` had no gradient" in learning.weights_distance(stuck)
    assert "No run here shows" in abstract.answer([far, stuck])  # not compared, so not judged
    assert abstract.closeness_of_each([far, stuck]) == ""


@pytest.mark.parametrize(
    ("weights", "mse", "told"),
    [((0.31, 0.71, -0.03), 1e-4, True), ((0.31, 0.68, 0.01), 1e-4, False), ((0.31, 0.71, -0.5), 0.08, False)],
)
def test_a_negative_weight_is_remarked_on_where_the_loss_is_small(run, weights, mse, told):
    history = run.train.history.assign(val_mse=mse)
    shown = altered(run, train={"weights": weights, "history": history})
    assert ("A negative blue is no grey" in learning.weights_distance(shown)) is told


@pytest.mark.parametrize(
    ("mse", "error", "train", "kind", "answer", "of_the_run", "claim"),
    [
        (1e-15, 1e-7, {}, "equal", "replace the pipeline to within half", "replaces the pipeline to", "holds"),
        (1e-4, 0.05, {}, "close", "come close to the pipeline but do not equal", "comes close to", "does not hold"),
        (0.3, 0.9, {}, "far", "do not replace the pipeline here", "does not replace the pipeline:", "does not hold"),
        (0.3, 0.9, {"no_gradient": True},
         "no gradient", "No run here shows whether", "had no gradient to learn from", "does not hold"),
        (1e-15, 1e-7, {"least_squares": None},  # black images determine no weights
         "undetermined", "No run here shows whether three trained weights",
         "does not show whether it replaces the pipeline, since its train", "not clear here"),
        (0.3, 0.9, {"least_squares": None},
         "far", "do not replace the pipeline here", "does not replace the pipeline:", "does not hold"),
    ],
)  # fmt: skip
def test_the_first_sentence_and_the_claim_follow_the_measured_distance(
    paper_run, mse, error, train, kind, answer, of_the_run, claim
):
    run = altered(paper_run, compare={"test_mse": mse, "max_error": error}, train=train)
    assert abstract.distance(run) == kind
    assert answer in abstract.answer([run]).split(". ")[0]
    assert of_the_run in abstract.closeness_of_each([run])
    assert verdicts([run])["learns"] == claim
    point = abstract.conclusion([run])[0]
    for text in ("these images cannot tell.** `paper`", "cannot tell whether it can: the training images are grey"):
        assert (text in point) is (kind == "undetermined")
    assert (abstract.closest_run([run]) is None) is (kind in ("undetermined", "no gradient"))
    assert ("it is the pipeline." in point) is (kind == "equal")


@pytest.mark.parametrize("closer", [True, False])
def test_the_first_sentence_names_the_run_that_was_timed_where_another_is_closest(timed, closer):
    run = timed()
    mse = run.compare.test_mse * (0.5 if closer else 2)
    text = abstract.answer([run, altered(run, label="other", compare={"test_mse": mse}, benchmark=None)])
    assert ("such a model, timed with the weights of `small`, is" in text.split(". ")[0]) is closer
    assert text.count("they are") == (not closer)


def test_the_answer_gives_each_methods_best_beside_the_pipelines(timed):
    run = timed(sequential=40.0)
    chip = escape(run.benchmark.environment.cpu)
    assert (
        f"On the CPU ({chip}, 1 thread) the model takes 19.5 [18.9, 20.1] µs per image folded and run in whole "
        "batches, the fast method (batch size 16) and 195 [189, 201] µs per image run by the paper's method (batch "
        "size 16); the pipeline, on the CPU, 39,062 [37,891, 40,234] µs per image run image by image and 97.7 [94.7, "
        "100.6] µs per image run in batches." in abstract.answer([run])
    )


def test_the_first_sentence_prefers_this_machine_to_a_shipped_run(timed):
    shipped = timed(fast=0.001).model_copy(update={"shipped": True, "label": "server"})
    here, there = places([timed(), shipped])
    assert abstract.quickest_place([here, there]) is here
    assert abstract.quickest_place([there]) is there
    assert abstract.quickest_place([]) is None


def test_the_conclusion_says_which_method_pays(timed):
    point = abstract.conclusion([timed(reference=0.2, fast=0.02)])[1]
    assert point == (
        "**The model on the CPU**: run the paper's way, it is 0.5× [0.5, 0.5] as fast as the pipeline in batches; run "
        "the fast way, it is 5× [5, 5] as fast as the pipeline in batches. The fast method is 10× [10, 10] as fast as "
        "the paper's."
    )


@pytest.mark.parametrize(
    ("kinds", "told"),
    [({"a": "equal", "b": "close"}, ["it is the pipeline.** `a`", "`b` (preset `paper`) cannot stand in for the pip"]),
     ({"a": "equal", "b": "undetermined"}, ["it is the pipeline.** `a`", "`b` (preset `paper`) cannot tell whether"]),
     ({"a": "no gradient", "b": "undetermined"}, ["It is not the pipeline here.** `a`", "`paper`) cannot tell whet"]),
     ({"a": "equal"}, ["Train it well, and it is the pipeline.** `a`"]),
     ({"a": "far", "b": "no gradient"}, ["It is not the pipeline here.** `a`", "visibly others", "the start had no"])],
)  # fmt: skip
def test_the_conclusion_says_which_runs_can_stand_in(monkeypatch, kinds, told):
    runs = [SimpleNamespace(label=label, compare=True, benchmark=None) for label in kinds]
    monkeypatch.setattr(abstract, "distance", lambda run: kinds[run.label])
    monkeypatch.setattr(abstract, "preset_text", lambda run: "`paper`")
    point = abstract.conclusion(runs)[0]
    assert all(text in point for text in told)
    assert ("look alike" in point) is ("close" in kinds.values())


def test_the_weights_table_has_the_yardsticks_once(run):
    config = TrainConfig(device="cpu", epochs=1)
    other = altered(run, label="other", train={"config": config, "history": run.train.history.head(1), "best_epoch": 1})
    shown = learning.weights_table([run, other])
    assert shown["Weights"].tolist() == [
        "ground truth, ITU-R BT.601", "least squares", "small (preset precise)", "other (preset paper)"
    ]  # fmt: skip
    assert shown["epoch"].tolist()[2:] == [f"{run.train.best_epoch} of {len(run.train.history)}", "1 of 1"]
    assert "condition number" in learning.optimum([run, other])
    path = learning.weight_path(other)
    assert path["epoch"].tolist() == [0, 1]
    assert tuple(path.loc[0, ["red", "green", "blue"]]) == run.train.initial_weights


# The study


def test_seeds_are_summed_up_by_preset():
    seeds = pd.DataFrame(
        {
            "preset": ["paper"] * 3 + ["precise"] * 3, "seed": [0, 1, 2] * 2,
            "weight_error": [0.1, 0.3, 0.9] + [1e-7] * 3,
            "val_mse": [1e-4] * 6, "best_epoch": [5, 6, 7] * 2, "seconds": [1.0] * 6,
            "no_gradient": [False, False, True] + [False] * 3,
        }
    )  # fmt: skip
    shown = studies.seeds_table(seeds).set_index("Preset")
    assert shown["no gradient"].tolist() == ["1", "0"]
    assert shown.loc["paper", "largest weight error"] == "0.3 [0.1, 0.9]"
    text = studies.seeds_text(seeds)
    assert (
        "`paper`, 1 start of 3 has no gradient (the clamp is flat there); the largest "
        "weight error of the others is between 0.1 and 0.3." in text
    )
    assert "With the preset `precise`, every start of 3 has a gradient" in text


# Which runs a figure shows


def test_figures_show_one_run_a_preset_and_say_which_they_leave_out(run):
    others = [altered(run, label=name, train={"config": TrainConfig(device="cpu")}) for name in ("first", "second")]
    for given in ([run, *others], [others[0], run, others[1]]):
        shown = learning.shown_beside(given)
        assert [each.label for each in shown] == ["first", "small"]  # the paper's first, then precise
        assert "Of `second` there is no room here" in learning.left_out(given, shown)
    assert learning.left_out([run], [run]) == ""


def on(run: Run, **facts: str) -> dict:
    """The environment of the run's training with other facts."""
    return {"environment": run.train.environment.model_copy(update=facts)}


def test_runs_of_several_machines_are_not_said_to_be_of_one_device(run):
    a, b = (altered(run, label=name.lower(), train=on(run, device_name=name)) for name in ("A", "B"))
    assert "one device, cpu (A)" in learning.devices_shown([a, a])
    assert learning.devices_shown([a, b]) == "`a` on cpu (A); `b` on cpu (B)."


# Another geometry


@pytest.mark.parametrize(
    ("pipeline", "size", "told", "flip"),
    [
        (Pipeline(), 32, "measured anew", "**Flip** horizontally and vertically."),
        (Pipeline(hflip=False), 32, "but for the geometry: here images of 32×32", "**Flip** vertically."),
        (Pipeline((64, 64), False, False), 96, "but for the geometry: here images of 96×96", None),
    ],
)
def test_a_geometry_that_is_not_the_papers_is_said(run, pipeline, size, told, flip):
    images = run.train.images.model_copy(update={"size": (size, size)})
    assert told in abstract.subject([altered(run, train={"pipeline": pipeline, "images": images})])
    steps = learning.model_steps(pipeline)
    assert (flip in steps) if flip else ("Flip" not in steps)
    assert f"to {pipeline.size[0]}×{pipeline.size[1]} pixels" in steps


@pytest.mark.parametrize(("epochs", "told"), [(3, True), (None, False)])
def test_a_training_that_ended_before_it_settled_says_so_and_what_to_do(run, epochs, told):
    text = learning.weights_distance(altered(run, train={"history": run.train.history[:epochs], "best_epoch": 1}))
    assert ("ended before it had settled" in text) is told
    assert ("`--epochs 26`" in text) is told  # 17 steps an epoch: 21 epochs for 350 steps, and 4 + 1 to see it


def test_one_recorded_machine_a_stage_is_told_apart(run):
    text = provenance.first_page([altered(run, benchmark=on(run, cpu="POWER9"))])
    assert re.search(r"\*\*Machine:\*\* .*\(`small`: train, compare\); POWER9, .*\(`small`: benchmark\)", text)


def test_a_block_of_code_keeps_its_spaces_and_no_controls():
    assert code_block("a 'b  c' \\\n  \u05d0\x1b") == "```sh\na 'b  c' \\\n  \u05d0\ufffd\n```"


@pytest.mark.parametrize("shown", [code, escape])
def test_what_a_run_says_turns_no_text_around_it(shown):
    assert shown("a\u202eb\x1b") == shown("a\ufffdb\ufffd")
    assert "\u2068\u05d0 3\u2069" in shown("\u05d0 3")  # Hebrew is isolated
    assert "\u2068" not in shown("caf\u00e9 3")


# What is incomplete, and what is hostile


def sentences(runs: list[Run]) -> list[str]:
    """All that a report says of a benchmark; its tables are made too."""
    found = [abstract.answer(runs), *abstract.conclusion(runs), *map(speed.baselines, machines(runs))]
    for group in table1.table1_groups(places(runs)):
        table1.table1(group)
        found.append(table1.table1_caption(group, runs))
    for place in places(runs):
        speed.factors_table(place)
        found += [say(place) for say in (speed.accuracy, speed.against_reference, speed.one_thread, speed.set_up)]
        found += [say(place) for say in (speed.other_weights, speed.effects, speed.workers_effect, speed.precision)]
        found += [say(place, method) for say in (speed.fastest, speed.wins_from) for method in place.methods]
        found += [speed.contributions(place), *speed.cells(place).astype(str).agg(" ".join, axis=1)]
    return found + [" ".join(row) for row in claims_table(runs).itertuples(index=False)]


def failing_in(part: str, *methods: str) -> dict:
    return {name: lambda s, name=name: REASON if s.part == part else SECONDS[name] for name in methods}


@pytest.mark.parametrize(
    "options",
    [
        {"parts": ["best", "one thread"]}, {"parts": ["sweep", "workers"]}, {"parts": ["sweep", "small", "best"]},
        *({method: REASON} for method in ("sequential", "batched", "reference", "fast", "resize")),
        *(failing_in(part, "sequential", "batched", "grayscale") for part in ("small", "best", "factors")),
        failing_in("best", "reference", "fast", "copy"),
        dict.fromkeys(SECONDS, REASON),
    ],
)  # fmt: skip
def test_whatever_is_missing_the_rest_is_told_and_is_json(timed, options):
    runs = [timed(small=(8,), workers=(0, 1), **options)]
    for text in sentences(runs):
        assert not re.search(r"\bnan\b|\bNone\b|\binf\b| [.,;]|\(\)|  ", text), text
    found = json.loads(json.dumps(numbers.report_numbers(runs), allow_nan=False))
    assert ("no time of the model was taken" in found["answer"]) is (places(runs) == [])
    assert found["places"].keys() == {place.title for place in places(runs)}
    assert len(found["runs"]["small"]["benchmark"]) == len(runs[0].benchmark.table)


HOSTILE = "<script>|`*$x$\u202e"


def test_hostile_texts_stay_escaped(run):
    environment = run.benchmark.environment.model_copy(update={"cpu": HOSTILE})
    measured = benchmark(others=(HOSTILE,), reference=lambda s: f"not measured: {HOSTILE}" if s.shuffle else 0.2)
    hostile = altered(run, label=HOSTILE, benchmark={"measured": measured, "environment": environment})
    shown = (code(HOSTILE), escape(HOSTILE))
    texts = sentences([hostile])
    assert sum(any(each in text for each in shown) for text in texts) == 6
    for each in shown:
        texts = [text.replace(each, "") for text in texts]
    assert not re.search(r"<|script|\$x|\u202e", "".join(texts))
