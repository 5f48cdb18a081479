"""What the benchmarks show: on each device of each run the best settings, what matters, where the speed comes from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..benchmarking import KNOWN, PARTS, SWEPT, Measurements
from ..measure import EQUAL, Estimate, estimate
from ..methods import METHODS
from ..run import Run

SETTING = ["device", "batch_size", "shuffle", "drop_last"]
RIVALS = ("sequential", "batched")  # the pipeline, image by image and in batches
# What each factor is compared with: the time at the first ÷ the time at the second, all else equal
LEVELS = {
    "network": [("pipeline", "eager"), ("eager", "folded"), ("pipeline", "folded")],
    "loader": [("rows", "batches")],
    "storage": [("float32", "uint8")],
}
CUDA_STEPS = ("graph", "pinned", "fast")


@dataclass(frozen=True)
class Timing:
    """One setting in one part of a benchmark: its median time, with interval, and how many times as fast it is."""

    name: str
    method: str
    batch_size: int
    shuffle: bool
    drop_last: bool
    images: int  # of a pass
    seconds: Estimate  # of a pass
    milliseconds: Estimate
    microseconds: Estimate  # of a pass, per image
    speedup: Estimate | None  # over the pipeline image by image, in the same rounds; None where that was not measured
    setup_seconds: float | None
    mse: float | None  # of the output against the ground truth


@dataclass(frozen=True)
class Setting:
    """How many times as fast a method is with `shuffle` or `drop_last` as without: in each round the median pair."""

    name: str
    method: str
    ratio: Estimate


@dataclass(frozen=True)
class Wins:
    """At which batch sizes a method beats the pipeline beyond doubt, with every shuffle and drop_last."""

    rival: str
    sizes: list[int]
    measured: list[int]
    from_size: int | None  # from which on at all larger ones too

    @property
    def always(self) -> bool:
        return self.sizes == self.measured

    @property
    def never(self) -> bool:
        return not self.sizes


@dataclass(frozen=True)
class Payback:
    """After how many images the set-up is paid back by the time saved per image."""

    rival: str
    verdict: str  # of the comparison with the rival: only what is faster pays back
    images: int | None


@dataclass(frozen=True)
class Method:
    """A way to run the model, at one place."""

    name: str  # reference or fast
    settings: int  # of the sweep that were measured
    swept: Timing  # the fastest of these, as the sweep has it: partly the luckiest
    best: Timing | None  # the same setting, measured again in rounds of its own
    as_fast: int  # how many other settings of the sweep may be as fast as that
    over: dict[str, Estimate]  # how many times as fast as each of RIVALS, both at their best
    one_thread: dict[str, Estimate]  # the same with one thread
    wins: list[Wins]
    effects: list[Setting]
    larger_batches: Estimate | None  # the time per image at the smallest batch size of the sweep ÷ that at the largest
    smallest: int
    largest: int


@dataclass(frozen=True)
class Change:
    """What a change of network, loader or storage is worth: the time before ÷ that after, all else equal."""

    factor: str
    before: str
    after: str
    ratio: Estimate


@dataclass(frozen=True)
class Combination:
    """One combination of network, loader and storage, or one of CUDA's further steps; `known`: without any training."""

    network: str
    loader: str
    storage: str
    step: str  # of CUDA_STEPS, or empty
    known: bool
    speedup: Estimate  # over the pipeline image by image


@dataclass(frozen=True)
class Step:
    """Why the model as it was trained is slower than the pipeline: its convolution beside the weighted sum."""

    ratio: Estimate  # the convolution's time ÷ the weighted sum's
    convolution_microseconds: float  # per image
    sum_microseconds: float


@dataclass(frozen=True)
class OtherWeights:
    """The fast method with weights other than those timed: how many times as fast as these."""

    name: str
    known: bool  # the pipeline's own, without any training
    ratio: Estimate


@dataclass(frozen=True)
class Workers:
    """`num_workers` loader processes, and how many times as fast they are as none."""

    count: int
    timing: Timing
    ratio: Estimate


@dataclass(frozen=True)
class Missing:
    """Settings of the sweep without a time, and why."""

    device: str
    settings: int
    reason: str


