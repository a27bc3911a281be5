"""The image-classification recipe: train, evaluate and predict, with the choices that differ in its presets."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from duoka import data, devices
from duoka.data import transforms
from duoka.devices.cpu import loader_workers
from duoka.log import logger
from duoka.recipes.common.recipe_run import RecipeRun, fit, recipe_run, run_options
from duoka.recipes.common.registry import Prediction, RecipeOutcome
from duoka.recipes.datasets.images import Collate, ImageSet, loader, read_image
from duoka.recipes.image_classification.results import DatasetMetadata, next_step, test_and_write_results, test_results
from duoka.trainer import Trainer
from duoka.utils.imports import import_optional
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
    def augmentation(self, config: Any, images: ImageSet, library: Any) -> list[Any]:
        """Return the random transforms of training images, from ``duoka.data.transforms`` or torchvision's ``v2``."""

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
        with recipe_run(self.name, config) as run:
            torch.manual_seed(config.seed)
            model = self.build_model(config, metadata)
            trainer = self._trainer(model, config, images, metadata, **run_options(run, self.name, config))
            fit(trainer, save_model=True, model_path=run.model)
            if current_world().is_main:
                self.write_extras(run, config, model, metadata)
            return test_and_write_results(self.name, run, trainer, images, metadata)

    def evaluate(self, run: RecipeRun, config: Any) -> RecipeOutcome:
        """Test the model of a finished run again, and write ``evaluation.json`` into its folder."""
        config = config.resolved()  # a file that was written by hand may lack options
        model, metadata = self.load_finished_run(run, config)
        images = self.load(config)
        results = test_results(self._trainer(model, config, images, metadata))
        run.write_results(results, "evaluation.json")
        return RecipeOutcome(run, results, next_step(run, images))

    def predict(self, run: RecipeRun, config: Any, sources: Sequence[str], *, invert: bool = False) -> list[Prediction]:
        """Return the classes of image files with their probabilities, most likely first, from the first device."""
        config = config.resolved()
        model, metadata = self.load_finished_run(run, config)
        first = devices.resolve(config.device).devices[0]
        pixels = torch.stack([read_image(source, metadata.shape, invert=invert) for source in sources])
        model.to(first).eval()
        with torch.inference_mode():
            logits = model(metadata.normalize(pixels.float() / 255, torch.empty(len(pixels), 0)).to(first))
        ranked = logits.double().softmax(dim=1).cpu().sort(dim=1, descending=True)
        return [
            Prediction(source, tuple(zip((metadata.classes[index] for index in indices), values, strict=True)))
            for source, values, indices in zip(sources, ranked.values.tolist(), ranked.indices.tolist(), strict=True)
        ]

    def load_finished_run(self, run: RecipeRun, config: Any) -> tuple[nn.Module, DatasetMetadata]:
        """Return the trained model of a run, and the metadata of its images."""
        run.finished_model()  # raises for an unfinished run
        metadata = DatasetMetadata.of_run(run)
        return run.build_finished_model(lambda: self.build_model(config, metadata)), metadata

    def train_loader(self, config: Any, images: ImageSet, metadata: DatasetMetadata) -> Any:
        """Return a loader that keeps the images on the device, or one with worker processes if there are any."""
        mix = self.batch_mix(config, len(metadata.classes))
        if not config.num_workers:
            steps = [*self.augmentation(config, images, transforms), metadata.normalize]
            pixels_and_labels, size = (images.train.pixels, images.train.labels), config.batch_size
            return data.resident(pixels_and_labels, batch_size=size, shuffle=True, transforms=steps, mix=mix)
        v2 = import_optional("torchvision.transforms.v2", extra="vision")
        workers = _workers_per_device(config.device, config.num_workers)
        steps = self.augmentation(config, images, v2)
        transform = v2.Compose(steps) if steps else v2.Identity()
        return loader(images.train, Collate(metadata.statistics, mix), config.batch_size, workers, transform)

    def test_loader(self, config: Any, images: ImageSet, metadata: DatasetMetadata) -> Any:
        """Return a loader of the test part, in order and without augmentation; its batches may be larger."""
        pixels_and_labels = images.test.pixels, images.test.labels
        size = max(256, config.batch_size)
        return data.resident(pixels_and_labels, batch_size=size, shuffle=False, transforms=[metadata.normalize])

    def _trainer(
        self, model: nn.Module, config: Any, images: ImageSet, metadata: DatasetMetadata, **options: Any
    ) -> Trainer:
        names = ("device", "batch_size_means", "precision", "epochs", "optimizer", "lr", "lr_scaling", "weight_decay")
        options |= {name: getattr(config, name) for name in (*names, "seed")}
        options |= {
            "scheduler": None if config.scheduler == "none" else config.scheduler,
            **self.trainer_options(config),
        }
        loaders = self.train_loader(config, images, metadata), self.test_loader(config, images, metadata)
        return Trainer(model, *loaders, metrics=_metrics(len(metadata.classes)), **options)


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
