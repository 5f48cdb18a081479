"""Opposite measurements must give opposite sentences."""

import re
from itertools import product
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import altered

from transformnet_lib import Pipeline, Run, TrainConfig, paper
from transformnet_lib.findings import abstract, learning, numbers, places, provenance, speed, studies, table1
from transformnet_lib.findings.claims import Claim, claims, claims_table
from transformnet_lib.findings.places import Place
from transformnet_lib.findings.text import code, code_block, escape
from transformnet_lib.timing import BENCHMARK_COLUMNS, Setting, summarise

SIZES = (16, 64, 256)
BASE = 1.0  # seconds of the pipeline image by image


def table(seconds_of, *, batched=0.1, devices=("cpu",), workers=None, spread=0.01, fast=None, steps=None, copy=None):
    """A benchmark over 1,024 images (no drop_last remainder); `seconds_of(batch_size, shuffle, drop_last)`.

    `fast` is like `seconds_of`, of the fast path; `steps` has the seconds of folded; both are left out unless given.
    """
    rows = []

    def add(setting: Setting, seconds: float) -> None:
        raw = [seconds * factor for factor in (1 - spread, 1, 1 + spread)]
        rows.append(summarise(setting, raw, count=1024, sequential_seconds_per_image=BASE / 1024, load_average=0.5))

    add(Setting("sequential", "cpu", 1), BASE)
    for size in SIZES:
        add(Setting("batched", "cpu", size), batched)
    for device in devices:
        if copy:
            add(Setting("copy", device, 1), copy)
        for method, of_method in (("reference", seconds_of), ("fast", fast)):
            for size, shuffle, drop_last in product(SIZES, (True, False), (True, False)) if of_method else ():
                add(Setting(method, device, size, shuffle, drop_last), of_method(size, shuffle, drop_last))
        if steps:
            add(Setting("folded", device, 256), steps)
    for count, seconds in (workers or {}).items():
        add(Setting("reference", "cpu", 256, num_workers=count), seconds)
    return pd.DataFrame(rows).reindex(columns=list(BENCHMARK_COLUMNS))


def place(seconds_of, **options) -> Place:
    """The CPU on which `table(seconds_of, …)` was measured."""
    return at(table(seconds_of, **options))


def at(rows: pd.DataFrame, device: str = "cpu", shipped: bool = False) -> Place:
    run = SimpleNamespace(label="small", shipped=shipped)
    return Place(run, rows, device, {"cpu": "the CPU"}.get(device, device), device)


@pytest.fixture
def measured(run):
    """Answers a function that gives the run with a table in place of its benchmark's."""
    return lambda rows: altered(run, benchmark={"table": rows})


# The fastest setting, and from which batch size on


def test_the_fastest_setting_is_named_with_its_spread_and_both_baselines():
    text = speed.fastest(place(lambda size, shuffle, _: 16 / size + 0.001 * shuffle), "reference")
    assert "On the CPU, the model run the paper's way is fastest with batch size 256, in order" in text
    assert "62.5 ms [62.2, 62.8]" in text
    assert "16× as fast as the pipeline run image by image" in text
    assert "and 1.6× as fast as the same pipeline run in batches" in text


def test_a_model_slower_than_the_batched_pipeline_is_called_so():
    assert "and slower (2× the time) than the same pipeline run in batches" in speed.fastest(
        place(lambda *_: 0.2), "reference"
    )


def with_a_small_size(*methods: str, seconds: float = 0.001) -> pd.DataFrame:
    """A table with rows of batch size 8, outside the sweep, that are the fastest an image."""
    rows = table(lambda *_: 0.2, batched=0.1)
    raw = [seconds] * 5
    small = [
        summarise(Setting(method, "cpu", 8), raw, count=1024, sequential_seconds_per_image=BASE / 1024)
        for method in methods
    ]
    return pd.concat([rows, pd.DataFrame(small)], ignore_index=True).reindex(columns=list(BENCHMARK_COLUMNS))


def test_both_rivals_are_at_their_fastest_of_the_same_batch_sizes():
    rows = with_a_small_size("batched", "reference")
    batched, best = at(rows).baseline("batched"), at(rows).best("reference")
    assert (batched["batch_size"], batched["images"]) == (best["batch_size"], best["images"]) == (16, 1024)
    assert at(rows).baseline("sequential")["images"] == 1024
    rows.loc[(rows["method"] == "batched") & (rows["batch_size"] != 8), "reason"] = "not measured: why"
    assert at(rows).baseline("batched")["batch_size"] == 8  # no other was measured


