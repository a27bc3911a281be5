"""Files: atomic writes (temporary file, fsync, rename), reads with limits, safe names, a lock between processes."""

import contextlib
import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from duoka.errors import DuokaError, StorageError
from duoka.utils.text import format_bytes

_TEMPORARY = ".duoka-tmp"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_NAME_BYTES = 120
"""Longest safe name; file systems allow 255 bytes, of which suffixes and temporary names take some."""


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, needed_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Open ``path`` for writing bytes; readers see the old file until the block ends without an error.

    The bytes go to a hidden temporary file in the same folder. When the block ends, the file is flushed to disk and
    renamed. When the block raises, the temporary file is removed and ``path`` keeps its old content. A killed writer
    leaves its temporary file, and the next write of the same ``path`` removes it. Missing folders are created,
    symbolic links are followed, and the umask decides the permission bits.

    Args:
        path: the file to write.
        needed_bytes: the size to be written; nothing is written if the disk has less space.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.

    >>> with atomic_write("notes.txt") as file:
    ...     _ = file.write(b"whole or not at all")
    """
    target = Path(os.path.realpath(path))
    with _storage_errors(target, needed_bytes):
        _remove_stale_files(target)
        _check_space(target, needed_bytes)
        with _temporary_file(target) as (temporary, file):
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(target)
            file.close()
        _flush_folder(target.parent)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check that ``atomic_write`` can start to write ``path``; missing folders are created.

    Raises:
        StorageError: the folder cannot be created or written.
    """
    target = Path(os.path.realpath(path))
    with _storage_errors(target), tempfile.TemporaryFile(dir=target.parent):
        pass


def open_file(path: str | os.PathLike[str], most_bytes: int | None = None) -> BinaryIO:
    """Open the regular file ``path`` to read its bytes.

    A pipe, a socket or a device is refused before it is opened, because opening one may wait forever.

    Args:
        path: the file; symbolic links are followed.
        most_bytes: largest size of a file that is opened; ``None`` is no limit.

    Raises:
        OSError: the file is missing, is no regular file, or is too large. ``strerror`` is the reason as text.
    """
    try:
        found = os.stat(path)
    except ValueError as error:  # a null character or half a surrogate pair, which the system does not accept
        raise OSError(errno.EINVAL, "its name has characters that no file name can have", repr(path)) from error
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, not a file", str(path))
    if most_bytes is not None and found.st_size > most_bytes:
        sizes = f"it has {format_bytes(found.st_size)}, and at most {format_bytes(most_bytes)} are read"
        raise OSError(errno.EFBIG, sizes, str(path))
    return Path(path).open("rb")


def read_file(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """Return the bytes of a regular file of at most ``most_bytes``. Raises OSError as ``open_file`` does."""
    with open_file(path, most_bytes) as file:
        return file.read(most_bytes)


def is_file(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is a regular file; a path that the system refuses, such as one too long, is none."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def safe_name(text: str) -> str:
    """Return text from data, such as the name of a class, as the name of one file in a folder.

    Letters and digits of any script and ``_.=+-`` stay. Other characters become dashes, and a long name is cut.

    >>> safe_name("../etc/passwd"), safe_name("aquarium fish"), safe_name("/")
    ('etc-passwd', 'aquarium-fish', 'unnamed')
    """
    name = re.sub(r"[^\w.=+-]+", "-", text)
    return name.encode()[:_NAME_BYTES].decode(errors="ignore").strip("-.") or "unnamed"


def safe_names(texts: Iterable[str]) -> list[str]:
    """Return a safe name for each text, unique on file systems that ignore case too.

    >>> safe_names(["Q (m3/s)", "q [m3/s]", "油温"])
    ['Q-m3-s', 'q-m3-s-2', '油温']
    """
    found: list[str] = []
    taken: set[str] = set()
    for text in texts:
        name = stem = safe_name(text)
        number = 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        found.append(name)
    return found


@contextlib.contextmanager
def _storage_errors(target: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Create the folder of ``target``, and raise ``StorageError`` if the system cannot write it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_file():  # the rename would replace it
            kind = "a folder" if target.is_dir() else "not a regular file"
            raise StorageError(f"cannot write {target}: it is {kind}; name a file")
        yield
    except DuokaError:
        raise
    except Exception as error:
        cause = _find_os_error(error)
        if cause is None:
            raise
        raise StorageError(_storage_message(target, cause, needed_bytes)) from error


def _check_space(target: Path, needed_bytes: int | None) -> None:
    """Raise ``OSError`` as the system would, but before anything is written."""
    usage = shutil.disk_usage(target.parent)
    if needed_bytes is not None and usage.total and usage.free < needed_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _remove_stale_files(target: Path) -> None:
    """Remove temporary files without a lock, which killed writers left."""
    for stale in target.parent.glob(f".{glob.escape(target.name)}.*{_TEMPORARY}"):
        with contextlib.suppress(OSError):
            descriptor = os.open(stale, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                stale.unlink()
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def _temporary_file(target: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Create and lock a temporary file beside ``target``, and remove it if the ``with`` block raises."""
    while True:
        temporary = target.parent / f".{target.name[:200]}.{secrets.token_hex(4)}{_TEMPORARY}"
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks; no file on it is ever seen as stale
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink:
            break
        os.close(descriptor)  # another writer removed it before the lock
    file = os.fdopen(descriptor, "w+b")
    try:
        yield temporary, file
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        with contextlib.suppress(OSError):  # buffered bytes cannot be written when the disk is full
            file.close()
        raise


def _flush_folder(folder: Path) -> None:
    """Make the rename durable where the file system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _find_os_error(error: BaseException | None) -> OSError | None:
    """Return the OSError that caused ``error``; torch's archive writer wraps it in a RuntimeError."""
    seen: set[int] = set()  # user code may make a circle of causes
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__ or error.__context__
    return None


def _storage_message(target: Path, error: OSError, needed_bytes: int | None) -> str:
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        folder = next(parent for parent in target.parents if parent.exists())
        needed = "" if needed_bytes is None else f"{format_bytes(needed_bytes)} needed, "
        limit = " or raise the file-size limit (ulimit -f)" if error.errno == errno.EFBIG else ""
        return (
            f"cannot write {target}: {reason} ({needed}{format_bytes(shutil.disk_usage(folder).free)} free). "
            f"Free some space{limit}, or write to another disk; the previous content is untouched"
        )
    if error.errno in _FORBIDDEN:
        return f"cannot write {target}: {reason}. Make {target.parent} writable, or write to another folder"
    return f"cannot write {target}: {reason}. Check the path, or write to another folder"


def write_time_ns(path: str | os.PathLike[str]) -> int | None:
    """Return when ``path`` was last written, ``None`` if there is no such file."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


@contextlib.contextmanager
def file_lock(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold an exclusive lock between processes on ``path``: a folder, or a file that is created if it is missing.

    The operating system releases the lock when the process ends, even if it is killed. A file system without locks
    gives no protection and no error.

    Raises:
        StorageError: ``path`` cannot be opened.
    """
    flags = os.O_RDONLY if Path(path).is_dir() else os.O_RDWR | os.O_CREAT
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        raise StorageError(f"cannot lock {path}: {error.strerror}. Choose a folder that can be written") from error
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
