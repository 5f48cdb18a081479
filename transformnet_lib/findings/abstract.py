"""The report's first sentences: the answer, then what it rests on."""

from collections.abc import Sequence

from ..runs import Run
from ..timing import MAX_MSE, load_benchmark
from ..training import load_config, load_training
from .speed import WAYS, baseline, measured_devices, measured_paths, model_rows, quickest
from .text import counted, scientific, spread_text, times_text

HALF_A_LEVEL = 0.5 / 255  # of a pixel: below it, an 8-bit picture is the same


def answer(runs: Sequence[Run]) -> str:
    """Whether the weights replace the pipeline, and how fast each way to run them is at best, per device."""
    timed = [run for run in runs if run.has("benchmark")]
    speed = [_speed(run, device) for run in timed for device in measured_devices(load_benchmark(run))]
    return " ".join([f"{_closeness(runs)}.", *speed])


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
    }[_distance(best)]
    stage = best.stage_info("compare")
    return (
        f"Three trained weights {words} (MSE {scientific(stage['results']['test_mse'])} over "
        f"{stage['images']['count']:,} test images, preset `{load_config(best).preset}`)"
    )


def _distance(run: Run) -> str:
    """A compared run's model against the pipeline: "equal" after rounding to 8 bits, "close", "far" or "dead"."""
    results = run.stage_info("compare")["results"]
    if load_training(run).dead:
        return "dead"
    if results["test_mse"] > MAX_MSE:
        return "far"
    return "equal" if results["max_error"] < HALF_A_LEVEL else "close"


def _speed(run: Run, device: str) -> str:
    """The best setting of each way on a device, against both ways to run the pipeline."""
    table = load_benchmark(run)
    batched = baseline(table, "batched")
    parts = []
    for path in reversed(measured_paths(table, device)):  # the fast way first
        rows = model_rows(table, device, path)
        best = quickest(rows)
        ratio = best["speedup"] / batched["speedup"]
        parts.append(
            f"{WAYS[path]} takes {spread_text(best)} at best (batch size {best['batch_size']}), "
            f"{times_text(best['speedup'])} as fast as the pipeline run image by image and {times_text(ratio)} as "
            "fast as the pipeline run in batches"
        )
    machine = run.stage_info("benchmark")["environment"]
    chip = machine["cpu"] if device == "cpu" else machine["device_name"]
    return (
        f"On {device} ({chip}, {counted(machine['threads'], 'thread')}), {'; '.join(parts)} (medians and "
        f"quartiles of {best['repeats']} repeats over up to "
        f"{table['images'].max():,} images)."
    )


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
            sentences.append(
                f"With the preset `{load_config(run).preset}` ({run.label}), TransformNet {words[_distance(run)]}: "
                f"over {run.stage_info('compare')['images']['count']:,} test images the MSE is "
                f"{scientific(results['test_mse'])} and the largest error of a pixel "
                f"{scientific(255 * results['max_error'])} of 255 grey levels."
            )
    return " ".join(sentences)
