"""Data without length or samples, and losses that are not finite."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from duoka.checkpoint import load_training
from duoka.errors import ConfigError, DataError, DivergenceError
from duoka.trainer import Callback
from duoka.world import current_world
from support.tiny_training import labeled_samples, loader, trainer_of


class Stream(IterableDataset):
    """Samples without a length."""

    def __init__(self, count: int = 12) -> None:
        self.count = count

    def __iter__(self):
        yield from labeled_samples(self.count)


def batches():
    """Ready-made batches without a length."""
    yield from loader()


def nothing():
    """No batch at all."""
    yield from ()


@pytest.mark.parametrize("data", [DataLoader(Stream(), batch_size=4), batches], ids=["stream", "generator"])
def test_evaluation_data_may_have_no_length(data):
    trainer = trainer_of(eval_data=data, test_data=data)
    validation, test = trainer.fit()
    expected = trainer.evaluate(loader())["loss"]
    assert validation["loss"] == pytest.approx(expected)
    assert test["loss"] == pytest.approx(expected)


class OwnShare(Stream):
    """A stream that divides itself, as programs for torchrun do."""

    def __iter__(self):
        divided = torch.distributed.is_initialized()
        rank, size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if divided else (0, 1)
        yield from itertools.islice(labeled_samples(self.count), rank, None, size)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_splits_itself_by_rank_is_an_error(workers):
    options = {"multiprocessing_context": "fork"} if workers else {}
    data = DataLoader(OwnShare(), batch_size=4, num_workers=workers, **options)
    trainer = trainer_of(data, device="cpu:2")
    with pytest.raises(DataError, match=r"train_data .*another rank.*get_rank\(\)"):
        trainer.fit()
    with pytest.raises(DataError, match=r"eval_data .*another rank"):
        trainer.evaluate(data)
    trainer_of(DataLoader(OwnShare(), batch_size=4), device="cpu").fit()


EMPTY = {
    "data set": DataLoader(TensorDataset(torch.empty(0, 5), torch.empty(0).long()), batch_size=4),
    "list": [],
    "stream": DataLoader(Stream(0), batch_size=4),
    "generator": nothing,
}


@pytest.mark.parametrize("data", EMPTY.values(), ids=EMPTY)
def test_empty_data_are_an_error_in_every_role(data):
    with pytest.raises(DataError, match=r"train_data .*length 0"):
        trainer_of(data).fit()
    with pytest.raises(DataError, match=r"eval_data .*length 0"):
        trainer_of(eval_data=data).fit()
    with pytest.raises(DataError, match=r"test_data .*length 0"):
        trainer_of(test_data=data).fit()
    for question in (trainer_of().evaluate, trainer_of().predict):
        with pytest.raises(DataError, match="length 0"):
            question(data)


@pytest.mark.parametrize(
    ("device", "size", "words"), [("cpu", 13, "batch_size=13,"), ("cpu:2", 8, "batch_size=8 on each of 2 devices")]
)
def test_drop_last_that_drops_every_batch_is_an_error(device, size, words):
    data = DataLoader(labeled_samples(), batch_size=size, drop_last=True)
    with pytest.raises(DataError, match=f"12 samples .*{words}.*drop_last=False"):
        trainer_of(data, device=device).fit()


def test_a_nan_loss_is_recorded_warned_of_once_and_never_the_best(caplog):
    with caplog.at_level(logging.WARNING, logger="duoka"):
        trainer = trainer_of(
            eval_data=loader(),
            optimizer="sgd",
            lr=0.1,
            scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: math.inf**epoch),
            monitor="loss",
            epochs=3,
            on_nonfinite_loss="warn",
        )
        validation, _ = trainer.fit()
    assert [math.isnan(record["val_loss"]) for record in trainer.history] == [False, True, True]
    assert trainer.best.epoch == 1
    assert math.isfinite(validation["loss"])
    (warning,) = [record.getMessage() for record in caplog.records if "became" in record.getMessage()]
    assert "loss became nan in epoch 2" in warning


def test_a_monitored_loss_that_is_always_nan_keeps_the_last_weights():
    def lost(output, target):
        return nn.functional.cross_entropy(output, target) * math.nan

    trainer = trainer_of(eval_data=loader(), loss=lost, monitor="loss", on_nonfinite_loss="warn")
    validation, _ = trainer.fit()
    assert math.isnan(validation["loss"])
    assert trainer.best is None


def test_monitor_without_any_evaluation_result_is_an_error():
    class OwnLoss(nn.Linear):
        def forward(self, features, target):
            output = super().forward(features)
            return nn.functional.cross_entropy(output, target) if self.training else output

    with pytest.raises(ConfigError, match="which has none"):
        trainer_of(model=OwnLoss(5, 2), loss=None, eval_data=loader(), monitor="loss").fit()


class DivergesLater(nn.Module):
    """A model whose output is NaN from its seventh step on, in the second layer, on the last rank."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 2)
        self.steps = 0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.steps += self.training
        world = current_world()
        is_lost = self.training and self.steps >= 7 and world.rank == world.size - 1
        if is_lost:
            self.second.bias.data.fill_(math.inf)
        return self.second(self.first(features))


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
@pytest.mark.parametrize("is_pair", [False, True])
def test_training_stops_at_a_loss_that_is_not_finite(tmp_path, device, is_pair):
    def pair(output, target):
        return nn.functional.cross_entropy(output, target, reduction="sum"), len(target)

    loss = pair if is_pair else nn.CrossEntropyLoss()
    options = {"model": DivergesLater(), "loss": loss, "device": device, "batch_size_means": "global", "epochs": 4}
    with pytest.raises(DivergenceError, match=r"the loss of step 7 is not finite.*find_nonfinite_layer=True"):
        trainer_of(out_dir=tmp_path, checkpoint_every_steps=1, tensorboard=False, **options).fit()
    saved = load_training(tmp_path / "checkpoint" / "last.pt")
    assert saved["state"]["step"] == 6
    assert all(value.isfinite().all() for value in saved["model"].values())


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_the_first_layer_that_is_not_finite_is_named(device):
    trainer = trainer_of(model=DivergesLater(), device=device, epochs=9, find_nonfinite_layer=True)
    with pytest.raises(DivergenceError, match=r"step 7 .*is that of second \(Linear\), whose parameters are not"):
        trainer.fit()
    assert not any(layer._forward_hooks for layer in trainer.model.modules())


