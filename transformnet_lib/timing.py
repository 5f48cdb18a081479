"""The timing harness: two baselines, one timed pass of the model, and the sweep over settings.

Every clock is `time.perf_counter`, read after the device has finished. Images, model and results are in memory before
a clock starts; nothing is decoded from disk inside one.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from .errors import ParameterError
from .machine import available_devices, resolve_device, synchronize
from .model import TransformNet
from .pipeline import Pipeline, to_float
from .runs import Run, describe_images
from .training import load_model

BATCH_SIZES = (16, 32, 64, 128, 256, 512)  # images; the paper's
NUM_WORKERS = (0, 1, 2)  # loader processes of the small sweep
NUM_WORKERS_BATCH_SIZE = 256  # images; the batch size at which num_workers is swept, the paper's for training
REPEATS = 5  # timed passes of each setting
PATHS = ("reference",)
MAX_MSE = 1e-2  # against the ground truth; a model farther off (20 dB) does not replace the pipeline and is not timed
CHECKED_IMAGES = 2011  # of the output; no multiple of a usual batch size, so that a last, smaller batch is among them

# benchmark.csv: one row a measured setting. Baselines have no device setting of their own: they run on the CPU.
BENCHMARK_COLUMNS = {
    "path": "str",  # sequential, batched (both the pipeline) or reference (the model)
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
    "images_per_second": "float",
    "speedup": "float",  # sequential seconds per image ÷ this row's seconds per image
    "mse": "float",  # of this row's output against the ground truth, before timing
    "raw_seconds": "str",  # every repeat, separated by spaces
    "reason": "str",  # why there is no time; empty where there is one
}


@dataclass(frozen=True)
class Setting:
    """One row to measure."""

    path: str
    device: str
    batch_size: int
    shuffle: bool = False
    drop_last: bool = False
    num_workers: int = 0

    def images(self, count: int) -> int:
        """How many of `count` images one pass processes."""
        return count - count % self.batch_size if self.drop_last else count


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
    eval mode, the copy to the device inside the clock. What is done once per use is outside it: the conversion to
    float32, moving the model, building the loader. Raises ParameterError for a setting that cannot be run.
    """
    if path not in PATHS:
        raise ParameterError(f"path: expected one of {', '.join(PATHS)}, got {path!r}")
    run_pass = reference_pass(
        model,
        images=to_float(images),
        device=resolve_device(device),
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=num_workers,
    )
    seconds, _ = run_pass()
    return seconds


test_inference_time.__test__ = False  # its name is the paper's; pytest leaves it alone


def reference_pass(
    model: TransformNet,
    *,
    images: Tensor,
    device: torch.device,
    batch_size: int,
    shuffle: bool,
    drop_last: bool,
    num_workers: int,
) -> Callable[..., tuple[float, list[Tensor]]]:
    """Prepare the paper's protocol; each call of the answer is one pass: (seconds, outputs if `keep` else [])."""
    if type(batch_size) is not int or batch_size < 1:
        raise ParameterError(f"batch_size: expected a whole number from 1, got {batch_size!r}")
    if type(num_workers) is not int or num_workers < 0:
        raise ParameterError(f"num_workers: expected a whole number from 0, got {num_workers!r}")
    if drop_last and len(images) < batch_size:
        raise ParameterError(f"zero batches: drop_last with batch size {batch_size} and {len(images)} images")
    loader = DataLoader(
        TensorDataset(images),
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),  # else every pass would use up the global generator
    )
    model = copy.deepcopy(model).to(device).eval()  # the caller's stays where it is, for the other devices

    @torch.inference_mode()
    def run_pass(keep: bool = False) -> tuple[float, list[Tensor]]:
        outputs = []
        synchronize(device)
        start = time.perf_counter()
        for (batch,) in loader:
            output = model(batch.to(device))
            if keep:
                outputs.append(output.cpu())
        synchronize(device)
        return time.perf_counter() - start, outputs

    return run_pass


