"""Presets of the image-classification recipe: ``cifar100`` with ResNets, ``tiny-imagenet`` with five small networks."""

import dataclasses
import shutil
from typing import Any

import torch
from torch import nn

from duoka import checkpoint
from duoka.errors import ConfigError
from duoka.log import logger
from duoka.recipes.common.recipe_run import RecipeRun
from duoka.recipes.datasets import cifar, image_folder, tiny_imagenet
from duoka.recipes.datasets.images import ImageSet, load_digits
from duoka.recipes.image_classification.config import Cifar100Config, TinyImageNetConfig
from duoka.recipes.image_classification.results import DatasetMetadata
from duoka.recipes.image_classification.train import ImageRecipe
from duoka.recipes.models import small_cnns
from duoka.recipes.models.resnet import resnet
from duoka.utils.imports import import_optional
from duoka.utils.text import plural

SCALE = (0.8, 1.0)
"""Range of the share of an image's area that a random crop keeps."""
JITTER = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2}
"""Strength of random color changes."""
LOAD_WITHOUT_DUOKA = """\
from model import build  # this folder's model.py, which needs torch and nothing else
model = build({model!r}, {classes}, {size})
model.load_state_dict(torch.load("model.pth"))
"""
"""Content of ``load.txt`` in every run's folder."""


