"""What a user would pick instead of the model: the pipeline by other libraries, timed side by side on the same images.

Each is used as its own documentation would have it, on images in the form it likes best, which lie in memory before the
clock starts: uint8 height × width × 3 for OpenCV and Pillow, float32 batches for the others. Each is marked with its
largest difference from the ground truth, since "the same pipeline" is not the same arithmetic everywhere.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from .errors import ParameterError
from .machine import available_devices, seconds_for
from .measure import (
    LEAST_ROUNDS,
    NOT_MEASURED,
    ROUND_COLUMNS,
    failure,
    ratio,
    reasons_of,
    rounds,
    seconds_of,
    stacked,
    summary,
)
from .methods import copy_pass, float32_exactly, prepare_pass
from .model import TransformNet
from .pipeline import Pipeline, to_float

BATCH_SIZE = 512  # images; where there are batches

LIBRARY_COLUMNS = {
    "method": "str",
    "device": "str",
    "images": "count",
    "max_difference": "amount",  # largest difference of a pixel from the ground truth, in grey levels of 255
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
FAST = "TransformNet, fast"
LIBRARIES = (
    OtherLibrary(BASELINE, torchvision_one_by_one),
    OtherLibrary("torchvision v2, batches", torchvision_batched, devices=ALL),
    OtherLibrary("Kornia, batches", kornia_batched, "kornia", ALL),
    OtherLibrary("OpenCV, image by image", opencv_one_by_one, "cv2"),
    OtherLibrary("Pillow, image by image", pillow_one_by_one, "PIL"),
)


def study_libraries(
    model: TransformNet,
    images: Tensor,
    *,
    devices: Sequence[str] = ("cpu",),
    least: int = LEAST_ROUNDS,
    done: pd.DataFrame | None = None,
    save: Callable[[pd.DataFrame], None] = lambda table: None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure every library, the model's fast method and the copy on `images`, uint8 (n, 3, h, w), in `least` rounds.

    Gives the facts, a row per method and device (`LIBRARY_COLUMNS`), and the rounds (`ROUND_COLUMNS`), from which
    `libraries_table` derives the times. Where a device is not the CPU, the copy to it is timed; one row more has the
    images on it already. A method that cannot be measured, since the library is not installed or the device runs out of
    memory, stays with the reason. After each round `save` gets the rounds so far, which `done` takes up again.
    """
    pipeline = model.pipeline
    with torch.inference_mode():
        targets = torch.cat([pipeline(to_float(chunk)) for chunk in images.split(BATCH_SIZE)])
    rows, methods, outputs_of, failures = [], {}, {}, []

    def difference(name: str) -> float | None:
        """The largest of a pixel from the ground truth, in grey levels."""
        outputs = outputs_of[name]
        return outputs and (_grey_levels(outputs()) - 255 * targets).abs().max().item()

    with torch.inference_mode(), float32_exactly():
        for device in devices:
            for method, prepare in _methods(model, images, torch.device(device)):
                row = {"method": method, "device": device, "images": len(images), "max_difference": None}
                rows.append(row)
                name = name_of(method, device)
                try:
                    methods[name], outputs_of[name] = prepare()
                    row["max_difference"] = difference(name)
                except NOT_MEASURED as error:
                    methods.pop(name, None)
                    failures.append({"round": 0, "attempt": 1, **failure(name, error)})
        before = pd.DataFrame(failures, columns=list(ROUND_COLUMNS))
        if done is not None:  # whose methods that failed, failed then for good
            before = stacked(done, before[~before["method"].isin(reasons_of(done))])
        table = rounds(methods, seconds=0, least=least, title="libraries", done=before, save=save)
        facts = pd.DataFrame(rows, columns=list(LIBRARY_COLUMNS))
        for row in (row for row in rows if name_of(row["method"], row["device"]) in methods):
            name, before = name_of(row["method"], row["device"]), row["max_difference"]
            if (after := difference(name)) != before:
                error = RuntimeError(
                    f"off the ground truth by {before:.3g} grey levels, after the rounds by {after:.3g}"
                )
                table.loc[table["method"] == name, "reason"] = failure(name, error)["reason"]
    return facts, table


def name_of(method: str, device: str) -> str:
    """What the rounds call a method on a device."""
    return f"{method} on {device}"


def libraries_table(facts: pd.DataFrame, rounds: pd.DataFrame) -> pd.DataFrame:
    """The facts with times and speed-ups over torchvision image by image, and `reason` where there are none.

    The columns ahead, ahead_low and ahead_high say how many times as fast as the row the model's fast method is, on the
    same device, within rounds.
    """
    names = [name_of(method, device) for method, device in zip(facts["method"], facts["device"], strict=True)]
    seconds, reasons = seconds_of(rounds), reasons_of(rounds)
    times = summary(seconds, name_of(BASELINE, "cpu")).reindex(names).reset_index(drop=True)
    table = facts.join(times).assign(reason=[reasons.get(name, "") for name in names])
    for i, (name, device) in enumerate(zip(names, facts["device"], strict=True)):
        ahead = [float("nan")] * 3
        if {name, name_of(FAST, device)} <= set(seconds):
            found = ratio(seconds, name_of(FAST, device), name)
            ahead = [found.median, found.low, found.high]
        table.loc[i, ["ahead", "ahead_low", "ahead_high"]] = ahead
    table.loc[table["seconds"].isna() & (table["reason"] == ""), "reason"] = "not measured"
    return table


def _methods(model: TransformNet, images: Tensor, device: torch.device) -> Iterator[tuple[str, Callable]]:
    """Name and preparation of each row on a device; a preparation gives the timed pass and what gives its outputs."""
    kind = device.type

    def library(method: OtherLibrary) -> tuple[Callable[[], float], Callable[[], list]]:
        if importlib.util.find_spec(method.package) is None:
            raise ParameterError(f"{method.package} is not installed (pip install -e '.[peers]')")
        if kind not in available_devices():
            raise ParameterError(f"no {kind.upper()} device")
        work = method.prepare(images, model.pipeline, device)
        return (lambda: seconds_for(work, device)), work

    def fast(source: Tensor) -> tuple[Callable[[], float], Callable[[], list]]:
        options = {"batch_size": BATCH_SIZE, "shuffle": False, "drop_last": False, "num_workers": 0, "method": "fast"}
        work = prepare_pass(model, images=source, device=device, **options)
        return work.seconds, lambda: [output.cpu() for output in work.outputs()]

    def resident() -> tuple[Callable[[], float], Callable[[], list]]:
        folded, there = model.folded(), images.to(device)

        def work() -> list:
            return [folded(batch) for batch in there.split(BATCH_SIZE)]

        return (lambda: seconds_for(work, device)), work

    for method in LIBRARIES:
        if kind in method.devices:
            yield method.name, lambda method=method: library(method)
    yield FAST, lambda: fast(images)
    if kind != "cpu":
        yield "TransformNet, images on the device already", resident
    bound = "copy: the bytes read and written once" if kind == "cpu" else "copy: the images copied to the device"
    yield bound, lambda: (copy_pass(images, model.pipeline, device), None)


def _grey_levels(outputs: list) -> Tensor:
    """Outputs of any of the libraries as float32 (n, 1, h, w), 0 to 255."""
    if isinstance(outputs[0], Tensor):
        single = outputs[0].ndim == 3
        return 255 * (torch.stack(outputs) if single else torch.cat(outputs)).float().cpu()
    return torch.from_numpy(np.stack([np.asarray(output) for output in outputs])).float()[:, None]
