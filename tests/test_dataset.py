"""The data set of image and target pairs, and its split."""

import numpy as np
import pytest
import torch
from conftest import noise, refusal, save
from test_pipeline import written_out

from transformnet_lib.dataset import CustomDataset, split_indices
from transformnet_lib.errors import ParameterError
from transformnet_lib.images import load_images
from transformnet_lib.pipeline import Pipeline

# CustomDataset


@pytest.mark.parametrize("cache", [True, False])
def test_items_are_float_pairs_from_0_to_1(tmp_path, cache):
    dataset = CustomDataset(tmp_path, False, cache, limit=20)  # the assignment's call; there is no CIFAR-10
    pixels = load_images("photos", train=False, limit=20).pixels.numpy()
    assert (dataset.source, dataset.split, len(dataset)) == ("photos", "test", 20)
    assert dataset.request["data"] == "photos"
    for i in (0, 7, 19):
        image, target = dataset[i]
        assert image.shape == (3, 32, 32) and target.shape == (1, 28, 28)
        assert image.dtype == target.dtype == torch.float32
        assert np.array_equal(image.numpy(), pixels[i].astype(np.float32) / np.float32(255))
        assert target.min() >= 0 and target.max() <= 1
        torch.testing.assert_close(target, written_out(image, (28, 28), True, True), rtol=0, atol=1e-6)


def test_cached_targets_equal_uncached_ones_for_any_pipeline(tree, monkeypatch):
    monkeypatch.setattr("transformnet_lib.dataset.TARGET_BATCH", 3)
    options = {"data": f"folder:{tree}", "pipeline": Pipeline((5, 4), hflip=False)}
    cached, uncached = (CustomDataset(cache=cache, **options) for cache in (True, False))
    assert cached.targets.shape == (7, 1, 5, 4) and uncached.targets is None
    for (image, target), (same_image, same_target) in zip(cached, uncached, strict=False):
        assert torch.equal(image, same_image)
        torch.testing.assert_close(target, same_target, rtol=0, atol=1e-6)
        torch.testing.assert_close(target, written_out(image, (5, 4), False, True), rtol=0, atol=1e-6)


@pytest.mark.parametrize("limit", [3, None])
def test_images_are_held_once_as_bytes_and_only_those_asked_for(tree, limit):
    dataset = CustomDataset(data=f"folder:{tree}", limit=limit, cache=False)
    tensors = [value for value in vars(dataset).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == (limit or 7) * 3 * 9 * 7


def test_a_limited_dataset_does_not_keep_all_photos():
    dataset = CustomDataset(data="photos", train=False, limit=10, cache=False)
    assert dataset.images.untyped_storage().nbytes() == 10 * 3 * 32 * 32


def test_a_dataset_can_be_asked_for_again_from_its_request(tree):
    dataset = CustomDataset(tree, data=f"folder:{tree}", limit=4, fit="crop", image_size=5)
    again = CustomDataset(**dataset.request)
    assert again.fingerprint == dataset.fingerprint and again.request == dataset.request


def test_the_other_split_is_cropped_to_the_size_of_the_first(tmp_path):
    save(tmp_path / "train/1.png", noise(8, 12, 3))
    save(tmp_path / "test/1.png", noise(30, 20, 3))
    trained = CustomDataset(tmp_path, data=f"folder:{tmp_path}", fit="crop")
    assert CustomDataset(**trained.request, train=False).images.shape == trained.images.shape == (1, 3, 8, 8)


# split_indices


@pytest.mark.parametrize(("count", "expected"), [(50_000, [45_000, 5_000]), (10, [9, 1]), (7, [6, 1])])
def test_a_split_parts_all_images_and_repeats_none(count, expected):
    parts = split_indices(count)
    assert [len(part) for part in parts] == expected
    assert sorted(torch.cat(parts).tolist()) == list(range(count))


def test_a_split_depends_on_its_seed_alone():
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = split_indices(100, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, split_indices(100, seed=3), strict=True))
    assert not torch.equal(first[1], split_indices(100, seed=4)[1])
    assert first[1].tolist() != sorted(first[1].tolist())  # shuffled


@pytest.mark.parametrize(("count", "val_fraction"), [(0, 0.1), (4, 0.1), (10, 0.0), (10, 1.0)])
def test_too_few_images_for_a_split_are_refused(count, val_fraction):
    message = refusal(lambda: split_indices(count, val_fraction=val_fraction), ParameterError)
    assert f"at least one training and one validation image, got {count} images" in message
