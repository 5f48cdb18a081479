"""The report's first sentences, the answer and what it rests on; and its last, what to take from it."""

from collections.abc import Sequence

import numpy as np

from ..pipeline import GRAY_WEIGHTS, Pipeline
from ..runs import Run
from ..timing import MAX_MSE
from ..training import load_config, load_training
from .places import Place, places
from .speed import both_paths, over_batched, waterfall
from .text import code, counted, escape, scientific, spread_text, times_text

HALF_A_LEVEL = 0.5 / 255  # of a pixel: below it, an 8-bit picture is the same


def answer(runs: Sequence[Run]) -> str:
    """Whether the weights replace the pipeline and whether they are faster; then each way to run them, per device."""
    timed = places(runs)
    quick = quickest_place(timed)
    sentences = [f"{_closeness(runs)}{_verdict(quick)}."]
    sentences += [_speed(place) for place in timed]
    return " ".join(sentences)


def quickest_place(timed: Sequence[Place]) -> Place | None:
    """The place with the most images a second; one of a shipped run only where there is no other."""
    own = [place for place in timed if not place.run.shipped] or timed
    return max(own, key=lambda place: place.best(place.paths[-1])["images_per_second"], default=None)


def _closeness(runs: Sequence[Run]) -> str:
    """How close the closest of the compared runs comes to the pipeline."""
    compared = [run for run in runs if run.has("compare") and not load_training(run).dead]
    if not compared:
        return "No run here shows whether three trained weights can replace the pipeline"
    best = min(compared, key=lambda run: run.stage_info("compare")["results"]["test_mse"])
    words = {
        "equal": "replace the pipeline to within half a grey level in every pixel",
        "close": "come close to the pipeline but do not equal it",
        "far": "do not replace the pipeline here",
    }[distance(best)]
    stage = best.stage_info("compare")
    return (
        f"Three trained weights {words} (MSE {scientific(stage['results']['test_mse'])} over "
        f"{stage['images']['count']:,} test images, preset {code(load_config(best).preset)})"
    )


def _verdict(place: Place | None) -> str:
    """Whether the model is faster than the pipeline, image by image and in batches, at the quickest place."""
    if place is None:
        return "; no run here timed them"
    path = place.paths[-1]
    one_by_one, batched = place.best(path)["speedup"], over_batched(place, path)
    if one_by_one >= 1 and batched >= 1:
        return (
            f", and on {place.name} they are {times_text(one_by_one)} as fast as the pipeline run image by image and "
            f"{times_text(batched)} as fast as the pipeline run in batches"
        )
    if one_by_one >= 1:
        return (
            f"; on {place.name} they are {times_text(one_by_one)} as fast as the pipeline run image by image, but not "
            f"faster than the pipeline run in batches ({times_text(batched)})"
        )
    return f", but on {place.name} they are slower than the pipeline run image by image ({times_text(one_by_one)})"


def distance(run: Run) -> str:
    """A compared run's model against the pipeline: "equal" after rounding to 8 bits, "close", "far" or "dead"."""
    results = run.stage_info("compare")["results"]
    if load_training(run).dead:
        return "dead"
    if results["test_mse"] > MAX_MSE:
        return "far"
    return "equal" if results["max_error"] < HALF_A_LEVEL else "close"


def _speed(place: Place) -> str:
    """The best setting of each way at a place, with the pipeline's own times."""
    sequential, batched = place.baseline("sequential"), place.baseline("batched")
    ways = {"fast": "folded and run in whole batches, the fast way", "reference": "run the paper's way"}
    parts = [
        f"{spread_text(place.best(path))} {ways[path]} (batch size {place.best(path)['batch_size']})"
        for path in reversed(place.paths)
    ]
    machine = place.run.stage_info("benchmark")["environment"]
    chip = machine["cpu"] if place.device == "cpu" else machine["device_name"]
    best = place.best(place.paths[-1])
    return (
        f"On {place.name} ({escape(chip)}, {counted(machine['threads'], 'thread')}) the model takes at best "
        f"{' and '.join(parts)}, the pipeline {spread_text(sequential)} image by image and {spread_text(batched)} in "
        f"batches: medians and quartiles of {counted(best['repeats'], 'repeat')} over {sequential['images']:,} images "
        "or what whole batches leave of them."
    )


