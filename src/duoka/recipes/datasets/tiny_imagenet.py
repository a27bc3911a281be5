"""Tiny-ImageNet in its official folders: found below the root, or downloaded there, and packed for quick starts.

200 classes of ImageNet at 64x64 pixels, 500 training and 50 validation images each; the test images have no labels and are
left out. Source: Y. Le, X. Yang, Tiny ImageNet Visual Recognition Challenge, Stanford CS231n, 2015.
"""

from __future__ import annotations

import os
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from duoka.errors import DataError, StorageError
from duoka.log import logger
from duoka.recipes.datasets import image_cache
from duoka.recipes.datasets.download import check, fetch, one_at_a_time, refuse_file
from duoka.recipes.datasets.image_folder import EXTENSIONS
from duoka.recipes.datasets.images import ImageSet

__all__ = ["OFFICIAL", "Archive", "load"]

SIZE = 64
"""Pixels a side."""
ANNOTATIONS = "val_annotations.txt"


@dataclass(frozen=True)
class Archive:
    """Where the set comes from."""

    url: str
    size: int
    """Bytes."""
    md5: str

    @property
    def name(self) -> str:
        """Its file name."""
        return self.url.rpartition("/")[2]


OFFICIAL = Archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", 248_100_043, "90528d7ca1a48142e341f4ef8d21d0de")


def load(root: str | Path, *, download: bool = True, archive: Archive = OFFICIAL, size: int = SIZE) -> ImageSet:
    """Read the set from ``root``, in which the official folder, or one like it, lies, or which is such a folder.

    Args:
        root: the folder; the archive is downloaded to it where neither the archive nor what was unpacked from it is there.
        download: whether it may be.
        archive: where it comes from.
        size: pixels a side that images are scaled to; official ones have 64.

    Raises:
        DataError: files are missing, damaged or contradict each other; the message says which, and the remedy.
        StorageError: the folder cannot be written.

    """
    refuse_file(Path(root))
    folder = _found(Path(root)) or _unpacked(Path(root), archive, download)
    wnids = _lines(folder, "wnids.txt")
    if len(wnids) < 2 or len(set(wnids)) < len(wnids):
        raise DataError(
            f"{folder / 'wnids.txt'} names {len(set(wnids))} classes in {len(wnids)} lines: two at least, once each"
        )
    labels = {wnid: label for label, wnid in enumerate(sorted(wnids))}
    train, test = _training(folder, labels), _validation(folder, labels)
    return image_cache.load(folder, _names(folder, sorted(wnids)), train, test, size=size)


def _found(root: Path) -> Path | None:
    """Return the folder with ``wnids.txt``: ``root``, the official one in it, or the only one in it."""
    for folder in (root, root / "tiny-imagenet-200"):
        if (folder / "wnids.txt").is_file():
            return folder
    inside = sorted(path.parent for path in root.glob("*/wnids.txt"))
    if len(inside) > 1:
        names = ", ".join(path.name for path in inside)
        raise DataError(f"{root} holds several sets ({names}): name one of them with --root")
    return inside[0] if inside else None


def _unpacked(root: Path, archive: Archive, download: bool) -> Path:
    """Unpack the archive, which is downloaded if it is not there."""
    packed_file = root / archive.name
    if not packed_file.is_file():
        if not download:
            others = sorted(path for ending in ("tar", "zip", "gz", "tgz") for path in root.glob(f"*.{ending}"))
            unpack = f"unpack {others[0].name} there if that is it, " if others else ""
            remedy = f"{unpack}allow the download with --download true, or fetch {archive.url} and put it there"
            raise DataError(f"{root} holds neither wnids.txt, nor a folder with it, nor {archive.name}: {remedy}")
        fetch(archive.url, packed_file, size=archive.size, md5=archive.md5)
    folder = root / packed_file.stem
    with one_at_a_time(root):
        if not folder.exists():
            again = f"delete it and start again to download it anew, or fetch {archive.url}"
            check(packed_file, size=archive.size, md5=archive.md5, remedy=again)
            _unpack(packed_file, folder, again)
    if not (folder / "wnids.txt").is_file():
        raise DataError(f"{folder} has no wnids.txt: remove the folder, and {packed_file.name} is unpacked again")
    return folder


