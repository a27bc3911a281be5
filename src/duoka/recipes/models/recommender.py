"""``Recommender``, the base of the recommendation models with their loss and scores; and ``NCF``, by ids alone."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import duoka
from duoka.recipes.models.pair_scoring import PairScore, PairScorer, TowerOutput
from duoka.utils.rng_state import preserve_rng_state
from duoka.utils.torch_settings import preserve_train_modes
from duoka.utils.validation import check_integer, check_number, invalid_option

MIN_TEMPERATURE = 0.05
"""Sums of a thousand exponentials of cosines divided by this stay far below the largest float32."""


class Recommender(nn.Module):
    """Base of the recommendation models: loss, scores and recommendations. Subclasses define ``vectors``.

    Args:
        users: number of users.
        items: number of items.
        score: the score of a pair.
        contrast: weight of the contrastive term in the loss.
        candidates: number of samples whose items are the contrastive term's candidates.
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
        check_number("contrast", contrast)
        check_integer("candidates", candidates, 1)
        check_number("temperature", temperature, MIN_TEMPERATURE)
        self.n_users, self.n_items = users, items
        self.contrast, self.candidates, self.temperature = contrast, candidates, temperature
        self.score = score

    def vectors(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors ``(count, width)`` of ``users`` and ``items``, distinct and ascending int64 ids each."""
        raise NotImplementedError

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the batch mean of the BPR loss plus ``contrast`` times InfoNCE.

        ``batch`` has ``users``, ``positives`` and ``negatives``, int64 ``(batch,)`` each. BPR (Rendle et
        al., 2009, https://arxiv.org/abs/1205.2618) compares the scores of the positive and the negative
        item. InfoNCE (van den Oord et al., 2018, https://arxiv.org/abs/1807.03748) compares the cosine
        of user and positive item with those of the candidates: the distinct positive items of the first
        ``candidates`` samples of the global batch, the same on any number of devices.
        """
        items = torch.stack([batch["positives"], batch["negatives"]])
        user_ids, user_rows = compact_ids(batch["users"], self.n_users)
        item_ids, item_rows = compact_ids(items, self.n_items)
        return self.loss_from_vectors(*self.vectors(user_ids, item_ids), user_rows, item_rows, items[0])

    def loss_from_vectors(
        self, users: Tensor, items: Tensor, user_rows: Tensor, item_rows: Tensor, positives: Tensor
    ) -> Tensor:
        """Return the loss of samples whose vectors are rows of ``users`` and ``items``, ``(any, width)`` each.

        ``user_rows (batch,)`` are rows of users, ``item_rows (2, batch)`` those of positive and negative
        items, and ``positives (batch,)`` the ids of the positive items.
        """
        user, tower = self.score.user_tower(users).select(user_rows), self.score.item_tower(items)
        positive, negative = map(tower.select, item_rows)
        products = self.score.dot(user, positive)
        # With one MLP call per item, the gradient of what moves both scores alike is exactly 0, so AdamW makes no step.
        difference = self.score.dot(user, negative) + self.score.mlp(user, negative)
        difference = difference - products - self.score.mlp(user, positive)
        loss = softplus(difference).mean()
        if self.contrast:
            contrast = self._contrastive_loss(users, items, user_rows, item_rows[0], positives, products)
            loss = loss + self.contrast * contrast.mean()
        return loss

    def _contrastive_loss(
        self, users: Tensor, items: Tensor, user_rows: Tensor, item_rows: Tensor, positives: Tensor, products: Tensor
    ) -> Tensor:
        """Return InfoNCE of each sample, ``(batch,)``; ``products`` are those of user and positive item.

        The sum over the candidates is computed once per user, and the positive item is added where it
        is no candidate. Cosines are at most 1, so no maximum is subtracted before the exponential.
        """
        users, items = users.float(), items.float()
        user_norms, item_norms = _norms(users), _norms(items)
        candidates, ids = _global_candidates(items, item_rows, positives, self.candidates, self.training)
        scaled = candidates / (_norms(candidates) * self.temperature).unsqueeze(1)
        log_sums = ((users / user_norms.unsqueeze(1)) @ scaled.T).float().exp().sum(1).log()[user_rows]
        own = products.float() / (user_norms[user_rows] * item_norms[item_rows] * self.temperature)
        is_candidate = _mark(ids, self.n_items, torch.bool)[positives]
        return torch.where(is_candidate, log_sums - own, softplus(log_sums - own))

    @torch.no_grad()
    def scorer(self) -> PairScorer:
        """Return the scorer of the present weights, with the towers of all users and items."""
        with preserve_train_modes(self):
            self.eval()
            users, items = self.vectors(*(torch.arange(n, device=self._device) for n in (self.n_users, self.n_items)))
            towers = self.score.user_tower(users), self.score.item_tower(items)
        return PairScorer(self.score, *(TowerOutput(tower.dot.float(), tower.hidden.float()) for tower in towers))

    def score_all(self, users: Tensor) -> Tensor:
        """Return the scores of ``users``, int64 ``(count,)``, with every item; for several calls keep a ``scorer()``."""
        return self.scorer().score_all(users)

    def predict(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the scores of pairs, int64 ``(count,)`` each: ``(count,)``."""
        return self.scorer().score_pairs(users, items)

    def recommend(
        self, user: int, k: int = 10, seen: Iterable[int] = (), scorer: PairScorer | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the ids and scores of the best ``k`` items for ``user`` that are not in ``seen``, best first.

        There are fewer if fewer are left. ``scorer`` is a ``scorer()`` to use again.
        """
        if not 0 <= user < self.n_users:
            raise invalid_option("user", user, f"from 0 to {self.n_users - 1}")
        check_integer("k", k, 1)
        scores = (scorer or self.scorer()).score_all(torch.tensor([user]))[0]
        excluded = sorted(set(seen))
        for wrong in (item for item in excluded if not 0 <= item < self.n_items):
            raise invalid_option("seen item", wrong, f"from 0 to {self.n_items - 1}")
        scores[torch.tensor(excluded, dtype=torch.int64, device=scores.device)] = -torch.inf
        best = scores.topk(min(k, self.n_items - len(excluded)))
        return best.indices.cpu(), best.values.cpu()

    @property
    def _device(self) -> torch.device:
        return self.score.out_layer.weight.device


class NCF(Recommender):
    """Neural collaborative filtering (He et al., WWW 2017, https://arxiv.org/abs/1708.05031), by ids alone.

    As in NeuMF, the product and the MLP have separate embeddings; the product has no weights.
    """

    def __init__(self, users: int, items: int, *, embedding_size: int = 64, seed: int = 0) -> None:
        with preserve_rng_state():
            torch.default_generator.manual_seed(seed)
            super().__init__(users, items, PairScore(embedding_size, embedding_size), contrast=0.0)
            self.user_ids = id_embedding(users, 2 * embedding_size)
            self.item_ids = id_embedding(items, 2 * embedding_size)

    def vectors(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(users, 2 * embedding_size)`` and ``(items, 2 * embedding_size)``."""
        return self.user_ids(users), self.item_ids(items)


def id_embedding(count: int, size: int) -> nn.Embedding:
    """Return an embedding of ``count`` ids, with small random weights."""
    embedding = nn.Embedding(count, size)
    nn.init.normal_(embedding.weight, std=0.1)
    return embedding


def compact_ids(ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return ascending ids that include ``ids``, and the row of each of ``ids`` in them.

    These are the distinct ids, or all ``count`` where most occur anyway.
    """
    if ids.numel() > 2 * count:
        return torch.arange(count, device=ids.device), ids
    marked = _mark(ids, count, torch.int64)
    return marked.nonzero().squeeze(1), (marked.cumsum(0) - 1)[ids]


def _mark(ids: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor ``(count,)`` that is 1 at each of ``ids`` and 0 elsewhere."""
    marked = torch.zeros(count, dtype=dtype, device=ids.device)
    marked[ids] = 1
    return marked


def _norms(vectors: Tensor) -> Tensor:
    """Return the length of each vector, ``(count,)``, at least 1e-6."""
    norms: Tensor = vectors.norm(dim=1)
    return norms.clamp_min(1e-6)


def _global_candidates(
    items: Tensor, item_rows: Tensor, positives: Tensor, count: int, training: bool
) -> tuple[Tensor, Tensor]:
    """Return the vectors and ids of the distinct positive items of the global batch's first ``count`` samples.

    Each rank has the vectors of one shard; all-reduces bring the others' and their gradients.
    """
    world = duoka.current_world()
    if world.size == 1 or not training:
        ids, inverse = torch.unique(positives[:count], return_inverse=True)
        rows = torch.empty_like(ids).scatter_(0, inverse, item_rows[:count])
        return items[rows], ids
    sent = torch.zeros(world.size, count, dtype=torch.int64, device=positives.device)
    sent[world.rank, : len(positives)] = positives[:count] + 1
    received = world.all_reduce(sent).flatten()
    samples = received.nonzero().squeeze(1)[:count]  # the first ones, in the order of ranks
    ids, inverse = torch.unique(received[samples] - 1, return_inverse=True)
    first = torch.full_like(ids, world.size * count).scatter_reduce(0, inverse, samples, "amin")
    own = (first // count == world.rank).nonzero().squeeze(1)
    vectors = torch.zeros(len(ids), items.shape[1], device=items.device, dtype=items.dtype)
    return _AllReduceSum.apply(vectors.index_copy(0, own, items[item_rows[first[own] % count]])), ids


class _AllReduceSum(torch.autograd.Function):
    """A sum over ranks whose gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # noqa: ARG004
        return duoka.current_world().all_reduce(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        return duoka.current_world().all_reduce(grad.contiguous())
