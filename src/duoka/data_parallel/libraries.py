"""What libraries note about a model in its process when it is constructed, and miss where it was brought by other means."""

from __future__ import annotations

import sys

from torch import nn

__all__ = ["introduce"]


def introduce(module: nn.Module) -> None:
    """Note it for a model that was brought here: Hugging Face's say by class which hidden states can be returned."""
    capturing = sys.modules.get("transformers.utils.output_capturing") or sys.modules.get("transformers.utils.generic")
    registry = getattr(capturing, "_CAN_RECORD_REGISTRY", None)
    if registry is None:
        return
    for part in module.modules():
        if hasattr(part, "_can_record_outputs"):
            registry[str(type(part)) if type(registry) is dict else part] = part._can_record_outputs
