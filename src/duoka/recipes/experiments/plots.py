"""Plots of an experiment: a bar per variant, learning curves, and each variant's difference from the baseline."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duoka.utils.figures import BLUE, GREY, ORANGE, figure_file, hide_frame

Named = Sequence[tuple[str, Sequence[float]]]
"""Variants and their values, one per seed."""
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colors, which color-blind readers can distinguish; with four line styles they name 28 curves."""
STYLES = ("-", "--", ":", "-.")
MARKERS = "os^Dv*X"
"""One per color, so that curves differ in grey too."""
MARKERS_PER_CURVE = 12


def plot_bars(path: Path, metric: str, named: Named) -> None:
    """Plot each variant's mean as a bar, its standard deviation as a line, and each seed as a dot."""
    means, deviations = [statistics.fmean(values) for _, values in named], _deviations(named)
    with figure_file(path, 7.5, 1.3 + 0.42 * len(named)) as figure:
        axes = figure.add_subplot()
        axes.barh(range(len(named)), means, color="#9CC9E5", height=0.65, xerr=deviations, ecolor=BLUE)
        for y, (mean, spread, (_, values)) in enumerate(zip(means, deviations, named, strict=True)):
            if len(values) > 1:
                axes.plot(values, [y] * len(values), "o", color=BLUE, markersize=3.5)
            end = max(0.0, mean + spread, *values)  # right of bar, deviation and dots
            axes.annotate(f"{mean:.4f}", (end, y), (8, 0), textcoords="offset points", va="center", fontsize=9)
        axes.margins(x=0.16)
        _label_axes(axes, [name for name, _ in named], f"Best {metric} of each variant{_seeds(named)}", metric)


def plot_curves(path: Path, metric: str, named: Sequence[tuple[str, Sequence[Sequence[tuple[int, float]]]]]) -> None:
    """Plot the mean over the seeds of every evaluation, with a band from the lowest to the highest seed."""
    with figure_file(path, 9.0, max(4.2, 1.2 + 0.25 * len(named))) as figure:
        axes = figure.add_subplot()
        for number, (name, runs) in enumerate(named):
            by_epoch: dict[int, list[float]] = {}
            for epoch, value in (point for run in runs for point in run):
                by_epoch.setdefault(epoch, []).append(value)
            epochs = sorted(by_epoch)
            color, style = COLORS[number % len(COLORS)], STYLES[number // len(COLORS) % len(STYLES)]
            means = [statistics.fmean(by_epoch[epoch]) for epoch in epochs]
            every = math.ceil(len(epochs) / MARKERS_PER_CURVE)
            axes.plot(
                epochs, means, color=color, linestyle=style, linewidth=1.6, label=name,
                marker=MARKERS[number % len(MARKERS)], markersize=5, markevery=(number % every, every),
            )  # fmt: skip
            if len(runs) > 1:
                low, high = ([pick(by_epoch[epoch]) for epoch in epochs] for pick in (min, max))
                axes.fill_between(epochs, low, high, color=color, alpha=0.12, linewidth=0)
        axes.set(xlabel="epoch", ylabel=metric, title=f"{metric} in evaluation")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(visible=True, alpha=0.3)
        hide_frame(axes)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)


def plot_differences(path: Path, metric: str, baseline: str, named: Named, *, higher: bool) -> None:
    """Plot each variant's gain (blue) or loss (orange) against ``baseline``; no plot without a baseline."""
    values_of = dict(named)
    if baseline not in values_of or len(values_of) < 2:
        path.unlink(missing_ok=True)
        return
    base = statistics.fmean(values_of.pop(baseline))
    others = [(name, [round(value - base, 9) for value in values]) for name, values in values_of.items()]
    others.sort(key=lambda item: statistics.fmean(item[1]), reverse=higher)
    means = [statistics.fmean(values) for _, values in others]
    with figure_file(path, 7.5, 1.3 + 0.42 * len(others)) as figure:
        axes = figure.add_subplot()
        colors = [BLUE if (value >= 0) == higher else ORANGE for value in means]
        look = {"color": colors, "ecolor": "black", "alpha": 0.75}
        bars = axes.barh(range(len(others)), means, 0.65, xerr=_deviations(others), **look)
        axes.bar_label(bars, fmt="%+.4f", padding=5, fontsize=9)
        axes.axvline(0, color=GREY, linewidth=1)
        axes.margins(x=0.22)
        title = f"Change of {metric} against {baseline}{_seeds(others)}"
        _label_axes(axes, [name for name, _ in others], title, f"change of {metric}")


def _deviations(named: Named) -> list[float]:
    return [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in named]


def _seeds(named: Named) -> str:
    most = max(len(values) for _, values in named)
    return f"\nmean ± deviation of {most} seeds" if most > 1 else ""


def _label_axes(axes: Any, names: Sequence[str], title: str, label: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.5, -0.5), xlabel=label, title=title)
    hide_frame(axes)
