"""Measures that torchmetrics lacks."""

from torch import Tensor
from torchmetrics import MeanMetric


class LabelWeightedAccuracy(MeanMetric):
    """The mean share of the label that the likeliest class has: with labels of one class each, the accuracy.

    ``update(logits (batch, classes), target)`` takes classes ``(batch,)``, or the shares of a mixed label
    ``(batch, classes)``: of an image that is 0.7 cat and 0.3 dog the answer cat counts 0.7.
    """

    higher_is_better = True  # type: ignore[assignment]

    def update(self, logits: Tensor, target: Tensor) -> None:  # type: ignore[override]
        """Take in a batch, without ``MeanMetric``'s search for NaN."""
        answers = logits.argmax(dim=1)
        right = answers == target if target.ndim == 1 else target.gather(1, answers[:, None])
        self.mean_value = self.mean_value + right.sum()
        self.weight = self.weight + len(logits)
