"""The class itself: what old scripts and the wrapped model's users expect of it."""

from __future__ import annotations

import copy
import gc
import io
import os
import time

import psutil
import pytest
import torch
from torch import nn

import duoka
from duoka import errors


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.temperature = 2.0

    def forward(self, x):
        return self.layer(x) / self.temperature

    def predict(self, x):
        return self(x).argmax(1)


def helpers() -> list[int]:
    return [c.pid for c in psutil.Process().children() if "duoka.workers.worker_main" in " ".join(c.cmdline())]


def test_it_is_a_data_parallel_with_its_attributes(wrap) -> None:
    net = Net()
    model = wrap(net, "cpu:3")
    assert isinstance(model, nn.DataParallel)
    assert model.module is net
    assert (model.device_ids, model.dim, model.output_device) == ([0, 1, 2], 0, 0)


def test_the_wrapped_models_attributes_are_reached_and_set_directly(wrap) -> None:
    model = wrap(Net())
    x = torch.randn(6, 4)
    assert torch.equal(model.predict(x), model.module.predict(x))
    assert model.layer is model.module.layer
    model.temperature = 4.0
    assert model.module.temperature == 4.0
    torch.testing.assert_close(model(x), model.module(x))
    with pytest.raises(AttributeError, match="Net"):
        _ = model.missing


@pytest.mark.parametrize("prefix", ["", "module."])
def test_states_have_no_prefix_and_load_with_or_without(prefix: str, wrap) -> None:
    model = wrap(Net())
    assert list(model.state_dict()) == ["layer.weight", "layer.bias"]
    model.load_state_dict({prefix + name: torch.ones_like(v) for name, v in model.state_dict().items()})
    assert model.layer.weight.unique().tolist() == [1]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({prefix + "layer.weight": torch.ones(3, 4)})


def test_a_wrapped_part_of_a_model_saves_and_loads_without_prefix(wrap) -> None:
    whole = nn.Sequential(wrap(Net()), nn.Linear(3, 2))
    state = whole.state_dict()
    assert list(state) == ["0.layer.weight", "0.layer.bias", "1.weight", "1.bias"]
    whole.load_state_dict({name: torch.zeros_like(value) for name, value in state.items()})
    assert whole[0].layer.weight.abs().sum() == 0


def test_a_wrapped_model_inside_a_wrapped_model_computes_on_the_outer_ones_devices(wrap) -> None:
    inner = wrap(Net())
    outer = wrap(nn.Sequential(nn.Linear(4, 4), inner))
    x = torch.randn(6, 4)
    torch.testing.assert_close(outer(x), inner.module(outer.module[0](x)))
    outer(x).sum().backward()
    assert inner.layer.weight.grad is not None


def test_one_device_is_the_bare_model(wrap) -> None:
    model = wrap(Net(), "cpu")
    x = torch.randn(6, 4)
    assert torch.equal(model(x), model.module(x))
    assert wrap(nn.Identity(), "cpu")(torch.tensor(3.0)).shape == ()
    assert model._duoka_controller is None


def test_devices_may_be_given_in_one_way_only() -> None:
    with pytest.raises(errors.ConfigError, match="one of them"):
        duoka.DataParallel(Net(), device_ids=[0], devices="cpu:2")


def test_a_subclass_with_steps_of_its_own_is_refused_on_several_devices_and_others_are_not() -> None:
    """They would not be called: a batch that is to be divided in another way would be divided evenly without a word."""

    class Balanced(duoka.DataParallel):
        def scatter(self, *_):
            raise AssertionError

        def gather(self, *_):
            raise AssertionError

    class Doubling(duoka.DataParallel):
        def forward(self, x):
            return 2 * super().forward(x)

    net, x = Net(), torch.randn(6, 4)
    with pytest.raises(errors.UnsupportedError, match="Balanced overrides scatter and gather"):
        Balanced(net, devices="cpu:2")
    assert torch.equal(Balanced(net, devices="cpu")(x), net(x))
    doubling = Doubling(net, devices="cpu:2")
    assert torch.allclose(doubling(x), 2 * net(x))
    doubling.close()


