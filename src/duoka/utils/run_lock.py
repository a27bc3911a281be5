"""Lock of a run's folder: one program at a time writes there, and a refusal names the other one."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from duoka.errors import StorageError
from duoka.log import logger

LOCK = ".lock"
_CHILDREN_END_WITHIN_S = 10.0
"""How long the children of a killed program, which have copies of its lock, may take to notice its end."""


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the folder, which is created if it is missing and removed again if it stays empty.

    The system ends the lock with the process, even if it is killed. A file system without locks has the file ``.lock``
    alone, which names process and host.

    Raises:
        StorageError: another program, or another ``Trainer`` of this one, holds the folder, or it cannot be written.

    """
    path, is_new = folder / LOCK, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"out_dir={str(folder)!r} cannot be used: {error}; give a folder that can be written"
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # of the copies in forked children too
        os.close(descriptor)
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _acquire(path: Path) -> int:
    """Return the descriptor of the locked file, with this process named in it."""
    deadline = time.monotonic() + _CHILDREN_END_WITHIN_S
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            is_free = _try_lock(descriptor)
            holder = _read(descriptor)
            is_gone = holder.get("host") == socket.gethostname() and not _is_running(holder)
            if is_free is None:  # no locks on this file system, so the text counts
                is_free = not holder or is_gone
            if is_free and _is_at(descriptor, path):
                if holder:
                    logger.warning("%s: %s was killed; this run takes its folder", path.parent, _name(holder))
                _write(descriptor)
                return descriptor
            if not is_free and (not is_gone or time.monotonic() > deadline):
                raise StorageError(_refusal(path, holder))
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if not is_free:
            time.sleep(0.1)


def _try_lock(descriptor: int) -> bool | None:
    """Return whether the file is locked now, ``None`` if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether the open file is still the one at ``path``: its last holder removes it."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    opened = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (opened.st_dev, opened.st_ino)


def _write(descriptor: int) -> None:
    import psutil

    began = psutil.Process().create_time()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = {"pid": os.getpid(), "began": began, "host": socket.gethostname(), "since": since}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _read(descriptor: int) -> dict[str, Any]:
    """Return what the holder has written, nothing if it is not complete."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0) or b"{}")
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_running(holder: dict[str, Any]) -> bool:
    import psutil

    try:
        return bool(abs(psutil.Process(holder["pid"]).create_time() - holder["began"]) < 1.0)
    except (psutil.Error, LookupError, TypeError, ValueError):
        return False


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')},"


def _refusal(path: Path, holder: dict[str, Any]) -> str:
    if holder.get("pid") == os.getpid() and holder.get("host") == socket.gethostname():
        return f"{path.parent} is in use by another Trainer of this program; give each another out_dir"
    who = _name(holder) if holder else "another program"
    return (
        f"{path.parent} is in use: {who} trains there. Wait for its end or stop it, or train in another folder; if it has "
        f"ended and this message stays, delete {path}"
    )
