"""Options of the image-classification recipes ``cifar100`` and ``tiny-imagenet``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from duoka.errors import ConfigError
from duoka.recipes.common.config import at_least, check

__all__ = ["Cifar100Config", "TinyImageNetConfig"]

SETS: dict[str, dict[str, Any]] = {
    "digits": {
        "model": "resnet10",
        "width": 0.25,
        "batch_size": 64,
        "batch_size_means": "global",
        "epochs": 12,
        "lr": 0.01,
        "num_workers": 0,
    },
    "others": {"model": "resnet18", "width": 1.0, "batch_size": 256, "batch_size_means": "per_device", "epochs": 50},
}
"""What an option that is left open comes to, by data set."""
OPTIMIZERS: dict[str, dict[str, float]] = {
    "sgd": {"lr": 0.1, "weight_decay": 5e-4},
    "adam": {"lr": 0.001, "weight_decay": 0.0},
    "adamw": {"lr": 0.001, "weight_decay": 0.05},
    "adagrad": {"lr": 0.01, "weight_decay": 0.0},
    "rmsprop": {"lr": 0.001, "weight_decay": 0.0},
}
"""The same, by optimiser."""


@dataclass(frozen=True)
class Cifar100Config:
    """Train a ResNet for small images.

    The test part is evaluated after every epoch and never chooses anything: the result is the last epoch's.
    """

    dataset: Literal["cifar100", "cifar10", "folder", "digits"] = "cifar100"
    """What to train on; ``digits`` needs no download, ``folder`` is a folder of images a class below ``root``."""
    root: str = "./data"
    """Folder of the data: of the CIFAR archive or what was unpacked from it, or of the class folders."""
    download: bool = True
    """Whether CIFAR may be downloaded (about 170 MB) when ``root`` has none."""
    verify: bool = True
    """Whether CIFAR's files must have the official checksums; false for other data in the same format."""
    image_size: int = 32
    """Side, in pixels, that the images of a ``folder`` are scaled and cropped to."""
    test_share: float = 0.2
    """Share of each class that is kept for testing where the data have no test part: 0 to 1."""
    split_seed: int = 0
    """Decides which images those are; apart from ``seed``, so that runs with other seeds are tested on the same."""

    model: Literal["resnet10", "resnet18", "resnet50"] | None = None
    """The network; null is resnet18, for digits resnet10."""
    width: float | None = None
    """Factor on the numbers of channels, 64 to 512; null is 1, for digits 0.25."""

    device: str = "auto"
    """What to compute on: auto, all, 0, 0,1, 0-3, cuda:1, cpu, cpu:2, idle, idle:2."""
    num_workers: int | None = None
    """Processes that load data, for all devices of a machine together, never more than its cores allow; null and 0 are none:
    images stay on the device, where whole batches are changed at once."""
    batch_size: int | None = None
    """Batch size, in images, of each device (see ``batch_size_means``); null is 256, for digits 64."""
    batch_size_means: Literal["per_device", "global"] | None = None
    """Whether ``batch_size`` is each device's, or all devices' together; null is per_device, for digits global."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of forward and backward."""

    epochs: int | None = None
    """How many times the training images are gone through; null is 50, for digits 12."""
    optimizer: Literal["sgd", "adam", "adamw", "adagrad", "rmsprop"] = "adamw"
    """What changes the weights."""
    lr: float | None = None
    """Learning rate, for one device's batch; null is 0.1 for sgd, 0.01 for adagrad, else 0.001 (digits: 0.01)."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """How ``lr`` grows with the number of devices when the batch does."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate rises before the schedule begins."""
    scheduler: Literal["multistep", "cosine", "onecycle", "none"] = "onecycle"
    """How the learning rate changes: at half and three quarters to a tenth, along a cosine to 0, up and down, or not."""
    weight_decay: float | None = None
    """Weight decay; null is the optimiser's: 0.0005 for sgd, 0.05 for adamw, else 0."""
    momentum: float = 0.9
    """Momentum of sgd; the other optimisers have none of this kind."""
    label_smoothing: float = 0.0
    """Share of a label that is spread over all classes: 0 to 1."""
    seed: int = 0
    """Decides the first weights, the order of the images and their random changes."""

    out: str = "runs"
    """Folder of all runs; this one becomes OUT/cifar100/TIME-NAME."""
    name: str | None = None
    """The run's name; null is DATASET-MODEL."""
    resume: str | None = None
    """A stopped run's folder, to go on with it there, with its own options unless others are given."""

    FIXED = ("dataset", "model", "width", "optimizer", "scheduler")
    PLANNED = ("multistep", "cosine", "onecycle")
    DATA = ("dataset", "root", "download", "verify", "image_size", "test_share", "split_seed")

    def __post_init__(self) -> None:
        check(self)
        for option, least in {
            "batch_size": 1,
            "epochs": 1,
            "image_size": 8,
            "num_workers": 0,
            "seed": 0,
            "split_seed": 0,
        }.items():
            at_least(self, option, least)
        for option in ("lr", "width"):
            at_least(self, option, 0, exclusive=True)
        for option in ("weight_decay", "warmup_epochs"):
            at_least(self, option, 0)
        at_least(self, "momentum", 0, below=1)
        at_least(self, "label_smoothing", 0, below=1)
        at_least(self, "test_share", 0, exclusive=True, below=1)

    def resolved(self) -> Cifar100Config:
        """Return the same with a value for every option that was left open."""
        by_optimizer, by_set = OPTIMIZERS[self.optimizer], SETS.get(self.dataset, SETS["others"])
        if self.optimizer not in ("adam", "adamw"):
            by_set = {option: value for option, value in by_set.items() if option != "lr"}
        chosen = {**by_optimizer, **by_set}
        chosen["name"] = f"{self.dataset}-{self.model or chosen['model']}"
        open_ones = {option: value for option, value in chosen.items() if getattr(self, option) is None}
        return dataclasses.replace(self, **open_ones)


