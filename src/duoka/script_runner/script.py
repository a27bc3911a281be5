"""Somebody's program: a file or a module, run once as ``__main__`` with everything where Python itself would put it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType, TracebackType

from duoka.errors import ConfigError, DuokaError

__all__ = ["Script"]

_INTERRUPTED = 128 + signal.SIGINT


class Script:
    """A script or a module, found, read and compiled, ready to run in this process."""

    def __init__(self, target: str, arguments: Sequence[str] = (), *, is_module: bool = False) -> None:
        """Find the program.

        Args:
            target: a file's path, or with ``is_module`` a module's name as after ``python -m``.
            arguments: what the program shall find in ``sys.argv`` after its own name.
            is_module: whether ``target`` is a module's name.

        Raises:
            ConfigError: there is no such file or module, or it cannot be run.

        """
        self.target, self.is_module = target, is_module
        self._spec = _find_module(target) if is_module else None
        self.path = str(Path(str(self._spec.origin) if self._spec is not None else target).absolute())
        self.argv = [self.path if is_module else target, *arguments]
        self.source = _read(Path(self.path if is_module else target))
        self._first_on_path = os.getcwd() if is_module else str(Path(target).resolve().parent)

    def run(self) -> int:
        """Run it to its end and return its exit status; its exceptions are shown as Python shows them."""
        main = self._main_module()
        with _as_main(main, self.argv, self._first_on_path):
            try:
                exec(self._compiled(), main.__dict__)  # noqa: S102 - it is the user's own script
            except SystemExit as stop:
                return _status(stop)
            except BaseException as error:
                return _show(error)
        return 0

    def _compiled(self) -> CodeType:
        return compile(self.source, self.path, "exec", dont_inherit=True)

    def _main_module(self) -> ModuleType:
        main = ModuleType("__main__")
        main.__file__ = self.path
        main.__builtins__ = __builtins__  # type: ignore[attr-defined]
        if self._spec is not None:
            main.__spec__, main.__package__, main.__loader__ = self._spec, self._spec.parent, self._spec.loader
        return main


@contextlib.contextmanager
def _as_main(main: ModuleType, argv: list[str], first_on_path: str) -> Iterator[None]:
    before = sys.modules["__main__"], sys.argv, sys.path[:]
    sys.modules["__main__"], sys.argv = main, list(argv)
    # Python has put the folder of the `duoka` command first, where a script finds its own folder.
    sys.path[:] = [first_on_path, *(sys.path[1:] if sys.path and not sys.flags.safe_path else sys.path)]
    try:
        yield
    finally:
        for thread in threading.enumerate():  # as Python does before it ends
            if not thread.daemon and thread is not threading.current_thread():
                thread.join()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        sys.modules["__main__"], sys.argv, sys.path[:] = before


def _find_module(name: str) -> ModuleSpec:
    """Return where a module is, as ``python -m`` looks for it: from the working directory, a package by its ``__main__``."""
    sys.path.insert(0, os.getcwd())
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"there is no module {name!r}: {error}. Run from the folder that holds its package."
        ) from error
    finally:
        sys.path.pop(0)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        path = f"{name.replace('.', '/')}.py"
        raise ConfigError(f"there is no module {name!r} to run ({path} or a package with __main__.py, seen from here).")
    return spec


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise ConfigError(f"{str(path)!r} is a folder. Name the script in it, or use -m for a package.")
    try:
        source = path.read_bytes()
    except FileNotFoundError:
        beside = sorted(str(other) for other in path.parent.glob("*.py"))[:8] if path.parent.is_dir() else []
        there = f" Here there are: {', '.join(beside)}." if beside else ""
        raise ConfigError(f"there is no script {str(path)!r}.{there}") from None
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    if b"\0" in source:
        raise ConfigError(
            f"{str(path)!r} is no script: it holds binary data. Name a file of Python code, or a notebook."
        )
    return source


def _status(stop: SystemExit) -> int:
    """Return the exit status that Python gives for ``sys.exit(...)``."""
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code & 0xFF
    print(stop.code, file=sys.stderr)
    return 1


def _show(error: BaseException) -> int:
    """Show an exception as Python does at the end of a script, without the frames that stand between script and torch."""
    is_explained = isinstance(
        error, KeyboardInterrupt | DuokaError
    )  # where it came to pass in duoka tells nobody anything
    own = _without_ours(error.__traceback__, ends_at_ours=is_explained)
    _tidy_context(error)
    sys.excepthook(type(error), error.with_traceback(own), own)
    with contextlib.suppress(io.UnsupportedOperation, ValueError):
        sys.stderr.flush()
    return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def _tidy_context(error: BaseException) -> None:
    """Take duoka's frames out of what an exception came of; of two Ctrl-C show one."""
    before = error.__cause__ or error.__context__
    if isinstance(error, KeyboardInterrupt) and isinstance(before, KeyboardInterrupt):
        error.__suppress_context__ = True
    elif before is not None:
        before.__traceback__ = _without_ours(before.__traceback__, ends_at_ours=isinstance(before, DuokaError))
        _tidy_context(before)


def _without_ours(trace: TracebackType | None, *, ends_at_ours: bool) -> TracebackType | None:
    """Return a traceback without duoka's frames and those of torch's function modes, except where it ends in one."""
    if trace is None:
        return None
    name = str(trace.tb_frame.f_globals.get("__name__", ""))
    is_ours = name.startswith("duoka.") or name == "torch.overrides"
    if name == __name__:
        return _without_ours(trace.tb_next, ends_at_ours=ends_at_ours)
    if is_ours and ends_at_ours:
        return None
    rest = _without_ours(trace.tb_next, ends_at_ours=ends_at_ours)
    if is_ours and (
        trace.tb_next is not None or name == "duoka.data_parallel.device_remap"
    ):  # which calls torch's own, in C++
        return rest
    return TracebackType(rest, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)