def _unpack(archive: Path, folder: Path, again: str) -> None:
    """Unpack what has labels; under its name the folder is never half of it."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    logger.info("unpacking %s, once", archive)
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [name for name in opened.namelist() if not name.startswith(f"{folder.name}/test/")]
            opened.extractall(part, members)
        (part / folder.name).rename(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, FileNotFoundError) as error:
        raise DataError(f"{archive} cannot be unpacked: {error}: {again}") from error
    except OSError as error:
        raise StorageError(f"cannot write {part}: {error}: free some space, or choose another --root") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _training(folder: Path, labels: dict[str, int]) -> image_cache.CachedFiles:
    """Return the files of ``train/<wnid>/images``."""
    found: list[tuple[str, int, tuple[int, int]]] = []
    for wnid, label in labels.items():
        images = folder / "train" / wnid / "images"
        entries = sorted(_images(images))
        if not entries:
            raise DataError(
                f"{images} holds no image of the class {wnid}, which wnids.txt names: {_incomplete(folder)}"
            )
        found += [(f"train/{wnid}/images/{name}", label, stat) for name, stat in entries]
    return _files(found)


def _validation(folder: Path, labels: dict[str, int]) -> image_cache.CachedFiles:
    """Return the files of ``val/images`` with the classes that ``val_annotations.txt`` gives them."""
    there = dict(_images(folder / "val" / "images"))
    found = []
    for number, line in enumerate(_lines(folder, f"val/{ANNOTATIONS}"), 1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in labels:
            where = f"{folder / 'val' / ANNOTATIONS}, line {number}"
            raise DataError(f"{where}: {wnid!r} is no class of wnids.txt: {_incomplete(folder)}")
        if name not in there:
            raise DataError(f"{folder / 'val' / 'images' / name} is missing: {_incomplete(folder)}")
        found.append((f"val/images/{name}", labels[wnid], there[name]))
    if not found:
        raise DataError(f"{folder / 'val' / ANNOTATIONS} is empty: {_incomplete(folder)}")
    return _files(found)


def _files(found: list[tuple[str, int, tuple[int, int]]]) -> image_cache.CachedFiles:
    names, labels, stats = zip(*found, strict=True)
    return image_cache.CachedFiles(names, labels, stats)


def _images(folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the name, size and time of each image file in a folder; nothing of one that is not there."""
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if os.path.splitext(entry.name)[1].lower() in EXTENSIONS:  # noqa: PTH122 - 100,000 paths would take a second
                stat = entry.stat()
                yield entry.name, (stat.st_size, stat.st_mtime_ns)


def _names(folder: Path, wnids: list[str]) -> tuple[str, ...]:
    """Return the classes' first names in ``words.txt``; with their numbers where two are called the same."""
    words: dict[str, str] = {}
    if (folder / "words.txt").is_file():
        words = {
            wnid: name.partition(",")[0]
            for wnid, _, name in (line.partition("\t") for line in _lines(folder, "words.txt"))
        }
    names = [words.get(wnid, wnid) for wnid in wnids]
    often = Counter(names)
    return tuple(name if often[name] == 1 else f"{name} ({wnid})" for name, wnid in zip(names, wnids, strict=True))


def _lines(folder: Path, name: str) -> list[str]:
    path = folder / name
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {why}: {_incomplete(folder)}") from error
    return [line.strip("\r") for line in text.split("\n") if line.strip()]


def _incomplete(folder: Path) -> str:
    return f"the set was not unpacked completely, or changed; unpack it again (remove {folder} first)"
