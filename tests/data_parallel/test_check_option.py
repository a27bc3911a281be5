"""``DataParallel(check=...)``: outputs joined as one device gives them, and a warning or an error where that fails."""

from __future__ import annotations

import collections
import copy
import dataclasses
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import duoka
from duoka import errors
from duoka.data_parallel.scatter import Arguments
from duoka.data_parallel.split_check import check_call
from support.transports import both_transports


class Function(nn.Module):
    """A model whose forward is a given function of its layer and the inputs."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.layer = nn.Linear(4, 3)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


class Kept:
    """An object that a model keeps results in."""


X = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, -100, 2, 1, -100, -100])
IGNORED = {
    "cross entropy with ignored labels": (
        lambda self, x, y: functional.cross_entropy(self.layer(x), y),
        (X, LABELS),
    ),
    "mean over a mask": (
        lambda self, x, mask: (self.layer(x).square().sum(1) * mask).sum() / mask.sum(),
        (X, LABELS >= 0),
    ),
    "sum over samples": (lambda self, x: self.layer(x).square().sum(), (X,)),
    "mean over samples": (lambda self, x: self.layer(x).square().mean(), (X,)),
    "next token": (
        lambda self, x, ids: functional.cross_entropy(
            self.layer(x)[:, None].expand(-1, 5, -1)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        ),
        (X, torch.tensor([[0, 1, 2, 1, 0]] * 4 + [[-100, -100, -100, 1, 2]] * 3)),
    ),
}


@both_transports
@pytest.mark.parametrize("devices", ["cpu:2", "cpu:3"])
@pytest.mark.parametrize("case", IGNORED)
def test_a_loss_of_the_model_is_one_number_with_all_gradients(case, devices, pair) -> None:
    function, inputs = IGNORED[case]
    model, reference = pair(Function(function), devices)
    for _ in range(3):
        losses = [one(*inputs) for one in (model, reference)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(model.layer.weight.grad, reference.layer.weight.grad)


OUTPUTS = {
    "batch in the second dimension": lambda self, x: self.layer(x).expand(2, -1, -1),
    "count": lambda self, x: (self.layer(x).argmax(1) == 1).sum(),
    "array and number": lambda self, x: (self.layer(x).detach().numpy(), len(x), float(x.mean())),
    "distribution": lambda self, x: torch.distributions.Normal(self.layer(x), torch.ones(len(x), 3)),
    "rows of different lengths": lambda self, x: [self.layer(row).expand(int(row[0] > 0) + 1, 3) for row in x],
    "parameter": lambda self, x: (self.layer(x), self.layer.weight * 1),
    "a list of two": lambda self, x: [self.layer(x), {"aux": x}],
}


@both_transports
@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs_of_every_form_are_those_of_one_device(case, pair) -> None:
    model, reference = pair(Function(OUTPUTS[case]), "cpu:3")
    for x in (X, X[:5], X):
        assert show(model(x)) == show(reference(x))


def show(value):
    if isinstance(value, torch.Tensor | np.ndarray):
        return [
            round(number, 4) for number in np.asarray(torch.as_tensor(value).detach().double()).ravel()
        ], value.shape
    if isinstance(value, torch.distributions.Normal):
        return show(value.loc), value.batch_shape
    if isinstance(value, dict):
        return {key: show(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [show(item) for item in value]
    return round(value, 4)


def test_lists_and_arrays_with_one_item_a_sample_are_split(pair) -> None:
    def function(self, x, names, factors, sequences):
        rows = [
            row * len(name) * float(factor) + part.sum()
            for row, name, factor, part in zip(self.layer(x), names, factors, sequences, strict=True)
        ]
        return torch.stack(rows)

    model, reference = pair(Function(function), "cpu:3")
    inputs = X, ["a" * n for n in range(7)], np.arange(7.0), [torch.ones(n + 1, requires_grad=n == 5) for n in range(7)]
    torch.testing.assert_close(model(*inputs), reference(*inputs))
    model(*inputs).sum().backward()
    torch.testing.assert_close(inputs[3][5].grad, torch.full((6,), 3.0))


DIFFERENT = {
    "depends on other samples": lambda self, x: self.layer(x) - self.layer(x).mean(0),
    "not the mean over the samples": lambda self, x: self.layer(x).std(),
    "gradient of layer.weight": lambda self, x: x.new_ones(len(x)) + (y := self.layer(x).sum()) - y.detach() + 0 * y,
    "makes a choice": lambda self, x: (y := self.layer(x))[:, (y.mean(0) + torch.arange(3) * 9).topk(2).indices],
    "changes its inputs in place": lambda self, x: self.layer(x.sub_(1)),
    "keeps tensors in kept": lambda self, x: setattr(self, "kept", self.layer(x).sum()) or self.layer(x),
}


@pytest.mark.parametrize("reason", DIFFERENT)
def test_a_difference_from_one_device_is_a_warning_once_or_an_error(reason, wrap) -> None:
    model = wrap(Function(DIFFERENT[reason]))
    with pytest.warns(UserWarning, match=f"on 2 devices than on one: .*{reason}.*check='off'") as caught:
        model(X.clone())
    assert caught[0].filename == __file__
    model(X.clone())  # pytest makes a second warning an error
    with pytest.raises(errors.UnsupportedError, match=reason):
        wrap(Function(DIFFERENT[reason]), check="raise")(X.clone())
    wrap(Function(DIFFERENT[reason]), check="off")(X.clone())


ON_ONE_DEVICE = {
    "a set, which cannot be joined": (lambda self, x: {self.layer(x)}, (X,)),
    "PackedSequence among its arguments": (
        lambda self, x: self.layer(x.data),
        (pack_sequence([torch.ones(3, 4), torch.ones(2, 4)]),),
    ),
    "sparse tensor among its arguments": (lambda self, x: torch.sparse.mm(x, self.layer.weight.T), (X.to_sparse(),)),
    "has b on some devices only": (
        lambda self, x: {"a": self.layer(x), **({"b": x} if x[0, 0] > 8 else {})},
        (torch.cat([torch.full((1, 4), 9.0), X]),),
    ),
    "a part of the batch .*3 of 7 .*: RuntimeError.*Let its forward accept": (
        lambda self, x: self.layer(x).view(7, 3),
        (X,),
    ),
    "no dimension along which": (lambda self, x: self.layer(x) @ self.layer(x).T, (X,)),
}


@pytest.mark.parametrize("reason", ON_ONE_DEVICE)
def test_what_cannot_be_split_or_joined_is_computed_on_one_device(reason, wrap) -> None:
    function, inputs = ON_ONE_DEVICE[reason]
    model = wrap(Function(function))
    with pytest.warns(UserWarning, match=f"runs on one device and not on 2: .*{reason}"):
        got = model(*inputs)
    want = model.module(*inputs)
    if isinstance(want, torch.Tensor):
        assert torch.equal(got, want)
    else:
        assert len(got) == len(want)


def test_an_output_that_changes_its_form_is_joined_by_its_form(pair) -> None:
    def forward(self, x, y):
        return self.layer(x) if self.gives_logits else functional.cross_entropy(self.layer(x), y)

    for first in (True, False):
        model, reference = pair(Function(forward))
        for gives_logits in (first, first, not first):
            model.module.gives_logits = reference.gives_logits = gives_logits
            torch.testing.assert_close(model(X, LABELS), reference(X, LABELS))


@pytest.mark.parametrize(
    ("statistic", "value"),
    [(lambda x: (x > 0.9).any(), 0), (lambda x: x.long().max(), 4), (lambda x: len({int(row[0]) for row in x}), 0)],
)
def test_a_statistic_is_not_taken_from_one_part(statistic, value: int, wrap) -> None:
    model = wrap(Function(lambda self, x: (self.layer(x), statistic(x))))
    x = torch.zeros(8, 4)
    model(x)
    x[3], x[7] = value, 5
    with pytest.warns(UserWarning, match="runs on one device and not on 2: output.1. is"):
        got = model(x)[1]
    assert got == statistic(x)


@pytest.mark.parametrize("kind", ["object", "namespace", "deque"])
def test_results_kept_in_an_object_of_the_model_are_a_difference(kind, wrap) -> None:
    def forward(self, x):
        loss = self.layer(x).square().mean()
        if kind == "deque":
            self.kept.append(loss)
        else:
            self.kept.loss = loss
        return self.layer(x)

    model = Function(forward)
    model.kept = {"object": Kept, "namespace": SimpleNamespace, "deque": collections.deque}[kind]()
    with pytest.warns(UserWarning, match="keeps tensors in kept"):
        wrap(model)(X)


def test_a_float_mask_of_zeros_and_ones_weights_a_mean(pair) -> None:
    model, reference = pair(Function(lambda self, x, mask: (self.layer(x).sum(1) * mask).sum() / mask.sum()))
    mask = torch.ones(7)
    torch.testing.assert_close(model(X, mask), reference(X, mask))
    mask[4:] = 0
    torch.testing.assert_close(model(X, mask), reference(X, mask))
    mask = torch.linspace(0.1, 0.9, 7)  # at call 3, which is not due
    torch.testing.assert_close(model(X, mask), reference(X, mask))


def test_an_output_that_is_drawn_is_computed_on_one_device(wrap) -> None:
    model = wrap(Function(lambda self, x: (self.layer(x), torch.randint(1_000_000, (1,)))))
    with pytest.warns(UserWarning, match=r"runs on one device .* was the same for all parts in the check"):
        assert len(model(X)[1]) == 1
    assert len(model(X)[1]) == 1


def test_a_hook_of_the_user_is_a_warning(wrap) -> None:
    model, seen = wrap(nn.Sequential(nn.Linear(4, 3), nn.ReLU())), []
    model.module[1].register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="hook on the module '1'"):
        model(X)
    assert seen == [1]


def test_batch_norm_never_gets_one_sample_of_a_larger_batch(pair) -> None:
    model, reference = pair(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "cpu:2")
    torch.testing.assert_close(model(X[:3]), reference(X[:3]))


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_transforms_of_the_wrapper_work_and_so_does_the_next_call(wrap) -> None:
    model = wrap(nn.Linear(4, 3))
    want = model(X)
    tangent = torch.func.jvp(model, (X,), (X,))[1]
    torch.testing.assert_close(tangent, X @ model.weight.T)
    torch.testing.assert_close(torch.func.vmap(model)(X[None])[0], want)
    torch.testing.assert_close(torch.compile(model, backend="eager")(X), want)
    parameters = {name: torch.zeros_like(value) for name, value in model.module.named_parameters()}
    assert torch.func.functional_call(model.module, parameters, (X,)).abs().max() == 0
    torch.testing.assert_close(model(X), want)


def test_a_mode_of_the_user_sees_the_whole_batch(wrap) -> None:
    model, counts = wrap(nn.Linear(4, 3)), []
    for one in (model, model.module):
        with FlopCounterMode(display=False) as counter, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            one(X)
        counts.append(counter.get_total_flops())
        if one is model:
            assert "FlopCounterMode is active" in str(caught[0].message)
    assert counts == [2 * 7 * 4 * 3] * 2


def test_names_of_modules_parameters_and_buffers_have_no_prefix() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4)))
    model = duoka.DataParallel(copy.deepcopy(inner), devices="cpu:2")
    for method in ("named_parameters", "named_buffers"):
        assert [name for name, _ in getattr(model, method)()] == [name for name, _ in getattr(inner, method)()]
        expected = [name for name, _ in getattr(inner, method)("part")]
        assert [name for name, _ in getattr(model, method)("part")] == expected
    assert [name for name, _ in model.named_modules()] == ["", "", "0", "1", "1.0"]
    whole = nn.ModuleDict({"body": model})
    assert next(name for name, _ in whole.named_parameters()) == "body.0.weight"
    assert sum(1 for _ in model.parameters()) == 4


def test_an_unknown_check_is_refused() -> None:
    with pytest.raises(errors.ConfigError, match="check='maybe'"):
        duoka.DataParallel(nn.Linear(1, 1), devices="cpu:2", check="maybe")


def perplexity(y: torch.Tensor) -> torch.Tensor:
    shares = torch.stack([y > 1, y <= 1]).flatten(1).sum(1) / y.numel()
    return torch.special.entr(shares).sum().exp()


NUMBERS = {
    "perplexity": lambda y: perplexity(y).detach(),
    "perplexity, a number": lambda y: float(perplexity(y)),
    "standard deviation": lambda y: y.detach().std(),
    "largest value": lambda y: y.detach().max(),
    "largest value, a number": lambda y: y.max().item(),
    "range in two numbers": lambda y: y.detach().amax(0) - y.detach().amin(0),
    "share of all, a number": lambda y: float((y > 0).float().mean()) ** 2,
}


@pytest.mark.parametrize("case", NUMBERS)
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_a_number_that_was_the_same_in_all_parts_is_checked_later(case, start, wrap) -> None:
    model = wrap(Function(lambda self, x: (self.layer(x), NUMBERS[case](x[:, :2] * self.factor + start))))
    model.module.factor = 0.0
    for _ in range(2):
        model(X)
    model.module.factor = 3.0  # at call 3, which is not due
    with pytest.warns(UserWarning, match=r"on 2 devices than on one: output\[1\]|not on 2: output\[1\]"):
        model(X)


@pytest.mark.parametrize("make", [float, torch.Tensor.detach], ids=["number", "tensor"])
def test_a_mean_that_was_the_same_in_all_parts_stays_a_mean(make, pair) -> None:
    model, reference = pair(Function(lambda self, x: (self.layer(x), make((x * self.factor).mean()))))
    for factor in (0.0, 0.0, 3.0, 4.0, 0.0, 5.0):
        model.module.factor = reference.factor = factor
        assert show(model(X)[1]) == show(reference(X)[1])


class Learner(nn.Module):
    """A model whose ``parameters`` method is no iterator, as MAML's."""

    def __init__(self) -> None:
        super().__init__()
        self.vars = nn.ParameterList([torch.ones(1, 4), torch.zeros(1)])

    def forward(self, x):
        return functional.linear(x, *self.vars)

    def parameters(self):
        return self.vars


