"""TransformNet: the paper's network, three trained weights around a fixed geometry; and its folded form, for speed."""

from collections.abc import Sequence

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
    eager model within 1e-6, under autocast too; beyond some 100 pixels that takes float64, for float32's sums of so
    many pixels round more. Raises ParameterError for any other input.

    Nothing is learned, so there are no parameters. The buffers are `weights` and `geometry`, int64 (height, width,
    hflip, vflip); a state of another geometry does not load. L and R are made on the images' device, wherever the
    buffers are, when a shape, dtype or device is first met, and again when the weights have changed. A CUDA graph
    captured from the model reads them: as long as the graph is replayed, keep the model as it is, and show it no more
    than KEPT_SHAPES shapes in all.

    >>> TransformNet().folded()(torch.zeros(8, 3, 32, 32, dtype=torch.uint8)).shape
    torch.Size([8, 1, 28, 28])
    """

    @torch.inference_mode(False)  # else no weights could be loaded outside of it
    def __init__(self, weights: Tensor, pipeline: Pipeline):
        super().__init__()
        self.register_buffer("weights", weights.detach().cpu().clone())
        self.register_buffer("geometry", torch.tensor([*pipeline.size, pipeline.hflip, pipeline.vflip]))
        self.pipeline = pipeline
        self.kept = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"kept": {}}  # a copy's tensors count their writes from 0

    @torch.inference_mode(False)  # as in __init__
    def _apply(self, fn, recurse=True):
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        own = [*self.pipeline.size, int(self.pipeline.hflip), int(self.pipeline.vflip)]
        geometry = state_dict[prefix + "geometry"].tolist() if prefix + "geometry" in state_dict else own
        if geometry != own:
            errors.append(
                f"{prefix}geometry: expected (height, width, hflip, vflip) = {own}, got {geometry}; "
                "fold a model of that pipeline"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def axis_matrix(self, size: int, axis: int, device: torch.device) -> Tensor:
        """The pipeline's `axis_matrix` `(pipeline.size[axis], size)` in the weights' dtype."""
        # No CPU resizes in half precision
        dtype = torch.promote_types(self.weights.dtype, torch.float32)
        return self.pipeline.axis_matrix(size, axis, dtype=dtype, device=device).to(self.weights.dtype)

    @torch.inference_mode(False)  # else what is kept could not be used where gradients are wanted
    def fold(self, images: Tensor) -> tuple[Tensor | dict[str, Tensor], Tensor | None, bool]:
        """L and R for images such as these, and whether anything can need clamping.

        On a CPU, L is the arguments of `embedding_bag`; R is None where columns stay as they are.
        """
        weights, content = self.weights, _content(self.weights)  # now: others may be loaded meanwhile
        dtype = weights.dtype
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype not in (torch.uint8, dtype):
            raise ParameterError(
                f"expected uint8 or {str(dtype)[6:]} images of shape (batch, 3, height, width), "
                f"got {str(images.dtype)[6:]} {tuple(images.shape)}"
            )
        count, _, height, width = images.shape
        mix = weights.to(images.device) / (255 if images.dtype == torch.uint8 else 1)
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
        margin = max(1e-5, 100 * torch.finfo(dtype).eps)
        mean = bool((weights >= 0).all() and weights.sum() <= 1 - margin)
        matrices = left, right, not (mean and images.dtype == torch.uint8)
        if len(self.kept) >= KEPT_SHAPES:  # more, if threads share the model
            self.kept.clear()
        self.kept[images.shape, images.dtype, images.device] = weights, content, matrices
        return matrices

    def matrices(self, images: Tensor) -> tuple[Tensor | dict[str, Tensor], Tensor | None, bool]:
        """`fold`'s answer, kept from the last call with images of this shape if the weights are still the same."""
        key = images.shape, images.dtype, images.device
        weights, content, matrices = self.kept.get(key, (None, None, None))
        return matrices if weights is self.weights and content == _content(weights) else self.fold(images)

    def forward(self, images: Tensor) -> Tensor:
        # Compiled, the look-up would not see that weights were written to. Decorated, it would cost some 20 µs per call
        look_up = torch.compiler.disable(self.matrices) if torch.compiler.is_compiling() else self.matrices
        matrices = look_up(images)
        device = images.device.type
        if device != "meta" and torch.is_autocast_enabled(device):  # there is none on meta
            with torch.autocast(device, enabled=False):  # it would multiply in bfloat16: wrong by a grey level
                return self.products(images, *matrices)
        return self.products(images, *matrices)

    def products(self, images: Tensor, left: Tensor | dict[str, Tensor], right: Tensor | None, clips: bool) -> Tensor:
        """clamp(L x R), with what `fold` made for such images."""
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


def _content(tensor: Tensor) -> list[float] | int:
    """What changes with a tensor: its numbers; on other devices, which would be waited for, its count of writes."""
    return tensor.tolist() if tensor.device.type == "cpu" or tensor.is_inference() else tensor._version


def weighted_model(weights: Sequence[float], pipeline: Pipeline | None = None) -> TransformNet:
    """A TransformNet with these weights for red, green and blue, in eval mode."""
    model = TransformNet(pipeline)
    with torch.no_grad():
        model.mix.weight.copy_(torch.tensor(weights).view(1, 3, 1, 1))
    return model.eval()


def seeded_model(seed: int, pipeline: Pipeline | None = None) -> TransformNet:
    """A TransformNet with PyTorch's default initialisation drawn from `seed`; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TransformNet(pipeline)
