import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BIN, altered, command
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from transformnet_lib import Run, cli, files, inference, machine
from transformnet_lib.errors import DataError, ParameterError, RunError
from transformnet_lib.images import decode_image, image_files
from transformnet_lib.inference import export_onnx, infer_folder
from transformnet_lib.model import FoldedTransformNet
from transformnet_lib.pipeline import to_float


@pytest.fixture
def images(tmp_path) -> Path:
    """30 images of two sizes, in folders; two have the same stem."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.RandomState(0)
    for i in range(30):
        shape = (32, 32, 3) if i % 3 else (40, 36, 3)
        Image.fromarray(rng.randint(0, 256, shape, np.uint8)).save(folder / ("sub" if i % 2 else ".") / f"{i}.png")
    shutil.copy(folder / "0.png", folder / "0.bmp")
    (folder / "notes.txt").write_text("no image")
    return folder


def expected(run, images: Path) -> dict[str, torch.Tensor]:
    """The plain model's output for each file."""
    model = run.model
    with torch.inference_mode():
        return {
            file.relative_to(images).as_posix(): model(to_float(torch.from_numpy(decode_image(file).copy())[None]))[0]
            for file in image_files(images)
        }


def listing(folder: Path) -> dict[str, bytes]:
    """All files but the locks, whose number is that of the processes."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if path.name != ".lock"}


def test_each_image_becomes_a_picture_of_the_models_output(run, images, tmp_path):
    assert infer_folder(run, images, tmp_path / "out", batch_size=7, device="cpu") == 31
    wanted = expected(run, images)
    assert set(listing(tmp_path / "out")) == {f"{name}.png" for name in wanted} | {".infer/model.json"}
    for name, output in wanted.items():
        drawn = np.asarray(Image.open(tmp_path / "out" / f"{name}.png"))
        assert drawn.dtype == np.uint8
        assert np.abs(drawn - output[0].numpy() * 255).max() <= 0.51


def test_shards_hold_the_names_and_the_exact_outputs(run, images, tmp_path):
    infer_folder(run, images, tmp_path / "out", form="npz", batch_size=12, device="cpu")
    shards = [np.load(path, allow_pickle=False) for path in sorted((tmp_path / "out").glob("*.npz"))]
    assert [len(shard["names"]) for shard in shards] == [12, 12, 7]
    found = {name: row for shard in shards for name, row in zip(shard["names"], shard["outputs"], strict=True)}
    for name, output in expected(run, images).items():
        assert np.abs(found[name] - output.numpy()).max() < 1e-6


def test_no_more_images_are_held_than_fit_in_the_bytes_allowed(run, images, tmp_path, monkeypatch):
    infer_folder(run, images, tmp_path / "whole", device="cpu")
    held, decode = [], inference.decode_image
    monkeypatch.setattr(inference, "decode_image", lambda path: held.append(path) or decode(path))
    monkeypatch.setattr(inference, "HELD_BYTES", 5 * 40 * 36 * 3)  # five of the larger images
    forward, most = FoldedTransformNet.forward, []

    def counted(model, batch):
        most.append(len(held))
        held.clear()
        return forward(model, batch)

    monkeypatch.setattr(FoldedTransformNet, "forward", counted)
    infer_folder(run, images, tmp_path / "out", device="cpu")
    assert max(most) <= 7  # the smaller images are less than three quarters of those bytes
    assert listing(tmp_path / "out") == listing(tmp_path / "whole")


@pytest.mark.parametrize("form", ["png", "npz"])
def test_a_second_call_does_only_what_is_missing(run, images, tmp_path, form):
    out = tmp_path / "out"
    infer_folder(run, images, out, form=form, batch_size=10, device="cpu")
    before = listing(out)
    assert infer_folder(run, images, out, form=form, batch_size=10, device="cpu") == 0
    gone = sorted(path for path in out.rglob("*") if path.suffix in (".png", ".npz"))[1]
    gone.unlink()
    assert infer_folder(run, images, out, form=form, batch_size=10, device="cpu") == (1 if form == "png" else 10)
    assert listing(out) == before


@pytest.mark.parametrize("when", [None, 1_000_000_000_000_000_000], ids=["now", "by cp -p of an older one"])
@pytest.mark.parametrize("form", ["png", "npz"])
def test_the_result_of_an_image_that_was_replaced_is_made_again(run, images, tmp_path, form, when):
    infer_folder(run, images, tmp_path / "out", form=form, batch_size=10, device="cpu")
    image = images / "0.bmp"
    image.write_bytes(image.read_bytes()[:-3] + bytes(3))  # as large as it was
    if when:
        os.utime(image, ns=(when, when))
    assert infer_folder(run, images, tmp_path / "out", form=form, batch_size=10, device="cpu") in (1, 10)
    infer_folder(run, images, tmp_path / "anew", form=form, batch_size=10, device="cpu")
    assert listing(tmp_path / "out") == listing(tmp_path / "anew")


@pytest.mark.parametrize("form", ["png", "npz"])
def test_the_result_of_an_image_that_changes_while_it_is_worked_on_is_made_again(
    run, images, tmp_path, form, monkeypatch
):
    def decode(path):
        read = decode_image(path)
        if path.name == "0.png":
            Image.new("RGB", (32, 32), "white").save(path)
        return read

    with monkeypatch.context() as patch:
        patch.setattr(inference, "decode_image", decode)
        infer_folder(run, images, tmp_path / "out", form=form, batch_size=10, device="cpu")
    assert infer_folder(run, images, tmp_path / "out", form=form, batch_size=10, device="cpu") in (1, 10)
    infer_folder(run, images, tmp_path / "anew", form=form, batch_size=10, device="cpu")
    assert listing(tmp_path / "out") == listing(tmp_path / "anew")


def test_an_image_that_vanishes_is_named(run, images, tmp_path, monkeypatch):
    found = list(image_files(images))
    monkeypatch.setattr(inference, "image_files", lambda folder: iter(found))
    (images / "0.png").unlink()
    with pytest.raises(DataError, match=r"0\.png: cannot be read \(No such file"):
        infer_folder(run, images, tmp_path / "out", device="cpu")


def test_shards_that_images_no_longer_fill_are_removed_also_beyond_a_gap(run, images, tmp_path):
    out = tmp_path / "out"
    infer_folder(run, images, out, form="npz", batch_size=6, device="cpu")
    (out / "shard-000009-of-rank-0000.npz").write_bytes(b"after a kill between two removals")
    others = [out / "shard-000009-of-rank-0001.npz", out / "shard-of-mine-of-rank-0000.npz"]
    for other in others:
        other.write_bytes(b"another rank's, and one without a number")
    for file in sorted(image_files(images))[:20]:
        file.unlink()
    infer_folder(run, images, out, form="npz", batch_size=6, device="cpu")
    for other in others:
        other.unlink()
    infer_folder(run, images, tmp_path / "anew", form="npz", batch_size=6, device="cpu")
    assert listing(out) == listing(tmp_path / "anew")


def test_a_shard_that_cannot_be_removed_is_one_line(run, images, tmp_path):
    infer_folder(run, images, tmp_path / "out", form="npz", device="cpu")
    (tmp_path / "out/shard-000099-of-rank-0000.npz").mkdir()
    with pytest.raises(RunError, match=r"shard-000099-of-rank-0000.npz: cannot be removed"):
        infer_folder(run, images, tmp_path / "out", form="npz", device="cpu")


@pytest.mark.parametrize("form", ["png", "npz"])
def test_a_pipe_in_the_place_of_a_result_is_replaced_and_not_waited_for(run, images, tmp_path, form):
    out = tmp_path / "out"
    infer_folder(run, images, out, form=form, device="cpu")
    place = out / ("0.png.png" if form == "png" else SHARD)
    place.unlink()
    os.mkfifo(place)
    infer_folder(run, images, out, form=form, device="cpu")
    assert place.is_file()
    assert infer_folder(run, images, out, form=form, device="cpu") == 0


@pytest.mark.parametrize("name", ["train/weights.safetensors", "train/stage.json", "onnx"])
def test_an_export_replaces_no_file_of_a_run(run, name):
    pytest.importorskip("onnx")
    with pytest.raises(ParameterError, match=r"out: expected a file whose name ends in \.onnx, got "):
        export_onnx(run, run.path / name)


def test_shards_are_made_again_if_images_were_added(run, images, tmp_path):
    infer_folder(run, images, tmp_path / "out", form="npz", batch_size=10, device="cpu")
    shutil.copy(images / "0.png", images / "zz.png")
    assert infer_folder(run, images, tmp_path / "out", form="npz", batch_size=10, device="cpu") > 0
    names = [name for path in (tmp_path / "out").glob("*.npz") for name in np.load(path)["names"].tolist()]
    assert sorted(names) == sorted(expected(run, images))


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_end(run, images, tmp_path):
    for i in range(400):  # enough to be in the middle of
        shutil.copy(images / "0.png", images / f"copy-{i:03}.png")
    infer_folder(run, images, tmp_path / "whole", batch_size=4, device="cpu")
    arguments = ["transformnet", "infer", run.path, "--images", images, "--out", tmp_path / "out", "--batch-size", 4]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([BIN / arguments[0], *map(str, arguments[1:])], **quiet) as process:
        while len(list((tmp_path / "out").rglob("*.png"))) < 40:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert len(list((tmp_path / "out").rglob("*.png"))) < 431
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert listing(tmp_path / "out") == listing(tmp_path / "whole")


@pytest.mark.parametrize(("form", "killed_at"), [("png", "model.json"), ("png", "0.bmp.png"), ("npz", "shard")])
def test_what_a_killed_command_had_begun_to_write_is_cleared_away(run, images, tmp_path, monkeypatch, form, killed_at):
    infer_folder(run, images, tmp_path / "whole", form=form, device="cpu")
    replace = os.replace

    def killed(part, place):
        if Path(place).name.startswith(killed_at):
            raise SystemExit
        replace(part, place)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(os, "replace", killed)
        patched.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process clears nothing away
        infer_folder(run, images, tmp_path / "out", form=form, device="cpu")
    assert any(name.endswith(".part") for name in listing(tmp_path / "out"))
    infer_folder(run, images, tmp_path / "out", form=form, device="cpu")
    assert listing(tmp_path / "out") == listing(tmp_path / "whole")


def test_a_second_process_of_one_rank_is_refused(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    for place in (".infer", ".infer/0"):
        with (
            files.locked(tmp_path / "out" / place, ".lock"),
            pytest.raises(RunError, match="in use by another command"),
        ):
            infer_folder(run, images, tmp_path / "out", device="cpu")
    assert list(listing(tmp_path / "out")) == [".infer/model.json"]


@pytest.mark.slow
def test_under_torchrun_each_process_takes_its_share(run, images, tmp_path):
    infer_folder(run, images, tmp_path / "whole", device="cpu")
    done = command("torchrun", "--no-python", "--nproc-per-node", 2, BIN / "transformnet", "infer", run.path,
                   "--images", images, "--out", tmp_path / "out", "--device", "cpu", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        f"15 images done now, in {tmp_path / 'out'}",
        f"16 images done now, in {tmp_path / 'out'}",
    ]
    assert listing(tmp_path / "out") == listing(tmp_path / "whole")


SHARD = "shard-000000-of-rank-0000.npz"


@pytest.mark.parametrize(
    ("form", "name", "junk"),
    [
        *(("png", "0.png.png", junk) for junk in (b"", b"junk", "cut", "flipped", "another size", "in colour")),
        *(("npz", SHARD, junk) for junk in (b"", b"junk", b"PK\x05\x06" + bytes(18), "cut", "flipped", "another size")),
    ],
)
def test_a_result_that_is_none_is_made_again(run, images, tmp_path, form, name, junk):
    infer_folder(run, images, tmp_path / "out", form=form, batch_size=31, device="cpu")
    before = listing(tmp_path / "out")
    whole, file = before[name], tmp_path / "out" / name
    match junk:
        case "cut":
            file.write_bytes(whole[:-20])
        case "flipped":
            half = len(whole) // 2
            file.write_bytes(whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :])
        case "another size" if form == "npz":
            np.savez(file, **dict(np.load(file)) | {"outputs": np.zeros((1, 1, 28, 28), np.float32)})
        case "another size" | "in colour":
            notes = PngInfo()
            with Image.open(file) as picture:
                for name, text in picture.text.items():
                    notes.add_text(name, text)
            other = ("L", (27, 28)) if junk == "another size" else ("RGB", (28, 28))
            Image.new(*other).save(file, pnginfo=notes)
        case _:
            file.write_bytes(junk)
    assert infer_folder(run, images, tmp_path / "out", form=form, batch_size=31, device="cpu") > 0
    assert listing(tmp_path / "out") == before


def test_a_folder_in_the_place_of_a_result_is_refused_by_name(run, images, tmp_path):
    infer_folder(run, images, tmp_path / "out", device="cpu")
    (tmp_path / "out/0.png.png").unlink()
    (tmp_path / "out/0.png.png").mkdir()
    with pytest.raises(RunError, match=r"0\.png\.png: .*\(Is a directory\)"):
        infer_folder(run, images, tmp_path / "out", device="cpu")


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing", "nested without end"])
def test_what_is_no_note_of_a_model_is_refused_by_name(run, images, tmp_path, kind):
    note = tmp_path / "out/.infer/model.json"
    note.parent.mkdir(parents=True)
    (tmp_path / "out/0.png.png").touch()  # a result of it
    match kind:
        case "pipe":
            os.mkfifo(note)
        case "folder":
            note.mkdir()
        case "link to nothing":
            note.symlink_to(tmp_path / "nothing")
        case _:
            note.write_text("[" * 200_000)
    with pytest.raises(RunError, match=r"model\.json: (cannot be read|the folder holds results)"):
        infer_folder(run, images, tmp_path / "out", device="cpu")


def test_a_call_that_failed_before_its_first_result_claims_nothing(run, images, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.png: not a readable image"):
        infer_folder(run, tmp_path / "broken", tmp_path / "out", device="cpu")
    assert infer_folder(run, images, tmp_path / "out", device="cpu") == 31


@pytest.mark.parametrize(("length", "form"), [(246, "png"), (255, "npz")])
def test_names_as_long_as_they_may_be_are_no_hindrance(run, images, tmp_path, length, form):
    (tmp_path / "long").mkdir()
    shutil.copy(images / "0.png", tmp_path / "long" / f"{'x' * (length - 4)}.png")
    assert infer_folder(run, tmp_path / "long", tmp_path / "out", form=form, device="cpu") == 1


def test_a_result_whose_name_would_be_too_long_is_one_line(run, images, tmp_path):
    (tmp_path / "long").mkdir()
    shutil.copy(images / "0.png", tmp_path / "long" / f"{'x' * 250}.png")
    with pytest.raises(RunError, match=r"x\.png\.png: cannot be written \(File name too long\)"):
        infer_folder(run, tmp_path / "long", tmp_path / "out", device="cpu")


def test_results_of_two_models_or_formats_are_not_mixed(run, images, tmp_path):
    infer_folder(run, images, tmp_path / "out", device="cpu")
    shutil.copytree(images, tmp_path / "others")
    with pytest.raises(RunError, match="results of other images"):
        infer_folder(run, tmp_path / "others", tmp_path / "out", device="cpu")
    with pytest.raises(
        RunError, match="results of other images, another model, another format, or another batch size or"
    ):
        infer_folder(run, images, tmp_path / "out", form="npz", device="cpu")


@pytest.fixture(scope="module")
def other_run(run) -> Run:
    """A run whose weights differ from those of `run` in the last bit of one."""
    red, *others = run.train.weights
    return altered(run, train={"weights": (float(np.nextafter(np.float32(red), np.float32(1))), *others)})


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder; None for what is no file."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else None for name, path in found.items()}


def without_model(file: Path) -> None:
    """Make a result what it was before results said of which model they are."""
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            kept = {name: arrays[name] for name in arrays if name != "model"}
        np.savez(file, **kept)
    else:
        notes = PngInfo()
        with Image.open(file) as picture:
            notes.add_text(inference.STAMP, picture.text[inference.STAMP])
            picture.save(file, pnginfo=notes)


def test_a_fingerprint_is_of_the_weights_to_the_last_bit_and_of_the_pipeline(run, other_run):
    own = inference._fingerprint(run.model)
    assert own == inference._fingerprint(run.model)
    flipped = run.model
    flipped.pipeline = replace(flipped.pipeline, vflip=not flipped.pipeline.vflip)
    assert len({own, inference._fingerprint(other_run.model), inference._fingerprint(flipped)}) == 3


@pytest.mark.parametrize("form", ["png", "npz"])
def test_without_the_record_results_of_this_model_count_and_those_of_another_are_refused(
    run, other_run, images, tmp_path, form
):
    out = tmp_path / "out"
    infer_folder(run, images, out, form=form, device="cpu")
    shutil.rmtree(out / ".infer")
    before = tree(out)
    got = "expected a result of the model [0-9a-f]{16}, got one of the model [0-9a-f]{16}; take another --out"
    with pytest.raises(RunError, match=rf"out/.*\.{form}: {got}"):
        infer_folder(other_run, images, out, form=form, device="cpu")
    assert tree(out) == before
    assert infer_folder(run, images, out, form=form, device="cpu") == 0


@pytest.mark.parametrize("form", ["png", "npz", "png behind a link"])
def test_results_of_another_model_are_refused_wherever_they_are(run, other_run, images, tmp_path, form):
    infer_folder(other_run, images, tmp_path / "others", form=form[:3], device="cpu")
    if form == "png behind a link":
        (tmp_path / "out").mkdir()
        (tmp_path / "out/sub").symlink_to(tmp_path / "others/sub")
    else:
        shutil.rmtree(tmp_path / "others/.infer")
        (tmp_path / "others/0.png.png").unlink(missing_ok=True)
        (tmp_path / "others").rename(tmp_path / "out")
        for file in set(image_files(images)) - {images / "0.png"}:  # no result is in the place of this one
            file.unlink()
    with pytest.raises(RunError, match="got one of the model"):
        infer_folder(run, images, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out/.infer").exists()


@pytest.mark.parametrize("form", ["png", "npz"])
def test_a_result_that_another_model_made_is_made_again(run, other_run, images, tmp_path, form):
    infer_folder(run, images, tmp_path / "out", form=form, device="cpu")
    infer_folder(other_run, images, tmp_path / "others", form=form, device="cpu")
    name = "sub/1.png.png" if form == "png" else SHARD
    before = tree(tmp_path / "out")
    shutil.copy(tmp_path / "others" / name, tmp_path / "out" / name)
    assert infer_folder(run, images, tmp_path / "out", form=form, device="cpu") == (1 if form == "png" else 31)
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("form", ["png", "npz"])
def test_a_result_that_does_not_say_its_model_is_made_again_or_without_the_record_refused(run, images, tmp_path, form):
    out = tmp_path / "out"
    infer_folder(run, images, out, form=form, device="cpu")
    before = tree(out)
    place = out / ("sub/1.png.png" if form == "png" else SHARD)
    without_model(place)
    assert infer_folder(run, images, out, form=form, device="cpu") == (1 if form == "png" else 31)
    assert tree(out) == before
    without_model(place)
    (out / ".infer/model.json").unlink()
    with pytest.raises(RunError, match="got one of the model unknown; take another --out"):
        infer_folder(run, images, out, form=form, device="cpu")


@pytest.mark.parametrize("kind", ["picture", "text", "pipe", "link to nothing", "shard"])
def test_without_a_record_no_other_file_in_the_place_of_a_result_is_replaced(run, images, tmp_path, kind):
    place = tmp_path / "out" / (SHARD if kind == "shard" else "sub/1.png.png")
    place.parent.mkdir(parents=True)
    match kind:
        case "picture":
            Image.new("L", (28, 28)).save(place)
        case "pipe":
            os.mkfifo(place)
        case "link to nothing":
            place.symlink_to("nothing")
        case _:
            place.write_bytes(b"somebody's")
    before = tree(tmp_path / "out")
    with pytest.raises(RunError, match=rf"{place.name}: expected a result of the model .*, got something else; take"):
        infer_folder(run, images, tmp_path / "out", form="npz" if kind == "shard" else "png", device="cpu")
    assert tree(tmp_path / "out") == before


def test_without_a_record_pictures_that_are_in_no_results_place_are_no_hindrance(run, images, tmp_path):
    (tmp_path / "out/mine").mkdir(parents=True)
    Image.new("L", (28, 28)).save(tmp_path / "out/mine/a.png.png")
    os.mkfifo(tmp_path / "out/pipe.png")
    assert infer_folder(run, images, tmp_path / "out", device="cpu") == 31


def test_a_folder_in_which_another_has_begun_is_not_claimed(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    other, out = altered(run, train={"weights": (0.2, 0.3, 0.5)}), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(inference, "_outputs", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        infer_folder(run, images, out, device="cpu")  # no result yet
    record = (out / ".infer/model.json").read_bytes()
    with files.locked(out / ".infer/0"), pytest.raises(RunError, match="in use by another command"):
        infer_folder(other, images, out, device="cpu")
    assert (out / ".infer/model.json").read_bytes() == record
    assert infer_folder(other, images, out, device="cpu") == 31
    assert (out / ".infer/model.json").read_bytes() != record


def test_with_a_record_a_folder_is_not_searched(run, images, tmp_path, monkeypatch):
    infer_folder(run, images, tmp_path / "out", device="cpu")
    monkeypatch.setattr(inference, "_model_of", lambda file: pytest.fail("opened once more"))
    assert infer_folder(run, images, tmp_path / "out", device="cpu") == 0


@pytest.mark.parametrize("resolved", [True, False], ids=["a link", "as a bind mount, which nothing resolves"])
def test_folders_that_lie_in_each_other_are_refused_whatever_they_are_called(
    run, images, tmp_path, monkeypatch, resolved
):
    (tmp_path / "alias").symlink_to(tmp_path)
    (tmp_path / "alias of images").symlink_to(images)
    before = tree(images)
    if not resolved:
        monkeypatch.setattr(os.path, "realpath", os.path.abspath)
    for out in (tmp_path, tmp_path / "alias"):
        with pytest.raises(ParameterError, match=r"holds .*images, whose images results could replace; take another"):
            infer_folder(run, images, out, device="cpu")
    for out in (images, images / "new/out", tmp_path / "alias of images/new", tmp_path / "alias/images/sub"):
        with pytest.raises(ParameterError, match="results would be taken for images"):
            infer_folder(run, images, out, device="cpu")
    assert tree(images) == before
    assert not (tmp_path / ".infer").exists()


@pytest.mark.parametrize("target", ["images/sub", "images/new", "images", "."])
def test_a_folder_among_the_results_that_leads_into_the_images_is_refused(run, images, tmp_path, target):
    (images / "images").mkdir()
    shutil.copy(images / "0.png", images / "images")
    (tmp_path / "out/images").mkdir(parents=True)
    link = tmp_path / "out" / ("sub" if target != "." else "images")
    if target == ".":
        shutil.copytree(images / "sub", images / "images/images")  # its result's folder would be out/images/images
        link.rmdir()
    link.symlink_to(tmp_path / target)
    before = tree(tmp_path)
    with pytest.raises(ParameterError, match=rf"out/{link.name}.* leads into .*images, .* take another --out"):
        infer_folder(run, images, tmp_path / "out", batch_size=2, device="cpu")
    assert tree(tmp_path) == before


def test_a_hidden_folder_that_leads_into_the_images_is_refused(run, images, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.infer").symlink_to(images / "sub")
    before = tree(tmp_path)
    with pytest.raises(ParameterError, match="results would be taken for images"):
        infer_folder(run, images, tmp_path / "out", device="cpu")
    assert tree(tmp_path) == before


def test_a_folder_among_the_results_may_lead_elsewhere(run, images, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/sub").symlink_to(tmp_path / "elsewhere")
    assert infer_folder(run, images, tmp_path / "out", device="cpu") == 31
    assert len(list((tmp_path / "elsewhere").glob("*.png.png"))) == 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "gif"}, "format: expected one of png, npz, got 'gif'"),
        ({"batch_size": 0}, "batch_size: expected a whole number from 1, got 0"),
        ({"device": "tpu"}, "device: expected cpu"),
        ({"rank": 2, "world_size": 2}, "rank: expected one from 0 to below world_size, got rank 2 of 2"),
    ],
)
def test_bad_options_are_refused(run, images, tmp_path, options, message):
    with pytest.raises(ParameterError, match=message):
        infer_folder(run, images, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_bad_folders_and_images_are_refused_by_name(run, images, tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        infer_folder(run, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images below"):
        infer_folder(run, tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ParameterError, match="lies in the run directory; take another folder"):
        infer_folder(run, images, run.path)
    (images / "broken.png").write_bytes(b"no png")
    with pytest.raises(DataError, match=r"broken\.png: not a readable image"):
        infer_folder(run, images, tmp_path / "out", device="cpu")


def test_a_link_to_itself_for_the_results_is_one_line(run, images, tmp_path):
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(RunError, match=r"out/\.infer: cannot be written"):
        infer_folder(run, images, tmp_path / "out", device="cpu")


def test_the_onnx_file_gives_the_models_output_for_any_batch(run, test_set, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
    path = export_onnx(run, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = to_float(test_set.images)
    with torch.inference_mode():
        wanted = run.model(images).numpy()
    for count in (1, 7, len(images)):
        (found,) = session.run(None, {"images": images[:count].numpy()})
        assert found.shape == wanted[:count].shape
        assert np.abs(found - wanted[:count]).max() < 1e-5
    with pytest.raises(Exception, match="Got invalid dimensions"):
        session.run(None, {"images": np.zeros((1, 3, 16, 16), np.float32)})


def told(*arguments, **variables: str) -> str:
    """The error that a command line ends with."""
    return str(CliRunner().invoke(cli.app, list(map(str, arguments)), env=variables).exception)


def test_the_onnx_command_says_where_the_file_is(run, tmp_path):
    pytest.importorskip("onnx", reason="the extra [onnx] is not installed")
    done = CliRunner().invoke(cli.app, ["export", str(run.path), "--out", str(tmp_path / "m.onnx")])
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'm.onnx'}\n")
    assert (tmp_path / "m.onnx").is_file()
    assert told("export", run.path, "--to", "tflite") == "to: expected onnx, got 'tflite'"


def test_a_rank_that_is_no_number_is_one_line(run, images, tmp_path):
    message = told("infer", run.path, "--images", images, "--out", tmp_path / "out", RANK="x")
    assert message == "RANK: expected a whole number, as torchrun sets it, got 'x'; unset it"


@pytest.mark.parametrize(
    ("device", "taken"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")]
)
def test_under_torchrun_each_process_takes_its_own_cuda_device(run, monkeypatch, tmp_path, device, taken):
    asked = {}
    monkeypatch.setattr(machine, "available_devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(inference, "infer_folder", lambda *_, **options: asked.update(options) or 0)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    cli.infer(run.path, images=tmp_path, out=tmp_path, device=device)
    assert asked["device"] == taken