def test_the_fastest_is_said_to_be_that_of_the_sweep(measured):
    rows = with_a_small_size("reference")
    swept = "swept over batch size, shuffle and drop_last"
    text = speed.fastest(at(rows), "reference")
    assert f"is fastest with batch size 16, shuffled, drop_last, of the 12 settings {swept}: 200 ms" in text
    assert f", the best of the settings {swept}." in abstract.answer([measured(rows)])


@pytest.mark.parametrize(("others", "told"), [(0.2, "The quartiles of 11 other settings overlap"), (0.9, None)])
def test_settings_whose_spread_overlaps_the_fastest_are_counted(others, told):
    measured = place(lambda size, shuffle, drop_last: 0.2 if size == 16 and shuffle and drop_last else others)
    text = speed.fastest(measured, "reference")
    assert (told in text) if told else ("overlap" not in text)


@pytest.mark.parametrize(
    ("seconds", "one_by_one", "in_batches"),
    [
        ({16: 0.01, 64: 0.01, 256: 0.01}, "at every batch size", "at every batch size"),
        ({16: 2.0, 64: 0.5, 256: 0.05}, "from batch size 64 on", "from batch size 256 on"),
        ({16: 2.0, 64: 3.0, 256: 4.0}, "does not beat", "does not beat"),
        ({16: 0.5, 64: 3.0, 256: 4.0}, "only at batch sizes 16", "does not beat"),
    ],
)
def test_from_which_batch_size_the_model_wins(seconds, one_by_one, in_batches):
    first, second = speed.wins_from(place(lambda size, *_: seconds[size]), "reference").split(", and it ")
    assert one_by_one in first
    assert in_batches in second


def test_the_slowest_loader_setting_decides_who_wins():
    assert "does not beat the pipeline run image by image" in speed.wins_from(
        place(lambda size, shuffle, _: 2.0 if shuffle else 0.01), "reference"
    )


def test_a_win_within_the_spread_is_none():
    close = place(lambda *_: 0.099, batched=0.1, spread=0.02)
    assert "it does not beat the pipeline run in batches" in speed.wins_from(close, "reference")
    assert "beats the pipeline run in batches of the same size at every" in speed.wins_from(
        place(lambda *_: 0.09, batched=0.1, spread=0.02), "reference"
    )


def test_the_quickest_is_that_of_the_least_time_not_of_the_slowest_baseline():
    rows = table(lambda size, *_: {16: 0.3, 64: 0.2, 256: 0.1}[size])
    slow = (rows["method"] == "reference") & (rows["batch_size"] == 16)
    rows.loc[slow, "speedup"] *= 10
    assert "is fastest with batch size 256" in speed.fastest(at(rows), "reference")


def test_the_fast_way_is_compared_with_the_papers_over_all_settings():
    both = place(lambda size, *_: 0.2, fast=lambda size, *_: {16: 0.1, 64: 0.05, 256: 0.02}[size])
    assert (
        "Over 12 settings on the CPU the fast way is 4× as fast as the paper's way (median; from 2× to 10×)"
        in speed.against_reference(both)
    )
    assert speed.against_reference(place(lambda *_: 0.2)) == ""


# Shuffle, drop_last, workers


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.5, "costs time"), (1.0, "makes no clear difference"), (0.5, "saves time")]
)
def test_whether_shuffle_matters_beyond_the_spread(factor, verdict):
    shuffled = place(lambda size, shuffle, _: factor if shuffle else 1.0)
    text = speed.effects(shuffled)
    assert f"`shuffle` {verdict} (the time is {factor:.2f} times for the model run the paper's way)" in text
    assert "`drop_last` makes no clear difference" in text
    rows = speed.effects_table([shuffled]).set_index("setting")
    assert rows["verdict"].to_dict() == {"shuffle": verdict, "drop_last": "makes no clear difference"}
    assert rows.loc["shuffle", "time with ÷ without"] == f"{factor:.2f} [{factor:.2f}, {factor:.2f}]"
    assert rows.loc["shuffle", ["slower", "quicker"]].tolist() == [
        "6 of 6" if factor > 1 else "0 of 6", "6 of 6" if factor < 1 else "0 of 6"
    ]  # fmt: skip


