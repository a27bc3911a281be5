"""Tiny-ImageNet in its official folders, found below the root or downloaded there, and decoded once into a cache.

200 classes of ImageNet at 64x64 pixels, with 500 training and 50 validation images each. The official test images have
no labels and are not used. Source: Y. Le, X. Yang, Tiny ImageNet Visual Recognition Challenge, Stanford CS231n, 2015.
"""

import os
from collections import Counter
from pathlib import Path

from duoka.errors import DataError
from duoka.recipes.datasets import image_cache
from duoka.recipes.datasets.download import RemoteFile, data_folder
from duoka.recipes.datasets.image_cache import ImageFile
from duoka.recipes.datasets.images import EXTENSIONS, ImageSet
from duoka.utils.files import read_file, safe_name
from duoka.utils.text import shorten

SIZE = 64
"""Pixels a side."""
ANNOTATIONS = "val_annotations.txt"
MAX_BYTES = 50_000_000
"""Largest list of classes, names or annotations."""
OFFICIAL = RemoteFile(
    "https://cs231n.stanford.edu/tiny-imagenet-200.zip",
    248_100_043,
    "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
)


def load(root: str | Path, *, download: bool = True, archive: RemoteFile = OFFICIAL, size: int = SIZE) -> ImageSet:
    """Read the set from ``root``, which is or holds the official folder, or one with the same layout.

    The archive is downloaded to ``root`` if neither the archive nor its contents are found there. Images are scaled to
    ``size`` pixels a side.

    Raises DataError if files are missing, damaged or contradict each other, and StorageError if the folder cannot be
    written.
    """
    root = data_folder(root)
    folder = _find(root) or _unpack(root, archive, download)
    wnids = sorted(_read_lines(folder, "wnids.txt"))
    if len(wnids) < 2 or len(set(wnids)) < len(wnids):
        raise DataError(
            f"{folder / 'wnids.txt'} names {len(set(wnids))} classes in {len(wnids)} lines: two at least, once each"
        )
    if odd := [wnid for wnid in wnids if safe_name(wnid) != wnid]:
        raise DataError(f"{folder / 'wnids.txt'} has the line {shorten(repr(odd[0]))}, which is no name of a folder")
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    train, test = _training_files(folder, labels), _validation_files(folder, labels)
    return image_cache.load(folder, _class_names(folder, wnids), train, test, size=size)


def _find(root: Path) -> Path | None:
    """Return the folder with ``wnids.txt``: ``root``, the official folder in it, or the only one in it."""
    for folder in (root, root / "tiny-imagenet-200"):
        if (folder / "wnids.txt").is_file():
            return folder
    found = sorted(path.parent for path in root.glob("*/wnids.txt"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{root} holds several sets ({names}): name one of them with --root")
    return found[0] if found else None


def _unpack(root: Path, archive: RemoteFile, download: bool) -> Path:
    missing = f"{root} holds neither wnids.txt, nor a folder with it, nor {archive.file_name}"
    if others := sorted(path.name for suffix in ("tar", "zip", "gz", "tgz") for path in root.glob(f"*.{suffix}")):
        missing += f" (unpack {others[0]} there if that is it)"
    folder = archive.unpack(root, download=download, missing=missing, skip="test")
    if not (folder / "wnids.txt").is_file():
        raise DataError(f"{folder} has no wnids.txt: remove the folder, and {archive.file_name} is unpacked again")
    return folder


def _training_files(folder: Path, labels: dict[str, int]) -> list[ImageFile]:
    found: list[ImageFile] = []
    for wnid, label in labels.items():
        below = f"train/{wnid}/images"
        files = _image_stats(folder / below)
        if not files:
            raise DataError(f"{folder / below} holds no image of the class {wnid} in wnids.txt: {_incomplete(folder)}")
        found += [ImageFile(f"{below}/{name}", label, *files[name]) for name in sorted(files)]
    return found


def _validation_files(folder: Path, labels: dict[str, int]) -> list[ImageFile]:
    """Return the files of ``val/images`` with their classes in ``val_annotations.txt``."""
    files = _image_stats(folder / "val" / "images")
    annotations = folder / "val" / ANNOTATIONS
    found = []
    for number, line in enumerate(_read_lines(folder, f"val/{ANNOTATIONS}"), 1):
        name, wnid, *_ = [*line.split("\t"), ""]
        if wnid not in labels:
            raise DataError(f"{annotations}, line {number}: {wnid!r} is no class of wnids.txt: {_incomplete(folder)}")
        if name not in files:
            raise DataError(f"{folder / 'val' / 'images' / name} is missing: {_incomplete(folder)}")
        found.append(ImageFile(f"val/images/{name}", labels[wnid], *files[name]))
    if not found:
        raise DataError(f"{annotations} is empty: {_incomplete(folder)}")
    return found


def _image_stats(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and modification time in ns of each image file in ``folder``; nothing if there is no such folder."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:  # a Path for each of 100,000 files would take a second
        stats = {entry.name: entry.stat() for entry in entries if entry.name.lower().endswith(EXTENSIONS)}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def _class_names(folder: Path, wnids: list[str]) -> tuple[str, ...]:
    """Return the first name of each class in ``words.txt``, with its number if two classes share it."""
    words: dict[str, str] = {}
    if (folder / "words.txt").is_file():
        pairs = (line.partition("\t") for line in _read_lines(folder, "words.txt"))
        words = {wnid: names.partition(",")[0] for wnid, _, names in pairs}
    names = [words.get(wnid, wnid) for wnid in wnids]
    counts = Counter(names)
    return tuple(name if counts[name] == 1 else f"{name} ({wnid})" for name, wnid in zip(names, wnids, strict=True))


def _read_lines(folder: Path, name: str) -> list[str]:
    path = folder / name
    try:
        text = read_file(path, MAX_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {reason}: {_incomplete(folder)}") from error
    return [line.strip("\r") for line in text.split("\n") if line.strip()]


def _incomplete(folder: Path) -> str:
    return f"the set was not unpacked completely, or it was changed; unpack it again (remove {folder} first)"
