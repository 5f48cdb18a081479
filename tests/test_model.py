import copy
import io
import pickle
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from transformnet_lib import GRAY_WEIGHTS, Pipeline, TransformNet, model
from transformnet_lib.model import seeded_model
from transformnet_lib.pipeline import to_float


@pytest.fixture
def images():
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def exact(pipeline: Pipeline) -> TransformNet:
    model = TransformNet(pipeline)
    with torch.no_grad():
        model.mix.weight.copy_(torch.tensor(GRAY_WEIGHTS).view(1, 3, 1, 1))
    return model


def test_only_three_weights_are_learned_and_there_is_no_bias():
    assert [tuple(parameter.shape) for parameter in TransformNet().parameters()] == [(1, 3, 1, 1)]


@pytest.mark.parametrize("hflip", [True, False])
@pytest.mark.parametrize("vflip", [True, False])
@pytest.mark.parametrize("size", [(28, 28), (40, 17)])
def test_with_the_right_weights_it_equals_the_pipeline(images, hflip, vflip, size):
    steps = [v2.Resize(size, antialias=True), v2.Grayscale()]
    steps += [v2.RandomHorizontalFlip(p=1)] * hflip + [v2.RandomVerticalFlip(p=1)] * vflip
    expected = v2.Compose(steps)(images)
    output = exact(Pipeline(size=size, hflip=hflip, vflip=vflip))(images)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


def test_output_is_clamped_to_an_image(images):
    model = TransformNet()
    with torch.no_grad():
        model.mix.weight.fill_(5)
        assert model(images).max() == 1
        model.mix.weight.fill_(-5)
        assert model(images).min() == 0


def test_float64_stays_float64(images):
    assert TransformNet().double()(images.double()).dtype == torch.float64


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(3, 32, 32), torch.zeros(2, 1, 32, 32), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)],
)
def test_other_shapes_and_dtypes_are_refused_naming_them(wrong):
    with pytest.raises(ValueError, match=rf"expected float images .* got {str(wrong.dtype)[6:]}"):
        TransformNet()(wrong)


def test_seeded_model_repeats_and_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again, other = (seeded_model(seed).weights for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.rand(3), expected)


# The folded form


def sides(most: int):
    return st.tuples(*[st.integers(2, most)] * 4)


def differs(model: TransformNet, folded, images: torch.Tensor, as_float: torch.Tensor) -> float:
    return (model(as_float) - folded(images)).abs().max().item()


@settings(deadline=None)  # the first example pays for imports
@given(sides(64), st.booleans(), st.booleans(), st.integers(0, 99))
def test_the_folded_model_equals_the_eager_one_and_the_pipeline(sides, hflip, vflip, seed):
    height, width, *size = sides
    model = exact(Pipeline(tuple(size), hflip, vflip)).requires_grad_(False)
    pixels = torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(seed)).byte()
    images = to_float(pixels)
    folded = model.folded()
    assert differs(model, folded, images, images) <= 1e-6
    assert differs(model, folded, pixels, images) <= 1e-6
    assert differs(model.pipeline, folded, pixels, images) <= 1e-6


@settings(deadline=None, max_examples=40)
@given(sides(512), st.booleans(), st.booleans(), st.integers(0, 99))
def test_they_are_equal_for_large_images_and_any_weights(sides, hflip, vflip, seed):
    height, width, *size = sides
    model = seeded_model(seed, Pipeline(tuple(size), hflip, vflip)).double().requires_grad_(False)
    pixels = torch.randint(0, 256, (1, 3, height, width), generator=torch.Generator().manual_seed(seed)).byte()
    images = pixels.double() / 255
    assert differs(model, model.folded(), images, images) <= 1e-6
    assert differs(model, model.folded(), pixels, images) <= 1e-6


@pytest.mark.parametrize(("size", "hflip"), [((28, 28), True), ((28, 32), False), ((32, 32), True)])
def test_the_two_forms_of_the_left_product_agree(images, monkeypatch, size, hflip):
    folded = exact(Pipeline(size, hflip=hflip)).folded()
    expected = folded(images)
    _, right, clips = folded.fold(images)
    left = torch.zeros(size[0], 3 * 32)
    one = folded.fold(images[:1])[0]
    rows = torch.arange(size[0]).repeat_interleave(one["offsets"].diff())
    left[rows, one["input"].long()] = one["per_sample_weights"]
    monkeypatch.setattr(folded, "fold", lambda images: (left, right, clips))  # as on a GPU
    folded.kept.clear()
    torch.testing.assert_close(folded(images), expected, rtol=0, atol=1e-6)


