"""The ground truth as data: what the fixed image pipeline does, in one place.

Size and flips are fields of `Pipeline`; the data set, the model, the timing harness and the report all read them
from here and repeat none of them.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import ParameterError

# ITU-R BT.601 luma as torchvision's Grayscale rounds it (torchvision/transforms/v2/functional/_color.py,
# `_rgb_to_grayscale_image`): 0.2989 where the standard has 0.299, so the three sum to 0.9999.
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)

MAX_SIZE = 4096  # pixels a side; far above any image this is meant for, low enough to refuse nonsense


def check_size(name: str, size: int | tuple[int, int]) -> tuple[int, int]:
    """Return `size` as (height, width) in pixels; an int means a square. ParameterError if out of 1..4096."""
    sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= MAX_SIZE for side in sides):
        raise ParameterError(f"{name}: expected one or two whole numbers from 1 to {MAX_SIZE}, got {size!r}")
    return sides


@dataclass(frozen=True)
class Pipeline:
    """Resize (bilinear, antialiased) → grayscale → horizontal flip → vertical flip.

    Called on float images `(..., 3, height, width)` in [0, 1] it returns `(..., 1, *size)`, same dtype and device.

    >>> Pipeline()(torch.zeros(8, 3, 32, 32)).shape
    torch.Size([8, 1, 28, 28])
    """

    size: tuple[int, int] = (28, 28)  # output height and width in pixels
    hflip: bool = True
    vflip: bool = True

    def __post_init__(self):
        object.__setattr__(self, "size", check_size("output_size", self.size))
        for name in ("hflip", "vflip"):
            if type(getattr(self, name)) is not bool:
                raise ParameterError(f"{name}: expected True or False, got {getattr(self, name)!r}")

    @property
    def flip_axes(self) -> tuple[int, ...]:
        """The tensor axes that are reversed: -1 for the horizontal flip, -2 for the vertical one."""
        return (-1,) * self.hflip + (-2,) * self.vflip

    def resize(self, images: Tensor) -> Tensor:
        """Resize float images `(batch, channels, height, width)` to `(batch, channels, *size)`, as `v2.Resize` does."""
        return _resized(images, self.size)

    def flip(self, images: Tensor) -> Tensor:
        """Reverse the axes of images `(..., height, width)` that the pipeline reverses."""
        return images.flip(self.flip_axes)

    def axis_matrix(self, side: int, axis: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """What `resize` and `flip` do to the rows (axis -2) or columns (-1) of an image, as `(size[axis], side)`.

        `side` is how many rows or columns the image has. The matrix is PyTorch's own resize of the unit matrix in the
        image's dtype and on its device: in float32 the taps of a large image are rounded, and these must be rounded
        alike.
        """
        unit = torch.eye(side, dtype=dtype, device=device)[None, None]
        matrix = _resized(unit, (self.size[axis], side))[0, 0]
        return matrix.flip(0) if axis in self.flip_axes else matrix

    def compose(self):
        """The pipeline as the torchvision `v2.Compose` that a user would write."""
        from torchvision.transforms import v2  # here: its import takes over a second, and who reads runs needs none

        steps = [v2.Resize(self.size, antialias=True), v2.Grayscale()]
        steps += [v2.functional.horizontal_flip] * self.hflip + [v2.functional.vertical_flip] * self.vflip
        return v2.Compose(steps)

    def __call__(self, images: Tensor) -> Tensor:
        return self.compose()(images)

    def __str__(self) -> str:
        flips = [name for name, on in (("horizontal flip", self.hflip), ("vertical flip", self.vflip)) if on]
        return " → ".join([f"resize to {self.size[0]}×{self.size[1]}", "grayscale", *flips])

    def to_dict(self) -> dict:
        """The fields as plain JSON values."""
        return {**asdict(self), "size": list(self.size)}


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)


def to_float(images: Tensor) -> Tensor:
    """uint8 images in 0..255 as float32 in [0, 1]; floats pass through.

    >>> to_float(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([0., 1.])
    """
    return images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images
