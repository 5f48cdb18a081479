"""What the benchmarks say: the fastest method, from which batch size on, what matters, where the speed comes from."""

from collections.abc import Sequence

import pandas as pd

from .. import paper
from ..benchmarking import KNOWN, NUM_WORKERS_BATCH_SIZE
from ..measure import DISTURBED, EQUAL, Estimate, verdict
from .places import Place
from .text import code, counted, escape, listed, percent, ratio_text, scientific, spread_text, times_text

SWEEP = "swept over batch size, shuffle and drop_last"  # the paper's table; small batch sizes are not
METHODS = {"reference": "the model run the paper's way", "fast": "the model run the fast way"}
EFFECTS = {
    "faster": "costs time",
    "slower": "saves time",
    "equal": "makes no difference",
    "open": "may or may not matter",
}


def setting_text(row: pd.Series) -> str:
    """A setting in words: "batch size 128, shuffled, drop_last"."""
    order = "shuffled" if row["shuffle"] else "in order"
    return f"batch size {row['batch_size']}, {order}{', drop_last' if row['drop_last'] else ''}"


# The baselines and the fastest settings


def baselines(place: Place) -> str:
    """The pipeline's own times on the machine of this place, beside the paper's."""
    (sequential,) = place.measured.rows("sweep", "sequential", "cpu").to_dict("records") or [None]
    batched = place.measured.fastest("batched", "cpu")
    if sequential is None or batched is None:
        return f"On the machine of {code(place.run.label)} the pipeline itself was not measured."
    machine = place.run.benchmark.environment
    speedup = place.measured.ratio("sweep", batched["name"], "sequential")
    return (
        f"On the machine of {code(place.run.label)} ({escape(machine.cpu)}, {counted(machine.threads, 'thread')}) the "
        f"pipeline takes {spread_text(sequential)} image by image for {sequential['images']:,} images (the paper, on "
        f"its machine: {paper.SEQUENTIAL_SECONDS} s for {paper.IMAGES:,}), and {spread_text(batched)} in batches of "
        f"{batched['batch_size']}, {ratio_text(speedup)} as fast. Both run on the CPU."
    )


def against_text(ratio: Estimate) -> str:
    """A ratio of speeds as the beginning of a comparison: "5.37× [5.1, 5.6] as fast as"."""
    return {
        "equal": f"as fast (within ±{EQUAL:.0%}: {ratio_text(ratio)}) as",
        "open": f"neither faster nor slower beyond doubt ({ratio_text(ratio)}) than",
    }.get(verdict(ratio), f"{ratio_text(ratio)} as fast as")


def fastest(place: Place, method: str) -> str:
    """The sweep's fastest setting of a method, measured again, against both ways to run the pipeline."""
    best, batched = place.best(method), place.best("batched")
    if best is None:
        return f"On {place.name}, {METHODS[method]} was not measured again in rounds of its own."
    others = place.as_fast_as_best(method)
    overlap = f" {counted(others, 'other setting')} may be as fast." if others else ""
    rivals = [("image by image", place.against(method, "sequential"))]
    rivals += [] if batched is None else [(f"in batches of {batched['batch_size']}", place.against(method, "batched"))]
    told = [f"{against_text(ratio)} the pipeline run {name}" for name, ratio in rivals if ratio]
    compared = f" That is {listed(told)}, on the CPU." if told else ""
    return (
        f"On {place.name}, {METHODS[method]} is fastest with {setting_text(best)}, of the "
        f"{counted(len(place.rows(method)), 'setting')} {SWEEP}.{overlap} Measured again in rounds of its own, it "
        f"takes {spread_text(best)} for {best['images']:,} images ({counted(best['rounds'], 'round')}).{compared}"
    )


def one_thread(place: Place) -> str:
    """The same comparison with one thread; empty where it was not measured."""
    parts = []
    for method in place.methods:
        ratios = [(name, place.against(method, rival, "one thread")) for rival, name in RIVALS.items()]
        told = [f"{against_text(ratio)} the pipeline {name}" for name, ratio in ratios if ratio]
        parts += [f"{METHODS[method]} is {listed(told)}"] if told else []
    return f"With one thread on {place.name}, {'; '.join(parts)}." if parts else ""


RIVALS = {"sequential": "image by image", "batched": "in batches"}


def against_reference(place: Place) -> str:
    """By how much the fast method beats the paper's, over all settings that have both; empty if there are none."""
    ratio = place.over_reference()
    if ratio is None:
        return ""
    return (
        f"Over the settings of the sweep on {place.name} the fast method is {ratio_text(ratio)} as fast as the paper's "
        "(in each round the median over the settings)."
    )


def precision(place: Place) -> str:
    """How good the times of a place are, and how often the machine did other work."""
    found = place.measured.disturbed("sweep")
    again = (
        f" {counted(found['again'], 'disturbed round')} {'was' if found['again'] == 1 else 'were'} measured again."
        if found["again"]
        else ""
    )
    return (
        f"On {place.name} the sweep took {counted(found['rounds'], 'round')}, and its speed-ups are good to "
        f"±{percent(place.precision)} (half an interval, the median of the settings).{again} Other "
        f"programs took more than {DISTURBED:.0%} of the processors' time in {found['disturbed'] or 'none'} of the "
        "rounds that count, as far as the system tells."
    )


