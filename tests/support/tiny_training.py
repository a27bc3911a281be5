"""A tiny classification task and a trainer for it, in a fraction of a second."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from duoka.trainer import Trainer


def labeled_samples(count: int = 12) -> TensorDataset:
    """Return samples of five features, whose class is the sign of their sum."""
    features = torch.randn(count, 5, generator=torch.Generator().manual_seed(0))
    return TensorDataset(features, (features.sum(1) > 0).long())


def loader(samples: int = 12, batch_size: int = 4, **options) -> DataLoader:
    return DataLoader(labeled_samples(samples), batch_size=batch_size, **options)


def trainer_of(train_data=None, **options) -> Trainer:
    """Return a silent trainer of a linear model on one CPU device; ``options`` override its own."""
    torch.manual_seed(0)
    settings = {"loss": nn.CrossEntropyLoss(), "device": "cpu", "epochs": 2, "verbose": False}
    model = options.pop("model", None) or nn.Linear(5, 2)
    return Trainer(model, loader() if train_data is None else train_data, **(settings | options))
