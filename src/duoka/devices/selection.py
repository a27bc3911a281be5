"""Selection of devices: a specification resolved to devices of this machine, with the reason."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from duoka.devices import nccl
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
        count = request.count or 1
        reason = "cpu was requested." if count == 1 else f"{count} CPU workers were requested."
        return DeviceSelection((torch.device("cpu"),) * count, reason)
    if request.kind == "index":
        return _by_index(request, inventory)
    if request.kind == "idle" and (inventory.count or request.count):
        return _idle(request, inventory, get_usage)
    if inventory.count and request.type in (None, inventory.type):
        devices = inventory.devices()
        which = "the one accelerator, " if len(devices) == 1 else f"all {len(devices)} accelerators: "
        return DeviceSelection(devices, f"{request.text} selects {which}{join_names(devices)}.")
    if inventory.count or request.type or request.text.lower() == "gpu":  # not the CPU because of a broken driver
        raise _not_there(request, inventory, request.type if inventory.count else request.text)
    reason = f"{request.text} selects the CPU, because no accelerator was found{_note(inventory)}."
    if request.kind != "auto":
        logger.warning("device %s", reason)
    return DeviceSelection((torch.device("cpu"),), reason)


def _by_index(request: DeviceRequest, inventory: Inventory) -> DeviceSelection:
    wrong_type = request.type not in (None, inventory.type)
    missing = [index for index in request.indices if wrong_type or index >= inventory.count]
    if missing:
        kind = request.type or inventory.type
        absent = [f"{kind}:{index}" if kind else str(index) for index in dict.fromkeys(missing)]
        more = [f"{len(absent) - _MAX_LISTED} more"] if len(absent) > _MAX_LISTED else []
        raise _not_there(request, inventory, join_names([*absent[:_MAX_LISTED], *more]))
    devices = inventory.devices(request.indices)
    reason = f"{join_names(devices)} {'was' if len(devices) == 1 else 'were'} requested"
    if repeated := sorted({str(device) for device in devices if devices.count(device) > 1}):
        shared = f"several ranks share {join_names(repeated)}, {nccl.sharing_backend(devices[0].type)}"
        logger.warning("device %r: %s. Use this for tests only; it is slower than one rank.", request.text, shared)
        reason += f"; {shared}"
    return DeviceSelection(devices, f"{reason}.")


def _note(inventory: Inventory) -> str:
    return f" ({inventory.note})" if inventory.note else ""


def _not_there(request: DeviceRequest, inventory: Inventory, names: str | None) -> DeviceError:
    if inventory.count:
        existing = f"this machine has {join_names(inventory.devices())}"
        remedy = f"0 to {inventory.count - 1}" if inventory.count > 1 else "'0'"
    else:
        existing, remedy = "this machine has no accelerator", "'cpu', 'cpu:2' for practice"
    missing = "" if request.text == names else f": {names}"
    return DeviceError(
        f"device {request.text!r} does not exist{missing}; {existing}{_note(inventory)}. "
        f"Write {remedy}, or 'auto'; `duoka devices` lists the devices."
    )


def _idle(request: DeviceRequest, inventory: Inventory, get_usage: GetUsage) -> DeviceSelection:
    existing = join_names(inventory.devices()) if inventory.count else "no accelerator"
    if request.count and request.count > inventory.count:
        raise DeviceError(
            f"device {request.text!r} needs {request.count}, but this machine has {existing}. "
            "Write a smaller number or 'auto'."
        )
    facts = get_usage()
    if facts is None:
        raise DeviceError(
            f"device {request.text!r} needs NVML, which knows the processes on {existing}. "
            "Install nvidia-ml-py and an NVIDIA driver, or name the devices by number."
        )
    uses = {fact.index or 0: _use(fact) for fact in facts}
    in_use = {index: f"{inventory.type}:{index} {use}" for index, use in uses.items() if use is not None}
    if not request.count:
        chosen = [index for index in uses if index not in in_use]
        others = "; ".join(in_use.values())
        if not chosen:
            raise DeviceError(
                f"device {request.text!r}: no accelerator is idle: {others}. "
                "Write 'idle:1' for the least used, name devices by number, or wait."
            )
        rest = f", which no other program uses{f' ({others})' if others else ''}"
    else:
        chosen = sorted(fact.index or 0 for fact in sorted(facts, key=_load)[: request.count])
        shared = "; ".join(in_use[index] for index in chosen if index in in_use)
        if shared:
            logger.warning("device %r selects devices that are in use: %s.", request.text, shared)
        rest = f", although {shared}" if shared else ", which no other program uses"
    devices = inventory.devices(chosen)
    return DeviceSelection(devices, f"{request.text} selects {join_names(devices)}{rest}.")


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
