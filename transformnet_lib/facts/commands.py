"""The command lines that make runs and a report again."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict

from ..benchmarking import BATCH_SIZES, SECONDS
from ..comparison import spread_indices
from ..measure import LEAST_ROUNDS, PRECISION
from ..pipeline import Pipeline
from ..records import ImageSet
from ..run import Run
from ..sizes import SIZES
from ..stages import SEEDS
from ..training import PRESETS, TrainConfig

# What `transformnet train` has an option for
TRAIN_OPTIONS = ("seed", "epochs", "batch_size", "lr", "min_delta", "patience")
WIDTH = 76  # characters


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
        if len(lines[-1]) + len(word) > WIDTH and word.startswith("--"):
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
            images = [] if name == "train" else _other_images(run, run.stages[name].images)
            lines.append(_command(["transformnet", name, *_options("run-dir", run.label), *images, *options(run)]))
    return lines


def _other_images(run: Run, images: ImageSet) -> list[str]:
    """The options that name a stage's images, where they are not those of the training's source."""
    asked, trained = ({"data": each.source, "data_path": each.request.data_path} for each in (images, run.train.images))
    return [part for name in asked if asked[name] != trained[name] for part in _options(name, asked[name])]


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
        height, width = run.pipeline.size
        options += _options("output_size", height if height == width else f"{height}x{width}")
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
