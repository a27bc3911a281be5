"""Shares of a batch's parts in a mean: by samples, or by labels that count.

A model that returns its loss averages over samples, or over labels that are not ignored (negative), or over what a mask
selects; language models leave out the first label of each sequence.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch

from duoka.data_parallel.scatter import Arguments

Shares: TypeAlias = tuple[float, ...]


class Source(NamedTuple):
    """What a mean is over: all samples, or some elements of one split tensor of the arguments."""

    tensor: int = -1
    test: Literal["all", "nonnegative", "nonzero"] = "all"
    skips_first: bool = False


SAMPLES = Source()


def sources_of(arguments: Arguments) -> list[Source]:
    """Return what a mean may be over."""
    found = [SAMPLES]
    for index, tensor in enumerate(arguments.tensors):
        if arguments.is_split(index) and not tensor.is_floating_point() and not tensor.is_complex():
            tests: list[Literal["nonnegative", "nonzero"]] = ["nonzero"]
            if tensor.dtype.is_signed and tensor.dtype != torch.bool:
                tests.insert(0, "nonnegative")
            shifts = [False, True] if tensor.dim() == 2 and arguments.dim == 0 else [False]
            found += [Source(index, test, shift) for test in tests for shift in shifts]
    return found


def shares_of(arguments: Arguments, sizes: Sequence[int], source: Source) -> Shares:
    """Return each part's share; that of the samples if nothing counts."""
    counts: Sequence[float] = sizes
    if source.tensor >= 0:
        tensor = arguments.tensors[source.tensor]
        if source.skips_first:
            tensor = tensor[:, 1:]
        selected = tensor >= 0 if source.test == "nonnegative" else tensor != 0
        pieces = torch.split(selected, list(sizes), arguments.dim)
        counts = torch.stack([piece.sum() for piece in pieces]).tolist()
    total = sum(counts)
    return tuple(count / total for count in counts) if total else shares_of(arguments, sizes, SAMPLES)
