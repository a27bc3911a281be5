"""Finished runs of the image recipes: their model, what they know of their images, and predictions for image files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from duoka import devices
from duoka.data.transforms import Normalize
from duoka.recipes.common.recipe_run import RecipeRun
from duoka.recipes.common.registry import Prediction
from duoka.recipes.datasets.images import ImageSet, Statistics, channel_statistics, read_image


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
        statistics = images.statistics or channel_statistics(images.train.pixels)
        return cls(images.classes, images.shape, statistics)

    @classmethod
    def of_run(cls, run: RecipeRun) -> DatasetMetadata:
        """Return the metadata in the results of a finished run."""
        saved = run.read_results("images")["images"]
        channels, height, width = saved["shape"]
        statistics = Statistics(tuple(saved["mean"]), tuple(saved["std"]))
        return cls(tuple(saved["classes"]), (channels, height, width), statistics)

    @property
    def normalize(self) -> Normalize:
        """Transform of pixels from 0 to 1 to mean 0 and standard deviation 1."""
        return Normalize(self.statistics.mean, self.statistics.std)


def predict_files(
    model: nn.Module, metadata: DatasetMetadata, device: str, sources: Sequence[str], *, invert: bool
) -> list[Prediction]:
    """Return the classes of image files with their probabilities, most likely first; computed on the first device."""
    first = devices.resolve(device).devices[0]
    pixels = torch.stack([read_image(source, metadata.shape, invert=invert) for source in sources])
    model.to(first).eval()
    with torch.inference_mode():
        logits = model(metadata.normalize(pixels.float() / 255, torch.empty(len(pixels), 0)).to(first))
    ranked = logits.double().softmax(dim=1).cpu().sort(dim=1, descending=True)
    return [
        Prediction(source, tuple(zip((metadata.classes[index] for index in indices), values, strict=True)))
        for source, values, indices in zip(sources, ranked.values.tolist(), ranked.indices.tolist(), strict=True)
    ]
