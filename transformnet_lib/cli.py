"""The command line `transformnet …`: each command executes a notebook with its parameters; nothing is computed here.

The library is imported inside the commands, so that `--help` answers at once. An option that is not given is left at
the notebook's default; only `limit` differs: a notebook's own default is a quick look, the command's is all images.
"""

import json
import os
import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from .errors import Interrupted, TransformnetError, one_line
from .export.errors import ExportError

app = typer.Typer(
    help="Train TransformNet, compare it with the pipeline it replaces, time both, and make the report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Get image data.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def option(kind: type, help_text: str, *names: str):
    """An option's annotated type: optional, so that "not given" differs from every value."""
    return Annotated[kind | None, typer.Option(*names, help=help_text, show_default=False)]


def folder(text: str) -> Path:
    """A path from the command line. An empty one would mean the working directory: more likely a variable is unset."""
    if not str(text):
        raise typer.BadParameter("expected a path, got an empty text")
    return Path(text)


def folder_option(help_text: str):
    """A path option's annotated type."""
    return Annotated[Path, typer.Option(parser=folder, help=help_text)]


def size(text: str) -> int | list[int]:
    """A size from the command line: 28, or 48x64 as [height, width]."""
    sides = str(text).split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise typer.BadParameter(f"expected a whole number, or two as in 48x64, got {text!r}")
    return int(text) if len(sides) == 1 else [int(side) for side in sides]


RunArgument = Annotated[Path, typer.Argument(parser=folder, metavar="RUN", help="A trained run directory.")]
RunDir = folder_option("The run directory to read and write.")
Force = Annotated[bool, typer.Option("--force", help="Make what is complete again.")]
Device = option(str, "cpu, cuda, cuda:N, mps or auto [auto].")
Data = option(str, "Images: auto, photos, cifar10 or folder:PATH [auto: CIFAR-10 if it is there, else photos].")
DataPath = option(str, "The folder that holds CIFAR-10 [data].")
Fit = option(str, "none, or crop: crop and resize a folder's images to one size [none].")
ImageSize = option(int, "Pixels per side for --fit crop [the first image's shorter side].")
OutputSize = Annotated[
    str | None,
    typer.Option(
        parser=size,
        metavar="PIXELS",
        help="Pixels per side of the pipeline's output, or HEIGHTxWIDTH [28].",
        show_default=False,
    ),
]
HFlip = option(bool, "Whether the pipeline flips horizontally [yes].", "--hflip/--no-hflip")
VFlip = option(bool, "Whether the pipeline flips vertically [yes].", "--vflip/--no-vflip")
Preset = option(str, "paper or precise [paper].")
Limit = option(int, "Use only so many images of each split [all].")
Seed = option(int, "Of the split, the initial weights and the shuffling [0].")
Epochs = option(int, "Passes over the training images, at most [the preset's, 30].")
BatchSize = option(int, "Images per training step [the preset's, 256].")
Lr = option(float, "AdamW's learning rate [the preset's].")
MinDelta = option(float, "The least improvement of the MSE that counts [the preset's].")
Patience = option(int, "Epochs without improvement before stopping [the preset's, 4].")
BatchSizes = option(list[int], "A batch size to time; repeatable [16, 32, 64, 128, 256, 512].", "--batch-size")
Devices = option(list[str], "A device to time; repeatable [the run's own, and cuda].", "--device")
Rounds = option(int, "Rounds of the measurements, at least; from 9 [9].")
Seconds = option(float, "Seconds for the rounds of the sweep, beyond the least rounds [60].")
Precision = option(float, "Rounds end when every ratio is known to this part of it [0.03].")
Indices = option(list[int], "A test image to show; repeatable [five, spread evenly].", "--index")
RunData = option(str, "Images [those the run was trained on].", "--data")
RunDataPath = option(str, "The folder that holds CIFAR-10 now [the run's].", "--data-path")


def given(**parameters) -> dict:
    """The parameters that were given."""
    return {name: value for name, value in parameters.items() if value is not None}


def full_sweep() -> dict:
    """The benchmark's parameters for all settings; the notebook's own defaults are a quick look."""
    from .benchmarking import BATCH_SIZES, NUM_WORKERS, SECONDS, SMALL_BATCH_SIZES

    sweep = {"batch_sizes": BATCH_SIZES, "small_batch_sizes": SMALL_BATCH_SIZES, "num_workers": NUM_WORKERS}
    return {name: list(values) for name, values in sweep.items()} | {"seconds": SECONDS}


def run_stage(name: str, run_dir: Path, parameters: dict) -> None:
    """Execute a stage's notebook into its run directory and say where the result is."""
    from . import report

    made = report.run_stage(name, run_dir, parameters)
    state = "complete" if made else "was complete"
    typer.echo(f"{name}: {state} in {run_dir / name}, with its notebook {name}.ipynb")


@app.command()
def train(
    run_dir: RunDir,
    device: Device = None,
    preset: Preset = None,
    data: Data = None,
    data_path: DataPath = None,
    fit: Fit = None,
    image_size: ImageSize = None,
    output_size: OutputSize = None,
    hflip: HFlip = None,
    vflip: VFlip = None,
    limit: Limit = None,
    seed: Seed = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    min_delta: MinDelta = None,
    patience: Patience = None,
    force: Force = False,
) -> None:
    """Train the model: history, weights and TensorBoard events into a run directory."""
    parameters = given(**{name: value for name, value in locals().items() if name != "run_dir"})
    run_stage("train", run_dir, {"device": "auto", "data": "auto", "limit": None} | parameters)


@app.command()
def compare(
    run_dir: RunDir,
    index: Indices = None,
    data: RunData = None,
    data_path: RunDataPath = None,
    force: Force = False,
) -> None:
    """Compare a trained run's model with the ground truth on test images."""
    run_stage("compare", run_dir, given(indices=index, data=data, data_path=data_path, force=force))


@app.command()
def benchmark(
    run_dir: RunDir,
    device: Devices = None,
    batch_size: BatchSizes = None,
    rounds: Rounds = None,
    seconds: Seconds = None,
    precision: Precision = None,
    beside: Annotated[
        list[Path] | None, typer.Option(parser=folder, help="A run whose weights are timed too; repeatable.")
    ] = None,
    data: RunData = None,
    data_path: RunDataPath = None,
    force: Force = False,
) -> None:
    """Time a trained run's model against the pipeline, image by image and in batches."""
    from .report import weights_of

    options = given(
        devices=device, batch_sizes=batch_size, rounds=rounds, seconds=seconds, precision=precision, data=data,
        data_path=data_path, other_weights=weights_of(beside) if beside else None,
    )  # fmt: skip
    run_stage("benchmark", run_dir, full_sweep() | options | {"force": force})


@app.command()
def seeds(
    run_dir: RunDir,
    seeds: Annotated[int, typer.Option(help="How many seeds to train each preset from.")] = 5,
    data: RunData = None,
    data_path: RunDataPath = None,
    force: Force = False,
) -> None:
    """Train each preset from several seeds, on a trained run's images; more seeds are added to those that are there."""
    run_stage("seeds", run_dir, {"seeds": seeds, **given(data=data, data_path=data_path, force=force)})


@app.command()
def study(
    run_dir: RunDir,
    size: option(list[int], "A number of images to time; repeatable [1,000 to 1,000,000].", "--size") = None,
    rounds: Rounds = None,
    data: RunData = None,
    data_path: RunDataPath = None,
    force: Force = False,
) -> None:
    """Take a closer look at a trained run: other libraries, and cost over size."""
    from .sizes import SIZES

    options = given(sizes=size, rounds=rounds, data=data, data_path=data_path, force=force)
    run_stage("study", run_dir, {"sizes": list(SIZES)} | options)


@app.command()
def report(
    run: Annotated[
        list[Path] | None,
        typer.Option(
            "--run",
            parser=folder,
            help="A finished run to report on; repeatable. Without any, runs are made.",
        ),
    ] = None,
    device: option(list[str], "A device to make runs on; repeatable [all that are present].") = None,
    data: Data = None,
    data_path: DataPath = None,
    fit: Fit = None,
    image_size: ImageSize = None,
    output_size: OutputSize = None,
    hflip: HFlip = None,
    vflip: VFlip = None,
    limit: Limit = None,
    preset: option(list[str], "A preset to train with; repeatable; precise is timed [paper, precise].") = None,
    seed: Seed = None,
    epochs: Epochs = None,
    rounds: Rounds = None,
    seconds: Seconds = None,
    precision: Precision = None,
    study: Annotated[
        bool, typer.Option("--study", help="Add a closer look: 20 seeds, other libraries, cost over size.")
    ] = False,
    title: option(str, "The report's title.") = None,
    author: option(str, "The author named under the title.") = None,
    words: Annotated[
        Path | None, typer.Option(parser=folder, help="A folder of templates of your own in place of those shipped.")
    ] = None,
    runs_dir: folder_option("Where the runs are made, one folder per run.") = Path("runs"),
    out: folder_option("The folder for report.html and report.pdf.") = Path("report/build"),
    force: Force = False,
) -> None:
    """Make the report: train, compare, benchmark and seeds on each device, then report.html and report.pdf.

    The runs are <preset>-<device> in --runs-dir. Complete stages are left alone; after an interruption the same command
    continues. With --run nothing is made but the report.
    """
    made_with = given(
        data=data,
        data_path=data_path,
        fit=fit,
        image_size=image_size,
        output_size=output_size,
        hflip=hflip,
        vflip=vflip,
        limit=limit,
        seed=seed,
        epochs=epochs,
    )
    limits = given(rounds=rounds, seconds=seconds, precision=precision)
    if run and (
        unused := [
            *made_with,
            *given(device=device, preset=preset, **limits, study=study or None, force=force or None),
        ]
    ):
        names = ", ".join("--" + name.replace("_", "-") for name in unused)
        raise TransformnetError(f"{names}: only for making runs; --run reports on finished ones")
    from .files import check_path
    from .report import check_front, make_report, make_runs, refuse_others
    from .run import read_runs, shipped_runs
    from .sizes import SIZES
    from .stages import SEEDS, STUDY_SEEDS
    from .words import check_folder
    from .words.filters import percent, plain

    check_path("out", out)
    check_front(title, author)
    if words:
        check_folder(words)
    refuse_others(out / "report.ipynb")
    made = run or make_runs(
        device or [],
        runs_dir,
        **given(presets=preset),
        train={"data": "auto", "limit": None} | made_with,
        benchmark=full_sweep() | limits,
        seeds={"seeds": STUDY_SEEDS if study else SEEDS},
        study={"sizes": list(SIZES), **given(rounds=rounds)} if study else None,
        force=force,
    )
    # A shipped run joins where it shows a kind of device that is not here; to runs that were named nothing is added
    shipped = [] if run else [each.path for each in shipped_runs(read_runs(made))]
    files = make_report([*made, *shipped], out, title=title, author=author, words=words)
    for file in files:
        typer.echo(file)
    numbers = json.loads(files[-1].read_text())
    typer.echo(plain(numbers["answer"]), err=True)
    for place in numbers["places"]:
        title = one_line(f"{place['run']}, {place['device']}")
        typer.echo(f"{title}: speed-ups of the sweep are good to ±{percent(place['precision'])}", err=True)


@app.command()
def infer(
    run: RunArgument,
    images: folder_option("A folder of images; those in folders below it count too."),
    out: folder_option("The folder for the results."),
    form: Annotated[str, typer.Option("--format", help="png: a picture per image; npz: shards of float32.")] = "png",
    batch_size: Annotated[int, typer.Option(help="Images held at once, and in one npz shard.")] = 512,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, mps or auto.")] = "auto",
) -> None:
    """Apply a run's model to a folder of images of any size; after a kill the same command continues.

    Under torchrun each process takes its share of the images, and its own CUDA device.
    """
    from .inference import infer_folder
    from .machine import resolve_device
    from .run import read_run

    ranks = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    for name, value in ranks.items():
        if not value.isdecimal():
            raise TransformnetError(f"{name}: expected a whole number, as torchrun sets it, got {value!r}; unset it")
    rank, world_size = map(int, ranks.values())
    if "LOCAL_RANK" in os.environ and str(resolve_device(device)) == "cuda":  # each process a device of its own
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    count = infer_folder(
        read_run(run), images, out, form=form, batch_size=batch_size, device=device, rank=rank, world_size=world_size
    )
    typer.echo(f"{count:,} images done now, in {out}")


@app.command()
def export(
    run: RunArgument,
    to: Annotated[str, typer.Option(help="The format: onnx.")] = "onnx",
    out: Annotated[
        Path | None, typer.Option(parser=folder, help="The file to write [transformnet.onnx in the run].")
    ] = None,
) -> None:
    """Write a run's model for other programs."""
    from .inference import export_onnx
    from .run import read_run

    if to != "onnx":
        raise TransformnetError(f"to: expected onnx, got {to!r}")
    typer.echo(export_onnx(read_run(run), out or run / "transformnet.onnx"))


@data_app.command()
def cifar10(
    data_path: folder_option("The folder to put it in.") = Path("data"),
) -> None:
    """Download CIFAR-10 (170 MB; its host is slow, allow an hour), check its hash and unpack it."""
    from .cifar10 import download_cifar10

    typer.echo(f"CIFAR-10 is in {download_cifar10(data_path)}")


def main() -> None:
    """Run the command line.

    An error of ours is one line on stderr and exit status 1. SIGTERM, and the SIGHUP of a closed terminal, work as
    Ctrl-C does: what is finished is saved, and the exit status is 128 + the signal's number, as shells say it.
    """
    received: int | None = None
    if not sys.warnoptions:  # an error is one line; Pillow warns besides of what we then refuse
        warnings.simplefilter("ignore")

    def stop(number: int, frame) -> None:
        nonlocal received
        received = number
        if getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False):
            # torch's C++ aborts with a page of text at an exception in its import, when nothing is written yet
            os.write(2, b"interrupted\n")
            os._exit(128 + number)
        raise KeyboardInterrupt

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has two of them
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has SIGHUP
            signal.signal(number, stop)
    try:
        app()
    except Interrupted as error:
        _leave(str(error), 128 + (received or signal.SIGINT))
    except SystemExit as ended:
        if ended.code == 130:  # typer's, for one that came while no notebook was executed
            _leave("interrupted; the same command goes on where it stopped", 128 + (received or signal.SIGINT))
        raise
    except OSError:
        if received:  # typer's line about it, or ours, could not be written: the terminal is closed
            _leave("interrupted", 128 + received)
        raise
    except (TransformnetError, ExportError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


def _leave(message: str, status: int) -> None:
    """End the process without Python's own shutdown.

    That would wait for locks which a thread may hold that was executing a notebook, and is no longer run: tqdm's.
    """
    with suppress(OSError):  # the terminal is closed
        typer.echo(f"\n{message}", err=True)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)
