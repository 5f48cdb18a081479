"""The methods: ways to do the pipeline's work over all images, each set up once and then run as one timed pass.

Every clock is `time.perf_counter`, read after the device has finished. Images, model and results are in memory before
a clock starts; nothing is decoded from disk inside one. A method is a network, a way to load its images and how they
are stored:

    method      network              images come         stored as
    sequential  pipeline             one by one          float32
    batched     pipeline             in whole batches    float32
    reference   eager model          row by row          float32    (the paper's)
    fast        folded model         in whole batches    uint8      (on CUDA pinned memory and CUDA graphs too)

Every other combination of the three is a method too, named after them: `folded-rows-float32`.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from .dataset import BatchIndices, batch_loader
from .errors import ParameterError
from .machine import resolve_device, synchronize
from .model import TransformNet
from .pipeline import Pipeline, to_float

MAX_MSE = 1e-2  # against the ground truth; a model farther off (20 dB) does not replace the pipeline and is not timed
MAX_DIFFERENCE = 1e-4  # of a pixel from the eager model's: a fortieth of a grey level; rounding leaves less than 1e-5
LOADER_SECONDS = 20  # in which a loader process must give a batch; one that cannot be reached never would


@dataclass(frozen=True)
class Method:
    """A way to do the work."""

    network: str  # one of NETWORKS
    loader: str  # rows: fetched one by one and collated, as in the paper; batches: in one step; images: no batches
    storage: str  # float32 or uint8
    graph: str = ""  # on CUDA: a graph per batch, pinned: from pinned memory, overlapped: with copies beside it


NETWORKS = ("pipeline", "eager", "folded")
METHODS = {
    "sequential": Method("pipeline", "images", "float32"),
    "batched": Method("pipeline", "batches", "float32"),
    "reference": Method("eager", "rows", "float32"),
    "fast": Method("folded", "batches", "uint8", "overlapped"),
    "graph": Method("folded", "batches", "uint8", "graph"),
    "pinned": Method("folded", "batches", "uint8", "pinned"),
    **{"-".join(parts): Method(*parts) for parts in product(NETWORKS, ("batches", "rows"), ("float32", "uint8"))},
}


def sequential_pass(pipeline: Pipeline, images: Tensor) -> float:
    """Apply the pipeline image by image on the CPU; wall time in seconds. `images` (n, 3, h, w) float32 in [0, 1]."""
    transform = pipeline.compose()
    with torch.inference_mode():
        start = time.perf_counter()
        for image in images:
            transform(image)
        return time.perf_counter() - start


def copy_pass(images: Tensor, pipeline: Pipeline, device: torch.device) -> Callable[[], float]:
    """What no way to do the work can beat; each call of the answer moves the bytes once and gives its seconds.

    On the CPU every byte of `images` (n, 3, h, w) is read and every byte of the float32 outputs is written, once. On
    another device the images are copied to it, from pinned memory if it is CUDA.
    """
    if device.type != "cpu":
        source = images.pin_memory() if device.type == "cuda" else images
        target = torch.empty_like(images, device=device)
        moves = [lambda: target.copy_(source, non_blocking=True)]
    else:
        source = images.contiguous().view(-1).view(torch.uint8)
        target = torch.empty(len(images) * math.prod(pipeline.size) * 4, dtype=torch.uint8)  # 4 bytes a float32
        both = min(len(source), len(target))
        moves = [lambda: target[:both].copy_(source[:both])]
        moves += [lambda: target[both:].zero_()] * (len(target) > both) + [source[both:].amax] * (len(source) > both)

    def run_pass() -> float:
        synchronize(device)
        start = time.perf_counter()
        for move in moves:
            move()
        synchronize(device)
        return time.perf_counter() - start

    run_pass()  # warm-up: memory that was never written is slow the first time
    return run_pass


def test_inference_time(
    model: TransformNet,
    *,
    images: Tensor,
    device: str,
    batch_size: int,
    shuffle: bool,
    drop_last: bool,
    num_workers: int = 0,
    method: str = "reference",
) -> float:
    """One timed pass of `model` over `images` (n, 3, h, w; float32 in [0, 1] or uint8); wall time in seconds.

    `method="reference"` is the paper's protocol: a DataLoader over a TensorDataset of float32 images, the eager model
    in eval mode, the copy to the device inside the clock. `method="fast"` is what this library recommends, with the
    images stored as they are given (uint8 is the faster). What is done once per use is outside the clock: the
    conversion to float32 of other methods, moving or folding the model, building the loader, pinning, graph capture.
    Raises ParameterError for a setting that cannot be run.
    """
    return prepare_pass(
        model,
        images=images,
        device=resolve_device(device),
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=num_workers,
        method=method,
    ).seconds()


test_inference_time.__test__ = False  # its name is the paper's; pytest leaves it alone


@torch.inference_mode()
def prepare_pass(
    model: TransformNet,
    *,
    images: Tensor,
    device: torch.device,
    batch_size: int,
    shuffle: bool,
    drop_last: bool,
    num_workers: int,
    method: str,
) -> "Pass":
    """Set up one method, outside the clock: what is returned is what will be timed, and what is checked."""
    known = [name for name, each in METHODS.items() if each.loader != "images"]
    if method not in known:
        raise ParameterError(f"method: expected one of {', '.join(known)}, got {method!r}")
    if type(batch_size) is not int or batch_size < 1:
        raise ParameterError(f"batch_size: expected a whole number from 1, got {batch_size!r}")
    if type(num_workers) is not int or num_workers < 0:
        raise ParameterError(f"num_workers: expected a whole number from 0, got {num_workers!r}")
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ParameterError(f"expected images of shape (count, 3, height, width), got {tuple(images.shape)}")
    if drop_last and len(images) < batch_size:
        raise ParameterError(f"zero batches: drop_last with batch size {batch_size} and {len(images)} images")
    batches = {"batch_size": batch_size, "shuffle": shuffle, "drop_last": drop_last}
    way = METHODS[method]
    network = _network(model, way, device)
    if way.graph and device.type == "cuda" and num_workers == 0:
        kind = {"graph": GraphPass, "pinned": PinnedGraphPass, "overlapped": OverlappedPass}[way.graph]
        return kind(network, images, device, **batches)
    images = images if way.storage == "uint8" else to_float(images)
    for size in {min(batch_size, len(images)), len(images) % batch_size} - {0}:
        network(images[:size].to(device))  # a folded model makes its matrices
    load = batch_loader if way.loader == "batches" else row_loader
    timeout = LOADER_SECONDS if num_workers else 0
    return LoaderPass(network, images, device, partial(load, num_workers=num_workers, timeout=timeout, **batches))


def _network(model: TransformNet, method: Method, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What a method runs on each batch, on `device`; the caller's model stays where it is, for the other devices."""
    if method.network == "folded":
        return model.folded().to(device)
    network = model.pipeline.compose() if method.network == "pipeline" else copy.deepcopy(model).to(device).eval()
    return network if method.storage == "float32" else lambda batch: network(to_float(batch))


