"""What the benchmarks say: Table 1, which way is fastest, from which batch size on, and where the speed comes from."""

from collections.abc import Sequence

import pandas as pd

from .. import paper
from ..runs import Run
from ..timing import NOISY_SPREAD, PATHS, load_benchmark
from .text import YES_NO, counted, spread_text, times_text

SETTING = ["device", "batch_size", "shuffle", "drop_last"]

# A setting "matters" if in at least this share of the pairs the quartile ranges lie apart, on the same side.
APART_SHARE = 0.75
LEAST_REPEATS = 3  # fewer have no spread to judge a difference by

WAYS = {"reference": "the model run the paper's way", "fast": "the model run the fast way"}

# The steps of the waterfall, each with what it changes of the one before.
WATERFALL = {
    "sequential": "pipeline, image by image",
    "batched": "pipeline, in batches",
    "reference": "model, the paper's way",
    "folded": "folded model",
    "fast": "fast loader",
}
CHANGES = {
    "batched": "running the pipeline in batches",
    "reference": "putting the model in its place, run the paper's way,",
    "folded": "folding the model",
    "fast": "the batch loader, with images stored as uint8,",
}


def measured_devices(table: pd.DataFrame) -> list[str]:
    """The devices on which the model was measured, in the table's order."""
    return list(dict.fromkeys(table.loc[table["path"].isin(PATHS) & (table["reason"] == ""), "device"]))


def measured_paths(table: pd.DataFrame, device: str) -> list[str]:
    """The ways to run the model that were measured on a device, the paper's first."""
    return [path for path in PATHS if len(model_rows(table, device, path))]


def swept_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the sweep over shuffle and drop_last, measured or not: those that Table 1 has."""
    rows = table[table["path"].isin(PATHS) & (table["num_workers"] == 0)]
    return rows[rows.groupby(["path", "device", "batch_size"])["path"].transform("size") == 4]


def model_rows(table: pd.DataFrame, device: str, path: str) -> pd.DataFrame:
    """The measured rows of Table 1 on one device and path."""
    rows = swept_rows(table)
    return rows[(rows["device"] == device) & (rows["path"] == path) & (rows["reason"] == "")]


def baseline(table: pd.DataFrame, path: str) -> pd.Series:
    """The pipeline's row: image by image ("sequential"), or in batches of the size that is fastest ("batched")."""
    rows = table[(table["path"] == path) & (table["reason"] == "")]
    return quickest(rows)


def quickest(rows: pd.DataFrame) -> pd.Series:
    """The row of the least median time an image: not of the largest speed-up, which a slow baseline makes too."""
    return rows.loc[per_image(rows, "seconds").idxmin()]


def per_image(rows: pd.DataFrame, column: str) -> pd.Series:
    """A column of seconds a pass as seconds an image really processed."""
    return rows[column] / rows["images"]


def setting_text(row: pd.Series) -> str:
    """A setting in words: "batch size 128, shuffled, drop_last"."""
    order = "shuffled" if row["shuffle"] else "in order"
    return f"batch size {row['batch_size']}, {order}{', drop_last' if row['drop_last'] else ''}"


def baselines(run: Run) -> str:
    """The pipeline's own times on this run's machine, beside the paper's."""
    table = load_benchmark(run)
    sequential, batched = baseline(table, "sequential"), baseline(table, "batched")
    machine = run.stage_info("benchmark")["environment"]
    return (
        f"On the machine of `{run.label}` ({machine['cpu']}, {counted(machine['threads'], 'thread')}) the pipeline "
        f"takes {spread_text(sequential)} image by image for {sequential['images']:,} images (the paper, on its "
        f"machine: {paper.SEQUENTIAL_SECONDS} s for 10,000), and {spread_text(batched)} in batches of "
        f"{batched['batch_size']}, {times_text(batched['speedup'])} as fast."
    )


