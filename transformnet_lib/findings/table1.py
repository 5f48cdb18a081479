"""Table 1: the paper's settings with its times, and those measured beside them."""

from collections.abc import Sequence

import pandas as pd

from .. import paper
from ..benchmarking import SWEPT
from ..measure import CONFIDENCE
from ..run import SHIPPED_SIGN, Run
from .places import SETTING, Place, places, swept_rows
from .text import YES_NO, code, counted, decimals, escape, listed


def table1_groups(places: Sequence[Place]) -> list[list[Place]]:
    """The places that can share one Table 1: different kinds of device; "cuda:1" counts as the paper's "cuda"."""
    groups: list[list[Place]] = []
    for place in places:
        free = next((group for group in groups if place.kind not in [other.kind for other in group]), None)
        if free is None:
            groups.append([place])
        else:
            free.append(place)
    return groups or [[]]


TABLE1_COLUMNS = [
    ("", "Device"), ("", "Batch"), ("", "Shuffle"), ("", "Drop last"),
    ("The paper", "ms"), ("The paper", "×"),
    ("Reference", "ms"), ("Reference", "×"),
    ("Fast", "ms"), ("Fast", "×"),
    (" ", "Ratio"), (" ", "Images"),
]  # fmt: skip


def table1(group: Sequence[Place]) -> pd.DataFrame:
    """Table 1 for the kinds of device in `group`: the paper's settings with its times and those measured.

    Two header rows. Times are milliseconds of a pass, median and interval; "×" is the speed-up over the pipeline image
    by image, "Ratio" the paper's way's time over the fast one's, "Images" those of a pass here. A dagger marks a time
    that a shipped run brought from another machine. Without any place all 48 settings
    stand, with the paper's columns alone.
    """
    published = paper.table1()
    if group:
        kinds = [place.kind for place in group]
        published = published[published["device"].isin(kinds)]
        published = published.sort_values("device", key=lambda devices: devices.map(kinds.index), kind="stable")
    of_kind = {place.kind: place for place in group}
    measured = {kind: _measured(place) for kind, place in of_kind.items()}
    rows = []
    for setting in published.itertuples():
        processed = paper.IMAGES - setting.drop_last * (paper.IMAGES % setting.batch_size)
        speedup = paper.SEQUENTIAL_SECONDS / paper.IMAGES / (setting.seconds / processed)
        row = [setting.device, setting.batch_size, YES_NO[setting.shuffle], YES_NO[setting.drop_last]]
        row += [f"{setting.seconds * 1000:.1f}", f"{speedup:.1f}"]
        found = [
            measured.get(setting.device, {}).get((method, setting.batch_size, setting.shuffle, setting.drop_last))
            for method in SWEPT
        ]
        for measured_row in found:
            row += [measured_row["text"], f"{measured_row['speedup']:.1f}"] if measured_row else ["–", "–"]
        ratio = (
            of_kind[setting.device].measured.ratio("sweep", found[1]["name"], found[0]["name"]) if all(found) else None
        )
        row.append(f"{ratio.median:.1f}" if ratio else "–")
        row.append(next((f"{each['images']:,}" for each in found if each), "–"))
        rows.append(row)
    return pd.DataFrame(rows, columns=pd.MultiIndex.from_tuples(TABLE1_COLUMNS))


def _measured(place: Place) -> dict[tuple, dict]:
    """The rows of Table 1 that a place has, by method and setting, each with its time as `text`."""
    rows, dagger, found = pd.concat([place.rows(method) for method in SWEPT]), SHIPPED_SIGN * place.run.shipped, {}
    for row in rows.to_dict("records"):
        median, low, high = (row[name] * 1000 for name in ("seconds", "low", "high"))
        digits = decimals(median)
        text = f"{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]{dagger}"
        key = tuple(row[name] for name in ("method", "batch_size", "shuffle", "drop_last"))
        found[key] = {"text": text} | {name: row[name] for name in ("name", "speedup", "images")}
    return found


def table1_caption(group: Sequence[Place], runs: Sequence[Run]) -> str:
    """What the columns of this Table 1 are; `runs` are named where no place is there that could be."""
    own = [run for run in runs if any(run is place.run for place in group)] or runs
    labels = listed([code(label) for label in dict.fromkeys(place.run.label for place in group)]) if group else "no run"
    return (
        "The paper's settings: its times, single measurements on its machine, and those measured here "
        f"({labels}) as medians over the rounds with their {CONFIDENCE:.0%} intervals, the model run the paper's way "
        "(reference) and the fast way. × is the speed-up over the same machine's pipeline run image by image, in the "
        "same rounds; ratio, the reference's time over the fast one's; images, those of a pass here. "
        + not_measured(own)
    ).strip()


def not_measured(runs: Sequence[Run]) -> str:
    """The settings without a time, folded into a sentence a reason; empty if there are none.

    With the paper's times on devices of which nothing was measured.
    """
    published = paper.table1()
    sentences, devices = [], {}
    for run in runs:
        missing = swept_rows(run.benchmark.table).query("reason != ''") if run.benchmark else pd.DataFrame()
        if missing.empty:
            continue
        kinds = missing["reason"].str.partition(" (MSE")[0]  # the same reason, whatever the number in it
        for (device, reason), rows in missing.groupby(["device", kinds]):
            count = len(rows.drop_duplicates(SETTING))
            devices[device.partition(":")[0]] = None
            sentences.append(
                f"{counted(count, 'setting')} on {escape(device)} in run {code(run.label)} "
                f"{'has' if count == 1 else 'have'} no time ({escape(reason)})."
            )
    measured = {place.kind for place in places(runs)}
    for device in (device for device in devices if device not in measured):
        seconds = published.loc[published["device"] == device, "seconds"] * 1000
        if len(seconds):
            sentences.append(f"The paper's times on {device} are {seconds.min():.1f} to {seconds.max():.1f} ms.")
    return " ".join(sentences)
