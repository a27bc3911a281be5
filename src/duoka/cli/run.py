"""``duoka run SCRIPT``: an unchanged script, module or notebook on every device."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from duoka.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from duoka.script_runner import RunSession, Script

__all__ = ["SUMMARY", "run"]

SUMMARY = "run an unchanged script or notebook on every device"

_HELP = """\
usage: duoka run [OPTION...] SCRIPT [ARGUMENT...]
       duoka run [OPTION...] -m MODULE [ARGUMENT...]
       duoka run [OPTION...] NOTEBOOK.ipynb

Run a script once, as it is, with its models computed on every device.

options:
  --device SPEC   auto, all, 0, 0,1, 0-3, cpu:4, idle:2, ... (default: auto)
  --scale-batch   multiply the batch size of training loaders by the number of devices
  --explain       say what would be done, and run nothing
  -m MODULE       run a module, as python -m does
  -h, --help      this help

Options stand before the script or after it; what follows `--` is the script's, and so is an option that was
given before the script already:  duoka run train.py --epochs 3 --device 0,1
"""
_NARROWED = "DUOKA_RUN_DEVICES"
_FLAGS = {"--scale-batch": "scale_batch", "--explain": "explain"}


class RunArguments(NamedTuple):
    """What a command line asks for."""

    target: str
    arguments: tuple[str, ...]
    is_module: bool = False
    device: str = "auto"
    scale_batch: bool = False
    explain: bool = False


def run(argv: Sequence[str]) -> int:
    """Run the script that ``argv`` names; return its own exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        (sys.stdout if argv else sys.stderr).write(_HELP)
        return 0 if argv else 2
    request = parse(argv)
    from duoka.devices import resolve
    from duoka.script_runner import Script, explain

    devices = resolve(os.environ.pop(_NARROWED, request.device)).devices
    if request.target.endswith(".ipynb") and not request.is_module:
        return _run_notebook(request)
    program = Script(request.target, request.arguments, is_module=request.is_module)
    _check_ambiguity(argv, request, program)
    if request.explain:
        sys.stdout.write(
            "\n".join(explain(program.source, program.target, devices, scale_batch=request.scale_batch)) + "\n"
        )
        return 0
    _narrow(devices, argv)
    return _run_program(program, request, devices)


def _narrow(devices: Sequence[torch.device], argv: Sequence[str]) -> None:
    """Begin anew with only these GPUs visible, so that ``cuda:0`` is the first of them to the script and to all it uses."""
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
        _NARROWED: ",".join(str(distinct.index(number)) for number in numbers),
    }
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "duoka", "run", *argv], environment)


def parse(argv: Sequence[str]) -> RunArguments:
    """Read a command line; raises ``ConfigError`` where it is not understood."""
    words, options = _options(list(argv), {})
    if words[:1] == ["-m"]:
        if len(words) == 1:
            raise ConfigError("-m needs the name of a module: duoka run -m package.train")
        options["is_module"], words = True, words[1:]
    if not words:
        taken = str(options.get("device", ""))
        eaten = f" --device has taken {taken!r} as its value." if taken.endswith((".py", ".ipynb")) else ""
        raise ConfigError(f"which script?{eaten} duoka run train.py --device 0,1")
    target, *rest = words
    if target.startswith("-"):
        raise ConfigError(
            f"there is no option {target!r} here: --device, --scale-batch, --explain, -m, or a script's name."
        )
    rest, options = _options_anywhere(rest, options)
    return RunArguments(target, tuple(rest), **options)  # type: ignore[arg-type]


def _options(words: list[str], options: dict[str, object]) -> tuple[list[str], dict[str, object]]:
    """Take our options off the front."""
    while words:
        taken = _option(words)
        if taken is None:
            break
        name, value, words = taken
        options[name] = value
    return words, options


def _options_anywhere(words: list[str], options: dict[str, object]) -> tuple[list[str], dict[str, object]]:
    """Take those of our options that did not stand before the script out of its arguments, up to ``--``."""
    before = set(options)
    rest: list[str] = []
    while words:
        if words[0] == "--":
            return rest + words[1:], options
        taken = _option(words)
        if taken is None or taken[0] in before:
            rest.append(words.pop(0))
        else:
            name, value, words = taken
            options[name] = value
    return rest, options


def _option(words: list[str]) -> tuple[str, object, list[str]] | None:
    """Return the option that stands first, its value, and the words after it; ``None`` if none of ours stands there."""
    word, *rest = words
    if word in _FLAGS:
        return _FLAGS[word], True, rest
    if word.startswith("--device="):
        return "device", word.partition("=")[2], rest
    if word == "--device":
        if not rest:
            raise ConfigError("--device needs a value: auto, all, 0, 0,1, cpu:2, ...")
        return "device", rest[0], rest[1:]
    return None


def _check_ambiguity(argv: Sequence[str], request: RunArguments, program: Script) -> None:
    """Refuse to guess whose option it is that stands after a script, or what a misspelt one means."""
    script = argv.index(request.target)
    end = argv.index("--") if "--" in argv else len(argv)
    before, after = (
        [word.partition("=")[0] for word in words] for words in (argv[:script], argv[script + 1 : max(script + 1, end)])
    )
    ours = [name for name in ("--device", *_FLAGS) if name not in before]
    for word in after:
        is_the_scripts = re.search(rb"""["']%s["']""" % re.escape(word.encode()), program.source)
        if word in ours and is_the_scripts:
            raise ConfigError(
                f"{word} may be meant for duoka or for {request.target}, which has such an option itself. Put duoka's before "
                f"the script: duoka run {word}{' SPEC' if word == '--device' else ''} {request.target} ..."
            )
        close = difflib.get_close_matches(word, ours, n=1, cutoff=0.8) if word.startswith("--") else []
        if close and word not in ours and not is_the_scripts:
            raise ConfigError(
                f"did you mean {close[0]} by {word}? {request.target} does not seem to have such an option; if it has, put it "
                "after `--`."
            )


def _run_program(program: Script, request: RunArguments, devices: Sequence[torch.device]) -> int:
    from duoka.script_runner import RunSession

    with RunSession(devices, scale_batch=request.scale_batch, source=program.source) as session:
        status = program.run()
    _say(session, completed=status == 0)
    return status


def _say(session: RunSession, *, completed: bool) -> None:
    from rich.console import Console

    from duoka.script_runner.report import print_report

    width = None if sys.stderr.isatty() else 120
    out = Console(stderr=True, width=width, highlight=False, markup=False, emoji=False)
    print_report(session.stats, out, completed=completed)


def _run_notebook(request: RunArguments) -> int:
    from duoka.script_runner import run_notebook

    if request.explain:
        raise ConfigError("--explain reads scripts; a notebook is run, or left alone.")
    if request.arguments:
        raise ConfigError(f"a notebook takes no arguments: {' '.join(request.arguments)}")
    status, target, report = run_notebook(Path(request.target), request.device, scale_batch=request.scale_batch)
    sys.stderr.write(report)
    sys.stdout.write(f"outputs: {target}\n")
    return status
