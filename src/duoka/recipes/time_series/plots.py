"""Pictures of forecasts and of predicted columns."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duoka.recipes.datasets.time_series import SlidingWindows, TimeSeries
from duoka.recipes.time_series.results import Forecasts
from duoka.utils.figures import BLUE, GREEN, GREY, ORANGE, figure_file, hide_frame

PURPLE = "#CC79A7"
MODEL_COLORS = (ORANGE, GREY, PURPLE, GREEN)
MARKERS = ("o", "s", "^", "D")
EXAMPLE_COLUMNS, EXAMPLE_WINDOWS = 4, 3
MAX_ROWS, MAX_COLUMNS = 150, 24
TITLE: dict[str, Any] = {"loc": "left", "fontsize": 10, "fontweight": "bold"}
LEGEND_ABOVE: dict[str, Any] = {"loc": "outside upper center", "ncols": 3, "frameon": False}


def plot_examples(path: Path, results: Forecasts, dates: Any, test: SlidingWindows) -> None:
    """Draw three test windows of the first columns: the truth, the Informer's forecast and the best baseline's.

    ``dates`` are those of all steps from the first test window's history on.
    """
    names = results.names[:EXAMPLE_COLUMNS]
    starts = torch.linspace(0, len(test) - 1, EXAMPLE_WINDOWS + 2).long()[1:-1].tolist()
    past = min(test.past, 4 * test.horizon)
    rivals = sorted(list(results.forecasts)[1:], key=lambda model: float(results.errors(model)["mse"]))[:1]
    lines = list(zip(("Informer", *rivals), (ORANGE, GREEN), ("-", "--"), strict=False))
    invert = results.standardization.inverse_transform
    with figure_file(path, 4.6 * EXAMPLE_WINDOWS, 0.8 + 2.3 * len(names)) as figure:
        grid = figure.subplots(len(names), EXAMPLE_WINDOWS, squeeze=False)
        for column, start in enumerate(starts):
            shown = slice(start + test.past - past, start + test.past + test.horizon)
            truth = invert(test.values[shown, test.targets])
            for row, name in enumerate(names):
                axes = grid[row, column]
                axes.plot(dates[shown], truth[:, row].numpy(), color=BLUE, linewidth=1.3, label="true")
                for model, color, style in lines:
                    forecast = invert(results.forecasts[model][start])[:, row].numpy()
                    look = {"color": color, "linestyle": style, "linewidth": 1.5, "marker": _marker(forecast)}
                    axes.plot(dates[shown][past:], forecast, label=model, **look)
                axes.set_title(name if column == 0 else "", **TITLE)
                _shade_future(axes, dates[shown][past - 1 :])
        figure.legend(*grid[0, 0].get_legend_handles_labels(), **LEGEND_ABOVE)
        _note_omitted(figure, len(names), len(results.names))


def plot_future(
    path: Path, series: TimeSeries, targets: Sequence[int], dates: Any, forecast: Tensor, *, history: int
) -> None:
    """Draw the last ``history`` steps of a series and the forecast ``(steps, targets)`` beyond it, on ``dates``."""
    shown = targets[:MAX_COLUMNS]
    with figure_file(path, 9.0, 0.8 + 2.0 * len(shown)) as figure:
        grid = figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0]
        future = series.dates[-1:].append(dates)
        for axes, index, predicted in zip(grid, shown, forecast.unbind(1), strict=False):
            known = series.values[-history:, index]
            axes.plot(series.dates[-history:], known.numpy(), color=BLUE, linewidth=1.3, label="known")
            joined = torch.cat((known[-1:].double(), predicted))
            axes.plot(future, joined.numpy(), color=ORANGE, linewidth=1.6, label="forecast")
            axes.set_title(series.columns[index], **TITLE)
            _shade_future(axes, future)
        figure.legend(*grid[0].get_legend_handles_labels(), **LEGEND_ABOVE)
        _note_omitted(figure, len(shown), len(targets))


def plot_error_by_step(path: Path, results: Forecasts) -> None:
    """Draw the mean squared error of each step of the horizon for all models."""
    horizon = results.truth.shape[1]
    steps = range(1, horizon + 1)
    with _single_axes(path, 7.5, 4.2) as axes:
        for model, color, marker in zip(results.forecasts, MODEL_COLORS, MARKERS, strict=False):
            look = {"color": color, "marker": marker, "markevery": max(1, horizon // 12), "markersize": 4}
            axes.plot(steps, results.errors(model)["mse_by_step"], label=model, **look)
        axes.set(xlabel="step of the forecast", ylabel="MSE, standardized", ylim=(0, None), xlim=(0.5, horizon + 0.5))
        axes.set_title("Error by step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)


def plot_error_by_column(path: Path, results: Forecasts) -> None:
    """Draw the mean squared error of each column for all models, as bars."""
    models, shown = list(results.forecasts), results.names[:MAX_COLUMNS]
    with _single_axes(path, max(6.0, 1.8 + 0.35 * len(models) * len(shown)), 4.2) as axes:
        for number, (model, color) in enumerate(zip(models, MODEL_COLORS, strict=False)):
            errors = results.errors(model)["by_column"]
            offset = (number - (len(models) - 1) / 2) * 0.8 / len(models)
            centers = [position + offset for position in range(len(shown))]
            heights = [errors[name]["mse"] for name in shown]
            axes.bar(centers, heights, width=0.76 / len(models), color=color, label=model)
        fits = max(map(len, shown)) <= 3 * len(models) + 2
        rotation: dict[str, Any] = {} if fits else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(shown)), [name if len(name) <= 32 else f"{name[:31]}…" for name in shown], **rotation)
        axes.set(ylabel="MSE, standardized")
        axes.set_title("Error by column")
        _note_omitted(axes.figure, len(shown), len(results.names))
        axes.legend(frameon=False)


def plot_lines(path: Path, truth: Tensor, predicted: Tensor, name: str, *, rows: str = "test row") -> None:
    """Draw true and predicted values ``(rows,)`` of the first rows of a column; ``rows`` is the noun for the axis."""
    with _single_axes(path, 11.0, 3.6) as axes:
        numbers = range(1, min(len(truth), MAX_ROWS) + 1)
        for values, color, style, label in ((truth, BLUE, "-", "true"), (predicted, ORANGE, "--", "predicted")):
            look = {"color": color, "linestyle": style, "linewidth": 1.2, "marker": _marker(numbers)}
            axes.plot(numbers, values[:MAX_ROWS].numpy(), label=label, **look)
        axes.set(xlabel=rows, ylabel=name, xlim=(0.5, len(numbers) + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(f"{name}: the first {len(numbers)} of {len(truth):,} {rows}s", loc="left")
        axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))


def plot_scatter(path: Path, truth: Tensor, predicted: Tensor, name: str, r2: float) -> None:
    """Draw predicted against true values ``(rows,)`` of a column, with the diagonal."""
    with _single_axes(path, 5.2, 5.0) as axes:
        ends = [float(torch.minimum(truth, predicted).min()), float(torch.maximum(truth, predicted).max())]
        axes.plot(ends, ends, color=GREY, linewidth=1)
        axes.scatter(truth.numpy(), predicted.numpy(), s=7, color=BLUE, alpha=0.35, linewidths=0)
        axes.set(xlabel=f"true {name}", ylabel=f"predicted {name}", aspect="equal")
        axes.set_title(f"{name}: R² {r2:.4f} on {len(truth):,} test rows")


def plot_residuals(path: Path, errors: Tensor, names: Sequence[str]) -> None:
    """Draw a histogram of the errors ``(rows, columns)``, predicted minus true, of each of the first columns."""
    shown = names[:MAX_COLUMNS]
    across = min(4, len(shown))
    down = math.ceil(len(shown) / across)
    with figure_file(path, 4.8 * across, 3.8 * down) as figure:
        grid = list(figure.subplots(down, across, squeeze=False).flat)
        for axes in grid[len(shown) :]:
            axes.set_axis_off()
        for axes, column, name in zip(grid, errors.unbind(1), shown, strict=False):
            axes.hist(column.numpy(), bins=50, color=BLUE, alpha=0.8)
            axes.axvline(0, color=ORANGE, linewidth=1.2)
            axes.set(xlabel=f"predicted minus true {name}", ylabel="test rows")
            axes.set_title(f"mean {float(column.mean()):+.3g}, deviation {float(column.std(correction=0)):.3g}")
            _style(axes)
        _note_omitted(figure, len(shown), len(names))


@contextlib.contextmanager
def _single_axes(path: Path, width: float, height: float) -> Iterator[Any]:
    """Yield the axes of a figure without other axes, and write the figure to ``path`` when the block ends."""
    with figure_file(path, width, height) as figure:
        axes = figure.add_subplot()
        _style(axes)
        yield axes


def _marker(values: Any) -> str | None:
    """Return a marker for a line of a single point, which would otherwise be invisible."""
    return "o" if len(values) == 1 else None


def _note_omitted(figure: Any, shown: int, total: int) -> None:
    if shown < total:
        figure.supxlabel(f"the first {shown} of {total} columns", fontsize=9, color=GREY)


def _style(axes: Any) -> None:
    axes.grid(visible=True, alpha=0.3)
    axes.set_axisbelow(True)
    hide_frame(axes)


def _shade_future(axes: Any, dates: Any) -> None:
    """Shade the forecast's dates and label the time axis briefly."""
    from matplotlib import dates as matplotlib_dates

    ticks: Any = matplotlib_dates
    axes.axvspan(dates[0], dates[-1], color=GREY, alpha=0.1, linewidth=0)
    locator = ticks.AutoDateLocator(minticks=3, maxticks=7)  # with 6, some spans (66 hours) fit no step
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ticks.ConciseDateFormatter(locator))
    _style(axes)
