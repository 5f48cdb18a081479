"""What the stage study shows: the same pipeline by other libraries, and cost over the number of images."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..libraries import FAST
from ..measure import Estimate
from ..run import Run

SAME = 1.0  # grey levels of 255: pictures that differ more somewhere are not the same


@dataclass(frozen=True)
class Library:
    """A way to do the work on a device."""

    method: str
    device: str
    seconds: Estimate | None  # None where `reason` says why
    speedup: Estimate | None  # over torchvision image by image
    ahead: Estimate | None  # how many times as fast as it the model's fast method is on the same device
    grey_levels: float | None  # its largest difference from the ground truth, of 255
    reason: str

    @property
    def ours(self) -> bool:
        return self.method.startswith("TransformNet")

    @property
    def differs(self) -> bool:
        return self.grey_levels is not None and self.grey_levels > SAME


@dataclass(frozen=True)
class Rival:
    """On a device the quickest of the other libraries."""

    device: str
    library: Library
    own: Library  # the model's fast method
    others: list[Library]  # all other libraries measured there

    @property
    def different(self) -> list[Library]:
        """Those that make other pictures."""
        return [library for library in self.others if library.differs]


@dataclass(frozen=True)
class Size:
    """How a method's time grows with the number of images."""

    method: str
    images: int  # the most measured
    seconds: Estimate  # for these
    microseconds: float  # per image
    power: float | None  # of the number of images with which time grows: the slope of a line through the logarithms
    growth: str  # "less", "proportional" or "more"; empty for one size


@dataclass(frozen=True)
class StudyFacts:
    label: str  # of the run
    images: int
    libraries: list[Library]
    rivals: list[Rival]
    sizes: list[Size]
    sizes_table: pd.DataFrame
    peak_mib: dict[int, float]  # the process' largest memory, by number of images


def study_facts(run: Run) -> StudyFacts | None:
    """None for a run without the stage."""
    if not run.study:
        return None
    libraries = [_library(row) for row in run.study.libraries.to_dict("records")]
    sizes = run.study.sizes[run.study.sizes["reason"] == ""]
    return StudyFacts(
        label=run.label,
        images=int(run.study.libraries["images"].max()) if libraries else 0,
        libraries=libraries,
        rivals=[
            rival for device in dict.fromkeys(each.device for each in libraries) for rival in _rival(libraries, device)
        ],
        sizes=[_size(method, rows) for method, rows in sizes.groupby("method", sort=False)],
        sizes_table=run.study.sizes,
        peak_mib={int(images): float(peak) for images, peak in sizes.groupby("images")["peak_mib"].max().items()},
    )


def _library(row: dict) -> Library:
    def found(median: str, low: str, high: str) -> Estimate | None:
        return None if pd.isna(row[median]) else Estimate(row[median], row[low], row[high], int(row["rounds"]))

    return Library(
        method=row["method"],
        device=row["device"],
        seconds=found("seconds", "low", "high"),
        speedup=found("speedup", "speedup_low", "speedup_high"),
        ahead=found("ahead", "ahead_low", "ahead_high"),
        grey_levels=None if pd.isna(row["max_difference"]) else float(row["max_difference"]),
        reason=row["reason"],
    )


def _rival(libraries: list[Library], device: str) -> list[Rival]:
    """At most one."""
    there = [each for each in libraries if each.device == device and not each.reason]
    own = [each for each in there if each.method == FAST]
    others = [each for each in there if not each.ours and each.grey_levels is not None]
    if not own or not others:
        return []
    return [Rival(device, min(others, key=lambda each: each.seconds.median), own[0], others)]


def _size(method: str, rows: pd.DataFrame) -> Size:
    last, power = rows.iloc[-1], None
    if len(rows) > 1:
        power = float(np.polyfit(np.log(rows["images"].astype(float)), np.log(rows["seconds"]), 1)[0])
    seconds = Estimate(*(float(last[name]) for name in ("seconds", "low", "high")), int(last["rounds"]))
    growth = "" if power is None else "less" if power < 0.9 else "proportional" if power < 1.1 else "more"
    images = int(last["images"])
    return Size(method, images, seconds, 1e6 * seconds.median / images, power, growth)
