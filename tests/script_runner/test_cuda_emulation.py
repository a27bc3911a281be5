"""The emulated GPUs replace names that exist in torch, and only while a script runs."""

from __future__ import annotations

import threading

import pytest
import torch

from duoka.script_runner.cuda_emulation import emulate_cuda, emulated_api

NAMES = [(owner, name) for _, owner, table in emulated_api(2) for name in table]


@pytest.mark.parametrize(("owner", "name"), NAMES, ids=[f"{owner.__name__}.{name}" for owner, name in NAMES])
def test_each_emulated_name_exists_in_torch(owner, name) -> None:
    assert hasattr(owner, name)


def test_every_name_is_restored_after_the_run() -> None:
    before = [getattr(owner, name) for owner, name in NAMES]
    run = threading.Thread.run
    with emulate_cuda(2):
        assert torch.cuda.device_count() == 2
        assert torch.cuda.get_device_name(1) == "CPU worker 1 (duoka)"
        with pytest.raises(RuntimeError, match="invalid device ordinal 2"):
            torch.cuda.set_device(2)
    assert all(now is then for now, then in zip((getattr(*one) for one in NAMES), before, strict=True))
    assert threading.Thread.run is run
