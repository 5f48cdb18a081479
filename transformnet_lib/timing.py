"""The timing harness: two baselines, one timed pass of the model by a method, and the sweep over settings.

Every clock is `time.perf_counter`, read after the device has finished. Images, model and results are in memory before
a clock starts; nothing is decoded from disk inside one.

A method is a way to run the model over all images:

    method      model     loader                          storage
    reference   eager     row by row, as in the paper     float32
    folded      folded    row by row, as in the paper     float32
    fast        folded    whole batches (`batch_loader`)  uint8; on CUDA pinned memory and a CUDA graph too
"""

import copy
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm

from .dataset import BatchIndices, batch_loader
from .errors import ParameterError
from .machine import available_devices, clock_mhz, resolve_device, synchronize
from .model import TransformNet
from .pipeline import Pipeline, to_float

BATCH_SIZES = (16, 32, 64, 128, 256, 512)  # images; the paper's
SMALL_BATCH_SIZES = (1, 2, 4, 8)  # outside the paper's table: from which batch size on is which method ahead?
NUM_WORKERS = (0, 1, 2)  # loader processes of the small sweep
NUM_WORKERS_BATCH_SIZE = 256  # images; the batch size at which num_workers is swept, the paper's for training
REPEATS = 5  # timed passes of each setting
METHODS = ("reference", "fast")  # measured for each of the paper's settings
STEP = "folded"  # between the two; measured once a batch size, without shuffle and drop_last
WHOLE = ("sequential", "copy")  # without batches; their rows have batch size 1
DEVICE = r"cpu|mps|cuda(:\d{1,4})?"  # as a table names it
MAX_MSE = 1e-2  # against the ground truth; a model farther off (20 dB) does not replace the pipeline and is not timed
MAX_DIFFERENCE = 1e-4  # of a pixel from the eager model's: a fortieth of a grey level; rounding leaves less than 1e-5
WARM_UP_IMAGES = (
    1031  # of the pipeline in batches; no multiple of a usual batch size: a last, smaller one is among them
)
SEQUENTIAL_IMAGES = 500  # of the baseline's pass that each round of repeats begins with; 0.04 s on a 2020s core
# A median whose quartiles lie farther apart than this part of it is called noisy: the interquartile range at which
# torch.utils.benchmark begins to warn (torch/utils/benchmark/utils/common.py, _IQR_WARN_THRESHOLD).
NOISY_SPREAD = 0.1
# What leaves a row without a time and the sweep going on: a setting that cannot be run, no memory, a lost device (both
# are RuntimeErrors of PyTorch's), a loader process that cannot be started.
NOT_MEASURED = (ParameterError, RuntimeError, MemoryError, OSError)

# benchmark.csv: one row a measured setting. Baselines have no device setting of their own: they run on the CPU.
BENCHMARK_COLUMNS = {
    "method": "str",  # sequential, batched (both the pipeline), copy, or one of METHODS and STEP (the model)
    "device": "str",
    "batch_size": "int",
    "shuffle": "bool",
    "drop_last": "bool",
    "num_workers": "int",
    "images": "int",  # really processed in one pass: drop_last drops some
    "repeats": "int",
    "seconds": "float",  # median over the repeats, as are q1 and q3
    "q1": "float",
    "q3": "float",
    "noisy": "bool",  # the quartiles are farther apart than NOISY_SPREAD of the median
    "images_per_second": "float",
    "sequential_seconds_per_image": "float",  # median of the baseline's passes that took turns with this row's
    "speedup": "float",  # sequential seconds per image ÷ this row's seconds per image
    "mse": "float",  # of the model's output against the ground truth, the larger of before and after the repeats
    "setup_seconds": "float",  # what is done once, outside the clock: loader, folding, pinning, graph capture
    "threads": "int",  # of PyTorch on the CPU
    "load_average": "float",  # processes running or waiting, over the last minute; none where not readable
    "clock_mhz": "float",  # of the row's device, after the last repeat; none where not readable
    "raw_seconds": "str",  # every repeat, separated by spaces
    "reason": "str",  # why there is no time; empty where there is one
}


