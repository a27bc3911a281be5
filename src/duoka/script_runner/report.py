"""Report at the end of a run: a table of models, the time of a step, and one suggestion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from duoka.devices.cpu import core_limits
from duoka.script_runner.run_stats import ModelStats, RunStats, StepComparison
from duoka.utils.text import format_duration, join_names, plural

if TYPE_CHECKING:
    from rich.console import Console


_SLOW_LOADING = 0.25
"""Fraction of a step from which waiting for the DataLoader is worth a suggestion."""
_SLOW_COMMUNICATION = 0.2
_MIN_SPEEDUP = 1.1
_MAX_SPEEDUP_PER_DEVICE = 1.1
"""A higher speed-up than this is a disturbed measurement."""
_MIN_STEPS = 3


def print_report(stats: RunStats, out: Console, *, completed: bool = True) -> None:
    """Print the report; nothing for a run that failed before a model was split."""
    from rich.table import Column, Table

    if not completed and not any(model.split for model in stats.models):
        return
    title = f"duoka run on {describe_devices(stats.devices)}"
    out.print()
    if stats.models:
        headings = ("model", "found", "devices", "batch", "batch per device", "calls split / whole")
        columns = (Column(heading, overflow="fold") for heading in headings)
        table = Table(*columns, title=title, title_justify="left", title_style="bold")
        for model in _merge_alike(stats.models):
            used = (model.devices or len(stats.devices)) if model.is_parallel else 1
            per_device = _per_device(model.batch, min(used, model.batch)) if model.batch else "-"
            number = f"{used}, then 1" if used > 1 and model.refusal else str(used)
            calls = f"{model.split} / {model.whole}"
            table.add_row(model.name, model.how, number, str(model.batch or "-"), per_device, calls)
        out.print(table)
    else:
        out.print(title)
    for line in report_lines(stats):
        out.print(line, soft_wrap=True)
    if completed:
        out.print(f"suggestion: {suggestion(stats)}", soft_wrap=True)


def describe_devices(devices: Sequence[torch.device]) -> str:
    """Return the devices as text: ``2 CPU workers``, ``cuda:0 and cuda:1``."""
    if all(device.type == "cpu" for device in devices):
        return "the CPU" if len(devices) == 1 else f"{len(devices)} CPU workers"
    return join_names(devices)


def report_lines(stats: RunStats) -> list[str]:
    """Return the lines below the table."""
    models = _merge_alike(stats.models)
    verbs = {True: "ended", False: "ran"}
    lines = [f"{one.name} {verbs[one.is_parallel]} on one device: {one.refusal}." for one in models if one.refusal]
    if stats.scale_batch and len(stats.devices) > 1:
        lines += _scale_batch_lines(stats)
    return [*lines, *stats.notes, *_time_lines(stats)]


def _scale_batch_lines(stats: RunStats) -> list[str]:
    scaled = [loader for loader in stats.loaders if loader.has_trained and loader.scaled_batch != loader.batch]
    lines = [f"DataLoader at {one.location}: batch size {one.batch} -> {one.scaled_batch}" for one in scaled]
    if not scaled:
        return ["--scale-batch had no effect: no DataLoader that shuffles or samples has trained a model."]
    if any(model.is_parallel for model in stats.models):
        return [*lines, "The learning rate is the script's; a larger batch often needs a higher one."]
    return [*lines, "--scale-batch was in vain: no model ran on all devices. Run without it."]


def suggestion(stats: RunStats) -> str:
    """Return the one change that would help most."""
    parallel = [model for model in stats.models if model.is_parallel]
    devices = max((model.devices for model in parallel), default=0) or len(stats.devices)
    if devices == 1:
        return "use more devices: --device all uses every GPU, --device cpu:2 two CPU workers."
    if not parallel:
        return _suggestion_without_parallel_models(stats)
    if len(stats.steps) < _MIN_STEPS:
        return f"none: {plural(stats.num_steps, 'training step')} are too few for one."
    shares = stats.time_shares()
    if shares["loading data"] > _SLOW_LOADING:
        workers = max(2, core_limits().count // 2)
        return (
            f"load data faster: each step waits {shares['loading data']:.0%} of its time for the DataLoader. "
            f"Set num_workers={workers}, or keep the data in memory."
        )
    batch = max(model.batch for model in parallel)
    option = " (--scale-batch multiplies it)" if stats.loaders and not stats.scale_batch else ""
    larger = f"use a larger batch{option}: each device gets {_per_device(batch, devices)} of {batch} samples"
    compared = stats.comparison()
    if compared is not None and compared.one_device_s < _MIN_SPEEDUP * compared.all_devices_s:
        return f"{larger}, too little work to gain from {devices} devices. Otherwise run the script without duoka."
    if shares["transfer"] + shares["waiting"] > _SLOW_COMMUNICATION:
        return f"{larger}."
    return "none: the devices are busy computing."


def _suggestion_without_parallel_models(stats: RunStats) -> str:
    if not stats.models:
        return (
            "no model was found. duoka finds a model where the script calls model.to(device) or model.cuda(), or passes "
            "its parameters to an optimizer. Elsewhere write model = duoka.DataParallel(model)."
        )
    if refused := next((model for model in stats.models if model.refusal), None):
        return f"use a model that can be split: {refused.name} ran on one device for the reason above."
    if uncalled := next((model for model in stats.models if not model.whole), None):
        return f"call {uncalled.name} as model(batch): the script called only its methods or parts, which run on one device."
    if max(model.batch for model in stats.models) < 2:
        return "use batches of more than one sample: one sample cannot be split."
    if many := next((model for model in stats.models if model.whole > 1), None):
        return f"use other batches: none of the {many.whole} calls of {many.name} had one that duoka could check and split."
    return "train for more steps: the first call, which checks the model, ran on one device, and was the only one."


def _time_lines(stats: RunStats) -> list[str]:
    lines = []
    has_split = any(step.is_split for step in stats.steps)
    parallel = [model for model in stats.models if model.is_parallel]
    all_wrapped = bool(parallel) and all(model.devices for model in parallel)  # a wrapper may never run on one device
    if compared := stats.comparison():
        lines.append(
            f"step time: {format_duration(compared.one_device_s)} on one device (in some steps, to compare), "
            f"{format_duration(compared.all_devices_s)} on all devices: {_speed(compared, len(stats.devices))}"
        )
    elif (seconds := stats.seconds_per_step()) is not None:
        few = "; too few steps on one device to compare" if has_split and not all_wrapped else ""
        where = "all devices" if has_split else "one device"
        lines.append(f"step time: {format_duration(seconds)} on {where}{few}")
    if stats.steps:
        shares = stats.time_shares().items()
        lines.append(f"of which: {', '.join(f'{name} {share:.0%}' for name, share in shares)}")
    if stats.startup_s:
        lines.append(f"start-up: {format_duration(stats.startup_s)} to check the models and start workers")
    return lines


def _speed(compared: StepComparison, devices: int) -> str:
    ratio = compared.one_device_s / compared.all_devices_s
    if ratio > _MAX_SPEEDUP_PER_DEVICE * devices:
        return (
            f"no comparison, because {devices} devices gain at most {devices} times: another program slowed one device"
        )
    return f"{ratio:.2f} times as fast" if ratio >= 1 else f"{1 / ratio:.2f} times slower"


def _merge_alike(models: Sequence[ModelStats]) -> list[ModelStats]:
    """Merge the models that one line of the script creates, as in a cross-validation."""
    groups: dict[tuple[str, str, str, int], list[ModelStats]] = {}
    for model in models:
        groups.setdefault((model.name, model.how, model.refusal, model.devices), []).append(model)
    return [group[0].merged(group[1:]) for group in groups.values()]


def _per_device(batch: int, devices: int) -> str:
    size, rest = divmod(batch, devices)
    return f"{size} or {size + 1}" if rest else f"{size}"
