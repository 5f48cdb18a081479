"""What the runs say, in sentences and tables: every number is computed from run files, and the words follow it.

Sentences are Markdown; tables are DataFrames of formatted strings, ready to show.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from . import paper
from .comparison import metrics_table
from .pipeline import GRAY_WEIGHTS
from .runs import Run
from .timing import MAX_MSE, load_benchmark
from .training import load_config, load_training

SETTING = ["device", "batch_size", "shuffle", "drop_last"]
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
YES_NO = {True: "yes", False: "no"}

# A setting "matters" if in at least this share of the pairs the quartile ranges lie apart, on the same side.
APART_SHARE = 0.75


def seconds_text(seconds: float) -> str:
    """A time with three significant digits and its unit.

    >>> seconds_text(0.12345), seconds_text(12.345)
    ('123 ms', '12.3 s')
    """
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def scientific(value: float, digits: int = 2) -> str:
    """A small quantity as people write it.

    >>> scientific(0.000123), scientific(0.0), scientific(0.25)
    ('1.2×10⁻⁴', '0', '0.25')
    """
    if value == 0 or not np.isfinite(value) or 0.01 <= abs(value) < 1000:
        return f"{value:.{digits}g}"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}×10{str(int(exponent)).translate(SUPERSCRIPTS)}"


def spread_text(row: pd.Series) -> str:
    """A row's median with its quartiles: "127 ms [126 ms, 128 ms]"."""
    return f"{seconds_text(row['seconds'])} [{seconds_text(row['q1'])}, {seconds_text(row['q3'])}]"


def times_text(factor: float) -> str:
    """A ratio as "5.6×"."""
    return f"{factor:.3g}×" if factor >= 0.1 else f"{factor:.2g}×"


def measured_devices(table: pd.DataFrame) -> list[str]:
    """The devices on which the model was measured, in the table's order."""
    model = table[(table["path"] == "reference") & (table["reason"] == "")]
    return list(dict.fromkeys(model["device"]))


def model_rows(table: pd.DataFrame, device: str) -> pd.DataFrame:
    """The measured rows of Table 1 on one device."""
    rows = swept_rows(table)
    return rows[(rows["device"] == device) & (rows["reason"] == "")]


def swept_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the sweep over shuffle and drop_last, measured or not; those of the num_workers sweep left out."""
    rows = table[(table["path"] == "reference") & (table["num_workers"] == 0)]
    return rows[rows.groupby(["device", "batch_size"])["path"].transform("size") == 4]


def baseline(table: pd.DataFrame, path: str) -> pd.Series:
    """The pipeline's row: image by image ("sequential"), or in batches of the size that is fastest ("batched")."""
    rows = table[(table["path"] == path) & (table["reason"] == "")]
    return rows.loc[rows["speedup"].idxmax()]


def setting_text(row: pd.Series) -> str:
    """A setting in words: "batch size 128, shuffled, drop_last"."""
    order = "shuffled" if row["shuffle"] else "in order"
    return f"batch size {row['batch_size']}, {order}{', drop_last' if row['drop_last'] else ''}"


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
            sentences += [fastest(table, device) for device in measured_devices(table)]
    return " ".join(sentences)


def per_image(rows: pd.DataFrame, column: str) -> pd.Series:
    """A column of seconds a pass as seconds an image really processed."""
    return rows[column] / rows["images"]


def fastest(table: pd.DataFrame, device: str) -> str:
    """The fastest setting on a device against both ways to run the pipeline."""
    rows = model_rows(table, device)
    best = rows.loc[rows["speedup"].idxmax()]
    sequential, batched = baseline(table, "sequential"), baseline(table, "batched")
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
        f"On {device}, the model's fastest median is that of {setting_text(best)}: {spread_text(best)} for "
        f"{best['images']:,} images (median and quartiles of {best['repeats']} repeats{others}), "
        f"{times_text(best['speedup'])} as fast as the "
        f"pipeline run image by image on the CPU ({spread_text(sequential)}) {comparison} the same pipeline run in "
        f"batches of {batched['batch_size']} ({spread_text(batched)})."
    )