def fastest(table: pd.DataFrame, device: str, path: str) -> str:
    """The fastest setting of a path on a device, against both ways to run the pipeline."""
    rows = model_rows(table, device, path)
    best = quickest(rows)
    batched = baseline(table, "batched")
    against_batched = best["speedup"] / batched["speedup"]
    comparison = (
        f"and {times_text(against_batched)} as fast as"
        if against_batched >= 1
        else f"but takes {times_text(1 / against_batched)} the time of"
    )
    overlapping = int((per_image(rows, "q1") <= best["q3"] / best["images"]).sum()) - 1
    overlaps = "1 other setting overlap" if overlapping == 1 else f"{overlapping} other settings overlap"
    others = f"; the quartiles of {overlaps} with its own" if overlapping else ""
    return (
        f"On {device}, {WAYS[path]} is fastest with {setting_text(best)}: {spread_text(best)} for "
        f"{best['images']:,} images (median and quartiles of {best['repeats']} repeats{others}), "
        f"{times_text(best['speedup'])} as fast as the pipeline run image by image on the CPU {comparison} the same "
        f"pipeline run in batches of {batched['batch_size']} ({spread_text(batched)})."
    )


def against_reference(table: pd.DataFrame, device: str) -> str:
    """By how much the fast way beats the paper's, over all rows of Table 1 that have both; empty if there are none."""
    pairs = both_paths(table, device)
    if pairs.empty:
        return ""
    return (
        f"Over the {counted(len(pairs), 'setting')} on {device} the fast way takes between 1/{pairs.max():.3g} and "
        f"1/{pairs.min():.3g} of the time of the paper's way (median 1/{pairs.median():.3g})."
    )


def both_paths(table: pd.DataFrame, device: str) -> pd.Series:
    """Seconds of the paper's way ÷ seconds of the fast way, for each setting that has both."""
    reference, fast = (model_rows(table, device, path).set_index(SETTING[1:])["seconds"] for path in PATHS)
    return (reference / fast).dropna()


def wins_from(table: pd.DataFrame, device: str, path: str) -> str:
    """From which batch size on a path beats the pipeline, run image by image and run in batches."""
    rows = table[
        (table["device"] == device) & (table["path"] == path) & (table["num_workers"] == 0) & (table["reason"] == "")
    ]
    # Slower quartile of the slowest setting against the faster one of the pipeline: a win beyond the spread.
    slowest = _speedup_at(rows, "q3").groupby(rows["batch_size"]).min()
    batched = table[table["path"] == "batched"].set_index("batch_size")
    parts = []
    for name, limit in (
        ("run image by image", pd.Series(1.0, index=slowest.index)),
        ("run in batches of the same size", _speedup_at(batched, "q1").reindex(slowest.index)),
    ):
        wins = slowest > limit
        from_here_on = wins[::-1].cummin()[::-1]
        if wins.all():
            parts.append(f"beats the pipeline {name} at every batch size measured, {slowest.index[0]} included")
        elif from_here_on.any():
            parts.append(f"beats the pipeline {name} from batch size {from_here_on.idxmax()} on")
        elif wins.any():
            sizes = ", ".join(map(str, wins[wins].index))
            parts.append(f"beats the pipeline {name} only at batch sizes {sizes}")
        else:
            parts.append(f"does not beat the pipeline {name} at any batch size measured")
    return (
        f"On {device}, {WAYS[path]}, at its slowest shuffle and drop_last and beyond the quartiles, {parts[0]}, and it "
        f"{parts[1]}."
    )


def _speedup_at(rows: pd.DataFrame, quartile: str) -> pd.Series:
    """The speed-up by a quartile of the times instead of their median."""
    return rows["sequential_seconds_per_image"] * rows["images"] / rows[quartile]


