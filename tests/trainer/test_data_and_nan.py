"""Data without length or without samples, and losses that are no numbers: what is said, and what is kept."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from duoka.errors import ConfigError, DataError
from duoka.trainer import Trainer


def samples(count: int = 12) -> TensorDataset:
    features = torch.randn(count, 5, generator=torch.Generator().manual_seed(0))
    return TensorDataset(features, (features.sum(1) > 0).long())


def trainer_of(train_data=None, **options) -> Trainer:
    settings = {"loss": nn.CrossEntropyLoss(), "device": "cpu", "epochs": 2, "verbose": False}
    train_data = DataLoader(samples(), batch_size=4) if train_data is None else train_data
    return Trainer(options.pop("model", None) or nn.Linear(5, 2), train_data, **(settings | options))


class Stream(IterableDataset):
    """Samples without a length."""

    def __init__(self, count: int = 12) -> None:
        self.count = count

    def __iter__(self):
        yield from samples(self.count)


def batches():
    """Ready-made batches without a length."""
    yield from DataLoader(samples(), batch_size=4)


def nothing():
    """No batch at all."""
    yield from ()


@pytest.mark.parametrize("data", [DataLoader(Stream(), batch_size=4), batches], ids=["stream", "generator"])
def test_evaluation_data_may_have_no_length(data):
    trainer = trainer_of(eval_data=data, test_data=data)
    validation, test = trainer.fit()
    expected = trainer.evaluate(DataLoader(samples(), batch_size=4))["loss"]
    assert validation["loss"] == pytest.approx(expected)
    assert test["loss"] == pytest.approx(expected)


class OwnShare(Stream):
    """A stream that divides itself, as programs for torchrun do."""

    def __iter__(self):
        divided = torch.distributed.is_initialized()
        rank, size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if divided else (0, 1)
        yield from itertools.islice(samples(self.count), rank, None, size)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_divides_itself_by_rank_is_refused_before_samples_are_lost(workers):
    options = {"multiprocessing_context": "fork"} if workers else {}
    data = DataLoader(OwnShare(), batch_size=4, num_workers=workers, **options)
    trainer = trainer_of(data, device="cpu:2")
    with pytest.raises(
        DataError, match=r"train_data .*other samples on another rank.*leave torch.distributed.get_rank"
    ):
        trainer.fit()
    with pytest.raises(DataError, match=r"eval_data .*other samples on another rank"):
        trainer.evaluate(data)
    trainer_of(DataLoader(OwnShare(), batch_size=4), device="cpu").fit()


EMPTY = {
    "data set": DataLoader(TensorDataset(torch.empty(0, 5), torch.empty(0).long()), batch_size=4),
    "list": [],
    "stream": DataLoader(Stream(0), batch_size=4),
    "generator": nothing,
}


@pytest.mark.parametrize("data", EMPTY.values(), ids=EMPTY)
def test_data_without_a_sample_are_refused_wherever_they_are_given(data):
    with pytest.raises(DataError, match=r"train_data has no sample \(a .* of length 0\); give data with at least one"):
        trainer_of(data).fit()
    with pytest.raises(DataError, match=r"eval_data has no sample"):
        trainer_of(eval_data=data).fit()
    with pytest.raises(DataError, match="test_data has no sample"):
        trainer_of(test_data=data).fit()
    for question in (trainer_of().evaluate, trainer_of().predict):
        with pytest.raises(DataError, match="has no sample"):
            question(data)


@pytest.mark.parametrize(
    ("device", "size", "words"), [("cpu", 13, "batch_size=13,"), ("cpu:2", 8, "batch_size=8 on each of 2 devices")]
)
def test_batches_that_are_all_left_out_are_named(device, size, words):
    data = DataLoader(samples(), batch_size=size, drop_last=True)
    with pytest.raises(DataError, match=f"its 12 samples are fewer than {words}.*drop_last=False or a smaller"):
        trainer_of(data, device=device).fit()


def test_a_loss_that_is_no_number_is_kept_and_said_once_and_is_never_the_best(caplog):
    with caplog.at_level(logging.WARNING, logger="duoka"):
        trainer = trainer_of(
            eval_data=DataLoader(samples(), batch_size=4),
            optimizer="sgd",
            lr=0.1,
            scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: math.inf**epoch),
            monitor="loss",
            epochs=3,
        )
        validation, _ = trainer.fit()
    assert [math.isnan(record["val_loss"]) for record in trainer.history] == [False, True, True]
    assert trainer.best.epoch == 1
    assert math.isfinite(validation["loss"])
    (warning,) = [record.getMessage() for record in caplog.records if "became" in record.getMessage()]
    assert "loss became nan in epoch 2" in warning


def test_a_monitored_loss_that_was_never_a_number_leaves_the_last_weights():
    def lost(output, target):
        return nn.functional.cross_entropy(output, target) * math.nan

    trainer = trainer_of(eval_data=DataLoader(samples(), batch_size=4), loss=lost, monitor="loss")
    validation, _ = trainer.fit()
    assert math.isnan(validation["loss"])
    assert trainer.best is None


def test_a_result_that_evaluation_does_not_have_is_named_though_it_has_none():
    class OwnLoss(nn.Linear):
        def forward(self, features, target):
            output = super().forward(features)
            return nn.functional.cross_entropy(output, target) if self.training else output

    with pytest.raises(ConfigError, match="no result of the evaluation, which has none"):
        trainer_of(model=OwnLoss(5, 2), loss=None, eval_data=DataLoader(samples(), batch_size=4), monitor="loss").fit()
