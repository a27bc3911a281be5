"""Which evaluation is the best so far, and when to stop waiting for a better one."""

from __future__ import annotations

import difflib
import math
import re

from duoka.errors import ConfigError
from duoka.trainer.callbacks import Best, State
from duoka.trainer.config import TrainerConfig
from duoka.trainer.metrics import Metrics, Results

__all__ = ["BestTracker"]

PREFIX = "val_"
SMALLER_IS_BETTER = frozenset({
    "loss", "error", "err", "mse", "mae", "rmse", "mape", "smape", "nll", "bce", "perplexity", "ppl", "wer", "cer",
    "divergence", "distance",
})  # fmt: skip
LARGER_IS_BETTER = frozenset({
    "accuracy", "acc", "f1", "auc", "auroc", "ap", "map", "precision", "recall", "iou", "dice", "bleu", "rouge", "r2",
    "correlation", "similarity", "psnr", "ssim",
})  # fmt: skip
"""Words that say it in a name, where they stand alone."""


class BestTracker:
    """Watches one evaluation result. Every rank judges the same values, so all come to the same end."""

    def __init__(self, config: TrainerConfig, metrics: Metrics, has_evaluation: bool) -> None:
        name = config.monitor or ("loss" if config.early_stop_patience is not None else None)
        self.name = name.removeprefix(PREFIX) if name else None
        self.patience = config.early_stop_patience
        self.smaller = True
        if self.name is None:
            return
        if not has_evaluation:
            raise ConfigError(
                f"monitor={self.name!r} watches evaluations, and there is no eval_data; give it, or leave monitor out"
            )
        known = metrics.names
        if known is not None:
            self._check_name(["loss", *known])
        self.smaller = self._smaller_is_better(config, metrics)

    def value(self, results: Results) -> float | None:
        """Return the monitored value, ``None`` where nothing is monitored."""
        if self.name is None:
            return None
        self._check_name(list(results))
        value = results[self.name]
        if not isinstance(value, (int, float)):
            raise ConfigError(
                f"monitor={self.name!r} has more than one value, so none is the best; monitor a single number"
            )
        return float(value)

    def take(self, state: State, *, whole: bool = True) -> bool:
        """Take in ``state.validation``; return whether it is the best so far, and say in ``state`` when to stop.

        An evaluation in an epoch that was left early may be the best, but tries no patience: where training goes on from
        there, the end of the epoch is evaluated.
        """
        value = self.value(state.validation)
        if value is None:
            return False
        if self._is_better(value, state.best):
            state.best, state.bad_evaluations = Best(value, state.epoch, dict(state.validation)), 0
            return True
        state.bad_evaluations += whole
        self.lose_patience(state)
        return False

    def lose_patience(self, state: State) -> None:
        """Say in ``state`` that training stops if there were too many evaluations in a row that were no better."""
        if self.patience is not None and state.bad_evaluations >= self.patience:
            state.stop(f"{self.name} has not become better in {state.bad_evaluations} evaluations")

    def _is_better(self, value: float, best: Best | None) -> bool:
        if math.isnan(value):
            return False
        if best is None:
            return True
        return value < best.value if self.smaller else value > best.value

    def _check_name(self, names: list[str]) -> None:
        if self.name is None or self.name in names:
            return
        close = difflib.get_close_matches(self.name, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"monitor={self.name!r} is no result of the evaluation, which has {', '.join(names) or 'none'}{hint}"
        )

    @property
    def words(self) -> str:
        """What is monitored, in words; empty where nothing is."""
        return "" if self.name is None else f"monitors {self.name} ({'lower' if self.smaller else 'higher'} is better)"

    def _smaller_is_better(self, config: TrainerConfig, metrics: Metrics) -> bool:
        """Return what was said, else what the metric says, else what its name says.

        Raises:
            ConfigError: nothing says it.

        """
        if config.monitor_mode != "auto":
            return config.monitor_mode == "min"
        assert self.name is not None
        higher = metrics.higher_is_better(self.name)
        if higher is not None:
            return not higher
        words = set(re.findall(r"[A-Z]?[a-z]+\d*|[A-Z]+(?![a-z])\d*", self.name))
        words = {word.lower() for word in words} | set(re.split(r"[^a-z0-9]+", self.name.lower()))
        smaller, larger = words & SMALLER_IS_BETTER, words & LARGER_IS_BETTER
        if bool(smaller) == bool(larger):
            raise ConfigError(
                f"monitor={self.name!r}: neither the metric nor its name says whether a lower or a higher value is better; say "
                'it: monitor_mode="min" or monitor_mode="max"'
            )
        return bool(smaller)
