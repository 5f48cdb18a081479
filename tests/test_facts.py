"""What follows from measurements: opposite ones must give opposite facts."""

import json
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from conftest import altered
from handtimed import REASON, SECONDS, SIZES, SWEEP, WIDE, benchmark

from transformnet_lib import Pipeline, Run, TrainConfig, paper
from transformnet_lib.benchmarking import KNOWN, Measurements
from transformnet_lib.facts import Report, as_json, report_facts
from transformnet_lib.facts.claims import Claim, Finding
from transformnet_lib.facts.speed import Method, Place


@pytest.fixture
def timed(run) -> Callable[..., Run]:
    """Answers a function that gives the run as if its benchmark had taken the times that `benchmark` is given."""
    return lambda **options: altered(run, benchmark={"measured": benchmark(**options)})


@pytest.fixture
def place(timed) -> Callable[..., Place]:
    """The same for the first device of that run."""
    return lambda **options: report_facts([timed(**options)]).places[0]


def method(where: Place, name: str) -> Method:
    return next(each for each in where.methods if each.name == name)


# The fastest setting, and from which batch size on


def test_the_fastest_setting_is_measured_again_and_compared_within_rounds(place):
    found = method(place(reference=lambda s: 16 / s.batch_size + 0.001 * s.shuffle), "reference")
    assert (found.best.batch_size, found.best.shuffle, found.best.drop_last) == (256, False, True)
    best = found.best.seconds
    assert (best.median, best.low, best.high) == pytest.approx((0.0625, 0.0625, 0.0625))  # at the pipeline's pace
    assert found.swept.seconds.median == pytest.approx(0.0625) and found.swept.name == found.best.name
    assert [(ratio.median, ratio.low, ratio.high) for ratio in found.over.values()] == [
        pytest.approx([16] * 3), pytest.approx([1.6] * 3)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "verdict"), [(0.05, "faster"), (0.2, "slower"), (0.101, "equal"), (0.1 * WIDE, "open")]
)
def test_every_comparison_has_the_verdict_of_its_interval(place, seconds, verdict):
    where = place(reference=seconds, fast=None)  # the pipeline takes 0.1 s in batches
    (found,) = where.methods
    assert found.over["batched"].verdict == found.one_thread["batched"].verdict == verdict
    assert where.no_gain is (verdict in ("slower", "equal"))


def test_the_fastest_of_the_sweep_may_be_slower_when_it_is_measured_again(place):
    best = {"batch_size": 64, "shuffle": True, "drop_last": True}

    def seconds(s):
        return (0.1 if s.part == "sweep" else 0.19) if best.items() <= vars(s).items() else 0.2

    found = method(place(reference=lambda s: seconds(s) * WIDE), "reference")
    assert (found.swept.seconds.median, found.best.seconds.median) == pytest.approx((0.1, 0.19))
    assert found.as_fast == 11  # as its own rounds show, not as the sweep made believe


def test_one_thread_has_rounds_of_its_own(place):
    found = method(place(fast=lambda s: 0.2 if s.part == "one thread" else 0.02), "fast")
    assert (found.over["sequential"].median, found.one_thread["sequential"].median) == pytest.approx((50, 5))


@pytest.mark.parametrize(("others", "count"), [(0.21 * WIDE, 11), (0.202, 11), (0.9, 0)])
def test_settings_of_the_sweep_not_slower_beyond_doubt_are_counted(place, others, count):
    best = {"batch_size": 64, "shuffle": True, "drop_last": True}
    where = place(
        small=(8,),
        reference=lambda s: 0.2 if best.items() <= vars(s).items() else 0.001 if s.part == "small" else others,
    )
    found = method(where, "reference")
    assert (found.as_fast, found.settings, found.best.batch_size) == (count, 12, 64)


