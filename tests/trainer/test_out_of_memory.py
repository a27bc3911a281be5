"""Out of memory: steps in smaller parts that end in the same parameters, the largest part that fits, and the message."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from duoka.errors import ConfigError, DuokaError
from duoka.trainer import Trainer
from duoka.trainer.out_of_memory import is_out_of_memory
from duoka.world import current_world
from support.tiny_training import labeled_samples

pytestmark = pytest.mark.usefixtures("one_thread", "pickle_by_value")
DEVICES = ("cpu", "cpu:2")


class Small(nn.Module):
    """A float64 model for which memory suffices, except in the cases that a subclass adds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        self.unused = nn.Linear(2, 2).double()
        self.calls = 0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        return self.net(features.double())


class FailsOnce(Small):
    """Has too little memory in its seventh training step, on the last rank, once."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        world = current_world()
        if self.training and self.calls == 6 and world.rank == world.size - 1:
            self.calls += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().forward(features)


class HoldsThree(Small):
    """Has memory for three samples at once on rank 0, and for more on the others."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.training and len(features) > 3 + current_world().rank:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(features)


class HoldsNothing(Small):
    """Has no memory for a single sample."""

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def sum_and_count(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    return nn.functional.cross_entropy(output, target, reduction="sum"), len(target)


LOSSES = {"mean": lambda o, t: ((o[:, 0] - t) ** 2).mean(), "class": nn.CrossEntropyLoss(), "pair": sum_and_count}


def trained(kind: type[nn.Module], device: str, **options) -> Trainer:
    torch.manual_seed(0)
    data = torch.utils.data.DataLoader(labeled_samples(44), batch_size=16, shuffle=True)
    settings = {"loss": LOSSES["class"], "optimizer": "adamw", "lr": 0.05, "epochs": 3, "batch_size_means": "global"}
    trainer = Trainer(kind(), data, device=device, verbose=False, **(settings | options))
    trainer.fit()
    return trainer


def assert_same(one: Trainer, other: Trainer) -> None:
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    losses = [[record["train_loss"] for record in trainer.history] for trainer in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loss", LOSSES)
def test_halving_after_a_failure_gives_the_parameters_without_it(device, loss, capsys):
    accuracy = {"train_metrics": MulticlassAccuracy(2, average="micro")}
    undisturbed = trained(Small, device, loss=LOSSES[loss], **accuracy)
    failed = trained(FailsOnce, device, loss=LOSSES[loss], on_out_of_memory="halve", **accuracy)
    assert_same(failed, undisturbed)
    accuracies = [[record["train_MulticlassAccuracy"] for record in one.history] for one in (failed, undisturbed)]
    assert accuracies[0] == accuracies[1]


def test_halving_is_logged_and_goes_on_from_the_same_step(tmp_path):
    failed = trained(FailsOnce, "cpu:2", on_out_of_memory="halve", out_dir=tmp_path, tensorboard=False)
    assert "out of memory: from here on at most 4 samples of a device at once" in (tmp_path / "log.txt").read_text()
    assert [record["step"] for record in failed.history] == [3, 6, 9]


@pytest.mark.parametrize("device", DEVICES)
def test_the_largest_micro_batch_that_fits_is_found_on_all_ranks(device, tmp_path):
    undisturbed = trained(Small, device)
    fitted = trained(HoldsThree, device, micro_batch_size="fit", out_dir=tmp_path, tensorboard=False)
    whole = 16 if device == "cpu" else 8
    assert f"micro-batch: 3 of {whole} samples of a device at once" in (tmp_path / "log.txt").read_text()
    assert_same(fitted, undisturbed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{"micro_batch_size": 3}, {"micro_batch_size": "fit"}])
@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_take_the_same_step(device, options, loss):
    accumulated = {"gradient_accumulation_steps": 2, "loss": LOSSES[loss]}
    assert_same(trained(Small, device, **options, **accumulated), trained(Small, device, **accumulated))


@pytest.mark.parametrize("options", [{}, {"on_out_of_memory": "halve"}, {"micro_batch_size": "fit"}])
@pytest.mark.parametrize("device", DEVICES)
def test_the_message_has_the_numbers_and_the_remedies_in_order(device, options):
    with pytest.raises(torch.OutOfMemoryError) as failed:
        trained(HoldsNothing, device, **options)
    message = str(failed.value)
    assert isinstance(failed.value, DuokaError)
    size = sum(one.numel() * 8 for one in Small().parameters())
    assert message.startswith("cpu is out of memory: ")
    assert f"the model takes parameters {size} bytes, gradients {size} bytes, optimizer {2 * size} bytes; " in message
    assert " are available. What helps" in message
    remedies = [
        "smaller batch_size",
        "micro_batch_size='fit'",
        "gradient_acc",
        "precision",
        "checkpointing",
        "more devices",
    ]
    places = [message.index(remedy) for remedy in remedies]
    assert places == sorted(places)


def test_a_failed_allocation_on_the_cpu_is_recognized():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(failed.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_options_that_exclude_each_other_are_refused():
    with pytest.raises(ConfigError, match="strategy='dp'"):
        Trainer(Small(), loss=nn.MSELoss(), micro_batch_size="fit", strategy="dp")
    with pytest.raises(ConfigError, match="micro_batch_size=0 is not valid"):
        Trainer(Small(), loss=nn.MSELoss(), micro_batch_size=0)
