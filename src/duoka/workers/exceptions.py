"""Exceptions across processes: each arrives as its own type, with the worker's traceback as its cause."""

import contextlib
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch

from duoka.errors import DuokaError, LaunchError, WorkerDied
from duoka.workers.serialization import Payload, dumps, load_and_close, loads

T = TypeVar("T")

SECONDARY_FAILURE_WAIT_S = 1.0
"""How long a failure that only reports a lost connection waits for the failure of the rank that closed it."""


class RemoteTraceback(Exception):  # noqa: N818 - a cause, shown above the user's exception
    """The text of a worker's traceback; the cause of the exception that the user sees."""

    def __str__(self) -> str:
        return f"\n{self.args[0].rstrip()}"


class RemoteError(DuokaError):
    """Stands for an exception whose class or contents cannot be pickled."""


class RendezvousError(LaunchError):
    """A rank could not connect to the others in time: one of them has ended, or waits for a busy machine."""


def serialize_exception(error: BaseException) -> Payload:
    """Pickle ``error`` and the text of its traceback and of those of its causes."""
    text = "".join(traceback.format_exception(type(error), error, strip_internal_frames(error.__traceback__)))

    def by_parts(obj: Any) -> Any:  # for a class whose constructor has other arguments than the exception
        return (_from_parts, (type(obj), obj.args, obj.__dict__)) if obj is error else NotImplemented

    text_only = RemoteError(f"{type(error).__qualname__}: {error}")
    for candidate, replace in ((error, None), (error, by_parts), (text_only, None)):
        with contextlib.suppress(Exception), contextlib.ExitStack() as unless_returned:
            payload = dumps((candidate, text), replace)
            unless_returned.callback(payload.close)
            loads(payload, torch.device("cpu"))
            unless_returned.pop_all()
            return payload
    raise AssertionError("text can always be pickled")


def deserialize_exception(payload: Payload, rank: int, device: str, receiver: torch.device) -> BaseException:
    """Rebuild the exception, with the worker's traceback as its cause."""
    error: BaseException
    try:
        error, text = load_and_close(payload, receiver)
    except Exception as failure:  # the sender can rebuild the class, and this process cannot
        error, text = RemoteError(f"an exception that cannot be rebuilt in this process: {failure}"), ""
    error.__cause__ = RemoteTraceback(f"Traceback of rank {rank} ({device}):\n{text}")
    return error


def call_user_code(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call ``function``; ``strip_internal_frames`` removes this frame and all above it from a traceback."""
    return function(*args, **kwargs)


def strip_internal_frames(frames: TracebackType | None) -> TracebackType | None:
    """Return the traceback from the user's function on; unchanged if it does not pass through ``call_user_code``."""
    inner = frames
    while inner is not None and inner.tb_frame.f_code is not call_user_code.__code__:
        inner = inner.tb_next
    return frames if inner is None else inner.tb_next or frames


def is_secondary_failure(error: BaseException) -> bool:
    """Return whether ``error`` only reports a lost connection, so that another rank's failure is its cause."""
    if isinstance(error, torch.distributed.DistError | RendezvousError):
        return True
    if isinstance(error, WorkerDied) or not isinstance(error, RuntimeError):
        return False
    return any(word in str(error).lower() for word in ("gloo", "nccl", "closed by peer"))


def _from_parts(kind: type[BaseException], args: tuple[Any, ...], attributes: dict[str, Any]) -> BaseException:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error
