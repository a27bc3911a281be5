"""Images/s of random resized crop, flip, colour jitter and normalisation: a DataLoader over JPEG files, and resident data.

Both make batches of 64 of the same images with the same distributions of changes, on two cores: the DataLoader with two
worker processes that decode and change image by image, duoka as two devices (``cpu:2``) would, half of each batch on one
thread each, from a pack that was made once. They take turns, so that whatever else the machine does meets both alike; each
number is a median over the rounds, and so is their ratio. Run ``python benchmarks/images.py --root DIR [--rounds 7]``,
where DIR holds Tiny-ImageNet or a set in its folders. Needs torchvision.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import duoka
from duoka.data import augment
from duoka.recipes.sets import tinyimagenet
from duoka.recipes.sets.imageset import ImageSet

BATCH, CORES = 64, 2
SCALE, JITTER = (0.8, 1.0), (0.2, 0.2, 0.2)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--root", required=True)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--seconds", type=float, default=4.0, help="of each contestant in each round")
    given = options.parse_args()
    torch.set_num_threads(1)
    images = tinyimagenet.load(given.root, download=False)
    contestants = {
        "DataLoader, 2 workers, JPEG files": files(Path(given.root), images),
        "duoka.data.resident": kept(images),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for loader in contestants.values():
        rate(loader, 1.0)  # not counted: workers start, files come into the system's cache
    for number in range(given.rounds):
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            rates[name].append(rate(contestants[name], given.seconds))
    for name, values in rates.items():
        print(f"{name:36} {statistics.median(values):8,.0f} images/s  ({min(values):,.0f} to {max(values):,.0f})")
    theirs, ours = rates.values()
    print(
        f"ratio {statistics.median(b / a for a, b in zip(theirs, ours, strict=True)):.2f}, median of {given.rounds} rounds"
    )


def files(root: Path, images: ImageSet) -> DataLoader[Any]:
    folder = next(path.parent for path in (*root.glob("wnids.txt"), *root.glob("*/wnids.txt")))
    assert images.statistics is not None
    steps = [
        v2.RandomResizedCrop(64, scale=SCALE),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(*JITTER),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(images.statistics.mean, images.statistics.std),
    ]
    data = ImageFolder(folder / "train", v2.Compose(steps))
    return DataLoader(data, BATCH, shuffle=True, num_workers=CORES, persistent_workers=True)


def kept(images: ImageSet) -> Any:
    assert images.statistics is not None
    steps = [
        augment.RandomResizedCrop(64, scale=SCALE),
        augment.RandomHorizontalFlip(),
        augment.ColorJitter(*JITTER),
        augment.Normalize(images.statistics.mean, images.statistics.std),
    ]
    data = (images.train.pixels, images.train.labels)
    return Halves(duoka.data.resident(data, batch_size=BATCH, shuffle=True, transforms=steps, device="cpu"))


class Halves:
    """Both devices' parts of an epoch, each made by a thread: torch's operations leave the interpreter to the other."""

    def __init__(self, loader: Any) -> None:
        self.shards = [duoka.data.shard(loader, rank=rank, size=CORES, seed=0) for rank in range(CORES)]

    def __iter__(self) -> Iterator[Any]:
        with ThreadPoolExecutor(CORES, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for labels in pool.map(self.labels, self.shards):
                for part in labels:
                    yield None, part

    @staticmethod
    def labels(shard: Any) -> list[torch.Tensor]:
        return [part.batch[1] for part in shard]


def rate(loader: Iterable[Any], seconds: float) -> float:
    """Go through whole epochs for about ``seconds``; return images/s."""
    count, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        count += sum(len(labels) for _, labels in loader)
    return count / passed


if __name__ == "__main__":
    main()
