"""Hooks on the script's DataLoaders, which time them and can multiply the training batch size."""

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from duoka.script_runner.patching import Patches
from duoka.script_runner.run_stats import LoaderStats, RunStats
from duoka.script_runner.source_scan import caller_location
from duoka.utils.torch_private import DataLoaderIterator


def install_loader_hooks(patches: Patches, stats: RunStats, batch_factor: int) -> None:
    """Time every loader, and multiply the batch size of shuffling loaders, until the patches end."""
    multiplied: weakref.WeakKeyDictionary[Any, LoaderStats] = weakref.WeakKeyDictionary()

    def init(
        original: Callable[..., Any], loader: Any, dataset: Any, batch_size: Any = 1, *args: Any, **kwargs: Any
    ) -> None:
        scaled = batch_size
        batch_sampler = kwargs.get("batch_sampler")
        found = None
        if batch_sampler is None and isinstance(batch_size, int) and _is_for_training(args, kwargs):
            scaled = batch_size * batch_factor
            found = LoaderStats(caller_location(), batch_size, scaled)
            stats.loaders.append(found)
        elif batch_factor > 1 and batch_sampler is not None:
            stats.add_note(
                f"The DataLoader at {caller_location()} has its own batch_sampler, which --scale-batch does not change."
            )
        original(loader, dataset, scaled, *args, **kwargs)
        if found is not None and batch_factor > 1:
            multiplied[loader] = found

    def iterate(original: Callable[..., Any], loader: Any) -> Any:
        """Iterate with the script's batch size where gradients are off: some test loaders shuffle, too."""
        if (found := multiplied.get(loader)) is not None and loader.batch_sampler is not None:
            found.has_trained |= torch.is_grad_enabled()
            loader.batch_sampler.batch_size = found.scaled_batch if torch.is_grad_enabled() else found.batch
        return original(loader)

    def next_batch(original: Callable[..., Any], iterator: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(iterator)
        finally:
            stats.loading_s += time.perf_counter() - start

    patches.wrap(DataLoader, "__init__", init)
    patches.wrap(DataLoader, "__iter__", iterate)
    patches.wrap(DataLoaderIterator, "__next__", next_batch)


def _is_for_training(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether the loader shuffles or samples out of order, as training loaders do."""
    shuffle = args[0] if args else kwargs.get("shuffle")
    sampler = args[1] if len(args) > 1 else kwargs.get("sampler")
    return bool(shuffle) or isinstance(sampler, RandomSampler) or not isinstance(sampler, SequentialSampler | None)
