"""Recipe ``cifar100``: ResNets on CIFAR-100, CIFAR-10, a folder of images, or handwritten digits.

It reads top to bottom: the options, what they come to, training, and what a finished run is asked afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from duoka import devices
from duoka.errors import ConfigError
from duoka.log import logger
from duoka.recipes.common.recipe_run import RecipeRun, folder_of, run_options
from duoka.recipes.common.registry import Prediction, RecipeOutcome
from duoka.recipes.datasets import cifar, digits, image_folder
from duoka.recipes.datasets.image_loader import Collate, augmentation, loader
from duoka.recipes.datasets.images import ImageSet
from duoka.recipes.image_classification import common
from duoka.recipes.image_classification.common import DatasetMetadata
from duoka.recipes.image_classification.config import Cifar100Config
from duoka.recipes.models.resnet import resnet
from duoka.trainer import Trainer

__all__ = ["Cifar100Config", "evaluate", "predict", "train"]

T = TypeVar("T")
NAME = "cifar100"
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
    test = common.test_loader(images, facts, _given(config.batch_size))
    return common.tested(NAME, run, trainer, images, facts, test)


def evaluate(run: RecipeRun, config: Cifar100Config) -> RecipeOutcome:
    """Test the model of a finished run again; writes ``evaluation.json`` into its folder."""
    model, facts = _finished(run, config)
    images = load(config)
    trainer = _trainer(model, config, images, facts, None)
    return common.evaluated(run, trainer, images, common.test_loader(images, facts, _given(config.batch_size)))


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
        common.test_loader(images, facts, _given(config.batch_size)),
        loss=nn.CrossEntropyLoss(label_smoothing=config.label_smoothing),
        metrics=common.metrics(len(images.classes)),
        device=config.device,
        batch_size_means=config.batch_size_means,
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
    size, count = _given(config.batch_size), len(images.train)
    together = replicas if config.batch_size_means == "per_device" else 1
    if size * together > count:
        logger.warning("`batch_size` is %s, more than the %s images: one step an epoch", f"{size:,}", f"{count:,}")

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
            f"`batch_size` is {size} ({config.batch_size_means}){on}, which{last} gives a device only "
            f"one image: batch norm needs at least two. Write --batch_size {enough}"
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
    if not config.num_workers:
        return common.loader(images.train, facts, _given(config.batch_size), common.shifts(images))
    workers = common.workers_of(config.device, config.num_workers)
    return loader(images.train, Collate(facts.statistics), _given(config.batch_size), workers, augmentation(images))


def _finished(run: RecipeRun, config: Cifar100Config) -> tuple[nn.Module, DatasetMetadata]:
    """Return the trained model of a run and what it remembers of its images."""
    model, width = _given(config.model), _given(config.width)
    return common.finished(run, lambda facts: resnet(model, len(facts.classes), facts.shape[0], width))


def _given(value: T | None) -> T:
    """Return what ``Config.resolved`` has filled in."""
    assert value is not None
    return value
