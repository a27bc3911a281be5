"""Recipe ``tiny-imagenet``: five networks, three optimisers and three augmentations on Tiny-ImageNet, CIFAR-10 or CIFAR-100.

It reads top to bottom: the options, what they come to, training, and what a finished run is asked afterwards.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from duoka import checkpoint, devices
from duoka.data import transforms
from duoka.recipes.common.recipe_run import RecipeRun, folder_of, run_options
from duoka.recipes.common.registry import Prediction, RecipeOutcome
from duoka.recipes.datasets import cifar, tiny_imagenet
from duoka.recipes.datasets.image_loader import Collate, loader
from duoka.recipes.datasets.images import ImageSet
from duoka.recipes.image_classification import common
from duoka.recipes.image_classification.common import DatasetMetadata
from duoka.recipes.image_classification.config import TinyImageNetConfig
from duoka.recipes.models import small_cnns
from duoka.trainer import Trainer
from duoka.utils.imports import import_optional
from duoka.world import current_world

__all__ = ["TinyImageNetConfig", "evaluate", "predict", "train"]

NAME = "tiny-imagenet"
PLAIN = """\
from model import build  # this folder's model.py, which needs torch and nothing else
model = build({model!r}, {classes}, {size})
model.load_state_dict(torch.load("model.pth"))
"""
"""How weights are loaded without duoka: written into every run's folder."""
SCALE = (0.8, 1.0)
"""The share of an image's area that a random crop keeps."""
JITTER = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2}
"""How much colours change."""


Config = TinyImageNetConfig
"""What the registry asks every recipe for."""


def train(config: TinyImageNetConfig) -> RecipeOutcome:
    """Train, test, and write the run's folder with its results, pictures, and weights for plain torch."""
    config = config.resolved()
    chosen = devices.resolve(config.device).devices  # a device that is not there is said before any download
    images = load(config)
    facts = common.facts_of(images)
    run = folder_of(NAME, config, chosen)
    torch.manual_seed(config.seed)
    model = small_cnns.build(config.model, len(images.classes), images.shape[1])
    trainer = _trainer(model, config, images, facts, run)
    with run.resumable(NAME):
        trainer.fit(save_model=True, model_path=run.model)
    if current_world().is_main:
        _write_plain(run, model, config, facts)
    test = common.test_loader(images, facts, config.batch_size)
    return common.tested(NAME, run, trainer, images, facts, test)


def evaluate(run: RecipeRun, config: TinyImageNetConfig) -> RecipeOutcome:
    """Test the model of a finished run again; writes ``evaluation.json`` into its folder."""
    model, facts = _finished(run, config)
    images = load(config)
    trainer = _trainer(model, config, images, facts, None)
    return common.evaluated(run, trainer, images, common.test_loader(images, facts, config.batch_size))


def predict(
    run: RecipeRun, config: TinyImageNetConfig, sources: Sequence[str], *, invert: bool = False
) -> list[Prediction]:
    """Name the classes of image files, with the probabilities that the model of a finished run gives them."""
    model, facts = _finished(run, config)
    return common.predictions(model, facts, config.device, sources, invert=invert)


def load(config: TinyImageNetConfig) -> ImageSet:
    """Return the images that ``config`` names."""
    if config.dataset == "tiny-imagenet":
        images = tiny_imagenet.load(config.root, download=config.download, size=config.image_size or tiny_imagenet.SIZE)
    else:
        images = cifar.load(cifar.official(config.dataset), config.root, download=config.download)
    if config.limit is None:
        return images
    train, test = (part.select(_first_of_each(part.labels, config.limit)) for part in (images.train, images.test))
    return dataclasses.replace(images, train=train, test=test)


def changes(config: TinyImageNetConfig, size: int) -> list[Any]:
    """Return the random changes of single images."""
    if config.augmentation == "none":
        return []
    crop = transforms.RandomResizedCrop(size, scale=SCALE)
    return [crop, transforms.RandomHorizontalFlip(), transforms.ColorJitter(**JITTER)]


def one_by_one(config: TinyImageNetConfig, size: int) -> Any:
    """Return torchvision's transform of one image that makes the same random changes, for worker processes."""
    v2 = import_optional("torchvision.transforms.v2", extra="vision")
    if config.augmentation == "none":
        return v2.Identity()
    return v2.Compose([v2.RandomResizedCrop(size, scale=SCALE), v2.RandomHorizontalFlip(), v2.ColorJitter(**JITTER)])


def mixing(config: TinyImageNetConfig, classes: int) -> Any:
    """Return torchvision's transform that mixes a batch, or ``None``."""
    if config.augmentation not in ("mixup", "cutmix"):
        return None
    v2 = import_optional("torchvision.transforms.v2", extra="vision")
    return (v2.MixUp if config.augmentation == "mixup" else v2.CutMix)(num_classes=classes)


def _first_of_each(labels: torch.Tensor, limit: int) -> torch.Tensor:
    """Return the places of the first ``limit`` images of each class, in order."""
    return torch.cat([(labels == label).nonzero().flatten()[:limit] for label in torch.unique(labels)]).sort().values


def _trainer(
    model: nn.Module, config: TinyImageNetConfig, images: ImageSet, facts: DatasetMetadata, run: RecipeRun | None
) -> Trainer:
    """Return a trainer with the options of ``config``, which writes into the folder of ``run``."""
    from duoka.recipes.common.label_metrics import LabelWeightedAccuracy

    return Trainer(
        model,
        _train_loader(config, images, facts),
        common.test_loader(images, facts, config.batch_size),
        loss=nn.functional.cross_entropy,
        metrics=common.metrics(len(facts.classes)),
        train_metrics={"accuracy": LabelWeightedAccuracy()},
        device=config.device,
        batch_size_means=config.batch_size_means,
        precision=config.precision,
        epochs=config.epochs,
        optimizer=config.optimizer,
        lr=config.lr,
        lr_scaling=config.lr_scaling,
        weight_decay=config.weight_decay,
        scheduler=None if config.scheduler == "none" else config.scheduler,
        seed=config.seed,
        **({} if run is None else run_options(run, NAME, config)),
    )


def _train_loader(config: TinyImageNetConfig, images: ImageSet, facts: DatasetMetadata) -> Any:
    """Return a loader that makes batches on the device, or in worker processes where these were asked for."""
    mix = mixing(config, len(facts.classes))
    if not config.num_workers:
        return common.loader(images.train, facts, config.batch_size, changes(config, facts.shape[1]), mix)
    workers = common.workers_of(config.device, config.num_workers)
    collate = Collate(facts.statistics, mix)
    return loader(images.train, collate, config.batch_size, workers, one_by_one(config, facts.shape[1]))


def _write_plain(run: RecipeRun, model: nn.Module, config: TinyImageNetConfig, facts: DatasetMetadata) -> None:
    """Leave what loads the weights without duoka: the network's source, the weights, and three lines."""
    shutil.copyfile(small_cnns.__file__, run.folder / "model.py")
    checkpoint.save(model, run.folder / "model.pth")
    text = PLAIN.format(model=config.model, classes=len(facts.classes), size=facts.shape[1])
    (run.folder / "load.txt").write_text(text, encoding="utf-8")


def _finished(run: RecipeRun, config: TinyImageNetConfig) -> tuple[nn.Module, DatasetMetadata]:
    """Return the trained model of a run and what it remembers of its images."""
    return common.finished(run, lambda facts: small_cnns.build(config.model, len(facts.classes), facts.shape[1]))
