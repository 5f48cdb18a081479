"""The report's first sentences, the answer and what it rests on; and its last, what to take from it."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..measure import verdict
from ..methods import MAX_MSE
from ..pipeline import GRAY_WEIGHTS, Pipeline
from ..run import Run
from .learning import preset_text
from .places import Place, places
from .speed import LEVEL_NAMES, RIVALS, SWEEP, against_text
from .table1 import not_measured
from .text import code, counted, decimals, escape, listed, percent, ratio_text, scientific, times_text

SHORT = {"reference": "the paper's way", "fast": "the fast way"}  # to run the model
HALF_A_LEVEL = 0.5 / 255  # of a pixel: below it, an 8-bit picture is the same


def answer(runs: Sequence[Run]) -> str:
    """Whether the weights replace the pipeline and whether they are faster; then each way to run them, per device."""
    timed = places(runs)
    closest, quick = closest_run(runs), quickest_place(timed)
    sentences = [f"{_closeness(closest)}{_verdict(closest, quick, runs)}."]
    for kind in dict.fromkeys(place.kind for place in timed):
        place = quickest_place([place for place in timed if place.kind == kind])
        sentences += [_speed(place)] if place else []
    return " ".join(sentences)


def closest_run(runs: Sequence[Run]) -> Run | None:
    """The compared run whose model comes closest to the pipeline; None if no run that can tell was compared."""
    compared = [run for run in runs if run.compare and distance(run) not in ("no gradient", "undetermined")]
    return min(compared, key=lambda run: run.compare.test_mse, default=None)


def quickest_place(timed: Sequence[Place]) -> Place | None:
    """The place with the most images a second; one of a shipped run only where there is no other."""
    own = [place for place in timed if not place.run.shipped] or timed
    own = [place for place in own if quickest_method(place)]
    return max(own, key=lambda place: place.best(quickest_method(place))["images_per_second"], default=None)


def quickest_method(place: Place) -> str | None:
    """The method that was measured again at a place in the least time per image."""
    found = {method: place.best(method) for method in place.methods}
    timed = {method: row["images_per_second"] for method, row in found.items() if row is not None}
    return max(timed, key=timed.get, default=None)


def _closeness(best: Run | None) -> str:
    """How close the closest of the compared runs comes to the pipeline."""
    if best is None:
        return "No run here shows whether three trained weights can replace the pipeline"
    words = {
        "equal": "replace the pipeline to within half a grey level in every pixel",
        "close": "come close to the pipeline but do not equal it",
        "far": "do not replace the pipeline here",
    }[distance(best)]
    stage = best.compare
    return (
        f"Three trained weights {words} (MSE {scientific(stage.test_mse)} over "
        f"{stage.images.count:,} test images, preset {preset_text(best)})"
    )


def _verdict(closest: Run | None, place: Place | None, runs: Sequence[Run]) -> str:
    """Whether the model is faster than the pipeline, image by image and in batches, at the quickest place."""
    if place is None:
        taken = "its best settings were not measured again" if places(runs) else "no time of the model was taken"
        return f"; {taken}. {not_measured(runs)}".rstrip(" .")
    method, model = quickest_method(place), "they are"
    if place.run is not closest:
        model = f"such a model, timed with the weights of {code(place.run.label)}, is"
    ratios = {name: place.against(method, rival) for rival, name in RIVALS.items()}
    told = [f"{against_text(ratio)} the pipeline run {name}" for name, ratio in ratios.items() if ratio]
    link = "but" if any(ratio and verdict(ratio) == "slower" for ratio in ratios.values()) else "and"
    return f", {link} on {place.name} {model} {listed(told)}" if told else ""


def distance(run: Run) -> str:
    """A compared run's model against the pipeline: "equal" after rounding to 8 bits, "close", "far" or "no gradient".

    Or "undetermined": not far, but on images whose colours do not determine the weights, which thus may be any.
    """
    results = run.compare
    if run.train.no_gradient:
        return "no gradient"
    if results.test_mse > MAX_MSE:
        return "far"
    if run.train.least_squares is None:
        return "undetermined"
    return "equal" if results.max_error < HALF_A_LEVEL else "close"


def _speed(place: Place) -> str:
    """The best setting of each method at a place, beside the pipeline's, in time per image."""
    names = {"fast": "folded and run in whole batches, the fast method", "reference": "run by the paper's method"}
    found = {method: place.best(method) for method in ("fast", "reference", *RIVALS)}
    model = [
        f"{_per_image(row)} {names[method]} (batch size {row['batch_size']})"
        for method, row in found.items()
        if row is not None and method in names
    ]
    rivals = [f"{_per_image(found[rival])} run {name}" for rival, name in RIVALS.items() if found[rival] is not None]
    pipeline = f"; the pipeline, on the CPU, {listed(rivals)}" if rivals else ""
    best = place.best(quickest_method(place))
    machine = place.run.benchmark.environment
    chip = machine.cpu if place.device == "cpu" else machine.device_name
    return (
        f"On {place.name} ({escape(chip)}, {counted(machine.threads, 'thread')}) the model takes {listed(model)}"
        f"{pipeline}. These are the best of the settings {SWEEP}, measured again in rounds of their own, with the "
        f"intervals of {counted(best['rounds'], 'round')}. The speed-ups of the sweep are good to "
        f"±{percent(place.precision)}."
    )


