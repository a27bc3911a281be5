"""Pairs for ranking losses: each known film of a user next to one the user does not know, drawn anew in every epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from duoka.errors import DataError
from duoka.recipes.datasets.movielens import SeenItems

if TYPE_CHECKING:
    Samples = Dataset[dict[str, Tensor]]
else:
    Samples = Dataset

__all__ = ["Negatives", "Triples", "loader"]

Integers = NDArray[np.int64]


class Negatives:
    """Draws unknown films: each as likely as any other, and never one that the user knows.

    A user with ``m`` known films among ``n`` has ``n - m`` unknown ones. Their number ``r``, drawn evenly, is turned into a
    place without drawing again: it is ``r`` plus the known places before it. Known place ``k`` of a user (from 0), which is
    ``p``, has ``p - k`` unknown ones before it, so the known ones before unknown ``r`` are those with ``p - k <= r``: one
    binary search in an ascending list over all users.

    Args:
        seen: what each user knows.
        n_items: how many films there are.
        user_ids: the users' numbers in their file, for messages; without them their places are named.
        among: the films to draw from, ascending, all that anybody knows among them; ``None`` is every film.

    """

    def __init__(
        self, seen: SeenItems, n_items: int, user_ids: Integers | None = None, among: Integers | None = None
    ) -> None:
        self.n_items, self.user_ids, self.among = n_items if among is None else len(among), user_ids, among
        self.indptr = seen.indptr
        counts = np.diff(seen.indptr)
        self.unknown = self.n_items - counts
        """How many films each user does not know ``(users,)``."""
        owners = np.repeat(np.arange(len(counts)), counts)
        places = seen.indices if among is None else np.searchsorted(among, seen.indices)
        before = places - (np.arange(len(places)) - seen.indptr[owners])
        self._keys = owners * self.n_items + before

    def draw(self, users: Integers, random: np.random.Generator) -> Integers:
        """Return one unknown film for each of ``users``, both ``(samples,)``; ascending users are the fastest.

        Raises:
            DataError: one of them knows every film.

        """
        unknown = self.unknown[users]
        if len(users) and unknown.min() < 1:
            place = int(users[np.argmin(unknown)])
            user = f"the user at place {place}" if self.user_ids is None else f"user {self.user_ids[place]}"
            which = "" if self.among is None else " that training has"
            raise DataError(
                f"{user} knows all {self.n_items:,} films{which}, so there is none to tell them from: leave the user out, or "
                "add films"
            )
        numbers = random.integers(0, unknown)
        known = np.searchsorted(self._keys, users * self.n_items + numbers, side="right") - self.indptr[users]
        drawn: Integers = numbers + known
        return drawn if self.among is None else self.among[drawn]


class Triples(Samples):
    """Sample ``i`` is the ``i``-th known pair with a film its user does not know: ``users``, ``positives``, ``negatives``.

    The unknown films are a function of ``(seed, epoch)``: the same on every device, whatever part of them it loads, and after
    a resume. Trainers tell the epoch; who iterates a loader himself calls ``set_epoch``.

    Args:
        pairs: places of user and film ``(samples, 2)``.
        seen: what each user knows; usually the same pairs.
        n_items: how many films there are.
        seed: what is drawn from.
        user_ids: the users' numbers in their file, for messages.
        among: the films that unknown ones are drawn from, ascending; ``None`` is every film.

    """

    def __init__(
        self,
        pairs: Integers,
        seen: SeenItems,
        n_items: int,
        seed: int = 0,
        user_ids: Integers | None = None,
        among: Integers | None = None,
    ) -> None:
        ordered = pairs[np.argsort(pairs[:, 0], kind="stable")]
        self._users = np.ascontiguousarray(ordered[:, 0])
        self._sampler = Negatives(seen, n_items, user_ids, among)
        self._seed, self._epoch = seed, -1
        self.users = torch.from_numpy(self._users)
        self.positives = torch.from_numpy(np.ascontiguousarray(ordered[:, 1]))
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the unknown films of ``epoch``."""
        if epoch != self._epoch:
            drawn = self._sampler.draw(self._users, np.random.default_rng((self._seed, epoch)))
            self.negatives, self._epoch = torch.from_numpy(drawn), epoch

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[0] for name, column in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the batch of these samples, each tensor int64 ``(batch,)``."""
        rows = torch.from_numpy(np.array(indices))  # five times as fast as torch is with a list of numbers
        return {"users": self.users[rows], "positives": self.positives[rows], "negatives": self.negatives[rows]}


def loader(samples: Triples, batch_size: int) -> DataLoader[Any]:
    """Return a loader of ``samples`` in random order, which come as batches from the data set itself."""
    return DataLoader(samples, batch_size=batch_size, sampler=_Shuffled(len(samples)), collate_fn=_as_it_is)


class _Shuffled(Sampler[int]):
    """The numbers below ``count`` in random order, in half the time of torch's ``RandomSampler``."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.count).tolist())

    def __len__(self) -> int:
        return self.count


def _as_it_is(batch: Any) -> Any:
    return batch
