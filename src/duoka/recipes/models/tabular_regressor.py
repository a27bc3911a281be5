"""An encoder-only Informer for tables: it predicts numbers from a row of numbers, each feature a token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from duoka.recipes.models.informer import InformerSize, encoder_layers, sinusoidal_positions

SMALL_SIZE = InformerSize(width=64, heads=4, hidden=128, encoder_layers=2, factor=5, distil=True, dropout=0.1)
"""The size for a table of ten columns."""


class TabularRegressor(nn.Module):
    """Predicts ``outputs`` numbers from ``features`` numbers: encoder layers, mean over features, two linear layers.

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
        return self.norm(torch.nn.functional.gelu(mixed.transpose(1, 2)))  # type: ignore[no-any-return]