def settings(
    devices: Sequence[str], batch_sizes: Sequence[int] = BATCH_SIZES, num_workers: Sequence[int] = NUM_WORKERS
) -> list[Setting]:
    """The paper's sweep, device × batch size × shuffle × drop_last, then the small sweep of num_workers."""
    rows = [
        Setting("reference", device, batch_size, shuffle, drop_last)
        for device, shuffle, drop_last, batch_size in product(devices, (True, False), (True, False), batch_sizes)
    ]
    rows += [
        Setting("reference", device, NUM_WORKERS_BATCH_SIZE, num_workers=workers)
        for device, workers in product(devices, num_workers)
    ]
    return list(dict.fromkeys(rows))


def check_sweep(*, batch_sizes: Sequence[int], num_workers: Sequence[int], repeats: int) -> None:
    """Raise ParameterError for a sweep that cannot be run."""
    if type(repeats) is not int or repeats < 1:
        raise ParameterError(f"repeats: expected a whole number from 1, got {repeats!r}")
    for name, values, least in (("batch_sizes", batch_sizes, 1), ("num_workers", num_workers, 0)):
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
) -> pd.DataFrame:
    """Measure the baselines and every setting on `images` (n, 3, h, w; uint8 or float32 in [0, 1]).

    Returns one row a setting with the columns `BENCHMARK_COLUMNS`. Each setting is first run on `CHECKED_IMAGES` to
    check its output against the ground truth, which also warms it up; then on all, `repeats` times, taking turns with
    the others so that a busy moment hits all alike. A setting that cannot be measured keeps its row, with the reason
    and without a time.
    """
    check_sweep(batch_sizes=batch_sizes, num_workers=num_workers, repeats=repeats)
    images = to_float(images)
    pipeline = model.pipeline
    with torch.inference_mode():
        targets = torch.cat([pipeline(chunk) for chunk in images.split(512)])

    passes: dict[Setting, Callable[[], float]] = {
        Setting("sequential", "cpu", 1): lambda: sequential_pass(pipeline, images)
    }
    for size in batch_sizes:
        passes[Setting("batched", "cpu", size)] = lambda size=size: batched_pass(pipeline, images, batch_size=size)
    for baseline in passes.values():
        baseline()  # warm-up
    mses, reasons = dict.fromkeys(passes, 0.0), {}
    raw_seconds: dict[Setting, list[float]] = {setting: [] for setting in passes}
    with float32_exactly():
        for setting in tqdm(settings(devices, batch_sizes, num_workers), desc="check", unit="setting", leave=False):
            raw_seconds[setting] = []
            prepared = _checked_pass(model, images, targets, setting)
            if isinstance(prepared, str):
                reasons[setting] = prepared
            else:
                passes[setting], mses[setting] = prepared
        for _ in tqdm(range(repeats), desc="measure", unit="round", leave=False):
            for setting in passes:
                try:
                    if setting not in reasons:
                        raw_seconds[setting].append(passes[setting]())
                except RuntimeError as error:  # out of memory, or the device is gone
                    reasons[setting] = _not_measured(error)
    return summarise(raw_seconds, mses=mses, reasons=reasons, count=len(images))


def _checked_pass(
    model: TransformNet, images: Tensor, targets: Tensor, setting: Setting
) -> tuple[Callable[[], float], float] | str:
    """One setting's timed pass and its MSE against the ground truth, or why there is none."""
    kind = setting.device.partition(":")[0]
    if kind in ("cuda", "mps") and kind not in available_devices():
        return f"not measured: no {kind.upper()} device"
    prepare = {
        "device": resolve_device(setting.device),
        "batch_size": setting.batch_size,
        "drop_last": setting.drop_last,
        "num_workers": setting.num_workers,
    }
    try:
        run_pass = reference_pass(model, images=images, shuffle=setting.shuffle, **prepare)
        # Checked in order, so that outputs and targets can be compared; shuffling only permutes them.
        checked = images[: max(CHECKED_IMAGES, 2 * setting.batch_size + 1)]
        outputs = torch.cat(reference_pass(model, images=checked, shuffle=False, **prepare)(keep=True)[1])
        mse = (outputs - targets[: len(outputs)]).square().mean().item()
        if not mse <= MAX_MSE:
            return f"not measured: output differs from the ground truth (MSE {mse:.3g}, more than {MAX_MSE:g})"
        return (lambda: run_pass()[0]), mse
    except (RuntimeError, ParameterError) as error:
        return _not_measured(error)


