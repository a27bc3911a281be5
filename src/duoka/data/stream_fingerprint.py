"""The fingerprint of a stream: text and numbers of its first samples, to check that all ranks read the same stream."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from duoka.errors import DataError
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
    words: list[str] = []
    numbers: list[float] = []
    for leaf in iter_leaves(list(samples[:MAX_SAMPLES])):
        if isinstance(leaf, (torch.Tensor, np.ndarray, np.generic)):
            array = torch.as_tensor(leaf) if not isinstance(leaf, torch.Tensor) and leaf.dtype.kind in "biufc" else leaf
            words.append(f"{array.dtype} {tuple(array.shape)}")
            if isinstance(array, torch.Tensor) and not array.is_sparse:
                first = array.detach().flatten()[:MAX_NUMBERS].to("cpu")
                numbers += (first.abs() if first.is_complex() else first).double().tolist()
        elif isinstance(leaf, (bool, int, float)):
            numbers.append(float(leaf))
        elif isinstance(leaf, (str, bytes)):
            words.append(repr(leaf[:MAX_NUMBERS]))
    return StreamFingerprint(words, numbers)


def same_stream(one: StreamFingerprint, other: StreamFingerprint) -> bool:
    """Whether both fingerprints are of the same samples, up to rounding."""
    if one.words != other.words or len(one.numbers) != len(other.numbers):
        return False
    return np.allclose(one.numbers, other.numbers, rtol=TOLERANCE, atol=TOLERANCE**2, equal_nan=True)


def require_same_stream(by_rank: Sequence[StreamFingerprint | None], name: str) -> None:
    """Raise ``DataError`` unless all ranks have read the same samples of the data called ``name``."""
    main, *others = by_rank
    if not all(main is other or (main and other and same_stream(other, main)) for other in others):
        raise DataError(
            f"{name} yields other samples on another rank: it splits itself by rank, or draws from a random generator "
            "that duoka does not know. duoka splits every global batch, so samples would be lost. Yield all samples in "
            "the same order on every rank: do not use torch.distributed.get_rank() or RANK in it"
        )
