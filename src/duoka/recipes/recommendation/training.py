"""Training in two stages, each by a Trainer: on texts that are encoded once, then with GPT-2 in every step."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from duoka import Trainer, devices
from duoka.recipes.common.recipe_run import RecipeRun, fit, run_options
from duoka.recipes.datasets import negative_sampling
from duoka.recipes.datasets.movielens import ML1MDataset
from duoka.recipes.models.gpt2_recommender import (
    GPT2Recommender,
    GPT2RecommenderEnhanced,
    copy_stage1_weights,
    two_lr_groups,
)
from duoka.recipes.models.gpt2_text_encoder import Lora, TokenizedTexts, tokenize_texts
from duoka.recipes.models.recommender import NCF, Recommender
from duoka.recipes.recommendation.config import NAME, RecommendationConfig
from duoka.recipes.recommendation.ranking_metrics import RankingEvaluator, RankingModel

BEST_METRIC = "ndcg@10"
"""The validation metric that selects the best weights."""
NCF_LR = 3e-3
"""The NCF baseline's learning rate: ids alone learn more slowly, and stop too early at stage 1's rate."""
VALIDATION_METRICS = ("ndcg@10", "recall@10", "hr@10", "mrr@10", "recall@50")


class RankingModelWithLoss(RankingModel):
    """A recommender in training: a batch of samples in, its loss out; or a batch of users, as ``RankingModel``."""

    def forward(
        self, users: Tensor, positives: Tensor | None = None, negatives: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return ``{"loss": ...}``, or ``{"prediction": ...}`` without items; arguments are int64 ``(batch,)``."""
        if positives is None or negatives is None:
            return super().forward(users)
        model: Any = self.model
        return {"loss": model.loss({"users": users, "positives": positives, "negatives": negatives})}


@dataclass(frozen=True)
class StageResult:
    """The result of one stage."""

    number: int
    model: Recommender
    """With its best weights."""
    validation: dict[str, float]
    """Metrics of these weights."""
    epochs: int


def load_texts(config: RecommendationConfig, data: ML1MDataset) -> TokenizedTexts | None:
    """Return the tokenized texts with their GPT-2; ``None`` for a model of ids alone."""
    if config.model == "ncf":
        return None
    return tokenize_texts(data.user_texts, data.item_texts, pretrained=config.pretrained, seed=config.seed)


def build_model(
    config: RecommendationConfig, data: ML1MDataset, texts: TokenizedTexts | None, stage: int
) -> Recommender:
    """Return the model of a stage with its initial weights."""
    if texts is None:
        return NCF(data.n_users, data.n_items, embedding_size=config.embedding_size, seed=config.seed)
    model_class = GPT2RecommenderEnhanced if config.model == "enhanced" else GPT2Recommender
    model = model_class(
        texts,
        embedding_size=config.embedding_size,
        use_cache=stage == 1,
        train_text="frozen" if stage == 1 else config.train_text,
        lora=Lora(config.lora_rank, config.lora_alpha),
        heads=config.heads,
        contrast=config.contrast,
        id_dropout=config.id_dropout,
        seed=config.seed,
        device=first_device(config),
    )
    rated = (data.train.users, data.n_users), (data.train.items, data.n_items)
    users, items = (np.flatnonzero(np.bincount(ids, minlength=count) == 0) for ids, count in rated)
    model.hide_ids(users=torch.from_numpy(users), items=torch.from_numpy(items))  # their embeddings stay untrained
    return model


def train_stages(config: RecommendationConfig, data: ML1MDataset, run: RecipeRun) -> list[StageResult]:
    """Train each stage in its own folder within the run's; with ``config.resume`` from its checkpoint, if it has one."""
    texts = load_texts(config, data)
    stages = [(1, config.lr, config.epochs)]
    if config.dynamic_epochs and texts is not None:
        stages.append((2, config.dynamic_lr, config.dynamic_epochs))
    results: list[StageResult] = []
    for number, lr, epochs in stages:
        model = build_model(config, data, texts, number)
        if results:
            copy_stage1_weights(results[0].model, model)
        options = run_options(run, NAME, config, data.metadata()) | {"out_dir": run.folder / f"stage-{number}"}
        trainer = _trainer(model, config, data, lr, epochs=epochs, **options)  # with the time that is left now
        validation, _ = fit(trainer, save_model=True)
        results.append(StageResult(number, model, validation, len(trainer.history)))
    return results


def train_ncf(config: RecommendationConfig, data: ML1MDataset) -> Recommender:
    """Return the NCF baseline, trained as long as stage 1."""
    model = build_model(config, data, None, 1)
    _trainer(model, config, data, NCF_LR, epochs=config.epochs, verbose=False).fit(save_model=False)
    return model


def training_samples(config: RecommendationConfig, data: ML1MDataset) -> negative_sampling.TripletDataset:
    """Return the training samples: rated pairs, each with an item that the user has not rated.

    With cold films the negatives are items with training ratings only: no user has rejected the others.
    """
    items = np.unique(data.train.items) if config.split == "cold-films" else None
    seen = data.seen("train")
    return negative_sampling.TripletDataset(data.train.pairs, seen, data.n_items, config.seed, data.user_ids, items)


def evaluator_of(config: RecommendationConfig, data: ML1MDataset, part: str) -> RankingEvaluator:
    """Return the evaluator of ``part``; with cold films it ranks the films of the part only."""
    return RankingEvaluator.of(data, part, only_its_films=config.split == "cold-films")


def _trainer(model: Recommender, config: RecommendationConfig, data: ML1MDataset, lr: float, **options: Any) -> Trainer:
    from duoka.recipes.recommendation.user_means import mean_metrics

    evaluator, precision = evaluator_of(config, data, "validation"), str(config.precision)
    if precision == "auto":
        precision = "fp32" if first_device(config).type == "cpu" else "bf16"
    return Trainer(
        RankingModelWithLoss(model, evaluator),
        negative_sampling.loader(training_samples(config, data), config.batch_size),
        evaluator.loader(),
        metrics=mean_metrics(VALIDATION_METRICS),
        device=config.device,
        batch_size_means=config.batch_size_means,
        precision=precision,
        optimizer=two_lr_groups(model, lr=lr, text_lr=config.text_lr, weight_decay=config.weight_decay),
        max_grad_norm=config.clip,
        eval_every_epochs=config.eval_every_epochs,
        monitor=BEST_METRIC,
        early_stop_patience=config.patience or None,
        seed=config.seed,
        **options,
    )


def evaluate_model(model: nn.Module, evaluator: RankingEvaluator, config: RecommendationConfig) -> dict[str, float]:
    """Return the metrics of ``model``, averaged over the users, on all devices."""
    from duoka.recipes.recommendation.user_means import mean_metrics

    trainer = Trainer(RankingModel(model, evaluator), metrics=mean_metrics(), device=config.device, verbose=False)
    metrics: dict[str, float] = trainer.evaluate(evaluator.loader())
    return metrics


def first_device(config: RecommendationConfig) -> torch.device:
    """Return the first of the configured devices."""
    return devices.resolve(config.device).devices[0]
