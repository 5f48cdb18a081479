import pandas as pd
import pytest
import torch

from transformnet_lib import GRAY_WEIGHTS, Run, TransformNet, benchmark, test_inference_time, timing
from transformnet_lib.errors import ParameterError, RunError
from transformnet_lib.timing import (
    BENCHMARK_COLUMNS,
    Setting,
    benchmark_run,
    load_benchmark,
    reference_pass,
    settings,
    summarise,
)

PASS = {"device": "cpu", "batch_size": 16, "shuffle": False, "drop_last": False}


@pytest.fixture
def model() -> TransformNet:
    model = TransformNet()
    with torch.no_grad():
        model.mix.weight.copy_(torch.tensor(GRAY_WEIGHTS).view(1, 3, 1, 1))
    return model


@pytest.fixture
def images():
    return torch.rand(50, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# The sweep


def test_the_sweep_is_the_papers_48_settings_and_the_workers():
    from transformnet_lib import paper

    rows = settings(["cuda", "cpu"])
    table = [(r.device, r.batch_size, r.shuffle, r.drop_last) for r in rows if r.num_workers == 0]
    published = paper.table1()
    assert table == list(published[["device", "batch_size", "shuffle", "drop_last"]].itertuples(index=False, name=None))
    assert len(table) == 48
    assert [(r.device, r.num_workers) for r in rows if r.num_workers] == [
        ("cuda", 1), ("cuda", 2), ("cpu", 1), ("cpu", 2)
    ]  # fmt: skip


# One pass


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_one_pass_gives_positive_seconds(model, images, dtype):
    images = images if dtype == "float32" else (images * 255).to(torch.uint8)
    seconds = test_inference_time(model, images=images, **PASS)
    assert isinstance(seconds, float)
    assert seconds > 0


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("drop_last", "processed"), [(True, 48), (False, 50)])
def test_the_reference_pass_runs_the_model_on_each_image_once(model, images, shuffle, drop_last, processed):
    run_pass = reference_pass(
        model,
        images=images,
        device=torch.device("cpu"),
        batch_size=16,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=0,
    )
    _, outputs = run_pass(keep=True)
    assert [len(output) for output in outputs[:3]] == [16, 16, 16]
    outputs, expected = torch.cat(outputs), model(images).detach()
    assert len(outputs) == processed == Setting("reference", "cpu", 16, shuffle, drop_last).images(50)
    where = [int((expected - output).abs().amax((1, 2, 3)).argmin()) for output in outputs]
    torch.testing.assert_close(outputs, expected[where])
    assert len(set(where)) == processed
    assert (where == sorted(where)) != shuffle


def test_a_pass_leaves_the_global_generator_alone(model, images):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    test_inference_time(model, images=images, **PASS | {"shuffle": True})
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected a whole number from 1, got 0"),
        ({"num_workers": -1}, "num_workers: expected a whole number from 0, got -1"),
        ({"path": "magic"}, "path: expected one of reference, got 'magic'"),
        ({"device": "tpu"}, "device: expected cpu"),
        ({"batch_size": 64, "drop_last": True}, "zero batches: drop_last with batch size 64 and 50 images"),
    ],
)
def test_a_setting_that_cannot_run_is_refused(model, images, wrong, message):
    with pytest.raises(ParameterError, match=message):
        test_inference_time(model, images=images, **PASS | wrong)


# Arithmetic, on times written by hand


def summary(count=1000, **changes) -> pd.DataFrame:
    raw = {
        Setting("sequential", "cpu", 1): [10.0, 12.0, 11.0],
        Setting("reference", "cpu", 300, drop_last=True): [1.0, 3.0, 2.0, 5.0, 4.0],
        Setting("reference", "cuda", 300): [],
    }
    return summarise(raw, mses={}, reasons={Setting("reference", "cuda", 300): "not measured: why"}, count=count)


def test_median_and_quartiles_are_those_of_the_repeats():
    row = summary().iloc[1]
    assert (row["q1"], row["seconds"], row["q3"], row["repeats"]) == (2.0, 3.0, 4.0, 5)
    assert row["raw_seconds"] == "1.0 3.0 2.0 5.0 4.0"


def test_speedup_compares_seconds_per_image_really_processed():
    row = summary().iloc[1]
    assert row["images"] == 900
    assert row["images_per_second"] == 300
    assert row["speedup"] == pytest.approx((11.0 / 1000) / (3.0 / 900))


def test_a_row_without_a_time_keeps_its_reason():
    row = summary().iloc[2]
    assert row["reason"] == "not measured: why"
    assert row["repeats"] == 0
    assert pd.isna(row["seconds"]) and pd.isna(row["speedup"])


# The harness


def test_every_setting_has_a_row_and_the_baselines_are_exact(model, images):
    table = benchmark(model, images, devices=["cpu"], batch_sizes=[16, 32], num_workers=[0], repeats=2)
    assert list(table.columns) == list(BENCHMARK_COLUMNS)
    assert table["path"].tolist() == ["sequential", "batched", "batched"] + ["reference"] * 9
    assert (table["mse"] < 1e-12).all()
    assert (table["reason"] == "").all()
    assert table.loc[0, "speedup"] == 1