@dataclass(frozen=True)
class TinyImageNetConfig:
    """Train one of five networks for small images, as one experiment of a suite.

    The validation part is evaluated after every epoch, without any random change, and never chooses anything.
    """

    dataset: Literal["tiny-imagenet", "cifar10", "cifar100"] = "tiny-imagenet"
    """What to train on."""
    root: str = "./data"
    """Folder of the data: of the official folder or archive, or that folder itself."""
    download: bool = True
    """Whether data may be downloaded (250 MB, CIFAR 170 MB) when ``root`` has none."""
    image_size: int | None = None
    """Side, in pixels, that images are scaled to, a multiple of 8; null is 64, of CIFAR 32, which keeps its own."""
    limit: int | None = None
    """How many images of each class are trained and tested on, at most; null is all: for a quick look."""

    model: Literal["baseline", "residual", "deeper_wider", "se_attention", "best"] = "baseline"
    """The network; with 200 classes of 13.6, 9.9, 19.4, 13.7 and 20.1 million parameters."""
    augmentation: Literal["none", "basic", "mixup", "cutmix"] = "basic"
    """Random changes in training: none; resized crop, flip and colours; or these and torchvision's MixUp or CutMix."""

    device: str = "auto"
    """What to compute on: auto, all, 0, 0,1, 0-3, cuda:1, cpu, cpu:2, idle, idle:2."""
    num_workers: int | None = None
    """Processes that load data, for all devices of a machine together, never more than its cores allow (the guide has four a
    device); null and 0 are none: images stay on the device, where whole batches are changed at once. With workers, MixUp and
    CutMix mix each device's part of a batch in itself."""
    batch_size: int = 64
    """Batch size, in images, of each device (see ``batch_size_means``)."""
    batch_size_means: Literal["per_device", "global"] = "per_device"
    """Whether ``batch_size`` is each device's, or all devices' together."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of forward and backward."""

    epochs: int = 50
    """How many times the training images are gone through."""
    optimizer: Literal["adam", "adamw", "rmsprop"] = "adam"
    """What changes the weights."""
    lr: float = 3e-4
    """Learning rate, for one device's batch."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """How ``lr`` grows with the number of devices when the batch does."""
    scheduler: Literal["cosine", "none"] | None = None
    """How the learning rate changes: along a cosine to 0, or not; null is none for adam, cosine for the others."""
    weight_decay: float | None = None
    """Weight decay; null is 0.000001 for the model best, else 0.01 for adamw and 0 for the others."""
    seed: int = 0
    """Decides the first weights, the order of the images and their random changes."""

    out: str = "runs"
    """Folder of all runs; this one becomes OUT/tiny-imagenet/TIME-NAME."""
    name: str | None = None
    """The run's name; null is MODEL-AUGMENTATION-OPTIMIZER."""
    resume: str | None = None
    """A stopped run's folder, to go on with it there, with its own options unless others are given."""

    FIXED = ("dataset", "image_size", "model", "optimizer", "scheduler")
    PLANNED = ("cosine",)
    DATA = ("dataset", "root", "download", "image_size", "limit")

    def __post_init__(self) -> None:
        check(self)
        for option, least in {"batch_size": 1, "epochs": 1, "num_workers": 0, "seed": 0}.items():
            at_least(self, option, least)
        at_least(self, "lr", 0, exclusive=True)
        at_least(self, "image_size", 8)
        at_least(self, "limit", 1)
        own = 64 if self.dataset == "tiny-imagenet" else 32
        if self.image_size is not None and (self.image_size % 8 or (own == 32 and self.image_size != own)):
            limits = "a multiple of 8" if own == 64 else f"{own}, the size of {self.dataset}'s images"
            raise ConfigError(f"`image_size` is {self.image_size}: it must be {limits}")
        at_least(self, "weight_decay", 0)

    def resolved(self) -> TinyImageNetConfig:
        """Return the same with a value for every option that was left open."""
        decay = 1e-6 if self.model == "best" else 0.01 if self.optimizer == "adamw" else 0.0
        chosen = {
            "scheduler": "none" if self.optimizer == "adam" else "cosine",
            "weight_decay": decay,
            "image_size": 64 if self.dataset == "tiny-imagenet" else 32,
            "name": f"{self.model}-{self.augmentation}-{self.optimizer}",
        }
        open_ones: dict[str, Any] = {option: value for option, value in chosen.items() if getattr(self, option) is None}
        return dataclasses.replace(self, **open_ones)
