"""Training TransformNet: configuration and presets, early stopping, the loop, and the run directory's `train` stage.

The geometry (resize and flips) has nothing to learn, so it is applied to every image once, before the first epoch, and
the loop sees only what it leaves: the same losses as a loop over the whole module, without resizing 30 times over.
"""

import math
import time
from dataclasses import asdict, dataclass, fields, replace

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from .data import CustomDataset, split_indices
from .errors import DataError, ParameterError, RunError, TrainingError
from .machine import resolve_device, synchronize
from .model import TransformNet, seeded_model
from .pipeline import to_float
from .runs import Run, describe_images

PREPARE_BATCH = 2048  # images a step while the geometry is applied; bounds the scratch memory to about 50 MB

MIN_COLOUR = 1e-9  # least ratio of the smallest to the largest eigenvalue of E[x xᵀ]; below it, no colour


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
        whole = {"seed": 0, "epochs": 1, "batch_size": 1, "patience": 0}
        if self.decay_steps is not None:
            whole["decay_steps"] = 1
        for name, least in whole.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ParameterError(f"{name}: expected a whole number from {least}, got {value!r}")
        if self.seed >= 2**63:
            raise ParameterError(f"seed: expected a whole number below 2**63, got {self.seed!r}")
        for name in ("lr", "weight_decay", "min_delta", "val_fraction"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ParameterError(f"{name}: expected a number from 0, got {value!r}")
        if not 0 < self.val_fraction < 1:
            raise ParameterError(f"val_fraction: expected a number between 0 and 1, got {self.val_fraction!r}")
        for name in ("clamp", "whiten"):
            if type(getattr(self, name)) is not bool:
                raise ParameterError(f"{name}: expected true or false, got {getattr(self, name)!r}")

    @classmethod
    def from_preset(cls, preset: str, **changes) -> "TrainConfig":
        """The preset's values; a change of None keeps the preset's.

        >>> TrainConfig.from_preset("paper", epochs=None, seed=3) == TrainConfig(seed=3)
        True
        """
        if preset not in PRESETS:
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
        lr=5e-2,
        weight_decay=0.0,
        min_delta=0.0,
        clamp=False,
        whiten=True,
        decay_steps=350,
    ),
}


