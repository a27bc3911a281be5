"""Checkpoint files: archives of ``torch.save`` and safetensors files, each with a checksum that loading verifies.

The checksum is the CRC-32 of the file's other bytes. An archive has it in its zip comment, a safetensors file in its
metadata; other programs ignore it. Archives without it are checked by the CRC-32 that zip stores for each record.
"""

import contextlib
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

from duoka.errors import CheckpointError
from duoka.utils.files import open_file
from duoka.utils.text import did_you_mean, first_line

_COMMENT = re.compile(rb"duoka crc32=([0-9a-f]{8})\Z")
_COMMENT_BYTES = len("duoka crc32=00000000")
_KEY, _BLANK = "duoka.crc32", "00000000"
_IN_HEADER = re.compile(rb'"duoka\.crc32":"(.{8})', re.DOTALL)
_CHUNK_BYTES = 1 << 20
_MAX_HEADER_BYTES = 100_000_000
_FOLDER = 0x10


def write_archive(state: Any, file: BinaryIO) -> None:
    """Write plain ``state`` as ``torch.save`` does, with a checksum in the zip comment."""
    torch.save(state, file)
    comment = b"duoka crc32=%08x" % _crc32(file, file.seek(0, os.SEEK_END))
    file.seek(-2, os.SEEK_END)  # the archive ends with the length of its comment, which is 0 until now
    file.write(len(comment).to_bytes(2, "little") + comment)


def write_safetensors(state: Mapping[str, Any], file: BinaryIO) -> None:
    """Write a plain, flat ``state`` of named tensors; the file is built in memory first.

    Tied tensors are stored once. The metadata map each further name to the stored one, as in
    ``safetensors.torch.save_model``.

    Raises:
        CheckpointError: the format cannot hold a value of ``state``.

    """
    tensors, aliases = _separate_ties(state)
    content = memoryview(safetensors.torch.save(tensors, {"format": "pt", **aliases, _KEY: _BLANK}))
    place = _IN_HEADER.search(content)
    assert place is not None  # the metadata have it
    file.write(content[: place.start(1)])
    file.write(b"%08x" % zlib.crc32(content))
    file.write(content[place.end(1) :])


