"""The run directory's optional stage `study`: many seeds, what others offer, and cost over size."""

import itertools
import math
from collections.abc import Sequence

import pandas as pd

from .dataset import CustomDataset
from .errors import ParameterError, RunError
from .machine import resolve_device
from .peers import PEER_COLUMNS, study_peers
from .runs import Run, describe_images
from .seeds import PRESETS_STUDIED, SEED_COLUMNS, check_seeds, study_seeds
from .sizes import SIZE_COLUMNS, SIZES, check_sizes, study_sizes
from .timing import read_times
from .training import PRESETS, load_config, load_model
from .untrusted import is_amount

SEEDS = tuple(range(20))
REPEATS = 5  # timed passes of each peer and size
TABLES = {"seeds.csv": SEED_COLUMNS, "peers.csv": PEER_COLUMNS, "sizes.csv": SIZE_COLUMNS}


def study_run(
    run: Run,
    train_set: CustomDataset,
    test_set: CustomDataset,
    *,
    seeds: int | Sequence[int] = SEEDS,
    presets: Sequence[str] = PRESETS_STUDIED,
    sizes: Sequence[int] = SIZES,
    repeats: int = REPEATS,
    force: bool = False,
) -> dict[str, pd.DataFrame]:
    """A run's `study` stage, on the device it was trained on: seeds.csv, peers.csv and sizes.csv; see `load_study`.

    `seeds` are the seeds, or how many: from 0 up. An interrupted study goes on after the last seed, or the last of the
    three tables.
    """
    seeds = range(seeds) if type(seeds) is int and seeds > 0 else seeds
    check_seeds(presets, seeds)  # before anything is discarded
    check_sizes(sizes)
    if type(repeats) is not int or repeats < 1:
        raise ParameterError(f"repeats: expected a whole number from 1, got {repeats!r}")
    device = resolve_device(load_config(run).device)
    parameters = {"seeds": list(seeds), "presets": list(presets), "sizes": list(sizes), "repeats": repeats}
    with run.stage("study", parameters, images=describe_images(train_set), device=device, force=force) as results:
        if results is not None:
            done = {name: _read(run, name) for name in TABLES if (run.path / name).exists()}
            study_seeds(
                train_set,
                presets=presets,
                seeds=seeds,
                device=str(device),
                done=done.get("seeds.csv"),
                save=lambda table: run.write_table("seeds.csv", table),
            )
            model = load_model(run)
            if "peers.csv" not in done:
                devices = list(dict.fromkeys(["cpu", str(device)]))
                run.write_table("peers.csv", study_peers(model, test_set.images, devices=devices, repeats=repeats))
            if "sizes.csv" not in done:
                table = study_sizes(model, test_set.images, device=str(device), sizes=sizes, repeats=repeats)
                run.write_table("sizes.csv", table)
            results["test_images"] = describe_images(test_set)  # of peers and sizes
    return load_study(run)


def load_study(run: Run) -> dict[str, pd.DataFrame]:
    """The tables of a run's complete `study` stage: seeds, peers, sizes."""
    parameters = run.stage_info("study")["parameters"]
    tables = {name.removesuffix(".csv"): _read(run, name) for name in TABLES}
    trained = set(zip(tables["seeds"]["preset"], tables["seeds"]["seed"], strict=True))
    try:
        lacking = set(itertools.product(parameters["presets"], parameters["seeds"])) - trained
    except (KeyError, TypeError) as error:
        raise RunError(f"{run.path}/run.json: parameters of study: expected lists of presets and seeds") from error
    if lacking:
        raise RunError(f"{run.path}/seeds.csv: lacks {len(lacking)} rows that the stage's parameters ask for")
    return tables


def _read(run: Run, name: str) -> pd.DataFrame:
    """One of the study's tables; RunError for rows that no study makes."""
    path = run.path / name
    table = read_times(run, name, TABLES[name]) if name != "seeds.csv" else run.read_table(name, TABLES[name])
    rows = {"seeds.csv": ["preset", "seed"], "peers.csv": ["name", "device"], "sizes.csv": ["way", "device", "images"]}
    if table.duplicated(rows[name]).any():
        raise RunError(f"{path}: has a row twice")
    if name != "seeds.csv":
        if (table["reason"] != "").all():
            raise RunError(f"{path}: has no time at all")
        return table
    if not table["preset"].isin(list(PRESETS)).all() or not table["best_epoch"].between(1, table["epochs"]).all():
        raise RunError(f"{path}: expected presets of ours, each with a best epoch among its epochs")
    amounts = table[["val_mse", "seconds"]].assign(weight_error=table["weight_error"].fillna(0))  # none of grey images
    if not amounts.map(is_amount).all(axis=None) or not table[["red", "green", "blue"]].map(math.isfinite).all(
        axis=None
    ):
        raise RunError(f"{path}: expected finite weights, and weight_error, val_mse and seconds from 0")
    return table
