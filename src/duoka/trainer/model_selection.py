"""Selection of the best evaluation, and early stopping."""

import math
import re

from duoka.errors import ConfigError
from duoka.trainer.callbacks import Best, State
from duoka.trainer.config import TrainerConfig
from duoka.trainer.metrics import Metrics, Results
from duoka.utils.text import did_you_mean

PREFIX = "val_"
"""Prefix of evaluation results in the records of epochs."""
LOWER_IS_BETTER = frozenset({
    "loss", "error", "err", "mse", "mae", "rmse", "mape", "smape", "nll", "bce", "perplexity", "ppl", "wer", "cer",
    "divergence", "distance",
})  # fmt: skip
HIGHER_IS_BETTER = frozenset({
    "accuracy", "acc", "f1", "auc", "auroc", "ap", "map", "precision", "recall", "iou", "dice", "bleu", "rouge", "r2",
    "correlation", "similarity", "psnr", "ssim",
})  # fmt: skip
"""Words in the name of a result that decide the direction."""


class BestTracker:
    """Tracks one evaluation result. Every rank sees the same values, so all ranks decide the same."""

    def __init__(self, config: TrainerConfig, metrics: Metrics, has_evaluation: bool) -> None:
        name = config.monitor or ("loss" if config.early_stop_patience is not None else None)
        self.name = name.removeprefix(PREFIX) if name else None
        self.patience = config.early_stop_patience
        self.lower_is_better = True
        if self.name is None:
            return
        if not has_evaluation:
            raise ConfigError(
                f"monitor={self.name!r} needs evaluations, and there is no eval_data; give eval_data, or leave monitor out"
            )
        if metrics.names is not None:
            self._check_name(["loss", *metrics.names])
        self.lower_is_better = self._is_lower_better(self.name, config, metrics)

    def value(self, results: Results) -> float | None:
        """Return the monitored value, ``None`` without ``monitor``."""
        if self.name is None:
            return None
        self._check_name(list(results))
        value = results[self.name]
        if not isinstance(value, (int, float)):
            raise ConfigError(f"monitor={self.name!r} has more than one value; monitor a single number")
        return float(value)

    def update(self, state: State, *, end_of_epoch: bool = True) -> bool:
        """Compare ``state.validation`` with the best so far; return whether it is better.

        An evaluation within an epoch may be the best, but does not count for early stopping: a resumed run evaluates
        again at the end of that epoch.
        """
        value = self.value(state.validation)
        if value is None:
            return False
        best, sign = state.best, 1 if self.lower_is_better else -1
        if not math.isnan(value) and (best is None or sign * value < sign * best.value):
            state.best = Best(value, state.epoch, dict(state.validation))
            state.evaluations_without_improvement = 0
            return True
        state.evaluations_without_improvement += end_of_epoch
        self.check_patience(state)
        return False

    def check_patience(self, state: State) -> None:
        """Stop training if too many consecutive evaluations were not better."""
        if self.patience is not None and state.evaluations_without_improvement >= self.patience:
            state.stop(f"{self.name} has not improved in {state.evaluations_without_improvement} evaluations")

    def _check_name(self, names: list[str]) -> None:
        if self.name not in names:
            hint = did_you_mean(self.name, names)
            known = f"{', '.join(names) or 'none'}{f'; {hint}' if hint else ''}"
            raise ConfigError(f"monitor={self.name!r} is not a result of the evaluation, which has {known}")

    @property
    def summary(self) -> str:
        """The monitored result and its direction; empty without ``monitor``."""
        direction = "lower" if self.lower_is_better else "higher"
        return "" if self.name is None else f"monitors {self.name} ({direction} is better)"

    @staticmethod
    def _is_lower_better(name: str, config: TrainerConfig, metrics: Metrics) -> bool:
        """Return the direction by the option ``monitor_mode``, else by the metric, else by the words of its name."""
        if config.monitor_mode != "auto":
            return config.monitor_mode == "min"
        higher = metrics.higher_is_better(name)
        if higher is not None:
            return not higher
        words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+\d*|[A-Z]+(?![a-z])\d*", name)}
        words |= set(re.split(r"[^a-z0-9]+", name.lower()))
        is_lower, is_higher = bool(words & LOWER_IS_BETTER), bool(words & HIGHER_IS_BETTER)
        if is_lower == is_higher:
            raise ConfigError(
                f"monitor={name!r}: neither the metric nor its name shows whether lower or higher is better; give "
                'monitor_mode="min" or monitor_mode="max"'
            )
        return is_lower
