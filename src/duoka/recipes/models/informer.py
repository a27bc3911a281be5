"""``Informer``, a forecaster whose ProbSparse encoder halves its sequence, and ``TabularRegressor``, its encoder for tables.

H. Zhou et al., "Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting",
AAAI 2021, https://arxiv.org/abs/2012.07436.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from duoka.errors import ConfigError
from duoka.recipes.models.attention import CrossAttention, SelfAttention


@dataclass(frozen=True)
class InformerSize:
    """Sizes of an Informer; the defaults are the paper's for ETT."""

    width: int = 512
    """Features of each position (the paper's d_model)."""
    heads: int = 8
    """Attention heads."""
    hidden: int = 2048
    """Width within the feed-forward layers (d_ff)."""
    encoder_layers: int = 2
    decoder_layers: int = 1
    factor: int | None = 5
    """ProbSparse's sampling factor; ``None`` for full attention."""
    distil: bool = True
    """Halve the sequence between encoder layers."""
    dropout: float = 0.05


PAPER_SIZE = InformerSize()
SMALL_SIZE = InformerSize(width=64, heads=4, hidden=128, encoder_layers=2, factor=5, distil=True, dropout=0.1)
"""The size for a table of ten columns."""


class Informer(nn.Module):
    """Forecasts several series from their past and calendar features.

    The decoder gets the last ``label_length`` known values, and zeros for the steps to forecast.
    Differences from the authors' code:

    - ProbSparse measures all queries on the same keys (see ``prob_sparse_attention``).
    - Distilling normalizes each position (layer norm), so the number of devices changes nothing.
    - The last decoder layer computes only the positions of the forecast.
    - Heads are concatenated in order; the code's ``mix`` option permutes them with the positions.

    Args:
        inputs: number of known series.
        outputs: number of series to forecast.
        marks: calendar features of each step.
        label_length: past steps given to the decoder.
        horizon: steps to forecast.
        size: widths and depths.
    """

    def __init__(
        self, inputs: int, outputs: int, marks: int, *, label_length: int, horizon: int, size: InformerSize = PAPER_SIZE
    ) -> None:
        super().__init__()
        self.label_length, self.horizon = label_length, horizon
        self.encoder_embedding = InformerEmbedding(inputs, marks, size)
        self.decoder_embedding = InformerEmbedding(inputs, marks, size)
        self.encoder = nn.Sequential(*encoder_layers(size, DistillingLayer), nn.LayerNorm(size.width))
        self.decoder = nn.ModuleList(DecoderLayer(size, salt=100 + number) for number in range(size.decoder_layers))
        self.head = nn.Sequential(nn.LayerNorm(size.width), nn.Linear(size.width, outputs))

    def forward(self, history: Tensor, marks: Tensor) -> Tensor:
        """Return the forecast ``(batch, horizon, outputs)`` for the known past, ``history (batch, length, inputs)``.

        ``marks (batch, length + horizon, marks)`` are calendar features of past and future.
        """
        length = history.shape[1]
        if length < self.label_length or marks.shape[1] != length + self.horizon:
            raise ConfigError(
                f"the history has {length} steps and the calendar {marks.shape[1]}: the history needs at least "
                f"label_length={self.label_length}, and the calendar horizon={self.horizon} more than the history"
            )
        memory = self.encoder(self.encoder_embedding(history, marks[:, :length]))
        start = nn.functional.pad(history[:, length - self.label_length :], (0, 0, 0, self.horizon))
        hidden = self.decoder_embedding(start, marks[:, length - self.label_length :])
        *first, last = self.decoder
        for layer in first:
            hidden = layer(hidden, memory, hidden.shape[1])
        return self.head(last(hidden, memory, self.horizon))  # type: ignore[no-any-return]


