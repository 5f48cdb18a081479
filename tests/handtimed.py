"""Benchmarks whose times are written by hand, so that what follows from them is known."""

from dataclasses import asdict

import numpy as np
import pandas as pd

from transformnet_lib.benchmarking import KNOWN, PARTS, SETTING_COLUMNS, Measurements, Plan
from transformnet_lib.measure import LEAST_ROUNDS, ROUND_COLUMNS, failure, stacked
from transformnet_lib.methods import METHODS, NETWORKS

SIZES = (16, 64, 256)
COUNT = 1024  # images: drop_last drops none
DRIFT = np.linspace(0.96, 1.04, LEAST_ROUNDS)  # of the machine: an interval of ±3 % of every time, and of no ratio
WIDE = 1 + np.array([-4, 3, -2, 1, 0, -1, 2, -3, 4]) / 20  # a method's own noise: an interval of ±15 %
REASON = "not measured: no time"
SWEEP = ("sweep", "small")  # the parts that most tests need

NETWORK = {"pipeline": 0.08, "eager": 0.16, "folded": 0.02}
LOADER = {"rows": 1.5, "batches": 1.0}
STORAGE = {"float32": 1.0, "uint8": 0.8}
SECONDS = {
    "sequential": 1.0, "batched": 0.1, "reference": 0.2, "fast": 0.02, "copy": 0.005, "graph": 0.02, "pinned": 0.02,
    "resize": 0.05, "convolution": 0.04, "grayscale": 0.01, "flips": 0.005,
    **{
        name: NETWORK[each.network] * LOADER[each.loader] * STORAGE[each.storage]
        for name, each in METHODS.items()
        if name.startswith(NETWORKS)
    },
}  # fmt: skip


def benchmark(*, devices=("cpu",), small=(), workers=(), others=(KNOWN,), parts=PARTS, **methods) -> Measurements:
    """Nine rounds of each part, in which a pass over COUNT images takes the seconds of its method (SECONDS).

    `methods` changes these: to a number, one per round, a text (why it failed), None (it is not there), or a function
    of the setting that gives one of these. The others are `Plan`'s.
    """
    plan, made = Plan(devices, SIZES, small, workers, others, COUNT), Measurements.none()
    for part in parts:
        settings, turns = [], []
        for setting in PARTS[part](plan, made):
            seconds = (SECONDS | methods)[setting.method]
            seconds = seconds(setting) if callable(seconds) else seconds
            if seconds is None:
                continue
            settings.append(asdict(setting) | {"threads": 2, "setup_seconds": 0.004, "mse": 1e-14})
            turn = failure(setting.name, RuntimeError())
            if isinstance(seconds, str):
                turns.append(turn | {"round": 0, "reason": seconds})
                continue
            turn |= {"passes": 1, "reason": ""}
            seconds = seconds * DRIFT * setting.images / COUNT
            turns += [turn | {"round": i, "seconds": each} for i, each in enumerate(seconds, 1)]
        made = Measurements(
            stacked(made.settings, pd.DataFrame(settings, columns=list(SETTING_COLUMNS))),
            stacked(made.rounds, pd.DataFrame(turns, columns=["part", *ROUND_COLUMNS]).assign(part=part, attempt=1)),
        )
    return made
