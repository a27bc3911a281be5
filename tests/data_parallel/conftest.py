"""What the tests of the mirror engine share: a wrapped model beside the same model on one device, and what they compare."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import duoka

BOTH_EVERY_TIME = ("test_equality", "test_failures", "test_collective_transport")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What only says once more, over the other transport, what the files above say: `make test-all` runs it."""
    for item in items:
        sends = getattr(item, "callspec", None) and item.callspec.params.get("transport") == "collective"
        seldom = item.path.stem not in BOTH_EVERY_TIME or item.get_closest_marker("slow")
        if sends and seldom and item.path.parent.name == "data_parallel":
            item.add_marker(pytest.mark.extended)


@pytest.fixture(params=["shared", "collective"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test twice: with CPU workers' shared memory, and with the collectives of accelerators, over gloo."""
    monkeypatch.setenv("DUOKA_COLLECTIVE_TRANSPORT", "1" if request.param == "collective" else "")
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
    """Return a model wrapped, and a copy of it that stays on one device."""

    def make(module: nn.Module, devices: str = "cpu:2") -> tuple[duoka.DataParallel, nn.Module]:
        return wrap(module, devices), copy.deepcopy(module)

    return make


@pytest.fixture(autouse=True)
def seeded_and_on_one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def distance(model: nn.Module, reference: nn.Module) -> float:
    """The relative distance of two models' parameters, the largest of any parameter that is not near zero."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(model.parameters(), reference.parameters(), strict=True)]
    return max((float((a - b).norm() / b.norm().clamp_min(1e-2)) for a, b in pairs), default=0.0)


def same_gradients(model: nn.Module, reference: nn.Module, tolerance: float = 1e-5) -> bool:
    for (name, own), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        if (own.grad is None) != (other.grad is None):
            raise AssertionError(f"{name}: {own.grad} is not {other.grad}")
        if own.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, rtol=tolerance, atol=tolerance)
    return True


@pytest.fixture
def compare():
    class Compare:
        distance = staticmethod(distance)
        same_gradients = staticmethod(same_gradients)

    return Compare
