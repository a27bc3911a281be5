"""Watch over losses and parameters that are not finite: the step, and the first layer whose output is not finite."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import nn

from duoka.errors import DivergenceError
from duoka.trainer.loss_meter import NEVER, LossMeter
from duoka.utils.pytree import iter_tensors
from duoka.world import World


class LossWatch:
    """Raises on all ranks when a loss or parameter of any rank is not finite. Reading them waits for the device."""

    def __init__(self, module: nn.Module, meter: LossMeter, world: World, layers: "LayerWatch | None") -> None:
        self.module, self.meter, self.world, self.layers = module, meter, world, layers

    def check(self, *, with_parameters: bool) -> None:
        """Raise ``DivergenceError`` if a loss was not finite; every rank must call this at the same step.

        With ``with_parameters`` also if a trained parameter is not finite, which a later loss would show.
        """
        is_finite = not with_parameters or _are_finite(one for one in self.module.parameters() if one.requires_grad)
        mine = torch.tensor([self.meter.first_bad_step(), is_finite], device="cpu")
        step, is_finite = self.world.all_reduce(mine, "min").tolist()
        if step != NEVER:
            self._raise_for_loss(step)
        if not is_finite:
            self._raise_for_parameter()

    def _raise_for_parameter(self) -> NoReturn:
        names = (name for name, one in self.module.named_parameters() if one.requires_grad and not _is_finite(one))
        found = [name for name in self.world.all_gather_object(next(names, "")) if name]
        raise DivergenceError(
            f"after step {self.meter.step} the parameter {found[0].removeprefix('model.')} is not finite, though the losses "
            "are: the gradient of a step was not finite, and training cannot recover from that; nothing was saved since. A "
            "lower lr, max_grad_norm=1.0 or precision='fp32' may help. on_nonfinite_loss='warn' goes on"
        )

    def _raise_for_loss(self, step: int) -> NoReturn:
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


def _are_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether all tensors are finite, and wait only once for each device."""
    flags: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        flags.setdefault(tensor.device, []).append(tensor.detach().isfinite().all())
    return all(bool(torch.stack(found).all()) for found in flags.values())


def _is_finite(values: Any) -> bool:
    numbers = (one for one in iter_tensors(values) if one.is_floating_point() or one.is_complex())
    return all(bool(one.isfinite().all()) for one in numbers)
