"""What the study measures: many seeds, other libraries, cost over size."""

import dataclasses
import importlib.util
import itertools
import math
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from transformnet_lib import GRAY_WEIGHTS, CustomDataset, Pipeline, TransformNet, libraries, measure, seeds, sizes
from transformnet_lib.facts.study import Rival, StudyFacts, study_facts
from transformnet_lib.libraries import (
    BASELINE,
    FAST,
    LIBRARIES,
    LIBRARY_COLUMNS,
    libraries_table,
    name_of,
    study_libraries,
)
from transformnet_lib.measure import ROUND_COLUMNS
from transformnet_lib.model import weighted_model
from transformnet_lib.pipeline import to_float
from transformnet_lib.sizes import SIZE_COLUMNS, sizes_table, study_sizes
from transformnet_lib.workbench import Workbench


def facts_of(libraries: pd.DataFrame | None = None, sizes: pd.DataFrame | None = None) -> StudyFacts:
    """What follows from a study's tables; those left out are empty."""
    none = pd.DataFrame(columns=["method", "device", "images", "seconds", "reason", "peak_mib"])
    study = SimpleNamespace(libraries=none if libraries is None else libraries, sizes=none if sizes is None else sizes)
    return study_facts(SimpleNamespace(label="r", study=study))


@pytest.fixture
def exact() -> TransformNet:
    return weighted_model(GRAY_WEIGHTS)


def test_grey_images_have_no_optimum_to_be_compared_with(train_set):
    grey = CustomDataset(data="photos", train=True, limit=100)
    grey.images = grey.images[:, :1].expand(-1, 3, -1, -1).contiguous()
    grey.targets = grey.compute_targets()
    table = seeds.study_seeds(grey, presets=["paper"], seeds=[0])
    assert table["weight_error"].isna().all() and (table["val_mse"] >= 0).all()
    assert table["preset"].tolist() == ["paper", "paper with lr", "paper with min_delta"]  # grey cannot be whitened


# Other libraries


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.mark.parametrize("method", LIBRARIES, ids=lambda method: method.name)
@pytest.mark.parametrize("flips", [(True, True), (True, False), (False, True), (False, False)])
def test_each_library_draws_about_the_same_pictures(method, flips, test_set):
    if not installed(method.package):
        pytest.skip(f"{method.package} is not installed")
    images = test_set.images[:40]
    pipeline = Pipeline((20, 24), *flips)
    work = method.prepare(images, pipeline, torch.device("cpu"))
    difference = libraries._grey_levels(work()) - 255 * pipeline(to_float(images))
    assert difference.shape == (40, 1, 20, 24)
    assert difference.abs().mean() < 4  # grey levels; a flip or the sides mixed up would be tens


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(measure, "TURN_SECONDS", 1e-9)


def test_a_library_row_has_its_interval_speedup_and_difference(exact, test_set):
    facts, rounds = study_libraries(exact, test_set.images[:100])
    assert list(facts.columns) == list(LIBRARY_COLUMNS) and list(rounds.columns) == list(ROUND_COLUMNS)
    rows = libraries_table(facts, rounds).set_index("method")
    assert (rows["reason"] == "").all() and (rows["rounds"] == 9).all()
    assert rows.loc[BASELINE, ["speedup", "max_difference"]].tolist() == [1, 0]
    assert rows.loc["TransformNet, fast", "max_difference"] < 1e-3
    assert rows.loc["Pillow, image by image", "max_difference"] > 0.4  # it rounds to whole grey levels, twice
    assert math.isnan(rows.loc["copy: the bytes read and written once", "max_difference"])
    assert (rows["low"] <= rows["seconds"]).all() and (rows["seconds"] <= rows["high"]).all()
    assert (rows["speedup_low"] <= rows["speedup"]).all() and (rows["speedup"] <= rows["speedup_high"]).all()


