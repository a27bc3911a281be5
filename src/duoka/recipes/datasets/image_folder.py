"""Folders of images, one folder a class, directly below the root or below ``train/`` and ``test/`` or ``val/``."""

from pathlib import Path

import torch

from duoka.errors import DataError
from duoka.log import logger
from duoka.recipes.datasets.images import EXTENSIONS, Images, ImageSet, read_images, stratified_split
from duoka.utils.imports import import_optional


def load(root: str | Path, *, size: int = 32, test_share: float = 0.2, split_seed: int = 0) -> ImageSet:
    """Read the images below ``root`` in color, scaled and cropped to ``size`` x ``size`` pixels.

    If ``root`` has no test folder, ``test_share`` of each class becomes the test part.

    Raises DataError if class folders are missing or empty, only the test part has a class, or an image is unreadable.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}: name the folder of your class folders with --root")
    name = root.resolve().name
    if not (root / "train").is_dir():
        classes = _classes(root)
        images = _read(root, classes, size)
        train, test = stratified_split(images.labels, test_share, split_seed)
        return ImageSet(name, classes, images.select(train), images.select(test))
    classes = _classes(root / "train")
    parts = [part for part in ("test", "val", "valid", "validation") if _class_folders(root / part)]
    if not parts:
        raise DataError(f"{root} has train/ and neither test/ nor val/ with class folders: add one of them")
    test_root = root / parts[0]
    if unknown := set(_class_folders(test_root)) - set(classes):
        raise DataError(f"{test_root} has classes that {root / 'train'} lacks: {', '.join(sorted(unknown)[:5])}")
    logger.info("%s: trains on train/, tests on %s/", root, test_root.name)
    return ImageSet(name, classes, _read(root / "train", classes, size), _read(test_root, classes, size))


def _classes(folder: Path) -> tuple[str, ...]:
    names = _class_folders(folder)
    if len(names) < 2:
        found = f"found {names[0]!r} only" if names else "found no folder"
        raise DataError(f"{folder} must hold a folder of images for each class, two at least: {found}")
    return tuple(names)


def _class_folders(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.glob("[!.]*") if child.is_dir())


def _read(folder: Path, classes: tuple[str, ...], size: int) -> Images:
    """Decode all images of ``folder``, whose labels are indices into ``classes``."""
    torchvision = import_optional("torchvision.datasets.folder", extra="vision")
    labels = {name: label for label, name in enumerate(classes)}
    samples = torchvision.make_dataset(folder, labels, extensions=EXTENSIONS, allow_empty=True)
    for name in sorted(set(_class_folders(folder)) - {classes[label] for _, label in samples}):
        raise DataError(
            f"{folder / name} holds no image ({', '.join(EXTENSIONS)}): remove the folder, or put images of {name!r} there"
        )
    pixels = torch.empty((len(samples), 3, size, size), dtype=torch.uint8)
    read_images([Path(path) for path, _ in samples], pixels)
    return Images(pixels, torch.tensor([label for _, label in samples], dtype=torch.int64))