@dataclass(frozen=True)
class Setting:
    """One row to measure. Those that differ in `method` alone are measured together."""

    method: str
    device: str
    batch_size: int
    shuffle: bool = False
    drop_last: bool = False
    num_workers: int = 0

    @property
    def group(self) -> "Setting":
        """What this row shares with those that are measured with it."""
        return self if self.method in WHOLE else replace(self, method="")

    def offered(self, count: int) -> int:
        """How many of `count` images are given to a pass: below the paper's batch sizes as many *batches* as at 32.

        Else batch size 1 would take longer than all others together.
        """
        return count if self.batch_size >= BATCH_SIZES[0] else max(1, count * self.batch_size // 32)

    def images(self, count: int) -> int:
        """How many of `count` images one pass processes."""
        if self.method in WHOLE:
            return count
        offered = self.offered(count)
        return offered - offered % self.batch_size if self.drop_last else offered


def sequential_pass(pipeline: Pipeline, images: Tensor) -> float:
    """Apply the pipeline image by image on the CPU; wall time in seconds. `images` (n, 3, h, w) float32 in [0, 1]."""
    transform = pipeline.compose()
    with torch.inference_mode():
        start = time.perf_counter()
        for image in images:
            transform(image)
        return time.perf_counter() - start


def batched_pass(pipeline: Pipeline, images: Tensor, *, batch_size: int) -> float:
    """Apply the same transform to batches on the CPU; wall time in seconds."""
    transform = pipeline.compose()
    with torch.inference_mode():
        start = time.perf_counter()
        for batch in images.split(batch_size):
            transform(batch)
        return time.perf_counter() - start


def copy_pass(images: Tensor, pipeline: Pipeline, device: torch.device) -> Callable[[], float]:
    """What no way to do the work can beat; each call of the answer moves the bytes once and gives its seconds.

    On the CPU every byte of `images` (n, 3, h, w) is read and every byte of the float32 outputs is written, once. On
    another device the images are copied to it, from pinned memory if it is CUDA.
    """
    if device.type != "cpu":
        source = images.pin_memory() if device.type == "cuda" else images
        target = torch.empty_like(images, device=device)
        moves = [lambda: target.copy_(source, non_blocking=True)]
    else:
        source = images.contiguous().view(-1).view(torch.uint8)
        target = torch.empty(len(images) * math.prod(pipeline.size) * 4, dtype=torch.uint8)  # 4 bytes a float32
        both = min(len(source), len(target))
        moves = [lambda: target[:both].copy_(source[:both])]
        moves += [lambda: target[both:].zero_()] * (len(target) > both) + [source[both:].amax] * (len(source) > both)

    def run_pass() -> float:
        synchronize(device)
        start = time.perf_counter()
        for move in moves:
            move()
        synchronize(device)
        return time.perf_counter() - start

    run_pass()  # warm-up: memory that was never written is slow the first time
    return run_pass


def test_inference_time(
    model: TransformNet,
    *,
    images: Tensor,
    device: str,
    batch_size: int,
    shuffle: bool,
    drop_last: bool,
    num_workers: int = 0,
    method: str = "reference",
) -> float:
    """One timed pass of `model` over `images` (n, 3, h, w; float32 in [0, 1] or uint8); wall time in seconds.

    `method="reference"` is the paper's protocol: a DataLoader over a TensorDataset of float32 images, the eager model
    in eval mode, the copy to the device inside the clock. `method="fast"` is what this library recommends, with the
    images stored as they are given (uint8 is the faster). What is done once per use is outside the clock: the
    conversion to float32 of the other methods, moving or folding the model, building the loader, pinning, graph
    capture.
    Raises ParameterError for a setting that cannot be run.
    """
    return prepare_pass(
        model,
        images=images,
        device=resolve_device(device),
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=num_workers,
        method=method,
    ).seconds()


test_inference_time.__test__ = False  # its name is the paper's; pytest leaves it alone


@torch.inference_mode()
def prepare_pass(
    model: TransformNet,
    *,
    images: Tensor,
    device: torch.device,
    batch_size: int,
    shuffle: bool,
    drop_last: bool,
    num_workers: int,
    method: str,
) -> "Pass":
    """Set up one method, outside the clock: what is returned is what will be timed, and what is checked."""
    if method not in (*METHODS, STEP):
        raise ParameterError(f"method: expected one of {', '.join((*METHODS, STEP))}, got {method!r}")
    if type(batch_size) is not int or batch_size < 1:
        raise ParameterError(f"batch_size: expected a whole number from 1, got {batch_size!r}")
    if type(num_workers) is not int or num_workers < 0:
        raise ParameterError(f"num_workers: expected a whole number from 0, got {num_workers!r}")
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ParameterError(f"expected images of shape (count, 3, height, width), got {tuple(images.shape)}")
    if drop_last and len(images) < batch_size:
        raise ParameterError(f"zero batches: drop_last with batch size {batch_size} and {len(images)} images")
    batches = {"batch_size": batch_size, "shuffle": shuffle, "drop_last": drop_last}
    network = copy.deepcopy(model).to(device).eval()  # the caller's stays where it is, for the other devices
    if method != "reference":
        network = network.folded()
    if method == "fast" and device.type == "cuda" and num_workers == 0:
        return GraphedPass(network, images, device, **batches)
    images = images if method == "fast" else to_float(images)
    for size in {min(batch_size, len(images)), len(images) % batch_size} - {0}:
        network(images[:size].to(device))  # the folded model makes its matrices
    load = batch_loader if method == "fast" else row_loader
    return LoaderPass(network, images, device, partial(load, num_workers=num_workers, **batches))


def row_loader(tensor: Tensor, *, seed: int = 0, **options) -> DataLoader:
    """The paper's loader: rows fetched one by one and collated. Its own generator leaves the global one as it is."""
    return DataLoader(TensorDataset(tensor), generator=torch.Generator().manual_seed(seed), **options)


class Pass:
    """One way to run a network over all images, set up: `seconds` times it, `mse` checks what it gives.

    `load(tensor)` makes the loader over the rows of `tensor`, which gives batches as tuples of one and draws from a
    generator of its own; `load(tensor, num_workers=0)` makes one that gives the same batches without workers.
    """

    def __init__(self, network: nn.Module, images: Tensor, device: torch.device, load: Callable[..., DataLoader]):
        self.network, self.images, self.device, self.load = network, images, device, load
        self.loader = load(images)

    def outputs(self) -> Iterator[Tensor]:
        """Run the network over all images, in inference mode; a batch's output is valid until the next is asked for."""
        raise NotImplementedError

    def seconds(self) -> float:
        """One timed pass: wall time until the device has finished."""
        with torch.inference_mode():
            synchronize(self.device)
            start = time.perf_counter()
            for _ in self.outputs():
                pass
            synchronize(self.device)
            return time.perf_counter() - start

    def order(self) -> Tensor:
        """The indices of the images in the order in which the next pass will take them, `(count,)`."""
        loader = self.load(torch.arange(len(self.images)), num_workers=0)
        loader.generator.set_state(self.loader.generator.get_state())
        return torch.cat([batch for (batch,) in loader])

    def mse(self, targets: Tensor, expected: Tensor) -> float:
        """The MSE of one pass, not timed, against the `targets` (count, 1, h, w) of all images, on the CPU.

        RuntimeError for an output that differs from `expected`, the eager model's, by more than MAX_DIFFERENCE. Each
        call takes the same order, so that drop_last drops the same images before the repeats and after them.
        """
        self.loader.generator.manual_seed(0)
        order, start, total = self.order(), 0, 0.0
        with torch.inference_mode():
            for output in self.outputs():
                output, indices = output.cpu(), order[start : start + len(output)]
                difference = (output - expected[indices]).abs().max().item()
                if not difference <= MAX_DIFFERENCE:
                    raise RuntimeError(f"output differs from the eager model's by {difference:.3g} in a pixel")
                errors = output - targets[indices]
                start, total = start + len(output), total + errors.square().sum(dtype=torch.float64).item()
        if start != len(order):
            raise RuntimeError(f"expected the outputs of {len(order)} images, got {start}")
        return total / (start * targets[0].numel())


class LoaderPass(Pass):
    """Batch by batch, as the loader gives them: copied to the device, then the network."""

    def outputs(self) -> Iterator[Tensor]:
        for (batch,) in self.loader:
            yield self.network(batch.to(self.device))


class PinnedBatches(Dataset):
    """Images (count, 3, height, width) in pinned memory, from where CUDA copies while the CPU goes on.

    A batch in order is a view of them. A shuffled one is gathered straight into one of two pinned buffers; `turn` says
    which, and whoever copies it away records `copied[turn]`, so that a buffer is not filled before its copy has ended.
    """

    def __init__(self, images: Tensor, batch_size: int):
        self.images = images.pin_memory()
        self.buffers = [images.new_empty(batch_size, *images.shape[1:]).pin_memory() for _ in range(2)]
        self.copied = [torch.cuda.Event() for _ in range(2)]
        self.turn = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice | Tensor) -> tuple[Tensor]:
        self.turn = 1 - self.turn
        if isinstance(index, slice):
            return (self.images[index],)
        self.copied[self.turn].synchronize()
        return (torch.index_select(self.images, 0, index, out=self.buffers[self.turn][: len(index)]),)


