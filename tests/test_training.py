import math

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import BatchSampler, DataLoader

from transformnet_lib import GRAY_WEIGHTS, CustomDataset, EarlyStopping, Run, TrainConfig, train
from transformnet_lib.data import split_indices
from transformnet_lib.errors import DataError, ParameterError, RunError, TrainingError
from transformnet_lib.model import seeded_model
from transformnet_lib.training import Trainer, load_config, load_dataset, load_model, load_training


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


def test_losses_equal_a_plain_dataloader_loop_over_the_module(train_set):
    config = paper(seed=1, epochs=3, batch_size=64)
    fast = train(train_set, config)

    model = seeded_model(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    indices, val = split_indices(len(train_set), val_fraction=0.1, seed=config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    val_images, val_targets = next(iter(DataLoader(train_set, sampler=val.tolist(), batch_size=len(val))))
    for epoch in range(config.epochs):
        order = indices[torch.randperm(len(indices), generator=generator)].tolist()
        summed = 0.0
        for images, targets in DataLoader(train_set, batch_sampler=BatchSampler(order, config.batch_size, False)):
            loss = torch.nn.functional.mse_loss(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            summed += loss.item() * len(images)
        with torch.no_grad():
            val_mse = torch.nn.functional.mse_loss(model(val_images), val_targets).item()
        row = fast.history.iloc[epoch]
        assert row["train_mse"] == pytest.approx(summed / len(indices), rel=1e-4)
        assert row["val_mse"] == pytest.approx(val_mse, rel=1e-4)


def test_known_weights_are_recovered_by_the_precise_preset(train_set):
    result = train(train_set, TrainConfig.from_preset("precise", device="cpu", batch_size=32))
    np.testing.assert_allclose(result.model.weights, GRAY_WEIGHTS, atol=2e-6)
    assert result.best_val_mse < 1e-12


def test_a_dead_start_is_noticed_by_paper_and_survived_by_precise(train_set):
    assert train(train_set, paper(seed=3)).dead  # seed 3 starts with three negative weights
    precise = train(train_set, TrainConfig.from_preset("precise", device="cpu", seed=3, batch_size=32))
    assert not precise.dead
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


def test_a_loss_that_is_never_finite_is_an_error_naming_the_epoch():
    dataset = CustomDataset(data="photos", train=True, limit=100)
    dataset.targets.fill_(math.nan)
    with pytest.raises(TrainingError, match="validation MSE nan at epoch 4"):
        train(dataset, paper())


# The run directory's stage


def test_a_run_is_read_back_as_it_was_trained(run, train_set, test_set):
    result = load_training(run)
    assert load_model(run).weights == result.model.weights
    assert load_config(run) == TrainConfig.from_preset("precise", device="cpu", batch_size=32)
    assert load_dataset(run, train=True).fingerprint == train_set.fingerprint
    assert load_dataset(run).fingerprint == test_set.fingerprint


def test_tensorboard_holds_the_history(run):
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert sorted(events.Tags()["scalars"]) == ["epoch_seconds", "train_mse", "val_mse"]
    for name in events.Tags()["scalars"]:
        values = [(event.step, event.value) for event in events.Scalars(name)]
        expected = list(zip(run.history()["epoch"], run.history()[name].astype(np.float32), strict=True))
        assert values == expected


def test_a_complete_run_is_only_read(run, train_set, monkeypatch):
    monkeypatch.setattr(Trainer, "run_epoch", None)
    config = TrainConfig.from_preset("precise", device="cpu", batch_size=32)
    assert train(train_set, config, run=run).history.equals(run.history())


def test_an_interrupted_training_goes_on_and_ends_as_if_undisturbed(train_set, tmp_path, monkeypatch):
    config = TrainConfig.from_preset("precise", device="cpu", batch_size=64)
    undisturbed = train(train_set, config, run=Run(tmp_path / "undisturbed"))

    run, epochs = Run(tmp_path / "interrupted"), Trainer.run_epoch
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_epoch", lambda self: epochs(self) if len(self.history) < 3 else _interrupt())
        with pytest.raises(KeyboardInterrupt):
            train(train_set, config, run=run)
    with pytest.raises(RunError, match="not complete"):
        run.history()
    resumed = train(train_set, config, run=run)
    columns = ["epoch", "train_mse", "val_mse"]
    assert resumed.history[columns].equals(undisturbed.history[columns])
    assert resumed.model.weights == undisturbed.model.weights
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("val_mse")] == resumed.history["epoch"].tolist()


def _interrupt():
    raise KeyboardInterrupt


def test_force_must_be_true_or_false(train_set, tmp_path):
    with pytest.raises(ParameterError, match="force: expected True or False, got 'no'"):
        train(train_set, paper(epochs=1), run=Run(tmp_path / "run"), force="no")


def test_images_that_are_all_black_are_no_dead_start():
    black = CustomDataset(data="photos", train=True, limit=100)
    black.images.zero_()
    black.targets.zero_()
    assert not train(black, paper(epochs=1)).dead


def test_other_parameters_are_refused_without_force_and_taken_with_it(train_set, tmp_path):
    run = Run(tmp_path / "run")
    train(train_set, paper(epochs=1), run=run)
    with pytest.raises(RunError, match="epochs: 1 → 2"):
        train(train_set, paper(epochs=2), run=run)
    assert len(run.history()) == 1
    assert len(train(train_set, paper(epochs=2), run=run, force=True).history) == 2


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
    with pytest.raises(ParameterError, match=rf"^{name}: expected .* got {value!r}$"):
        TrainConfig(**wrong)


def test_unknown_presets_and_devices_are_refused(train_set):
    with pytest.raises(ParameterError, match="preset: expected one of paper, precise, got 'best'"):
        TrainConfig.from_preset("best")
    with pytest.raises(ParameterError, match="device: expected cpu"):
        train(train_set, paper().__class__(device="gpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused(train_set):
    with pytest.raises(ParameterError, match="this machine has no cuda; present: cpu"):
        train(train_set, TrainConfig(device="cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_trains_to_the_cpus_losses(train_set):
    cpu, cuda = (train(train_set, TrainConfig(device=device, epochs=3)) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(cuda.history["val_mse"], cpu.history["val_mse"], rtol=1e-3)


def test_a_training_mse_that_overflows_is_an_error(train_set):
    with pytest.raises(TrainingError, match=r"the training MSE is (nan|inf)"):
        train(train_set, paper(lr=1e30, epochs=3))


def test_grey_images_are_refused_by_precise(train_set):
    grey = CustomDataset(data="photos", train=True, limit=100)
    grey.images[:] = grey.images[:, :1]
    with pytest.raises(DataError, match="the training images are grey"):
        train(grey, TrainConfig.from_preset("precise", device="cpu"))


def test_a_forced_training_that_cannot_start_keeps_what_is_there(train_set, tmp_path):
    run = Run(tmp_path / "run")
    train(train_set, paper(epochs=1), run=run)
    with pytest.raises(ParameterError):
        train(CustomDataset(data="photos", train=True, limit=4), paper(), run=run, force=True)
    assert len(run.history()) == 1


def test_too_few_images_are_refused():
    with pytest.raises(ParameterError, match="at least one training and one validation image, got 4"):
        train(CustomDataset(data="photos", train=True, limit=4), paper())
