"""Writing a file so that it is there whole or not at all: temporary file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from duoka.errors import StorageError

__all__ = ["atomic_write", "check_writable"]

_TEMPORARY = ".duoka-tmp"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, needed_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Open ``path`` for writing bytes; readers see the old file until the block ends well, then the whole new one.

    The bytes go to a hidden temporary file in the same folder, which is flushed to the disk and renamed when the block
    ends. When the block raises, the temporary file is removed and ``path`` is as it was. A writer that is killed leaves
    its temporary file; the next write of the same ``path`` removes it. Missing folders are created, a symbolic link is
    followed, and the permission bits are those that the umask gives.

    Args:
        path: the file to write.
        needed_bytes: how much will be written, named in the message when the disk is full.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.

    >>> with atomic_write("notes.txt") as file:
    ...     _ = file.write(b"whole or not at all")

    """
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _refuse_what_is_no_file(target)
        _remove_stale(target)
        temporary, file = _open_temporary(target)
        with _removed_on_error(temporary, file):
            yield file
            _flush_to_disk(file)
            temporary.replace(target)
            file.close()
        _flush_folder(target.parent)
    except StorageError:
        raise
    except Exception as error:
        cause = _operating_system_error(error)
        if cause is None:
            raise
        raise StorageError(_explain(target, cause, needed_bytes)) from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Make sure that ``atomic_write`` can begin to write ``path``; missing folders are created.

    Raises:
        StorageError: the folder cannot be made or written.

    """
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _refuse_what_is_no_file(target)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(_explain(target, error, None)) from error


def _refuse_what_is_no_file(target: Path) -> None:
    """A device, a pipe or a folder would be replaced by the rename."""
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "not a regular file"
        raise StorageError(f"cannot write {target}: it is {kind}; name a file")


def _remove_stale(target: Path) -> None:
    """Remove the temporary files of writers that were killed: nobody holds their lock any more."""
    for stale in target.parent.glob(f".{_escaped(target.name)}.*{_TEMPORARY}"):
        with contextlib.suppress(OSError):
            descriptor = os.open(stale, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                stale.unlink()
            finally:
                os.close(descriptor)


def _escaped(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _open_temporary(target: Path) -> tuple[Path, BinaryIO]:
    """Create and lock a temporary file beside ``target``; again when a cleaner took it before it was locked."""
    while True:
        temporary = target.parent / f".{target.name[:200]}.{secrets.token_hex(4)}{_TEMPORARY}"
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks: nothing of it is ever taken for stale
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink:
            return temporary, os.fdopen(descriptor, "w+b")
        os.close(descriptor)


@contextlib.contextmanager
def _removed_on_error(temporary: Path, file: BinaryIO) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        with contextlib.suppress(OSError):  # what is buffered cannot be written either when the disk is full
            file.close()
        raise


def _flush_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make the rename itself durable, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _operating_system_error(error: BaseException | None) -> OSError | None:
    """The system's refusal behind ``error``: torch's archive writer reports it as an error of its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__ or error.__context__
    return None


def _explain(target: Path, error: OSError, needed_bytes: int | None) -> str:
    said = error.strerror or str(error)
    if error.errno in _FULL:
        needed = "" if needed_bytes is None else f"{_size(needed_bytes)} needed, "
        limit = " or raise the file-size limit (ulimit -f)" if error.errno == errno.EFBIG else ""
        return (
            f"cannot write {target}: {said} ({needed}{_size(_free_bytes(target.parent))} free). "
            f"Free some space{limit}, or write to another disk; what was there before is untouched"
        )
    if error.errno in _FORBIDDEN:
        return f"cannot write {target}: {said}. Make {target.parent} writable, or write to another folder"
    return f"cannot write {target}: {said}. Check the path, or write to another folder"


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count} bytes"
