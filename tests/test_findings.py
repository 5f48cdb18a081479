"""Opposite measurements must give opposite sentences."""

from itertools import product
from types import SimpleNamespace

import pandas as pd
import pytest

from transformnet_lib import Run, TrainConfig, paper, train
from transformnet_lib.findings import abstract, learning, speed, studies
from transformnet_lib.timing import BENCHMARK_COLUMNS, Setting, summarise
from transformnet_lib.training import load_training

SIZES = (16, 64, 256)
BASE = 1.0  # seconds of the pipeline image by image


def table(seconds_of, *, batched=0.1, devices=("cpu",), workers=None, spread=0.01, fast=None, steps=None, floor=None):
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
        if floor:
            add(Setting("floor", device, 1), floor)
        for path, of_path in (("reference", seconds_of), ("fast", fast)):
            for size, shuffle, drop_last in product(SIZES, (True, False), (True, False)) if of_path else ():
                add(Setting(path, device, size, shuffle, drop_last), of_path(size, shuffle, drop_last))
        if steps:
            add(Setting("folded", device, 256), steps)
    for count, seconds in (workers or {}).items():
        add(Setting("reference", "cpu", 256, num_workers=count), seconds)
    return pd.DataFrame(rows).reindex(columns=list(BENCHMARK_COLUMNS))


def test_the_fastest_setting_is_named_with_its_spread_and_both_baselines():
    text = speed.fastest(table(lambda size, shuffle, _: 16 / size + 0.001 * shuffle), "cpu", "reference")
    assert "On cpu, the model run the paper's way is fastest with batch size 256, in order" in text
    assert "62.5 ms [62.2 ms, 62.8 ms]" in text
    assert "16× as fast as the pipeline run image by image" in text
    assert "and 1.6× as fast as the same pipeline run in batches" in text


def test_a_model_slower_than_the_batched_pipeline_is_called_so():
    assert "but takes 2× the time of the same pipeline run in batches" in speed.fastest(
        table(lambda *_: 0.2), "cpu", "reference"
    )


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
    first, second = speed.wins_from(table(lambda size, *_: seconds[size]), "cpu", "reference").split(", and it ")
    assert one_by_one in first
    assert in_batches in second


def test_the_slowest_loader_setting_decides_who_wins():
    assert "does not beat the pipeline run image by image" in speed.wins_from(
        table(lambda size, shuffle, _: 2.0 if shuffle else 0.01), "cpu", "reference"
    )


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.5, "costs time"), (1.0, "makes no clear difference"), (0.5, "saves time")]
)
def test_whether_shuffle_matters_beyond_the_spread(factor, verdict):
    measured = table(lambda size, shuffle, _: factor if shuffle else 1.0)
    assert f"`shuffle` {verdict}: the time per image with it is {factor:.2f} times" in speed.effect_of(
        measured, "cpu", "reference", "shuffle"
    )
    assert "`drop_last` makes no clear difference" in speed.effect_of(measured, "cpu", "reference", "drop_last")


@pytest.mark.parametrize(
    ("workers", "verdict"),
    [
        ({1: 2.0, 2: 3.0}, "does not help, as the paper remarks"),
        ({1: 0.5, 2: 3.0}, "helps, against the paper's remark"),
        ({1: 1.0, 2: 1.0}, "makes no clear difference"),
    ],
)
def test_whether_workers_help(workers, verdict):
    assert verdict in speed.workers_effect(table(lambda *_: 1.0, workers=workers), "cpu")


def test_an_effect_of_nothing_measured_is_not_judged():
    rows = table(lambda *_: 1.0)
    rows.loc[rows["drop_last"], "reason"] = "not measured: why"
    assert "could not be judged" in speed.effect_of(rows, "cpu", "reference", "drop_last")


def test_workers_that_were_not_measured_are_said_to_be_so():
    assert "were not both measured" in speed.workers_effect(table(lambda *_: 1.0), "cpu")


def test_table1_has_the_papers_48_rows_beside_the_measured_ones(run):
    groups = speed.table1_groups([run])
    assert list(groups) == ["small"]
    shown = speed.table1(groups["small"])
    published = paper.table1()
    on_cpu = published["device"] == "cpu"  # which was measured, and so comes first
    assert shown["Paper (s)"].tolist() == [
        f"{seconds:.4f}" for rows in (published[on_cpu], published[~on_cpu]) for seconds in rows["seconds"]
    ]
    for column in ("Reference (s)", "Fast (s)", "Ratio"):
        measured = shown[shown[column] != "–"]
        assert set(measured["Batch"]) == {16, 64}  # not 256, which only the sweep of num_workers has
        assert set(measured["Device"]) == {"cpu"}
        assert len(measured) == 8


def test_table1_gives_median_quartiles_speedup_ratio_and_a_star_for_noise():
    shown = speed.table1(speed.swept_rows(table(lambda *_: 0.25, fast=lambda *_: 0.05, spread=0.2)))
    row = shown[(shown["Device"] == "cpu") & (shown["Batch"] == 64)].iloc[0]
    assert row["Reference (s)"] == "0.250 [0.225, 0.275]*"
    assert (row["Fast (s)"], row["Ratio"]) == ("0.0500 [0.0450, 0.0550]*", "5.0")
    assert (row["×"], row["× "]) == ("4.0", "20.0")
    quiet = speed.table1(speed.swept_rows(table(lambda *_: 0.25, fast=lambda *_: 0.05)))
    assert not quiet["Reference (s)"].str.contains("*", regex=False).any()