def test_ways_that_differ_in_their_verdict_are_told_apart():
    text = speed.effects(place(lambda *_: 1.0, fast=lambda size, shuffle, _: 0.3 if shuffle else 0.1))
    assert (
        "`shuffle` makes no clear difference (the time is 1.00 times for the model run the paper's way); costs time"
        in (text)
    )


def test_a_difference_on_one_side_in_too_few_pairs_is_not_clear():
    text = speed.effects(place(lambda size, shuffle, _: 2.0 if shuffle and size == 16 else 1.0))
    assert "`shuffle` makes no clear difference" in text


def test_an_effect_of_nothing_measured_is_not_judged():
    rows = table(lambda *_: 1.0)
    rows.loc[rows["drop_last"], "reason"] = "not measured: why"
    assert "`drop_last` was not measured both with and without it" in speed.effects(at(rows))


@pytest.mark.parametrize(
    ("workers", "verdict"),
    [
        ({1: 2.0, 2: 3.0}, "makes it slower, as the paper remarks"),
        ({1: 0.5, 2: 3.0}, "helps, against the paper's remark"),
        ({1: 1.0, 2: 1.0}, "makes no clear difference"),
    ],
)
def test_whether_workers_help(workers, verdict):
    assert verdict in speed.workers_effect(place(lambda *_: 1.0, workers=workers))


def test_workers_that_were_not_measured_are_said_to_be_so():
    assert "were not both measured" in speed.workers_effect(place(lambda *_: 1.0))


def test_too_few_repeats_are_not_judged():
    rows = table(lambda size, shuffle, _: 2.0 if shuffle else 1.0, workers={1: 3.0}).assign(repeats=2)
    assert "`shuffle` cannot be judged (" in speed.effects(at(rows))
    assert "could not be judged from fewer than 3 repeats" in speed.workers_effect(at(rows))


def single(rows: pd.DataFrame, repeats: int = 1) -> pd.DataFrame:
    """The rows as if so few repeats had been made; a single one is its own quartiles."""
    alone = {"q1": rows["seconds"], "q3": rows["seconds"]} if repeats == 1 else {}
    return rows.assign(repeats=rows["repeats"].clip(upper=repeats), **alone)


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_no_way_beats_another_by_too_few_repeats(measured, repeats):
    rows = single(table(lambda *_: 0.05, fast=lambda *_: 0.02, steps=0.04, copy=0.01), repeats)
    run, few = measured(rows), repeats < 3
    (where,) = places.places([run])
    for rival in ("sequential", "batched"):
        assert (speed.against(where, "fast", rival)["verdict"] == "cannot be judged") is few
    texts = [
        *(say(where, "fast") for say in (speed.fastest, speed.wins_from)), abstract.answer([run]),
        *abstract.conclusion([run])[1:], speed.contributions(where), speed.baselines(where),
    ]  # fmt: skip
    assert ("50× as fast (too few repeats to judge) as the pipeline run image by image" in texts[0]) is few
    assert ("With fewer than 3 repeats it is not clearly fastest." in texts[0]) is few
    assert (texts[1] == (
        "On the CPU, from which batch size on the model run the fast way beats the pipeline cannot be judged from "
        "fewer than 3 repeats."
    )) is few  # fmt: skip
    for text in texts:
        assert ("too few repeats" in text or "from fewer than 3" in text or "from so few" in text) is few, text
        assert repeats > 1 or "[" not in text, text
    found = numbers.report_numbers([run])["places"]["cpu"]
    sizes = found["wins_from_batch_size"]["fast"]
    assert sizes == dict.fromkeys(("image by image", "in batches"), None if few else 16)
    assert (found["other_settings_as_fast"]["fast"] is None) is few
    assert {step["verdict"] for step in found["steps"][1:]} == ({"cannot be judged"} if few else {"faster"})


def test_steps_that_cannot_be_judged_are_said_to_be_so():
    rows = table(lambda *_: 0.2, fast=lambda *_: 0.02, steps=0.1)
    one = rows.copy()
    one.loc[one["method"] == "folded", "repeats"] = 2
    text = speed.contributions(at(one))
    assert "running the pipeline in batches speeds up: 10×" in text and "run the paper's way, slows down: 0.5×" in text
    assert "folding the model cannot be judged from so few repeats: 2× [" in text
    assert "stored as uint8, cannot be judged from so few repeats: 5× [" in text
    assert "folding the model cannot be judged from so few repeats: 2×;" in speed.contributions(at(single(rows)))


