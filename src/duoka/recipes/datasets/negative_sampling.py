"""Triplets for ranking losses: each rated film of a user with an unrated one, drawn anew in every epoch."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from duoka.data.sample_fetch import identity_collate
from duoka.errors import DataError
from duoka.recipes.datasets.movielens import SeenItems
from duoka.recipes.datasets.movielens_format import Integers


class NegativeSampler:
    """Draws unrated films of a user, each with the same probability and without rejection.

    A user with ``m`` rated films among ``n`` has ``n - m`` unrated ones. A uniform number ``r`` below ``n - m`` selects
    film ``r + k``, where ``k`` is the number of rated films before it. The user's rated film number ``k`` (from 0) with
    index ``p`` has ``p - k`` unrated films before it. So ``k`` counts the rated films with ``p - k <= r``: one binary
    search in an ascending list over all users.

    Args:
        seen: the rated films of each user.
        n_items: the number of films.
        user_ids: ids of the users for messages; ``None`` names their indices.
        candidates: the films to draw from, ascending, with all rated films among them; ``None`` is every film.
    """

    def __init__(
        self, seen: SeenItems, n_items: int, user_ids: Integers | None = None, candidates: Integers | None = None
    ) -> None:
        self.n_items = n_items if candidates is None else len(candidates)
        self.user_ids, self.candidates = user_ids, candidates
        self.indptr, indices = seen.indptr.numpy(), seen.indices.numpy()
        counts = np.diff(self.indptr)
        self.num_unrated = self.n_items - counts
        """The number of unrated films of each user ``(users,)``."""
        users = np.repeat(np.arange(len(counts)), counts)
        rated = indices if candidates is None else np.searchsorted(candidates, indices)
        unrated_before = rated - (np.arange(len(rated)) - self.indptr[users])
        self._keys = users * self.n_items + unrated_before

    def draw(self, users: Integers, random: np.random.Generator) -> Integers:
        """Return one unrated film for each of ``users``, both ``(samples,)``; ascending users are fastest.

        Raises DataError if a user has rated every film.
        """
        num_unrated = self.num_unrated[users]
        if len(users) and num_unrated.min() < 1:
            index = int(users[np.argmin(num_unrated)])
            user = f"the user at index {index}" if self.user_ids is None else f"user {self.user_ids[index]}"
            where = "" if self.candidates is None else " of the training part"
            raise DataError(
                f"{user} has rated all {self.n_items:,} films{where}, which leaves no negative sample: leave the user out, or "
                "add films"
            )
        numbers = random.integers(0, num_unrated)
        rated_before = np.searchsorted(self._keys, users * self.n_items + numbers, side="right") - self.indptr[users]
        drawn: Integers = numbers + rated_before
        return drawn if self.candidates is None else self.candidates[drawn]


class TripletDataset(Dataset[dict[str, Tensor]]):
    """Data set whose sample ``i`` is the ``i``-th pair with an unrated film: ``users``, ``positives``, ``negatives``.

    The unrated films are a function of ``(seed, epoch)``: the same on every rank and after a resume. Trainers call
    ``set_epoch``; a loop of your own must call it too.

    ``pairs`` are indices of user and film ``(samples, 2)``; the other arguments are those of ``NegativeSampler``.
    """

    def __init__(
        self,
        pairs: Integers,
        seen: SeenItems,
        n_items: int,
        seed: int = 0,
        user_ids: Integers | None = None,
        candidates: Integers | None = None,
    ) -> None:
        ordered = pairs[np.argsort(pairs[:, 0], kind="stable")]
        self._sampler = NegativeSampler(seen, n_items, user_ids, candidates)
        self._seed, self._epoch = seed, -1
        self.users = torch.from_numpy(np.ascontiguousarray(ordered[:, 0]))
        self.positives = torch.from_numpy(np.ascontiguousarray(ordered[:, 1]))
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the unrated films of ``epoch``."""
        if epoch != self._epoch:
            drawn = self._sampler.draw(self.users.numpy(), np.random.default_rng((self._seed, epoch)))
            self.negatives, self._epoch = torch.from_numpy(drawn), epoch

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[0] for name, column in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return a batch, each tensor int64 ``(batch,)``."""
        rows = torch.from_numpy(np.array(indices))  # five times as fast as torch with a list of numbers
        return {"users": self.users[rows], "positives": self.positives[rows], "negatives": self.negatives[rows]}


def loader(samples: TripletDataset, batch_size: int) -> DataLoader[Any]:
    """Return a shuffling loader of ``samples``, whose ``__getitems__`` already returns whole batches."""
    sampler = _ShuffleSampler(len(samples))
    return DataLoader(samples, batch_size=batch_size, sampler=sampler, collate_fn=identity_collate)


class _ShuffleSampler(Sampler[int]):
    """Indices below ``count`` in random order, in half the time of torch's ``RandomSampler``."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.count).tolist())

    def __len__(self) -> int:
        return self.count
