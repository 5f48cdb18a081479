"""What takes turns in which part of a benchmark, what follows from the rounds, and what ends as a row with a reason."""

import itertools
import math
import os
import time
from contextlib import ExitStack
from dataclasses import replace

import pandas as pd
import pytest
import torch

from transformnet_lib import GRAY_WEIGHTS, TransformNet, benchmark, measure, paper, workbench
from transformnet_lib.benchmarking import (
    KNOWN,
    PARTS,
    SETTING_COLUMNS,
    SWEPT,
    TABLE_COLUMNS,
    Measurements,
    Plan,
    Workbenches,
    best_settings,
    factor_settings,
    small_settings,
    sweep_settings,
    worker_settings,
)
from transformnet_lib.errors import ParameterError
from transformnet_lib.measure import ROUND_COLUMNS
from transformnet_lib.model import weighted_model
from transformnet_lib.workbench import DeviceProcess, Setting, Workbench

SMALL = {"devices": ["cpu"], "batch_sizes": [16], "num_workers": [], "small_batch_sizes": [], "seconds": 0.0}
MODEL = ("reference", "fast")


@pytest.fixture
def model() -> TransformNet:
    return weighted_model(GRAY_WEIGHTS)


@pytest.fixture
def images() -> torch.Tensor:
    return (torch.rand(50, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255).byte()


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(measure, "TURN_SECONDS", 1e-9)


def plan(**changes) -> Plan:
    asked = {"devices": ["cpu"], "batch_sizes": [16, 64], "small_batch_sizes": [1, 4], "num_workers": [0, 1]}
    return Plan(**asked | {"others": [KNOWN], "count": 1000} | changes)


# Which settings there are


def test_the_sweep_is_the_papers_48_settings_for_both_methods():
    published = paper.table1()[["device", "batch_size", "shuffle", "drop_last"]].itertuples(index=False, name=None)
    rows = sweep_settings(plan(devices=["cuda", "cpu"], batch_sizes=[16, 32, 64, 128, 256, 512]), Measurements.none())
    for method in SWEPT:
        table = [(row.device, row.batch_size, row.shuffle, row.drop_last) for row in rows if row.method == method]
        assert len(table) == 48 and sorted(table) == sorted(published := list(published))
    assert len({row.name for row in rows}) == len(rows)


@pytest.mark.parametrize("count", [1, 5, 50, 1000])
def test_the_shares_of_the_baseline_are_all_images_once(count):
    rows = sweep_settings(plan(batch_sizes=[16, 32, 64], count=count), Measurements.none())
    shares = [row.images for row in rows if row.method == "sequential"]
    assert sum(shares) == count and max(shares) - min(shares) <= 1
    assert [row.batch_size for row in rows if row.method == "batched"] == [16, 32, 64]


def test_small_batches_are_in_order_and_as_many_as_at_64():
    rows = small_settings(plan(count=10_000), Measurements.none())
    assert {(row.method, row.batch_size, row.images) for row in rows} == {
        ("sequential", 1, 1000),
        *((method, size, 10_000 * size // 64) for method in ("batched", *MODEL) for size in (1, 4)),
    }  # fmt: skip
    assert not any(row.shuffle or row.drop_last for row in rows)
    assert small_settings(plan(small_batch_sizes=[]), Measurements.none()) == []


def test_small_batches_of_few_images_are_as_large_as_asked_for():
    rows = small_settings(plan(count=50, small_batch_sizes=[1, 8, 64]), Measurements.none())
    assert {(row.batch_size, row.images) for row in rows if row.method == "fast"} == {(1, 1), (8, 8), (64, 50)}


def test_drop_last_drops_what_fills_no_batch():
    assert Setting("sweep", "fast", "cpu", 16, 50).images == 50
    assert Setting("sweep", "fast", "cpu", 16, 50, drop_last=True).images == 48


def test_workers_are_compared_only_if_there_are_several():
    assert [row.num_workers for row in worker_settings(plan(num_workers=[0, 2]), Measurements.none())] == [0, 2]
    assert worker_settings(plan(num_workers=[1]), Measurements.none()) == []


# What follows from rounds


def by_hand(seconds: dict[Setting, list[float]], **facts) -> Measurements:
    """Measurements with these seconds, round by round."""
    rows = [
        {"part": setting.part, "round": number, "attempt": 1, "method": setting.name, "seconds": value, "passes": 1,
         "cpu_seconds": 0.0, "switches": 0, "waiting_seconds": 0.0, "stolen_seconds": 0.0, "reason": ""}
        for setting, values in seconds.items()
        for number, value in enumerate(values, 1)
    ]  # fmt: skip
    settings = [{**vars(setting), "threads": 2, "setup_seconds": 0.5, "mse": 1e-12} | facts for setting in seconds]
    return Measurements(
        pd.DataFrame(settings, columns=list(SETTING_COLUMNS)), pd.DataFrame(rows, columns=["part", *ROUND_COLUMNS])
    )


def test_the_fastest_takes_the_least_time_per_image():
    dropping, whole = Setting("sweep", "fast", "cpu", 16, 50, drop_last=True), Setting("sweep", "fast", "cpu", 16, 50)
    measured = by_hand({dropping: [12.0] * 9, whole: [12.2] * 9})  # 48 images and 50
    assert measured.fastest("fast", "cpu")["name"] == whole.name


def test_a_speedup_is_over_the_pipeline_in_the_same_round_per_image_really_processed():
    drift = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    measured = by_hand(
        {
            Setting("sweep", "sequential", "cpu", 16, 30): [each * 6 for each in drift],
            Setting("sweep", "sequential", "cpu", 32, 20): [each * 4 for each in drift],
            Setting("sweep", "fast", "cpu", 16, 50, drop_last=True): [each * 2.4 for each in drift],
        }
    )
    table = measured.table
    assert list(table.columns) == list(TABLE_COLUMNS)
    fast, sequential = table.set_index("method").loc[["fast", "sequential"]].to_dict("records")
    assert (fast["images"], fast["rounds"]) == (48, 9)
    assert [fast[name] for name in ("seconds", "low", "high")] == pytest.approx([12.0] * 3)  # at the pipeline's median
    assert [fast[name] for name in ("speedup", "speedup_low", "speedup_high")] == pytest.approx([4.0] * 3)  # 0.2 ÷ 0.05
    assert fast["images_per_second"] == pytest.approx(4.0)
    assert (sequential["images"], sequential["seconds"], sequential["speedup"]) == (50, 50.0, 1.0)
    assert sequential["batch_size"] == 1 and (table["reason"] == "").all()


def test_a_slower_row_can_never_have_the_larger_speedup():
    drift = [1.0, 5.0, 1.0, 5.0, 1.0, 5.0, 1.0, 5.0, 1.0]
    measured = by_hand(
        {
            Setting("sweep", "sequential", "cpu", 16, 50): [2 * each for each in drift],
            Setting("sweep", "fast", "cpu", 16, 50): [0.5 * each for each in drift],
            Setting("sweep", "fast", "cpu", 32, 50): [0.4 * each for each in drift],
        }
    )
    table = measured.table.query("method == 'fast'").sort_values("seconds")
    assert table["speedup"].is_monotonic_decreasing
    assert measured.fastest("fast", "cpu")["batch_size"] == 32


def test_a_row_without_a_time_keeps_its_reason_and_the_anchor_needs_all_its_shares():
    settings = {
        Setting("sweep", "sequential", "cpu", 16, 30): [1.0] * 9,
        Setting("sweep", "sequential", "cpu", 32, 20): [1.0] * 9,
        Setting("sweep", "fast", "cpu", 16, 50): [0.5] * 9,
    }
    measured = by_hand(settings)
    failed = measured.rounds["method"] == "sequential cpu 32"
    measured.rounds.loc[failed, ["seconds", "reason"]] = [math.nan, "not measured: why"]
    table = measured.table.set_index("method")
    assert table.loc["sequential", "reason"] == "not measured: why" and math.isnan(table.loc["sequential", "seconds"])
    assert table.loc["fast", "seconds"] == 0.5 and math.isnan(table.loc["fast", "speedup"])


def test_the_best_settings_are_measured_again_with_other_weights_and_the_copy():
    measured = by_hand(
        {
            Setting("sweep", "batched", "cpu", 16, 50): [2.0] * 9,
            Setting("sweep", "batched", "cpu", 32, 50): [1.0] * 9,
            Setting("sweep", "fast", "cpu", 16, 50, True, False): [0.1] * 9,
            Setting("sweep", "fast", "cpu", 32, 50, False, False): [0.2] * 9,
        }
    )
    rows = best_settings(plan(others=[KNOWN, "paper"], count=50), measured)
    assert [row.name for row in rows] == [
        "sequential cpu 1", "batched cpu 32", "fast cpu 16 shuffle", "fast cpu 16 shuffle weights=known",
        "fast cpu 16 shuffle weights=paper", "copy cpu 1",
    ]  # fmt: skip
    factors = factor_settings(plan(count=50), measured)
    assert {row.batch_size for row in factors} == {1, 16} and len(factors) == 1 + 12 + 4 + 1
    assert len({row.name for row in factors}) == len(factors)
    assert len(factor_settings(plan(devices=["cuda"]), measured)) == 1  # nothing was measured there


# The harness


def measured_by(*arguments, **options) -> Measurements:
    """What `benchmark` saved last."""
    saved = []
    benchmark(*arguments, save=saved.append, **options)
    return saved[-1]


def test_every_part_is_measured_and_every_output_is_exact(model, images):
    sweep = SMALL | {"batch_sizes": [16, 32], "small_batch_sizes": [1], "num_workers": [0, 1]}
    table = benchmark(model, images, **sweep, other_weights={"other": [0.3, 0.58, 0.1]})
    assert list(table.columns) == list(TABLE_COLUMNS) and set(table["part"]) == set(PARTS)
    assert (table["reason"] == "").all() and (table["rounds"] == 9).all()
    own = table[table["method"].isin(MODEL) & (table["weights"] != "other")]
    assert (own["mse"] < 1e-12).all() and (own["setup_seconds"] > 0).all()
    assert (table.query("method == 'sequential'")["speedup"] == 1).all()
    assert table["part"].value_counts().to_dict() == {
        "sweep": 2 * 9 + 1, "small": 4, "best": 7, "one thread": 7, "factors": 1 + 12 + 4 + 1, "workers": 2
    }  # fmt: skip
    assert (table["low"] <= table["seconds"]).all() and (table["seconds"] <= table["high"]).all()


def test_one_part_has_one_thread_and_they_are_as_before_at_the_end(model, images):
    torch.set_num_threads(2)
    try:
        table = benchmark(model, images, **SMALL)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert table.groupby("part")["threads"].unique().map(list).to_dict() == {
        part: [1 if part == "one thread" else 2] for part in ("sweep", "best", "one thread", "factors")
    }


@pytest.fixture
def log(monkeypatch):
    """Who is checked, and who takes a turn."""
    noted = []
    for name in ("check", "turn"):
        original = getattr(Workbench, name)

        def note(self, setting, *arguments, name=name, original=original):
            noted.append((name, setting))
            return original(self, setting, *arguments)

        monkeypatch.setattr(Workbench, name, note)
    return noted


def test_outputs_are_checked_before_the_rounds_and_after_them(model, images, log):
    benchmark(model, images, **SMALL)
    sweep = log[: [name for name, _ in log].index("turn")]
    names = [row.name for row in sweep_settings(plan(batch_sizes=[16], count=50), Measurements.none())]
    assert [name for _, name in sweep] == [name for name in names if not name.startswith("sequential")]
    turns = list(itertools.takewhile(lambda each: each[0] == "turn", log[len(sweep) :]))
    assert len(turns) == 9 * len(names) and {name for _, name in turns} == set(names)
    after = log[len(sweep) + len(turns) :][: len(sweep) + 1]
    assert {name for kind, name in after if kind == "check"} >= {name for _, name in sweep}


def test_a_model_that_does_not_equal_the_pipeline_is_not_timed(images):
    table = benchmark(weighted_model([-1, -1, -1]), images, **SMALL)  # black
    rows = table[table["method"].isin(MODEL) & (table["weights"] == "")]
    assert len(rows) == 8 and rows["seconds"].isna().all()
    said = r"not measured: output differs from the ground truth \(MSE 0\.\d+, more than 0.01\)"
    assert rows["reason"].str.fullmatch(said).all()
    assert table.loc[table["method"] == "batched", "speedup"].notna().all()


@pytest.mark.parametrize("method", MODEL)
@pytest.mark.parametrize("early", [True, False])
def test_an_output_that_is_wrong_at_first_or_later_leaves_no_time(model, images, monkeypatch, method, early):
    prepare = workbench.prepare_pass

    def spoiled(model, **options):
        work = prepare(model, **options)
        if options["method"] == method:
            seconds = work.seconds
            spoil = lambda: work.network.register_forward_hook(lambda *_: _[-1] * 0.999)  # noqa: E731
            if early:
                spoil()
            else:
                work.seconds = lambda: spoil() and seconds()
        return work

    monkeypatch.setattr(workbench, "prepare_pass", spoiled)
    table = benchmark(model, images, **SMALL).query("part == 'sweep'")
    rows = table[table["method"] == method]
    assert rows["reason"].str.match(r"not measured: output differs from the eager model's by \S+ in a pixel").all()
    assert rows["seconds"].isna().all() and (table.loc[table["method"] != method, "reason"] == "").all()


def test_zero_batches_are_a_row_with_the_reason(model, images):
    table = benchmark(model, images, **SMALL | {"batch_sizes": [64]}).query("part == 'sweep'")
    dropped = table["drop_last"].astype(bool)
    said = "not measured: zero batches: drop_last with batch size 64 and 50 images"
    assert set(table.loc[dropped, "reason"]) == {said} and table.loc[dropped, "images"].tolist() == [0] * 4
    assert table.loc[dropped, "seconds"].isna().all() and (table.loc[~dropped, "reason"] == "").all()


def test_a_method_that_runs_out_of_memory_in_a_round_leaves_the_others(model, images, monkeypatch):
    turn, turns = Workbench.turn, itertools.count(1)

    def fails(self, name):
        if name == "fast cpu 16" and next(turns) == 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore")
        return turn(self, name)

    monkeypatch.setattr(Workbench, "turn", fails)
    measured = measured_by(model, images, **SMALL)
    sweep = measured.table.query("part == 'sweep'").set_index("name")
    assert sweep.loc["fast cpu 16", "reason"] == "not measured: CUDA out of memory. Tried to allocate 20.00 GiB"
    assert (sweep.drop("fast cpu 16")["rounds"] == 9).all()
    assert (measured.rounds_of("sweep")["method"] == "fast cpu 16").sum() == 4  # not tried again


def test_what_was_measured_is_not_measured_again(model, images, log):
    saved = []

    def stop_in_the_third_round_of_best(measured):
        saved.append(measured)
        if len(measured.rounds_of("best")) and measured.rounds_of("best")["round"].max() == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        benchmark(model, images, **SMALL, save=stop_in_the_third_round_of_best)
    before, before_log = saved[-1], len(log)
    assert set(before.settings["part"]) == {"sweep"}
    whole = measured_by(model, images, **SMALL, done=before)
    rounds = [each.reset_index(drop=True) for each in (before.rounds, whole.rounds)]
    assert rounds[1].head(len(rounds[0])).equals(rounds[0])
    turned = [name for kind, name in log[before_log:] if kind == "turn"]
    assert turned and turned.count("copy cpu 1") == 6 + 9  # the rounds of `best` that were missing, and one thread's
    assert (whole.table["rounds"] == 9).all() and set(whole.table["part"]) == {"sweep", "best", "one thread", "factors"}


# Devices


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_rows_say_that_there_is_no_device(run):
    cuda = run.benchmark.table.query("device == 'cuda'")
    assert set(cuda["reason"]) == {"not measured: no CUDA device"}
    assert cuda["part"].value_counts().to_dict() == {"sweep": 2 * 8, "small": 2, "best": 1, "one thread": 1}


class Fragile(Workbench):
    """Ends its process as a lost device does."""

    def turn(self, name):
        if name.startswith("fast"):
            os.abort()
        return super().turn(name)


def test_a_process_of_its_own_does_what_a_workbench_does(model, images):
    bench = DeviceProcess({"": model}, images)
    setting = Setting("sweep", "fast", "cpu", 16, 50, shuffle=True)
    try:
        facts = bench.prepare(setting)
        assert facts["mse"] < 1e-12 and facts["setup_seconds"] > 0
        assert bench.turn(setting.name) > 0 and bench.check(setting.name, 16) < 1e-12
        with pytest.raises(RuntimeError, match="zero batches: drop_last with batch size 64 and 50 images"):
            bench.prepare(replace(setting, batch_size=64, drop_last=True))
        bench.set_threads(1)
        bench.clear()
        with pytest.raises(SystemError, match=r"(?s)Traceback.*KeyError: 'fast"):  # no reason of a row
            bench.turn(setting.name)
    finally:
        bench.close()
    assert not bench.process.is_alive()


def test_a_device_that_does_not_answer_is_given_up(model, images, monkeypatch):
    bench = DeviceProcess({"": model}, images, workbench=Silent)
    bench.set_threads(1)  # it has started
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the device's process gave no answer in 0"):
        patch.setattr("transformnet_lib.workbench.ANSWER_SECONDS", 0)
        bench.turn("any")
    with pytest.raises(RuntimeError, match="the device's process ended"):
        bench.turn("any")
    bench.close()


class Silent(Workbench):
    def turn(self, name):
        time.sleep(3600)


def test_a_device_that_is_first_needed_in_a_part_has_the_threads_of_that_part(model, images, monkeypatch):
    threads = []
    monkeypatch.setattr("transformnet_lib.benchmarking.available_devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr("transformnet_lib.benchmarking.DeviceProcess", lambda *of: Workbench(*of))
    monkeypatch.setattr(Workbench, "set_threads", lambda self, count: threads.append(count))
    with ExitStack() as stack:
        benches = Workbenches({"": model}, images, stack)
        with benches.threads(3):
            assert isinstance(benches["cuda"], Workbench)
    assert threads == [3, 1]  # as before at the end


def test_a_lost_device_ends_its_own_process_and_its_rows_have_the_reason(model, images, monkeypatch, capfd):
    """CUDA as it is, but for what is behind it: a CPU in a process that is ended by a signal."""
    monkeypatch.setattr("transformnet_lib.benchmarking.available_devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(
        "transformnet_lib.benchmarking.DeviceProcess",
        lambda models, images: Renamed(DeviceProcess(models, images, workbench=Fragile)),
    )
    table = benchmark(model, images, **SMALL | {"devices": ["cpu", "cuda"]})
    cuda = table[(table["device"] == "cuda") & (table["part"] == "sweep")]
    assert set(cuda["reason"]) == {"not measured: the device's process ended (exit status -6)"}
    cpu = table[table["device"] == "cpu"]
    assert (cpu["reason"] == "").all() and set(cpu["part"]) == {"sweep", "best", "one thread", "factors"}


class Renamed:
    """A process for the CPU that is asked for CUDA."""

    def __init__(self, process):
        self.process = process

    def prepare(self, setting):
        facts = self.process.prepare(replace(setting, device="cpu"))
        self.names = getattr(self, "names", {}) | {setting.name: replace(setting, device="cpu").name}
        return facts

    def turn(self, name):
        return self.process.turn(self.names[name])

    def check(self, name, least=None):
        return self.process.check(self.names[name], least)

    def set_threads(self, count):
        self.process.set_threads(count)

    def clear(self):
        self.process.clear()

    def close(self):
        self.process.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_is_timed(model, images):
    table = benchmark(model, images, **SMALL | {"devices": ["cuda"], "num_workers": [0, 1]})
    assert (table["reason"] == "").all() and set(table["device"]) == {"cpu", "cuda"}
    assert (table["mse"].dropna() < 1e-12).all()
    assert {"graph", "pinned"} <= set(table["method"])


# Bad input


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rounds": 8}, "rounds: expected a whole number from 9, got 8: fewer do not bound a median"),
        ({"seconds": -1}, "seconds: expected a number from 0 to"),
        ({"seconds": 10**400}, "seconds: expected a number from 0 to"),
        ({"precision": "fine"}, "precision: expected a number from 0 to .*, got 'fine'"),
        ({"batch_sizes": [16, 16]}, r"batch_sizes: expected each number once, got \[16, 16\]"),
        ({"batch_sizes": [2**63]}, "batch_sizes: expected a list of whole numbers from 1"),
        ({"num_workers": [0, 0]}, "num_workers: expected each number once"),
        ({"devices": "cpu"}, "devices: expected a list of devices, got 'cpu'"),
        ({"devices": [0]}, "devices: expected a list of devices"),
        ({"devices": ["cpu", "cpu"]}, "devices: expected each once"),
        ({"other_weights": {"a": [1, 2, float("nan")]}}, "other_weights: expected names with red, green and blue each"),
        ({"other_weights": {"a": [1, 2, 10**400]}}, "other_weights: expected names with red, green and blue each"),
        ({"batch_sizes": [16, 0]}, "batch_sizes: expected a list of whole numbers from 1"),
        ({"small_batch_sizes": [0]}, "small_batch_sizes: expected a list of whole numbers from 1"),
        ({"batch_sizes": []}, "batch_sizes: expected at least one"),
        ({"batch_sizes": 16}, "batch_sizes: expected a list of whole numbers from 1, got 16"),
        ({"num_workers": [-1]}, "num_workers: expected a list of whole numbers from 0"),
        ({"devices": ["tpu"]}, "device: expected cpu, cuda, cuda:N, mps or auto, got 'tpu'"),
        ({"other_weights": {"a": [1, 2]}}, "other_weights: expected names with red, green and blue each"),
        ({"other_weights": {"": [1, 2, 3]}}, "other_weights: expected names other than '' and 'known', got ''"),
        (
            {"other_weights": {"known": [1, 2, 3]}},
            "other_weights: expected names other than '' and 'known', got 'known'",
        ),
        ({"other_weights": [1, 2, 3]}, "other_weights: expected names with red, green and blue each"),
    ],
)
def test_parameters_out_of_range_are_refused(model, images, wrong, message):
    with pytest.raises(ParameterError, match=message):
        benchmark(model, images, **SMALL | {"devices": []} | wrong)


def test_no_images_are_refused(model, images):
    with pytest.raises(ParameterError, match=r"expected images of shape \(count, 3, height, width\), got \(0, 3"):
        benchmark(model, images[:0], **SMALL)
