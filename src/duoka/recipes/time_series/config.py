"""The options of the recipe ``informer``, and what those that are left open come to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from duoka.errors import ConfigError
from duoka.recipes.common.config import at_least, check
from duoka.recipes.models.informer import InformerSize
from duoka.recipes.models.tabular_regressor import SMALL_SIZE

__all__ = ["NAME", "TimeSeriesConfig"]

NAME = "informer"
LENGTHS = {"M": (48, 48, 24), "MS": (96, 48, 24), "S": (720, 168, 24)}
"""seq_len, label_len and pred_len by what is forecast: the authors' script for ETTh1, horizon 24; for MS their defaults."""
FORECAST: dict[str, Any] = {
    "batch_size": 32,
    "epochs": 6,
    "optimizer": "adam",
    "lr": 1e-4,
    "weight_decay": 0.0,
    "scheduler": "halving",
    "patience": 3,
}
REGRESS: dict[str, Any] = {
    "batch_size": 1024,
    "epochs": 300,
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 1e-4,
    "scheduler": "cosine",
    "patience": 0,
}


@dataclass(frozen=True)
class TimeSeriesConfig:
    """Forecast series, or predict some columns of a table from others.

    A forecast's weights are those of the epoch that is best on the validation part; the test part chooses nothing.
    """

    task: Literal["forecast", "regress"] = "forecast"
    """``forecast``: the next steps of series with dates. ``regress``: some columns of a table from other columns."""
    csv: str | None = None
    """The table: a first line of names, then numbers; null (forecast only) takes ``dataset``."""
    dataset: Literal["ETTh1", "ETTh2", "ETTm1", "ETTm2"] = "ETTh1"
    """Which set of transformer temperatures is forecast where there is no ``csv``."""
    root: str = "./data"
    """Folder of these sets."""
    download: bool = True
    """Whether such a set may be downloaded (2 to 10 MB) when ``root`` does not have it."""
    fill: bool = False
    """Whether missing values, and missing dates, are interpolated between their neighbours; otherwise they are refused.
    What follows a gap is looked at for that, so errors of forecasts that begin in one come out a little too small."""
    inputs: str | None = None
    """Columns to learn from, by names or positions from 1 (``HUFL,HULL``, ``1-10``); null is all that are no target or date."""
    targets: str | None = None
    """Columns to predict, likewise; null is the last two for regress, all for M, the last for S and MS."""

    train_rows: int | None = None
    """Regress: rows drawn at random for training, the rest are for the test; null is 10,000 if there are more, else 80 %."""
    split_seed: int = 0
    """Regress: decides which rows those are; apart from ``seed``, so that runs with other seeds are tested on the same."""

    date: str = "date"
    """Forecast: the column of dates, by name or position."""
    features: Literal["M", "S", "MS"] = "M"
    """Forecast: all series from all (M), one from itself (S), or one from all (MS)."""
    seq_len: int | None = None
    """Forecast: steps of the past that are looked at; null is 48 for M, 96 for MS, 720 for S."""
    label_len: int | None = None
    """Forecast: last steps of them that the decoder starts from; null is 48, for S 168."""
    pred_len: int | None = None
    """Forecast: steps to forecast; null is 24."""
    split: Literal["auto", "paper", "ratio"] = "auto"
    """Forecast: 12, 4 and 4 months (paper), or 70, 10 and 20 % (ratio); auto is paper for files called ETTh... and ETTm..."""
    inverse: bool = False
    """Forecast: whether the numbers that are printed are in the columns' own units; results.json has both."""
    baselines: bool = True
    """Forecast: whether the last value, last season and DLinear are measured beside the Informer."""

    attention: Literal["prob", "full"] = "prob"
    """ProbSparse attention, or full."""
    factor: int = 5
    """ProbSparse's sampling factor: it takes this many times ln(length) queries and keys."""
    distil: bool = True
    """Whether the encoder halves its sequence between layers."""
    width: int | None = None
    """Width of the model; null is 512, for regress 64."""
    heads: int | None = None
    """Attention heads; null is 8, for regress 4."""
    hidden: int | None = None
    """Width within feed-forward parts; null is 2048, for regress 128."""
    encoder_layers: int = 2
    """Layers of the encoder."""
    decoder_layers: int = 1
    """Forecast: layers of the decoder."""
    dropout: float | None = None
    """Share of features dropped in training: 0 to 1; null is 0.05, for regress 0.1."""

    device: str = "auto"
    """What to compute on: auto, all, 0, 0,1, 0-3, cuda:1, cpu, cpu:2, idle, idle:2."""
    batch_size: int | None = None
    """Batch size, in windows or rows (see ``batch_size_means``); null is 32, for regress 1024."""
    batch_size_means: Literal["per_device", "global"] = "global"
    """Whether ``batch_size`` is each device's, or all devices' together."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of forward and backward."""

    epochs: int | None = None
    """How many times the training data are gone through, at most; null is 6, for regress 300."""
    optimizer: Literal["adam", "adamw"] | None = None
    """What changes the weights; null is adam, for regress adamw."""
    lr: float | None = None
    """Learning rate; null is 0.0001, for regress 0.001."""
    weight_decay: float | None = None
    """Weight decay; null is 0, for regress 0.0001."""
    scheduler: Literal["halving", "cosine", "none"] | None = None
    """How the learning rate changes: half after each epoch but the first, a cosine to 0, or not; null: halving, cosine."""
    patience: int | None = None
    """Forecast: stop after this many epochs without a better validation; 0 never stops, and keeps the best; null is 3."""
    seed: int = 0
    """Decides the first weights, the order of the samples and dropout."""

    out: str = "runs"
    """Folder of all runs; this one becomes OUT/informer/TIME-NAME."""
    name: str | None = None
    """The run's name; null is made of task and file."""
    resume: str | None = None
    """A stopped run's folder, to go on with it there, with its own options unless others are given."""

    FIXED = (
        "task",
        "dataset",
        "inputs",
        "targets",
        "train_rows",
        "split_seed",
        "features",
        "seq_len",
        "label_len",
        "pred_len",
        "split",
        "attention",
        "distil",
        "width",
        "heads",
        "hidden",
        "encoder_layers",
        "decoder_layers",
        "optimizer",
        "scheduler",
    )
    PLANNED = ("cosine",)
    DATA = (
        "task",
        "csv",
        "dataset",
        "root",
        "download",
        "fill",
        "inputs",
        "targets",
        "train_rows",
        "split_seed",
        "date",
        "features",
        "seq_len",
        "label_len",
        "pred_len",
        "split",
    )

    def __post_init__(self) -> None:
        check(self)
        for option in (
            "batch_size",
            "epochs",
            "factor",
            "encoder_layers",
            "decoder_layers",
            "seq_len",
            "pred_len",
            "train_rows",
        ):
            at_least(self, option, 1)
        for option in ("width", "heads", "hidden"):
            at_least(self, option, 1)
        for option in ("label_len", "patience", "weight_decay"):
            at_least(self, option, 0)
        for option in ("seed", "split_seed"):
            at_least(self, option, 0, below=2**63)
        at_least(self, "lr", 0, exclusive=True)
        at_least(self, "dropout", 0, below=1)
        if self.csv == "":
            raise ConfigError("`csv` is empty: name a file, or leave --csv out")
        if self.task == "regress" and self.csv is None:
            raise ConfigError("regress needs a table: --csv FILE.csv; `duoka data make datatry` writes an example")

    def resolved(self) -> TimeSeriesConfig:
        """Return the same with a value for every option that was left open.

        Raises:
            ConfigError: lengths or widths that do not go together.

        """
        size = InformerSize() if self.task == "forecast" else SMALL_SIZE
        chosen: dict[str, Any] = {
            "width": size.width,
            "heads": size.heads,
            "hidden": size.hidden,
            "dropout": size.dropout,
        }
        chosen |= FORECAST if self.task == "forecast" else REGRESS
        chosen |= zip(("seq_len", "label_len", "pred_len"), LENGTHS[self.features], strict=True)
        if self.seq_len is not None:
            chosen["label_len"] = min(chosen["label_len"], self.seq_len)
        source = Path(self.csv).stem if self.csv else self.dataset
        chosen["name"] = f"{self.task}-{source}" + (f"-{self.features}" if self.task == "forecast" else "")
        open_ones = {option: value for option, value in chosen.items() if getattr(self, option) is None}
        resolved = dataclasses.replace(self, **open_ones)
        resolved._check_together()
        return resolved

    def size(self) -> InformerSize:
        """Return the model's widths and depths."""
        assert self.width is not None
        assert self.heads is not None
        assert self.hidden is not None
        assert self.dropout is not None
        return InformerSize(
            width=self.width,
            heads=self.heads,
            hidden=self.hidden,
            encoder_layers=self.encoder_layers,
            decoder_layers=self.decoder_layers,
            factor=self.factor if self.attention == "prob" else None,
            distil=self.distil,
            dropout=self.dropout,
        )

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Steps of the past, of the decoder's start, and of the forecast."""
        assert self.seq_len is not None
        assert self.label_len is not None
        assert self.pred_len is not None
        return self.seq_len, self.label_len, self.pred_len

    def _check_together(self) -> None:
        past, start, _ = self.lengths
        if start > past:
            raise ConfigError(
                f"`label_len` is {start} and `seq_len` {past}: the decoder starts from steps of the past, so at most {past}"
            )
        size = self.size()
        if size.width % size.heads or size.width % 2:
            raise ConfigError(
                f"`width` is {size.width} and `heads` {size.heads}: give an even width that is a multiple of the heads"
            )
