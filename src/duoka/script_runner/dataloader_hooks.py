"""The DataLoaders of a script: how long it waits for them, and larger batches for those that it trains with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler
from torch.utils.data import dataloader as implementation

from duoka.script_runner.model_discovery import caller_location
from duoka.script_runner.patching import Patches
from duoka.script_runner.run_stats import LoaderStats, RunStats

__all__ = ["watch_loaders"]


def watch_loaders(patches: Patches, stats: RunStats, factor: int) -> None:
    """Time every loader until the patches end, and multiply the batch size of those that shuffle by ``factor``."""

    def make(
        original: Callable[..., Any], loader: Any, dataset: Any, batch_size: Any = 1, *args: Any, **kwargs: Any
    ) -> None:
        scaled = batch_size
        if isinstance(batch_size, int) and kwargs.get("batch_sampler") is None and _is_for_training(args, kwargs):
            scaled = batch_size * factor
            stats.loaders.append(LoaderStats(caller_location(), batch_size, scaled))
        elif factor > 1 and isinstance(kwargs.get("batch_sampler"), BatchSampler | Sampler):
            stats.add_note(
                f"The DataLoader at {caller_location()} has a batch sampler of its own, which --scale-batch leaves alone."
            )
        original(loader, dataset, scaled, *args, **kwargs)

    def take(original: Callable[..., Any], iterator: Any) -> Any:
        begun = time.perf_counter()
        try:
            return original(iterator)
        finally:
            stats.loading += time.perf_counter() - begun

    patches.wrap(DataLoader, "__init__", make)
    patches.wrap(implementation._BaseDataLoaderIter, "__next__", take)


def _is_for_training(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it shuffles, or samples otherwise than in order: so training loaders do, and others do not."""
    shuffle = args[0] if args else kwargs.get("shuffle")
    sampler = args[1] if len(args) > 1 else kwargs.get("sampler")
    return bool(shuffle) or isinstance(sampler, RandomSampler) or not isinstance(sampler, SequentialSampler | None)