@dataclass(frozen=True)
class Place:
    """A device on which a run timed the model beside the pipeline."""

    number: int  # from 1, in the order of the report
    run: str
    shipped: bool
    device: str
    named: bool  # whether several runs were timed, so that the run must be named
    cpu: str
    chip: str  # what the model ran on
    threads: int
    origin: str  # of the weights timed: "training", or "least squares"
    mse: float | None  # of these weights on the images timed
    set_up_seconds: float | None  # of the fast method, once
    weights: tuple[float, float, float]
    # The pipeline by itself, in the rounds of the best settings (else those of the sweep), for as many images each
    sequential: Timing | None  # image by image
    batched: Timing | None  # in batches, in the fastest setting
    batched_over_sequential: Estimate | None
    methods: list[Method]  # those of the paper's table that were measured, the paper's first
    fast_over_reference: Estimate | None  # in each round the median over the settings
    copy: Timing | None  # the bytes moved once
    changes: list[Change]
    factors_batch_size: int | None
    combinations: list[Combination]
    step: Step | None
    others: list[OtherWeights]
    paid_back: list[Payback]
    no_workers: Timing | None
    workers: list[Workers]
    precision: float  # half the width of a speed-up's interval, as a part of it: the median over the sweep
    rounds: dict[str, dict[str, int | None]]  # of each part: rounds, measured again, disturbed
    table: pd.DataFrame  # the run's whole benchmark, TABLE_COLUMNS

    @property
    def disturbed(self) -> int:
        """In how many of the rounds that decide the headline other programs took the processors."""
        return self.rounds["best"]["disturbed"] or 0

    @property
    def sweep_rounds(self) -> int:
        return self.rounds["sweep"]["rounds"] or 0

    @property
    def sweep_disturbed(self) -> int:
        """In how many rounds of the sweep other programs took the processors."""
        return self.rounds["sweep"]["disturbed"] or 0

    @property
    def kind(self) -> str:
        """The kind of device: "cuda:1" is one of "cuda", as the paper's."""
        return self.device.partition(":")[0]

    @property
    def timed_methods(self) -> list[Method]:
        """Those measured again in rounds of their own."""
        return [method for method in self.methods if method.best]

    @property
    def one_thread_methods(self) -> list[Method]:
        """Those measured with one thread too; [] where all had one anyway."""
        return [method for method in self.methods if method.one_thread and self.threads > 1]

    @property
    def effects(self) -> list[Setting]:
        return [effect for method in self.methods for effect in method.effects]

    @property
    def against_batched(self) -> list[Method]:
        """The methods compared with the pipeline in batches."""
        return [method for method in self.timed_methods if "batched" in method.over]

    @property
    def no_gain(self) -> bool:
        """Whether no method is, or may be, faster than the pipeline in batches."""
        ratios = [method.over["batched"] for method in self.against_batched]
        return bool(ratios) and all(ratio.verdict in ("slower", "equal") for ratio in ratios)

    @property
    def title(self) -> str:
        """What names the place in tables and figures."""
        return f"{self.run} ({self.device})" if self.named else self.device

    @property
    def quickest(self) -> Method | None:
        """The method with the most images per second, of those measured again."""
        return min(self.timed_methods, key=lambda method: method.best.microseconds.median, default=None)

    @property
    def headline(self) -> dict[str, Timing]:
        """The times that say it all: of the pipeline and of each method, at their best."""
        own = {"sequential": self.sequential, "batched": self.batched}
        found = own | {method.name: method.best for method in self.timed_methods}
        return {name: timing for name, timing in found.items() if timing}

    @property
    def workers_verdict(self) -> str:
        """Whether raising num_workers is "faster", "slower", "equal" or "open"; empty if it was not measured."""
        return _first({each.ratio.verdict for each in self.workers}, ("faster", "open", "slower", "equal"))

    @property
    def known(self) -> OtherWeights | None:
        """The fast method with the pipeline's own weights, without any training."""
        return next((each for each in self.others if each.known), None)


def _first(found: set[str], order: Sequence[str]) -> str:
    return next((verdict for verdict in order if verdict in found), "")


def places(runs: Sequence[Run]) -> list[Place]:
    """Every device on which a run timed the model beside the pipeline."""
    timed = [run for run in runs if run.benchmark]
    found = []
    for run in timed:
        table = run.benchmark.table
        swept = (table["part"] == "sweep") & table["method"].isin(SWEPT) & table["speedup"].notna()
        for device in dict.fromkeys(table.loc[swept, "device"]):
            found.append(_place(run, device, number=len(found) + 1, named=len(timed) > 1))
    return found


