"""Opposite measurements must give opposite sentences."""

from itertools import product

import pandas as pd
import pytest

from transformnet_lib import findings
from transformnet_lib.timing import Setting, summarise

SIZES = (16, 64, 256)


def table(seconds_of, *, sequential=1.0, batched=0.1, devices=("cpu",), workers=None) -> pd.DataFrame:
    """A benchmark over 1,024 images (no drop_last remainder); `seconds_of(batch_size, shuffle, drop_last)`."""
    raw = {Setting("sequential", "cpu", 1): [sequential] * 3}
    raw |= {Setting("batched", "cpu", size): [batched] * 3 for size in SIZES}
    for device, size, shuffle, drop_last in product(devices, SIZES, (True, False), (True, False)):
        seconds = seconds_of(size, shuffle, drop_last)
        raw[Setting("reference", device, size, shuffle, drop_last)] = [seconds * f for f in (0.99, 1.0, 1.01)]
    for count, seconds in (workers or {}).items():
        raw[Setting("reference", "cpu", 256, num_workers=count)] = [seconds * f for f in (0.99, 1.0, 1.01)]
    return summarise(raw, mses={}, reasons={}, count=1024)


def test_the_fastest_setting_is_named_with_its_spread_and_both_baselines():
    text = findings.fastest(table(lambda size, shuffle, _: 16 / size + 0.001 * shuffle), "cpu")
    assert "fastest median is that of batch size 256, in order" in text
    assert "62.5 ms [62.2 ms, 62.8 ms]" in text
    assert "16× as fast as the pipeline run image by image" in text
    assert "and 1.6× as fast as the same pipeline run in batches" in text


def test_a_model_slower_than_the_batched_pipeline_is_called_so():
    assert "but takes 2× the time of the same pipeline run in batches" in findings.fastest(table(lambda *_: 0.2), "cpu")


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
    first, second = findings.wins_from(table(lambda size, *_: seconds[size]), "cpu").split(", and it ")
    assert one_by_one in first
    assert in_batches in second


def test_the_slowest_loader_setting_decides_who_wins():
    assert "does not beat the pipeline run image by image" in findings.wins_from(
        table(lambda size, shuffle, _: 2.0 if shuffle else 0.01), "cpu"
    )


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.5, "costs time"), (1.0, "makes no clear difference"), (0.5, "saves time")]
)
def test_whether_shuffle_matters_beyond_the_spread(factor, verdict):
    measured = table(lambda size, shuffle, _: factor if shuffle else 1.0)
    assert f"`shuffle` {verdict}: the time per image with it is {factor:.2f} times" in findings.effect_of(
        measured, "cpu", "shuffle"
    )
    assert "`drop_last` makes no clear difference" in findings.effect_of(measured, "cpu", "drop_last")


@pytest.mark.parametrize(
    ("workers", "verdict"),
    [
        ({1: 2.0, 2: 3.0}, "does not help, as the paper remarks"),
        ({1: 0.5, 2: 3.0}, "helps, against the paper's remark"),
        ({1: 1.0, 2: 1.0}, "makes no clear difference"),
    ],
)
def test_whether_workers_help(workers, verdict):
    assert verdict in findings.workers_effect(table(lambda *_: 1.0, workers=workers), "cpu")


def test_an_effect_of_nothing_measured_is_not_judged():
    rows = table(lambda *_: 1.0)
    rows.loc[rows["drop_last"], "reason"] = "not measured: why"
    assert "could not be judged" in findings.effect_of(rows, "cpu", "drop_last")


def test_workers_that_were_not_measured_are_said_to_be_so():
    assert "were not both measured" in findings.workers_effect(table(lambda *_: 1.0), "cpu")


def test_table1_has_the_papers_48_rows_beside_the_measured_ones(run):
    shown = findings.table1([run])
    assert len(shown) == 48
    published = findings.paper.table1()
    on_cpu = published["device"] == "cpu"  # which was measured, and so comes first
    assert shown["Paper (s)"].tolist() == [
        f"{seconds:.4f}" for rows in (published[on_cpu], published[~on_cpu]) for seconds in rows["seconds"]
    ]
    measured = shown[shown["Here (s)"] != "–"]
    assert set(measured["Batch"]) == {16, 64}  # not 256, which only the sweep of num_workers has
    assert set(measured["Device"]) == {"cpu"}
    assert len(measured) == 8


def test_rows_without_a_time_fold_into_one_sentence(run):
    assert findings.not_measured([run]) == (
        "8 settings on cuda in run `small` have no time (not measured: no CUDA device)."
    )


def test_weights_are_judged_by_their_distance(run, tmp_path, train_set):
    from transformnet_lib import Run, TrainConfig, train

    assert "to rounding" in findings.weights_distance(run) or "close to" in findings.weights_distance(run)
    far, dead = Run(tmp_path / "far"), Run(tmp_path / "dead")
    train(train_set, TrainConfig(device="cpu"), run=far)
    train(train_set, TrainConfig(device="cpu", seed=3), run=dead)
    assert "`far` are not the ground truth's" in findings.weights_distance(far)
    assert "`dead` is a dead start" in findings.weights_distance(dead)
    assert "does not replace the pipeline" not in findings.answer([far, dead])  # not compared, so not judged
