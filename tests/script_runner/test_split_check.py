"""A model may be split only if the outputs of a batch's parts equal the output of the whole batch."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from duoka.script_runner.split_check import check_splittable


class Function(nn.Module):
    """A model whose forward is a given function of itself and the inputs."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.lstm = nn.LSTM(6, 6, 2, dropout=0.5, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True)
        self.register_buffer("mean", torch.zeros(6))
        self.calls = 0
        self.kept = None
        self.seen = 0

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def keep(self, x):
    self.kept = self.linear(x)
    return self.kept


def count(self, x):
    self.calls += 1
    return self.linear(x)


def follow(self, x):
    if self.training:
        self.mean.mul_(0.9).add_(x.detach().mean(0))
    return self.linear(x - self.mean)


def add(self, x):
    self.seen += len(x)
    return self.linear(x)


def fill(self, x, found):
    found.append(x)
    return self.linear(x)


def cool(self, x):
    self.norm.weight.data.mul_(0.9)
    return self.linear(x) * self.norm.weight


def log(self, x):
    y = self.linear(x)
    return y, {"mean": y.mean().item()}


X = torch.randn(11, 6)
SEQUENCE = torch.randn(11, 5, 6)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda self, x: self.linear(x), (X,)),
        (lambda self, x: self.norm(self.linear(x)), (X,)),
        (lambda self, x: functional.dropout(self.linear(x), 0.5), (X,)),
        (lambda self, x: functional.dropout(x, 0.5, training=True).mean(1), (X,)),
        (lambda self, x: self.linear(x) + torch.randn_like(x) * x, (X,)),
        (lambda self, x: self.lstm(x)[0], (SEQUENCE,)),
        (lambda self, x: self.attention(x, x, x)[0], (SEQUENCE,)),
        (lambda self, x: {"a": self.linear(x), "b": [x.sum(1), (x > 0)]}, (X,)),
        (lambda self, x, y: (self.linear(x), functional.mse_loss(self.linear(x), y)), (X, X)),
        (count, (X,)),
    ],
)
def test_models_that_compute_each_sample_independently_pass(function, inputs) -> None:
    assert check_splittable(Function(function), inputs, {}, 3).reason == ""


@pytest.mark.parametrize(
    ("function", "inputs", "reason"),
    [
        (lambda self, x: self.linear(x) - self.linear(x).mean(0), (X,), "depends on other samples"),
        (lambda self, x: self.linear(x) @ self.linear(x).T, (X,), "cannot be gathered"),
        (lambda self, x: nn.functional.mse_loss(x, x * 2, reduction="sum"), (X,), "not the mean over the samples"),
        (lambda self, x: self.lstm(x)[1][0], (SEQUENCE,), "cannot be gathered"),
        (lambda self, x: self.lstm(x)[1][0], (SEQUENCE[:9],), "first dimension"),
        (lambda self, x: self.linear(x.cumsum(0)), (X,), "depends on other samples"),
        (lambda self, x: self.linear(x).view(11, 6), (X,), "cannot compute a part"),
        (lambda self, x: len(x), (X,), "no tensors"),
        (lambda self, x: self.linear(x) / 0 if len(x) > 4 else 1 / 0, (X,), "cannot compute a part"),
        (keep, (X,), "keeps tensors in kept"),
        (follow, (X,), "the buffer 'mean'"),
        (add, (X,), "keeps results in seen"),
        (fill, (X, []), "changes an object"),
        (cool, (X,), "depends on other samples"),
        (log, (X,), "differs between the parts"),
        (lambda self, x: self.linear(x.sub_(0.5)), (X.clone(),), "changes its inputs in place"),
        (lambda self, x: self.norm.weight.mul_(0.9) * x, (X,), "writes to its parameter norm.weight"),
        (lambda self, x: (self.linear(x), torch.distributions.Normal(x, 1)), (X,), "returns a Normal"),
        (lambda self, x: (self.linear(x), (x > 9).sum()), (X,), "a count or a flag"),
        (lambda self, x: (self.linear(x), self.linear(x).detach().numpy()), (X,), "returns a ndarray"),
    ],
)
def test_models_that_need_the_whole_batch_are_refused_with_a_reason(function, inputs, reason) -> None:
    assert reason in check_splittable(Function(function), inputs, {}, 3).reason


def test_the_check_does_not_change_the_inputs() -> None:
    given, found = X.clone(), []
    check_splittable(Function(lambda self, x, found: fill(self, x.mul_(2), found)), (given, found), {}, 2)
    assert torch.equal(given, X)
    assert found == []


def test_the_check_does_not_change_parameters() -> None:
    model = Function(cool)
    check_splittable(model, (X,), {}, 2)
    assert torch.equal(model.norm.weight, torch.ones(6))
    lazy = nn.LazyLinear(3)
    assert check_splittable(lazy, (X,), {}, 2) is None
    assert isinstance(lazy.weight, nn.parameter.UninitializedParameter)


def test_the_result_names_the_outputs_that_are_means_over_the_batch() -> None:
    model = Function(lambda self, x, y: {"loss": functional.mse_loss(self.linear(x), y), "logits": self.linear(x)})
    assert check_splittable(model, (X, X), {}, 2).scalar_outputs == (0,)


def test_the_check_changes_no_buffer_attribute_hook_or_generator() -> None:
    model = Function(lambda self, x: follow(self, self.norm(functional.dropout(count(self, x), 0.5))) + torch.rand(()))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    model.register_forward_hook(lambda *given: seen.append(given))
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    check_splittable(model, (X,), {}, 2)
    assert (before[1], before[2]) == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(before[0], torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.calls == 0
    assert seen == []
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_in_memory_shared_with_other_processes_is_refused() -> None:
    model = nn.Linear(4, 2).share_memory()
    result = check_splittable(model, (torch.ones(4, 4),), {}, 2)
    assert "shares with other processes" in result.reason
