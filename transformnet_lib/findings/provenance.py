"""Where the numbers come from: images, machines, versions, commits, times; and how to make them again."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import pandas as pd

from ..benchmarking import BATCH_SIZES, SECONDS
from ..comparison import spread_indices
from ..measure import LEAST_ROUNDS, PRECISION
from ..pipeline import Pipeline
from ..records import Stage
from ..run import SHIPPED_SIGN, Run
from ..sizes import SIZES
from ..stages import SEEDS
from ..training import PRESETS, TrainConfig
from .learning import preset_text
from .text import code, counted, escape, listed

# What `transformnet train` has an option for
TRAIN_OPTIONS = ("seed", "epochs", "batch_size", "lr", "min_delta", "patience")

COMMAND_WIDTH = 76  # characters

# The training's parameters as a reader knows them
PARAMETERS = {
    "preset": "preset",
    "device": "device asked for",
    "seed": "seed",
    "epochs": "epochs, at most",
    "batch_size": "batch size (images)",
    "lr": "learning rate",
    "weight_decay": "weight decay",
    "min_delta": "least improvement of the MSE (min_delta)",
    "patience": "epochs without improvement (patience)",
    "val_fraction": "share of images for validation",
    "clamp": "loss on clamped outputs",
    "whiten": "weights moved in decorrelated colours",
    "decay_steps": "steps over which the learning rate falls to 0",
}

# The machine's facts
MACHINE = {
    "device_name": "device", "cpu": "CPU", "cores": "cores", "usable_cores": "cores that may be used",
    "threads": "threads", "os": "system", "python": "Python", "torch": "torch", "torchvision": "torchvision",
    "cuda": "CUDA",
}  # fmt: skip


def report_date(runs: Sequence[Run]) -> str:
    """The day on which the newest stage was finished, YYYY-MM-DD: the same runs give the same date."""
    return max(stage.finished for run in runs for stage in run.stages.values()).date().isoformat()


def first_page(runs: Sequence[Run]) -> str:
    """Images, machine, versions, seed and commit, each named once, and by run or stage where these differ."""

    def told(name: str, values: dict[str, list[str]]) -> str:
        if len(values) == 1:
            return f"**{name}:** {next(iter(values))}."
        return f"**{name}:** " + "; ".join(f"{text} ({listed(names)})" for text, names in values.items()) + "."

    def of_runs(name: str, value: Callable[[Run], str]) -> str:
        values: dict[str, list[str]] = {}
        for run in runs:
            values.setdefault(value(run), []).append(code(run.label))
        return told(name, values)

    def of_stages(name: str, value: Callable[[Stage], str]) -> str:
        """A value that may differ between the stages of a run, which were perhaps made on several machines."""
        values: dict[str, list[str]] = {}
        for run in runs:
            of_run: dict[str, list[str]] = {}
            for stage_name, stage in run.stages.items():
                of_run.setdefault(value(stage), []).append(stage_name)
            for text, stages in of_run.items():
                which = f": {', '.join(stages)}" if len(of_run) > 1 else ""
                values.setdefault(text, []).append(f"{code(run.label)}{which}")
        return told(name, values)

    def images(run: Run) -> str:
        found = run.train.images
        height, width = found.size
        return f"{code(found.source)}, {found.count:,} training images of {height}×{width} pixels"

    def machine(stage: Stage) -> str:
        there = stage.environment
        name = there.cpu if there.device == "cpu" else f"{there.device_name} with {there.cpu}"
        cores = counted(there.cores, "core") if there.cores else "cores unknown"
        return f"{escape(name)}, {cores}, {counted(there.threads, 'thread')}, {escape(there.os)}"

    def versions(stage: Stage) -> str:
        there = stage.environment
        return escape(f"Python {there.python}, torch {there.torch}, torchvision {there.torchvision}")

    def stages(run: Run) -> str:
        return f"{code(run.label)} (preset {preset_text(run)}: {', '.join(run.stages)})"

    compared = [run.compare.images.count for run in runs if run.compare]
    tested = [f"**Test images:** {compared[0]:,}, the same for all runs."] if compared else []
    marked = [
        f"**{SHIPPED_SIGN}:** {code(run.label)} came with this project, made on another machine; all its numbers are "
        f"marked {SHIPPED_SIGN} or named after it."
        for run in runs
        if run.shipped
    ]
    lines = [
        f"**Runs:** {'; '.join(map(stages, runs))}. Every number below was read from "
        "their files, but for those marked as the paper's.",
        *marked,
        of_runs("Images", images),
        *tested,
        of_stages("Machine", machine),
        of_stages("Versions", versions),
        of_runs("Seed", lambda run: str(run.train.config.seed)),
        of_stages("Commit", lambda stage: code(short_commit(stage))),
        of_stages("Date", lambda stage: stage.started.date().isoformat()),
    ]
    return "\n".join(f"- {line}" for line in lines)


def short_commit(stage: Stage) -> str:
    """The commit's first 12 digits, with "+changes" where files differed from it."""
    commit, plus, changes = stage.commit.partition("+")
    return commit[:12] + plus + changes


