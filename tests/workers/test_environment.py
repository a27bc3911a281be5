"""Workers start with the owner's environment, and with the devices that the owner itself sees."""

from __future__ import annotations

from pathlib import Path

import torch

from duoka.workers.environment import keep_device_variables, worker_environment
from duoka.workers.events import wait_until_ready
from duoka.workers.handle import WorkerHandle
from duoka.workers.process_context import ProcessContext


def test_device_variables_stay_as_they_were_and_others_follow_the_owner(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    with keep_device_variables():
        for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "DUOKA_TEST"):
            monkeypatch.setenv(name, "0")
        worker = WorkerHandle(torch.device("cpu"))
        try:
            wait_until_ready([worker])
            started = Path(f"/proc/{worker.pid}/environ").read_bytes().decode().split("\0")
        finally:
            worker.close()
        for environment in (ProcessContext.capture().environment, dict(line.partition("=")[::2] for line in started)):
            assert environment["CUDA_VISIBLE_DEVICES"] == "1,0"
            assert "HIP_VISIBLE_DEVICES" not in environment
            assert environment["DUOKA_TEST"] == "0"
    assert worker_environment()["CUDA_VISIBLE_DEVICES"] == "0"
