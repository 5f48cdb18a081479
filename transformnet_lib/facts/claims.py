"""What the paper says, held against what was measured here."""

from collections.abc import Sequence
from dataclasses import dataclass

from .. import paper
from ..measure import Estimate, estimate
from ..run import Run
from .learning import RunFacts
from .speed import Method, Place

HOLDS, FAILS, MIXED, UNCLEAR, OPEN = "holds", "does not hold", "differs", "not clear here", "not tested here"
JUDGED = {"faster": HOLDS, "slower": FAILS, "equal": FAILS, "open": UNCLEAR}  # that one is faster


@dataclass(frozen=True)
class Finding:
    """What one run, or one place, shows of a claim."""

    who: str
    verdict: str  # HOLDS, FAILS or UNCLEAR
    numbers: dict[str, object]


@dataclass(frozen=True)
class Claim:
    """One of the paper's claims. `name` is the block of the words that say it."""

    name: str
    paper: dict[str, float]  # its own numbers
    findings: list[Finding]
    untested: str  # why nothing could judge it; empty where something did

    @property
    def verdict(self) -> str:
        """Over all that judged it: MIXED where they disagree."""
        found = {finding.verdict for finding in self.findings}
        return OPEN if not found else found.pop() if len(found) == 1 else MIXED


def claims(runs: Sequence[Run], facts: Sequence[RunFacts], places: Sequence[Place]) -> list[Claim]:
    """The paper's claims, in its order: of its recipe, judged by its preset, unchanged; of times, judged by places."""
    recipe = [each for each in facts if each.preset.name == "paper" and each.preset.unchanged]
    timed = [(place, method) for place in places for method in place.methods if method.name == "reference"]
    cuda, untested = _cuda(runs, timed)
    published = paper.table1()
    per_image = published["seconds"] / (
        paper.IMAGES - published["drop_last"] * (paper.IMAGES % published["batch_size"])
    )
    speedups = paper.SEQUENTIAL_SECONDS / paper.IMAGES / per_image
    both = published.set_index(["device", "batch_size", "shuffle", "drop_last"])["seconds"]
    gain = both["cpu"] / both["cuda"]
    no_time = "" if timed else "not timed"
    stopped = [each for each in recipe if each.training.ended_early and not each.training.no_gradient]
    sizes = [(place, method) for place, method in timed if method.larger_batches]
    return [
        _claim("learns", [_learns(run) for run in recipe if run.comparison], "no recipe"),
        _claim("best", [_best(run) for run in stopped], "never stopped"),
        _claim("sequential", [_sequential(run, place) for run, place in _of(runs, timed)], no_time,
               least=speedups.min(), most=speedups.max()),
        _claim("batches", [_batches(*each) for each in sizes], no_time or "one batch size"),
        _claim("cuda", cuda, untested, settings=len(gain), faster=int((gain > 1).sum()), most=gain.max()),
        _claim("workers", [_workers(place) for place in places if place.workers], no_time or "no workers"),
    ]  # fmt: skip


def _claim(name: str, findings: list[Finding], untested: str, **numbers: float) -> Claim:
    return Claim(name, numbers, findings, "" if findings else untested)


def _of(runs: Sequence[Run], timed: Sequence[tuple]) -> list[tuple[Run, Place]]:
    of_label = {run.label: run for run in runs}
    return [(of_label[place.run], place) for place, _ in timed]


def _learns(run: RunFacts) -> Finding:
    found = run.comparison
    verdict = {"equal": HOLDS, "undetermined": UNCLEAR}.get(found.distance, FAILS)
    return Finding(run.label, verdict, {"mse": found.mse, "grey_levels": found.grey_levels, "distance": found.distance})


def _best(run: RunFacts) -> Finding:
    trained = run.training
    numbers = {"restored": trained.val_mse, "lowest": trained.lowest_val_mse}
    return Finding(run.label, HOLDS if trained.restored_lowest else FAILS, numbers)


def _sequential(run: Run, place: Place) -> Finding:
    measured = run.benchmark.measured
    rows = measured.rows("sweep", "reference", place.device)
    found = [measured.ratio("sweep", name, "sequential").verdict for name in rows["name"]]
    counts = {word: found.count(word) for word in ("faster", "slower", "equal", "open")}
    numbers = {"settings": len(rows), "least": rows["speedup"].min(), "most": rows["speedup"].max()}
    numbers["counts"] = {word: count for word, count in counts.items() if count}
    verdict = FAILS if counts["slower"] or counts["equal"] else UNCLEAR if counts["open"] else HOLDS
    return Finding(place.title, verdict, numbers)


def _batches(place: Place, method: Method) -> Finding:
    ratio = method.larger_batches
    return Finding(
        place.title, JUDGED[ratio.verdict], {"ratio": ratio, "least": method.smallest, "most": method.largest}
    )


def _cuda(runs: Sequence[Run], timed: Sequence[tuple]) -> tuple[list[Finding], str]:
    """CUDA at its best against the CPU at its best, by the runs that are fastest on each."""
    best = {}
    for place, method in timed:
        if method.best and (place.kind not in best or _time(method) < _time(best[place.kind][1])):
            best[place.kind] = place, method
    if not {"cpu", "cuda"} <= set(best):
        return [], "not timed" if not best else "not on CUDA" if "cpu" in best else "not on the CPU"
    (of_cpu, cpu), (of_cuda, cuda) = best["cpu"], best["cuda"]
    same = of_cpu.run == of_cuda.run
    measured = {run.label: run.benchmark.measured for run in runs if run.benchmark}
    if same:
        ratio = measured[of_cpu.run].ratio("best", cuda.best.name, cpu.best.name)
    else:  # different runs share no rounds: the ends of the two intervals against each other, wider than needed
        slow, quick = (
            estimate(measured[place.run].times["best"][method.best.name].dropna().to_numpy())
            for place, method in (best["cpu"], best["cuda"])
        )
        ends = slow.median / quick.median, slow.low / quick.high, slow.high / quick.low
        ratio = Estimate(*ends, min(slow.n, quick.n))
    numbers = {"ratio": ratio, "same_rounds": same, "cuda": of_cuda.title, "cpu": of_cpu.title}
    return [Finding(of_cuda.title, JUDGED[ratio.verdict], numbers)], ""


def _time(method: Method) -> float:
    return method.best.microseconds.median


def _workers(place: Place) -> Finding:
    """That more of them are worse."""
    verdict = {"slower": HOLDS, "faster": FAILS, "equal": FAILS, "open": UNCLEAR}[place.workers_verdict]
    return Finding(place.title, verdict, {"effect": place.workers_verdict})