def test_the_folded_output_is_clamped_and_keeps_the_images(images):
    before, pixels = images.clone(), (images * 255).byte()
    model = TransformNet()
    with torch.no_grad():
        model.mix.weight.fill_(5)
        assert model.folded()(images).max() == model.folded()(pixels).max() == 1
        model.mix.weight.fill_(-5)
        assert model.folded()(images).min() == model.folded()(pixels).min() == 0
    assert exact(Pipeline()).folded()(images + 1).max() == 1
    assert torch.equal(images, before)


def test_the_folded_model_needs_no_gradients_and_follows_the_dtype(images):
    assert not TransformNet().folded()(images).requires_grad
    assert TransformNet().double().folded()((images * 255).byte()).dtype == torch.float64


def test_batches_of_any_size_and_layout_are_taken(images):
    folded = TransformNet().folded()
    whole = folded(images)
    assert torch.equal(torch.cat([folded(batch) for batch in images.split(2)]), whole)
    assert torch.equal(folded(images.to(memory_format=torch.channels_last)), whole)
    assert folded(images[:0]).shape == (0, 1, 28, 28)


def test_what_is_kept_is_bounded(images):
    folded = TransformNet().folded()
    for side in range(2, 2 * model.KEPT_SHAPES):
        folded(images[..., :side])
        assert len(folded.kept) <= model.KEPT_SHAPES


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(3, 32, 32), torch.zeros(2, 1, 32, 32), torch.zeros(2, 3, 32, 32, dtype=torch.float64)],
)
def test_the_folded_model_refuses_other_shapes_and_dtypes(wrong):
    with pytest.raises(ValueError, match=rf"expected uint8 or float32 images .* got {str(wrong.dtype)[6:]}"):
        TransformNet().folded()(wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_folded_model_is_the_same_on_cuda(images):
    folded = exact(Pipeline()).folded()
    expected = folded(images)
    for place in ("cpu", "cuda"):  # of the buffers
        folded.to(place)
        torch.testing.assert_close(folded(images), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(folded(images.cuda()).cpu(), expected, rtol=0, atol=1e-6)
    with torch.autocast("cuda"):
        torch.testing.assert_close(folded(images.cuda()).cpu(), expected, rtol=0, atol=1e-6)


def test_a_folded_model_that_was_first_used_without_gradients_can_give_them():
    folded = exact(Pipeline()).folded()
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        folded(images)
    images.requires_grad_()
    folded(images).sum().backward()
    assert images.grad.abs().sum() > 0


def test_a_folded_state_brings_its_weights(images):
    pipeline = Pipeline((20, 24), hflip=False)
    one, other = exact(pipeline).folded(), seeded_model(0, pipeline).folded()
    one(images)  # keeps matrices, which must not be used again
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    assert state["geometry"].tolist() == [20, 24, False, True] and state["geometry"].dtype == torch.int64
    one.load_state_dict(state)
    assert torch.equal(one.weights, other.weights)
    assert torch.equal(one(images), other(images))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("pipeline", [Pipeline((28, 20)), Pipeline(hflip=False), Pipeline(vflip=False)])
def test_a_folded_state_of_another_geometry_is_refused_and_changes_nothing(images, pipeline, strict):
    whole = torch.nn.Sequential(exact(Pipeline()).folded())
    expected = whole(images)
    with pytest.raises(RuntimeError, match=r"0\.geometry: expected .* = \[28, 28, 1, 1\], got \[.*; fold a model of"):
        whole.load_state_dict(torch.nn.Sequential(TransformNet(pipeline).folded()).state_dict(), strict=strict)
    assert torch.equal(whole(images), expected)


@pytest.mark.parametrize(
    "change", ["copy", "compiled copy", "replace", "call", "meta", "data", "numpy", "swap", "inference"]
)
def test_other_weights_count_however_they_came(images, change):
    folded, other = exact(Pipeline()).folded(), seeded_model(0).folded()
    if change == "compiled copy":
        folded = torch.compile(folded, backend="eager")
    folded(images)
    if change.endswith("copy"):
        folded.weights.copy_(other.weights)
    elif change == "replace":
        folded.weights = other.weights.clone()
    elif change == "data":
        folded.weights.data = other.weights.clone()
    elif change == "numpy":
        folded.weights.numpy()[:] = other.weights.numpy()
    elif change == "swap":
        torch.utils.swap_tensors(folded.weights, other.weights.clone())
    elif change == "inference":
        with torch.inference_mode():
            folded.load_state_dict(folded.state_dict() | {"weights": torch.rand(3)}, assign=True)
            folded(images)
            folded.load_state_dict(other.state_dict())
    elif change == "meta":
        folded = exact(Pipeline()).folded().to("meta")
        folded.load_state_dict(other.state_dict(), assign=True)
    called = (
        torch.func.functional_call(folded, dict(other.named_buffers()), images) if change == "call" else folded(images)
    )
    assert torch.equal(called, other(images))


def test_a_folded_model_converted_in_inference_mode_can_load_weights_outside_of_it(images):
    folded = exact(Pipeline()).folded()
    with torch.inference_mode():
        folded.double()
    folded.load_state_dict(seeded_model(0).folded().double().state_dict())
    assert torch.equal(folded(images.double()), seeded_model(0).double().folded()(images.double()))


def test_weights_that_are_loaded_while_another_call_makes_matrices_count_from_then_on(images, monkeypatch):
    one, other = exact(Pipeline()).folded(), seeded_model(0).folded()
    whole = one.axis_matrix

    def meanwhile(*arguments):
        one.load_state_dict(other.state_dict())
        return whole(*arguments)

    monkeypatch.setattr(one, "axis_matrix", meanwhile)
    one(images)
    monkeypatch.undo()
    assert torch.equal(one(images), other(images))


def test_a_model_folded_in_inference_mode_can_load_weights_outside_of_it(images):
    with torch.inference_mode():
        folded = exact(Pipeline()).folded()
    other = seeded_model(0).folded()
    folded.load_state_dict(other.state_dict())
    assert torch.equal(folded(images), other(images))


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float64, 2e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)], ids=str
)
def test_a_folded_model_can_be_converted_after_it_was_used(images, dtype, atol):
    pixels = (images * 255).byte()
    folded = exact(Pipeline()).folded()
    expected = folded(pixels)
    output = folded.to(dtype)(pixels)
    assert output.dtype == dtype and folded.geometry.dtype == torch.int64
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=atol)
    torch.testing.assert_close(folded(images.to(dtype)).float(), expected, rtol=0, atol=atol + 1 / 255)
    torch.testing.assert_close(folded.float()(images), exact(Pipeline()).folded()(images), rtol=0, atol=atol)


