"""CIFAR-10: downloading it, and reading its batches as uint8 `(count, 3, 32, 32)`."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pooch
import torch
from torch import Tensor
from tqdm import tqdm

from .errors import DataError
from .files import check_path

# https://www.cs.toronto.edu/~kriz/cifar.html; the md5 is the one torchvision checks (torchvision/datasets/cifar.py)
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"
CIFAR10_BYTES = 170_498_071  # of the archive
CIFAR10_FOLDER = "cifar-10-batches-py"  # in which the archive unpacks
DOWNLOAD_TIMEOUT = 60  # seconds without a byte


def read_cifar10(data_path: Path, train: bool) -> Tensor:
    """CIFAR-10 as torchvision reads it; every file's md5 is checked before it is unpickled."""
    from torchvision.datasets import CIFAR10  # here, since its import takes longer than any other and few need it

    try:
        dataset = CIFAR10(data_path, train=train, download=False)
    except (RuntimeError, OSError) as error:
        there = (data_path / CIFAR10_FOLDER).is_dir()
        state = "is damaged or incomplete (an md5 differs)" if there else "is not there"
        raise missing_cifar10(data_path, state) from error
    return torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()


def missing_cifar10(data_path: Path, state: str) -> DataError:
    return DataError(
        f"CIFAR-10: {data_path / CIFAR10_FOLDER} {state}; get it with `transformnet data cifar10 --data-path "
        f"{data_path}`, or use data=photos"
    )


def download_cifar10(data_path: str | Path = "data") -> Path:
    """Download CIFAR-10 (170 MB) into `data_path`, check its hash, unpack it, and return its folder.

    Does nothing if it is there already. The archive, and then each file of it, takes its name when it is whole; the
    hash is checked before anything is unpacked. Raises DataError if the download fails or its hash differs.
    """
    check_path("data_path", data_path)
    folder = Path(data_path) / CIFAR10_FOLDER
    with suppress(DataError):
        read_cifar10(Path(data_path), train=True)
        return folder
    kept = Path(data_path) / Path(CIFAR10_URL).name
    if kept.exists() and not kept.is_file():  # a pipe would be waited for
        raise DataError(f"{kept}: expected a file, got something else; remove it")
    for place in (Path(data_path), folder):  # before an hour of downloading
        if os.path.lexists(place) and (not place.is_dir() or (place == folder and place.is_symlink())):
            raise DataError(f"{place}: expected a folder, got something else; remove it, or take another --data-path")
    responses = []  # pooch leaves that of a failed download open
    bar = tqdm(
        total=CIFAR10_BYTES, unit="B", unit_scale=True, leave=False
    )  # pooch's own would stay, and be drawn again after an error

    def watch(response, **_) -> None:
        responses.append(response)
        chunks = response.iter_content
        response.iter_content = lambda chunk_size: _no_more_than_the_archive(chunks(chunk_size))

    try:
        archive = pooch.retrieve(
            CIFAR10_URL,
            known_hash=f"md5:{CIFAR10_MD5}",
            path=data_path,
            fname=kept.name,
            downloader=pooch.HTTPDownloader(
                progressbar=bar,
                timeout=DOWNLOAD_TIMEOUT,
                headers={"Accept-Encoding": "identity"},
                hooks={"response": watch},
            ),
        )
        with tempfile.TemporaryDirectory(dir=data_path, prefix=".unpacked-") as beside:
            # Not as `processor`: that skips an archive kept
            pooch.Untar(extract_dir=Path(beside).name)(archive, "download", None)
            folder.mkdir(exist_ok=True)
            for file in Path(beside, CIFAR10_FOLDER).iterdir():
                file.replace(folder / file.name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; pooch says ValueError for a wrong hash
        reason: BaseException = error
        while reason.__context__ is not None:  # requests wraps urllib3's error, and that the system's, in long texts
            reason = reason.__context__
        raise DataError(
            f"CIFAR-10: download from {CIFAR10_URL} failed: {reason}; try again, or use data=photos"
        ) from error
    finally:
        bar.close()
        for response in responses:
            response.close()
    read_cifar10(Path(data_path), train=True)
    return folder


def _no_more_than_the_archive(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Pass on what comes, unpacked if the server packed it; ValueError once it is more than the archive."""
    count = 0
    for chunk in chunks:
        count += len(chunk)
        if count > CIFAR10_BYTES:
            raise ValueError(f"the server sent more than the archive's {CIFAR10_BYTES:,} bytes")
        yield chunk