def subject(runs: Sequence[Run]) -> str:
    """What is measured, and whether that is what the paper measured; cites the report's reference 1."""
    pipeline, size = runs[0].pipeline, runs[0].stage_info("train")["images"]["size"]
    theirs = pipeline == Pipeline() and size == [32, 32]
    origin = (
        "are those of “the paper” [[1]](#ref-1), measured anew."
        if theirs
        else "are those of “the paper” [[1]](#ref-1) but for the geometry: here images of "
        f"{size[0]}×{size[1]} pixels go through them, there it was 32×32, resized to 28×28 and flipped both ways. The "
        "paper's times are given as they are, and compare only in their ratios."
    )
    return f"The pipeline ({pipeline}) and TransformNet, the network of three weights that is to replace it, {origin}"


def closeness_of_each(runs: Sequence[Run]) -> str:
    """How close each run's model comes to the pipeline."""
    words = {
        "equal": "replaces the pipeline to within half a grey level of 255 in every pixel",
        "close": "comes close to the pipeline but does not equal it",
        "far": "does not replace the pipeline",
        "dead": "does not replace the pipeline, since its weights had no gradient to learn from",
    }
    sentences = []
    for run in runs:
        if run.has("compare"):
            results = run.stage_info("compare")["results"]
            away = np.abs(np.subtract(load_training(run).model.weights, GRAY_WEIGHTS)).max()
            sentences.append(
                f"With the preset {code(load_config(run).preset)} ({code(run.label)}), TransformNet "
                f"{words[distance(run)]}: the MSE is {scientific(results['test_mse'])}, the largest error of a pixel "
                f"{scientific(255 * results['max_error'])} of 255 grey levels, that of a weight {scientific(away)}."
            )
    return " ".join(sentences)


def conclusion(runs: Sequence[Run]) -> list[str]:
    """What to take from the report, a sentence or two a point: the weights, the speed, where it comes from."""
    points = []
    compared = [run for run in runs if run.has("compare")]
    equal = [run for run in compared if distance(run) == "equal"]
    other = [run for run in compared if distance(run) != "equal"]
    if equal and other:
        points.append(
            f"**Train it well, and it is the pipeline.** {_named(equal)} can stand in for the pipeline wherever an "
            f"8-bit picture would do; {_named(other)} cannot, though its loss is small and its pictures look alike: "
            "look at the weights, not at the pictures."
        )
    elif equal:
        points.append(
            f"**It is the pipeline.** {_named(equal)} can stand in for it wherever an 8-bit picture would do."
        )
    elif other:
        points.append(f"**It is not the pipeline here.** {_named(other)} should not be put in its place.")
    for place in places(runs):
        fast = "fast" in place.paths and over_batched(place, "fast") >= 1
        paper_way = "reference" in place.paths and over_batched(place, "reference") >= 1
        if fast and paper_way:
            verdict = "The model is faster than the pipeline in batches, run either way"
        elif fast:
            verdict = "The model is faster than the pipeline in batches, but only run the fast way"
        elif paper_way:
            verdict = "The model is faster than the pipeline in batches, but not run the fast way"
        else:
            verdict = "The model is not faster than the pipeline in batches, so speed is no reason to use it"
        ratios = both_paths(place)
        gain = f", which is {times_text(ratios.median())} as fast as the paper's (median)" if len(ratios) else ""
        points.append(f"**On {place.name}.** {verdict}{gain}.")
        steps = waterfall(place)
        if len(steps):
            gained = steps.iloc[1:].set_index("path")["factor"]
            order = gained.sort_values(ascending=False)
            names = {
                "batched": "running in batches at all",
                "reference": "the model as such",
                "folded": "folding resize, mix and flips into two matrices",
                "fast": "fetching whole batches",
            }
            told = ", ".join(f"{names[path]} {times_text(factor)}" for path, factor in order.items())
            points.append(f"**What makes the difference there**, each on top of the others: {told}.")
    return points


def _named(runs: Sequence[Run]) -> str:
    return " and ".join(f"{code(run.label)} (preset {code(load_config(run).preset)})" for run in runs)
