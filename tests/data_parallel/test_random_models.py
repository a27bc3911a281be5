"""Random models on several devices and on one: the same results, or a warning or an error that says otherwise."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import duoka
from duoka.errors import DuokaError
from support import random_models
from support.random_models import FEATURES, INPUTS, LAYERS, OUTPUTS, RandomModel
from support.transports import both_transports

calls = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 9),
        "backward": st.booleans(),
        "training": st.just(False),
        "change": st.none() | st.sampled_from([2.0, 3.0, 0.5]),
        "input_gradient": st.booleans(),
    }
)
examples = st.fixed_dictionaries(
    {
        "layers": st.lists(st.sampled_from(sorted(LAYERS)), max_size=3),
        "output": st.sampled_from(sorted(OUTPUTS)),
        "input": st.sampled_from(INPUTS),
        "devices": st.integers(2, 3),
        "calls": st.lists(calls, min_size=1, max_size=3),
    }
)


def difference(got: Any, want: Any, place: str = "output") -> str:
    """Return where two values differ; empty if nowhere."""
    if isinstance(want, torch.Tensor):
        if not isinstance(got, torch.Tensor) or got.shape != want.shape or got.layout != want.layout:
            return f"{place}: {getattr(got, 'shape', got)} in place of {want.shape}"
        got, want = got.detach().to_dense(), want.detach().to_dense()
        return "" if torch.allclose(got, want, rtol=1e-6, atol=1e-8) else f"{place}: {got} in place of {want}"
    if isinstance(want, np.ndarray):
        same = isinstance(got, np.ndarray) and got.shape == want.shape and np.allclose(got, want)
        return "" if same else f"{place}: {got} in place of {want}"
    if type(got) is not type(want):
        return f"{place}: {type(got).__name__} in place of {type(want).__name__}"
    if isinstance(want, Mapping):
        if got.keys() != want.keys():
            return f"{place}: keys {list(got)} in place of {list(want)}"
        pairs = [(f"{place}[{key!r}]", got[key], want[key]) for key in want]
    elif isinstance(want, list | tuple):
        if len(got) != len(want):
            return f"{place}: {len(got)} items in place of {len(want)}"
        pairs = [(f"{place}[{index}]", *both) for index, both in enumerate(zip(got, want, strict=True))]
    elif isinstance(want, set) or hasattr(want, "__next__"):
        return difference(list(got), list(want), place)
    elif hasattr(want, "__dict__"):
        return difference(vars(got), vars(want), place)
    else:
        same = got == want or (isinstance(want, float) and got == pytest.approx(want))
        return "" if same else f"{place}: {got!r} in place of {want!r}"
    return next((found for name, one, other in pairs if (found := difference(one, other, name))), "")


def loss_of(value: Any) -> torch.Tensor | None:
    """Return a number that depends on every tensor with a graph in ``value``."""
    if isinstance(value, torch.Tensor):
        weights = torch.arange(1.0, value.numel() + 1, dtype=torch.float64).view(value.shape)
        return (value * weights).sum() if value.requires_grad else None
    children: list[Any] = []
    if isinstance(value, Mapping):
        children = list(value.values())
    elif isinstance(value, list | tuple):
        children = list(value)
    elif hasattr(value, "__dict__"):
        children = list(vars(value).values())
    terms = [term for child in children if (term := loss_of(child)) is not None]
    return torch.stack([term.reshape(()) for term in terms]).sum() if terms else None


def run_call(model: Any, leaves: list[torch.Tensor], call: dict[str, Any], form: str, seed: int) -> dict[str, Any]:
    """Return a call's output, and the gradients of everything that may get one."""
    x = torch.randn(call["batch"], FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x.requires_grad_(call["input_gradient"])
    args, kwargs = random_models.make_input(form, x * 1)
    with torch.set_grad_enabled(call["backward"]):
        output = model(*args, **kwargs)
    for leaf in leaves:
        leaf.grad = None
    if call["backward"] and (loss := loss_of(output)) is not None:
        loss.backward()
    return {"output": output, "gradients": [leaf.grad for leaf in leaves], "input": x.grad}


def check(example: dict[str, Any]) -> None:
    random_models.reset_shared_state()
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    model = RandomModel(example["layers"], example["output"]).eval()
    reference = copy.deepcopy(model)
    wrapped = duoka.DataParallel(model, devices=f"cpu:{example['devices']}")
    said = False
    try:
        for seed, call in enumerate(example["calls"]):
            if call["change"] is not None:
                model.change(call["change"])
                reference.change(call["change"])
            try:
                want = run_call(reference, reference.leaves(), call, example["input"], seed)
            except Exception as error:
                note(f"one device fails: {error!r}")
                return
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    got = run_call(wrapped, model.leaves(), call, example["input"], seed)
                except (DuokaError, ValueError, RuntimeError, TypeError, NotImplementedError):
                    return  # a refusal; others, such as KeyError, say nothing to a user
            said = said or bool(caught)
            if not said:
                assert not (found := difference(got, want, "")), f"call {seed}: {found}"
    finally:
        wrapped.close()
        torch.set_default_dtype(default)
        random_models.reset_shared_state()


def limited_to(count: int) -> settings:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, database=None, print_blob=True, suppress_health_check=checks)


@both_transports
@given(examples)
@limited_to(40)
def test_several_devices_compute_what_one_computes_or_say_so(transport, example):
    check(example)


@pytest.mark.extended
@pytest.mark.timeout(1200)
@both_transports
@given(examples)
@limited_to(2000)
def test_two_thousand_models_on_several_devices_and_on_one(transport, example):
    check(example)
