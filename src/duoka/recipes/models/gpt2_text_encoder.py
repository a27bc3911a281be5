"""Descriptions of users and films as vectors: tokenised once, each distinct piece encoded once by a GPT-2.

A description is one string; its fields stand on lines of their own (``"Comedy, Drama\\nToy Story (1995)"``), and each
field becomes one vector: the mean of GPT-2's last states over the field's tokens, which have read the fields before it. As
nothing is padded, a vector does not depend on what else is encoded with it. Fields that many texts share should come first,
since common beginnings are computed once (`packing`). `recommender` joins the vectors with embeddings of ids.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, layer_norm

from duoka.errors import ConfigError, DataError
from duoka.log import logger
from duoka.recipes.models.gpt2_packed_forward import states
from duoka.recipes.models.prefix_packing import pack
from duoka.utils.imports import import_optional

__all__ = ["TRAINING", "Lora", "TextSpans", "TokenizedTexts", "EntityTexts", "TextEncoder", "prepare", "width_of"]

TRAINING = ("frozen", "lora", "full")
"""How a text encoder may be trained: not at all, by low-rank additions to its projections, or all of it."""
Tokenize = Callable[[list[str]], list[list[int]]]
ROW_LENGTH = 32
"""Tokens in a row that GPT-2 is given; a longer text makes rows of its own length."""
ROWS_AT_ONCE = 64
"""Rows in one pass where no gradient is asked for, which bounds the memory that encoding everything takes."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adaptation (Hu et al., 2021, https://arxiv.org/abs/2106.09685), by peft.

    Its dropout is off: a text that is encoded once for many samples must mean the same to all of them.
    """

    rank: int = 8
    alpha: float = 32.0
    """What the addition is multiplied by, over the rank."""
    layers: tuple[str, ...] = ("c_attn", "c_proj")
    """The projections of GPT-2 that get an addition."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not self.layers:
            raise ConfigError(f"{self} has to have a rank of 1 or more, alpha above 0 and at least one layer")


@dataclass(frozen=True)
class EntityTexts:
    """The texts of the users, or of the films."""

    pieces: Tensor
    """Which pieces each one's text consists of, ``(entities, fields)``, int64, from 0."""
    first: int
    """Where this side's pieces begin among all."""
    count: int
    """How many distinct pieces it has."""

    @property
    def fields(self) -> int:
        """How many fields a text has."""
        return self.pieces.shape[1]


@dataclass(frozen=True)
class TextSpans:
    """All distinct fields of all texts, tokenised, each with what stands before it; sorted within a side."""

    tokens: np.ndarray[Any, np.dtype[np.int64]]
    """``(pieces, longest)``, -1 after a piece's end."""
    starts: np.ndarray[Any, np.dtype[np.int64]]
    """``(pieces,)``; tokens before are read only."""
    ends: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return int(self.tokens.shape[1])


@dataclass
class TokenizedTexts:
    """Texts that are tokenised, and the GPT-2 that reads them: made once by ``prepare``, shared by models."""

    pieces: TextSpans
    users: EntityTexts
    items: EntityTexts
    network: nn.Module = field(repr=False)
    """``transformers.GPT2Model``, without dropout, untrained by us."""
    tokenize: Tokenize = field(repr=False)
    """From lines of text to their tokens; a field after the first begins with its line break."""
    name: str = "none"
    """What ``prepare`` was asked for."""
    _vectors: Tensor | None = field(default=None, repr=False)

    def encoder(self, training: str, lora: Lora | None = None) -> TextEncoder:
        """Return an encoder of its own, to be trained as ``training`` says."""
        return TextEncoder(self.pieces, copy.deepcopy(self.network), training, lora or Lora())

    def vectors(self, device: torch.device | str = "cpu") -> Tensor:
        """Return every piece's vector before training, ``(pieces, width)``, on the host; computed when first asked for."""
        if self._vectors is None:
            encoder = TextEncoder(self.pieces, self.network, "frozen", Lora()).to(device)
            with torch.no_grad():
                self._vectors = encoder(torch.arange(len(self.pieces))).cpu()
            self.network.to("cpu")
        return self._vectors


