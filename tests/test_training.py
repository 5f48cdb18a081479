import gc
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from fake_cuda import fake_cuda
from torch.utils.data import BatchSampler, DataLoader

from transformnet_lib import GRAY_WEIGHTS, CustomDataset, EarlyStopping, TrainConfig, train
from transformnet_lib.dataset import split_indices
from transformnet_lib.errors import DataError, ParameterError, TrainingError
from transformnet_lib.model import seeded_model
from transformnet_lib.normal_equations import least_squares_of
from transformnet_lib.resized import ResizedImages
from transformnet_lib.training import Trainer, finish


def paper(**changes) -> TrainConfig:
    return TrainConfig.from_preset("paper", device="cpu", **changes)


def test_the_paper_preset_is_the_papers_recipe():
    config = TrainConfig()
    assert (config.lr, config.batch_size, config.epochs) == (2e-3, 256, 30)
    assert (config.min_delta, config.patience, config.val_fraction) == (1e-4, 4, 0.1)


# Early stopping


def test_an_improvement_of_exactly_min_delta_counts():
    stopping = EarlyStopping(min_delta=0.25, patience=1)
    assert [stopping.improved(loss) for loss in (1.0, 0.75, 0.75, 0.5)] == [True, True, False, True]


def test_ties_are_misses_with_min_delta_zero():
    stopping = EarlyStopping(min_delta=0, patience=2)
    assert [stopping.improved(1.0) for _ in range(3)] == [True, False, False]
    assert stopping.should_stop


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_counts_as_a_miss(bad):
    stopping = EarlyStopping(min_delta=0, patience=3)
    assert not stopping.improved(bad)
    assert stopping.improved(1.0)
    assert not stopping.improved(bad)
    assert (stopping.best, stopping.misses) == (1.0, 1)


def test_misses_must_follow_each_other():
    stopping = EarlyStopping(min_delta=0.1, patience=2)
    for loss in (1.0, 1.0, 0.5, 0.5):
        stopping.improved(loss)
        assert not stopping.should_stop
    stopping.improved(0.5)
    assert stopping.should_stop


@pytest.mark.parametrize("patience", [0, 1])
def test_patience_of_0_or_1_stops_at_the_first_miss_but_not_before(patience):
    stopping = EarlyStopping(min_delta=0, patience=patience)
    stopping.improved(1.0)
    assert not stopping.should_stop
    stopping.improved(1.0)
    assert stopping.should_stop


# The loop


class PlainWhitened(torch.nn.Module):
    """A TransformNet whose weights are w = basis v, with v to be trained, in float64 as it was derived on paper."""

    def __init__(self, model, moment):
        super().__init__()
        self.model, factor = model, torch.linalg.cholesky(moment)
        self.basis = torch.linalg.inv(factor.mT)
        self.v = torch.nn.Parameter(factor.mT @ model.mix.weight.detach().double().flatten())

    def forward(self, images):
        weights = (self.basis @ self.v).float().view(1, 3, 1, 1)
        return self.model.pipeline.flip(torch.nn.functional.conv2d(self.model.pipeline.resize(images), weights))


