"""State that a model's forward reads reaches every device, wherever it is and however it changes."""

import copy
import enum
import functools
import importlib

import numpy as np
import pytest
import torch
from torch import nn

from support import random_models
from support.random_models import FEATURES, PLACES, Scale


@pytest.fixture(autouse=True)
def unchanged_afterwards():
    random_models.reset_shared_state()
    yield
    random_models.reset_shared_state()


@pytest.mark.parametrize("place", PLACES)
def test_a_change_in_place_reaches_all_devices(wrap, place):
    model = Scale(place)
    wrapped, x = wrap(model), torch.randn(6, FEATURES)
    wrapped(x)
    for value in (3.0, 0.5):
        model.change(value)
        torch.testing.assert_close(wrapped(x), model(x))


@pytest.mark.parametrize("place", ["class", "global"])
def test_a_value_set_before_the_first_call_reaches_all_devices(wrap, place):
    model, x = Scale(place), torch.randn(6, FEATURES)
    model.change(7.0)
    torch.testing.assert_close(wrap(model)(x), model(x))


@pytest.mark.parametrize("devices", ["cpu:2", "cpu:3"])
@pytest.mark.parametrize(
    "place", ["trained_tensor", "trained_buffer", "tensor_in_list", "tensor_in_object", "hidden_layer", "hidden_module"]
)
def test_a_tensor_that_is_no_parameter_gets_the_whole_gradient(wrap, place, devices):
    model, x = Scale(place), torch.randn(6, FEATURES)
    wrapped = wrap(model, devices)
    for _ in range(2):
        want = torch.autograd.grad(model(x).square().sum(), model.tensors())
        wrapped(x).square().sum().backward()
        for tensor, gradient in zip(model.tensors(), want, strict=True):
            torch.testing.assert_close(tensor.grad, gradient)
            tensor.grad = None
            with torch.no_grad():
                tensor.sub_(0.1 * gradient)


def test_a_layer_appended_to_a_list_later_is_trained_by_all_devices(wrap):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = [nn.Linear(4, 4)]

        def forward(self, x):
            return sum(head(x) for head in self.heads)

    model, x = Heads(), torch.randn(6, 4)
    wrapped = wrap(model)
    wrapped(x)
    model.heads.append(nn.Linear(4, 4))
    want = torch.autograd.grad(model(x).sum(), model.heads[1].bias)[0]
    wrapped(x).sum().backward()
    torch.testing.assert_close(model.heads[1].bias.grad, want)


def test_a_frozen_tensor_in_a_list_may_be_trained_later(wrap):
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.tensors = [torch.ones(4)]

        def forward(self, x):
            return x * self.tensors[0]

    model, x = Hidden(), torch.randn(6, 4)
    wrapped = wrap(model)
    wrapped(x)
    model.tensors[0].requires_grad_(True)
    wrapped(x).sum().backward()
    torch.testing.assert_close(model.tensors[0].grad, x.sum(0))


def test_an_array_of_numpy_under_a_tensor_may_be_edited(wrap):
    class OverArray(nn.Module):
        def __init__(self, array):
            super().__init__()
            self.weight = nn.Parameter(torch.from_numpy(array))

        def forward(self, x):
            return x * self.weight

    array, x = np.ones(4, dtype=np.float32), torch.randn(6, 4)
    wrapped = wrap(OverArray(array))
    wrapped(x)
    array[:] = 3
    torch.testing.assert_close(wrapped(x), 3 * x)


def test_a_large_value_that_is_not_watched_is_announced(wrap):
    class Large(nn.Linear):
        def __init__(self):
            super().__init__(4, 2)
            self.table = np.zeros(300_000)

    with pytest.warns(UserWarning, match="'table' holds 2.40 MB"):
        wrap(Large())(torch.randn(6, 4))


