"""The stats of a run in words: a table of models, the time of a step, and the one change that would help most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from duoka.scaling import core_limits
from duoka.script_runner.run_stats import ModelStats, RunStats, TimeShares

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["advice", "device_words", "print_report"]

_SLOW_LOADING = 0.25
_MUCH_TALK = 0.2
_WORTH_IT = 1.1
_DISTURBED = 1.1
_FEW = 3
"""Steps that tell nothing yet."""


def print_report(stats: RunStats, out: Console, *, completed: bool = True) -> None:
    """Print what the run came to; of one that failed before anything was shared out there is nothing to say."""
    from rich.table import Table

    if not completed and not any(model.split for model in stats.models):
        return
    out.print()
    if stats.models:
        table = Table(title=f"duoka run on {device_words(stats.devices)}", title_justify="left", title_style="bold")
        for heading in ("model", "found", "devices", "batch", "batch per device", "calls shared / whole"):
            table.add_column(heading, overflow="fold")
        for model in _alike_together(stats.models):
            table.add_row(*_row(model, len(stats.devices)))
        out.print(table)
    else:
        out.print(f"duoka run on {device_words(stats.devices)}")
    for line in lines(stats):
        out.print(line, soft_wrap=True)
    if completed:
        out.print(f"what would help most: {advice(stats)}", soft_wrap=True)


def device_words(devices: Sequence[torch.device]) -> str:
    """Return devices in words: ``2 CPU workers``, ``cuda:0 and cuda:1``."""
    if all(device.type == "cpu" for device in devices):
        return "the CPU" if len(devices) == 1 else f"{len(devices)} CPU workers"
    return " and ".join(map(str, devices))


def lines(stats: RunStats) -> list[str]:
    """Return what is said below the table."""
    models = _alike_together(stats.models)
    said = [f"{model.name}: on one device, because {model.refusal}." for model in models if model.refusal]
    said += [
        f"DataLoader at {loader.place}: batch size {loader.batch} -> {loader.scaled}"
        for loader in stats.loaders
        if loader.scaled != loader.batch
    ]
    if any(loader.scaled != loader.batch for loader in stats.loaders):
        said.append("The learning rate is the script's own; with a larger batch a larger one is often right.")
    if stats.scales and not stats.loaders:
        said.append("--scale-batch has changed nothing: the script made no DataLoader that shuffles or samples.")
    return [*said, *stats.notes, *_times(stats)]


def _alike_together(models: Sequence[ModelStats]) -> list[ModelStats]:
    """Return one stats for all models that one line of the script has made, as that of a cross-validation does."""
    groups: dict[tuple[str, str, str, int], list[ModelStats]] = {}
    for model in models:
        groups.setdefault((model.name, model.how, model.refusal, model.devices), []).append(model)
    return [group[0] if len(group) == 1 else _together(group) for group in groups.values()]


def _together(group: Sequence[ModelStats]) -> ModelStats:
    first = group[0]
    total = ModelStats(first.calls, f"{first.name} ({len(group)} of them)", first.how, first.refusal, first.devices)
    for model in group:
        total.whole, total.split = total.whole + model.whole, total.split + model.split
        total.trained_split += model.trained_split
        total.trained.update(model.trained)
        total.evaluated.update(model.evaluated)
    return total


def _times(stats: RunStats) -> list[str]:
    """Say how long a step took, and where its time went."""
    said = []
    is_shared = any(step.is_split for step in stats.steps)
    shared = [model for model in stats.models if model.is_shared]
    all_wrapped = bool(shared) and all(model.devices for model in shared)  # a wrapper computes no batch whole
    compared, seconds, devices = stats.comparison(), stats.seconds_a_step(), len(stats.devices)
    if compared is not None:
        whole, split = compared
        how = f"{whole / split:.2f} times as fast" if split <= whole else f"{split / whole:.2f} times slower"
        if whole > _DISTURBED * devices * split:
            how = f"no comparison: more than {devices} times as fast is not possible, something else has slowed the one device"
        said.append(f"a step: {_time(whole)} on one device (tried in between), {_time(split)} on all: {how}")
    elif seconds is not None:
        few = "; too few steps to compare with one device" if is_shared and not all_wrapped else ""
        said.append(f"a step: {_time(seconds)} on {'all devices' if is_shared else 'one device'}{few}")
    if stats.steps:
        said.append(f"its time: {_shares(stats.shares())}")
    if stats.calls.startup_s:
        said.append(f"to begin with: {_time(stats.calls.startup_s)} for trying the model and starting helpers, once")
    return said


def advice(stats: RunStats) -> str:
    """Return the one change that would help most."""
    shared = [model for model in stats.models if model.is_shared]
    devices = max((model.devices for model in shared), default=0) or len(stats.devices)
    if devices == 1:
        return "more devices; --device cpu:2 shares the work between two CPU workers, --device all takes every GPU."
    if not shared:
        return _why_nothing(stats)
    if len(stats.steps) < _FEW:
        return f"nothing that can be told from {stats.calls.steps} training steps."
    shares = stats.shares()
    if shares.loading > _SLOW_LOADING:
        workers = max(2, core_limits().count // 2)
        return (
            f"faster loading: {shares.loading:.0%} of a step waits for the DataLoader. Give it num_workers={workers}, or keep "
            "the data in memory."
        )
    batch = max(model.batch for model in shared)
    can_scale = stats.loaders and not stats.scales
    larger = f"a larger batch{' (--scale-batch multiplies it)' if can_scale else ''}: {batch} samples are "
    compared = stats.comparison()
    if compared is not None and compared[0] < _WORTH_IT * compared[1]:
        return (
            f"{larger}{_per_device(batch, devices)} a device, too little work to be worth sharing between {devices}. "
            "Otherwise this script is best run without duoka."
        )
    if shares.moving + shares.waiting > _MUCH_TALK:
        return f"{larger}{_per_device(batch, devices)} a device."
    return "nothing that this run shows; devices are busy computing."


def _why_nothing(stats: RunStats) -> str:
    if not stats.models:
        return (
            "nothing here: no model was found. Models are found where model.to(device), model.cuda() or an optimiser is given "
            "their parameters; or write model = duoka.DataParallel(model)."
        )
    refused = [model for model in stats.models if model.refusal]
    if refused:
        return f"a model that can be computed in parts; {refused[0].name} is on one device for the reason above."
    uncalled = [model for model in stats.models if not model.whole]
    if uncalled:
        return (
            f"calling the model as model(batch): {uncalled[0].name} was found, but at most its methods or parts were called, "
            "which are computed on one device."
        )
    if max(model.batch for model in stats.models) < 2:
        return "batches of more than one sample: one sample cannot be shared."
    return "more steps: the first call is computed whole, to try the model, and there was no other."


def _row(model: ModelStats, devices: int) -> tuple[str, ...]:
    used = (model.devices or devices) if model.is_shared else 1
    per_device = "-" if not model.batch else _per_device(model.batch, min(used, model.batch))
    return model.name, model.how, str(used), str(model.batch or "-"), per_device, f"{model.split} / {model.whole}"


def _per_device(batch: int, devices: int) -> str:
    low, extra = divmod(batch, devices)
    return f"{low}" if not extra else f"{low} or {low + 1}"


def _shares(shares: TimeShares) -> str:
    parts = ("computing", shares.computing), ("moving", shares.moving), ("waiting", shares.waiting)
    words = [f"{name} {share:.0%}" for name, share in (*parts, ("loading data", shares.loading))]
    return ", ".join(words)


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
