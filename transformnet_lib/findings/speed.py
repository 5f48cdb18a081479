"""What the benchmarks say: which way is fastest, from which batch size on, what matters, where the speed comes from."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from .. import paper
from ..timing import METHODS, NOISY_SPREAD
from .places import SETTING, Place, disturbed, per_image, speedup_at
from .text import METHOD_NAMES, code, counted, escape, listed, ratio_text, repeats_text, spread_text, times_text

# A setting "matters" if in at least this share of the pairs the quartile ranges lie apart, on the same side.
APART_SHARE = 0.75
SWEEP = "swept over batch size, shuffle and drop_last"  # all that `Place.best` looks at, small sizes are not
LEAST_REPEATS = 3  # fewer have no spread to judge a difference by
UNJUDGED = "cannot be judged"  # the verdict on them
TOO_FEW = " (too few repeats to judge)"

WAYS = {"reference": "the model run the paper's way", "fast": "the model run the fast way"}

# The steps of the waterfall, each with what it changes of the one before
CHANGES = {
    "batched": "running the pipeline in batches",
    "reference": "putting the model in its place, run the paper's way,",
    "folded": "folding the model",
    "fast": "the batch loader, with images stored as uint8,",
}


def setting_text(row: pd.Series) -> str:
    """A setting in words: "batch size 128, shuffled, drop_last"."""
    order = "shuffled" if row["shuffle"] else "in order"
    return f"batch size {row['batch_size']}, {order}{', drop_last' if row['drop_last'] else ''}"


# The baselines and the fastest settings


def baselines(place: Place) -> str:
    """The pipeline's own times on the machine of this place, beside the paper's."""
    sequential, batched = place.baseline("sequential"), place.baseline("batched")
    machine = place.run.benchmark.environment
    few = TOO_FEW if too_few(sequential, batched) else ""
    return (
        f"On the machine of {code(place.run.label)} ({escape(machine.cpu)}, "
        f"{counted(machine.threads, 'thread')}) the pipeline "
        f"takes {spread_text(sequential)} image by image for {sequential['images']:,} images (the paper, on its "
        f"machine: {paper.SEQUENTIAL_SECONDS} s for {paper.IMAGES:,}), and {spread_text(batched)} in batches of "
        f"{batched['batch_size']}, {times_text(batched['speedup'])} as fast{few}."
    )


def against(place: Place, method: str, rival: str) -> dict:
    """A way to run the model against the pipeline, both at the sweep's fastest: rival is "sequential" or "batched".

    ratio: how many times as fast it is, by the medians; low and high: by the worse and the better pair of quartiles.
    verdict: "faster" if even low is above 1, "slower" if even high is below 1, else "no clear difference"; or, from
    fewer than LEAST_REPEATS repeats, "cannot be judged".
    """
    best, other = place.best(method), place.baseline(rival)
    # Image by image is what each speed-up is over already, and took turns with its row
    ratio, low, high = (best["speedup"], speedup_at(best, "q3"), speedup_at(best, "q1"))
    if rival == "batched":
        ratio, low, high = ratio / other["speedup"], low / speedup_at(other, "q1"), high / speedup_at(other, "q3")
    return {"ratio": ratio, "low": low, "high": high, "verdict": judged(verdict_of(low, high), best, other)}


def too_few(*measured: pd.Series | pd.DataFrame) -> bool:
    """Whether any of these rows, or rows of tables, has fewer than LEAST_REPEATS repeats."""
    return any(np.min(each["repeats"]) < LEAST_REPEATS for each in measured)


def judged(verdict: str, *measured: pd.Series | pd.DataFrame) -> str:
    """The verdict on rows that were compared; that there can be none where their repeats are too few."""
    return UNJUDGED if too_few(*measured) else verdict


def verdict_of(low: float, high: float) -> str:
    """What a ratio of speeds says whose worst and best pair of quartiles give `low` and `high`."""
    return "faster" if low > 1 else "slower" if high < 1 else "no clear difference"


def against_text(found: dict) -> str:
    """The result of `against` as the beginning of a comparison: "5.37× as fast as"."""
    if found["verdict"] == UNJUDGED:
        return f"{times_text(found['ratio'])} as fast{TOO_FEW} as"
    if found["verdict"] == "no clear difference":
        spread = ratio_text(found["ratio"], found["low"], found["high"])
        return f"neither clearly faster nor slower ({spread}) than"
    if found["ratio"] >= 1:
        return f"{times_text(found['ratio'])} as fast as"
    return f"slower ({times_text(1 / found['ratio'])} the time) than"


def fastest(place: Place, method: str) -> str:
    """The sweep's fastest setting of a way to run the model, against both ways to run the pipeline."""
    best, batched, overlapping = place.best(method), place.baseline("batched"), overlaps(place, method)
    one_by_one, in_batches = (against_text(against(place, method, rival)) for rival in ("sequential", "batched"))
    others = (
        f" The quartiles of {counted(overlapping, 'other setting')} overlap with its own, so it is not clearly fastest."
        if overlapping
        else ""
    )
    if overlapping is None:
        others = f" With fewer than {LEAST_REPEATS} repeats it is not clearly fastest."
    return (
        f"On {place.name}, {WAYS[method]} is fastest with {setting_text(best)}, of the "
        f"{counted(len(place.model_rows(method)), 'setting')} {SWEEP}: {spread_text(best)} for "
        f"{best['images']:,} images ({repeats_text(best['repeats'])}). That is "
        f"{one_by_one} the pipeline run image by image on the CPU, and {in_batches} the same "
        f"pipeline run in batches of {batched['batch_size']} ({spread_text(batched)}).{others}"
    )


