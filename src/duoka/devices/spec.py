"""The device grammar: text, numbers or ``torch.device`` objects, parsed into a ``DeviceRequest`` without hardware."""

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch

from duoka.errors import ConfigError, DeviceError
from duoka.utils.text import did_you_mean, shorten

DeviceSpec: TypeAlias = "str | int | torch.device | Sequence[str | int | torch.device] | None"
"""Any form of the grammar: ``"auto"``, ``0``, ``"0,1"``, ``torch.device("cuda:1")``, ``["cuda:0", "cuda:1"]``."""

GRAMMAR = "'auto', 'all', '0', '0,1', '0-3', 'cuda:1', 'cpu', 'cpu:4', 'idle', 'idle:2' or 'mps'"

Kind = Literal["auto", "all", "index", "cpu", "idle"]

_ACCELERATORS: dict[str, str | None] = {
    **{name: name for name in ("cuda", "hpu", "mps", "mtia", "npu", "xpu")},
    **dict.fromkeys(("hip", "rocm"), "cuda"),
    **dict.fromkeys(("all", "gpu"), None),
}
"""Names of accelerators, and their type in torch, which names an AMD GPU "cuda"; ``None`` for any type."""
_NAMES = sorted({"auto", "cpu", "idle", *_ACCELERATORS} - {"hip", "rocm"})
_MAX_DEVICES = 1024
"""Limit for typing errors such as ``0-999999999``."""
_MAX_TEXT = 10 * _MAX_DEVICES


def reconcile(device: DeviceSpec, devices: DeviceSpec, default: DeviceSpec = "auto") -> DeviceSpec:
    """Return what ``device=`` and ``devices=``, two spellings of one option, name together; ``None`` is not given.

    Raises ConfigError where both are given and name different devices.

    >>> reconcile("cpu:2", None)
    'cpu:2'
    """
    if device is None or devices is None:
        given = device if devices is None else devices
        return default if given is None else given
    if replace(parse(device), text="") != replace(parse(devices), text=""):
        raise ConfigError(f"device={device!r} and devices={devices!r} name different devices. Give one of them.")
    return devices


@dataclass(frozen=True)
class DeviceRequest:
    """The devices that a user names, not yet compared with those of the machine."""

    text: str
    """The specification as the user wrote it, for messages."""
    kind: Kind
    type: str | None = None
    """The accelerator type in torch; ``None`` for any."""
    indices: tuple[int, ...] = ()
    """The accelerators' indices, if ``kind`` is ``"index"``."""
    count: int | None = None
    """The number of CPU workers or idle accelerators; ``None`` if not given."""


def parse(spec: DeviceSpec) -> DeviceRequest:
    """Parse ``spec``; raises ``DeviceError``, with a suggestion, if it is not of the grammar.

    >>> parse("0,2-3").indices
    (0, 2, 3)
    >>> parse("cpu:4").count
    4
    """
    if spec is None:
        return DeviceRequest("auto", "auto")
    entries = spec if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]
    if not entries:
        raise DeviceError(f"an empty list names no device. Write {GRAMMAR}.")
    if len(entries) > _MAX_DEVICES or (len(entries) == 1 and len(str(entries[0])) > _MAX_TEXT):
        raise DeviceError(f"device {shorten(repr(spec))} names more than {_MAX_DEVICES} devices. Write {GRAMMAR}.")
    text = ",".join(_write(entry) for entry in entries)
    shown = shorten(text)
    parts = [_parse_item(item, shown) for item in text.lower().split(",")]
    return parts[0] if len(parts) == 1 else _join(parts, shown)


def _write(entry: object) -> str:
    if isinstance(entry, str):
        return entry.strip()
    if isinstance(entry, torch.device):  # torch.device("cpu:0") is the CPU, but "cpu:0" would be zero workers
        return "cpu" if entry.type == "cpu" else str(entry)
    try:
        if not isinstance(entry, bool):
            return str(operator.index(entry))  # type: ignore[arg-type]  # any integer, also of numpy or a 0-d tensor
    except TypeError:
        pass
    raise DeviceError(
        f"device {shorten(repr(entry))} is a {type(entry).__name__}; write {GRAMMAR}, or give a torch.device."
    )


