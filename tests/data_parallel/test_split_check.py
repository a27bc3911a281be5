"""A model may be split only if the outputs of a batch's parts equal the output of the whole batch."""

from __future__ import annotations

import random
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from duoka.data_parallel.call_planner import CallPlanner
from duoka.data_parallel.scatter import Arguments
from duoka.data_parallel.split_check import SplitResult, check_call


class Function(nn.Module):
    """A model whose forward is a given function of itself and the inputs."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.lstm = nn.LSTM(6, 6, 2, dropout=0.5, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True)
        self.register_buffer("mean", torch.zeros(6))
        self.calls = 0
        self.kept = None
        self.seen = 0

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def check(model: nn.Module, inputs: tuple, devices: int) -> SplitResult:
    return check_call(model, Arguments(inputs, {}), devices)


def keep(self, x):
    self.kept = self.linear(x)
    return self.kept


def count(self, x):
    self.calls += 1
    return self.linear(x)


def follow(self, x):
    if self.training:
        self.mean.mul_(0.9).add_(x.detach().mean(0))
    return self.linear(x - self.mean)


def add(self, x):
    self.seen += len(x)
    return self.linear(x)


def fill(self, x, found):
    found.append(x)
    return self.linear(x)


def cool(self, x):
    self.norm.weight.data.mul_(0.9)
    return self.linear(x) * self.norm.weight


def log(self, x):
    y = self.linear(x)
    return y, {"mean": y.mean().item()}


def half_gradient(self, x):
    y = self.linear(x)
    return y.detach() + 0 * y.mean(0) + (y - y.detach()) * len(y)


def choose(self, x):
    y = self.linear(x)
    return y[:, (y.mean(0) + 10 * torch.arange(6)).topk(2).indices]


def draw(x):
    """Draw from every library's generator."""
    return random.random() + np.random.rand() + torch.empty(1).random_(2) + torch.randperm(3)[0]


X = torch.randn(11, 6)
SEQUENCE = torch.randn(11, 5, 6)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda self, x: self.linear(x), (X,)),
        (lambda self, x: self.norm(self.linear(x)), (X,)),
        (lambda self, x: functional.dropout(self.linear(x), 0.5), (X,)),
        (lambda self, x: functional.dropout(x, 0.5, training=True).mean(1), (X,)),
        (lambda self, x: self.linear(x) + torch.randn_like(x) * x, (X,)),
        (lambda self, x: self.lstm(x)[0], (SEQUENCE,)),
        (lambda self, x: self.attention(x, x, x)[0], (SEQUENCE,)),
        (lambda self, x: {"a": self.linear(x), "b": [x.sum(1), (x > 0)]}, (X,)),
        (lambda self, x, y: (self.linear(x), functional.mse_loss(self.linear(x), y)), (X, X)),
        (count, (X,)),
        (lambda self, x: self.lstm(x)[1][0], (SEQUENCE,)),
        (lambda self, x: nn.functional.mse_loss(x, x * 2, reduction="sum"), (X,)),
        (lambda self, x: len(x), (X,)),
        (log, (X,)),
        (lambda self, x: (self.linear(x), torch.distributions.Normal(x, torch.ones_like(x))), (X,)),
        (lambda self, x: (self.linear(x), (x > 9).sum(), self.linear(x).detach().numpy()), (X,)),
        (lambda self, x: [self.linear(row).expand(int(row[0] > 0) + 1, 6) for row in x], (X,)),
    ],
)
def test_models_that_compute_each_sample_independently_pass(function, inputs) -> None:
    result = check(Function(function), inputs, 3)
    assert (result.reason, result.is_splittable, result.drawn) == ("", True, "")


@pytest.mark.parametrize(
    ("function", "inputs", "reason"),
    [
        (lambda self, x: self.linear(x) - self.linear(x).mean(0), (X,), "depends on other samples"),
        (lambda self, x: self.linear(x) @ self.linear(x).T, (X,), "no dimension along which its parts can be joined"),
        (lambda self, x: self.linear(x).std(), (X,), "not the mean over the samples"),
        (lambda self, x: self.linear(x).amax(0), (X,), "a statistic of the whole batch"),
        (lambda self, x: (x, f"{len(x)} rows"), (X,), "'4 rows' for the batch"),
        (lambda self, x: {torch.ones(1)}, (X,), "a set, which cannot be joined"),
        (lambda self, x: x.to_sparse(), (X,), "sparse_coo tensor"),
        (lambda self, x: {"a": x, **({"b": x} if len(x) > 2 else {})}, (X,), "has b on some devices only"),
        (lambda self, x: self.linear(x.cumsum(0)), (X,), "depends on other samples"),
        (
            lambda self, x: self.linear(x).view(11, 6),
            (X,),
            "a part of the batch in the check (4 of 11 samples): RuntimeError",
        ),
        (lambda self, x: self.linear(x) / 0 if len(x) > 2 else 1 / 0, (X,), "cannot compute a part"),
        (keep, (X,), "keeps tensors in kept"),
        (follow, (X,), "the buffer 'mean'"),
        (add, (X,), "keeps results in seen"),
        (fill, (X, []), "changes an object"),
        (lambda self, x: self.linear(x.sub_(0.5)), (X.clone(),), "changes its inputs in place"),
        (half_gradient, (X,), "gradient of linear.weight"),
        (choose, (X,), "makes a choice (topk)"),
    ],
)
def test_models_that_need_the_whole_batch_are_refused_with_a_reason(function, inputs, reason) -> None:
    assert reason in check(Function(function), inputs, 3).reason


