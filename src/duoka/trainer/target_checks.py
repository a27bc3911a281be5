"""Targets that a loss would misread: labels that no output stands for, and shapes that broadcast to a matrix."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch

from duoka.errors import ConfigError, DataError
from duoka.trainer.loss_reduction import class_loss

_SIZE = r"\(torch\.Size\(\[(.*?)\]\)\)"
_BROADCAST = rf"Using a target size {_SIZE} that is different to the input size {_SIZE}"


def refuse_broadcast(compute: Callable[[], Any]) -> Any:
    """Return ``compute()``, a loss; raise ``ConfigError`` where it compares each output with each target.

    torch's losses warn of every broadcast. One that makes no more numbers than there are, such as a target of one number,
    may be meant.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Using a target size")
            return compute()
    except UserWarning as warning:
        if (found := re.search(_BROADCAST, str(warning))) is None:
            raise
        sizes = [torch.Size(map(int, re.findall(r"\d+", size))) for size in found.groups()]
        broadcast: torch.Size = torch.broadcast_shapes(*sizes)  # type: ignore[no-untyped-call]
        if broadcast.numel() > max(size.numel() for size in sizes):
            target, output = map(tuple, sizes)
            raise ConfigError(
                f"the loss gets an output of shape {output} and a target of shape {target}, and would compare each with all: "
                f"give both one shape: {_remedy(target, output)}"
            ) from warning
    return compute()


def _remedy(target: tuple[int, ...], output: tuple[int, ...]) -> str:
    if target == (*output, 1):
        return "output.unsqueeze(-1) at the end of the model, or target.squeeze(-1) in the data"
    if output == (*target, 1):
        return "output.squeeze(-1) at the end of the model, or target.unsqueeze(-1) in the data"
    return "reshape the target in the data, or the output at the end of the model"


def explained_label_error(error: IndexError, output: Any, target: Any) -> DataError | None:
    """Return ``DataError`` with both numbers for torch's error of a label out of range, else ``None``."""
    is_torchs = re.fullmatch(r"Target -?\d+ is out of bounds\.", str(error))
    return _out_of_range(target, output.shape[1], None) if is_torchs and _are_classes(output, target) else None


def check_labels(target: Any, num_classes: int, ignored: int) -> None:
    """Raise ``DataError`` if a label is not below ``num_classes``, for devices that a wrong one would stop for good."""
    if isinstance(target, torch.Tensor) and not target.is_floating_point() and target.numel():
        counted = target[target != ignored]
        if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < num_classes:
            raise _out_of_range(counted, num_classes, ignored)


def class_count(loss: Any, output: Any, target: Any) -> tuple[int, int] | None:
    """Return the number of classes and the ignored label of one of torch's class losses; ``None`` of another loss."""
    function, options = class_loss(loss)
    if function is None or not _are_classes(output, target):
        return None
    return output.shape[1], options.get("ignore_index", -100)


def _are_classes(output: Any, target: Any) -> bool:
    tensors = isinstance(output, torch.Tensor) and isinstance(target, torch.Tensor)
    return tensors and output.ndim >= 2 and not target.is_floating_point() and output.shape != target.shape


def _out_of_range(target: torch.Tensor, num_classes: int, ignored: int | None) -> DataError:
    lowest, highest = (int(value) for value in torch.aminmax(target))
    labels = f"labels reach {highest}" if highest >= num_classes else f"labels go down to {lowest}"
    one_based = lowest == 1 and highest == num_classes
    remedy = (
        "subtract 1 from the labels"
        if one_based
        else f"give the last layer {highest + 1} outputs, or correct the labels"
    )
    if highest < num_classes:
        named = "" if ignored is None else f" (only {ignored} is ignored)"
        remedy = f"correct the labels, or name the label to ignore: cross_entropy's ignore_index={lowest}{named}"
    return DataError(f"the model has {num_classes} outputs, {labels}: labels are 0 to {num_classes - 1}; {remedy}")
