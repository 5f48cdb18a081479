"""The timing harness: two baselines, one timed pass of the model along a path, and the sweep over settings.

Every clock is `time.perf_counter`, read after the device has finished. Images, model and results are in memory before
a clock starts; nothing is decoded from disk inside one.

A path is a way to run the model over all images:

    path        model     loader                          storage
    reference   eager     row by row, as in the paper     float32
    folded      folded    row by row, as in the paper     float32
    fast        folded    whole batches (`batch_loader`)  uint8; on CUDA pinned memory and a CUDA graph too
"""

import copy
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm

from .dataset import BatchIndices, batch_loader
from .errors import DataError, ParameterError, RunError
from .machine import available_devices, clock_mhz, resolve_device, synchronize
from .model import TransformNet
from .pipeline import Pipeline, to_float
from .runs import ROUNDING, Run, describe_images
from .training import load_model
from .untrusted import is_amount

BATCH_SIZES = (16, 32, 64, 128, 256, 512)  # images; the paper's
SMALL_BATCH_SIZES = (1, 2, 4, 8)  # outside the paper's table: from which batch size on is which path ahead?
NUM_WORKERS = (0, 1, 2)  # loader processes of the small sweep
NUM_WORKERS_BATCH_SIZE = 256  # images; the batch size at which num_workers is swept, the paper's for training
REPEATS = 5  # timed passes of each setting
PATHS = ("reference", "fast")  # measured for each of the paper's settings
STEP = "folded"  # between the two; measured once a batch size, without shuffle and drop_last
WHOLE = ("sequential", "floor")  # without batches; their rows have batch size 1
DEVICE = r"cpu|mps|cuda(:\d{1,4})?"  # as a table names it
MAX_MSE = 1e-2  # against the ground truth; a model farther off (20 dB) does not replace the pipeline and is not timed
CHECKED_IMAGES = 1031  # of the output; no multiple of a usual batch size, so that a last, smaller batch is among them
SEQUENTIAL_IMAGES = 500  # of the baseline's pass that each round of repeats begins with; 0.04 s on a 2020s core
# A median whose quartiles lie farther apart than this part of it is called noisy: the interquartile range at which
# torch.utils.benchmark begins to warn (torch/utils/benchmark/utils/common.py, _IQR_WARN_THRESHOLD).
NOISY_SPREAD = 0.1
# What leaves a row without a time and the sweep going on: a setting that cannot be run, no memory, a lost device (both
# are RuntimeErrors of PyTorch's), a loader process that cannot be started.
NOT_MEASURED = (ParameterError, RuntimeError, MemoryError, OSError)

# benchmark.csv: one row a measured setting. Baselines have no device setting of their own: they run on the CPU.
BENCHMARK_COLUMNS = {
    "path": "str",  # sequential, batched (both the pipeline), floor, or one of PATHS and STEP (the model)
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
    "mse": "float",  # of the model's output against the ground truth, before timing; none for the pipeline and floor
    "setup_seconds": "float",  # what is done once, outside the clock: loader, folding, pinning, graph capture
    "threads": "int",  # of PyTorch on the CPU
    "load_average": "float",  # processes running or waiting, over the last minute; none where not readable
    "clock_mhz": "float",  # of the row's device, after the last repeat; none where not readable
    "raw_seconds": "str",  # every repeat, separated by spaces
    "reason": "str",  # why there is no time; empty where there is one
}


