"""Errors of the operating system's limits (descriptors, memory, processes, disk), with the remedy for each."""

import contextlib
import errno
import os
import resource
from collections.abc import Iterator

from duoka.errors import LaunchError

_REMEDIES = {
    errno.EMFILE: "This process has as many open files and sockets as it may ({limit}): close some, or raise the limit with "
    "`ulimit -n`",
    errno.ENFILE: "All processes of this machine together have too many files open: end some of them",
    errno.ENOMEM: "Free some memory, or use fewer devices",
    errno.EAGAIN: "Free some memory, end some processes, or use fewer devices",
    errno.ENOSPC: "Free some space on the disk",
}

_DESCRIPTORS_OF_A_GROUP, _DESCRIPTORS_OF_A_RANK, _DESCRIPTORS_TO_FREE_A_GROUP = 12, 4, 2
"""More than gloo needs: a listener, an epoll, an event and two connections a peer; and torch's store."""


@contextlib.contextmanager
def explain_resource_errors(action: str) -> Iterator[None]:
    """Raise LaunchError with the remedy if the ``with`` block, which does ``action``, meets a limit of the system."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        remedy = _REMEDIES[error.errno].format(limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        raise LaunchError(f"duoka could not {action}: {os.strerror(error.errno)}. {remedy}.") from error


@contextlib.contextmanager
def reserve_descriptors(num_ranks: int) -> Iterator[None]:
    """Raise LaunchError unless a process group of so many ranks can open its files; keep some until the block ends.

    torch's groups and stores end the process where they cannot open a file: in threads, and when they are freed.
    """
    with explain_resource_errors("connect the ranks"):
        _close_all(_open_many(_DESCRIPTORS_OF_A_GROUP + _DESCRIPTORS_OF_A_RANK * num_ranks))
        kept = _open_many(_DESCRIPTORS_TO_FREE_A_GROUP)
    try:
        yield
    finally:
        _close_all(kept)


def _open_many(count: int) -> list[int]:
    opened: list[int] = []
    try:
        opened.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(count))
    except OSError:
        _close_all(opened)
        raise
    return opened


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
