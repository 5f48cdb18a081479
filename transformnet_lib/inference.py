"""Using a run's model afterwards: over a folder of images of any size, or as an ONNX file for other programs."""

import hashlib
import io
import itertools
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

from .errors import DataError, ParameterError, RunError
from .files import check_path, drop_leftovers, locked, read_file, write_atomic
from .images import IMAGE_SUFFIXES, decode_image, image_files
from .machine import resolve_device
from .model import FoldedTransformNet, TransformNet
from .records import MAX_TEXT_BYTES
from .run import Run

FORMATS = ("png", "npz")
SHARD = "shard-{:06}-of-rank-{:04}.npz"
SHARDS = "shard-[0-9]*-of-rank-[0-9]*.npz"  # all ranks', as a glob
BATCH_SIZE = 512  # images that are held at once, at most; also those of one npz shard
HELD_BYTES = 2**27  # of decoded images held at once (twice, and as float32): 43,000 of 32×32 pixels, 3 of 12 megapixels
STATE = ".infer"  # hidden, since the folder is for results: what they are of, each rank's lock and what it is writing
RECORD = f"{STATE}/model.json"  # whose results the folder holds
STAMP = "transformnet-image"  # the text in a PNG that says of which version of the image it was made
MODEL = "transformnet-model"  # and the one that says by which model
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
    images hold `names` (paths below `images`), `outputs`, float32 `(n, 1, *pipeline.size)` in [0, 1], `stamps`, int64
    `(n, 2)`: the bytes and the nanosecond of change of each image file, and `model`, a fingerprint of the model; a PNG
    holds these two as texts. Images may differ in size. Each file is written whole or not at all, and a result that is
    there already, whole, by this model and of its image as it is now is left as it is, so that the same call goes on
    after a kill; shards beyond the last are removed. Of `world_size` processes, the one of `rank` (from 0) takes every
    `world_size`-th image; the progress bar is rank 0's. Raises DataError for a missing folder or an unreadable image,
    ParameterError if a result could replace an image, RunError if `out` holds results of other images or another model
    (or, without the record of that, another file in a result's place), or another process of this rank works there.
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
    if _lies_in(out, images) or _lies_in(out / STATE, images):
        raise ParameterError(f"out: {out} lies in {images}; results would be taken for images the next time")
    if _lies_in(images, out):
        raise ParameterError(f"out: {out} holds {images}, whose images results could replace; take another --out")
    if _lies_in(out, run.path):
        raise ParameterError(f"out: {out} lies in the run directory; take another folder")

    count = 0
    for folder, files in itertools.groupby(image_files(images), lambda file: file.parent):
        place = out / folder.relative_to(images)
        if form == "png" and _lies_in(place, images):
            raise ParameterError(
                f"out: {place} leads into {images}, whose images results could replace; take another --out"
            )
        count += sum(1 for _ in files)
    if not count and not rank:
        raise DataError(f"images: no images below {images}; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    where = resolve_device(device)
    model = run.model
    fingerprint = _fingerprint(model)
    shards = {"batch_size": batch_size, "world_size": world_size} if form == "npz" else {}
    if out.exists() and not os.path.lexists(out / RECORD):
        # Not under the lock: it may take long, and each rank comes to the same answer
        _refuse_strangers(out, images, form, fingerprint)
    record = {"images": str(images.resolve()), "weights": model.weights, "pipeline": run.pipeline.to_dict()}
    record |= {"format": form, **shards}
    folded, mine = model.folded(), itertools.islice(image_files(images), rank, None, world_size)
    parts = out / STATE / str(rank)

    done, number, share = 0, -1, f"rank 0 of {world_size}" if world_size > 1 else None
    with (
        _claimed(out, record, parts),
        ThreadPoolExecutor() as pool,  # Pillow frees the GIL
        tqdm(total=len(range(rank, count, world_size)), unit="image", desc=share, disable=rank > 0) as bar,
    ):
        drop_leftovers(parts)
        for number, files in enumerate(_batches(mine, batch_size)):
            names = [file.relative_to(images).as_posix() for file in files]
            # Before an image is read: the result of one that changes meanwhile is made again by the next call
            stamps = list(map(_stamp, files))
            if form == "png":
                targets = {file: out / f"{name}.png" for file, name in zip(files, names, strict=True)}
                texts = {f: {STAMP: _text(stamp), MODEL: fingerprint} for f, stamp in zip(files, stamps, strict=True)}
                there = pool.map(lambda file: _is_picture(targets[file], texts[file], run.pipeline.size), files)  # noqa: B023
                files = [file for file, done_before in zip(files, there, strict=True) if not done_before]
                outputs = _outputs(folded, files, where, pool)
                list(pool.map(lambda file, y: _write(targets[file], _png(y, texts[file]), parts), files, outputs))  # noqa: B023
            else:
                shard = out / SHARD.format(number, rank)
                made_of = {"names": names, "stamps": stamps, "model": fingerprint}
                if _is_shard(shard, made_of, run.pipeline.size):
                    files = []
                else:
                    buffer = io.BytesIO()
                    outputs = np.stack([output.numpy() for output in _outputs(folded, files, where, pool)])
                    np.savez_compressed(buffer, outputs=outputs, **made_of)
                    _write(shard, buffer.getvalue(), parts)
            done += len(files)
            bar.update(len(names))
        if form == "npz":
            _remove_shards(out, rank, number + 1)  # there were more images once
    return done


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether `path`, which need not be there, is or lies in `folder`; also by a link, a bind mount or another case."""
    real = Path(os.path.realpath(path))
    for parent in (real, *real.parents):
        try:
            if os.path.samefile(parent, folder):
                return True
        except OSError:  # one of them is not there yet, or not to be looked at
            pass
    return False


def _fingerprint(model: TransformNet) -> str:
    """16 hexadecimal digits that differ between models of other weights, to the last bit, or another pipeline."""
    return hashlib.sha256(json.dumps([model.weights, model.pipeline.to_dict()]).encode()).hexdigest()[:16]


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


def _is_picture(file: Path, texts: Mapping[str, str], size: tuple[int, int]) -> bool:
    """Whether `file` is a result with these texts: a grey PNG of this (height, width), its checksums right."""
    try:
        if not file.is_file():  # a pipe would be waited for
            return False
        with Image.open(file, formats=["PNG"]) as picture:
            picture.verify()
            kind = picture.mode, picture.size
            return kind == ("L", (size[1], size[0])) and picture.info.items() >= texts.items()
    except Exception:  # Pillow raises many kinds
        return False


def _is_shard(shard: Path, made_of: Mapping[str, object], size: tuple[int, int]) -> bool:
    """Whether `shard` holds these `names`, `stamps` and `model`, and outputs of this (height, width)."""
    if not shard.is_file():
        return False
    try:
        # Not np.load, which leaves a broken file open. The zip's checksums are looked at on reading
        with shard.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as arrays:
            outputs, shape = arrays["outputs"], (len(made_of["names"]), 1, *size)
            known = all(np.array_equal(arrays[name], value) for name, value in made_of.items())
            return known and (outputs.shape, outputs.dtype) == (shape, np.float32)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error):
        return False


def _model_of(file: Path) -> str | None:
    """The fingerprint of the model that made a result, "unknown" if it does not say; None for what is no result."""
    try:
        if not file.is_file():  # a pipe would be waited for
            return None
        if file.suffix == ".npz":
            with file.open("rb") as content, np.lib.npyio.NpzFile(content, allow_pickle=False) as arrays:
                return str(arrays["model"]) if "model" in arrays else "unknown"
        with Image.open(file, formats=["PNG"]) as picture:
            return picture.info.get(MODEL, "unknown") if STAMP in picture.info else None
    except Exception:  # Pillow and NumPy raise many kinds
        return None


def _refuse_strangers(out: Path, images: Path, form: str, fingerprint: str) -> None:
    """RunError if `out` has another model's results at any depth, or in a result's place what is no result.

    For a folder without a record of whose results it holds: what is not of this model may be wanted by somebody.
    """
    places = out.glob(SHARDS)
    if form == "png":
        places = itertools.chain(places, (out / f"{file.relative_to(images)}.png" for file in image_files(images)))
    elsewhere = (Path(parent, name) for parent, _, names in os.walk(out) for name in names if name.endswith(".png"))
    for files, allowed in ((places, {fingerprint}), (elsewhere, {fingerprint, None})):
        for file in files:
            if (found := _model_of(file)) not in allowed and os.path.lexists(file):
                got = f"one of the model {found}" if found else "something else"
                raise RunError(f"{file}: expected a result of the model {fingerprint}, got {got}; take another --out")


@contextmanager
def _claimed(out: Path, record: dict, parts: Path) -> Iterator[None]:
    """Hold `parts`, a rank's place in `out`, whose results are noted to be those of `record`."""
    with ExitStack() as held:
        with locked(out / STATE):
            drop_leftovers(out / STATE)
            _claim(out, record)
            held.enter_context(locked(parts))  # before another can claim the folder
        yield


def _claim(out: Path, record: dict) -> None:
    """Note in `out` whose results it holds; RunError if they are another's, or will be.

    The note of a call that failed before its first result is replaced, unless a rank of it is still at work.
    """
    path = out / RECORD
    record, known = json.loads(json.dumps(record)), None
    noted = os.path.lexists(path)
    if noted:
        with suppress(ValueError, RecursionError):
            known = json.loads(read_file(path, MAX_TEXT_BYTES))
    if known == record:
        return
    for rank in (out / STATE).glob("*/.lock") if noted else ():
        with locked(rank.parent):
            pass
    if noted and any(found.name != STATE for found in out.iterdir()):
        raise RunError(
            f"{path}: the folder holds results of other images, another model, another format, or another batch "
            "size or number of processes; take another --out"
        )
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


def _png(output: Tensor, texts: Mapping[str, str]) -> bytes:
    buffer, notes = io.BytesIO(), PngImagePlugin.PngInfo()
    for name, text in texts.items():
        notes.add_text(name, text)
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
    height, width = image_size or run.train.images.size
    model = run.model
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
