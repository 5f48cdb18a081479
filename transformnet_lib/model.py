"""TransformNet: the paper's network, three trained weights around a fixed geometry."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ParameterError
from .pipeline import Pipeline


class TransformNet(nn.Module):
    """Resize, grey, flip and clamp an RGB batch; only the grey mix is learned: three unitless weights, no bias.

    Input `(batch, 3, height, width)`, float in [0, 1]; output `(batch, 1, *pipeline.size)`, same dtype and device.
    Raises ParameterError for any other rank, channel count or an integer dtype.

    >>> TransformNet()(torch.zeros(8, 3, 32, 32)).shape
    torch.Size([8, 1, 28, 28])
    """

    def __init__(self, pipeline: Pipeline | None = None):
        super().__init__()
        self.pipeline = pipeline or Pipeline()
        self.mix = nn.Conv2d(3, 1, kernel_size=1, bias=False)

    @property
    def weights(self) -> tuple[float, float, float]:
        """The three learned weights, for red, green and blue."""
        return tuple(self.mix.weight.detach().flatten().double().tolist())

    def resize(self, images: Tensor) -> Tensor:
        """Bilinear, antialiased resize to `(batch, 3, *pipeline.size)`, as the ground truth does it."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ParameterError(
                "expected float images of shape (batch, 3, height, width), "
                f"got {str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
            )
        return F.interpolate(images, self.pipeline.size, mode="bilinear", antialias=True, align_corners=False)

    def flip(self, images: Tensor) -> Tensor:
        """Reverse the axes that the pipeline reverses."""
        return images.flip(self.pipeline.flip_axes)

    def forward(self, images: Tensor) -> Tensor:
        return self.flip(self.mix(self.resize(images))).clamp(0, 1)


def seeded_model(seed: int, pipeline: Pipeline | None = None) -> TransformNet:
    """A TransformNet with PyTorch's default initialisation drawn from `seed`; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TransformNet(pipeline)
