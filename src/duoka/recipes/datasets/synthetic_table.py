"""Synthetic table ``datatry``: 10 features and 2 targets with a known ground truth, so that the best result is known."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from duoka.recipes.datasets import csv_table

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
"""Names of the features, and the bounds of the uniform distribution of each."""
TARGETS = ("Pressure", "SWAT")
NOISE = {"Pressure": 3.0, "SWAT": 0.02}
"""Standard deviation of the normal noise of each target, in bar and as a share of water."""


@dataclass(frozen=True)
class SyntheticTable:
    """Rows of features and targets."""

    features: Tensor
    """float64 ``(rows, 10)``."""
    ground_truth: Tensor
    """The targets without noise, float64 ``(rows, 2)``."""
    targets: Tensor
    """The targets, float64 ``(rows, 2)``."""

    def best_r2(self) -> dict[str, float]:
        """Return for each target the R² of the ground truth, which a model can exceed only by chance."""
        residual = (self.targets - self.ground_truth).square().sum(0)
        total = (self.targets - self.targets.mean(0)).square().sum(0)
        return dict(zip(TARGETS, (1 - residual / total).tolist(), strict=True))


def make(rows: int = 10_000, seed: int = 0) -> SyntheticTable:
    """Draw rows, which are a function of the arguments.

    The targets follow these formulas plus noise, with each feature scaled to 0 to 1 unless noted otherwise:

    - Pressure, bar: ``80 + 120 Depth + 45 tanh(3 (Injection - Production)) exp(-Distance) + 15 sin(2 pi Days) Porosity``
    - SWAT, the share of water: ``0.15 + 0.7 / (1 + exp(-6 (0.5 Days + 0.6 Injection Permeability - 0.4 Distance - 0.1)))
      - 0.08 log(Viscosity unscaled, in mPa s) / log(20)``

    Thickness and Temperature have no effect.
    """
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(rows, len(FEATURES), generator=generator, dtype=torch.float64)
    low, high = torch.tensor([bounds for _, *bounds in FEATURES], dtype=torch.float64).unbind(1)
    features = low + share * (high - low)
    depth, porosity, permeability, _, _, _, injection, production, distance, days = share.unbind(1)
    pressure = 80 + 120 * depth + 45 * torch.tanh(3 * (injection - production)) * torch.exp(-distance)
    pressure = pressure + 15 * torch.sin(2 * math.pi * days) * porosity
    front = torch.sigmoid(6 * (0.5 * days + 0.6 * injection * permeability - 0.4 * distance - 0.1))
    water = 0.15 + 0.7 * front - 0.08 * features[:, 4].log() / math.log(20)
    ground_truth = torch.stack((pressure, water), dim=1)
    noise = torch.randn(rows, len(TARGETS), generator=generator, dtype=torch.float64)
    noise *= torch.tensor(list(NOISE.values()), dtype=torch.float64)
    return SyntheticTable(features, ground_truth, ground_truth + noise)


def write(path: Path, table: SyntheticTable) -> None:
    """Write the features, then the targets as the last two columns."""
    rows = torch.cat((table.features, table.targets), dim=1).tolist()
    csv_table.write(path, [*(feature[0] for feature in FEATURES), *TARGETS], rows, digits=7)
