"""Training steps with GPT-2 in the loop: packed prefixes next to three padded columns of texts.

Both ways train one model (LoRA on a GPT-2, cross-attention, BPR and InfoNCE) on the same batches of
256 users with a seen and an unseen film each. Texts repeat as often as MovieLens-1M's; titles have one
to twelve words. The reference tokenizes the batch's users, positive and negative films, pads each
column to its longest text, and calls GPT-2 once per column, as `transformers` documents. The
benchmark first compares both ways' gradients, then times their steps in turn.

    python benchmarks/recommend_dynamic.py [--seconds 60] [--threads 2] [--pretrained none]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from duoka.recipes.models.gpt2_recommender import GPT2RecommenderEnhanced, two_lr_groups
from duoka.recipes.models.gpt2_text_encoder import TokenizedTexts, tokenize_texts

USERS, FILMS, BATCH = 6040, 3883, 256
GENDERS = {"female": 1709, "male": 4331}
AGES = {
    "under 18": 222,
    "18 to 24": 1103,
    "25 to 34": 2096,
    "35 to 44": 1193,
    "45 to 49": 550,
    "50 to 55": 496,
    "56 or more": 380,
}
JOBS = {
    "other": 711, "academic or educator": 528, "artist": 267, "clerical or administrative": 173, "college student": 759,
    "customer service": 112, "doctor": 236, "executive": 679, "farmer": 17, "homemaker": 92, "pupil": 195, "lawyer": 129,
    "programmer": 388, "retired": 142, "sales or marketing": 302, "scientist": 144, "self-employed": 241, "technician": 502,
    "craftsman": 70, "unemployed": 72, "writer": 281,
}  # fmt: skip
GENRES = {
    "Drama": 1603, "Comedy": 1200, "Action": 503, "Thriller": 492, "Romance": 471, "Horror": 343, "Adventure": 283,
    "Sci-Fi": 276, "Children's": 251, "Crime": 211, "War": 143, "Documentary": 127, "Musical": 114, "Mystery": 106,
    "Animation": 105, "Fantasy": 68, "Western": 68, "Film-Noir": 44,
}  # fmt: skip
GENRES_OF_A_FILM = {1: 2025, 2: 1322, 3: 421, 4: 100, 5: 14, 6: 1}
"""Counts in MovieLens-1M; here all attributes are independent."""
SYLLABLES = "ba|ka|ri|to|men|sol|ver|da|lin|go|ter|mar|pe|shu|ron|ce|fa|il|mo|ny|qua|re|sta|tri|u|vi|wen|xo|zar|lo"
Step = Callable[[Mapping[str, Tensor]], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pretrained", default="none")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for line in compare(given.seconds, given.pretrained):
        print(line)


def compare(seconds: float, pretrained: str = "none") -> list[str]:
    """Compare both ways' gradients and step times; return lines of text."""
    users, films = descriptions()
    texts = tokenize_texts(users, films, pretrained=pretrained)
    model = GPT2RecommenderEnhanced(texts, use_cache=False)
    draw = batches(seed=0)
    warm = trained(model, model.loss)  # LoRA's first gradients are zero for half of its weights
    for _ in range(5):
        warm(next(draw))
    ours, theirs = model, PaddedColumns(copy.deepcopy(model), texts, users, films)
    apart, relative = difference(ours, theirs, next(draw))
    steps = [trained(ours, ours.loss), trained(theirs.model, theirs.loss)]
    times: list[list[float]] = [[], []]
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times[1]) < 5:
        batch = next(draw)
        for number in (0, 1) if len(times[0]) % 2 else (1, 0):
            began = time.perf_counter()
            steps[number](batch)
            times[number].append(time.perf_counter() - began)
    rates = [BATCH / statistics.median(each) for each in times]
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    return [
        f"largest difference of a gradient: {apart:.1e}; of the largest one of its parameter, {relative:.1e}",
        f"three padded columns           {rates[1]:8,.0f} samples/s",
        f"each distinct prefix once      {rates[0]:8,.0f} samples/s",
        f"ratio {ratio:.2f}, median of {len(times[0])} steps of {BATCH} samples each, {torch.get_num_threads()} threads",
    ]


