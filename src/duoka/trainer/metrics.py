"""torchmetrics over several ranks: every sample once, and the same number as on one device."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from duoka.errors import ConfigError
from duoka.world import World

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

__all__ = ["Metrics", "Results"]

Results = dict[str, Any]
"""Names and values: numbers, or tensors on the CPU where a metric has more than one value."""


class Metrics:
    """A private copy of the user's metrics on one rank.

    Every rank updates with its own samples; ``compute`` brings the states together on rank 0. Ranks that had no sample are
    left out, as their empty states are not neutral to every reduction.
    """

    def __init__(self, metrics: Any, device: torch.device) -> None:
        self.collection = collection_of(metrics)
        if self.collection is None:
            return
        self.collection.to(device)
        for metric in self._each():
            metric.sync_on_compute = False  # torchmetrics would synchronise by itself inside a process group
            metric._to_sync = False

    def _each(self) -> list[Metric]:
        """Return every metric, those inside wrappers and compositions included."""
        from torchmetrics import Metric

        modules = () if self.collection is None else self.collection.modules()
        return [module for module in modules if isinstance(module, Metric)]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to measure."""
        return self.collection is None

    def reset(self) -> None:
        """Forget what was seen."""
        if self.collection is not None:
            self.collection.reset()

    def update(self, output: Any, target: Any) -> None:
        """Take in one batch's predictions and targets."""
        if self.collection is not None:
            self.collection.update(output, target)

    def compute(self, world: World) -> Results:
        """Return the values over all ranks' samples, the same on every rank."""
        if self.collection is None:
            return {}
        if world.size > 1:
            list(self.collection.values(copy_state=True))  # metrics that share states get their own before they are set
            self._merge(world)
        values = {name: _plain(value) for name, value in self.collection.compute().items()} if world.is_main else {}
        return world.broadcast_object(values)

    def _merge(self, world: World) -> None:
        mine = [(metric._update_count, _states(metric)) for metric in self._each()]
        everyone = world.all_gather_object(mine)
        if world.is_main:
            for index, metric in enumerate(self._each()):
                _set_states(metric, [rank[index] for rank in everyone])

    def higher_is_better(self, name: str) -> bool | None:
        """Return what the metric called ``name`` says about itself, ``None`` if it does not say.

        A name that no metric has is a value of a wrapper's (of one class, say); then those that hold others are asked.
        """
        if self.collection is None:
            return None
        metrics = dict(self.collection.items())
        asked = [metrics[name]] if name in metrics else [each for each in metrics.values() if _inner(each)]
        said = {_direction(metric) for metric in asked}
        return said.pop() if len(said) == 1 else None

    @property
    def names(self) -> list[str] | None:
        """The names of the values to come; ``None`` where only computing them tells, as with wrappers."""
        if self.collection is None:
            return []
        wrapped = len(self._each()) > len(self.collection)
        return None if wrapped else [str(name) for name in self.collection]


def collection_of(metrics: Any) -> MetricCollection | None:
    """Return a copy of ``metrics`` (one, a list, a dict, a collection) as a collection, ``None`` for none."""
    if metrics is None or (isinstance(metrics, (list, tuple, dict)) and not metrics):
        return None
    from torchmetrics import Metric, MetricCollection

    if isinstance(metrics, MetricCollection):
        return metrics.clone()
    if isinstance(metrics, Metric):
        metrics = [metrics]
    try:
        return MetricCollection(copy.deepcopy(metrics))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"metrics={metrics!r}: {error}. Give torchmetrics: one, a list, or a dict of names and metrics"
        ) from error


def _inner(metric: Metric) -> list[Metric]:
    """Return the metrics that ``metric`` wraps."""
    from torchmetrics import Metric

    return [module for module in metric.modules() if isinstance(module, Metric) and module is not metric]


def _direction(metric: Metric) -> bool | None:
    """Whether higher is better, by ``metric`` or all that it wraps; of a formula (1 - accuracy) they do not tell."""
    from torchmetrics.metric import CompositionalMetric

    if metric.higher_is_better is not None or isinstance(metric, CompositionalMetric):
        return metric.higher_is_better
    said = {inner.higher_is_better for inner in _inner(metric)}
    return said.pop() if len(said) == 1 else None


def _states(metric: Metric) -> dict[str, Any]:
    return {name: _to_cpu(getattr(metric, name)) for name in metric._defaults}


def _to_cpu(state: Any) -> Any:
    return [item.detach().cpu() for item in state] if isinstance(state, list) else state.detach().cpu()


def _set_states(metric: Metric, ranks: list[tuple[int, dict[str, Any]]]) -> None:
    """Set ``metric``'s states to those of all ranks together, by the rules that torchmetrics itself reduces with."""
    seen = [states for count, states in ranks if count > 0]
    metric._update_count = sum(count for count, _ in ranks)
    metric._computed = None
    for name, reduction in metric._reductions.items():
        states = [rank[name] for rank in seen]
        if not states:
            continue
        if isinstance(states[0], list):
            joined: Any = [item.to(metric.device) for state in states for item in state]
        else:
            joined = torch.stack([state.to(metric.device) for state in states])
            joined = reduction(joined) if callable(reduction) else joined
        setattr(metric, name, joined)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.detach().cpu()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value
