"""Selection of devices: a specification resolved to devices of this machine, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from duoka.devices.info import DeviceInfo
from duoka.devices.inventory import Inventory, detect, device_usage
from duoka.devices.spec import DeviceRequest, DeviceSpec, parse
from duoka.errors import DeviceError
from duoka.log import logger
from duoka.utils.text import join_names

_BUSY_PERCENT = 10
"""A device with a higher utilization is in use."""
_BUSY_MEMORY = 0.1
"""A device is also in use if others hold a larger share of its memory: a container hides processes, but not memory."""
_MAX_LISTED = 8
"""The number of missing devices that a message names."""

GetUsage = Callable[[], Sequence[DeviceInfo] | None]


@dataclass(frozen=True)
class DeviceSelection:
    """The devices to use, one a rank, and the reason."""

    devices: tuple[torch.device, ...]
    """Accelerators have the index that the user sees; each CPU worker is ``torch.device("cpu")``."""
    reason: str
    """One sentence."""


def resolve(spec: DeviceSpec = "auto") -> DeviceSelection:
    """Return the devices that ``spec`` names, and the reason; starts nothing on any device.

    ``spec`` is one of:

    - ``None`` or ``"auto"``: every accelerator, else the CPU;
    - ``"all"``, ``"cuda"``, ``"gpu"``, ``"mps"``: every accelerator (of that type);
    - ``0``, ``"0,1"``, ``"0-3"``, ``"cuda:1"``: accelerators by index;
    - ``"cpu"``, ``"cpu:4"``: the CPU, or four CPU workers;
    - ``"idle"``, ``"idle:2"``: all accelerators that no other program uses, or the two least used;
    - a ``torch.device``, or a list of these.

    ``"auto"``, ``"all"`` and ``"idle"`` select the CPU on a machine without accelerators; ``"cuda"`` and ``"gpu"`` do not.

    Raises:
        DeviceError: ``spec`` is not valid, or names a device that does not exist.

    >>> resolve("cpu:2").devices
    (device(type='cpu'), device(type='cpu'))
    """
    request = parse(spec)
    if request.kind == "cpu":  # needs no driver of accelerators
        return select(request, Inventory(), lambda: None)
    inventory = detect()
    return select(request, inventory, lambda: device_usage(inventory))


def select(request: DeviceRequest, inventory: Inventory, get_usage: GetUsage) -> DeviceSelection:
    """Resolve a request on a machine with these accelerators; ``get_usage`` returns their use by other programs."""
    if request.kind == "cpu":
        return _cpu(request.count or 1)
    if request.kind == "index":
        return _by_index(request, inventory)
    if request.kind == "idle" and (inventory.count or request.count):
        return _idle(request, inventory, get_usage)
    if inventory.count and request.type in (None, inventory.type):
        reason = f"{request.text} selects {_every(inventory)}."
        return DeviceSelection(_devices(inventory, range(inventory.count)), reason)
    if inventory.count:
        raise DeviceError(_not_there(request, inventory, str(request.type)))
    if request.type or request.text.lower() == "gpu":  # not the CPU because of a broken driver
        raise DeviceError(_not_there(request, inventory, request.text))
    return _fall_back(request, inventory)


def _devices(inventory: Inventory, indices: Sequence[int]) -> tuple[torch.device, ...]:
    return tuple(torch.device(str(inventory.type), index) for index in indices)


def _every(inventory: Inventory) -> str:
    names = join_names(inventory.names())
    return f"the one accelerator, {names}" if inventory.count == 1 else f"all {inventory.count} accelerators: {names}"


def _cpu(count: int) -> DeviceSelection:
    reason = "cpu was requested." if count == 1 else f"{count} CPU workers were requested."
    return DeviceSelection((torch.device("cpu"),) * count, reason)


def _fall_back(request: DeviceRequest, inventory: Inventory) -> DeviceSelection:
    """Select the CPU if ``auto``, ``all`` or ``idle`` finds no accelerator; only ``auto`` does so without a warning."""
    cause = f" ({inventory.note})" if inventory.note else ""
    reason = f"{request.text} selects the CPU, because no accelerator was found{cause}."
    if request.kind != "auto":
        logger.warning("device %s", reason)
    return DeviceSelection((torch.device("cpu"),), reason)


def _by_index(request: DeviceRequest, inventory: Inventory) -> DeviceSelection:
    wrong_type = request.type not in (None, inventory.type)
    missing = [index for index in request.indices if wrong_type or index >= inventory.count]
    if missing:
        kind = request.type or inventory.type
        absent = [f"{kind}:{index}" if kind else str(index) for index in dict.fromkeys(missing)]
        raise DeviceError(_not_there(request, inventory, join_names(_shortened(absent))))
    names = [f"{inventory.type}:{index}" for index in request.indices]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        logger.warning(
            "device %r names %s more than once: several ranks share it, over gloo. Use this for tests only; it is slower.",
            request.text,
            join_names(repeated),
        )
    verb = "was" if len(names) == 1 else "were"
    return DeviceSelection(_devices(inventory, request.indices), f"{join_names(names)} {verb} requested.")


def _shortened(names: list[str]) -> list[str]:
    more = len(names) - _MAX_LISTED
    return [*names[:_MAX_LISTED], f"{more} more"] if more > 0 else names


def _not_there(request: DeviceRequest, inventory: Inventory, names: str) -> str:
    """Return the message for devices that do not exist."""
    note = f" ({inventory.note})" if inventory.note else ""
    if inventory.count:
        existing = f"this machine has {join_names(inventory.names())}"
        remedy = f"0 to {inventory.count - 1}" if inventory.count > 1 else "'0'"
    else:
        existing, remedy = "this machine has no accelerator", "'cpu', 'cpu:2' for practice"
    missing = "" if request.text == names else f": {names}"
    return (
        f"device {request.text!r} does not exist{missing}; {existing}{note}. "
        f"Write {remedy}, or 'auto'; `duoka devices` lists the devices."
    )


def _idle(request: DeviceRequest, inventory: Inventory, get_usage: GetUsage) -> DeviceSelection:
    if request.count and request.count > inventory.count:
        existing = join_names(inventory.names()) if inventory.count else "no accelerator"
        raise DeviceError(
            f"device {request.text!r} needs {request.count}, but this machine has {existing}. "
            "Write a smaller number or 'auto'."
        )
    facts = get_usage()
    if facts is None:
        raise DeviceError(
            f"device {request.text!r} needs NVML, which knows the processes on {join_names(inventory.names())}. "
            "Install nvidia-ml-py and an NVIDIA driver, or name the devices by number."
        )
    return _least_used(request, inventory, facts) if request.count else _all_idle(request, inventory, facts)


def _all_idle(request: DeviceRequest, inventory: Inventory, facts: Sequence[DeviceInfo]) -> DeviceSelection:
    uses = {fact.index or 0: _use(fact) for fact in facts}
    free = [index for index, use in uses.items() if use is None]
    busy = [f"{inventory.type}:{index} {use}" for index, use in uses.items() if use is not None]
    if not free:
        raise DeviceError(
            f"device {request.text!r}: no accelerator is idle: {'; '.join(busy)}. "
            "Write 'idle:1' for the least used, name devices by number, or wait."
        )
    rest = f" ({'; '.join(busy)})" if busy else ""
    names = join_names([f"{inventory.type}:{index}" for index in free])
    return DeviceSelection(
        _devices(inventory, free), f"{request.text} selects {names}, which no other program uses{rest}."
    )


def _least_used(request: DeviceRequest, inventory: Inventory, facts: Sequence[DeviceInfo]) -> DeviceSelection:
    ranked = sorted(facts, key=_load)[: request.count]
    chosen = sorted(ranked, key=lambda fact: fact.index or 0)
    shared = [f"{fact.device} {use}" for fact in chosen if (use := _use(fact)) is not None]
    if shared:
        logger.warning("device %r selects devices that are in use: %s.", request.text, "; ".join(shared))
    rest = f", although {'; '.join(shared)}" if shared else ", which no other program uses"
    names = join_names([fact.device for fact in chosen])
    return DeviceSelection(
        _devices(inventory, [fact.index or 0 for fact in chosen]), f"{request.text} selects {names}{rest}."
    )


def _load(fact: DeviceInfo) -> tuple[bool, int, float, int]:
    """Return a sort key: idle devices first, then the lowest utilization, then the most free memory."""
    return _use(fact) is not None, fact.utilization_percent or 0, fact.foreign_memory_share, fact.index or 0


def _use(fact: DeviceInfo) -> str | None:
    """Describe the use of the device by other programs; ``None`` if it is idle."""
    if fact.users:
        owners = sorted({process.user or "another user" for process in fact.users})
        return f"is used by {join_names(owners)} (process {', '.join(str(process.pid) for process in fact.users)})"
    if fact.foreign_memory_share > _BUSY_MEMORY:
        return f"has {fact.foreign_memory_share:.0%} of its memory taken"
    ours = any(process.own for process in fact.processes)
    if not ours and (fact.utilization_percent or 0) > _BUSY_PERCENT:
        return f"has {fact.utilization_percent} % utilization"
    return None
