"""``duoka run SCRIPT``: an unchanged script, module or notebook on every device."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from duoka.cli.arguments import add_device, command_parser
from duoka.errors import ConfigError
from duoka.utils.argument_parser import ArgumentParser
from duoka.utils.text import did_you_mean

if TYPE_CHECKING:
    import torch

    from duoka.script_runner import Script


_VISIBLE_DEVICES = "DUOKA_RUN_DEVICES"
_DEVICE_NUMBERS = "DUOKA_RUN_NUMBERS"
"""Environment variables of a restarted run: its devices as it sees them, and by the user's numbers."""
_FLAGS = ("--scale-batch", "--explain")
_DEVICE = ("--device", "--devices")
_RULE = (
    "Options stand before the script or after it. Words after -- belong to the script, and so does an option that also "
    "stands before the script: duoka run train.py --epochs 3 --device 0,1. If the script has an option --device too, "
    "it gets one device by it (--device cuda), and duoka's stands before the script."
)


class RunArguments(NamedTuple):
    """Arguments of ``duoka run``."""

    target: str
    arguments: tuple[str, ...]
    is_module: bool = False
    device: str = "auto"
    scale_batch: bool = False
    explain: bool = False


def run(argv: Sequence[str]) -> int:
    """Run the script that ``argv`` names; return its own exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        parser().print_help(sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    request = parse(argv)
    from duoka.devices import resolve
    from duoka.script_runner import RunSession, Script, end_copies_of_script, explain

    if request.target.endswith(".ipynb") and not request.is_module:
        resolve(request.device)  # an error here, not in the notebook's kernel
        return _run_notebook(request)
    program = Script(request.target, request.arguments, is_module=request.is_module)
    if _names_one_device(argv, request, program):
        request = parse(argv, is_device_the_scripts=True)
        program.argv[1:] = request.arguments
    else:
        _check_ambiguity(argv, request, program)
    devices = resolve(os.environ.pop(_VISIBLE_DEVICES, request.device)).devices
    if request.explain:
        lines = explain(program.source, program.target, devices, scale_batch=request.scale_batch)
        sys.stdout.write("\n".join(lines) + "\n")
        return 0
    _restart_with_visible_devices(devices, argv)
    numbers = [int(number) for number in os.environ.pop(_DEVICE_NUMBERS, "").split(",") if number]
    with RunSession(devices, scale_batch=request.scale_batch, source=program.source, numbers=numbers) as session:
        status = program.run()
        if status:
            end_copies_of_script({program.target, program.path})
    from rich.console import Console  # now, so that the script's own imports come first

    from duoka.script_runner.report import print_report

    width = None if sys.stderr.isatty() else 120
    out = Console(stderr=True, width=width, highlight=False, markup=False, emoji=False)
    print_report(session.stats, out, completed=status == 0)
    return status


def _restart_with_visible_devices(devices: Sequence[torch.device], argv: Sequence[str]) -> None:
    """Restart this process with only these GPUs visible, so that the script's ``cuda:0`` is the first of them."""
    import torch

    numbers = [device.index for device in devices]
    distinct = list(dict.fromkeys(numbers))
    if devices[0].type != "cuda" or distinct == list(range(torch.cuda.device_count())):
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = [visible[number] if len(visible) > number and visible[number] else str(number) for number in distinct]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": ",".join(names),
        _VISIBLE_DEVICES: ",".join(str(distinct.index(number)) for number in numbers),
        _DEVICE_NUMBERS: ",".join(map(str, numbers)),
    }
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-P", "-m", "duoka", "run", *argv], environment)


def parser() -> ArgumentParser:
    """Return the parser of duoka's own options."""
    usage = "duoka run [OPTION...] SCRIPT.py|NOTEBOOK.ipynb|-m MODULE [ARGUMENT...]"
    parser = command_parser("run", usage=usage, epilog=_RULE)
    add_device(parser, "auto, all, 0, 0,1, 0-3, cpu:4, idle:2, ... (default: auto)")
    text = "multiply the batch size of training loaders by the number of devices"
    parser.add_argument("--scale-batch", action="store_true", help=text)
    parser.add_argument("--explain", action="store_true", help="print what would be done, and run nothing")
    parser.add_argument("-m", dest="module", metavar="MODULE", help="run a module, as python -m does")
    return parser