@pytest.mark.parametrize("library", ["torch", "numpy", "python", "numpy object", "torch object"])
def test_parts_and_calls_draw_different_numbers_repeatably(wrap, library):
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.generators = {"numpy": np.random.default_rng(3), "torch": torch.Generator().manual_seed(3)}

        def forward(self, x):
            noise = {
                "torch": lambda: torch.rand(x.shape),
                "numpy": lambda: torch.from_numpy(np.random.rand(*x.shape)),
                "python": lambda: torch.tensor([[random_number() for _ in row] for row in x]),
                "numpy object": lambda: torch.from_numpy(self.generators["numpy"].random(tuple(x.shape))),
                "torch object": lambda: torch.rand(x.shape, generator=self.generators["torch"]),
            }[library]()
            return self.linear(x) * 0 + noise

    def run():
        seed_everything()
        wrapped = wrap(Noise(), check="off")
        return [wrapped(torch.ones(6, 4)).detach() for _ in range(2)]

    first, second = run()
    assert len({tuple(row.tolist()) for row in torch.cat([first, second])}) == 12
    assert torch.equal(torch.cat([first, second]), torch.cat(run()))


def random_number():
    import random

    return random.random()


def seed_everything():
    import random

    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def test_a_copy_of_a_model_with_hidden_layers_is_independent(wrap):
    model, x = Scale("hidden_layer"), torch.randn(6, FEATURES)
    wrapped = wrap(model)
    wrapped(x)
    double = copy.deepcopy(model)
    model.change(2.0)
    torch.testing.assert_close(wrapped(x), model(x))
    assert not torch.equal(double(x), model(x))


class Form(enum.Enum):
    PLAIN = 1
    DOUBLE = 2


class Settings:
    """A class that holds an object of itself."""

    factor = 2.0


Settings.instance = Settings()


def test_classes_and_functions_may_refer_to_themselves(wrap):
    def power(x, n):
        return x if n == 0 else power(x, n - 1) * Settings.instance.factor

    class Model(nn.Linear):
        form = Form.PLAIN

        def forward(self, x):
            y = self.power(super().forward(x), 2)
            return y * 2 if self.form is Form.DOUBLE else y

    model, x = Model(4, 2), torch.randn(6, 4)
    model.power = power
    wrapped = wrap(model)
    torch.testing.assert_close(wrapped(x), model(x))
    model.form = Form.DOUBLE
    torch.testing.assert_close(wrapped(x), model(x))


RATES = {"now": 1.0}


def _rate(step):
    return RATES["now"] * step


cached_rate = functools.lru_cache(8)(_rate)


class CachedRate(nn.Linear):
    """A model that multiplies by what a cached function returns."""

    step = 1
    holder = "global"

    @functools.cache  # noqa: B019 - as users write it
    def own_rate(self, step):
        return RATES["now"] * step

    def forward(self, x):
        rates = {"global": cached_rate, "attribute": getattr(self, "rate", None), "method": self.own_rate}
        return super().forward(x) * rates[self.holder](self.step)


@pytest.mark.parametrize("holder", ["global", "attribute", "method"])
def test_what_a_cached_function_reads_reaches_all_devices(wrap, holder):
    model, x = CachedRate(4, 2), torch.randn(6, 4)
    model.rate, model.holder = cached_rate, holder
    wrapped = wrap(model)
    for model.step in (1, 2, 3):
        RATES["now"] = float(model.step)
        torch.testing.assert_close(wrapped(x), model(x))
    cached_rate.cache_clear()


@pytest.mark.parametrize("is_installed", [True, False])
def test_a_library_beside_its_record_may_fill_its_caches(wrap, tmp_path, monkeypatch, is_installed):
    name = f"filling_{is_installed}"
    source = "seen = {}\ndef flat(x):\n    seen.setdefault(type(x), 1)\n    return x.flatten(1)\n"
    (tmp_path / f"{name}.py").write_text(source)
    if is_installed:
        (tmp_path / f"{name}-1.dist-info").mkdir()
        (tmp_path / f"{name}-1.dist-info/RECORD").write_text(f"{name}.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(name)

    class Model(nn.Linear):
        flat = staticmethod(module.flat)

        def forward(self, x):
            return super().forward(self.flat(x))

    wrapped, x = wrap(Model(4, 2)), torch.randn(6, 2, 2)
    if is_installed:
        wrapped(x)
    else:
        with pytest.warns(UserWarning, match="changes seen outside the model"):
            wrapped(x)
