"""What the paper says, held against what was measured here."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import pandas as pd

from .. import paper
from ..measure import Estimate, verdict
from ..run import Run
from .abstract import distance
from .learning import changes
from .places import Place, places
from .speed import workers_verdict
from .text import listed, ratio_text, scientific, times_text

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
JUDGED = {"faster": HOLDS, "slower": FAILS, "equal": FAILS, "open": UNCLEAR}  # that one is faster


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
        rows = place.rows("reference")
        found = [verdict(place.measured.ratio("sweep", name, "sequential")) for name in rows["name"]]
        least, most = rows["speedup"].min(), rows["speedup"].max()
        counts = {word: found.count(word) for word in ("faster", "slower", "equal", "open")}
        numbers[place.title] = {"least": least, "most": most, "settings": len(rows), **counts}
        told = listed([f"{word} in {count}" for word, count in counts.items() if count])
        here[place.title] = f"{times_text(least)} to {times_text(most)} by the medians; {told} of {len(rows)} settings"
        failed = counts["slower"] or counts["equal"]
        verdicts[place.title] = FAILS if failed else UNCLEAR if counts["open"] else HOLDS
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
        if ratio := place.larger_batches("reference"):
            sizes = place.rows("reference")["batch_size"]
            numbers[place.title] = {**asdict(ratio), "least": sizes.min(), "most": sizes.max()}
            here[place.title] = f"{ratio_text(ratio)} as fast at {sizes.max()} as at {sizes.min()} images"
            verdicts[place.title] = JUDGED[verdict(ratio)]
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
    best: dict[str, tuple[pd.Series, Place]] = {}
    for place in (place for place in places(runs) if place.best("reference") is not None):
        row, kind = place.best("reference"), place.kind
        if kind not in best or row["images_per_second"] > best[kind][0]["images_per_second"]:
            best[kind] = row, place
    if not {"cpu", "cuda"} <= set(best):
        missing = "CUDA" if "cpu" in best else "the CPU"
        return Claim(claim, numbers=numbers, untested=f"not measured on {missing}" if best else NOT_TIMED)
    (cpu, of_cpu), (cuda, of_cuda) = best["cpu"], best["cuda"]

    def ratio_of(column: str, by: str) -> float:
        return cpu[column] / cpu["images"] / (cuda[by] / cuda["images"])

    where, how = f"{of_cuda.title} against {of_cpu.title}", "within the same rounds"
    if of_cpu.measured is of_cuda.measured:
        ratio = of_cpu.measured.ratio("best", cuda["name"], cpu["name"])
    else:  # different runs share no rounds: the ends of the two intervals against each other, wider than needed
        how, rounds = "by the ends of the intervals", int(min(cpu["rounds"], cuda["rounds"]))
        ratio = Estimate(ratio_of("seconds", "seconds"), ratio_of("low", "high"), ratio_of("high", "low"), rounds)
    here = {where: f"{ratio_text(ratio)} as fast, each at its best, {how}"}
    numbers[where] = asdict(ratio)
    return Claim(claim, here, {where: JUDGED[verdict(ratio)]}, numbers)


def _workers(runs: Sequence[Run]) -> Claim:
    found = {place.title: workers_verdict(place) for place in places(runs)}
    kinds = {"makes it slower": HOLDS, "helps": FAILS, "makes no difference": FAILS, "open": UNCLEAR}
    told = {"open": "whether raising it matters is open"}
    judged = {title: each for title, each in found.items() if each}
    return Claim(
        "More num_workers give worse times",
        {title: told.get(each, f"raising it {each}") for title, each in judged.items()},
        {title: kinds[each] for title, each in judged.items()},
        untested="num_workers was not measured" if found else NOT_TIMED,
    )
