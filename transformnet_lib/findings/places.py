"""Where the model was timed: each device of each run's benchmark, and what its rounds say there, in numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..benchmarking import SWEPT, Measurements
from ..measure import Estimate, estimate, verdict
from ..methods import METHODS
from ..run import Run
from .text import code, device_text

SETTING = ["device", "batch_size", "shuffle", "drop_last"]
# What each factor is compared with: `factors` gives the time at the first ÷ the time at the second, all else equal
LEVELS = {
    "network": [("pipeline", "eager"), ("eager", "folded"), ("pipeline", "folded")],
    "loader": [("rows", "batches")],
    "storage": [("float32", "uint8")],
}


@dataclass(frozen=True, eq=False)
class Place:
    """A device on which a run timed the model: the run's benchmark, the device, and how sentences name the two."""

    run: Run
    measured: Measurements
    device: str
    name: str  # Markdown, for sentences
    title: str  # plain text, for tables and figures

    @property
    def kind(self) -> str:
        """The kind of device: "cuda:1" is one of "cuda", as the paper's."""
        return self.device.partition(":")[0]

    @property
    def methods(self) -> list[str]:
        """The methods of the paper's table that were measured here, the paper's first."""
        return [method for method in SWEPT if len(self.rows(method))]

    def rows(self, method: str, part: str = "sweep") -> pd.DataFrame:
        """The measured rows of a method, in a part of the benchmark; the pipeline's on the CPU."""
        return self.measured.rows(part, method, "cpu" if method in ("sequential", "batched") else self.device)

    def best(self, method: str, part: str = "best") -> pd.Series | None:
        """The fastest setting of a method in the sweep, as it was measured again in rounds of its own."""
        rows = self.rows(method, part)
        return None if rows.empty else rows.iloc[0]

    def best_with(self, weights: str, part: str = "best") -> pd.Series | None:
        """The fast method's best setting with other weights."""
        table = self.measured.table
        wanted = {"part": part, "device": self.device, "weights": weights, "reason": ""}
        rows = table[(table[list(wanted)] == pd.Series(wanted)).all(axis=1)]
        return None if rows.empty else rows.iloc[0]

    def against(self, method: str, rival: str, part: str = "best") -> Estimate | None:
        """How many times as fast as `rival` a method is, each in its best setting, within rounds of these alone."""
        own, other = self.best(method, part), self.best(rival, part)
        return None if own is None or other is None else self.measured.ratio(part, own["name"], other["name"])

    def as_fast_as_best(self, method: str) -> int:
        """How many other settings of the sweep are not slower than the best one beyond doubt."""
        rows, best = self.rows(method), self.measured.fastest(method, self.device)
        names = [name for name in rows["name"] if name != best["name"]]
        return sum(verdict(self.measured.ratio("sweep", name, best["name"])) != "slower" for name in names)

    def pooled(self, pairs: Sequence[tuple[str, str]], part: str = "sweep") -> Estimate | None:
        """The time of the first setting ÷ that of the second, per image: in each round the median over the pairs."""
        times = self.measured.times[part]
        ratios = [times[first] / times[second] for first, second in pairs if first in times and second in times]
        return estimate(pd.concat(ratios, axis=1).dropna().median(axis=1).to_numpy()) if ratios else None

    def over_reference(self) -> Estimate | None:
        """How many times as fast as the paper's method the fast one is: in each round the median over the settings."""
        slow, fast = (self.rows(method).set_index(SETTING)["name"] for method in SWEPT)
        return self.pooled([(slow[key], fast[key]) for key in slow.index if key in fast.index])

    def effect(self, method: str, name: str) -> Estimate | None:
        """The time with `shuffle` or `drop_last` ÷ that without, over the pairs that differ in it alone."""
        others = [column for column in ("batch_size", "shuffle", "drop_last") if column != name]
        rows = self.rows(method)
        rows = rows.assign(**{name: rows[name].astype(bool)})
        pairs = rows[rows[name]].merge(rows[~rows[name]], on=others, suffixes=("_with", "_without"))
        return self.pooled(list(zip(pairs["name_with"], pairs["name_without"], strict=True)))

    def larger_batches(self, method: str) -> Estimate | None:
        """The time per image at the smallest batch size of the sweep ÷ that at the largest."""
        rows = self.rows(method)
        small, large = (
            rows[rows["batch_size"] == size].set_index(["shuffle", "drop_last"])["name"]
            for size in (rows["batch_size"].min(), rows["batch_size"].max())
        )
        if rows["batch_size"].nunique() < 2:
            return None
        return self.pooled([(small[key], large[key]) for key in small.index if key in large.index])

    def wins(self, method: str) -> pd.DataFrame:
        """Whether a method beats the pipeline in every setting of a batch size, beyond doubt: a row per batch size.

        Columns: "image by image" and "in batches" (of the same size), each a bool.
        """
        found = {}
        for part in ("small", "sweep"):
            for size, rows in self.rows(method, part).groupby("batch_size"):
                batched = self.rows("batched", part).query(f"batch_size == {size}")
                rivals = {"image by image": self.rows("sequential", part), "in batches": batched}
                found[size] = {
                    rival: len(others) > 0
                    and all(
                        verdict(self.measured.ratio(part, name, other)) == "faster"
                        for name in rows["name"]
                        for other in others["name"]
                    )
                    for rival, others in rivals.items()
                }
        return pd.DataFrame.from_dict(found, orient="index").sort_index()

    def workers(self) -> dict[int, tuple[pd.Series, Estimate]]:
        """For each number of loader processes above 0: its row, and how many times as fast as without any it is."""
        rows = self.rows("reference", "workers").set_index("num_workers")
        if 0 not in rows.index:
            return {}
        none = rows.loc[0, "name"]
        return {
            int(n): (rows.loc[n], self.measured.ratio("workers", rows.loc[n, "name"], none)) for n in rows.index if n
        }

    def factors(self) -> pd.DataFrame:
        """Main effects of network, loader and storage, over all settings of the others: a row per comparison.

        Columns: factor, before, after, and the time before ÷ that after (in each round the geometric mean over the
        other factors) as ratio, low and high; verdict. Empty unless all was measured.
        """
        times, rows = self.measured.times.get("factors", pd.DataFrame()), []
        name_of = {}
        for setting in self.measured.settings_of("factors"):
            method = METHODS.get(setting.method)
            if method and "-" in setting.method and not setting.weights and setting.device == self.device:
                name_of[method.network, method.loader, method.storage] = setting.name
        if not name_of or not set(name_of.values()) <= set(times):
            return pd.DataFrame()
        for k, (factor, pairs) in enumerate(LEVELS.items()):
            for before, after in pairs:
                cells = [cell for cell in name_of if cell[k] == before]
                logs = [
                    np.log(times[name_of[cell]] / times[name_of[(*cell[:k], after, *cell[k + 1 :])]]) for cell in cells
                ]
                found = estimate(np.exp(pd.concat(logs, axis=1).mean(axis=1)).dropna().to_numpy())
                rows.append(
                    {"factor": factor, "before": before, "after": after, "ratio": found.median, "low": found.low}
                    | {"high": found.high, "verdict": verdict(found)}
                )
        return pd.DataFrame(rows)

    def step(self, name: str) -> pd.Series | None:
        """The row of one step within a batch."""
        return self.best(name, "factors")

    def convolution_cost(self) -> Estimate | None:
        """The time of the model's convolution ÷ that of the pipeline's weighted sum, which it stands in for."""
        slow, quick = self.step("convolution"), self.step("grayscale")
        if slow is None or quick is None:
            return None
        return self.measured.ratio("factors", quick["name"], slow["name"])

    def paid_back(self, rival: str) -> float | None:
        """After how many images the set-up of the fast method, over that rival's, is paid back; inf for never."""
        own, other = self.best("fast"), self.best(rival)
        if own is None or other is None:
            return None
        gain = 1 / other["images_per_second"] - 1 / own["images_per_second"]
        return math.inf if gain <= 0 else own["setup_seconds"] / gain

    @property
    def precision(self) -> float:
        """Half the width of a speed-up's interval, as a part of it: the median over the sweep's rows here."""
        rows = pd.concat([self.rows(method) for method in ("batched", *SWEPT)])
        return float(((rows["speedup_high"] - rows["speedup_low"]) / 2 / rows["speedup"]).median())


def places(runs: Sequence[Run]) -> list[Place]:
    """Every device on which a run timed the model beside the pipeline; where several runs did, names say whose."""
    timed = [run for run in runs if run.benchmark]
    found = []
    for run in timed:
        table = run.benchmark.table
        swept = (table["part"] == "sweep") & table["method"].isin(SWEPT) & table["speedup"].notna()
        for device in dict.fromkeys(table.loc[swept, "device"]):
            name, title = device_text(device), device
            if len(timed) > 1:
                name, title = f"{name} of {code(run.label)}", f"{run.label} ({title})"
            found.append(Place(run, run.benchmark.measured, device, name, title))
    return found


def machines(runs: Sequence[Run]) -> list[Place]:
    """One place a timed run for the pipeline itself, which was timed on the CPU whether the model was or not."""
    timed = [run for run in runs if run.benchmark]
    return [Place(run, run.benchmark.measured, "cpu", device_text("cpu"), run.label) for run in timed]


def swept_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the paper's table, measured or not."""
    return table[(table["part"] == "sweep") & table["method"].isin(SWEPT)]
