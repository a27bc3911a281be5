"""A glimpse of what a rank has read of a stream: enough to see that all ranks read the same one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from duoka.data.batch_ops import opened

__all__ = ["StreamFingerprint", "same_stream", "fingerprint"]

SAMPLES = 4
"""How many samples are looked at."""
NUMBERS = 32
"""How many numbers of each tensor are."""
TOLERANCE = 1e-3
"""By how much, relative to themselves, numbers may differ that machines of other kinds have computed."""


class StreamFingerprint(NamedTuple):
    """Words and numbers of the first samples."""

    words: list[str]
    numbers: list[float]


def fingerprint(samples: Sequence[Any]) -> StreamFingerprint:
    """Return a glimpse of the first of ``samples`` (or of the batches that hold them)."""
    seen = StreamFingerprint([], [])
    for sample in samples[:SAMPLES]:
        _look(sample, seen)
    return seen


def _look(node: Any, seen: StreamFingerprint) -> None:
    if isinstance(node, (torch.Tensor, np.ndarray, np.generic)):
        array = torch.as_tensor(node) if not isinstance(node, torch.Tensor) and node.dtype.kind in "biufc" else node
        seen.words.append(f"{array.dtype} {tuple(array.shape)}")
        if isinstance(array, torch.Tensor) and not array.is_sparse:
            numbers = array.detach().flatten()[:NUMBERS].to("cpu")
            seen.numbers.extend((numbers.abs() if numbers.is_complex() else numbers).double().tolist())
    elif isinstance(node, (bool, int, float)):
        seen.numbers.append(float(node))
    elif isinstance(node, (str, bytes)):
        seen.words.append(repr(node[:NUMBERS]))
    else:
        for child in (opened(node) or ([],))[0]:
            _look(child, seen)


def same_stream(one: StreamFingerprint, other: StreamFingerprint) -> bool:
    """Whether both are of the same samples, up to rounding."""
    return (
        one.words == other.words
        and len(one.numbers) == len(other.numbers)
        and all(
            math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE * TOLERANCE) or (math.isnan(a) and math.isnan(b))
            for a, b in zip(one.numbers, other.numbers, strict=True)
        )
    )
