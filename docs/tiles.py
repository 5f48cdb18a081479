"""Cut square tiles out of a folder of photographs: `python docs/tiles.py PHOTOGRAPHS OUT`; see own-images.md.

Writes `OUT/train/` and `OUT/test/`, each tile named after its photograph. No photograph is in both.
"""

import argparse
import random
from pathlib import Path

from PIL import Image

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("photographs", type=Path, help="a folder of .jpg, .jpeg or .png files")
parser.add_argument("out", type=Path, help="the folder to make")
parser.add_argument("--side", type=int, default=96, help="pixels a side of a tile [96]")
parser.add_argument("--count", type=int, default=600, help="tiles of each photograph [600]")
parser.add_argument("--reduce", type=int, nargs="+", default=[2, 4, 8], help="make it so many times smaller [2 4 8]")
parser.add_argument("--test", nargs="+", default=[], help="how the test photographs' names begin [every fourth]")
given = parser.parse_args()

files = sorted(path for path in given.photographs.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
tests = [path for path in files if path.name.startswith(tuple(given.test))] if given.test else files[3::4]
if not tests or len(tests) == len(files):
    parser.error(
        f"{given.photographs}: {len(files)} photographs, {len(tests)} of them to test on: both splits need one"
    )
for path in files:
    photograph = Image.open(path).convert("RGB")
    sizes = [photograph.reduce(factor) for factor in given.reduce]
    sizes = [small for small in sizes if min(small.size) >= given.side] or [photograph]
    if min(photograph.size) < given.side:
        parser.error(f"{path}: smaller than {given.side}×{given.side} pixels")
    folder = given.out / ("test" if path in tests else "train")
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(path.name)  # the same tiles each time
    for i in range(given.count):
        small = draw.choice(sizes)
        left, top = (draw.randrange(length - given.side + 1) for length in small.size)
        small.crop((left, top, left + given.side, top + given.side)).save(folder / f"{path.stem}-{i:04}.png")
print(
    *(f"{given.out / split}: {len(list((given.out / split).iterdir())):,} tiles" for split in ("train", "test")),
    sep="\n",
)
