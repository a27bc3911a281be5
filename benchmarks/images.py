"""Images/s of random resized crop, flip, colour jitter and normalisation: a DataLoader over JPEG files, and resident data.

Both make batches of 64 of the same images with the same distributions of changes, on two cores: the DataLoader with two
worker processes that decode and change image by image, duoka as two devices (``cpu:2``), half of each batch in a process
each, from the pack of decoded images that the recipe makes once (how quickly is told, too). They take turns, so that
whatever else the machine does meets both alike; each number is a median over the rounds, and so is their ratio. The
DataLoader's sampler never ends, so that it starts its workers once, and what these had prepared while they waited does not
count. Run ``python benchmarks/images.py --root DIR [--rounds 7]``, where DIR holds Tiny-ImageNet or a set in its folders. Needs
torchvision.
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import duoka
from duoka.data import transforms
from duoka.recipes.datasets import tiny_imagenet
from duoka.recipes.datasets.images import ImageSet, read_image
from duoka.recipes.image_classification.presets import JITTER, SCALE

BATCH, CORES = 64, 2


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--root", required=True)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--seconds", type=float, default=4.0, help="of each contestant in each round")
    given = options.parse_args()
    torch.set_num_threads(1)
    images = tiny_imagenet.load(given.root, download=False)
    files = Files(Path(given.root), images)
    contestants = {"DataLoader, 2 workers, JPEG files": files, "duoka.data.resident": Kept(images)}
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for contestant in contestants.values():
        contestant.rate(1.0)  # not counted: workers start, files come into the system's cache
    for number in range(given.rounds):
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            rates[name].append(contestants[name].rate(given.seconds))
    for name, values in rates.items():
        print(f"{name:36} {statistics.median(values):8,.0f} images/s  ({min(values):,.0f} to {max(values):,.0f})")
    theirs, ours = rates.values()
    print(
        f"ratio {statistics.median(b / a for a, b in zip(theirs, ours, strict=True)):.2f}, median of {given.rounds} rounds"
    )
    print(f"{'decoding alone, once, 2 threads':36} {files.decoding():8,.0f} images/s")


class Files:
    """torch's and torchvision's own way, image by image in worker processes."""

    def __init__(self, root: Path, images: ImageSet) -> None:
        folder = next(path.parent for path in (*root.glob("wnids.txt"), *root.glob("*/wnids.txt")))
        assert images.statistics is not None
        steps = [
            v2.RandomResizedCrop(64, scale=SCALE),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(**JITTER),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(images.statistics.mean, images.statistics.std),
        ]
        self.data = ImageFolder(folder / "train", v2.Compose(steps))
        endless = RandomSampler(self.data, replacement=True, num_samples=1 << 40)
        self.batches = iter(DataLoader(self.data, BATCH, sampler=endless, num_workers=CORES))

    def rate(self, seconds: float) -> float:
        """Return images/s."""
        for _ in range(2 * CORES):
            next(self.batches)  # made while the other was measured: workers prefetch two each
        count, began = 0, time.perf_counter()
        while (passed := time.perf_counter() - began) < seconds:
            count += len(next(self.batches)[1])
        return count / passed

    def decoding(self) -> float:
        """Return the images/s that are decoded when the pack is made."""
        paths = [path for path, _ in self.data.samples[:2000]]
        began = time.perf_counter()
        with ThreadPoolExecutor(CORES) as pool:
            list(pool.map(lambda path: read_image(path, (3, 64, 64)), paths))
        return len(paths) / (time.perf_counter() - began)


class Kept:
    """Both devices' parts, each made by a process of its own, as in every training on ``cpu:2``."""

    def __init__(self, images: ImageSet) -> None:
        assert images.statistics is not None
        steps = [
            transforms.RandomResizedCrop(64, scale=SCALE),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(**JITTER),
            transforms.Normalize(images.statistics.mean, images.statistics.std),
        ]
        data = (images.train.pixels, images.train.labels)
        self.loader = duoka.data.resident(data, batch_size=BATCH, shuffle=True, transforms=steps, device="cpu")

    def rate(self, seconds: float) -> float:
        """Return images/s."""
        return sum(duoka.launch(made, self.loader, seconds, devices=f"cpu:{CORES}", returns="all"))


def made(loader: Any, seconds: float) -> float:
    """Go through epochs for ``seconds``; return this rank's images/s."""
    world = duoka.current_world()
    shard = duoka.data.shard(loader, rank=world.rank, world_size=world.size, seed=0)
    torch.set_num_threads(1)
    world.all_reduce(torch.zeros(1))  # all begin together
    count, began = 0, time.perf_counter()
    while True:
        for part in shard:
            count += len(part.batch[1])
            if (passed := time.perf_counter() - began) >= seconds:
                return count / passed


if __name__ == "__main__":
    main()
