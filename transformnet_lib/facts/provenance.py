"""Where the numbers come from: images, machines, versions, commits and times of each stage."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..records import Environment, ImageSet, Stage
from ..run import Run

MACHINE = ("device_name", "cpu", "cores", "usable_cores", "threads", "os", "python", "torch", "torchvision", "cuda")


@dataclass(frozen=True)
class StageFacts:
    """One stage of a run: when, where, on which images, and what it was asked for."""

    run: str
    name: str
    images: ImageSet
    machine: Environment
    commit: str  # its first 12 digits, with "+changes" where files differed from it
    started: str  # YYYY-MM-DD HH:MM, UTC
    seconds: float  # of the last sitting
    sittings: int
    parameters: dict[str, object]

    @property
    def continued(self) -> bool:
        return self.sittings > 1


@dataclass(frozen=True)
class SettingFacts:
    """One thing that runs were trained with, or on which machine: its value for each run."""

    name: str
    values: list[object]

    @property
    def same(self) -> bool:
        return all(value == self.values[0] for value in self.values)


def stages(runs: Sequence[Run]) -> list[StageFacts]:
    return [_stage(run, name, stage) for run in runs for name, stage in run.stages.items()]


def _stage(run: Run, name: str, stage: Stage) -> StageFacts:
    commit, plus, changes = stage.commit.partition("+")
    return StageFacts(
        run=run.label,
        name=name,
        images=stage.images,
        machine=stage.environment,
        commit=commit[:12] + plus + changes,
        started=f"{stage.started:%Y-%m-%d %H:%M}",
        seconds=stage.seconds,
        sittings=stage.sittings,
        parameters=stage.parameters,
    )


def settings(runs: Sequence[Run]) -> list[SettingFacts]:
    """The parameters of the trainings, their images and machines, one fact a row."""
    columns = []
    for run in runs:
        train = run.train
        tested = [run.stages[name].images for name in ("compare", "benchmark") if name in run.stages]
        columns.append(
            asdict(train.config)
            | {"pipeline": str(run.pipeline), "image_size": "{}×{}".format(*train.images.size)}
            | {"limit": train.images.request.limit}
            | {"training_images": f"{train.images.count:,} of {train.images.source}"}
            | {"training_fingerprint": train.images.fingerprint[:16]}
            | {"test_images": f"{tested[0].count:,} of {tested[0].source}" if tested else None}
            | {"test_fingerprint": tested[0].fingerprint[:16] if tested else None}
            | {name: getattr(train.environment, name) for name in MACHINE}
        )
    return [SettingFacts(name, [column[name] for column in columns]) for name in columns[0]]


def date(runs: Sequence[Run]) -> str:
    """The day on which the newest stage was finished, YYYY-MM-DD: the same runs give the same date."""
    return max(stage.finished for run in runs for stage in run.stages.values()).date().isoformat()
