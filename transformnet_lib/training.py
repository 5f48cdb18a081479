"""Training TransformNet: configuration and presets, early stopping, the loop, and the run directory's `train` stage.

The geometry (resize and flips) has nothing to learn, so it is applied to every image once, before the first epoch, and
the loop sees only what it leaves (`prepared.py`). The gradient of three weights is written out. Both give the same
losses as a loop over the whole module with autograd, many times faster.
"""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from .dataset import CustomDataset, check_pairs, split_indices
from .errors import DataError, Interrupted, ParameterError, RunError, TrainingError
from .machine import resolve_device, synchronize
from .model import TransformNet, seeded_model
from .optimum import LeastSquares, condition_number, least_squares_of
from .prepared import Prepared
from .runs import HISTORY_COLUMNS, Run, check_plain, describe_images, differences
from .untrusted import is_amount

FLOAT32_MAX = torch.finfo(torch.float32).max
CHECKPOINT_FORMAT = 2  # raised when a checkpoint of the old one could not be gone on with


def check_whole(name: str, value: int, least: int) -> None:
    """ParameterError unless `value` is a whole number from `least` to 2**63 - 1."""
    if type(value) is not int or not least <= value < 2**63:
        raise ParameterError(f"{name}: expected a whole number from {least}, below 2**63, got {value!r}")


def check_number(name: str, value: float) -> None:
    """ParameterError unless `value` is a number from 0 that float32 can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= FLOAT32_MAX:
        raise ParameterError(f"{name}: expected a number from 0, below {FLOAT32_MAX:.1e}, got {value!r}")


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the preset `paper`, our reading of the paper's recipe; see `PRESETS`."""

    preset: str = "paper"  # only a name; `from_preset` fills the fields
    device: str = "auto"  # cpu, cuda, cuda:N, mps or auto
    seed: int = 0  # of the split, the initial weights and the shuffling
    epochs: int = 30  # at most
    batch_size: int = 256  # images
    lr: float = 2e-3  # AdamW's learning rate
    weight_decay: float = 0.01  # AdamW's; PyTorch's default, since the paper names none
    min_delta: float = 1e-4  # MSE; an improvement is at least this much
    patience: int = 4  # epochs without improvement before stopping
    val_fraction: float = 0.1  # of the training images
    clamp: bool = True  # whether the training loss sees clamped outputs; validation always does
    whiten: bool = False  # whether the optimiser works in decorrelated colour coordinates
    decay_steps: int | None = None  # the learning rate falls to 0 over so many steps (half a cosine); None: constant

    def __post_init__(self):
        for name in ("preset", "device"):
            if type(getattr(self, name)) is not str:
                raise ParameterError(f"{name}: expected a name, got {getattr(self, name)!r}")
        for name, least in {"seed": 0, "epochs": 1, "batch_size": 1, "patience": 0}.items():
            check_whole(name, getattr(self, name), least)
        if self.decay_steps is not None:
            check_whole("decay_steps", self.decay_steps, 1)
        for name in ("lr", "weight_decay", "min_delta", "val_fraction"):
            check_number(name, getattr(self, name))
        if not torch.tensor(float(self.lr)) > 0:  # as the optimiser gets it, in float32
            raise ParameterError(f"lr: expected a number above 0, got {self.lr!r}")
        if not 0 < self.val_fraction < 1:
            raise ParameterError(f"val_fraction: expected a number between 0 and 1, got {self.val_fraction!r}")
        for name in ("clamp", "whiten"):
            if type(getattr(self, name)) is not bool:
                raise ParameterError(f"{name}: expected True or False, got {getattr(self, name)!r}")

    @classmethod
    def from_preset(cls, preset: str, **changes) -> "TrainConfig":
        """The preset's values; a change of None keeps the preset's.

        >>> TrainConfig.from_preset("paper", epochs=None, seed=3) == TrainConfig(seed=3)
        True
        """
        if preset not in list(PRESETS):
            raise ParameterError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
        return replace(PRESETS[preset], **{name: value for name, value in changes.items() if value is not None})