def test_white_in_half_precision_is_rounded_to_no_more_than_white():
    folded = TransformNet(Pipeline((72, 53))).folded().bfloat16()
    folded.weights.copy_(torch.tensor([0.703125, 0.1328125, 0.1640625]))  # their sum is rounded to below 1
    assert folded(torch.full((1, 3, 8, 10), 255, dtype=torch.uint8)).max() == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_folded_model_is_its_own(images, copied):
    folded = exact(Pipeline()).folded()
    expected = folded(images)
    for _ in range(2):
        folded.load_state_dict(folded.state_dict())  # writes that the copy has not counted
    assert torch.equal(folded(images), expected)
    other = copied(folded)
    assert not other.kept  # on a GPU only the count of writes tells, and a copy's begins again
    assert torch.equal(other(images), expected)
    other.load_state_dict(seeded_model(0).folded().state_dict())
    assert not torch.equal(other(images), expected)
    assert torch.equal(folded(images), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_changes_nothing(images, compiled):
    expected = exact(Pipeline()).folded()(images)
    folded = exact(Pipeline()).folded()
    if compiled:
        folded = torch.compile(folded, backend="eager")
    with torch.autocast("cpu"):
        first, again = folded(images), folded(images)  # makes its matrices, has them
        with torch.inference_mode():
            without = folded(images)
        images.requires_grad_()
        folded(images).sum().backward()
    for output in (first, again, without):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    assert images.grad.abs().sum() > 0


def test_no_matrices_are_needed_for_the_shape_of_an_output():
    assert TransformNet().folded()(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 1, 28, 28)


def test_what_threads_that_share_a_model_keep_is_bounded(images):
    class Slow(dict):
        """So that threads find the same number kept, and each adds to it."""

        def __len__(self):
            number = super().__len__()
            time.sleep(0.001)
            return number

    folded, threads, most, wrong = exact(Pipeline()).folded(), 8, [], []
    folded.kept = Slow()
    batches = [images[..., :side] for side in range(2, 33)]
    expected = [exact(Pipeline()).folded()(batch) for batch in batches]

    def work(k: int):
        for i in range(k, k + 3 * len(batches), 3):
            batch, right = batches[i % len(batches)], expected[i % len(batches)]
            wrong.extend([] if torch.equal(folded(batch), right) else [i])
            most.append(len(folded.kept))

    workers = [threading.Thread(target=work, args=(k,)) for k in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(most) == threads * len(batches) and wrong == []
    assert max(most) < model.KEPT_SHAPES + threads
