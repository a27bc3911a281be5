"""The thread that watches the workers of a launch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from duoka.workers import monitor
from duoka.workers.channel import Message
from duoka.workers.serialization import Payload, memory_file


def test_a_result_that_arrives_after_a_failure_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    failed, done = (SimpleNamespace(rank=rank, label=f"cpu:{rank}", kill=lambda: None) for rank in (1, 2))
    descriptor = memory_file("result")

    class Events:
        def __init__(self, *_: Any) -> None:
            pass

        def poll(self, _: float) -> Iterator[tuple[Any, Any]]:
            yield failed, ValueError("the cause")
            yield done, Message("done", Payload(b"", (), descriptor))

        def close(self) -> None:
            pass

    monkeypatch.setattr(monitor, "EventSelector", Events)
    interrupts: Any = SimpleNamespace(stop_caller=lambda: None)
    workers: Any = [failed, done]
    watch = monitor.WorkerMonitor(workers, interrupts, lambda: None, torch.device("cpu"), show_output=False)
    watch.start()
    watch.wait_for_all("done")
    assert not watch.stop()
    assert isinstance(watch.error, ValueError)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