@pytest.mark.parametrize(
    ("seconds", "one_by_one", "in_batches"),
    [({8: 0.01, 16: 0.01, 64: 0.01, 256: 0.01}, 8, 8), ({8: 9, 16: 2.0, 64: 0.5, 256: 0.05}, 64, 256),
     ({8: 9, 16: 2.0, 64: 3.0, 256: 4.0}, None, None), ({8: 9, 16: 0.5, 64: 3.0, 256: 4.0}, [16], None),
     ({8: 0.1, 16: 0.1, 64: 0.095 * WIDE, 256: 0.05}, 8, 256)],
)  # fmt: skip
def test_from_which_batch_size_the_model_wins(place, seconds, one_by_one, in_batches):
    where = place(small=(8,), reference=lambda s: seconds[s.batch_size], parts=SWEEP)
    for won, expected in zip(method(where, "reference").wins, (one_by_one, in_batches), strict=True):
        assert won.from_size == (None if isinstance(expected, list) else expected)
        assert won.always is (expected == 8) and won.never is (expected is None)
        assert not isinstance(expected, list) or won.sizes == expected


@pytest.mark.parametrize("slow", [True, False])
def test_the_slowest_shuffle_decides_who_wins(place, slow):
    where = place(fast=lambda s: 2.0 if s.shuffle is slow and s.batch_size == 256 else 0.01, parts=SWEEP)
    assert method(where, "fast").wins[0].sizes == [16, 64]


def test_the_fast_method_is_compared_with_the_papers_over_all_settings(place):
    fast = {16: 0.1, 64: 0.05, 256: 0.02}
    narrow, wide = (
        place(fast=lambda s, noise=noise: fast[s.batch_size] * noise, parts=SWEEP).fast_over_reference
        for noise in (1, WIDE)
    )
    assert (narrow.median, narrow.low, narrow.high) == pytest.approx((4, 4, 4))
    assert (wide.low, wide.high) == pytest.approx((4 / 1.15, 4 / 0.85))
    assert place(fast=None, parts=SWEEP).fast_over_reference is None


def test_the_pipelines_own_times_are_those_beside_the_best_settings_for_as_many_images(place, timed):
    where = place(batched=lambda s: 0.05 if s.part == "best" else 0.02, sequential=lambda s: 1 + (s.part == "best"))
    assert (where.sequential.seconds.median, where.batched.seconds.median) == pytest.approx((2, 0.05))
    assert (where.sequential.images, where.sequential.milliseconds.median) == (1024, pytest.approx(2000))
    assert where.batched_over_sequential.median == pytest.approx(40)
    where = place(batched=0.05, parts=SWEEP)
    assert (where.sequential.seconds.median, where.batched.seconds.median) == pytest.approx((1, 0.05))
    assert place(batched=REASON).batched is None and place(batched=REASON).batched_over_sequential is None


@pytest.mark.parametrize(
    ("fast", "images"), [(0.02, [5, 52]), (0.2, [6, None]), (2.0, [None, None]), (0.1 * WIDE, [5, None])]
)
def test_after_how_many_images_the_set_up_is_paid_back(place, fast, images):
    found = place(fast=fast).paid_back
    assert [back.images for back in found] == images
    assert [back.verdict == "faster" for back in found] == [count is not None for count in images]


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "equal"), (0.5, "faster"), (2.0, "slower"), (WIDE, "open")]
)  # fmt: skip
def test_whether_the_speed_is_one_of_the_weights(place, factor, verdict):
    where = place(others=(KNOWN, "a|b"), fast=lambda s: 0.02 * (factor if s.weights == KNOWN else 1))
    assert where.known.ratio.verdict == verdict
    assert [(each.name, each.known) for each in where.others] == [(KNOWN, True), ("a|b", False)]
    assert where.others[1].ratio.verdict == "equal"
    assert place(others=()).others == place(fast=REASON).others == [] and place(others=()).known is None


# Shuffle, drop_last, workers


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.5, "slower"), (1.0, "equal"), (0.5, "faster"), (WIDE, "open")]
)  # fmt: skip
def test_whether_shuffle_and_drop_last_matter(place, factor, verdict):
    for name in ("shuffle", "drop_last"):
        where = place(reference=lambda s, name=name: 0.2 * (factor if getattr(s, name) else 1), fast=None, parts=SWEEP)
        found = {effect.name: effect.ratio for effect in where.effects}
        assert found.pop(name).verdict == verdict
        assert [ratio.verdict for ratio in found.values()] == ["equal"]


