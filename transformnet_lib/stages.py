"""The four stages of a run: each does its work into the run directory, in one form.

`<name>_stage(run_dir, …, force=False) -> Run`: the training and the stage, as they are then read. Parameters are
checked before anything is written. A stage that is complete is only read; one that was stopped goes on after its last
epoch, group of rows, seed or table.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .comparison import check_indices, compare
from .dataset import CustomDataset, check_pairs, split_indices
from .errors import DataError, Interrupted, ParameterError, RunError
from .libraries import LIBRARY_COLUMNS, study_libraries
from .machine import resolve_device
from .normal_equations import least_squares_of
from .records import ImageSet, damaged, read_tensors
from .run import Run, read_run
from .seeds import PRESETS_STUDIED, SEED_COLUMNS, check_seeds, study_seeds
from .sizes import SIZE_COLUMNS, SIZES, check_sizes, study_sizes
from .stage_writer import StageWriter, stage
from .timing import (
    BATCH_SIZES,
    BENCHMARK_COLUMNS,
    NUM_WORKERS,
    REPEATS,
    SMALL_BATCH_SIZES,
    benchmark,
    check_sweep,
)
from .training import HISTORY_COLUMNS, TrainConfig, Trainer, epochs

SEEDS = tuple(range(20))
CHECKPOINT = "checkpoint.safetensors"
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
            writer.results |= totals
    return read_run(run_dir, stages=["compare"])


def benchmark_stage(
    run_dir: str | Path,
    dataset: CustomDataset,
    *,
    devices: Sequence[str] = (),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    num_workers: Sequence[int] = NUM_WORKERS,
    repeats: int = REPEATS,
    small_batch_sizes: Sequence[int] = SMALL_BATCH_SIZES,
    force: bool = False,
) -> Run:
    """Time the run's model on `dataset`'s images; see `benchmark`.

    `devices` empty means the device that the run was trained on, and CUDA, whose rows say so where there is none.
    """
    sweep = {"batch_sizes": batch_sizes, "num_workers": num_workers, "small_batch_sizes": small_batch_sizes}
    check_sweep(**sweep, repeats=repeats)
    if not isinstance(devices, list | tuple):
        raise ParameterError(f"devices: expected a list of devices, got {devices!r}")
    run = read_run(run_dir, stages=["train"])
    size, trained_size = tuple(dataset.images.shape[-2:]), run.train.images.size
    if size != trained_size:
        raise DataError(
            f"{dataset.source}: images of {size[0]}×{size[1]} pixels; {run.path} was trained on "
            f"{trained_size[0]}×{trained_size[1]}"
        )
    devices = [str(resolve_device(device)) if device == "auto" else device for device in devices]
    devices = list(dict.fromkeys(devices or (run.train.config.device, "cuda")))
    for device in devices:
        if device != "cuda":  # whose absence the table states
            resolve_device(device)
    parameters = {"devices": devices, **{name: list(values) for name, values in sweep.items()}, "repeats": repeats}
    try:
        device = resolve_device(devices[0])
    except ParameterError:
        device = resolve_device("cpu")
    with stage(run_dir, "benchmark", parameters, dataset=dataset, device=device, force=force) as writer:
        if writer:
            done = writer.read_table("benchmark.csv", BENCHMARK_COLUMNS)
            benchmark(
                run.model,
                dataset.images,
                **parameters,
                done=done,
                save=lambda table: writer.write_table("benchmark.csv", table),
            )
    return read_run(run_dir, stages=["benchmark"])


def study_stage(
    run_dir: str | Path,
    train_set: CustomDataset,
    test_set: CustomDataset,
    *,
    seeds: int | Sequence[int] = SEEDS,
    presets: Sequence[str] = PRESETS_STUDIED,
    sizes: Sequence[int] = SIZES,
    repeats: int = REPEATS,
    force: bool = False,
) -> Run:
    """Many seeds, other libraries and cost over size, on the device of the training.

    `seeds` are the seeds, or how many: from 0 up.
    """
    seeds = range(seeds) if type(seeds) is int and seeds > 0 else seeds
    check_seeds(presets, seeds)
    check_sizes(sizes)
    if type(repeats) is not int or repeats < 1:
        raise ParameterError(f"repeats: expected a whole number from 1, got {repeats!r}")
    run = read_run(run_dir, stages=["train"])
    device, images = resolve_device(run.train.config.device), test_set.images
    parameters = {"seeds": list(seeds), "presets": list(presets), "sizes": list(sizes), "repeats": repeats}
    with stage(run_dir, "study", parameters, dataset=train_set, device=device, force=force) as writer:
        if writer:
            study_seeds(
                train_set,
                presets=presets,
                seeds=seeds,
                device=str(device),
                done=writer.read_table("seeds.csv", SEED_COLUMNS),
                save=lambda table: writer.write_table("seeds.csv", table),
            )
            if writer.read_table("libraries.csv", LIBRARY_COLUMNS) is None:
                devices = list(dict.fromkeys(["cpu", str(device)]))
                writer.write_table(
                    "libraries.csv", study_libraries(run.model, images, devices=devices, repeats=repeats)
                )
            if writer.read_table("sizes.csv", SIZE_COLUMNS) is None:
                table = study_sizes(run.model, images, device=str(device), sizes=sizes, repeats=repeats)
                writer.write_table("sizes.csv", table)
            writer.results["test_images"] = ImageSet.of(test_set).model_dump(mode="json")  # of libraries and sizes
    return read_run(run_dir, stages=["study"])