PRESETS = {
    # What the paper states, and PyTorch's defaults where it is silent. Kept with its faults.
    "paper": TrainConfig(),
    # Reaches the least-squares optimum. `whiten` makes the loss equally steep in every direction, where red, green and
    # blue are so alike that plain steps creep; without clamping no start is dead; without weight decay the optimum is
    # that of the MSE; the decay to 0 lets the last steps settle.
    "precise": TrainConfig(
        preset="precise",
        lr=0.1,
        weight_decay=0.0,
        min_delta=0.0,
        clamp=False,
        whiten=True,
        decay_steps=350,
    ),
}


class EarlyStopping:
    """Stop after `patience` epochs in a row without an improvement of at least `min_delta` (MSE).

    A tie is not an improvement, nor is NaN. With `patience` 0 or 1 the first miss stops. Raises ParameterError for a
    negative or not finite `min_delta` and a negative or broken `patience`.
    """

    def __init__(self, min_delta: float = 1e-4, patience: int = 4):
        check_number("min_delta", min_delta)
        check_whole("patience", patience, 0)
        self.min_delta, self.patience = min_delta, patience
        self.best, self.misses = math.inf, 0

    def improved(self, loss: float) -> bool:
        """Record one epoch's loss and say whether it is the best so far by at least `min_delta`."""
        if loss < self.best and self.best - loss >= self.min_delta:  # NaN is never an improvement
            self.best, self.misses = loss, 0
            return True
        self.misses += 1
        return False

    @property
    def should_stop(self) -> bool:
        return self.misses >= max(1, self.patience)


