"""Start of a worker process: its command and descriptors, and the thread that the system counts as its parent."""

import functools
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeAlias

from duoka.errors import LaunchError
from duoka.malloc import with_large_pages
from duoka.workers.environment import worker_environment
from duoka.workers.rendezvous import RendezvousFile
from duoka.workers.resource_limits import explain_resource_errors

_PROGRAM = """import resource, sys
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
sys.path[:] = {path!r}
from duoka.workers.worker_main import main
main()"""
"""A worker may open as many files as the system allows, also where its owner has few left."""
_Process: TypeAlias = "subprocess.Popen[bytes]"
_Calls: TypeAlias = "queue.SimpleQueue[tuple[Callable[[], _Process], Future[_Process]] | None]"


def start_worker_process(channel_fd: int, output_fd: int, stack_fd: int) -> _Process:
    """Start a worker; it writes its output and, when asked by a signal, its Python stack to these descriptors."""
    rendezvous = RendezvousFile.of_this_process()
    command = [sys.executable, *subprocess._args_from_interpreter_flags(), "-P", "-u"]  # type: ignore[attr-defined]
    arguments = [channel_fd, stack_fd, os.getpid(), rendezvous.fd, rendezvous.path]

    def start() -> _Process:
        return subprocess.Popen(
            [*command, "-c", _PROGRAM.format(path=_module_path()), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=output_fd,
            stderr=output_fd,
            pass_fds=[channel_fd, stack_fd, rendezvous.fd],
            start_new_session=True,
            env=with_large_pages(worker_environment()),  # each task applies its owner's environment
        )

    try:
        with explain_resource_errors("start a worker process"):
            return _call_in_lasting_thread(start)
    except OSError as error:
        raise LaunchError(f"a worker process could not be started with {command[0]!r}: {error}.") from error


def _call_in_lasting_thread(start: Callable[[], _Process]) -> _Process:
    """Call ``start`` in a thread that outlives the workers.

    Linux ends a worker when the *thread* that started it ends. The main thread lasts; for other threads there is one
    that lasts until ``close_workers``.
    """
    if threading.current_thread() is threading.main_thread():
        return start()
    future: Future[_Process] = Future()
    _starter_calls(os.getpid()).put((start, future))
    return future.result()


def end_starter_thread() -> None:
    """End the thread that has started workers for threads other than the main one, if there is one: after its workers."""
    if _starter_calls.cache_info().currsize:
        _starter_calls(os.getpid()).put(None)
        _starter_calls.cache_clear()


@functools.lru_cache(maxsize=1)
def _starter_calls(pid: int) -> _Calls:  # noqa: ARG001 - a forked child has its own
    """Start the thread, and return its queue."""
    calls: _Calls = queue.SimpleQueue()

    def run() -> None:
        while (call := calls.get()) is not None:
            start, future = call
            try:
                future.set_result(start())
            except BaseException as error:
                future.set_exception(error)
            del start, future, call

    threading.Thread(target=run, name="duoka-start", daemon=True).start()
    return calls


def _module_path() -> list[str]:
    """Return the owner's module search path, with the script's folder last.

    A file beside the user's script must not shadow a module that the worker itself imports before it has a task.
    """
    script_folders = {str(Path(name).absolute().parent) for name in sys.argv[:1]}
    path = sorted((entry for entry in sys.path if entry and isinstance(entry, str)), key=script_folders.__contains__)
    package = str(Path(__file__).parents[2])
    return path if package in path else [*path, package]
