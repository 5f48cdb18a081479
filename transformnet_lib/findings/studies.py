"""What the optional study says: training from many seeds, what others offer, cost over size."""

import numpy as np
import pandas as pd

from .text import counted, listed, scientific, seconds_text, spread_text, times_text


def seeds_table(seeds: pd.DataFrame) -> pd.DataFrame:
    """One row a preset: median and range over the seeds, and the number of dead starts."""

    def spread(values: pd.Series, write) -> str:
        return f"{write(values.median())} [{write(values.min())}, {write(values.max())}]"

    rows = [
        {
            "Preset": preset,
            "seeds": str(len(rows)),
            "dead starts": str(int(rows["dead"].sum())),
            "largest weight error": spread(rows["weight_error"], scientific),
            "validation MSE": spread(rows["val_mse"], scientific),
            "restored epoch": spread(rows["best_epoch"], "{:.0f}".format),
            "time (s)": spread(rows["seconds"], "{:.2f}".format),
        }
        for preset, rows in seeds.groupby("preset")
    ]
    return pd.DataFrame(rows)


def seeds_text(seeds: pd.DataFrame) -> str:
    """What each preset makes of its random starts."""
    sentences = []
    for preset, rows in seeds.groupby("preset"):
        dead = rows["dead"].sum()
        alive = rows[~rows["dead"]]
        starts = f"{counted(dead, 'start')} of {len(rows)} dead" if dead else f"no start of {len(rows)} is dead"
        ends = (
            f"; the largest weight error of the others is between {scientific(alive['weight_error'].min())} and "
            f"{scientific(alive['weight_error'].max())}"
            if len(alive)
            else ""
        )
        sentences.append(f"With the preset `{preset}`, {starts}{ends}.")
    return " ".join(sentences)


def peers_table(peers: pd.DataFrame) -> pd.DataFrame:
    """One row a way to do the work: time, speed-up and largest difference from the ground truth."""
    measured = peers[peers["reason"] == ""]
    shown = pd.DataFrame(
        {
            "Way": measured["name"],
            "device": measured["device"],
            "time": [spread_text(row) for _, row in measured.iterrows()],
            "speed-up": measured["speedup"].map(times_text),
            "largest difference (of 255)": [
                "–" if pd.isna(value) else f"{value:.1f}" if value >= 0.05 else "0.0"
                for value in measured["max_difference"]
            ],
        }
    )
    return shown.reset_index(drop=True)


def peers_text(peers: pd.DataFrame) -> str:
    """How the fast way stands among the peers, those of equal results apart; and what could not be measured."""
    sentences = []
    for device, rows in peers[peers["reason"] == ""].groupby("device", sort=False):
        ours = rows[rows["name"].str.startswith("TransformNet, the fast")]
        others = rows[rows["max_difference"].notna() & ~rows["name"].str.startswith("TransformNet")]
        if ours.empty or others.empty:
            continue
        best = others.loc[others["seconds"].idxmin()]
        ratio = best["seconds"] / ours.iloc[0]["seconds"]
        verdict = f"{times_text(ratio)} as fast as" if ratio >= 1 else f"slower ({times_text(1 / ratio)} the time) than"
        sentences.append(
            f"On {device}, the model run the fast way is {verdict} the quickest of the others, {best['name']}."
        )
        if (own := ours.iloc[0]["max_difference"]) > 1:
            sentences.append(
                f"Its pictures differ by up to {own:.1f} grey levels, since its weights are what this run learned."
            )
        far = others[others["max_difference"] > 1]
        if len(far):
            names = listed([f"{row['name']} ({row['max_difference']:.1f})" for _, row in far.iterrows()])
            sentences.append(f"Not the same pictures, by more than one grey level somewhere: {names}.")
    for reason, rows in peers[peers["reason"] != ""].groupby("reason", sort=False):
        sentences.append(f"{listed(list(rows['name']))} on {rows['device'].iloc[0]}: {reason}.")
    return " ".join(sentences)


def sizes_text(sizes: pd.DataFrame) -> str:
    """How time and memory grow with the number of images."""
    sentences = []
    measured = sizes[sizes["reason"] == ""]
    for way, rows in measured.groupby("way", sort=False):
        if len(rows) < 2:
            continue
        last = rows.iloc[-1]
        slope = np.polyfit(np.log(rows["images"].astype(float)), np.log(rows["seconds"]), 1)[0]
        growth = "less than in proportion" if slope < 0.9 else "in proportion" if slope < 1.1 else "faster than that"
        sentences.append(
            f"{way}: {seconds_text(last['seconds'])} for {last['images']:,} images, "
            f"{1e6 * last['seconds'] / last['images']:.3g} µs each; time grows {growth} (as the number of "
            f"images to the power {slope:.2f})."
        )
    peaks = measured.groupby("images")["peak_mib"].max()
    told = listed([f"{peak:,.0f} MiB for {images:,} images" for images, peak in peaks.items()])
    sentences.append(f"The largest memory of the process was {told}.")
    return " ".join(sentences)