def test_the_check_does_not_change_the_inputs() -> None:
    given, found = X.clone(), []
    check(Function(lambda self, x, found: fill(self, x.mul_(2), found)), (given, found), 2)
    assert torch.equal(given, X)
    assert found == []


def test_the_check_does_not_change_parameters() -> None:
    model = Function(cool)
    check(model, (X,), 2)
    assert torch.equal(model.norm.weight, torch.ones(6))
    lazy = nn.LazyLinear(3)
    assert check(lazy, (X,), 2) is None
    assert isinstance(lazy.weight, nn.parameter.UninitializedParameter)


def test_the_result_names_the_outputs_that_are_means_over_the_batch() -> None:
    model = Function(lambda self, x, y: {"loss": functional.mse_loss(self.linear(x), y), "logits": self.linear(x)})
    rules = check(model, (X, X), 2).rules.rules
    assert {place: rule.kind for place, rule in rules.items()} == {("loss",): "mean", ("logits",): "concatenate"}


def test_the_check_changes_no_buffer_attribute_hook_or_generator() -> None:
    model = Function(
        lambda self, x: follow(self, self.norm(functional.dropout(count(self, x), 0.5))) + torch.rand(()) + draw(x)
    )
    state = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    model.register_forward_hook(lambda *given: seen.append(given))
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    check(model, (X,), 2)
    assert (before[1], before[2]) == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(before[0], torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.calls == 0
    assert seen == []
    assert all(parameter.grad is None for parameter in model.parameters())


def test_writes_to_parameters_are_undone_and_reported() -> None:
    model = Function(cool)
    assert check(model, (X,), 3).written == "norm.weight"
    assert torch.equal(model.norm.weight, torch.ones(6))


@pytest.mark.parametrize(
    ("draw", "owner"),
    [(lambda n: np.random.rand(n), "NumPy's"), (lambda n: [random.random() for _ in range(n)], "Python's")],
)
def test_values_are_not_compared_if_other_libraries_draw_random_numbers(draw, owner) -> None:
    result = check(Function(lambda self, x: self.linear(x) * torch.tensor(draw(len(x)))[:, None]), (X,), 3)
    assert (result.drawn, result.reason) == (owner, "")


@pytest.mark.parametrize(
    ("function", "owner"),
    [
        (lambda self, x: nn.Linear(6, 2)(self.linear(x)), "torch's, such as the weights of a layer"),
        (lambda self, x: self.linear(x) * random.random(), "Python's"),
        (lambda self, x: self.linear(x) + 0 * np.random.rand(), ""),
        (lambda self, x: (random.random(), self.linear(x))[1], ""),
        (lambda self, x: self.linear(x) * self.kept.random(), "a generator's that it owns"),
    ],
)
def test_numbers_drawn_once_for_all_samples_count_if_they_have_an_effect(function, owner) -> None:
    model = Function(function)
    model.kept = np.random.default_rng(1)
    result = check(model, (X,), 2)
    assert result.reason == ""
    assert result.drawn.startswith(owner)
    assert bool(result.drawn) == bool(owner)


def test_the_check_does_not_advance_what_a_closure_holds() -> None:
    count = 0

    def step() -> int:
        nonlocal count
        count += 1
        return count

    model = Function(lambda self, x: self.lstm(x)[0] * min(self.step(), 1))
    model.step = step
    assert check(model, (SEQUENCE,), 3).reason == ""
    assert count == 0


def test_generators_of_the_model_are_restored() -> None:
    model = Function(lambda self, x: self.linear(x) * torch.rand(1, generator=self.generator))
    model.generator = torch.Generator().manual_seed(3)
    before = model.generator.get_state()
    assert check(model, (X,), 3).reason == ""
    assert torch.equal(model.generator.get_state(), before)


def test_a_mean_over_labels_that_count_is_found() -> None:
    model = Function(lambda self, x, y: functional.cross_entropy(self.linear(x), y))
    labels = torch.arange(X.shape[0]) % 6
    planner = CallPlanner(2)
    for _ in range(2):
        assert planner.plan(model, Arguments((X, labels), {})).reason == ""
    labels[2:9] = -100  # at call 3, which is not due
    arguments = Arguments((X, labels), {})
    (rule,) = planner.plan(model, arguments).rules.rules.values()
    assert rule.source.test == "nonnegative"


def test_texts_among_the_arguments_are_kinds_of_their_own_however_many() -> None:
    def forward(self, x, name, how):
        values = self.linear(x).sum(1)
        return values.mean() if how == "mean" else values.sum()

    model, planner = Function(forward), CallPlanner(2)
    kinds = []
    for number in range(70):
        arguments = Arguments((X, str(number), "mean"), {})
        planner.plan(model, arguments)
        planner.decide(model, arguments)
    for how in ("mean", "sum", "mean", "sum"):
        (rule,) = planner.plan(model, Arguments((X, "new", how), {})).rules.rules.values()
        kinds.append(rule.kind)
    assert kinds == ["mean", "sum", "mean", "sum"]


def test_a_statistic_of_the_batch_makes_the_check_compute_all_samples() -> None:
    model, planner = Function(lambda self, x: functional.relu(x) - functional.relu(x).mean(0)), CallPlanner(2)
    x = -torch.ones(8, 6)
    assert planner.plan(model, Arguments((x,), {})).reason == ""
    for _ in range(4):
        assert planner.plan(model, Arguments((x,), {})).reason == ""
    x[6] = 1  # at call 6, which is not due, in a sample that a check of a few does not compute
    assert "depends on other samples" in planner.plan(model, Arguments((x,), {})).reason


def test_a_statistic_of_places_of_all_samples_is_one_of_the_batch() -> None:
    def forward(self, x):
        usage = functional.one_hot((x.flatten() > 0).long(), 2).float().mean(0)
        return self.linear(x), torch.special.entr(usage).sum().exp()

    model, planner = Function(forward), CallPlanner(3)
    x = torch.ones(9, 6)
    for _ in range(2):
        assert planner.plan(model, Arguments((x,), {})).reason == ""
    x[3:6] = -1  # at call 3, which is not due: each part has a perplexity of 1, and the batch one of 1.9
    assert "output[1]" in planner.plan(model, Arguments((x,), {})).reason


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: self.linear(x) / self.linear.weight.repeat(20, 1).norm(2, 0),
        lambda self, x: torch.max(self.linear(x), -x),
        lambda self, x: self.linear(x).min(other=x),
        lambda self, x: torch.quantile(self.linear(x), 0.5, 1),
        lambda self, x: self.linear(x).quantile(torch.tensor([0.2, 0.5]), dim=1).T,
        lambda self, x: torch.maximum(input=self.linear(x), other=x).norm(2, 1),
        lambda self, x: torch.var(self.linear(x), [1]),
    ],
)
def test_what_reduces_no_samples_is_no_statistic(function) -> None:
    result = check(Function(function), (X,), 2)
    assert (result.reason, result.has_statistic) == ("", False)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.norm(2, 0),
        lambda x: x.quantile(0.5, 0),
        lambda x: x.max(dim=0)[0],
        lambda x: x.var((0,), correction=0),
    ],
)
def test_a_reduction_of_the_samples_is_a_statistic(function) -> None:
    assert check(Function(lambda self, x: self.linear(x) + 0 * function(x)), (X,), 2).has_statistic


