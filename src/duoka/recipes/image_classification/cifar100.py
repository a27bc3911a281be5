"""Recipe ``cifar100``: ResNets on CIFAR-100, CIFAR-10, a folder of images, or handwritten digits.

It reads top to bottom: the options, what they come to, training, and what a finished run is asked afterwards.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from duoka import devices
from duoka.errors import ConfigError
from duoka.log import logger
from duoka.recipes.common.config import at_least, check
from duoka.recipes.common.recipe_run import RecipeRun, folder_of, run_options
from duoka.recipes.common.registry import Prediction, RecipeOutcome
from duoka.recipes.datasets import cifar, digits, image_folder
from duoka.recipes.datasets.image_loader import Collate, augmentation, loader
from duoka.recipes.datasets.images import ImageSet
from duoka.recipes.image_classification import common
from duoka.recipes.image_classification.common import DatasetMetadata
from duoka.recipes.models.resnet import resnet
from duoka.trainer import Trainer

__all__ = ["Cifar100Config", "evaluate", "predict", "train"]

T = TypeVar("T")
NAME = "cifar100"
SETS: dict[str, dict[str, Any]] = {
    "digits": {
        "model": "resnet10",
        "width": 0.25,
        "bsize": 64,
        "batch": "global",
        "epochs": 12,
        "lr": 0.01,
        "workers": 0,
    },
    "others": {"model": "resnet18", "width": 1.0, "bsize": 256, "batch": "per_device", "epochs": 50},
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
    workers: int | None = None
    """Processes that load data, for all devices of a machine together, never more than its cores allow; null and 0 are none:
    images stay on the device, where whole batches are changed at once."""
    bsize: int | None = None
    """Batch size, in images, of each device (see ``batch``); null is 256, for digits 64."""
    batch: Literal["per_device", "global"] | None = None
    """Whether ``bsize`` is each device's, or all devices' together; null is per_device, for digits global."""
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
            "bsize": 1,
            "epochs": 1,
            "image_size": 8,
            "workers": 0,
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


Config = Cifar100Config
"""What the registry asks every recipe for."""


def train(config: Cifar100Config) -> RecipeOutcome:
    """Train, test, and write the run's folder with its results and pictures."""
    config = config.resolved()
    chosen = devices.resolve(config.device).devices  # a device that is not there is said before any download
    images = load(config)
    _check_batch(config, images, int(os.environ.get("WORLD_SIZE", 0)) or len(chosen))
    facts = common.facts_of(images)
    run = folder_of(NAME, config, chosen)
    torch.manual_seed(config.seed)
    model = resnet(_given(config.model), len(images.classes), images.shape[0], _given(config.width))
    trainer = _trainer(model, config, images, facts, run)
    with run.resumable(NAME):
        trainer.fit(save_model=True, model_path=run.model)
    test = common.test_loader(images, facts, _given(config.bsize))
    return common.tested(NAME, run, trainer, images, facts, test)


def evaluate(run: RecipeRun, config: Cifar100Config) -> RecipeOutcome:
    """Test the model of a finished run again; writes ``evaluation.json`` into its folder."""
    model, facts = _finished(run, config)
    images = load(config)
    trainer = _trainer(model, config, images, facts, None)
    return common.evaluated(run, trainer, images, common.test_loader(images, facts, _given(config.bsize)))


def predict(
    run: RecipeRun, config: Cifar100Config, sources: Sequence[str], *, invert: bool = False
) -> list[Prediction]:
    """Name the classes of image files, with the probabilities that the model of a finished run gives them."""
    model, facts = _finished(run, config)
    return common.predictions(model, facts, config.device, sources, invert=invert)


def load(config: Cifar100Config) -> ImageSet:
    """Return the images that ``config`` names."""
    if config.dataset == "digits":
        return digits.load(test_share=config.test_share, split_seed=config.split_seed)
    if config.dataset == "folder":
        share, seed = config.test_share, config.split_seed
        return image_folder.load(config.root, size=config.image_size, test_share=share, split_seed=seed)
    source = cifar.official(config.dataset)
    return cifar.load(source, config.root, download=config.download, verify=config.verify)


def _trainer(
    model: nn.Module, config: Cifar100Config, images: ImageSet, facts: DatasetMetadata, run: RecipeRun | None
) -> Trainer:
    """Return a trainer with the options of ``config``, which writes into the folder of ``run``."""
    return Trainer(
        model,
        _train_loader(config, images, facts),
        common.test_loader(images, facts, _given(config.bsize)),
        loss=nn.CrossEntropyLoss(label_smoothing=config.label_smoothing),
        metrics=common.metrics(len(images.classes)),
        device=config.device,
        batch=config.batch,
        precision=config.precision,
        epochs=config.epochs,
        optimizer=config.optimizer,
        optimizer_options={"momentum": config.momentum} if config.optimizer == "sgd" else {},
        lr=config.lr,
        lr_scaling=config.lr_scaling,
        weight_decay=config.weight_decay,
        warmup_epochs=config.warmup_epochs,
        **_schedule(config),
        seed=config.seed,
        **({} if run is None else run_options(run, NAME, config)),
    )


def _check_batch(config: Cifar100Config, images: ImageSet, replicas: int) -> None:
    """Refuse a batch that leaves a device one image where batch norm needs two; say where it is all images at once.

    The network halves a side three times, so images of up to 8 pixels end as one value a channel.
    """
    size, count = _given(config.bsize), len(images.train)
    together = replicas if config.batch == "per_device" else 1
    if size * together > count:
        logger.warning("`bsize` is %s, more than the %s images: one step an epoch", f"{size:,}", f"{count:,}")

    def fewest(size: int) -> int:
        """Return how many images the smallest batch of an epoch has."""
        return count % (size * together) or min(size * together, count)

    if max(images.shape[1:]) <= 8 and fewest(size) < 2 * replicas:
        enough = next((more for more in range(size + 1, count + 1) if fewest(more) >= 2 * replicas), count)
        on = f" on {replicas} devices" if replicas > 1 else ""
        last = (
            ""
            if fewest(size) == size * together
            else f" leaves {fewest(size)} of {count:,} images for the last batch and"
        )
        raise ConfigError(
            f"`bsize` is {size} ({config.batch}){on}, which{last} gives a device only one image: batch norm needs at least "
            f"two. Write --bsize {enough}"
        )


def _schedule(config: Cifar100Config) -> dict[str, Any]:
    """Return the trainer's options for the learning rate's course; it changes at every step."""
    if config.scheduler == "none":
        return {}
    cycles_momentum = config.optimizer in ("sgd", "adam", "adamw")
    options = {"cycle_momentum": False} if config.scheduler == "onecycle" and not cycles_momentum else {}
    return {"scheduler": config.scheduler, "scheduler_options": options}


def _train_loader(config: Cifar100Config, images: ImageSet, facts: DatasetMetadata) -> Any:
    """Return a loader that makes batches on the device, or in worker processes where these were asked for."""
    if not config.workers:
        return common.loader(images.train, facts, _given(config.bsize), common.shifts(images))
    workers = common.workers_of(config.device, config.workers)
    return loader(images.train, Collate(facts.statistics), _given(config.bsize), workers, augmentation(images))


def _finished(run: RecipeRun, config: Cifar100Config) -> tuple[nn.Module, DatasetMetadata]:
    """Return the trained model of a run and what it remembers of its images."""
    model, width = _given(config.model), _given(config.width)
    return common.finished(run, lambda facts: resnet(model, len(facts.classes), facts.shape[0], width))


def _given(value: T | None) -> T:
    """Return what ``Config.resolved`` has filled in."""
    assert value is not None
    return value