@dataclass(frozen=True)
class Setting:
    """One row to measure. Those that differ in `path` alone are measured together."""

    path: str
    device: str
    batch_size: int
    shuffle: bool = False
    drop_last: bool = False
    num_workers: int = 0

    @property
    def group(self) -> "Setting":
        """What this row shares with those that are measured with it."""
        return self if self.path in WHOLE else replace(self, path="")

    def offered(self, count: int) -> int:
        """How many of `count` images are given to a pass: below the paper's batch sizes as many *batches* as at 32.

        Else batch size 1 would take longer than all others together.
        """
        return count if self.batch_size >= BATCH_SIZES[0] else max(1, count * self.batch_size // 32)

    def images(self, count: int) -> int:
        """How many of `count` images one pass processes."""
        if self.path in WHOLE:
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


def floor_pass(images: Tensor, pipeline: Pipeline, device: torch.device) -> Callable[[], float]:
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
    path: str = "reference",
) -> float:
    """One timed pass of `model` over `images` (n, 3, h, w; float32 in [0, 1] or uint8); wall time in seconds.

    `path="reference"` is the paper's protocol: a DataLoader over a TensorDataset of float32 images, the eager model in
    eval mode, the copy to the device inside the clock. `path="fast"` is what this library recommends, with the images
    stored as they are given (uint8 is the faster). What is done once per use is outside the clock: the conversion to
    float32 of the other paths, moving or folding the model, building the loader, pinning, graph capture.
    Raises ParameterError for a setting that cannot be run.
    """
    run_pass = prepare_pass(
        model,
        images=images,
        device=resolve_device(device),
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=num_workers,
        path=path,
    )
    seconds, _ = run_pass()
    return seconds


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
    path: str,
) -> Callable[..., tuple[float, list[Tensor]]]:
    """Set up one path; each call of the answer is one pass: (seconds, outputs on the CPU if `keep` else [])."""
    if path not in (*PATHS, STEP):
        raise ParameterError(f"path: expected one of {', '.join((*PATHS, STEP))}, got {path!r}")
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
    if path != "reference":
        network = network.folded()
    if path == "fast" and device.type == "cuda" and num_workers == 0:
        return graphed_pass(network, images=images, device=device, **batches)
    if path == "fast":
        loader = batch_loader(images, num_workers=num_workers, **batches)
    else:
        images = to_float(images)
        loader = DataLoader(
            TensorDataset(images),
            num_workers=num_workers,
            generator=torch.Generator().manual_seed(0),  # else every pass would use up the global generator
            **batches,
        )
    for size in {min(batch_size, len(images)), len(images) % batch_size} - {0}:
        network(images[:size].to(device))  # the folded model makes its matrices

    @torch.inference_mode()
    def run_pass(keep: bool = False) -> tuple[float, list[Tensor]]:
        outputs = []
        synchronize(device)
        start = time.perf_counter()
        for (batch,) in loader:
            output = network(batch.to(device))
            if keep:
                outputs.append(output.cpu())
        synchronize(device)
        return time.perf_counter() - start, outputs

    return run_pass


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


