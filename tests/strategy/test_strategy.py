"""Strategies: which is chosen and why, and that each one's gradient is that of the mean over the global batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from duoka.errors import ConfigError
from duoka.launcher import launch
from duoka.strategy import select_strategy
from duoka.world import World, current_world

pytestmark = pytest.mark.usefixtures("pickle_by_value")

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


class MeanLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return functional.mse_loss(self.layer(batch), batch.sum(1, keepdim=True))


def batch(samples: int) -> torch.Tensor:
    return torch.randn(samples, 4, generator=torch.Generator().manual_seed(samples))


def reference(samples: int) -> torch.Tensor:
    module = MeanLoss()
    module(batch(samples)).backward()
    return module.layer.weight.grad


@pytest.mark.parametrize(
    ("name", "size", "chosen", "words"),
    [("auto", 1, "single", "one device"), ("auto", 2, "ddp", "2 ranks"), ("ddp", 2, "ddp", "during backward")],
)
def test_the_strategy_comes_with_a_reason(name, size, chosen, words):
    strategy, reason = select_strategy(name, World(0, size, CPU))
    assert strategy.name == chosen
    assert words in reason


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [("dpd", 1, "did you mean 'd"), ("dp", 2, "one process"), ("single", 2, "this job has 2")],
)
def test_an_unknown_or_impossible_strategy_is_an_error(name, size, message):
    with pytest.raises(ConfigError, match=message):
        select_strategy(name, World(0, size, CPU))


def gradient_of_unequal_parts(samples: int) -> torch.Tensor:
    world = current_world()
    strategy, _ = select_strategy("auto", world)
    module = MeanLoss()
    if world.rank:
        nn.init.zeros_(module.layer.weight)  # wrapping brings rank 0's weights
    wrapped = strategy.wrap(module)
    part = torch.tensor_split(batch(samples), world.size)[world.rank]
    loss = wrapped(part if len(part) else batch(1)) * strategy.loss_scale(len(part), samples)
    loss.backward()
    return module.layer.weight.grad


@pytest.mark.parametrize(("size", "samples"), [(2, 5), (3, 7), (3, 2)])
def test_unequal_parts_have_the_gradient_of_the_global_mean(size, samples):
    gradients = launch(gradient_of_unequal_parts, samples, devices=f"cpu:{size}", returns="all")
    for gradient in gradients:
        assert torch.allclose(gradient, reference(samples), rtol=1e-5)


def gradient_of_sums(samples: int) -> torch.Tensor:
    world = current_world()
    strategy, _ = select_strategy("auto", world)
    module = MeanLoss()
    wrapped = strategy.wrap(module)
    part = torch.tensor_split(batch(samples), world.size)[world.rank]
    (wrapped(part) * len(part)).backward()
    strategy.average_gradients(module.parameters(), torch.tensor(len(part)))
    return module.layer.weight.grad


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sums_are_divided_by_the_weight_of_all_ranks(size):
    for gradient in launch(gradient_of_sums, 7, devices=f"cpu:{size}", returns="all"):
        assert torch.allclose(gradient, reference(7), rtol=1e-5)


def test_a_step_of_weight_0_has_gradient_0():
    strategy, _ = select_strategy("auto", ALONE)
    module = MeanLoss()
    module(batch(3)).backward()
    strategy.average_gradients(module.parameters(), torch.tensor(0.0))
    assert float(module.layer.weight.grad.abs().sum()) == 0.0


def local_then_global() -> tuple[bool, bool]:
    world = current_world()
    strategy, _ = select_strategy("auto", world)
    module = MeanLoss()
    wrapped = strategy.wrap(module)
    with strategy.no_sync():
        wrapped(batch(2 + world.rank)).backward()
    local = world.all_gather_object(module.layer.weight.grad.clone())
    wrapped(batch(2 + world.rank)).backward()
    together = world.all_gather_object(module.layer.weight.grad.clone())
    return torch.equal(*local), torch.equal(*together)


def test_gradients_stay_local_until_the_last_micro_batch():
    assert launch(local_then_global, devices="cpu:2") == (False, True)


def clipped_norm() -> tuple[float, float]:
    strategy, _ = select_strategy("auto", current_world())
    module = MeanLoss()
    wrapped = strategy.wrap(module)
    wrapped(batch(4)).backward()
    before = strategy.clip(module.parameters(), 0.25)
    after = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in module.parameters()]))
    return float(before), float(after)


@pytest.mark.parametrize("size", [1, 2])
def test_the_total_norm_of_the_gradient_is_clipped(size):
    for before, after in launch(clipped_norm, devices=f"cpu:{size}", returns="all"):
        assert before > 0.25
        assert after == pytest.approx(0.25, rel=1e-4)


def gradients_without_wrapper() -> list[float]:
    world = current_world()
    strategy, _ = select_strategy("auto", world)
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(()))]
    parameters[0].grad = torch.full((2,), float(world.rank + 1))
    if world.rank:
        parameters[1].grad = torch.tensor(4.0)
    strategy.all_reduce_gradients(parameters)
    return [float(parameter.grad.mean()) for parameter in parameters]


@pytest.mark.parametrize(("size", "expected"), [(2, [1.5, 2.0]), (3, [2.0, 8 / 3])])
def test_gradients_before_wrapping_are_averaged_over_ranks(size, expected):
    for gradients in launch(gradients_without_wrapper, devices=f"cpu:{size}", returns="all"):
        assert gradients == pytest.approx(expected)


def synchronized() -> tuple[float, float]:
    world = current_world()
    strategy, _ = select_strategy("auto", world)
    module = MeanLoss()
    with torch.no_grad():
        module.layer.bias.fill_(world.rank)
        module.seen.fill_(world.rank)
    strategy.broadcast(module.buffers())
    seen = float(module.seen)
    strategy.broadcast([*module.parameters(), *module.buffers()])
    return seen, module.layer.bias.item()


def test_all_ranks_get_rank_0s_buffers_and_weights():
    assert launch(synchronized, devices="cpu:2", returns="all") == [(0.0, 0.0), (0.0, 0.0)]


def test_ddp_passes_its_options_to_torch():
    def option() -> bool:
        strategy, _ = select_strategy("ddp", current_world(), ddp_options={"static_graph": True, "bucket_cap_mb": 3})
        wrapped = strategy.wrap(MeanLoss())
        return wrapped.static_graph and wrapped.bucket_bytes_cap == 3 * 2**20

    assert launch(option, devices="cpu:2") is True


def test_a_model_with_nothing_to_train_is_refused_by_ddp():
    def wrap() -> None:
        select_strategy("auto", current_world())[0].wrap(MeanLoss().requires_grad_(requires_grad=False))

    with pytest.raises(ConfigError, match="nothing to train"):
        launch(wrap, devices="cpu:2")


@pytest.mark.parametrize("weighted", [False, True])
def test_torchs_dataparallel_has_the_same_loss_and_gradient(weighted):
    class Weighted(MeanLoss):
        def forward(self, batch):
            return super().forward(batch) * len(batch), torch.tensor(len(batch))

    strategy, reason = select_strategy("dp", ALONE, devices=[CPU])
    assert "nn.DataParallel" in reason
    module = Weighted() if weighted else MeanLoss()
    loss = strategy.wrap(module)(batch(5))
    total, weight = loss if weighted else (loss, torch.tensor(1))
    (total / weight).backward()
    assert torch.allclose(module.layer.weight.grad, reference(5), rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_torchs_dataparallel_trains_on_accelerators():
    device = torch.device("cuda:0")
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    strategy, _ = select_strategy("dp", World(0, 1, device), devices=devices)
    module = MeanLoss().to(device)
    strategy.wrap(module)(batch(5).to(device)).backward()
    assert torch.allclose(module.layer.weight.grad.cpu(), reference(5), rtol=1e-4)


def test_gradients_of_several_dtypes_are_each_divided_in_their_own():
    strategy, _ = select_strategy("auto", ALONE)
    parameters = [nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    strategy.average_gradients(parameters, torch.tensor(3.0))
    assert torch.equal(parameters[0].grad, torch.full((2,), 1 / 3, dtype=torch.bfloat16))
    assert torch.equal(parameters[1].grad, torch.full((2,), 1 / 3))


def test_torchs_dataparallel_on_the_cpu_uses_no_accelerator(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("nn.DataParallel without device_ids takes every accelerator")

    monkeypatch.setattr(nn, "DataParallel", refuse)
    module = MeanLoss()
    select_strategy("dp", ALONE, devices=[CPU, CPU])[0].wrap(module)(batch(5)).backward()
    assert torch.allclose(module.layer.weight.grad, reference(5), rtol=1e-5)
