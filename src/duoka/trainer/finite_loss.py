"""Watch over losses that are not finite: the step, and the first layer whose output is not finite."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from duoka.errors import DivergenceError
from duoka.trainer.loss_meter import NEVER, LossMeter
from duoka.utils.pytree import iter_tensors
from duoka.world import World


class LossWatch:
    """Raises on all ranks when a loss of any rank is not finite. Reading the losses waits for the device."""

    def __init__(self, meter: LossMeter, world: World, layers: "LayerWatch | None") -> None:
        self.meter, self.world, self.layers = meter, world, layers

    def check(self) -> None:
        """Raise ``DivergenceError`` if a loss was not finite; every rank must call this at the same step."""
        first = torch.tensor(self.meter.first_bad_step(), device="cpu")
        step = int(self.world.all_reduce(first, "min"))
        if step == NEVER:
            return
        where = ""
        if self.layers is not None:
            found = [place for place in self.world.all_gather_object(self.layers.first) if place]
            where = found[0] if found else "The outputs of all layers are finite, so the loss function gives it. "
        raise DivergenceError(
            f"the loss of step {step} is not finite, and training cannot recover from that; nothing was saved since. {where}"
            "A lower lr, max_grad_norm=1.0 or precision='fp32' may help. "
            + ("" if self.layers else "find_nonfinite_layer=True names the layer, and ")
            + "on_nonfinite_loss='warn' goes on"
        )


class LayerWatch:
    """Notes the first layer of a model whose output is not finite; every layer then waits for the device."""

    def __init__(self, model: nn.Module, stack: contextlib.ExitStack) -> None:
        self.first = ""
        """A sentence about the layer; empty before it is found."""
        self.model = model
        for name, layer in model.named_modules():
            hook = layer.register_forward_hook(self._hook_of(name or "the model itself"))
            stack.callback(hook.remove)

    def _hook_of(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(layer: nn.Module, _: Any, output: Any) -> None:
            if self.first or not self.model.training or _is_finite(output):
                return
            cause = ""
            if not _is_finite(list(layer.parameters(recurse=False))):
                cause = ", whose parameters are not finite: the gradient of an earlier step was not"
            self.first = f"The first output that is not finite is that of {name} ({type(layer).__name__}){cause}. "

        return note


def _is_finite(values: Any) -> bool:
    numbers = (one for one in iter_tensors(values) if one.is_floating_point() or one.is_complex())
    return all(bool(one.isfinite().all()) for one in numbers)
