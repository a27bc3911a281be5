"""The image-classification recipe: train, evaluate and predict, with the choices that differ in its presets."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from duoka import checkpoint, data, devices
from duoka.devices.cpu import loader_workers
from duoka.log import logger
from duoka.recipes.common.recipe_run import RecipeRun, run_dir_for, run_options
from duoka.recipes.common.registry import Prediction, RecipeOutcome
from duoka.recipes.datasets.image_loader import Collate, loader
from duoka.recipes.datasets.images import ImageSet
from duoka.recipes.image_classification.predict import DatasetMetadata, predict_files
from duoka.recipes.image_classification.results import evaluate_run, test_and_write_results
from duoka.trainer import Trainer
from duoka.world import current_world


class ImageRecipe(ABC):
    """A recipe of the registry; a preset chooses data, model, augmentation and options."""

    name: ClassVar[str]
    Config: ClassVar[type[Any]]

    @abstractmethod
    def load(self, config: Any) -> ImageSet:
        """Return the images that ``config`` names."""

    @abstractmethod
    def build_model(self, config: Any, metadata: DatasetMetadata) -> nn.Module:
        """Return the untrained model."""

    @abstractmethod
    def batch_transforms(self, config: Any, images: ImageSet) -> list[Any]:
        """Return the random transforms of training batches on the device."""

    @abstractmethod
    def sample_transform(self, config: Any, images: ImageSet) -> Any:
        """Return torchvision's transform of one training image, for DataLoader workers."""

    def batch_mix(self, config: Any, num_classes: int) -> Any:  # noqa: ARG002
        """Return a transform that mixes the images of a batch, or ``None``."""
        return None

    @abstractmethod
    def trainer_options(self, config: Any) -> dict[str, Any]:
        """Return loss, schedule and other options of ``Trainer`` that the presets do not share."""

    def check_images(self, config: Any, images: ImageSet, replicas: int) -> None:  # noqa: B027
        """Raise ``ConfigError`` if ``replicas`` devices cannot train on these images."""

    def write_extras(self, run: RecipeRun, config: Any, model: nn.Module, metadata: DatasetMetadata) -> None:  # noqa: B027
        """Write further files of a trained model."""

    def train(self, config: Any) -> RecipeOutcome:
        """Train and test, and write results, plots and weights into the run's folder."""
        config = config.resolved()
        chosen = devices.resolve(config.device).devices  # before any download, so that a missing device is found first
        images = self.load(config)
        self.check_images(config, images, int(os.environ.get("WORLD_SIZE", 0)) or len(chosen))
        metadata = DatasetMetadata.of(images)
        run = run_dir_for(self.name, config, chosen)
        torch.manual_seed(config.seed)
        model = self.build_model(config, metadata)
        trainer = self._trainer(model, config, images, metadata, **run_options(run, self.name, config))
        with run.resumable(self.name):
            trainer.fit(save_model=True, model_path=run.model)
        if current_world().is_main:
            self.write_extras(run, config, model, metadata)
        return test_and_write_results(self.name, run, trainer, images, metadata, trainer.eval_data)

    def evaluate(self, run: RecipeRun, config: Any) -> RecipeOutcome:
        """Test the model of a finished run again; writes ``evaluation.json`` into its folder."""
        model, metadata = self.load_finished_run(run, config)
        images = self.load(config)
        trainer = self._trainer(model, config, images, metadata)
        return evaluate_run(run, trainer, images, trainer.eval_data)

    def predict(self, run: RecipeRun, config: Any, sources: Sequence[str], *, invert: bool = False) -> list[Prediction]:
        """Return the classes of image files with their probabilities, by the model of a finished run."""
        model, metadata = self.load_finished_run(run, config)
        return predict_files(model, metadata, config.device, sources, invert=invert)

    def load_finished_run(self, run: RecipeRun, config: Any) -> tuple[nn.Module, DatasetMetadata]:
        """Return the trained model of a run, and the metadata of its images."""
        path, metadata = run.finished_model(), DatasetMetadata.of_run(run)
        model = self.build_model(config, metadata)
        checkpoint.load(path, model)
        return model, metadata

    def train_loader(self, config: Any, images: ImageSet, metadata: DatasetMetadata) -> Any:
        """Return a loader that keeps the images on the device, or one with worker processes if there are any."""
        mix = self.batch_mix(config, len(metadata.classes))
        if not config.num_workers:
            transforms = [*self.batch_transforms(config, images), metadata.normalize]
            pixels_and_labels = images.train.pixels, images.train.labels
            size = config.batch_size
            return data.resident(pixels_and_labels, batch_size=size, shuffle=True, transforms=transforms, mix=mix)
        workers = _workers_per_device(config.device, config.num_workers)
        transform = self.sample_transform(config, images)
        return loader(images.train, Collate(metadata.statistics, mix), config.batch_size, workers, transform)

    def test_loader(self, config: Any, images: ImageSet, metadata: DatasetMetadata) -> Any:
        """Return a loader of the test part, in order and without augmentation; its batches may be larger."""
        pixels_and_labels = images.test.pixels, images.test.labels
        size = max(256, config.batch_size)
        return data.resident(pixels_and_labels, batch_size=size, shuffle=False, transforms=[metadata.normalize])

    def _trainer(
        self, model: nn.Module, config: Any, images: ImageSet, metadata: DatasetMetadata, **options: Any
    ) -> Trainer:
        return Trainer(
            model,
            self.train_loader(config, images, metadata),
            self.test_loader(config, images, metadata),
            metrics=_metrics(len(metadata.classes)),
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
            **self.trainer_options(config),
            **options,
        )


def _metrics(num_classes: int) -> dict[str, Any]:
    """Return accuracy, and for many classes also top-5 accuracy."""
    from torchmetrics.classification import MulticlassAccuracy

    top_k = {"accuracy": 1, "top5_accuracy": 5} if num_classes >= 20 else {"accuracy": 1}
    return {name: MulticlassAccuracy(num_classes, average="micro", top_k=k) for name, k in top_k.items()}


def _workers_per_device(device: str, requested: int) -> int:
    """Return the DataLoader workers of each device if ``requested`` are for all; warn if the cores allow fewer."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or len(devices.resolve(device).devices)
    workers = loader_workers(local, requested)
    log = logger.warning if workers.total < requested else logger.info
    log("data-loader workers: %s", workers.reason)
    return workers.per_device
