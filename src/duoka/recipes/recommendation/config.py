"""The options of the recipe ``movielens``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from duoka.errors import ConfigError
from duoka.recipes.common.config import at_least, check
from duoka.recipes.datasets.movielens_split import check_ratio

__all__ = ["NAME", "RecommendationConfig"]

NAME = "movielens"


@dataclass(frozen=True)
class RecommendationConfig:
    """Recommend films: embeddings of users and films joined with what a GPT-2 reads of their descriptions, in two stages.

    Stage 1 trains on descriptions that were encoded once; stage 2 trains GPT-2, too, by LoRA. Each keeps its weights of the
    best validation NDCG@10, and the run's model is the better one of the two; the test part chooses nothing.
    """

    root: str = "./data"
    """Folder of users.dat, movies.dat and ratings.dat, or the one that ml-1m or ml-1m.zip is in."""
    download: bool = True
    """Whether MovieLens-1M may be downloaded (6 MB) when ``root`` has none."""
    split: Literal["random", "per-user", "time", "cold-films"] = "random"
    """Which ratings are the test: at random, some of each user, the last of each user, or all those of some films."""
    split_ratio: str = "0.8,0.1,0.1"
    """Shares of training, validation and test."""
    split_seed: int = 0
    """Decides the split; apart from ``seed``, so that runs with other seeds are tested on the same ratings."""

    model: Literal["enhanced", "concatenation", "ncf"] = "enhanced"
    """Text and id joined by cross-attention, by concatenation, or ids alone."""
    pretrained: str = "gpt2"
    """The GPT-2: a name of the hub, a folder, or ``none`` for a small one with random weights, made from the data, offline."""
    embedding_size: int = 64
    """Width of the vectors of users and films."""
    heads: int = 4
    """Heads of the cross-attention."""
    contrast: float = 0.1
    """Weight of the contrastive term (InfoNCE) beside the ranking loss (BPR)."""
    id_dropout: float = 0.1
    """Share of the ids that are hidden in a step of training, so that texts learn to stand alone: 0 to 1."""

    device: str = "auto"
    """What to compute on: auto, all, 0, 0,1, 0-3, cuda:1, cpu, cpu:2, idle, idle:2."""
    batch_size: int = 2048
    """Batch size, in ratings (see ``batch_size_means``)."""
    batch_size_means: Literal["per_device", "global"] = "global"
    """Whether ``batch_size`` is each device's, or all devices' together."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of forward and backward; auto is bf16 on accelerators and fp32 on the CPU. Evaluations have fp32."""
    clip: float = 1.0
    """Largest norm of the gradient; longer ones are shortened to it."""

    epochs: int = 30
    """Stage 1: how many times the training ratings are gone through, at most."""
    lr: float = 1e-3
    """Stage 1: learning rate."""
    dynamic_epochs: int = 3
    """Stage 2: the same; 0 leaves stage 2 out."""
    dynamic_lr: float = 5e-4
    """Stage 2: learning rate of all but GPT-2."""
    text_lr: float = 5e-5
    """Stage 2: learning rate of GPT-2."""
    train_text: Literal["lora", "full"] = "lora"
    """Stage 2: what of GPT-2 is trained: low-rank additions (peft), or all."""
    lora_rank: int = 8
    """Stage 2: rank of the additions."""
    lora_alpha: float = 32.0
    """Stage 2: what they are multiplied by, times the rank."""
    weight_decay: float = 0.01
    """Weight decay, of both stages."""
    patience: int = 3
    """Stop a stage after this many evaluations without a better NDCG@10; 0 never stops."""
    eval_every_epochs: int = 1
    """Epochs from one evaluation to the next."""
    baselines: bool = True
    """Whether popularity, ItemKNN and NCF are measured beside the model."""
    seed: int = 0
    """Decides the first weights, the order of the ratings, the unknown films they are compared with, and hidden ids."""

    out: str = "runs"
    """Folder of all runs; this one becomes OUT/movielens/TIME-NAME."""
    name: str | None = None
    """The run's name; null is made of model, GPT-2 and split."""
    resume: str | None = None
    """A stopped run's folder, to go on with it there, with its own options unless others are given."""

    FIXED = (
        "model",
        "pretrained",
        "embedding_size",
        "heads",
        "split",
        "split_ratio",
        "split_seed",
        "train_text",
        "lora_rank",
        "lora_alpha",
        "seed",  # it makes the small GPT-2 that stage 1 has read the texts with
        "contrast",
        "id_dropout",
        "lr",  # a stage that goes on has its optimiser's state, rates and all
        "dynamic_lr",
        "text_lr",
        "weight_decay",
    )
    PLANNED = ()
    scheduler = None  # rates stay as they are

    def __post_init__(self) -> None:
        check(self)
        for option in ("embedding_size", "heads", "batch_size", "epochs", "lora_rank", "eval_every_epochs"):
            at_least(self, option, 1)
        for option in ("split_seed", "seed", "dynamic_epochs", "patience", "contrast", "weight_decay"):
            at_least(self, option, 0)
        for option in ("clip", "lr", "dynamic_lr", "text_lr", "lora_alpha"):
            at_least(self, option, 0, exclusive=True)
        at_least(self, "id_dropout", 0, below=1)
        if self.embedding_size % self.heads:
            raise ConfigError(
                f"`embedding_size` is {self.embedding_size} and `heads` {self.heads}: the size must be a multiple of the heads"
            )
        check_ratio(self.ratio)

    def resolved(self) -> RecommendationConfig:
        """Return the same with a value for every option that was left open."""
        text = "" if self.model == "ncf" else f"-{self.pretrained.rstrip('/').rpartition('/')[2]}"
        changed: dict[str, Any] = {"name": self.name or f"{self.model}{text}-{self.split}"}
        if self.model == "ncf":
            changed["dynamic_epochs"] = 0  # it has no text to train
        return dataclasses.replace(self, **changed)

    @property
    def ratio(self) -> tuple[float, ...]:
        """The shares of training, validation and test."""
        try:
            return tuple(float(share) for share in self.split_ratio.split(","))
        except ValueError:
            raise ConfigError(
                f"`split_ratio` is {self.split_ratio!r}: write three shares with commas between them, such as 0.8,0.1,0.1"
            ) from None
