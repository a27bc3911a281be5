"""Interrupts of rank 0 at inconvenient moments, and in forked children."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import pytest
import torch

from duoka.workers import run_on_all
from duoka.workers.interrupts import InterruptHandler, PeerFailed


def test_a_stop_during_clean_up_is_replaced_by_the_workers_failure(monkeypatch) -> None:
    """The first ``close`` raises, as a signal at that moment makes it."""
    real_close, hits = InterruptHandler.close, []

    def close(self: InterruptHandler) -> None:
        if not hits:
            hits.append(1)
            raise PeerFailed
        real_close(self)

    @contextlib.contextmanager
    def work(rank, barrier):
        if rank:
            raise KeyError("of rank 1")
        threading.Event().wait(600)
        yield

    monkeypatch.setattr(InterruptHandler, "close", close)
    with pytest.raises(KeyError, match="of rank 1"):
        run_on_all(work, [0, 1], (), [torch.device("cpu")] * 2)
    assert hits
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_to_a_forked_child_does_not_reach_the_parent() -> None:
    with InterruptHandler() as parent:
        if (child := os.fork()) == 0:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            except KeyboardInterrupt:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert not parent.read_signals()
    assert signal.set_wakeup_fd(-1) == -1
