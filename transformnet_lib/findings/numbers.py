"""The report's numbers by name, so that others can check them by program: the content of report.json."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from .. import paper
from ..comparison import metrics_table
from ..pipeline import GRAY_WEIGHTS
from ..records import Stage
from ..run import STUDY_TABLES, Run
from .abstract import answer
from .claims import claims
from .places import Place, disturbed, places, spoiled
from .speed import against, both_paths, effect, from_size, overlaps, waterfall, wins, workers, workers_verdict
from .studies import growth, quickest_libraries

FORMAT = 1  # of report.json; raised when a name changes its meaning


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
    if run.study:
        study = {name: getattr(run.study, name) for name in STUDY_TABLES}
        measured = study["sizes"][study["sizes"]["reason"] == ""]
        methods = {method: rows for method, rows in measured.groupby("method") if len(rows) > 1}
        found["study"] = study | {
            "growth": {method: growth(rows) for method, rows in methods.items()},
            "of_preset": {preset: _seeds(rows) for preset, rows in study["seeds"].groupby("preset")},
            "quickest_library": quickest_libraries(study["libraries"]),
        }
    return found


def _seeds(rows: pd.DataFrame) -> dict:
    """Median and range over a preset's seeds."""
    spread = {
        name: {"median": rows[name].median(), "least": rows[name].min(), "most": rows[name].max()}
        for name in ("weight_error", "val_mse", "best_epoch", "seconds")
    }
    return {"seeds": len(rows), "no_gradient": int(rows["no_gradient"].sum())} | spread


def _place(place: Place) -> dict:
    """One device of one run's benchmark: the rows that sentences name, and what they conclude."""
    ratios = both_paths(place)
    return {
        "run": place.run.label,
        "device": place.device,
        "pipeline": {method: place.baseline(method) for method in ("sequential", "batched")},
        "copy": place.copy,
        "fastest": {method: place.best(method) for method in place.methods},
        "other_settings_as_fast": {method: overlaps(place, method) for method in place.methods},
        "against_pipeline": {
            method: {rival: against(place, method, rival) for rival in ("sequential", "batched")}
            for method in place.methods
        },
        "fast_over_reference": {"least": ratios.min(), "median": ratios.median(), "most": ratios.max()},
        "wins_from_batch_size": {
            method: {rival: from_size(won) for rival, won in wins(place, method).items()} for method in place.methods
        },
        "effects": {
            method: {name: effect(place, method, name) for name in ("shuffle", "drop_last")} for method in place.methods
        },
        "num_workers": {"verdict": workers_verdict(place), "rows": workers(place)},
        "steps": waterfall(place),
        "rows": len(place.rows),
        "disturbed_rows": int(disturbed(place.rows).sum()),
        "spoiled": spoiled(place),
        "noisy_rows": int(place.rows["noisy"].sum()),
        "largest_load_average": place.rows["load_average"].max(),
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
