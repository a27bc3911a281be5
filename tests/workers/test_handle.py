"""One helper process and the lines to it."""

from __future__ import annotations

import os
import threading

import torch

from duoka.workers.handle import WorkerHandle


def test_a_helper_that_several_threads_close_is_closed_once(monkeypatch) -> None:
    """A number that is closed twice may by then be somebody else's file."""
    helper, closed, real = WorkerHandle(torch.device("cpu")), [], os.close
    mine = {helper.output_fd, helper.death_fd} - {None}
    start = threading.Barrier(4)

    def close() -> None:
        start.wait()
        helper.close()

    monkeypatch.setattr(os, "close", lambda fd: (closed.append(fd), real(fd))[1])
    threads = [threading.Thread(target=close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(fd for fd in closed if fd in mine) == sorted(mine)
    assert not helper.is_alive()
