"""Options of the recipe ``informer``, and the defaults that depend on others."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from duoka.errors import ConfigError
from duoka.recipes.common.config import RunOptions
from duoka.recipes.models.informer import SMALL_SIZE, InformerSize
from duoka.utils.text import duoka_command

NAME = "informer"
LENGTHS = {"M": (48, 48, 24), "MS": (96, 48, 24), "S": (720, 168, 24)}
"""seq_len, label_len and pred_len by ``features``: the authors' script for ETTh1, horizon 24; for MS their defaults."""
TASK_OPTIONS = ("batch_size", "epochs", "optimizer", "lr", "weight_decay", "scheduler", "patience")
TASK_DEFAULTS = {
    "forecast": (32, 6, "adam", 1e-4, 0.0, "halving", 3),
    "regress": (1024, 300, "adamw", 1e-3, 1e-4, "cosine", 0),
}
"""Defaults of ``TASK_OPTIONS`` by ``task``."""


@dataclass(frozen=True)
class TimeSeriesConfig(RunOptions):
    """Forecast series, or predict some columns of a table from others.

    A forecast's weights are those of the epoch that is best on the validation part; the test part chooses nothing.
    """

    task: Literal["forecast", "regress"] = "forecast"
    """forecast: the next steps of series with dates; regress: some columns of a table from other columns."""
    csv: str | None = None
    """Table: a first line of names, then numbers. Default: ``dataset``, for forecast only."""
    dataset: Literal["ETTh1", "ETTh2", "ETTm1", "ETTm2"] = "ETTh1"
    """Series of transformer temperatures to forecast if there is no ``csv``."""
    root: str = "./data"
    """Folder of these series."""
    download: bool = True
    """Download such a series (2 to 10 MB) if ``root`` has none."""
    fill: bool = False
    """Interpolate missing values and missing dates between their neighbors, instead of refusing them. Interpolation reads
    values after a gap, so errors of forecasts that begin in one are a little too small."""
    inputs: str | None = None
    """Columns to learn from, by names or positions from 1: HUFL,HULL or 1-10. Default: all that are no target or date."""
    targets: str | None = None
    """Columns to predict, likewise. Default: the last two for regress, all for M, the last for S and MS."""

    train_rows: int | None = None
    """Regress: rows drawn at random for training; the rest are for the test. Default: 10,000 if there are more, else 80 %."""
    split_seed: int = 0
    """Regress: seed that chooses these rows, apart from ``seed``: runs with other seeds have the same test rows."""

    date: str = "date"
    """Forecast: column of dates, by name or position."""
    features: Literal["M", "S", "MS"] = "M"
    """Forecast: all series from all (M), one from itself (S), or one from all (MS)."""
    seq_len: int | None = None
    """Forecast: steps of the past that the encoder reads. Default: 48 for M, 96 for MS, 720 for S."""
    label_len: int | None = None
    """Forecast: last steps of the past that the decoder starts from. Default: 48; 168 for S."""
    pred_len: int | None = None
    """Forecast: steps to forecast. Default: 24."""
    split: Literal["auto", "paper", "ratio"] = "auto"
    """Forecast: 12, 4 and 4 months (paper), or 70, 10 and 20 % (ratio); auto is paper for files named ETTh... and ETTm..."""
    inverse: bool = False
    """Forecast: print numbers in the columns' own units; results.json has both."""
    baselines: bool = True
    """Forecast: also measure the last value, the last season and DLinear."""

    attention: Literal["prob", "full"] = "prob"
    """ProbSparse attention, or full."""
    factor: int = 5
    """ProbSparse's sampling factor: it selects this many times ln(length) queries and keys."""
    distil: bool = True
    """Halve the encoder's sequence between layers."""
    width: int | None = None
    """Width of the model. Default: 512; 64 for regress."""
    heads: int | None = None
    """Attention heads. Default: 8; 4 for regress."""
    hidden: int | None = None
    """Width within feed-forward parts. Default: 2048; 128 for regress."""
    encoder_layers: int = 2
    """Layers of the encoder."""
    decoder_layers: int = 1
    """Forecast: layers of the decoder."""
    dropout: float | None = None
    """Share of features dropped in training: 0 to 1. Default: 0.05; 0.1 for regress."""

    batch_size: int | None = None
    """Windows or rows in a batch; see ``batch_size_means``. Default: 32; 1024 for regress."""
    epochs: int | None = None
    """Largest number of passes over the training data. Default: 6; 300 for regress."""
    optimizer: Literal["adam", "adamw"] | None = None
    """Optimizer. Default: adam; adamw for regress."""
    lr: float | None = None
    """Default: 0.0001; 0.001 for regress."""
    weight_decay: float | None = None
    """Default: 0; 0.0001 for regress."""
    scheduler: Literal["halving", "cosine", "none"] | None = None
    """Learning-rate schedule: half after each epoch but the first, a cosine to 0, or constant. Default: halving; cosine for
    regress."""
    patience: int | None = None
    """Forecast: stop after this many epochs without a better validation; 0 never stops, and keeps the best. Default: 3."""
    name: str | None = None
    """Default: made of task and file."""

    FIXED = (
        "task", "dataset", "inputs", "targets", "train_rows", "split_seed", "features", "seq_len", "label_len",
        "pred_len", "split", "attention", "distil", "width", "heads", "hidden", "encoder_layers", "decoder_layers",
        "optimizer", "scheduler",
    )  # fmt: skip
    PLANNED = ("cosine",)
    PATHS = ("root", "csv")
    DATA = (
        "task", "csv", "dataset", "root", "download", "fill", "inputs", "targets", "train_rows", "split_seed",
        "date", "features", "seq_len", "label_len", "pred_len", "split",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_numbers("train_rows", least=1)
        self.check_numbers("encoder_layers", "decoder_layers", least=1, below=1000)
        self.check_numbers("factor", "seq_len", "pred_len", "width", "heads", "hidden", least=1, below=1_000_000)
        self.check_numbers("label_len", "patience", least=0, below=1_000_000)
        self.check_numbers("split_seed", least=0, below=2**63)
        self.check_numbers("dropout", least=0, below=1)
        if self.csv == "":
            raise ConfigError("csv is empty: name a file, or leave --csv out")
        if self.task == "regress" and self.csv is None:
            example = duoka_command("data", "make", "datatry")
            raise ConfigError(f"regress needs a table: --csv FILE.csv; `{example}` writes an example")

    def resolved(self) -> TimeSeriesConfig:
        """Return a copy with a value for every option.

        Raises ConfigError if lengths or widths do not fit together.
        """
        size = InformerSize() if self.task == "forecast" else SMALL_SIZE
        chosen: dict[str, Any] = {name: getattr(size, name) for name in ("width", "heads", "hidden", "dropout")}
        chosen |= zip(TASK_OPTIONS, TASK_DEFAULTS[self.task], strict=True)
        chosen |= zip(("seq_len", "label_len", "pred_len"), LENGTHS[self.features], strict=True)
        if self.seq_len is not None:
            chosen["label_len"] = min(chosen["label_len"], self.seq_len)
        source = Path(self.csv).stem if self.csv else self.dataset
        chosen["name"] = f"{self.task}-{source}" + (f"-{self.features}" if self.task == "forecast" else "")
        resolved = self.fill_in(chosen)
        past, start, _ = resolved.lengths
        if start > past:
            raise ConfigError(
                f"label_len={start} is longer than seq_len={past}: the decoder starts from steps of the past, so at most {past}"
            )
        size = resolved.size()
        if size.width % size.heads or size.width % 2:
            raise ConfigError(
                f"width={size.width} does not suit heads={size.heads}: give an even width that is a multiple of the heads"
            )
        return resolved

    def size(self) -> InformerSize:
        """Return the model's widths and depths."""
        sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(InformerSize)}
        return InformerSize(**sizes | {"factor": self.factor if self.attention == "prob" else None})

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Steps of the past, of the decoder's start, and of the forecast."""
        return cast("tuple[int, int, int]", (self.seq_len, self.label_len, self.pred_len))
