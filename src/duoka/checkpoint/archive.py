"""Files of ``torch.save`` (``.pt``, ``.pth``), with a checksum that plain ``torch.load`` passes over.

The checksum stands in the comment at the end of the zip archive that ``torch.save`` writes: the CRC-32 of all bytes
before it. It finds a truncated file and a flipped byte anywhere; ``torch.load`` by itself checks nothing. Archives
that others wrote are checked by the CRC-32 that zip keeps of each record.
"""

from __future__ import annotations

import pickle
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch

from duoka.errors import CheckpointError

__all__ = ["read_archive", "verify_archive", "write_archive"]

_COMMENT = re.compile(rb"duoka crc32=([0-9a-f]{8})\Z")
_COMMENT_BYTES = len("duoka crc32=00000000")
_CHUNK_BYTES = 1 << 20
_FOLDER = 0x10


class _Summing:
    """A file that keeps the CRC-32 of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.crc = 0

    def write(self, data: bytes) -> int:
        self.crc = zlib.crc32(data, self.crc)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write_archive(state: Any, file: BinaryIO) -> None:
    """Write a portable ``state`` as ``torch.save`` does, and the checksum after it."""
    summing = _Summing(file)
    torch.save(state, summing)  # type: ignore[arg-type]  # needs no more of a file than this
    comment = b"duoka crc32=%08x" % summing.crc
    file.seek(-2, 2)  # the archive ends with the length of its comment, so far 0
    file.write(len(comment).to_bytes(2, "little") + comment)


def read_archive(path: Path, map_location: str | torch.device) -> Any:
    """Return what ``path`` holds; a file that would run code is refused.

    Raises:
        CheckpointError: the file is damaged, or holds more than numbers, strings and tensors.

    """
    verify_archive(path)
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, str(error))) from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{_no_checkpoint(path)} ({first})") from error


def verify_archive(path: Path) -> bool:
    """Compare ``path`` with its checksum; return whether duoka wrote it.

    Raises:
        CheckpointError: the file is truncated or was changed.

    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return False  # the format of torch before 1.6, which keeps no checksum
        file.seek(0, 2)
        body_bytes = max(0, file.tell() - _COMMENT_BYTES)
        file.seek(body_bytes)
        comment = _COMMENT.match(file.read())
        if comment is not None:
            if _checksum(file, body_bytes - 2) != int(comment[1], 16):
                raise CheckpointError(f"{path} is damaged: its bytes do not match its checksum; use another copy of it")
            return True
    _verify_records(path)
    return False


def _checksum(file: BinaryIO, count: int) -> int:
    """CRC-32 of the first ``count`` bytes and of the empty comment that followed them when it was taken."""
    file.seek(0)
    crc = 0
    while count > 0 and (data := file.read(min(count, _CHUNK_BYTES))):
        crc = zlib.crc32(data, crc)
        count -= len(data)
    return zlib.crc32(b"\0\0", crc)


def _verify_records(path: Path) -> None:
    """Check each record of another program's archive; a CRC of 0 means that it kept none."""
    try:
        with zipfile.ZipFile(path) as archive:
            _refuse_a_program(path, archive.namelist())
            _refuse_a_cut_comment(path, archive.comment)
            for record in archive.infolist():
                if record.external_attr & _FOLDER:  # torch would take the bytes of a folder from unset memory
                    raise zipfile.BadZipFile(f"{record.filename} is marked as a folder")
                if record.CRC:
                    with archive.open(record) as data:
                        while data.read(_CHUNK_BYTES):
                            pass
    except (zipfile.BadZipFile, OSError, RuntimeError, ValueError, zlib.error, EOFError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); use another copy of it") from error


def _refuse_a_cut_comment(path: Path, comment: bytes) -> None:
    """The end of a file of ours, cut off: zipfile takes what is left of the comment for the whole."""
    with path.open("rb") as file:
        file.seek(-2 - len(comment), 2)
        declared = int.from_bytes(file.read(2), "little")
    if declared != len(comment):
        raise zipfile.BadZipFile(f"{len(comment)} of the last {declared} bytes are there")


def _refuse_a_program(path: Path, names: list[str]) -> None:
    if any(name.endswith("/constants.pkl") for name in names):  # how torch itself tells
        raise CheckpointError(f"{path} is a TorchScript program, which is code; save its state_dict() instead")


def _refusal(path: Path, said: str) -> str:
    if not (names := _code_named_in(path, said)):
        return _no_checkpoint(path)
    return (
        f"{path} was not loaded: it names code to be run on loading ({', '.join(names)}), and a checkpoint needs only "
        "numbers, strings and tensors. If you trust whoever wrote it, convert it once, in a process of its own:\n"
        f'    state = torch.load("{path}", weights_only=False)\n'
        '    duoka.save(state, "converted.pt")  # a model, or a dict of state; for other objects, their state_dict()'
    )


def _no_checkpoint(path: Path) -> str:
    return f"{path} is damaged, or is no checkpoint of PyTorch; give a file that duoka.save or torch.save has written"


def _code_named_in(path: Path, said: str) -> list[str]:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an old format, or a pickle that is not even one
        names = []
    return sorted(set(names) | set(re.findall(r"(?:GLOBAL|function|class|global) ([\w.]+\.[\w.]+)", said)))
