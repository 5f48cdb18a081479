"""The report's first sentences."""

from collections.abc import Sequence

from ..runs import Run
from ..timing import MAX_MSE, load_benchmark
from ..training import load_config, load_training
from .speed import fastest, measured_devices, measured_paths
from .text import scientific


def answer(runs: Sequence[Run]) -> str:
    """The report's first sentences: how close the model comes, and whether it is faster, per device."""
    sentences = []
    trained = {run.label: load_training(run) for run in runs}
    for run in runs:
        if run.has("compare"):
            results = run.stage_info("compare")["results"]
            if trained[run.label].dead:
                verdict = "does not replace the pipeline, since its weights had no gradient to learn from"
            elif results["test_mse"] > MAX_MSE:
                verdict = "does not replace the pipeline"
            elif results["max_error"] < 0.5 / 255:
                verdict = "replaces the pipeline to within half a grey level of 255 in every pixel"
            else:
                verdict = "comes close to the pipeline but does not equal it"
            sentences.append(
                f"With the preset `{load_config(run).preset}` ({run.label}), TransformNet {verdict}: over "
                f"{run.stage_info('compare')['images']['count']:,} test images the MSE is "
                f"{scientific(results['test_mse'])} and the largest error of a pixel "
                f"{scientific(255 * results['max_error'])} of 255 grey levels."
            )
    for run in runs:
        if run.has("benchmark"):
            table = load_benchmark(run)
            for device in measured_devices(table):
                sentences += [fastest(table, device, path) for path in measured_paths(table, device)]
    return " ".join(sentences)
