"""How an exception crosses from a helper to the user's process: as its own type, with the helper's traceback as cause."""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from duoka.errors import DuokaError
from duoka.workers.serialization import Payload, dumps, loads

__all__ = ["RemoteTraceback", "is_echo", "own_frames", "pack", "unpack"]


class RemoteTraceback(Exception):  # noqa: N818 - shown above the user's exception, it is no error of its own
    """What the helper's own traceback said; the cause of the exception that the user sees."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text.rstrip()}"


class RemoteError(DuokaError):
    """Stands for an exception whose class or contents cannot leave the process that raised it."""


def pack(error: BaseException) -> Payload:
    """Pickle ``error`` and its traceback's text, with all of its causes."""
    text = "".join(traceback.format_exception(type(error), error, own_frames(error.__traceback__)))
    for how in (error, _Rebuilt(error), RemoteError(f"{type(error).__qualname__}: {error}")):
        try:
            payload = dumps((how, text, is_echo(error)))
            loads(payload, torch.device("cpu"))
        except Exception:
            continue
        return payload
    raise AssertionError("text always travels")


def unpack(payload: Payload, rank: int, device: str, receiver: torch.device) -> BaseException:
    """Rebuild the exception, its cause being the remote traceback."""
    try:
        error, text, _ = loads(payload, receiver)
    except Exception as failed:  # its class can be rebuilt there but not here
        error, text = RemoteError(f"an exception that cannot be rebuilt here: {failed}"), ""
    finally:
        payload.close()
    error.__cause__ = RemoteTraceback(f"Traceback of rank {rank} ({device}):\n{text}")
    return error  # type: ignore[no-any-return]


def own_frames(frames: TracebackType | None) -> TracebackType | None:
    """Return the traceback from the user's function on, without the frames that led to it."""
    package = Path(__file__).parents[1]
    ours = (*(str(package / part) for part in ("workers", "launcher", "data_parallel")), contextlib.__file__)
    inner = frames
    while inner is not None and inner.tb_frame.f_code.co_filename.startswith(ours):
        inner = inner.tb_next
    return inner or frames


def is_echo(error: BaseException) -> bool:
    """Whether ``error`` only says that another rank went away, so that the other's own failure is what to show."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "nccl", "closed by peer"))


class _Rebuilt:
    """Pickles an exception by class, arguments and attributes, for classes whose constructor wants other arguments."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self.error), self.error.args, self.error.__dict__)


def _rebuild(kind: type[BaseException], args: tuple[Any, ...], attributes: dict[str, Any]) -> BaseException:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error