def overlaps(place: Place, method: str) -> int | None:
    """How many other settings' quartile ranges, in time an image, overlap with the fastest's; None if not judged."""
    rows, best = place.model_rows(method), place.best(method)
    if too_few(rows):
        return None
    return int((per_image(rows, "q1") <= best["q3"] / best["images"]).sum()) - 1


def both_paths(place: Place) -> pd.Series:
    """Seconds of the paper's way ÷ seconds of the fast way, for each setting that has both."""
    reference, fast = (place.model_rows(method).set_index(SETTING[1:])["seconds"] for method in METHODS)
    return (reference / fast).dropna()


def against_reference(place: Place) -> str:
    """By how much the fast way beats the paper's, over all rows of Table 1 that have both; empty if there are none."""
    ratios = both_paths(place)
    if ratios.empty:
        return ""
    return (
        f"Over {counted(len(ratios), 'setting')} on {place.name} the fast way is {times_text(ratios.median())} as fast "
        f"as the paper's way (median; from {times_text(ratios.min())} to {times_text(ratios.max())})."
    )


# From which batch size on


def wins(place: Place, method: str) -> dict[str, pd.Series | None]:
    """At which batch sizes a way to run the model beats the pipeline: "image by image" and "in batches" → bool a size.

    Beyond the spread: the slower quartile of the slowest shuffle and drop_last against the pipeline's faster one. None
    for both where the repeats are too few.
    """
    rows = place.rows[(place.rows["method"] == method) & (place.rows["num_workers"] == 0)]
    slowest = speedup_at(rows, "q3").groupby(rows["batch_size"]).min()
    batched = place.table[(place.table["method"] == "batched") & (place.table["reason"] == "")].set_index("batch_size")
    if too_few(rows, batched):
        return dict.fromkeys(("image by image", "in batches"))
    return {
        "image by image": slowest > 1,
        "in batches": slowest > speedup_at(batched, "q1").reindex(slowest.index),
    }


def from_size(won: pd.Series | None) -> int | None:
    """The batch size from which on `won` (a bool a size, ascending) is true to the end; None if its last is not."""
    if won is None:
        return None
    from_here_on = won[::-1].cummin()[::-1]
    return int(from_here_on.idxmax()) if from_here_on.any() else None


def wins_from(place: Place, method: str) -> str:
    """From which batch size on a way to run the model beats the pipeline, run image by image and run in batches."""
    parts = []
    for rival, won in wins(place, method).items():
        if won is None:
            return (
                f"On {place.name}, from which batch size on {WAYS[method]} beats the pipeline {UNJUDGED} from fewer "
                f"than {LEAST_REPEATS} repeats."
            )
        name = "run image by image" if rival == "image by image" else "run in batches of the same size"
        if won.all():
            parts.append(f"beats the pipeline {name} at every batch size measured, {won.index[0]} included")
        elif size := from_size(won):
            parts.append(f"beats the pipeline {name} from batch size {size} on")
        elif won.any():
            parts.append(f"beats the pipeline {name} only at batch sizes {listed(list(map(str, won[won].index)))}")
        else:
            parts.append(f"does not beat the pipeline {name} at any batch size measured")
    return (
        f"On {place.name}, {WAYS[method]}, at its slowest shuffle and drop_last and beyond the quartiles, {parts[0]}, "
        f"and it {parts[1]}."
    )


