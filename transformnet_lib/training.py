"""Training TransformNet: configuration and presets, early stopping and the loop.

The geometry (resize and flips) has nothing to learn, so it is applied to every image once, before the first epoch, and
the loop sees only what it leaves (`resized.py`). The gradient of three weights is written out. Both give the same
losses as a loop over the whole module with autograd, many times faster.
"""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from .checks import check_number, check_whole
from .dataset import CustomDataset, split_indices
from .errors import ParameterError, TrainingError
from .machine import resolve_device, synchronize
from .model import TransformNet, seeded_model
from .normal_equations import condition_number
from .resized import ResizedImages

# An MSE lower by less than this is rounding (half the square of 2**-24, float32's spacing below 1): it would decide on
# each machine otherwise which epoch is the best. The weights that it leaves are right to 1e-6 at a condition of 320.
MSE_ROUNDING = 2**-49
HISTORY_COLUMNS = {  # one row an epoch; the weights are those after it
    "epoch": "int",
    "train_mse": "loss",
    "val_mse": "loss",
    "epoch_seconds": "amount",
    "red": "float",
    "green": "float",
    "blue": "float",
}


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
    # blue are so alike that plain steps are slow; without clamping every start has a gradient; without weight decay the
    # optimum is that of the MSE; the decay to 0 lets the last steps settle; what is only rounding is no improvement.
    "precise": TrainConfig(
        preset="precise",
        lr=0.1,
        weight_decay=0.0,
        min_delta=MSE_ROUNDING,
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

    `history` has a dict an epoch, by `HISTORY_COLUMNS`; `best_weights` is the best state_dict; `no_gradient` says
    whether the gradient was zero in every epoch though there was an error, since all outputs lay where the clamp is
    flat. `epoch_seconds` covers the training and the validation pass; `setup_seconds` what was done once before.

    Trainings that differ in their config alone may share one `resized`.
    """

    def __init__(self, dataset: CustomDataset, config: TrainConfig, *, resized: ResizedImages | None = None):
        start = time.perf_counter()
        self.config = config
        self.device = resolve_device(config.device)
        self.stopping = EarlyStopping(config.min_delta, config.patience)
        self.history: list[dict] = []
        self.steps = 0  # taken by the optimiser so far
        self.best_weights: dict[str, Tensor] | None = None
        self.best_epoch = 0
        self.no_gradient = False
        self.generator = torch.Generator().manual_seed(config.seed)  # of the shuffling alone; on the CPU everywhere

        self.resized = resized or ResizedImages(dataset, self.device)
        self.pipeline = dataset.pipeline
        self.train, self.val = split_indices(len(dataset), val_fraction=config.val_fraction, seed=config.seed)
        # The optimiser moves v; the weights are w = basis v. For `paper` the two are the same. Whitened, basis = L⁻ᵀ
        # with L Lᵀ = E[x xᵀ] over the colours x: then the loss is |v - v*|² plus a constant, whatever the images,
        # equally steep in all directions. That in float64, since L⁻ᵀ magnifies rounding by up to 30.
        exact = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no other
        weights = seeded_model(config.seed, self.pipeline).mix.weight.detach().flatten()
        basis, trained = torch.eye(3), weights
        if config.whiten:
            colours = self.resized.moments(self.train)[:3, :3]
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
        values = self.batch_size * self.resized.pixels
        self.x, self.buffers = torch.empty(3 * values, device=self.device), torch.empty(3, values, device=self.device)
        self.sums = torch.zeros(3, dtype=exact, device=self.device)  # over an epoch
        self.train_sum, self.val_sum, self.slope = self.sums  # squared errors of both splits; absolute gradients
        self.batch = torch.empty(self.batch_size, dtype=torch.int64, device=self.device)  # what the graph reads
        self.recorded = self.device.type == "cuda"
        self.graph = (
            None  # of one step, where that is recorded; it reads what this trainer holds and keeps nothing alive
        )
        synchronize(self.device)
        self.setup_seconds = time.perf_counter() - start

    def weights(self) -> Tensor:
        """The three weights, float32, on the device."""
        return (self.basis @ self.trained).float()

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The model on a batch's images, of m pixels: colours `(3, m)`, outputs before and after the clamp, targets.

        An output is wᵀx for a pixel's colours x, the same sum as the 1×1 convolution. All four are buffers.
        """
        m = len(batch) * self.resized.pixels
        x, outputs, clamped, targets = self.x[: 3 * m].view(3, m), *self.buffers[:, :m]
        self.resized.gather(batch, x, targets)
        torch.mv(x.mT, self.weights(), out=outputs)
        torch.clamp(outputs, 0, 1, out=clamped)
        return x, outputs, clamped, targets

    def sum_of_products(self, values: Tensor, errors: Tensor) -> Tensor:
        """Σ values · errors over all pixels of a batch: `(…, m)` and `(m,)` to `(…,)`, in the dtype of `sums`.

        Over an image in float32, over the images in float64: a float32 sum of a whole batch depends in its fifth digit
        on the order that a machine adds in, which AdamW in whitened coordinates carries into the weights (up to 5e-4).
        """
        values, errors = (each.unflatten(-1, (-1, self.resized.pixels)) for each in (values, errors))
        return torch.linalg.vecdot(values, errors).sum(-1, dtype=self.sums.dtype)

    def step(self, batch: Tensor) -> None:
        """One step of AdamW on the images at `batch`, everything on the device: this is what a CUDA graph records.

        The loss is the mean of e², e = output - target. In w its gradient is the mean of 2 e x over the pixels, where
        a clipped pixel counts 0; in v it is basisᵀ times that.
        """
        x, outputs, clamped, targets = self.forward(batch)
        errors = torch.sub(clamped if self.config.clamp else outputs, targets, out=targets)
        self.train_sum += self.sum_of_products(errors, errors)
        if self.config.clamp:
            errors *= torch.eq(outputs, clamped, out=outputs)  # 1.0 where nothing was clipped, else 0.0
        gradient = self.sum_of_products(x, errors) * (2 / len(errors))
        self.slope += gradient.abs().sum()
        self.trained.grad.copy_(self.basis.mT @ gradient.to(self.basis.dtype))
        self.optimizer.step()

    def run_epoch(self) -> dict:
        """Train on every training image once, validate, and return the epoch's row of the history."""
        start = time.perf_counter()
        self.sums.zero_()
        order = self.train[torch.randperm(len(self.train), generator=self.generator)]
        for batch in order.to(self.resized.index_device).split(self.batch_size):
            self.optimizer.param_groups[0]["lr"].fill_(self.learning_rate)
            self.step_as_graph(batch) if self.recorded else self.step(batch)
            self.steps += 1
        for batch in self.val.to(self.resized.index_device).split(self.batch_size):
            _, _, clamped, targets = self.forward(batch)
            errors = torch.sub(clamped, targets, out=targets)
            self.val_sum += self.sum_of_products(errors, errors)
        train_sum, val_sum, slope = self.sums.tolist()  # the one time that the device is waited for

        row = {
            "epoch": len(self.history) + 1,
            "train_mse": train_sum / (len(self.train) * self.resized.pixels),
            "val_mse": val_sum / (len(self.val) * self.resized.pixels),
            "epoch_seconds": time.perf_counter() - start,
        }
        weights = self.weights().cpu()
        self.history.append(row | dict(zip(("red", "green", "blue"), weights.tolist(), strict=True)))
        self.no_gradient = (self.no_gradient or row["epoch"] == 1) and row["train_mse"] > 0 and slope == 0
        if self.stopping.improved(row["val_mse"]):
            self.best_weights, self.best_epoch = {"mix.weight": weights.view(1, 3, 1, 1)}, row["epoch"]
        return self.history[-1]

    def step_as_graph(self, batch: Tensor) -> None:
        """`step`, on CUDA: full batches replay one recorded step, a single launch instead of twenty.

        The first one runs as it is, since the optimiser's state and cuBLAS's workspace must exist before a recording
        (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs); recording a step does not run it. What a
        graph cannot hold runs as it is too: the smaller last batch, and images that come from the CPU.
        """
        if len(batch) < self.batch_size or not self.resized.kept:
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
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step(self.batch)
            self.graph = graph  # only now, so that a recording that was interrupted is not replayed

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

    def result(self) -> "TrainResult":
        """What the training has come to so far."""
        model = TransformNet(self.pipeline)
        model.load_state_dict(self.best_weights)
        history = pd.DataFrame(self.history)
        return TrainResult(model, history, self.best_epoch, self.no_gradient, self.setup_seconds, self.initial_weights)

    def state_dict(self) -> dict[str, Tensor]:
        """All that is needed to go on as if never stopped, as tensors by name."""
        state = {
            "trained": self.trained,
            "basis": self.basis,
            "generator": self.generator.get_state(),
            "history": torch.tensor([list(row.values()) for row in self.history], dtype=torch.float64),
            "stopping": torch.tensor([self.stopping.best, self.stopping.misses], dtype=torch.float64),
            "counts": torch.tensor([self.steps, self.best_epoch, self.no_gradient], dtype=torch.int64),
            **{f"optimizer.{name}": value for name, value in self.optimizer.state[self.trained].items()},
        }
        state |= {f"best.{name}": value for name, value in (self.best_weights or {}).items()}
        return {name: value.clone() for name, value in state.items()}  # else the next epoch would change them

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict()`'s answer."""
        self.graph = None  # it reads the optimiser's old tensors, which are replaced
        moments = {name: state[f"optimizer.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
        self.trained.copy_(state["trained"])
        self.basis.copy_(state["basis"])
        groups = self.optimizer.state_dict()["param_groups"]  # as they are: the learning rate follows from `steps`
        self.optimizer.load_state_dict({"state": {0: moments}, "param_groups": groups})
        self.generator.set_state(state["generator"])
        self.stopping.best, misses = state["stopping"].tolist()
        self.stopping.misses = int(misses)
        rows = [dict(zip(HISTORY_COLUMNS, row, strict=True)) for row in state["history"].tolist()]
        self.history = [row | {"epoch": int(row["epoch"])} for row in rows]
        self.steps, self.best_epoch, no_gradient = state["counts"].tolist()
        self.no_gradient = bool(no_gradient)
        best = state.get("best.mix.weight")
        self.best_weights = None if best is None else {"mix.weight": best}


@dataclass(frozen=True)
class TrainResult:
    """A finished training: the model with its best weights (on the CPU), the history, and how it ended."""

    model: TransformNet
    history: pd.DataFrame
    best_epoch: int
    no_gradient: bool  # the weights had no gradient: the training never moved, and the result is useless
    setup_seconds: float
    initial_weights: tuple[float, float, float]  # red, green, blue; those after each epoch are in the history

    @property
    def best_val_mse(self) -> float:
        return float(self.history.set_index("epoch").loc[self.best_epoch, "val_mse"])


def train(dataset: CustomDataset, config: TrainConfig) -> TrainResult:
    """Train on `dataset` (its training split) and return the result; nothing is written.

    Raises TrainingError if the loss stays infinite or NaN, DataError for images that are none.
    """
    return finish(Trainer(dataset, config))


def finish(trainer: Trainer) -> TrainResult:
    """Run the epochs left and return the result."""
    for _ in epochs(trainer):
        pass
    return trainer.result()


def epochs(trainer: Trainer) -> Iterator[dict]:
    """Run the epochs left under a progress bar, giving each one's row of the history; TrainingError at the end."""
    with tqdm(total=trainer.config.epochs, initial=len(trainer.history), unit="epoch", leave=False) as bar:
        while not trainer.finished:
            row = trainer.run_epoch()
            yield row
            bar.set_postfix(val_mse=f"{row['val_mse']:.3g}")
            bar.update()
    _refuse_if_not_finite(trainer)


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
