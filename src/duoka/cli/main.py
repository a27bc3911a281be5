"""The ``duoka`` command: finds the subcommand, runs it, and turns what users can cause into one message.

Nothing heavy is imported here: a subcommand's module is imported when that subcommand is used.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from duoka.cli.console import complain
from duoka.errors import ConfigError, DuokaError
from duoka.malloc import keep_freed_memory

__all__ = ["COMMANDS", "main"]

USAGE_ERROR = 2
INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


class Command(NamedTuple):
    """A subcommand: the module whose ``run(argv) -> int`` it is, and its line in the help."""

    module: str
    summary: str


COMMANDS = {
    "run": Command("duoka.cli.run", "run an unchanged script or notebook on every device"),
    "train": Command("duoka.cli.train", "train a recipe on every device"),
    "compare": Command("duoka.cli.compare", "train variants of a recipe and compare them"),
    "eval": Command("duoka.cli.evaluate", "evaluate a finished run"),
    "predict": Command("duoka.cli.predict", "predict with a finished run"),
    "recommend": Command("duoka.cli.recommend", "recommend films to a user with a finished run"),
    "check": Command("duoka.cli.check", "check that every device computes and reaches the others"),
    "data": Command("duoka.cli.data", "make example data"),
    "devices": Command("duoka.cli.devices", "show the devices, who uses them, and which would be chosen"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (``None``: this process's) and return the exit status.

    0 is success, 2 what the user can mend, 130 an interruption, 1 anything unexpected.
    """
    if argv is None:  # the process is the command's own
        keep_freed_memory()
    debug, words = _take_debug(list(sys.argv[1:] if argv is None else argv))
    try:
        status = _dispatch(words)
        sys.stdout.flush()
    except DuokaError as error:
        return _refuse(str(error), debug)
    except KeyboardInterrupt:
        return _interrupted(debug)
    except OSError as error:
        return _storage(error, debug)
    except Exception:  # a bug of ours, or of the user's own code: the traceback is the message
        traceback.print_exc()
        return 1
    return status


def _take_debug(words: list[str]) -> tuple[bool, list[str]]:
    """Return whether ``--debug`` is among our words, and the words without it; what follows ``run`` or ``--`` is not ours."""
    end = next((index for index, word in enumerate(words) if word == "--" or words[:index] == ["run"]), len(words))
    ours = [word for word in words[:end] if word != "--debug"]
    return len(ours) < end, ours + words[end:]


def _dispatch(words: list[str]) -> int:
    if not words:
        sys.stderr.write(_help())
        return USAGE_ERROR
    first, *rest = words
    if first in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    if first in ("-V", "--version"):
        from duoka import __version__

        sys.stdout.write(f"duoka {__version__}\n")
        return 0
    if first not in COMMANDS:
        raise ConfigError(_unknown(first))
    with _ending_on_interrupt():
        run = importlib.import_module(COMMANDS[first].module).run
        importlib.import_module("torch")
    return int(run(rest))


@contextlib.contextmanager
def _ending_on_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process at once: a library that is being imported may swallow a KeyboardInterrupt, or choke on it."""

    def end(*_: object) -> None:
        os.write(2, b"duoka: interrupted\n")
        os._exit(INTERRUPTED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: duoka COMMAND [OPTION...]\n\n"
        "Train a PyTorch model on every device you have.\n\n"
        f"commands:\n{commands}\n\n"
        "options:\n"
        "  -h, --help     this help; after a command, that command's\n"
        "  -V, --version  the version\n"
        "  --debug        show the traceback of an error; may stand anywhere\n"
    )


def _unknown(word: str) -> str:
    kind = "option" if word.startswith("-") else "command"
    known = ["--help", "--version", "--debug"] if kind == "option" else list(COMMANDS)
    close = difflib.get_close_matches(word, known, n=1)
    meant = f" Did you mean '{close[0]}'?" if close else ""
    return f"there is no {kind} {word!r}.{meant} `duoka --help` lists what there is: {', '.join(known)}."


def _refuse(message: str, debug: bool) -> int:
    """Say what the user can mend; the traceback is shown on request alone."""
    if debug:
        traceback.print_exc()
    complain(message)
    return USAGE_ERROR


def _interrupted(debug: bool) -> int:
    if debug:
        traceback.print_exc()
    complain("interrupted")
    return INTERRUPTED


def _storage(error: OSError, debug: bool) -> int:
    """Turn a full disk or an unwritable folder into a message; anything else is unexpected."""
    if isinstance(error, BrokenPipeError) and _reader_is_gone():
        return 1
    remedies = {
        errno.ENOSPC: "the disk is full. Free some space, or choose another folder",
        errno.EDQUOT: "your disk quota is used up. Free some space, or choose another folder",
        errno.EACCES: "access is not permitted. Change its permissions, or choose another folder",
        errno.EPERM: "this is not permitted. Change its permissions, or choose another folder",
        errno.EROFS: "the file system is read-only. Choose another folder",
    }
    if error.errno not in remedies:
        traceback.print_exc()
        return 1
    where = f"{os.fspath(error.filename)!r}: " if isinstance(error.filename, str | os.PathLike) else ""
    return _refuse(f"{where}{remedies[error.errno]}.", debug)


def _reader_is_gone() -> bool:
    """Whether standard output leads nowhere any more (``duoka devices | head -1``); if so, quiet it for good."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return True
    return False
