"""What a training owes to its random start: the same training from many seeds."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import pandas as pd
from tqdm import tqdm

from .checks import check_list
from .dataset import CustomDataset
from .errors import DataError, ParameterError
from .machine import resolve_device
from .normal_equations import least_squares_of
from .resized import ResizedImages
from .training import PRESETS, TrainConfig, Trainer, finish

PRESETS_STUDIED = ("paper", "precise")
# Single changes of the recipe, each to what `precise` has: which of them repairs it?
CHANGES = ("lr", "min_delta", "whiten")

SEED_COLUMNS = {
    "preset": "str",  # or one with a change: paper with lr
    "seed": "int",
    "red": "float",  # the restored weights
    "green": "float",
    "blue": "float",
    "weight_error": "amount",  # the largest difference of a weight from the least-squares optimum of the same split
    "val_mse": "amount",  # of the restored weights
    "best_epoch": "count",
    "epochs": "count",
    "no_gradient": "bool",
    "seconds": "amount",  # of all epochs; preparing the images, which all trainings share, is left out
}


def study_seeds(
    dataset: CustomDataset,
    *,
    presets: Sequence[str] = PRESETS_STUDIED,
    seeds: Sequence[int] = range(20),
    device: str = "cpu",
    done: pd.DataFrame | None = None,
    save: Callable[[pd.DataFrame], None] = lambda table: None,
) -> pd.DataFrame:
    """Train every preset from every seed: a row each, with the columns `SEED_COLUMNS`.

    With the preset `paper`, also once with each of its CHANGES, from the first seed. The images are resized once; a
    seed decides the split, the initial weights and the shuffling. After each training `save` gets all rows so far;
    given as `done` to another call, they are not made again.
    """
    check_seeds(presets, seeds)
    rows = [] if done is None else done.to_dict("records")
    known = {(row["preset"], row["seed"]) for row in rows}
    settings = list(itertools.product(presets, seeds))
    settings += [(changed_name(change), seeds[0]) for change in CHANGES if "paper" in presets]
    settings = [setting for setting in settings if setting not in known]
    for row in tqdm(_rows(dataset, settings, device), total=len(settings), desc="seeds", leave=False):
        rows.append(row)
        save(pd.DataFrame(rows))
    return pd.DataFrame(rows)


def changed_name(change: str) -> str:
    """What the column preset says of the recipe with one of CHANGES."""
    return f"paper with {change}"


def _config(preset: str, **options) -> TrainConfig:
    """The config of a preset, or of what `changed_name` gives."""
    name, _, change = preset.partition(" with ")
    if change:
        options |= {change: getattr(PRESETS["precise"], change)}
    return TrainConfig.from_preset(name, **options)


def check_seeds(presets: Sequence[str], seeds: Sequence[int]) -> None:
    """ParameterError unless `presets` are names of presets and `seeds` whole numbers, at least one of each."""
    if not isinstance(seeds, list | tuple | range) or not seeds:
        raise ParameterError(f"seeds: expected a list of whole numbers, or how many (from 1), got {seeds!r}")
    if not isinstance(presets, list | tuple) or not presets or any(preset not in list(PRESETS) for preset in presets):
        raise ParameterError(f"presets: expected a list of {', '.join(PRESETS)}, got {presets!r}")
    if len(set(presets)) < len(presets):
        raise ParameterError(f"presets: expected each once, got {presets!r}")
    check_list("seeds", seeds, 0)


def _rows(dataset: CustomDataset, settings: Sequence[tuple[str, int]], device: str) -> Iterator[dict]:
    """Train with each of the settings (preset, seed) in turn."""
    if not settings:
        return
    resized, optima = ResizedImages(dataset, resolve_device(device)), {}
    for preset, seed in settings:
        config = _config(preset, seed=seed, device=device)
        if seed not in optima:
            try:
                optima[seed] = least_squares_of(resized, val_fraction=config.val_fraction, seed=seed).weights
            except DataError:  # grey images, which the preset paper can train on
                optima[seed] = (math.nan,) * 3
        start = time.perf_counter()
        try:
            result = finish(Trainer(dataset, config, resized=resized))
        except DataError:  # grey images cannot be whitened, which is no change of the recipe then
            if preset in list(PRESETS):
                raise
            continue
        weights = result.model.weights
        yield {
            "preset": preset,
            "seed": seed,
            **dict(zip(("red", "green", "blue"), weights, strict=True)),
            "weight_error": max(abs(w - v) for w, v in zip(weights, optima[seed], strict=True)),
            "val_mse": result.best_val_mse,
            "best_epoch": result.best_epoch,
            "epochs": len(result.history),
            "no_gradient": result.no_gradient,
            "seconds": time.perf_counter() - start,
        }
