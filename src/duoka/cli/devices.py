"""``duoka devices``: what is there, who uses it, and which would be chosen and why."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from duoka.cli.console import console, gibibytes, print_json
from duoka.devices import DeviceInfo, DeviceProcess, DeviceSelection, describe, resolve
from duoka.devices.cpu import Cores, core_limits
from duoka.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["SUMMARY", "run", "show"]

SUMMARY = "show the devices, who uses them, and which would be chosen"

_LISTED = 8
"""How many CPU workers are listed one by one."""
_COMMAND_LENGTH = 32
_HIDDEN_MEMORY = 0.1
"""More memory than this share, held by no process that is seen, is another container's; the driver keeps less."""


def run(argv: Sequence[str]) -> int:
    """Print the devices of this machine and the choice; return the exit status."""
    options, others = _parser().parse_known_args(argv)
    if others:
        raise ConfigError(_unknown(others))
    choice, facts, cores = resolve(options.device), describe(), core_limits()
    if options.json:
        print_json(_as_json(options.device, choice, facts, cores))
    else:
        show(options.device, choice, facts, cores)
    return 0


def _unknown(words: Sequence[str]) -> str:
    """Say what is no option here, and how a device is named."""
    flag, joined, value = words[0].partition("=")
    spec = (
        value
        if joined
        else words[1]
        if flag.startswith("-") and len(words) > 1
        else ""
        if flag.startswith("-")
        else flag
    )
    meant = (
        f": did you mean `--device {spec or 'SPEC'}`?"
        if flag in ("--devices", "-d") or not flag.startswith("-")
        else ""
    )
    return f"`duoka devices` takes no {words[0]!r}{meant or ': `duoka devices --help` lists its options'}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "duoka devices", description=f"{SUMMARY[0].upper()}{SUMMARY[1:]}.", allow_abbrev=False
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="SPEC",
        help="what to choose: auto, all, 0, 0,1, 0-3, cuda:1, cpu, cpu:4, idle, idle:2, mps (default: %(default)s)",
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


def show(spec: str, choice: DeviceSelection, facts: Sequence[DeviceInfo], cores: Cores) -> None:
    """Print the table of devices, and what ``spec`` chooses of them."""
    out = console()
    out.print(_table(facts, cores))
    links = {link.kind: link.description for fact in facts for link in fact.links}
    for kind, words in sorted(links.items()):
        out.print(f"{kind}: {words}")
    if any(fact.source == "torch" for fact in facts):
        out.print("'-': not known here; for NVIDIA GPUs the driver's NVML and nvidia-ml-py tell more.")
    count, only_cpu = len(choice.devices), choice.devices[0].type == "cpu"
    names = f"{count} CPU workers" if only_cpu and count > _LISTED else ", ".join(map(str, choice.devices))
    out.print(f"{spec} chooses: {names}\nwhy: {choice.reason}")
    if only_cpu and count > max(cores.count, 2):  # two are for practice anywhere
        unit = "core" if cores.count == 1 else "cores"
        out.print(
            f"{count} CPU workers on {cores.count} {unit}: too many, they wait for each other; cpu:{cores.count} is faster."
        )


def _table(facts: Sequence[DeviceInfo], cores: Cores) -> Table:
    """Return a row a device; for the CPU what a CPU has."""
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
        return "hidden processes" if hidden else "nobody" if fact.source == "nvml" else "-"
    return "\n".join(map(_process, others))


def _process(process: DeviceProcess) -> str:
    """Return one user of a device on one line; the system hides processes of other containers, not their numbers."""
    command = process.command or "hidden process"
    shown = command if len(command) <= _COMMAND_LENGTH else f"{command[: _COMMAND_LENGTH - 3]}..."
    memory = "" if process.memory_bytes is None else f", {gibibytes(process.memory_bytes)}"
    return f"{process.user or 'another container'}: {shown} (process {process.pid}{memory})"


def _links(fact: DeviceInfo) -> str:
    return "\n".join(f"{link.to}: {link.kind}" for link in fact.links) or "-"
