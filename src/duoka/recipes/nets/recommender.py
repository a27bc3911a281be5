"""Recommenders of films: embeddings of ids joined with what a GPT-2 reads of descriptions, and one that knows ids only.

``GPT2Recommender`` concatenates the two, ``GPT2RecommenderEnhanced`` lets the id ask the fields of the text (cross-attention),
``NCF`` is the baseline. All are trained by ``loss(batch)`` and asked by ``score_all``, ``predict`` and ``recommend``.
`gpt2_text` has the text side, `scoring` the score of a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, softplus

import duoka
from duoka.errors import ConfigError
from duoka.recipes.nets.attention import check_heads
from duoka.recipes.nets.gpt2_text import Lora, Prepared, Side, width_of
from duoka.recipes.nets.scoring import Half, Score, Scorer

__all__ = ["NCF", "GPT2Recommender", "GPT2RecommenderEnhanced", "Recommender", "TwoRates", "carry_over"]


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
        self, users: int, items: int, score: Score, *, contrast: float, candidates: int = 256, temperature: float = 0.2
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
        users, films = batch["users"], torch.cat([batch["positives"], batch["negatives"]])
        (some_users, user_at), (some_items, item_at) = _distinct(users, self.n_users), _distinct(films, self.n_items)
        vectors = self.vectors(some_users, some_items)
        return self.loss_of(*vectors, user_at, item_at, batch["positives"])

    def loss_of(self, users: Tensor, items: Tensor, user_at: Tensor, item_at: Tensor, films: Tensor) -> Tensor:
        """Return what ``loss`` does, of vectors that are there already.

        Args:
            users: vectors ``(any, width)``.
            items: the same of films.
            user_at: where in ``users`` each sample's is, ``(batch,)``.
            item_at: where in ``items`` the films of all samples are, the positive ones and then the negative, ``(2 * batch,)``.
            films: the numbers of the positive films, ``(batch,)``.

        """
        positives, negatives = item_at.chunk(2)
        user, item_half = self.score.user_half(users).of(user_at), self.score.item_half(items)
        better, worse = item_half.of(positives), item_half.of(negatives)
        products = self.score.products(user, better)
        difference = products - self.score.products(user, worse)
        difference = difference + self.score.network(user, better) - self.score.network(user, worse)
        loss = softplus(-difference).mean()
        if self.contrast:
            loss = loss + self.contrast * self._contrast(users, items, user_at, positives, films, products).mean()
        return loss

    def _contrast(
        self, users: Tensor, items: Tensor, user_at: Tensor, item_at: Tensor, films: Tensor, products: Tensor
    ) -> Tensor:
        """Return InfoNCE of each sample, ``(batch,)``, whose product of user and film is known already.

        The sum over the candidates is computed once a user, not once a sample; the user's own film is added to it where it is
        not among them. Cosines are at most 1, so the sum needs no maximum taken out first.
        """
        users, items = users.float(), items.float()
        (user_directions, user_lengths), (item_directions, item_lengths) = _polar(users), _polar(items)
        candidates, names = _candidates(item_directions, item_at, films, self.candidates, self.training)
        among = (user_directions @ (candidates / self.temperature).T).float().exp().sum(1).log()[user_at]
        own = products.float() / (user_lengths[user_at] * item_lengths[item_at] * self.temperature)
        return torch.where(_is_in(films, names, self.n_items), among - own, softplus(among - own))

    # -- asking --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def scorer(self) -> Scorer:
        """Return the model at rest: every user's and film's half of the score's first layer, each computed once."""
        was_training = self.training
        self.eval()
        users, items = self.vectors(
            *(torch.arange(count, device=self._device) for count in (self.n_users, self.n_items))
        )
        halves = self.score.user_half(users), self.score.item_half(items)
        self.train(was_training)
        return Scorer(self.score, *(Half(half.product.float(), half.first.float()) for half in halves))

    def score_all(self, users: Tensor) -> Tensor:
        """Return the scores of ``users``, int64 ``(count,)``, with every film: ``(count, films)``.

        For several calls keep ``model.scorer()`` and ask it.
        """
        return self.scorer().all(users)

    def predict(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the scores of pairs of users and films, int64 ``(count,)`` each: ``(count,)``."""
        return self.scorer().pairs(users, items)

    def recommend(self, user: int, k: int = 10, seen: Iterable[int] = ()) -> tuple[Tensor, Tensor]:
        """Return the best films for ``user`` and their scores, best first; fewer than ``k`` where there are no more.

        Args:
            user: the user's number.
            k: how many films.
            seen: films to leave out.

        Raises:
            ConfigError: there is no such user or film, or ``k`` is not a positive number.

        """
        if not 0 <= user < self.n_users or k < 1:
            raise ConfigError(f"user={user}, k={k}: users are 0 to {self.n_users - 1}, and k is 1 or more")
        scores = self.score_all(torch.tensor([user]))[0]
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
        with _seeded(seed):
            super().__init__(users, items, Score(embedding_size, embedding_size), contrast=0.0)
            self.user_ids = _embedding(users, 2 * embedding_size)
            self.item_ids = _embedding(items, 2 * embedding_size)

    def vectors(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(users, 2 * embedding_size)`` and ``(items, 2 * embedding_size)``."""
        return self.user_ids(users), self.item_ids(items)


class _TextRecommender(Recommender):
    """What the two with texts share: the text side, and ids that are sometimes hidden so that texts must speak for them."""

    joining: type[nn.Module]

    def __init__(
        self,
        texts: Prepared,
        *,
        embedding_size: int = 64,
        use_cache: bool = True,
        train_text: str | None = None,
        lora: Lora | None = None,
        heads: int = 4,
        contrast: float = 0.1,
        candidates: int = 256,
        temperature: float = 0.2,
        id_dropout: float = 0.1,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        train_text = train_text or ("frozen" if use_cache else "lora")
        _check(use_cache, train_text, id_dropout)
        check_heads(embedding_size, heads)
        counts = len(texts.users.pieces), len(texts.items.pieces)
        with _seeded(seed):
            score = Score(embedding_size)
            options = {"contrast": contrast, "candidates": candidates, "temperature": temperature}
            super().__init__(*counts, score, **options)  # type: ignore[arg-type]
            self.id_dropout = id_dropout
            width = width_of(texts.network)
            self.user = _Joined(counts[0], texts.users, width, embedding_size, self.joining, heads, salt=1)
            self.item = _Joined(counts[1], texts.items, width, embedding_size, self.joining, heads, salt=2)
            self.draws: Tensor
            self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
            self.encoder = None if use_cache else texts.encoder(train_text, lora)  # the last part: see ``TwoRates``
        if use_cache:
            self.user.keep(texts.vectors(device))
            self.item.keep(texts.vectors(device))

    def hide(self, *, users: Tensor | None = None, items: Tensor | None = None) -> None:
        """Let texts alone speak for these from now on: films that nobody has rated yet have no id worth knowing."""
        for side, hidden in ((self.user, users), (self.item, items)):
            if hidden is not None:
                side.hidden[hidden.to(side.hidden.device)] = True

    def vectors(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(users, embedding_size)`` and ``(items, embedding_size)``."""
        if self.training:
            self.draws += 1
        (user_texts, user_places), (item_texts, item_places) = self._texts(users, items)
        dropout = self.id_dropout if self.training else 0.0
        joined_users, _ = self.user(users, user_texts, user_places, self.draws, dropout)
        joined_items, _ = self.item(items, item_texts, item_places, self.draws, dropout)
        return joined_users, joined_items

    @torch.no_grad()
    def attention(self, *, users: Tensor | None = None, items: Tensor | None = None) -> Tensor:
        """Return how much the id and each field of the text weigh, ``(count, 1 + fields)``, of ``users`` or of ``items``.

        Raises:
            ConfigError: not one of the two was given, or this model does not weigh.

        """
        if (users is None) == (items is None):
            raise ConfigError("attention() is asked for users= or for items=, one of them")
        wanted = users if users is not None else items
        assert wanted is not None  # one of them was given
        wanted, none = wanted.to(self._device), torch.zeros(0, dtype=torch.int64, device=self._device)
        some, at = torch.unique(wanted, return_inverse=True)
        user_side, item_side = self._texts(*((some, none) if users is not None else (none, some)))
        side, found = (self.user, user_side) if users is not None else (self.item, item_side)
        _, weights = side(some, *found, self.draws, 0.0)
        if weights is None:
            raise ConfigError(f"{type(self).__name__} does not weigh id and text; GPT2RecommenderEnhanced does")
        return weights.float()[at]  # type: ignore[no-any-return]

    def _texts(self, users: Tensor, items: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return, a side, the vectors of distinct pieces and where in them each one's fields are, ``(count, fields)``."""
        if self.encoder is None:
            return (self.user.kept, self.user.pieces[users]), (self.item.kept, self.item.pieces[items])
        sides = [torch.unique(s.pieces[w], return_inverse=True) for s, w in ((self.user, users), (self.item, items))]
        (user_some, user_at), (item_some, item_at) = sides
        found = self.encoder(torch.cat([user_some + self.user.first, item_some + self.item.first]))
        return (found[: len(user_some)], user_at), (found[len(user_some) :], item_at)


class _Joined(nn.Module):
    """One side, users or films: embeddings of ids, the projection of their texts, and what joins them."""

    def __init__(
        self, count: int, side: Side, width: int, size: int, joining: type[nn.Module], heads: int, *, salt: int
    ) -> None:
        super().__init__()
        self.ids = _embedding(count + 1, size)
        """The last one stands for an id that is hidden."""
        self.project = nn.Linear(width, size)
        self.join = joining(size, side.fields, heads)
        self.first, self.count, self.salt = side.first, side.count, salt
        self.pieces = side.pieces
        """No buffer, since DDP sends buffers at every step."""
        self.hidden: Tensor
        self.register_buffer("hidden", torch.zeros(count, dtype=torch.bool))
        self.kept: Any = None
        """The texts' vectors in cached mode: a parameter that is not trained, since buffers are sent at every step."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.pieces = fn(self.pieces)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def keep(self, vectors: Tensor) -> None:
        """Use these vectors, of all pieces of both sides, for ever."""
        own = vectors[self.first : self.first + self.count].clone()
        self.kept = nn.Parameter(own, requires_grad=False)

    def forward(
        self, wanted: Tensor, texts: Tensor, places: Tensor, draw: Tensor, dropout: float
    ) -> tuple[Tensor, Tensor | None]:
        """Return the vectors of ``wanted``, ``(count, size)``, and how much id and fields weighed in them, if anything did."""
        hidden = self.hidden[wanted]
        if dropout:
            hidden = hidden | (_chance(wanted, draw, self.salt) < dropout)
        ids = self.ids(torch.where(hidden, len(self.hidden), wanted))
        return self.join(ids, self.project(texts), places)  # type: ignore[no-any-return]


class _Concatenation(nn.Module):
    """Id and the mean of the text's fields, side by side, through one layer."""

    def __init__(self, size: int, fields: int, heads: int) -> None:  # noqa: ARG002 - as ``_CrossAttention``
        super().__init__()
        self.layer = nn.Linear((1 + fields) * size, size)

    def forward(self, ids: Tensor, texts: Tensor, places: Tensor) -> tuple[Tensor, None]:
        """Return ``(count, size)`` of ids of that shape, ``texts (pieces, size)`` and ``places (count, fields)`` in them."""
        return self.layer(torch.cat([ids, embedding(places, texts).flatten(1)], 1)), None


class _CrossAttention(nn.Module):
    """The id asks itself and the fields of the text, and adds what it gets to what it is."""

    def __init__(self, size: int, fields: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.asking = nn.Linear(size, size)
        self.answering = nn.Linear(size, 2 * size)
        self.field = nn.Parameter(torch.randn(1 + fields, size) * size**-0.5)
        """What tells the id and each field apart when they are asked."""
        self.outward = nn.Linear(size, size)

    def forward(self, ids: Tensor, texts: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(count, size)`` and the weights ``(count, 1 + fields)``, means over the heads; arguments as above."""
        question = self.asking(ids) * (ids.shape[1] // self.heads) ** -0.5
        own_key, own_value = self.answering(ids).chunk(2, 1)
        keys, values = (embedding(places, part) for part in self.answering(texts).chunk(2, 1))
        asked = [
            self._by_head(question * own_key).sum(2),
            self._by_head(question.unsqueeze(1) * keys).sum(3).flatten(1),
        ]
        asked_fields = torch.unflatten(torch.cat(asked, 1) + question @ self._fields(), 1, (-1, self.heads))
        weights = asked_fields.softmax(1)
        own, others = weights.unsqueeze(3).tensor_split((1,), 1)
        got = own.squeeze(1) * self._by_head(own_value) + (others * self._by_head(values)).sum(1)
        return ids + self.outward(got.flatten(1)), weights.mean(2)

    def _fields(self) -> Tensor:
        """Return what turns a question into its products with the fields' vectors, ``(size, (1 + fields) * heads)``."""
        apart = self._by_head(self.field).unsqueeze(3) * torch.eye(self.heads, device=self.field.device).unsqueeze(1)
        return apart.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)

    def _by_head(self, vectors: Tensor) -> Tensor:
        return torch.unflatten(vectors, -1, (self.heads, -1))


class GPT2Recommender(_TextRecommender):
    """Joins ids and texts by concatenation.

    Args:
        texts: what ``gpt2_text.prepare`` returned.
        embedding_size: width of the vectors.
        use_cache: whether texts are encoded once, here, and stay as they are; else in every step, with gradients.
        train_text: ``"frozen"``, ``"lora"`` or ``"full"``; ``None`` is frozen where ``use_cache``, else LoRA.
        lora: its sizes.
        heads: of the attention, where there is one.
        contrast: weight of the contrastive term.
        candidates: see ``loss``.
        temperature: of the contrastive term.
        id_dropout: share of the ids that are hidden in each step of training, so that texts learn to stand alone. Which
            ones is a function of the step and the id, so that it is the same on any number of devices.
        seed: decides the first weights.
        device: where texts are encoded for the cache.

    Raises:
        ConfigError: texts are to be cached and trained; or a value that cannot be.

    """

    joining = _Concatenation


class GPT2RecommenderEnhanced(_TextRecommender):
    """Joins ids and texts by attention: the id asks which fields of the text matter. Arguments are ``GPT2Recommender``'s."""

    joining = _CrossAttention


@dataclass(frozen=True)
class TwoRates:
    """An optimiser with a rate of its own for GPT-2: ``Trainer(..., optimizer=TwoRates.of(model, lr=5e-4, text_lr=5e-5))``."""

    lr: float
    text_lr: float
    text_parameters: int
    """How many of the model's trained parameters, the last ones, are GPT-2's."""
    weight_decay: float = 0.01

    @classmethod
    def of(cls, model: nn.Module, *, lr: float, text_lr: float, weight_decay: float = 0.01) -> TwoRates:
        """Return the one for ``model``."""
        encoder = getattr(model, "encoder", None)
        count = 0 if encoder is None else sum(parameter.requires_grad for parameter in encoder.parameters())
        return cls(lr, text_lr, count, weight_decay)

    def __call__(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Return AdamW over ``parameters``, the trained ones in the model's order."""
        own = len(parameters) - self.text_parameters
        groups = [{"params": parameters[:own], "lr": self.lr}, {"params": parameters[own:], "lr": self.text_lr}]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, weight_decay=self.weight_decay, fused=True)


def carry_over(source: _TextRecommender, target: _TextRecommender) -> None:
    """Give ``target`` the weights of ``source`` but for the text encoder's: from the cached stage to the dynamic one.

    Raises:
        ConfigError: they are not of one kind and size.

    """
    own = {name: value for name, value in target.state_dict().items() if not name.startswith("encoder.")}
    theirs = {name: value for name, value in source.state_dict().items() if not name.endswith(".kept")}
    theirs = {name: value for name, value in theirs.items() if not name.startswith("encoder.")}
    own = {name: value for name, value in own.items() if not name.endswith(".kept")}
    odd = {name for name in own.keys() | theirs.keys() if name not in own or name not in theirs}
    odd |= {name for name in own.keys() & theirs.keys() if own[name].shape != theirs[name].shape}
    if odd:
        raise ConfigError(
            f"the two models differ in {', '.join(sorted(odd)[:3])}; build both with the same options and texts"
        )
    target.load_state_dict(theirs, strict=False)


def _check(use_cache: bool, train_text: str, id_dropout: float) -> None:
    if use_cache and train_text != "frozen":
        raise ConfigError(
            f"use_cache=True with train_text={train_text!r} would train nothing of the text encoder: cached vectors were "
            "computed before, and no gradient reaches what computed them; give use_cache=False, or train_text='frozen'"
        )
    if not 0 <= id_dropout < 1:
        raise ConfigError(f"id_dropout={id_dropout} has to be a share, from 0 to below 1")


def _distinct(wanted: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return numbers that include ``wanted``, ascending, and where in them each is; all where most are wanted anyway."""
    if len(wanted) > 2 * count:
        return torch.arange(count, device=wanted.device), wanted
    named = torch.zeros(count, dtype=torch.int64, device=wanted.device)
    named[wanted] = 1
    return named.nonzero().squeeze(1), (named.cumsum(0) - 1)[wanted]


def _is_in(numbers: Tensor, names: Tensor, count: int) -> Tensor:
    """Whether each of ``numbers``, below ``count``, is one of ``names``."""
    named = torch.zeros(count, dtype=torch.bool, device=numbers.device)
    named[names] = True
    return named[numbers]


def _polar(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return directions of length 1, and lengths ``(count,)``."""
    lengths = vectors.norm(dim=1).clamp_min(1e-6)
    return vectors / lengths.unsqueeze(1), lengths


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


def _chance(numbers: Tensor, draw: Tensor, salt: int) -> Tensor:
    """Return a number from 0 to below 1 for each of ``numbers``: a function of it, the draw and the salt alone.

    The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
    """
    mixed = (numbers + 1) * -7046029254386353131 + (draw + 1) * 2862933555777941757 + salt * 3935559000370003845
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    mixed = mixed ^ ((mixed >> 31) & ((1 << 33) - 1))
    return (mixed & (2**24 - 1)).float() / 2**24


def _embedding(count: int, size: int) -> nn.Embedding:
    embedding = nn.Embedding(count, size)
    nn.init.normal_(embedding.weight, std=0.1)
    return embedding


def _seeded(seed: int) -> Any:
    """Draw first weights from ``seed`` inside the block, and leave the user's generator as it was."""
    return _Seeded(seed)


class _Seeded:
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.before = torch.random.get_rng_state()
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        torch.random.set_rng_state(self.before)