def test_an_effect_is_the_median_over_the_pairs_for_each_method(place):
    def reference(setting):
        return 0.4 if setting.shuffle and setting.batch_size == 16 else 0.2

    where = place(reference=reference, fast=lambda s: 0.03 if s.shuffle else 0.01, parts=SWEEP)
    found = {(effect.method, effect.name): effect.ratio.median for effect in where.effects}
    assert (found["reference", "shuffle"], found["fast", "shuffle"]) == pytest.approx((1, 1 / 3))
    where = place(reference=lambda s: REASON if s.drop_last else 0.2, fast=None, parts=SWEEP)
    assert [effect.name for effect in where.effects] == ["shuffle"]


@pytest.mark.parametrize(
    ("one", "two", "verdict", "claim"),
    [(2.0, 3.0, "slower", "holds"), (1.0, 3.0, "slower", "holds"), (0.5, 3.0, "faster", "does not hold"),
     (1, 1.01, "equal", "does not hold"), (WIDE, 2, "open", "not clear here")],
)  # fmt: skip
def test_whether_workers_help(timed, one, two, verdict, claim):
    run = timed(workers=(0, 1, 2), reference=lambda s: 0.2 * {0: 1, 1: one, 2: two}[s.num_workers])
    report = report_facts([run])
    assert report.places[0].workers_verdict == verdict and report.claims[-1].verdict == claim
    assert report.places[0].no_workers.seconds.median == pytest.approx(0.2)


@pytest.mark.parametrize("workers", [(), (0, 1)])
def test_workers_that_were_not_measured_have_no_verdict(timed, workers):
    run = timed(workers=workers, reference=lambda s: REASON if s.part == "workers" and not s.num_workers else 0.2)
    report = report_facts([run])
    assert report.places[0].workers_verdict == "" and report.places[0].workers == []
    assert (report.claims[-1].untested, report.claims[-1].verdict) == ("no workers", "not tested here")


# Where the speed comes from


@pytest.mark.parametrize("noise", [1.0, WIDE])
def test_main_effects_are_the_factors_of_which_the_times_are_made(place, noise):
    where = place(**{name: SECONDS[name] * noise for name in SECONDS if name.startswith("folded")})
    found = {(change.factor, change.before, change.after): change.ratio for change in where.changes}
    assert {key: ratio.median for key, ratio in found.items()} == pytest.approx(
        {
            ("network", "pipeline", "eager"): 0.5, ("network", "eager", "folded"): 8.0,
            ("network", "pipeline", "folded"): 4.0, ("loader", "rows", "batches"): 1.5,
            ("storage", "float32", "uint8"): 1.25,
        }
    )  # fmt: skip
    assert [ratio.verdict for ratio in found.values()] == ["slower", *["faster"] * 4]
    folded = found["network", "eager", "folded"]
    assert (folded.low, folded.high) == pytest.approx((8 / 1.15, 8 / 0.85) if noise is WIDE else (8, 8))


def test_main_effects_are_means_over_the_other_factors_on_the_same_device_with_the_same_weights(place):
    slow = {"eager-rows-float32": lambda s: 2 * SECONDS[s.method] if s.device == "cpu" else 9.0}
    known = {"folded-batches-uint8": lambda s: 50.0 if s.weights else SECONDS[s.method]}
    where = place(devices=("cpu", "cuda"), **slow, **known)
    found = {(change.before, change.after): change.ratio.median for change in where.changes}
    assert found["rows", "batches"] == pytest.approx(1.5 * 2 ** (1 / 6))  # one of six pairs is twice as slow
    assert found["pipeline", "eager"] == pytest.approx(0.5 / 2 ** (1 / 4))
    assert found["pipeline", "folded"] == pytest.approx(4)


