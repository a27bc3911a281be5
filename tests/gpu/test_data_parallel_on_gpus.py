"""``DataParallel`` on accelerators: GPUs over NCCL, other accelerators over gloo; one device alone.

A GPU named several times uses NCCL with ``NCCL_MULTI_RANK_GPU_ENABLE=1`` and NCCL 2.30, otherwise gloo: run this file in both.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

import duoka
from duoka import errors
from duoka.data_parallel.transport import process_group
from duoka.devices import nccl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine"),
    pytest.mark.leaks_allowed,  # CUDA keeps threads and descriptors until the process ends
    pytest.mark.filterwarnings("ignore"),
]
DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")
COUNT = torch.accelerator.device_count()

SHARES = nccl.ranks_may_share_a_gpu()

DEVICES = [
    pytest.param("0,0", id="one device named twice", marks=[pytest.mark.extended] if COUNT > 1 else []),
    pytest.param(
        "0,0,0",
        id="one device named three times",
        marks=[
            pytest.mark.extended,
            pytest.mark.skipif(not SHARES, reason="gloo is tested with the device named twice"),
        ],
    ),
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

    def make(module: nn.Module, devices: str, **options) -> duoka.DataParallel:
        wrapped.append(duoka.DataParallel(module, devices=devices, **options))
        return wrapped[-1]

    torch.manual_seed(0)
    yield make
    for model in wrapped:
        model.close()


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5)
    )


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("batch", [1, 2, 7, pytest.param(32, marks=pytest.mark.extended)])
def test_twenty_steps_equal_those_of_one_device(batch: int, devices: str, wrap) -> None:
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


@pytest.mark.parametrize("devices", DEVICES)
def test_inputs_on_the_host_are_moved_and_get_their_gradients(devices: str, wrap) -> None:
    model = wrap(nn.Linear(4, 3), devices)
    x = torch.randn(7, 4, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a model that one device computes
        out = model(x)
    assert out.device == torch.device(DEVICE.type, 0)
    out.sum().backward()
    torch.testing.assert_close(x.grad, model.weight.detach().cpu().sum(0).expand(7, 4))


@pytest.mark.parametrize("devices", DEVICES)
def test_an_edit_through_data_after_the_step_is_seen(devices: str, wrap) -> None:
    model = wrap(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), devices)
    model.module[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 4, device=DEVICE)
    for _ in range(5):
        model(x).pow(2).mean().backward()
        optimizer.step()
        for parameter in model.parameters():
            parameter.data.mul_(0.5)
        torch.testing.assert_close(model(x), model.module(x))
        with torch.no_grad():
            torch.testing.assert_close(model(x), model.module(x))


@pytest.mark.parametrize("devices", DEVICES)
def test_failures_block_no_device(devices: str, wrap) -> None:
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
    for row in (0, 6 - 6 // len(devices.split(","))):  # the first row of the first and of the last device
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


@pytest.mark.parametrize("devices", DEVICES)
def test_a_worker_that_dies_is_reported_and_replaced(devices: str, wrap) -> None:
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
def no_synchronization(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail if the host waits for a device, except inside gloo's transfers, which go through the host."""
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    waits = torch.get_device_module(DEVICE).waits
    allowed = []

    def counted(method):
        def call(*args, **kwargs):
            before = waits()
            value = method(*args, **kwargs)
            allowed.append(waits() - before)
            return value

        return call

    monkeypatch.setattr(process_group.PrivateProcessGroup, "_start", counted(process_group.PrivateProcessGroup._start))
    monkeypatch.setattr(process_group.PendingCollective, "wait", counted(process_group.PendingCollective.wait))
    before = waits()
    yield
    assert waits() - before == sum(allowed)