class InformerEmbedding(nn.Module):
    """The sum of the embedded values, their positions and the calendar."""

    def __init__(self, inputs: int, marks: int, size: InformerSize) -> None:
        super().__init__()
        self.values = nn.Conv1d(inputs, size.width, kernel_size=3, padding=1, padding_mode="circular")
        nn.init.kaiming_normal_(self.values.weight, mode="fan_in", nonlinearity="leaky_relu")
        self.calendar = nn.Linear(marks, size.width, bias=False)
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, values: Tensor, marks: Tensor) -> Tensor:
        """Return ``(batch, length, width)`` for ``values (batch, length, inputs)`` and ``marks (batch, length, marks)``."""
        embedded = self.values(values.transpose(1, 2)).transpose(1, 2) + self.calendar(marks)
        embedded = embedded + sinusoidal_positions(embedded.shape[1], embedded.shape[2], embedded.device)
        return self.dropout(embedded)  # type: ignore[no-any-return]


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each with a residual connection and a layer norm."""

    def __init__(self, size: InformerSize, salt: int = 0) -> None:
        super().__init__()
        self.attention = SelfAttention(size.width, size.heads, factor=size.factor, dropout=size.dropout, salt=salt)
        self.feed_forward = _feed_forward(size)
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``(batch, length, width)`` for inputs of that shape."""
        hidden = self.norm1(inputs + self.dropout(self.attention(inputs)))
        return self.norm2(hidden + self.feed_forward(hidden))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention to the encoder's output, and feed-forward."""

    def __init__(self, size: InformerSize, salt: int = 0) -> None:
        super().__init__()
        width, heads, dropout = size.width, size.heads, size.dropout
        self.attention = SelfAttention(width, heads, factor=size.factor, causal=True, dropout=dropout, salt=salt)
        self.cross_attention = CrossAttention(width, heads, dropout=dropout)
        self.feed_forward = _feed_forward(size)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Tensor, memory: Tensor, count: int) -> Tensor:
        """Return the last ``count`` positions, ``(batch, count, width)``, for ``inputs (batch, length, width)``."""
        hidden = inputs + self.dropout(self.attention(inputs))
        hidden = self.norm1(hidden[:, hidden.shape[1] - count :])
        hidden = self.norm2(hidden + self.dropout(self.cross_attention(hidden, memory)))
        return self.norm3(hidden + self.feed_forward(hidden))  # type: ignore[no-any-return]


class DistillingLayer(nn.Module):
    """Halves a sequence: circular convolution over three positions, layer norm, ELU and max-pooling."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel_size=3, padding=1, padding_mode="circular")
        self.norm = nn.LayerNorm(width)
        self.pool = nn.Sequential(nn.ELU(), nn.MaxPool1d(kernel_size=3, stride=2, padding=1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``(batch, ceil(length / 2), width)`` for ``(batch, length, width)``."""
        mixed = self.norm(self.conv(inputs.transpose(1, 2)).transpose(1, 2))
        return self.pool(mixed.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


class TabularRegressor(nn.Module):
    """Predicts ``outputs`` numbers from ``features`` numbers, each a token: encoder layers, their mean, two linear layers.

    With few features ProbSparse attention selects every query, so it equals full attention.
    """

    def __init__(self, features: int, outputs: int, size: InformerSize = SMALL_SIZE) -> None:
        super().__init__()
        self.token = nn.Linear(1, size.width)
        self.positions: Tensor
        self.register_buffer("positions", sinusoidal_positions(features, size.width), persistent=False)
        self.encoder = nn.Sequential(*encoder_layers(size, StridedConvDownsample))
        self.head = nn.Sequential(
            nn.Linear(size.width, 128), nn.GELU(), nn.Dropout(size.dropout), nn.Linear(128, outputs)
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Return ``(batch, outputs)`` for ``rows (batch, features)``."""
        encoded = self.encoder(self.token(rows.unsqueeze(-1)) + self.positions)
        return self.head(encoded.mean(dim=1))  # type: ignore[no-any-return]


class StridedConvDownsample(nn.Module):
    """Halves a sequence by a convolution of stride 2 and a layer norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.norm = nn.LayerNorm(width)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``(batch, ceil(length / 2), width)`` for ``(batch, length, width)``."""
        mixed: Tensor = self.conv(inputs.transpose(1, 2))
        return self.norm(nn.functional.gelu(mixed.transpose(1, 2)))  # type: ignore[no-any-return]


def encoder_layers(size: InformerSize, downsample: type[nn.Module]) -> list[nn.Module]:
    """Return the encoder's layers, with a ``downsample(width)`` between them where ``size.distil``."""
    layers: list[nn.Module] = []
    for number in range(size.encoder_layers):
        if number and size.distil:
            layers.append(downsample(size.width))
        layers.append(EncoderLayer(size, salt=number))
    return layers


def sinusoidal_positions(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return the position encoding ``(length, width)`` of Vaswani et al. (2017, section 3.5).

    >>> sinusoidal_positions(2, 4)[0].tolist()
    [0.0, 1.0, 0.0, 1.0]
    """
    frequency = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    angle = torch.arange(length, device=device).unsqueeze(1) * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1)[:, :width]


def _feed_forward(size: InformerSize) -> nn.Sequential:
    dropout = nn.Dropout(size.dropout)
    return nn.Sequential(
        nn.Linear(size.width, size.hidden), nn.GELU(), dropout, nn.Linear(size.hidden, size.width), dropout
    )
