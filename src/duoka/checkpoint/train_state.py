"""Training checkpoints: everything that a run needs to go on as if it had not stopped, in one file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from duoka.checkpoint.rank_zero_write import written_by_one
from duoka.checkpoint.save_load import model_state, read, write
from duoka.errors import CheckpointError, ConfigError

__all__ = ["TRAINING_VERSION", "load_training", "save_training"]

_FORMAT = "duoka.training"
TRAINING_VERSION = 1
"""Raised when a file of before could not be read as one of now."""


def save_training(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Save the state of a run: nested dicts, lists, tuples, numbers, strings, tensors, all of the same type afterwards.

    State dicts of optimisers, schedulers and gradient scalers go in as they are, modules stand for their state dict;
    NumPy's arrays come back as tensors, its scalars as Python's. Writes and waits as ``save`` does.

    Args:
        path: where to, ending in ``.pt`` or ``.pth``.
        state: what ``load_training`` is to return.

    Raises:
        CheckpointError: the state holds what could only be loaded again by running code; the message says where.
        StorageError: the disk is full or the folder is not writable; the file that was there is as it was.

    """
    path = Path(path)
    if path.suffix not in (".pt", ".pth"):
        raise ConfigError(f"{path} has the suffix {path.suffix!r}; a training checkpoint is saved as .pt or .pth")
    written_by_one(str(path), lambda: write(_document(state), path))


def _document(state: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": _FORMAT, "version": TRAINING_VERSION, "state": _modules_as_state(dict(state))}


def _modules_as_state(state: Any) -> Any:
    if isinstance(state, nn.Module):
        return model_state(state)
    return {key: _modules_as_state(value) for key, value in state.items()} if type(state) is dict else state


def load_training(path: str | os.PathLike[str], *, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Return the state that ``save_training`` wrote.

    Raises:
        CheckpointError: the file is damaged, is no training checkpoint, or was written by a newer duoka.

    """
    path = Path(path)
    document, _ = read(path, map_location)
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is no training checkpoint of duoka; read a file of weights with duoka.load")
    if not isinstance(version := document.get("version"), int) or version > TRAINING_VERSION:
        raise CheckpointError(
            f"{path} is a training checkpoint of version {version}, this duoka reads up to version {TRAINING_VERSION}: "
            "install a newer duoka (pip install --upgrade duoka)"
        )
    state: dict[str, Any] = document["state"]
    return state
