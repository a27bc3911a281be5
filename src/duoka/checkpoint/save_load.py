"""``save`` and ``load``: a model's parameters and buffers in a file, by names without wrappers' prefixes."""

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import nn

from duoka.checkpoint.formats import read_file, write_archive, write_safetensors
from duoka.checkpoint.key_names import clean_name, clean_state, rename_keys, unwrap
from duoka.checkpoint.load_state import load_state
from duoka.checkpoint.rank_zero_write import write_on_rank_zero
from duoka.checkpoint.sanitize import tensor_bytes, to_plain_types
from duoka.errors import CheckpointError, ConfigError
from duoka.utils.files import atomic_write
from duoka.utils.validation import invalid_option

M = TypeVar("M", bound=nn.Module)

_NESTED_UNDER = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
_ARCHIVES = (".pt", ".pth")
_SAFETENSORS = ".safetensors"


def save(model_or_state: nn.Module | Mapping[Any, Any], path: str | os.PathLike[str]) -> None:
    """Save a model, a state dict or a nested dict of state in one file, the same for any number of devices.

    The file is an archive of plain PyTorch (``.pt``, ``.pth``: ``torch.load(path, weights_only=True)`` reads it on any
    machine) or of safetensors (``.safetensors``, tensors only). Names carry no ``module.`` or ``_orig_mod.`` of
    wrappers; a child that you named ``module`` keeps its name when a model is given. The file has a checksum, is
    flushed to disk, and replaces an older file in one step.

    Rank 0 writes. The other ranks may call too; they wait until rank 0 has written, and raise what it raised. Rank 0
    waits for no other rank, so ``if rank == 0: duoka.save(...)`` works as well.

    Args:
        model_or_state: a module, wrapped or not, or a dict, in which modules stand for their state.
        path: the file; the suffix decides the format. Missing folders are created.

    Raises:
        ConfigError: the suffix is none of these.
        CheckpointError: only running code could load the state again.
        StorageError: the disk is full or the folder is not writable; the old file is unchanged.

    >>> model = nn.Linear(2, 3)
    >>> save(nn.DataParallel(model), "model.pt")
    >>> load("model.pt", into=nn.Linear(2, 3))
    Linear(in_features=2, out_features=3, bias=True)

    """
    if isinstance(path, nn.Module | Mapping):
        raise ConfigError(f"save takes the model first, then the path: duoka.save(model, {str(model_or_state)!r:.80})")
    path = Path(path)
    check_suffix(path)

    def write_state() -> None:
        if not isinstance(model_or_state, nn.Module | Mapping):
            raise ConfigError(f"save takes a module or a dict of state, not a {type(model_or_state).__name__}")
        write(clean_nested(model_or_state), path)

    write_on_rank_zero(str(path), write_state)


def write(state: Any, path: Path) -> None:
    """Write ``state`` to ``path`` on this rank, in the format that the suffix names."""
    plain = to_plain_types(state)
    with atomic_write(path, needed_bytes=tensor_bytes(plain)) as file:
        (write_safetensors if path.suffix == _SAFETENSORS else write_archive)(plain, file)


def check_suffix(path: Path) -> None:
    """Raise ``ConfigError`` if ``save`` does not know the suffix of ``path``."""
    if path.suffix not in (*_ARCHIVES, _SAFETENSORS):
        raise ConfigError(f"{path} has the suffix {path.suffix!r}; a model is saved as .pt, .pth or .safetensors")


def clean_nested(state: Any) -> Any:
    """Return ``state`` with each module as its state dict, and each state dict without wrappers' prefixes."""
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
    """Return the state dict of ``model`` by the names that it has without wrappers around it or its parts."""
    inner = unwrap(model)
    return rename_keys(inner.state_dict(), lambda name: clean_name(inner, name))


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

    Accepts ``.pt``, ``.pth`` and ``.safetensors`` files that one GPU or many wrote, with or without ``module.`` and
    ``_orig_mod.`` in the names, as a state dict alone or inside a training dict (``{"state_dict": ...}``,
    ``{"model": ...}``). Loading never runs code from the file, and verifies its checksum.

    Args:
        path: the file.
        into: the model to load into, wrapped or not; names are matched to its own. Without it, prefixes are removed
            from files that other programs wrote where every name has them.
        map_location: the device of the returned tensors; a model's tensors keep their devices.
        strict: whether missing or unexpected names are an error; a wrong shape always is.

    Raises:
        CheckpointError: the file is damaged, would run code, or does not fit the model, which is then unchanged.

    """
    if isinstance(path, nn.Module):
        raise ConfigError(f"load takes the path first, then the model: duoka.load({str(into)!r:.80}, into=model)")
    if into is not None and not isinstance(into, nn.Module):
        raise invalid_option("into", into, "the model to load into, a torch.nn.Module")
    path = Path(path)
    state, is_ours = read_file(path, map_location)
    if into is None:
        return state if is_ours else clean_nested(state)
    load_state(into, _model_state_in(state, path), strict=strict, source=str(path))
    return into


def _model_state_in(state: Any, path: Path) -> Mapping[str, Any]:
    """Return the model's state dict from the dict that a training script saved it in."""
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