def row_loader(tensor: Tensor, *, seed: int = 0, **options) -> DataLoader:
    """The paper's loader: rows fetched one by one and collated. Its own generator leaves the global one as it is."""
    return DataLoader(TensorDataset(tensor), generator=torch.Generator().manual_seed(seed), **options)


def _grayscale(images: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import rgb_to_grayscale  # here, as in `Pipeline.compose`

    return rgb_to_grayscale(images)


# The steps within a batch of the pipeline and of the eager model, each on what the one before it gives
STEPS = {
    "resize": lambda model: (lambda images: images, model.pipeline.resize),
    "convolution": lambda model: (model.pipeline.resize, model.mix),
    "grayscale": lambda model: (model.pipeline.resize, _grayscale),
    "flips": lambda model: (lambda images: model.pipeline.resize(images)[:, :1].contiguous(), model.pipeline.flip),
}


def prepare_step(
    name: str, model: TransformNet, images: Tensor, device: torch.device, batch_size: int
) -> Callable[[], float]:
    """One step alone, on batches that lie on the device: each call of the answer does it once over all images."""
    model = copy.deepcopy(model).to(device).eval()
    before, step = STEPS[name](model)
    with torch.inference_mode():
        batches = [before(to_float(batch.to(device))) for batch in images.split(batch_size)]

    @torch.inference_mode()
    def run_pass() -> float:
        synchronize(device)
        start = time.perf_counter()
        for batch in batches:
            step(batch)
        synchronize(device)
        return time.perf_counter() - start

    run_pass()  # warm-up
    return run_pass


class Pass:
    """One method over all images, set up: `seconds` times a pass, `mse` checks what it gives.

    `load(tensor)` makes the loader over the rows of `tensor`, which gives batches as tuples of one and draws from a
    generator of its own; `load(tensor, num_workers=0, timeout=0)` makes one that gives the same batches by itself.
    """

    def __init__(self, network: Callable, images: Tensor, device: torch.device, load: Callable[..., DataLoader]):
        self.network, self.images, self.device, self.load = network, images, device, load
        self.loader = load(images)

    def outputs(self) -> Iterator[Tensor]:
        """Run the network over all images, in inference mode; a batch's output is valid until the next is asked for."""
        raise NotImplementedError

    def seconds(self) -> float:
        """One timed pass: wall time until the device has finished."""
        with torch.inference_mode():
            synchronize(self.device)
            start = time.perf_counter()
            for _ in self.outputs():
                pass
            synchronize(self.device)
            return time.perf_counter() - start

    def order(self) -> Tensor:
        """The indices of the images in the order in which the next pass will take them, `(count,)`."""
        loader = self.load(torch.arange(len(self.images)), num_workers=0, timeout=0)
        loader.generator.set_state(self.loader.generator.get_state())
        return torch.cat([batch for (batch,) in loader])

    def mse(self, targets: Tensor, expected: Tensor, *, least: int | None = None) -> float:
        """The MSE of one pass, not timed, against the `targets` (count, 1, h, w) of all images, on the CPU.

        RuntimeError for an output that differs from `expected`, that of the same weights in the eager model, by more
        than MAX_DIFFERENCE. With `least` the pass ends at the first batch by which so many images were compared. Each
        call takes the same order, so that drop_last drops the same images.
        """
        self.loader.generator.manual_seed(0)
        order, start, total = self.order(), 0, 0.0
        with torch.inference_mode():
            for output in self.outputs():
                output, indices = output.cpu(), order[start : start + len(output)]
                difference = (output - expected[indices]).abs().max().item()
                if not difference <= MAX_DIFFERENCE:
                    raise RuntimeError(f"output differs from the eager model's by {difference:.3g} in a pixel")
                errors = output - targets[indices]
                start, total = start + len(output), total + errors.square().sum(dtype=torch.float64).item()
                if least is not None and start >= least:
                    break
        if start != len(order) and least is None:
            raise RuntimeError(f"expected the outputs of {len(order)} images, got {start}")
        return total / (start * targets[0].numel())


class LoaderPass(Pass):
    """Batch by batch, as the loader gives them: copied to the device, then the network."""

    def outputs(self) -> Iterator[Tensor]:
        try:
            for (batch,) in self.loader:
                yield self.network(batch.to(self.device))
        except RuntimeError as error:
            if "DataLoader timed out" not in str(error):
                raise
            raise RuntimeError(
                f"the loader processes gave no batch in {LOADER_SECONDS} s; if TMPDIR is a path of more than 77 "
                "characters, set a shorter one"
            ) from error


class PinnedBatches(Dataset):
    """Images (count, 3, height, width) in pinned memory, from where CUDA copies while the CPU goes on.

    A batch in order is a view of them. A shuffled one is gathered straight into one of two pinned buffers; `turn` says
    which, and whoever copies it away records `copied[turn]`, so that a buffer is not filled before its copy has ended.
    """

    def __init__(self, images: Tensor, batch_size: int):
        self.images = images if images.is_pinned() else images.pin_memory()
        self.buffers = [images.new_empty(batch_size, *images.shape[1:]).pin_memory() for _ in range(2)]
        self.copied = [torch.cuda.Event() for _ in range(2)]
        self.turn = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice | Tensor) -> tuple[Tensor]:
        self.turn = 1 - self.turn
        if isinstance(index, slice):
            return (self.images[index],)
        self.copied[self.turn].synchronize()
        return (torch.index_select(self.images, 0, index, out=self.buffers[self.turn][: len(index)]),)