def test_combinations_have_the_speedups_in_their_order(place):
    where = place(devices=("cuda",), graph=0.018, pinned=0.017, fast=lambda s: 0.5 if s.weights else 0.016 * WIDE)
    found = where.combinations
    medians = [each.speedup.median for each in found]
    assert medians == sorted(medians) and len(found) == 16
    assert (found[0].step, found[0].known, found[-1].step, found[-1].known) == ("fast", True, "fast", False)
    assert medians[-1] == pytest.approx(1 / 0.016)
    rows = next(each for each in found if (each.network, each.loader, each.storage) == ("eager", "rows", "float32"))
    assert rows.speedup.median == pytest.approx(1 / 0.24)
    where = place(**{"eager-rows-uint8": REASON})  # without a cell there are no main effects
    assert where.changes == [] and len(where.combinations) == 12  # of 13, with the known weights


@pytest.mark.parametrize(("seconds", "verdict"), [(0.04, "faster"), (0.01, "equal"), (0.005, "slower")])
def test_the_convolution_is_compared_with_the_weighted_sum(place, seconds, verdict):
    step = place(convolution=seconds).step
    assert step.ratio.verdict == verdict and step.ratio.median == pytest.approx(seconds / 0.01)
    assert place(convolution=REASON).step is None


# How good the times are


def test_how_good_the_times_are(timed):
    run = timed(reference=0.2 * WIDE, fast=None, workers=(0, 1))
    (where,) = report_facts([run]).places
    assert where.precision == pytest.approx(0.153, abs=0.001)
    assert where.rounds["sweep"] == {"rounds": 9, "again": 0, "disturbed": 0}
    settings, rounds = run.benchmark.measured.settings, run.benchmark.measured.rounds
    disturbed = rounds.assign(stolen_seconds=rounds["seconds"].where(rounds["round"].isin([2, 3, 7]), 0) * 0.2)
    again = rounds[(rounds["round"] == 2) & (rounds["part"] == "sweep")].assign(attempt=2)
    measured = Measurements(settings, pd.concat([disturbed, again], ignore_index=True))
    (where,) = report_facts([altered(run, benchmark={"measured": measured})]).places
    assert where.rounds["sweep"] == {"rounds": 9, "again": 1, "disturbed": 2}
    assert where.rounds["workers"]["disturbed"] is None  # its own processes wait for each other


# Table 1


def test_table1_has_all_of_the_papers_settings_and_ours_beside(timed):
    run = timed(reference=0.25 * WIDE, fast=lambda s: REASON if s.shuffle else 0.05, parts=SWEEP)
    (table,) = report_facts([run]).table1
    assert len(table.rows) == 48 and [row.device for row in table.rows[:24]] == ["cpu"] * 24  # what was measured first
    published = paper.table1().query("device == 'cpu'")
    assert [row.paper_milliseconds / 1000 for row in table.rows[:24]] == pytest.approx(published["seconds"].tolist())
    assert {row.batch_size for row in table.rows if row.reference} == set(SIZES)
    shuffled, *_, ordered = [row for row in table.rows[:24] if row.batch_size == 64]
    assert (shuffled.fast, shuffled.ratio, shuffled.images) == (None, None, 1024)
    assert (ordered.fast.speedup.median, ordered.ratio.median) == pytest.approx((20, 5))
    assert [(block.device, block.shuffle, block.drop_last) for block in table.blocks[:2]] == [
        ("cpu", True, True), ("cpu", True, False)
    ]  # fmt: skip
    assert table.blocks[0].best == {"paper": 512, "reference": 16, "fast": None}
    assert table.blocks[7].best["reference"] is None  # not measured on CUDA
    assert ordered.reference.milliseconds.low == pytest.approx(212.5)  # of its own noise


def test_devices_of_different_kinds_share_a_table1_and_others_do_not(timed):
    other = altered(timed(devices=("cuda:2",), parts=SWEEP), label="other")
    report = report_facts([timed(devices=("cpu", "cuda:1"), parts=SWEEP), other])
    a, b, c = report.places
    assert [table.places for table in report.table1] == [[a, b], [c]]
    assert sum(row.reference is not None for row in report.table1[1].rows) == 12
    assert list(report.table1[0].missing) == ["small"]


