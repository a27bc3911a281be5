"""Gather: join the outputs of all parts into one value.

A ``Rule`` says how the values at one place are joined. ``split_check`` finds the rules by comparing parts with a whole
batch. Without them, tensors are concatenated along the batch dimension, and scalars become a vector.
"""

import functools
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from duoka.data_parallel.placeholders import Placeholder, is_object, is_placeholder, map_values, open_value
from duoka.data_parallel.shares import SAMPLES, Shares, Source

Path: TypeAlias = tuple[Any, ...]
"""Place of a value in an output: keys, indices and names of attributes."""
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 3e-3, torch.float64: 1e-9}
"""Largest difference of two outputs relative to the largest value; see ``DEFAULT_TOLERANCE``."""
DEFAULT_TOLERANCE = 2e-4
Kind: TypeAlias = Literal["concatenate", "stack", "mean", "sum", "same", "items"]


class Rule(NamedTuple):
    """How values are joined; ``items`` are lists with one item a sample."""

    kind: Kind
    dim: int = 0
    """Dimension of a concatenation."""
    source: Source = SAMPLES
    """What a mean is over."""
    ndim: int = -1
    """Number of dimensions of the parts in the checked calls; -1 for values besides tensors."""
    weights: Shares = ()
    """Shares of the parts in a mean, for one call."""
    others: tuple["Rule", ...] = ()
    """Further rules that fit so far, because values were the same in all parts, or zero."""


Rules: TypeAlias = Mapping[Path, Rule]


class OutputSpec(NamedTuple):
    """One joined tensor: its parts, and the rule."""

    placeholders: tuple[Placeholder, ...]
    rule: Rule


class JoinError(ValueError):
    """Outputs of the parts do not fit together."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}. Let the model return the same structure for all samples, or call model.module")
        self.reason = reason


class UndecidedError(Exception):
    """What the checks have seen does not say how to join the values of this call."""

    reason = "an output differs between the parts of the batch, and was the same for all parts in the check"


class Join:
    """Joins values of all parts; ``specs`` says how to join their tensors."""

    def __init__(
        self,
        sizes: Sequence[int],
        dim: int,
        rules: Rules | None = None,
        shares: Callable[[Source], Shares] | None = None,
    ) -> None:
        """Prepare; ``rules`` of ``None`` means that there was no check. ``shares`` are those of this call."""
        self._sizes, self._dim, self._rules, self._shares = sizes, dim, rules, shares
        self.specs: list[OutputSpec] = []

    def merge(self, values: Sequence[Any], path: Path = ()) -> Any:
        """Return one structure for the parts' structures, with a placeholder for each of ``specs``."""
        first = values[0]
        rule = None if self._rules is None else self._rules.get(path)
        if rule is not None:
            rule = self._with_shares(rule)
        if any(map(is_placeholder, values)):
            if not all(map(is_placeholder, values)):
                raise _different_types(path, values)
            if rule is None and self._rules is not None:
                raise _unknown(path)
            return self._add(OutputSpec(tuple(values), rule or Rule("concatenate", self._dim)))
        opened = open_value(first)
        if rule.kind == "items" if rule else self._rules is None and is_per_sample(values, self._sizes):
            return type(first)([map_values(self._keep, item) for value in values for item in value])
        if opened is None or (rule is not None and rule.kind == "same"):
            return self._join_leaves(values, rule, path)
        columns = [
            self.merge(column, (*path, key)) for key, column in zip(keys(first), columns_of(values, path), strict=True)
        ]
        return opened[1](columns)

    def decide(self, tensors: Sequence[Sequence[torch.Tensor]]) -> None:
        """Raise ``UndecidedError`` unless the rules hold for these tensors."""
        for spec in self.specs:
            parts = [tensors[p.part][p.position].detach() for p in spec.placeholders]
            if self._rules is None or len(parts) == 1:
                continue
            if not all(part.dim() == spec.rule.ndim and _has_form(part, parts[0], spec.rule) for part in parts):
                raise UndecidedError
            rules = _different_rules(spec.rule, parts, is_close)
            values = [
                join_tensors(OutputSpec(spec.placeholders, rule), tensors).detach() for rule in rules[1:] and rules
            ]
            if not all(is_close(value, values[0]) for value in values[1:]):
                raise UndecidedError

    def _with_shares(self, rule: Rule) -> Rule:
        others = tuple(map(self._with_shares, rule.others))
        weights = self._shares(rule.source) if rule.kind == "mean" and self._shares is not None else rule.weights
        return rule._replace(weights=weights, others=others)

    def _add(self, spec: OutputSpec) -> Placeholder:
        self.specs.append(spec)
        return Placeholder(len(self.specs) - 1)

    def _keep(self, leaf: Any) -> Any:
        return self._add(OutputSpec((leaf,), Rule("same"))) if is_placeholder(leaf) else leaf

    def _join_leaves(self, values: Sequence[Any], rule: Rule | None, path: Path) -> Any:
        if len({type(value) for value in values}) > 1 and not all(isinstance(v, int | float) for v in values):
            raise _different_types(path, values)
        if self._rules is None:
            return values[0]
        if rule is None:
            raise _unknown(path)
        return join_leaves(values, rule, path)


