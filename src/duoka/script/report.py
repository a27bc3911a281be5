"""The account of a run in words: a table of models, the time of a step, and the one change that would help most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from duoka.scaling import core_limits
from duoka.script.account import Account, ModelAccount, Shares

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["advice", "device_words", "print_report"]

_SLOW_LOADING = 0.25
_MUCH_TALK = 0.2
_WORTH_IT = 1.1


def print_report(account: Account, out: Console) -> None:
    """Print what the run came to."""
    from rich.table import Table

    out.print()
    if account.models:
        table = Table(title=f"duoka run on {device_words(account.devices)}", title_justify="left", title_style="bold")
        for heading in ("model", "found", "devices", "batch", "batch per device", "calls shared / whole"):
            table.add_column(heading, overflow="fold")
        for model in account.models:
            table.add_row(*_row(model, len(account.devices)))
        out.print(table)
    else:
        out.print(f"duoka run on {device_words(account.devices)}")
    for line in lines(account):
        out.print(line, soft_wrap=True)


def device_words(devices: Sequence[torch.device]) -> str:
    """Return devices in words: ``2 CPU workers``, ``cuda:0 and cuda:1``."""
    if all(device.type == "cpu" for device in devices):
        return "the CPU" if len(devices) == 1 else f"{len(devices)} CPU workers"
    return " and ".join(map(str, devices))


def lines(account: Account) -> list[str]:
    """Return what is said below the table."""
    said = [f"{model.name}: on one device, because {model.refusal}." for model in account.models if model.refusal]
    said += [
        f"DataLoader at {loader.place}: batch size {loader.batch} -> {loader.scaled}"
        for loader in account.loaders
        if loader.scaled != loader.batch
    ]
    if any(loader.scaled != loader.batch for loader in account.loaders):
        said.append("The learning rate is the script's own; with a larger batch a larger one is often right.")
    said += account.notes
    split, whole = account.seconds_a_step(split=True), account.seconds_a_step(split=False)
    if split is not None and whole is not None:
        how = f"{whole / split:.2f} times as fast" if split <= whole else f"{split / whole:.2f} times slower"
        said.append(f"a step: {_time(whole)} on one device (measured in the first steps), {_time(split)} on all: {how}")
    elif (one := split if split is not None else whole) is not None:
        said.append(f"a step: {_time(one)} on {'all devices' if split is not None else 'one device'}")
    if account.steps:
        said.append(f"its time: {_shares(account.shares())}")
    said.append(f"what would help most: {advice(account)}")
    return said


def advice(account: Account) -> str:
    """Return the one change that would help most."""
    devices = len(account.devices)
    if devices == 1:
        return "more devices; --device cpu:2 shares the work between two CPU workers, --device all takes every GPU."
    shared = [model for model in account.models if model.split]
    if not shared:
        return _why_nothing(account)
    shares = account.shares()
    if shares.loading > _SLOW_LOADING:
        workers = max(2, core_limits().count // 2)
        return (
            f"faster loading: {shares.loading:.0%} of a step waits for the DataLoader. Give it num_workers={workers}, or keep "
            "the data in memory."
        )
    batch = max(model.batch for model in shared)
    split, whole = account.seconds_a_step(split=True), account.seconds_a_step(split=False)
    is_slow = split is not None and whole is not None and whole < _WORTH_IT * split
    if is_slow or shares.moving + shares.waiting > _MUCH_TALK:
        larger = "" if any(one.scaled != one.batch for one in account.loaders) else " (--scale-batch multiplies it)"
        return (
            f"a larger batch: {batch} samples are {batch // devices} a device, too little work to be worth sharing between "
            f"{devices}{larger}. Otherwise this script is best run without duoka."
            if is_slow
            else f"a larger batch{larger}: {batch} samples are {batch // devices} a device."
        )
    return "nothing that this run shows; devices are busy computing."


def _why_nothing(account: Account) -> str:
    if not account.models:
        return (
            "nothing here: no model was found. Models are found where model.to(device), model.cuda() or an optimiser is given "
            "their parameters; or write model = duoka.DataParallel(model)."
        )
    uncalled = [model for model in account.models if not model.refusal and not model.whole]
    if uncalled:
        return (
            f"calling the model as model(batch): {uncalled[0].name} was found, but only its methods or parts were called, "
            "which are computed on one device."
        )
    refused = [model for model in account.models if model.refusal]
    if refused:
        return f"a model that can be computed in parts; {refused[0].name} is on one device for the reason above."
    return "more steps or larger batches: all calls were too few, or of one sample, to be shared."


def _row(model: ModelAccount, devices: int) -> tuple[str, ...]:
    used = devices if model.split else 1
    per_device = "-" if not model.batch else _per_device(model.batch, min(used, model.batch))
    return model.name, model.how, str(used), str(model.batch or "-"), per_device, f"{model.split} / {model.whole}"


def _per_device(batch: int, devices: int) -> str:
    low, extra = divmod(batch, devices)
    return f"{low}" if not extra else f"{low} or {low + 1}"


def _shares(shares: Shares) -> str:
    parts = ("computing", shares.computing), ("moving", shares.moving), ("waiting", shares.waiting)
    words = [f"{name} {share:.0%}" for name, share in (*parts, ("loading data", shares.loading))]
    return ", ".join(words)


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
