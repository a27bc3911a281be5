"""A loss that is not a mean over samples is announced once on several devices; all others are not."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import duoka
from duoka.trainer import Trainer

pytestmark = pytest.mark.usefixtures("pickle_by_value")

MESSAGE = "is not the mean of its halves' losses"


def samples(count: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(count, 6, generator=generator)
    return TensorDataset(features, torch.randint(4, (count,), generator=generator))


def classifier(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8), *layers, nn.Tanh(), nn.Linear(8, 4))


def warnings_of(caplog, model: nn.Module, loss, device: str = "cpu:2", **options) -> list[str]:
    caplog.clear()
    loader = options.pop("data", None) or DataLoader(samples(), batch_size=16, drop_last=True)
    settings = {"optimizer": "sgd", "lr": 0.1, "epochs": 2, "batch_size_means": "global", "verbose": False}
    with caplog.at_level(logging.WARNING, logger="duoka"):
        Trainer(model, loader, loss=loss, device=device, **(settings | options)).fit()
    return [record.getMessage() for record in caplog.records if MESSAGE in record.getMessage()]


def info_nce(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    vectors = functional.normalize(output, dim=1)
    other = functional.normalize(output.roll(1, 1), dim=1)
    return functional.cross_entropy(vectors @ other.T / 0.2, torch.arange(len(target)))


def hardest_triplet(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    distances = torch.cdist(output, output)
    same = target[:, None] == target
    return ((distances * same).amax(1) - (distances + 100 * same).amin(1) + 1).relu().mean()


def mean_over_long_rows(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    mask = (target % 2 == 0).float()
    return ((output.square().sum(1) + 9 * target) * mask).sum() / mask.sum().clamp(min=1)


class WithLoss(nn.Module):
    """A model that returns its own loss, and only in training."""

    def __init__(self) -> None:
        super().__init__()
        self.body = classifier()

    def forward(self, features, target):
        return info_nce(self.body(features), target) if self.training else None


@pytest.mark.parametrize("loss", [info_nce, hardest_triplet, mean_over_long_rows])
def test_a_loss_over_the_batch_is_announced_once(caplog, loss):
    (message,) = warnings_of(caplog, classifier(nn.BatchNorm1d(8), nn.Dropout(0.3)), loss)
    assert "Each of 2 devices" in message
    assert warnings_of(caplog, classifier(), loss, device="cpu") == []


def test_a_models_own_loss_over_the_batch_is_announced(caplog):
    assert len(warnings_of(caplog, WithLoss(), None)) == 1


class Functional(nn.Module):
    """Dropout, attention and batch norm as functions, an LSTM with dropout, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.last, self.calls = nn.Linear(6, 8), nn.Linear(8, 4), 0
        self.lstm = nn.LSTM(8, 8, num_layers=2, dropout=0.5, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, features):
        self.calls += 1
        self.seen += len(features)
        hidden = functional.dropout(self.first(features), 0.5, self.training)[:, None]
        hidden = functional.scaled_dot_product_attention(hidden, hidden, hidden, None, 0.5 * self.training)
        hidden = self.attention(self.lstm(hidden)[0], hidden, hidden)[0].squeeze(1)
        return self.last(hidden)


class NormalizedByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = classifier(), nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, features):
        return self.norm(self.body(features))


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = classifier()

    def forward(self, features):
        return self.body(features + torch.randn_like(features))


class WithGenerator(Noisy):
    def forward(self, features):
        self.generator = getattr(self, "generator", None) or torch.Generator().manual_seed(1)
        return self.body(features + torch.randn(features.shape, generator=self.generator))


def counting():
    """Return a loss that is larger at each call."""
    calls = 0

    def loss(output, target):
        nonlocal calls
        calls += 1
        return functional.cross_entropy(output, target) * calls

    return loss


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (lambda: classifier(nn.BatchNorm1d(8), nn.Dropout(0.5)), functional.cross_entropy),
        (Functional, functional.cross_entropy),
        (NormalizedByHand, functional.cross_entropy),
        (Noisy, functional.cross_entropy),
        (WithGenerator, functional.cross_entropy),
        (classifier, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3, 4]), ignore_index=2)),
        (classifier, lambda output, target: functional.cross_entropy(output, target, ignore_index=1)),
        (classifier, lambda o, t: (functional.cross_entropy(o, t, reduction="none") * (t > 1)).sum() / len(t)),
        (classifier, lambda o, t: ((o.sum(1) * (t > 1)).sum(), (t > 1).sum())),
        (classifier, lambda o, t: functional.cross_entropy(o, t, label_smoothing=0.1) + 0.1 * o.square().mean()),
        (classifier, counting()),
    ],
)
def test_a_mean_over_samples_is_not_announced(caplog, model, loss):
    assert warnings_of(caplog, model(), loss) == []


def test_bfloat16_weights_are_not_announced(caplog):
    def loss(output, target):
        return functional.cross_entropy(output.float(), target)

    model = classifier(nn.LayerNorm(8)).bfloat16()
    data = [(x.bfloat16(), y) for x, y in DataLoader(samples(), batch_size=16)]
    assert warnings_of(caplog, model, loss, data=data) == []


class SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(_, tensor):
        return duoka.current_world().all_reduce(tensor)

    @staticmethod
    def backward(_, grad):
        return duoka.current_world().all_reduce(grad.contiguous())


def gathered_info_nce(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """InfoNCE of this rank's samples with the negatives of all ranks."""
    vectors = functional.normalize(output, dim=1)
    other = functional.normalize(output.roll(1, 1), dim=1)
    world = duoka.current_world()
    first = world.rank * len(target)
    if world.size > 1:
        padding = (0, 0, first, (world.size - 1 - world.rank) * len(target))
        other = SumOverRanks.apply(functional.pad(other, padding))
    return functional.cross_entropy(vectors @ other.T / 0.2, torch.arange(first, first + len(target)))


def test_negatives_of_all_ranks_take_the_step_of_one_device(caplog):
    one, two = classifier().double(), classifier().double()
    data = [(x.double(), y) for x, y in DataLoader(samples(), batch_size=16)]
    assert warnings_of(caplog, one, gathered_info_nce, device="cpu", data=data) == []
    assert warnings_of(caplog, two, gathered_info_nce, data=data) == []
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-8)


def test_the_check_changes_no_result(caplog, monkeypatch):
    """Neither generators, nor buffers, nor attributes, nor gradients: with and without it, weights are the same."""
    with_check = Functional()
    warnings_of(caplog, with_check, functional.cross_entropy)
    monkeypatch.setattr("duoka.trainer.batch_coupling.batch_coupling", lambda *_: "")
    without = Functional()
    warnings_of(caplog, without, functional.cross_entropy)
    assert (with_check.calls, with_check.seen) == (without.calls, without.seen)
    for a, b in zip(with_check.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


def test_batches_that_cannot_be_cut_are_not_checked(caplog):
    class Edges(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, features, edges):
            return self.layer(features.index_add(0, edges[1], features[edges[0]]))

    def collate(items):
        features, target = torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])
        return features, torch.zeros(2, 3, dtype=torch.int64), target

    data = DataLoader(samples(), batch_size=16, collate_fn=collate)
    assert warnings_of(caplog, Edges(), info_nce, data=data) == []