def join_leaves(values: Sequence[Any], rule: Rule, path: Path = ()) -> Any:
    """Join numbers, arrays and other values besides tensors."""
    if rule.others:
        joined = [join_leaves(values, one, path) for one in _different_rules(rule, values, is_same)]
        if not all(is_same(value, joined[0]) for value in joined):
            raise UndecidedError
        return join_leaves(values, rule._replace(others=()), path)
    if rule.kind == "same":
        if not all(is_same(value, values[0]) for value in values):
            raise JoinError(f"{place(path)} differs between the parts of the batch")
        return values[0]
    if rule.kind == "concatenate":
        return np.concatenate(values, rule.dim)
    if rule.kind == "sum":
        return sum(values[1:], values[0])
    if all(is_equal(value, values[0]) for value in values):
        return values[0]
    return sum(weight * value for weight, value in zip(rule.weights, values, strict=True) if weight)


def join_tensors(spec: OutputSpec, tensors: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """Return the joined tensor; autograd differentiates the result."""
    parts = [tensors[placeholder.part][placeholder.position] for placeholder in spec.placeholders]
    rule = spec.rule
    if rule.kind == "stack" or (rule.kind == "concatenate" and parts[0].dim() == 0):
        return torch.stack(parts)
    if len(parts) == 1 or rule.kind == "same":
        return parts[0].clone()
    if rule.kind == "concatenate":
        return torch.cat(parts, rule.dim)
    if rule.kind == "sum":
        return torch.stack(parts).sum(0, dtype=parts[0].dtype)
    weighted = [part * weight for part, weight in zip(parts, rule.weights, strict=True) if weight]  # others may be NaN
    return functools.reduce(torch.add, weighted)


def scatter_gradient(
    gradient: torch.Tensor, spec: OutputSpec, shapes: Sequence[torch.Size]
) -> Sequence[torch.Tensor | None]:
    """Return the gradient of each part from that of ``join_tensors``' result; ``None`` for none."""
    rule = spec.rule
    if rule.kind == "stack" or (rule.kind == "concatenate" and not shapes[0]):
        return gradient.unbind()
    if len(shapes) == 1:
        return [gradient]
    if rule.kind == "concatenate":
        return torch.split(gradient, [shape[rule.dim] for shape in shapes], rule.dim)
    if rule.kind == "mean":
        return [gradient * weight if weight else None for weight in rule.weights]
    return [gradient] * len(shapes) if rule.kind == "sum" else [gradient, *[None] * len(shapes[1:])]


def _different_rules(rule: Rule, parts: Sequence[Any], agree: Callable[[Any, Any], bool]) -> list[Rule]:
    """Return the rules that fitted so far and may give different values now; raise ``UndecidedError`` if parts differ."""
    rules = [one._replace(others=()) for one in (rule, *rule.others)]
    if any(one.kind == "same" for one in rules):
        if not all(agree(part, parts[0]) for part in parts):
            raise UndecidedError
        rules = [one for one in rules if one.kind != "mean"]  # any mean of equal values is that value
    return rules


def _has_form(part: torch.Tensor, first: torch.Tensor, rule: Rule) -> bool:
    """Return whether two parts have the same shape, but for the dimension of a concatenation."""
    if rule.kind != "concatenate":
        return part.shape == first.shape
    shapes = [[size for dim, size in enumerate(one.shape) if dim != rule.dim] for one in (part, first)]
    return shapes[0] == shapes[1]


def keys(value: Any) -> list[Any]:
    """Return the keys, indices or names of attributes of what ``open_value`` opens, in its order."""
    if isinstance(value, Mapping):
        return list(value)
    if hasattr(value, "_fields"):
        return list(value._fields)
    opened = open_value(value)
    assert opened is not None
    if isinstance(value, list | tuple):
        return list(range(len(value)))
    return list(vars(value)) if is_object(value) else list(value.__dataclass_fields__)


def columns_of(values: Sequence[Any], path: Path) -> list[list[Any]]:
    """Return, for each child of a container, the values of all parts."""
    first = values[0]
    kinds = {(type(value).__module__, type(value).__name__) for value in values}  # a forward may define the class
    if len(kinds) > 1 or any(open_value(value) is None for value in values):
        raise _different_types(path, values)
    if isinstance(first, list | tuple) and len({len(value) for value in values}) > 1:
        lengths = [len(value) for value in values]
        raise JoinError(f"{place(path)} is a {type(first).__name__} of different lengths on the devices: {lengths}")
    names = [keys(value) for value in values]
    if any(set(own) != set(names[0]) for own in names):
        different = sorted({str(key) for own in names for key in set(own) ^ set(names[0])})
        raise JoinError(f"{place(path)} has {', '.join(different)} on some devices only")
    children = [dict(zip(own, open_value(value)[0], strict=True)) for own, value in zip(names, values, strict=True)]  # type: ignore[index]
    return [[child[key] for child in children] for key in names[0]]


def place(path: Path) -> str:
    """Return a path as text: ``output.past_key_values[0]``."""
    return "output" + "".join(f".{p}" if isinstance(p, str) and p.isidentifier() else f"[{p!r}]" for p in path)


def is_equal(one: Any, other: Any) -> bool:
    """Return whether two values besides tensors are the same."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")
    try:
        return bool(one == other) or (one != one and other != other) or pickle.dumps(one) == pickle.dumps(other)
    except Exception:
        return False


def is_same(one: Any, other: Any) -> bool:
    """Return whether two values besides tensors are the same, numbers but for rounding."""
    if type(one) is type(other) and isinstance(one, float | complex):
        return is_close(torch.tensor(one, device="cpu"), torch.tensor(other, device="cpu"))
    return is_equal(one, other)


def is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are equal but for rounding."""
    if one.shape != other.shape:
        return False
    if not (other.is_floating_point() or other.is_complex()) or other.numel() == 0:
        return torch.equal(one, other)
    largest = float(other.detach().abs().nan_to_num(0, 0, 0).max())
    tolerance = _TOLERANCE.get(other.dtype, DEFAULT_TOLERANCE) * max(largest, 1e-6)
    return torch.allclose(one.detach().to(other.dtype), other.detach(), rtol=0, atol=tolerance, equal_nan=True)


def is_per_sample(values: Sequence[Any], sizes: Sequence[int]) -> bool:
    """Return whether each list has one item a sample, and items are not whole batches themselves."""
    if any(not isinstance(v, list) or len(v) != size for v, size in zip(values, sizes, strict=True)):
        return False
    kinds = {type(item) for value in values for item in value}
    return len(kinds) == 1 and (len(set(sizes)) > 1 or kinds != {Placeholder})


def _unknown(path: Path) -> JoinError:
    return JoinError(f"{place(path)} was not among the outputs when duoka checked this kind of call")


def _different_types(path: Path, values: Sequence[Any]) -> JoinError:
    names = {"Tensor" if is_placeholder(value) else type(value).__name__ for value in values}
    return JoinError(f"{place(path)} has different types on the devices: {', '.join(sorted(names))}")