class Cifar100Preset(ImageRecipe):
    """ResNets on CIFAR-100, CIFAR-10, a folder of images, or handwritten digits."""

    name = "cifar100"
    Config = Cifar100Config

    def load(self, config: Cifar100Config) -> ImageSet:
        """Return the images that ``config`` names."""
        if config.dataset == "digits":
            return load_digits(test_share=config.test_share, split_seed=config.split_seed)
        if config.dataset == "folder":
            share, seed = config.test_share, config.split_seed
            return image_folder.load(config.root, size=config.image_size, test_share=share, split_seed=seed)
        source = cifar.official(config.dataset)
        return cifar.load(source, config.root, download=config.download, verify=config.verify)

    def build_model(self, config: Cifar100Config, metadata: DatasetMetadata) -> nn.Module:
        """Return a ResNet."""
        assert config.model is not None  # resolved() has set both
        assert config.width is not None
        return resnet(config.model, len(metadata.classes), metadata.shape[0], config.width)

    def augmentation(self, config: Cifar100Config, images: ImageSet, library: Any) -> list[Any]:  # noqa: ARG002
        """Return a crop with padding, and a flip if that keeps the label.

        The padding is 4 of 32 pixels (He et al., 2015), and in proportion for other sizes.
        """
        side = min(images.shape[1:])
        flip = [library.RandomHorizontalFlip()] if images.flip_keeps_label else []
        return [library.RandomCrop(side, padding=max(1, side // 8)), *flip]

    def trainer_options(self, config: Cifar100Config) -> dict[str, Any]:
        """Return loss, momentum, warm-up and schedule options."""
        has_momentum = config.optimizer in ("sgd", "adam", "adamw")
        is_fixed = config.scheduler == "onecycle" and not has_momentum
        return {
            "loss": nn.CrossEntropyLoss(label_smoothing=config.label_smoothing),
            "optimizer_options": {"momentum": config.momentum} if config.optimizer == "sgd" else {},
            "warmup_epochs": config.warmup_epochs,
            "scheduler_options": {"cycle_momentum": False} if is_fixed else {},
        }

    def check_images(self, config: Cifar100Config, images: ImageSet, replicas: int) -> None:
        """Refuse a batch that leaves a device one image where batch norm needs two; warn of a batch of all images.

        The network halves the side three times, so images of up to 8 pixels end as one value per channel.
        """
        assert config.batch_size is not None  # resolved() has set it
        size, count = config.batch_size, len(images.train)
        batches = replicas if config.batch_size_means == "per_device" else 1
        if size * batches > count:
            logger.warning("batch_size=%s is more than the %s images: one step per epoch", f"{size:,}", f"{count:,}")

        def smallest_batch(size: int) -> int:
            return count % (size * batches) or min(size * batches, count)

        smallest = smallest_batch(size)
        if max(images.shape[1:]) > 8 or smallest >= 2 * replicas:
            return
        enough = next((n for n in range(size + 1, count + 1) if smallest_batch(n) >= 2 * replicas), count)
        last = "" if smallest == size * batches else f" leaves {smallest} of {count:,} images for the last batch and"
        raise ConfigError(
            f"batch_size={size} ({config.batch_size_means}, {plural(replicas, 'device')}){last} gives a device only one image, "
            f"and batch norm needs two; write --batch_size {enough}"
        )


class TinyImageNetPreset(ImageRecipe):
    """Five networks, three optimizers and three augmentations on Tiny-ImageNet, CIFAR-10 or CIFAR-100."""

    name = "tiny-imagenet"
    Config = TinyImageNetConfig

    def load(self, config: TinyImageNetConfig) -> ImageSet:
        """Return the images that ``config`` names, at most ``limit`` of each class."""
        if config.dataset == "tiny-imagenet":
            size = config.image_size or tiny_imagenet.SIZE
            images = tiny_imagenet.load(config.root, download=config.download, size=size)
        else:
            images = cifar.load(cifar.official(config.dataset), config.root, download=config.download)
        if config.limit is None:
            return images
        parts = []
        for part in (images.train, images.test):
            of_classes = [(part.labels == label).nonzero().flatten() for label in torch.unique(part.labels)]
            parts.append(part.select(torch.cat([indices[: config.limit] for indices in of_classes]).sort().values))
        return dataclasses.replace(images, train=parts[0], test=parts[1])

    def build_model(self, config: TinyImageNetConfig, metadata: DatasetMetadata) -> nn.Module:
        """Return one of the five networks."""
        return small_cnns.build(config.model, len(metadata.classes), metadata.shape[1])

    def augmentation(self, config: TinyImageNetConfig, images: ImageSet, library: Any) -> list[Any]:
        """Return resized crop, flip and color jitter, unless the augmentation is none."""
        if config.augmentation == "none":
            return []
        crop = library.RandomResizedCrop(images.shape[1], scale=SCALE)
        return [crop, library.RandomHorizontalFlip(), library.ColorJitter(**JITTER)]

    def batch_mix(self, config: TinyImageNetConfig, num_classes: int) -> Any:
        """Return torchvision's MixUp or CutMix, or ``None``."""
        if config.augmentation not in ("mixup", "cutmix"):
            return None
        v2 = import_optional("torchvision.transforms.v2", extra="vision")
        return (v2.MixUp if config.augmentation == "mixup" else v2.CutMix)(num_classes=num_classes)

    def trainer_options(self, config: TinyImageNetConfig) -> dict[str, Any]:  # noqa: ARG002
        """Return the loss, and the accuracy on mixed labels."""
        from duoka.recipes.image_classification.label_metrics import LabelWeightedAccuracy  # imports torchmetrics

        return {"loss": nn.functional.cross_entropy, "train_metrics": {"accuracy": LabelWeightedAccuracy()}}

    def write_extras(
        self, run: RecipeRun, config: TinyImageNetConfig, model: nn.Module, metadata: DatasetMetadata
    ) -> None:
        """Write the network's source, its weights, and three lines that load them without duoka."""
        shutil.copyfile(small_cnns.__file__, run.folder / "model.py")
        checkpoint.save(model, run.folder / "model.pth")
        size = metadata.shape[1]
        text = LOAD_WITHOUT_DUOKA.format(model=config.model, classes=len(metadata.classes), size=size)
        run.write_text("load.txt", text)


CIFAR100 = Cifar100Preset()
TINY_IMAGENET = TinyImageNetPreset()