class GraphedCall:
    """`network(input)` recorded as a CUDA graph; `replay()` computes `output` from what `input` then holds.

    A graph keeps nothing alive that its kernels read: neither the network's parameters and matrices nor the input. Once
    they are freed it reads whatever lies there, until their memory is the driver's again and the next replay fails. So
    this object owns them all.
    """

    def __init__(self, network: nn.Module, input: Tensor):
        self.network, self.input = network, input
        side = torch.cuda.Stream(input.device)
        side.wait_stream(torch.cuda.current_stream(input.device))
        with torch.cuda.stream(side):
            network(input)  # warm-up, which makes what must not be made while capturing: matrices, cuBLAS' workspace
        torch.cuda.current_stream(input.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = network(input)

    def replay(self) -> None:
        self.graph.replay()


class GraphedPass(Pass):
    """The fast method on CUDA: while one batch is computed, the next is copied on a stream of its own.

    There are two of everything: pinned buffer, graph with its input and output on the device, event. A batch's output
    is valid until the second batch after it. A smaller last batch runs the whole graph, and what lies behind it is not
    looked at.
    """

    def __init__(self, network: nn.Module, images: Tensor, device: torch.device, **batches):
        super().__init__(network, images, device, partial(batch_loader, **batches))  # for `order`: the same indices
        self.source = PinnedBatches(images, batches["batch_size"])
        generator = torch.Generator().manual_seed(0)
        indices = BatchIndices(len(images), generator=generator, **batches)
        self.loader = DataLoader(self.source, sampler=indices, batch_size=None, collate_fn=tuple, generator=generator)
        with torch.cuda.device(device):
            shape = (batches["batch_size"], *images.shape[1:])
            self.calls = [GraphedCall(network, images.new_zeros(shape, device=device)) for _ in range(2)]
            self.copying, self.computed = torch.cuda.Stream(), [torch.cuda.Event() for _ in range(2)]

    def outputs(self) -> Iterator[Tensor]:
        with torch.cuda.device(self.device):
            computing = torch.cuda.current_stream()
            for (batch,) in self.loader:
                k = self.source.turn
                call, computed, copied = self.calls[k], self.computed[k], self.source.copied[k]
                with torch.cuda.stream(self.copying):
                    self.copying.wait_event(computed)  # the graph that read this input two batches ago
                    call.input[: len(batch)].copy_(batch, non_blocking=True)
                    copied.record(self.copying)
                computing.wait_event(copied)
                call.replay()
                computed.record(computing)
                yield call.output[: len(batch)]


def settings(
    devices: Sequence[str],
    batch_sizes: Sequence[int] = BATCH_SIZES,
    num_workers: Sequence[int] = NUM_WORKERS,
    small_batch_sizes: Sequence[int] = SMALL_BATCH_SIZES,
) -> list[Setting]:
    """The rows of a benchmark, group by group.

    Baselines come first: the pipeline image by image and in batches. Then both methods over the paper's sweep, device ×
    shuffle × drop_last × batch size, with the step between the methods where neither shuffle nor drop_last is on; small
    batch sizes likewise; last the reference method over num_workers, and the copy.
    """
    sizes, swept = [*batch_sizes, *small_batch_sizes], set(batch_sizes)
    rows = [Setting("sequential", "cpu", 1)] + [Setting("batched", "cpu", size) for size in sizes]
    rows += [
        Setting(method, device, size, shuffle, drop_last)
        for device, shuffle, drop_last, size in product(devices, (True, False), (True, False), sizes)
        for method in (METHODS if shuffle or drop_last else (*METHODS, STEP))
        if size in swept or not (shuffle or drop_last)
    ]
    rows += [
        Setting("reference", device, NUM_WORKERS_BATCH_SIZE, num_workers=workers)
        for device, workers in product(devices, num_workers)
    ]
    rows += [Setting("copy", device, 1) for device in devices]
    return list(dict.fromkeys(rows))


def check_sweep(
    *, batch_sizes: Sequence[int], num_workers: Sequence[int], repeats: int, small_batch_sizes: Sequence[int] = ()
) -> None:
    """Raise ParameterError for a sweep that cannot be run."""
    if type(repeats) is not int or repeats < 1:
        raise ParameterError(f"repeats: expected a whole number from 1, got {repeats!r}")
    numbers = {"batch_sizes": (batch_sizes, 1), "small_batch_sizes": (small_batch_sizes, 1)}
    for name, (values, least) in (numbers | {"num_workers": (num_workers, 0)}).items():
        if not isinstance(values, list | tuple) or any(type(value) is not int or value < least for value in values):
            raise ParameterError(f"{name}: expected a list of whole numbers from {least}, got {values!r}")
    if not batch_sizes:
        raise ParameterError("batch_sizes: expected at least one, got none")


def benchmark(
    model: TransformNet,
    images: Tensor,
    *,
    devices: Sequence[str] = ("cpu", "cuda"),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    num_workers: Sequence[int] = NUM_WORKERS,
    repeats: int = REPEATS,
    small_batch_sizes: Sequence[int] = SMALL_BATCH_SIZES,
    done: pd.DataFrame | None = None,
    save: Callable[[pd.DataFrame], None] = lambda table: None,
) -> pd.DataFrame:
    """Measure the baselines and every setting on `images` (n, 3, h, w; uint8 or float32 in [0, 1]).

    Returns one row a setting with the columns `BENCHMARK_COLUMNS`. Rows that differ in the method alone form a group,
    and groups are measured one after the other. Each row of a group is run on all images: once to compare its output
    with the ground truth, which also warms it up; `repeats` times under the clock; and once more to compare. In each
    repeat the rows of the group take turns, after the pipeline applied to `SEQUENTIAL_IMAGES` image by image. So each
    row's baseline is of the same seconds and the same process.
    A row that cannot be measured stays, with the reason and without a time.

    After each group `save` gets all rows so far. Given as `done` to another call, they are not measured again.
    """
    check_sweep(batch_sizes=batch_sizes, num_workers=num_workers, repeats=repeats, small_batch_sizes=small_batch_sizes)
    for device in devices:
        if device.partition(":")[0] not in ("cuda", "mps"):  # whose absence the rows state
            resolve_device(device)
    bench = Bench(model, images, repeats)
    rows = [] if done is None else done.to_dict("records")
    finished = {Setting(*(row[name] for name in Setting.__dataclass_fields__)) for row in rows}
    groups: dict[Setting, list[Setting]] = {}
    for setting in settings(devices, batch_sizes, num_workers, small_batch_sizes):
        if setting not in finished:
            groups.setdefault(setting.group, []).append(setting)
    with float32_exactly():
        for group in tqdm(groups.values(), desc="measure", unit="setting", leave=False):
            rows += bench.measure(group)
            save(pd.DataFrame(rows, columns=list(BENCHMARK_COLUMNS)))
    return pd.DataFrame(rows, columns=list(BENCHMARK_COLUMNS))


class Bench:
    """What the rows of a benchmark have in common: the model, the images, their ground truth, how often to repeat."""

    def __init__(self, model: TransformNet, images: Tensor, repeats: int):
        self.model, self.images, self.floats, self.repeats = model, images, to_float(images), repeats
        with torch.inference_mode():
            self.targets = torch.cat([model.pipeline(chunk) for chunk in self.floats.split(512)])
            self.expected = torch.cat([model(chunk) for chunk in self.floats.split(512)])
        sequential_pass(model.pipeline, self.floats[:SEQUENTIAL_IMAGES])  # warm-up

    def measure(self, group: list[Setting]) -> list[dict]:
        """Measure the rows of one group, taking turns with each other and the baseline."""
        load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # Windows has none
        entries, facts = [], {}
        raw_seconds: dict[Setting, list[float]] = {setting: [] for setting in group}
        for setting in group:
            facts[setting] = {"threads": torch.get_num_threads(), "load_average": load_average}
            try:
                entries.append(self.prepare(setting, facts[setting], raw_seconds[setting]))
            except NOT_MEASURED as error:
                facts[setting]["reason"] = not_measured(error)
        check_outputs(entries)
        baseline, sequential_seconds = self.floats[:SEQUENTIAL_IMAGES], []
        for _ in range(self.repeats if entries else 0):
            sequential_seconds.append(sequential_pass(self.model.pipeline, baseline))
            take_turns(entries)
        check_outputs(entries)
        for setting in (setting for setting in group if "reason" not in facts[setting]):
            facts[setting]["clock_mhz"] = clock_mhz(resolve_device(setting.device))
            per_image = statistics.median(sequential_seconds) / len(baseline)
            facts[setting]["sequential_seconds_per_image"] = per_image
        for entry in entries:
            entry.row["mse"] = max(entry.errors, default=None)
        return [
            summarise(setting, seconds, count=len(self.images), **facts[setting])
            for setting, seconds in raw_seconds.items()
        ]

    def prepare(self, setting: Setting, facts: dict, seconds: list[float]) -> "Entry":
        """One row's pass, warmed up; its set-up time goes into `facts`."""
        count, pipeline = setting.offered(len(self.images)), self.model.pipeline
        if setting.method == "sequential":
            return Entry(facts, lambda: sequential_pass(pipeline, self.floats), seconds=seconds)
        if setting.method == "batched":
            batched_pass(pipeline, self.floats[:WARM_UP_IMAGES], batch_size=setting.batch_size)
            images = self.floats[:count]
            return Entry(facts, lambda: batched_pass(pipeline, images, batch_size=setting.batch_size), seconds=seconds)
        kind = setting.device.partition(":")[0]
        if kind in ("cuda", "mps") and kind not in available_devices():
            raise ParameterError(f"no {kind.upper()} device")
        if setting.method == "copy":
            return Entry(facts, copy_pass(self.images, pipeline, resolve_device(setting.device)), seconds=seconds)
        images = (self.images if setting.method == "fast" else self.floats)[:count]
        start = time.perf_counter()
        work = prepare_pass(self.model, images=images, **asdict(setting) | {"device": resolve_device(setting.device)})
        facts["setup_seconds"] = time.perf_counter() - start
        targets, expected = self.targets[:count], self.expected[:count]
        return Entry(facts, work.seconds, lambda: work.mse(targets, expected), MAX_MSE, seconds=seconds)


@dataclass(eq=False)
class Entry:
    """A row that is being measured: one pass of it, and how far what it gives is from the ground truth.

    `errors` are asked for before the first repeat, which also warms up on as much as is timed, and after the last one.
    The pipeline has none: it is the ground truth.
    """

    row: dict
    run_pass: Callable[[], float]  # one timed pass; its seconds
    error: Callable[[], float] | None = None  # of one more pass, not timed
    most: float = math.inf  # an error above it is no replacement of the pipeline
    errors: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def check(self) -> None:
        """Raise ParameterError for an error above `most`, RuntimeError if it is another than before the repeats."""
        if self.error is None:
            return
        error = self.error()
        if not error <= self.most:
            raise ParameterError(f"output differs from the ground truth by {error:.3g}, more than {self.most:g}")
        self.errors.append(error)
        if not math.isclose(error, self.errors[0], rel_tol=1e-4, abs_tol=1e-9):  # sums in another order
            raise RuntimeError(f"output off the ground truth by {self.errors[0]:.3g}, after the repeats by {error:.3g}")


def not_measured(error: Exception) -> str:
    """The reason in a row without a time: one line, and not endless."""
    return f"not measured: {(str(error) or type(error).__name__).splitlines()[0][:200]}"


def attempt(entries: list[Entry], step: Callable[[Entry], None]) -> None:
    """Do `step` with each entry; one that fails leaves the list, and its row gets the reason."""
    for entry in list(entries):
        try:
            step(entry)
        except NOT_MEASURED as error:  # a wrong output, out of memory, or the device is gone
            entry.row["reason"] = not_measured(error)
            entries.remove(entry)


def check_outputs(entries: list[Entry]) -> None:
    """Compare what each pass gives with the ground truth, before the repeats and again after them."""
    attempt(entries, Entry.check)


def take_turns(entries: list[Entry]) -> None:
    """Time each pass once."""
    attempt(entries, lambda entry: entry.seconds.append(entry.run_pass()))


@contextmanager
def float32_exactly() -> Iterator[None]:
    """CUDA's TF32 off, which rounds products to 10 bits; restored at the end."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def spread(seconds: Sequence[float]) -> dict:
    """The columns that every table of times has: repeats, seconds (the median), q1, q3 and raw_seconds.

    The quartiles are those of `statistics.quantiles(method="inclusive")`; one repeat is its own median and quartiles.
    """
    q1, median, q3 = statistics.quantiles(seconds, method="inclusive") if len(seconds) > 1 else (seconds[0],) * 3
    raw_seconds = " ".join(map(repr, seconds))
    return {"repeats": len(seconds), "seconds": median, "q1": q1, "q3": q3, "raw_seconds": raw_seconds}


def is_noisy(row: Mapping[str, float]) -> bool:
    """Whether a median's quartiles lie so far apart that it says little."""
    return bool(row["q3"] - row["q1"] > NOISY_SPREAD * row["seconds"])


def summarise(
    setting: Setting,
    seconds: list[float],
    *,
    count: int,
    sequential_seconds_per_image: float | None = None,
    reason: str = "",
    **facts,
) -> dict:
    """One row: the statistics of raw wall times (seconds, one a repeat, over `count` images offered), and `facts`."""
    images = setting.images(count)
    seconds = [] if reason else seconds  # a row that failed on the way has no time
    row = asdict(setting) | facts
    row |= {"images": images, "repeats": 0, "raw_seconds": "", "reason": reason, "noisy": False}
    if seconds:
        row |= spread(seconds)
        median = row["seconds"]
        if setting.method == "sequential":  # its own baseline
            sequential_seconds_per_image = median / images
        row |= {
            "noisy": is_noisy(row),
            "images_per_second": images / median,
            "sequential_seconds_per_image": sequential_seconds_per_image,
            "speedup": sequential_seconds_per_image / (median / images),
        }
    return row