class EarlyStopping:
    """Stop after `patience` epochs in a row without an improvement of at least `min_delta` (MSE).

    A tie is not an improvement, nor is NaN. With `patience` 0 or 1 the first miss stops.
    """

    def __init__(self, min_delta: float = 1e-4, patience: int = 4):
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

    `history` has a dict an epoch (epoch, train_mse, val_mse, epoch_seconds); `best_weights` is the best state_dict.
    `epoch_seconds` covers the training and the validation pass; `setup_seconds` what was done once before.
    """

    def __init__(self, dataset: CustomDataset, config: TrainConfig):
        self.config = config
        self.device = resolve_device(config.device)
        self.stopping = EarlyStopping(config.min_delta, config.patience)
        self.history: list[dict] = []
        self.steps = 0  # taken by the optimiser so far
        self.best_weights: dict[str, Tensor] | None = None
        self.best_epoch = 0
        self.generator = torch.Generator().manual_seed(config.seed)  # of the shuffling alone

        start = time.perf_counter()
        self.model = seeded_model(config.seed, dataset.pipeline).to(self.device)
        targets = dataset.compute_targets() if dataset.targets is None else dataset.targets
        train, val = split_indices(len(dataset), val_fraction=config.val_fraction, seed=config.seed)
        self.train_inputs = self._prepare(dataset.images[train])
        self.val_inputs = self._prepare(dataset.images[val])
        self.train_targets, self.val_targets = targets[train].to(self.device), targets[val].to(self.device)
        # What the optimiser moves: the weights w themselves, or whitened v with w = L⁻ᵀ v and L Lᵀ = E[x xᵀ] over the
        # colours x. In v the loss is |v - v*|² plus a constant, whatever the images: equally steep in all directions.
        self.factor = self._whitening() if config.whiten else None
        start_weights = self.model.mix.weight.detach().view(3)
        if config.whiten:
            start_weights = self.factor.mT @ start_weights.to(self.factor.dtype)
        self.trained = start_weights.clone().requires_grad_()
        self.optimizer = torch.optim.AdamW([self.trained], lr=config.lr, weight_decay=config.weight_decay)
        steps = math.ceil(len(train) / config.batch_size)
        # While the learning rate still falls, an epoch without improvement is no reason to stop.
        self.horizon = min(config.decay_steps, steps * config.epochs) if config.decay_steps else None
        synchronize(self.device)
        self.setup_seconds = time.perf_counter() - start

    def _prepare(self, images: Tensor) -> Tensor:
        """uint8 images → resized and flipped float32 `(count, 3, *pipeline.size)` on the device."""
        chunks = (to_float(chunk.to(self.device)) for chunk in images.split(PREPARE_BATCH))
        return torch.cat([self.model.flip(self.model.resize(chunk)) for chunk in chunks])

    def _second_moment(self) -> Tensor:
        """E[x xᵀ] over the training pixels, `(3, 3)`; float64, since L⁻ᵀ magnifies rounding by up to 30."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no other
        total = torch.zeros(3, 3, dtype=dtype, device=self.device)
        for chunk in self.train_inputs.split(PREPARE_BATCH):
            colours = chunk.transpose(0, 1).reshape(3, -1).to(dtype)
            total += colours @ colours.mT
        return total / (self.train_inputs.numel() // 3)

    def _whitening(self) -> Tensor:
        """The lower triangular L of L Lᵀ = E[x xᵀ]; DataError if the colours span fewer than three dimensions."""
        moment = self._second_moment()
        eigenvalues = torch.linalg.eigvalsh(moment)
        if not eigenvalues[0] > MIN_COLOUR * eigenvalues[-1]:
            raise DataError(
                "the training images are grey or of too few colours: red, green and blue cannot be told apart, so no "
                "training can find their weights; use the preset paper, or images in colour"
            )
        return torch.linalg.cholesky(moment)

    def weights(self) -> Tensor:
        """The three weights as float32, differentiable in what is trained."""
        if self.factor is None:
            return self.trained
        return torch.linalg.solve_triangular(self.factor.mT, self.trained[:, None], upper=True)[:, 0].float()

    def outputs(self, inputs: Tensor) -> Tensor:
        """The model's output before the clamp for prepared inputs, `(batch, 3, h, w)` → `(batch, 1, h, w)`.

        The same sum as the 1×1 convolution, whose backward pass is ten times slower on a CPU.
        """
        return torch.einsum("c,bchw->bhw", self.weights(), inputs)[:, None]

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

    @property
    def dead(self) -> bool:
        """Whether the last step had an error but no gradient: its outputs lie where the clamp is flat."""
        if self.trained.grad is None or not self.history:
            return False
        return self.history[-1]["train_mse"] > 0 and not self.trained.grad.any().item()

    def run_epoch(self) -> dict:
        """Train on every training image once, validate, and return the epoch's row of the history."""
        start = time.perf_counter()
        order = torch.randperm(len(self.train_inputs), generator=self.generator).to(self.device)
        summed = torch.zeros((), device=self.device)  # stays there: reading it would wait for the device every step
        for batch in order.split(self.config.batch_size):
            outputs = self.outputs(self.train_inputs[batch])
            if self.config.clamp:
                outputs = outputs.clamp(0, 1)
            loss = F.mse_loss(outputs, self.train_targets[batch])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.param_groups[0]["lr"] = self.learning_rate
            self.optimizer.step()
            self.steps += 1
            summed += loss.detach() * len(batch)
        train_mse = summed.item() / len(self.train_inputs)
        val_mse = self.validate()
        row = {
            "epoch": len(self.history) + 1,
            "train_mse": train_mse,
            "val_mse": val_mse,
            "epoch_seconds": time.perf_counter() - start,
        }
        self.history.append(row)
        if self.stopping.improved(val_mse):
            self.best_weights, self.best_epoch = self.weights_now(), row["epoch"]
        return row

    @torch.no_grad()
    def validate(self) -> float:
        """The MSE over the validation images."""
        summed = torch.zeros((), dtype=torch.float32, device=self.device)
        for inputs, targets in zip(
            self.val_inputs.split(PREPARE_BATCH), self.val_targets.split(PREPARE_BATCH), strict=True
        ):
            outputs = self.outputs(inputs).clamp(0, 1)
            summed += F.mse_loss(outputs, targets) * len(inputs)
        return summed.item() / len(self.val_inputs)

    def weights_now(self) -> dict[str, Tensor]:
        """The current weights as a TransformNet's state_dict, on the CPU."""
        return {"mix.weight": self.weights().detach().cpu().reshape(1, 3, 1, 1).clone()}

    def state_dict(self) -> dict:
        """All that is needed to go on as if never stopped."""
        return {
            "trained": self.trained.detach(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "generator": self.generator.get_state(),
            "stopping": {"best": self.stopping.best, "misses": self.stopping.misses},
            "history": self.history,
            "best_weights": self.best_weights,
            "best_epoch": self.best_epoch,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict()`'s answer."""
        with torch.no_grad():
            self.trained.copy_(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        self.generator.set_state(state["generator"])
        self.stopping.best, self.stopping.misses = state["stopping"]["best"], state["stopping"]["misses"]
        self.history, self.best_weights = list(state["history"]), state["best_weights"]
        self.best_epoch = state["best_epoch"]


@dataclass(frozen=True)
class TrainResult:
    """A finished training: the model with its best weights (on the CPU), the history, and how it ended."""

    model: TransformNet
    history: pd.DataFrame
    best_epoch: int
    dead: bool  # the weights had no gradient: the training never moved, and the result is useless
    setup_seconds: float

    @property
    def best_val_mse(self) -> float:
        return float(self.history.set_index("epoch").loc[self.best_epoch, "val_mse"])


def train(dataset: CustomDataset, config: TrainConfig, *, run: Run | None = None, force: bool = False) -> TrainResult:
    """Train on `dataset` (its training split) and return the result.

    With `run`, this is that run's `train` stage: history, weights, a checkpoint an epoch and TensorBoard events are
    written there, an interrupted training goes on where it stopped, and a complete one is only read. Raises
    TrainingError if the loss is not finite, RunError if the run holds something else (see `Run.stage`).
    """
    if run is None:
        trainer = Trainer(dataset, config)
        _run_epochs(trainer)
        return _result(trainer)
    device = resolve_device(config.device)
    split_indices(len(dataset), val_fraction=config.val_fraction)  # refuses too few before anything is discarded
    parameters = {**asdict(config), "device": str(device), "pipeline": dataset.pipeline.to_dict()}
    with run.stage("train", parameters, images=describe_images(dataset), device=device, force=force) as results:
        if results is not None:
            trainer = Trainer(dataset, config)
            if (run.path / "checkpoint.pt").exists():
                trainer.load_state_dict(run.read_torch("checkpoint.pt"))
            _run_epochs(trainer, run)
            results |= {
                "best_epoch": trainer.best_epoch,
                "dead": trainer.dead,
                "setup_seconds": trainer.setup_seconds,
            }
    return load_training(run)


def _run_epochs(trainer: Trainer, run: Run | None = None) -> None:
    """Run the epochs left, writing each to `run` if there is one."""
    writer = run.summary_writer(next_epoch=len(trainer.history) + 1) if run else None
    bar = tqdm(total=trainer.config.epochs, initial=len(trainer.history), unit="epoch", leave=False)
    try:
        while not trainer.finished:
            row = trainer.run_epoch()
            if run:
                run.write_table("history.csv", pd.DataFrame(trainer.history))
                if trainer.best_epoch == row["epoch"]:
                    run.write_torch("weights.pt", trainer.best_weights)
                run.write_torch("checkpoint.pt", trainer.state_dict())
                for name in ("train_mse", "val_mse", "epoch_seconds"):
                    writer.add_scalar(name, row[name], row["epoch"])
                writer.flush()
            bar.set_postfix(val_mse=f"{row['val_mse']:.3g}")
            bar.update()
    finally:
        bar.close()
        if writer:
            writer.close()
    last = trainer.history[-1]
    if not math.isfinite(last["val_mse"]) or not math.isfinite(last["train_mse"]) or trainer.best_weights is None:
        raise TrainingError(
            f"the training MSE is {last['train_mse']}, the validation MSE {last['val_mse']} at epoch {last['epoch']}; "
            f"lower lr (now {trainer.config.lr}) or look at the images"
        )


def _result(trainer: Trainer) -> TrainResult:
    model = TransformNet(trainer.model.pipeline)
    model.load_state_dict(trainer.best_weights)
    history = pd.DataFrame(trainer.history)
    return TrainResult(model, history, trainer.best_epoch, trainer.dead, trainer.setup_seconds)


def load_training(run: Run) -> TrainResult:
    """The result of a run's complete `train` stage, read from its files."""
    results = run.stage_info("train").get("results", {})
    history = run.history()
    kinds = {"best_epoch": int, "dead": bool, "setup_seconds": float}
    for name, kind in kinds.items():
        if type(results.get(name)) is not kind:
            raise RunError(f"{run.path}/run.json: results of train: expected {name} ({kind.__name__})")
    if results["best_epoch"] not in set(history["epoch"]):
        raise RunError(f"{run.path}/history.csv: has no best epoch {results['best_epoch']}")
    return TrainResult(load_model(run), history, **{name: results[name] for name in kinds})


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
    except (KeyError, ParameterError) as error:
        raise RunError(f"{run.path}/run.json: parameters of train: {error}") from error
