"""What the optional study says: training from many seeds."""

import pandas as pd

from .text import counted, scientific


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
