"""Options of the recipe ``movielens``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from duoka.recipes.common.config import RunOptions
from duoka.recipes.datasets.movielens import check_ratio
from duoka.utils.validation import invalid_option

NAME = "movielens"


@dataclass(frozen=True)
class RecommendationConfig(RunOptions):
    """Recommend films: embeddings of users and films joined with what a GPT-2 reads of their descriptions, in two stages.

    Stage 1 trains on descriptions that were encoded once; stage 2 trains GPT-2, too, by LoRA. Each keeps its weights of the
    best validation NDCG@10, and the run's model is the better one of the two; the test part chooses nothing.
    """

    root: str = "./data"
    """Folder of users.dat, movies.dat and ratings.dat, or the folder of ml-1m or ml-1m.zip."""
    download: bool = True
    """Download MovieLens-1M (6 MB) if ``root`` has none."""
    split: Literal["random", "per-user", "time", "cold-films"] = "random"
    """Ratings of the test: random ones, some of each user, the last of each user, or all ratings of some films."""
    split_ratio: str = "0.8,0.1,0.1"
    """Shares of training, validation and test."""
    split_seed: int = 0
    """Seed of the split, apart from ``seed``: runs with other seeds have the same test ratings."""

    model: Literal["enhanced", "concatenation", "ncf"] = "enhanced"
    """Text and id joined by cross-attention, by concatenation, or ids alone."""
    pretrained: str = "gpt2"
    """GPT-2: a name on the hub, a folder, or none for a small one with random weights, made from the data, offline."""
    embedding_size: int = 64
    """Width of the vectors of users and films."""
    heads: int = 4
    """Heads of the cross-attention."""
    contrast: float = 0.1
    """Weight of the contrastive term (InfoNCE) beside the ranking loss (BPR)."""
    id_dropout: float = 0.1
    """Share of the ids that are hidden in a training step, so that texts learn to stand alone: 0 to 1."""

    batch_size: int = 2048
    """Ratings in a batch; see ``batch_size_means``."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # type: ignore[assignment]
    """Number format of training; auto is bf16 on accelerators and fp32 on the CPU. Evaluations use fp32."""
    clip: float = 1.0
    """Largest norm of the gradient; a longer one is shortened to it."""

    epochs: int = 30
    """Stage 1: largest number of passes over the training ratings."""
    lr: float = 1e-3
    """Stage 1: learning rate."""
    dynamic_epochs: int = 3
    """Stage 2: largest number of passes; 0 skips stage 2."""
    dynamic_lr: float = 5e-4
    """Stage 2: learning rate of all but GPT-2."""
    text_lr: float = 5e-5
    """Stage 2: learning rate of GPT-2."""
    train_text: Literal["lora", "full"] = "lora"
    """Stage 2: trained part of GPT-2: low-rank additions (peft), or all."""
    lora_rank: int = 8
    """Stage 2: rank of the additions."""
    lora_alpha: float = 32.0
    """Stage 2: scale of the additions, times the rank."""
    weight_decay: float = 0.01
    """Weight decay of both stages."""
    patience: int = 3
    """Stop a stage after this many evaluations without a better NDCG@10; 0 never stops."""
    eval_every_epochs: int = 1
    """Epochs from one evaluation to the next."""
    baselines: bool = True
    """Also measure popularity, ItemKNN and NCF."""
    name: str | None = None
    """Default: made of model, GPT-2 and split."""

    FIXED = (  # `seed` makes the small GPT-2 that stage 1 reads with; a checkpoint's optimizer has its learning rates
        "model", "pretrained", "embedding_size", "heads", "split", "split_ratio", "split_seed", "train_text", "lora_rank",
        "lora_alpha", "seed", "contrast", "id_dropout", "lr", "dynamic_lr", "text_lr", "weight_decay",
    )  # fmt: skip
    scheduler = None  # learning rates are constant

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_numbers("eval_every_epochs", least=1)
        self.check_numbers("embedding_size", "heads", "lora_rank", least=1, below=10_000)
        self.check_numbers("split_seed", "dynamic_epochs", "patience", "contrast", least=0)
        self.check_numbers("clip", "dynamic_lr", "text_lr", "lora_alpha", least=0, exclusive=True)
        self.check_numbers("id_dropout", least=0, below=1)
        if self.embedding_size % self.heads:
            raise invalid_option("embedding_size", self.embedding_size, f"a multiple of heads={self.heads}")
        check_ratio(self.ratio)

    def resolved(self) -> RecommendationConfig:
        """Return a copy with a value for every option."""
        text = "" if self.model == "ncf" else f"-{self.pretrained.rstrip('/').rpartition('/')[2]}"
        changed: dict[str, Any] = {"name": self.name or f"{self.model}{text}-{self.split}"}
        if self.model == "ncf":
            changed["dynamic_epochs"] = 0  # it has no text to train
        return dataclasses.replace(self, **changed)

    @property
    def ratio(self) -> tuple[float, ...]:
        """Shares of training, validation and test."""
        try:
            return tuple(float(share) for share in self.split_ratio.split(","))
        except ValueError:
            expected = "three shares with commas between them, such as 0.8,0.1,0.1"
            raise invalid_option("split_ratio", self.split_ratio, expected) from None
