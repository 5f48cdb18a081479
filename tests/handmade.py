"""Runs written by hand through `stage`, in milliseconds: their numbers mean nothing."""

import itertools
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from transformnet_lib import CustomDataset, Pipeline, TrainConfig, run
from transformnet_lib.libraries import name_of
from transformnet_lib.stage_writer import StageWriter, stage
from transformnet_lib.workbench import Setting

PARAMETERS = {
    "train": {**asdict(TrainConfig(device="cpu")), "pipeline": Pipeline().to_dict()},
    "compare": {"indices": [3, 1]},
    "benchmark": {"rounds": 9},
    "seeds": {"seeds": [0], "presets": ["paper"]},
    "study": {"rounds": 9},
}
# Floats that few digits would not bring back: no finite binary fraction, the smallest there is, all 17 digits
FLOATS = (0.1, 5e-324, 0.1 + 0.2)
TEXT = 'a "b", c\nd'


class Killed(BaseException):
    """Nothing in the library catches it."""


def table(columns: dict[str, str]) -> pd.DataFrame:
    """Two rows of any values, with some missing in the second."""
    floats = itertools.cycle(FLOATS)
    rows = {"int": (1, 2), "count": (1, 2), "loss": (math.inf, 1e300), "bool": (True, False), "str": (TEXT, "")}
    return pd.DataFrame({name: rows.get(kind) or (next(floats), math.nan) for name, kind in columns.items()})


def rounds_of(method: str) -> pd.DataFrame:
    """Nine rounds of a method that took as many tenths of a second."""
    counted = {"cpu_seconds": 0.1, "switches": 1, "waiting_seconds": math.nan, "stolen_seconds": 0.0, "reason": ""}
    rows = [
        {"round": k, "attempt": 1, "method": method, "seconds": k * 0.1, "passes": 1} | counted for k in range(1, 10)
    ]
    return pd.DataFrame(rows, columns=list(run.ROUND_COLUMNS))


def write_files(writer: StageWriter, name: str, images: CustomDataset, weight: float) -> None:
    """What the stage `name` writes; `weight` tells one result from another."""
    if name == "train":
        writer.write_table("history.csv", table(run.HISTORY_COLUMNS))
        writer.write_tensors("weights.safetensors", {"mix.weight": torch.tensor([weight, 0, 1]).view(1, 3, 1, 1)})
        optimum = dict.fromkeys(("condition", "val_mse", "truth_val_mse", "seconds"), 0.5)
        optimum |= {"weights": (1.0, 2.0, 3.0), "images": 18}
        writer.results |= {"best_epoch": 2, "no_gradient": False, "setup_seconds": 0.5, "least_squares": optimum}
        writer.results["initial_weights"] = (0.1, 0.2, 0.3)
    elif name == "compare":
        targets = np.linspace(0, 1, 2 * 28 * 28, dtype=np.float32).reshape(2, 1, 28, 28)
        arrays = {"indices": np.array([3, 1]), "inputs": images.images[[3, 1]].numpy()}
        writer.write_arrays("examples.npz", **arrays, targets=targets, outputs=targets / 3)
        writer.results |= {"test_mse": 0.25, "max_error": weight}
    elif name == "benchmark":
        setting = Setting("sweep", "fast", "cpu", 16, 20)
        facts = {**asdict(setting), "threads": 2, "setup_seconds": 0.1, "mse": math.nan}
        writer.write_table("settings.csv", pd.DataFrame([facts], columns=list(run.SETTING_COLUMNS)))
        writer.write_table("rounds.csv", rounds_of(setting.name).assign(part="sweep")[["part", *run.ROUND_COLUMNS]])
        writer.results |= {"weights": (weight, 0.2, 0.3), "origin": "training"}
    elif name == "seeds":
        writer.write_table("seeds.csv", table(run.SEED_COLUMNS))
    else:
        facts = pd.DataFrame([{"method": "fast", "device": "cpu", "images": 10, "peak_mib": 0.1}])
        writer.write_table("sizes.csv", facts)
        writer.write_table("size_rounds.csv", rounds_of("fast").assign(size=10)[["size", *run.ROUND_COLUMNS]])
        facts = facts.drop(columns="peak_mib").assign(max_difference=0.1)
        writer.write_table("libraries.csv", facts)
        writer.write_table("library_rounds.csv", rounds_of(name_of("fast", "cpu")))


def do(path: Path, name: str, images: CustomDataset, *, force: bool = False, weight: float = 0.5, **changes) -> bool:
    """Do a stage, with changed parameters; whether there was anything to do."""
    device = torch.device("cpu")
    with stage(path, name, PARAMETERS[name] | changes, dataset=images, device=device, force=force) as writer:
        if writer:
            write_files(writer, name, images, weight)
    return writer is not None


def stop(path: Path, name: str, images: CustomDataset, *, force: bool = False, **changes) -> Path:
    """Begin a stage and be stopped at work; the folder that this was in."""
    options = {"dataset": images, "device": torch.device("cpu"), "force": force}
    with pytest.raises(Killed), stage(path, name, PARAMETERS[name] | changes, **options) as writer:
        writer.write("history.csv", b"half")
        raise Killed
    return writer.folder


def content(path: Path) -> dict[str, bytes | None]:
    """All that lies below `path`, but for the lock: the bytes of a file, None for a folder."""
    return {
        str(entry.relative_to(path)): entry.read_bytes() if entry.is_file() else None
        for entry in sorted(path.rglob("*"))
        if entry.name != ".lock"
    }
