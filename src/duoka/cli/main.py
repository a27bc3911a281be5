"""The ``duoka`` command: imports and runs one subcommand, and prints errors that users can mend as one line.

A subcommand's module, jsonargparse and torch are imported when the subcommand is used: ``duoka --help`` needs none.
"""

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from duoka.cli.console import print_error
from duoka.errors import ConfigError, DuokaError, TrainingInterrupted
from duoka.malloc import keep_freed_memory
from duoka.utils.signals import handle_interrupt
from duoka.utils.text import did_you_mean

USAGE_ERROR = 2
INTERRUPTED = 130
"""128 + SIGINT, as in shells."""
OPTIONS = ("--help", "--version", "--debug")
_OS_ERRORS = {
    errno.ENOSPC: "the disk is full. Free some space",
    errno.EDQUOT: "your disk quota is used up. Free some space",
    errno.EACCES: "access is not permitted. Change its permissions",
    errno.EPERM: "this is not permitted. Change its permissions",
    errno.EROFS: "the file system is read-only. Make it writable",
    errno.ENAMETOOLONG: "the name is too long for a file. Shorten it",
    errno.ELOOP: "symbolic links lead in a circle. Correct them",
    errno.ENOTDIR: "a part of the path is a file. Correct the path",
}
"""Errors of the operating system that users can mend, and the remedy."""


COMMANDS = {
    "run": "run an unchanged script or notebook on every device",
    "train": "train a recipe on every device",
    "compare": "train variants of a recipe and compare them",
    "eval": "evaluate a finished run",
    "predict": "predict with a finished run",
    "recommend": "recommend films to a user with a finished run",
    "check": "check that every device computes and reaches the others",
    "data": "make example data",
    "devices": "show the devices, their users, and the ones that would be chosen",
    "completion": "print a script that completes commands and options in a shell",
}
"""Each subcommand, a module of this package with ``run(argv) -> int`` and ``parser()``, and its line in the help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (``None``: this process's) and return the exit status.

    The status is 0 for success, 2 for an error that the user can mend, 130 for an interruption (143 by SIGTERM, 129 by
    SIGHUP, 138 by SIGUSR1), 124 at a time limit, 1 for anything unexpected.
    """
    if argv is None:  # the process is the command's own
        keep_freed_memory()
    debug, words = _pop_debug_flag(list(sys.argv[1:] if argv is None else argv))
    try:
        status = _dispatch(words)
        sys.stdout.flush()
        return status
    except (Exception, KeyboardInterrupt, TrainingInterrupted) as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            return 1
        status, message = _explain(error)
        if debug or not message:
            traceback.print_exc()
        if message:
            print_error(message)
        return status


def _pop_debug_flag(words: list[str]) -> tuple[bool, list[str]]:
    """Return whether ``--debug`` is among duoka's words, and the words without it; words after ``run`` or ``--`` stay."""
    end = next((index for index, word in enumerate(words) if word == "--" or words[:index] == ["run"]), len(words))
    ours = [word for word in words[:end] if word != "--debug"]
    return len(ours) < end, ours + words[end:]


def _dispatch(words: list[str]) -> int:
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    if not words or words[0] in ("-h", "--help"):
        (sys.stdout if words else sys.stderr).write(_help())
        return 0 if words else USAGE_ERROR
    first, *rest = words
    if first in ("-V", "--version"):
        from duoka import __version__

        sys.stdout.write(f"duoka {__version__}\n")
        return 0
    if first not in COMMANDS:
        kind, known = ("option", OPTIONS) if first.startswith("-") else ("command", tuple(COMMANDS))
        hint = did_you_mean(first, known) or f"`duoka --help` lists them: {', '.join(known)}"
        raise ConfigError(f"there is no {kind} {first!r}; {hint}")
    with handle_interrupt(_end_process):
        run = importlib.import_module(f"duoka.cli.{first}").run
        importlib.import_module("torch")
    return int(run(rest))


def _end_process(*_: object) -> None:
    """End the process at once on Ctrl-C: a library that is being imported may swallow a KeyboardInterrupt."""
    os.write(2, b"duoka: interrupted\n")
    os._exit(INTERRUPTED)


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items())
    return (
        "usage: duoka COMMAND [OPTION...]\n\n"
        "Train a PyTorch model on every device you have.\n\n"
        f"commands:\n{commands}\n\n"
        "options:\n"
        "  -h, --help     show this help; after a command, the command's help\n"
        "  -V, --version  show the version\n"
        "  --debug        show the traceback of an error; may stand anywhere\n\n"
        "`duoka help COMMAND` explains one command.\n"
    )


def _explain(error: BaseException) -> tuple[int, str]:
    """Return the exit status and the message of an error; "" for an unexpected error, which needs its traceback."""
    if isinstance(error, DuokaError):
        return USAGE_ERROR, str(error)
    if isinstance(error, TrainingInterrupted):
        return int(error.code or 0), str(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if not isinstance(error, OSError) or error.errno not in _OS_ERRORS:
        return 1, ""
    where = f"{os.fspath(error.filename)!r}: " if isinstance(error.filename, str | os.PathLike) else ""
    return USAGE_ERROR, f"{where}{_OS_ERRORS[error.errno]}, or choose another folder."


def _is_output_closed() -> bool:
    """Return whether the reader of standard output has gone (``duoka devices | head -1``); if so, discard output."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except BrokenPipeError:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
        return True
    return False
