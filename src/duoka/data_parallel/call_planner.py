"""Plans the calls of one model: checks each kind of call at its 1st, 2nd, 4th, 8th, ... time."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from duoka.data_parallel.gather import Rule
from duoka.data_parallel.join_rules import JoinRules
from duoka.data_parallel.placeholders import is_placeholder
from duoka.data_parallel.scatter import Arguments
from duoka.data_parallel.shares import shares_of
from duoka.data_parallel.split_check import STALE_CLOSURE, RunOnWorkers, SplitResult, check_call

_MAX_FAILURES = 3
"""Checks in which the model may raise an exception before one device computes all calls of the kind."""

_MAX_KINDS = 64
"""Kinds of calls that are remembered; calls with different texts among the arguments are different kinds."""


class CallPlanner:
    """Remembers the checks of each kind of call."""

    def __init__(self, num_devices: int) -> None:
        self._num_devices = num_devices
        self._kinds: dict[Any, _Kind] = {}

    def plan(
        self,
        module: nn.Module,
        arguments: Arguments,
        run_on_workers: RunOnWorkers | None = None,
        *,
        minimum: int = 1,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> SplitResult | None:
        """Return whether and how a call is split; ``None`` if that cannot be checked yet.

        A check runs inside ``around()``.
        """
        if arguments.refusal:  # for this call only
            return SplitResult(arguments.refusal, is_splittable=False)
        sizes = arguments.sizes(self._num_devices, minimum=minimum)
        kind = self._kind(module, arguments)
        is_due = kind.is_due(arguments, sizes)
        kind.count += 1
        if not is_due:
            return kind.result
        with around():
            return self._check(kind, module, arguments, sizes, run_on_workers, minimum)

    def _check(
        self,
        kind: "_Kind",
        module: nn.Module,
        arguments: Arguments,
        sizes: Sequence[int],
        run_on_workers: RunOnWorkers | None,
        minimum: int,
    ) -> SplitResult | None:
        whole = kind.is_ambiguous
        result = check_call(module, arguments, self._num_devices, run_on_workers, minimum=minimum, whole=whole)
        if not whole and result is not None and _needs_whole_batch(result, arguments, sizes):
            result = check_call(module, arguments, self._num_devices, minimum=minimum, whole=True) or result
        if result is None:
            return None
        if result.is_failure and kind.failures < _MAX_FAILURES:
            kind.failures += 1
            return result  # for this call only
        is_new = kind.result is not None and not kind.result.reason and result.reason != STALE_CLOSURE
        if result.reason and is_new:
            since = f" (a check of call {kind.checked} saw no difference: results since then may differ)"
            result = result._replace(reason=result.reason + since)
        kind.result, kind.checked = result, kind.count
        return result

    def decide(self, module: nn.Module, arguments: Arguments, *, minimum: int = 1) -> SplitResult | None:
        """Check all samples of a call for which the rules that fitted so far give different values.

        A few samples decide if one device has no memory for all. A value that is the same in all parts of this check, and
        not in the call, is drawn: its rule stays undecided.
        """
        result = check_call(module, arguments, self._num_devices, minimum=minimum, whole=True)
        if result is None:
            result = check_call(module, arguments, self._num_devices, minimum=minimum)
        if result is None or result.is_failure:
            return result
        self._kind(module, arguments).result = result
        if result.rules is None:
            return result
        decided = {place: _decided(rule) for place, rule in result.rules.rules.items()}
        return result._replace(rules=result.rules._replace(rules=decided))

    def refuse(self, module: nn.Module, arguments: Arguments, reason: str) -> SplitResult:
        """Let one device compute all calls of this kind."""
        result = self._kind(module, arguments).result = SplitResult(reason, is_splittable=False)
        return result

    def _kind(self, module: nn.Module, arguments: Arguments) -> "_Kind":
        """Return the calls of the same mode, argument types and split arguments; the kind not used for longest is forgotten."""
        tensors = enumerate(arguments.tensors)
        shapes = tuple((t.dim(), t.dtype, t.requires_grad, arguments.is_split(index)) for index, t in tensors)
        signature = module.training, torch.is_grad_enabled(), shapes, repr(_structure(arguments.structure))
        kind = self._kinds[signature] = self._kinds.pop(signature, _Kind())
        if len(self._kinds) > _MAX_KINDS:
            del self._kinds[next(iter(self._kinds))]
        return kind


class _Kind:
    """Calls with the same mode, types and dimensions."""

    def __init__(self) -> None:
        self.count = self.checked = 0
        self.result: SplitResult | None = None
        self.failures = 0
        self.is_ambiguous = False
        """Whether the call at hand needs a check of its whole batch."""

    def is_due(self, arguments: Arguments, sizes: Sequence[int]) -> bool:
        if self.result is not None and not self.result.is_splittable:
            return False
        self.is_ambiguous = self.result is not None and _needs_whole_batch(self.result, arguments, sizes)
        number = self.count + 1
        return self.result is None or self.is_ambiguous or number & (number - 1) == 0


def _structure(value: Any) -> Any:
    """Return nested values with the type's name in place of each value that has no stable text."""
    if is_placeholder(value):
        return "tensor"
    if isinstance(value, dict):
        return {key: _structure(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_structure(item) for item in value]
    return value if isinstance(value, bool | str | None) else type(value).__name__


def _decided(rule: Rule) -> Rule:
    is_same = any(other.kind == "same" for other in rule.others)
    return rule if is_same else rule._replace(others=())


def _needs_whole_batch(result: SplitResult, arguments: Arguments, sizes: Sequence[int]) -> bool:
    """Return whether a few samples cannot show how this call is computed on several devices."""
    if result.has_statistic and not result.reason:
        return True
    return result.rules is not None and _is_ambiguous(result.rules, arguments, sizes)


def _is_ambiguous(rules: JoinRules, arguments: Arguments, sizes: Sequence[int]) -> bool:
    """Return whether means that agreed in earlier checks have different shares in this call."""
    alternatives = {sources for sources in rules.sources.values() if len(sources) > 1}
    if not alternatives:
        return False
    shares = shares_of(arguments, sizes, [source for sources in alternatives for source in sources])
    return any(len({shares[source] for source in sources}) > 1 for sources in alternatives)
