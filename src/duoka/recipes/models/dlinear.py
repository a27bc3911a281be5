"""DLinear: a baseline forecast by two linear maps over time, one of the trend and one of the remainder."""

from collections.abc import Sequence

from torch import Tensor, nn

TREND_STEPS = 25


class DLinear(nn.Module):
    """Forecasts each series from its own past, all by the same two maps.

    A. Zeng et al., "Are Transformers Effective for Time Series Forecasting?", AAAI 2023,
    https://arxiv.org/abs/2205.13504.

    Args:
        past: steps of the history.
        horizon: steps to forecast.
        targets: indices of the columns to forecast.
    """

    def __init__(self, past: int, horizon: int, targets: Sequence[int]) -> None:
        super().__init__()
        self.targets = list(targets)
        self.trend, self.remainder = nn.Linear(past, horizon), nn.Linear(past, horizon)
        for layer in (self.trend, self.remainder):
            nn.init.constant_(layer.weight, 1 / past)
        self.moving_average = nn.AvgPool1d(TREND_STEPS, stride=1)

    def forward(self, history: Tensor, marks: Tensor) -> Tensor:  # noqa: ARG002 - the Informer's signature
        """Return ``(batch, horizon, targets)`` for ``history (batch, past, columns)``; ``marks`` is not used."""
        series = history[:, :, self.targets].transpose(1, 2)
        half = TREND_STEPS // 2
        trend = self.moving_average(nn.functional.pad(series, (half, half), mode="replicate"))
        forecast: Tensor = self.trend(trend) + self.remainder(series - trend)
        return forecast.transpose(1, 2)
