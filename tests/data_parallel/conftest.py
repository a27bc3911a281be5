"""Fixtures for tests of ``DataParallel``: a transport, wrapped models, and the same models on one device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import duoka
from duoka.data_parallel.worker_group import COLLECTIVE_ON_CPU
from support.transports import TRANSPORTS


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Select how tensors travel between CPU workers."""
    monkeypatch.setenv(COLLECTIVE_ON_CPU, "1" if request.param == "collective" else "")
    return request.param


@pytest.fixture
def wrap(transport: str) -> Iterator[Callable[..., duoka.DataParallel]]:
    """Wrap models; they are closed after the test."""
    wrapped: list[duoka.DataParallel] = []

    def make(module: nn.Module, devices: str = "cpu:2", **options) -> duoka.DataParallel:
        wrapped.append(duoka.DataParallel(module, devices=devices, **options))
        return wrapped[-1]

    yield make
    for model in wrapped:
        model.close()


@pytest.fixture
def pair(wrap) -> Callable[..., tuple[duoka.DataParallel, nn.Module]]:
    """Return a wrapped model, and a copy of it that stays on one device."""

    def make(module: nn.Module, devices: str = "cpu:2", **options) -> tuple[duoka.DataParallel, nn.Module]:
        return wrap(module, devices, **options), copy.deepcopy(module)

    return make


@pytest.fixture(autouse=True)
def seeded_on_one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def float64() -> Iterator[None]:
    """Make float64 the default dtype, so that several steps agree on any CPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
