"""Settings of torch that a block of code changes for a while: process-wide ones, and the train mode of modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.backends import cudnn


def capture_torch_settings(names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Return the current settings by name; ``names`` selects some of ``SETTINGS``."""
    return {name: SETTINGS[name][0]() for name in names or SETTINGS}


def apply_torch_settings(settings: Mapping[str, Any]) -> None:
    """Set what ``capture_torch_settings`` returned; a setting that already has its value is not touched."""
    for name, value in settings.items():
        get, put = SETTINGS[name]
        if get() != value:
            put(value)


@contextlib.contextmanager
def preserve_train_modes(module: nn.Module) -> Iterator[None]:
    """Restore ``training`` of ``module`` and of every submodule after the ``with`` block."""
    modes = [(each, each.training) for each in module.modules()]
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "float32_matmul_precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "deterministic": (_deterministic, lambda both: torch.use_deterministic_algorithms(both[0], warn_only=both[1])),
    "anomaly": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "cudnn_benchmark": (lambda: cudnn.benchmark, lambda value: setattr(cudnn, "benchmark", value)),
    "cudnn_deterministic": (lambda: cudnn.deterministic, lambda value: setattr(cudnn, "deterministic", value)),
    "cudnn_allow_tf32": (lambda: cudnn.allow_tf32, lambda value: setattr(cudnn, "allow_tf32", value)),
}
"""Each setting's getter and setter."""
