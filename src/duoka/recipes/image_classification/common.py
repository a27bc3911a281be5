"""What image recipes share: loaders on the device, metrics, what a finished run tells, and predictions for files."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import duoka
from duoka import checkpoint, devices
from duoka.data import transforms as augment
from duoka.devices.cpu import loader_workers
from duoka.log import logger
from duoka.recipes.common.recipe_run import RecipeRun
from duoka.recipes.common.registry import Prediction, RecipeOutcome
from duoka.recipes.datasets.images import Images, ImageSet, Statistics, channel_statistics, read_image, write_image
from duoka.recipes.image_classification import plots
from duoka.trainer import Trainer
from duoka.world import current_world

__all__ = [
    "DatasetMetadata",
    "evaluated",
    "facts_of",
    "finished",
    "loader",
    "metrics",
    "next_step",
    "predictions",
    "read_facts",
    "results_of",
    "shifts",
    "test_loader",
    "tested",
    "workers_of",
]


@dataclass(frozen=True)
class DatasetMetadata:
    """What a finished run remembers of its images."""

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    statistics: Statistics


def facts_of(images: ImageSet) -> DatasetMetadata:
    """Return what a model of ``images`` must be told."""
    return DatasetMetadata(images.classes, images.shape, images.statistics or channel_statistics(images.train.pixels))


def read_facts(run: RecipeRun) -> DatasetMetadata:
    """Return what ``tested`` wrote into the run's folder."""
    remembered = run.read_results("images")["images"]
    channels, height, width = remembered["shape"]
    statistics = Statistics(tuple(remembered["mean"]), tuple(remembered["std"]))
    return DatasetMetadata(tuple(remembered["classes"]), (channels, height, width), statistics)


def loader(
    images: Images, facts: DatasetMetadata, batch_size: int, changes: Sequence[Any] | None = None, mix: Any = None
) -> Any:
    """Return a loader that keeps ``images`` on the device, normalised; shuffled and changed where there are ``changes``."""
    transforms = [*(changes or ()), augment.Normalize(facts.statistics.mean, facts.statistics.std)]
    data, shuffle = (images.pixels, images.labels), changes is not None
    return duoka.data.resident(data, batch_size=batch_size, shuffle=shuffle, transforms=transforms, mix=mix)


def test_loader(images: ImageSet, facts: DatasetMetadata, batch_size: int) -> Any:
    """Return a loader of the test part, in order and without any random change; batches may be larger than in training."""
    return loader(images.test, facts, max(256, batch_size))


