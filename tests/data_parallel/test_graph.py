"""The user's autograd graph over several devices: it allows what a graph on one device allows."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from duoka import errors
from support.comparison import assert_same_gradients, relative_distance


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.trunk(x))
        return self.left(h), self.right(h)


def test_inputs_get_their_gradients_too(pair) -> None:
    model, reference = pair(nn.Linear(4, 3))
    xs = [torch.arange(28.0).view(7, 4).requires_grad_() for _ in range(2)]
    for m, x in zip((model, reference), xs, strict=True):
        m(x * 2).pow(2).sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    assert_same_gradients(model, reference)


def test_several_forwards_before_one_backward(pair) -> None:
    model, reference = pair(Two())
    inputs = [torch.randn(5, 4), torch.randn(3, 4), torch.randn(1, 4)]
    for m in (model, reference):
        outs = [m(x) for x in inputs]
        (sum(left.pow(2).sum() for left, _ in outs) * outs[0][1].mean()).backward()
    assert_same_gradients(model, reference)


def test_a_retained_graph_can_be_walked_again(pair) -> None:
    model, reference = pair(Two())
    x = torch.randn(5, 4)
    for m in (model, reference):
        left, right = m(x)
        left.sum().backward(retain_graph=True)
        right.pow(2).sum().backward(retain_graph=True)
        (left.mean() + right.mean()).backward()
    assert_same_gradients(model, reference)


def test_a_second_backward_through_a_freed_graph_is_an_error(wrap) -> None:
    model = wrap(Two())
    left, _ = model(torch.randn(5, 4))
    left.pow(2).sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        left.sum().backward()
    assert model(torch.randn(5, 4))[0].shape == (5, 2)


def test_a_loss_may_use_some_of_the_outputs(pair) -> None:
    model, reference = pair(Two())
    x = torch.randn(5, 4)
    for m in (model, reference):
        m(x)[1][:2].sum().backward()
    assert_same_gradients(model, reference)
    assert model.left.weight.grad is None


def test_autograd_grad_equals_one_device_and_is_not_overwritten(pair) -> None:
    model, reference = pair(nn.Linear(4, 3))
    x = torch.randn(5, 4)
    expected = torch.autograd.grad(reference(x).sum(), list(reference.parameters()))
    first = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    for _ in range(3):
        torch.autograd.grad(model(x * 5).sum(), list(model.parameters()))
    for own, other in zip(first, expected, strict=True):
        torch.testing.assert_close(own, other)


def test_a_double_backward_is_refused_with_a_remedy(wrap) -> None:
    model = wrap(nn.Linear(4, 3))
    x = torch.randn(5, 4, requires_grad=True)
    with pytest.raises(errors.UnsupportedError, match=r"model\.module"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
    torch.autograd.grad(model.module(x).pow(2).sum(), x, create_graph=True)[0].sum().backward()


def test_outputs_without_a_graph_get_none(wrap) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            out = self.layer(x)
            return out, out.argmax(1), out.detach(), x

    out, best, detached, same = wrap(Mixed())(torch.randn(5, 4))
    assert [t.requires_grad for t in (out, best, detached, same)] == [True, False, False, False]


def test_two_eval_forwards_keep_their_buffers_for_the_backward(pair) -> None:
    model, reference = pair(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)).eval())
    first, second = torch.randn(6, 4), torch.randn(6, 4)
    for m in (model, reference):
        (m(first) * m(second)).sum().backward()
    assert_same_gradients(model, reference)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_model_first_called_without_gradients_can_train(mode, pair) -> None:
    model, reference = pair(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6).eval(), nn.Linear(6, 1)))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
    x = torch.randn(6, 4)
    for _ in range(2):
        with mode():
            torch.testing.assert_close(model(x), reference(x))
        for m, optimizer in zip((model, reference), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).pow(2).sum().backward()
            optimizer.step()
    assert relative_distance(model, reference) < 1e-5


def test_a_model_may_return_none(wrap) -> None:
    class Silent(nn.Linear):
        def forward(self, x):
            super().forward(x)

    assert wrap(Silent(4, 2))(torch.randn(6, 4)) is None


def shared_bytes(model) -> int:
    """Return the shared memory ever allocated by rank 0; 0 with the collective transport."""
    traffic = getattr(model._duoka_controller.group.transport, "traffic", None)
    return sum(len(s.mapping) - traffic._unused for s in traffic.segments) if traffic else 0


def test_dropped_forwards_free_their_graphs_in_workers(wrap) -> None:
    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            alive = sum(
                1 for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == (3, 4) and o.requires_grad
            )
            return self.layer(x), torch.full((len(x),), alive)

    model = wrap(Probe(), check="off")
    counts = [int(model(torch.randn(6, 4, requires_grad=True))[1][-1]) for _ in range(12)]
    assert counts[-1] == counts[4]


def anonymous_bytes(process: psutil.Process) -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def test_memory_does_not_grow_over_many_steps(wrap) -> None:
    model = wrap(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def steps(count: int) -> None:
        for number in range(count):
            optimizer.zero_grad()
            model(torch.randn(8 + number % 5, 16)).pow(2).mean().backward()
            model(torch.randn(8, 16))
            optimizer.step()

    def used() -> int:
        """Return anonymous memory: file pages count as a process's own when others unmap the file."""
        gc.collect()
        return sum(map(anonymous_bytes, (psutil.Process(), *psutil.Process().children())))

    steps(300)
    before, shared = used(), shared_bytes(model)
    steps(600)
    assert shared_bytes(model) == shared
    assert used() - before < 4 << 20


@pytest.mark.slow
@pytest.mark.parametrize("steps", [4_000, pytest.param(10_000, marks=pytest.mark.extended)])
def test_memory_does_not_grow_over_thousands_of_steps(steps: int, wrap) -> None:
    model = wrap(nn.Linear(4, 2))
    for number in range(steps):
        model(torch.ones(2 + number % 7, 4)).sum().backward()
        if number == 1000:
            before = shared_bytes(model)
    assert shared_bytes(model) == before
