"""The recipe `movielens` at MovieLens-1M's size: reading, negative sampling, full ranking; the plain way beside them.

    python benchmarks/recommend.py [--users 6040 --films 3883 --ratings 1000000] [--threads 2]

The data are those of `duoka data make movielens`, written to a temporary folder. Each time is the best of three.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duoka.recipes.movielens.baselines import Popularity
from duoka.recipes.movielens.ranking import Task, evaluate
from duoka.recipes.sets import movielens_planted
from duoka.recipes.sets.movielens import ML1MDataset
from duoka.recipes.sets.negatives import Triples


def best_of(repeats: int, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest of some calls, and what the last returned."""
    times, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
    return min(times), result


def plain_negatives(users: Any, positives: dict[int, set[int]], n_items: int) -> list[int]:
    """One draw after another until the film is unknown: the straightforward way."""
    random = np.random.default_rng(0)
    drawn = []
    for user in users:
        film = int(random.integers(n_items))
        while film in positives[user]:
            film = int(random.integers(n_items))
        drawn.append(film)
    return drawn


def plain_reading(path: Path) -> list[list[int]]:
    """Line by line: the straightforward way."""
    with path.open(encoding="latin-1") as file:
        return [[int(field) for field in line.rstrip("\n").split("::")] for line in file]


def data_and_sampler(folder: Path) -> tuple[ML1MDataset, Triples]:
    data = ML1MDataset(folder)
    return data, Triples(data.train.pairs, data.seen(), data.n_items)


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
    print(f"the straightforward way: reading {reading:.2f} s, negatives of an epoch {drawing:.2f} s")
    return data


def report_ranking(data: ML1MDataset) -> None:
    task = Task.of(data, "test")
    scores = Popularity(task.seen, data.n_items)

    def score(users: Tensor) -> Tensor:
        return scores.all(users)

    seconds, _ = best_of(3, lambda: evaluate(score, task))
    print(f"full ranking of {len(task.users):,} users without the model's own scoring: {seconds:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--users", type=int, default=6_040)
    parser.add_argument("--films", type=int, default=3_883)
    parser.add_argument("--ratings", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        example = movielens_planted.make(options.users, options.films, options.ratings)
        movielens_planted.write(Path(folder), example)
        report_ranking(report_data(Path(folder)))


if __name__ == "__main__":
    main()
