import gc

import pandas as pd
import pytest
import torch
from fake_cuda import fake_cuda

from transformnet_lib import GRAY_WEIGHTS, Pipeline, TransformNet, benchmark, test_inference_time, timing
from transformnet_lib.errors import ParameterError
from transformnet_lib.machine import clock_mhz
from transformnet_lib.timing import (
    BENCHMARK_COLUMNS,
    METHODS,
    STEP,
    Setting,
    prepare_pass,
    settings,
    summarise,
)

PASS = {"device": "cpu", "batch_size": 16, "shuffle": False, "drop_last": False}
SMALL = {"devices": ["cpu"], "batch_sizes": [16], "num_workers": [], "small_batch_sizes": [], "repeats": 1}


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


def test_the_sweep_is_the_papers_48_settings_for_both_paths():
    from transformnet_lib import paper

    published = list(
        paper.table1()[["device", "batch_size", "shuffle", "drop_last"]].itertuples(index=False, name=None)
    )
    rows = settings(["cuda", "cpu"], num_workers=[], small_batch_sizes=[])
    for method in METHODS:
        table = [(row.device, row.batch_size, row.shuffle, row.drop_last) for row in rows if row.method == method]
        assert table == published
        assert len(table) == 48


def test_steps_and_small_batches_are_measured_without_shuffle_and_drop_last():
    rows = settings(["cpu"], batch_sizes=[16], small_batch_sizes=[1, 2], num_workers=[0, 1, 2])
    assert len(set(rows)) == len(rows)
    assert {row.batch_size for row in rows if row.method == "batched"} == {16, 1, 2}
    for method in (*METHODS, STEP):
        plain = {row.batch_size for row in rows if row.method == method and not (row.shuffle or row.drop_last)}
        assert plain - {256} == {16, 1, 2}
    others = [row for row in rows if row.shuffle or row.drop_last]
    assert {(row.method, row.batch_size) for row in others} == {("reference", 16), ("fast", 16)}
    assert [row.num_workers for row in rows if row.batch_size == 256] == [0, 1, 2]


def test_rows_that_differ_in_the_path_alone_are_one_group():
    groups = {row.group for row in settings(["cpu"], batch_sizes=[16], num_workers=[0], small_batch_sizes=[1])}
    assert len(groups) == 8  # sequential; batch size 1; batch size 16, four times; the workers' batch size; the floor


def test_small_batches_are_as_many_as_at_32():
    assert Setting("fast", "cpu", 16).images(10_000) == 10_000
    assert Setting("fast", "cpu", 2).images(10_000) == 625
    assert Setting("fast", "cpu", 1).images(3) == 1
    assert Setting("fast", "cpu", 8, drop_last=True).images(50) == 8  # of 25


# One pass


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_one_pass_gives_positive_seconds(model, images, dtype, num_workers, method):
    images = images if dtype == "float32" else (images * 255).to(torch.uint8)
    seconds = test_inference_time(model, images=images, method=method, num_workers=num_workers, **PASS)
    assert isinstance(seconds, float)
    assert seconds > 0


@pytest.mark.parametrize("method", [*METHODS, STEP, "graphed"])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("drop_last", "processed"), [(True, 48), (False, 50)])
def test_each_path_runs_the_model_on_each_image_once(model, images, monkeypatch, method, shuffle, drop_last, processed):
    images = (images * 255).byte()
    options = {"batch_size": 16, "shuffle": shuffle, "drop_last": drop_last}
    with fake_cuda(monkeypatch), torch.inference_mode():
        work = prepared(model, images, method, **options)
        list(work.outputs())  # an odd or even number of batches before makes no difference
        order, outputs = work.order().tolist(), [output.clone() for output in work.outputs()]
    images = images / 255
    assert [len(output) for output in outputs[:3]] == [16, 16, 16]
    outputs, expected = torch.cat(outputs), model(images).detach()
    assert len(outputs) == processed == Setting(method, "cpu", 16, shuffle, drop_last).images(50)
    torch.testing.assert_close(outputs, expected[order])
    assert len(set(order)) == processed
    assert (order == sorted(order)) != shuffle


def prepared(model, images, method, **options) -> timing.Pass:
    """A pass on the CPU; "graphed" is the fast method as it is on CUDA, under `fake_cuda`."""
    device = torch.device("cpu")
    if method == "graphed":
        return timing.GraphedPass(model.folded(), images, device, **options)
    return prepare_pass(model, images=images, device=device, method=method, **{"num_workers": 0} | options)


