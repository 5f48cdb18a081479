import gc
import os
import subprocess
import sys

import pytest
import torch
from fake_cuda import fake_cuda

from transformnet_lib import GRAY_WEIGHTS, Pipeline, TransformNet, methods, test_inference_time
from transformnet_lib.errors import ParameterError
from transformnet_lib.methods import METHODS, STEPS, prepare_pass, prepare_step
from transformnet_lib.model import weighted_model

LOADED = [name for name, method in METHODS.items() if method.loader != "images" and not method.graph]
GRAPHS = {"graph": methods.GraphPass, "pinned": methods.PinnedGraphPass, "overlapped": methods.OverlappedPass}
PASS = {"device": "cpu", "batch_size": 16, "shuffle": False, "drop_last": False}


@pytest.fixture
def model() -> TransformNet:
    return weighted_model(GRAY_WEIGHTS)


@pytest.fixture
def images():
    return torch.rand(50, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# One pass


@pytest.mark.parametrize("method", ["reference", "fast"])
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_one_pass_gives_positive_seconds(model, images, dtype, num_workers, method):
    images = images if dtype == "float32" else (images * 255).to(torch.uint8)
    seconds = test_inference_time(model, images=images, method=method, num_workers=num_workers, **PASS)
    assert isinstance(seconds, float)
    assert seconds > 0


@pytest.mark.parametrize("method", [*LOADED, *GRAPHS])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("drop_last", "processed"), [(True, 48), (False, 50)])
def test_each_method_runs_the_model_on_each_image_once(
    model, images, monkeypatch, method, shuffle, drop_last, processed
):
    images = (images * 255).byte()
    options = {"batch_size": 16, "shuffle": shuffle, "drop_last": drop_last}
    with fake_cuda(monkeypatch), torch.inference_mode():
        work = prepared(model, images, method, **options)
        list(work.outputs())  # an odd or even number of batches before makes no difference
        order, outputs = work.order().tolist(), [output.clone() for output in work.outputs()]
    images = images / 255
    assert [len(output) for output in outputs[:3]] == [16, 16, 16]
    outputs, expected = torch.cat(outputs), model(images).detach()
    assert len(outputs) == processed
    torch.testing.assert_close(outputs, expected[order])
    assert len(set(order)) == processed
    assert (order == sorted(order)) != shuffle


def prepared(model, images, method, **options) -> methods.Pass:
    """A pass on the CPU; one of GRAPHS as it is on CUDA, under `fake_cuda`."""
    device = torch.device("cpu")
    if method in GRAPHS:
        return GRAPHS[method](model.folded(), images, device, **options)
    return prepare_pass(model, images=images, device=device, method=method, **{"num_workers": 0} | options)


@pytest.mark.parametrize("method", [*LOADED, *GRAPHS])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shuffled_pass_is_compared_in_its_own_order(model, images, monkeypatch, method, num_workers):
    targets = model.pipeline(images)
    options = {"batch_size": 16, "shuffle": True, "drop_last": True}
    options |= {} if method in GRAPHS else {"num_workers": num_workers}
    with fake_cuda(monkeypatch):
        work = prepared(model, images, method, **options)
        for _ in range(3):  # timed passes in between, each in another order
            assert work.mse(targets, targets) < 1e-12
            work.seconds()
        error = work.mse(targets.flip(0), targets)
        work.seconds()
        assert error > 1e-3 and work.mse(targets.flip(0), targets) == pytest.approx(
            error
        )  # no other images are dropped


def test_a_graph_keeps_alive_what_it_reads(model, images, monkeypatch):
    with fake_cuda(monkeypatch), torch.inference_mode():
        call = methods.GraphedCall(model.folded(), images.clone())
        gc.collect()
        call.input.copy_(images.flip(0))
        call.replay()
        torch.testing.assert_close(call.output, model(images.flip(0)).detach())


def test_the_fake_graph_notices_what_is_gone(monkeypatch):
    with fake_cuda(monkeypatch), torch.inference_mode():
        call = methods.GraphedCall(torch.nn.Linear(2, 2).requires_grad_(False), torch.ones(1, 2))
        call.replay()
        del call.network
        gc.collect()
        with pytest.raises(RuntimeError, match="illegal memory access"):
            call.replay()


def test_a_shuffled_batch_is_not_gathered_before_its_buffers_last_copy_ended(monkeypatch):
    with fake_cuda(monkeypatch):
        source = methods.PinnedBatches(torch.arange(6, dtype=torch.uint8).view(6, 1), 2)
        waited = []
        for k, event in enumerate(source.copied):
            event.synchronize = lambda k=k: waited.append((k, source.buffers[k].flatten().tolist()))
        batches = [source[torch.tensor(index)][0] for index in ([0, 1], [2, 3], [4, 5], [1])]
    assert [k for k, _ in waited] == [1, 0, 1, 0]
    assert waited[2:] == [(1, [0, 1]), (0, [2, 3])]  # not overwritten yet
    assert [batch.flatten().tolist() for batch in batches[2:]] == [[4, 5], [1]]
    assert batches[3].data_ptr() == source.buffers[0].data_ptr()