def test_settings_without_a_time_are_counted_by_device_and_reason(timed):
    def seconds(setting):
        if setting.shuffle and setting.device == "cpu":
            return "not measured: a" if setting.drop_last else "not measured: b (MSE 1)"
        return REASON if setting.device == "cuda" else 0.02

    run = timed(devices=("cpu", "cuda"), reference=seconds, fast=seconds, parts=SWEEP)
    report = report_facts([run, altered(run, label="other", benchmark=None)])
    assert [(each.device, each.settings, each.reason) for each in report.missing["small"]] == [
        ("cpu", 3, "not measured: a"), ("cpu", 3, "not measured: b"), ("cuda", 12, REASON)
    ]  # fmt: skip
    assert report.missing["other"] == []


def test_without_any_time_there_is_no_place_and_a_whole_table1(timed):
    report = report_facts([timed(**dict.fromkeys(SECONDS, REASON))])
    assert report.places == [] and report.quickest is None and len(report.table1[0].rows) == 48


# The paper's claims


def verdicts(runs) -> dict[str, str]:
    return {claim.name: claim.verdict for claim in report_facts(runs).claims}


def at_256(seconds):
    """At batch size 256, where drop_last fails, and 0.5 s elsewhere."""
    return lambda s: 0.5 if s.batch_size < 256 else REASON if s.drop_last else seconds


def on_cuda(seconds):
    return lambda s: 0.5 if s.device == "cpu" else seconds


@pytest.mark.parametrize(
    ("name", "seconds", "verdict"),
    [
        ("sequential", 0.2, "holds"), ("sequential", lambda s: 32 / s.batch_size, "does not hold"),
        ("sequential", 1.01, "does not hold"), ("sequential", lambda s: WIDE if s.shuffle else 0.2, "not clear here"),
        ("batches", at_256(0.1), "holds"), ("batches", at_256(0.9), "does not hold"),
        ("batches", at_256(0.5), "does not hold"), ("batches", at_256(0.5 * WIDE), "not clear here"),
        ("cuda", on_cuda(0.1), "holds"), ("cuda", on_cuda(0.9), "does not hold"),
        ("cuda", on_cuda(0.5 * WIDE), "not clear here"), ("cuda", on_cuda(REASON), "not tested here"),
    ],
)  # fmt: skip
def test_opposite_times_give_opposite_verdicts_on_a_claim(timed, name, seconds, verdict):
    devices = ("cpu", "cuda") if name == "cuda" else ("cpu",)
    assert verdicts([timed(devices=devices, reference=seconds, parts=["sweep", "best"])])[name] == verdict


def test_a_claim_has_the_numbers_on_which_it_rests(timed):
    run = timed(reference=lambda s: 32 / s.batch_size, devices=("cpu", "cuda"))
    claims = {claim.name: claim for claim in report_facts([run]).claims}
    (found,) = claims["sequential"].findings[:1]
    assert found.numbers["counts"] == {"faster": 8, "slower": 4}
    assert (found.numbers["least"], found.numbers["most"]) == pytest.approx((0.5, 8))
    assert claims["batches"].findings[0].numbers["ratio"].median == pytest.approx(16)
    assert claims["cuda"].findings[0].numbers["same_rounds"] and claims["cuda"].untested == ""


def test_the_fastest_of_all_runs_speaks_for_a_kind_of_device(timed):
    of_label = {"a": ("cpu", 0.5), "b": ("cpu", 0.2), "c": ("cuda", 0.1), "d": ("cuda", 0.4)}
    each = {label: timed(devices=(device,), reference=seconds) for label, (device, seconds) in of_label.items()}
    claim = report_facts([altered(run, label=label) for label, run in each.items()]).claims[4]
    (found,) = claim.findings  # of different runs, each with ±3 %: the ends of their intervals
    assert (found.who, found.numbers["cpu"], found.verdict) == ("c (cuda)", "b (cpu)", "holds")
    assert not found.numbers["same_rounds"] and found.numbers["ratio"].low == pytest.approx(1.88, abs=0.01)


