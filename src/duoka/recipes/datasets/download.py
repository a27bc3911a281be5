"""Download, checksum and extraction of data set files, each done by one process at a time and never left half done."""

import contextlib
import hashlib
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.request import urlopen

from duoka.errors import DataError, StorageError
from duoka.log import logger
from duoka.utils.files import atomic_write, file_lock, is_file, open_file
from duoka.utils.text import format_bytes

CHUNK_BYTES = 1 << 20
MAX_BYTES = 100_000_000
"""Most bytes of a download whose size is not known."""
MAX_UNPACKED_BYTES = 2_000_000_000
TIMEOUT_S = 30.0


@dataclass(frozen=True)
class RemoteFile:
    """A file to download, with its checksum."""

    url: str
    size: int | None
    """Bytes; ``None`` is not checked, and at most ``MAX_BYTES``."""
    sha256: str
    alternative: str = field(default="", kw_only=True)
    """Another remedy if the file is missing or damaged, which begins with ``", or "``."""

    @property
    def file_name(self) -> str:
        """The last part of the address."""
        return self.url.rpartition("/")[2]

    @property
    def refetch(self) -> str:
        """The remedy for a damaged file."""
        return f"delete it and start again to download it anew, or fetch {self.url}{self.alternative}"

    def locate(self, folder: Path, *, download: bool, verify: bool = True, missing: str = "") -> Path:
        """Return the file in ``folder``, verified if it is there, otherwise downloaded by one process at a time.

        Raises DataError if ``download`` is off and the file is missing, as the text ``missing`` says, if the network fails,
        or if size or checksum are wrong, and StorageError if ``folder`` cannot be written.
        """
        path = folder / self.file_name
        if path.exists():
            if verify:
                self._verify(path)
            return path
        if not download:
            remedy = f"allow it with --download true, or fetch {self.url}{self.alternative}"
            raise DataError(f"{missing or f'{path} is not there'}, and download is off: {remedy}")
        with locked_folder(folder):
            if not path.exists():
                logger.info("downloading %s to %s", self.url, folder)
                with atomic_write(path, needed_bytes=self.size) as file:
                    for chunk in self._chunks(path):
                        file.write(chunk)
                    remedy = f"the download of {self.url} was cut short or changed: start again"
                    verify_checksum(file, path, self.sha256, size=self.size, remedy=remedy)
        return path

    def unpack(self, root: Path, *, download: bool, missing: str, skip: str = "") -> Path:
        """Verify and unpack the zip file in ``root`` into the folder of its name, unless that exists; return the folder.

        The folder ``skip`` of the archive is not unpacked. A missing archive is downloaded. Raises as ``locate`` does.
        """
        archive = self.locate(root, download=download, verify=False, missing=missing)
        folder = root / archive.stem
        with locked_folder(root):
            if not folder.exists():
                self._verify(archive)
                logger.info("unpacking %s", archive)
                self._extract(archive, folder, skip)
        return folder

    def _verify(self, path: Path) -> None:
        with _open(path) as file:
            verify_checksum(file, path, self.sha256, size=self.size, remedy=self.refetch)

    def _chunks(self, target: Path) -> Iterator[bytes]:
        """Yield the file's bytes with a progress bar; bytes beyond its size end the download."""
        from rich.console import Console
        from rich.progress import wrap_file

        console = Console(stderr=True, force_jupyter=False)
        try:
            with urlopen(self.url, timeout=TIMEOUT_S) as response:
                total = self.size or int(response.headers.get("Content-Length", 0))
                left = self.size or MAX_BYTES
                with wrap_file(response, total, description=self.file_name, console=console) as stream:
                    while chunk := stream.read(CHUNK_BYTES):
                        left -= len(chunk)
                        if left < 0:
                            raise OSError(f"the server sends more than {self.size or MAX_BYTES:,} bytes")
                        yield chunk
        except (OSError, HTTPException) as error:
            remedy = f"check the connection, or fetch it with a browser and put it at {target}"
            raise DataError(f"cannot download {self.url}: {error}: {remedy}") from error

    def _extract(self, archive: Path, folder: Path, skip: str) -> None:
        """Extract into a temporary folder of a new name, which no one can have prepared, then rename it."""
        for stale in folder.parent.glob(f".{folder.name}.*.part"):  # of a killed process, as the parent is locked
            shutil.rmtree(stale, ignore_errors=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        try:
            with zipfile.ZipFile(archive) as opened:
                wanted, skipped = f"{folder.name}/", f"{folder.name}/{skip}/"
                entries = [entry for entry in opened.infolist() if entry.filename.startswith(wanted)]
                entries = [entry for entry in entries if not entry.filename.startswith(skipped)]
                if sum(entry.file_size for entry in entries) > MAX_UNPACKED_BYTES:
                    raise zipfile.BadZipFile(f"it holds more than {format_bytes(MAX_UNPACKED_BYTES)}")
                opened.extractall(part, entries)
            (part / folder.name).rename(folder)
        except (zipfile.BadZipFile, zlib.error, EOFError, FileNotFoundError) as error:
            raise DataError(f"{archive} cannot be unpacked: {error}: {self.refetch}") from error
        except OSError as error:
            raise StorageError(f"cannot write {part}: {error}: free some space, or choose another --root") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)


def verify_checksum(
    file: IO[bytes], path: Path, checksum: str, *, size: int | None = None, remedy: str, kind: str = "SHA-256"
) -> None:
    """Compare an open file, named ``path`` in messages, with the checksum that it must have.

    ``kind`` is SHA-256, or MD5 where no other is known. Raises DataError if size or checksum differ; the message names
    the file, both values, and ``remedy``.
    """
    found = file.seek(0, 2)
    if size is not None and found != size:
        raise DataError(f"{path} has {found:,} bytes, not {size:,}: {remedy}")
    file.seek(0)
    method = partial(hashlib.md5, usedforsecurity=False) if kind == "MD5" else hashlib.sha256
    digest = hashlib.file_digest(file, method).hexdigest()  # type: ignore[arg-type]
    if digest != checksum:
        raise DataError(f"{path} ({found:,} bytes) has the {kind} checksum {digest}, not {checksum}: {remedy}")


def _open(path: Path) -> IO[bytes]:
    try:
        return open_file(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}: remove it, or choose another --root") from error


def data_folder(root: str | Path) -> Path:
    """Return ``root`` as a path. Raises DataError if it is a file, most likely an archive, instead of the data's folder."""
    root = Path(root)
    if is_file(root):
        remedy = f"give the folder of the data: --root {root.parent}"
        if root.suffix in (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2"):
            command = "unzip" if root.suffix == ".zip" else "tar -xf"
            remedy = f"unpack it with `{command} {root}`, and give the folder with --root"
        raise DataError(f"{root} is a file, not a folder: {remedy}")
    return root


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create ``folder`` if it is missing, and lock it between processes.

    Raises StorageError if ``folder`` cannot be created or read.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(folder))
        except (OSError, StorageError) as error:
            raise StorageError(f"cannot use the folder {folder}: {error}: choose another --root") from error
        yield
