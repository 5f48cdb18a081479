"""The report's numbers by name, so that others can check them by program: the content of report.json."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from .. import paper
from ..benchmarking import PARTS
from ..comparison import metrics_table
from ..measure import Estimate, verdict
from ..pipeline import GRAY_WEIGHTS
from ..records import Stage
from ..run import Run
from .abstract import answer
from .claims import claims
from .places import Place, places
from .speed import RIVALS, from_size, workers_verdict
from .studies import growth, quickest_libraries

FORMAT = 2  # of report.json; raised when a name changes its meaning


def report_numbers(runs: Sequence[Run]) -> dict:
    """All that a report on `runs` says in numbers, as JSON values: seconds, images, MSE of pixels in [0, 1].

    A number that does not exist, as a ratio to something not measured, is None.
    """
    return _plain(
        {
            "format": FORMAT,
            "answer": answer(runs),
            "ground_truth_weights": GRAY_WEIGHTS,
            "paper": {
                "source": paper.SOURCE,
                "images": paper.IMAGES,
                "sequential_seconds": paper.SEQUENTIAL_SECONDS,
                "table1": paper.table1(),
            },
            "claims": [vars(claim) | {"verdict": claim.verdict} for claim in claims(runs)],
            "runs": {run.label: _run(run) for run in runs},
            "places": {place.title: _place(place) for place in places(runs)},
        }
    )


def _run(run: Run) -> dict:
    """One run: what it was made with, and what each of its stages found."""
    trained, optimum = run.train, run.train.least_squares
    found = {
        "shipped": run.shipped,
        "stages": {
            name: stage.model_dump(mode="json", include=set(Stage.model_fields)) for name, stage in run.stages.items()
        },
        "train": {
            "preset": run.train.config.preset,
            "weights": trained.weights,
            "initial_weights": trained.initial_weights,
            "largest_weight_error": float(np.abs(np.subtract(trained.weights, GRAY_WEIGHTS)).max()),
            "no_gradient": trained.no_gradient,
            "epochs": len(trained.history),
            "best_epoch": trained.best_epoch,
            "best_val_mse": trained.best_val_mse,
            "lowest_val_mse": float(trained.history["val_mse"].min()),
            "seconds": float(trained.history["epoch_seconds"].sum()),
            "history": trained.history,
        },
        "least_squares": vars(optimum) if optimum else None,
    }
    if run.compare:
        results = run.compare
        found["compare"] = {
            "test_mse": results.test_mse,
            "largest_pixel_error": results.max_error,
            "examples": metrics_table(run.compare.examples),
        }
    if run.benchmark:
        found["benchmark"] = run.benchmark.table
    if run.seeds:
        of_preset = {preset: _seeds(rows) for preset, rows in run.seeds.table.groupby("preset")}
        found["seeds"] = {"table": run.seeds.table, "of_preset": of_preset}
    if run.study:
        sizes = run.study.sizes
        methods = {method: rows for method, rows in sizes[sizes["reason"] == ""].groupby("method") if len(rows) > 1}
        found["study"] = {
            "libraries": run.study.libraries,
            "sizes": sizes,
            "growth": {method: growth(rows) for method, rows in methods.items()},
            "quickest_library": {
                device: {"method": name, **_ratio(ratio)}
                for device, (name, ratio) in quickest_libraries(run.study.libraries).items()
            },
        }
    return found


def _seeds(rows: pd.DataFrame) -> dict:
    """Median and range over a preset's seeds."""
    spread = {
        name: {"median": rows[name].median(), "least": rows[name].min(), "most": rows[name].max()}
        for name in ("weight_error", "val_mse", "best_epoch", "seconds")
    }
    return {"seeds": len(rows), "no_gradient": int(rows["no_gradient"].sum())} | spread


def _ratio(ratio: Estimate | None) -> dict | None:
    """A ratio of speeds with its interval and what that shows."""
    return ratio and {**vars(ratio), "precision": ratio.precision, "verdict": verdict(ratio)}


def _against(place: Place, method: str, part: str) -> dict:
    """A method against both ways to run the pipeline."""
    return {name: _ratio(place.against(method, rival, part)) for rival, name in RIVALS.items()}


def _place(place: Place) -> dict:
    """One device of one run's benchmark: the rows that sentences name, and what they conclude."""
    won = {method: place.wins(method) for method in place.methods}
    methods, parts = ("sequential", "batched", *place.methods, "copy"), ("best", "one thread")
    return {
        "run": place.run.label,
        "device": place.device,
        "weights": {"origin": place.run.benchmark.origin, "values": place.run.benchmark.weights},
        "best": {part: {method: place.best(method, part) for method in methods} for part in parts},
        "other_settings_as_fast": {method: place.as_fast_as_best(method) for method in place.methods},
        "against_pipeline": {
            part: {method: _against(place, method, part) for method in place.methods} for part in parts
        },
        "fast_over_reference": _ratio(place.over_reference()),
        "wins_from_batch_size": {
            method: {rival: from_size(table[rival]) for rival in table} for method, table in won.items()
        },
        "time_with_over_without": {
            method: {name: _ratio(place.effect(method, name)) for name in ("shuffle", "drop_last")}
            for method in place.methods
        },
        "larger_batches": {method: _ratio(place.larger_batches(method)) for method in place.methods},
        "num_workers": {
            "verdict": workers_verdict(place),
            "as_fast_as_none": {count: _ratio(ratio) for count, (_, ratio) in place.workers().items()},
        },
        "factors": place.factors(),
        "convolution_over_weighted_sum": _ratio(place.convolution_cost()),
        "images_that_pay_back_set_up": {name: place.paid_back(rival) for rival, name in RIVALS.items()},
        "precision": place.precision,
        "rounds": {part: place.measured.disturbed(part) for part in PARTS},
    }


def _plain(value: object) -> object:
    """`value` as JSON can hold it: tables as lists of rows, and no NaN or infinity."""
    if isinstance(value, pd.DataFrame):
        return [_plain(row) for row in value.to_dict("records")]
    if isinstance(value, pd.Series):
        return _plain(value.to_dict())
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value
