"""The example table ``datatry``: 10 features, and 2 targets by a known law with noise, so that the best result is known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from duoka.recipes.datasets import csv_table

__all__ = ["FEATURES", "TARGETS", "SyntheticTable", "make", "write"]

FEATURES = (
    ("Depth", 800.0, 2400.0),
    ("Porosity", 0.05, 0.35),
    ("Permeability", 1.0, 500.0),
    ("Thickness", 2.0, 40.0),
    ("Viscosity", 0.5, 20.0),
    ("Temperature", 30.0, 110.0),
    ("Injection", 0.0, 300.0),
    ("Production", 10.0, 250.0),
    ("Distance", 50.0, 600.0),
    ("Days", 1.0, 3650.0),
)
"""Names of the features, and the ends between which each is drawn evenly, independently of the others."""
TARGETS = ("Pressure", "SWAT")
NOISE = {"Pressure": 3.0, "SWAT": 0.02}
"""Standard deviation of the normal noise on each target: bar, and share of water."""


@dataclass(frozen=True)
class SyntheticTable:
    """Rows of the example."""

    features: Tensor
    """float64 ``(rows, 10)``."""
    law: Tensor
    """The targets without noise, float64 ``(rows, 2)``."""
    targets: Tensor
    """The targets, float64 ``(rows, 2)``."""

    def best_r2(self) -> dict[str, float]:
        """Return for each target the R² that the law itself has on these rows: nothing can do better but by luck."""
        residual = (self.targets - self.law).square().sum(0)
        total = (self.targets - self.targets.mean(0)).square().sum(0)
        return dict(zip(TARGETS, (1 - residual / total).tolist(), strict=True))


def make(rows: int = 10_000, seed: int = 0) -> SyntheticTable:
    """Draw ``rows`` rows; the same ``seed`` gives the same rows everywhere.

    The law, where a feature's name stands for its value scaled to 0 to 1 between its ends, if not said otherwise:

    - Pressure, bar: ``80 + 120 Depth + 45 tanh(3 (Injection - Production)) exp(-Distance) + 15 sin(2 pi Days) Porosity``
    - SWAT, share of water: ``0.15 + 0.7 / (1 + exp(-6 (0.5 Days + 0.6 Injection Permeability - 0.4 Distance - 0.1)))
      - 0.08 log(Viscosity unscaled, in mPa s) / log(20)``

    Thickness and Temperature are in no law: a good model finds that out.
    """
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(rows, len(FEATURES), generator=generator, dtype=torch.float64)
    low, high = (
        torch.tensor(ends, dtype=torch.float64) for ends in zip(*(feature[1:] for feature in FEATURES), strict=True)
    )
    features = low + share * (high - low)
    depth, porosity, permeability, _, _, _, injection, production, distance, days = share.unbind(1)
    pressure = 80 + 120 * depth + 45 * torch.tanh(3 * (injection - production)) * torch.exp(-distance)
    pressure = pressure + 15 * torch.sin(2 * math.pi * days) * porosity
    front = torch.sigmoid(6 * (0.5 * days + 0.6 * injection * permeability - 0.4 * distance - 0.1))
    water = 0.15 + 0.7 * front - 0.08 * features[:, 4].log() / math.log(20)
    law = torch.stack((pressure, water), dim=1)
    noise = torch.randn(rows, len(TARGETS), generator=generator, dtype=torch.float64)
    return SyntheticTable(features, law, law + noise * torch.tensor(list(NOISE.values()), dtype=torch.float64))


def write(path: Path, example: SyntheticTable) -> None:
    """Write the features and, as the last two columns, the targets."""
    rows = torch.cat((example.features, example.targets), dim=1).tolist()
    csv_table.write(path, [*(feature[0] for feature in FEATURES), *TARGETS], rows, digits=7)