def parse(argv: Sequence[str], *, is_device_the_scripts: bool = False) -> RunArguments:
    """Split a command line into duoka's options, the script, and the script's arguments; raises ``ConfigError``.

    With ``is_device_the_scripts`` every ``--device`` after the script belongs to the script.
    """
    own, rest = [], list(argv)
    while rest and (count := _own_words(rest[0])):
        own += rest[:count]
        rest = rest[count:]
    is_module = rest[:1] == ["-m"]
    if is_module:
        rest = rest[1:]
    if not rest:
        device = parser().parse(own).device
        eaten = f" --device has taken {device!r} as its value." if device.endswith((".py", ".ipynb")) else ""
        missing = "-m needs the name of a module" if is_module else "the script is missing"
        raise ConfigError(f"{missing}.{eaten} Write duoka run train.py --device 0,1, or duoka run -m package.train")
    target, *rest = rest
    if target.startswith("-"):
        parser().parse([target])  # raises: it is not an option of duoka
    before = {_name(word) for word in own} | ({"--device"} if is_device_the_scripts else set())
    arguments: list[str] = []
    while rest and rest[0] != "--":
        count = 0 if _name(rest[0]) in before else _own_words(rest[0])
        (own if count else arguments).extend(rest[: count or 1])
        rest = rest[count or 1 :]
    options = parser().parse(own)
    return RunArguments(
        target, (*arguments, *rest[1:]), is_module, options.device, options.scale_batch, options.explain
    )


def _own_words(word: str) -> int:
    """Return the number of words of the option of duoka that begins with ``word``; 0 if ``word`` is no such option."""
    if word in _DEVICE:
        return 2
    return int(word in _FLAGS or word.startswith(("--device=", "--devices=")))


def _name(word: str) -> str:
    """Return the name of an option, the same for both names of ``--device``."""
    name = word.partition("=")[0]
    return "--device" if name in _DEVICE else name


def _names_one_device(argv: Sequence[str], request: RunArguments, program: Script) -> bool:
    """Return whether the script has an option ``--device``, and gets one device of torch by it, such as ``cuda``."""
    after = argv[argv.index(request.target) + 1 :]
    given = after[: after.index("--") if "--" in after else len(after)]
    words = [
        (word.partition("=")[0], word.partition("=")[2] or "".join(given[index + 1 : index + 2]))
        for index, word in enumerate(given)
        if _name(word) == "--device"
    ]
    return bool(words) and all(
        _has_option(program, name) and re.fullmatch(r"cpu|mps|(cuda|xpu|npu)(:[0-9]+)?|[0-9]+", value)
        for name, value in words
    )


def _has_option(program: Script, name: str) -> bool:
    """Return whether the text of the script, or of a module beside it, names an option; or takes any, as nanoGPT's."""
    word = re.escape(name.lstrip("-").encode())
    pattern = re.compile(rb"""["']--%s["']|DEFINE_[a-z]+\(\s*["']%s["']|["']configurator\.py["']""" % (word, word))
    return any(pattern.search(source) for source in program.sources())


def _check_ambiguity(argv: Sequence[str], request: RunArguments, program: Script) -> None:
    """Refuse an option after the script that may be duoka's or the script's, or that is a misspelt one of duoka's."""
    script = argv.index(request.target)
    end = argv.index("--") if "--" in argv else len(argv)
    before = {_name(word) for word in argv[:script]}
    ours = [name for name in (*_DEVICE, *_FLAGS) if _name(name) not in before]
    for word in (word.partition("=")[0] for word in argv[script + 1 : max(script + 1, end)]):
        is_the_scripts = _has_option(program, word)
        if word in ours and is_the_scripts:
            value = " SPEC" if word in _DEVICE else ""
            raise ConfigError(
                f"{word} may be meant for duoka or for {request.target}, which has such an option too. Write duoka's option "
                f"before the script: duoka run {word}{value} {request.target} ..."
            )
        close = did_you_mean(word, ours, cutoff=0.8) if word.startswith("--") and word not in ours else ""
        if close and not is_the_scripts:
            raise ConfigError(
                f"{word} is no option of duoka, and {request.target} does not seem to have it; {close} Write an option of the "
                "script after `--`."
            )


def _run_notebook(request: RunArguments) -> int:
    from duoka.script_runner import run_notebook

    if request.explain:
        raise ConfigError("--explain reads scripts, not notebooks: leave it out to run the notebook")
    if request.arguments:
        raise ConfigError(f"a notebook takes no arguments: {' '.join(request.arguments)}")
    status, target, report = run_notebook(Path(request.target), request.device, scale_batch=request.scale_batch)
    sys.stderr.write(report)
    sys.stdout.write(f"outputs: {target}\n")
    return status