class Trainer:
    """One training, an epoch at a time: `while not trainer.finished: trainer.run_epoch()`.

    `history` has a dict an epoch (see `Run.history`); `best_weights` is the best state_dict; `dead` says whether no
    epoch had a gradient though there was an error, since all outputs lay where the clamp is flat. `epoch_seconds`
    covers the training and the validation pass; `setup_seconds` what was done once before.

    Trainings that differ in their config alone may share one `prepared`.
    """

    def __init__(self, dataset: CustomDataset, config: TrainConfig, *, prepared: Prepared | None = None):
        start = time.perf_counter()
        self.config = config
        self.device = resolve_device(config.device)
        self.stopping = EarlyStopping(config.min_delta, config.patience)
        self.history: list[dict] = []
        self.steps = 0  # taken by the optimiser so far
        self.best_weights: dict[str, Tensor] | None = None
        self.best_epoch = 0
        self.dead = False
        self.generator = torch.Generator().manual_seed(config.seed)  # of the shuffling alone; on the CPU everywhere

        self.prepared = prepared or Prepared(dataset, self.device)
        self.pipeline = dataset.pipeline
        self.train, self.val = split_indices(len(dataset), val_fraction=config.val_fraction, seed=config.seed)
        # The optimiser moves v; the weights are w = basis v. For `paper` the two are the same. Whitened, basis = L⁻ᵀ
        # with L Lᵀ = E[x xᵀ] over the colours x: then the loss is |v - v*|² plus a constant, whatever the images,
        # equally steep in all directions. That in float64, since L⁻ᵀ magnifies rounding by up to 30.
        exact = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no other
        weights = seeded_model(config.seed, self.pipeline).mix.weight.detach().flatten()
        basis, trained = torch.eye(3), weights
        if config.whiten:
            colours = self.prepared.moments(self.train)[:3, :3]
            condition_number(colours)  # refuses grey images
            factor = torch.linalg.cholesky(colours)
            basis, trained = torch.linalg.inv(factor).mT.to(exact), (factor.mT @ weights.double()).to(exact)
        self.basis, self.trained = basis.to(self.device), trained.to(self.device)
        self.trained.grad = torch.zeros_like(self.trained)
        self.initial_weights = tuple(self.weights().tolist())
        self.optimizer = torch.optim.AdamW(
            [self.trained],
            lr=torch.tensor(config.lr, device=self.device),  # a tensor, so that a CUDA graph sees it change
            weight_decay=config.weight_decay,
            fused=True,
            capturable=self.device.type == "cuda",
        )
        steps = math.ceil(len(self.train) / config.batch_size)
        # While the learning rate still falls, an epoch without improvement is no reason to stop.
        self.horizon = min(config.decay_steps, steps * config.epochs) if config.decay_steps else None

        self.batch_size = min(config.batch_size, len(self.train))
        values = self.batch_size * self.prepared.pixels
        self.x, self.buffers = torch.empty(3 * values, device=self.device), torch.empty(3, values, device=self.device)
        self.sums = torch.zeros(3, dtype=exact, device=self.device)  # over an epoch
        self.train_sum, self.val_sum, self.slope = self.sums  # squared errors of both splits; absolute gradients
        self.batch = torch.empty(self.batch_size, dtype=torch.int64, device=self.device)  # what the graph reads
        self.graph = None  # of one step, on CUDA
        synchronize(self.device)
        self.setup_seconds = time.perf_counter() - start

    def weights(self) -> Tensor:
        """The three weights, float32, on the device."""
        return (self.basis @ self.trained).float()

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The model on a batch's images, of m pixels: colours `(3, m)`, outputs before and after the clamp, targets.

        An output is wᵀx for a pixel's colours x, the same sum as the 1×1 convolution. All four are buffers.
        """
        m = len(batch) * self.prepared.pixels
        x, outputs, clamped, targets = self.x[: 3 * m].view(3, m), *self.buffers[:, :m]
        self.prepared.gather(batch, x, targets)
        torch.mv(x.mT, self.weights(), out=outputs)
        torch.clamp(outputs, 0, 1, out=clamped)
        return x, outputs, clamped, targets

    def step(self, batch: Tensor) -> None:
        """One step of AdamW on the images at `batch`, everything on the device: this is what a CUDA graph records.

        The loss is the mean of e², e = output - target. In w its gradient is the mean of 2 e x over the pixels, where
        a clipped pixel counts 0; in v it is basisᵀ times that.
        """
        x, outputs, clamped, targets = self.forward(batch)
        errors = torch.sub(clamped if self.config.clamp else outputs, targets, out=targets)
        self.train_sum += torch.dot(errors, errors)
        if self.config.clamp:
            errors *= torch.eq(outputs, clamped, out=outputs)  # 1.0 where nothing was clipped, else 0.0
        gradient = torch.mv(x, errors) * (2 / len(errors))
        self.slope += gradient.abs().sum()
        self.trained.grad.copy_(self.basis.mT @ gradient.to(self.basis.dtype))
        self.optimizer.step()

    def run_epoch(self) -> dict:
        """Train on every training image once, validate, and return the epoch's row of the history."""
        start = time.perf_counter()
        self.sums.zero_()
        order = self.train[torch.randperm(len(self.train), generator=self.generator)]
        for batch in order.to(self.prepared.index_device).split(self.batch_size):
            self.optimizer.param_groups[0]["lr"].fill_(self.learning_rate)
            self.step(batch) if self.device.type != "cuda" else self.step_as_graph(batch)
            self.steps += 1
        for batch in self.val.to(self.prepared.index_device).split(self.batch_size):
            _, _, clamped, targets = self.forward(batch)
            errors = torch.sub(clamped, targets, out=targets)
            self.val_sum += torch.dot(errors, errors)
        train_sum, val_sum, slope = self.sums.tolist()  # the one time that the device is waited for

        row = {
            "epoch": len(self.history) + 1,
            "train_mse": train_sum / (len(self.train) * self.prepared.pixels),
            "val_mse": val_sum / (len(self.val) * self.prepared.pixels),
            "epoch_seconds": time.perf_counter() - start,
        }
        weights = self.weights().cpu()
        self.history.append(row | dict(zip(("red", "green", "blue"), weights.tolist(), strict=True)))
        self.dead = (self.dead or row["epoch"] == 1) and row["train_mse"] > 0 and slope == 0
        if self.stopping.improved(row["val_mse"]):
            self.best_weights, self.best_epoch = {"mix.weight": weights.view(1, 3, 1, 1)}, row["epoch"]
        return self.history[-1]

    def step_as_graph(self, batch: Tensor) -> None:
        """`step`, on CUDA: full batches replay one recorded step, a single launch instead of twenty.

        The first one runs as it is, since the optimiser's state and cuBLAS's workspace must exist before a recording
        (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs); recording a step does not run it. What a
        graph cannot hold runs as it is too: the smaller last batch, and images that come from the CPU.
        """
        if len(batch) < self.batch_size or not self.prepared.kept:
            self.step(batch)
            return
        self.batch.copy_(batch)
        if self.graph is not None:
            self.graph.replay()
            return
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.step(self.batch)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step(self.batch)

    @property
    def finished(self) -> bool:
        settled = self.horizon is None or self.steps >= self.horizon
        return (settled and self.stopping.should_stop) or len(self.history) >= self.config.epochs

    @property
    def learning_rate(self) -> float:
        """Of the next step: constant, or half a cosine from `config.lr` down to 0 at step `horizon`."""
        if self.horizon is None:
            return self.config.lr
        return self.config.lr * (1 + math.cos(math.pi * min(self.steps / self.horizon, 1))) / 2

    def state_dict(self) -> dict:
        """All that is needed to go on as if never stopped."""
        return {
            "trained": self.trained,
            "basis": self.basis,
            "optimizer": self.optimizer.state_dict()["state"],
            "steps": self.steps,
            "generator": self.generator.get_state(),
            "stopping": {"best": self.stopping.best, "misses": self.stopping.misses},
            "history": torch.tensor([list(row.values()) for row in self.history], dtype=torch.float64),
            "best_weights": self.best_weights,
            "best_epoch": self.best_epoch,
            "dead": self.dead,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict()`'s answer."""
        self.trained.copy_(state["trained"])
        self.basis.copy_(state["basis"])
        groups = self.optimizer.state_dict()["param_groups"]  # as they are: the learning rate follows from `steps`
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        self.generator.set_state(state["generator"])
        self.stopping.best, self.stopping.misses = state["stopping"]["best"], state["stopping"]["misses"]
        rows = [dict(zip(HISTORY_COLUMNS, row, strict=True)) for row in state["history"].tolist()]
        self.history = [row | {"epoch": int(row["epoch"])} for row in rows]
        self.steps, self.dead = state["steps"], state["dead"]
        self.best_weights, self.best_epoch = state["best_weights"], state["best_epoch"]


@dataclass(frozen=True)
class TrainResult:
    """A finished training: the model with its best weights (on the CPU), the history, and how it ended."""

    model: TransformNet
    history: pd.DataFrame
    best_epoch: int
    dead: bool  # the weights had no gradient: the training never moved, and the result is useless
    setup_seconds: float
    initial_weights: tuple[float, float, float]  # red, green, blue; those after each epoch are in the history

    @property
    def best_val_mse(self) -> float:
        return float(self.history.set_index("epoch").loc[self.best_epoch, "val_mse"])


def train(dataset: CustomDataset, config: TrainConfig, *, run: Run | None = None, force: bool = False) -> TrainResult:
    """Train on `dataset` (its training split) and return the result.

    With `run`, this is that run's `train` stage: history, weights, a checkpoint an epoch and TensorBoard events are
    written there, an interrupted training goes on where it stopped, and a complete one is only read. Raises
    TrainingError if the loss stays infinite or NaN, DataError for images that are none, Interrupted for Ctrl-C
    (without `run` that stays a KeyboardInterrupt), RunError if the run holds something else (see `Run.stage`).
    """
    if run is None:
        return finish(Trainer(dataset, config))
    device = resolve_device(config.device)
    # Refuse what cannot be trained on before anything is discarded
    split_indices(len(dataset), val_fraction=config.val_fraction)
    check_pairs(dataset)
    parameters = {**asdict(config), "device": str(device), "pipeline": dataset.pipeline.to_dict()}
    images = describe_images(dataset)
    made_for = {**parameters, "images": images["fingerprint"], "torch": str(torch.__version__)}
    with run.stage("train", parameters, images=images, device=device, force=force) as results:
        if results is not None:
            try:
                trainer = Trainer(dataset, config)
                _run_epochs(trainer, run, made_for)
            except KeyboardInterrupt:
                saved = "the best weights so far are" if (run.path / "weights.pt").exists() else "no epoch is yet"
                raise Interrupted(
                    f"interrupted: {saved} saved in {run.path}; run the same command or cell again to go on"
                ) from None
            results |= {
                "best_epoch": trainer.best_epoch,
                "dead": trainer.dead,
                "setup_seconds": trainer.setup_seconds,
                "initial_weights": list(trainer.initial_weights),
                "least_squares": _yardstick(trainer),
            }
    return load_training(run)


def finish(trainer: Trainer) -> TrainResult:
    """Run the epochs left and return the result; nothing is written."""
    for _ in _epochs(trainer):
        pass
    _refuse_if_not_finite(trainer)
    model = TransformNet(trainer.pipeline)
    model.load_state_dict(trainer.best_weights)
    return TrainResult(
        model,
        pd.DataFrame(trainer.history),
        trainer.best_epoch,
        trainer.dead,
        trainer.setup_seconds,
        trainer.initial_weights,
    )


def _epochs(trainer: Trainer) -> Iterator[dict]:
    """Run the epochs left under a progress bar, giving each one's row of the history."""
    with tqdm(total=trainer.config.epochs, initial=len(trainer.history), unit="epoch", leave=False) as bar:
        while not trainer.finished:
            row = trainer.run_epoch()
            yield row
            bar.set_postfix(val_mse=f"{row['val_mse']:.3g}")
            bar.update()


def _run_epochs(trainer: Trainer, run: Run, made_for: dict) -> None:
    """Run the epochs left, saving each to `run`.

    The checkpoint is the truth, written whole or not at all; history.csv and weights.pt are made from it, also on
    going on, so that a kill between two writes does no harm. TensorBoard's events come first: those of an epoch that
    has no checkpoint are purged on going on, whereas missing ones would stay missing.
    """
    if (run.path / "checkpoint.pt").exists():
        _load_checkpoint(trainer, run, made_for)
        _save_results(trainer, run)
    try:
        with run.summary_writer(next_epoch=len(trainer.history) + 1) as writer:
            for row in _epochs(trainer):
                for name in list(HISTORY_COLUMNS)[1:]:
                    writer.add_scalar(name, row[name], row["epoch"])
                writer.flush()
                head = {"format": CHECKPOINT_FORMAT, "made_for": made_for}
                run.write_torch("checkpoint.pt", head | trainer.state_dict())
                _save_results(trainer, run)
    except OSError as error:  # our own files' are RunErrors
        raise RunError(f"{run.path / 'tensorboard'}: cannot be written ({error.strerror})") from error
    _refuse_if_not_finite(trainer)


def _save_results(trainer: Trainer, run: Run) -> None:
    if trainer.best_weights:
        run.write_torch("weights.pt", trainer.best_weights)
    run.write_table("history.csv", pd.DataFrame(trainer.history))


def _load_checkpoint(trainer: Trainer, run: Run, made_for: dict) -> None:
    """Go on from the run's checkpoint; RunError if it is damaged or of another training, saying what differs."""
    state = run.read_torch("checkpoint.pt")
    start_anew = "take another run_dir, or force=True (--force) to start anew"
    known = state["format"] if type(state.get("format")) is int else "missing"
    if known != CHECKPOINT_FORMAT:
        raise RunError(
            f"{run.path}/checkpoint.pt: format {known}; this version goes on from format "
            f"{CHECKPOINT_FORMAT}: {start_anew}"
        )
    try:
        check_plain(state["made_for"])  # before it is compared and shown
        differing = differences(state["made_for"], made_for)
        if not differing:
            trainer.load_state_dict(state)
    except Exception as error:  # what a stranger's values make of torch
        raise RunError(f"{run.path}/checkpoint.pt: damaged ({type(error).__name__}: {error}); {start_anew}") from error
    if differing:
        raise RunError(f"{run.path}/checkpoint.pt: of another training ({differing}); {start_anew}")


def _refuse_if_not_finite(trainer: Trainer) -> None:
    """Raise TrainingError if the last epoch's losses are not finite, naming the epoch where that began."""
    rows = list(itertools.takewhile(lambda row: not _finite(row), reversed(trainer.history)))
    if rows:
        began = rows[-1]
        raise TrainingError(
            f"from epoch {began['epoch']} on the loss is not finite (training MSE {began['train_mse']}, validation MSE "
            f"{began['val_mse']}); lower lr (now {trainer.config.lr}) or look at the images"
        )


def _finite(row: dict) -> bool:
    return math.isfinite(row["train_mse"]) and math.isfinite(row["val_mse"])


def load_training(run: Run) -> TrainResult:
    """The result of a run's complete `train` stage, read from its files."""
    results = run.stage_info("train").get("results", {})
    history = run.history()
    kinds = {"best_epoch": int, "dead": bool, "setup_seconds": float, "initial_weights": list}
    for name, kind in kinds.items():
        if type(results.get(name)) is not kind:
            raise RunError(f"{run.path}/run.json: results of train: expected {name} ({kind.__name__})")
    initial = results["initial_weights"]
    if len(initial) != 3 or any(type(weight) is not float for weight in initial):
        raise RunError(f"{run.path}/run.json: results of train: expected three initial_weights, got {initial!r}")
    if len(history) > (most := load_config(run).epochs):
        raise RunError(f"{run.path}/history.csv: {len(history):,} epochs, more than the {most:,} of the parameters")
    if results["best_epoch"] not in set(history["epoch"]):
        raise RunError(f"{run.path}/history.csv: has no best epoch {results['best_epoch']}")
    best = history.set_index("epoch").loc[results["best_epoch"]]
    if not is_amount(results["setup_seconds"]):
        raise RunError(f"{run.path}/run.json: results of train: expected setup_seconds from 0")
    if not is_amount(float(best["val_mse"])):
        raise RunError(f"{run.path}/history.csv: the best epoch, {results['best_epoch']}, has no val_mse")
    model = load_model(run)
    if list(model.weights) != best[["red", "green", "blue"]].tolist():
        raise RunError(f"{run.path}: weights.pt and history.csv have other weights for epoch {results['best_epoch']}")
    known = {name: results[name] for name in kinds} | {"initial_weights": tuple(initial)}
    return TrainResult(model, history, **known)


def _yardstick(trainer: Trainer) -> dict | None:
    """The least-squares optimum of the same images as plain JSON values; None where they do not determine it."""
    config = trainer.config
    try:
        optimum = least_squares_of(trainer.prepared, val_fraction=config.val_fraction, seed=config.seed)
    except DataError:  # grey images
        return None
    return asdict(optimum) | {"weights": list(optimum.weights)}


def load_least_squares(run: Run) -> LeastSquares | None:
    """The least-squares optimum of a run's training images; None where they do not determine it (grey images)."""
    found = run.stage_info("train").get("results", {}).get("least_squares")
    if found is None:
        return None
    try:
        weights, *amounts = (found[field.name] for field in fields(LeastSquares))
        sound = [type(weight) for weight in weights] == [float] * 3 and all(map(is_amount, amounts))
        optimum = LeastSquares(**found | {"weights": tuple(weights)})
    except (KeyError, TypeError) as error:
        raise RunError(f"{run.path}/run.json: results of train: least_squares: damaged ({error})") from error
    if not sound or type(optimum.images) is not int:
        raise RunError(f"{run.path}/run.json: results of train: least_squares: expected numbers, got {optimum}")
    return optimum


def load_model(run: Run) -> TransformNet:
    """The run's trained model, on the CPU, in eval mode."""
    model = TransformNet(run.pipeline)
    model.load_state_dict(run.weights())
    return model.eval()


def load_dataset(run: Run, *, train: bool = False, data: str = "", data_path: str = "") -> CustomDataset:
    """The images that a run was trained on, or with `train=False` those to test it on, for the run's pipeline.

    `data` and `data_path` say where they lie now, if that has changed.
    """
    request = run.stage_info("train")["images"]["request"]
    given = {name: value for name, value in (("data", data), ("data_path", data_path)) if value}
    return CustomDataset(train=train, pipeline=run.pipeline, **(request | given))


def load_config(run: Run) -> TrainConfig:
    """The configuration that a run was trained with."""
    parameters = run.stage_info("train")["parameters"]
    try:
        return TrainConfig(**{field.name: parameters[field.name] for field in fields(TrainConfig)})
    except KeyError as error:
        raise RunError(f"{run.path}/run.json: parameters of train: has no {error}") from error
    except ParameterError as error:
        raise RunError(f"{run.path}/run.json: parameters of train: {error}") from error