def _not_measured(error: Exception) -> str:
    return f"not measured: {str(error).splitlines()[0][:200]}"


@contextmanager
def float32_exactly() -> Iterator[None]:
    """CUDA's TF32 off, which rounds products to 10 bits; restored at the end."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def summarise(
    raw_seconds: dict[Setting, list[float]], *, mses: dict[Setting, float], reasons: dict[Setting, str], count: int
) -> pd.DataFrame:
    """Turn raw wall times (seconds, by setting, over `count` images) into the benchmark's rows.

    The quartiles are those of `statistics.quantiles(method="inclusive")`; one repeat is its own median and quartiles.
    """
    (sequential,) = [seconds for setting, seconds in raw_seconds.items() if setting.path == "sequential"]
    sequential_per_image = statistics.median(sequential) / count
    rows = []
    for setting, seconds in raw_seconds.items():
        images = setting.images(count)
        seconds = [] if setting in reasons else seconds  # a row that failed on the way has no time
        row = {
            "path": setting.path,
            "device": setting.device,
            "batch_size": setting.batch_size,
            "shuffle": setting.shuffle,
            "drop_last": setting.drop_last,
            "num_workers": setting.num_workers,
            "images": images,
            "repeats": len(seconds),
            "mse": mses.get(setting),
            "raw_seconds": " ".join(map(repr, seconds)),
            "reason": reasons.get(setting, ""),
        }
        if seconds:
            quartiles = statistics.quantiles(seconds, method="inclusive") if len(seconds) > 1 else seconds * 3
            row |= dict(zip(("q1", "seconds", "q3"), quartiles, strict=True))
            row["images_per_second"] = images / row["seconds"]
            row["speedup"] = sequential_per_image / (row["seconds"] / images)
        rows.append(row)
    return pd.DataFrame(rows, columns=list(BENCHMARK_COLUMNS))


def benchmark_run(
    run: Run,
    dataset,
    *,
    devices: Sequence[str] = (),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    num_workers: Sequence[int] = NUM_WORKERS,
    repeats: int = REPEATS,
    force: bool = False,
) -> pd.DataFrame:
    """A run's `benchmark` stage: `benchmark` with the run's model on `dataset`'s images, into benchmark.csv.

    `devices` empty means the device that the run was trained on, and CUDA, whose rows say so where there is none.
    """
    check_sweep(batch_sizes=batch_sizes, num_workers=num_workers, repeats=repeats)  # before anything is discarded
    if not isinstance(devices, list | tuple):
        raise ParameterError(f"devices: expected a list of devices, got {devices!r}")
    trained_on = run.stage_info("train")["environment"]["device"]
    devices = list(dict.fromkeys(devices or (trained_on, "cuda")))
    for device in devices:
        if device != "cuda":  # whose absence the table states
            resolve_device(device)
    parameters = {
        "devices": devices,
        "batch_sizes": list(batch_sizes),
        "num_workers": list(num_workers),
        "repeats": repeats,
    }
    device = resolve_device(devices[0] if devices[0].partition(":")[0] in available_devices() else "cpu")
    with run.stage("benchmark", parameters, images=describe_images(dataset), device=device, force=force) as results:
        if results is not None:
            run.write_table("benchmark.csv", benchmark(load_model(run), dataset.images, **parameters))
    return load_benchmark(run)


def load_benchmark(run: Run) -> pd.DataFrame:
    """The rows of a run's complete `benchmark` stage, as `benchmark` returned them."""
    run.require("benchmark")
    table = run.read_table("benchmark.csv", BENCHMARK_COLUMNS)
    return table.fillna({"raw_seconds": "", "reason": ""})
