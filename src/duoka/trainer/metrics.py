"""torchmetrics over several ranks: each sample once, and the same value as on one device."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from duoka.data_parallel.state_watch import Digest
from duoka.errors import ConfigError
from duoka.utils.pytree import map_leaves
from duoka.utils.torch_private import merge_metric_states, metric_states, unregistered_attributes
from duoka.world import World

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection


Results = dict[str, Any]
"""Values by name: numbers, or CPU tensors for metrics with more than one value."""


class Metrics:
    """A private copy of the user's metrics on one rank.

    Every rank updates with its own samples; ``compute`` merges the states on rank 0. It leaves out ranks without
    samples, because an empty state is not neutral to every reduction.
    """

    def __init__(self, metrics: Any, device: torch.device) -> None:
        self.collection = _to_collection(metrics)
        if self.collection is None:
            return
        self.collection.to(device)
        for metric in _metrics_in(self.collection):
            metric.distributed_available_fn = lambda: False  # or torchmetrics synchronizes in the process group
        self._attributes = {id(metric): _digests(metric) for metric in _metrics_in(self.collection)}

    @property
    def empty(self) -> bool:
        """Whether there are no metrics."""
        return self.collection is None

    def reset(self) -> None:
        """Reset all states."""
        if self.collection is not None:
            self.collection.reset()

    def update(self, output: Any, target: Any) -> None:
        """Add one batch's predictions and targets."""
        if self.collection is not None:
            self.collection.update(output, target)

    def compute(self, world: World) -> Results:
        """Return the values over all ranks' samples, the same on every rank."""
        if self.collection is None:
            return {}
        if world.size > 1:
            list(self.collection.values(copy_state=True))  # separates metrics that share states
            self._merge(_metrics_in(self.collection), world)
        return world.broadcast_object(map_leaves(_to_plain, self.collection.compute()) if world.is_main else {})

    def _merge(self, metrics: Sequence[Metric], world: World) -> None:
        """Give the metrics of rank 0 the results of all ranks; a metric with its own ``merge_state`` merges itself."""
        own = [_merges_itself(metric) for metric in metrics]
        pairs = list(zip(metrics, own, strict=True))
        states = [copy.deepcopy(one).to("cpu") if is_own else metric_states(one) for one, is_own in pairs]
        changed = [self._changed_attributes(one) if one.update_count and not is_own else {} for one, is_own in pairs]
        by_rank, changed_by_rank = world.all_gather_object(states), world.all_gather_object(changed)
        for metric, *found in zip(metrics, *changed_by_rank, strict=True):
            _check_attributes(metric, found)
        for (metric, is_own), *gathered in zip(pairs, *by_rank, strict=True) if world.is_main else ():
            if not is_own:
                merge_metric_states(metric, gathered)
                continue
            for other in gathered[1:]:
                if other.update_count:
                    metric.merge_state(other.to(metric.device))

    def _changed_attributes(self, metric: Metric) -> dict[str, str | bool | None]:
        """Return the attributes besides states that updates have changed; a class in place of other values than flags."""
        before, values = self._attributes.get(id(metric), {}), unregistered_attributes(metric)
        changed = {name: values[name] for name, digest in _digests(metric).items() if before.get(name) != digest}
        return {n: v if isinstance(v, str | bool | None) else f"a {type(v).__name__}" for n, v in changed.items()}

    def higher_is_better(self, name: str) -> bool | None:
        """Return ``higher_is_better`` of the metric called ``name``, ``None`` if it is unknown.

        A name without a metric is one value of a wrapper (of one class, say); then all wrappers are asked.
        """
        metrics = {} if self.collection is None else dict(self.collection.items())
        wrappers = [metric for metric in metrics.values() if len(_metrics_in(metric)) > 1]
        return _common([_direction(metric) for metric in ([metrics[name]] if name in metrics else wrappers)])

    @property
    def names(self) -> list[str] | None:
        """Names of the values; ``None`` if only ``compute`` shows them, as with wrappers."""
        if self.collection is None:
            return []
        has_wrappers = len(_metrics_in(self.collection)) > len(self.collection)
        return None if has_wrappers else [str(name) for name in self.collection]


def _digests(metric: Metric) -> dict[str, Digest]:
    return {name: Digest([value]) for name, value in unregistered_attributes(metric).items()}


def _check_attributes(metric: Metric, changed_by_rank: Sequence[dict[str, Any]]) -> None:
    """Refuse a metric that collects results in plain attributes; flags that are the same on all ranks are fine."""
    for changed in changed_by_rank:
        for name, value in changed.items():
            if str(value).startswith("a ") or any(other.get(name, value) != value for other in changed_by_rank):
                raise ConfigError(
                    f"the metric {type(metric).__name__} keeps results in its attribute {name!r}, which several devices "
                    f"cannot merge; register it: self.add_state({name!r}, default=..., dist_reduce_fx=...), or define "
                    "merge_state(other)"
                )


def _to_collection(metrics: Any) -> MetricCollection | None:
    """Return a copy of ``metrics`` (one, a list, a dict, a collection) as a collection, ``None`` if there are none."""
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
            f"metrics={metrics!r} is not valid: {error}; give torchmetrics: one, a list, or a dict of names and metrics"
        ) from error


def _metrics_in(module: torch.nn.Module) -> list[Metric]:
    """Return all metrics in ``module``, including itself and those inside wrappers and compositions."""
    from torchmetrics import Metric

    return [each for each in module.modules() if isinstance(each, Metric)]


def _merges_itself(metric: Metric) -> bool:
    """Whether the metric's class defines ``merge_state``."""
    from torchmetrics import Metric

    return type(metric).merge_state is not Metric.merge_state


def _direction(metric: Metric) -> bool | None:
    """Return ``higher_is_better`` of ``metric``, else of all metrics that it wraps; unknown for formulas (1 - accuracy)."""
    from torchmetrics.metric import CompositionalMetric

    if metric.higher_is_better is not None or isinstance(metric, CompositionalMetric):
        return metric.higher_is_better
    return _common([inner.higher_is_better for inner in _metrics_in(metric) if inner is not metric])


def _common(answers: list[bool | None]) -> bool | None:
    """Return the answer that all metrics give, ``None`` if they differ."""
    return answers[0] if len(set(answers)) == 1 else None


def _to_plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.detach().cpu()
    return value
