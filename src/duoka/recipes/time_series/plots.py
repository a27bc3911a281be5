"""Pictures of forecasts and of predicted columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duoka.recipes.datasets.time_series import SeriesSplit, TimeSeries
from duoka.recipes.time_series.results import Forecasts
from duoka.utils.figures import figure_file

__all__ = ["beyond", "by_column", "by_step", "examples", "lines", "residuals", "scatter"]

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6B6B6B"
COLOURS = (ORANGE, GREY, PURPLE, GREEN)
MARKERS = ("o", "s", "^", "D")
SHOWN_COLUMNS, SHOWN_WINDOWS, SHOWN_ROWS, MOST_COLUMNS = 4, 3, 150, 24


def examples(path: Path, results: Forecasts, dates: Any, parts: SeriesSplit) -> None:
    """Draw three test windows of the first columns with their history: what came, the Informer's forecast, the next best.

    Args:
        path: the picture's file.
        results: forecasts of the test windows.
        dates: of all steps, from the first test window's history on.
        parts: the series' parts.

    """
    test, scaling = parts.test, results.scaling
    names = results.names[:SHOWN_COLUMNS]
    windows = torch.linspace(0, len(test) - 1, SHOWN_WINDOWS + 2).long()[1:-1].tolist()
    past = min(test.past, 4 * test.horizon)
    others = sorted(list(results.forecasts)[1:], key=lambda name: float(results.errors(name)["mse"]))[:1]
    with figure_file(path, 4.6 * SHOWN_WINDOWS, 0.8 + 2.3 * len(names)) as figure:
        grid = figure.subplots(len(names), SHOWN_WINDOWS, squeeze=False)
        for column, window in enumerate(windows):
            ends = window + test.past
            when = dates[ends - past : ends + test.horizon]
            truth = scaling.inverse_transform(test.values[ends - past : ends + test.horizon, test.targets])
            for row, name in enumerate(names):
                axes = grid[row, column]
                axes.plot(when, truth[:, row].numpy(), color=BLUE, linewidth=1.3, label="what came")
                for who, colour, style in zip(("Informer", *others), (ORANGE, GREEN), ("-", "--"), strict=False):
                    forecast = scaling.inverse_transform(results.forecasts[who][window])[:, row]
                    dot = "o" if test.horizon == 1 else None
                    axes.plot(
                        when[past:],
                        forecast.numpy(),
                        color=colour,
                        linestyle=style,
                        linewidth=1.5,
                        marker=dot,
                        label=who,
                    )
                axes.axvspan(when[past - 1], when[-1], color=GREY, alpha=0.1, linewidth=0)
                _dates(axes)
                axes.set_title(name if column == 0 else "", loc="left", fontsize=10, fontweight="bold")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
        _say_shown(figure, len(names), len(results.names))


def beyond(
    path: Path, series: TimeSeries, targets: Sequence[int], dates: Any, forecast: Tensor, *, history: int
) -> None:
    """Draw the end of a series and the forecast beyond it.

    Args:
        path: the picture's file.
        series: what is known.
        targets: places of the forecast columns.
        dates: of the forecast.
        forecast: ``(steps, targets)``, in the columns' units.
        history: how many known steps are drawn.

    """
    shown = targets[:MOST_COLUMNS]
    with figure_file(path, 9.0, 0.8 + 2.0 * len(shown)) as figure:
        grid = figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0]
        for number, (axes, place) in enumerate(zip(grid, shown, strict=True)):
            known = series.values[-history:, place]
            axes.plot(series.dates[-history:], known.numpy(), color=BLUE, linewidth=1.3, label="known")
            joined = torch.cat((known[-1:].double(), forecast[:, number].double()))
            axes.plot(series.dates[-1:].append(dates), joined.numpy(), color=ORANGE, linewidth=1.6, label="forecast")
            axes.axvspan(series.dates[-1], dates[-1], color=GREY, alpha=0.1, linewidth=0)
            axes.set_title(series.columns[place], loc="left", fontsize=10, fontweight="bold")
            _dates(axes)
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
        _say_shown(figure, len(shown), len(targets))


def by_step(path: Path, results: Forecasts) -> None:
    """Draw the mean squared error of each step of the horizon, of every forecast."""
    with figure_file(path, 7.5, 4.2) as figure:
        axes = figure.add_subplot()
        for name, colour, marker in zip(results.forecasts, COLOURS, MARKERS, strict=False):
            errors = results.errors(name)["mse_by_step"]
            every = max(1, len(errors) // 12)
            axes.plot(
                range(1, len(errors) + 1),
                errors,
                color=colour,
                marker=marker,
                markevery=every,
                markersize=4,
                label=name,
            )
        axes.set(xlabel="step of the forecast", ylabel="MSE, standardised", ylim=(0, None))
        steps = results.truth.shape[1]
        axes.set_xlim(0.5, steps + 0.5)
        axes.set_title("How the error grows with the horizon")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if steps <= 12:
            axes.set_xticks(range(1, steps + 1))
        _plain(axes)
        axes.legend(frameon=False)


def by_column(path: Path, results: Forecasts) -> None:
    """Draw the mean squared error of each column, of every forecast, as bars."""
    names, makers = results.names, list(results.forecasts)
    shown = names[:MOST_COLUMNS]
    with figure_file(path, max(6.0, 1.8 + 0.35 * len(makers) * len(shown)), 4.2) as figure:
        axes = figure.add_subplot()
        for number, (maker, colour) in enumerate(zip(makers, COLOURS, strict=False)):
            errors = results.errors(maker)["by_column"]
            places = [place + (number - (len(makers) - 1) / 2) * 0.8 / len(makers) for place in range(len(shown))]
            heights = [errors[name]["mse"] for name in shown]
            axes.bar(places, heights, width=0.76 / len(makers), color=colour, label=maker)
        flat = max(map(len, shown)) <= 3 * len(makers) + 2
        turned: dict[str, Any] = {} if flat else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(shown)), [name if len(name) <= 32 else f"{name[:31]}…" for name in shown], **turned)
        axes.set(ylabel="MSE, standardised")
        axes.set_title("The error of each column")
        _say_shown(figure, len(shown), len(names))
        _plain(axes)
        axes.legend(frameon=False)


def lines(path: Path, truth: Tensor, predicted: Tensor, name: str, *, rows: str = "test row") -> None:
    """Draw true and predicted values ``(rows,)`` of one column, of the first rows, which ``rows`` is the word for."""
    with figure_file(path, 11.0, 3.6) as figure:
        axes = figure.add_subplot()
        places = range(1, min(len(truth), SHOWN_ROWS) + 1)
        dot = "o" if len(places) == 1 else None
        axes.plot(places, truth[:SHOWN_ROWS].numpy(), color=BLUE, linewidth=1.2, marker=dot, label="true")
        axes.plot(
            places,
            predicted[:SHOWN_ROWS].numpy(),
            color=ORANGE,
            linewidth=1.2,
            linestyle="--",
            marker=dot,
            label="predicted",
        )
        axes.set(xlabel=rows, ylabel=name, xlim=(0.5, len(places) + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(f"{name}: the first {len(places)} of {len(truth):,} {rows}s", loc="left")
        _plain(axes)
        axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))


def scatter(path: Path, truth: Tensor, predicted: Tensor, name: str, r2: float) -> None:
    """Draw predicted against true values ``(rows,)`` of one column; a perfect prediction lies on the line."""
    with figure_file(path, 5.2, 5.0) as figure:
        axes = figure.add_subplot()
        ends = [float(torch.minimum(truth, predicted).min()), float(torch.maximum(truth, predicted).max())]
        axes.plot(ends, ends, color=GREY, linewidth=1)
        axes.scatter(truth.numpy(), predicted.numpy(), s=7, color=BLUE, alpha=0.35, linewidths=0)
        axes.set(xlabel=f"true {name}", ylabel=f"predicted {name}", aspect="equal")
        axes.set_title(f"{name}: R² {r2:.4f} on {len(truth):,} test rows")
        _plain(axes)


def residuals(path: Path, errors: Tensor, names: Sequence[str]) -> None:
    """Draw how often which error (predicted less true) ``(rows, columns)`` occurs, a panel a column, of the first ones."""
    shown = names[:MOST_COLUMNS]
    across = min(4, len(shown))
    down = math.ceil(len(shown) / across)
    with figure_file(path, 4.8 * across, 3.8 * down) as figure:
        grid = list(figure.subplots(down, across, squeeze=False).flat)
        for axes in grid[len(shown) :]:
            axes.set_axis_off()
        for axes, column, name in zip(grid, errors.unbind(1), shown, strict=False):
            axes.hist(column.numpy(), bins=50, color=BLUE, alpha=0.8)
            axes.axvline(0, color=ORANGE, linewidth=1.2)
            axes.set(xlabel=f"predicted less true {name}", ylabel="test rows")
            axes.set_title(f"mean {float(column.mean()):+.3g}, deviation {float(column.std(correction=0)):.3g}")
            _plain(axes)
        _say_shown(figure, len(shown), len(names))


def _say_shown(figure: Any, shown: int, there: int) -> None:
    """Say below a picture that it leaves columns out."""
    if shown < there:
        figure.supxlabel(f"the first {shown} of {there} columns", fontsize=9, color=GREY)


def _plain(axes: Any) -> None:
    axes.grid(visible=True, alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _dates(axes: Any) -> None:
    """Label a time axis briefly."""
    from matplotlib import dates

    ticks: Any = dates
    locator = ticks.AutoDateLocator(minticks=3, maxticks=7)  # with 6, some spans (66 hours) fit no step
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ticks.ConciseDateFormatter(locator))
    _plain(axes)