def wins_from(table: pd.DataFrame, device: str) -> str:
    """From which batch size on the model beats the pipeline, run image by image and run in batches."""
    rows = model_rows(table, device)
    slowest = rows.groupby("batch_size")["speedup"].min()  # over shuffle and drop_last
    batched = table[(table["path"] == "batched")].set_index("batch_size")["speedup"]
    parts = []
    for name, limit in (
        ("run image by image", pd.Series(1.0, index=slowest.index)),
        ("run in batches of the same size", batched.reindex(slowest.index)),
    ):
        wins = slowest > limit
        from_here_on = wins[::-1].cummin()[::-1]
        if wins.all():
            parts.append(f"beats the pipeline {name} at every batch size measured")
        elif from_here_on.any():
            parts.append(f"beats the pipeline {name} from batch size {from_here_on.idxmax()} on")
        elif wins.any():
            sizes = ", ".join(map(str, wins[wins].index))
            parts.append(f"beats the pipeline {name} only at batch sizes {sizes}")
        else:
            parts.append(f"does not beat the pipeline {name} at any batch size measured")
    return f"On {device} the model, at its slowest shuffle and drop_last, {parts[0]}, and it {parts[1]}."


def effect_of(table: pd.DataFrame, device: str, name: str) -> str:
    """Whether shuffle or drop_last changes the time per image beyond the repeats' spread, over all matching pairs."""
    rows = model_rows(table, device).copy()
    for column in ("seconds", "q1", "q3"):
        rows[column] /= rows["images"]
    others = [column for column in ("batch_size", "shuffle", "drop_last") if column != name]
    pairs = rows[rows[name]].merge(rows[~rows[name]], on=others, suffixes=("_on", "_off"))
    if pairs.empty:
        return f"On {device}, `{name}` could not be judged: no setting was measured both with and without it."
    ratio = pairs["seconds_on"] / pairs["seconds_off"]
    slower = int((pairs["q1_on"] > pairs["q3_off"]).sum())
    quicker = int((pairs["q3_on"] < pairs["q1_off"]).sum())
    needed = APART_SHARE * len(pairs)
    verdict = "costs time" if slower >= needed else "saves time" if quicker >= needed else "makes no clear difference"
    return (
        f"On {device}, `{name}` {verdict}: the time per image with it is {ratio.median():.2f} times that without "
        f"(median of {len(pairs)} pairs, from {ratio.min():.2f} to {ratio.max():.2f}); the quartile ranges lie apart "
        f"in {slower + quicker} of the pairs, slower with it in {slower}."
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


def weights_distance(run: Run) -> str:
    """How far a run's weights are from the ground truth's."""
    trained = load_training(run)
    away = np.abs(np.subtract(trained.model.weights, GRAY_WEIGHTS)).max()
    if trained.dead:
        return (
            f"`{run.label}` is a dead start: its outputs lie outside [0, 1], where the clamp gives no gradient, and "
            f"the weights stay up to {scientific(away)} from the ground truth's."
        )
    if away < 1e-6:
        quality = "the ground truth's to rounding"
    elif away < 1e-3:
        quality = "close to the ground truth's"
    else:
        quality = "not the ground truth's"
    return (
        f"The weights of `{run.label}` are {quality}: the largest difference is {scientific(away)}. They are those of "
        f"epoch {trained.best_epoch} of {len(trained.history)}, with a validation MSE of "
        f"{scientific(trained.best_val_mse)}."
    )


def weights_table(runs: Sequence[Run]) -> pd.DataFrame:
    """The learned weights beside those of the ground truth."""
    rows = [("ground truth (ITU-R BT.601)", *(f"{weight:.4f}" for weight in GRAY_WEIGHTS), "0", "–", "–")]
    for run in runs:
        trained = load_training(run)
        rows.append(
            (
                f"{run.label} ({load_config(run).preset})",
                *(f"{weight:.7f}" for weight in trained.model.weights),
                scientific(trained.best_val_mse, 3),
                f"{trained.best_epoch} of {len(trained.history)}",
                f"{trained.history['epoch_seconds'].median():.3f}",
            )
        )
    columns = ["Weights", "red", "green", "blue", "validation MSE", "restored epoch", "median epoch (s)"]
    return pd.DataFrame(rows, columns=columns)


def report_date(runs: Sequence[Run]) -> str:
    """The day on which the newest stage was finished, YYYY-MM-DD: the same runs give the same date."""
    return max(stage["finished"] for run in runs for stage in run.info["stages"].values() if "finished" in stage)[:10]


def first_page(runs: Sequence[Run]) -> str:
    """Images, machine, versions and commit, each named once, and by run where runs differ."""

    def told(name: str, of_run) -> str:
        values: dict[str, list[str]] = {}
        for run in runs:
            values.setdefault(of_run(run.stage_info("train")), []).append(run.label)
        if len(values) == 1:
            return f"**{name}:** {next(iter(values))}."
        return f"**{name}:** " + "; ".join(f"{text} (`{'`, `'.join(labels)}`)" for text, labels in values.items()) + "."

    def images(stage: dict) -> str:
        height, width = stage["images"]["size"]
        return f"`{stage['images']['source']}`, {stage['images']['count']:,} training images of {height}×{width} pixels"

    def machine(stage: dict) -> str:
        there = stage["environment"]
        name = there["cpu"] if there["device"] == "cpu" else f"{there['device_name']} with {there['cpu']}"
        return f"{name}, {there['cores']} cores, {there['threads']} threads, {there['os']}"

    def versions(stage: dict) -> str:
        there = stage["environment"]
        return f"Python {there['python']}, torch {there['torch']}, torchvision {there['torchvision']}"

    def stages(run: Run) -> str:
        done = [name for name in ("train", "compare", "benchmark") if run.has(name)]
        return f"`{run.label}` (preset `{load_config(run).preset}`: {', '.join(done)})"

    compared = [run.stage_info("compare")["images"]["count"] for run in runs if run.has("compare")]
    tested = [f"**Test images:** {compared[0]:,}, the same for all runs."] if compared else []
    lines = [
        f"**Runs:** {'; '.join(map(stages, runs))}. Every number below was read from "
        "their files, but for those marked as the paper's.",
        told("Images", images),
        *tested,
        told("Machine", machine),
        told("Versions", versions),
        told("Commit", lambda stage: f"`{short_commit(stage)}`"),
        told("Date", lambda stage: stage["started"][:10]),
    ]
    return "\n".join(f"- {line}" for line in lines)


def short_commit(stage: dict) -> str:
    """The commit's first 12 digits, with "+changes" where files differed from it."""
    commit, plus, changes = stage["commit"].partition("+")
    return commit[:12] + plus + changes


def stopping(run: Run) -> str:
    """How early stopping was set and how it ended in this run."""
    config, trained = load_config(run), load_training(run)
    count = len(trained.history)
    ended = f"stopped after {count} epochs" if count < config.epochs else f"ran all {count} epochs"
    least = f"at least {config.min_delta:g}" if config.min_delta else "at all"
    settled = " (counted once the learning rate has fallen to 0)" if config.decay_steps else ""
    return (
        f"With the preset `{config.preset}` (`{run.label}`) an epoch is an improvement if the validation MSE falls "
        f"{least} below the best so far; after {config.patience} epochs in a row without one{settled}, or "
        f"{config.epochs} in all, training ends. It {ended}; the last improvement, whose "
        f"weights "
        f"were restored, came in epoch {trained.best_epoch}. The lowest validation MSE of any epoch is "
        f"{scientific(trained.history['val_mse'].min())}, that of the restored one {scientific(trained.best_val_mse)}."
    )


# What the reader must know of each kind of image source.
SOURCES = {
    "photos": (
        "crops of 32×32 pixels from photographs that come with scikit-image, cut at three scales; training and test "
        "crops are from different photographs, so the two differ more than two samples of one collection would. They "
        "are not the CIFAR-10 images of the paper"
    ),
    "cifar10": "CIFAR-10, the images that the paper used",
    "folder": "image files of the user's own, as they lay in that folder's train/ and test/",
}


def images_used(runs: Sequence[Run]) -> str:
    """Which images the runs saw, and whether they are the paper's."""
    sources = dict.fromkeys(run.stage_info("train")["images"]["source"] for run in runs)
    return " ".join(f"The images `{source}` are {SOURCES[source.partition(':')[0]]}." for source in sources)


def training(run: Run) -> str:
    """The training's settings in a sentence."""
    config, images = load_config(run), run.stage_info("train")["images"]
    val = round(images["count"] * config.val_fraction)
    extras = [
        f"weight decay {config.weight_decay:g}",
        "the loss on clamped outputs" if config.clamp else "the loss on outputs before the clamp",
    ]
    if config.whiten:
        extras.append("the weights moved in decorrelated colour coordinates")
    if config.decay_steps:
        extras.append(f"the learning rate falling to 0 over {config.decay_steps} steps along half a cosine")
    return (
        f"Run `{run.label}` (preset `{config.preset}`) was trained on {images['count'] - val:,} images and validated "
        f"on {val:,}, with AdamW at a learning rate of {config.lr:g}, batch size {config.batch_size}, at most "
        f"{config.epochs} epochs, seed {config.seed}; {', '.join(extras)}."
    )


def baselines(run: Run) -> str:
    """The pipeline's own times on this run's machine, beside the paper's."""
    table = load_benchmark(run)
    sequential, batched = baseline(table, "sequential"), baseline(table, "batched")
    return (
        f"On the machine of `{run.label}` ({run.stage_info('benchmark')['environment']['cpu']}, "
        f"{run.stage_info('benchmark')['environment']['threads']} threads) the pipeline takes "
        f"{spread_text(sequential)} image by image for {sequential['images']:,} images (the paper, on its machine: "
        f"{paper.SEQUENTIAL_SECONDS} s for 10,000), and {spread_text(batched)} in batches of {batched['batch_size']}, "
        f"{times_text(batched['speedup'])} as fast."
    )


def history_text(histories: dict[str, pd.DataFrame], column: str) -> str:
    """First and last value of each run's curve, for those who cannot see it."""
    return " ".join(
        f"{label}: {scientific(history[column].iloc[0])} in epoch 1, {scientific(history[column].iloc[-1])} in epoch "
        f"{len(history)}."
        for label, history in histories.items()
    )


def devices_shown(runs: Sequence[Run]) -> str:
    """Which devices the training curves show; one alone is said to be alone."""
    devices = list(dict.fromkeys(run.stage_info("train")["environment"]["device"] for run in runs))
    if len(devices) == 1:
        return f"All runs were trained on one device, {devices[0]}: there is no other to compare with."
    return f"Devices: {', '.join(devices)}."


def table1_caption(runs: Sequence[Run]) -> str:
    """What Table 1's columns are."""
    measured = [run.label for run in runs if run.has("benchmark")]
    return (
        "The paper's 48 settings: its seconds, single measurements on its machine, and those measured here (run "
        f"{', '.join(f'`{label}`' for label in measured)}): medians and quartiles. Speed-ups are over the pipeline run "
        "image by image, on the paper's machine and here. " + not_measured(runs)
    ).strip()


def command(runs: Sequence[Run]) -> str:
    """The command that makes this report again, in the folder that holds the runs."""
    return " ".join(["transformnet report", *(f"--run {run.label}" for run in runs)])


def provenance_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One column a run, one row a fact: parameters, machine, versions, images, commit, seconds of each stage."""
    columns = {}
    for run in runs:
        stages = run.info["stages"]
        train = run.stage_info("train")
        machine = train["environment"]
        facts = {"commit": short_commit(train)}
        facts |= {name: machine.get(name) for name in ("os", "cpu", "cores", "threads", "device_name", "python")}
        facts |= {name: machine.get(name) for name in ("torch", "torchvision", "cuda")}
        facts |= {name: value for name, value in train["parameters"].items() if name != "pipeline"}
        for name, stage in stages.items():
            images = stage["images"]
            facts[f"{images['split']} images"] = f"{images['count']:,} of {images['source']}"
            facts[f"{images['split']} images, sha256"] = images["fingerprint"][:16] + "…"
            facts[f"{name}: started"] = stage["started"]
            facts[f"{name}: seconds"] = f"{stage['seconds']:.1f}" if "seconds" in stage else "–"
        columns[run.label] = facts
    table = pd.DataFrame(columns).map(lambda value: "–" if value is None or value is np.nan else str(value))
    return table.rename_axis("Fact").reset_index()


def example_caption(runs: Sequence[Run], i: int) -> str:
    """The caption of example `i`: which image, and its metrics for each run."""
    parts = []
    for run in runs:
        row = metrics_table(run.examples()).iloc[i]
        parts.append(
            f"`{run.label}` MSE {scientific(row['mse'])}, PSNR {row['psnr_db']:.1f} dB, SSIM {row['ssim']:.4f}"
        )
    index = runs[0].examples()["indices"][i]
    return f"Test image {index}: input, ground truth, model output and error; {'; '.join(parts)}."


def benchmark_columns(runs: Sequence[Run]) -> dict[str, pd.DataFrame]:
    """The runs' measurements, as few columns as there can be: runs that measured different devices share one."""
    columns: dict[str, pd.DataFrame] = {}
    for run in runs:
        if not run.has("benchmark"):
            continue
        table = load_benchmark(run)
        if not (devices := measured_devices(table)):
            continue
        rows = pd.concat([model_rows(table, device) for device in devices])
        for name, other in columns.items():
            if not set(other["device"]) & set(rows["device"]):
                columns[f"{name}, {run.label}"] = pd.concat([columns.pop(name), rows])
                break
        else:
            columns[run.label] = rows
    return columns


def table1(runs: Sequence[Run]) -> pd.DataFrame:
    """Table 1: the paper's 48 settings with its seconds, and what the runs measured: seconds, quartiles, speed-up.

    Devices that a run measured come first.
    """
    shown = paper.table1()
    shown["Paper (s)"] = shown["seconds"].map("{:.4f}".format)
    processed = paper.IMAGES - shown["drop_last"] * (paper.IMAGES % shown["batch_size"])
    speedup = paper.SEQUENTIAL_SECONDS / paper.IMAGES / (shown["seconds"] / processed)
    shown["Paper, speed-up"] = speedup.map("{:.1f}×".format)
    shown = shown.drop(columns="seconds")
    columns = benchmark_columns(runs)
    measured = {device for rows in columns.values() for device in rows["device"]}
    shown = shown.sort_values("device", key=lambda devices: ~devices.isin(measured), kind="stable")
    for label, rows in columns.items():
        title = f"{label}: " if len(columns) > 1 else ""
        rows = rows.assign(
            median=rows["seconds"].map("{:.4f}".format),
            quartiles=rows["q1"].map("{:.4f}".format) + "–" + rows["q3"].map("{:.4f}".format),
            ratio=rows["speedup"].map("{:.1f}×".format),
        )[[*SETTING, "median", "quartiles", "ratio"]]
        names = {"median": "Here (s)", "quartiles": "Quartiles (s)", "ratio": "Speed-up"}
        rows = rows.rename(columns={old: title + new for old, new in names.items()})
        shown = shown.merge(rows, on=SETTING, how="left")
    shown[["shuffle", "drop_last"]] = shown[["shuffle", "drop_last"]].replace(YES_NO)
    names = dict(zip(SETTING, ("Device", "Batch", "Shuffle", "Drop last"), strict=True))
    return shown.rename(columns=names).fillna("–")


def not_measured(runs: Sequence[Run]) -> str:
    """The rows without a time, folded into a sentence a reason; empty if there are none."""
    sentences = []
    for run in runs:
        if run.has("benchmark"):
            missing = swept_rows(load_benchmark(run)).query("reason != ''")
            kinds = missing["reason"].str.partition(" (MSE")[0]  # the same reason, whatever the number in it
            for (device, reason), rows in missing.groupby(["device", kinds]):
                count = f"{len(rows)} settings" if len(rows) > 1 else "1 setting"
                have = "have" if len(rows) > 1 else "has"
                sentences.append(f"{count} on {device} in run `{run.label}` {have} no time ({reason}).")
    return " ".join(sentences)
