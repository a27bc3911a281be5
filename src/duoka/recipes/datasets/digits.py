"""scikit-learn's handwritten digits: 1,797 real grey images of 8x8 pixels, which need no download."""

from __future__ import annotations

import torch

from duoka.recipes.datasets.images import Images, ImageSet, stratified_split
from duoka.utils.imports import import_optional

__all__ = ["load"]


def load(*, test_share: float = 0.2, split_seed: int = 0) -> ImageSet:
    """Return the digits with ``test_share`` of each class in the test part.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    Ink is bright on a dark ground, as in the original.
    """
    bunch = import_optional("sklearn.datasets", extra="vision").load_digits()
    pixels = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    everything = Images(pixels, torch.from_numpy(bunch.target).long())
    train, test = stratified_split(everything.labels, test_share, split_seed)
    classes = tuple(str(name) for name in bunch.target_names)
    return ImageSet("digits", classes, everything.take(train), everything.take(test), mirrored_alike=False)
