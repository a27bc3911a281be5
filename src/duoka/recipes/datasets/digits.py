"""scikit-learn's handwritten digits: 1,797 real gray images of 8x8 pixels, without a download."""

from __future__ import annotations

import torch

from duoka.recipes.datasets.images import Images, ImageSet, stratified_split
from duoka.utils.imports import import_optional


def load(*, test_share: float = 0.2, split_seed: int = 0) -> ImageSet:
    """Return the digits, bright on a dark ground, with ``test_share`` of each class in the test part.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    bunch = import_optional("sklearn.datasets", extra="vision").load_digits()
    pixels = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    images = Images(pixels, torch.from_numpy(bunch.target).long())
    train, test = stratified_split(images.labels, test_share, split_seed)
    classes = tuple(str(name) for name in bunch.target_names)
    return ImageSet("digits", classes, images.select(train), images.select(test), flip_keeps_label=False)