class Item:
    """A value in a set."""


def test_a_set_of_objects_in_an_attribute_is_no_difference() -> None:
    model = Function(lambda self, x: self.linear(x))
    model.kept = {Item(), Item()}
    assert check(model, (X,), 2).reason == ""


def test_nan_in_place_of_a_number_is_a_difference() -> None:
    def keep_mean(self, x):
        self.kept = float("nan") if len(x) > 2 else 1.0
        return self.linear(x)

    assert "keeps results in kept" in check(Function(keep_mean), (X,), 2).reason


def test_a_refused_call_does_not_change_the_plan_of_its_kind() -> None:
    model, planner = Function(lambda self, x: self.linear(x)), CallPlanner(2)
    for refusal in ("", "a mode", "a mode", "", "a mode", ""):
        arguments = Arguments((X,), {})
        arguments.refusal = refusal
        assert planner.plan(model, arguments).reason == refusal


@pytest.mark.parametrize("name", ["forward", "other"])
@pytest.mark.parametrize("on_submodule", [False, True])
def test_a_method_of_an_object_is_checked_and_not_that_of_its_class(name: str, on_submodule: bool) -> None:
    def patched(self, x):
        values = functional.linear(x, self.weight)
        return values - values.mean(0)

    patched.__name__ = name
    model = nn.Sequential(nn.Linear(X.shape[1], 3))
    target = model[0] if on_submodule else model
    if not on_submodule:
        model.weight = nn.Parameter(torch.randn(3, X.shape[1]))
    target.forward = types.MethodType(patched, target)
    result = CallPlanner(2).plan(model, Arguments((X,), {}))
    assert "depends on other samples" in result.reason


def test_draws_from_a_generator_of_the_model_hide_no_difference() -> None:
    def forward(self, x):
        values = self.linear(x) + 0 * torch.rand(1, generator=self.generator)
        return values - values.mean(0)

    model = Function(forward)
    model.generator = torch.Generator().manual_seed(1)
    assert "depends on other samples" in CallPlanner(2).plan(model, Arguments((X,), {})).reason


def test_a_later_check_says_since_when_results_may_differ() -> None:
    model = Function(lambda self, x: self.linear(x) - (self.linear(x).mean(0) if self.calls else 0))
    planner = CallPlanner(3)
    for number in (1, 2, 3, 4):
        model.calls = int(number > 2)
        result = planner.plan(model, Arguments((X,), {}))
    assert "a check of call 2 saw no difference" in result.reason
