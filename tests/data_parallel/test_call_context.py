"""A call on several devices: torch's settings, what the model does to its inputs, and what it leaves behind."""

import gc

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class Reads(nn.Module):
    """Adds a number that a function returns in the process that computes."""

    def __init__(self, read):
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.read = read

    def forward(self, x):
        return self.linear(x) * 0 + float(self.read())


@pytest.mark.parametrize("kernel", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_workers_use_the_callers_attention_kernels(wrap, kernel):
    for read in (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.math_sdp_enabled):
        model, x = wrap(Reads(read)), torch.randn(6, 4)
        with sdpa_kernel(kernel):
            assert torch.equal(model(x), model.module(x))
        assert torch.equal(model(x), model.module(x))


def test_workers_use_the_callers_flags_of_backends(wrap, monkeypatch):
    model, x = wrap(Reads(lambda: torch.backends.cudnn.deterministic)), torch.randn(6, 4)
    assert torch.equal(model(x), model.module(x))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert torch.equal(model(x), model.module(x))


@pytest.mark.parametrize("devices", ["cpu:2", "cpu:3"])
def test_a_model_that_writes_to_its_input_has_the_gradients_of_one_device(wrap, devices):
    encoder, model, x = nn.Linear(4, 6), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 2)), torch.randn(6, 4)
    want = torch.autograd.grad(model(encoder(x)).sum(), encoder.weight)[0]
    with pytest.warns(UserWarning, match="changes its inputs in place"):
        wrap(model, devices)(encoder(x)).sum().backward()
    torch.testing.assert_close(encoder.weight.grad, want)


def test_a_model_that_writes_to_its_input_changes_no_row_of_the_callers(wrap):
    x = torch.randn(6, 4)
    before = x.clone()
    with pytest.warns(UserWarning, match="changes its inputs in place"):
        wrap(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)))(x)
    assert torch.equal(x, before)


def swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning", "ignore:.*deprecated:DeprecationWarning")
def test_a_forward_may_call_a_scripted_function(wrap):
    class Swish(nn.Linear):
        def __init__(self):
            super().__init__(4, 2)
            self.activation = torch.jit.script(swish)

        def forward(self, x):
            return self.activation(super().forward(x))

    model, x = wrap(Swish()), torch.randn(6, 4)
    torch.testing.assert_close(model(x), model.module(x))


class NoGradientForWeight(torch.autograd.Function):
    @staticmethod
    def forward(_, x, weight):
        return x * weight

    @staticmethod
    def backward(_, gradient):
        return gradient, None


def test_a_function_may_return_no_gradient_for_a_parameter(wrap):
    class Straight(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return NoGradientForWeight.apply(super().forward(x), self.scale)

    model, x = Straight(), torch.randn(6, 4)
    want = torch.autograd.grad(model(x).sum(), model.weight)[0]
    wrap(model)(x).sum().backward()
    torch.testing.assert_close(model.weight.grad, want)
    assert model.scale.grad is None


def test_a_step_leaves_nothing_for_the_garbage_collector(wrap):
    model, x = wrap(nn.Linear(4, 1)), torch.ones(4, 4)
    for _ in range(3):
        model(x).sum().backward()
    gc.collect()
    gc.disable()
    try:
        model(x).sum().backward()
        assert gc.collect() == 0
    finally:
        gc.enable()
