"""``DataParallel`` on accelerators: several GPUs over NCCL, one named twice or others' devices over gloo, one alone."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

import duoka
from duoka import errors
from duoka.data_parallel.transport import process_group

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine"),
    pytest.mark.leaks_allowed,  # CUDA keeps threads and descriptors for the life of the process
    pytest.mark.filterwarnings("ignore"),
]
DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")
COUNT = torch.accelerator.device_count()

PLACES = [
    pytest.param("0,0", id="one device named twice", marks=[pytest.mark.extended] if COUNT > 1 else []),
    pytest.param(
        "0,1",
        id="two devices",
        marks=pytest.mark.skipif(COUNT < 2, reason="fewer than two devices"),
    ),
    pytest.param(
        "0,1,2",
        id="three devices",
        marks=pytest.mark.skipif(COUNT < 3, reason="fewer than three devices"),
    ),
]


@pytest.fixture
def wrap() -> Iterator[Callable[..., duoka.DataParallel]]:
    wrapped: list[duoka.DataParallel] = []

    def make(module: nn.Module, devices: str) -> duoka.DataParallel:
        wrapped.append(duoka.DataParallel(module, devices=devices))
        return wrapped[-1]

    torch.manual_seed(0)
    yield make
    for model in wrapped:
        model.close()


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5)
    )


@pytest.mark.parametrize("devices", PLACES)
@pytest.mark.parametrize("batch", [1, 2, 7, pytest.param(32, marks=pytest.mark.extended)])
def test_twenty_steps_end_where_one_device_ends(batch: int, devices: str, wrap) -> None:
    module = net().double().to(DEVICE)
    reference = copy.deepcopy(module)
    runs = [(m, torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)) for m in (wrap(module, devices), reference)]
    for _ in range(20):
        x = torch.randn(batch, 3, 8, 8, dtype=torch.float64, device=DEVICE)
        y = torch.randint(5, (batch,), device=DEVICE)
        for model, optimizer in runs:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    for own, other in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)
    assert not dist.is_initialized()


@pytest.mark.parametrize("devices", PLACES)
def test_inputs_of_the_host_are_brought_and_get_their_gradients(devices: str, wrap) -> None:
    model = wrap(nn.Linear(4, 3), devices)
    x = torch.randn(7, 4, requires_grad=True)
    out = model(x)
    assert out.device == torch.device(DEVICE.type, 0)
    out.sum().backward()
    torch.testing.assert_close(x.grad, model.weight.detach().cpu().sum(0).expand(7, 4))


@pytest.mark.parametrize("devices", PLACES)
@pytest.mark.parametrize("wait_s", [0.0, 0.2])
def test_an_edit_through_data_after_the_step_is_seen(wait_s: float, devices: str, wrap) -> None:
    model = wrap(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), devices)
    model.module[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 4, device=DEVICE)
    for _ in range(5):
        model(x).pow(2).mean().backward()
        optimizer.step()
        time.sleep(wait_s)
        for parameter in model.parameters():
            parameter.data.mul_(0.5)
        torch.testing.assert_close(model(x), model.module(x))
        with torch.no_grad():
            torch.testing.assert_close(model(x), model.module(x))


@pytest.mark.parametrize("devices", PLACES)
def test_failures_keep_nobody_waiting(devices: str, wrap) -> None:
    class Moody(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            if (x[0] < 0).any():
                raise ValueError("negative")
            if (x[0] > 5).any():
                out.register_hook(lambda _: 1 / 0)
            return out

    model = wrap(Moody(2, 1), devices)
    good = torch.ones(6, 2, device=DEVICE)
    for row in (0, 6 - 6 // len(devices.split(","))):  # the first of the first part and of the last
        bad = good.clone()
        bad[row] = -1
        with pytest.raises(ValueError, match="negative"):
            model(bad)
        bad[row] = 9
        with pytest.raises(ZeroDivisionError):
            model(bad).sum().backward()
        model.zero_grad()
        model(good).sum().backward()
        assert model.weight.grad.tolist() == [[6, 6]]


@pytest.mark.parametrize("devices", PLACES)
def test_a_helper_that_dies_is_reported_and_replaced(devices: str, wrap) -> None:
    class Deadly(nn.Linear):
        def forward(self, x, *, end: bool = False):
            if end and os.getpid() != self.owner:
                os._exit(3)
            return super().forward(x)

    model = wrap(Deadly(2, 1), devices)
    model.module.owner = os.getpid()
    x = torch.ones(6, 2, device=DEVICE)
    model(x)
    with pytest.raises(errors.WorkerDied):
        model(x, end=True)
    model(x).sum().backward()
    assert model.weight.grad.tolist() == [[6, 6]]


@contextlib.contextmanager
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail if the host is made to wait for a device, unless gloo's sending does it, which goes through the host."""
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        yield
        torch.cuda.set_sync_debug_mode("default")
        return
    waits = torch.get_device_module(DEVICE).waits
    sent = []

    def counted(method):
        def call(*args, **kwargs):
            before = waits()
            value = method(*args, **kwargs)
            sent.append(waits() - before)
            return value

        return call

    monkeypatch.setattr(process_group.PrivateProcessGroup, "_start", counted(process_group.PrivateProcessGroup._start))
    monkeypatch.setattr(process_group.PendingCollective, "wait", counted(process_group.PendingCollective.wait))
    before = waits()
    yield
    assert waits() - before == sum(sent)


