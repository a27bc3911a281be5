"""State of an ``nn.Module`` that a block of code may change for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def preserve_train_modes(module: nn.Module) -> Iterator[None]:
    """Restore ``training`` of ``module`` and of every submodule after the ``with`` block."""
    modes = [(each, each.training) for each in module.modules()]
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training
