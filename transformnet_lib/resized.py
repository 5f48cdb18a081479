"""What a training sees of a data set: colours after resize and flips, and their targets, gathered batch by batch.

The geometry has nothing to learn, so it is applied to every image once and kept. Where that takes more than
`KEEP_BYTES`, it is applied to every batch again; both give the same numbers.
"""

import math

import torch
from torch import Tensor

from .dataset import CustomDataset, check_pairs
from .pipeline import to_float

KEEP_BYTES = 2**30  # of resized colours: 114,000 images of 28×28 pixels; more are resized again for each batch
CHUNK = 512  # images a step while all are gone through; bounds the scratch memory to about 30 MB for 28×28 pixels


class ResizedImages:
    """The colours and targets of all images of `dataset` on `device`, one column a pixel of the output.

    `gather` gives a batch's; `pixels` is the number of columns an image has. Kept in memory if `keep` and no larger
    than `KEEP_BYTES`. Raises DataError for images or targets that are none (see `check_pairs`).
    """

    def __init__(self, dataset: CustomDataset, device: torch.device, *, keep: bool = True):
        check_pairs(dataset)
        self.dataset, self.device = dataset, device
        self.pixels = math.prod(dataset.pipeline.size)
        self.kept = keep and len(dataset) * 3 * self.pixels * 4 <= KEEP_BYTES  # 4 bytes a float32
        # Where `gather` wants its indices: beside what it picks from.
        self.index_device = device if self.kept else torch.device("cpu")
        if self.kept:
            self.inputs = torch.empty(3, len(dataset), self.pixels, device=device)
            cached = dataset.targets is not None  # then they are taken as they are: on the CPU without a copy
            self.targets = dataset.targets.flatten(1).to(device) if cached else torch.empty_like(self.inputs[0])
            for chunk in torch.arange(len(dataset)).split(CHUNK):
                colours, targets = self._compute(chunk)
                self.inputs[:, chunk[0] : chunk[-1] + 1] = colours
                if not cached:
                    self.targets[chunk[0] : chunk[-1] + 1] = targets

    def _compute(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Colours `(3, count, pixels)` and targets `(count, pixels)`, float32, straight from the data set."""
        pipeline = self.dataset.pipeline
        images = to_float(self.dataset.images[indices].to(self.device)).float()
        targets = pipeline(images) if self.dataset.targets is None else self.dataset.targets[indices].to(self.device)
        colours = pipeline.flip(pipeline.resize(images))
        return colours.flatten(2).transpose(0, 1), targets.flatten(1)

    def gather(self, indices: Tensor, inputs: Tensor, targets: Tensor) -> None:
        """Write the images at `indices` into `inputs` `(3, count * pixels)` and `targets` `(count * pixels,)`.

        Into buffers of the caller, since fresh memory for each batch takes as long as the arithmetic.
        """
        inputs, targets = inputs.view(3, -1, self.pixels), targets.view(-1, self.pixels)
        if self.kept:
            for kept, buffer in zip(self.inputs, inputs, strict=True):  # channel by channel: this runs in parallel
                torch.index_select(kept, 0, indices, out=buffer)
            torch.index_select(self.targets, 0, indices, out=targets)
        else:
            colours, wanted = self._compute(indices)
            inputs.copy_(colours)
            targets.copy_(wanted)

    def moments(self, indices: Tensor) -> Tensor:
        """E[z zᵀ] over the pixels of the images at `indices`, z = (red, green, blue, target): `(4, 4)`, on the CPU.

        In float64, since solving for the weights magnifies rounding by the condition number.
        """
        exact = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no other
        total = torch.zeros(4, 4, dtype=exact, device=self.device)
        for chunk in indices.to(self.index_device).split(CHUNK):
            values = torch.empty(4, len(chunk) * self.pixels, device=self.device)
            self.gather(chunk, values[:3], values[3])
            values = values.to(exact)
            total += values @ values.mT
        return total.cpu().double() / (len(indices) * self.pixels)