@pytest.mark.parametrize("preset", ["paper", "precise"])
def test_losses_equal_a_plain_dataloader_loop_over_the_module(preset, train_set):
    config = TrainConfig.from_preset(preset, device="cpu", seed=1, epochs=3, batch_size=64)
    fast = train(train_set, config)

    indices, val = split_indices(len(train_set), val_fraction=0.1, seed=config.seed)
    val_images, val_targets = next(iter(DataLoader(train_set, sampler=val.tolist(), batch_size=len(val))))
    model = seeded_model(config.seed)
    if preset == "precise":
        every, _ = next(iter(DataLoader(train_set, sampler=indices.tolist(), batch_size=len(indices))))
        colours = model.pipeline.resize(every).transpose(0, 1).reshape(3, -1).double()
        model = PlainWhitened(model, colours @ colours.mT / colours.shape[1])
    trained = [model.v if preset == "precise" else model.mix.weight]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    steps = 3 * math.ceil(len(indices) / 64)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if preset == "precise" else None
    generator = torch.Generator().manual_seed(config.seed)
    for epoch in range(config.epochs):
        order = indices[torch.randperm(len(indices), generator=generator)].tolist()
        summed = 0.0
        for images, targets in DataLoader(train_set, batch_sampler=BatchSampler(order, config.batch_size, False)):
            loss = torch.nn.functional.mse_loss(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if cosine:
                cosine.step()
            summed += loss.item() * len(images)
        with torch.no_grad():
            val_mse = torch.nn.functional.mse_loss(model(val_images).clamp(0, 1), val_targets).item()
        row = fast.history.iloc[epoch]
        assert row["train_mse"] == pytest.approx(summed / len(indices), rel=1e-4)
        assert row["val_mse"] == pytest.approx(val_mse, rel=1e-4)


@pytest.mark.parametrize("preset", ["paper", "precise"])
def test_resizing_batch_by_batch_gives_the_losses_of_resizing_once(preset, train_set, monkeypatch):
    config = TrainConfig.from_preset(preset, device="cpu", epochs=2, batch_size=64)
    kept = train(train_set, config)
    monkeypatch.setattr("transformnet_lib.resized.KEEP_BYTES", 600 * 3 * 28 * 28 * 4 - 1)
    assert not ResizedImages(train_set, torch.device("cpu")).kept
    streamed = train(train_set, config)
    columns = ["train_mse", "val_mse", "red", "green", "blue"]
    assert streamed.history[columns].equals(kept.history[columns])


def test_targets_that_are_not_cached_are_computed(train_set, monkeypatch):
    lazy = CustomDataset(data="photos", train=True, limit=600, cache=False)
    cached, kept = train(train_set, paper(epochs=1)), train(lazy, paper(epochs=1))
    monkeypatch.setattr("transformnet_lib.resized.KEEP_BYTES", 0)
    streamed = train(lazy, paper(epochs=1))
    assert lazy.targets is None
    assert cached.model.weights == kept.model.weights == streamed.model.weights


def test_known_weights_are_recovered_by_the_precise_preset(train_set):
    result = train(train_set, TrainConfig.from_preset("precise", device="cpu", batch_size=32))
    np.testing.assert_allclose(result.model.weights, GRAY_WEIGHTS, atol=2e-6)
    assert result.best_val_mse < 1e-12


def test_a_start_without_gradient_is_noticed_by_paper_and_survived_by_precise(train_set):
    assert train(train_set, paper(seed=3)).no_gradient  # seed 3 starts with three negative weights
    precise = train(train_set, TrainConfig.from_preset("precise", device="cpu", seed=3, batch_size=32))
    assert not precise.no_gradient
    np.testing.assert_allclose(precise.model.weights, GRAY_WEIGHTS, atol=2e-6)


def test_best_weights_are_those_of_a_run_stopped_at_the_best_epoch(train_set):
    config = paper(lr=0.5, batch_size=32)
    result = train(train_set, config)
    assert result.best_epoch < len(result.history)  # else there is nothing to restore
    trainer = Trainer(train_set, config)
    for _ in range(result.best_epoch):
        trainer.run_epoch()
    assert result.model.weights == tuple(trainer.weights().double().tolist())


def test_the_same_seed_gives_the_same_training_and_another_seed_another(train_set):
    first, again, other = (train(train_set, paper(seed=seed, epochs=2)) for seed in (0, 0, 1))
    assert first.history["val_mse"].tolist() == again.history["val_mse"].tolist() != other.history["val_mse"].tolist()


@pytest.mark.parametrize(("preset", "began"), [("paper", 1), ("paper", 3), ("precise", 2)])
@pytest.mark.parametrize("weights", [math.nan, math.inf])
def test_a_loss_that_stays_not_finite_is_an_error_after_patience_naming_where_it_began(
    preset, began, weights, train_set, monkeypatch
):
    epochs, trained = Trainer.run_epoch, []

    def spoiled(self):
        trained.append(len(self.history) + 1)
        if trained[-1] == began:
            self.trained.fill_(weights)
        return epochs(self)

    monkeypatch.setattr(Trainer, "run_epoch", spoiled)
    with pytest.raises(TrainingError, match=f"^from epoch {began} on the loss is not finite"):
        decay_steps = 1 if preset == "precise" else None  # else its patience begins only after 350 steps
        train(train_set, TrainConfig.from_preset(preset, device="cpu", min_delta=0.0, decay_steps=decay_steps))
    assert trained[-1] == began + 3  # patience is 4


def test_an_epoch_that_is_not_finite_is_a_miss_and_can_be_made_good(train_set, monkeypatch):
    validated, losses = Trainer.run_epoch, iter([0.5, math.nan, math.inf, math.nan, 0.25, 1.0, 1.0])

    def scripted(self):
        loss, improved = next(losses), self.stopping.improved
        with monkeypatch.context() as patch:
            patch.setattr(self.stopping, "improved", lambda _: improved(loss))
            row = validated(self)
        row["val_mse"] = loss
        return row

    monkeypatch.setattr(Trainer, "run_epoch", scripted)
    result = train(train_set, paper(epochs=7))
    assert (result.best_epoch, result.best_val_mse, len(result.history)) == (5, 0.25, 7)


def test_a_gradient_lost_on_the_way_is_no_start_without_one(train_set):
    result = train(train_set, paper(lr=5.0, seed=2, batch_size=16))
    assert result.best_epoch > 0 and not result.no_gradient


def test_images_that_are_all_black_are_no_start_without_gradient():
    black = CustomDataset(data="photos", train=True, limit=100)
    black.images.zero_()
    black.targets.zero_()
    assert not train(black, paper(epochs=1)).no_gradient


# Bad input


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"patience": -1},
        {"seed": -1},
        {"seed": 2**63},
        {"lr": -1.0},
        {"lr": 0},
        {"lr": 1e-60},
        {"lr": 1e300},
        {"lr": "0.1"},
        {"lr": math.nan},
        {"min_delta": 10**400},
        {"batch_size": 2.0},
        {"batch_size": 2**63},
        {"device": 3},
        {"preset": ["paper"]},
        {"min_delta": math.nan},
        {"weight_decay": math.inf},
        {"val_fraction": 0},
        {"val_fraction": 1},
        {"epochs": "30"},
        {"epochs": True},
        {"clamp": "true"},
        {"decay_steps": 0},
    ],
)
def test_a_config_out_of_range_is_refused_naming_field_and_value(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ParameterError, match=rf"^{name}: expected .* got {re.escape(repr(value))}$"):
        TrainConfig(**wrong)