@pytest.mark.parametrize("seconds", [0.2, 0.1])
def test_what_cannot_be_judged_is_no_advice(measured, seconds):
    rows = table(lambda *_: seconds, fast=lambda *_: seconds, batched=0.1)
    for repeats in (1, 2, 3):
        text = " ".join(abstract.conclusion([measured(single(rows, repeats))]))
        assert ("Speed is no reason to use it." in text) is (repeats == 3)


def test_a_setting_with_no_time_does_not_keep_others_from_being_judged():
    rows = table(lambda *_: 0.05)
    rows.loc[(rows["method"] == "batched") & (rows["batch_size"] == 16), ["reason", "repeats"]] = [
        "not measured: why",
        0,
    ]
    assert "in batches of the same size from batch size 64 on" in speed.wins_from(at(rows), "reference")


def test_a_single_time_is_called_one(measured):
    rows = table(lambda *_: 0.25, fast=lambda *_: 0.05)
    one = at(single(rows))
    assert "250 ms for 1,024 images (a single time)." in speed.fastest(one, "reference")
    assert "in batches: each a single time over 1,024 images" in abstract.answer([measured(single(rows))])
    assert table1.table1([one]).query("`('', 'Batch')` == 64")["Reference", "ms"].tolist() == ["250"] * 4
    assert "(`small`) as single times, the model" in table1.table1_caption([one], [])
    assert "(the median and quartiles of 3 repeats)." in speed.fastest(at(rows), "reference")
    assert "(`small`) as median and quartiles, the model" in table1.table1_caption([at(rows)], [])


# Where the speed comes from


def test_the_waterfall_has_each_steps_factor():
    whole = place(lambda *_: 0.2, fast=lambda *_: 0.02, steps=0.1, copy=0.005)
    steps = speed.waterfall(whole)
    assert steps["method"].tolist() == ["sequential", *speed.CHANGES]
    assert steps["batch_size"].unique() == [256]
    assert steps["speedup"].tolist() == pytest.approx([1, 10, 5, 10, 50])
    assert steps["factor"].tolist()[1:] == pytest.approx([10, 0.5, 2, 5])
    text = speed.contributions(whole)
    assert "running the pipeline in batches speeds up: 10× [9.9, 10.1]" in text
    assert "run the paper's way, slows down: 0.5× [0.495, 0.505]" in text
    assert "Together 50×." in text and "would be 200×" in text
    same = speed.contributions(place(lambda *_: 0.1, fast=lambda *_: 0.1, steps=0.1))
    assert "folding the model makes no clear difference: 1×" in same
    assert "no work at all" not in same  # nothing was measured of the floor


def test_a_waterfall_that_lacks_a_step_is_not_drawn():
    assert speed.waterfall(place(lambda *_: 0.2)).empty
    assert speed.contributions(place(lambda *_: 0.2)) == ""


def test_noise_is_said():
    assert "None of 16 rows on the CPU is disturbed" in speed.noise(place(lambda *_: 0.2))
    assert "16 of 16 rows on the CPU are disturbed: in 16 the quartiles" in speed.noise(
        place(lambda *_: 0.2, spread=0.2)
    )


def test_a_row_of_a_slow_phase_is_marked_though_its_own_spread_is_small():
    rows = table(lambda *_: 0.2)
    rows.loc[12, "sequential_seconds_per_image"] *= 1.5
    assert places.disturbed(rows).tolist() == [i == 12 for i in range(len(rows))] and not rows["noisy"].any()
    assert "1 of 16 rows on the CPU is disturbed: 1 was measured while the pipeline itself was" in speed.noise(at(rows))


# Table 1


def test_table1_has_the_papers_settings_of_the_measured_devices_beside_the_measured_ones(run):
    (group,) = table1.table1_groups(places.places([run]))
    shown = table1.table1(group)
    published = paper.table1().query("device == 'cpu'")
    assert shown["The paper", "ms"].tolist() == [f"{1000 * seconds:.1f}" for seconds in published["seconds"]]
    for column in (("Reference", "ms"), ("Fast", "ms"), (" ", "Ratio")):
        rows = shown[shown[column] != "–"]
        assert set(rows["", "Batch"]) == {16, 64}  # not 256, which only the sweep of num_workers has
        assert set(rows["", "Device"]) == {"cpu"}
        assert len(rows) == 8