def training_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One column a run, one row a fact: the parameters of its training and the machine."""
    columns = {}
    for run in runs:
        stage = run.train
        machine, images = stage.environment, stage.images
        facts = {name: getattr(run.train.config, field) for field, name in PARAMETERS.items()}
        facts |= {"pipeline": run.pipeline, "training images": f"{images.count:,} of {images.source}"}
        facts |= {"training images, sha256": images.fingerprint[:16] + "…"}
        tested = [run.stages[name].images for name in ("compare", "benchmark") if name in run.stages]
        facts |= {"test images, sha256": tested[0].fingerprint[:16] + "…"} if tested else {}
        facts |= {name: getattr(machine, field) for field, name in MACHINE.items()}
        columns[run.label] = facts
    table = pd.DataFrame(columns)
    return table.map(_fact).rename_axis("Fact").reset_index()


def _fact(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def stages_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a stage of a run: its images, machine, when, how long, and the commit."""
    rows = []
    for run, name, stage in _stages(runs):
        images, machine = stage.images, stage.environment
        rows.append(
            {
                "Run": run.label,
                "stage": name,
                "images": f"{images.count:,} {images.split}",
                "machine": f"{machine.cpu}, {counted(machine.threads, 'thread')}",
                "started (UTC)": f"{stage.started:%Y-%m-%d %H:%M}",
                "seconds": _duration(stage),
                "commit": short_commit(stage),
            }
        )
    return pd.DataFrame(rows)


def _duration(stage: Stage) -> str:
    """The seconds a stage took; where it was stopped and continued, those of the last sitting."""
    several = f" (the last of {stage.sittings} sittings)" if stage.sittings > 1 else ""
    return f"{stage.seconds:.1f}{several}"


def stages_asked(runs: Sequence[Run]) -> str:
    """What each stage after the training was asked for: a Markdown list."""
    lines = []
    for run, name, stage in _stages(runs):
        asked = [f"{key.replace('_', ' ')} {_asked(value)}" for key, value in stage.parameters.items()]
        if name != "train" and asked:
            lines.append(f"- {code(run.label)}, {name}: {escape('; '.join(asked))}.")
    return "\n".join(lines)


def _stages(runs: Sequence[Run]) -> Iterator[tuple[Run, str, Stage]]:
    for run in runs:
        yield from ((run, name, stage) for name, stage in run.stages.items())


