"""What is measured: methods and settings, part by part, and the table that follows from their rounds.

    part        what takes turns in a round
    sweep       the paper's table: reference and fast × batch size × shuffle × drop_last, and the pipeline
    small       both methods and the pipeline at batch sizes below the paper's
    best        the fastest setting of each method in the sweep, measured again, and the copy
    one thread  the same with one thread
    factors     {pipeline, eager, folded} × {batches, rows} × {float32, uint8}, and the steps within a batch
    workers     the reference method over num_workers

Raw times are kept, and everything else is derived from them: `Measurements`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from itertools import product
from math import nan

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from .checks import check_list
from .errors import ParameterError
from .machine import available_devices, resolve_device
from .measure import (
    LEAST_ROUNDS,
    NOT_MEASURED,
    PRECISION,
    ROUND_COLUMNS,
    Estimate,
    check_rounds,
    disturbed_rounds,
    failure,
    ratio,
    reasons_of,
    rounds,
    seconds_of,
    stacked,
    summary,
)
from .methods import NETWORKS, STEPS, float32_exactly
from .model import TransformNet, weighted_model
from .pipeline import GRAY_WEIGHTS
from .workbench import DeviceProcess, Setting, Workbench

BATCH_SIZES = (16, 32, 64, 128, 256, 512)  # images; the paper's
SMALL_BATCH_SIZES = (1, 2, 4, 8)  # outside the paper's table: from which batch size on is which method ahead?
NUM_WORKERS = (0, 1, 2)  # loader processes
NUM_WORKERS_BATCH_SIZE = 256  # images; the batch size at which num_workers is swept, the paper's for training
SECONDS = 60.0  # for the turns of the sweep; its least rounds may take longer
PART_SHARE = 1 / 15  # of the sweep's seconds, for the turns of each other part
SWEPT = ("reference", "fast")  # the methods in the paper's table
KNOWN = "known"  # the pipeline's own weights, in place of those of the model
MAX_WEIGHT = 1e6  # of other weights; nothing near it is a grey mix
CHECKED_AGAIN = 2048  # images whose outputs are compared once more after the rounds

# settings.csv: a row per part and setting, there once a part is complete
SETTING_COLUMNS = {
    "part": "str",
    "method": "str",  # one of METHODS, copy, or one of STEPS
    "device": "str",
    "batch_size": "count",
    "offered": "count",  # images given to a pass
    "shuffle": "bool",
    "drop_last": "bool",
    "num_workers": "int",
    "weights": "str",  # empty: those of the model that is timed; known: the pipeline's own; or those of another run
    "threads": "count",  # of PyTorch on the CPU
    "setup_seconds": "amount",  # what is done once, outside the clock: loader, folding, pinning, graph capture
    "mse": "amount",  # of the output against the ground truth, before the rounds; none where there is no model
}
# Derived: a row per part and setting; the pipeline image by image is one row per part, `sequential`
TABLE_COLUMNS = (
    *("part", "method", "device", "batch_size", "shuffle", "drop_last", "num_workers", "weights", "threads"),
    *("images", "rounds", "seconds", "low", "high", "images_per_second", "speedup", "speedup_low", "speedup_high"),
    *("mse", "setup_seconds", "name", "reason"),
)


_FIELDS = [field.name for field in fields(Setting)]


@dataclass(frozen=True)
class Plan:
    """What a benchmark was asked for; `count` images, `others` the names of other weights."""

    devices: Sequence[str]
    batch_sizes: Sequence[int]
    small_batch_sizes: Sequence[int]
    num_workers: Sequence[int]
    others: Sequence[str]
    count: int


def sweep_settings(plan: Plan, measured: "Measurements") -> list[Setting]:
    """The paper's table, with the pipeline beside it: in batches of each size, and image by image.

    Image by image is divided among the batch sizes: each has its share of the images, and those of a round make one
    pass, the anchor that the rows of all batch sizes have in common.
    """
    made = []
    for k, size in enumerate(plan.batch_sizes):
        share = plan.count * (k + 1) // len(plan.batch_sizes) - plan.count * k // len(plan.batch_sizes)
        made += [Setting("sweep", "sequential", "cpu", size, share)] * bool(share)
        made.append(Setting("sweep", "batched", "cpu", size, plan.count))
        made += [
            Setting("sweep", method, device, size, plan.count, shuffle, drop_last)
            for device, shuffle, drop_last, method in product(plan.devices, (True, False), (True, False), SWEPT)
        ]
    return made


def small_settings(plan: Plan, measured: "Measurements") -> list[Setting]:
    """Small batches, in order: as many of them as there are at 64, or they would take longer than all others."""
    made = []
    for size in plan.small_batch_sizes:
        offered = min(plan.count, max(size, plan.count * size // 64))
        made.append(Setting("small", "batched", "cpu", size, offered))
        made += [Setting("small", method, device, size, offered) for device, method in product(plan.devices, SWEPT)]
    return made and [Setting("small", "sequential", "cpu", 1, max(1, plan.count // 10)), *made]


def best_settings(plan: Plan, measured: "Measurements") -> list[Setting]:
    """The fastest setting of each method in the sweep, with the copy, and the fast method with other weights too.

    The pipeline image by image takes a fifth of the images, since it takes most of the time.
    """
    made = [Setting("best", "sequential", "cpu", 1, max(1, plan.count // 5))]
    for device, method in [("cpu", "batched"), *product(plan.devices, SWEPT)]:
        row = measured.fastest(method, device)
        if row is not None:
            options = {name: row[name].item() for name in ("batch_size", "shuffle", "drop_last")}
            made.append(Setting("best", method, device, offered=plan.count, **options))
            made += [replace(made[-1], weights=weights) for weights in plan.others if method == "fast"]
    return made + [Setting("best", "copy", device, 1, plan.count) for device in plan.devices]


def one_thread_settings(plan: Plan, measured: "Measurements") -> list[Setting]:
    """Those of the part `best`."""
    return [replace(setting, part="one thread") for setting in measured.settings_of("best")]


def factor_settings(plan: Plan, measured: "Measurements") -> list[Setting]:
    """Every network with every loader and storage, in order, at the fast method's best batch size, and the steps."""
    count = max(1, plan.count // 2)
    made = [Setting("factors", "sequential", "cpu", 1, max(1, count // 5))]
    cells = ["-".join(parts) for parts in product(NETWORKS, ("batches", "rows"), ("float32", "uint8"))]
    for device in plan.devices:
        row = measured.fastest("fast", device)
        if row is not None:
            methods = [*cells, *STEPS, *(("graph", "pinned", "fast") if device.startswith("cuda") else ())]
            made += [Setting("factors", method, device, row["batch_size"].item(), count) for method in methods]
            made.append(
                replace(made[-1], method=methods[-1] if made[-1].method == "fast" else cells[-3], weights=KNOWN)
            )
    return made


def worker_settings(plan: Plan, measured: "Measurements") -> list[Setting]:
    """The reference method over the number of loader processes; none unless there are several to compare."""
    if len(set(plan.num_workers)) < 2:
        return []
    return [
        Setting("workers", "reference", device, NUM_WORKERS_BATCH_SIZE, plan.count, num_workers=workers)
        for device, workers in product(plan.devices, dict.fromkeys(plan.num_workers))
    ]


PARTS = {
    "sweep": sweep_settings,
    "small": small_settings,
    "best": best_settings,
    "one thread": one_thread_settings,
    "factors": factor_settings,
    "workers": worker_settings,
}


@dataclass(frozen=True, eq=False)
class Measurements:
    """What a benchmark measured: `settings` (SETTING_COLUMNS) and `rounds` (part and ROUND_COLUMNS). The rest follows.

    A setting's name stands in the column `method` of the rounds. Raises what a table of nonsense makes pandas raise.
    """

    settings: pd.DataFrame
    rounds: pd.DataFrame

    @classmethod
    def none(cls) -> "Measurements":
        return cls(pd.DataFrame(columns=list(SETTING_COLUMNS)), pd.DataFrame(columns=["part", *ROUND_COLUMNS]))

    def rounds_of(self, part: str) -> pd.DataFrame:
        """The rounds of a part, with the columns ROUND_COLUMNS."""
        return self.rounds[self.rounds["part"] == part].drop(columns="part")

    def settings_of(self, part: str) -> list[Setting]:
        rows = self.settings[self.settings["part"] == part]
        return [Setting(**row) for row in rows[_FIELDS].to_dict("records")]

    @cached_property
    def times(self) -> dict[str, pd.DataFrame]:
        """Seconds per image in each part: a row per round, a column per setting's name, and their common anchor.

        That is `sequential`, the pipeline image by image.
        """
        parts = self.settings["part"].unique()
        return {part: per_image(seconds_of(self.rounds_of(part)), self.settings_of(part)) for part in parts}

    @cached_property
    def table(self) -> pd.DataFrame:
        """Medians over the rounds with their intervals, a row per part and setting: TABLE_COLUMNS.

        A speed-up is the pipeline's time per image, image by image, ÷ the row's own, within each round.
        """
        rows = []
        for part in self.settings["part"].unique():
            estimates, reasons = summary(self.times[part], "sequential"), reasons_of(self.rounds_of(part))
            settings = self.settings_of(part)
            facts = self.settings[self.settings["part"] == part].to_dict("records")
            for setting, own in zip(settings, facts, strict=True):
                if setting.method != "sequential":
                    own |= {"name": setting.name, "images": setting.images}
                    rows.append(own | _times(own, estimates, reasons.get(setting.name, "")))
            if shares := [setting for setting in settings if setting.method == "sequential"]:
                own = facts[0] | asdict(shares[0]) | {"batch_size": 1, "setup_seconds": nan, "mse": nan}
                own |= {"name": "sequential", "images": sum(share.images for share in shares)}
                failed = [reasons[share.name] for share in shares if share.name in reasons]
                rows.append(own | _times(own, estimates, (failed or [""])[0]))
        return pd.DataFrame(rows, columns=list(TABLE_COLUMNS))

    def rows(self, part: str, method: str, device: str) -> pd.DataFrame:
        """The measured rows of a method on a device, with the weights of the model that is timed."""
        return self._measured.get((part, method, device), self.table.iloc[:0])

    @cached_property
    def _measured(self) -> dict[tuple[str, str, str], pd.DataFrame]:
        measured = self.table[(self.table["reason"] == "") & (self.table["weights"] == "")]
        return dict(iter(measured.groupby(["part", "method", "device"])))

    def fastest(self, method: str, device: str, part: str = "sweep") -> pd.Series | None:
        """The row of a method with the least time per image, None where nothing was measured."""
        rows = self.rows(part, method, device)
        return None if rows.empty else rows.loc[(rows["seconds"] / rows["images"]).idxmin()]

    def ratio(self, part: str, name: str, other: str) -> Estimate:
        """How many times as fast as `other` a setting is, per image, within rounds; both are names of settings."""
        return ratio(self.times[part], name, other)

    def disturbed(self, part: str) -> dict[str, int | None]:
        """Of a part: its rounds, how many were measured again, and how many are disturbed all the same.

        None for `workers`, whose own processes wait for each other.
        """
        attempts = disturbed_rounds(self.rounds_of(part))
        last = attempts.groupby("round").tail(1)
        disturbed = None if part == "workers" else int(last.sum())
        return {"rounds": len(last), "again": len(attempts) - len(last), "disturbed": disturbed}


def per_image(seconds: pd.DataFrame, settings: Sequence[Setting]) -> pd.DataFrame:
    """Seconds per pass, as `seconds_of` gives them, as seconds per image; all shares of `sequential` as one column."""
    measured = [setting for setting in settings if setting.name in seconds]
    shares = [setting for setting in measured if setting.method == "sequential"]
    made = {setting.name: seconds[setting.name] / setting.images for setting in measured if setting not in shares}
    if shares and len(shares) == sum(setting.method == "sequential" for setting in settings):
        total = seconds[[setting.name for setting in shares]].sum(axis=1, skipna=False)
        made["sequential"] = total / sum(setting.images for setting in shares)
    return pd.DataFrame(made, index=seconds.index)


def _times(facts: dict, estimates: pd.DataFrame, reason: str) -> dict:
    """What the rounds say of a setting, per pass; or why they say nothing."""
    if reason:
        return {"rounds": 0, "reason": reason}
    found = estimates.loc[facts["name"]].to_dict()
    seconds = {name: found[name] * facts["images"] for name in ("seconds", "low", "high")}
    return found | seconds | {"rounds": int(found["rounds"]), "images_per_second": 1 / found["seconds"], "reason": ""}


def check_sweep(
    *,
    batch_sizes: Sequence[int],
    small_batch_sizes: Sequence[int] = (),
    num_workers: Sequence[int] = (),
    rounds: int = LEAST_ROUNDS,
    seconds: float = SECONDS,
    precision: float = PRECISION,
) -> None:
    """Raise ParameterError for a benchmark that cannot be run."""
    check_rounds(rounds, seconds, precision)
    check_list("batch_sizes", batch_sizes, 1)
    check_list("small_batch_sizes", small_batch_sizes, 1)
    check_list("num_workers", num_workers, 0)
    if not batch_sizes:
        raise ParameterError("batch_sizes: expected at least one, got none")


def check_devices(devices: object) -> None:
    """Raise ParameterError for names of no device; that one is not here, the table states."""
    if not isinstance(devices, list | tuple) or any(type(device) is not str for device in devices):
        raise ParameterError(f"devices: expected a list of devices, got {devices!r}")
    if len(set(devices)) < len(devices):
        raise ParameterError(f"devices: expected each once, got {devices!r}")
    for device in devices:
        if device.partition(":")[0] not in ("cuda", "mps"):
            resolve_device(device)


def check_weights(weights: object) -> dict[str, tuple[float, ...]]:
    """Other weights to time, by the name of where they come from; ParameterError unless three numbers each."""
    if not isinstance(weights, Mapping) or not all(
        isinstance(each, list | tuple)
        and len(each) == 3
        and all(type(value) in (int, float) and abs(value) <= MAX_WEIGHT for value in each)
        for each in weights.values()
    ):
        raise ParameterError(f"other_weights: expected names with red, green and blue each, got {weights!r:.200}")
    if taken := {"", KNOWN} & set(weights):  # the model's own, and the pipeline's
        raise ParameterError(f"other_weights: expected names other than '' and {KNOWN!r}, got {taken.pop()!r}")
    return {str(name): tuple(map(float, each)) for name, each in weights.items()}


def benchmark(
    model: TransformNet,
    images: Tensor,
    *,
    devices: Sequence[str] = ("cpu", "cuda"),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    small_batch_sizes: Sequence[int] = SMALL_BATCH_SIZES,
    num_workers: Sequence[int] = NUM_WORKERS,
    other_weights: Mapping[str, Sequence[float]] | None = None,
    rounds: int = LEAST_ROUNDS,
    seconds: float = SECONDS,
    precision: float = PRECISION,
    done: Measurements | None = None,
    save: Callable[[Measurements], None] = lambda measured: None,
) -> pd.DataFrame:
    """Measure methods and settings on `images` (n, 3, h, w; uint8 or float32 in [0, 1]), part by part.

    Gives one row per part and setting, with the columns TABLE_COLUMNS: `Measurements.table`.

    Each setting is run once on all its images to compare the output with the ground truth, which also warms it up; then
    in at least `rounds` rounds, until the turns of the sweep have taken `seconds` (those of other parts PART_SHARE of
    it) or every speed-up is within `precision`; and once more to compare. `other_weights` (name → red, green, blue) are
    timed beside those of the model, in the fast method's best setting.
    A setting that cannot be measured stays, with the reason and without a time. CUDA has a process of its own, so that
    a device that is lost takes no other rows with it.

    After each round `save` gets all that was measured so far; given as `done` to another call, it is not measured
    again.
    """
    sweep = {"batch_sizes": batch_sizes, "small_batch_sizes": small_batch_sizes, "num_workers": num_workers}
    check_sweep(**sweep, rounds=rounds, seconds=seconds, precision=precision)
    others = {KNOWN: GRAY_WEIGHTS, **check_weights(other_weights or {})}
    check_devices(devices)
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ParameterError(f"expected images of shape (count, 3, height, width), got {tuple(images.shape)}")
    models = {"": model, **{name: weighted_model(weights, model.pipeline) for name, weights in others.items()}}
    plan = Plan(devices, **sweep, others=list(others), count=len(images))
    measured = done or Measurements.none()
    with ExitStack() as stack:
        stack.enter_context(float32_exactly())
        benches = Workbenches(models, images, stack)
        for part in (each for each in PARTS if each not in set(measured.settings["part"])):
            settings = PARTS[part](plan, measured)
            share = 1 if part == "sweep" else PART_SHARE
            limits = {"least": rounds, "precision": precision, "seconds": seconds * share}
            measured = measure_part(benches, part, settings, measured, save, **limits)
            save(measured)
    return measured.table


class Workbenches:
    """A workbench per kind of device, made when it is first needed: CUDA's is in a process of its own."""

    def __init__(self, models: Mapping[str, TransformNet], images: Tensor, stack: ExitStack):
        self.make, self.stack = (models, images), stack
        self.made: dict[str, Workbench | DeviceProcess] = {}

    def __getitem__(self, device: str) -> Workbench | DeviceProcess:
        """The workbench of a device; ParameterError if this machine has no such device."""
        kind = device.partition(":")[0]
        if kind not in available_devices():
            raise ParameterError(f"no {kind.upper()} device")
        if kind not in self.made:
            self.made[kind] = DeviceProcess(*self.make) if kind == "cuda" else Workbench(*self.make)
            self.stack.callback(self.made[kind].close)
            self.made[kind].set_threads(torch.get_num_threads())  # a process of its own begins with all
        return self.made[kind]

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """PyTorch's threads on all of them; as before at the end."""
        before = torch.get_num_threads()
        self._set_threads(count)
        try:
            yield
        finally:
            self._set_threads(before)

    def _set_threads(self, count: int) -> None:
        torch.set_num_threads(count)
        for bench in self.made.values():
            with suppress(RuntimeError):  # its process has ended
                bench.set_threads(count)


def measure_part(
    benches: Workbenches,
    part: str,
    settings: Sequence[Setting],
    before: Measurements,
    save: Callable[[Measurements], None],
    **limits,
) -> Measurements:
    """`before` with the rounds of one part more, and its settings."""
    threads = 1 if part == "one thread" else torch.get_num_threads()
    table = before.rounds_of(part)
    failed = set(table.loc[table["reason"] != "", "method"])
    facts, methods = {}, {}

    def joined(table: pd.DataFrame, settings: Sequence[dict] = ()) -> Measurements:
        others = before.rounds[before.rounds["part"] != part]
        return Measurements(
            stacked(before.settings, pd.DataFrame(settings, columns=list(SETTING_COLUMNS))),
            stacked(others, table.assign(part=part)[["part", *ROUND_COLUMNS]]),
        )

    def fail(setting: Setting, error: Exception) -> None:
        nonlocal table
        number = int(table["round"].max()) if len(table) else 0
        row = {"round": number, "attempt": 1, **failure(setting.name, error)}
        table = stacked(table, pd.DataFrame([row], columns=list(ROUND_COLUMNS)))

    with benches.threads(threads):
        for setting in tqdm(settings, desc=f"{part}: set up", unit="setting", leave=False):
            facts[setting.name] = {"setup_seconds": nan, "mse": nan}
            if setting.name in failed:
                continue
            try:
                facts[setting.name] = benches[setting.device].prepare(setting)
                methods[setting.name] = partial(benches[setting.device].turn, setting.name)
            except NOT_MEASURED as error:
                fail(setting, error)
        size_of = {setting.name: setting.batch_size for setting in settings}
        table = rounds(
            methods,
            **limits,
            estimates=lambda seconds: _speedups(per_image(seconds, settings)),
            together=size_of.get,
            title=part,
            done=table,
            save=lambda rows: save(joined(rows)),
            repeat=part != "workers",  # whose processes wait for each other
        )
        failed = set(table.loc[table["reason"] != "", "method"])
        for setting in (each for each in settings if each.name not in failed):
            try:
                benches[setting.device].check(setting.name, CHECKED_AGAIN)
            except NOT_MEASURED as error:
                fail(setting, error)
        for bench in benches.made.values():
            with suppress(RuntimeError):
                bench.clear()
    return joined(table, [{**asdict(each), "threads": threads, **facts[each.name]} for each in settings])


def _speedups(per_image: pd.DataFrame) -> list[Estimate]:
    """Of every setting over the pipeline image by image; over the first setting where that took no turns."""
    anchor = "sequential" if "sequential" in per_image else next(iter(per_image), None)
    return [ratio(per_image, name, anchor) for name in per_image if name != anchor]
