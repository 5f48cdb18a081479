"""Where the model was timed: each device of each run's benchmark, and the rows measured there."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from ..run import Run
from ..timing import METHODS, NOISY_SPREAD
from .text import code, device_text

SETTING = ["device", "batch_size", "shuffle", "drop_last"]


@dataclass(frozen=True, eq=False)
class Place:
    """A device on which a run timed the model: the run's benchmark, the device, and how sentences name the two."""

    run: Run
    table: pd.DataFrame  # the rows of benchmark.csv
    device: str
    name: str  # Markdown, for sentences
    title: str  # plain text, for tables and figures

    @property
    def kind(self) -> str:
        """The kind of device: "cuda:1" is one of "cuda", as the paper's."""
        return self.device.partition(":")[0]

    @property
    def methods(self) -> list[str]:
        """The ways to run the model that were measured here, the paper's first."""
        return [method for method in METHODS if len(self.model_rows(method))]

    @property
    def rows(self) -> pd.DataFrame:
        """All rows measured on this device."""
        return self.table[(self.table["device"] == self.device) & (self.table["reason"] == "")]

    def model_rows(self, method: str) -> pd.DataFrame:
        """The measured rows of Table 1 for one way to run the model."""
        rows = swept_rows(self.table)
        return rows[(rows["device"] == self.device) & (rows["method"] == method) & (rows["reason"] == "")]

    def baseline(self, method: str) -> pd.Series:
        """The pipeline's row: image by image ("sequential"), or in batches of the sweep's fastest size ("batched")."""
        rows = self.table[(self.table["method"] == method) & (self.table["reason"] == "")]
        # As the model's `best`: a pass of the small sizes, outside the sweep, goes over fewer images
        swept = rows[rows["batch_size"].isin(swept_rows(self.table)["batch_size"])]
        return quickest(swept if method == "batched" and len(swept) else rows)

    def best(self, method: str) -> pd.Series:
        """The fastest row of the sweep for one way to run the model."""
        return quickest(self.model_rows(method))

    @property
    def copy(self) -> pd.Series | None:
        """The row of moving the images' bytes once and nothing else, if it was measured."""
        rows = self.rows[self.rows["method"] == "copy"]
        return None if rows.empty else rows.iloc[0]


def places(runs: Sequence[Run]) -> list[Place]:
    """Every device on which a run timed the model; where several runs did, names say whose."""
    timed = [run for run in runs if run.benchmark]
    found = []
    for run in timed:
        table = run.benchmark.table
        devices = dict.fromkeys(table.loc[table["method"].isin(METHODS) & (table["reason"] == ""), "device"])
        for device in devices:
            name, title = device_text(device), device
            if len(timed) > 1:
                name, title = f"{name} of {code(run.label)}", f"{run.label} ({title})"
            found.append(Place(run, table, device, name, title))
    return found


def machines(runs: Sequence[Run]) -> list[Place]:
    """One place a timed run for the pipeline itself, which was timed on the CPU whether the model was or not."""
    timed = [run for run in runs if run.benchmark]
    return [Place(run, run.benchmark.table, "cpu", device_text("cpu"), run.label) for run in timed]


def swept_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the sweep over shuffle and drop_last, measured or not: those that Table 1 has."""
    rows = table[table["method"].isin(METHODS) & (table["num_workers"] == 0)]
    return rows[rows.groupby(["method", "device", "batch_size"])["method"].transform("size") == 4]


def quickest(rows: pd.DataFrame) -> pd.Series:
    """The row of the least median time an image: not of the largest speed-up, which a slow baseline makes too."""
    return rows.loc[per_image(rows, "seconds").idxmin()]


def per_image(rows: pd.DataFrame, column: str) -> pd.Series:
    """A column of seconds a pass as seconds an image really processed."""
    return rows[column] / rows["images"]


def speedup_at(rows, quartile: str):
    """The speed-up over the pipeline image by image by a quartile of the times instead of their median."""
    return rows["sequential_seconds_per_image"] * rows["images"] / rows[quartile]


def disturbed(rows: pd.DataFrame) -> pd.Series:
    """Whether rows are noisy, or were measured in a slow or fast phase of the machine, told by their own baseline."""
    of_baseline = rows["sequential_seconds_per_image"] / rows["sequential_seconds_per_image"].median()
    return rows["noisy"] | ((of_baseline - 1).abs() > NOISY_SPREAD)


def spoiled(place: Place) -> bool:
    """Whether most rows of a place are disturbed, so that its times say little."""
    return bool(disturbed(place.rows).mean() > 0.5)
