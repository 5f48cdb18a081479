import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from transformnet_lib.dataset import batch_loader
from transformnet_lib.errors import ParameterError


def passes(*, count: int = 50, times: int = 1, **options) -> list[list[list[int]]]:
    """The rows that each batch of each pass gave, by number."""
    loader = batch_loader(torch.arange(count), **options)
    return [[batch.tolist() for (batch,) in loader] for _ in range(times)]


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


@given(st.integers(0, 70), st.integers(1, 80), st.booleans(), st.booleans())
def test_each_row_comes_once_and_only_an_incomplete_batch_is_dropped(count, batch_size, shuffle, drop_last):
    tensor = torch.arange(count)
    loader = batch_loader(tensor, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last)
    plain = DataLoader(TensorDataset(tensor), batch_size=batch_size, drop_last=drop_last)
    for _ in range(2):
        batches = [batch.tolist() for (batch,) in loader]
        assert [len(batch) for batch in batches] == [len(batch) for (batch,) in plain]
        assert len(loader) == len(plain) == len(batches)
        rows = flat(batches)
        assert len(set(rows)) == len(rows)
        assert shuffle or rows == list(range(len(rows)))


def test_each_pass_has_another_order_and_drops_other_rows():
    first, second = passes(times=2, batch_size=16, shuffle=True, drop_last=True)
    assert flat(first) != flat(second)
    assert sorted(flat(first)) != sorted(flat(second))
    assert flat(first) != sorted(flat(first))


def test_the_seed_decides_the_orders():
    options = {"times": 3, "batch_size": 16, "shuffle": True}
    assert passes(**options, seed=1) == passes(**options, seed=1)
    assert passes(**options, seed=1) != passes(**options, seed=2)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_global_generator_is_left_alone(shuffle):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    passes(batch_size=16, shuffle=shuffle)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("shuffle", [True, False])
def test_workers_give_the_same_batches(shuffle):
    options = {"times": 2, "batch_size": 16, "shuffle": shuffle, "drop_last": True}
    alone, with_workers = passes(**options), passes(**options, num_workers=2)
    assert with_workers == alone


def test_targets_stay_with_their_images():
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 3, 4, 5).contiguous()
    for batch, targets in batch_loader(images, torch.arange(50.0), batch_size=16, shuffle=True):
        assert batch.dtype == torch.uint8 and batch.shape[1:] == (3, 4, 5)
        assert torch.equal(batch[:, 0, 0, 0].float(), targets)


def test_batches_in_order_are_views():
    tensor = torch.zeros(50)
    ((batch,), *_) = batch_loader(tensor, batch_size=50)
    assert batch.data_ptr() == tensor.data_ptr()


def test_it_can_be_sent_to_a_worker_that_is_spawned():
    loader = batch_loader(torch.arange(5), batch_size=2)
    for part in (loader.dataset, loader.collate_fn):
        pickle.loads(pickle.dumps(part))


@pytest.mark.parametrize(
    ("tensors", "wrong", "message"),
    [
        ([torch.zeros(5)], {"batch_size": 0}, "batch_size: expected a whole number from 1, got 0"),
        ([torch.zeros(5)], {"batch_size": 2.0}, "batch_size: expected a whole number from 1, got 2.0"),
        ([torch.zeros(5)], {"num_workers": -1}, "num_workers: expected a whole number from 0, got -1"),
        ([torch.zeros(5), torch.zeros(4)], {}, "expected tensors of equal length, got 5, 4"),
        ([], {}, "expected tensors of equal length, got none"),
    ],
)
def test_what_cannot_be_loaded_is_refused(tensors, wrong, message):
    with pytest.raises(ParameterError, match=message):
        batch_loader(*tensors, **{"batch_size": 2} | wrong)