class PaddedColumns:
    """The same model, which tokenizes, pads and encodes three columns of texts in every step."""

    def __init__(
        self, model: GPT2RecommenderEnhanced, texts: TokenizedTexts, users: list[str], films: list[str]
    ) -> None:
        self.model, self.tokenize, self.users, self.films = model, texts.tokenize, users, films
        self.network = model.encoder.network

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        model = self.model
        model.step += 1
        users = self._column(model.user, self.users, batch["users"])
        films = torch.cat([self._column(model.item, self.films, batch[name]) for name in ("positives", "negatives")])
        rows = torch.arange(2 * len(batch["users"])).view(2, -1)
        return model.loss_from_vectors(users, films, rows[0], rows, batch["positives"])

    def _column(self, side: Any, texts: list[str], wanted: Tensor) -> Tensor:
        fields = self._encoded([texts[number] for number in wanted.tolist()])
        rows = torch.arange(fields.shape[0] * fields.shape[1]).view(fields.shape[:2])
        return side(wanted, fields.flatten(0, 1), rows, self.model.step, self.model.id_dropout)[0]

    def _encoded(self, texts: list[str]) -> Tensor:
        """Return the masked mean of each field's states, ``(texts, fields, width)``."""
        lines = [text.split("\n") for text in texts]
        flat = [line if number == 0 else "\n" + line for text in lines for number, line in enumerate(text)]
        found = self.tokenize(flat)
        fields = np.array([len(line) for line in found]).reshape(len(texts), -1)
        ends = fields.cumsum(1)
        inside = np.arange(ends.max()) < ends[:, -1:]
        tokens = np.zeros(inside.shape, dtype=np.int64)
        tokens[inside] = list(itertools.chain.from_iterable(found))
        mask = torch.from_numpy(inside).long()
        output = self.network(input_ids=torch.from_numpy(tokens), attention_mask=mask, use_cache=False)
        place = np.arange(tokens.shape[1])
        own = (place >= (ends - fields)[:, :, None]) & (place < ends[:, :, None])
        means = torch.from_numpy(own).float() @ output.last_hidden_state / torch.from_numpy(fields).unsqueeze(2)
        return layer_norm(means, means.shape[-1:])


def descriptions(seed: int = 0) -> tuple[list[str], list[str]]:
    """Return random texts of users and films, one field per line."""
    draw, syllables = random.Random(seed), SYLLABLES.split("|")
    words = ["".join(draw.choices(syllables, k=draw.choice((1, 2, 2, 3)))).title() for _ in range(2500)]
    weights = [1 / (rank + 3) for rank in range(len(words))]

    def drawn(shares: Mapping[Any, int]) -> Any:
        return draw.choices(list(shares), list(shares.values()))[0]

    users = [f"{drawn(GENDERS)}\naged {drawn(AGES)}\n{drawn(JOBS)}" for _ in range(USERS)]
    films = []
    for _ in range(FILMS):
        genres, wanted = set[str](), drawn(GENRES_OF_A_FILM)
        while len(genres) < wanted:
            genres.add(drawn(GENRES))
        title = " ".join(draw.choices(words, weights, k=min(12, max(1, round(draw.lognormvariate(1.0, 0.6))))))
        films.append(f"{', '.join(sorted(genres))}\n{title} ({draw.randint(1930, 2000)})")
    return users, films


def batches(seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches: positive films by popularity, users and negative films uniformly."""
    random = np.random.default_rng(seed)
    popularity = 1 / (np.arange(FILMS) + 100.0)
    while True:
        columns = {
            "users": random.integers(0, USERS, BATCH),
            "positives": random.choice(FILMS, BATCH, p=popularity / popularity.sum()),
            "negatives": random.integers(0, FILMS, BATCH),
        }
        yield {name: torch.from_numpy(column) for name, column in columns.items()}


def trained(model: nn.Module, loss: Step) -> Step:
    """Return a training step of ``model``."""
    build_optimizer = two_lr_groups(model, lr=5e-4, text_lr=5e-5)
    optimizer = build_optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])

    def step(batch: Mapping[str, Tensor]) -> Tensor:
        value = loss(batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value

    return step


def difference(
    ours: GPT2RecommenderEnhanced, theirs: PaddedColumns, batch: Mapping[str, Tensor]
) -> tuple[float, float]:
    """Return the largest difference of both ways' gradients: absolute, and relative to the parameter's largest gradient."""
    found = []
    for model, loss in ((ours, ours.loss), (theirs.model, theirs.loss)):
        loss(batch).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    apart = [(float((a - b).abs().max()), float(b.abs().max())) for a, b in zip(*found, strict=True)]
    return max(one for one, _ in apart), max(one / max(largest, 1e-6) for one, largest in apart)


if __name__ == "__main__":
    main()