def test_unknown_presets_and_devices_are_refused(train_set):
    with pytest.raises(ParameterError, match="preset: expected one of paper, precise, got 'best'"):
        TrainConfig.from_preset("best")
    with pytest.raises(ParameterError, match="preset: expected one of paper, precise, got \\['paper'\\]"):
        TrainConfig.from_preset(["paper"])
    with pytest.raises(ParameterError, match="device: expected cpu"):
        train(train_set, paper().__class__(device="gpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused(train_set):
    with pytest.raises(ParameterError, match="this machine has no cuda; present: cpu"):
        train(train_set, TrainConfig(device="cuda"))


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def assert_same_training(first: Trainer, second: Trainer) -> None:
    """What holds between machines: the same path and restored epoch, and `precise` at the least-squares weights."""
    weights, others = (pd.DataFrame(trainer.history)[["red", "green", "blue"]] for trainer in (first, second))
    np.testing.assert_allclose(weights, others, atol=1e-5)
    assert first.best_epoch == second.best_epoch
    if first.config.preset == "precise":
        optimum = least_squares_of(first.resized).weights
        for trainer in (first, second):
            np.testing.assert_allclose(trainer.best_weights["mix.weight"].flatten(), optimum, atol=1e-6)


def trained(dataset: CustomDataset, config: TrainConfig, resized: ResizedImages | None = None) -> Trainer:
    trainer = Trainer(dataset, config, resized=resized)
    finish(trainer)
    return trainer


@pytest.mark.parametrize("preset", ["paper", "precise"])
@pytest.mark.parametrize("batch_size", [32, 64])
def test_another_machines_rounding_and_order_of_summing_leave_the_training_as_it_is(preset, batch_size, train_set):
    config = TrainConfig.from_preset(preset, device="cpu", batch_size=batch_size, epochs=45)
    other = ResizedImages(train_set, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    up = torch.randint(2, other.inputs.shape, generator=generator, dtype=torch.bool)
    other.inputs = torch.where(up, other.inputs.nextafter(torch.ones(())), other.inputs)  # resized with other rounding
    order = torch.randperm(other.pixels, generator=generator)
    other.inputs, other.targets = other.inputs[..., order], other.targets[:, order]
    assert_same_training(trained(train_set, config), trained(train_set, config, other))


@cuda
@pytest.mark.parametrize("preset", ["paper", "precise"])
@pytest.mark.parametrize("batch_size", [32, 64])
def test_cuda_follows_the_cpus_path(preset, batch_size, train_set):
    config = {"batch_size": batch_size, "epochs": 45}
    assert_same_training(
        *(trained(train_set, TrainConfig.from_preset(preset, device=device, **config)) for device in ("cpu", "cuda"))
    )


@cuda
@pytest.mark.parametrize("preset", ["paper", "precise"])
def test_a_recorded_step_does_what_the_step_does(preset, train_set, monkeypatch):
    config = TrainConfig.from_preset(preset, device="cuda", epochs=3, batch_size=64)
    recorded = train(train_set, config)
    monkeypatch.setattr(Trainer, "step_as_graph", Trainer.step)
    assert train(train_set, config).model.weights == recorded.model.weights


@pytest.mark.parametrize("preset", ["paper", "precise"])
def test_a_recorded_step_reads_nothing_that_the_trainer_does_not_keep(preset, train_set, monkeypatch):
    """On the CPU, with a fake graph; a checkpoint that is loaded after the recording replaces tensors that it read."""
    config = TrainConfig.from_preset(preset, device="cpu", epochs=3, batch_size=64)
    plain = trained(train_set, config)
    with fake_cuda(monkeypatch):
        first, second = Trainer(train_set, config), Trainer(train_set, config)
        first.recorded = second.recorded = True
        first.run_epoch()
        second.run_epoch()
        second.run_epoch()
        second.load_state_dict(first.state_dict())
        first.run_epoch()  # shares nothing with the state that it gave
        gc.collect()
        finish(second)
    assert second.history[-1]["val_mse"] == pytest.approx(plain.history[-1]["val_mse"], rel=1e-6)
    assert second.best_weights["mix.weight"].equal(plain.best_weights["mix.weight"])


def test_a_training_mse_that_overflows_is_an_error(train_set):
    with pytest.raises(TrainingError, match=r"from epoch 1 on the loss is not finite \(training MSE (nan|inf)"):
        train(train_set, paper(lr=1e30, epochs=3))


def test_grey_images_are_refused_by_precise(train_set):
    grey = CustomDataset(data="photos", train=True, limit=100)
    grey.images[:] = grey.images[:, :1]
    with pytest.raises(DataError, match="the training images are grey"):
        train(grey, TrainConfig.from_preset("precise", device="cpu"))


def test_too_few_images_are_refused():
    with pytest.raises(ParameterError, match="at least one training and one validation image, got 4"):
        train(CustomDataset(data="photos", train=True, limit=4), paper())