def _separate_ties(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return each tensor under the first of its names, and the first name by each further name."""
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[int, str] = {}
    storages: set[int] = set()
    for name, value in state.items():
        _check_storable(name, value)
        if id(value) in names:
            aliases[name] = names[id(value)]
            continue
        names[id(value)] = name
        storage = value.untyped_storage().data_ptr()
        tensors[name] = (value.clone() if storage in storages else value).contiguous()
        storages.add(storage)
    return tensors, aliases


def _check_storable(name: Any, value: Any) -> None:
    found = f"{name!r} holds a {type(value).__name__}"
    if isinstance(name, str) and name != "__metadata__" and isinstance(value, torch.Tensor):
        found = f"{name!r} is a tensor of {value.dtype}, {str(value.layout).removeprefix('torch.')}"
        if value.layout is torch.strided and not value.is_quantized:
            with contextlib.suppress(KeyError, ValueError, safetensors.SafetensorError):  # the dtype
                safetensors.torch.save({name: torch.empty(0, dtype=value.dtype)})
                return
    raise CheckpointError(f"a .safetensors file holds only named dense tensors of common types, and {found}; use .pt")


def read_file(path: Path, map_location: str | torch.device = "cpu") -> tuple[Any, bool]:
    """Return the content of ``path`` and whether duoka wrote it; the content decides the format, not the suffix.

    Raises:
        CheckpointError: the file is missing or damaged, would run code, or holds more than numbers, strings and tensors.

    """
    try:
        with open_file(path) as file:
            start = file.read(9)
            if start[8:] == b"{" or (path.suffix == ".safetensors" and start[:2] != b"PK"):
                is_ours = _verify_safetensors(path, file)
                return _read_safetensors(path, map_location), is_ours
            # torch before 1.6 wrote no zip, and no checksum
            is_ours = start[:2] == b"PK" and _verify_archive(path, file)
        return _read_archive(path, map_location), is_ours
    except FileNotFoundError as error:
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, names, cutoff=0.75) or "check the path"
        raise CheckpointError(f"there is no file {path}; {hint}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}; name a readable checkpoint") from error


def _crc32(file: BinaryIO, count: int, crc: int = 0, start: int = 0) -> int:
    """Return the CRC-32 of ``count`` bytes from ``start``."""
    file.seek(start)
    while count > 0 and (data := file.read(min(count, _CHUNK_BYTES))):
        crc = zlib.crc32(data, crc)
        count -= len(data)
    return crc


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: its bytes do not match its checksum; use another copy of it")


def _verify_safetensors(path: Path, file: BinaryIO) -> bool:
    """Verify the checksum of a safetensors file, and return whether the file has one."""
    file.seek(0)
    length = file.read(8)
    header = length + file.read(min(int.from_bytes(length, "little"), _MAX_HEADER_BYTES))
    place = _IN_HEADER.search(header)
    if place is None:
        return False
    blank = header[: place.start(1)] + _BLANK.encode() + header[place.end(1) :]
    rest = file.seek(0, os.SEEK_END) - len(header)
    if place[1] != b"%08x" % _crc32(file, rest, zlib.crc32(blank), len(header)):
        raise _damaged(path)
    return True


def _read_safetensors(path: Path, map_location: str | torch.device) -> dict[str, torch.Tensor]:
    try:
        with safetensors.safe_open(path, framework="pt", device=str(map_location)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); use another copy of it") from error
    ties = {name: tensors[first] for name, first in metadata.items() if first in tensors and name not in tensors}
    return {**tensors, **ties}


def _verify_archive(path: Path, file: BinaryIO) -> bool:
    """Verify the checksum of an archive, or its records' where it has none; return whether it has one."""
    body_bytes = max(0, file.seek(0, os.SEEK_END) - _COMMENT_BYTES)
    file.seek(body_bytes)
    comment = _COMMENT.match(file.read())
    if comment is None:
        _verify_records(path, file)
        return False
    empty_comment = b"\0\0"  # what preceded the comment when the checksum was computed
    if zlib.crc32(empty_comment, _crc32(file, body_bytes - len(empty_comment))) != int(comment[1], 16):
        raise _damaged(path)
    return True


def _verify_records(path: Path, file: BinaryIO) -> None:
    """Check each record of another program's archive; a CRC of 0 means that the program stored none."""
    try:
        with zipfile.ZipFile(file) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):  # torch's own criterion
                raise CheckpointError(f"{path} is a TorchScript program, which is code; save its state_dict() instead")
            file.seek(-2 - len(archive.comment), os.SEEK_END)
            declared = int.from_bytes(file.read(2), "little")
            if declared != len(archive.comment):  # zipfile accepts a part of duoka's comment, whose end is cut off
                raise zipfile.BadZipFile(f"{len(archive.comment)} of the last {declared} bytes are there")
            for record in archive.infolist():
                if record.external_attr & _FOLDER:  # torch would read a folder's bytes from uninitialized memory
                    raise zipfile.BadZipFile(f"{record.filename} is marked as a folder")
                if record.CRC:
                    with archive.open(record) as data:
                        while data.read(_CHUNK_BYTES):
                            pass
    except (zipfile.BadZipFile, OSError, RuntimeError, ValueError, zlib.error, EOFError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); use another copy of it") from error


def _read_archive(path: Path, map_location: str | torch.device) -> Any:
    unknown = (
        f"{path} is damaged, or is no checkpoint of PyTorch; give a file that duoka.save or torch.save has written"
    )
    try:
        with open_file(path) as file:  # torch reads a path that ends in .safetensors as that format only
            return torch.load(file, map_location=map_location, weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        names = _code_named_in(path, str(error))
        code = (
            f"{path} was not loaded: it names code to be run on loading ({', '.join(names)}), and a checkpoint needs only "
            "numbers, strings and tensors. If you trust its author, convert it once, in a separate process:\n"
            f'    state = torch.load("{path}", weights_only=False)\n'
            '    duoka.save(state, "converted.pt")  # a model, or a dict of state; for other objects, their state_dict()'
        )
        raise CheckpointError(code if names else unknown) from error
    except Exception as error:  # torch raises errors of many types for damaged files
        raise CheckpointError(f"{unknown} ({first_line(error)})") from error


def _code_named_in(path: Path, message: str) -> list[str]:
    try:
        with open_file(path) as file:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # an old format, or no pickle at all
        names = []
    return sorted(set(names) | set(re.findall(r"(?:GLOBAL|function|class|global) ([\w.]+\.[\w.]+)", message)))
