"""The machine: which devices it has, which one was asked for, and what of it is recorded beside a measurement."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from .errors import ParameterError


def available_devices() -> list[str]:
    """The kinds of device present here: "cpu", and "cuda" and "mps" where PyTorch can use them."""
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [name for name, here in present.items() if here]


def resolve_device(device: str) -> torch.device:
    """Return the device named: "cpu", "cuda", "cuda:N", "mps", or "auto" for the fastest kind present.

    Raises ParameterError if the name is unknown or this machine has no such device.
    """
    kind, _, index = str(device).partition(":")
    known = kind in ("auto", "cpu", "cuda", "mps") and (not index or (kind == "cuda" and index.isdecimal()))
    if not known:
        raise ParameterError(f"device: expected cpu, cuda, cuda:N, mps or auto, got {device!r}")
    present = available_devices()
    if kind == "auto":
        return torch.device(present[-1])
    if kind not in present or (index and int(index) >= torch.cuda.device_count()):
        raise ParameterError(f"device: this machine has no {device}; present: {', '.join(present)}")
    return torch.device(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given; CUDA and MPS calls return before that."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_for(work: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """The wall time of `work()` in seconds, until the device has finished."""
    device = torch.device(device)
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def cpu_name() -> str:
    """The processor's model as the operating system names it."""
    try:
        if platform.system() == "Linux":
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, StopIteration, subprocess.CalledProcessError):
        pass  # some ARM kernels name no model
    return platform.processor() or platform.machine()


def git_commit() -> str:
    """The commit of the clone this library runs from, "+changes" behind it if files differ, else "unknown"."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return "unknown"  # installed somewhere inside another project's repository
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(device: torch.device) -> dict:
    """What a reader must know of the machine to judge a measurement made on `device`: plain JSON values."""
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else None,
        "threads": torch.get_num_threads(),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }
