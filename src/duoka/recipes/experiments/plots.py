"""Pictures of a comparison: bars, curves laid over each other, and what each variant brings against the baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duoka.recipes.image_classification.plots import GREY, RIGHT, WRONG, canvas

__all__ = ["bars", "contributions", "curves"]

Named = Sequence[tuple[str, Sequence[float]]]
"""Variants and their values, one a seed."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which colour-blind readers tell apart; with four kinds of line they name 28 curves."""
STYLES = ("-", "--", ":", "-.")
MARKERS = "os^Dv*X"
"""One a colour, so that curves are told apart in grey, too."""
MARKS = 12
"""About how many of them a long curve has."""


def bars(path: Path, metric: str, named: Named) -> None:
    """Draw each variant's mean as a bar, its deviation over the seeds as a line, and each seed as a dot."""
    places = range(len(named))
    means = [statistics.fmean(values) for _, values in named]
    with canvas(path, 7.5, 1.3 + 0.42 * len(named)) as figure:
        axes = figure.add_subplot()
        axes.barh(places, means, color="#9CC9E5", height=0.65, xerr=_deviations(named), ecolor=RIGHT)
        _dots(axes, named)
        _label(axes, [f"{value:.4f}" for value in means], [max(0.0, *values) for _, values in named])
        _finish(axes, [name for name, _ in named], f"Best {metric} of each variant{_seeds(named)}", metric)


def curves(path: Path, metric: str, named: Sequence[tuple[str, Sequence[Sequence[tuple[int, float]]]]]) -> None:
    """Draw the mean over the seeds of every evaluation, with a band from the lowest to the highest seed."""
    with canvas(path, 9.0, max(4.2, 1.2 + 0.25 * len(named))) as figure:
        axes = figure.add_subplot()
        for place, (name, runs) in enumerate(named):
            by_epoch: dict[int, list[float]] = {}
            for epoch, value in (point for run in runs for point in run):
                by_epoch.setdefault(epoch, []).append(value)
            epochs = sorted(by_epoch)
            colour, style = COLOURS[place % len(COLOURS)], STYLES[place // len(COLOURS) % len(STYLES)]
            means = [statistics.fmean(by_epoch[epoch]) for epoch in epochs]
            every = math.ceil(len(epochs) / MARKS)
            axes.plot(
                epochs, means, color=colour, linestyle=style, linewidth=1.6, label=name,
                marker=MARKERS[place % len(MARKERS)], markersize=5, markevery=(place % every, every),
            )  # fmt: skip
            if len(runs) > 1:
                low, high = ([pick(by_epoch[epoch]) for epoch in epochs] for pick in (min, max))
                axes.fill_between(epochs, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.set(xlabel="epoch", ylabel=metric, title=f"{metric} in evaluation")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(visible=True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)


def contributions(path: Path, metric: str, baseline: str, named: Named, *, higher: bool) -> None:
    """Draw what each variant gains (blue) or loses (orange) against ``baseline``; without it there is no picture."""
    base = next((values for name, values in named if name == baseline), None)
    others = (
        [
            (name, [round(value - statistics.fmean(base), 9) for value in values])
            for name, values in named
            if name != baseline
        ]
        if base
        else []
    )
    if not others:
        path.unlink(missing_ok=True)
        return
    others.sort(key=lambda item: -statistics.fmean(item[1]) if higher else statistics.fmean(item[1]))
    means = [statistics.fmean(values) for _, values in others]
    with canvas(path, 7.5, 1.3 + 0.42 * len(others)) as figure:
        axes = figure.add_subplot()
        colours = [RIGHT if (value >= 0) == higher else WRONG for value in means]
        axes.barh(
            range(len(others)), means, color=colours, height=0.65, xerr=_deviations(others), ecolor="black", alpha=0.75
        )
        axes.axvline(0, color=GREY, linewidth=1)
        for place, (value, (_, values)) in enumerate(zip(means, others, strict=True)):
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            end = max(value + spread, *values, 0.0) if value >= 0 else min(value - spread, *values, 0.0)
            shift, side = (5, "left") if value >= 0 else (-5, "right")
            axes.annotate(
                f"{value:+.4f}", (end, place), (shift, 0), textcoords="offset points", va="center", ha=side, fontsize=9
            )
        axes.margins(x=0.22)
        if not any(value for _, values in others for value in values):
            axes.set_xlim(-0.01, 0.01)
        _finish(
            axes,
            [name for name, _ in others],
            f"Change of {metric} against {baseline}{_seeds(others)}",
            f"change of {metric}",
        )


def _deviations(named: Named) -> list[float] | None:
    several = any(len(values) > 1 for _, values in named)
    return [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in named] if several else None


def _seeds(named: Named) -> str:
    most = max(len(values) for _, values in named)
    return f"\nmean ± deviation of {most} seeds" if most > 1 else ""


def _dots(axes: Any, named: Named) -> None:
    for place, (_, values) in enumerate(named):
        if len(values) > 1:
            axes.plot(values, [place] * len(values), "o", color=RIGHT, markersize=3.5)


def _label(axes: Any, texts: Sequence[str], ends: Sequence[float]) -> None:
    for place, (text, end) in enumerate(zip(texts, ends, strict=True)):
        axes.annotate(text, (end, place), (8, 0), textcoords="offset points", va="center", fontsize=9)
    axes.margins(x=0.16)


def _finish(axes: Any, names: Sequence[str], title: str, label: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.5, -0.5), xlabel=label, title=title)
    axes.spines[["top", "right"]].set_visible(False)