# Shuffle, drop_last, workers


def effect(place: Place, method: str, name: str) -> dict | None:
    """What `shuffle` or `drop_last` changes, over all pairs of settings that differ in it alone; None without pairs.

    ratio, least, most: median and range of the time an image with it ÷ without. slower, quicker: in how many of the
    pairs the quartile ranges lie apart on that side. verdict: "costs time", "saves time", "makes no clear difference",
    or, from fewer than LEAST_REPEATS repeats, "cannot be judged".
    """
    rows = place.model_rows(method).copy()
    for column in ("seconds", "q1", "q3"):
        rows[column] = per_image(rows, column)
    others = [column for column in ("batch_size", "shuffle", "drop_last") if column != name]
    pairs = rows[rows[name]].merge(rows[~rows[name]], on=others, suffixes=("_on", "_off"))
    if pairs.empty:
        return None
    ratio = pairs["seconds_on"] / pairs["seconds_off"]
    slower = int((pairs["q1_on"] > pairs["q3_off"]).sum())
    quicker = int((pairs["q3_on"] < pairs["q1_off"]).sum())
    needed = APART_SHARE * len(pairs)
    verdict = "costs time" if slower >= needed else "saves time" if quicker >= needed else "makes no clear difference"
    return {
        "pairs": len(pairs),
        "ratio": ratio.median(),
        "least": ratio.min(),
        "most": ratio.max(),
        "slower": slower,
        "quicker": quicker,
        "verdict": judged(verdict, rows),
    }


def effects_table(places: Sequence[Place]) -> pd.DataFrame:
    """One row a place, way and setting: what shuffle and drop_last change."""
    rows = []
    for place in places:
        for method in place.methods:
            for name in ("shuffle", "drop_last"):
                if found := effect(place, method, name):
                    rows.append(
                        {
                            "Run": place.run.label,
                            "device": place.device,
                            "method": "the paper's" if method == "reference" else "fast",
                            "setting": name,
                            "time with ÷ without": f"{found['ratio']:.2f} [{found['least']:.2f}, {found['most']:.2f}]",
                            "slower": f"{found['slower']} of {found['pairs']}",
                            "quicker": f"{found['quicker']} of {found['pairs']}",
                            "verdict": found["verdict"],
                        }
                    )
    return pd.DataFrame(rows)


def effects(place: Place) -> str:
    """Whether shuffle and drop_last matter beyond the repeats' spread, for each way to run the model."""
    sentences = []
    for name in ("shuffle", "drop_last"):
        of_verdict: dict[str, list[str]] = {}
        for method in place.methods:
            if found := effect(place, method, name):
                of_verdict.setdefault(found["verdict"], []).append(f"{found['ratio']:.2f} times for {WAYS[method]}")
        told = "; ".join(f"{verdict} (the time is {listed(ways)})" for verdict, ways in of_verdict.items())
        sentences.append(f"On {place.name}, {code(name)} {told or 'was not measured both with and without it'}.")
    return " ".join(sentences)


def workers(place: Place) -> pd.DataFrame:
    """The small sweep of num_workers, the row without workers first; empty unless both were measured."""
    rows = place.rows
    sweep = rows[(rows["method"] == "reference") & ~rows["shuffle"] & ~rows["drop_last"]]
    more = sweep[sweep["num_workers"] > 0]
    none = sweep[(sweep["num_workers"] == 0) & sweep["batch_size"].isin(more["batch_size"])]
    return pd.DataFrame() if more.empty or none.empty else pd.concat([none.head(1), more])


def workers_verdict(place: Place) -> str | None:
    """Whether raising num_workers "helps", "makes it slower" or "makes no clear difference"; None if not judged."""
    sweep = workers(place)
    if sweep.empty or too_few(sweep):
        return None
    none, more = sweep.iloc[0], sweep.iloc[1:]
    if (more["q1"] > none["q3"]).all():
        return "makes it slower"
    return "helps" if (more["q3"] < none["q1"]).any() else "makes no clear difference"


def workers_effect(place: Place) -> str:
    """Whether loader processes help, from the small sweep of num_workers."""
    sweep, verdict = workers(place), workers_verdict(place)
    if sweep.empty:
        return f"On {place.name}, `num_workers` of 0 and above were not both measured."
    if verdict is None:
        return f"On {place.name}, `num_workers` could not be judged from fewer than {LEAST_REPEATS} repeats."
    none, more = sweep.iloc[0], sweep.iloc[1:]
    told = {"makes it slower": ", as the paper remarks", "helps": ", against the paper's remark"}.get(verdict, "")
    times = listed([f"{spread_text(row)} with {row['num_workers']}" for _, row in more.iterrows()])
    return (
        f"On {place.name}, raising `num_workers` {verdict}{told}: at batch size {none['batch_size']} a pass takes "
        f"{spread_text(none)} with 0 workers, {times}. Starting the processes is part of a pass."
    )


