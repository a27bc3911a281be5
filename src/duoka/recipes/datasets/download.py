"""One file from the network to its place: with progress, checked, and never half a file under its final name."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from duoka.errors import DataError, StorageError
from duoka.log import logger

__all__ = ["check", "fetch", "one_at_a_time", "refuse_file"]

CHUNK = 1 << 20
"""Bytes read at once."""


def fetch(url: str, target: Path, *, size: int | None, md5: str, timeout_s: float = 30) -> None:
    """Download ``url`` to ``target`` unless it is there; of several processes that ask, one downloads, all wait.

    Raises:
        DataError: the network fails, or what came has not ``size`` bytes (``None``: any) and the checksum ``md5``.
        StorageError: ``target`` cannot be written.

    """
    part = target.with_name(target.name + ".part")
    with one_at_a_time(target.parent):
        if target.exists():
            return
        try:
            how_much = "" if size is None else f" ({size / 1e6:.0f} MB)"
            logger.info("downloading %s%s to %s", url, how_much, target.parent)
            _receive(_chunks(url, target, timeout_s), part, size)
            check(part, size=size, md5=md5, remedy=f"the download of {url} was cut short or changed: start again")
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)


def check(path: Path, *, size: int | None, md5: str, remedy: str) -> None:
    """Compare the file with what it should be.

    Raises:
        DataError: size or checksum differ; the message names the file, both values, and ``remedy``.

    """
    found = path.stat().st_size
    if size is not None and found != size:
        raise DataError(f"{path} has {found:,} bytes, not {size:,}: {remedy}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if digest != md5:
        raise DataError(f"{path} ({found:,} bytes) has the MD5 checksum {digest}, not {md5}: {remedy}")


def refuse_file(root: Path) -> None:
    """Say what to do with a file, most likely an archive, that was given in place of the data's folder.

    Raises:
        DataError: ``root`` is a file.

    """
    if root.is_file():
        is_archive = root.suffix in (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2")
        how = "unzip" if root.suffix == ".zip" else "tar -xf"
        remedy = f"unpack it with `{how} {root}`, and give the folder with --root"
        raise DataError(
            f"{root} is a file, not a folder: {remedy if is_archive else f'give the folder of the data: --root {root.parent}'}"
        )


def _receive(chunks: Iterator[bytes], part: Path, size: int | None) -> None:
    """Write ``chunks`` to ``part``, showing progress."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        with (
            part.open("wb") as file,
            Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True, force_jupyter=False)) as bar,
        ):
            task = bar.add_task(part.stem, total=size)
            for chunk in chunks:
                file.write(chunk)
                bar.advance(task, len(chunk))
    except OSError as error:
        raise StorageError(f"cannot write {part}: {error}: free some space, or choose another --root") from error


def _chunks(url: str, by_hand: Path, timeout_s: float) -> Iterator[bytes]:
    """Yield what ``url`` sends, piece by piece."""
    try:
        with urlopen(url, timeout=timeout_s) as response:
            while chunk := response.read(CHUNK):
                yield chunk
    except (OSError, HTTPException) as error:  # refused, not found, timed out
        remedy = f"check the connection, or fetch it with a browser and put it at {by_hand}"
        raise DataError(f"cannot download {url}: {error}: {remedy}") from error


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold ``folder`` against other processes that ask the same, where the system can lock; make it if needed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise StorageError(f"cannot use the folder {folder}: {error}: choose another --root") from error
    try:
        with contextlib.suppress(ImportError, OSError):  # Windows; network file systems without locks
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
