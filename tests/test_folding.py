"""A folded pipeline in the pipeline's place: equal, whoever calls it and from where, and never worse."""

import copy
import multiprocessing
import pickle
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from transformnet_lib import kernels
from transformnet_lib.errors import ParameterError
from transformnet_lib.folding import FoldedTransform, fold
from transformnet_lib.identification import NotSeparable, identify

SHAPE = (3, 60, 80)


def pipeline():
    """Resize, crop and Normalize, as for ImageNet but small."""
    return v2.Compose([v2.Resize(40), v2.CenterCrop(32), v2.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))])


def images(count: int = 6, *, dtype=torch.float32) -> torch.Tensor:
    pixels = torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return pixels if dtype == torch.uint8 else pixels / 255


@pytest.fixture(scope="module")
def folded():
    """Folded whatever the clock says: which of the two is faster is another test's."""
    return always_folded(pipeline(), SHAPE)


def always_folded(transform, *shapes, dtype=torch.float32) -> FoldedTransform:
    made = FoldedTransform(transform)
    made._timed = lambda *_: (0.0, 1.0)
    for shape in shapes:
        made.prepare(shape, dtype)
    del made._timed
    assert len(made.folded) == len(shapes)
    return made


def assert_same(output, transform=None, batch=None) -> None:
    expected = (transform or pipeline())(images() if batch is None else batch)
    assert output.shape == expected.shape and output.dtype == expected.dtype
    assert (output - expected).abs().max() < 1e-4


def test_batches_and_single_images_are_what_the_pipeline_gives(folded):
    assert_same(folded(images()))
    assert_same(folded(images()[0])[None], batch=images()[:1])
    assert_same(folded(images().flip(0)), batch=images().flip(0))  # not contiguous
    assert folded(images(0)).shape == (0, 3, 32, 32)


def test_bytes_give_what_they_gave_within_the_rounding(monkeypatch):
    floats = v2.Compose([v2.Resize(40), v2.CenterCrop(32), v2.ToDtype(torch.float32, scale=True)])
    for transform, level in ((floats, 1 / 255), (v2.Compose([v2.Resize(40), v2.CenterCrop(32)]), 1)):
        made = always_folded(transform, SHAPE, dtype=torch.uint8)
        output, expected = made(images(dtype=torch.uint8)), transform(images(dtype=torch.uint8))
        assert output.dtype == expected.dtype
        assert (output.double() - expected.double()).abs().max() <= 1.01 * level


def test_the_loops_equal_the_plain_form():
    cases = [
        (pipeline(), SHAPE), (v2.Grayscale(), (3, 20, 30)), (lambda x: x[:, [2, 0]], (3, 20, 30)),
        (v2.Pad(3, fill=0.5), (1, 9, 8)), (lambda x: (1.1 * v2.functional.hflip(x)).clamp(0, 1), (3, 20, 30)),
    ]  # fmt: skip
    for transform, shape in cases:
        separable = identify(transform, shape)
        for dtype in (torch.uint8, torch.float32):
            batch = torch.randint(0, 256, (5, *shape), dtype=torch.uint8)
            batch = batch if dtype == torch.uint8 else batch / 255
            assert (kernels.apply(kernels.Bands.of(separable), batch) - separable(batch)).abs().max() < 2e-6


def test_a_size_is_folded_once_enough_images_of_it_came_by(monkeypatch):
    made = FoldedTransform(pipeline(), after=10)
    monkeypatch.setattr(made, "_timed", lambda *_: (0.0, 1.0))
    made(images())
    assert not made.folded
    assert_same(made(images()))
    assert list(made.folded) == [(SHAPE, torch.float32)]
    assert_same(made(images()))


def test_what_is_refused_goes_through_the_transform_and_a_warning_says_so_once():
    made = FoldedTransform(lambda x: (4 * x).floor() / 4, after=0)
    with pytest.warns(UserWarning, match=r"float32 images of 3×60×80 go through the transform itself: .*not linear"):
        output = made(images())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(made(images()), output)
    assert torch.equal(output, (4 * images()).floor() / 4)
    with pytest.raises(NotSeparable, match="not linear"):
        fold(lambda x: (4 * x).floor() / 4, SHAPE)


