"""Cost over size: how time and memory grow with the number of images."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from .errors import ParameterError
from .model import TransformNet
from .pipeline import to_float
from .timing import (
    MAX_MSE,
    NOT_MEASURED,
    Entry,
    batched_pass,
    check_outputs,
    float32_exactly,
    not_measured,
    prepare_pass,
    sequential_pass,
    spread,
    take_turns,
)

SIZES = (1_000, 10_000, 100_000, 1_000_000)  # images
SEQUENTIAL_LIMIT = 10_000  # images; more take minutes image by image and would say nothing new
BATCH_SIZE = 512  # images

SIZE_COLUMNS = {
    "method": "str",  # sequential, batched (both the pipeline, on the CPU), reference or fast (the model)
    "device": "str",
    "images": "int",
    "repeats": "int",
    "seconds": "float",  # median over the repeats, as are q1 and q3
    "q1": "float",
    "q3": "float",
    "peak_mib": "float",  # the process' largest resident size while this size was measured; not on Linux: after it
    "raw_seconds": "str",  # every repeat, separated by spaces
    "reason": "str",  # why there is no time; empty where there is one
}


def study_sizes(
    model: TransformNet, images: Tensor, *, device: str = "cpu", sizes: Sequence[int] = SIZES, repeats: int = 3
) -> pd.DataFrame:
    """Time each method on as many images as `sizes` say, with the columns `SIZE_COLUMNS`; smallest first.

    More images than `images`, uint8 (n, 3, h, w), has are the same ones gone through again and again, so that nothing
    of that size is held. The methods take turns. The model's outputs are compared with the ground truth before and
    after.
    """
    check_sizes(sizes)
    rows = []
    with torch.inference_mode(), float32_exactly():
        targets = torch.cat([model.pipeline(to_float(chunk)) for chunk in images.split(BATCH_SIZE)])
        expected = torch.cat([model(to_float(chunk)) for chunk in images.split(BATCH_SIZE)])
        for size in tqdm(sorted(set(sizes)), desc="sizes", unit="size", leave=False):
            _forget_peak()
            whole, rest = divmod(size, len(images))
            entries, found = [], []
            for method in ("sequential", "batched", "reference", "fast"):
                if method == "sequential" and size > SEQUENTIAL_LIMIT:
                    continue
                where = "cpu" if method in ("sequential", "batched") else device
                row = {"method": method, "device": where, "images": size, "repeats": 0, "raw_seconds": "", "reason": ""}
                found.append(row)
                try:
                    parts = [(whole, *_prepare(method, model, images, targets, expected, where))] if whole else []
                    if rest:
                        tail = (each[:rest] for each in (images, targets, expected))
                        parts.append((1, *_prepare(method, model, *tail, where)))
                    errors = [error for _, _, error in parts if error]
                    error = errors and (lambda errors=errors: max(error() for error in errors))
                    entries.append(Entry(row, lambda parts=parts: _run(parts), error or None, MAX_MSE))
                except NOT_MEASURED as error:
                    row["reason"] = not_measured(error)
            check_outputs(entries)
            for _ in range(repeats):
                take_turns(entries)
            check_outputs(entries)
            for entry in entries:
                entry.row |= spread(entry.seconds) | {"peak_mib": _peak_mib()}
            rows += found
    return pd.DataFrame(rows).reindex(columns=list(SIZE_COLUMNS))


def check_sizes(sizes: Sequence[int]) -> None:
    """ParameterError unless `sizes` are whole numbers from 1."""
    if not isinstance(sizes, list | tuple) or any(type(size) is not int or size < 1 for size in sizes):
        raise ParameterError(f"sizes: expected a list of whole numbers from 1, got {sizes!r}")


def _run(parts: list[tuple]) -> float:
    """Seconds of several timed passes, each run so many times."""
    return sum(run_pass() for times, run_pass, _ in parts for _ in range(times))


def _prepare(
    method: str, model: TransformNet, images: Tensor, targets: Tensor, expected: Tensor, device: str
) -> tuple[Callable[[], float], Callable[[], float] | None]:
    """One method's timed pass over `images`, and its MSE against `targets`; None for the pipeline, which made them."""
    if method == "sequential":
        floats = to_float(images)
        return lambda: sequential_pass(model.pipeline, floats), None
    if method == "batched":
        floats = to_float(images)
        return lambda: batched_pass(model.pipeline, floats, batch_size=BATCH_SIZE), None
    options = {"batch_size": BATCH_SIZE, "shuffle": False, "drop_last": False, "num_workers": 0}
    work = prepare_pass(model, images=images, device=torch.device(device), method=method, **options)
    return work.seconds, lambda: work.mse(targets, expected)


# Linux keeps the largest resident size of a process and can forget it: man proc_pid_clear_refs, man proc_pid_status
def _forget_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> float:
    """The largest resident size of this process since `_forget_peak`, in MiB; on others than Linux the present one."""
    try:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 2**10  # KiB
    except (OSError, ValueError):
        return psutil.Process().memory_info().rss / 2**20