def test_table1_gives_median_quartiles_speedup_ratio_and_a_star_for_noise():
    row = (
        table1.table1([place(lambda *_: 0.25, fast=lambda *_: 0.05, spread=0.2)]).query("`('', 'Batch')` == 64").iloc[0]
    )
    assert row["Reference", "ms"] == "250 [225, 275]*"
    assert (row["Fast", "ms"], row[" ", "Ratio"]) == ("50.0 [45.0, 55.0]*", "5.0")
    assert (row["Reference", "×"], row["Fast", "×"], row[" ", "Images"]) == ("4.0", "20.0", "1,024")
    quiet = table1.table1([place(lambda *_: 0.25, fast=lambda *_: 0.05)])
    assert not quiet["Reference", "ms"].str.contains("*", regex=False).any()


def test_times_of_a_shipped_run_carry_its_mark():
    rows = table(lambda *_: 0.25, fast=lambda *_: 0.05)
    shown = table1.table1([at(rows, shipped=True)])
    measured = shown[shown["Fast", "ms"] != "–"]
    assert all(text.endswith("†") for name in ("Reference", "Fast") for text in measured[name, "ms"])
    assert not table1.table1([at(rows)])["Fast", "ms"].str.contains("†").any()


def test_devices_of_different_kinds_share_a_table1_and_others_do_not():
    a, b, c = (at(table(lambda *_: 0.2, devices=(device,)), device) for device in ("cpu", "cuda:1", "cpu"))
    groups = table1.table1_groups([a, b, c])
    assert groups == [[a, b], [c]]
    assert table1.table1(groups[0])["", "Device"].tolist() == ["cpu"] * 24 + ["cuda"] * 24
    assert table1.table1([b, a])["", "Device"].tolist() == ["cuda"] * 24 + ["cpu"] * 24
    assert (table1.table1([b])["Reference", "ms"] != "–").sum() == 12


def test_where_nothing_could_be_measured_table1_has_the_papers_column_alone(measured):
    rows = table(lambda *_: 0.2)
    rows["reason"] = "not measured: output differs from the ground truth (MSE 0.285, more than 0.01)"
    run = measured(rows)
    (group,) = table1.table1_groups(places.places([run]))
    shown = table1.table1(group)
    assert len(shown) == 48 and set(shown["Reference", "ms"]) == {"–"}
    assert "12 settings on cpu in run `small` have no time (not measured\\: output differs" in table1.table1_caption(
        group, [run]
    )


def test_where_everything_was_measured_nothing_is_said_to_be_missing(measured):
    assert table1.not_measured([measured(table(lambda *_: 0.2))]) == ""


def test_rows_without_a_time_fold_into_one_sentence_with_the_papers_times(run):
    assert table1.not_measured([run]) == (
        "8 settings on cuda in run `small` have no time (not measured\\: no CUDA device). The paper's times on cuda "
        "are 50.3 to 412.1 ms."
    )


# The paper's claims


def verdicts(runs) -> dict[str, str]:
    names = ("learns", "keeps the best", "beats image by image", "larger batches", "cuda", "workers")
    return dict(zip(names, (claim.verdict for claim in claims(runs)), strict=True))


@pytest.mark.parametrize(
    ("seconds", "holds"),
    [
        (lambda *_: 0.2, "holds"),
        (lambda size, *_: 2.0 if size == 16 else 0.2, "does not hold"),
        (lambda *_: 1.1, "does not hold"),
        (lambda size, *_: 1.0 if size == 16 else 0.2, "not clear here"),
    ],
)
def test_whether_every_setting_beats_the_pipeline_image_by_image(measured, seconds, holds):
    assert verdicts([measured(table(seconds))])["beats image by image"] == holds


@pytest.mark.parametrize(("at_256", "holds"), [(0.1, "holds"), (0.9, "does not hold"), (0.5, "not clear here")])
def test_whether_larger_batches_are_faster(measured, at_256, holds):
    run = measured(table(lambda size, *_: at_256 if size == 256 else 0.5))
    assert verdicts([run])["larger batches"] == holds


