"""The owner's handle of one worker process."""

from __future__ import annotations

import os
import threading

import torch

from duoka.workers.handle import WorkerHandle


def test_several_threads_that_close_a_worker_close_each_descriptor_once(monkeypatch) -> None:
    """A descriptor's number may belong to another file when it is closed a second time."""
    worker, closed, real = WorkerHandle(torch.device("cpu")), [], os.close
    own = {worker.output_fd, worker.death_fd} - {None}
    start = threading.Barrier(4)

    def close() -> None:
        start.wait()
        worker.close()

    monkeypatch.setattr(os, "close", lambda fd: (closed.append(fd), real(fd))[1])
    threads = [threading.Thread(target=close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(fd for fd in closed if fd in own) == sorted(own)
    assert not worker.is_alive()