@pytest.mark.parametrize("method", [*METHODS, STEP, "graphed"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shuffled_pass_is_compared_in_its_own_order(model, images, monkeypatch, method, num_workers):
    targets = model.pipeline(images)
    options = {"batch_size": 16, "shuffle": True, "drop_last": True}
    options |= {} if method == "graphed" else {"num_workers": num_workers}
    with fake_cuda(monkeypatch):
        work = prepared(model, images, method, **options)
        for _ in range(3):  # timed passes in between, each in another order
            assert work.mse(targets, targets) < 1e-12
            work.seconds()
        error = work.mse(targets.flip(0), targets)
        work.seconds()
        assert error > 1e-3 and work.mse(targets.flip(0), targets) == pytest.approx(
            error
        )  # no other images are dropped


def test_a_graph_keeps_alive_what_it_reads(model, images, monkeypatch):
    with fake_cuda(monkeypatch), torch.inference_mode():
        call = timing.GraphedCall(model.folded(), images.clone())
        gc.collect()
        call.input.copy_(images.flip(0))
        call.replay()
        torch.testing.assert_close(call.output, model(images.flip(0)).detach())


def test_the_fake_graph_notices_what_is_gone(monkeypatch):
    with fake_cuda(monkeypatch), torch.inference_mode():
        call = timing.GraphedCall(torch.nn.Linear(2, 2).requires_grad_(False), torch.ones(1, 2))
        call.replay()
        del call.network
        gc.collect()
        with pytest.raises(RuntimeError, match="illegal memory access"):
            call.replay()


def test_a_shuffled_batch_is_not_gathered_before_its_buffers_last_copy_ended(monkeypatch):
    with fake_cuda(monkeypatch):
        source = timing.PinnedBatches(torch.arange(6, dtype=torch.uint8).view(6, 1), 2)
        waited = []
        for k, event in enumerate(source.copied):
            event.synchronize = lambda k=k: waited.append((k, source.buffers[k].flatten().tolist()))
        batches = [source[torch.tensor(index)][0] for index in ([0, 1], [2, 3], [4, 5], [1])]
    assert [k for k, _ in waited] == [1, 0, 1, 0]
    assert waited[2:] == [(1, [0, 1]), (0, [2, 3])]  # not overwritten yet
    assert [batch.flatten().tolist() for batch in batches[2:]] == [[4, 5], [1]]
    assert batches[3].data_ptr() == source.buffers[0].data_ptr()


@pytest.mark.parametrize("method", METHODS)
def test_a_pass_leaves_the_global_generator_alone(model, images, method):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    test_inference_time(model, images=images, method=method, **PASS | {"shuffle": True})
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected a whole number from 1, got 0"),
        ({"num_workers": -1}, "num_workers: expected a whole number from 0, got -1"),
        ({"method": "magic"}, "method: expected one of reference, fast, folded, got 'magic'"),
        ({"device": "tpu"}, "device: expected cpu"),
        ({"batch_size": 64, "drop_last": True}, "zero batches: drop_last with batch size 64 and 50 images"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_setting_that_cannot_run_is_refused(model, images, wrong, message, method):
    with pytest.raises(ParameterError, match=message):
        test_inference_time(model, images=images, **PASS | {"method": method} | wrong)


@pytest.mark.parametrize("shape", [(50, 1, 32, 32), (3, 32, 32), (0, 3, 32, 32)])
def test_images_of_another_shape_are_refused(model, shape):
    with pytest.raises(
        ParameterError, match=rf"expected images of shape \(count, 3, height, width\), got \({shape[0]}"
    ):
        test_inference_time(model, images=torch.zeros(shape), **PASS)


# Arithmetic, on times written by hand


def row(seconds, *, setting=None, **facts) -> dict:
    setting = setting or Setting("reference", "cpu", 300, drop_last=True)
    return summarise(setting, seconds, count=1000, **{"sequential_seconds_per_image": 0.011} | facts)


def test_median_and_quartiles_are_those_of_the_repeats():
    found = row([1.0, 3.0, 2.0, 5.0, 4.0])
    assert (found["q1"], found["seconds"], found["q3"], found["repeats"]) == (2.0, 3.0, 4.0, 5)
    assert found["raw_seconds"] == "1.0 3.0 2.0 5.0 4.0"


def test_speedup_compares_seconds_per_image_really_processed():
    found = row([1.0, 3.0, 2.0, 5.0, 4.0])
    assert found["images"] == 900
    assert found["images_per_second"] == 300
    assert found["speedup"] == pytest.approx(0.011 / (3.0 / 900))


def test_the_sequential_row_is_its_own_baseline():
    found = row([10.0, 12.0, 11.0], setting=Setting("sequential", "cpu", 1))
    assert found["speedup"] == 1
    assert found["sequential_seconds_per_image"] == 0.011


@pytest.mark.parametrize(
    ("seconds", "noisy"),
    [([1.0, 1.04, 1.12], False), ([1.0, 1.04, 1.3], True), ([1.0], False), ([1.0] * 4 + [9.0], False)],
)
def test_a_row_is_noisy_if_its_quartiles_are_a_tenth_of_the_median_apart(seconds, noisy):
    assert row(seconds)["noisy"] is noisy


def test_a_row_without_a_time_keeps_its_reason():
    found = row([1.0], reason="not measured: why")
    assert (found["reason"], found["repeats"], found["raw_seconds"]) == ("not measured: why", 0, "")
    assert "seconds" not in found and "speedup" not in found


# The harness


@pytest.fixture
def by_hand(monkeypatch):
    """Every pass takes one second by the clock, and who passes is noted."""
    order = []
    monkeypatch.setattr(timing, "sequential_pass", lambda pipeline, images: order.append("sequential") or 1.0)
    monkeypatch.setattr(timing, "batched_pass", lambda *a, batch_size: order.append(f"batched {batch_size}") or 1.0)
    monkeypatch.setattr(timing, "copy_pass", lambda *a: lambda: order.append("copy") or 1.0)

    def prepare(model, *, method, batch_size, **options):
        work = prepare_pass(model, method=method, batch_size=batch_size, **options)
        mse = work.mse
        work.mse = lambda *of: order.append(f"check {method} {batch_size}") or mse(*of)
        work.seconds = lambda: order.append(f"time {method} {batch_size}") or 1.0
        return work

    monkeypatch.setattr(timing, "prepare_pass", prepare)
    return order


def test_every_setting_has_a_row_and_the_baselines_are_exact(model, images):
    table = benchmark(model, images, **SMALL | {"batch_sizes": [16, 32], "repeats": 2, "small_batch_sizes": [1]})
    assert list(table.columns) == list(BENCHMARK_COLUMNS)
    assert table["method"].value_counts().to_dict() == {
        "sequential": 1, "batched": 3, "reference": 9, "fast": 9, "folded": 3, "copy": 1
    }  # fmt: skip
    assert (table.loc[table["method"].isin([*METHODS, STEP]), "mse"] < 1e-12).all()
    assert (table["reason"] == "").all()
    assert (table["threads"] == torch.get_num_threads()).all()
    assert table.loc[0, ["method", "speedup", "images"]].tolist() == ["sequential", 1, 50]
    assert (table["repeats"] == 2).all()
    assert (table[table["method"] == "fast"]["setup_seconds"] > 0).all()


def test_paths_take_turns_with_the_baseline_between_two_checks_that_are_not_timed(model, images, by_hand):
    table = benchmark(model, images, **SMALL | {"repeats": 2})
    assert by_hand[:5] == ["sequential"] * 5  # warm-up; baseline and the row of its own, twice
    first = by_hand[5 : 5 + 4 + 2 * 5 + 3]
    checks = [f"check {method} 16" for method in (*METHODS, STEP)]
    assert first[:4] == ["batched 16", *checks]  # warm-up
    assert first[4:-3] == ["sequential", "batched 16", *(f"time {method} 16" for method in (*METHODS, STEP))] * 2
    assert first[-3:] == checks
    assert (table["raw_seconds"] == "1.0 1.0").all()


def test_speedup_is_over_the_baseline_of_the_same_group(model, images, by_hand, monkeypatch):
    seconds = iter([9.0, 9.0, 5.0, 2.0, 4.0, 4.0, 4.0, 8.0])  # warm-up, baseline, the row of its own; then one a group
    monkeypatch.setattr(timing, "sequential_pass", lambda *a: next(seconds))
    table = benchmark(model, images, **SMALL)
    assert table["sequential_seconds_per_image"].tolist()[:2] == [5.0 / 50, 2.0 / 50]
    assert table["speedup"].tolist()[1] == pytest.approx(2.0)
    assert table["speedup"].tolist()[-3:] == pytest.approx([4.0 * 48 / 50] * 2 + [8.0])  # drop_last; the floor


@pytest.mark.parametrize("size", [(28, 28), (4, 4)])  # outputs of more bytes than the images', and of fewer
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_floor_moves_all_bytes_and_only_times_that(images, size, dtype, monkeypatch):
    moved = []
    for name in ("copy_", "zero_", "amax"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, f=original, n=name: moved.append((n, len(self))) or f(self, *a)
        )
    given = (images * 255).byte() if dtype == torch.uint8 else images
    run_pass = timing.copy_pass(given, Pipeline(size), torch.device("cpu"))
    moved.clear()
    assert run_pass() > 0
    count, (copied, *rest) = len(images), moved
    read, written = given.numel() * given.element_size(), count * size[0] * size[1] * 4
    assert copied == ("copy_", min(read, written))
    assert rest == [("zero_", written - read)] * (written > read) + [("amax", read - written)] * (read > written)


def test_fast_images_stay_uint8(model, images, by_hand, monkeypatch):
    seen = {}
    prepare = timing.prepare_pass
    monkeypatch.setattr(
        timing, "prepare_pass", lambda *a, **k: seen.update({k["method"]: k["images"].dtype}) or prepare(*a, **k)
    )
    benchmark(model, (images * 255).byte(), **SMALL)
    assert seen == dict.fromkeys(("reference", "folded"), torch.float32) | {"fast": torch.uint8}


def test_a_model_that_does_not_equal_the_pipeline_is_not_timed(images):
    model = TransformNet()
    with torch.no_grad():
        model.mix.weight.fill_(-1)  # black
    table = benchmark(model, images, **SMALL)
    rows = table[table["method"].isin([*METHODS, STEP])]
    assert len(rows) == 9
    assert (
        rows["reason"]
        .str.fullmatch(r"not measured: output differs from the ground truth by 0\.\d+, more than 0.01")
        .all()
    )
    assert rows["seconds"].isna().all()


@pytest.mark.parametrize("method", [*METHODS, STEP])
@pytest.mark.parametrize("inexact", [False, True])
def test_an_output_that_changes_while_it_is_timed_leaves_no_time(model, images, by_hand, monkeypatch, method, inexact):
    factor = 0.999
    if inexact:  # off by as much as is timed at all, and then by a fifth of a grey level more
        factor = 0.9995
        with torch.no_grad():
            model.mix.weight *= 0.9
    prepare = timing.prepare_pass

    def spoiled(model, **options):
        work = prepare(model, **options)
        if options["method"] == method:
            work.seconds = lambda: work.network.register_forward_hook(lambda *_: _[-1] * factor) and 1.0
        return work

    monkeypatch.setattr(timing, "prepare_pass", spoiled)
    table = benchmark(model, images, **SMALL)
    rows = table[table["method"] == method]
    assert rows["reason"].str.match(r"not measured: output differs from the eager model's by \S+ in a pixel").all()
    assert rows["seconds"].isna().all()
    assert (table.loc[table["method"] != method, "reason"] == "").all()


def test_an_output_that_is_as_wrong_as_before_is_timed_and_another_is_not():
    errors = iter([5.0, 5.0001, 5.01])
    entry = timing.Entry({}, lambda: 1.0, lambda: next(errors))  # as another library's, which is no eager model's
    entry.check()
    entry.check()
    with pytest.raises(RuntimeError, match=r"output off the ground truth by 5, after the repeats by 5\.01"):
        entry.check()


@pytest.mark.parametrize("method", ["fast", STEP])
def test_a_method_that_is_wrong_in_a_few_images_from_the_start_is_not_timed(
    model, images, by_hand, monkeypatch, method
):
    prepare = timing.prepare_pass

    def spoiled(model, **options):
        work = prepare(model, **options)
        if options["method"] == method:  # a corner of the first image of a batch: an MSE far below the limit
            work.network.register_forward_hook(lambda *_: _[-1][0, 0, :2, :2].zero_() * 0 is None or _[-1])
        return work

    monkeypatch.setattr(timing, "prepare_pass", spoiled)
    table = benchmark(model, images, **SMALL)
    rows = table[table["method"] == method]
    assert rows["reason"].str.match(r"not measured: output differs from the eager model's by \S+ in a pixel").all()
    assert rows["seconds"].isna().all()
    assert (table.loc[table["method"] != method, "reason"] == "").all()


def test_zero_batches_are_a_row_with_the_reason(model, images):
    table = benchmark(model, images, **SMALL | {"batch_sizes": [64]})
    dropped = table["drop_last"]
    assert set(table.loc[dropped, "reason"]) == {
        "not measured: zero batches: drop_last with batch size 64 and 50 images"
    }
    assert table.loc[dropped, "images"].tolist() == [0] * 4
    assert table.loc[dropped, "seconds"].isna().all()
    assert (table.loc[~dropped, "reason"] == "").all()


@pytest.mark.parametrize("error", [RuntimeError("out of memory\nsecond line"), OSError("out of memory")])
def test_a_device_that_fails_on_the_way_leaves_the_other_rows(model, images, monkeypatch, error):
    calls = []

    def fail_late(*args, batch_size):
        calls.append(batch_size)
        if batch_size == 32 and calls.count(32) > 2:
            raise error
        return 1.0

    monkeypatch.setattr(timing, "batched_pass", fail_late)
    table = benchmark(model, images, **SMALL | {"devices": [], "batch_sizes": [16, 32, 64], "repeats": 3})
    table = table[table["method"] == "batched"].set_index("batch_size")
    assert table.loc[32, "reason"] == "not measured: out of memory"
    assert pd.isna(table.loc[32, "seconds"])
    assert table["repeats"].tolist() == [3, 0, 3]
    assert calls.count(32) == 3  # warm-up, one repeat, and the one that failed: it isn't tried again


def test_a_device_that_disappears_leaves_the_other_rows(model, images, monkeypatch):
    present = iter([["cpu", "mps"]])
    monkeypatch.setattr(timing, "available_devices", lambda: next(present, ["cpu"]))
    monkeypatch.setattr(timing, "resolve_device", lambda device: torch.device("cpu"))
    table = benchmark(model, images, **SMALL | {"devices": ["mps", "cpu"]})
    mps = table[table["device"] == "mps"]
    assert mps["reason"].tolist() == [""] + ["not measured: no MPS device"] * 9
    assert (table.loc[table["device"] == "cpu", "reason"] == "").all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_rows_say_that_there_is_no_device(run):
    cuda = run.benchmark.table.query("device == 'cuda'")
    # 2 batch sizes × shuffle × drop_last × 2 methods, the step for 2 batch sizes, 3 at batch size 1, workers, floor
    assert len(cuda) == 16 + 2 + 3 + 1 + 1
    assert set(cuda["reason"]) == {"not measured: no CUDA device"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_is_timed(model, images):
    table = benchmark(model, (images * 255).byte(), **SMALL | {"devices": ["cuda"], "repeats": 2})
    assert (table["reason"] == "").all()
    assert set(table["device"]) == {"cpu", "cuda"}
    assert (table["mse"].dropna() < 1e-12).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shuffle", [True, False])
def test_on_cuda_the_fast_path_gives_every_image_once_too(model, shuffle):
    images = torch.randint(0, 256, (1000, 3, 32, 32)).byte()
    device, options = torch.device("cuda"), {"batch_size": 16, "drop_last": False, "num_workers": 0, "method": "fast"}
    work = prepare_pass(model, images=images, device=device, shuffle=shuffle, **options)
    with torch.inference_mode():
        order = work.order()
        gc.collect()
        torch.cuda.empty_cache()  # what nobody keeps is the driver's again
        junk = [torch.full((2**18,), torch.nan, device=device) for _ in range(100)]
        outputs = torch.cat([output.cpu() for output in work.outputs()])
    assert len(order.unique()) == 1000 and len(junk) == 100
    torch.testing.assert_close(outputs, model(images / 255).detach()[order], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"repeats": 0}, "repeats: expected a whole number from 1, got 0"),
        ({"batch_sizes": [16, 0]}, "batch_sizes: expected a list of whole numbers from 1"),
        ({"small_batch_sizes": [0]}, "small_batch_sizes: expected a list of whole numbers from 1"),
        ({"batch_sizes": []}, "batch_sizes: expected at least one"),
        ({"batch_sizes": 16}, "batch_sizes: expected a list of whole numbers from 1, got 16"),
        ({"num_workers": [-1]}, "num_workers: expected a list of whole numbers from 0"),
        ({"devices": ["tpu"]}, "device: expected cpu, cuda, cuda:N, mps or auto, got 'tpu'"),
    ],
)
def test_parameters_out_of_range_are_refused(model, images, wrong, message):
    with pytest.raises(ParameterError, match=message):
        benchmark(model, images, **SMALL | {"devices": []} | wrong)


def test_the_clock_is_megahertz_or_none(monkeypatch):
    mhz = clock_mhz(torch.device("cpu"))
    assert mhz is None or 100 < mhz < 10_000
    monkeypatch.setattr(
        "transformnet_lib.machine.Path.read_text", lambda self: "cpu MHz\t: 1000.5\ncpu MHz\t: 2000.5\n"
    )
    assert clock_mhz(torch.device("cpu")) == 1500.5
    monkeypatch.setattr("transformnet_lib.machine.Path.read_text", lambda self: "no clock here\n")
    assert clock_mhz(torch.device("cpu")) is None
