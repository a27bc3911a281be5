"""Training in two stages: on texts that were encoded once, then with GPT-2 in the loop; each through a Trainer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duoka import Trainer, devices
from duoka.recipes.common.recipe_run import ConfigWriter, RecipeRun
from duoka.recipes.datasets import negative_sampling as negatives
from duoka.recipes.datasets.movielens import ML1MDataset
from duoka.recipes.models.gpt2_recommender import GPT2Recommender, GPT2RecommenderEnhanced, TwoRates, carry_over
from duoka.recipes.models.gpt2_text_encoder import Lora, TokenizedTexts, prepare
from duoka.recipes.models.recommender import NCF, Recommender
from duoka.recipes.recommendation.config import NAME, RecommendationConfig
from duoka.recipes.recommendation.ranking_metrics import RankedItems, RankingEvaluator, means

__all__ = [
    "BEST",
    "Stage",
    "StageTraining",
    "build",
    "measured",
    "prepared",
    "samples_of",
    "train_ncf",
    "train_stages",
]

BEST = "ndcg@10"
"""What says which weights are the best."""
NCF_RATE = 3e-3
"""The baseline's learning rate: ids alone learn more slowly, and stop too early at the rate of stage 1."""
WATCHED = ("ndcg@10", "recall@10", "hr@10", "mrr@10", "recall@50")
"""What is measured on the validation part after each epoch."""


class StageTraining(RankedItems):
    """A model with its loss: a batch with films returns the loss, a block of users the measures of their lists."""

    def forward(
        self, users: Tensor, positives: Tensor | None = None, negatives: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return ``{"loss": ...}``, or what ``Ranked`` returns; all arguments int64 ``(batch,)``."""
        if positives is None or negatives is None:
            return super().forward(users)
        model: Any = self.model
        return {"loss": model.loss({"users": users, "positives": positives, "negatives": negatives})}


@dataclass(frozen=True)
class Stage:
    """What a stage came to."""

    number: int
    model: Recommender
    """With its best weights."""
    validation: dict[str, float]
    """Its measures there."""
    epochs: int
    """How many it has gone through."""


def prepared(config: RecommendationConfig, data: ML1MDataset) -> TokenizedTexts | None:
    """Return the tokenised texts and the GPT-2 that reads them; ``None`` where the model has ids alone."""
    if config.model == "ncf":
        return None
    return prepare(data.user_texts, data.item_texts, pretrained=config.pretrained, seed=config.seed)


def build(config: RecommendationConfig, data: ML1MDataset, texts: TokenizedTexts | None, stage: int) -> Recommender:
    """Return the model of a stage with its first weights."""
    if texts is None:
        return NCF(data.n_users, data.n_items, embedding_size=config.embedding_size, seed=config.seed)
    device = devices.resolve(config.device).devices[0]
    kind = GPT2RecommenderEnhanced if config.model == "enhanced" else GPT2Recommender
    model = kind(
        texts,
        embedding_size=config.embedding_size,
        use_cache=stage == 1,
        train_text="frozen" if stage == 1 else config.train_text,
        lora=Lora(config.lora_rank, config.lora_alpha),
        heads=config.heads,
        contrast=config.contrast,
        id_dropout=config.id_dropout,
        seed=config.seed,
        device=device,
    )
    model.hide(
        users=_without_ratings(data.train.users, data.n_users), items=_without_ratings(data.train.items, data.n_items)
    )
    return model


def _without_ratings(places: Any, count: int) -> Tensor:
    """Return who, or which films, training knows nothing of, so that an id would say nothing."""
    return (torch.bincount(torch.from_numpy(places), minlength=count) == 0).nonzero().flatten()


def train_stages(config: RecommendationConfig, data: ML1MDataset, run: RecipeRun) -> list[Stage]:
    """Train both stages, or the second only where the first is done; a stage that has begun goes on from its checkpoint."""
    texts = prepared(config, data)
    first = build(config, data, texts, 1)
    done = [_train(first, config, data, run, 1, config.lr)]
    if config.dynamic_epochs and texts is not None:
        second = build(config, data, texts, 2)
        carry_over(first, second)  # type: ignore[arg-type]
        done.append(_train(second, config, data, run, 2, config.dynamic_lr))
    return done


def _train(
    model: Recommender, config: RecommendationConfig, data: ML1MDataset, run: RecipeRun, number: int, lr: float
) -> Stage:
    """Train one stage in a folder of its own within the run's."""
    folder = run.folder / f"stage-{number}"
    epochs = config.epochs if number == 1 else config.dynamic_epochs
    trainer = _trainer(
        model,
        config,
        data,
        lr,
        epochs=epochs,
        out_dir=folder,
        resume="auto" if config.resume else False,
        callbacks=[ConfigWriter(run, NAME, dataclasses.replace(config, resume=None), data.metadata())],
    )
    validation, _ = trainer.fit(save_model=True)
    return Stage(number, model, validation, len(trainer.history))


def train_ncf(config: RecommendationConfig, data: ML1MDataset) -> Recommender:
    """Return the baseline that knows ids alone, trained as long as stage 1."""
    model = build(config, data, None, 1)
    _trainer(model, config, data, NCF_RATE, epochs=config.epochs, verbose=False).fit(save_model=False)
    return model


def samples_of(config: RecommendationConfig, data: ML1MDataset) -> negatives.TripletDataset:
    """Return what is trained on: known pairs, each with an unknown film.

    In the split of films that are yet to come those are never the unknown ones: nobody has turned them down.
    """
    films = np.unique(data.train.items) if config.split == "cold-films" else None
    return negatives.TripletDataset(
        data.train.pairs, data.seen("train"), data.n_items, config.seed, data.user_ids, films
    )


def _trainer(model: Recommender, config: RecommendationConfig, data: ML1MDataset, lr: float, **options: Any) -> Trainer:
    task = RankingEvaluator.of(data, "validation", only_its_films=config.split == "cold-films")
    return Trainer(
        StageTraining(model, task),
        negatives.loader(samples_of(config, data), config.batch_size),
        task.loader(),
        metrics=means(WATCHED),
        device=config.device,
        batch_size_means=config.batch_size_means,
        precision=_precision(config),
        optimizer=TwoRates.of(model, lr=lr, text_lr=config.text_lr, weight_decay=config.weight_decay),
        max_grad_norm=config.clip,
        eval_every_epochs=config.eval_every_epochs,
        monitor=BEST,
        early_stop_patience=config.patience or None,
        seed=config.seed,
        **options,
    )


def measured(model: torch.nn.Module, task: RankingEvaluator, config: RecommendationConfig) -> dict[str, float]:
    """Return the measures of ``model``, averaged over the users, on all devices."""
    trainer = Trainer(RankedItems(model, task), metrics=means(), device=config.device, verbose=False)
    results: dict[str, float] = trainer.evaluate(task.loader())
    return results


def _precision(config: RecommendationConfig) -> str:
    if config.precision != "auto":
        return config.precision
    return "fp32" if devices.resolve(config.device).devices[0].type == "cpu" else "bf16"
