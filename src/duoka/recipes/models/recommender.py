"""What all recommenders of films share, and ``NCF``, which knows ids only: trained by ``loss(batch)``, asked by ``score_all``,
``predict`` and ``recommend``. `scoring` has the score of a pair, `gpt2_recommender` the models that read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import duoka
from duoka.errors import ConfigError
from duoka.recipes.models.pair_scoring import PairScore, PairScorer, TowerOutput

__all__ = ["NCF", "Recommender", "distinct", "id_embedding", "seeded"]


LOWEST_TEMPERATURE = 0.05
"""Exponentials of cosines over this, a thousand of them, are far from the largest float32."""


class Recommender(nn.Module):
    """What all recommenders share: the loss, the scores, the recommendations. ``vectors`` is the model's own.

    Args:
        users: how many there are.
        items: how many films.
        score: of a pair.
        contrast: weight of the contrastive term beside BPR's.
        candidates: of how many samples' films the contrastive term tells a user's own apart, at most.
        temperature: of the contrastive term.

    """

    def __init__(
        self,
        users: int,
        items: int,
        score: PairScore,
        *,
        contrast: float,
        candidates: int = 256,
        temperature: float = 0.2,
    ) -> None:
        super().__init__()
        if contrast < 0 or candidates < 1 or temperature < LOWEST_TEMPERATURE:
            raise ConfigError(
                f"contrast={contrast}, candidates={candidates}, temperature={temperature}: the weight is 0 or more, the "
                f"candidates 1 or more, the temperature {LOWEST_TEMPERATURE} or more"
            )
        self.n_users, self.n_items = users, items
        self.contrast, self.candidates, self.temperature = contrast, candidates, temperature
        self.score = score

    def vectors(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors of ``users`` and ``items``, which are distinct, ascending and int64: ``(count, width)`` each."""
        raise NotImplementedError

    # -- training ------------------------------------------------------------------------------------------------------

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean over the batch of BPR's loss plus ``contrast`` times InfoNCE.

        BPR (Rendle et al., UAI 2009, https://arxiv.org/abs/1205.2618): the film that the user has seen is to score higher than
        one that he has not. InfoNCE (van den Oord et al., 2018, https://arxiv.org/abs/1807.03748): by the cosine of
        their vectors, over ``temperature``, the user's film is to be told apart from the candidates, which are the
        distinct positive films of the first ``candidates`` samples of the global batch: the same on any number of devices.

        Args:
            batch: ``users``, ``positives`` and ``negatives``, int64 ``(batch,)`` each.

        """
        users, films = batch["users"], torch.stack([batch["positives"], batch["negatives"]])
        (some_users, user_at), (some_items, item_at) = distinct(users, self.n_users), distinct(films, self.n_items)
        vectors = self.vectors(some_users, some_items)
        return self.loss_of(*vectors, user_at, item_at, films[0])

    def loss_of(self, users: Tensor, items: Tensor, user_at: Tensor, item_at: Tensor, films: Tensor) -> Tensor:
        """Return what ``loss`` does, of vectors that are there already.

        Args:
            users: vectors ``(any, width)``.
            items: the same of films.
            user_at: where in ``users`` each sample's is, ``(batch,)``.
            item_at: where in ``items`` each sample's positive and negative film are, ``(2, batch)``.
            films: the numbers of the positive films, ``(batch,)``.

        """
        user, item_half = self.score.user_half(users).of(user_at), self.score.item_half(items)
        better, worse = item_half.of(item_at[0]), item_half.of(item_at[1])
        products = self.score.products(user, better)
        # One call a film: the gradient of what moves both scores alike is then exactly 0, of which AdamW makes no step.
        difference = self.score.products(user, worse) + self.score.network(user, worse)
        difference = difference - products - self.score.network(user, better)
        loss = softplus(difference).mean()
        if self.contrast:
            loss = loss + self.contrast * self._contrast(users, items, user_at, item_at[0], films, products).mean()
        return loss

    def _contrast(
        self, users: Tensor, items: Tensor, user_at: Tensor, item_at: Tensor, films: Tensor, products: Tensor
    ) -> Tensor:
        """Return InfoNCE of each sample, ``(batch,)``, whose product of user and film is known already.

        The sum over the candidates is computed once a user, not once a sample; the user's own film is added to it where it is
        not among them. Cosines are at most 1, so the sum needs no maximum taken out first.
        """
        users, items = users.float(), items.float()
        user_lengths, item_lengths = _lengths(users), _lengths(items)
        candidates, names = _candidates(items, item_at, films, self.candidates, self.training)
        scaled = candidates / (_lengths(candidates) * self.temperature).unsqueeze(1)
        among = ((users / user_lengths.unsqueeze(1)) @ scaled.T).float().exp().sum(1).log()[user_at]
        own = products.float() / (user_lengths[user_at] * item_lengths[item_at] * self.temperature)
        return torch.where(_is_in(films, names, self.n_items), among - own, softplus(among - own))

    # -- asking --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def scorer(self) -> PairScorer:
        """Return the model at rest: every user's and film's half of the score's first layer, each computed once."""
        was_training = self.training
        self.eval()
        users, items = self.vectors(
            *(torch.arange(count, device=self._device) for count in (self.n_users, self.n_items))
        )
        halves = self.score.user_half(users), self.score.item_half(items)
        self.train(was_training)
        return PairScorer(self.score, *(TowerOutput(half.product.float(), half.first.float()) for half in halves))

    def score_all(self, users: Tensor) -> Tensor:
        """Return the scores of ``users``, int64 ``(count,)``, with every film: ``(count, films)``.

        For several calls keep ``model.scorer()`` and ask it.
        """
        return self.scorer().all(users)

    def predict(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the scores of pairs of users and films, int64 ``(count,)`` each: ``(count,)``."""
        return self.scorer().pairs(users, items)

    def recommend(
        self, user: int, k: int = 10, seen: Iterable[int] = (), scorer: PairScorer | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the best films for ``user`` and their scores, best first; fewer than ``k`` where there are no more.

        Args:
            user: the user's number.
            k: how many films.
            seen: films to leave out.
            scorer: what ``scorer()`` returned, for several calls; without it everything is encoded in each.

        Raises:
            ConfigError: there is no such user or film, or ``k`` is not a positive number.

        """
        if not 0 <= user < self.n_users or k < 1:
            raise ConfigError(f"user={user}, k={k}: users are 0 to {self.n_users - 1}, and k is 1 or more")
        scores = (scorer or self.scorer()).all(torch.tensor([user]))[0]
        without = torch.tensor(sorted(set(seen)), dtype=torch.int64, device=scores.device)
        if len(without) and not 0 <= without[0] <= without[-1] < self.n_items:
            raise ConfigError(f"seen names films from {without[0]} to {without[-1]}: there are 0 to {self.n_items - 1}")
        scores[without] = -torch.inf
        best = scores.topk(min(k, self.n_items - len(without)))
        return best.indices.cpu(), best.values.cpu()

    @torch.no_grad()
    def user_vectors(self) -> Tensor:
        """Return the vectors of all users, ``(users, width)``."""
        return self.scorer().users.product

    @torch.no_grad()
    def item_vectors(self) -> Tensor:
        """Return the vectors of all films, ``(films, width)``; their cosine says how alike films are."""
        return self.scorer().items.product

    @property
    def _device(self) -> torch.device:
        return self.score.last.weight.device


class NCF(Recommender):
    """Neural collaborative filtering (He et al., WWW 2017, https://arxiv.org/abs/1708.05031): ids only.

    A generalised product and a network with embeddings of their own, as in NeuMF; the score's product weighs all places
    alike, which loses nothing, as the embeddings' own lengths can say it.
    """

    def __init__(self, users: int, items: int, *, embedding_size: int = 64, seed: int = 0) -> None:
        with seeded(seed):
            super().__init__(users, items, PairScore(embedding_size, embedding_size), contrast=0.0)
            self.user_ids = id_embedding(users, 2 * embedding_size)
            self.item_ids = id_embedding(items, 2 * embedding_size)

    def vectors(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(users, 2 * embedding_size)`` and ``(items, 2 * embedding_size)``."""
        return self.user_ids(users), self.item_ids(items)


def distinct(wanted: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return numbers that include ``wanted``, ascending, and where in them each is; all where most are wanted anyway."""
    if wanted.numel() > 2 * count:
        return torch.arange(count, device=wanted.device), wanted
    named = torch.zeros(count, dtype=torch.int64, device=wanted.device)
    named[wanted] = 1
    return named.nonzero().squeeze(1), (named.cumsum(0) - 1)[wanted]


def _is_in(numbers: Tensor, names: Tensor, count: int) -> Tensor:
    """Whether each of ``numbers``, below ``count``, is one of ``names``."""
    named = torch.zeros(count, dtype=torch.bool, device=numbers.device)
    named[names] = True
    return named[numbers]


def _lengths(vectors: Tensor) -> Tensor:
    """Return the length of each of ``vectors``, ``(count,)``; never 0."""
    lengths: Tensor = vectors.norm(dim=1)
    return lengths.clamp_min(1e-6)


def _candidates(items: Tensor, item_at: Tensor, films: Tensor, count: int, training: bool) -> tuple[Tensor, Tensor]:
    """Return the vectors of the distinct films of the global batch's first ``count`` samples, and the films.

    Each device has made the vectors of its own part; the others' come with their gradients, by sums over the devices.
    """
    world = duoka.current_world()
    if world.size == 1 or not training:
        names, at = torch.unique(films[:count], return_inverse=True)
        where = torch.empty_like(names).scatter_(0, at, item_at[:count])
        return items[where], names
    sent = torch.zeros(world.size, count, dtype=torch.int64, device=films.device)
    sent[world.rank, : len(films)] = films[:count] + 1
    received = world.all_reduce(sent).flatten()
    places = received.nonzero().squeeze(1)[:count]  # of the first samples, in the order of the devices
    names, at = torch.unique(received[places] - 1, return_inverse=True)
    owner = torch.full_like(names, world.size * count).scatter_reduce(0, at, places, "amin")
    mine = (owner // count == world.rank).nonzero().squeeze(1)
    own = items[item_at[owner[mine] % count]]
    vectors = torch.zeros(len(names), items.shape[1], device=items.device, dtype=items.dtype).index_copy(0, mine, own)
    return _Summed.apply(vectors), names


class _Summed(torch.autograd.Function):
    """A sum over the devices whose gradient is the sum of the devices' gradients: what each did with it counts."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # noqa: ARG004 - nothing to remember
        return duoka.current_world().all_reduce(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return duoka.current_world().all_reduce(gradient.contiguous())


def id_embedding(count: int, size: int) -> nn.Embedding:
    """Return one vector of ``size`` for each of ``count`` ids."""
    embedding = nn.Embedding(count, size)
    nn.init.normal_(embedding.weight, std=0.1)
    return embedding


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw first weights from ``seed`` inside the block, and leave the user's generator as it was."""
    before = torch.random.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(before)