# Where the speed comes from


def waterfall(place: Place) -> pd.DataFrame:
    """The steps from the pipeline image by image to the fast way, at the largest batch size that has them all.

    In order, without drop_last. Columns: method, name, batch_size, speedup (over image by image), factor (the speed-up
    over that of the step before) with low and high, the factor by the worse and the better pair of quartiles, and
    verdict, as of `against`. Empty if a step is missing.
    """
    table = place.table
    rows = table[(table["reason"] == "") & (table["num_workers"] == 0) & ~table["shuffle"] & ~table["drop_last"]]
    sequential = rows[rows["method"] == "sequential"]
    rows = rows[(rows["method"] == "batched") | (rows["device"] == place.device)]
    sizes = [set(rows.loc[rows["method"] == method, "batch_size"]) for method in CHANGES]
    common = set.intersection(*sizes)
    if not common or sequential.empty:
        return pd.DataFrame()
    size = max(common)
    steps = [sequential.iloc[0]]
    for method in CHANGES:
        steps.append(rows[(rows["method"] == method) & (rows["batch_size"] == size)].iloc[0])
    found = pd.DataFrame(steps).reset_index(drop=True)
    found["batch_size"] = size
    found["name"] = found["method"].map(METHOD_NAMES | {"fast": "folded model, fast loader"})
    worst, best = speedup_at(found, "q3"), speedup_at(found, "q1")
    found["factor"] = found["speedup"] / found["speedup"].shift()
    found["low"], found["high"] = worst / best.shift(), best / worst.shift()
    rows = [row for _, row in found.iterrows()]
    found["verdict"] = [
        None,
        *(judged(verdict_of(now["low"], now["high"]), before, now) for before, now in pairwise(rows)),
    ]
    return found[["method", "name", "batch_size", "speedup", "factor", "low", "high", "verdict"]]


def contributions(place: Place) -> str:
    """What batching, the model, folding and the loader each contribute to the speed; empty if a step is missing."""
    steps = waterfall(place)
    if steps.empty:
        return ""
    parts = []
    for step in steps.iloc[1:].itertuples():
        verdict = {"faster": "speeds up", "slower": "slows down"}.get(step.verdict, "makes no clear difference")
        verdict = f"{UNJUDGED} from so few repeats" if step.verdict == UNJUDGED else verdict
        parts.append(f"{CHANGES[step.method]} {verdict}: {ratio_text(step.factor, step.low, step.high)}")
    bound = place.copy
    bracket = " (the bracket has the ratio of the quartiles, at worst and at best)" if "[" in "".join(parts) else ""
    limit = (
        ""
        if bound is None
        else f" Moving the same images once, with no work at all, would be {times_text(bound['speedup'])} "
        f"({spread_text(bound)})."
    )
    return (
        f"On {place.name}, at batch size {steps['batch_size'].iloc[0]} and in order, each step against the one before"
        f"{bracket}: {'; '.join(parts)}. Together "
        f"{times_text(steps['speedup'].iloc[-1])}.{limit} Learning as such adds nothing: any weights take "
        "the same sums, but for the clamp, which the folded model leaves out where no output could be clipped."
    )


def noise(place: Place) -> str:
    """How many rows of a place are disturbed."""
    rows = place.rows
    noisy, count = int(rows["noisy"].sum()), int(disturbed(rows).sum())
    load = rows["load_average"].max()
    heavy = f" The load average was up to {load:.1f}." if pd.notna(load) else ""
    if not count:
        return f"None of {counted(len(rows), 'row')} on {place.name} is disturbed.{heavy}"
    why = [
        f"in {noisy} the quartiles lie farther apart than {NOISY_SPREAD:.0%} of the median" if noisy else "",
        f"{count - noisy} {'was' if count - noisy == 1 else 'were'} measured while the pipeline itself was slower or "
        "faster than at most times"
        if count > noisy
        else "",
    ]
    return (
        f"{count} of {counted(len(rows), 'row')} on {place.name} {'is' if count == 1 else 'are'} disturbed: "
        f"{listed(list(filter(None, why)))}.{heavy}"
    )
