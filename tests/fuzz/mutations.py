"""Seeded mutations of valid inputs: bytes, lines of text, and trees of dicts and lists."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch

NASTY_TEXTS = (
    "", " ", "null", "~", "nan", "inf", "-1", "0", "1e999", "9" * 5000, "0b_", "2001-99-99", "!!timestamp x", "*a", "&a x",
    "{", "[" * 2000, "{a: " * 500, "\0", "\n", "\t", "\ufeff", "\ud83d\ude00", "../../x", "/dev/zero", "a" * 300, "%s%n", "::",
    "\u202e", "\u0661", "'", '"', "\\", ",", ";", "-", "true", "$x^{2}$", "x\u0300" * 50, "1,5", "0x1F", "1_000", "é",
)  # fmt: skip
NASTY_BYTES = (
    b"\0",
    b"\xff" * 8,
    b"\xff\xff\xff\x7f",
    b"\0" * 64,
    b"\xef\xbb\xbf",
    b"\xc3\x28",
    b"PK\x03\x04",
    b"\r",
    b"\n",
    b"{",
)


def nasty_value(random_: random.Random) -> Any:
    """Return a value of a type or size that is seldom expected."""
    deep: Any = []
    for _ in range(random_.choice([5, 100])):
        deep = [deep]
    choices = (
        None, True, False, 0, -1, 2**63, 10**30, 1.5, float("nan"), float("inf"), [], {}, [1], {"a": 1}, {1: 2}, deep,
        random_.choice(NASTY_TEXTS),
    )  # fmt: skip
    return random_.choice(choices)


def mutate_bytes(data: bytes, random_: random.Random) -> bytes:
    """Return bytes with one to three flips, cuts, insertions, repeats or swaps."""
    changed = bytearray(data)
    for _ in range(random_.randint(1, 3)):
        at = random_.randrange(len(changed) + 1)
        end = min(len(changed), at + random_.choice([1, 2, 8, 64]))
        kind = random_.randrange(7)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << random_.randrange(8)
        elif kind == 1 and at < len(changed):
            changed[at] = random_.randrange(256)
        elif kind == 2:
            del changed[at:end]
        elif kind == 3:
            changed[at:at] = random_.choice(NASTY_BYTES)
        elif kind == 4:
            changed[at:at] = changed[at:end] * random_.choice([1, 50])
        elif kind == 5:
            del changed[at:]
        else:
            changed[at:end] = random_.choice(NASTY_BYTES)[: end - at]
    return bytes(changed)


def mutate_text(data: bytes, random_: random.Random) -> bytes:
    """Return text with a line lost, repeated, moved or cut, or a word replaced; sometimes with changed bytes."""
    if random_.random() < 0.3:
        return mutate_bytes(data, random_)
    lines = data.decode(errors="replace").split("\n")
    for _ in range(random_.randint(1, 3)):
        at = random_.randrange(len(lines))
        kind = random_.randrange(6)
        if kind == 0 and len(lines) > 1:
            del lines[at]
        elif kind == 1:
            lines.insert(at, random_.choice(lines))
        elif kind == 2:
            lines[at] = lines[at][: random_.randrange(len(lines[at]) + 1)]
        elif kind == 3:
            lines.insert(at, random_.choice(NASTY_TEXTS))
        else:
            lines[at] = _replace_word(lines[at], random_)
    return "\n".join(lines).encode(errors="surrogatepass")


def _replace_word(line: str, random_: random.Random) -> str:
    for separator in random_.sample([": ", "::", ",", ":", " ", "/"], 6):
        words = line.split(separator)
        if len(words) > 1:
            words[random_.randrange(len(words))] = random_.choice(NASTY_TEXTS)
            return separator.join(words)
    return random_.choice(NASTY_TEXTS)


def mutate_tree(tree: Any, random_: random.Random) -> Any:
    """Return a copy of nested dicts and lists with one to three values lost, added, nested, or of another type."""
    changed = copy.deepcopy(tree)
    for _ in range(random_.randint(1, 3)):
        places = list(_places(changed))
        if not places:
            return nasty_value(random_)
        holder, key = random_.choice(places)
        kind = random_.randrange(7)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            holder[key] = [holder[key]]
        elif kind == 2 and isinstance(holder, dict):
            holder[random_.choice([*NASTY_TEXTS, 3])] = holder[key]
        elif kind == 3 and isinstance(holder[key], torch.Tensor):
            holder[key] = _mutate_tensor(holder[key], random_)
        elif kind == 4 and type(holder[key]) in (int, float):
            holder[key] = random_.choice([-holder[key], holder[key] + 1, 2**62, -1, 0, str(holder[key])])
        else:
            holder[key] = nasty_value(random_)
    return changed


def _places(tree: Any) -> Any:
    """Yield each dict or list with each of its keys."""
    pending = [tree]
    while pending:
        holder = pending.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            yield holder, key
            pending.append(holder[key])


def _mutate_tensor(tensor: torch.Tensor, random_: random.Random) -> torch.Tensor:
    changes: list[Callable[[], torch.Tensor]] = [
        lambda: tensor[None],
        lambda: tensor.reshape(-1)[:1],
        lambda: tensor.to(torch.int64),
        lambda: tensor.to(torch.complex64),
        lambda: torch.zeros(0),
        lambda: torch.full_like(tensor.float(), float("nan")),
        lambda: tensor.t().contiguous() if tensor.ndim == 2 else tensor.double(),
        lambda: tensor.to_sparse() if tensor.ndim else tensor.double(),
        lambda: torch.zeros(tensor.shape, dtype=torch.bool),
    ]
    return random_.choice(changes)()
