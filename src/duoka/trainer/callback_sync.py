"""Callbacks run on rank 0; what they change there reaches all ranks, so that ranks stay equal."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import cloudpickle
import torch
from torch import nn
from torch.optim import Optimizer

from duoka.data_parallel.model_diff import ModelChanges, ModelSnapshot, set_namespaces
from duoka.data_parallel.transport.buckets import BucketChecksum, pack_bucket, value_buckets
from duoka.errors import UnsupportedError
from duoka.log import logger
from duoka.strategy import Strategy
from duoka.trainer.callbacks import Callback, State
from duoka.utils.pytree import map_leaves
from duoka.world import World


class _Changes(NamedTuple):
    """What callbacks changed: only what is not empty."""

    groups: list[dict[str, Any]] | None
    """All options of the optimizer's groups; ``params`` has indices of parameters."""
    trained: list[bool] | None
    """``requires_grad`` of each parameter."""
    tensors: list[int]
    """Indices of tensors with new values, which follow in a broadcast."""
    attributes: bytes | None
    """A pickled ``ModelChanges``."""


class CallbackSync:
    """Calls callbacks on rank 0, and gives their changes of model and optimizer to the other ranks."""

    def __init__(
        self, callbacks: Sequence[Callback], state: State, module: nn.Module, strategy: Strategy, world: World
    ) -> None:
        """Prepare; every rank of ``world`` must call this, and ``callbacks`` are empty except on rank 0."""
        self._callbacks, self._state, self._module = callbacks, state, module
        self._strategy, self._world = strategy, world
        names = [name for name in vars(Callback) if name.startswith("on_")]
        mine = [n for n in names if any(getattr(type(one), n) is not getattr(Callback, n) for one in callbacks)]
        self.overridden = frozenset(world.broadcast_object(mine))
        """Names of the methods that a callback overrides, on every rank."""
        self._snapshot: ModelSnapshot | None = None
        self._num_steps = 0
        self._last_check = 0

    def notify(self, event: str) -> bool:
        """Call the method ``event`` of each callback; return whether the set of trained parameters has changed."""
        if event not in self.overridden:
            return False
        if self._world.size == 1 or event == "on_fit_end":  # afterwards only rank 0's model is used
            self._call(event)
            return False
        if self._snapshot is None:
            self._snapshot = ModelSnapshot(self._module, self._world.device)
        is_step = event == "on_step_end"
        self._num_steps += is_step
        if not is_step or self._num_steps & (self._num_steps - 1) == 0:
            self._check_ranks_agree(self._snapshot)
        changes = self._call_and_compare(event, self._snapshot) if self._world.is_main else None
        changes = self._world.broadcast_object(changes)
        assert changes is not None
        if not self._world.is_main:
            self._apply(changes, self._snapshot)
        if changes.tensors:
            tensors = self._snapshot.tensors()
            self._strategy.broadcast([tensors[index] for index in changes.tensors])
        return changes.trained is not None or changes.groups is not None

    def _call(self, event: str) -> None:
        for callback in self._callbacks:
            getattr(callback, event)(self._state)

    def _call_and_compare(self, event: str, snapshot: ModelSnapshot) -> _Changes:
        parameters = list(self._module.parameters())
        self._attribute_changes(event, snapshot)  # of the step itself, which every rank has made
        groups, trained = self._groups(parameters), [one.requires_grad for one in parameters]
        versions = _versions(snapshot.tensors())
        self._call(event)
        attributes = self._attribute_changes(event, snapshot)
        new_groups, new_trained = self._groups(parameters), [one.requires_grad for one in parameters]
        new_versions = _versions(snapshot.tensors())
        edited = [n for n, version in enumerate(new_versions) if version != versions[n]]
        if event != "on_step_end":  # rare, so also edits that torch does not count: parameter.data.clamp_()
            edited = list(range(len(new_versions)))
        return _Changes(
            new_groups if new_groups != groups else None,
            new_trained if new_trained != trained else None,
            edited,
            cloudpickle.dumps(attributes) if attributes is not None and any(attributes) else None,
        )

    def _attribute_changes(self, event: str, snapshot: ModelSnapshot) -> ModelChanges | None:
        changes = snapshot.diff() if snapshot.structure_unchanged() else None
        if changes is None:
            raise UnsupportedError(
                f"a callback's {event} replaced layers or parameters of the model, or deleted attributes: callbacks run on "
                "rank 0, and the other devices cannot follow. Change values in place, or change the model before fit()"
            )
        moved = {
            index: map_leaves(_to_host, values, lambda leaf: isinstance(leaf, torch.Tensor))
            for index, values in changes.attributes.items()
        }
        return ModelChanges(moved, changes.namespaces)

    def _groups(self, parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
        index = {id(parameter): n for n, parameter in enumerate(parameters)}
        return [
            {
                name: [index[id(p)] for p in value if id(p) in index] if name == "params" else _plain(value)
                for name, value in group.items()
            }
            for group in self._state.optimizer.param_groups
        ]

    def _apply(self, changes: _Changes, snapshot: ModelSnapshot) -> None:
        """Make rank 0's changes on this rank."""
        parameters = list(self._module.parameters())
        if changes.trained is not None:
            for parameter, is_trained in zip(parameters, changes.trained, strict=True):
                parameter.requires_grad_(is_trained)
        if changes.groups is not None:
            _set_groups(self._state.optimizer, changes.groups, parameters)
        if changes.attributes is not None:
            attributes: ModelChanges = cloudpickle.loads(changes.attributes)
            for index, values in attributes.attributes.items():
                moved = map_leaves(self._to_device, values, lambda leaf: isinstance(leaf, torch.Tensor))
                snapshot.modules[index].__dict__.update(moved)
            set_namespaces(attributes.namespaces)

    def _to_device(self, leaf: Any) -> Any:
        return leaf.to(self._world.device) if isinstance(leaf, torch.Tensor) else leaf

    def _check_ranks_agree(self, snapshot: ModelSnapshot) -> None:
        """Warn if parameters differ between ranks; rank 0's values count from here on."""
        parameters = snapshot.parameters
        buckets = value_buckets(parameters, [range(len(parameters))])
        checksum = BucketChecksum(self._world.device)
        sums = [int(checksum(pack_bucket(bucket, parameters, self._world.device))) for bucket in buckets]
        by_rank = self._world.all_gather_object(sums)
        if any(other != by_rank[0] for other in by_rank):
            self._strategy.broadcast(parameters)
            if self._world.is_main:
                logger.warning(
                    "parameters differed between devices: a callback's on_step_end has changed them through .data, which "
                    "torch does not count. Results between steps %d and %d are not those of one device; use "
                    "torch.no_grad() and in-place operations on the parameters themselves",
                    self._last_check,
                    self._state.step,
                )
        self._last_check = self._state.step


def _set_groups(optimizer: Optimizer, groups: list[dict[str, Any]], parameters: Sequence[nn.Parameter]) -> None:
    for index, options in enumerate(groups):
        members = [parameters[n] for n in options["params"]]
        if index == len(optimizer.param_groups):
            optimizer.add_param_group({**options, "params": members})
            continue
        group = optimizer.param_groups[index]
        group["params"] = members
        for name, value in options.items():
            if isinstance(group.get(name), torch.Tensor):
                group[name].fill_(value)
            elif name != "params":
                group[name] = value


def _versions(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    return [(one.data_ptr(), -1 if one.is_inference() else one._version) for one in tensors]


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, torch.Tensor) else value


def _to_host(leaf: Any) -> Any:
    return leaf.detach().cpu() if isinstance(leaf, torch.Tensor) and leaf.device.type != "cpu" else leaf