def test_what_would_be_slower_folded_is_not_folded(monkeypatch):
    monkeypatch.setattr(FoldedTransform, "_timed", lambda *_: (2.0, 1.0))
    with pytest.warns(UserWarning, match="it would take 2 s where the transform takes 1 s"):
        made = fold(pipeline(), SHAPE)
    assert not made.folded and made.refused
    assert torch.equal(made(images()), pipeline()(images()))


def test_a_copy_and_a_pickle_do_the_same(folded):
    for twin in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert twin.folded
        assert_same(twin(images()))


def test_many_threads_may_share_it(folded):
    with ThreadPoolExecutor(4) as pool:
        for output in pool.map(folded, [images()] * 20):
            assert_same(output)


def test_one_thread_of_torchs_is_enough(folded):
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            assert_same(folded(images()))
        finally:
            torch.set_num_threads(before)


class Collated:
    """What a user gives to a DataLoader in the transform's place."""

    def __init__(self, folded):
        self.folded = folded

    def __call__(self, rows):
        return self.folded(torch.stack([row for (row,) in rows]))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_loader_may_use_it(folded, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on {sys.platform}")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        folded(images())  # so that there are threads, which a fork leaves behind
        loader = DataLoader(
            TensorDataset(images()), 3, collate_fn=Collated(folded), num_workers=2, multiprocessing_context=method,
            timeout=60,
        )  # fmt: skip
        assert_same(torch.cat(list(loader)))
    finally:
        torch.set_num_threads(before)


def test_a_child_has_a_pool_of_its_own(folded):
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no fork on {sys.platform}")
    list(kernels._pool(2).map(int, "12"))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(sum_in_threads).get(timeout=60) == 3


def sum_in_threads() -> int:
    return sum(kernels._pool(2).map(int, "12"))


def test_autocast_changes_nothing(folded, monkeypatch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(folded(images()))
        for each in folded.folded.values():
            monkeypatch.setattr(each, "bands", None)
        assert_same(folded(images()))


def test_gradients_flow_to_images_that_ask_for_them(folded):
    batch = images().requires_grad_()
    folded(batch).sum().backward()
    other = images().requires_grad_()
    pipeline()(other).sum().backward()
    assert (batch.grad - other.grad).abs().max() < 1e-4


@pytest.mark.slow
def test_compiled_it_does_the_same(folded):
    model = torch.nn.Sequential(folded, torch.nn.Flatten())
    assert_same(torch.compile(model, backend="eager")(images()).view(6, 3, 32, 32))


def test_on_another_device_the_matrices_are_moved_once(folded):
    output = folded(images().to("meta"))
    assert output.shape == (6, 3, 32, 32) and output.device.type == "meta"
    (each,) = folded.folded.values()
    assert list(each.moved) == [torch.device("meta")] and each.moved[torch.device("meta")].rows.device.type == "meta"
    assert_same(folded(images()))


def test_without_numba_it_does_the_same(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda: False)
    monkeypatch.setattr(kernels, "apply", None)
    assert_same(always_folded(pipeline(), SHAPE)(images()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fold(pipeline())("a picture"), "expected a tensor of images, got str"),
        (lambda: fold(3), "transform: expected something to call on images, got 3"),
        (lambda: fold(pipeline(), SHAPE, dtype=torch.float64), "dtype: expected torch.float32 or torch.uint8"),
        (lambda: fold(pipeline(), (3, 0, 5)), r"expected a shape \(channels, height, width\), got \(3, 0, 5\)"),
        (lambda: fold(v2.Grayscale(), (2, 60, 80)), "it raised"),
    ],
)
def test_bad_input_is_one_line(make, message):
    with pytest.raises((ParameterError, NotSeparable), match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