def _per_image(row: pd.Series) -> str:
    """The time per image, with its interval."""
    median, low, high = (1e6 * row[name] / row["images"] for name in ("seconds", "low", "high"))
    digits = decimals(median)
    return f"{median:,.{digits}f} [{low:,.{digits}f}, {high:,.{digits}f}] µs per image"


def subject(runs: Sequence[Run]) -> str:
    """What is measured, and whether that is what the paper measured; cites the report's reference 1."""
    pipeline, size = runs[0].pipeline, runs[0].train.images.size
    theirs = pipeline == Pipeline() and size == (32, 32)
    origin = (
        "are those of “the paper” [[1]](#ref-1), measured anew."
        if theirs
        else "are those of “the paper” [[1]](#ref-1) but for the geometry: here images of "
        f"{size[0]}×{size[1]} pixels go through them. The paper's times are those of its own geometry, and "
        "compare only in their ratios."
    )
    return f"The pipeline ({pipeline}) and TransformNet, the network of three weights that is to replace it, {origin}"


def closeness_of_each(runs: Sequence[Run]) -> str:
    """How close each run's model comes to the pipeline."""
    words = {
        "equal": "replaces the pipeline to within half a grey level of 255 in every pixel",
        "close": "comes close to the pipeline but does not equal it",
        "far": "does not replace the pipeline",
        "no gradient": "does not replace the pipeline, since its weights had no gradient to learn from",
        "undetermined": "does not show whether it replaces the pipeline, since its training images are grey or of too "
        "few colours, and a small error on such images says nothing of others",
    }
    sentences = []
    for run in runs:
        if run.compare:
            results = run.compare
            away = np.abs(np.subtract(run.train.weights, GRAY_WEIGHTS)).max()
            sentences.append(
                f"With the preset {preset_text(run)} ({code(run.label)}), TransformNet "
                f"{words[distance(run)]}: the MSE is {scientific(results.test_mse)}, the largest error of a pixel "
                f"{scientific(255 * results.max_error)} of 255 grey levels, that of a weight {scientific(away)}."
            )
    return " ".join(sentences)


def conclusion(runs: Sequence[Run]) -> list[str]:
    """What to take from the report, a sentence or two a point: the weights, the speed, where it comes from."""
    compared = [run for run in runs if run.compare]
    told = {
        "equal": "can stand in for the pipeline wherever an 8-bit picture would do.",
        "close": "cannot stand in for the pipeline, though the loss is small and the pictures look alike: the weights "
        "tell, not the pictures.",
        "far": "cannot stand in for the pipeline: the pictures are visibly others.",
        "no gradient": "cannot stand in for the pipeline: the start had no gradient to learn from.",
        "undetermined": "cannot tell whether it can: the training images are grey or of too few colours, and a small "
        "error on such images says nothing of others.",
    }
    kinds = {kind: [run for run in compared if distance(run) == kind] for kind in told}
    points = [f"{_named(of_kind)} {told[kind]}" for kind, of_kind in kinds.items() if of_kind]
    if points:
        head = "Train it well, and it is the pipeline." if kinds["equal"] else "It is not the pipeline here."
        if kinds["undetermined"] == compared:
            head = "Whether it is the pipeline, these images cannot tell."
        points = [f"**{head}** {' '.join(points)}"]
    for place in places(runs):
        found = {method: place.against(method, "batched") for method in place.methods}
        found = {method: ratio for method, ratio in found.items() if ratio}
        parts = [
            f"run {SHORT[method]}, it is {against_text(ratio)} the pipeline in batches"
            for method, ratio in found.items()
        ]
        gain = place.over_reference()
        told = f" The fast method is {ratio_text(gain)} as fast as the paper's." if gain else ""
        pays = not found or any(verdict(ratio) in ("faster", "open") for ratio in found.values())
        advice = "" if pays else " Speed is no reason to use it."
        points += [f"**The model on {place.name}**: {'; '.join(parts)}.{told}{advice}"] if parts else []
        factors = place.factors()
        if len(factors):
            steps = [
                f"{LEVEL_NAMES[row.after]} in place of {LEVEL_NAMES[row.before]} {times_text(row.ratio)}"
                for row in factors.itertuples()
            ]
            points.append(f"**What makes the difference there**, all else equal: {listed(steps)}.")
    return points


def _named(runs: Sequence[Run]) -> str:
    return listed([f"{code(run.label)} (preset {preset_text(run)})" for run in runs])
