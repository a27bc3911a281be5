"""Results of an image recipe: the test's numbers, plots and sample images, and the metadata that predictions need."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from duoka.data.transforms import Normalize
from duoka.errors import DataError
from duoka.recipes.common.recipe_run import RecipeRun
from duoka.recipes.common.registry import RecipeOutcome
from duoka.recipes.datasets.images import ImageSet, Statistics, channel_statistics, write_image
from duoka.recipes.image_classification import plots
from duoka.trainer import Trainer
from duoka.utils.text import duoka_command
from duoka.world import current_world

MAX_SIDE = 8192
"""Largest side, in pixels, that a run's file may name."""


class _SavedImages(TypedDict):
    """Entry ``images`` of ``results.json``."""

    classes: list[str]
    shape: tuple[int, int, int]
    mean: list[float]
    std: list[float]


class _SavedImageResults(TypedDict):
    """What predictions read of ``results.json``."""

    images: _SavedImages


@dataclass(frozen=True)
class DatasetMetadata:
    """Classes, shape and statistics of the images that a model was trained on."""

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    """``(channels, height, width)``"""
    statistics: Statistics

    @classmethod
    def of(cls, images: ImageSet) -> DatasetMetadata:
        """Return the metadata of ``images``."""
        return cls(images.classes, images.shape, images.statistics or channel_statistics(images.train.pixels))

    @classmethod
    def of_run(cls, run: RecipeRun) -> DatasetMetadata:
        """Return the metadata in the results of a finished run."""
        saved = run.read_results(_SavedImageResults)["images"]
        channels, height, width = saved["shape"]
        mean, std = tuple(saved["mean"]), tuple(saved["std"])
        fits = channels in (1, 3) and len(mean) == len(std) == channels and len(saved["classes"]) >= 2
        if not fits or not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE and min(std) > 0):
            where = f"{run.folder / 'results.json'}: images"
            raise DataError(
                f"{where} describes no set of images (shape {saved['shape']}, {len(saved['classes'])} classes, mean {mean}, "
                f"deviation {std}): correct it, or train a new run"
            )
        return cls(tuple(saved["classes"]), (channels, height, width), Statistics(mean, std))

    @property
    def normalize(self) -> Normalize:
        """Transform of pixels from 0 to 1 to mean 0 and standard deviation 1."""
        return Normalize(self.statistics.mean, self.statistics.std)


def test_and_write_results(
    recipe: str, run: RecipeRun, trainer: Trainer, images: ImageSet, metadata: DatasetMetadata
) -> RecipeOutcome:
    """Test the trained model, and write ``results.json``, plots and samples into the run's folder."""
    results = test_results(trainer)
    logits = trainer.predict(trainer.eval_data)
    if current_world().is_main:
        num_classes, predicted = len(images.classes), logits.argmax(dim=1)
        counts = torch.bincount(images.test.labels * num_classes + predicted, minlength=num_classes**2)
        counts = counts.view(num_classes, num_classes)  # true class by predicted class
        accuracies = (counts.diagonal() / counts.sum(dim=1).clamp_min(1)).tolist()
        run.log(", ".join(f"{name} {value:.4f}" for name, value in results.items()))
        _draw(run, images, counts, logits.double().softmax(dim=1))
        run.write_results(  # last, because a run with results is finished
            {
                "recipe": recipe,
                **results,
                "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
                "class_accuracy": dict(zip(images.classes, accuracies, strict=True)),
                "images": {"classes": images.classes, "shape": images.shape, **dataclasses.asdict(metadata.statistics)},
            }
        )
    return RecipeOutcome(run, results, next_step(run, images))


def test_results(trainer: Trainer) -> dict[str, float]:
    """Return loss and metrics on the test part, which is the trainer's ``eval_data``."""
    return {f"test_{name}": float(value) for name, value in trainer.evaluate().items()}


def next_step(run: RecipeRun, images: ImageSet) -> str:
    """Return a prediction command for a sample image of the run."""
    sample = run.samples(images.classes)[int(images.test.labels.min())]
    return duoka_command("predict", run.folder, sample)


def _draw(run: RecipeRun, images: ImageSet, counts: Tensor, probabilities: Tensor) -> None:
    """Draw the plots, and write one test image of each of the first ten classes."""
    test = images.test
    plots.confusion_matrix(run.plots / "confusion.png", counts, images.classes)
    plots.class_accuracy(run.plots / "class_accuracy.png", counts, images.classes)
    plots.examples(run.plots / "examples.png", test.pixels, test.labels, probabilities, images.classes)
    samples = run.samples(images.classes)
    for label in torch.unique(test.labels)[:10].tolist():
        index = int((test.labels == label).nonzero()[0])
        write_image(samples[label], test.pixels[index])
