"""What the paper says, held against what was measured here."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from .. import paper
from ..runs import Run
from ..training import load_config, load_training
from .abstract import distance
from .places import places
from .speed import workers_verdict
from .text import listed, scientific, times_text

HOLDS, FAILS, MIXED, OPEN = "holds", "does not hold", "holds in part", "not tested here"


@dataclass(frozen=True)
class Claim:
    """One of the paper's claims, what was found here, and whether it holds."""

    claim: str
    here: str
    verdict: str


def claims(runs: Sequence[Run]) -> list[Claim]:
    """The paper's claims that these runs can judge, in its order."""
    return [
        _learns(runs),
        _keeps_the_best(runs),
        _beats_one_by_one(runs),
        _larger_batches(runs),
        _cuda_wins(runs),
        _workers(runs),
    ]


def claims_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a claim."""
    rows = [(claim.claim, claim.here, claim.verdict) for claim in claims(runs)]
    return pd.DataFrame(rows, columns=["The paper", "Here", "Verdict"])


def _all(found: dict[str, bool]) -> str:
    """The verdict of a claim that was tested in several places."""
    if not found:
        return OPEN
    return HOLDS if all(found.values()) else MIXED if any(found.values()) else FAILS


def _recipe(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if load_config(run).preset == "paper"]


def _learns(runs: Sequence[Run]) -> Claim:
    compared = [run for run in _recipe(runs) if run.has("compare")]
    told = [
        f"{run.label}: MSE {scientific(run.stage_info('compare')['results']['test_mse'])}, largest error "
        f"{scientific(255 * run.stage_info('compare')['results']['max_error'])} of 255 grey levels"
        for run in compared
    ]
    verdict = _all({run.label: distance(run) == "equal" for run in compared})
    return Claim("Its recipe learns the grey mix of the pipeline (five pairs of pictures)", "; ".join(told), verdict)


def _keeps_the_best(runs: Sequence[Run]) -> Claim:
    told, found = [], {}
    for run in _recipe(runs):
        trained = load_training(run)
        lowest = trained.history["val_mse"].min()
        found[run.label] = trained.best_val_mse <= lowest
        told.append(
            f"{run.label}: restored {scientific(trained.best_val_mse)}, lowest of any epoch {scientific(lowest)}"
        )
    return Claim("Early stopping keeps the best validation loss", "; ".join(told), _all(found))


def _beats_one_by_one(runs: Sequence[Run]) -> Claim:
    told, found = [], {}
    for place in places(runs):
        if "reference" in place.paths:
            speedup = place.model_rows("reference")["speedup"]
            found[place.title] = bool((speedup > 1).all())
            told.append(f"{place.title}: {times_text(speedup.min())} to {times_text(speedup.max())}")
    published = paper.table1()
    processed = paper.IMAGES - published["drop_last"] * (paper.IMAGES % published["batch_size"])
    theirs = paper.SEQUENTIAL_SECONDS / paper.IMAGES / (published["seconds"] / processed)
    claim = (
        "In every setting the model, run its way, is faster than the pipeline image by image "
        f"({times_text(theirs.min())} to {times_text(theirs.max())})"
    )
    return Claim(claim, "; ".join(told), _all(found))


def _larger_batches(runs: Sequence[Run]) -> Claim:
    told, found = [], {}
    for place in places(runs):
        if "reference" in place.paths:
            rows = place.model_rows("reference")
            per_size = (rows["seconds"] / rows["images"]).groupby(rows["batch_size"]).median()
            least, most = per_size.index[0], per_size.index[-1]
            if least == most:
                continue
            found[place.title] = bool(per_size[most] < per_size[least])
            told.append(
                f"{place.title}: {times_text(per_size[least] / per_size[most])} as fast at {most} as at {least} images"
            )
    return Claim("Larger batches are faster (512 against 16 images, in its table)", "; ".join(told), _all(found))


def _cuda_wins(runs: Sequence[Run]) -> Claim:
    published = paper.table1().set_index(["device", "batch_size", "shuffle", "drop_last"])["seconds"]
    ratio = published["cpu"] / published["cuda"]
    claim = (
        f"CUDA is faster than the CPU (in {int((ratio > 1).sum())} of {len(ratio)} settings of its table, by up to "
        f"{times_text(ratio.max())})"
    )
    best = {}
    for place in places(runs):
        if "reference" in place.paths:
            kind = place.device.partition(":")[0]
            per_image = place.best("reference")["seconds"] / place.best("reference")["images"]
            best[kind] = min(best.get(kind, (per_image, place.title)), (per_image, place.title))
    if not {"cpu", "cuda"} <= set(best):
        return Claim(claim, f"measured only on {listed(list(best))}" if best else "", OPEN)
    (cpu, at_cpu), (cuda, at_cuda) = best["cpu"], best["cuda"]
    here = f"at best {times_text(cpu / cuda)} as fast ({at_cuda} against {at_cpu})"
    return Claim(claim, here, HOLDS if cuda < cpu else FAILS)


def _workers(runs: Sequence[Run]) -> Claim:
    found = {place.title: workers_verdict(place) for place in places(runs)}
    judged = {name: verdict for name, verdict in found.items() if verdict}
    told = "; ".join(f"{name}: raising it {verdict}" for name, verdict in judged.items())
    return Claim(
        "More num_workers give worse times",
        told,
        _all({name: verdict == "does not help" for name, verdict in judged.items()}),
    )
