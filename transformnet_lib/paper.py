"""The figures of the report that this project reproduces, as its author published them; none was measured by us."""

from pathlib import Path

import pandas as pd

SOURCE = "Isac Lucian-Constantin, “Optional Assignment: Advanced Topics in Neural Networks”, 18 December 2025"
IMAGES = 10_000  # CIFAR-10's test images, over which every time was taken
SEQUENTIAL_SECONDS = 0.7399  # the pipeline image by image on the CPU; its section 5.1


def table1() -> pd.DataFrame:
    """The paper's Table 1: device, batch_size, shuffle, drop_last, seconds; 48 rows in its order.

    Single measurements, over CIFAR-10's 10,000 test images, on a machine that the paper does not name.
    """
    return pd.read_csv(Path(__file__).with_name("paper_table1.csv"))