@pytest.mark.parametrize(
    ("on_cuda", "holds"), [(0.1, "holds"), (0.9, "does not hold"), (0.5, "not clear here"), (None, "not tested here")]
)
def test_whether_cuda_is_faster(measured, on_cuda, holds):
    rows = table(lambda *_: 0.5)
    if on_cuda:
        rows = pd.concat([rows, table(lambda *_: on_cuda, devices=("cuda",)).query("device == 'cuda'")])
    assert verdicts([measured(rows.reset_index(drop=True))])["cuda"] == holds


@pytest.mark.parametrize(
    ("workers", "holds"),
    [({1: 3.0}, "holds"), ({1: 0.5}, "does not hold"), ({1: 1.0}, "not clear here"), (None, "not tested here")],
)
def test_whether_workers_make_it_worse(measured, workers, holds):
    assert verdicts([measured(table(lambda *_: 1.0, workers=workers))])["workers"] == holds


@pytest.mark.parametrize(
    ("workers", "told"), [({1: 3.0}, "measured with fewer than 3 repeats"), (None, "not measured")]
)
def test_why_workers_were_not_judged_is_said(measured, workers, told):
    rows = table(lambda *_: 1.0, workers=workers).assign(repeats=2)
    shown = claims_table([measured(rows)]).set_index("The paper").loc["More num_workers give worse times"]
    assert shown.tolist() == [f"num_workers was {told}", "not tested here"]


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("cuda", [0.01, 0.9])
def test_too_few_repeats_decide_no_claim_on_speed(measured, cuda, repeats):
    rows = table(lambda size, *_: 16 / size)
    rows = pd.concat([rows, table(lambda *_: cuda, devices=("cuda",)).query("device == 'cuda'")], ignore_index=True)
    rows = single(rows, repeats)
    found = {claim.claim.split(" (")[0]: claim for claim in claims([measured(rows)])}
    judged = [found[name] for name in found if name.startswith(("In every", "Larger", "CUDA"))]
    assert [claim.verdict for claim in judged] == ["not clear here"] * 3
    here = [text for claim in judged for text in claim.here.values()]
    assert len(here) == 5 and all("(too few repeats to judge)" in text for text in here)
    assert any("[" in text for text in here) is (repeats == 2)


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
    [
        ([0.5, 0.4, 0.3, 0.3], "does not hold", "too little better"),
        ([0.5, 0.6, 0.7, 0.8], "holds", "is the lowest of all epochs"),
        (30 * [0.5], "not tested here", "ended by the limit of 30 epochs"),
    ],
)
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
        (
            0.3, 0.9, {"no_gradient": True},
            "no gradient", "No run here shows whether", "had no gradient to learn from", "does not hold",
        ),
        (
            1e-15, 1e-7, {"least_squares": None},  # black images determine no weights
            "undetermined", "No run here shows whether three trained weights",
            "does not show whether it replaces the pipeline, since its train", "not clear here",
        ),
        (
            0.3, 0.9, {"least_squares": None},
            "far", "do not replace the pipeline here", "does not replace the pipeline:", "does not hold",
        ),
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


@pytest.mark.parametrize(
    ("reference", "fast", "told"),
    [
        (0.2, 0.02, ", and on the CPU they are 50× as fast as the pipeline run image by image and 5× as fast as"),
        (
            0.2,
            0.15,
            "6.67× as fast as the pipeline run image by image and slower (1.5× the time) than the pipeline run in",
        ),
        (2.0, 1.5, ", but on the CPU they are slower (1.5× the time) than the pipeline run image by image"),
        (0.02, None, "they are 50× as fast as the pipeline run image by image and 5× as fast as"),
        (0.2, 0.1, "and neither clearly faster nor slower (1× [0.99, 1.01]) than the pipeline run in batches"),
    ],
)
def test_the_first_sentence_says_whether_the_model_is_faster(measured, reference, fast, told):
    run = measured(table(lambda *_: reference, fast=fast and (lambda *_: fast), batched=0.1))
    assert told in abstract.answer([run]).split(". ")[0]


@pytest.mark.parametrize("closer", [True, False])
def test_the_first_sentence_names_the_run_that_was_timed_where_another_is_closest(measured, closer):
    run = measured(table(lambda *_: 0.2, fast=lambda *_: 0.02))
    mse = run.compare.test_mse * (0.5 if closer else 2)
    text = abstract.answer([run, altered(run, label="other", compare={"test_mse": mse}, benchmark=None)])
    assert ("such a model, timed with the weights of `small`, is" in text.split(". ")[0]) is closer
    assert text.count("they are") == (not closer)