@pytest.mark.parametrize("which", [BASELINE, "Pillow, image by image"])
def test_a_library_that_runs_out_of_memory_in_a_round_keeps_its_row_and_the_others_go_on(
    which, exact, test_set, monkeypatch
):
    def prepare(images, pipeline, device):
        calls = itertools.count()

        def work():
            if next(calls) == 2:  # the first is to check the output, the second the first round's
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore")
            return [pipeline(to_float(images))]

        return work

    changed = [dataclasses.replace(method, prepare=prepare) if method.name == which else method for method in LIBRARIES]
    monkeypatch.setattr(libraries, "LIBRARIES", tuple(changed))
    table = libraries_table(*study_libraries(exact, test_set.images[:50])).set_index("method")
    assert table.loc[which, "reason"] == "not measured: CUDA out of memory. Tried to allocate 20.00 GiB."
    assert math.isnan(table.loc[which, "seconds"])
    others = table.drop(which)
    assert (others["rounds"] == 9).all() and (others["reason"] == "").all()
    assert others["speedup"].isna().all() == (which == BASELINE)


def test_a_library_whose_output_changes_while_it_is_timed_has_no_time(exact, test_set, monkeypatch):
    def prepare(images, pipeline, device):
        calls = itertools.count()
        return lambda: [pipeline(to_float(images)) + 0.01 * (next(calls) > 4)]

    changed = [dataclasses.replace(each, prepare=prepare) if each.package == "PIL" else each for each in LIBRARIES]
    monkeypatch.setattr(libraries, "LIBRARIES", tuple(changed))
    table = libraries_table(*study_libraries(exact, test_set.images[:50])).set_index("method")
    said = "not measured: off the ground truth by 0 grey levels, after the rounds by 2.55"
    assert table.loc["Pillow, image by image", "reason"] == said
    assert (table.drop("Pillow, image by image")["reason"] == "").all()


def test_a_size_that_runs_out_of_memory_in_a_round_keeps_its_row_and_the_others_go_on(exact, test_set, monkeypatch):
    turn, calls = Workbench.turn, itertools.count()

    def fails(self, name):
        if name.startswith("batched") and next(calls) == 1:
            raise MemoryError
        return turn(self, name)

    monkeypatch.setattr(Workbench, "turn", fails)
    table = sizes_table(*study_sizes(exact, test_set.images[:50], sizes=[50])).set_index("method")
    assert table.loc["batched", "reason"] == "not measured: MemoryError"
    assert math.isnan(table.loc["batched", "seconds"]) and (table.drop("batched")["rounds"] == 9).all()


def test_a_library_that_is_not_installed_and_a_device_that_is_not_there_say_so(exact, test_set, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "kornia" else find(name))
    table = libraries_table(*study_libraries(exact, test_set.images[:20], devices=["cpu", "mps"]))
    said = table.set_index(["method", "device"])["reason"]
    assert said["Kornia, batches", "cpu"].startswith("not measured: kornia is not installed (pip install")
    assert said["torchvision v2, batches", "mps"] == "not measured: no MPS device"
    reasons = {library.method: library.reason for library in facts_of(table).libraries if library.reason}
    assert "kornia is not installed" in reasons["Kornia, batches"]