def missing(run: Run) -> list[Missing]:
    """The settings of the paper's table that a run's benchmark has without a time, by device and reason."""
    if not run.benchmark:
        return []
    table = run.benchmark.table
    rows = table[(table["part"] == "sweep") & table["method"].isin(SWEPT) & (table["reason"] != "")]
    kinds = rows["reason"].str.partition(" (MSE")[0] if len(rows) else rows["reason"]  # whatever the number in it
    return [
        Missing(device, len(same.drop_duplicates(SETTING)), reason)
        for (device, reason), same in rows.groupby(["device", kinds])
    ]


def _place(run: Run, device: str, *, number: int, named: bool) -> Place:
    found, machine = _Rounds(run.benchmark.measured, device), run.benchmark.environment
    methods = [_method(found, name) for name in SWEPT if len(found.rows(name))]
    best, folded = timing(found.row("fast", "best")), found.row("folded-batches-uint8", "factors")
    sequential, batched = (found.row(rival, "best") for rival in RIVALS)
    if sequential is None or batched is None:
        sequential, batched = found.row("sequential", "sweep"), found.measured.fastest("batched", "cpu")
    return Place(
        number=number,
        run=run.label,
        shipped=run.shipped,
        device=device,
        named=named,
        cpu=machine.cpu,
        chip=machine.cpu if device == "cpu" else machine.device_name,
        threads=machine.threads,
        origin=run.benchmark.origin,
        mse=best and best.mse,
        set_up_seconds=best and best.setup_seconds,
        weights=run.benchmark.weights,
        sequential=timing(sequential, images=None if batched is None else int(batched["images"])),
        batched=timing(batched),
        batched_over_sequential=found.ratio(batched, sequential),
        methods=methods,
        fast_over_reference=found.over_reference(),
        copy=timing(found.row("copy", "best")),
        changes=found.changes(),
        factors_batch_size=None if folded is None else int(folded["batch_size"]),
        combinations=found.combinations(),
        step=found.step(),
        others=found.others(),
        paid_back=found.paid_back(),
        no_workers=timing(found.no_workers()),
        workers=found.workers(),
        precision=found.precision(),
        rounds={part: found.measured.disturbed(part) for part in PARTS},
        table=run.benchmark.table,
    )


def _method(found: "_Rounds", name: str) -> Method:
    sizes = found.rows(name)["batch_size"]
    effects = ((setting, found.effect(name, setting)) for setting in ("shuffle", "drop_last"))
    return Method(
        name=name,
        settings=len(sizes),
        best=timing(found.row(name, "best")),
        as_fast=found.as_fast_as_best(name),
        swept=timing(found.measured.fastest(name, found.device)),
        over=found.over(name, "best"),
        one_thread=found.over(name, "one thread"),
        wins=found.wins(name),
        effects=[Setting(setting, name, ratio) for setting, ratio in effects if ratio],
        larger_batches=found.larger_batches(name),
        smallest=int(sizes.min()),
        largest=int(sizes.max()),
    )


def timing(row: pd.Series | None, *, images: int | None = None) -> Timing | None:
    """A row of a benchmark's table; the time is that of a pass, or with `images` that of so many at the same pace."""
    if row is None:
        return None
    n, images = int(row["rounds"]), images or int(row["images"])
    seconds = [row[name] * images / row["images"] for name in ("seconds", "low", "high")]
    speedup = [row[name] for name in ("speedup", "speedup_low", "speedup_high")]
    return Timing(
        **{name: row[name] for name in ("name", "method")},
        **{name: bool(row[name]) for name in ("shuffle", "drop_last")},
        batch_size=int(row["batch_size"]),
        images=images,
        seconds=Estimate(*map(float, seconds), n),
        milliseconds=Estimate(*(1e3 * each for each in seconds), n),
        microseconds=Estimate(*(1e6 * each / images for each in seconds), n),
        speedup=None if pd.isna(speedup[0]) else Estimate(*map(float, speedup), n),
        **{name: None if pd.isna(row[name]) else float(row[name]) for name in ("setup_seconds", "mse")},
    )


