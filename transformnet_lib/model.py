"""TransformNet: the paper's network, three trained weights around a fixed geometry; and its folded form, for speed."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ParameterError
from .pipeline import Pipeline

KEPT_SHAPES = 16  # input shapes whose matrices a folded model keeps; about 1 MB each for 512 images of 32×32


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

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ParameterError(
                "expected float images of shape (batch, 3, height, width), "
                f"got {str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
            )
        return self.pipeline.flip(self.mix(self.pipeline.resize(images))).clamp(0, 1)

    def folded(self) -> "FoldedTransformNet":
        """The same function for inference, many times faster, with the weights as they are now."""
        return FoldedTransformNet(self.mix.weight.detach().flatten(), self.pipeline)


class FoldedTransformNet(nn.Module):
    """TransformNet as two matrix products an image: y = clamp(L x R), since resize, grey mix and flips are linear.

    x is the image with its colours stacked, (3 · height, width). L = [w_r A, w_g A, w_b A], where A resizes and flips
    the rows: the grey mix comes with it, so that R, which resizes and flips the columns, sees one colour. A row of L
    has few entries that are not 0 (7 of 96 for 32 → 28 pixels); on a CPU only those are multiplied.

    `weights`: float (3,). Input `(batch, 3, height, width)` of any size, uint8 or in [0, 1] of the weights' dtype;
    output `(batch, 1, *pipeline.size)` in [0, 1], of the weights' dtype, on the device of the input. Equal to the
    eager model within 1e-6; beyond some 100 pixels that takes float64, for float32's sums of so many pixels round more.
    L and R are made when a shape, dtype or device is first met. Nothing is learned, so there are no parameters, and
    one folded model serves all devices; for another dtype, convert the model before folding it.
    Raises ParameterError for any other input.

    >>> TransformNet().folded()(torch.zeros(8, 3, 32, 32, dtype=torch.uint8)).shape
    torch.Size([8, 1, 28, 28])
    """

    def __init__(self, weights: Tensor, pipeline: Pipeline):
        super().__init__()
        self.weights = weights.cpu().clone()
        self.pipeline = pipeline
        self.kept = {}

    def axis_matrix(self, size: int, axis: int, device: torch.device) -> Tensor:
        """The pipeline's `axis_matrix` `(pipeline.size[axis], size)` in the weights' dtype."""
        return self.pipeline.axis_matrix(size, axis, dtype=self.weights.dtype, device=device)

    @torch.inference_mode(False)  # else what is kept could not be used where gradients are wanted
    def fold(self, images: Tensor) -> tuple[Tensor | dict[str, Tensor], Tensor | None, bool]:
        """L and R for images such as these, and whether anything can need clamping.

        On a CPU, L is the arguments of `embedding_bag`; R is None where columns stay as they are.
        """
        dtype = self.weights.dtype
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype not in (torch.uint8, dtype):
            raise ParameterError(
                f"expected uint8 or {str(dtype)[6:]} images of shape (batch, 3, height, width), "
                f"got {str(images.dtype)[6:]} {tuple(images.shape)}"
            )
        count, _, height, width = images.shape
        mix = self.weights.to(images.device) / (255 if images.dtype == torch.uint8 else 1)
        left = torch.kron(mix, self.axis_matrix(height, -2, images.device))
        same_columns = width == self.pipeline.size[1] and not self.pipeline.hflip
        right = None if same_columns else self.axis_matrix(width, -1, images.device).T.contiguous()
        if images.device.type == "cpu":
            # An output row is a weighted sum of a few rows of the image: a bag of them. In a batch, image i's rows
            # begin at 3 · height · i.
            row, column = left.nonzero(as_tuple=True)
            per_row = torch.bincount(row, minlength=len(left)).repeat(count)
            left = {
                "input": (torch.arange(count)[:, None] * 3 * height + column).flatten().int(),
                "offsets": F.pad(per_row.cumsum(0), (1, 0)).int(),
                "per_sample_weights": left[row, column].repeat(count),
            }
        # uint8 cannot leave [0, 1], nor can its weighted mean with weights that sum to less (0.9999 in the pipeline);
        # the margin is for rounding. One operation less is a tenth of the time at batch size 16.
        mean = bool((self.weights >= 0).all() and self.weights.sum() <= 1 - 1e-5)
        if len(self.kept) == KEPT_SHAPES:
            self.kept.clear()
        matrices = left, right, not (mean and images.dtype == torch.uint8)
        self.kept[images.shape, images.dtype, images.device] = matrices
        return matrices

    def forward(self, images: Tensor) -> Tensor:
        left, right, clips = self.kept.get((images.shape, images.dtype, images.device)) or self.fold(images)
        x = images.to(self.weights.dtype)
        if isinstance(left, dict):
            y = F.embedding_bag(weight=x.flatten(0, 2), mode="sum", include_last_offset=True, **left)
        else:
            y = left @ x.flatten(1, 2)
        if right is not None:
            y = y @ right
        if clips:
            y.clamp_(0, 1)
        return y.view(len(images), 1, *self.pipeline.size)


def seeded_model(seed: int, pipeline: Pipeline | None = None) -> TransformNet:
    """A TransformNet with PyTorch's default initialisation drawn from `seed`; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TransformNet(pipeline)
