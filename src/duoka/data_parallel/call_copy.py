"""Copy of a call's arguments for a check, which notices when the call changes them."""

import copy
import pickle
from typing import Any

import torch
from torch import nn

from duoka.data_parallel.placeholders import extract_tensors
from duoka.data_parallel.scatter import Part


class CallCopy:
    """Copies of a call's arguments, which notice when the call changes them."""

    def __init__(self, part: Part, device: torch.device | None) -> None:
        needs_gradient = torch.is_grad_enabled()
        self.inputs: list[torch.Tensor] = []
        given = []
        for tensor in part.tensors:
            own = tensor.detach().to(device or tensor.device, copy=True)
            if needs_gradient and tensor.requires_grad:
                self.inputs.append(own.requires_grad_())
                own = own.clone()  # a leaf refuses in-place writes
            given.append(own)
        self._args, self._kwargs = Part(given, copy.deepcopy(part.structure)).arguments()
        self._tensors, self._before = self._content()
        self._versions = list(map(_version, self._tensors))

    def apply(self, model: nn.Module) -> Any:
        """Call ``model``."""
        return model(*self._args, **self._kwargs)

    def side_effect(self) -> str:
        """Return what the call changed about its arguments; empty if nothing."""
        content = self._content()[1]
        if list(map(_version, self._tensors)) != self._versions:
            return "its forward changes its inputs in place, and the caller's tensors stay as they were"
        return "its forward changes an object that it receives" if content != self._before else ""

    def _content(self) -> tuple[list[torch.Tensor], bytes]:
        tensors, structure = extract_tensors((self._args, self._kwargs))
        try:
            return tensors, pickle.dumps(structure)
        except Exception:  # an object that pickle refuses
            return tensors, b""


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