def effect_of(table: pd.DataFrame, device: str, path: str, name: str) -> str:
    """Whether shuffle or drop_last changes the time per image beyond the repeats' spread, over all matching pairs."""
    rows = model_rows(table, device, path).copy()
    for column in ("seconds", "q1", "q3"):
        rows[column] /= rows["images"]
    others = [column for column in ("batch_size", "shuffle", "drop_last") if column != name]
    pairs = rows[rows[name]].merge(rows[~rows[name]], on=others, suffixes=("_on", "_off"))
    if pairs.empty:
        return f"On {device}, `{name}` could not be judged: no setting was measured both with and without it."
    if rows["repeats"].min() < LEAST_REPEATS:
        return f"On {device}, `{name}` could not be judged from fewer than {LEAST_REPEATS} repeats."
    ratio = pairs["seconds_on"] / pairs["seconds_off"]
    slower = int((pairs["q1_on"] > pairs["q3_off"]).sum())
    quicker = int((pairs["q3_on"] < pairs["q1_off"]).sum())
    needed = APART_SHARE * len(pairs)
    verdict = "costs time" if slower >= needed else "saves time" if quicker >= needed else "makes no clear difference"
    return (
        f"On {device}, for {WAYS[path]}, `{name}` {verdict}: the time per image with it is {ratio.median():.2f} times "
        f"that without (median of {counted(len(pairs), 'pair')}, from {ratio.min():.2f} to {ratio.max():.2f}). The "
        f"quartile ranges lie apart in {slower + quicker} of them, slower with it in {slower}, quicker in {quicker}; "
        f"clear would be {APART_SHARE:.0%} of the pairs on one side."
    )


def workers_effect(table: pd.DataFrame, device: str) -> str:
    """Whether loader processes help, from the small sweep of num_workers."""
    sweep = table[
        (table["path"] == "reference")
        & (table["device"] == device)
        & (table["reason"] == "")
        & ~table["shuffle"]
        & ~table["drop_last"]
    ]
    more = sweep[sweep["num_workers"] > 0]
    none = sweep[(sweep["num_workers"] == 0) & sweep["batch_size"].isin(more["batch_size"])]
    if more.empty or none.empty:
        return f"On {device}, `num_workers` of 0 and above were not both measured."
    if sweep["repeats"].min() < LEAST_REPEATS:
        return f"On {device}, `num_workers` could not be judged from fewer than {LEAST_REPEATS} repeats."
    none = none.iloc[0]
    listed = " and ".join(f"{spread_text(row)} with {row['num_workers']}" for _, row in more.iterrows())
    if (more["q1"] > none["q3"]).all():
        verdict = "does not help, as the paper remarks"
    elif (more["q3"] < none["q1"]).any():
        verdict = "helps, against the paper's remark"
    else:
        verdict = "makes no clear difference"
    return (
        f"On {device}, raising `num_workers` {verdict}: at batch size {none['batch_size']} a pass takes "
        f"{spread_text(none)} with 0 workers, {listed}. Starting the processes is part of a pass."
    )


def waterfall(table: pd.DataFrame, device: str) -> pd.DataFrame:
    """The steps from the pipeline image by image to the fast path, at the largest batch size that has them all.

    In order, without drop_last. Columns: path, name, batch_size, speedup (over image by image), factor (of the time per
    image, over the step before) with low and high, the factor by the worse and the better pair of quartiles. Empty if
    a step is missing.
    """
    rows = table[(table["reason"] == "") & (table["num_workers"] == 0) & ~table["shuffle"] & ~table["drop_last"]]
    sequential = rows[rows["path"] == "sequential"]
    rows = rows[(rows["path"] == "batched") | (rows["device"] == device)]
    sizes = [set(rows.loc[rows["path"] == path, "batch_size"]) for path in list(WATERFALL)[1:]]
    common = set.intersection(*sizes)
    if not common or sequential.empty:
        return pd.DataFrame()
    size = max(common)
    steps = [sequential.iloc[0]]
    for path in list(WATERFALL)[1:]:
        steps.append(rows[(rows["path"] == path) & (rows["batch_size"] == size)].iloc[0])
    found = pd.DataFrame(steps).reset_index(drop=True)
    found["batch_size"] = size
    found["name"] = found["path"].map(WATERFALL)
    median, q1, q3 = (per_image(found, column) for column in ("seconds", "q1", "q3"))
    found["factor"] = median.shift() / median
    found["low"], found["high"] = q1.shift() / q3, q3.shift() / q1
    return found[["path", "name", "batch_size", "speedup", "factor", "low", "high"]]