@pytest.mark.parametrize("method", ["reference", "fast"])
def test_a_pass_leaves_the_global_generator_alone(model, images, method):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    test_inference_time(model, images=images, method=method, **PASS | {"shuffle": True})
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected a whole number from 1, got 0"),
        ({"num_workers": -1}, "num_workers: expected a whole number from 0, got -1"),
        ({"method": "magic"}, "method: expected one of batched, reference, fast, graph"),
        ({"device": "tpu"}, "device: expected cpu"),
        ({"batch_size": 64, "drop_last": True}, "zero batches: drop_last with batch size 64 and 50 images"),
    ],
)
@pytest.mark.parametrize("method", ["reference", "fast"])
def test_a_setting_that_cannot_run_is_refused(model, images, wrong, message, method):
    with pytest.raises(ParameterError, match=message):
        test_inference_time(model, images=images, **PASS | {"method": method} | wrong)


@pytest.mark.parametrize("shape", [(50, 1, 32, 32), (3, 32, 32), (0, 3, 32, 32)])
def test_images_of_another_shape_are_refused(model, shape):
    with pytest.raises(
        ParameterError, match=rf"expected images of shape \(count, 3, height, width\), got \({shape[0]}"
    ):
        test_inference_time(model, images=torch.zeros(shape), **PASS)


@pytest.mark.parametrize("size", [(28, 28), (4, 4)])  # outputs of more bytes than the images', and of fewer
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_copy_moves_all_bytes_and_only_times_that(images, size, dtype, monkeypatch):
    moved = []
    for name in ("copy_", "zero_", "amax"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, f=original, n=name: moved.append((n, len(self))) or f(self, *a)
        )
    given = (images * 255).byte() if dtype == torch.uint8 else images
    run_pass = methods.copy_pass(given, Pipeline(size), torch.device("cpu"))
    moved.clear()
    assert run_pass() > 0
    count, (copied, *rest) = len(images), moved
    read, written = given.numel() * given.element_size(), count * size[0] * size[1] * 4
    assert copied == ("copy_", min(read, written))
    assert rest == [("zero_", written - read)] * (written > read) + [("amax", read - written)] * (read > written)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shuffle", [True, False])
def test_on_cuda_the_fast_method_gives_every_image_once_too(model, shuffle):
    images = torch.randint(0, 256, (1000, 3, 32, 32)).byte()
    device, options = torch.device("cuda"), {"batch_size": 16, "drop_last": False, "num_workers": 0, "method": "fast"}
    work = prepare_pass(model, images=images, device=device, shuffle=shuffle, **options)
    with torch.inference_mode():
        order = work.order()
        gc.collect()
        torch.cuda.empty_cache()  # what nobody keeps is the driver's again
        junk = [torch.full((2**18,), torch.nan, device=device) for _ in range(100)]
        outputs = torch.cat([output.cpu() for output in work.outputs()])
    assert len(order.unique()) == 1000 and len(junk) == 100
    torch.testing.assert_close(outputs, model(images / 255).detach()[order], rtol=0, atol=1e-6)


@pytest.mark.skipif(sys.platform == "win32", reason="no sockets with paths")
def test_loader_processes_that_cannot_be_reached_are_an_error_in_bounded_time(tmp_path):
    folder = tmp_path / ("x" * 90)  # a socket's path has at most 107 bytes
    folder.mkdir()
    code = """if True:
        import torch
        from transformnet_lib import TransformNet, methods
        methods.LOADER_SECONDS = 3
        options = dict(batch_size=8, shuffle=False, drop_last=False, num_workers=1)
        methods.test_inference_time(TransformNet(), images=torch.zeros(16, 3, 32, 32), device="cpu", **options)
    """
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "RuntimeError: the loader processes gave no batch in 3 s; if TMPDIR is a path of more than" in done.stderr


# Steps within a batch


@pytest.mark.parametrize("name", STEPS)
def test_a_step_does_what_the_pipeline_or_the_model_does_there(model, images, name):
    before, step = STEPS[name](model)
    done = step(before(images))
    resized = model.pipeline.resize(images)
    expected = {
        "resize": resized, "convolution": model.mix(resized), "grayscale": methods._grayscale(resized),
        "flips": resized[:, :1].flip(-1, -2),
    }  # fmt: skip
    torch.testing.assert_close(done, expected[name])
    assert prepare_step(name, model, (images * 255).byte(), torch.device("cpu"), 16)() > 0