def test_copies_and_saved_models_are_whole(wrap) -> None:
    model = wrap(Net())
    x = torch.randn(6, 4)
    expected = model(x).detach()
    double = copy.deepcopy(model)
    torch.testing.assert_close(double(x), expected)
    double.close()
    file = io.BytesIO()
    torch.save(model, file)
    assert len(file.getvalue()) < 20_000
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded(x), expected)
    loaded.close()
    for clone in (copy.deepcopy(model.module), copy.deepcopy(model.layer.weight)):
        assert all(
            p.untyped_storage().nbytes() == p.numel() * 4
            for p in (clone.parameters() if isinstance(clone, nn.Module) else [clone])
        )


class Named(duoka.DataParallel):
    """As people write them: arguments of its own, and more than the model inside."""

    def __init__(self, name: str, module: nn.Module, devices: str) -> None:
        super().__init__(module, devices=devices, dim=0)
        self.name = name
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.scale * super().forward(x)


def test_copies_of_a_subclass_are_of_that_class_and_have_what_it_has() -> None:
    model, x = Named("mine", nn.Linear(4, 3), "cpu:2"), torch.randn(6, 4)
    model.register_forward_hook(add_one)
    expected = model(x).detach()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for double in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert (type(double), double.name) == (Named, "mine")
        torch.testing.assert_close(double(x), expected)
        double(x).sum().backward()
        assert model.scale.grad is None
        assert double.scale.grad is not None
        double.close()
    model.close()


def add_one(_, __, output):
    return output + 1


def test_closing_gives_the_helpers_back_and_leaves_the_parameters(wrap) -> None:
    model = wrap(Net())
    x = torch.randn(6, 4)
    expected = model(x).detach()
    pids = helpers()
    model.close()
    model.close()
    gc.collect()
    torch.testing.assert_close(model.module(x), expected)
    model.module(x).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert duoka.launch(lambda: duoka.current_world().rank, devices="cpu:2", returns="all") == [0, 1]
    assert helpers() == pids
    torch.testing.assert_close(model(x), model.module(x))
    assert helpers() == pids


def test_a_collected_wrapper_gives_the_helpers_back(transport: str) -> None:
    model = duoka.DataParallel(Net(), devices="cpu:2")
    model(torch.randn(6, 4)).sum().backward()
    group = model._duoka_controller.group
    del model
    gc.collect()
    deadline = time.monotonic() + 5
    while group._session is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert group._session is None


def test_the_users_thread_count_is_given_back(wrap) -> None:
    torch.set_num_threads(2)
    model = wrap(Net())
    out = model(torch.randn(6, 4))
    assert torch.get_num_threads() == 2
    out.sum().backward()
    assert torch.get_num_threads() == 2


def test_models_of_every_type_of_number(wrap) -> None:
    model = wrap(Net())
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        x = torch.randn(6, 4, dtype=dtype)
        torch.testing.assert_close(model(x), model.module(x), rtol=1e-2, atol=1e-2)


def test_a_wrapper_that_is_gone_leaves_its_helpers_to_the_graph_that_needs_them() -> None:
    model = nn.Linear(3, 1)
    x = torch.randn(8, 3)
    loss = duoka.DataParallel(model, devices="cpu:2")(x).pow(2).sum()
    time.sleep(0.3)  # what ends helpers does so in a thread of its own
    loss.backward()
    other = nn.Linear(3, 1)
    other.load_state_dict(model.state_dict())
    other(x).pow(2).sum().backward()
    torch.testing.assert_close(model.weight.grad, other.weight.grad)
    del loss


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and later, of any process with threads
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_what_a_forked_child_trains_is_its_own(wrap) -> None:
    model = wrap(nn.Linear(4, 2))
    model(torch.ones(4, 4)).sum().backward()
    before = model.weight.detach().clone()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with torch.no_grad():
            model.weight.fill_(7)
        grandchild = os.fork()
        if grandchild == 0:
            os.write(writer, b"1" if bool((model.weight == 7).all()) else b"0")
            os._exit(0)
        os.waitpid(grandchild, 0)
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"1"
    os.close(reader), os.close(writer)
    torch.testing.assert_close(model.weight, before, rtol=0, atol=0)
    with torch.no_grad():
        model.weight.fill_(2)  # the parent's pages are still the helpers'
    torch.testing.assert_close(
        model(torch.ones(4, 4)), nn.functional.linear(torch.ones(4, 4), model.weight, model.bias)
    )
