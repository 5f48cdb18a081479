"""What the paper says, held against what was measured here."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from .. import paper
from ..run import Run
from .abstract import distance
from .learning import changes
from .places import Place, per_image, places, speedup_at, spoiled
from .speed import LEAST_REPEATS, TOO_FEW, UNJUDGED, judged, too_few, verdict_of, workers, workers_verdict
from .text import ratio_text, scientific, times_text

HOLDS, FAILS, MIXED, UNCLEAR, OPEN = "holds", "does not hold", "differs", "not clear here", "not tested here"


@dataclass(frozen=True)
class Claim:
    """One of the paper's claims; for each run or place that can judge it what was found, in words and numbers."""

    claim: str
    here: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, str] = field(default_factory=dict)  # HOLDS, FAILS or UNCLEAR
    numbers: dict[str, object] = field(default_factory=dict)
    untested: str = ""  # why nothing could judge it

    @property
    def verdict(self) -> str:
        """Over all that judged it: MIXED where they disagree."""
        found = set(self.verdicts.values())
        return OPEN if not found else found.pop() if len(found) == 1 else MIXED


def claims(runs: Sequence[Run]) -> list[Claim]:
    """The paper's claims, in its order."""
    judges = (_learns, _keeps_the_best, _beats_one_by_one, _larger_batches, _cuda_wins, _workers)
    return [judge(runs) for judge in judges]


def claims_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a claim."""
    rows = []
    for claim in claims(runs):
        here = "; ".join(f"{name}: {told}" for name, told in claim.here.items())
        rows.append((claim.claim, here or claim.untested, claim.verdict))
    return pd.DataFrame(rows, columns=["The paper", "Here", "Verdict"])


def _recipe(runs: Sequence[Run]) -> list[Run]:
    """The runs made by the paper's recipe as it is, on all images, from whatever seed."""
    return [run for run in runs if run.train.config.preset == "paper" and not changes(run)]


NO_RECIPE = "no run here is of the preset paper, unchanged and on all images"
NOT_TIMED = "no time of the model was taken"
JUDGED = {"faster": HOLDS, "slower": FAILS}  # others are UNCLEAR


def _busy(place: Place) -> str:
    """A note where most rows of a place are disturbed, so that its times decide nothing; else empty."""
    return " (most rows disturbed)" if spoiled(place) else ""


def _learns(runs: Sequence[Run]) -> Claim:
    here, verdicts, numbers = {}, {}, {}
    for run in (run for run in _recipe(runs) if run.compare):
        results = run.compare
        numbers[run.label] = {"test_mse": results.test_mse, "largest_error_levels": 255 * results.max_error}
        here[run.label] = (
            f"MSE {scientific(results.test_mse)}, largest error {scientific(255 * results.max_error)} of 255 "
            "grey levels"
        )
        kind = distance(run)
        if kind == "undetermined":
            here[run.label] += ", but its training images do not determine the weights"
        verdicts[run.label] = {"equal": HOLDS, "undetermined": UNCLEAR}.get(kind, FAILS)
    claim = "Its recipe learns the grey mix of the pipeline (five pairs of pictures)"
    return Claim(claim, here, verdicts, numbers, NO_RECIPE)


def _keeps_the_best(runs: Sequence[Run]) -> Claim:
    here, verdicts, numbers = {}, {}, {}
    for run in _recipe(runs):
        trained = run.train
        if trained.no_gradient or len(trained.history) == run.train.config.epochs:
            continue  # it learned nothing, or ended by the limit of epochs
        lowest = float(trained.history["val_mse"].min())
        numbers[run.label] = {"restored_val_mse": trained.best_val_mse, "lowest_val_mse": lowest}
        here[run.label] = f"restored {scientific(trained.best_val_mse)}, lowest of any epoch {scientific(lowest)}"
        verdicts[run.label] = HOLDS if trained.best_val_mse <= lowest else FAILS
    claim = "Early stopping keeps the best validation loss"
    untested = "early stopping ended no run of the preset paper, unchanged, that learned anything"
    return Claim(claim, here, verdicts, numbers, untested)


def _beats_one_by_one(runs: Sequence[Run]) -> Claim:
    here, verdicts, numbers = {}, {}, {}
    for place in (place for place in places(runs) if "reference" in place.methods):
        rows = place.model_rows("reference")
        pairs = zip(speedup_at(rows, "q3"), speedup_at(rows, "q1"), strict=True)
        found = [judged(verdict_of(*pair), rows) for pair in pairs]
        least, most = rows["speedup"].min(), rows["speedup"].max()
        numbers[place.title] = {"least": least, "most": most, "settings": len(rows), "slower": found.count("slower")}
        here[place.title] = f"{times_text(least)} to {times_text(most)}{TOO_FEW if too_few(rows) else ''}{_busy(place)}"
        verdict = FAILS if "slower" in found else HOLDS if set(found) == {"faster"} else UNCLEAR
        verdicts[place.title] = UNCLEAR if spoiled(place) else verdict
    published = paper.table1()
    processed = paper.IMAGES - published["drop_last"] * (paper.IMAGES % published["batch_size"])
    theirs = paper.SEQUENTIAL_SECONDS / paper.IMAGES / (published["seconds"] / processed)
    numbers["paper"] = {"least": theirs.min(), "most": theirs.max()}
    claim = (
        "In every setting the model, run its way, is faster than the pipeline image by image "
        f"({times_text(theirs.min())} to {times_text(theirs.max())})"
    )
    return Claim(claim, here, verdicts, numbers, NOT_TIMED)


