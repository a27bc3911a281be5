"""The Informer: ProbSparse encoder that halves its sequence between layers, and a decoder that writes a forecast at once.

H. Zhou et al., "Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting", AAAI 2021,
https://arxiv.org/abs/2012.07436. `attention` has the attention; `regressor` is a smaller relative for tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from duoka.errors import ConfigError
from duoka.recipes.models.attention import CrossAttention, SelfAttention

__all__ = ["Distilling", "EncoderLayer", "Informer", "Size", "sinusoids"]


@dataclass(frozen=True)
class Size:
    """How large an Informer is; the defaults are the paper's for ETT."""

    width: int = 512
    """Of each place of a sequence (the paper's d_model)."""
    heads: int = 8
    """Attention heads."""
    hidden: int = 2048
    """Width within the feed-forward parts (d_ff)."""
    encoder_layers: int = 2
    decoder_layers: int = 1
    factor: int | None = 5
    """ProbSparse's sampling factor; ``None`` is full attention."""
    distil: bool = True
    """Whether the sequence is halved between encoder layers."""
    dropout: float = 0.05


class Informer(nn.Module):
    """Forecasts several series from their past and the calendar.

    The decoder gets the last ``label_length`` known values and zeros where the forecast belongs, so nothing of the future can
    reach it. Against the authors' code: ProbSparse measures all queries on the same keys (see ``prob_sparse``); distilling
    normalises each place by itself (layer norm), not over the batch, so that the number of devices changes nothing; the last
    decoder layer computes the forecast's places only, since nobody reads the others; heads are joined in their order (the
    code's ``mix`` option, which the paper does not have, permutes them with the places).

    Args:
        inputs: how many series are known.
        outputs: how many are forecast.
        marks: calendar features of each step.
        label_length: steps of the past that the decoder starts from.
        horizon: steps to forecast.
        size: widths and depths.

    """

    def __init__(
        self, inputs: int, outputs: int, marks: int, *, label_length: int, horizon: int, size: Size | None = None
    ) -> None:
        super().__init__()
        size = size or Size()
        self.label_length, self.horizon = label_length, horizon
        self.encoder_embedding = Embedding(inputs, marks, size)
        self.decoder_embedding = Embedding(inputs, marks, size)
        encoder: list[nn.Module] = []
        for number in range(size.encoder_layers):
            if number and size.distil:
                encoder.append(Distilling(size.width))
            encoder.append(EncoderLayer(size, salt=number))
        self.encoder = nn.Sequential(*encoder, nn.LayerNorm(size.width))
        self.decoder = nn.ModuleList(DecoderLayer(size, salt=100 + number) for number in range(size.decoder_layers))
        self.head = nn.Sequential(nn.LayerNorm(size.width), nn.Linear(size.width, outputs))

    def forward(self, history: Tensor, marks: Tensor) -> Tensor:
        """Return the forecast ``(batch, horizon, outputs)``.

        Args:
            history: the known past, ``(batch, length, inputs)``.
            marks: calendar features of past and future, ``(batch, length + horizon, marks)``.

        Raises:
            ConfigError: the past is shorter than ``label_length``, or ``marks`` are of another length.

        """
        length = history.shape[1]
        if length < self.label_length or marks.shape[1] != length + self.horizon:
            raise ConfigError(
                f"the past has {length} steps and the calendar {marks.shape[1]}: they must have {self.label_length} or more, "
                f"and {self.horizon} more than the past"
            )
        memory = self.encoder(self.encoder_embedding(history, marks[:, :length]))
        start = nn.functional.pad(history[:, length - self.label_length :], (0, 0, 0, self.horizon))
        places = self.decoder_embedding(start, marks[:, length - self.label_length :])
        *before, last = self.decoder
        for layer in before:
            places = layer(places, memory, places.shape[1])
        return self.head(last(places, memory, self.horizon))  # type: ignore[no-any-return]


class Embedding(nn.Module):
    """Values, their places and the calendar, summed into one vector a step."""

    def __init__(self, inputs: int, marks: int, size: Size) -> None:
        super().__init__()
        self.values = nn.Conv1d(inputs, size.width, kernel_size=3, padding=1, padding_mode="circular")
        nn.init.kaiming_normal_(self.values.weight, mode="fan_in", nonlinearity="leaky_relu")
        self.calendar = nn.Linear(marks, size.width, bias=False)
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, values: Tensor, marks: Tensor) -> Tensor:
        """Return ``(batch, length, width)`` of ``values (batch, length, inputs)`` and ``marks (batch, length, marks)``."""
        embedded = self.values(values.transpose(1, 2)).transpose(1, 2) + self.calendar(marks)
        embedded = embedded + sinusoids(embedded.shape[1], embedded.shape[2], embedded.device)
        return self.dropout(embedded)  # type: ignore[no-any-return]


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each added to what came in and normalised."""

    def __init__(self, size: Size, salt: int = 0) -> None:
        super().__init__()
        self.attention = SelfAttention(size.width, size.heads, factor=size.factor, dropout=size.dropout, salt=salt)
        self.feed_forward = _feed_forward(size)
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, places: Tensor) -> Tensor:
        """Return ``(batch, length, width)`` of the same."""
        places = self.norm1(places + self.dropout(self.attention(places)))
        return self.norm2(places + self.feed_forward(places))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Causal self-attention, a look at the encoder's memory, and feed-forward."""

    def __init__(self, size: Size, salt: int = 0) -> None:
        super().__init__()
        options = {"dropout": size.dropout}
        self.attention = SelfAttention(size.width, size.heads, factor=size.factor, causal=True, salt=salt, **options)
        self.look = CrossAttention(size.width, size.heads, **options)
        self.feed_forward = _feed_forward(size)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(size.width) for _ in range(3))
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, places: Tensor, memory: Tensor, wanted: int) -> Tensor:
        """Return the last ``wanted`` places, ``(batch, wanted, width)``, of ``places (batch, length, width)``."""
        places = places + self.dropout(self.attention(places))
        places = self.norm1(places[:, places.shape[1] - wanted :])
        places = self.norm2(places + self.dropout(self.look(places, memory)))
        return self.norm3(places + self.feed_forward(places))  # type: ignore[no-any-return]


class Distilling(nn.Module):
    """Halves a sequence: convolution over three neighbours in a circle, norm, ELU, and the larger of neighbours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv1d(width, width, kernel_size=3, padding=1, padding_mode="circular")
        self.norm = nn.LayerNorm(width)
        self.halve = nn.Sequential(nn.ELU(), nn.MaxPool1d(kernel_size=3, stride=2, padding=1))

    def forward(self, places: Tensor) -> Tensor:
        """Return ``(batch, ceil(length / 2), width)`` of ``(batch, length, width)``."""
        mixed = self.norm(self.mix(places.transpose(1, 2)).transpose(1, 2))
        return self.halve(mixed.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


def sinusoids(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return the positions' code ``(length, width)`` of Vaswani et al. (2017, section 3.5): sines and cosines in turns.

    >>> sinusoids(2, 4)[0].tolist()
    [0.0, 1.0, 0.0, 1.0]
    """
    frequency = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    angle = torch.arange(length, device=device).unsqueeze(1) * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1)[:, :width]


def _feed_forward(size: Size) -> nn.Sequential:
    dropout = nn.Dropout(size.dropout)
    return nn.Sequential(
        nn.Linear(size.width, size.hidden), nn.GELU(), dropout, nn.Linear(size.hidden, size.width), dropout
    )
