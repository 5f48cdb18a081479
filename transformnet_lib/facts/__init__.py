"""What is true of runs: numbers with intervals, verdicts, who was measured where. Words, tables and figures say it.

Computed once from the records of runs into frozen dataclasses; `report.json` is these facts as they are.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pydantic

from .. import paper
from ..measure import Estimate
from ..pipeline import GRAY_WEIGHTS, Pipeline
from ..records import ImageSet
from ..run import Run
from .claims import Claim, claims
from .commands import commands
from .learning import RunFacts, Seeds, WeightRow, run_facts, weight_rows
from .provenance import SettingFacts, StageFacts, date, settings, stages
from .speed import Missing, Place, missing, places
from .study import StudyFacts, study_facts
from .table1 import Table1, tables

FORMAT = 3  # of report.json; raised when a name changes its meaning


@dataclass(frozen=True)
class Report:
    """All that a report says, of runs of one pipeline. Seconds, images, MSE of pixels in [0, 1]."""

    format: int
    title: str
    author: str
    date: str
    pipeline: Pipeline
    tested: ImageSet | None  # the images compared and timed on; None where neither was done
    image_size: tuple[int, int]  # height and width
    papers_geometry: bool  # whether the paper's pipeline and image size
    ground_truth_weights: tuple[float, float, float]
    paper_source: str
    paper_images: int
    paper_seconds: float  # of its pipeline image by image
    parameters: int  # of the model
    parameter_bytes: int
    runs: list[RunFacts]
    weight_rows: list[WeightRow]
    closest: RunFacts | None  # the compared run whose model comes closest to the pipeline, of those that can tell
    recipe: RunFacts | None  # the compared run of the paper's preset, unchanged if there is one
    places: list[Place]
    quickest: Place | None  # the place with the most images per second; of a shipped run only if there is no other
    table1: list[Table1]
    missing: dict[str, list[Missing]]  # by run
    studies: list[StudyFacts]
    claims: list[Claim]
    settings: list[SettingFacts]
    stages: list[StageFacts]
    commands: str

    @property
    def compared(self) -> list[RunFacts]:
        return [run for run in self.runs if run.comparison]

    @property
    def seeded(self) -> list[RunFacts]:
        return [run for run in self.runs if run.seeds]

    @property
    def closest_other(self) -> RunFacts | None:
        """The closest run where it is not the recipe's."""
        return None if self.closest is self.recipe else self.closest

    @property
    def recipe_seeds(self) -> Seeds | None:
        """What the paper's preset makes of its seeds."""
        return next((seeds for run in self.seeded for seeds in run.seeds if seeds.preset == "paper"), None)

    @property
    def in_training(self) -> int:
        """How many test images are also among the training images of a compared run."""
        return max((run.comparison.in_training or 0 for run in self.compared), default=0)

    @property
    def test_kind(self) -> str:
        """The kind of the test images, which all runs share: photos, cifar10 or folder."""
        return self.tested.source.partition(":")[0] if self.tested else ""

    @property
    def machines(self) -> list[Place]:
        """One place per run that was timed: the pipeline's own times are of the CPU whatever the device."""
        return list({place.run: place for place in reversed(self.places)}.values())[::-1]

    @property
    def sources(self) -> dict[str, list[str]]:
        """The runs by the kind of their images."""
        return _grouped((run.kind, run.label) for run in self.runs)

    @property
    def devices(self) -> dict[str, list[str]]:
        """The runs by the device that they were trained on."""
        return _grouped((f"{run.device} ({run.device_name})", run.label) for run in self.runs)

    @property
    def by_distance(self) -> dict[str, list[RunFacts]]:
        """The compared runs by how close their models come to the pipeline, the closest kind first."""
        order = ("equal", "close", "far", "no gradient", "undetermined")
        found = {kind: [run for run in self.compared if run.comparison.distance == kind] for kind in order}
        return {kind: runs for kind, runs in found.items() if runs}

    @property
    def undetermined(self) -> bool:
        """Whether all models were compared on images that do not determine the weights."""
        return list(self.by_distance) == ["undetermined"]

    @property
    def same_settings(self) -> list[SettingFacts]:
        return [fact for fact in self.settings if fact.same]

    @property
    def different_settings(self) -> list[SettingFacts]:
        return [fact for fact in self.settings if not fact.same]

    @property
    def paper_milliseconds(self) -> float:
        return 1000 * self.paper_seconds

    @property
    def not_shown(self) -> list[RunFacts]:
        return [run for run in self.runs if run not in self.shown]

    @property
    def shown(self) -> list[RunFacts]:
        """The runs that narrow figures show: the first of each preset, the preset `paper` first; at most two."""
        first: dict[str, RunFacts] = {}
        for run in sorted(self.runs, key=lambda run: run.shipped):
            first.setdefault(run.preset.name, run)
        return sorted(first.values(), key=lambda run: run.preset.name != "paper")[:2]


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def report_facts(runs: Sequence[Run], *, title: str = "", author: str = "") -> Report:
    facts, found = [run_facts(run) for run in runs], places(runs)
    compared = [each for each in facts if each.comparison]
    can_tell = [each for each in compared if each.comparison.distance not in ("no gradient", "undetermined")]
    recipe = sorted(
        (each for each in compared if each.preset.name == "paper"), key=lambda each: not each.preset.unchanged
    )
    quick = [place for place in found if place.quickest]
    quick = [place for place in quick if not place.shipped] or quick
    pipeline, size = runs[0].pipeline, runs[0].train.images.size
    return Report(
        format=FORMAT,
        title=title,
        author=author,
        date=date(runs),
        pipeline=pipeline,
        tested=next((stage.images for run in runs for stage in (run.compare, run.benchmark) if stage), None),
        image_size=size,
        papers_geometry=pipeline == Pipeline() and size == (32, 32),
        ground_truth_weights=GRAY_WEIGHTS,
        paper_source=paper.SOURCE,
        paper_images=paper.IMAGES,
        paper_seconds=paper.SEQUENTIAL_SECONDS,
        parameters=len(GRAY_WEIGHTS),
        parameter_bytes=4 * len(GRAY_WEIGHTS),
        runs=facts,
        weight_rows=weight_rows(facts),
        closest=min(can_tell, key=lambda each: each.comparison.mse, default=None),
        recipe=next(iter(recipe), None),
        places=found,
        quickest=min(quick, key=lambda place: place.quickest.best.microseconds.median, default=None),
        table1=tables(runs, found),
        missing={run.label: missing(run) for run in runs},
        studies=[study for run in runs if (study := study_facts(run))],
        claims=claims(runs, facts, found),
        settings=settings(runs),
        stages=stages(runs),
        commands=commands(runs, title=title, author=author),
    )


def as_json(value: object) -> object:
    """Facts as JSON values: records as objects with their verdicts, tables as lists of rows, no NaN or infinity."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        derived = [name for name in ("verdict", "precision") if isinstance(getattr(type(value), name, None), property)]
        return {name: as_json(getattr(value, name)) for name in (*names, *derived)}
    if isinstance(value, pydantic.BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, pd.DataFrame):
        return as_json(value.to_dict("records"))
    if isinstance(value, dict):
        return {str(key): as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value


__all__ = ["Estimate", "Report", "as_json", "report_facts"]