def set_up(place: Place) -> str:
    """What the fast method costs once, and from how many images on that is paid back; empty if not measured."""
    own = place.best("fast")
    if own is None:
        return ""
    counts = [(place.paid_back(rival), name) for rival, name in RIVALS.items()]
    told = [
        f"never against the pipeline {name}"
        if count == float("inf")
        else f"after {max(1, round(count)):,} images against the pipeline {name}"
        for count, name in counts
        if count is not None
    ]
    return (
        f"Setting up the fast method on {place.name} (folding, the loader, on CUDA pinned memory and graphs) takes "
        f"{1000 * own['setup_seconds']:.3g} ms once{', paid back ' * bool(told)}{listed(told)}."
    )


def other_weights(place: Place) -> str:
    """Whether other weights, the pipeline's own among them, take another time than those of the model; or empty."""
    best, parts, verdicts = place.best("fast"), [], set()
    if best is None:
        return ""
    for weights in dict.fromkeys(place.measured.table.query("part == 'best' and weights != ''")["weights"]):
        row = place.best_with(weights)
        if row is not None:
            ratio = place.measured.ratio("best", row["name"], best["name"])
            verdicts.add(verdict(ratio))
            whose = "the pipeline's own, without any training," if weights == KNOWN else f"those of {code(weights)}"
            parts.append(f"with {whose} it is {against_text(ratio)} with those trained")
    if not parts:
        return ""
    told = "The fast method's speed does not come from training"
    if "slower" in verdicts:
        told = "The fast method's speed depends on its weights"
    elif "open" in verdicts:
        told = "Whether the fast method's speed depends on its weights stays open"
    return f"{told}: {'; '.join(parts)}."


# From which batch size on


def wins_from(place: Place, method: str) -> str:
    """From which batch size on a method beats the pipeline, run image by image and run in batches."""
    won, parts = place.wins(method), []
    names = {"image by image": "run image by image", "in batches": "run in batches of the same size"}
    for rival, name in names.items():
        sizes = won.index[won[rival].astype(bool)]
        if won[rival].all():
            parts.append(f"beats the pipeline {name} at every batch size measured, {won.index[0]} included")
        elif size := from_size(won[rival]):
            parts.append(f"beats the pipeline {name} from batch size {size} on")
        elif len(sizes):
            parts.append(f"beats the pipeline {name} only at batch sizes {listed(list(map(str, sizes)))}")
        else:
            parts.append(f"does not beat the pipeline {name} at any batch size measured")
    return (
        f"With every shuffle and drop_last measured, {METHODS[method]} on {place.name} {parts[0]}, and it {parts[1]}."
    )


def from_size(won: pd.Series) -> int | None:
    """The batch size from which on `won` (a bool per size, ascending) is true to the end; None if its last is not."""
    from_here_on = won.astype(bool)[::-1].cummin()[::-1]
    return int(from_here_on.idxmax()) if from_here_on.any() else None


# Shuffle, drop_last, workers


def effects_table(places: Sequence[Place]) -> pd.DataFrame:
    """One row per place, method and setting: what shuffle and drop_last change."""
    rows = []
    for place in places:
        for method in place.methods:
            for name in ("shuffle", "drop_last"):
                if ratio := place.effect(method, name):
                    rows.append(
                        {
                            "Run": place.run.label,
                            "device": place.device,
                            "method": "the paper's" if method == "reference" else "fast",
                            "setting": name,
                            "time with ÷ without": f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
                            "rounds": str(ratio.n),
                            "verdict": EFFECTS[verdict(ratio)],
                        }
                    )
    return pd.DataFrame(rows)


def effects(place: Place) -> str:
    """Whether shuffle and drop_last matter, for each method."""
    sentences = []
    for name in ("shuffle", "drop_last"):
        of_verdict: dict[str, list[str]] = {}
        for method in place.methods:
            if ratio := place.effect(method, name):
                text = f"{ratio.median:.2f} times [{ratio.low:.2f}, {ratio.high:.2f}] for {METHODS[method]}"
                of_verdict.setdefault(EFFECTS[verdict(ratio)], []).append(text)
        told = "; ".join(f"{word} (the time is {listed(texts)})" for word, texts in of_verdict.items())
        sentences.append(f"On {place.name}, {code(name)} {told or 'was not measured both with and without it'}.")
    return " ".join(sentences)


def workers_verdict(place: Place) -> str | None:
    """Whether raising num_workers "helps", "makes it slower", "makes no difference" or is "open"; None: unmeasured."""
    verdicts = {verdict(ratio) for _, ratio in place.workers().values()}
    words = {"faster": "helps", "open": "open", "slower": "makes it slower", "equal": "makes no difference"}
    return next((word for each, word in words.items() if each in verdicts), None)


