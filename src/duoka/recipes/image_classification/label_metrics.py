"""Measures that torchmetrics lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class LabelWeightedAccuracy(Metric):
    """The mean share of the label that the likeliest class has: with labels of one class each, the accuracy.

    ``update(logits (batch, classes), target)`` takes classes ``(batch,)``, or the shares of a mixed label
    ``(batch, classes)``: of an image that is 0.7 cat and 0.3 dog the answer cat counts 0.7.
    """

    higher_is_better = True
    right: Tensor
    total: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("right", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Take in a batch."""
        answers = logits.argmax(dim=1)
        if target.ndim == 1:
            self.right += (answers == target).sum()
        else:
            self.right += target.gather(1, answers[:, None]).sum()
        self.total += len(logits)

    def compute(self) -> Tensor:
        """Return the mean over all samples."""
        return self.right / self.total
