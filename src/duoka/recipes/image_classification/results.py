"""Test results of an image recipe: numbers, pictures, and sample images to try the model with."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

import torch
from torch import Tensor

from duoka.recipes.common.recipe_run import RecipeRun
from duoka.recipes.common.registry import RecipeOutcome
from duoka.recipes.datasets.images import ImageSet, write_image
from duoka.recipes.image_classification import plots
from duoka.recipes.image_classification.predict import DatasetMetadata
from duoka.trainer import Trainer
from duoka.world import current_world


def test_and_write_results(
    recipe: str, run: RecipeRun, trainer: Trainer, images: ImageSet, metadata: DatasetMetadata, test_loader: Any
) -> RecipeOutcome:
    """Test the trained model on ``test_loader``, and write ``results.json``, plots and samples into the run's folder."""
    results = _test_results(trainer, test_loader)
    logits = trainer.predict(test_loader)
    if current_world().is_main:
        counts = _confusion_counts(images, logits)
        accuracies = (counts.diagonal() / counts.sum(dim=1).clamp_min(1)).tolist()
        run.log(", ".join(f"{name} {value:.4f}" for name, value in results.items()))
        _draw(run, images, counts, logits.double().softmax(dim=1))
        run.write_results(  # last, because a run with results is finished
            {
                "recipe": recipe,
                **results,
                "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
                "class_accuracy": dict(zip(images.classes, accuracies, strict=True)),
                "images": {
                    "classes": images.classes,
                    "shape": images.shape,
                    **dataclasses.asdict(metadata.statistics),
                },
            }
        )
    return RecipeOutcome(run, results, _next_step(run, images))


def evaluate_run(run: RecipeRun, trainer: Trainer, images: ImageSet, test_loader: Any) -> RecipeOutcome:
    """Test the model of a finished run again, and write ``evaluation.json`` into its folder."""
    results = _test_results(trainer, test_loader)
    if current_world().is_main:
        run.write_results(results, "evaluation.json")
    return RecipeOutcome(run, results, _next_step(run, images))


def _test_results(trainer: Trainer, test_loader: Any) -> dict[str, float]:
    return {f"test_{name}": float(value) for name, value in trainer.evaluate(test_loader).items()}


def _next_step(run: RecipeRun, images: ImageSet) -> str:
    """Return a prediction command for a sample image of the run."""
    sample = run.sample(images.classes[int(images.test.labels.min())])
    return shlex.join(("duoka", "predict", str(run.folder), str(sample)))


def _draw(run: RecipeRun, images: ImageSet, counts: Tensor, probabilities: Tensor) -> None:
    """Draw the plots, and write one test image of each of the first ten classes."""
    test = images.test
    plots.confusion_matrix(run.plots / "confusion.png", counts, images.classes)
    plots.class_accuracy(run.plots / "class_accuracy.png", counts, images.classes)
    plots.examples(run.plots / "examples.png", test.pixels, test.labels, probabilities, images.classes)
    for label in torch.unique(test.labels)[:10].tolist():
        index = int((test.labels == label).nonzero()[0])
        write_image(run.sample(images.classes[label]), test.pixels[index])


def _confusion_counts(images: ImageSet, logits: Tensor) -> Tensor:
    """Return the number of test images of each class (row) by predicted class (column)."""
    num_classes, predicted = len(images.classes), logits.argmax(dim=1)
    counts = torch.bincount(images.test.labels * num_classes + predicted, minlength=num_classes**2)
    return counts.view(num_classes, num_classes)