def contributions(table: pd.DataFrame, device: str) -> str:
    """What batching, the model, folding and the loader each contribute to the speed; empty if a step is missing."""
    steps = waterfall(table, device)
    if steps.empty:
        return ""
    parts = []
    for step in steps.iloc[1:].itertuples():
        verdict = "speeds up" if step.low > 1 else "slows down" if step.high < 1 else "makes no clear difference"
        parts.append(f"{CHANGES[step.path]} {verdict}: {times_text(step.factor)} [{step.low:.3g}, {step.high:.3g}]")
    floor = floor_row(table, device)
    limit = "" if floor is None else f" Moving the same images once, with no work at all, would be {floor_text(floor)}."
    return (
        f"On {device}, at batch size {steps['batch_size'].iloc[0]} and in order, each step against the one before (the "
        f"bracket has the ratio of the quartiles, at worst and at best): {'; '.join(parts)}. Together "
        f"{times_text(steps['speedup'].iloc[-1])}.{limit} Learning as such adds nothing: any weights take "
        "the same sums, but for the clamp, which the folded model leaves out where no output could be clipped."
    )


def floor_row(table: pd.DataFrame, device: str) -> pd.Series | None:
    """The row of the floor on a device: the images' bytes moved once, and nothing else."""
    rows = table[(table["path"] == "floor") & (table["device"] == device) & (table["reason"] == "")]
    return None if rows.empty else rows.iloc[0]


def floor_text(floor: pd.Series) -> str:
    return f"{times_text(floor['speedup'])} ({spread_text(floor)})"


def table1_groups(runs: Sequence[Run]) -> dict[str, pd.DataFrame]:
    """The runs' measurements for as few copies of Table 1 as can be: different kinds of device share one.

    Keys name the runs; "cuda:1" counts as the paper's "cuda".
    """
    groups: list[tuple[list[str], pd.DataFrame]] = []
    for run in runs:
        table = load_benchmark(run) if run.has("benchmark") else pd.DataFrame()
        for device in measured_devices(table) if len(table) else []:
            kind = device.partition(":")[0]
            rows = swept_rows(table)
            rows = rows[(rows["device"] == device) & (rows["reason"] == "")].assign(device=kind)
            free = next((i for i, (_, other) in enumerate(groups) if kind not in set(other["device"])), None)
            if free is None:
                groups.append(([run.label], rows))
            else:
                names, other = groups[free]
                groups[free] = (names + [run.label] * (run.label not in names), pd.concat([other, rows]))
    if not groups:  # nothing could be measured: the paper's column alone
        groups = [([run.label], swept_rows(load_benchmark(run)).head(0)) for run in runs if run.has("benchmark")][:1]
    return {", ".join(names): rows for names, rows in groups}


