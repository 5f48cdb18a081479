"""Using a run's model afterwards: over a folder of images of any size, or as an ONNX file for other programs."""

import io
import itertools
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

from .errors import DataError, ParameterError, RunError
from .files import check_path, drop_leftovers, locked, read_plain, write_atomic
from .images import IMAGE_SUFFIXES, decode_image, image_files
from .machine import resolve_device
from .model import FoldedTransformNet
from .runs import Run
from .training import load_model
from .untrusted import MAX_TEXT_BYTES, parse_json

FORMATS = ("png", "npz")
SHARD = "shard-{:06}-of-rank-{:04}.npz"
BATCH_SIZE = 512  # images that are held at once, at most; also those of one npz shard
HELD_BYTES = 2**27  # of decoded images held at once (twice, and as float32): 43,000 of 32×32 pixels, 3 of 12 megapixels
STATE = ".infer"  # hidden, since the folder is for results: what they are of, each rank's lock and what it is writing
STAMP = "transformnet-image"  # the text in a PNG that says of which version of the image it was made
OPSET = 17  # of ONNX; old enough for runtimes of 2022


def infer_folder(
    run: Run,
    images: str | Path,
    out: str | Path,
    *,
    form: str = "png",
    batch_size: int = BATCH_SIZE,
    device: str = "auto",
    rank: int = 0,
    world_size: int = 1,
) -> int:
    """Apply a run's model to every image file below `images`; returns how many files this call processed.

    With `form="png"` `out/a/b.jpg.png` is the 8-bit result of `images/a/b.jpg`. With "npz", shards of `batch_size`
    images hold `names` (paths below `images`), `outputs`, float32 `(n, 1, *pipeline.size)` in [0, 1], and `stamps`,
    int64 `(n, 2)`: the bytes and the nanosecond of change of each image file, which a PNG holds as a text. Images may
    differ in size. Each file is written whole or not at all, and a result that is there already, whole, and of its
    image as it is now is left as it is, so that the same call goes on after a kill; shards beyond the last are removed.
    Of `world_size` processes, the one of `rank` (from 0) takes every `world_size`-th image; the progress bar is rank
    0's. Raises DataError for a missing folder or an unreadable image, RunError if `out` holds results of other
    images or another model, or another process of this rank works there.
    """
    check_path("images", images)
    check_path("out", out)
    images, out = Path(images), Path(out)
    if form not in FORMATS:
        raise ParameterError(f"format: expected one of {', '.join(FORMATS)}, got {form!r}")
    if type(batch_size) is not int or batch_size < 1:
        raise ParameterError(f"batch_size: expected a whole number from 1, got {batch_size!r}")
    if not 0 <= rank < world_size:
        raise ParameterError(f"rank: expected one from 0 to below world_size, got rank {rank} of {world_size}")
    if not images.is_dir():
        raise DataError(f"images: {images} is not a folder")
    if out.resolve().is_relative_to(images.resolve()):
        raise ParameterError(f"out: {out} lies in {images}; results would be taken for images the next time")
    if out.resolve() == run.path.resolve():
        raise ParameterError(f"out: {out} is the run directory; take another folder")

    def mine() -> Iterator[Path]:
        return itertools.islice(image_files(images), rank, None, world_size)

    total = sum(1 for _ in mine())
    if not total and not rank:
        raise DataError(f"images: no images below {images}; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    where = resolve_device(device)
    model = load_model(run)
    shards = {"batch_size": batch_size, "world_size": world_size} if form == "npz" else {}
    with locked(out / STATE, ".lock"):
        drop_leftovers(out / STATE)
        of = {"images": str(images.resolve()), "weights": model.weights, "pipeline": run.pipeline.to_dict()}
        _claim(out, of | {"format": form, **shards})
    folded = model.folded()
    parts = out / STATE / str(rank)

    done, number, share = 0, -1, f"rank 0 of {world_size}" if world_size > 1 else None
    with (
        locked(parts, ".lock"),
        ThreadPoolExecutor() as pool,  # Pillow frees the GIL
        tqdm(total=total, unit="image", desc=share, disable=rank > 0) as bar,
    ):
        drop_leftovers(parts)
        for number, files in enumerate(_batches(mine(), batch_size)):
            names = [file.relative_to(images).as_posix() for file in files]
            # Before an image is read: the result of one that changes meanwhile is made again by the next call
            stamps = list(map(_stamp, files))
            if form == "png":
                targets = {file: out / f"{name}.png" for file, name in zip(files, names, strict=True)}
                known = dict(zip(files, stamps, strict=True))
                there = pool.map(lambda file: _is_picture(targets[file], known[file], run.pipeline.size), files)  # noqa: B023
                files = [file for file, done_before in zip(files, there, strict=True) if not done_before]
                outputs = _outputs(folded, files, where, pool)
                list(pool.map(lambda file, y: _write(targets[file], _png(y, known[file]), parts), files, outputs))  # noqa: B023
            else:
                shard = out / SHARD.format(number, rank)
                if _is_shard(shard, names, stamps, run.pipeline.size):
                    files = []
                else:
                    buffer = io.BytesIO()
                    arrays = np.stack([output.numpy() for output in _outputs(folded, files, where, pool)])
                    np.savez_compressed(buffer, names=np.array(names), stamps=np.array(stamps), outputs=arrays)
                    _write(shard, buffer.getvalue(), parts)
            done += len(files)
            bar.update(len(names))
        if form == "npz":
            _remove_shards(out, rank, number + 1)  # there were more images once
    return done


def _remove_shards(out: Path, rank: int, start: int) -> None:
    """Remove the shards of `rank` from the number `start` on; not one by one, since a kill may have left a gap."""
    try:
        for left in out.glob(SHARD.replace("{:06}", "*").format(rank)):
            digits = left.name.split("-")[1]
            if digits.isdecimal() and int(digits) >= start:
                left.unlink()
    except OSError as error:
        place = error.filename or out
        raise RunError(f"{place}: cannot be removed ({error.strerror}), and is of images no more there") from error


def _stamp(image: Path) -> tuple[int, int]:
    """An image file's bytes and nanosecond of change; what replaces it has others."""
    try:
        found = image.stat()
    except OSError as error:
        raise DataError(f"{image}: cannot be read ({error.strerror})") from error
    return found.st_size, found.st_mtime_ns


def _is_picture(file: Path, stamp: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether `file` was made of an image with this stamp: a grey PNG of this (height, width), its checksums right."""
    try:
        if not file.is_file():  # a pipe would be waited for
            return False
        with Image.open(file, formats=["PNG"]) as picture:
            picture.verify()
            made_of = picture.info.get(STAMP), picture.mode, picture.size
            return made_of == (_text(stamp), "L", (size[1], size[0]))
    except Exception:  # Pillow raises many kinds
        return False


def _is_shard(shard: Path, names: Sequence[str], stamps: Sequence[tuple[int, int]], size: tuple[int, int]) -> bool:
    """Whether `shard` was made of the images of these names and stamps, and holds outputs of this (height, width)."""
    if not shard.is_file():
        return False
    try:
        # Not np.load, which leaves a broken file open. The zip's checksums are looked at on reading
        with shard.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as arrays:
            outputs, shape = arrays["outputs"], (len(names), 1, *size)
            made_of = arrays["names"].tolist(), list(map(tuple, arrays["stamps"].tolist()))
            return made_of == (names, stamps) and (outputs.shape, outputs.dtype) == (shape, np.float32)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error):
        return False


def _claim(out: Path, record: dict) -> None:
    """Note in `out` whose results it holds; RunError if they are another's. A call that failed early left none."""
    path = out / STATE / "model.json"
    record = json.loads(json.dumps(record))
    if os.path.lexists(path) and any(found.name != STATE for found in out.iterdir()):
        try:
            known = parse_json(read_plain(path, MAX_TEXT_BYTES))
        except (ValueError, RecursionError):
            known = None
        if known != record:
            raise RunError(
                f"{path}: the folder holds results of other images, another model, format or division; "
                "take another --out"
            )
    else:
        _write(path, (json.dumps(record, indent=2) + "\n").encode())


def _batches(files: Iterator[Path], size: int) -> Iterator[list[Path]]:
    while part := list(itertools.islice(files, size)):
        yield part


@torch.inference_mode()
def _outputs(
    model: FoldedTransformNet, files: Sequence[Path], device: torch.device, pool: ThreadPoolExecutor
) -> list[Tensor]:
    """The model's output for each file, `(1, height, width)` on the CPU; images of one size go through together.

    No more are decoded at once than fit in `HELD_BYTES`, if they are no larger than those before.
    """
    outputs: list[Tensor] = []
    largest, start = HELD_BYTES, 0  # bytes of an image; the first goes alone, since its size is not known
    while start < len(files):
        images = list(pool.map(decode_image, files[start : start + max(1, HELD_BYTES // largest)]))
        largest = max(image.nbytes for image in images)
        outputs += [torch.empty(0)] * len(images)
        for shape in dict.fromkeys(image.shape for image in images):
            chosen = [i for i, image in enumerate(images) if image.shape == shape]
            batch = torch.from_numpy(np.stack([images[i] for i in chosen])).to(device)
            for i, output in zip(chosen, model(batch).cpu(), strict=True):
                outputs[start + i] = output
        start += len(images)
    return outputs


def _text(stamp: tuple[int, int]) -> str:
    return "{} bytes, changed at {} ns".format(*stamp)


def _png(output: Tensor, stamp: tuple[int, int]) -> bytes:
    buffer, notes = io.BytesIO(), PngImagePlugin.PngInfo()
    notes.add_text(STAMP, _text(stamp))
    Image.fromarray((output[0] * 255).round().to(torch.uint8).numpy()).save(buffer, "PNG", pnginfo=notes)
    return buffer.getvalue()


def _write(path: Path, content: bytes, parts: Path | None = None) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content, parts=parts)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror})") from error


def export_onnx(run: Run, path: str | Path, *, image_size: tuple[int, int] | None = None) -> Path:
    """Write a run's model as ONNX, in its folded form: y = clamp(L x R), two matrix products an image.

    Input `images`, float32 `(batch, 3, height, width)` in [0, 1], any batch, of `image_size` (height, width; default:
    that of the run's images); output `outputs`, float32 `(batch, 1, *pipeline.size)`. Needs the extra `[onnx]`.
    `path` must end in .onnx, so that none of the run's own files is replaced.
    """
    check_path("out", path)
    if Path(path).suffix != ".onnx":
        raise ParameterError(f"out: expected a file whose name ends in .onnx, got {path}")
    try:
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise ParameterError("onnx is not installed: pip install -e '.[onnx]'") from error
    height, width = image_size or run.stage_info("train")["images"]["size"]
    model = load_model(run)
    folded, (out_height, out_width) = model.folded(), run.pipeline.size
    cpu = torch.device("cpu")
    left = torch.kron(model.mix.weight.detach().flatten(), folded.axis_matrix(height, -2, cpu))
    right = folded.axis_matrix(width, -1, cpu).T
    constants = {
        "left": left.numpy(),
        "right": np.ascontiguousarray(right.numpy()),
        "stacked": np.array([-1, 3 * height, width]),
        "shape": np.array([-1, 1, out_height, out_width]),
        "zero": np.float32(0),
        "one": np.float32(1),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["images", "stacked"], ["x"]),
            helper.make_node("MatMul", ["left", "x"], ["rows"]),
            helper.make_node("MatMul", ["rows", "right"], ["columns"]),
            helper.make_node("Reshape", ["columns", "shape"], ["y"]),
            helper.make_node("Clip", ["y", "zero", "one"], ["outputs"]),
        ],
        "TransformNet",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, height, width])],
        [helper.make_tensor_value_info("outputs", TensorProto.FLOAT, ["batch", 1, out_height, out_width])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    made = helper.make_model(
        graph, producer_name="transformnet", opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8
    )
    onnx.checker.check_model(made, full_check=True)
    _write(Path(path), made.SerializeToString())
    return Path(path)
