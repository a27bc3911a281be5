"""The fingerprint of a stream: text and numbers of its first samples, to check that all ranks read the same stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from duoka.utils.pytree import iter_leaves

MAX_SAMPLES = 4
MAX_NUMBERS = 32
"""The most numbers that count of each tensor, and the most characters of each string."""
TOLERANCE = 1e-3
"""The largest relative difference between numbers that machines of different kinds compute."""


class StreamFingerprint(NamedTuple):
    """Text (types, shapes, strings) and numbers of the first samples."""

    words: list[str]
    numbers: list[float]


def fingerprint(samples: Sequence[Any]) -> StreamFingerprint:
    """Return the fingerprint of the first of ``samples`` (or of the batches that hold them)."""
    found = StreamFingerprint([], [])
    for leaf in iter_leaves(list(samples[:MAX_SAMPLES])):
        _add(leaf, found)
    return found


def _add(leaf: Any, found: StreamFingerprint) -> None:
    if isinstance(leaf, (torch.Tensor, np.ndarray, np.generic)):
        array = torch.as_tensor(leaf) if not isinstance(leaf, torch.Tensor) and leaf.dtype.kind in "biufc" else leaf
        found.words.append(f"{array.dtype} {tuple(array.shape)}")
        if isinstance(array, torch.Tensor) and not array.is_sparse:
            numbers = array.detach().flatten()[:MAX_NUMBERS].to("cpu")
            found.numbers.extend((numbers.abs() if numbers.is_complex() else numbers).double().tolist())
    elif isinstance(leaf, (bool, int, float)):
        found.numbers.append(float(leaf))
    elif isinstance(leaf, (str, bytes)):
        found.words.append(repr(leaf[:MAX_NUMBERS]))


def same_stream(one: StreamFingerprint, other: StreamFingerprint) -> bool:
    """Whether both fingerprints are of the same samples, up to rounding."""
    return (
        one.words == other.words
        and len(one.numbers) == len(other.numbers)
        and all(
            math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE**2) or (math.isnan(a) and math.isnan(b))
            for a, b in zip(one.numbers, other.numbers, strict=True)
        )
    )
