"""What a training owes to its random start: the same training from many seeds, and a run's seeds.csv."""

import itertools
import time
from collections.abc import Iterator, Sequence

import pandas as pd

from .data import CustomDataset
from .errors import ParameterError
from .machine import resolve_device
from .optimum import least_squares_of
from .prepared import Prepared
from .runs import Run, describe_images
from .training import PRESETS, TrainConfig, Trainer, check_whole, finish

SEED_COLUMNS = {
    "preset": "str",
    "seed": "int",
    "red": "float",  # the restored weights
    "green": "float",
    "blue": "float",
    "weight_error": "float",  # the largest difference of a weight from the least-squares optimum of the same split
    "val_mse": "float",  # of the restored weights
    "best_epoch": "int",
    "epochs": "int",
    "dead": "bool",
    "seconds": "float",  # of all epochs; preparing the images, which all trainings share, is left out
}


def study_seeds(
    dataset: CustomDataset,
    *,
    presets: Sequence[str] = ("paper", "precise"),
    seeds: Sequence[int] = range(20),
    device: str = "cpu",
) -> pd.DataFrame:
    """Train every preset from every seed: a row each, with the columns `SEED_COLUMNS`.

    The images are prepared once; a seed decides the split, the initial weights and the shuffling.
    """
    return pd.DataFrame(_rows(dataset, _settings(presets, seeds), device))


def study_run(
    run: Run,
    dataset: CustomDataset,
    *,
    presets: Sequence[str] = ("paper", "precise"),
    seeds: Sequence[int] = range(20),
    device: str = "cpu",
    force: bool = False,
) -> pd.DataFrame:
    """A run's `study` stage: `study_seeds` into seeds.csv, where an interrupted study goes on after its last row."""
    settings = _settings(presets, seeds)
    where = resolve_device(device)
    parameters = {"presets": list(presets), "seeds": list(seeds), "device": str(where)}
    with run.stage("study", parameters, images=describe_images(dataset), device=where, force=force) as results:
        if results is not None:
            begun = (run.path / "seeds.csv").exists()
            done = run.read_table("seeds.csv", SEED_COLUMNS).to_dict("records") if begun else []
            left = [each for each in settings if each not in {(row["preset"], row["seed"]) for row in done}]
            for row in _rows(dataset, left, device):
                done.append(row)
                run.write_table("seeds.csv", pd.DataFrame(done))
    return load_seeds(run)


def load_seeds(run: Run) -> pd.DataFrame:
    """The rows of a run's complete `study` stage, as from `study_seeds`."""
    run.require("study")
    return run.read_table("seeds.csv", SEED_COLUMNS)


def _settings(presets: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    if not isinstance(seeds, list | tuple | range) or not seeds:
        raise ParameterError(f"seeds: expected a list of whole numbers, got {seeds!r}")
    if not isinstance(presets, list | tuple) or not presets or any(preset not in list(PRESETS) for preset in presets):
        raise ParameterError(f"presets: expected a list of {', '.join(PRESETS)}, got {presets!r}")
    for seed in seeds:
        check_whole("seeds", seed, 0)
    return list(itertools.product(presets, seeds))


def _rows(dataset: CustomDataset, settings: Sequence[tuple[str, int]], device: str) -> Iterator[dict]:
    """Train with each of the settings (preset, seed) in turn."""
    if not settings:
        return
    prepared, optima = Prepared(dataset, resolve_device(device)), {}
    for preset, seed in settings:
        config = TrainConfig.from_preset(preset, seed=seed, device=device)
        if seed not in optima:
            optima[seed] = least_squares_of(prepared, val_fraction=config.val_fraction, seed=seed).weights
        start = time.perf_counter()
        result = finish(Trainer(dataset, config, prepared=prepared))
        weights = result.model.weights
        yield {
            "preset": preset,
            "seed": seed,
            **dict(zip(("red", "green", "blue"), weights, strict=True)),
            "weight_error": max(abs(w - v) for w, v in zip(weights, optima[seed], strict=True)),
            "val_mse": result.best_val_mse,
            "best_epoch": result.best_epoch,
            "epochs": len(result.history),
            "dead": result.dead,
            "seconds": time.perf_counter() - start,
        }
