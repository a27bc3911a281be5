"""torchmetrics that average a ``RankingModel``'s metrics over users. (Importing torchmetrics takes seconds.)"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from duoka.recipes.recommendation.ranking_metrics import METRICS


class UserMean(MeanMetric):
    """The mean over users of one column of a ``RankingModel``'s metrics."""

    higher_is_better = True  # type: ignore[assignment]

    def __init__(self, column: int) -> None:
        super().__init__()
        self.column = column
        self.set_dtype(torch.float64)

    def update(self, metrics: Tensor, target: object = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Add the metrics of some users, ``(users, len(METRICS))``, without ``MeanMetric``'s search for NaN."""
        self.mean_value = self.mean_value + metrics[:, self.column].sum()
        self.weight = self.weight + len(metrics)


def mean_metrics(names: Sequence[str] = METRICS) -> MetricCollection:
    """Return a Trainer's metrics for a ``RankingModel``; ``names`` are some of ``METRICS``.

    Without compute groups, which would merge columns that are equal in the first batch.
    """
    each: dict[str, Any] = {name: UserMean(METRICS.index(name)) for name in names}
    return MetricCollection(each, compute_groups=False)