def table1(rows: pd.DataFrame) -> pd.DataFrame:
    """Table 1: the paper's 48 settings with its seconds and the measured `rows` (see `table1_groups`) beside them.

    For each path the median and quartiles in seconds and the speed-up; last by how much the fast way beats the paper's.
    Devices that were measured come first. A star marks a disturbed row.
    """
    shown = paper.table1()
    shown["Paper (s)"] = shown["seconds"].map("{:.4f}".format)
    processed = paper.IMAGES - shown["drop_last"] * (paper.IMAGES % shown["batch_size"])
    speedup = paper.SEQUENTIAL_SECONDS / paper.IMAGES / (shown["seconds"] / processed)
    shown["× (paper)"] = speedup.map("{:.1f}".format)
    shown = shown.drop(columns="seconds")
    shown = shown.sort_values("device", key=lambda devices: ~devices.isin(set(rows["device"])), kind="stable")
    medians = {}
    for path, title, sign in (("reference", "Reference (s)", "×"), ("fast", "Fast (s)", "× ")):
        of_path = rows[rows["path"] == path].set_index(SETTING)
        medians[path] = of_path["seconds"]
        digits = [3 if seconds >= 0.1 else 4 for seconds in of_path["seconds"]]
        spread = [
            f"{row.seconds:.{k}f} [{row.q1:.{k}f}, {row.q3:.{k}f}]{'*' if spoiled else ''}"
            for row, k, spoiled in zip(of_path.itertuples(), digits, disturbed(of_path), strict=True)
        ]
        columns = pd.DataFrame({title: spread, sign: of_path["speedup"].map("{:.1f}".format)}, index=of_path.index)
        shown = shown.merge(columns.reset_index(), on=SETTING, how="left")
    ratio = (medians["reference"] / medians["fast"]).dropna().map("{:.1f}".format).rename("Ratio")
    shown = shown.merge(ratio.reset_index(), on=SETTING, how="left")
    shown[["shuffle", "drop_last"]] = shown[["shuffle", "drop_last"]].replace(YES_NO)
    names = dict(zip(SETTING, ("Device", "Batch", "Shuffle", "Drop last"), strict=True))
    return shown.rename(columns=names).astype(object).fillna("–")


def table1_caption(runs: Sequence[Run], label: str) -> str:
    """What the columns of the Table 1 of this group are."""
    return (
        f"The paper's 48 settings: its seconds, single measurements on its machine, and those measured here "
        f"({', '.join(f'`{name}`' for name in label.split(', '))}): median and quartiles, run the paper's way "
        "(reference) and the fast way. Columns marked × are speed-ups over the pipeline run image by image, on the "
        "paper's machine and here; the last is the reference's time over the fast one's. "
        f"A star marks disturbed rows: quartiles farther apart than {NOISY_SPREAD:.0%} of the median, or measured "
        f"while the pipeline itself was {NOISY_SPREAD:.0%} slower or faster than at most times. " + not_measured(runs)
    ).strip()


def disturbed(rows: pd.DataFrame) -> pd.Series:
    """Whether rows are noisy, or were measured in a slow or fast phase of the machine, told by their own baseline."""
    of_baseline = rows["sequential_seconds_per_image"] / rows["sequential_seconds_per_image"].median()
    return rows["noisy"] | ((of_baseline - 1).abs() > NOISY_SPREAD)


def noise(table: pd.DataFrame, device: str) -> str:
    """How many rows on a device are disturbed."""
    rows = table[(table["device"] == device) & (table["reason"] == "")]
    noisy, count = int(rows["noisy"].sum()), int(disturbed(rows).sum())
    load = rows["load_average"].max()
    heavy = f" The load average was up to {load:.1f}." if pd.notna(load) else ""
    if not count:
        return f"None of {counted(len(rows), 'row')} on {device} is disturbed.{heavy}"
    return (
        f"{count} of {counted(len(rows), 'row')} on {device} {'is' if count == 1 else 'are'} disturbed: in {noisy} the "
        f"quartiles lie farther apart than {NOISY_SPREAD:.0%} of the median, the others were measured while the "
        f"pipeline itself was slower or faster than at most times.{heavy}"
    )


def not_measured(runs: Sequence[Run]) -> str:
    """The rows without a time, folded into a sentence a reason; empty if there are none."""
    sentences = []
    for run in runs:
        if run.has("benchmark"):
            missing = swept_rows(load_benchmark(run)).query("reason != ''")
            if missing.empty:
                continue
            kinds = missing["reason"].str.partition(" (MSE")[0]  # the same reason, whatever the number in it
            for (device, reason), rows in missing.groupby(["device", kinds]):
                count = len(rows.drop_duplicates(SETTING))
                have = "has" if count == 1 else "have"
                sentences.append(
                    f"{counted(count, 'setting')} on {device} in run `{run.label}` {have} no time ({reason})."
                )
    return " ".join(sentences)
