"""A GPT-2 and its tokenizer: from the Hugging Face hub, from a folder, or a small one made from the texts."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from duoka.errors import ConfigError
from duoka.log import logger
from duoka.utils.imports import import_optional
from duoka.utils.rng_state import preserve_rng_state
from duoka.utils.text import first_line

Tokenize = Callable[[list[str]], list[list[int]]]
"""Lines of text to the tokens of each."""
GPT2_OPTIONS = {"attn_implementation": "sdpa", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def load_gpt2(pretrained: str, texts: Iterable[str], seed: int) -> tuple[Tokenize, Any]:
    """Return a tokenizer and a ``transformers.GPT2Model`` without dropout.

    ``pretrained`` is a name on the hub, a folder, or ``"none"`` for a small random GPT-2 with a
    byte-level vocabulary, both a function of ``texts`` and ``seed`` alone.

    Raises ConfigError if there is no such GPT-2, or parts of it are missing.
    """
    transformers = import_optional("transformers", "recommend")
    with _quiet(transformers):
        if pretrained == "none":
            return _build_small(transformers, texts, seed)
        return _load_pretrained(transformers, pretrained)


def _build_small(transformers: Any, texts: Iterable[str], seed: int) -> tuple[Tokenize, Any]:
    tokenizer = import_optional("tokenizers", "recommend").ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(sorted(set(texts)), vocab_size=2048, min_frequency=2, show_progress=False)
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "n_positions": 256, "n_embd": 128, "n_layer": 2, "n_head": 4}
    config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, **GPT2_OPTIONS)
    with preserve_rng_state():
        torch.default_generator.manual_seed(seed)
        network = transformers.GPT2Model(config)
    return lambda lines: [encoding.ids for encoding in tokenizer.encode_batch(lines)], network


def _load_pretrained(transformers: Any, name: str) -> tuple[Tokenize, Any]:
    if not Path(name).is_dir():
        logger.info("looking for %s on the Hugging Face hub", name)
    try:
        model_type = transformers.AutoConfig.from_pretrained(name).model_type
        if model_type != "gpt2":
            raise ConfigError(f"pretrained={name!r} is a {model_type!r} model; give a GPT-2, or 'none' for a small one")
        network, info = transformers.GPT2Model.from_pretrained(name, output_loading_info=True, **GPT2_OPTIONS)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except ConfigError:
        raise
    except Exception as error:  # transformers raises a dozen types, from Python and from Rust
        raise ConfigError(
            f"pretrained={name!r} is neither a folder with a GPT-2 and its tokenizer nor the name of one on the hub that can "
            f"be downloaded ({first_line(error)}); give one, or 'none' for a small one made from the data"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"pretrained={name!r} lacks {len(missing)} weights of a GPT-2, such as {missing[0]}; give a complete GPT-2, or "
            "'none' for a small one made from the data"
        )
    return partial(_tokenize, name, tokenizer, network.config.vocab_size), network.float()


def _tokenize(name: str, tokenizer: Any, vocab_size: int, lines: list[str]) -> list[list[int]]:
    """Return the tokens of each line, which are checked to be tokens of the GPT-2."""
    tokens: list[list[int]] = tokenizer(lines, add_special_tokens=False)["input_ids"]
    largest = max((token for line in tokens for token in line), default=-1)
    if largest < 0:
        raise ConfigError(
            f"pretrained={name!r} has no tokenizer, or one that returns no tokens; save the GPT-2's own tokenizer there "
            "with tokenizer.save_pretrained"
        )
    if largest >= vocab_size:
        raise ConfigError(
            f"pretrained={name!r}: the tokenizer returns token {largest}, but the GPT-2 has tokens 0 to "
            f"{vocab_size - 1}; save the tokenizer there that the GPT-2 was trained with"
        )
    return tokens


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence transformers and the hub, apart from download progress, and restore their settings."""
    logging, hub = transformers.utils.logging, import_optional("huggingface_hub", "recommend").utils
    shows_downloads = not hub.are_progress_bars_disabled()
    with contextlib.ExitStack() as restored:
        restored.callback(logging.set_verbosity, logging.get_verbosity())
        restored.callback(hub.logging.set_verbosity, hub.logging.get_verbosity())
        restored.callback(hub.enable_progress_bars if shows_downloads else hub.disable_progress_bars)
        if logging.is_progress_bar_enabled():
            restored.callback(logging.enable_progress_bar)  # enables the hub's, too
        logging.set_verbosity_error()
        hub.logging.set_verbosity_error()  # without a network the hub logs twelve lines; the error has them in one
        logging.disable_progress_bar()  # disables the hub's, too
        if shows_downloads:
            hub.enable_progress_bars()
        yield
