"""What the stages seeds and study say: training from many seeds, what others offer, cost over size."""

import numpy as np
import pandas as pd

from ..libraries import FAST
from ..measure import Estimate
from .speed import against_text
from .text import METHOD_NAMES, code, counted, device_text, escape, listed, ratio_text, scientific, spread_text


def seeds_table(seeds: pd.DataFrame) -> pd.DataFrame:
    """One row a preset: median and range over the seeds, and the number of starts without a gradient."""

    def spread(values: pd.Series, write) -> str:
        return f"{write(values.median())} [{write(values.min())}, {write(values.max())}]"

    rows = [
        {
            "Preset": preset,
            "seeds": str(len(rows)),
            "no gradient": str(int(rows["no_gradient"].sum())),
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
        stuck = rows["no_gradient"].sum()
        others = rows[~rows["no_gradient"]]
        starts = (
            f"{counted(stuck, 'start')} of {len(rows)} {'has' if stuck == 1 else 'have'} no gradient (the clamp is "
            "flat there)"
            if stuck
            else f"every start of {len(rows)} has a gradient"
        )
        ends = (
            f"; the largest weight error of the others is between {scientific(others['weight_error'].min())} and "
            f"{scientific(others['weight_error'].max())}"
            if len(others)
            else ""
        )
        sentences.append(f"With the preset {code(preset)}, {starts}{ends}.")
    return " ".join(sentences)


def libraries_table(peers: pd.DataFrame) -> pd.DataFrame:
    """One row a way to do the work: time, speed-up and largest difference from the ground truth."""
    measured = peers[peers["reason"] == ""]
    shown = pd.DataFrame(
        {
            "Method": measured["method"],
            "device": measured["device"],
            "time": [spread_text(row) for _, row in measured.iterrows()],
            "speed-up": [
                ratio_text(Estimate(*row[["speedup", "speedup_low", "speedup_high"]], row["rounds"]))
                for _, row in measured.iterrows()
            ],
            "largest difference (of 255)": [
                "–" if pd.isna(value) else f"{value:.1f}" if value >= 0.05 else "0.0"
                for value in measured["max_difference"]
            ],
        }
    )
    return shown.reset_index(drop=True)


def quickest_libraries(peers: pd.DataFrame) -> dict[str, tuple[str, Estimate]]:
    """On each device the quickest of the other libraries, and how many times as fast as it the fast method is."""
    found = {}
    for device, rows in peers[peers["reason"] == ""].groupby("device", sort=False):
        ours = rows[rows["method"] == FAST]
        others = rows[rows["max_difference"].notna() & ~rows["method"].str.startswith("TransformNet")]
        if len(ours) and len(others):
            best = others.loc[others["seconds"].idxmin()]
            found[device] = best["method"], Estimate(*best[["ahead", "ahead_low", "ahead_high"]], int(best["rounds"]))
    return found


def libraries_text(peers: pd.DataFrame) -> str:
    """How the fast way stands among the peers, those of equal results apart; and what could not be measured."""
    sentences = []
    for device, (name, ratio) in quickest_libraries(peers).items():
        rows = peers[(peers["reason"] == "") & (peers["device"] == device)]
        own = rows.loc[rows["method"] == FAST, "max_difference"].iloc[0]
        others = rows[rows["max_difference"].notna() & ~rows["method"].str.startswith("TransformNet")]
        rival = f"the quickest of the others, {escape(name)}"
        sentences.append(f"On {device_text(device)}, the model run the fast way is {against_text(ratio)} {rival}.")
        if own > 1:
            sentences.append(
                f"Its pictures differ by up to {own:.1f} grey levels, since its weights are what this run learned."
            )
        far = others[others["max_difference"] > 1]
        if len(far):
            names = listed([f"{escape(row['method'])} ({row['max_difference']:.1f})" for _, row in far.iterrows()])
            sentences.append(f"Not the same pictures, by more than one grey level somewhere: {names}.")
    for reason, rows in peers[peers["reason"] != ""].groupby("reason", sort=False):
        names, device = listed(list(map(escape, rows["method"]))), escape(rows["device"].iloc[0])
        sentences.append(f"{names} on {device}: {escape(reason)}.")
    return " ".join(sentences)


def growth(rows: pd.DataFrame) -> float:
    """The power of the number of images with which a way's time grows: the slope of a line through the logarithms."""
    return float(np.polyfit(np.log(rows["images"].astype(float)), np.log(rows["seconds"]), 1)[0])


def sizes_table(sizes: pd.DataFrame) -> pd.DataFrame:
    """One row a way: its time over the most images, an image's share, and how time grows."""
    rows = []
    for method, of_method in sizes[sizes["reason"] == ""].groupby("method", sort=False):
        last = of_method.iloc[-1]
        rows.append(
            {
                "Method": METHOD_NAMES[method],
                "images": f"{last['images']:,}",
                "time": spread_text(last),
                "µs an image": f"{1e6 * last['seconds'] / last['images']:.3g}",
                "time grows as images to the power": f"{growth(of_method):.2f}" if len(of_method) > 1 else "–",
            }
        )
    return pd.DataFrame(rows)


def sizes_text(sizes: pd.DataFrame) -> str:
    """How time and memory grow with the number of images."""
    measured = sizes[sizes["reason"] == ""]
    kinds: dict[str, list[str]] = {}
    for method, rows in measured.groupby("method", sort=False):
        if len(rows) > 1:
            power = growth(rows)
            kind = "less than in proportion" if power < 0.9 else "in proportion" if power < 1.1 else "faster than that"
            kinds.setdefault(kind, []).append(METHOD_NAMES[method])
    told = "; ".join(f"{kind} for {listed([f'“{name}”' for name in names])}" for kind, names in kinds.items())
    grows = f"With the number of images time grows {told}. " if told else ""
    peaks = measured.groupby("images")["peak_mib"].max()
    memory = listed([f"{peak:,.0f} MiB for {images:,} images" for images, peak in peaks.items()])
    return f"{grows}The largest memory of the process was {memory}."
