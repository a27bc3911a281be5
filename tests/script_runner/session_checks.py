"""A run's session starts only where torch calls what replaces a model's call, and restores everything at its end."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from duoka.errors import UnsupportedError
from duoka.script_runner import RunSession
from duoka.utils import torch_private

CPUS = [torch.device("cpu")] * 2


def test_a_torch_that_ignores_replaced_calls_is_refused_at_the_start(monkeypatch) -> None:
    monkeypatch.setattr(torch_private, "replace_call", lambda module, call: None)
    with pytest.raises(UnsupportedError, match=torch.__version__.partition("+")[0]), RunSession(CPUS):
        pytest.fail("the session has started")
    with RunSession(CPUS[:1]):
        assert nn.Linear(2, 2)(torch.ones(3, 2)).shape == (3, 2)


def test_a_session_restores_torch_and_the_models_it_found() -> None:
    before = nn.DataParallel, nn.Module.to, torch.optim.Optimizer.__init__, torch.cuda.device_count
    with RunSession(CPUS):
        model = nn.Linear(2, 2)
        torch.optim.SGD(model.parameters(), 0.1)
        assert torch_private.replaced_call(model) is not None
        assert nn.DataParallel.__module__ == before[0].__module__
        assert isinstance(nn.DataParallel(nn.Linear(2, 2)), nn.DataParallel)
    assert torch_private.replaced_call(model) is None
    assert before == (nn.DataParallel, nn.Module.to, torch.optim.Optimizer.__init__, torch.cuda.device_count)


def test_calls_after_the_last_step_are_split_whatever_its_number() -> None:
    with RunSession(CPUS) as session:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(20):
            model.forward(torch.ones(4, 2)).sum().backward()
            optimizer.step()
        for _ in range(4):
            model(torch.ones(4, 2))
    assert (session.stats.num_whole, session.stats.num_split) == (1, 3)


def test_a_step_on_one_device_has_all_calls_of_a_step_and_no_more() -> None:
    with RunSession(CPUS) as session:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(23):
            for _ in range(2):  # gradients of two batches
                model(torch.ones(4, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (session.stats.num_whole, session.stats.num_split) == (7, 39)
    assert [step.is_split for step in session.stats.steps[-5:]] == [True, True, False, False, False]


class WithNumber(nn.Linear):
    """A model that also returns a number about the batch."""

    factor, number = 0.0, "mean"

    def forward(self, x):
        x = super().forward(x) * self.factor
        return x, getattr(x.detach(), self.number)()


@pytest.mark.parametrize(("number", "is_split"), [("mean", True), ("std", False), ("max", False), ("sum", True)])
def test_a_number_that_was_the_same_in_all_parts_is_never_joined_wrongly(number: str, is_split: bool) -> None:
    x = torch.randn(9, 2)
    with RunSession(CPUS) as session:
        model = WithNumber(2, 3)
        torch.optim.SGD(model.parameters(), 0.1)
        model.number = number
        for model.factor in (0.0, 0.0, 1.0, 2.0, 0.0, 3.0):  # call 3 is not due for a check
            torch.testing.assert_close(model(x), model.forward(x))
    assert session.stats.num_split == (5 if is_split else 1)
    assert ("output[1]" in session.stats.models[0].refusal) != is_split


class Learner(nn.Module):
    """A model whose ``parameters`` method is no iterator, as MAML's."""

    def __init__(self) -> None:
        super().__init__()
        self.vars = nn.ParameterList([torch.ones(1, 4), torch.zeros(1)])

    def forward(self, x):
        return nn.functional.linear(x, *self.vars)

    def parameters(self):
        return self.vars


def test_a_model_whose_parameters_method_returns_a_list_is_split() -> None:
    x = torch.randn(9, 4)
    with RunSession(CPUS) as session:
        model = Learner()
        torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            torch.testing.assert_close(model(x), model.forward(x))
    assert (session.stats.num_whole, session.stats.num_split) == (1, 1)
