"""The class ``DataParallel``: what existing scripts and users of the wrapped model expect."""

from __future__ import annotations

import copy
import gc
import io
import os
import threading

import pytest
import torch
from torch import nn

import duoka
from duoka import errors
from support.processes import worker_pids
from support.waiting import wait_until


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.temperature = 2.0

    def forward(self, x):
        return self.layer(x) / self.temperature

    def predict(self, x):
        return self(x).argmax(1)


def test_it_is_an_nn_data_parallel_with_its_attributes(wrap) -> None:
    net = Net()
    model = wrap(net, "cpu:3")
    assert isinstance(model, nn.DataParallel)
    assert model.module is net
    assert (model.device_ids, model.dim, model.output_device) == ([0, 1, 2], 0, 0)


def test_attributes_of_the_wrapped_model_are_read_and_set_directly(wrap) -> None:
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


def test_a_wrapped_submodule_saves_and_loads_without_prefix(wrap) -> None:
    whole = nn.Sequential(wrap(Net()), nn.Linear(3, 2))
    state = whole.state_dict()
    assert list(state) == ["0.layer.weight", "0.layer.bias", "1.weight", "1.bias"]
    whole.load_state_dict({name: torch.zeros_like(value) for name, value in state.items()})
    assert whole[0].layer.weight.abs().sum() == 0


def test_a_wrapped_model_inside_another_runs_on_the_outer_devices(wrap) -> None:
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


def test_naming_devices_twice_is_an_error() -> None:
    with pytest.raises(errors.ConfigError, match="one of them"):
        duoka.DataParallel(Net(), device_ids=[0], devices="cpu:2")


def test_device_is_another_name_of_devices() -> None:
    assert duoka.DataParallel(Net(), device="cpu:3").device_ids == [0, 1, 2]


def test_unknown_options_are_refused_with_a_suggestion() -> None:
    with pytest.raises(errors.ConfigError, match=r"devicess='cpu:2'.*did you mean 'devices'"):
        duoka.DataParallel(Net(), devicess="cpu:2")


def test_a_subclass_that_overrides_scatter_is_refused() -> None:
    """Duoka would not call the override, and would split the batch evenly without a warning."""

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


def test_copies_and_saved_models_are_complete(wrap) -> None:
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
    """A subclass with arguments, a parameter and an attribute of its own."""

    def __init__(self, name: str, module: nn.Module, devices: str) -> None:
        super().__init__(module, devices=devices, dim=0)
        self.name = name
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.scale * super().forward(x)


def test_copies_of_a_subclass_keep_its_class_and_attributes() -> None:
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


def test_closing_releases_the_workers_and_keeps_the_parameters(wrap) -> None:
    model = wrap(Net())
    x = torch.randn(6, 4)
    expected = model(x).detach()
    pids = worker_pids()
    model.close()
    model.close()
    gc.collect()
    torch.testing.assert_close(model.module(x), expected)
    model.module(x).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert duoka.launch(lambda: duoka.current_world().rank, devices="cpu:2", returns="all") == [0, 1]
    assert worker_pids() == pids
    torch.testing.assert_close(model(x), model.module(x))
    assert worker_pids() == pids


def test_a_collected_wrapper_releases_the_workers(transport: str) -> None:
    model = duoka.DataParallel(Net(), devices="cpu:2")
    model(torch.randn(6, 4)).sum().backward()
    group = model._duoka_controller.group
    del model
    gc.collect()
    wait_until(lambda: group._session is None)


def test_the_users_thread_count_is_restored(wrap) -> None:
    torch.set_num_threads(2)
    model = wrap(Net())
    out = model(torch.randn(6, 4))
    assert torch.get_num_threads() == 2
    out.sum().backward()
    assert torch.get_num_threads() == 2


def test_models_of_every_dtype(wrap) -> None:
    model = wrap(Net())
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        x = torch.randn(6, 4, dtype=dtype)
        torch.testing.assert_close(model(x), model.module(x), rtol=1e-2, atol=1e-2)


def test_a_graph_keeps_the_workers_of_a_collected_wrapper() -> None:
    model = nn.Linear(3, 1)
    x = torch.randn(8, 3)
    loss = duoka.DataParallel(model, devices="cpu:2")(x).pow(2).sum()
    gc.collect()
    wait_until(lambda: not any(thread.name == "duoka-close" for thread in threading.enumerate()))
    loss.backward()
    other = nn.Linear(3, 1)
    other.load_state_dict(model.state_dict())
    other(x).pow(2).sum().backward()
    torch.testing.assert_close(model.weight.grad, other.weight.grad)
    del loss


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and later, of any process with threads
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_trains_a_copy(wrap) -> None:
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
        model.weight.fill_(2)  # workers still share the parent's pages
    torch.testing.assert_close(
        model(torch.ones(4, 4)), nn.functional.linear(torch.ones(4, 4), model.weight, model.bias)
    )


@pytest.mark.parametrize("second", [lambda y: None, lambda y: {"aux": y * 2}])
def test_a_list_of_two_different_outputs_is_not_one_item_a_sample(wrap, second):
    class Two(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return [y, second(y)]

    first, other = wrap(Two(4, 3))(torch.ones(4, 4))  # two samples a device
    assert first.shape == (4, 3)
    assert other is None or other["aux"].shape == (4, 3)


@pytest.mark.parametrize("option", [{"dim": "a"}, {"dim": True}, {"compile": 3}])
def test_an_option_of_a_wrong_type_is_named(option):
    (name,) = option
    with pytest.raises(errors.ConfigError, match=f"{name}="):
        duoka.DataParallel(nn.Linear(1, 1), devices="cpu:2", **option)