def _asked(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(value) or "none"
    if isinstance(value, list) and len(value) > 7:
        return f"{value[0]} … {value[-1]}"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def commands(runs: Sequence[Run], *, title: str = "", author: str = "") -> str:
    """The command lines that make these runs and this report again, where the images are."""
    front = [part for name, text in (("title", title), ("author", author)) if text for part in _options(name, text)]
    report = ["transformnet", "report", *_options("run", [_folder(run) for run in runs]), *front]
    lines = [command for run in runs if not run.shipped for command in run_commands(run)]
    return "\n".join([*lines, _command(report)])


def _command(words: Sequence[str]) -> str:
    """Words as a command line, continued on the next where it is longer than a page is wide."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) > COMMAND_WIDTH and word.startswith("--"):
            lines.append("   ")
        lines[-1] += f" {word}"
    return " \\\n".join(lines)


def _folder(run: Run) -> str:
    return f"report/reference/{run.path.resolve().name}" if run.shipped else run.label


def run_commands(run: Run) -> list[str]:
    """The command line of each complete stage of a run, with the options that are not the command's defaults."""
    of_stage = {"train": _train_options, "compare": _compare, "benchmark": _benchmark, "seeds": _seeds, "study": _study}
    lines = []
    for name, options in of_stage.items():
        if name in run.stages:
            lines.append(_command(["transformnet", name, *_options("run-dir", run.label), *options(run)]))
    return lines


def _options(name: str, value: object) -> list[str]:
    """`--name value`, once for each of a list."""
    values = value if isinstance(value, list) else [value]
    return [part for each in values for part in (f"--{name.replace('_', '-')}", shlex.quote(str(each)))]


def _train_options(run: Run) -> list[str]:
    config, images = asdict(run.train.config), run.train.images
    preset = asdict(PRESETS.get(config["preset"], TrainConfig()))
    options = [*_options("device", config["device"]), *_options("preset", config["preset"])]
    request = images.request.model_dump() | {"data": images.source}
    defaults = {"data_path": "data", "limit": None, "fit": "none", "image_size": None}
    for name, value in request.items():
        if value != defaults.get(name, object()):
            options += _options(name, value)
    if run.pipeline.size != Pipeline().size:
        options += _options("output_size", run.pipeline.size[0])
    options += ["--no-hflip"] * (not run.pipeline.hflip) + ["--no-vflip"] * (not run.pipeline.vflip)
    options += _options("seed", config["seed"])
    others = [name for name in config if name not in ("device", "preset", "seed") and config[name] != preset[name]]
    for name in others:
        if name in TRAIN_OPTIONS:
            options += _options(name, config[name])
    by_python = [f"{name}={config[name]!r}" for name in others if name not in TRAIN_OPTIONS]
    return options + [f"# and, from Python: {', '.join(by_python)}"] * bool(by_python)


def _compare(run: Run) -> list[str]:
    stage = run.compare
    indices = stage.parameters.get("indices", [])
    return [] if indices == spread_indices(stage.images.count) else _options("index", indices)


def _benchmark(run: Run) -> list[str]:
    limits = {"rounds": LEAST_ROUNDS, "seconds": SECONDS, "precision": PRECISION}
    options = {"devices": "device", "batch_sizes": "batch_size", **{name: name for name in limits}}
    parameters = run.benchmark.parameters
    beside = _options("beside", list(parameters.get("other_weights", {})))
    return _stage_options(parameters, options, {"batch_sizes": list(BATCH_SIZES), **limits}) + beside


def _seeds(run: Run) -> list[str]:
    seeds = {"seeds": len(run.seeds.parameters["seeds"])}
    return _stage_options(seeds, {"seeds": "seeds"}, {"seeds": SEEDS})


def _study(run: Run) -> list[str]:
    options = {"sizes": "size", "rounds": "rounds"}
    return _stage_options(run.study.parameters, options, {"sizes": list(SIZES), "rounds": LEAST_ROUNDS})


def _stage_options(parameters: dict, options: dict[str, str], defaults: dict) -> list[str]:
    """The options (parameter → option) whose parameters were recorded and are not the command's default."""
    asked = {name: option for name, option in options.items() if name in parameters}
    return [
        part
        for name, option in asked.items()
        if parameters[name] != defaults.get(name)
        for part in _options(option, parameters[name])
    ]
