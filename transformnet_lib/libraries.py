"""What a user would pick instead of the model: the pipeline by other libraries, timed side by side on the same images.

Each is used as its own documentation would have it, on images in the form it likes best, which lie in memory before the
clock starts: uint8 height × width × 3 for OpenCV and Pillow, float32 batches for the others. Each is marked with its
largest difference from the ground truth, since "the same pipeline" is not the same arithmetic everywhere.
"""

import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .errors import ParameterError
from .machine import available_devices, synchronize
from .model import TransformNet
from .pipeline import Pipeline, to_float
from .timing import (
    NOT_MEASURED,
    Entry,
    check_outputs,
    copy_pass,
    float32_exactly,
    not_measured,
    prepare_pass,
    spread,
    take_turns,
)

BATCH_SIZE = 512  # images; where there are batches

LIBRARY_COLUMNS = {
    "method": "str",
    "device": "str",
    "images": "int",
    "repeats": "int",
    "seconds": "float",  # median over the repeats, as are q1 and q3
    "q1": "float",
    "q3": "float",
    "speedup": "float",  # torchvision image by image ÷ this row, both medians of this table
    "max_difference": "float",  # largest difference of a pixel from the ground truth, in grey levels of 255
    "raw_seconds": "str",  # every repeat, separated by spaces
    "reason": "str",  # why there is no time; empty where there is one
}


@dataclass(frozen=True)
class OtherLibrary:
    """A way to do the work: `prepare(images, pipeline, device)` gives a function that does it once.

    It returns the outputs, one array or picture an image or a batch, in [0, 1] or as uint8.
    """

    name: str
    prepare: Callable[[Tensor, Pipeline, torch.device], Callable[[], list]]
    package: str = "torchvision"  # that must be installed
    devices: tuple[str, ...] = ("cpu",)


def torchvision_one_by_one(images: Tensor, pipeline: Pipeline, device: torch.device):
    """`v2.Compose` on float32 images: the baseline."""
    transform, floats = pipeline.compose(), to_float(images)
    return lambda: [transform(image) for image in floats]


def torchvision_batched(images: Tensor, pipeline: Pipeline, device: torch.device):
    """`v2.Compose` on float32 batches, copied to the device inside the clock."""
    transform, floats = pipeline.compose(), to_float(images)
    return lambda: [transform(batch.to(device)) for batch in floats.split(BATCH_SIZE)]


def kornia_batched(images: Tensor, pipeline: Pipeline, device: torch.device):
    """Kornia's functions on float32 batches; its antialiasing is a Gaussian blur, not torchvision's wider triangle."""
    from kornia.color import rgb_to_grayscale
    from kornia.geometry.transform import hflip, resize, vflip

    floats = to_float(images)

    def transform(batch: Tensor) -> Tensor:
        batch = resize(batch, pipeline.size, interpolation="bilinear", align_corners=False, antialias=True)
        batch = rgb_to_grayscale(batch)
        batch = hflip(batch) if pipeline.hflip else batch
        return vflip(batch) if pipeline.vflip else batch

    return lambda: [transform(batch.to(device)) for batch in floats.split(BATCH_SIZE)]


