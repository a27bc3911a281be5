"""``save`` and ``load``: a model's parameters and buffers in a file, by names that no wrapper leaves a mark in."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, overload

import torch
from torch import nn

from duoka.checkpoint.archive import read_archive, verify_archive, write_archive
from duoka.checkpoint.formats import read_tensor_file, verify_tensor_file, write_tensor_file
from duoka.checkpoint.key_names import clean_name, clean_state, nearest, unwrap
from duoka.checkpoint.load_state import load_state
from duoka.checkpoint.rank_zero_write import written_by_one
from duoka.checkpoint.sanitize import portable, tensor_bytes
from duoka.errors import CheckpointError, ConfigError
from duoka.utils.files import atomic_write

__all__ = ["check_suffix", "load", "model_state", "read", "save", "write"]

M = TypeVar("M", bound=nn.Module)

_NESTED_UNDER = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
_ARCHIVES = (".pt", ".pth")
_TENSORS = ".safetensors"


def save(model_or_state: nn.Module | Mapping[Any, Any], path: str | os.PathLike[str]) -> None:
    """Save a model, a state dict or a nested dict of state, whole or not at all, the same for any number of devices.

    The file is one of plain PyTorch (``.pt``, ``.pth``: ``torch.load(path, weights_only=True)`` reads it anywhere, a
    machine without a GPU included) or of safetensors (``.safetensors``, tensors only). Names carry no ``module.`` or
    ``_orig_mod.``, whatever wraps the model; a child that you named ``module`` keeps its name when a model is given.
    The file carries a checksum, is flushed to the disk, and replaces an older one in one step.

    Rank 0 writes. The other ranks may call as well, and then wait until it has, and raise what it raised; rank 0 waits
    for nobody, so that ``if rank == 0: duoka.save(...)`` is right too.

    Args:
        model_or_state: a module, wrapped or not, or a dict, in which modules stand for their state.
        path: where to; the suffix decides the format. Folders that are not there are made.

    Raises:
        ConfigError: the suffix is none of these.
        CheckpointError: the state holds what could only be loaded again by running code.
        StorageError: the disk is full or the folder is not writable; the file that was there is as it was.

    >>> model = nn.Linear(2, 3)
    >>> save(nn.DataParallel(model), "model.pt")
    >>> load("model.pt", into=nn.Linear(2, 3))
    Linear(in_features=2, out_features=3, bias=True)

    """
    if isinstance(path, nn.Module | Mapping):
        raise ConfigError(f"save takes the model first, then the path: duoka.save(model, {str(model_or_state)!r:.80})")
    path = Path(path)
    check_suffix(path)
    written_by_one(str(path), lambda: write(_plain(model_or_state), path))


def write(state: Any, path: Path) -> None:
    """Write ``state`` to ``path`` on this rank, in the format that the suffix names."""
    ready = portable(state)
    needed_bytes = tensor_bytes(ready)
    with atomic_write(path, needed_bytes=needed_bytes) as file:
        _writer(path)(ready, file)


def _writer(path: Path) -> Any:
    return write_tensor_file if path.suffix == _TENSORS else write_archive


def check_suffix(path: Path) -> None:
    """Make sure that ``save`` knows the format that the suffix of ``path`` names.

    Raises:
        ConfigError: it does not.

    """
    if path.suffix not in (*_ARCHIVES, _TENSORS):
        raise ConfigError(f"{path} has the suffix {path.suffix!r}; a model is saved as .pt, .pth or .safetensors")


def _plain(state: Any) -> Any:
    """``state`` with modules replaced by what is in them, and without wrappers' prefixes."""
    if isinstance(state, nn.Module):
        return model_state(state)
    if not isinstance(state, Mapping):
        raise ConfigError(f"save takes a module or a dict of state, not a {type(state).__name__}")
    return clean_nested(state)


