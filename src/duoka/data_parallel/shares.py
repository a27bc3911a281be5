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
    test: Literal["all", "nonnegative", "nonzero", "sum"] = "all"
    """Which elements count; ``sum`` counts an element by its value."""
    skips_first: bool = False


SAMPLES = Source()


def sources_of(arguments: Arguments) -> list[Source]:
    """Return what a mean may be over."""
    found = [SAMPLES]
    for index, tensor in enumerate(arguments.tensors):
        if arguments.is_split(index) and not tensor.is_complex() and _can_select(tensor):
            tests: list[Literal["nonnegative", "nonzero", "sum"]] = ["nonzero"]
            if tensor.is_floating_point():
                tests.insert(0, "sum")
            elif tensor.dtype.is_signed:
                tests.insert(0, "nonnegative")
            shifts = [False, True] if tensor.dim() == 2 and arguments.dim == 0 else [False]
            found += [Source(index, test, shift) for test in tests for shift in shifts]
    return found


def _can_select(tensor: torch.Tensor) -> bool:
    """Return whether a tensor may say which elements count: integers, booleans, or weights of samples or their elements."""
    return not tensor.is_floating_point() or (tensor.dim() <= 2 and bool((tensor.isfinite() & (tensor >= 0)).all()))


def shares_of(arguments: Arguments, sizes: Sequence[int], sources: Sequence[Source]) -> dict[Source, Shares]:
    """Return each part's share by source; that of the samples if nothing counts. A device answers once."""
    known = arguments.shares.setdefault(tuple(sizes), {SAMPLES: _normalized(sizes)})
    missing = [source for source in sources if source not in known]
    if missing:
        device = arguments.tensors[missing[0].tensor].device
        counts = [_counts(arguments, sizes, source).to(device) for source in missing]
        for source, own in zip(missing, torch.stack(counts).tolist(), strict=True):
            known[source] = _normalized(own) if sum(own) else known[SAMPLES]
    return {source: known[source] for source in sources}


def _counts(arguments: Arguments, sizes: Sequence[int], source: Source) -> torch.Tensor:
    tensor = arguments.tensors[source.tensor]
    if source.skips_first:
        tensor = tensor[:, 1:]
    selected = tensor if source.test == "sum" else tensor >= 0 if source.test == "nonnegative" else tensor != 0
    return torch.stack([piece.sum() for piece in torch.split(selected, list(sizes), arguments.dim)])


def _normalized(counts: Sequence[float]) -> Shares:
    return tuple(round(count / sum(counts), 12) for count in counts)
