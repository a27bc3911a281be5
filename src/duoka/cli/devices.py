"""``duoka devices``: table of the devices, their users, and the ones that would be chosen and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from duoka.cli.arguments import add_device, add_json, command_parser
from duoka.cli.console import console, gibibytes, print_json
from duoka.devices import DeviceInfo, DeviceProcess, DeviceSelection, describe, resolve
from duoka.devices.cpu import Cores, core_limits
from duoka.utils.argument_parser import ArgumentParser

if TYPE_CHECKING:
    from rich.table import Table


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
        chosen = {"devices": [str(device) for device in choice.devices], "reason": choice.reason}
        rows = [dataclasses.asdict(fact) for fact in facts]
        print_json({"devices": rows, "cores": cores.count, "spec": spec, "choice": chosen})
    else:
        print_devices(spec, choice, facts, cores)
    return 0


def parser() -> ArgumentParser:
    """Return the command's parser."""
    parser = command_parser("devices")
    specs = "auto, all, 0, 0,1, 0-3, cuda:1, cpu, cpu:4, idle, idle:2, mps"
    parser.add_argument("spec", nargs="?", default=None, metavar="SPEC", help="the same as --device SPEC")
    add_device(parser, f"devices to choose: {specs} (default: %(default)s)")
    add_json(parser, "; bytes and percent")
    return parser


def print_devices(spec: str, choice: DeviceSelection, facts: Sequence[DeviceInfo], cores: Cores) -> None:
    """Print the table of devices, and the ones that ``spec`` chooses."""
    out = console()
    out.print(_table(facts, cores), soft_wrap=False)
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
    for heading in (
        "device",
        "name",
        "memory used / total",
        *(["cores"] if only_cpu else ["busy", "used by", "links"]),
    ):
        table.add_column(heading, overflow="fold")
    for fact in facts:
        memory = f"{gibibytes(fact.memory_used_bytes)} / {gibibytes(fact.memory_total_bytes)}"
        busy = "-" if fact.utilization_percent is None else f"{fact.utilization_percent} %"
        links = "\n".join(f"{link.to}: {link.kind}" for link in fact.links) or "-"
        table.add_row(fact.device, fact.name, memory, *((cores.reason,) if only_cpu else (busy, _users(fact), links)))
    return table


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