def clean_nested(state: Any) -> Any:
    """``state`` with modules as their state, and every state dict in it without wrappers' prefixes."""
    if isinstance(state, nn.Module):
        return model_state(state)
    if not isinstance(state, dict):
        return state
    if any(isinstance(value, torch.Tensor) for value in state.values()):
        return clean_state(state)
    if not any(isinstance(value, dict | nn.Module) for value in state.values()):
        return state
    kind = OrderedDict if isinstance(state, OrderedDict) else dict
    return kind((key, clean_nested(value)) for key, value in state.items())


def model_state(model: nn.Module) -> dict[str, Any]:
    """Return the state dict of ``model`` by the names it has when nothing is wrapped, the model's or a part's."""
    own = unwrap(model)
    state = own.state_dict()
    cleaned = OrderedDict((clean_name(own, name), value) for name, value in state.items())
    if hasattr(state, "_metadata"):
        versions = {clean_name(own, name): version for name, version in state._metadata.items()}
        cleaned._metadata = versions  # type: ignore[attr-defined]
    return cleaned


@overload
def load(
    path: str | os.PathLike[str], into: None = None, *, map_location: str | torch.device = "cpu", strict: bool = True
) -> Any: ...


@overload
def load(
    path: str | os.PathLike[str], into: M, *, map_location: str | torch.device = "cpu", strict: bool = True
) -> M: ...


def load(
    path: str | os.PathLike[str],
    into: M | None = None,
    *,
    map_location: str | torch.device = "cpu",
    strict: bool = True,
) -> Any:
    """Return the state that a file holds, or load it into a model and return the model.

    Accepts what one GPU or many wrote, with or without ``module.`` and ``_orig_mod.`` in the names, as ``.pt``,
    ``.pth`` or ``.safetensors``, a state dict alone or inside a training dict (``{"state_dict": ...}``,
    ``{"model": ...}``). Never runs code from the file. The file's checksum is verified.

    Args:
        path: the file.
        into: the model to load into, wrapped or not; names are matched to its own. Without it, prefixes are removed
            from files that other programs wrote where every name has them.
        map_location: the device that the returned tensors lie on; a model's stay where they are.
        strict: whether names that are missing or unexpected are an error; a wrong shape always is.

    Raises:
        CheckpointError: the file is damaged, would run code, or does not fit the model, which is then as it was.

    """
    if isinstance(path, nn.Module):
        raise ConfigError(f"load takes the path first, then the model: duoka.load({str(into)!r:.80}, into=model)")
    path = Path(path)
    state, ours = read(path, map_location)
    if into is None:
        return state if ours else clean_nested(state)
    load_state(into, _model_state_in(state, path), strict=strict, source=str(path))
    return into


def read(path: Path, map_location: str | torch.device = "cpu") -> tuple[Any, bool]:
    """Return what ``path`` holds and whether duoka wrote it; the content decides the format, not the suffix."""
    try:
        with path.open("rb") as file:
            if _is_tensor_file(file):
                return read_tensor_file(path, map_location), verify_tensor_file(path)
        return read_archive(path, map_location), verify_archive(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}{_similar(path)}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}; name a readable checkpoint") from error


def _is_tensor_file(file: BinaryIO) -> bool:
    start = file.read(9)
    return start[8:] == b"{" or (Path(file.name).suffix == _TENSORS and start[:2] != b"PK")


def _similar(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = nearest(path.name, names)
    return f"; did you mean {path.parent / close}?" if close else "; check the path"


def _model_state_in(state: Any, path: Path) -> Mapping[str, Any]:
    """The model's state dict inside whatever nesting a training script saved it in."""
    if isinstance(state, Mapping) and str(state.get("format", "")).startswith("duoka."):
        state = state.get("state")
    inner = state
    while isinstance(inner, Mapping) and (found := [key for key in _NESTED_UNDER if isinstance(inner.get(key), dict)]):
        inner = inner[found[0]]
    if isinstance(inner, Mapping) and any(isinstance(value, torch.Tensor) for value in inner.values()):
        return inner
    keys = ", ".join(map(repr, list(state)[:10])) if isinstance(state, Mapping) else f"a {type(state).__name__}"
    raise CheckpointError(
        f"{path} holds no state dict of a model: it has {keys or 'nothing'}. "
        f"Looked at the top and under {', '.join(_NESTED_UNDER)}"
    )