def test_runs_of_different_devices_share_a_table1_and_others_do_not(run, monkeypatch):
    tables = {
        "a": table(lambda *_: 0.2),
        "b": table(lambda *_: 0.2, devices=("cuda:1",)),
        "c": table(lambda *_: 0.2),
    }
    monkeypatch.setattr(speed, "load_benchmark", lambda run: tables[run.label])
    runs = [SimpleNamespace(label=label, has=lambda stage: True) for label in tables]
    groups = speed.table1_groups(runs)
    assert {label: set(rows["device"]) for label, rows in groups.items()} == {"a, b": {"cpu", "cuda"}, "c": {"cpu"}}


def test_the_waterfall_has_each_steps_factor():
    measured = table(lambda *_: 0.2, fast=lambda *_: 0.02, steps=0.1, floor=0.005)
    steps = speed.waterfall(measured, "cpu")
    assert steps["path"].tolist() == list(speed.WATERFALL)
    assert steps["batch_size"].unique() == [256]
    assert steps["speedup"].tolist() == pytest.approx([1, 10, 5, 10, 50])
    assert steps["factor"].tolist()[1:] == pytest.approx([10, 0.5, 2, 5])
    text = speed.contributions(measured, "cpu")
    assert "running the pipeline in batches speeds up: 10× [9.9, 10.1]" in text
    assert "run the paper's way, slows down: 0.5× [0.495, 0.505]" in text
    assert "Together 50×." in text and "would be 200×" in text
    same = speed.contributions(table(lambda *_: 0.1, fast=lambda *_: 0.1, steps=0.1), "cpu")
    assert "folding the model makes no clear difference: 1×" in same
    assert "no work at all" not in same  # nothing was measured of the floor


def test_a_waterfall_that_lacks_a_step_is_not_drawn():
    assert speed.waterfall(table(lambda *_: 0.2), "cpu").empty
    assert speed.contributions(table(lambda *_: 0.2), "cpu") == ""


def test_the_fast_way_is_compared_with_the_papers_over_all_settings():
    measured = table(lambda size, *_: 0.2, fast=lambda size, *_: {16: 0.1, 64: 0.05, 256: 0.02}[size])
    assert "Over the 12 settings on cpu the fast way takes between 1/10 and 1/2" in speed.against_reference(
        measured, "cpu"
    )
    assert speed.against_reference(table(lambda *_: 0.2), "cpu") == ""


def test_noise_is_said():
    assert "None of 16 rows on cpu is disturbed" in speed.noise(table(lambda *_: 0.2), "cpu")
    assert "16 of 16 rows on cpu are disturbed: in 16 the quartiles" in speed.noise(
        table(lambda *_: 0.2, spread=0.2), "cpu"
    )


def test_a_row_of_a_slow_phase_is_marked_though_its_own_spread_is_small():
    rows = table(lambda *_: 0.2)
    rows.loc[12, "sequential_seconds_per_image"] *= 1.5
    assert speed.disturbed(rows).tolist() == [i == 12 for i in range(len(rows))] and not rows["noisy"].any()
    assert "1 of 16 rows on cpu is disturbed: in 0 the quartiles" in speed.noise(rows, "cpu")


def test_the_quickest_is_that_of_the_least_time_not_of_the_slowest_baseline():
    rows = table(lambda size, *_: {16: 0.3, 64: 0.2, 256: 0.1}[size])
    slow = (rows["path"] == "reference") & (rows["batch_size"] == 16)
    rows.loc[slow, "speedup"] *= 10
    assert "is fastest with batch size 256" in speed.fastest(rows, "cpu", "reference")


def test_where_nothing_could_be_measured_table1_has_the_papers_column_alone(run, monkeypatch):
    rows = table(lambda *_: 0.2)
    rows["reason"] = "not measured: output differs from the ground truth (MSE 0.285, more than 0.01)"
    monkeypatch.setattr(speed, "load_benchmark", lambda run: rows)
    (label, measured), = speed.table1_groups([run]).items()  # fmt: skip
    shown = speed.table1(measured)
    assert len(shown) == 48 and set(shown["Reference (s)"]) == {"–"}
    assert "12 settings on cpu in run `small` have no time (not measured: output differs" in speed.table1_caption(
        [run], label
    )


def test_where_everything_was_measured_nothing_is_said_to_be_missing(run, monkeypatch):
    monkeypatch.setattr(speed, "load_benchmark", lambda run: table(lambda *_: 0.2))
    assert speed.not_measured([run]) == ""


def test_too_few_repeats_are_not_judged():
    rows = table(lambda size, shuffle, _: 2.0 if shuffle else 1.0, workers={1: 3.0}).assign(repeats=2)
    assert "could not be judged from fewer than 3 repeats" in speed.effect_of(rows, "cpu", "reference", "shuffle")
    assert "could not be judged from fewer than 3 repeats" in speed.workers_effect(rows, "cpu")


