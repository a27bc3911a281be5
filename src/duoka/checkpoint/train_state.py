"""Training checkpoints: everything that a run needs to resume exactly, in one file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from duoka.checkpoint.formats import read_file
from duoka.checkpoint.rank_zero_write import write_on_rank_zero
from duoka.checkpoint.save_load import model_state, write
from duoka.errors import CheckpointError, CheckpointFormatError, ConfigError

_FORMAT = "duoka.training"
TRAINING_VERSION = 1
"""Increased when the format changes, so that an older file cannot be read in the same way."""


def save_training(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Save the state of a run: nested dicts, lists, tuples, numbers, strings and tensors, which keep their types.

    State dicts of optimizers, schedulers and gradient scalers need no change; modules stand for their state dict.
    NumPy's arrays load as tensors, its scalars as Python's. Ranks write and wait as in ``save``.

    Args:
        path: the file, ending in ``.pt`` or ``.pth``.
        state: what ``load_training`` returns.

    Raises:
        CheckpointError: only running code could load a value again; the message names its place.
        StorageError: the disk is full or the folder is not writable; the old file is unchanged.

    """
    path = Path(path)
    if path.suffix not in (".pt", ".pth"):
        raise ConfigError(f"{path} has the suffix {path.suffix!r}; a training checkpoint is saved as .pt or .pth")

    def write_state() -> None:
        write({"format": _FORMAT, "version": TRAINING_VERSION, "state": _without_modules(dict(state))}, path)

    write_on_rank_zero(str(path), write_state)


def _without_modules(state: Any) -> Any:
    """Return ``state`` with state dicts in place of modules."""
    if isinstance(state, nn.Module):
        return model_state(state)
    return {key: _without_modules(value) for key, value in state.items()} if type(state) is dict else state


def load_training(path: str | os.PathLike[str], *, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Return the state that ``save_training`` wrote.

    Raises:
        CheckpointError: the file is damaged, is no training checkpoint, or was written by a newer duoka.

    """
    path = Path(path)
    document, _ = read_file(path, map_location)
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise CheckpointFormatError(
            f"{path} is no training checkpoint of duoka; load a file of weights with duoka.load"
        )
    if type(version := document.get("version")) is not int or version > TRAINING_VERSION:
        raise CheckpointFormatError(
            f"{path} is a training checkpoint of version {version}, this duoka reads up to version {TRAINING_VERSION}: "
            "install a newer duoka (pip install --upgrade duoka)"
        )
    state = document.get("state")
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: state is a {type(state).__name__}; it must be a dict: use another copy of it")
    return state
