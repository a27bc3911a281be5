"""Any folder of images: a folder a class, directly below the root or below ``train/`` and ``test/`` or ``val/``."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from duoka.errors import DataError
from duoka.log import logger
from duoka.recipes.datasets.images import Images, ImageSet, read_image, stratified_split

__all__ = ["EXTENSIONS", "load"]

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
"""Files that count as images; what else lies in a folder is left alone."""


def load(root: str | Path, *, size: int = 32, test_share: float = 0.2, split_seed: int = 0) -> ImageSet:
    """Read the images below ``root``, scaled and cropped to ``size`` x ``size`` pixels of colour, into memory.

    Where ``root`` has no part for testing, ``test_share`` of each class is taken for it.

    Raises:
        DataError: no class folders, an empty one, a class that only the test part has, or an image that is unreadable.

    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}: name the folder of your class folders with --root")
    name = root.resolve().name
    if not (root / "train").is_dir():
        classes = _classes(root)
        everything = _read(root, classes, size)
        train, test = stratified_split(everything.labels, test_share, split_seed)
        return ImageSet(name, classes, everything.take(train), everything.take(test))
    classes, part = _classes(root / "train"), _test_part(root)
    strange = set(_folders(part)) - set(classes)
    if strange:
        raise DataError(f"{part} has classes that {root / 'train'} lacks: {', '.join(sorted(strange)[:5])}")
    logger.info("%s: trains on train/, tests on %s/", root, part.name)
    return ImageSet(name, classes, _read(root / "train", classes, size), _read(part, classes, size))


def _test_part(root: Path) -> Path:
    """Return the folder to test on."""
    for name in ("test", "val", "valid", "validation"):
        if any(child.is_dir() for child in root.glob(f"{name}/*")):
            return root / name
    raise DataError(f"{root} has train/ and neither test/ nor val/ with class folders: add one of them")


def _classes(folder: Path) -> tuple[str, ...]:
    """Return the names of the classes that can be learned."""
    names = _folders(folder)
    if len(names) < 2:
        found = f"found {names[0]!r} only" if names else "found no folder"
        raise DataError(f"{folder} must hold a folder of images for each class, two at least: {found}")
    return tuple(names)


def _folders(folder: Path) -> list[str]:
    """Return the names of the class folders, sorted."""
    return sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _read(folder: Path, classes: tuple[str, ...], size: int) -> Images:
    """Decode all images of ``folder`` in parallel; Pillow decodes outside the interpreter's lock."""
    found = [(path, label) for label, name in enumerate(classes) for path in _files(folder, name)]
    pixels = torch.empty((len(found), 3, size, size), dtype=torch.uint8)

    def place(index: int) -> None:
        pixels[index] = read_image(found[index][0], (3, size, size))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for _ in pool.map(place, range(len(found))):
                pass
        except DataError:
            pool.shutdown(cancel_futures=True)
            raise
    labels: Tensor = torch.tensor([label for _, label in found], dtype=torch.int64)
    return Images(pixels, labels)


def _files(folder: Path, name: str) -> list[Path]:
    """Return the image files of one class, sorted; a class folder that the test part lacks has none."""
    files = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not files and (folder / name).is_dir():
        raise DataError(f"{folder / name} holds no image: remove the folder, or put images of {name!r} there")
    return files
