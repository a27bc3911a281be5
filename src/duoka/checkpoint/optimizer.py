"""Optimizer state by parameter names, independent of parameter order, wrappers and the number of devices."""

from typing import Any

import torch
from torch import nn

from duoka.checkpoint.key_names import clean_name, match_names, unwrap
from duoka.errors import CheckpointError

_LIKE_ADAM = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)
"""Optimizers with two values for each parameter."""


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return ``optimizer.state_dict()`` with the names of ``model``'s parameters instead of their numbers.

    A parameter outside the model (of a loss, for example) keeps its number, as ``#3``.
    """
    state = optimizer.state_dict()
    names = _names(optimizer, model)
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    return {
        **state,
        "state": {names[number]: value for number, value in state["state"].items()},
        "param_groups": groups,
    }


def optimizer_bytes(optimizer: torch.optim.Optimizer, *, unknown: int = 2) -> int:
    """Return the size of the optimizer's state; before its first step that of ``unknown`` values a parameter.

    The numbers of SGD and of Adam and its relatives are known.
    """
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    if held:
        return sum(tensor.numel() * tensor.element_size() for tensor in held)
    parameters: list[torch.Tensor] = [one for group in optimizer.param_groups for one in group["params"]]
    per_parameter = 2 if type(optimizer) in _LIKE_ADAM else unknown
    if isinstance(optimizer, torch.optim.SGD):
        per_parameter = int(any(group["momentum"] for group in optimizer.param_groups))
    return per_parameter * sum(one.numel() * one.element_size() for one in parameters)


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Any]) -> None:
    """Load what ``optimizer_state`` returned: values by name, settings (``lr``, ``momentum``) by group.

    Raises:
        CheckpointError: the state belongs to other parameters or groups; the optimizer is then unchanged.

    """
    names = _names(optimizer, model)
    saved = [name for group in state["param_groups"] for name in group["params"]]
    matched = match_names(saved, names.values())
    numbers = {name: number for number, name in names.items()}
    own = optimizer.state_dict()["param_groups"]
    current = [[names[number] for number in group["params"]] for group in own]
    found = [[matched.get(name, name) for name in group["params"]] for group in state["param_groups"]]
    _check_groups(optimizer, state["param_groups"], found, current)
    if unknown := [str(name) for name in state["state"] if name not in matched]:
        raise CheckpointError(
            f"the saved {type(optimizer).__name__} has values of {', '.join(unknown[:5])}, which is in none of its groups; use "
            "another copy of the state"
        )
    groups = [{**old, "params": new["params"]} for old, new in zip(state["param_groups"], own, strict=True)]
    values = {numbers[matched[name]]: value for name, value in state["state"].items()}
    try:
        optimizer.load_state_dict({**state, "state": values, "param_groups": groups})
    except (ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"the state of {type(optimizer).__name__} does not fit: {error}") from error


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[int, str]:
    """Return each parameter's name by its number in the optimizer's state dict."""
    inner = unwrap(model)
    known = {id(parameter): clean_name(inner, name) for name, parameter in inner.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {number: known.get(id(parameter), f"#{number}") for number, parameter in enumerate(parameters)}


def _check_groups(
    optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]], found: list[list[str]], wanted: list[list[str]]
) -> None:
    """Refuse other parameters, and another class's settings, which torch would load and the next step would fail on."""
    kind = type(optimizer).__name__
    if len(found) != len(wanted):
        raise CheckpointError(f"the saved {kind} has {len(found)} parameter groups, this one {len(wanted)}")
    for index, (theirs, ours) in enumerate(zip(found, wanted, strict=True)):
        missing, unexpected = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
        if missing or unexpected:
            raise CheckpointError(
                f"group {index} of the saved {kind} has other parameters: without {missing[:10]}, with {unexpected[:10]}"
            )
    added = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}  # by LR schedulers
    for index, (old, new) in enumerate(zip(saved, optimizer.param_groups, strict=True)):
        if missing := sorted(new.keys() - old.keys() - added):
            raise CheckpointError(
                f"the state is of another optimizer than {kind}: its group {index} has no {', '.join(missing)}; load it "
                "into an optimizer of the class that it was saved from"
            )