def _parse_item(item: str, text: str) -> DeviceRequest:
    """Parse one entry, without commas, of the request ``text``."""
    item = item.strip()
    if numbers := re.fullmatch(r"(?:([a-z]+):)?([0-9]{1,4})(?:-([0-9]{1,4}))?", item):
        name, first, last = numbers.groups()
        if name is None or name in _ACCELERATORS:
            kind = _ACCELERATORS[name] if name else None
            return DeviceRequest(text, "index", kind, _range(int(first), int(last or first), text))
        if name in ("cpu", "idle") and last is None:
            return DeviceRequest(text, "cpu" if name == "cpu" else "idle", count=_count(name, int(first), text))
    if item in ("auto", "idle"):
        return DeviceRequest(text, "auto" if item == "auto" else "idle")
    if item == "cpu":
        return DeviceRequest(text, "cpu", count=1)
    if item in _ACCELERATORS:
        return DeviceRequest(text, "all", _ACCELERATORS[item])
    where = f"device {text!r}" if item == text.lower() else f"device {text!r}, entry {shorten(item)!r},"
    raise DeviceError(f"{where} is not valid{_hint(item)} Write {GRAMMAR}.")


def _range(first: int, last: int, text: str) -> tuple[int, ...]:
    if last < first:
        raise DeviceError(f"device {text!r} counts down. A range goes up: write '{last}-{first}'.")
    if last - first >= _MAX_DEVICES:
        raise DeviceError(f"device {text!r} is {last - first + 1} devices; at most {_MAX_DEVICES} can be named.")
    return tuple(range(first, last + 1))


def _count(name: str, count: int, text: str) -> int:
    if 1 <= count <= _MAX_DEVICES:
        return count
    what = "CPU workers" if name == "cpu" else "idle accelerators"
    hint = " Write 'cpu' for the CPU: the number after 'cpu:' is how many workers." if name == "cpu" else ""
    raise DeviceError(f"device {text!r} asks for {count} {what}; it must be 1 to {_MAX_DEVICES}.{hint}")


def _join(parts: list[DeviceRequest], text: str) -> DeviceRequest:
    """Combine several entries into one request: accelerators by number, or CPU workers."""
    kinds = {part.kind for part in parts}
    if kinds == {"cpu"}:
        return DeviceRequest(text, "cpu", count=_count("cpu", sum(part.count or 1 for part in parts), text))
    if kinds != {"index"}:
        raise DeviceError(
            f"device {text!r} mixes different kinds of devices. "
            "Write numbered accelerators ('0,1', 'cuda:0,cuda:1') or CPU workers ('cpu:2')."
        )
    types = {part.type for part in parts} - {None}
    if len(types) > 1:
        raise DeviceError(f"device {text!r} mixes {' and '.join(sorted(map(str, types)))}. Name devices of one type.")
    return DeviceRequest(text, "index", next(iter(types), None), tuple(i for part in parts for i in part.indices))


def _hint(item: str) -> str:
    if not item:
        return ": a name is empty."
    if re.fullmatch(r"(?:[a-z]+:)?-[0-9]+", item):
        return ": a number cannot be negative. 'cpu' is the CPU, 'all' is every accelerator."
    if incomplete := re.fullmatch(r"([0-9]+)-|-([0-9]+)", item):
        return f": a range has two ends. Did you mean '{incomplete[1]}'?"
    if joined := re.fullmatch(r"([a-z]+)[ _-]?([0-9]{1,4})s?", item):
        name, number = joined.groups()
        if name in _ACCELERATORS:
            return f": did you mean '{number}'?"
        if name in ("cpu", "idle"):
            return f": did you mean '{name}:{number}'?"
    suggestion = did_you_mean(item, _NAMES)
    return f": {suggestion}" if suggestion else "."
