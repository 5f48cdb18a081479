"""Table 1: the paper's settings with its times, and those measured beside them."""

from collections.abc import Sequence
from dataclasses import dataclass

from .. import paper
from ..benchmarking import SWEPT
from ..measure import Estimate
from ..run import Run
from .speed import Missing, Place, Timing, missing, timing


@dataclass(frozen=True)
class Row:
    """One of the paper's 48 settings. None for what was not measured here."""

    device: str
    batch_size: int
    shuffle: bool
    drop_last: bool
    paper_milliseconds: float
    paper_speedup: float  # over its own pipeline image by image, per image
    images: int | None  # of a pass here
    reference: Timing | None
    fast: Timing | None
    ratio: Estimate | None  # how many times as fast as reference fast is
    shipped: bool  # whether a shipped run brought the times from another machine


@dataclass(frozen=True)
class Block:
    """The batch sizes of one device, shuffle and drop_last, and which of them takes the least time."""

    device: str
    shuffle: bool
    drop_last: bool
    rows: list[Row]
    best: dict[str, int | None]  # batch size, by column: paper, reference, fast; None where there is no time


@dataclass(frozen=True)
class Table1:
    """All 48 settings, with the times of one place for each kind of device that has one."""

    places: list[Place]
    blocks: list[Block]
    missing: dict[str, list[Missing]]  # by run: of its places', or of all runs where there is no place

    @property
    def rows(self) -> list[Row]:
        return [row for block in self.blocks for row in block.rows]


def tables(runs: Sequence[Run], places: Sequence[Place]) -> list[Table1]:
    """One table; more where several runs were timed on the same kind of device. "cuda:1" is one of "cuda"."""
    groups: list[list[Place]] = []
    for place in places:
        free = next((group for group in groups if place.kind not in [other.kind for other in group]), None)
        if free is None:
            groups.append([place])
        else:
            free.append(place)
    of_label = {run.label: run for run in runs}
    made = []
    for group in groups or [[]]:
        measured = {}
        for place in group:
            measured |= _measured(place, of_label[place.run])
        published = sorted(paper.table1().itertuples(), key=lambda row: row.device not in [each.kind for each in group])
        gaps = {label: missing(of_label[label]) for label in {place.run: None for place in group} or of_label}
        blocks: dict[tuple, list[Row]] = {}
        for row in published:
            key = (row.device, row.shuffle, row.drop_last)
            blocks.setdefault(key, []).append(_row(row, measured.get(_key(row), {})))
        made.append(Table1(group, [Block(*key, rows, _best(rows)) for key, rows in blocks.items()], gaps))
    return made


def _best(rows: Sequence[Row]) -> dict[str, int | None]:
    times = {
        "paper": {row.batch_size: row.paper_milliseconds for row in rows},
        "reference": {row.batch_size: row.reference.seconds.median for row in rows if row.reference},
        "fast": {row.batch_size: row.fast.seconds.median for row in rows if row.fast},
    }
    return {column: min(found, key=found.get, default=None) for column, found in times.items()}


def _measured(place: Place, run: Run) -> dict[tuple, dict]:
    """What a place has of each setting, by kind of device, batch size, shuffle and drop_last."""
    found: dict[tuple, dict] = {}
    for method in SWEPT:
        for _, row in run.benchmark.measured.rows("sweep", method, place.device).iterrows():
            found.setdefault((place.kind, *_key(row)[1:]), {"shipped": place.shipped})[method] = timing(row)
    for setting in found.values():
        if set(SWEPT) <= set(setting):
            names = setting["fast"].name, setting["reference"].name
            setting["ratio"] = run.benchmark.measured.ratio("sweep", *names)
    return found


def _row(setting, found: dict) -> Row:
    """A row of the paper's table with what was measured of it here."""
    processed = paper.IMAGES - setting.drop_last * (paper.IMAGES % setting.batch_size)
    timings = [found[method] for method in SWEPT if method in found]
    return Row(
        device=setting.device,
        batch_size=setting.batch_size,
        shuffle=setting.shuffle,
        drop_last=setting.drop_last,
        paper_milliseconds=1000 * setting.seconds,
        paper_speedup=paper.SEQUENTIAL_SECONDS / paper.IMAGES / (setting.seconds / processed),
        images=timings[0].images if timings else None,
        **{"reference": None, "fast": None, "ratio": None, "shipped": False} | found,
    )


def _key(row) -> tuple:
    return row.device, int(row.batch_size), bool(row.shuffle), bool(row.drop_last)