class GraphedCall:
    """`network(input)` recorded as a CUDA graph; `replay()` computes `output` from what `input` then holds.

    A graph keeps nothing alive that its kernels read: neither the network's parameters and matrices nor the input. Once
    they are freed it reads whatever lies there, until their memory is the driver's again and the next replay fails. So
    this object owns them all.
    """

    def __init__(self, network: nn.Module, input: Tensor):
        self.network, self.input = network, input
        side = torch.cuda.Stream(input.device)
        side.wait_stream(torch.cuda.current_stream(input.device))
        with torch.cuda.stream(side):
            network(input)  # warm-up, which makes what must not be made while capturing: matrices, cuBLAS' workspace
        torch.cuda.current_stream(input.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = network(input)

    def replay(self) -> None:
        self.graph.replay()


class GraphPass(Pass):
    """On CUDA: a batch is copied to the device and a graph is replayed, one after the other.

    A smaller last batch runs the whole graph, and what lies behind it is not looked at. A batch's output is valid until
    the next one.
    """

    def __init__(self, network: nn.Module, images: Tensor, device: torch.device, **batches):
        super().__init__(network, images, device, partial(batch_loader, **batches))
        shape = (batches["batch_size"], *images.shape[1:])
        with torch.cuda.device(device):
            self.call = GraphedCall(network, images.new_zeros(shape, device=device))

    def outputs(self) -> Iterator[Tensor]:
        with torch.cuda.device(self.device):
            for (batch,) in self.loader:
                self.call.input[: len(batch)].copy_(batch, non_blocking=True)
                self.copied()
                self.call.replay()
                yield self.call.output[: len(batch)]

    def copied(self) -> None:
        """Note that the copy of the present batch was asked for."""


def pinned_loader(source: PinnedBatches, **batches) -> DataLoader:
    """`batch_loader` over images in pinned memory; the same indices."""
    generator = torch.Generator().manual_seed(0)
    indices = BatchIndices(len(source), generator=generator, **batches)
    return DataLoader(source, sampler=indices, batch_size=None, collate_fn=tuple, generator=generator)


class PinnedGraphPass(GraphPass):
    """The same from pinned memory, which CUDA reads by itself."""

    def __init__(self, network: nn.Module, images: Tensor, device: torch.device, **batches):
        super().__init__(network, images, device, **batches)
        self.source = PinnedBatches(images, batches["batch_size"])
        self.loader = pinned_loader(self.source, **batches)

    def copied(self) -> None:
        self.source.copied[self.source.turn].record(torch.cuda.current_stream())


class OverlappedPass(Pass):
    """The fast method on CUDA: while one batch is computed, the next is copied on a stream of its own.

    There are two of everything: pinned buffer, graph with its input and output on the device, event. A batch's output
    is valid until the second batch after it. A smaller last batch runs the whole graph, as in `GraphPass`.
    """

    def __init__(self, network: nn.Module, images: Tensor, device: torch.device, **batches):
        super().__init__(network, images, device, partial(batch_loader, **batches))  # for `order`: the same indices
        self.source = PinnedBatches(images, batches["batch_size"])
        self.loader = pinned_loader(self.source, **batches)
        with torch.cuda.device(device):
            shape = (batches["batch_size"], *images.shape[1:])
            self.calls = [GraphedCall(network, images.new_zeros(shape, device=device)) for _ in range(2)]
            self.copying, self.computed = torch.cuda.Stream(), [torch.cuda.Event() for _ in range(2)]

    def outputs(self) -> Iterator[Tensor]:
        with torch.cuda.device(self.device):
            computing = torch.cuda.current_stream()
            for (batch,) in self.loader:
                k = self.source.turn
                call, computed, copied = self.calls[k], self.computed[k], self.source.copied[k]
                with torch.cuda.stream(self.copying):
                    self.copying.wait_event(computed)  # the graph that read this input two batches ago
                    call.input[: len(batch)].copy_(batch, non_blocking=True)
                    copied.record(self.copying)
                computing.wait_event(copied)
                call.replay()
                computed.record(computing)
                yield call.output[: len(batch)]


@contextmanager
def float32_exactly() -> Iterator[None]:
    """CUDA's TF32 off, which rounds products to 10 bits; restored at the end."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