def capture(network: nn.Module, batch: Tensor) -> tuple[Callable[[], None], Tensor]:
    """Capture `network(batch)` as a CUDA graph: what replays it, and the output that each replay fills anew."""
    side = torch.cuda.Stream(batch.device)
    side.wait_stream(torch.cuda.current_stream(batch.device))
    with torch.cuda.stream(side):
        network(batch)  # warm-up, which makes what must not be made while capturing: matrices, cuBLAS' workspace
    torch.cuda.current_stream(batch.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = network(batch)
    return graph.replay, output


def graphed_pass(
    network: nn.Module, *, images: Tensor, device: torch.device, batch_size: int, shuffle: bool, drop_last: bool
) -> Callable[..., tuple[float, list[Tensor]]]:
    """The fast path on CUDA: while one batch is computed, the next is copied on a stream of its own.

    There are two of everything: pinned buffer, input and output on the device, graph. A batch's output is valid until
    the second batch after it. A smaller last batch runs the whole graph, and what lies behind it is not looked at.
    """
    source = PinnedBatches(images, batch_size)
    generator = torch.Generator().manual_seed(0)
    indices = BatchIndices(
        len(images), batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, generator=generator
    )
    loader = DataLoader(source, sampler=indices, batch_size=None, collate_fn=tuple, generator=generator)
    with torch.cuda.device(device):
        inputs = [images.new_zeros(batch_size, *images.shape[1:], device=device) for _ in range(2)]
        graphs = [capture(network, batch) for batch in inputs]
        copying, computed = torch.cuda.Stream(), [torch.cuda.Event() for _ in range(2)]

    @torch.inference_mode()
    def run_pass(keep: bool = False) -> tuple[float, list[Tensor]]:
        outputs = []
        with torch.cuda.device(device):
            computing = torch.cuda.current_stream()
            synchronize(device)
            start = time.perf_counter()
            for (batch,) in loader:
                k, (replay, output) = source.turn, graphs[source.turn]
                with torch.cuda.stream(copying):
                    copying.wait_event(computed[k])  # the graph that read this input two batches ago
                    inputs[k][: len(batch)].copy_(batch, non_blocking=True)
                    source.copied[k].record(copying)
                computing.wait_event(source.copied[k])
                replay()
                computed[k].record(computing)
                if keep:
                    outputs.append(output[: len(batch)].to("cpu", copy=True))
            synchronize(device)
            return time.perf_counter() - start, outputs

    return run_pass


def settings(
    devices: Sequence[str],
    batch_sizes: Sequence[int] = BATCH_SIZES,
    num_workers: Sequence[int] = NUM_WORKERS,
    small_batch_sizes: Sequence[int] = SMALL_BATCH_SIZES,
) -> list[Setting]:
    """The rows of a benchmark, group by group.

    Baselines come first: the pipeline image by image and in batches. Then both paths over the paper's sweep, device ×
    shuffle × drop_last × batch size, with the step between the paths where neither shuffle nor drop_last is on; small
    batch sizes likewise; last the reference path over num_workers, and the floor.
    """
    sizes, swept = [*batch_sizes, *small_batch_sizes], set(batch_sizes)
    rows = [Setting("sequential", "cpu", 1)] + [Setting("batched", "cpu", size) for size in sizes]
    rows += [
        Setting(path, device, size, shuffle, drop_last)
        for device, shuffle, drop_last, size in product(devices, (True, False), (True, False), sizes)
        for path in (PATHS if shuffle or drop_last else (*PATHS, STEP))
        if size in swept or not (shuffle or drop_last)
    ]
    rows += [
        Setting("reference", device, NUM_WORKERS_BATCH_SIZE, num_workers=workers)
        for device, workers in product(devices, num_workers)
    ]
    rows += [Setting("floor", device, 1) for device in devices]
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

    Returns one row a setting with the columns `BENCHMARK_COLUMNS`. Rows that differ in the path alone form a group, and
    groups are measured one after the other. Each row of a group is first run on `CHECKED_IMAGES` to check its output
    against the ground truth, which also warms it up; then on all images, `repeats` times. In each repeat the rows of
    the group take turns, after the pipeline applied to `SEQUENTIAL_IMAGES` image by image. So each row's baseline is of
    the same seconds and the same process: neither a busy hour nor an interruption comes between the two.
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
        sequential_pass(model.pipeline, self.floats[:SEQUENTIAL_IMAGES])  # warm-up

    def measure(self, group: list[Setting]) -> list[dict]:
        """Measure the rows of one group, taking turns with each other and the baseline."""
        load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # Windows has none
        passes, facts = [], {}
        raw_seconds: dict[Setting, list[float]] = {setting: [] for setting in group}
        for setting in group:
            facts[setting] = {"threads": torch.get_num_threads(), "load_average": load_average}
            try:
                passes.append((facts[setting], self.prepare(setting, facts[setting]), raw_seconds[setting]))
            except NOT_MEASURED as error:
                facts[setting]["reason"] = not_measured(error)
        baseline, sequential_seconds = self.floats[:SEQUENTIAL_IMAGES], []
        for _ in range(self.repeats if passes else 0):
            sequential_seconds.append(sequential_pass(self.model.pipeline, baseline))
            take_turns(passes)
        for setting in (setting for setting in group if "reason" not in facts[setting]):
            facts[setting]["clock_mhz"] = clock_mhz(resolve_device(setting.device))
            per_image = statistics.median(sequential_seconds) / len(baseline)
            facts[setting]["sequential_seconds_per_image"] = per_image
        return [
            summarise(setting, seconds, count=len(self.images), **facts[setting])
            for setting, seconds in raw_seconds.items()
        ]

    def prepare(self, setting: Setting, facts: dict) -> Callable[[], float]:
        """One row's timed pass, warmed up; its MSE against the ground truth and set-up time go into `facts`."""
        count, pipeline = setting.offered(len(self.images)), self.model.pipeline
        if setting.path == "sequential":
            return lambda: sequential_pass(pipeline, self.floats)
        if setting.path == "batched":
            batched_pass(pipeline, self.floats[:CHECKED_IMAGES], batch_size=setting.batch_size)
            return lambda: batched_pass(pipeline, self.floats[:count], batch_size=setting.batch_size)
        kind = setting.device.partition(":")[0]
        if kind in ("cuda", "mps") and kind not in available_devices():
            raise ParameterError(f"no {kind.upper()} device")
        if setting.path == "floor":
            return floor_pass(self.images, pipeline, resolve_device(setting.device))
        images = (self.images if setting.path == "fast" else self.floats)[:count]
        options = asdict(setting) | {"device": resolve_device(setting.device)}
        start = time.perf_counter()
        run_pass = prepare_pass(self.model, images=images, **options)
        facts["setup_seconds"] = time.perf_counter() - start
        # Checked in order, so that outputs and targets can be compared; shuffling only permutes them.
        checked = images[: max(CHECKED_IMAGES, 2 * setting.batch_size + 1)]
        outputs = torch.cat(prepare_pass(self.model, images=checked, **options | {"shuffle": False})(keep=True)[1])
        facts["mse"] = mse = (outputs - self.targets[: len(outputs)]).square().mean().item()
        if not mse <= MAX_MSE:
            raise ParameterError(f"output differs from the ground truth (MSE {mse:.3g}, more than {MAX_MSE:g})")
        return lambda: run_pass()[0]


def not_measured(error: Exception) -> str:
    """The reason in a row without a time: one line, and not endless."""
    return f"not measured: {(str(error) or type(error).__name__).splitlines()[0][:200]}"


def take_turns(passes: list[tuple[dict, Callable[[], float], list[float]]]) -> None:
    """Run each pass (row, pass, seconds so far) once; one that fails leaves the list, and its row gets the reason."""
    for each in list(passes):
        row, run_pass, seconds = each
        try:
            seconds.append(run_pass())
        except NOT_MEASURED as error:  # out of memory, or the device is gone
            row["reason"] = not_measured(error)
            passes.remove(each)


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
        if setting.path == "sequential":  # its own baseline
            sequential_seconds_per_image = median / images
        row |= {
            "noisy": is_noisy(row),
            "images_per_second": images / median,
            "sequential_seconds_per_image": sequential_seconds_per_image,
            "speedup": sequential_seconds_per_image / (median / images),
        }
    return row


def benchmark_run(
    run: Run,
    dataset,
    *,
    devices: Sequence[str] = (),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    num_workers: Sequence[int] = NUM_WORKERS,
    repeats: int = REPEATS,
    small_batch_sizes: Sequence[int] = SMALL_BATCH_SIZES,
    force: bool = False,
) -> pd.DataFrame:
    """A run's `benchmark` stage: `benchmark` with the run's model on `dataset`'s images, into benchmark.csv.

    `devices` empty means the device that the run was trained on, and CUDA, whose rows say so where there is none.
    The table is written after each group of rows, and a benchmark that was interrupted goes on with the next one.
    """
    check_sweep(  # before anything is discarded
        batch_sizes=batch_sizes, num_workers=num_workers, repeats=repeats, small_batch_sizes=small_batch_sizes
    )
    if not isinstance(devices, list | tuple):
        raise ParameterError(f"devices: expected a list of devices, got {devices!r}")
    size, trained_size = list(dataset.images.shape[-2:]), run.stage_info("train")["images"]["size"]
    if size != trained_size:
        raise DataError(
            f"{dataset.source}: images of {size[0]}×{size[1]} pixels; {run.path} was trained on "
            f"{trained_size[0]}×{trained_size[1]}"
        )
    trained_on = run.stage_info("train")["parameters"]["device"]
    devices = [str(resolve_device(device)) if device == "auto" else device for device in devices]
    devices = list(dict.fromkeys(devices or (trained_on, "cuda")))
    for device in devices:
        if device != "cuda":  # whose absence the table states
            resolve_device(device)
    parameters = {
        "devices": devices,
        "batch_sizes": list(batch_sizes),
        "num_workers": list(num_workers),
        "repeats": repeats,
        "small_batch_sizes": list(small_batch_sizes),
    }
    device = resolve_device(devices[0] if devices[0].partition(":")[0] in available_devices() else "cpu")
    with run.stage("benchmark", parameters, images=describe_images(dataset), device=device, force=force) as results:
        if results is not None:
            done = read_benchmark(run) if (run.path / "benchmark.csv").exists() else None

            def save(table: pd.DataFrame) -> None:
                run.write_table("benchmark.csv", table)

            benchmark(load_model(run), dataset.images, **parameters, done=done, save=save)
    return load_benchmark(run)


def load_benchmark(run: Run) -> pd.DataFrame:
    """The rows of a run's complete `benchmark` stage, as `benchmark` returned them: all that its parameters ask for."""
    parameters = run.stage_info("benchmark")["parameters"]
    table, path = read_benchmark(run), run.path / "benchmark.csv"
    sweep = ("devices", "batch_sizes", "num_workers", "small_batch_sizes")
    try:
        check_sweep(**{name: value for name, value in parameters.items() if name != "devices"})
        wanted = settings(**{name: parameters[name] for name in sweep})
    except (KeyError, TypeError, ParameterError) as error:
        raise RunError(f"{run.path}/run.json: parameters of benchmark: {error}") from error
    if lacking := len(set(wanted) - set(_settings_of(table))):
        raise RunError(f"{path}: lacks {lacking} of {len(wanted)} rows that the stage's parameters ask for")
    measured = table[table["reason"] == ""]
    if (measured["repeats"] != parameters["repeats"]).any():
        raise RunError(f"{path}: has rows of other repeats than the stage's parameters ask for")
    if run.has("compare"):
        _refuse_other_model(run, measured)
    for baseline in ("sequential", "batched"):
        if table[(table["path"] == baseline) & (table["reason"] == "")].empty:
            raise RunError(f"{path}: has no time of the pipeline ({baseline}), so nothing to compare with")
    return table


def _refuse_other_model(run: Run, measured: pd.DataFrame) -> None:
    """Raise RunError if the model that was timed comes as close to the same images as that of `compare` cannot.

    Its MSE was taken over the first `CHECKED_IMAGES`; the squared errors of some are no more than those of all.
    """
    compared, timed = run.stage_info("compare"), run.stage_info("benchmark")
    if compared["images"]["fingerprint"] != timed["images"]["fingerprint"]:
        return
    count, error = timed["images"]["count"], math.sqrt(compared["results"]["test_mse"])
    for row in measured[~measured["drop_last"] & measured["mse"].notna()].to_dict("records"):
        checked, found = min(row["images"], CHECKED_IMAGES), math.sqrt(row["mse"])
        least = error if checked == count else 0
        if not least - ROUNDING <= found <= error * math.sqrt(count / checked) + ROUNDING:
            raise RunError(
                f"{run.path}/benchmark.csv: times of another model than that of compare: an mse of {row['mse']:.3g}, "
                f"where run.json says {error**2:.3g}"
            )


def read_benchmark(run: Run) -> pd.DataFrame:
    """The rows that benchmark.csv holds by now, all of them measured or with the reason why not."""
    table = read_times(run, "benchmark.csv", BENCHMARK_COLUMNS)
    path, found = run.path / "benchmark.csv", _settings_of(table)
    if len(set(found)) < len(found):
        raise RunError(f"{path}: has a setting twice")
    for i, row in enumerate(table.to_dict("records"), 1):
        if row["batch_size"] < 1:
            raise RunError(f"{path}: row {i}: expected a batch size from 1")
        speedup = row["sequential_seconds_per_image"] * row["images"] / row["seconds"]
        if row["reason"]:
            continue
        if not math.isclose(row["speedup"], speedup):
            raise RunError(f"{path}: row {i}: speedup: {row['speedup']}, but its times give {speedup}")
        if not math.isclose(row["images_per_second"], row["images"] / row["seconds"]):
            raise RunError(f"{path}: row {i}: images_per_second: other than its images and seconds give")
        if row["noisy"] != is_noisy(row):
            raise RunError(f"{path}: row {i}: noisy: {row['noisy']}, but its quartiles say otherwise")
        if row["mse"] > MAX_MSE:  # NaN, of the pipeline, is not
            raise RunError(f"{path}: row {i}: has a time, though its mse, {row['mse']}, exceeds {MAX_MSE}")
    return table


def _settings_of(table: pd.DataFrame) -> list[Setting]:
    return [Setting(*(row[name] for name in Setting.__dataclass_fields__)) for row in table.to_dict("records")]


def read_times(run: Run, name: str, columns: dict[str, str]) -> pd.DataFrame:
    """A table of times, each row as `spread` makes it of the seconds in raw_seconds, or without a time and a reason.

    RunError for a row that is neither, on a device that is none, of no images, or with a number below 0 or infinite.
    """
    table = run.read_table(name, columns)
    amounts = [column for column, kind in columns.items() if kind == "float"]
    for i, row in enumerate(table.to_dict("records"), 1):
        where = f"{run.path}/{name}: row {i}"
        if wrong := [column for column in amounts if not (is_amount(row[column]) or math.isnan(row[column]))]:
            raise RunError(f"{where}: {wrong[0]}: expected a number from 0, got {row[wrong[0]]}")
        if not re.fullmatch(DEVICE, row["device"]):
            raise RunError(f"{where}: device: expected cpu, cuda, cuda:N or mps, got {row['device'][:100]!r}")
        if row["reason"]:
            if row["repeats"] or row["raw_seconds"] or not math.isnan(row["seconds"]):
                raise RunError(f"{where}: has a time and a reason why there is none")
            continue
        try:
            seconds = [float(text) for text in row["raw_seconds"].split()]
            told = spread(seconds)
        except (IndexError, ValueError) as error:
            raise RunError(f"{where}: raw_seconds: expected numbers separated by spaces") from error
        if not all(0 < value < math.inf for value in seconds) or row["images"] < 1 or not row.get("speedup", 1) > 0:
            raise RunError(f"{where}: expected seconds, images and speed-up above 0")
        for column in ("repeats", "seconds", "q1", "q3"):
            if not math.isclose(row[column], told[column]):
                raise RunError(f"{where}: {column}: {row[column]}, but raw_seconds give {told[column]}")
    return table
