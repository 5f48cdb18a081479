"""What the study measures: many seeds, other libraries, cost over size."""

import dataclasses
import importlib.util
import itertools
import math
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from transformnet_lib import GRAY_WEIGHTS, CustomDataset, Pipeline, TransformNet, libraries, seeds, sizes
from transformnet_lib.findings import studies
from transformnet_lib.libraries import BASELINE, LIBRARIES, LIBRARY_COLUMNS, study_libraries
from transformnet_lib.pipeline import to_float
from transformnet_lib.sizes import SIZE_COLUMNS, study_sizes


@pytest.fixture
def exact() -> TransformNet:
    model = TransformNet()
    with torch.no_grad():
        model.mix.weight.copy_(torch.tensor(GRAY_WEIGHTS).view(1, 3, 1, 1))
    return model.eval()


def test_grey_images_have_no_optimum_to_be_compared_with(train_set):
    grey = CustomDataset(data="photos", train=True, limit=100)
    grey.images = grey.images[:, :1].expand(-1, 3, -1, -1).contiguous()
    grey.targets = grey.compute_targets()
    table = seeds.study_seeds(grey, presets=["paper"], seeds=[0])
    assert math.isnan(table["weight_error"].item()) and table["val_mse"].item() >= 0


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


def test_a_library_row_has_its_spread_speedup_and_difference(exact, test_set):
    table = study_libraries(exact, test_set.images, repeats=2)
    assert list(table.columns) == list(LIBRARY_COLUMNS)
    rows = table.set_index("method")
    assert rows.loc[BASELINE, ["speedup", "max_difference"]].tolist() == [1, 0]
    assert rows.loc["TransformNet, the fast way", "max_difference"] < 1e-3
    assert rows.loc["Pillow, image by image", "max_difference"] > 0.4  # it rounds to whole grey levels, twice
    assert math.isnan(rows.loc["copy: the bytes read and written once", "max_difference"])
    for _, row in rows[rows["reason"] == ""].iterrows():
        assert row["seconds"] == pytest.approx(np.mean(list(map(float, row["raw_seconds"].split()))))
        assert row["speedup"] == pytest.approx(rows.loc[BASELINE, "seconds"] / row["seconds"])


@pytest.mark.parametrize("which", [BASELINE, "Pillow, image by image"])
def test_a_library_that_runs_out_of_memory_in_a_later_repeat_keeps_its_row_and_the_others_go_on(
    which, exact, test_set, monkeypatch
):
    def prepare(images, pipeline, device):
        calls = itertools.count()

        def work():
            if next(calls) == 2:  # the first is to check the output, the second the first repeat
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore")
            return [pipeline(to_float(images))]

        return work

    changed = [dataclasses.replace(method, prepare=prepare) if method.name == which else method for method in LIBRARIES]
    monkeypatch.setattr(libraries, "LIBRARIES", tuple(changed))
    table = study_libraries(exact, test_set.images[:50], repeats=3).set_index("method")
    assert table.loc[which, "reason"] == "not measured: CUDA out of memory. Tried to allocate 20.00 GiB."
    assert math.isnan(table.loc[which, "seconds"]) and table.loc[which, "raw_seconds"] == ""
    others = table.drop(which)
    assert (others["repeats"] == 3).all() and (others["reason"] == "").all()
    assert others["speedup"].isna().all() == (which == BASELINE)


def test_a_size_that_runs_out_of_memory_in_a_later_repeat_keeps_its_row_and_the_others_go_on(
    exact, test_set, monkeypatch
):
    calls = itertools.count()

    def batched(*arguments, **options):
        if next(calls) == 1:
            raise MemoryError
        return 0.5

    monkeypatch.setattr(sizes, "batched_pass", batched)
    table = study_sizes(exact, test_set.images[:50], sizes=[50], repeats=3).set_index("method")
    assert table.loc["batched", "reason"] == "not measured: MemoryError"
    assert math.isnan(table.loc["batched", "seconds"])
    assert (table.drop("batched")["repeats"] == 3).all()


def test_a_library_that_is_not_installed_and_a_device_that_is_not_there_say_so(exact, test_set, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "kornia" else find(name))
    table = study_libraries(exact, test_set.images[:20], devices=["cpu", "mps"], repeats=1)
    said = table.set_index(["method", "device"])["reason"]
    assert said["Kornia, batches", "cpu"].startswith("not measured: kornia is not installed (pip install")
    assert said["torchvision v2, batches", "mps"] == "not measured: no MPS device"
    text = studies.libraries_text(table)
    assert "Kornia, batches" in text and "kornia is not installed" in text


