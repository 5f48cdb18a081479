"""The stages of a run: each does its work into the run directory, in one form.

`<name>_stage(run_dir, …, force=False) -> Run`: the training and the stage, as they are then read. Parameters are
checked before anything is written. A stage that is complete is only read; one that was stopped goes on after its last
epoch, round, seed or size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from .benchmarking import (
    BATCH_SIZES,
    NUM_WORKERS,
    SECONDS,
    SETTING_COLUMNS,
    SMALL_BATCH_SIZES,
    Measurements,
    benchmark,
    check_devices,
    check_sweep,
    check_weights,
)
from .comparison import check_indices, compare
from .dataset import CustomDataset, check_pairs, split_indices
from .errors import DataError, Interrupted, ParameterError, RunError
from .images import hashes
from .libraries import LIBRARY_COLUMNS, study_libraries
from .machine import resolve_device
from .measure import LEAST_ROUNDS, PRECISION, ROUND_COLUMNS, check_rounds
from .methods import MAX_MSE
from .model import TransformNet, weighted_model
from .normal_equations import least_squares_of
from .records import damaged, read_tensors
from .run import SIZE_TABLES, Run, read_run
from .seeds import PRESETS_STUDIED, SEED_COLUMNS, check_seeds, study_seeds
from .sizes import SIZES, check_sizes, study_sizes
from .stage_writer import StageWriter, stage
from .training import HISTORY_COLUMNS, TrainConfig, Trainer, epochs

SEEDS = 5  # of a report; a study takes more
STUDY_SEEDS = 20
CHECKPOINT = "checkpoint.safetensors"
IMAGES = "images.safetensors"  # hashes of the images trained on
TENSORBOARD = "tensorboard"  # a folder of event files


def train_stage(run_dir: str | Path, dataset: CustomDataset, config: TrainConfig, *, force: bool = False) -> Run:
    """Train on `dataset` (its training split): history, weights, a checkpoint an epoch and TensorBoard events.

    Raises what `train` does, and Interrupted for Ctrl-C.
    """
    device = resolve_device(config.device)
    split_indices(len(dataset), val_fraction=config.val_fraction)
    check_pairs(dataset)
    parameters = {**asdict(config), "device": str(device), "pipeline": dataset.pipeline.to_dict()}
    with stage(run_dir, "train", parameters, dataset=dataset, device=device, force=force) as writer:
        if writer:
            try:
                _train(_trainer(dataset, config, writer), writer)
            except KeyboardInterrupt:
                saved = (writer.folder / CHECKPOINT).exists()
                raise Interrupted(
                    f"interrupted: {'all epochs so far are' if saved else 'no epoch is yet'} saved in {writer.folder}; "
                    "run the same command or cell again to go on"
                ) from None
    return read_run(run_dir, stages=["train"])


def _trainer(dataset: CustomDataset, config: TrainConfig, writer: StageWriter) -> Trainer:
    """A trainer that goes on after the last epoch saved."""

    def loaded(path: Path) -> Trainer:
        trainer, state = Trainer(dataset, config), read_tensors(path)
        try:
            trainer.load_state_dict(state)
        except Exception as error:  # anything, by tensors that are not a trainer's
            raise damaged(path, error) from error
        return trainer

    return writer.earlier(CHECKPOINT, loaded) or Trainer(dataset, config)


def _train(trainer: Trainer, writer: StageWriter) -> None:
    """Run the epochs left, saving each.

    The checkpoint is the truth, written whole or not at all; the history and the weights are made from it at the end.
    TensorBoard's events come first: those of an epoch that has no checkpoint are purged on resuming, whereas missing
    ones would stay missing.
    """
    from torch.utils.tensorboard import SummaryWriter  # here, since only training needs it: 0.5 s

    try:
        with SummaryWriter(str(writer.folder / TENSORBOARD), purge_step=len(trainer.history) + 1) as events:
            for row in epochs(trainer):
                for name in list(HISTORY_COLUMNS)[1:]:
                    events.add_scalar(name, row[name], row["epoch"])
                events.flush()
                writer.write_tensors(CHECKPOINT, trainer.state_dict())
    except OSError as error:  # our own files' are RunErrors
        raise RunError(f"{writer.folder / TENSORBOARD}: cannot be written ({error.strerror})") from error
    result = trainer.result()
    writer.write_table("history.csv", result.history)
    writer.write_tensors("weights.safetensors", result.model.state_dict())
    writer.write_tensors(IMAGES, {"hashes": hashes(trainer.resized.dataset.images)})
    writer.results |= {
        "best_epoch": result.best_epoch,
        "no_gradient": result.no_gradient,
        "setup_seconds": result.setup_seconds,
        "initial_weights": list(result.initial_weights),
        "least_squares": _optimum(trainer),
    }


def _optimum(trainer: Trainer) -> dict | None:
    """The least-squares optimum of the same images; None where they do not determine it."""
    config = trainer.config
    try:
        return asdict(least_squares_of(trainer.resized, val_fraction=config.val_fraction, seed=config.seed))
    except DataError:  # grey images
        return None


def compare_stage(
    run_dir: str | Path, dataset: CustomDataset, indices: Sequence[int] = (), *, force: bool = False
) -> Run:
    """Compare model and ground truth on `dataset` (a test split), on the device of the training; see `compare`."""
    run = read_run(run_dir, stages=["train"])
    device = resolve_device(run.train.config.device)
    indices = check_indices(indices, len(dataset))
    with stage(run_dir, "compare", {"indices": indices}, dataset=dataset, device=device, force=force) as writer:
        if writer:
            examples, totals = compare(run.model, dataset, indices, device=str(device))
            writer.write_arrays("examples.npz", **examples)
            writer.results |= totals | {"in_training": _in_training(run, dataset)}
    return read_run(run_dir, stages=["compare"])


def _in_training(run: Run, dataset: CustomDataset) -> int | None:
    """How many images of `dataset` the run was trained on; None for a run that did not keep what tells."""
    path = run.path / "train" / IMAGES
    if not path.exists():
        return None
    trained = read_tensors(path).get("hashes", torch.empty(0))
    if trained.dtype != torch.int64:
        raise damaged(path, "expected hashes, int64")
    return int(torch.isin(hashes(dataset.images), trained).sum())


def benchmark_stage(
    run_dir: str | Path,
    dataset: CustomDataset,
    *,
    devices: Sequence[str] = (),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    small_batch_sizes: Sequence[int] = SMALL_BATCH_SIZES,
    num_workers: Sequence[int] = NUM_WORKERS,
    other_weights: Mapping[str, Sequence[float]] | None = None,
    rounds: int = LEAST_ROUNDS,
    seconds: float = SECONDS,
    precision: float = PRECISION,
    force: bool = False,
) -> Run:
    """Time a model on `dataset`'s images: the run's, or the one that `timed_weights` puts in its place; `benchmark`.

    `devices` empty means the device that the run was trained on, and CUDA, whose rows say so where there is none.
    """
    sweep = {"batch_sizes": batch_sizes, "num_workers": num_workers, "small_batch_sizes": small_batch_sizes}
    limits = {"rounds": rounds, "seconds": seconds, "precision": precision}
    check_sweep(**sweep, **limits)
    others = check_weights(other_weights or {})
    run = read_run(run_dir, stages=["train"])
    size, trained_size = tuple(dataset.images.shape[-2:]), run.train.images.size
    if size != trained_size:
        raise DataError(
            f"{dataset.source}: images of {size[0]}×{size[1]} pixels; {run.path} was trained on "
            f"{trained_size[0]}×{trained_size[1]}"
        )
    check_devices(devices)
    devices = [str(resolve_device(device)) if device == "auto" else device for device in devices]
    devices = list(dict.fromkeys(devices or (run.train.config.device, "cuda")))
    parameters = {"devices": devices, **{name: list(values) for name, values in sweep.items()}, **limits}
    parameters["other_weights"] = others
    try:
        device = resolve_device(devices[0])
    except ParameterError:
        device = resolve_device("cpu")
    with stage(run_dir, "benchmark", parameters, dataset=dataset, device=device, force=force) as writer:
        if writer:
            weights, origin = timed_weights(run)
            if origin != "training":  # the run's own take their turns too
                parameters["other_weights"] = {run.label: run.train.weights, **others}
            done = _measured(writer.read_table("rounds.csv", {"part": "str", **ROUND_COLUMNS}), writer)

            def save(measured: Measurements) -> None:
                writer.write_table("rounds.csv", measured.rounds)
                if len(measured.settings):  # of the parts that are complete
                    writer.write_table("settings.csv", measured.settings)

            benchmark(weighted_model(weights, run.pipeline), dataset.images, **parameters, done=done, save=save)
            writer.results |= {"weights": list(weights), "origin": origin}
    return read_run(run_dir, stages=["benchmark"])


def _measured(rounds: pd.DataFrame | None, writer: StageWriter) -> Measurements | None:
    """What an earlier sitting measured."""
    if rounds is None:
        return None
    settings = writer.read_table("settings.csv", SETTING_COLUMNS)
    return Measurements(Measurements.none().settings if settings is None else settings, rounds)


def timed_weights(run: Run) -> tuple[tuple[float, float, float], str]:
    """The weights of a run that are worth timing, and where they come from: its "training", or "least squares".

    Its own, if they were trained by `precise`. The recipe `paper` may stop anywhere, at weights that nobody would use;
    then, and where `precise` had too few steps, those of the least-squares optimum of the same images, unless the
    images do not determine it.
    """
    trained = run.train
    good = trained.config.preset == "precise" and trained.best_val_mse <= MAX_MSE
    if good or trained.least_squares is None:
        return trained.weights, "training"
    return trained.least_squares.weights, "least squares"


def seeds_stage(
    run_dir: str | Path,
    dataset: CustomDataset,
    *,
    seeds: int | Sequence[int] = SEEDS,
    presets: Sequence[str] = PRESETS_STUDIED,
    force: bool = False,
) -> Run:
    """Train each preset from many seeds on `dataset` (the run's training split), on the device of the training.

    `seeds` are the seeds, or how many: from 0 up. A complete stage with some of them is extended by the others.
    """
    seeds = list(range(seeds)) if type(seeds) is int and seeds > 0 else seeds
    check_seeds(presets, seeds)
    run = read_run(run_dir, stages=["seeds"])
    device, done = resolve_device(run.train.config.device), None
    parameters = {"seeds": list(seeds), "presets": list(presets)}
    same_images = run.seeds and run.seeds.images.fingerprint == dataset.fingerprint
    if same_images and not force and run.seeds.parameters["presets"] == parameters["presets"]:
        there = run.seeds.parameters["seeds"]
        if set(seeds) <= set(there):
            parameters["seeds"] = there
        elif set(there) < set(seeds):
            force, done = True, run.seeds.table
    with stage(run_dir, "seeds", parameters, dataset=dataset, device=device, force=force) as writer:
        if writer:
            saved = writer.read_table("seeds.csv", SEED_COLUMNS)
            study_seeds(
                dataset,
                presets=presets,
                seeds=seeds,
                device=str(device),
                done=done if saved is None else saved,
                save=lambda table: writer.write_table("seeds.csv", table),
            )
    return read_run(run_dir, stages=["seeds"])


def study_stage(
    run_dir: str | Path,
    dataset: CustomDataset,
    *,
    sizes: Sequence[int] = SIZES,
    rounds: int = LEAST_ROUNDS,
    force: bool = False,
) -> Run:
    """Measure other libraries and cost over size on `dataset`'s images, on the device of the training."""
    check_sizes(sizes)
    check_rounds(rounds, 0, 0)
    run = read_run(run_dir, stages=["train"])
    device, images = resolve_device(run.train.config.device), dataset.images
    model = weighted_model(timed_weights(run)[0], run.pipeline)
    with stage(
        run_dir, "study", {"sizes": list(sizes), "rounds": rounds}, dataset=dataset, device=device, force=force
    ) as writer:
        if writer:
            _study(writer, model, images, str(device), sizes, rounds)
    return read_run(run_dir, stages=["study"])


def _study(
    writer: StageWriter, model: TransformNet, images: Tensor, device: str, sizes: Sequence[int], least: int
) -> None:
    """Measure what is not yet measured: the libraries, then size after size."""
    if writer.read_table("libraries.csv", LIBRARY_COLUMNS) is None:
        facts, _ = study_libraries(
            model,
            images,
            devices=list(dict.fromkeys(["cpu", device])),
            least=least,
            done=writer.read_table("library_rounds.csv", ROUND_COLUMNS),
            save=lambda table: writer.write_table("library_rounds.csv", table),
        )
        writer.write_table("libraries.csv", facts)

    def save(facts: pd.DataFrame, table: pd.DataFrame) -> None:
        writer.write_table("size_rounds.csv", table)
        writer.write_table("sizes.csv", facts)

    facts, table = (writer.read_table(name, columns) for name, columns in SIZE_TABLES.items())
    if facts is not None and table is not None:
        table = table[table["size"].isin(facts["images"])]
    done = None if facts is None or table is None else (facts, table)
    study_sizes(model, images, device=device, sizes=sizes, least=least, done=done, save=save)
