"""CIFAR-10: downloading it, and reading it as uint8 `(count, 3, 32, 32)`."""

import tempfile
from contextlib import suppress
from pathlib import Path

import pooch
import torch
from torch import Tensor
from tqdm import tqdm

from .errors import DataError
from .files import check_path

CIFAR10_BYTES = 170_498_071  # of the archive
CIFAR10_FOLDER = "cifar-10-batches-py"  # in which the archive unpacks
CHUNK_BYTES = 2**16  # written at once
DOWNLOAD_TIMEOUT = 60  # seconds without a byte


def check_cifar10(data_path: str | Path) -> None:
    """DataError, saying how to get it, unless the folder of CIFAR-10 is in `data_path`. Nothing is read."""
    if not (Path(data_path) / CIFAR10_FOLDER).is_dir():
        raise _unusable(data_path, "is not there")


def read_cifar10(data_path: str | Path, *, train: bool) -> Tensor:
    """CIFAR-10's training or test images as torchvision reads them, uint8 `(count, 3, 32, 32)`.

    The md5 of every file is checked before any is unpickled. Raises DataError, saying how to get them, if they are
    missing or damaged.
    """
    from torchvision.datasets import CIFAR10  # here, since its import takes longer than any other and few need it

    check_cifar10(data_path)
    try:
        pixels = CIFAR10(data_path, train=train, download=False).data
    except (RuntimeError, OSError) as error:
        raise _unusable(data_path, "is damaged or incomplete (an md5 differs)") from error
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _unusable(data_path: str | Path, state: str) -> DataError:
    return DataError(
        f"CIFAR-10: {Path(data_path) / CIFAR10_FOLDER} {state}; get it with `transformnet data cifar10 --data-path "
        f"{data_path}`, or use data=photos"
    )


def download_cifar10(data_path: str | Path = "data") -> Path:
    """Download CIFAR-10 (170 MB) into `data_path`, check its md5, unpack it, and return its folder.

    Does nothing if it is there already. The archive, and then each file of it, takes its name when it is whole. Raises
    DataError if the download fails or the md5 differs.
    """
    from torchvision.datasets import CIFAR10

    check_path("data_path", data_path)
    folder = Path(data_path) / CIFAR10_FOLDER
    with suppress(DataError):
        read_cifar10(data_path, train=True)
        return folder
    try:
        archive = pooch.retrieve(
            CIFAR10.url, f"md5:{CIFAR10.tgz_md5}", path=data_path, fname=CIFAR10.filename, downloader=_stream
        )
        with tempfile.TemporaryDirectory(dir=data_path, prefix=".unpacked-") as beside:
            # Not as pooch's `processor`: that takes a file for whole because it is there
            pooch.Untar(extract_dir=Path(beside).name)(archive, "download", None)
            folder.mkdir(exist_ok=True)
            for file in Path(beside, CIFAR10_FOLDER).iterdir():
                file.replace(folder / file.name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; pooch says ValueError for a wrong hash
        reason: BaseException = error
        while reason.__context__ is not None:  # requests wraps urllib3's error, and that the system's, in long texts
            reason = reason.__context__
        raise DataError(
            f"CIFAR-10: download from {CIFAR10.url} failed: {reason}; try again, or use data=photos"
        ) from error
    read_cifar10(data_path, train=True)
    return folder


def _stream(url: str, path: str, _) -> None:
    """Write what `url` sends to `path`, with a progress bar. pooch's own downloader leaves connections open."""
    import requests  # here: its import opens a socket, to see whether there is IPv6

    with (
        requests.get(url, stream=True, timeout=DOWNLOAD_TIMEOUT) as response,
        open(path, "wb") as file,
        tqdm(total=CIFAR10_BYTES, unit="B", unit_scale=True, leave=False) as bar,
    ):
        response.raise_for_status()
        for chunk in response.iter_content(CHUNK_BYTES):
            bar.update(file.write(chunk))
            if bar.n > CIFAR10_BYTES:
                raise ValueError(f"the server sent more than the archive's {CIFAR10_BYTES:,} bytes")
