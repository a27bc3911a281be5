"""``duoka check``: a computation on each device, an all-reduce over all, and a save and load between them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

import duoka
from duoka.cli.console import console, gibibytes, print_json
from duoka.cli.main import command_parser
from duoka.devices.cpu import loader_workers
from duoka.errors import DuokaError
from duoka.scaling import Batch

if TYPE_CHECKING:
    from duoka.utils.argument_parser import ArgumentParser


BATCH = 64


class CheckResult(NamedTuple):
    """Result of one check."""

    name: str
    passed: bool
    words: str
    """Finding, or error."""
    remedy: str = ""
    """Remedy; empty if the check passed."""


def run(argv: Sequence[str]) -> int:
    """Check the devices that ``argv`` names; return the exit status, 1 if a check failed."""
    options = parser().parse(argv)
    choice = duoka.devices.resolve(options.device)
    lines = check(choice.devices, choice.reason)
    if options.json:
        print_json([line._asdict() for line in lines])
    else:
        out = console()
        for line in lines:
            out.print(f"{'pass' if line.passed else 'FAIL'}  {line.name}: {line.words}", soft_wrap=True)
            if line.remedy:
                out.print(f"      remedy: {line.remedy}", soft_wrap=True)
    return 0 if all(line.passed for line in lines) else 1


def parser() -> ArgumentParser:
    """Return the command's parser."""
    parser = command_parser("check")
    parser.add_argument(
        "--device", "--devices", default="auto", metavar="SPEC", help="devices to check (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser


def check(devices: Sequence[torch.device], reason: str = "") -> list[CheckResult]:
    """Run every check of ``devices``, also after one that failed."""
    alone = [f"{len(devices)} devices" if len(devices) > 1 else str(devices[0])]
    every = list(devices)
    steps: list[tuple[str, Callable[[], str], str]] = [
        ("devices", lambda: _memory(every, reason), "`duoka devices` shows what is there; name others with --device"),
        ("configuration", lambda: _configuration(every), "name fewer devices with --device"),
        *(
            (f"forward and backward on {device}", partial(_computes, device), _remedy(device))
            for device in dict.fromkeys(every)
        ),
        (
            "all at once, and all-reduce",
            lambda: _reduces(every),
            "try each device alone with --device; NCCL_DEBUG=INFO says what NCCL does",
        ),
        (
            f"save on {alone[0]}, reload on one",
            lambda: _saves(every),
            "free some space in the folder of temporary files",
        ),
    ]
    return [_line(*step) for step in steps]


def _line(name: str, step: Callable[[], str], remedy: str) -> CheckResult:
    try:
        return CheckResult(name, passed=True, words=step())
    except Exception as error:  # any error of a driver or a library is the finding
        words = str(error).strip().splitlines() or [""]
        own = isinstance(error, DuokaError)
        return CheckResult(
            name, passed=False, words=words[0] if own else f"{type(error).__name__}: {words[0]}", remedy=remedy
        )


def _remedy(device: torch.device) -> str:
    if device.type == "cpu":
        return (
            "run `python -c 'import torch; print(torch.ones(2) @ torch.ones(2))'`: if it fails too, install torch anew"
        )
    return f"`duoka devices` shows who uses {device}; leave it out with --device, or check torch's build against the driver"


def _memory(devices: Sequence[torch.device], reason: str) -> str:
    facts = {fact.device: fact for fact in duoka.devices.describe()}
    found = []
    for device in dict.fromkeys(map(str, devices)):
        fact = facts.get(device)
        memory = f" ({fact.name}, {gibibytes(fact.memory_total_bytes)})" if fact else ""
        found.append(f"{device}{memory}")
    return f"{', '.join(found)}; {reason}"


def _configuration(devices: Sequence[torch.device]) -> str:
    batch = Batch(BATCH, len(devices), "per_device", 1).summary
    return f"batch {batch}; data-loader workers {loader_workers(len(devices), None).reason}"


def _small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


def _computes(device: torch.device) -> str:
    """Run one forward and backward pass, and compare them with the CPU's."""
    losses = []
    for place in (torch.device("cpu"), device):
        model = _small().to(place)
        images = torch.linspace(-1, 1, 16 * 3 * 64).view(16, 3, 8, 8).to(place)
        loss = nn.functional.cross_entropy(model(images), torch.arange(16, device=place) % 10)
        torch.autograd.backward(loss)
        gradient = torch.stack(
            [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
        )
        losses.append((float(loss.detach()), float(gradient.norm())))
    (loss_cpu, gradient_cpu), (loss_here, gradient_here) = losses
    if abs(loss_cpu - loss_here) > 1e-2 or abs(gradient_cpu - gradient_here) > 1e-2 * max(1.0, gradient_cpu):
        raise ArithmeticError(f"loss and gradient are {losses[1]}, and on the CPU {losses[0]}")
    return f"loss {loss_here:.4f}, as on the CPU"


def _reduced() -> tuple[int, float]:
    """Compute on this rank; return the world size and the sum of rank + 1 over all ranks."""
    world = duoka.current_world()
    _computes(world.device)
    return world.size, float(world.all_reduce(torch.full((1024,), world.rank + 1.0, device=world.device)).mean())


def _reduces(devices: Sequence[torch.device]) -> str:
    if len(devices) == 1:
        return "one device, so there is nothing to reduce"
    size, total = duoka.launch(_reduced, devices=list(devices))
    expected = size * (size + 1) / 2
    if size != len(devices) or total != expected:
        raise ArithmeticError(f"{size} of {len(devices)} devices answered, and their sum is {total}, not {expected}")
    return f"{size} devices added up to {total:g}, as they should"


def _saves(devices: Sequence[torch.device]) -> str:
    """Save a model that is parallel on all devices and load it into a plain one, and the other way round."""
    with tempfile.TemporaryDirectory(prefix="duoka-check-") as folder:
        path = Path(folder) / "model.safetensors"
        spread = duoka.DataParallel(_small(), devices=list(devices))
        duoka.save(spread, path)
        plain = _small()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.zero_()
        duoka.load(path, plain)
        duoka.save(plain, path)
        duoka.load(path, spread)
        mine = {name: value.cpu() for name, value in duoka.unwrap(spread).state_dict().items()}
        if any(not torch.equal(value, mine[name]) for name, value in plain.state_dict().items()):
            raise ArithmeticError("the weights that were loaded are not those that were saved")
    return f"{len(mine)} tensors are the same"
