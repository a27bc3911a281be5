"""The choice of devices: what was asked for, what is there, what is taken and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from duoka.devices.info import DeviceInfo
from duoka.devices.inventory import Inventory, look, occupancy
from duoka.devices.spec import DeviceRequest, DeviceSpec, parse
from duoka.errors import DeviceError
from duoka.log import logger

__all__ = ["DeviceSelection", "choose", "resolve"]

_BUSY_PERCENT = 10
"""A device that computes more than this share of the time is in use."""
_BUSY_MEMORY = 0.1
"""So is one with more than this share of its memory taken by others: a container hides their processes, not this."""
_LISTED = 8
"""How many absent devices a message names."""

Occupancy = Callable[[], Sequence[DeviceInfo] | None]


@dataclass(frozen=True)
class DeviceSelection:
    """The devices to use, one a rank, and why these."""

    devices: tuple[torch.device, ...]
    """Accelerators with their index as the user sees it; each CPU worker is ``torch.device("cpu")``."""
    reason: str
    """One sentence."""


def resolve(spec: DeviceSpec = "auto") -> DeviceSelection:
    """Return the devices that ``spec`` names, and why.

    ``spec`` is ``None`` or ``"auto"`` (every accelerator, else the CPU), ``"all"``, ``"cuda"``, ``"gpu"``, ``0``,
    ``"0,1"``, ``"0-3"``, ``"cuda:1"``, ``"cpu"``, ``"cpu:4"`` (four workers), ``"idle"`` (accelerators that nobody else
    uses), ``"idle:2"`` (the two idlest), ``"mps"``, a ``torch.device``, or a list of these. ``DeviceError`` is raised
    where it is not understood, or names a device that is not there; ``"auto"``, ``"all"`` and ``"idle"`` take the CPU where
    there is no accelerator, ``"cuda"`` and ``"gpu"`` do not. Starts nothing on any device, and no context.

    >>> resolve("cpu:2").devices
    (device(type='cpu'), device(type='cpu'))
    """
    request = parse(spec)
    if request.kind == "cpu":  # never asks for accelerators: works where their driver does not
        return choose(request, Inventory(), lambda: None)
    seen = look()
    return choose(request, seen, lambda: occupancy(seen))


def choose(request: DeviceRequest, seen: Inventory, occupied: Occupancy) -> DeviceSelection:
    """Return the choice for a request on a machine with these accelerators; ``occupied`` tells who uses them."""
    if request.kind == "cpu":
        return _cpu(request.count or 1)
    if request.kind == "index":
        return _by_index(request, seen)
    if request.kind == "idle" and (seen.count or request.count):
        return _idle(request, seen, occupied)
    if seen.count and request.type in (None, seen.type):
        return DeviceSelection(_devices(seen, range(seen.count)), f"{request.text} takes {_every(seen)}.")
    if seen.count:
        raise DeviceError(_not_there(request, seen, str(request.type)))
    if request.type or request.text.lower() == "gpu":  # hours on a CPU because a driver is broken are nobody's wish
        raise DeviceError(_not_there(request, seen, request.text))
    return _fall_back(request, seen)


def _devices(seen: Inventory, indices: Sequence[int]) -> tuple[torch.device, ...]:
    return tuple(torch.device(str(seen.type), index) for index in indices)


def _every(seen: Inventory) -> str:
    names = seen.names()
    return f"the one accelerator, {names[0]}" if len(names) == 1 else f"all {len(names)} accelerators: {_and(names)}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _cpu(count: int) -> DeviceSelection:
    reason = "cpu was asked for." if count == 1 else f"{count} CPU workers were asked for."
    return DeviceSelection((torch.device("cpu"),) * count, reason)


def _fall_back(request: DeviceRequest, seen: Inventory) -> DeviceSelection:
    """Take the CPU where ``auto``, ``all`` or ``idle`` finds no accelerator; only ``auto`` does so quietly."""
    cause = f" ({seen.note})" if seen.note else ""
    reason = f"{request.text} takes the CPU, because no accelerator was found{cause}."
    if request.kind != "auto":
        logger.warning("device %s", reason)
    return DeviceSelection((torch.device("cpu"),), reason)


def _by_index(request: DeviceRequest, seen: Inventory) -> DeviceSelection:
    wrong_type = request.type not in (None, seen.type)
    missing = [index for index in request.indices if wrong_type or index >= seen.count]
    if missing:
        kind = request.type or seen.type
        absent = [f"{kind}:{index}" if kind else str(index) for index in dict.fromkeys(missing)]
        raise DeviceError(_not_there(request, seen, _and(_shortened(absent))))
    names = [f"{seen.type}:{index}" for index in request.indices]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        logger.warning(
            "device %r names %s more than once: these ranks share it, over gloo. That is for tests; it is slower.",
            request.text,
            _and(twice),
        )
    verb = "was" if len(names) == 1 else "were"
    return DeviceSelection(_devices(seen, request.indices), f"{_and(names)} {verb} asked for.")


def _shortened(names: list[str]) -> list[str]:
    more = len(names) - _LISTED
    return [*names[:_LISTED], f"{more} more"] if more > 0 else names


def _not_there(request: DeviceRequest, seen: Inventory, names: str) -> str:
    """Return the message for devices, already in words, that are not there."""
    note = f" ({seen.note})" if seen.note else ""
    there = f"there is {_and(seen.names())}" if seen.count else "there is no accelerator, only the CPU"
    remedy = f"0 to {seen.count - 1}" if seen.count > 1 else "'0'" if seen.count else "'cpu'"
    named = "" if request.text == names else f": {names}"
    remedy = f"Write {remedy}, or 'auto'; `duoka devices` shows what is there."
    return f"device {request.text!r} is not there{named}; {there}{note}. {remedy}"


def _idle(request: DeviceRequest, seen: Inventory, occupied: Occupancy) -> DeviceSelection:
    if request.count and request.count > seen.count:
        there = f"there is {_and(seen.names())}" if seen.count else "there is no accelerator"
        raise DeviceError(
            f"device {request.text!r} asks for {request.count}, and {there}. Write a smaller number or 'auto'."
        )
    facts = occupied()
    if facts is None:
        raise DeviceError(
            f"device {request.text!r}: who uses {_and(seen.names())} cannot be told without NVML. "
            "Install nvidia-ml-py and an NVIDIA driver, or name the devices by number."
        )
    return _idlest(request, seen, facts) if request.count else _all_idle(request, seen, facts)


def _all_idle(request: DeviceRequest, seen: Inventory, facts: Sequence[DeviceInfo]) -> DeviceSelection:
    uses = {fact.index or 0: _use(fact) for fact in facts}
    free = [index for index, use in uses.items() if use is None]
    busy = [f"{seen.type}:{index} {use}" for index, use in uses.items() if use is not None]
    if not free:
        raise DeviceError(
            f"device {request.text!r}: none is idle: {'; '.join(busy)}. "
            "Write 'idle:1' for the idlest, name devices by number, or wait."
        )
    beside = f" ({'; '.join(busy)})" if busy else ""
    names = _and([f"{seen.type}:{index}" for index in free])
    return DeviceSelection(_devices(seen, free), f"{request.text} takes {names}, which nobody else uses{beside}.")


def _idlest(request: DeviceRequest, seen: Inventory, facts: Sequence[DeviceInfo]) -> DeviceSelection:
    ranked = sorted(facts, key=_busyness)[: request.count]
    taken = sorted(ranked, key=lambda fact: fact.index or 0)
    shared = [f"{fact.device} {use}" for fact in taken if (use := _use(fact)) is not None]
    if shared:
        logger.warning("device %r takes devices that are in use: %s.", request.text, "; ".join(shared))
    beside = f", though {'; '.join(shared)}" if shared else ", which nobody else uses"
    names = _and([fact.device for fact in taken])
    return DeviceSelection(
        _devices(seen, [fact.index or 0 for fact in taken]), f"{request.text} takes {names}{beside}."
    )


def _busyness(fact: DeviceInfo) -> tuple[bool, int, float, int]:
    """Sort key: idle ones first, then the least computing, then the most free memory."""
    return _use(fact) is not None, fact.utilisation_percent or 0, fact.memory_of_others, fact.index or 0


def _use(fact: DeviceInfo) -> str | None:
    """Return what others do on the device, in words, or ``None`` where it is idle."""
    if fact.users:
        who = sorted({process.user or "another user" for process in fact.users})
        return f"is used by {_and(who)} (process {', '.join(str(process.pid) for process in fact.users)})"
    if fact.memory_of_others > _BUSY_MEMORY:
        return f"has {fact.memory_of_others:.0%} of its memory taken"
    ours = any(process.own for process in fact.processes)
    if not ours and (fact.utilisation_percent or 0) > _BUSY_PERCENT:
        return f"computes {fact.utilisation_percent} % of the time"
    return None
