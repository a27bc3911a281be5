"""Script or module that ``duoka run`` executes once, as ``__main__``."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, TracebackType

from duoka.errors import ConfigError, DuokaError
from duoka.script_runner.threads import join_threads


class Script:
    """A script or a module, found and read, ready to run in this process."""

    def __init__(self, target: str, arguments: Sequence[str] = (), *, is_module: bool = False) -> None:
        """Find and read the script.

        Args:
            target: a file's path, or with ``is_module`` a module's name as for ``python -m``.
            arguments: the script's command-line arguments, ``sys.argv[1:]``.
            is_module: whether ``target`` is a module's name.

        Raises:
            ConfigError: the file or module does not exist, or cannot be run.
        """
        self.target, self.is_module = target, is_module
        self._spec = _find_module(target) if is_module else None
        self.path = str(Path(str(self._spec.origin) if self._spec is not None else target).absolute())
        self.argv = [self.path if is_module else target, *arguments]
        self.source = _read(Path(self.path if is_module else target))
        self._import_dir = os.getcwd() if is_module else str(Path(target).resolve().parent)

    def sources(self) -> Iterator[bytes]:
        """Yield the script's text, and that of each module beside it which these texts import."""
        pending, seen = [Path(self.path)], {Path(self.path)}
        while pending:
            path = pending.pop()
            with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError, MemoryError):
                source = path.read_bytes()
                yield source
                names = {name for node in ast.walk(ast.parse(source)) for name in _imported_names(node)}
                folders = (Path(self._import_dir), path.parent)
                files = {
                    Path(folder, *f"{name}.py".split(".", name.count("."))) for name in names for folder in folders
                }
                pending += sorted(file for file in files - seen if file.is_file())
                seen |= files

    def run(self) -> int:
        """Run to the end and return the exit status; exceptions are printed as Python prints them."""
        main = ModuleType("__main__")
        main.__file__ = self.path
        main.__builtins__ = __builtins__  # type: ignore[attr-defined]
        if self._spec is not None:
            main.__spec__, main.__package__, main.__loader__ = self._spec, self._spec.parent, self._spec.loader
        with _installed_as_main(main, self.argv, self._import_dir):
            try:
                code = compile(self.source, self.path, "exec", dont_inherit=True)
                exec(code, main.__dict__)  # noqa: S102 - the user's own script
            except SystemExit as stop:
                if isinstance(stop.code, int | None):
                    return (stop.code or 0) & 0xFF
                print(stop.code, file=sys.stderr)
                return 1
            except BaseException as error:
                return _print_exception(error)
        return 0


@contextlib.contextmanager
def _installed_as_main(main: ModuleType, argv: list[str], import_dir: str) -> Iterator[None]:
    """Set ``__main__``, ``sys.argv`` and ``sys.path``, and wait for the script's threads at the end."""
    before = sys.modules["__main__"], sys.argv, sys.path[:]
    sys.modules["__main__"], sys.argv = main, list(argv)
    # The first entry is the folder of the `duoka` command; Python puts the script's folder there.
    sys.path[:] = [import_dir, *(sys.path[1:] if sys.path and not sys.flags.safe_path else sys.path)]
    try:
        yield
    finally:
        join_threads()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        sys.modules["__main__"], sys.argv, sys.path[:] = before


def _imported_names(node: ast.AST) -> list[str]:
    """Return the dotted names that an import statement may load; empty for any other statement."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = f"{node.module}." if node.module else ""
        return [*filter(None, [node.module]), *(f"{module}{alias.name}" for alias in node.names)]
    return []


def _find_module(name: str) -> ModuleSpec:
    """Find a module, or a package's ``__main__``, from the working directory as ``python -m`` does."""
    sys.path.insert(0, os.getcwd())
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"there is no module {name!r}: {error}. Run from the folder that contains its package."
        ) from error
    finally:
        sys.path.pop(0)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        path = f"{name.replace('.', '/')}.py"
        raise ConfigError(
            f"there is no module {name!r} to run: {os.getcwd()} contains neither {path} nor a package with __main__.py."
        )
    return spec


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise ConfigError(f"{str(path)!r} is a folder. Name the script in it, or use -m for a package.")
    try:
        source = path.read_bytes()
    except FileNotFoundError:
        others = sorted(str(other) for other in path.parent.glob("*.py"))[:8] if path.parent.is_dir() else []
        found = f"contains: {', '.join(others)}" if others else "contains no Python file; check the path"
        raise ConfigError(f"there is no script {str(path)!r}. {path.absolute().parent} {found}.") from None
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    if b"\0" in source:
        raise ConfigError(f"{str(path)!r} contains binary data. Name a Python file or a notebook.")
    return source


def _print_exception(error: BaseException) -> int:
    """Print an exception as Python does, but without duoka's frames, and return the exit status."""
    # Frames inside duoka do not help with an interrupt, or with an error whose message names the remedy.
    cut = isinstance(error, KeyboardInterrupt | DuokaError)
    trace = _script_frames(error.__traceback__, cut_at_duoka=cut)
    _clean_context(error)
    sys.excepthook(type(error), error.with_traceback(trace), trace)
    with contextlib.suppress(io.UnsupportedOperation, ValueError):
        sys.stderr.flush()
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def _clean_context(error: BaseException, seen: frozenset[int] = frozenset()) -> None:
    """Remove duoka's frames from the causes of an exception, which may form a circle; of two interrupts keep the last."""
    seen |= {id(error)}
    cause = error.__cause__ or error.__context__
    if isinstance(error, KeyboardInterrupt) and isinstance(cause, KeyboardInterrupt):
        error.__suppress_context__ = True
    elif cause is not None and id(cause) not in seen:
        cause.__traceback__ = _script_frames(cause.__traceback__, cut_at_duoka=isinstance(cause, DuokaError))
        _clean_context(cause, seen)


def _script_frames(trace: TracebackType | None, *, cut_at_duoka: bool) -> TracebackType | None:
    """Return a traceback without frames of duoka and of function modes, but with the frame that raised.

    With ``cut_at_duoka`` the traceback ends before the first frame of duoka. Modules that set ``__tracebackhide__``
    call torch's C++ code, so their frame is left out even if it is the last.
    """
    if trace is None:
        return None
    name = str(trace.tb_frame.f_globals.get("__name__", ""))
    is_internal = name.startswith("duoka.") or name == "torch.overrides"
    if name != __name__ and is_internal and cut_at_duoka:
        return None
    rest = _script_frames(trace.tb_next, cut_at_duoka=cut_at_duoka)
    has_raised = trace.tb_next is None and "__tracebackhide__" not in trace.tb_frame.f_globals
    if name == __name__ or (is_internal and not has_raised):
        return rest
    return TracebackType(rest, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)