def test_warm_up_is_not_among_the_repeats(model, images, monkeypatch):
    calls = []
    original = timing.sequential_pass
    monkeypatch.setattr(timing, "sequential_pass", lambda *a: calls.append(1) or original(*a))
    table = benchmark(model, images, devices=[], batch_sizes=[16], num_workers=[], repeats=3)
    assert len(calls) == 4
    assert len(table.loc[0, "raw_seconds"].split()) == 3


def test_repeats_take_turns(model, images, monkeypatch):
    order = []
    monkeypatch.setattr(timing, "sequential_pass", lambda *a: order.append("one by one") or 1.0)
    monkeypatch.setattr(timing, "batched_pass", lambda *a, batch_size: order.append(batch_size) or 1.0)
    benchmark(model, images, devices=[], batch_sizes=[16, 32], num_workers=[], repeats=2)
    assert order == ["one by one", 16, 32] * 3


def test_a_model_that_does_not_equal_the_pipeline_is_not_timed(images):
    model = TransformNet()
    with torch.no_grad():
        model.mix.weight.fill_(-1)  # black
    table = benchmark(model, images, devices=["cpu"], batch_sizes=[16], num_workers=[], repeats=1)
    rows = table[table["path"] == "reference"]
    assert len(rows) == 4
    assert rows["reason"].str.startswith("not measured: output differs from the ground truth (MSE 0.").all()
    assert rows["seconds"].isna().all()


def test_zero_batches_are_a_row_with_the_reason(model, images):
    table = benchmark(model, images, devices=["cpu"], batch_sizes=[64], num_workers=[], repeats=1)
    dropped = table["drop_last"] & (table["path"] == "reference")
    assert set(table.loc[dropped, "reason"]) == {
        "not measured: zero batches: drop_last with batch size 64 and 50 images"
    }
    assert (table.loc[~dropped, "reason"] == "").all()


def test_a_device_that_fails_on_the_way_leaves_the_other_rows(model, images, monkeypatch):
    calls = []

    def fail_late(*args, batch_size):
        calls.append(batch_size)
        if batch_size == 32 and len(calls) > 4:
            raise RuntimeError("out of memory\nsecond line")
        return 1.0

    monkeypatch.setattr(timing, "batched_pass", fail_late)
    table = benchmark(model, images, devices=[], batch_sizes=[16, 32], num_workers=[], repeats=3).set_index(
        "batch_size"
    )
    assert table.loc[32, "reason"] == "not measured: out of memory"
    assert pd.isna(table.loc[32, "seconds"])
    assert table.loc[16, "repeats"] == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_rows_say_that_there_is_no_device(run):
    cuda = load_benchmark(run).query("device == 'cuda'")
    assert len(cuda) == 10  # 2 batch sizes × shuffle × drop_last, and 2 numbers of workers at batch size 256
    assert set(cuda["reason"]) == {"not measured: no CUDA device"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_is_timed(model, images):
    table = benchmark(model, images, devices=["cuda"], batch_sizes=[16], num_workers=[], repeats=2)
    assert (table["reason"] == "").all()
    assert set(table["device"]) == {"cpu", "cuda"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"repeats": 0}, "repeats: expected a whole number from 1, got 0"),
        ({"batch_sizes": [16, 0]}, "batch_sizes: expected a list of whole numbers from 1"),
        ({"batch_sizes": []}, "batch_sizes: expected at least one"),
        ({"batch_sizes": 16}, "batch_sizes: expected a list of whole numbers from 1, got 16"),
        ({"num_workers": [-1]}, "num_workers: expected a list of whole numbers from 0"),
        ({"devices": ["tpu"]}, "device: expected cpu, cuda, cuda:N, mps or auto, got 'tpu'"),
    ],
)
def test_parameters_out_of_range_are_refused(model, images, wrong, message):
    with pytest.raises(ParameterError, match=message):
        benchmark(model, images, **{"devices": [], "batch_sizes": [16], "num_workers": []} | wrong)


# The stage


def test_the_stage_is_read_back_in_full_precision(run):
    table = load_benchmark(run)
    for _, row in table[table["reason"] == ""].iterrows():
        assert row["seconds"] == pytest.approx(sum(map(float, row["raw_seconds"].split())) / 2, rel=1e-12)  # 2 repeats


def test_a_complete_benchmark_is_only_read(run, test_set, monkeypatch):
    monkeypatch.setattr(timing, "benchmark", None)
    table = benchmark_run(run, test_set, devices=["cpu", "cuda"], batch_sizes=[16, 64], num_workers=[0, 1], repeats=2)
    assert table.equals(load_benchmark(run))


def test_an_untrained_run_cannot_be_timed(tmp_path, test_set):
    with pytest.raises(RunError, match="stage train: the folder holds no run"):
        benchmark_run(Run(tmp_path), test_set)
