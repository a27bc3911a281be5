"""Settings of torch that a block of code changes for a while: process-wide ones, and the train mode of modules."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.backends import cuda, cudnn


def capture_torch_settings() -> dict[str, Any]:
    """Return the current settings by name."""
    return {name: get() for name, (get, _) in SETTINGS.items()}


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


def train_except_frozen(module: nn.Module) -> str:
    """Put ``module`` into training mode, without the parts that the user has put into evaluation mode; return their names."""
    roots = [(f"{name}.", root) for name, root in module.named_children() if root.training]
    parts = [(prefix + name, part) for prefix, root in roots for name, part in root.named_modules()]
    frozen = {name: part for name, part in parts if not part.training}
    module.train()
    for part in frozen.values():
        part.training = False
    outer = [name.removeprefix("model.") for name in frozen if name.rpartition(".")[0] not in frozen]
    return ", ".join(outer[:5]) + (" ..." if len(outer) > 5 else "")


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _attention_kernels() -> tuple[bool, ...]:
    return tuple(enabled() for enabled, _ in _KERNELS)


def _set_attention_kernels(values: tuple[bool, ...]) -> None:
    for (_, enable), value in zip(_KERNELS, values, strict=True):
        enable(value)


_KERNELS: tuple[tuple[Callable[[], bool], Callable[[bool], None]], ...] = (
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.math_sdp_enabled, cuda.enable_math_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
)
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "float32_matmul_precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "deterministic": (_deterministic, lambda both: torch.use_deterministic_algorithms(both[0], warn_only=both[1])),
    "anomaly": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "attention_kernels": (_attention_kernels, _set_attention_kernels),
    "cudnn_enabled": (lambda: cudnn.enabled, lambda value: setattr(cudnn, "enabled", value)),
    "cudnn_benchmark": (lambda: cudnn.benchmark, lambda value: setattr(cudnn, "benchmark", value)),
    "cudnn_deterministic": (lambda: cudnn.deterministic, lambda value: setattr(cudnn, "deterministic", value)),
    "cudnn_allow_tf32": (lambda: cudnn.allow_tf32, lambda value: setattr(cudnn, "allow_tf32", value)),
}
"""Each setting's getter and setter."""
