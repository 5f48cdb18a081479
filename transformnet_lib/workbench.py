"""Where passes are set up, checked and run: a `Workbench`, or one in a process of its own, `DeviceProcess`."""

import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from .errors import ParameterError
from .machine import resolve_device
from .measure import NOT_MEASURED
from .methods import MAX_MSE, METHODS, STEPS, copy_pass, float32_exactly, prepare_pass, prepare_step, sequential_pass
from .model import TransformNet
from .pipeline import to_float
from .resources import PACKAGE

ANSWER_SECONDS = 600  # of a device's process; a pass over all images takes less on anything
WARM_UP_IMAGES = 500  # of the pipeline image by image


@dataclass(frozen=True)
class Setting:
    """One thing that takes turns; `offered` is how many images a pass is given."""

    part: str
    method: str
    device: str
    batch_size: int
    offered: int
    shuffle: bool = False
    drop_last: bool = False
    num_workers: int = 0
    weights: str = ""

    @property
    def name(self) -> str:
        """What tells this setting from others of its part, and stands in the rounds."""
        options = ["shuffle"] * self.shuffle + ["drop_last"] * self.drop_last
        options += [f"workers={self.num_workers}"] * bool(self.num_workers)
        options += [f"weights={self.weights}"] * bool(self.weights)
        return " ".join([self.method, self.device, str(self.batch_size), *options])

    @property
    def images(self) -> int:
        """How many images a pass processes."""
        return self.offered - self.offered % self.batch_size if self.drop_last else self.offered


class Workbench:
    """Passes over `images` (n, 3, h, w), set up one by one and then run again and again.

    `models` has the model that is timed under "", and others under the names of their weights.
    """

    def __init__(self, models: Mapping[str, TransformNet], images: Tensor):
        self.models, self.images, self.floats = models, images, to_float(images)
        self.outputs: dict[str, Tensor] = {}  # the eager models', on the CPU, by the names of their weights
        self.passes: dict[str, Callable[[], float]] = {}
        self.checks: dict[str, Callable[[int | None], float]] = {}
        self.targets = self.of_all(models[""].pipeline)
        sequential_pass(models[""].pipeline, self.floats[:WARM_UP_IMAGES])

    @torch.inference_mode()
    def of_all(self, network: Callable[[Tensor], Tensor]) -> Tensor:
        """What a network gives for all images."""
        return torch.cat([network(chunk) for chunk in self.floats.split(512)])

    def prepare(self, setting: Setting) -> dict[str, float]:
        """Set up a setting, and check and warm it up on as much as will be timed: its `setup_seconds` and `mse`.

        Raises ParameterError or RuntimeError for one that cannot be measured, or whose output is wrong.
        """
        device, images = resolve_device(setting.device), self.images[: setting.offered]
        facts = {"setup_seconds": float("nan"), "mse": float("nan")}
        model = self.models[setting.weights]
        if setting.method == "sequential":
            floats = self.floats[: setting.offered]
            self.passes[setting.name] = lambda: sequential_pass(model.pipeline, floats)
        elif setting.method == "copy":
            self.passes[setting.name] = copy_pass(images, model.pipeline, device)
        elif setting.method in STEPS:
            self.passes[setting.name] = prepare_step(setting.method, model, images, device, setting.batch_size)
        else:
            if METHODS[setting.method].storage == "float32":
                images = self.floats[: setting.offered]
            elif device.type == "cuda" and not self.images.is_pinned():
                self.images = self.images.pin_memory()  # once, for all
                images = self.images[: setting.offered]
            options = {name: getattr(setting, name) for name in ("batch_size", "shuffle", "drop_last", "num_workers")}
            start = time.perf_counter()
            work = prepare_pass(model, images=images, device=device, method=setting.method, **options)
            facts["setup_seconds"] = time.perf_counter() - start
            if METHODS[setting.method].network == "pipeline":
                expected = self.targets
            else:
                if setting.weights not in self.outputs:
                    self.outputs[setting.weights] = self.of_all(model)
                expected = self.outputs[setting.weights]
            self.checks[setting.name] = lambda least: work.mse(self.targets, expected, least=least)
            facts["mse"] = self.check(setting.name)
            self.passes[setting.name] = work.seconds
        return facts

    def check(self, name: str, least: int | None = None) -> float | None:
        """The MSE of a setting's output, or of its first `least` images; None for one that has no output to compare.

        ParameterError for one farther off the ground truth than MAX_MSE.
        """
        if name not in self.checks:
            return None
        mse = self.checks[name](least)
        if not mse <= MAX_MSE:
            raise ParameterError(f"output differs from the ground truth (MSE {mse:.3g}, more than {MAX_MSE:g})")
        return mse

    def turn(self, name: str) -> float:
        """One timed pass of a setting; its seconds."""
        with torch.inference_mode():
            return self.passes[name]()

    def set_threads(self, count: int) -> None:
        torch.set_num_threads(count)

    def clear(self) -> None:
        """Forget all settings."""
        self.passes.clear()
        self.checks.clear()

    def close(self) -> None:
        self.clear()


class DeviceProcess:
    """A `Workbench` in a process of its own, with the same methods.

    A CUDA device that is lost fails every later call, and ends its process as soon as a tensor on it is freed. Here it
    ends this one, and whoever asks it for anything gets a RuntimeError, as from one that does not answer. An error of
    the program itself is raised as SystemError, with its traceback.
    """

    def __init__(self, models: Mapping[str, TransformNet], images: Tensor, workbench: type[Workbench] = Workbench):
        context = get_context("spawn")  # a forked process cannot use CUDA
        self.connection, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, workbench, models, images.numpy()), daemon=False)
        sys.path.insert(0, str(PACKAGE.parent))  # which the process is given: this library need not be installed
        try:
            self.process.start()
        finally:
            sys.path.pop(0)
        there.close()

    def _ask(self, method: str, *arguments: object) -> object:
        try:
            self.connection.send((method, arguments))
            if not self.connection.poll(ANSWER_SECONDS):
                self.process.kill()
                raise RuntimeError(f"the device's process gave no answer in {ANSWER_SECONDS} s")
            answer, reason, traceback = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(1)
            raise RuntimeError(f"the device's process ended (exit status {self.process.exitcode})") from None
        if traceback:
            raise SystemError(traceback)
        if reason:
            raise RuntimeError(reason)
        return answer

    def prepare(self, setting: Setting) -> dict[str, float]:
        return self._ask("prepare", setting)

    def check(self, name: str, least: int | None = None) -> float | None:
        return self._ask("check", name, least)

    def turn(self, name: str) -> float:
        return self._ask("turn", name)

    def set_threads(self, count: int) -> None:
        self._ask("set_threads", count)

    def clear(self) -> None:
        self._ask("clear")

    def close(self) -> None:
        """End the process, which aborts by itself if its device was lost."""
        self.connection.close()
        self.process.join(5)
        with suppress(OSError):
            self.process.kill()
        self.process.join()


def serve(connection: Connection, workbench: type[Workbench], models: Mapping[str, TransformNet], images) -> None:
    """Do on a workbench what the other end asks for, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other end
    with suppress(EOFError, OSError), float32_exactly():
        bench = workbench(models, torch.from_numpy(images))
        while True:
            method, arguments = connection.recv()
            try:
                answer = getattr(bench, method)(*arguments), "", ""
            except NOT_MEASURED as error:  # the other end has a row for it
                answer = None, str(error) or type(error).__name__, ""
            except Exception:
                answer = None, "", traceback.format_exc()
            connection.send(answer)