def _larger_batches(runs: Sequence[Run]) -> Claim:
    here, verdicts, numbers = {}, {}, {}
    for place in (place for place in places(runs) if "reference" in place.methods):
        rows = place.model_rows("reference")
        least, most = rows["batch_size"].min(), rows["batch_size"].max()
        if least == most:
            continue
        small, large = (rows[rows["batch_size"] == size] for size in (least, most))

        def middle(rows: pd.DataFrame, column: str) -> float:
            return per_image(rows, column).median()

        ratio = middle(small, "seconds") / middle(large, "seconds")
        low, high = middle(small, "q1") / middle(large, "q3"), middle(small, "q3") / middle(large, "q1")
        numbers[place.title] = {"ratio": ratio, "low": low, "high": high, "least": least, "most": most}
        verdict = judged(verdict_of(low, high), small, large)
        few = TOO_FEW if verdict == UNJUDGED else ""
        here[place.title] = f"{ratio_text(ratio, low, high)} as fast{few} at {most} as at {least} images{_busy(place)}"
        verdicts[place.title] = UNCLEAR if spoiled(place) else JUDGED.get(verdict, UNCLEAR)
    return Claim("Larger batches are faster (512 against 16 images, in its table)", here, verdicts, numbers, NOT_TIMED)


def _cuda_wins(runs: Sequence[Run]) -> Claim:
    published = paper.table1().set_index(["device", "batch_size", "shuffle", "drop_last"])["seconds"]
    theirs = published["cpu"] / published["cuda"]
    claim = (
        f"CUDA is faster than the CPU (in {int((theirs > 1).sum())} of {len(theirs)} settings of its table, by up to "
        f"{times_text(theirs.max())})"
    )
    numbers: dict[str, object] = {
        "paper": {"settings": len(theirs), "faster": int((theirs > 1).sum()), "most": theirs.max()}
    }
    best: dict[str, tuple] = {}
    for place in (place for place in places(runs) if "reference" in place.methods):
        row, kind = place.best("reference"), place.kind
        time = row["seconds"] / row["images"]
        if kind not in best or time < best[kind][0]:
            best[kind] = (time, row, place)
    if not {"cpu", "cuda"} <= set(best):
        missing = "CUDA" if "cpu" in best else "the CPU"
        return Claim(claim, numbers=numbers, untested=f"not measured on {missing}" if best else NOT_TIMED)
    (_, cpu, of_cpu), (_, cuda, of_cuda) = best["cpu"], best["cuda"]

    def ratio_of(column: str, by: str) -> float:
        return cpu[column] / cpu["images"] / (cuda[by] / cuda["images"])

    ratio, low, high = ratio_of("seconds", "seconds"), ratio_of("q1", "q3"), ratio_of("q3", "q1")
    verdict = judged(verdict_of(low, high), cpu, cuda)
    few = TOO_FEW if verdict == UNJUDGED else ""
    where, busy = f"{of_cuda.title} against {of_cpu.title}", _busy(of_cuda) or _busy(of_cpu)
    here = {where: f"{ratio_text(ratio, low, high)} as fast{few}, each at its best of the settings swept{busy}"}
    numbers[where] = {"ratio": ratio, "low": low, "high": high}
    return Claim(claim, here, {where: UNCLEAR if busy else JUDGED.get(verdict, UNCLEAR)}, numbers)


def _workers(runs: Sequence[Run]) -> Claim:
    found = {place: workers_verdict(place) for place in places(runs)}
    judged = {place: verdict for place, verdict in found.items() if verdict}
    kinds = {"makes it slower": HOLDS, "helps": FAILS}
    few = any(verdict is None and len(workers(place)) for place, verdict in found.items())
    how = f"measured with fewer than {LEAST_REPEATS} repeats" if few else "not measured"
    return Claim(
        "More num_workers give worse times",
        {place.title: f"raising it {verdict}{_busy(place)}" for place, verdict in judged.items()},
        {place.title: UNCLEAR if spoiled(place) else kinds.get(verdict, UNCLEAR) for place, verdict in judged.items()},
        untested=f"num_workers was {how}" if found else NOT_TIMED,
    )
