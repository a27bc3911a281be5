"""Images/s of random resized crop, flip, color jitter and normalization: a DataLoader over JPEG files, and resident data.

Both make batches of 64 of the same images with the same distributions of transforms, on two cores. The DataLoader has two
worker processes, which decode and transform image by image. duoka has two devices (``cpu:2``), one process for each half of
a batch, and reads the cache of decoded images that the recipe builds once; the speed of decoding is printed too. The two take
turns, so other load on the machine affects both. Each number is a median over the rounds, and so is the ratio. The
DataLoader's sampler never ends, so its workers start once; batches that they prepared before their turn do not count.

Run ``python benchmarks/images.py --root DIR [--rounds 7]``, where DIR holds Tiny-ImageNet or a set in its folders. Needs
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
    options.add_argument("--seconds", type=float, default=4.0, help="seconds of each contestant in each round")
    given = options.parse_args()
    torch.set_num_threads(1)
    images = tiny_imagenet.load(given.root, download=False)
    files = Files(Path(given.root), images)
    contestants = {"DataLoader, 2 workers, JPEG files": files, "duoka.data.resident": Resident(images)}
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for contestant in contestants.values():
        contestant.rate(1.0)  # not counted: workers start, and the system caches files
    for number in range(given.rounds):
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            rates[name].append(contestants[name].rate(given.seconds))
    for name, values in rates.items():
        print(f"{name:36} {statistics.median(values):8,.0f} images/s  ({min(values):,.0f} to {max(values):,.0f})")
    data_loader, resident = rates.values()
    ratio = statistics.median(b / a for a, b in zip(data_loader, resident, strict=True))
    print(f"ratio {ratio:.2f}, median of {given.rounds} rounds")
    print(f"{'decoding alone, once, 2 threads':36} {files.decoding():8,.0f} images/s")


class Files:
    """A DataLoader of torchvision's ImageFolder, image by image in worker processes."""

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
            next(self.batches)  # prefetched during the other's turn, two by each worker
        count, began = 0, time.perf_counter()
        while (passed := time.perf_counter() - began) < seconds:
            count += len(next(self.batches)[1])
        return count / passed

    def decoding(self) -> float:
        """Return the images/s that a build of the cache decodes."""
        paths = [path for path, _ in self.data.samples[:2000]]
        began = time.perf_counter()
        with ThreadPoolExecutor(CORES) as pool:
            list(pool.map(lambda path: read_image(path, (3, 64, 64)), paths))
        return len(paths) / (time.perf_counter() - began)


class Resident:
    """Both devices' halves, each made by its own process, as in every training on ``cpu:2``."""

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
        return sum(duoka.launch(measure, self.loader, seconds, devices=f"cpu:{CORES}", returns="all"))


def measure(loader: Any, seconds: float) -> float:
    """Iterate over epochs for ``seconds``; return this rank's images/s."""
    world = duoka.current_world()
    shard = duoka.data.local_batches(loader, rank=world.rank, world_size=world.size, seed=0)
    torch.set_num_threads(1)
    world.all_reduce(torch.zeros(1))  # all start together
    count, began = 0, time.perf_counter()
    while True:
        for part in shard:
            count += len(part.batch[1])
            if (passed := time.perf_counter() - began) >= seconds:
                return count / passed


if __name__ == "__main__":
    main()
