"""The form of a training checkpoint: what a file must hold before a fit takes anything from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

from duoka.errors import CheckpointError
from duoka.utils.rng_state import preserve_rng_state, set_rng_state
from duoka.utils.schema import check_form, template_fault
from duoka.utils.text import first_line


class _SavedPosition(TypedDict):
    seed: int
    epoch: int
    samples: int


class _SavedBest(TypedDict):
    value: float
    epoch: int
    results: dict[str, Any]


class _SavedRecord(TypedDict):
    epoch: int
    step: int


class _SavedProgress(TypedDict):
    epoch: int
    step: int
    samples: int
    samples_in_epoch: int
    history: list[_SavedRecord]
    validation: dict[str, Any]
    evaluations_without_improvement: int
    best: _SavedBest | None


class _SavedSchedule(TypedDict):
    signature: str
    steps: int
    peak_lrs: list[float]
    scheduler: dict[str, Any] | None
    length: int | None


class _SavedGroup(TypedDict):
    params: list[str]


class _SavedOptimizer(TypedDict):
    state: dict[str, dict[str, Any]]
    param_groups: list[_SavedGroup]


class _SavedRank(TypedDict):
    rng: dict[str, Any]
    loss_meter: tuple[Any, Any]


class _SavedTraining(TypedDict):
    """The keys of a training checkpoint; a newer duoka may add some."""

    model: dict[str, Any]
    loss: dict[str, Any]
    optimizer: _SavedOptimizer
    optimizer_name: str
    schedule: _SavedSchedule
    scaler: dict[str, Any]
    position: _SavedPosition
    state: _SavedProgress
    best_weights: NotRequired[dict[str, Any]]
    monitor: str | None
    has_unused_parameters: bool | None
    ranks: list[_SavedRank]


_LARGEST = 2**53
_REMEDY = "use another copy of it, or begin a new run"


def check_training(saved: Any, path: Path) -> None:
    """Raise ``CheckpointError``, with the key's path, unless ``saved`` has the form of a training checkpoint."""
    check_form(saved, _SavedTraining, str(path), remedy=_REMEDY, error=CheckpointError)
    if not saved["ranks"]:
        raise _fault(path, "ranks is empty; it must have the state of one rank or more")
    for name in ("position", "state"):
        for key, value in saved[name].items():
            if type(value) is int and not 0 <= value < _LARGEST and key != "seed":
                raise _fault(path, f"{name}.{key} is {value}; it must be a count from 0 to 2**53")
    for number, rank in enumerate(saved["ranks"]):
        if not all(type(one) in (int, float) for one in rank["loss_meter"]):
            raise _fault(path, f"ranks[{number}].loss_meter is {rank['loss_meter']}; it must be a sum and a weight")
        _check_generators(rank["rng"], f"ranks[{number}].rng", path)


def _check_generators(state: dict[str, Any], key: str, path: Path) -> None:
    """Raise for states that a generator would refuse, which only the generators know."""
    with preserve_rng_state():
        try:
            set_rng_state(state)
        except Exception as error:  # generators raise errors of many types
            name = f" ({type(error).__name__}: {first_line(error)})"
            raise _fault(path, f"{key} is no state of the random generators{name}") from error


def check_against(saved: Any, present: Any, key: str, path: Path) -> None:
    """Raise ``CheckpointError`` unless saved state has the form of the present state of the same object."""
    if fault := template_fault(saved, present, key):
        raise _fault(path, fault)


def check_optimizer(saved: Any, optimizer: torch.optim.Optimizer, sizes: dict[str, torch.Size], path: Path) -> None:
    """Raise ``CheckpointError`` for an optimizer's state that its next step would fail on.

    Args:
        saved: the optimizer's entry of the checkpoint.
        optimizer: the optimizer that will take it.
        sizes: the shape of each parameter by its name in ``saved``.
        path: the checkpoint.
    """
    groups = optimizer.state_dict()["param_groups"]
    if len(saved["param_groups"]) == len(groups):  # else the loading itself raises, and names both numbers
        for number, (theirs, ours) in enumerate(zip(saved["param_groups"], groups, strict=True)):
            shared = {key for key in ours if key in theirs and key != "params"}
            saved_options, options = ({key: group[key] for key in shared} for group in (theirs, ours))
            check_against(saved_options, options, f"optimizer.param_groups[{number}]", path)
    if not type(optimizer).__module__.startswith("torch.optim."):
        return  # only torch's optimizers have state of the parameter's shape, and the same keys for each
    first: dict[str, type] | None = None
    for name, state in saved["state"].items():
        kinds = {key: type(value) for key, value in state.items()}
        first = first or kinds
        if kinds != first:
            odd = sorted(key for key in kinds.keys() | first.keys() if kinds.get(key) != first.get(key))
            raise _fault(path, f"optimizer.state.{name} differs from other parameters' state in {', '.join(odd[:5])}")
        for key, value in state.items():
            if value is not None and not isinstance(value, torch.Tensor):
                raise _fault(path, f"optimizer.state.{name}.{key} is a {type(value).__name__}; it must be a tensor")
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != sizes.get(name, value.shape):
                shapes = f"the shape {tuple(value.shape)}, and the parameter has {tuple(sizes[name])}"
                raise _fault(path, f"optimizer.state.{name}.{key} has {shapes}")


def _fault(path: Path, fault: str) -> CheckpointError:
    return CheckpointError(f"{path}: {fault}: {_REMEDY}")