def test_a_gradient_that_is_not_finite_is_named_by_the_next_step():
    def infinite_gradient(output, target):
        return nn.functional.cross_entropy(output, target) + (output * 0).abs().sqrt().sum()

    trainer = trainer_of(loss=infinite_gradient, find_nonfinite_layer=True)
    with pytest.raises(
        DivergenceError, match=r"step 2 .*that of the model itself \(Linear\), whose parameters are not"
    ):
        trainer.fit()


class NanGradient(Callback):
    """Makes a parameter NaN after a step, as a NaN gradient does: the loss of that step is finite."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, state) -> None:
        if state.step == self.step:
            state.model.weight.register_hook(lambda gradient: gradient * math.nan)


@pytest.mark.parametrize("last_step", [6, 12])
def test_parameters_that_are_not_finite_are_not_saved(tmp_path, last_step):
    options = {"out_dir": tmp_path, "tensorboard": False, "epochs": last_step // 3, "callbacks": [NanGradient(5)]}
    with pytest.raises(DivergenceError, match=r"after step 6 the parameter weight is not finite") as failed:
        trainer_of(**options).fit()
    assert failed.value.__notes__[0].endswith("diverges again with the same options; begin a new run with a lower lr")
    saved = load_training(tmp_path / "checkpoint" / "last.pt")
    assert saved["state"]["step"] == 3
    assert not (tmp_path / "model.safetensors").exists()


def test_weights_that_are_not_finite_are_not_saved_without_checkpoints(tmp_path):
    with pytest.raises(DivergenceError, match=r"after step 6 the parameter weight"):
        trainer_of(callbacks=[NanGradient(5)]).fit(model_path=tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()


def test_a_loss_function_that_gives_nan_is_named():
    trainer = trainer_of(loss=lambda output, _: output.mean() * math.nan, find_nonfinite_layer=True)
    with pytest.raises(DivergenceError, match="so the loss function gives it"):
        trainer.fit()


def test_a_frozen_layer_that_is_not_finite_is_named():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    nn.init.constant_(model[0].bias, math.inf)
    model[0].eval()
    with pytest.raises(DivergenceError, match=r"step 1 .*that of 0 \(Linear\), whose parameters are not"):
        trainer_of(model=model, find_nonfinite_layer=True).fit()