def test_the_verdict_follows_the_times():
    def table(ours: float, spread: float = 1.0) -> pd.DataFrame:
        """In each round the machine is slower, for all of them; ours is by turns `spread` times as slow or as fast."""
        rows = [(BASELINE, 1.0, 0.0), ("Pillow, image by image", 0.3, 1.5), (FAST, ours, 0.0)]
        facts = [{"method": name, "device": "cpu", "images": 1, "max_difference": d} for name, _, d in rows]
        rounds = [
            {"round": n, "attempt": 1, "method": name_of(name, "cpu"), "reason": ""}
            | {"seconds": n * s * (spread ** (-1) ** n if name == FAST else 1)}
            for n in range(1, 10) for name, s, _ in rows
        ]  # fmt: skip
        return libraries_table(pd.DataFrame(facts), pd.DataFrame(rounds))

    def rival(*options: float) -> Rival:
        (found,) = facts_of(table(*options)).rivals
        return found

    assert rival(0.1).library.method == "Pillow, image by image" and rival(0.1).library.ahead.median == pytest.approx(3)
    verdicts = {0.1: "faster", 0.6: "slower", 0.3: "equal"}
    assert {ours: rival(ours).library.ahead.verdict for ours in verdicts} == verdicts
    assert rival(0.25, 2.0).library.ahead.verdict == "open"
    assert [other.method for other in rival(0.1).different] == ["Pillow, image by image"] and not rival(0.1).own.differs
    learned = facts_of(table(0.1).replace({"max_difference": {0.0: 17.7}})).rivals[0].own
    assert learned.differs and learned.grey_levels == 17.7
    assert [library.speedup.median for library in facts_of(table(0.1)).libraries] == pytest.approx([1, 10 / 3, 10])


# Cost over size


def test_sizes_above_the_images_go_through_them_again(exact, test_set, monkeypatch):
    passed = []
    monkeypatch.setattr(Workbench, "turn", lambda self, name: passed.append((name, len(self.images))) or 1.0)
    monkeypatch.setattr(sizes, "LIMITS", {"sequential": 100, "reference": 150})
    facts, rounds = study_sizes(exact, test_set.images[:40], sizes=[100, 30, 200])
    assert list(facts.columns) == list(SIZE_COLUMNS) and list(rounds.columns) == ["size", *ROUND_COLUMNS]
    table = sizes_table(facts, rounds)
    assert table["images"].tolist() == [30] * 4 + [100] * 4 + [200] * 2  # rising; the slow methods up to their limits
    assert set(table[table["images"] == 200]["method"]) == {"batched", "fast"}
    assert table[table["images"] == 100]["seconds"].tolist() == [3.0] * 4  # 40, 40 and 20 images
    fast = [count for name, count in passed if name == "fast cpu 512"]
    assert fast == [30] * 9 + [40, 40, 20] * 9 + [40] * 5 * 9


def test_every_method_is_measured_for_every_size_and_no_size_twice(exact, test_set):
    saved = []
    done = study_sizes(exact, test_set.images, sizes=[100, 700], save=lambda *tables: saved.append(tables))
    table = sizes_table(*done)
    assert (table["reason"] == "").all() and (table["seconds"] > 0).all() and (table["rounds"] == 9).all()
    assert table["peak_mib"].min() > 100 and [len(facts) for facts, _ in saved] == [4, 8]
    again = study_sizes(exact, test_set.images, sizes=[100, 700], done=saved[0])
    assert again[1].head(len(saved[0][1])).equals(saved[0][1]) and len(again[0]) == 8


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can forget a process' largest memory")
def test_an_earlier_peak_is_forgotten():
    held = torch.ones(2**26)  # 256 MiB
    before = sizes._peak_mib()
    del held
    sizes._forget_peak()
    assert sizes._peak_mib() < before - 200


@pytest.mark.parametrize(("power", "growth"), [(1.0, "proportional"), (0.5, "less"), (2.0, "more")])
def test_growth_is_judged_by_its_power(power, growth):
    counts = [1_000, 10_000, 100_000]
    seconds = [(n / 1000) ** power / 10 for n in counts]
    table = pd.DataFrame(
        {"method": "fast", "images": counts, "seconds": seconds, "low": seconds, "high": seconds, "rounds": 9,
         "peak_mib": [100.0, 200.0, 300.0], "reason": ""}
    )  # fmt: skip
    found = facts_of(sizes=table)
    (size,) = found.sizes
    assert (size.growth, size.images) == (growth, 100_000) and size.power == pytest.approx(power)
    assert found.peak_mib == {1_000: 100.0, 10_000: 200.0, 100_000: 300.0}