def test_the_verdict_follows_the_times():
    def table(ours: float, repeats: int = 5) -> pd.DataFrame:
        rows = [(BASELINE, 1.0, 0.0), ("Pillow, image by image", 0.3, 1.5), ("TransformNet, the fast way", ours, 0.0)]
        return pd.DataFrame(
            [
                {"method": name, "device": "cpu", "seconds": s, "q1": s, "q3": s, "speedup": 1 / s, "max_difference": d,
                 "repeats": repeats, "reason": ""} for name, s, d in rows
            ]
        )  # fmt: skip

    assert "is 3× as fast as the quickest of the others, Pillow" in studies.libraries_text(table(0.1))
    assert "is slower (2× the time) than the quickest of the others, Pillow" in studies.libraries_text(table(0.6))
    assert "Not the same pictures, by more than one grey level somewhere: Pillow, image by image (1.5)" in (
        studies.libraries_text(table(0.1))
    )
    assert "is 3× as fast (too few repeats to judge) as the quickest of" in studies.libraries_text(
        table(0.1, repeats=2)
    )
    assert "Its pictures differ" not in studies.libraries_text(table(0.1))
    learned = table(0.1).replace({"max_difference": {0.0: 17.7}})
    assert "Its pictures differ by up to 17.7 grey levels" in studies.libraries_text(learned)
    assert studies.libraries_table(table(0.1))["speed-up"].tolist() == ["1×", "3.33×", "10×"]


def test_times_whose_quartiles_lie_far_apart_have_a_star():
    calm = {"method": "fast", "device": "cpu", "images": 10, "seconds": 1.0, "q1": 0.99, "q3": 1.01}
    table = pd.DataFrame([calm | {"speedup": 1.0, "max_difference": 0.0, "reason": ""}])
    for starred, spread in ((False, 0.01), (True, 0.06)):
        table["q1"], table["q3"] = 1 - spread, 1 + spread
        for shown in (studies.libraries_table(table), studies.sizes_table(table)):
            assert shown["time"].iloc[0].endswith("*") is starred


# Cost over size


def test_sizes_above_the_images_go_through_them_again(exact, test_set, monkeypatch):
    passed = []
    monkeypatch.setattr(
        sizes, "_prepare", lambda method, model, images, *_: (lambda: passed.append(len(images)) or 1.0, None)
    )
    monkeypatch.setattr(sizes, "SEQUENTIAL_LIMIT", 100)
    table = study_sizes(exact, test_set.images[:40], sizes=[100, 30, 200], repeats=2)
    assert list(table.columns) == list(SIZE_COLUMNS)
    assert table["images"].tolist() == [30] * 4 + [100] * 4 + [200] * 3  # rising; image by image only up to the limit
    assert "sequential" not in set(table[table["images"] == 200]["method"])
    assert table[table["images"] == 100]["seconds"].tolist() == [3.0] * 4  # 40, 40 and 20 images
    assert passed[: 4 * 2] == [30] * 8 and passed[8:11] == [40, 40, 20]


def test_every_way_is_measured_for_every_size(exact, test_set):
    table = study_sizes(exact, test_set.images, sizes=[100, 700], repeats=1)
    assert (table["reason"] == "").all() and (table["seconds"] > 0).all()
    assert table["peak_mib"].min() > 100


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can forget a process' largest memory")
def test_an_earlier_peak_is_forgotten():
    held = torch.ones(2**26)  # 256 MiB
    before = sizes._peak_mib()
    del held
    sizes._forget_peak()
    assert sizes._peak_mib() < before - 200


@pytest.mark.parametrize(
    ("power", "words"), [(1.0, "in proportion"), (0.5, "less than in proportion"), (2.0, "faster than that")]
)
def test_growth_is_put_into_words(power, words):
    counts = [1_000, 10_000, 100_000]
    seconds = [(n / 1000) ** power / 10 for n in counts]
    table = pd.DataFrame(
        {"method": "fast", "images": counts, "seconds": seconds, "q1": seconds, "q3": seconds,
         "peak_mib": [800.0, 801, 802], "reason": ""}
    )  # fmt: skip
    text = studies.sizes_text(table)
    assert f"time grows {words} for “model, the fast way”." in text
    assert "process was 800 MiB for 1,000 images, 801 MiB for 10,000 images and 802 MiB for 100,000 images." in text
    (row,) = studies.sizes_table(table).to_dict("records")
    assert (row["Way"], row["images"]) == ("model, the fast way", "100,000")
    assert row["µs an image"] == f"{10 * seconds[-1]:.3g}"
    assert row["time grows as images to the power"] == f"{power:.2f}"
