"""Where the numbers come from: images, machines, versions, commits, times; and how to make the report again."""

import shlex
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..runs import STAGE_FILES, Run
from ..training import load_config
from .text import counted


def report_date(runs: Sequence[Run]) -> str:
    """The day on which the newest stage was finished, YYYY-MM-DD: the same runs give the same date."""
    return max(stage["finished"] for run in runs for stage in run.info["stages"].values() if "finished" in stage)[:10]


def first_page(runs: Sequence[Run]) -> str:
    """Images, machine, versions and commit, each named once, and by run where runs differ."""

    def told(name: str, of_run) -> str:
        values: dict[str, list[str]] = {}
        for run in runs:
            values.setdefault(of_run(run.stage_info("train")), []).append(run.label)
        if len(values) == 1:
            return f"**{name}:** {next(iter(values))}."
        return f"**{name}:** " + "; ".join(f"{text} (`{'`, `'.join(labels)}`)" for text, labels in values.items()) + "."

    def images(stage: dict) -> str:
        height, width = stage["images"]["size"]
        return f"`{stage['images']['source']}`, {stage['images']['count']:,} training images of {height}×{width} pixels"

    def machine(stage: dict) -> str:
        there = stage["environment"]
        name = there["cpu"] if there["device"] == "cpu" else f"{there['device_name']} with {there['cpu']}"
        return f"{name}, {there['cores']} cores, {counted(there['threads'], 'thread')}, {there['os']}"

    def versions(stage: dict) -> str:
        there = stage["environment"]
        return f"Python {there['python']}, torch {there['torch']}, torchvision {there['torchvision']}"

    def stages(run: Run) -> str:
        done = [name for name in STAGE_FILES if run.has(name)]
        return f"`{run.label}` (preset `{load_config(run).preset}`: {', '.join(done)})"

    compared = [run.stage_info("compare")["images"]["count"] for run in runs if run.has("compare")]
    tested = [f"**Test images:** {compared[0]:,}, the same for all runs."] if compared else []
    lines = [
        f"**Runs:** {'; '.join(map(stages, runs))}. Every number below was read from "
        "their files, but for those marked as the paper's.",
        told("Images", images),
        *tested,
        told("Machine", machine),
        told("Versions", versions),
        told("Commit", lambda stage: f"`{short_commit(stage)}`"),
        told("Date", lambda stage: stage["started"][:10]),
    ]
    return "\n".join(f"- {line}" for line in lines)


def short_commit(stage: dict) -> str:
    """The commit's first 12 digits, with "+changes" where files differed from it."""
    commit, plus, changes = stage["commit"].partition("+")
    return commit[:12] + plus + changes


def command(runs: Sequence[Run]) -> str:
    """The command that makes this report again, in the folder that holds the runs."""
    return " ".join(["transformnet report", *(f"--run {shlex.quote(run.label)}" for run in runs)])


def provenance_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One column a run, one row a fact: parameters, machine, versions, images, commit, seconds of each stage."""
    columns = {}
    for run in runs:
        stages = run.info["stages"]
        train = run.stage_info("train")
        machine = train["environment"]
        facts = {"commit": short_commit(train)}
        facts |= {name: machine.get(name) for name in ("os", "cpu", "cores", "threads", "device_name", "python")}
        facts |= {name: machine.get(name) for name in ("torch", "torchvision", "cuda")}
        facts |= {name: value for name, value in train["parameters"].items() if name != "pipeline"}
        for name, stage in stages.items():
            images = stage["images"]
            facts[f"{images['split']} images"] = f"{images['count']:,} of {images['source']}"
            facts[f"{images['split']} images, sha256"] = images["fingerprint"][:16] + "…"
            facts[f"{name}: started"] = stage["started"]
            facts[f"{name}: seconds"] = f"{stage['seconds']:.1f}" if "seconds" in stage else "–"
        columns[run.label] = facts
    table = pd.DataFrame(columns).map(lambda value: "–" if value is None or value is np.nan else str(value))
    return table.rename_axis("Fact").reset_index()
