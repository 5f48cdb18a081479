"""CUDA's names, doing at once on the CPU what CUDA does later.

It tests the order of the host's steps, and that whoever replays a graph keeps alive what the graph reads: like a real
one, a graph here holds only weak references to memory that was there before it was captured.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class Borrowed:
    """A tensor by its place in memory that somebody else must keep."""

    def __init__(self, tensor: torch.Tensor):
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.dtype, self.offset, self.shape = tensor.dtype, tensor.storage_offset(), tensor.shape
        self.strides = tensor.stride()

    def tensor(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise RuntimeError("an illegal memory access was encountered")
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.strides)


class CUDAGraph:
    def __init__(self):
        self.calls = []

    def replay(self) -> None:
        with torch.inference_mode():
            for function, arguments, options, outputs in self.calls:
                results = tree_leaves(function(*restored(arguments), **restored(options)))
                for output, result in zip(restored(outputs), results, strict=True):
                    if isinstance(result, torch.Tensor) and result.data_ptr() != output.data_ptr():
                        output.copy_(result)


def restored(values):
    return tree_map_only(Borrowed, Borrowed.tensor, values)


class Capture(TorchDispatchMode):
    """Notes each operation; what it makes is the graph's own, what it is given is the caller's.

    As with CUDA, nothing is done by recording: the caller's memory is put back at the end.
    """

    def __init__(self, graph: CUDAGraph):
        super().__init__()
        self.graph, self.own, self.before = graph, set(), {}

    def __exit__(self, *error):
        super().__exit__(*error)
        for storage, content in self.before.values():
            storage.copy_(content)
        self.before.clear()  # else they would be kept alive here

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        def kept(tensor: torch.Tensor):
            return tensor if tensor.untyped_storage()._cdata in self.own else Borrowed(tensor)

        options = options or {}
        given = tree_leaves((arguments, options))
        storages = {leaf.untyped_storage()._cdata: leaf.untyped_storage() for leaf in given if torch.is_tensor(leaf)}
        for key in storages.keys() - self.own - self.before.keys():
            self.before[key] = storages[key], storages[key].clone()
        noted = tree_map_only(torch.Tensor, kept, (arguments, options))
        outputs = function(*arguments, **options)
        made = [leaf for leaf in tree_leaves(outputs) if torch.is_tensor(leaf)]
        self.own |= {leaf.untyped_storage()._cdata for leaf in made} - storages.keys()
        if function.namespace == "aten":
            self.graph.calls.append((function, *noted, tree_map_only(torch.Tensor, kept, tree_leaves(outputs))))
        return outputs


class Stream:
    def __init__(self, device=None): ...
    def wait_event(self, event): ...
    def wait_stream(self, stream): ...


class Event:
    def record(self, stream): ...
    def synchronize(self): ...


@contextmanager
def fake_cuda(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        for name in ("stream", "device"):
            patch.setattr(torch.cuda, name, lambda _: nullcontext())
        patch.setattr(torch.cuda, "current_stream", Stream)
        patch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
        patch.setattr(torch.cuda, "graph", Capture)
        yield