def workers_of(device: str, requested: int) -> int:
    """Return the loading processes of each device where ``requested`` are for all; says so where they are fewer."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or len(devices.resolve(device).devices)
    workers = loader_workers(local, requested)
    log = logger.warning if workers.total < requested else logger.info
    log("data-loader workers: %s", workers.reason)
    return workers.per_device


def shifts(images: ImageSet) -> list[Any]:
    """Return the usual changes of CIFAR's images: a shift within a border, and a flip where that is the same thing.

    The border is 4 pixels for 32 (He et al., 2015), and as much of other sizes.
    """
    side = min(images.shape[1:])
    flip = [augment.RandomHorizontalFlip()] if images.flip_keeps_label else []
    return [augment.RandomCrop(side, padding=max(1, side // 8)), *flip]


def metrics(classes: int) -> dict[str, Any]:
    """Return accuracy, and where there are many classes that of the five likeliest."""
    from torchmetrics.classification import MulticlassAccuracy

    found = {"accuracy": MulticlassAccuracy(classes, average="micro")}
    if classes >= 20:
        found["top5_accuracy"] = MulticlassAccuracy(classes, average="micro", top_k=5)
    return found


def results_of(measured: Any) -> dict[str, float]:
    """Return the numbers of an evaluation under the names of a test."""
    return {f"test_{name}": float(value) for name, value in measured.items()}


def tested(
    recipe: str, run: RecipeRun, trainer: Trainer, images: ImageSet, facts: DatasetMetadata, test: Any
) -> RecipeOutcome:
    """Test the trained model on the loader ``test``; write numbers, pictures and a few images to try."""
    results = results_of(trainer.evaluate(test))
    logits = trainer.predict(test)
    if current_world().is_main:
        counts = _confusion(images, logits)
        right = (counts.diagonal() / counts.sum(dim=1).clamp_min(1)).tolist()
        remembered = {"classes": images.classes, "shape": images.shape, **dataclasses.asdict(facts.statistics)}
        by_class = dict(zip(images.classes, right, strict=True))
        count = sum(parameter.numel() for parameter in trainer.model.parameters())
        run.log(", ".join(f"{name} {value:.4f}" for name, value in results.items()))
        _draw(run, images, counts, logits.double().softmax(dim=1))
        run.write_results(  # last, as a run that has them is finished
            {"recipe": recipe, **results, "parameters": count, "class_accuracy": by_class, "images": remembered}
        )
    return RecipeOutcome(run, results, next_step(run, images))


def finished(run: RecipeRun, build: Callable[[DatasetMetadata], nn.Module]) -> tuple[nn.Module, DatasetMetadata]:
    """Return the trained model of a run, which ``build`` makes without its weights, and what it remembers of its images."""
    path, facts = run.finished_model(), read_facts(run)
    model = build(facts)
    checkpoint.load(path, model)
    return model, facts


def evaluated(run: RecipeRun, trainer: Trainer, images: ImageSet, test: Any) -> RecipeOutcome:
    """Test the model of a finished run again on the loader ``test``; writes ``evaluation.json`` into its folder."""
    results = results_of(trainer.evaluate(test))
    if current_world().is_main:
        run.write_results(results, "evaluation.json")
    return RecipeOutcome(run, results, next_step(run, images))


def next_step(run: RecipeRun, images: ImageSet) -> str:
    """Return a command that works as it stands."""
    sample = run.sample(images.classes[int(images.test.labels.min())])
    return shlex.join(("duoka", "predict", str(run.folder), str(sample)))


def predictions(
    model: nn.Module, facts: DatasetMetadata, device: str, sources: Sequence[str], *, invert: bool
) -> list[Prediction]:
    """Name the classes of image files, with the probabilities that ``model`` gives them on the first of ``device``."""
    first = devices.resolve(device).devices[0]
    pixels = torch.stack([read_image(source, facts.shape, invert=invert) for source in sources])
    normalise = augment.Normalize(facts.statistics.mean, facts.statistics.std)
    model.to(first).eval()
    with torch.inference_mode():
        logits = model(normalise(pixels.float() / 255, torch.empty(len(pixels), 0)).to(first))
    ranked = logits.double().softmax(dim=1).cpu().sort(dim=1, descending=True)
    return [
        Prediction(source, tuple(zip((facts.classes[place] for place in places), values, strict=True)))
        for source, values, places in zip(sources, ranked.values.tolist(), ranked.indices.tolist(), strict=True)
    ]


def _draw(run: RecipeRun, images: ImageSet, counts: Tensor, probabilities: Tensor) -> None:
    """Draw the pictures, and leave a test image of each of the first classes for ``duoka predict``."""
    test = images.test
    plots.confusion_matrix(run.plots / "confusion.png", counts, images.classes)
    plots.class_accuracy(run.plots / "class_accuracy.png", counts, images.classes)
    plots.examples(run.plots / "examples.png", test.pixels, test.labels, probabilities, images.classes)
    for label in torch.unique(test.labels)[:10].tolist():
        place = int((test.labels == label).nonzero()[0])
        write_image(run.sample(images.classes[label]), test.pixels[place])


def _confusion(images: ImageSet, logits: Tensor) -> Tensor:
    """Return how many test images of a class (row) were taken for which (column)."""
    number, answers = len(images.classes), logits.argmax(dim=1)
    return torch.bincount(images.test.labels * number + answers, minlength=number**2).view(number, number)
