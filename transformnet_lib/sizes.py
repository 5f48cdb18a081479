"""Cost over size: how time and memory grow with the number of images."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
from torch import Tensor

from .checks import check_list
from .errors import ParameterError
from .measure import (
    LEAST_ROUNDS,
    NOT_MEASURED,
    ROUND_COLUMNS,
    failure,
    reasons_of,
    rounds,
    seconds_of,
    stacked,
    summary,
)
from .methods import float32_exactly
from .model import TransformNet
from .workbench import Setting, Workbench

SIZES = (1_000, 10_000, 100_000, 1_000_000)  # images
# More images than these take minutes a round by the slow methods, and would say nothing new
LIMITS = {"sequential": 10_000, "reference": 100_000}
METHODS = ("sequential", "batched", "reference", "fast")
BATCH_SIZE = 512  # images

SIZE_COLUMNS = {
    "method": "str",  # sequential, batched (both the pipeline, on the CPU), reference or fast (the model)
    "device": "str",
    "images": "count",
    "peak_mib": "amount",  # the process' largest resident size while this size was measured; not on Linux: after it
}


def study_sizes(
    model: TransformNet,
    images: Tensor,
    *,
    device: str = "cpu",
    sizes: Sequence[int] = SIZES,
    least: int = LEAST_ROUNDS,
    done: tuple[pd.DataFrame, pd.DataFrame] | None = None,
    save: Callable[[pd.DataFrame, pd.DataFrame], None] = lambda facts, table: None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure each method on as many images as `sizes` say, smallest first, in `least` rounds each.

    More images than `images`, uint8 (n, 3, h, w), has are the same ones gone through again and again, so that nothing
    of that size is held. The outputs are compared with the ground truth before and after. Gives the facts, a row per
    method and size (`SIZE_COLUMNS`), and the rounds, with the size in front of ROUND_COLUMNS, from which `sizes_table`
    derives the times. After each size `save` gets both so far, and `done` takes them up again.
    """
    check_sizes(sizes)
    facts, table = done or (pd.DataFrame(columns=list(SIZE_COLUMNS)), pd.DataFrame(columns=["size", *ROUND_COLUMNS]))
    models = {"": model}
    with float32_exactly():
        for size in (size for size in sorted(set(sizes)) if size not in set(facts["images"])):
            _forget_peak()
            whole, rest = divmod(size, len(images))
            # All images again and again, and some of them once
            benches = [
                (times, Workbench(models, part))
                for times, part in ((whole, images), (1, images[:rest]))
                if times and len(part)
            ]
            rows, names, failures = [], {}, []
            for method in (each for each in METHODS if size <= LIMITS.get(each, size)):
                where = "cpu" if method in ("sequential", "batched") else device
                rows.append({"method": method, "device": where, "images": size})
                try:
                    for _, bench in benches:
                        setting = Setting("size", method, where, BATCH_SIZE, len(bench.images))
                        bench.prepare(setting)
                    names[method] = setting.name  # the same on both
                except NOT_MEASURED as error:
                    failures.append({"round": 0, "attempt": 1, **failure(method, error)})
            made = rounds(
                {method: partial(_run, benches, name) for method, name in names.items()},
                seconds=0,
                least=least,
                title=f"{size:,} images",
                done=pd.DataFrame(failures, columns=list(ROUND_COLUMNS)),
            )
            for method, name in names.items():
                try:
                    for _, bench in benches:
                        bench.check(name)
                except NOT_MEASURED as error:
                    made.loc[made["method"] == method, "reason"] = failure(method, error)["reason"]
            peak = {"peak_mib": _peak_mib()}
            facts = stacked(facts, pd.DataFrame([row | peak for row in rows], columns=list(SIZE_COLUMNS)))
            table = stacked(table, made.assign(size=size)[["size", *ROUND_COLUMNS]])
            save(facts, table)
    return facts, table


def _run(benches: Sequence[tuple[int, Workbench]], name: str) -> float:
    """Seconds of one pass over as many images as the size says."""
    return sum(bench.turn(name) for times, bench in benches for _ in range(times))


def sizes_table(facts: pd.DataFrame, rounds: pd.DataFrame) -> pd.DataFrame:
    """The facts with their times, and `reason` where there are none."""
    parts = []
    for size, of_size in facts.groupby("images", sort=False):
        own = rounds[rounds["size"] == size].drop(columns="size")
        times = summary(seconds_of(own), "sequential").reindex(of_size["method"])
        reasons = [reasons_of(own).get(method, "") for method in of_size["method"]]
        parts.append(of_size.reset_index(drop=True).join(times.reset_index(drop=True)).assign(reason=reasons))
    table = pd.concat(parts, ignore_index=True)
    table.loc[table["seconds"].isna() & (table["reason"] == ""), "reason"] = "not measured"
    return table


def check_sizes(sizes: Sequence[int]) -> None:
    """ParameterError unless `sizes` are whole numbers from 1, each once."""
    check_list("sizes", sizes, 1)
    if not sizes:
        raise ParameterError("sizes: expected at least one, got none")


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
