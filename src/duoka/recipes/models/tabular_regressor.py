"""An encoder-only Informer that predicts numbers from a row of numbers: each feature is a token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from duoka.recipes.models.informer import EncoderLayer, Size, sinusoids

__all__ = ["SMALL", "Regressor"]

SMALL = Size(width=64, heads=4, hidden=128, encoder_layers=2, factor=5, distil=True, dropout=0.1)
"""The size that a table of ten columns needs."""


class Regressor(nn.Module):
    """Predicts ``outputs`` numbers from ``features``: tokens, encoder layers with halvings between, mean, two linear layers.

    With few features ProbSparse attention takes every query, and so is full attention.

    Args:
        features: how many numbers a row has.
        outputs: how many are predicted.
        size: widths and depths.

    """

    def __init__(self, features: int, outputs: int, size: Size = SMALL) -> None:
        super().__init__()
        self.token = nn.Linear(1, size.width)
        self.positions: Tensor
        self.register_buffer("positions", sinusoids(features, size.width), persistent=False)
        encoder: list[nn.Module] = []
        for number in range(size.encoder_layers):
            if number and size.distil:
                encoder.append(StridedConvDownsample(size.width))
            encoder.append(EncoderLayer(size, salt=number))
        self.encoder = nn.Sequential(*encoder)
        self.head = nn.Sequential(
            nn.Linear(size.width, 128), nn.GELU(), nn.Dropout(size.dropout), nn.Linear(128, outputs)
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Return ``(batch, outputs)`` of ``rows (batch, features)``."""
        encoded = self.encoder(self.token(rows.unsqueeze(-1)) + self.positions)
        return self.head(encoded.mean(dim=1))  # type: ignore[no-any-return]


class StridedConvDownsample(nn.Module):
    """Halves a sequence by a convolution of stride 2, and normalises."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.norm = nn.LayerNorm(width)

    def forward(self, places: Tensor) -> Tensor:
        """Return ``(batch, ceil(length / 2), width)`` of ``(batch, length, width)``."""
        mixed: Tensor = self.mix(places.transpose(1, 2))
        return self.norm(torch.nn.functional.gelu(mixed.transpose(1, 2)))  # type: ignore[no-any-return]
