"""Finds how outputs of parts are joined, by comparing them with the output for the whole batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence

from duoka.data_parallel.gather import (
    JoinError,
    OutputSpec,
    Path,
    Rule,
    columns_of,
    is_close,
    is_same,
    join_leaves,
    join_tensors,
    keys,
    place,
)
from duoka.data_parallel.placeholders import Placeholder, is_dense, is_object, open_value
from duoka.data_parallel.shares import SAMPLES, Shares, Source

_NUMBERS = (int, float, complex)


class NotJoinable(Exception):  # noqa: N818 - a result, not an error
    """An output cannot be joined; the message says why."""


class JoinRules(NamedTuple):
    """Rules for one kind of call, by place."""

    rules: Mapping[Path, Rule]
    mixed: str
    """Why joined outputs differ from those for the whole batch; empty if they do not."""
    sources: Mapping[Path, tuple[Source, ...]]
    """What each mean may be over; the first is in the rule."""


class RuleFinder:
    """Compares one output with those of its parts."""

    def __init__(self, shares: Mapping[Source, Shares], dim: int, *, compares: bool) -> None:
        """Prepare; ``shares`` are the parts' possible shares in a mean, and ``compares`` is whether values must agree."""
        self._means: dict[Shares, tuple[Source, ...]] = {}
        for source, weights in shares.items():
            self._means[weights] = (*self._means.get(weights, ()), source)
        self._dim, self._compares = dim, compares
        self._rules: dict[Path, Rule] = {}
        self._sources: dict[Path, tuple[Source, ...]] = {}
        self._mixed = ""
        self.pairs: list[tuple[torch.Tensor, torch.Tensor, Path]] = []
        """Tensors of the whole batch, and what the parts' are joined to."""

    def find(self, whole: Any, parts: Sequence[Any]) -> JoinRules:
        """Return the rules, or raise ``NotJoinable``."""
        try:
            self._walk(whole, parts, ())
        except JoinError as error:
            raise NotJoinable(error.reason) from error
        return JoinRules(self._rules, self._mixed, self._sources)

    def _walk(self, whole: Any, parts: Sequence[Any], path: Path) -> None:
        if is_dense(whole) and all(map(is_dense, parts)):
            rule = self._rules[path] = self._tensor_rule(whole, parts, path)._replace(ndim=whole.dim())
            self.pairs.append((whole, _join(parts, rule), path))
            return
        if isinstance(whole, PackedSequence | torch.Tensor):
            raise NotJoinable(f"{place(path)} is a {_kind(whole)}, which cannot be joined from parts")
        opened = open_value(whole)
        if opened is None:
            self._rules[path] = self._leaf_rule(whole, parts, path)
            return
        if type(whole) in (list, tuple) and self._has_items(whole, parts):
            self._rules[path] = Rule("items")
            self._compare_items(whole, [item for part in parts for item in part], path)
            return
        columns = columns_of([whole, *parts], path)
        for key, (own, *others) in zip(keys(whole), columns, strict=True):
            try:
                self._walk(own, others, (*path, key))
            except NotJoinable as error:
                if is_object(whole):
                    raise NotJoinable(f"{error} (in a {type(whole).__name__})") from error
                raise

    def _has_items(self, whole: Any, parts: Sequence[Any]) -> bool:
        if any(type(part) is not type(whole) for part in parts):
            return False
        lengths = [len(part) for part in parts]
        return len(whole) == sum(lengths) and any(length != len(whole) for length in lengths)

    def _compare_items(self, whole: Sequence[Any], items: Sequence[Any], path: Path) -> None:
        finder = RuleFinder({SAMPLES: (1.0,)}, self._dim, compares=self._compares)
        for index, (one, other) in enumerate(zip(whole, items, strict=True)):
            finder._walk(one, [other], (*path, index))
        self._mixed = self._mixed or finder._mixed
        self.pairs += finder.pairs

    def _tensor_rule(self, whole: torch.Tensor, parts: Sequence[torch.Tensor], path: Path) -> Rule:
        candidates = list(self._candidates(whole, parts))
        if not candidates:
            shapes = f"whole batch {tuple(whole.shape)}, parts {', '.join(str(tuple(p.shape)) for p in parts)}"
            raise NotJoinable(f"{place(path)} has no dimension along which its parts can be joined ({shapes})")
        if not self._compares:
            return candidates[0]
        with torch.no_grad():
            fitting = [rule for rule in candidates if is_close(_join(parts, rule), whole)]
        if any(not is_close(part, whole) for part in parts):
            fitting = [rule for rule in fitting if rule.kind != "same"]
        if fitting:
            return self._choose(fitting, path)
        self._note_mixed(whole, candidates[0], path)
        return candidates[0]

    def _choose(self, fitting: Sequence[Rule], path: Path) -> Rule:
        others = tuple(rule for rule in fitting if rule.kind != fitting[0].kind)
        if fitting[0].kind == "mean":
            means = (rule for rule in fitting if rule.kind == "mean")
            self._sources[path] = tuple(source for rule in means for source in self._means[rule.weights])
        return fitting[0]._replace(others=others)

    def _note_mixed(self, whole: torch.Tensor, rule: Rule, path: Path) -> None:
        if not whole.is_floating_point() and rule.kind != "concatenate":
            raise NotJoinable(f"{place(path)} is a count or a flag of the whole batch")
        if rule.kind == "concatenate":
            self._mixed = self._mixed or f"{place(path)} for one sample depends on other samples of the batch"
        elif whole.dim():
            raise NotJoinable(f"{place(path)} is a statistic of the whole batch")
        else:
            self._mixed = self._mixed or f"{place(path)} is not the mean over the samples"

    def _candidates(self, whole: torch.Tensor, parts: Sequence[torch.Tensor]) -> Sequence[Rule]:
        dims = sorted(range(whole.dim()), key=lambda dim: (dim != self._dim % max(whole.dim(), 1), dim))
        found = [Rule("concatenate", dim) for dim in dims if _fits(whole, parts, dim)]
        if all(part.shape == whole.shape for part in parts):
            if whole.is_floating_point() or whole.is_complex():
                found += self._mean_rules()
            found.append(Rule("same"))
            if whole.dtype != torch.bool:
                found.append(Rule("sum"))
        return found

    def _leaf_rule(self, whole: Any, parts: Sequence[Any], path: Path) -> Rule:
        candidates = [Rule("same")]
        if isinstance(whole, np.ndarray) and all(isinstance(part, np.ndarray) for part in parts):
            arrays = [torch.empty(value.shape, device="meta") for value in (whole, *parts)]
            candidates = [
                Rule("concatenate", d) for d in range(whole.ndim) if _fits(arrays[0], arrays[1:], d)
            ] + candidates
        if isinstance(whole, _NUMBERS) and not isinstance(whole, bool):
            if isinstance(whole, float):
                candidates = [*self._mean_rules(), Rule("same")]
            candidates.append(Rule("sum"))
        fits: Callable[[Rule], bool] = lambda rule: _is_joined(whole, parts, rule, compares=self._compares)  # noqa: E731
        fitting = [rule for rule in candidates if fits(rule)]
        if not fitting:
            kind, remedy = type(whole).__name__, ""
            if kind.endswith("Cache"):
                remedy = "; set config.use_cache = False to leave it out"
            if isinstance(whole, str | int | float | bool | None):
                raise NotJoinable(
                    f"{place(path)} is {whole!r:.40} for the batch and something else for its parts{remedy}"
                )
            raise NotJoinable(f"{place(path)} is a {kind}, which cannot be joined from parts{remedy}")
        return self._choose(fitting, path)

    def _mean_rules(self) -> list[Rule]:
        return [Rule("mean", source=sources[0], weights=weights) for weights, sources in self._means.items()]


def _join(parts: Sequence[torch.Tensor], rule: Rule) -> torch.Tensor:
    spec = OutputSpec(tuple(Placeholder(0, index) for index in range(len(parts))), rule)
    return join_tensors(spec, [[part] for part in parts])


def _is_joined(whole: Any, parts: Sequence[Any], rule: Rule, *, compares: bool) -> bool:
    try:
        value = join_leaves(parts, rule)
    except JoinError:
        return False
    if not compares and rule.kind != "same":
        return True
    if isinstance(whole, np.ndarray) and whole.dtype.kind in "fc":
        return value.shape == whole.shape and is_close(torch.from_numpy(value), torch.from_numpy(whole))
    return is_same(value, whole)


def _fits(whole: torch.Tensor, parts: Sequence[torch.Tensor], dim: int) -> bool:
    if any(part.dim() != whole.dim() for part in parts) or sum(part.size(dim) for part in parts) != whole.size(dim):
        return False
    return all(size == whole.size(other) for part in parts for other, size in enumerate(part.shape) if other != dim)


def _kind(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return (
        "nested tensor" if value.is_nested else "quantized tensor" if value.is_quantized else f"{value.layout} tensor"
    )