@dataclass(frozen=True, eq=False)
class _Rounds:
    """The rounds of a benchmark, seen from one of its devices."""

    measured: Measurements
    device: str

    def rows(self, method: str, part: str = "sweep") -> pd.DataFrame:
        """The measured rows of a method, in a part of the benchmark; the pipeline's on the CPU."""
        return self.measured.rows(part, method, "cpu" if method in RIVALS else self.device)

    def row(self, method: str, part: str) -> pd.Series | None:
        """The row of a method that has one there."""
        rows = self.rows(method, part)
        return None if rows.empty else rows.iloc[0]

    def ratio(self, row: pd.Series | None, other: pd.Series | None) -> Estimate | None:
        """How many times as fast as `other` a row of the same part is; None where one of them was not measured."""
        return None if row is None or other is None else self.measured.ratio(row["part"], row["name"], other["name"])

    def over(self, method: str, part: str) -> dict[str, Estimate]:
        """How many times as fast as each of RIVALS a method is, each in its best setting, within rounds."""
        found = {rival: self.ratio(self.row(method, part), self.row(rival, part)) for rival in RIVALS}
        return {rival: ratio for rival, ratio in found.items() if ratio}

    def as_fast_as_best(self, method: str) -> int:
        """How many other settings of the sweep may be as fast as the fastest one, by the intervals of their speed-ups.

        Of the fastest it is that of the rounds of its own: in the sweep the fastest of many is partly the luckiest.
        """
        rows, best = self.rows(method), self.row(method, "best")
        if best is None:
            return 0
        others = rows[rows["name"] != best["name"]]
        return int((others["speedup_high"] * (1 + EQUAL) >= best["speedup_low"]).sum())

    def pooled(self, pairs: Sequence[tuple[str, str]]) -> Estimate | None:
        """The time of the first setting ÷ that of the second, per image: in each round the median over the pairs."""
        times = self.measured.times["sweep"]
        ratios = [times[first] / times[second] for first, second in pairs if first in times and second in times]
        return estimate(pd.concat(ratios, axis=1).dropna().median(axis=1).to_numpy()) if ratios else None

    def over_reference(self) -> Estimate | None:
        """How many times as fast as the paper's method the fast one is: in each round the median over the settings."""
        slow, fast = (self.rows(method).set_index(SETTING)["name"] for method in SWEPT)
        return self.pooled([(slow[key], fast[key]) for key in slow.index if key in fast.index])

    def effect(self, method: str, name: str) -> Estimate | None:
        """The time without `shuffle` or `drop_last` ÷ that with it, over the pairs that differ in it alone."""
        others = [column for column in ("batch_size", "shuffle", "drop_last") if column != name]
        rows = self.rows(method)
        rows = rows.assign(**{name: rows[name].astype(bool)})
        pairs = rows[rows[name]].merge(rows[~rows[name]], on=others, suffixes=("_with", "_without"))
        return self.pooled(list(zip(pairs["name_without"], pairs["name_with"], strict=True)))

    def larger_batches(self, method: str) -> Estimate | None:
        """The time per image at the smallest batch size of the sweep ÷ that at the largest."""
        rows = self.rows(method)
        if rows["batch_size"].nunique() < 2:
            return None
        small, large = (
            rows[rows["batch_size"] == size].set_index(["shuffle", "drop_last"])["name"]
            for size in (rows["batch_size"].min(), rows["batch_size"].max())
        )
        return self.pooled([(small[key], large[key]) for key in small.index if key in large.index])

    def wins(self, method: str) -> list[Wins]:
        """At which batch sizes a method beats the pipeline in every setting: image by image, and in batches."""
        won: dict[str, dict[int, bool]] = {rival: {} for rival in RIVALS}
        for part in ("small", "sweep"):
            for size, rows in self.rows(method, part).groupby("batch_size"):
                batched = self.rows("batched", part)
                batched = batched[batched["batch_size"] == size]
                for rival, others in zip(RIVALS, (self.rows("sequential", part), batched), strict=True):
                    won[rival][int(size)] = len(others) > 0 and all(
                        self.measured.ratio(part, name, other).verdict == "faster"
                        for name in rows["name"]
                        for other in others["name"]
                    )
        return [_wins(rival, dict(sorted(of_size.items()))) for rival, of_size in won.items()]

    def no_workers(self) -> pd.Series | None:
        """The row of the part `workers` without loader processes."""
        rows = self.rows("reference", "workers").query("num_workers == 0")
        return None if rows.empty else rows.iloc[0]

    def workers(self) -> list[Workers]:
        """The numbers of loader processes above 0 that were measured beside none."""
        none = self.no_workers()
        return [
            Workers(int(row["num_workers"]), timing(row), self.measured.ratio("workers", row["name"], none["name"]))
            for _, row in self.rows("reference", "workers").iterrows()
            if none is not None and row["num_workers"]
        ]

    def changes(self) -> list[Change]:
        """Main effects of network, loader and storage, over all settings of the others; [] unless all was measured.

        In each round the geometric mean over the others, of these the median.
        """
        times, name_of = self.measured.times.get("factors", pd.DataFrame()), {}
        for setting in self.measured.settings_of("factors"):
            method = METHODS.get(setting.method)
            if method and "-" in setting.method and not setting.weights and setting.device == self.device:
                name_of[method.network, method.loader, method.storage] = setting.name
        if not name_of or not set(name_of.values()) <= set(times):
            return []
        found = []
        for k, (factor, pairs) in enumerate(LEVELS.items()):
            for before, after in pairs:
                logs = [
                    np.log(times[name] / times[name_of[(*cell[:k], after, *cell[k + 1 :])]])
                    for cell, name in name_of.items()
                    if cell[k] == before
                ]
                ratios = np.exp(pd.concat(logs, axis=1).mean(axis=1)).dropna()
                found.append(Change(factor, before, after, estimate(ratios.to_numpy())))
        return found

    def combinations(self) -> list[Combination]:
        """The combinations that were measured, the slowest first."""
        table, found = self.measured.table, []
        rows = table[(table["part"] == "factors") & (table["device"] == self.device) & table["speedup"].notna()]
        for _, row in rows.iterrows():
            method = METHODS.get(row["method"])
            step = row["method"] if row["method"] in CUDA_STEPS else ""
            if step or "-" in row["method"]:
                speedup = timing(row).speedup
                cell = (method.network, method.loader, method.storage)
                found.append(Combination(*cell, step, row["weights"] == KNOWN, speedup))
        return sorted(found, key=lambda each: each.speedup.median)

    def step(self) -> Step | None:
        """The model's convolution beside the pipeline's weighted sum of three channels, for which it stands."""
        slow, quick = self.row("convolution", "factors"), self.row("grayscale", "factors")
        ratio = self.ratio(quick, slow)
        return ratio and Step(ratio, *(1e6 / row["images_per_second"] for row in (slow, quick)))

    def others(self) -> list[OtherWeights]:
        """The fast method in its best setting with other weights."""
        best, table = self.row("fast", "best"), self.measured.table
        rows = table[(table["part"] == "best") & (table["device"] == self.device) & (table["reason"] == "")]
        return [
            OtherWeights(
                row["weights"], row["weights"] == KNOWN, self.measured.ratio("best", row["name"], best["name"])
            )
            for _, row in rows[rows["weights"] != ""].iterrows()
            if best is not None
        ]

    def paid_back(self) -> list[Payback]:
        """After how many images the set-up of the fast method is paid back, against each of RIVALS, which have none."""
        own, found = timing(self.row("fast", "best")), []
        for rival, ratio in self.over("fast", "best").items():
            images, gain = None, (ratio.median - 1) * own.microseconds.median / 1e6
            if ratio.verdict == "faster":
                images = max(1, math.ceil(own.setup_seconds / gain))
            found.append(Payback(rival, ratio.verdict, images))
        return found

    def precision(self) -> float:
        rows = pd.concat([self.rows(method) for method in ("batched", *SWEPT)])
        return float(((rows["speedup_high"] - rows["speedup_low"]) / 2 / rows["speedup"]).median())


def _wins(rival: str, won: dict[int, bool]) -> Wins:
    """`won` (of each batch size, ascending) as a fact."""
    sizes, from_size = list(won), None
    for size in reversed(sizes):
        if not won[size]:
            break
        from_size = size
    return Wins(rival, [size for size in sizes if won[size]], sizes, from_size)