def test_a_model_whose_parameters_method_returns_a_list_is_split(pair) -> None:
    model, reference = pair(Learner())
    torch.testing.assert_close(model(X), reference(X))
    assert check_call(Learner(), Arguments((X,), {}), 2).reason == ""


def named_tuple(y):
    return collections.namedtuple("Outputs", ["first", "second"])(y, y.mean())


def data_class(y):
    @dataclasses.dataclass
    class Outputs:
        first: torch.Tensor
        second: torch.Tensor

    return Outputs(y, y.mean())


def own_class(y):
    class Outputs:
        pass

    outputs = Outputs()
    outputs.first, outputs.second = y, y.mean()
    return outputs


@both_transports
@pytest.mark.parametrize("make", [named_tuple, data_class, own_class])
def test_outputs_of_a_class_that_the_forward_defines_are_joined(make, pair) -> None:
    model, reference = pair(Function(lambda self, x: make(self.layer(x))))
    for _ in range(2):
        got, want = model(X), reference(X)
        assert type(got).__name__ == type(want).__name__
        torch.testing.assert_close((got.first, got.second), (want.first, want.second))


def test_a_mean_of_parts_that_nearly_agree_is_the_mean(wrap) -> None:
    class MeanNumber(nn.Module):
        def forward(self, x):
            return x.mean().item()

    model, x = wrap(MeanNumber()), torch.full((8, 4), 0.6931)
    model(x)
    x[:4] += 6e-5
    for _ in range(3):
        assert abs(model(x) - x.mean().item()) < 1e-6
