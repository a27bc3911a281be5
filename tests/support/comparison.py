"""Comparison of two models' parameters and gradients."""

from __future__ import annotations

import torch
from torch import nn


def relative_distance(model: nn.Module, reference: nn.Module) -> float:
    """Return the largest relative distance of any pair of parameters; parameters near zero count as 0.01."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(model.parameters(), reference.parameters(), strict=True)]
    return max((float((a - b).norm() / b.norm().clamp_min(1e-2)) for a, b in pairs), default=0.0)


def assert_same_gradients(model: nn.Module, reference: nn.Module, tolerance: float = 1e-5) -> None:
    """Compare all gradients; a parameter has none in one model if it has none in the other."""
    for (name, own), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None), f"{name}: {own.grad} is not {other.grad}"
        if own.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, rtol=tolerance, atol=tolerance)