@pytest.mark.parametrize("devices", ["0", *PLACES])
def test_a_step_waits_for_no_device(devices: str, wrap, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything trained and no user who asks for a number, the host is never made to wait for its device."""
    if devices == "0,0" and DEVICE.type == "cuda":
        pytest.skip("gloo goes through the host")
    model = wrap(nn.Sequential(net(), nn.Dropout(), nn.BatchNorm1d(5)).to(DEVICE), devices)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(16, 3, 8, 8, device=DEVICE)

    def step() -> None:
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()

    def step_without_checksum() -> None:  # which is asked for where a device has nothing else to do
        if model._duoka_controller is not None:
            model._duoka_controller._weights._pause = 10
        step()

    step()
    step_without_checksum()
    with no_waiting(monkeypatch):
        for _ in range(3):
            step_without_checksum()


@pytest.mark.parametrize("devices", PLACES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_scaler_act_on_every_part(dtype: torch.dtype, devices: str, wrap) -> None:
    module = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).to(DEVICE)
    reference = copy.deepcopy(module)
    x, y = torch.randn(9, 4, device=DEVICE), torch.randint(3, (9,), device=DEVICE)
    for model in (wrap(module, devices), reference):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(DEVICE.type, enabled=dtype == torch.float16)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, dtype=dtype):
                out = model(x)
                loss = nn.functional.cross_entropy(out, y)
            assert out.dtype == dtype
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
    for own, other in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("devices", PLACES)
def test_a_seed_repeats_the_masks_and_parts_draw_their_own(devices: str, wrap) -> None:
    model = wrap(nn.Dropout(), devices)
    x = torch.ones(6, 64, device=DEVICE)
    torch.manual_seed(3)
    first = model(x)
    torch.manual_seed(3)
    assert torch.equal(model(x), first)
    more = [first, *(model(x) for _ in range(10))]
    assert len({tuple(row) for out in more for row in out.tolist()}) == 6 * 11


@pytest.mark.parametrize("devices", PLACES)
def test_models_feed_each_other_and_keep_what_is_frozen(devices: str, wrap) -> None:
    maker, judge = nn.Linear(3, 4).to(DEVICE), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).to(DEVICE)
    judge[0].requires_grad_(False)
    references = copy.deepcopy(maker), copy.deepcopy(judge)
    z = torch.randn(7, 3, device=DEVICE)
    wrap(judge, devices)(wrap(maker, devices)(z)).pow(2).sum().backward()
    references[1](references[0](z)).pow(2).sum().backward()
    assert judge[0].weight.grad is None
    torch.testing.assert_close(judge[1].weight.grad, references[1][1].weight.grad)
    torch.testing.assert_close(maker.weight.grad, references[0].weight.grad)


def test_a_model_that_was_moved_away_is_refused_with_the_remedy(wrap) -> None:
    model = wrap(nn.Linear(3, 2), "0,0")
    assert model(torch.ones(4, 3)).device == torch.device(DEVICE.type, 0)
    model.module.cpu()
    with pytest.raises(errors.DeviceError, match=rf"model.to\('{DEVICE.type}:0'\)"):
        model(torch.ones(4, 3))


@pytest.mark.parametrize("devices", PLACES)
def test_the_first_device_holds_a_copy_of_the_weights_no_longer_than_a_forward_and_sums_than_a_backward(
    devices: str, wrap
) -> None:
    gc.collect()
    before = torch.accelerator.memory_allocated(0)
    model = wrap(nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).to(DEVICE), devices)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    x = torch.randn(8, 1024, device=DEVICE)
    room = before + size // 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.accelerator.reset_peak_memory_stats(0)
        loss = model(x).sum()
        assert torch.accelerator.max_memory_allocated(0) < 2 * size + room  # itself and what is sent
        assert torch.accelerator.memory_allocated(0) < size + room
        torch.accelerator.reset_peak_memory_stats(0)
        loss.backward()
        assert torch.accelerator.max_memory_allocated(0) < 3 * size + room  # itself, its gradients and the helpers'
        del loss
        assert torch.accelerator.memory_allocated(0) < 2 * size + room
        optimizer.step()
    time.sleep(0.2)  # until what the step has sent has gone
    assert torch.accelerator.memory_allocated(0) < 2 * size + room


def test_one_device_is_brought_its_inputs_as_by_torchs_wrapper(wrap) -> None:
    model = wrap(nn.Linear(4, 3), "0")
    assert model(torch.randn(6, 4)).device == torch.device(DEVICE.type, 0)
    assert model(input=torch.randn(6, 4)).device == torch.device(DEVICE.type, 0)


def test_one_device_is_the_bare_model(wrap) -> None:
    model = wrap(nn.Linear(4, 3), "0")
    x = torch.randn(6, 4, device=DEVICE)
    assert torch.equal(model(x), model.module(x))
    assert model._duoka_controller is None