def test_a_win_within_the_spread_is_none():
    close = table(lambda *_: 0.099, batched=0.1, spread=0.02)
    assert "it does not beat the pipeline run in batches" in speed.wins_from(close, "cpu", "reference")
    assert "beats the pipeline run in batches of the same size at every" in speed.wins_from(
        table(lambda *_: 0.09, batched=0.1, spread=0.02), "cpu", "reference"
    )


def test_rows_without_a_time_fold_into_one_sentence(run):
    assert speed.not_measured([run]) == (
        "8 settings on cuda in run `small` have no time (not measured: no CUDA device)."
    )


def test_weights_are_judged_by_their_distance(run, tmp_path, train_set):
    assert "to rounding" in learning.weights_distance(run) or "close to" in learning.weights_distance(run)
    far, dead = Run(tmp_path / "far"), Run(tmp_path / "dead")
    train(train_set, TrainConfig(device="cpu"), run=far)
    train(train_set, TrainConfig(device="cpu", seed=3), run=dead)
    assert "`far` are not the ground truth's" in learning.weights_distance(far)
    assert "`dead` is a dead start" in learning.weights_distance(dead)
    assert "No run here shows" in abstract.answer([far, dead])  # not compared, so not judged
    assert abstract.closeness_of_each([far, dead]) == ""


@pytest.mark.parametrize(
    ("results", "dead", "answer", "of_the_run"),
    [
        (
            {"test_mse": 1e-15, "max_error": 1e-7},
            False,
            "replace the pipeline to within half",
            "replaces the pipeline to",
        ),
        ({"test_mse": 1e-4, "max_error": 0.05}, False, "come close to the pipeline but do not equal", "comes close to"),
        (
            {"test_mse": 0.3, "max_error": 0.9},
            False,
            "do not replace the pipeline here",
            "does not replace the pipeline:",
        ),
        ({"test_mse": 0.3, "max_error": 0.9}, True, "No run here shows whether", "had no gradient to learn from"),
    ],
)
def test_the_first_sentence_follows_the_measured_distance(run, monkeypatch, results, dead, answer, of_the_run):
    stage = run.stage_info("compare") | {"results": results}
    monkeypatch.setattr(
        Run, "stage_info", lambda self, name, f=Run.stage_info: stage if name == "compare" else f(self, name)
    )
    monkeypatch.setattr(abstract, "load_training", lambda run: SimpleNamespace(dead=dead))
    assert answer in abstract.answer([run])
    assert of_the_run in abstract.closeness_of_each([run])


def test_the_answer_gives_each_ways_best_against_both_baselines(run, monkeypatch):
    measured = table(lambda *_: 0.2, fast=lambda *_: 0.02, batched=0.1)
    monkeypatch.setattr(abstract, "load_benchmark", lambda run: measured)
    text = abstract.answer([run])
    assert "the model run the fast way takes 20 ms [19.9 ms, 20.1 ms] at best" in text
    assert "50× as fast as the pipeline run image by image and 5× as fast as the pipeline run in batches" in text
    assert "5× as fast as the pipeline run image by image and 0.5× as fast as the pipeline run in batches" in text


def test_the_weights_table_has_the_yardsticks_once(run, tmp_path, train_set):
    other = Run(tmp_path / "other")
    train(train_set, TrainConfig(device="cpu", epochs=1), run=other)
    shown = learning.weights_table([run, other])
    assert shown["Weights"].tolist() == [
        "ground truth, ITU-R BT.601", "least squares", "small (preset precise)", "other (preset paper)"
    ]  # fmt: skip
    assert shown["epoch"].tolist()[2:] == [f"{load_training(run).best_epoch} of {len(run.history())}", "1 of 1"]
    assert "condition number" in learning.optimum([run, other])
    path = learning.weight_path(other)
    assert path["epoch"].tolist() == [0, 1]
    assert tuple(path.loc[1, ["red", "green", "blue"]]) == pytest.approx(load_training(other).model.weights)


def test_seeds_are_summed_up_by_preset():
    seeds = pd.DataFrame(
        {
            "preset": ["paper"] * 3 + ["precise"] * 3, "seed": [0, 1, 2] * 2,
            "weight_error": [0.1, 0.3, 0.9] + [1e-7] * 3,
            "val_mse": [1e-4] * 6, "best_epoch": [5, 6, 7] * 2, "seconds": [1.0] * 6,
            "dead": [False, False, True] + [False] * 3,
        }
    )  # fmt: skip
    shown = studies.seeds_table(seeds).set_index("Preset")
    assert shown["dead starts"].tolist() == ["1", "0"]
    assert shown.loc["paper", "largest weight error"] == "0.3 [0.1, 0.9]"
    text = studies.seeds_text(seeds)
    assert (
        "With the preset `paper`, 1 start of 3 dead; the largest weight error of the others is between 0.1 and 0.3."
        in text
    )
    assert "With the preset `precise`, no start of 3 is dead" in text