def test_the_answer_gives_each_ways_best_beside_both_baselines(measured):
    text = abstract.answer([measured(table(lambda *_: 0.2, fast=lambda *_: 0.02, batched=0.1))])
    assert "takes at best 20.0 ms [19.9, 20.1] folded and run in whole batches, the fast way (batch size 16)" in text
    assert "and 200 ms [199, 201] run the paper's way (batch size 16)" in text
    assert "the pipeline 1.00 s [0.99, 1.00] image by image and 100 ms [100, 100] in batches" in text


def test_the_first_sentence_prefers_this_machine_to_a_shipped_run():
    here, there = at(table(lambda *_: 0.2)), at(table(lambda *_: 0.001), shipped=True)
    assert abstract.quickest_place([here, there]) is here
    assert abstract.quickest_place([there]) is there
    assert abstract.quickest_place([]) is None


@pytest.mark.parametrize(
    ("reference", "fast", "told"),
    [
        (
            0.05,
            0.02,
            "run the paper's way, it is 2× as fast as the pipeline in batches; run the fast way, it is 5× as fast",
        ),
        (0.2, 0.02, "run the paper's way, it is slower (2× the time) than the pipeline in batches; run the fast way"),
        (0.05, 0.2, "run the fast way, it is slower (2× the time) than the pipeline in batches. The fast way is 0.25×"),
        (0.2, 0.2, "Speed is no reason to use it."),
        (0.1, 0.1, "neither clearly faster nor slower (1× [0.99, 1.01]) than the pipeline in batches"),
    ],
)
def test_the_conclusion_says_which_way_pays(measured, reference, fast, told):
    run = measured(table(lambda *_: reference, fast=lambda *_: fast, batched=0.1))
    text = " ".join(abstract.conclusion([run]))
    assert told in text
    assert ("Speed is no reason" in text) is (min(reference, fast) >= 0.1)


def test_the_conclusion_takes_the_speed_apart_and_its_factors_multiply_out(measured):
    run = measured(table(lambda *_: 0.2, fast=lambda *_: 0.01, steps=0.1, batched=0.5))
    (last,) = [point for point in abstract.conclusion([run]) if "What makes the difference" in point]
    assert "at all 2×, the model as such 2.5×, folding resize, mix and flips into two matrices 2×" in last
    steps = speed.waterfall(places.places([run])[0])
    assert steps["factor"][1:].prod() == pytest.approx(steps["speedup"].iloc[-1])


@pytest.mark.parametrize(
    ("kinds", "told"),
    [
        (
            {"a": "equal", "b": "close"},
            ["it is the pipeline.** `a`", "`b` (preset `paper`) cannot stand in for the pipeline, though"],
        ),
        (
            {"a": "equal", "b": "undetermined"},
            ["it is the pipeline.** `a`", "`b` (preset `paper`) cannot tell whether it can: the"],
        ),
        (
            {"a": "no gradient", "b": "undetermined"},
            ["It is not the pipeline here.** `a`", "`b` (preset `paper`) cannot tell"],
        ),
        ({"a": "equal"}, ["Train it well, and it is the pipeline.** `a`"]),
        (
            {"a": "far", "b": "no gradient"},
            ["It is not the pipeline here.** `a`", "visibly others", "the start had no"],
        ),
    ],
)
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


@pytest.mark.parametrize(("spread", "verdicts"), [(0.3, {"not clear here"}), (0.01, {"holds"})])
def test_disturbed_times_decide_no_claim(measured, spread, verdicts):
    rows = table(lambda size, *_: 1.6 / size, fast=lambda *_: 0.02, spread=spread)
    of_speed = claims([measured(rows)])[2:4]
    assert {claim.verdict for claim in of_speed} == verdicts
    assert all(("(most rows disturbed)" in claim.here["cpu"]) is (spread > 0.1) for claim in of_speed)


@pytest.mark.parametrize(("spread", "warned"), [(0.3, True), (0.01, False)])
@pytest.mark.parametrize("said", [abstract.answer, lambda runs: " ".join(abstract.conclusion(runs))])
def test_abstract_and_conclusion_warn_where_most_rows_were_disturbed(measured, spread, warned, said):
    text = said([measured(table(lambda *_: 0.2, fast=lambda *_: 0.02, spread=spread))])
    assert ("were disturbed by other work on this machine" in text) is warned


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
