"""The recipe `movielens` at MovieLens-1M's size: reading, sampling, training and ranking, next to plain Python.

    python benchmarks/recommend.py [--users 6040 --films 3883 --ratings 1000000] [--threads 2] [--dynamic 60]

The data are those of `duoka data make movielens`, written to a temporary folder. Each time is the best of three.
`recommend_dynamic.py`, which compares ways to train GPT-2 in the loop, runs at the end.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import recommend_dynamic
import torch
from torch import Tensor

from duoka import Trainer
from duoka.recipes.datasets import synthetic_movielens
from duoka.recipes.datasets.movielens import ML1MDataset
from duoka.recipes.datasets.negative_sampling import TripletDataset, loader
from duoka.recipes.models.recommender import Recommender
from duoka.recipes.recommendation import Config
from duoka.recipes.recommendation.baselines import Popularity
from duoka.recipes.recommendation.ranking_metrics import METRICS, RankingEvaluator, RankingModel
from duoka.recipes.recommendation.training import RankingModelWithLoss, build_model, load_texts
from duoka.recipes.recommendation.user_means import mean_metrics


def best_of(repeats: int, work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of the fastest call, and the result of the last."""
    times, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
    return min(times), result


def plain_negatives(users: Any, positives: dict[int, set[int]], n_items: int) -> list[int]:
    """Draw until the film is unknown, one sample after the other."""
    random = np.random.default_rng(0)
    drawn = []
    for user in users:
        film = int(random.integers(n_items))
        while film in positives[user]:
            film = int(random.integers(n_items))
        drawn.append(film)
    return drawn


def plain_reading(path: Path) -> list[list[int]]:
    """Read line by line."""
    with path.open(encoding="latin-1") as file:
        return [[int(field) for field in line.rstrip("\n").split("::")] for line in file]


def data_and_sampler(folder: Path) -> tuple[ML1MDataset, TripletDataset]:
    data = ML1MDataset(folder)
    return data, TripletDataset(data.train.pairs, data.seen(), data.n_items)


def report_data(folder: Path) -> ML1MDataset:
    cold = time.perf_counter()
    data_and_sampler(folder)
    print(f"data and sampler ready, first time (imports pandas): {time.perf_counter() - cold:.2f} s")
    seconds, (data, samples) = best_of(3, lambda: data_and_sampler(folder))
    print(f"data and sampler ready, again: {seconds:.2f} s")
    epochs = iter(range(1, 10))
    seconds, _ = best_of(3, lambda: samples.set_epoch(next(epochs)))
    print(f"negatives of an epoch: {seconds:.3f} s for {len(samples):,} samples")
    reading, _ = best_of(1, lambda: plain_reading(folder / "ratings.dat"))
    positives: dict[int, set[int]] = {}
    for user, film in data.train.pairs.tolist():
        positives.setdefault(user, set()).add(film)
    drawing, _ = best_of(1, lambda: plain_negatives(data.train.users.tolist(), positives, data.n_items))
    print(f"plain Python: reading {reading:.2f} s, negatives of an epoch {drawing:.2f} s")
    return data


def report_ranking(data: ML1MDataset, model: Recommender, plain_users: int) -> None:
    evaluator = RankingEvaluator.of(data, "test")
    scores = Popularity(evaluator.seen, data.n_items)
    seconds, _ = best_of(3, lambda: evaluator.evaluate(scores.score_all))
    print(f"full ranking of {len(evaluator.users):,} users without a model's scoring: {seconds:.2f} s")
    trainer = Trainer(RankingModel(model, evaluator), metrics=mean_metrics(), device="cpu", verbose=False)
    began = time.process_time()
    seconds, _ = best_of(3, lambda: trainer.evaluate(evaluator.loader()))
    busy = (time.process_time() - began) / 3
    print(
        f"full ranking with a model's scoring, through Trainer.evaluate: {seconds:.2f} s; {busy:.2f} s of processor time"
    )
    some = evaluator.users[:plain_users]
    seconds, expected = best_of(1, lambda: plain_ranking(model, evaluator, some, data.n_items))
    metrics = evaluator.ranking_metrics(model.scorer().score_all(some), some)
    found = float(metrics[:, METRICS.index("ndcg@10")].mean())
    print(
        f"plain Python, one user after another: {seconds * len(evaluator.users) / len(some):.0f} s (from {len(some)} "
        f"users); NDCG@10 of both {found:.6f} and {expected:.6f}"
    )


@torch.no_grad()
def plain_ranking(model: Recommender, evaluator: RankingEvaluator, users: Tensor, n_items: int) -> float:
    """Return NDCG@10 by scoring all pairs of one user after the other, and sorting them."""
    model.eval()
    score, total = model.score, 0.0
    user_vectors, films = model.vectors(torch.arange(model.n_users), torch.arange(n_items))
    for user in users.tolist():
        pairs = score.user_tower(user_vectors[user].expand(n_items, -1)), score.item_tower(films)
        scores = (score.dot(*pairs) + score.mlp(*pairs)).tolist()
        seen = set(evaluator.seen.indices[evaluator.seen.indptr[user] : evaluator.seen.indptr[user + 1]].tolist())
        targets = set(
            evaluator.targets.indices[evaluator.targets.indptr[user] : evaluator.targets.indptr[user + 1]].tolist()
        )
        order = sorted((film for film in range(n_items) if film not in seen), key=lambda film: -scores[film])[:10]
        gain = sum(1 / math.log2(rank + 1) for rank, film in enumerate(order, 1) if film in targets)
        total += gain / sum(1 / math.log2(rank + 1) for rank in range(1, min(10, len(targets)) + 1))
    return total / len(users)


def report_training(data: ML1MDataset, model: Recommender, epochs: int, threads: int) -> None:
    """Train in one process with all threads, and on as many CPU workers with one thread each; print the best epoch."""
    samples = TripletDataset(data.train.pairs, data.seen(), data.n_items)
    evaluator = RankingEvaluator.of(data, "validation")
    for batch in (2048, 8192):
        for device in dict.fromkeys(("cpu", f"cpu:{threads}")):
            options: dict[str, Any] = {
                "optimizer": "adamw",
                "lr": 1e-3,
                "max_grad_norm": 1.0,
                "batch_size_means": "global",
                "verbose": False,
            }
            net = RankingModelWithLoss(copy.deepcopy(model), evaluator)
            trainer = Trainer(net, loader(samples, batch), epochs=epochs, device=device, **options)
            trainer.fit(save_model=False)
            rate = max(record["samples_per_s"] for record in trainer.history)
            print(f"training in cached mode, batch {batch:,}, Trainer on {device}: {rate:,.0f} samples/s")
    model.load_state_dict(net.model.state_dict())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--users", type=int, default=6_040)
    parser.add_argument("--films", type=int, default=3_883)
    parser.add_argument("--ratings", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3, help="of training in cached mode")
    parser.add_argument("--plain-users", type=int, default=100, help="how many are ranked plain Python")
    parser.add_argument(
        "--dynamic", type=float, default=60, metavar="S", help="seconds for dynamic mode; 0 leaves it out"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        example = synthetic_movielens.make(options.users, options.films, options.ratings)
        synthetic_movielens.write(Path(folder), example)
        data = report_data(Path(folder))
        config = Config(pretrained="none", device="cpu")
        model = build_model(config, data, load_texts(config, data), 1)
        report_training(data, model, options.epochs, options.threads)
        report_ranking(data, model, options.plain_users)
    if options.dynamic:
        print("\n".join(recommend_dynamic.compare(options.dynamic)))


if __name__ == "__main__":
    main()