def opencv_one_by_one(images: Tensor, pipeline: Pipeline, device: torch.device):
    """OpenCV on uint8 images, with INTER_AREA, its resize against aliasing."""
    import cv2

    pictures = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
    size = pipeline.size[::-1]
    flip = {(True, True): -1, (True, False): 1, (False, True): 0}.get((pipeline.hflip, pipeline.vflip))

    def transform(picture: np.ndarray) -> np.ndarray:
        grey = cv2.cvtColor(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
        return grey if flip is None else cv2.flip(grey, flip)

    return lambda: [transform(picture) for picture in pictures]


def pillow_one_by_one(images: Tensor, pipeline: Pipeline, device: torch.device):
    """Pillow on its own images; its bilinear filter is antialiased."""
    pictures = [Image.fromarray(picture) for picture in images.permute(0, 2, 3, 1).numpy()]
    size = pipeline.size[::-1]

    def transform(picture: Image.Image) -> Image.Image:
        grey = picture.resize(size, Image.Resampling.BILINEAR).convert("L")
        grey = grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if pipeline.hflip else grey
        return grey.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if pipeline.vflip else grey

    return lambda: [transform(picture) for picture in pictures]


ALL = ("cpu", "cuda", "mps")
BASELINE = "torchvision v2, image by image"
LIBRARIES = (
    OtherLibrary(BASELINE, torchvision_one_by_one),
    OtherLibrary("torchvision v2, batches", torchvision_batched, devices=ALL),
    OtherLibrary("Kornia, batches", kornia_batched, "kornia", ALL),
    OtherLibrary("OpenCV, image by image", opencv_one_by_one, "cv2"),
    OtherLibrary("Pillow, image by image", pillow_one_by_one, "PIL"),
)


def study_libraries(
    model: TransformNet, images: Tensor, *, devices: Sequence[str] = ("cpu",), repeats: int = 5
) -> pd.DataFrame:
    """Time every library, the model's fast method and the copy on `images`, uint8 (n, 3, h, w): a row per device.

    Columns: `LIBRARY_COLUMNS`. All take turns, repeat by repeat. Where a device is not the CPU, rows include the copy
    to it; one more has the images on it already. A row that cannot be measured, since the library is not installed or
    the device runs out of memory, stays with the reason and without a time.
    """
    pipeline = model.pipeline
    with torch.inference_mode():
        targets = torch.cat([pipeline(to_float(chunk)) for chunk in images.split(BATCH_SIZE)])
    rows, entries = [], []

    def difference(outputs: list) -> float:
        """The largest of a pixel from the ground truth, in grey levels."""
        return (_grey_levels(outputs) - 255 * targets).abs().max().item()

    with torch.inference_mode(), float32_exactly():
        for device in devices:
            for name, prepare in _ways(model, images, torch.device(device)):
                row = {"method": name, "device": device, "images": len(images), "max_difference": None, "reason": ""}
                rows.append(row)
                try:
                    run_pass, outputs = prepare()
                    error = outputs and (lambda outputs=outputs: difference(outputs()))
                    entries.append(Entry(row, run_pass, error))
                except NOT_MEASURED as error:
                    row["reason"] = not_measured(error)
        check_outputs(entries)
        for _ in tqdm(range(repeats), desc="libraries", unit="round", leave=False):
            take_turns(entries)
        check_outputs(entries)
    for entry in entries:
        entry.row |= spread(entry.seconds) | {"max_difference": max(entry.errors, default=None)}
    baseline = next((entry.row["seconds"] for entry in entries if entry.row["method"] == BASELINE), math.nan)
    for entry in entries:
        entry.row["speedup"] = baseline / entry.row["seconds"]
    return pd.DataFrame(rows).reindex(columns=list(LIBRARY_COLUMNS)).fillna({"repeats": 0, "raw_seconds": ""})


def _ways(model: TransformNet, images: Tensor, device: torch.device) -> Iterator[tuple[str, Callable]]:
    """Name and preparation of each row on a device; a preparation gives the timed pass and what gives its outputs."""
    kind = device.type

    def library(method: OtherLibrary) -> tuple[Callable[[], float], Callable[[], list]]:
        if importlib.util.find_spec(method.package) is None:
            raise ParameterError(f"{method.package} is not installed (pip install -e '.[libraries]')")
        if kind not in available_devices():
            raise ParameterError(f"no {kind.upper()} device")
        work = method.prepare(images, model.pipeline, device)
        return (lambda: _timed(work, device)), work

    def fast(source: Tensor) -> tuple[Callable[[], float], Callable[[], list]]:
        options = {"batch_size": BATCH_SIZE, "shuffle": False, "drop_last": False, "num_workers": 0, "method": "fast"}
        work = prepare_pass(model, images=source, device=device, **options)
        return work.seconds, lambda: [output.cpu() for output in work.outputs()]

    def resident() -> tuple[Callable[[], float], Callable[[], list]]:
        folded, there = model.folded(), images.to(device)

        def work() -> list:
            return [folded(batch) for batch in there.split(BATCH_SIZE)]

        return (lambda: _timed(work, device)), work

    for method in LIBRARIES:
        if kind in method.devices:
            yield method.name, lambda method=method: library(method)
    yield "TransformNet, the fast way", lambda: fast(images)
    if kind != "cpu":
        yield "TransformNet, images on the device already", resident
    bound = "copy: the bytes read and written once" if kind == "cpu" else "copy: the images copied to the device"
    yield bound, lambda: (copy_pass(images, model.pipeline, device), None)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def _grey_levels(outputs: list) -> Tensor:
    """Outputs of any of the libraries as float32 (n, 1, h, w), 0 to 255."""
    if isinstance(outputs[0], Tensor):
        single = outputs[0].ndim == 3
        return 255 * (torch.stack(outputs) if single else torch.cat(outputs)).float().cpu()
    return torch.from_numpy(np.stack([np.asarray(output) for output in outputs])).float()[:, None]
