"""``duoka check``: a computation on each device, an all-reduce over all, and a save and load between them."""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import duoka
from duoka.cli.arguments import add_device, add_json, command_parser
from duoka.cli.console import console, gibibytes, print_json
from duoka.devices.cpu import loader_workers
from duoka.errors import DuokaError
from duoka.scaling import Batch
from duoka.utils.argument_parser import ArgumentParser
from duoka.utils.text import first_line

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
    results = check(choice.devices, choice.reason)
    if options.json:
        print_json([result._asdict() for result in results])
    else:
        out = console()
        for result in results:
            out.print(f"{'pass' if result.passed else 'FAIL'}  {result.name}: {result.words}")
            if result.remedy:
                out.print(f"      remedy: {result.remedy}")
    return 0 if all(result.passed for result in results) else 1


def parser() -> ArgumentParser:
    """Return the command's parser."""
    parser = command_parser("check")
    add_device(parser, "devices to check (default: %(default)s)")
    add_json(parser)
    return parser


def check(devices: Sequence[torch.device], reason: str = "") -> list[CheckResult]:
    """Run every check of ``devices``, also after one that failed."""
    distinct = list(dict.fromkeys(devices))
    saver = f"{len(devices)} devices" if len(devices) > 1 else str(devices[0])
    all_reduce_remedy = "try each device alone with --device; NCCL_DEBUG=INFO says what NCCL does"
    return [
        _check(
            "devices", lambda: f"{_memory(distinct)}; {reason}", "name others with --device; `duoka devices` lists them"
        ),
        _check("configuration", lambda: _configuration(len(devices)), "name fewer devices with --device"),
        *(_check(f"forward and backward on {each}", partial(_compute, each), _remedy(each)) for each in distinct),
        _check("all at once, and all-reduce", lambda: _all_reduce(devices), all_reduce_remedy),
        _check(
            f"save on {saver}, reload on one",
            lambda: _save_and_load(devices),
            "free some space in the folder of temporary files",
        ),
    ]


def _check(name: str, step: Callable[[], str], remedy: str) -> CheckResult:
    try:
        return CheckResult(name, passed=True, words=step())
    except Exception as error:  # any error of a driver or a library is the finding
        kind = "" if isinstance(error, DuokaError) else f"{type(error).__name__}: "
        return CheckResult(name, passed=False, words=f"{kind}{first_line(error)}", remedy=remedy)


def _remedy(device: torch.device) -> str:
    if device.type == "cpu":
        test = "python -c 'import torch; print(torch.ones(2) @ torch.ones(2))'"
        return f"run `{test}`: if it fails too, install torch anew"
    return f"`duoka devices` shows who uses {device}; leave it out with --device, or check torch's build against the driver"


def _memory(devices: Sequence[torch.device]) -> str:
    facts = duoka.devices.describe()
    known = {fact.device: f" ({fact.name}, {gibibytes(fact.memory_total_bytes)})" for fact in facts}
    return ", ".join(f"{device}{known.get(str(device), '')}" for device in devices)


def _configuration(num_devices: int) -> str:
    return f"batch {Batch(BATCH, num_devices).summary}; data-loader workers {loader_workers(num_devices).reason}"


def _small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


def _loss_and_gradient(device: torch.device) -> tuple[float, float]:
    """Return the loss of one forward pass and the norm of its gradient."""
    model = _small_model().to(device)
    images = torch.linspace(-1, 1, 16 * 3 * 64).view(16, 3, 8, 8).to(device)
    loss = nn.functional.cross_entropy(model(images), torch.arange(16, device=device) % 10)
    torch.autograd.backward(loss)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return float(loss.detach()), float(nn.utils.get_total_norm(gradients))


def _compute(device: torch.device) -> str:
    """Run one forward and backward pass, and compare them with the CPU's."""
    expected, found = _loss_and_gradient(torch.device("cpu")), _loss_and_gradient(device)
    if abs(found[0] - expected[0]) > 1e-2 or abs(found[1] - expected[1]) > 1e-2 * max(1.0, expected[1]):
        raise ArithmeticError(f"loss and gradient are {found}, and on the CPU {expected}")
    return f"loss {found[0]:.4f}, as on the CPU"


def _sum_ranks() -> tuple[int, float]:
    """Compute on this rank; return the world size and the sum of rank + 1 over all ranks."""
    world = duoka.current_world()
    _compute(world.device)
    return world.size, float(world.all_reduce(torch.full((1024,), world.rank + 1.0, device=world.device)).mean())


def _all_reduce(devices: Sequence[torch.device]) -> str:
    if len(devices) == 1:
        return "one device, so there is nothing to reduce"
    size, total = duoka.launch(_sum_ranks, devices=list(devices))
    expected = size * (size + 1) / 2
    if size != len(devices) or total != expected:
        raise ArithmeticError(f"{size} of {len(devices)} devices answered, and their sum is {total}, not {expected}")
    return f"{size} devices added up to {total:g}, as they should"


def _save_and_load(devices: Sequence[torch.device]) -> str:
    """Save a model that is parallel on all devices and load it into a plain one, and the other way round."""
    with tempfile.TemporaryDirectory(prefix="duoka-check-") as folder:
        path = Path(folder) / "model.safetensors"
        parallel, plain = duoka.DataParallel(_small_model(), devices=list(devices)), _small_model()
        duoka.save(parallel, path)
        for parameter in plain.parameters():
            nn.init.zeros_(parameter)
        duoka.load(path, plain)
        duoka.save(plain, path)
        duoka.load(path, parallel)
        expected = {name: value.cpu() for name, value in duoka.unwrap(parallel).state_dict().items()}
        if any(not torch.equal(value, expected[name]) for name, value in plain.state_dict().items()):
            raise ArithmeticError("the weights that were loaded are not those that were saved")
    return f"{len(expected)} tensors are the same"
