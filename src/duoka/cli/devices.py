"""``duoka devices``: table of the devices, their users, and the ones that would be chosen and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from duoka.cli.console import console, gibibytes, print_json
from duoka.cli.main import command_parser
from duoka.devices import DeviceInfo, DeviceProcess, DeviceSelection, describe, resolve
from duoka.devices.cpu import Cores, core_limits

if TYPE_CHECKING:
    from rich.table import Table

    from duoka.utils.argument_parser import ArgumentParser


_LISTED = 8
"""Largest number of CPU workers that are listed one by one."""
_COMMAND_LENGTH = 32
_HIDDEN_MEMORY = 0.1
"""A larger share of memory that no visible process holds belongs to another container; the driver itself uses less."""


def run(argv: Sequence[str]) -> int:
    """Print the devices of this machine and the choice; return the exit status."""
    options = parser().parse(argv)
    spec = options.spec or options.device
    choice, facts, cores = resolve(spec), describe(), core_limits()
    if options.json:
        print_json(_as_json(spec, choice, facts, cores))
    else:
        print_devices(spec, choice, facts, cores)
    return 0


def parser() -> ArgumentParser:
    """Return the command's parser."""
    parser = command_parser("devices")
    specs = "auto, all, 0, 0,1, 0-3, cuda:1, cpu, cpu:4, idle, idle:2, mps"
    parser.add_argument("spec", nargs="?", default=None, metavar="SPEC", help="the same as --device SPEC")
    parser.add_argument(
        "--device",
        "--devices",
        default="auto",
        metavar="SPEC",
        help=f"devices to choose: {specs} (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs; bytes and percent")
    return parser


def _as_json(spec: str, choice: DeviceSelection, facts: Sequence[DeviceInfo], cores: Cores) -> dict[str, Any]:
    return {
        "devices": [dataclasses.asdict(fact) for fact in facts],
        "cores": cores.count,
        "spec": spec,
        "choice": {"devices": [str(device) for device in choice.devices], "reason": choice.reason},
    }


def print_devices(spec: str, choice: DeviceSelection, facts: Sequence[DeviceInfo], cores: Cores) -> None:
    """Print the table of devices, and the ones that ``spec`` chooses."""
    out = console()
    out.print(_table(facts, cores))
    links = {link.kind: link.description for fact in facts for link in fact.links}
    for kind, words in sorted(links.items()):
        out.print(f"{kind}: {words}")
    if any(fact.source == "torch" for fact in facts):
        out.print("'-' is unknown; for NVIDIA GPUs the driver's NVML and nvidia-ml-py give more.")
    count, only_cpu = len(choice.devices), choice.devices[0].type == "cpu"
    names = f"{count} CPU workers" if only_cpu and count > _LISTED else ", ".join(map(str, choice.devices))
    out.print(f"{spec} chooses: {names}\nwhy: {choice.reason}")
    if only_cpu and count > max(cores.count, 2):  # two are enough to practice
        unit = "core" if cores.count == 1 else "cores"
        out.print(
            f"{count} CPU workers on {cores.count} {unit}: too many, so they wait for each other; cpu:{cores.count} is faster."
        )


def _table(facts: Sequence[DeviceInfo], cores: Cores) -> Table:
    """Return a table with one row a device, and the columns that a CPU or a GPU has."""
    from rich.table import Table

    table = Table()
    only_cpu = all(fact.index is None for fact in facts)
    for heading in ("device", "name", "memory used / total", "cores" if only_cpu else "busy"):
        table.add_column(heading, overflow="fold")
    if not only_cpu:
        table.add_column("used by", overflow="fold")
        table.add_column("links", overflow="fold")
    for fact in facts:
        memory = f"{gibibytes(fact.memory_used_bytes)} / {gibibytes(fact.memory_total_bytes)}"
        rest = (cores.reason,) if only_cpu else (_percent(fact), _users(fact), _links(fact))
        table.add_row(fact.device, fact.name, memory, *rest)
    return table


def _percent(fact: DeviceInfo) -> str:
    return "-" if fact.utilization_percent is None else f"{fact.utilization_percent} %"


def _users(fact: DeviceInfo) -> str:
    others = [process for process in fact.processes if not process.own]
    if not others:
        hidden = fact.foreign_memory_share > _HIDDEN_MEMORY
        return "hidden processes" if hidden else "none" if fact.source == "nvml" else "-"
    return "\n".join(map(_process, others))


def _process(process: DeviceProcess) -> str:
    """Return one process on one line; the system hides commands of other containers, but not process numbers."""
    command = process.command or "hidden process"
    shown = command if len(command) <= _COMMAND_LENGTH else f"{command[: _COMMAND_LENGTH - 3]}..."
    memory = "" if process.memory_bytes is None else f", {gibibytes(process.memory_bytes)}"
    return f"{process.user or 'another container'}: {shown} (process {process.pid}{memory})"


def _links(fact: DeviceInfo) -> str:
    return "\n".join(f"{link.to}: {link.kind}" for link in fact.links) or "-"