@pytest.fixture
def paper_run(run) -> Run:
    """The run as if it were one of the paper's recipe, on all images."""
    images = run.train.images.model_copy(
        update={"request": run.train.images.request.model_copy(update={"limit": None})}
    )
    return altered(run, label="paper", train={"config": TrainConfig(device="cpu"), "images": images})


def test_the_recipes_claims_are_judged_by_runs_of_the_recipe_alone(run, paper_run):
    changed = altered(run, label="changed", train={"config": TrainConfig(device="cpu", min_delta=0.5)})
    preset = report_facts([changed]).runs[0].preset
    assert (preset.changes, preset.limit, preset.unchanged) == ({"min_delta": 0.5}, 600, False)
    assert verdicts([run, changed])["learns"] == verdicts([run, changed])["best"] == "not tested here"
    assert verdicts([run, paper_run])["learns"] == "holds"
    far = altered(paper_run, compare={"test_mse": 0.3, "max_error": 0.9})
    assert verdicts([run, far])["learns"] == "does not hold"


@pytest.mark.parametrize(
    ("losses", "holds"),
    [([0.5, 0.4, 0.3, 0.3], "does not hold"), ([0.5, 0.6, 0.7, 0.8], "holds"), (30 * [0.5], "not tested here")],
)
def test_early_stopping_is_judged_where_it_ended_a_training(paper_run, losses, holds):
    history = pd.concat([paper_run.train.history.head(1)] * len(losses)).assign(val_mse=losses)
    run = altered(paper_run, train={"history": history, "best_epoch": 1})
    assert verdicts([run])["best"] == holds


def test_places_that_disagree_are_no_verdict_for_all():
    def claim(*found: str) -> Claim:
        return Claim("c", {}, [Finding("a", verdict, {}) for verdict in found], "")

    assert claim("holds", "does not hold").verdict == claim("holds", "not clear here").verdict == "differs"
    assert (claim("holds", "holds").verdict, claim().verdict) == ("holds", "not tested here")


# Weights


@pytest.mark.parametrize(
    ("weights", "mse", "kind", "negative"),
    [((0.2989, 0.587, 0.114), 1e-14, "rounding", []), ((0.2994, 0.587, 0.114), 1e-6, "close", []),
     ((0.31, 0.71, -0.03), 1e-4, "far", ["blue"]), ((0.31, 0.68, 0.01), 1e-4, "far", []),
     ((0.31, 0.71, -0.5), 0.08, "far", [])],
)  # fmt: skip
def test_weights_are_judged_by_their_distance(run, weights, mse, kind, negative):
    history = run.train.history.assign(val_mse=mse)
    (found,) = report_facts([altered(run, train={"weights": weights, "history": history})]).runs
    assert (found.training.error_kind, found.training.negative) == (kind, negative)


@pytest.mark.parametrize(
    ("mse", "error", "train", "kind", "claim"),
    [
        (1e-15, 1e-7, {}, "equal", "holds"), (1e-4, 0.05, {}, "close", "does not hold"),
        (0.3, 0.9, {}, "far", "does not hold"), (0.3, 0.9, {"no_gradient": True}, "no gradient", "does not hold"),
        (1e-15, 1e-7, {"least_squares": None}, "undetermined", "not clear here"),  # black images determine no weights
        (0.3, 0.9, {"least_squares": None}, "far", "does not hold"),
    ],
)  # fmt: skip
def test_the_claim_and_the_closest_run_follow_the_measured_distance(paper_run, mse, error, train, kind, claim):
    report = report_facts([altered(paper_run, compare={"test_mse": mse, "max_error": error}, train=train)])
    assert report.runs[0].comparison.distance == kind and list(report.by_distance) == [kind]
    assert report.claims[0].verdict == claim
    assert (report.closest is None) is (kind in ("undetermined", "no gradient"))
    assert report.undetermined is (kind == "undetermined") and report.recipe is report.runs[0]