def workers_effect(place: Place) -> str:
    """Whether loader processes help."""
    found = place.workers()
    if not found:
        return f"On {place.name}, `num_workers` of 0 and above were not both measured."
    told = {
        "makes it slower": "raising `num_workers` makes it slower, as the paper remarks",
        "helps": "raising `num_workers` helps, against the paper's remark",
        "makes no difference": "raising `num_workers` makes no difference",
        "open": "whether raising `num_workers` helps stays open",
    }[workers_verdict(place)]
    (none,) = place.rows("reference", "workers").query("num_workers == 0").to_dict("records")
    times = [
        f"with {count} ({spread_text(row)}) it is {against_text(ratio)} without"
        for count, (row, ratio) in found.items()
    ]
    return (
        f"On {place.name}, {told}: at batch size {NUM_WORKERS_BATCH_SIZE} a pass without any takes "
        f"{spread_text(none)}; {listed(times)}. Starting the processes is part of a pass."
    )


# Where the speed comes from

LEVEL_NAMES = {
    "pipeline": "the pipeline", "eager": "the model as it was trained", "folded": "the folded model",
    "rows": "rows fetched one by one", "batches": "whole batches", "float32": "images stored as float32",
    "uint8": "images stored as uint8",
}  # fmt: skip


def factors_table(place: Place) -> pd.DataFrame:
    """The main effects, a row each."""
    return pd.DataFrame(
        [
            {
                "Change": f"{LEVEL_NAMES[row.before]} → {LEVEL_NAMES[row.after]}",
                "as fast": f"{times_text(row.ratio)} [{row.low:.3g}, {row.high:.3g}]",
                "verdict": row.verdict,
            }
            for row in place.factors().itertuples()
        ]
    )


def contributions(place: Place) -> str:
    """What network, loader and storage each contribute to the speed, and why the model as such is slow; or empty."""
    table = place.factors()
    if table.empty:
        return ""
    parts = [
        f"{LEVEL_NAMES[row.after]} in place of {LEVEL_NAMES[row.before]} {times_text(row.ratio)} [{row.low:.3g}, "
        f"{row.high:.3g}]"
        for row in table.itertuples()
    ]
    bound = place.best("copy")
    limit = ""
    if bound is not None:
        limit = f" Moving the same bytes once, with no work at all, takes {spread_text(bound)}."
    return (
        f"On {place.name}, in batches of {place.best('folded-batches-uint8', 'factors')['batch_size']}, in order, as a "
        f"factor of speed and all else equal: {'; '.join(parts)}.{limit}{_why_slow(place)}"
    )


def _why_slow(place: Place) -> str:
    """Why the model as it was trained is slower than the pipeline, where its convolution is the reason; else empty."""
    cost = place.convolution_cost()
    if cost is None or verdict(cost) != "faster":
        return ""
    slow, quick = (1e6 / place.step(name)["images_per_second"] for name in ("convolution", "grayscale"))
    return (
        f" The model as it was trained does the pipeline's steps, but for one: its 1×1 convolution takes {slow:.2g} µs "
        f"per image where the pipeline's weighted sum of three channels takes {quick:.2g}, {ratio_text(cost)} the time."
    )


def cells(place: Place) -> pd.DataFrame:
    """The speed-up over image by image of each combination of network, loader and storage, and of the known weights.

    Columns: name, speedup, low, high; in the order of the speed-ups.
    """
    table = place.measured.table
    rows = table[(table["part"] == "factors") & (table["device"] == place.device) & table["speedup"].notna()]
    found = []
    for row in rows.to_dict("records"):
        network, _, rest = row["method"].partition("-")
        if not rest and row["method"] not in CUDA_STEPS:
            continue
        name = CUDA_STEPS.get(row["method"]) or f"{SHORT[network]}, {SHORT_LOADERS[rest]}"
        name += ", known weights" * (row["weights"] == KNOWN)
        found.append({"name": name, "speedup": row["speedup"], "low": row["speedup_low"], "high": row["speedup_high"]})
    return pd.DataFrame(found, columns=["name", "speedup", "low", "high"]).sort_values("speedup", ignore_index=True)


SHORT = {"pipeline": "pipeline", "eager": "model", "folded": "folded"}
SHORT_LOADERS = {
    "batches-float32": "batches, float32", "batches-uint8": "batches, uint8", "rows-float32": "rows, float32",
    "rows-uint8": "rows, uint8",
}  # fmt: skip
CUDA_STEPS = {
    "graph": "folded, CUDA graph",
    "pinned": "folded, graph, pinned",
    "fast": "folded, graph, pinned, overlapped",
}


def accuracy(place: Place) -> str:
    """Which weights were timed, and how exact they are."""
    best, origin = place.best("fast"), place.run.benchmark.origin
    whose = "as they were trained" if origin == "training" else "of the least-squares optimum of its training images"
    mse = "" if best is None else f": their MSE on the images timed is {scientific(best['mse'])}"
    return f"The weights timed are those of {code(place.run.label)}, {whose}{mse}."