class TextEncoder(nn.Module):
    """Encodes pieces of text with a GPT-2, each by itself and exactly, whatever else is encoded with it.

    Args:
        pieces: what there is to encode.
        network: the GPT-2; it is changed in place.
        training: one of ``TRAINING``.
        lora: the additions, where ``training`` is ``"lora"``.

    Raises:
        ConfigError: ``training`` is not one of the three.
        MissingDependencyError: peft is needed and not installed.

    """

    def __init__(self, pieces: TextSpans, network: nn.Module, training: str, lora: Lora) -> None:
        super().__init__()
        if training not in TRAINING:
            raise ConfigError(f"train_text={training!r} is not one of {', '.join(TRAINING)}")
        self.pieces, self.width = pieces, width_of(network)
        self.row_length = max(ROW_LENGTH, pieces.longest)
        self.network = network.requires_grad_(training == "full")
        if training == "lora":
            _add_lora(network, lora)

    def forward(self, wanted: Tensor) -> Tensor:
        """Return the vectors of the pieces ``wanted``, ``(len(wanted), width)``.

        Args:
            wanted: int64, distinct and ascending: neighbours share the beginnings that they have in common.

        """
        chosen = wanted.cpu().numpy()
        if not len(chosen):
            return torch.zeros(0, self.width, device=self._device)
        pieces = self.pieces
        if torch.is_grad_enabled() or len(chosen) <= ROWS_AT_ONCE:
            return self._encode(pieces.tokens[chosen], pieces.starts[chosen], pieces.ends[chosen])
        parts = np.array_split(chosen, -(-int(pieces.ends[chosen].sum()) // (ROWS_AT_ONCE * self.row_length)))
        return torch.cat([self._encode(pieces.tokens[p], pieces.starts[p], pieces.ends[p]) for p in parts])

    def _encode(self, tokens: Any, starts: Any, ends: Any) -> Tensor:
        packed = pack(tokens, starts, ends, self.row_length).to(self._device)
        found = states(self.network, packed)
        found = found.float() if found.dtype.itemsize < 4 else found
        means = embedding_bag(packed.members, found, packed.starts, mode="mean")
        return layer_norm(means, (self.width,))

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device


def width_of(network: nn.Module) -> int:
    """Return the width of what a GPT-2 says of a token."""
    config: Any = network.config
    return int(config.n_embd)


def _add_lora(network: nn.Module, lora: Lora) -> None:
    peft = import_optional("peft", "recommend")
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=list(lora.layers),
        fan_in_fan_out=True,  # GPT-2 keeps its projections as (in, out)
    )
    peft.inject_adapter_in_model(config, network)


# -- preparing ---------------------------------------------------------------------------------------------------------


def prepare(
    user_texts: Sequence[str], item_texts: Sequence[str], *, pretrained: str | Path = "none", seed: int = 0
) -> TokenizedTexts:
    """Tokenise all texts, once, and load or build the GPT-2 that will read them.

    Args:
        user_texts: a description of each user; its fields on lines of their own, as many for each.
        item_texts: the same of each film.
        pretrained: a GPT-2 of the hub, by name; a folder with one (``save_pretrained``); or ``"none"`` for a small one with
            random weights and a byte-level vocabulary, both made from the texts and ``seed`` alone.
        seed: decides the small one's weights.

    Raises:
        DataError: a text or field is empty, has more tokens than the GPT-2 has places, or fields differ in number.
        ConfigError: there is no such GPT-2.
        MissingDependencyError: transformers is not installed.

    """
    import_optional("transformers", "recommend")
    texts = [*user_texts, *item_texts]
    with _quiet():
        tokenize, network = _small(texts, seed) if str(pretrained) == "none" else _loaded(str(pretrained))
    users, user_pieces = _tokenised("user", user_texts, tokenize, network.config.n_positions)
    items, item_pieces = _tokenised("item", item_texts, tokenize, network.config.n_positions)
    return TokenizedTexts(
        _table([*user_pieces, *item_pieces]),
        EntityTexts(users, 0, len(user_pieces)),
        EntityTexts(items, len(user_pieces), len(item_pieces)),
        network.eval(),
        tokenize,
        str(pretrained),
    )


Piece = tuple[tuple[int, ...], int]
"""The tokens up to the end of a field, and where the field begins."""


def _tokenised(side: str, texts: Sequence[str], tokenize: Tokenize, longest: int) -> tuple[Tensor, list[Piece]]:
    """Return which pieces each text has, ``(texts, fields)``, and the distinct pieces, sorted."""
    distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    fields = [text.split("\n") for text in distinct]
    _check_fields(side, texts, fields)
    words = sorted({line for text in fields for line in ((text[0], *("\n" + part for part in text[1:])))})
    numbers = dict(zip(words, tokenize(words), strict=True))
    pieces_of = [_pieces(text, numbers) for text in fields]
    _check_lengths(side, list(distinct), pieces_of, longest)
    pieces = sorted({piece for each in pieces_of for piece in each})
    place = {piece: number for number, piece in enumerate(pieces)}
    table = torch.tensor([[place[piece] for piece in each] for each in pieces_of])
    return table[torch.tensor([distinct[text] for text in texts])], pieces


def _pieces(fields: Sequence[str], numbers: dict[str, list[int]]) -> list[Piece]:
    pieces, tokens = [], list[int]()
    for number, line in enumerate(fields):
        start = len(tokens)
        tokens += numbers["\n" + line if number else line]
        pieces.append((tuple(tokens), start))
    return pieces


def _table(pieces: Sequence[Piece]) -> TextSpans:
    ends = np.array([len(tokens) for tokens, _ in pieces], dtype=np.int64)
    table = np.full((len(pieces), int(ends.max())), -1, dtype=np.int64)
    table[np.arange(table.shape[1]) < ends[:, None]] = [token for tokens, _ in pieces for token in tokens]
    return TextSpans(table, np.array([start for _, start in pieces], dtype=np.int64), ends)


def _check_fields(side: str, texts: Sequence[str], fields: Sequence[Sequence[str]]) -> None:
    if not texts:
        raise DataError(f"there is no {side} text; give one for each {side}")
    for text in fields:
        whole = "\n".join(text)
        if not all(part.strip() for part in text):
            number = list(texts).index(whole)
            raise DataError(
                f"the text of {side} {number} is {whole!r}: a field of it is empty; say what is known of it"
            )
        if len(text) != len(fields[0]):
            number = list(texts).index(whole)
            raise DataError(
                f"the text of {side} {number} is {whole!r}, which has {len(text)} fields (lines), and that of {side} 0 has "
                f"{len(fields[0])}; give each {side} the same fields"
            )


def _check_lengths(side: str, texts: Sequence[str], pieces: Sequence[Sequence[Piece]], longest: int) -> None:
    for text, (*_, (tokens, start)) in zip(texts, pieces, strict=True):
        if len(tokens) > longest:
            raise DataError(
                f"the {side} text {text!r} has {len(tokens)} tokens, and this GPT-2 reads {longest} at most; shorten it"
            )
        if len(tokens) == start:
            raise DataError(
                f"the tokeniser makes nothing of the last field of the {side} text {text!r}; say it otherwise"
            )


def _small(texts: Iterable[str], seed: int) -> tuple[Tokenize, Any]:
    """Return a byte-level tokeniser that has learned the texts' own words, and a small GPT-2 with random weights."""
    transformers, tokenizers = import_optional("transformers", "recommend"), import_optional("tokenizers", "recommend")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(sorted(set(texts)), vocab_size=2048, min_frequency=2, show_progress=False)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=256,
        n_embd=128,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
        **_NO_DROPOUT,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # those of accelerators stay as they are
        network = transformers.GPT2Model(config)
    return lambda words: [found.ids for found in tokenizer.encode_batch(words)], network


def _loaded(name: str) -> tuple[Tokenize, Any]:
    transformers = import_optional("transformers", "recommend")
    if not Path(name).is_dir():
        logger.info("looking for %s on the Hugging Face hub", name)
    try:
        kind = transformers.AutoConfig.from_pretrained(name).model_type
        if kind != "gpt2":
            raise ConfigError(f"pretrained={name!r} is a {kind!r} model; give a GPT-2, or 'none' for a small one")
        network, found = transformers.GPT2Model.from_pretrained(
            name, attn_implementation="sdpa", output_loading_info=True, **_NO_DROPOUT
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except ConfigError:
        raise
    except Exception as error:  # of a dozen kinds, as what is damaged is found in Python or in Rust
        raise ConfigError(
            f"pretrained={name!r} is neither a folder with a GPT-2 and its tokeniser nor the name of one that can be "
            f"downloaded from here ({_first_line(error)}); give one, or 'none' for a small one made from the data"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(
            f"pretrained={name!r} lacks {len(missing)} of a GPT-2's weights, such as {missing[0]}; give a whole GPT-2, or "
            "'none' for a small one made from the data"
        )
    return _tokenizing(name, tokenizer, network.config.vocab_size), network.float()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _tokenizing(name: str, tokenizer: Any, known: int) -> Tokenize:
    """Return what tokenises, as the GPT-2 that knows ``known`` tokens needs it."""

    def tokenize(words: list[str]) -> list[list[int]]:
        found: list[list[int]] = tokenizer(words, add_special_tokens=False)["input_ids"]
        largest = max((number for line in found for number in line), default=-1)
        if largest < 0:
            raise ConfigError(
                f"pretrained={name!r} has no tokeniser, or one that makes nothing of words; save the GPT-2's own there: "
                "tokenizer.save_pretrained"
            )
        if largest >= known:
            raise ConfigError(
                f"the tokeniser of pretrained={name!r} makes the token {largest}, and its GPT-2 knows {known}, from 0 to "
                f"{known - 1}; save the tokeniser there that the GPT-2 was trained with"
            )
        return found

    return tokenize


_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice to itself, but those of downloads, and leave its settings as they were."""
    logging, hub = (
        import_optional("transformers", "recommend").utils.logging,
        import_optional("huggingface_hub", "recommend").utils,
    )
    level, bars, downloads, hub_level = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        not hub.are_progress_bars_disabled(),
        hub.logging.get_verbosity(),
    )
    logging.set_verbosity_error()
    hub.logging.set_verbosity_error()  # without a network it says so twelve times; the error says it once
    logging.disable_progress_bar()  # the hub's, too
    if downloads:
        hub.enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub.logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()
        if not downloads:
            hub.disable_progress_bars()
