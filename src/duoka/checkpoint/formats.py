"""Files in the safetensors format, written as a stream, with a checksum in their metadata.

The checksum is the CRC-32 of the whole file with eight zeros in the checksum's own place. Tied tensors are stored once,
and the metadata name what each other name stands for, as ``safetensors.torch.save_model`` does. The library itself
writes a file of its own beside the one it is given, private and not flushed to the disk, so the few lines of the
format are written here; reading is the library's.

Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch

from duoka.errors import CheckpointError

__all__ = ["read_tensor_file", "verify_tensor_file", "write_tensor_file"]

_CHECKSUM = "duoka.crc32"
_BLANK = "00000000"
_CHUNK_BYTES = 1 << 20
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensor_file(state: Mapping[str, Any], file: BinaryIO) -> None:
    """Write a portable, flat ``state`` of named tensors.

    Raises:
        CheckpointError: there is something in ``state`` that the format cannot hold.

    """
    tensors, aliases = _without_ties(state)
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())  # keeps every tensor aligned
    header = _header(tensors, order, aliases)
    crc = _write(file, header, 0)
    for name in order:
        crc = _write(file, _raw(tensors[name]), crc)
    file.seek(_place_of_checksum(header))
    file.write(b"%08x" % crc)


def _without_ties(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return each tensor under the first of its names, and which name each further one stands for."""
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in state.items():
        _check(name, value)
        if id(value) in first:
            aliases[name] = first[id(value)]
        else:
            first[id(value)] = name
            tensors[name] = value
    return tensors, aliases


def _check(name: Any, value: Any) -> None:
    if not isinstance(name, str) or name == "__metadata__" or not isinstance(value, torch.Tensor):
        what = f"{name!r} holds a {type(value).__name__}"
    elif value.dtype not in _DTYPES or value.layout is not torch.strided or value.is_quantized:
        what = f"{name!r} is a tensor of {value.dtype}, {str(value.layout).removeprefix('torch.')}"
    else:
        return
    raise CheckpointError(f"a .safetensors file holds only named dense tensors of common types, and {what}; use .pt")


def _header(tensors: Mapping[str, torch.Tensor], order: list[str], aliases: Mapping[str, str]) -> bytes:
    """The length and the JSON text that begin the file, padded with spaces to a multiple of eight bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", _CHECKSUM: _BLANK, **aliases}}
    start = 0
    for name in order:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _raw(tensor: torch.Tensor) -> memoryview:
    flat = tensor.contiguous().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    return flat.view(torch.uint8).numpy().data


def _write(file: BinaryIO, data: bytes | memoryview, crc: int) -> int:
    if len(data):
        file.write(data)
    return zlib.crc32(data, crc)


def _place_of_checksum(header: bytes) -> int:
    return header.index(f'"{_CHECKSUM}":"'.encode()) + len(f'"{_CHECKSUM}":"')


def read_tensor_file(path: Path, map_location: str | torch.device) -> dict[str, torch.Tensor]:
    """Return the tensors of ``path``, tied ones under each of their names.

    Raises:
        CheckpointError: the file is truncated or was changed.

    """
    verify_tensor_file(path)
    try:
        with safetensors.safe_open(path, framework="pt", device=str(map_location)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); use another copy of it") from error
    ties = {name: tensors[first] for name, first in metadata.items() if first in tensors and name not in tensors}
    return {**tensors, **ties}


def verify_tensor_file(path: Path) -> bool:
    """Compare ``path`` with its checksum; return whether duoka wrote it.

    Raises:
        CheckpointError: the file is truncated or was changed.

    """
    with path.open("rb") as file:
        header = _read_header(file)
        if f'"{_CHECKSUM}":"'.encode() not in header:
            return False
        place = _place_of_checksum(header)
        noted = header[place : place + len(_BLANK)]
        crc = zlib.crc32(header[:place] + _BLANK.encode() + header[place + len(_BLANK) :])
        while data := file.read(_CHUNK_BYTES):
            crc = zlib.crc32(data, crc)
    if noted != b"%08x" % crc:
        raise CheckpointError(f"{path} is damaged: its bytes do not match its checksum; use another copy of it")
    return True


def _read_header(file: BinaryIO) -> bytes:
    length = file.read(8)
    return length + file.read(min(int.from_bytes(length, "little"), 100_000_000))
