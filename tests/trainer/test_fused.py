"""Fused implementations of optimizers given by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import duoka


def trained(model: nn.Module, **options) -> torch.optim.Optimizer:
    features = torch.arange(12, dtype=torch.float64).reshape(6, 2)
    data = DataLoader(TensorDataset(features, torch.ones(6, 1).double()), batch_size=3)
    found: list[torch.optim.Optimizer] = []

    class Keep(duoka.Callback):
        def on_fit_end(self, state) -> None:
            found.append(state.optimizer)

    options = {"lr": 1e-2, "epochs": 2, "device": "cpu", "verbose": False, "callbacks": [Keep()], **options}
    duoka.Trainer(model, data, loss=nn.functional.mse_loss, **options).fit(save_model=False)
    return found[0]


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_a_fused_optimizer_takes_the_steps_of_the_plain_one(name: str) -> None:
    torch.manual_seed(0)
    one, other = nn.Linear(2, 1).double(), nn.Linear(2, 1).double()
    other.load_state_dict(one.state_dict())
    assert trained(one, optimizer=name).defaults["fused"]
    assert not trained(other, optimizer=name, optimizer_options={"foreach": False}).defaults["fused"]
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-12, atol=1e-12)


def test_complex_weights_train_with_the_plain_optimizer() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 1, dtype=torch.complex128))

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return (features.to(self.weight.dtype) @ self.weight).abs()

    model = Turned()
    assert not trained(model, optimizer="adam").defaults["fused"]
    assert not torch.equal(model.weight.detach(), torch.ones(2, 1, dtype=torch.complex128))