def test_the_quickest_place_is_one_of_this_machine_if_there_is_one(timed):
    shipped = timed(fast=0.001).model_copy(update={"shipped": True, "label": "server"})
    assert report_facts([timed(), shipped]).quickest.run == "small"
    assert report_facts([shipped]).quickest.run == "server"
    assert report_facts([timed()]).quickest.quickest.name == "fast"


def test_the_weights_have_their_yardsticks_once(run):
    config = TrainConfig(device="cpu", epochs=1)
    other = altered(run, label="other", train={"config": config, "history": run.train.history.head(1), "best_epoch": 1})
    rows = report_facts([run, other]).weight_rows
    assert [(row.kind, row.label) for row in rows] == [
        ("truth", "small"), ("least squares", "small"), ("run", "small"), ("run", "other")
    ]  # fmt: skip
    path = report_facts([other]).runs[0].training.path
    assert path["epoch"].tolist() == [0, 1]
    assert tuple(path.loc[0, ["red", "green", "blue"]]) == run.train.initial_weights


@pytest.mark.parametrize(("epochs", "needed"), [(3, 26), (None, None)])
def test_a_training_that_ended_before_it_settled_says_what_it_needs(run, epochs, needed):
    history = {"history": run.train.history[:epochs], "best_epoch": 1}
    found = report_facts([altered(run, train=history)]).runs[0].training.unsettled
    assert (found and found.needed_epochs) == needed  # 17 steps an epoch: 21 epochs for 350 steps, and 4 + 1 to see it


def test_seeds_are_summed_up_by_preset(run):
    seeds = pd.DataFrame(
        {
            "preset": ["paper"] * 3 + ["precise"] * 3, "seed": [0, 1, 2] * 2,
            "weight_error": [0.1, 0.3, 0.9] + [1e-7] * 3,
            "val_mse": [1e-4] * 6, "best_epoch": [5, 6, 7] * 2, "seconds": [1.0] * 6,
            "no_gradient": [False, False, True] + [False] * 3,
        }
    )  # fmt: skip
    stage = run.train.model_copy(update={"table": seeds, "parameters": {"seeds": [0, 1, 2]}})
    paper_seeds, precise = report_facts([run.model_copy(update={"seeds": stage})]).runs[0].seeds
    assert (paper_seeds.no_gradient, precise.no_gradient) == (1, 0)
    assert (paper_seeds.error.median, paper_seeds.error.least, paper_seeds.error.most) == (0.3, 0.1, 0.9)
    assert paper_seeds.error_with_gradient.most == 0.3


def test_narrow_figures_show_one_run_per_preset(run):
    others = [altered(run, label=name, train={"config": TrainConfig(device="cpu")}) for name in ("first", "second")]
    for given in ([run, *others], [others[0], run, others[1]]):
        report = report_facts(given)
        assert [each.label for each in report.shown] == ["first", "small"]  # the paper's first, then precise
        assert [each.label for each in report.not_shown] == ["second"]


@pytest.mark.parametrize(
    ("pipeline", "size", "papers"),
    [(Pipeline(), 32, True), (Pipeline(hflip=False), 32, False), (Pipeline(), 96, False)],
)
def test_whether_the_geometry_is_the_papers(run, pipeline, size, papers):
    images = run.train.images.model_copy(update={"size": (size, size)})
    assert report_facts([altered(run, train={"pipeline": pipeline, "images": images})]).papers_geometry is papers


# report.json


def test_facts_are_json_with_their_verdicts_and_no_nan(timed):
    report = report_facts([timed(small=(8,), workers=(0, 1), sequential=REASON)])
    found = json.loads(json.dumps(as_json(report), allow_nan=False))
    assert found["format"] == 3 and found["runs"][0]["training"]["weights"]
    (where,) = [*found["places"], None][:1]
    assert where is None or where["methods"][0]["over"]["batched"].keys() >= {"median", "low", "verdict", "precision"}
    assert found["claims"][0].keys() == {"name", "paper", "findings", "untested", "verdict"}
    assert as_json(np.float64("nan")) is None and as_json({1: (True, np.int64(3))}) == {"1": [True, 3]}
    assert isinstance(report, Report)