@pytest.mark.parametrize("devices", ["0", *DEVICES])
def test_a_step_does_not_synchronize_with_a_device(devices: str, wrap, monkeypatch: pytest.MonkeyPatch) -> None:
    """If everything is trained and the program reads no value, the host never waits for its device."""
    if devices.startswith("0,0") and DEVICE.type == "cuda" and not SHARES:
        pytest.skip("gloo goes through the host")
    model = wrap(nn.Sequential(net(), nn.Dropout(), nn.BatchNorm1d(5)).to(DEVICE), devices)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(16, 3, 8, 8, device=DEVICE)

    def step() -> None:
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()

    for _ in range(4):
        step()
    with no_synchronization(monkeypatch):
        for _ in range(3):  # calls 5 to 7, which are not checked
            step()


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_scaler_act_on_every_device(dtype: torch.dtype, devices: str, wrap) -> None:
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


@pytest.mark.parametrize("devices", DEVICES)
def test_a_seed_repeats_the_masks_and_devices_draw_different_ones(devices: str, wrap) -> None:
    model = wrap(nn.Dropout(), devices)
    x = torch.ones(6, 64, device=DEVICE)
    torch.manual_seed(3)
    first = model(x)
    torch.manual_seed(3)
    assert torch.equal(model(x), first)
    more = [first, *(model(x) for _ in range(10))]
    assert len({tuple(row) for out in more for row in out.tolist()}) == 6 * 11


@pytest.mark.parametrize("devices", DEVICES)
def test_one_models_output_is_anothers_input(devices: str, wrap) -> None:
    maker, judge = nn.Linear(3, 4).to(DEVICE), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).to(DEVICE)
    judge[0].requires_grad_(False)
    references = copy.deepcopy(maker), copy.deepcopy(judge)
    z = torch.randn(7, 3, device=DEVICE)
    wrap(judge, devices)(wrap(maker, devices)(z)).pow(2).sum().backward()
    references[1](references[0](z)).pow(2).sum().backward()
    assert judge[0].weight.grad is None
    torch.testing.assert_close(judge[1].weight.grad, references[1][1].weight.grad)
    torch.testing.assert_close(maker.weight.grad, references[0].weight.grad)


def test_a_model_moved_to_another_device_is_refused_with_a_remedy(wrap) -> None:
    model = wrap(nn.Linear(3, 2), "0,0")
    assert model(torch.ones(4, 3)).device == torch.device(DEVICE.type, 0)
    model.module.cpu()
    with pytest.raises(errors.DeviceError, match=rf"model.to\('{DEVICE.type}:0'\)"):
        model(torch.ones(4, 3))


@pytest.mark.parametrize("devices", DEVICES)
def test_the_first_device_frees_weight_copies_and_sums_early(devices: str, wrap) -> None:
    """It keeps copies of the weights during a forward only, and workers' sums during a backward only."""
    gc.collect()
    before = torch.accelerator.memory_allocated(0)
    model = wrap(nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).to(DEVICE), devices, check="off")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    x = torch.randn(8, 1024, device=DEVICE)
    room = before + size // 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.accelerator.reset_peak_memory_stats(0)
        loss = model(x).sum()
        assert torch.accelerator.max_memory_allocated(0) < 2 * size + room  # the model, and what is sent
        assert torch.accelerator.memory_allocated(0) < size + room
        torch.accelerator.reset_peak_memory_stats(0)
        loss.backward()
        assert torch.accelerator.max_memory_allocated(0) < 3 * size + room  # the model, its gradients, and the workers'
        del loss
        assert torch.accelerator.memory_allocated(0) < 2 * size + room
        optimizer.step()
    assert torch.accelerator.memory_allocated(0) < 2 * size + room


def test_one_device_gets_its_inputs_moved(wrap) -> None:
    model = wrap(nn.Linear(4, 3), "0")
    assert model(torch.randn(6, 4)).device == torch.device(DEVICE.type, 0)
    assert model(input=torch.randn(6, 4)).device == torch.device(DEVICE.type, 0)


def test_one_device_is_the_bare_model(wrap) -> None:
    model = wrap(nn.Linear(4, 3), "0")
    x = torch.randn(6, 4, device=DEVICE)
    assert torch.equal(model(x), model.module(x))
    assert model._duoka_controller is None
