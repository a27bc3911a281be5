"""Results of finished trials: one row a variant, a Markdown table, JSON, and plots."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from duoka.recipes.experiments import plots
from duoka.recipes.experiments.experiment_spec import ExperimentSpec
from duoka.recipes.experiments.trial_run import finished_run, read_history
from duoka.utils.files import atomic_write
from duoka.utils.text import format_duration

HEADINGS = ("variant", "best", "last", "against baseline", "time", "parameters", "images/s", "seeds")


class _SavedSizes(TypedDict):
    """What the table reads of a run's ``results.json``."""

    parameters: NotRequired[int]


@dataclass(frozen=True)
class ResultRow:
    """A variant's results; each list has one value per seed."""

    variant: str
    best: list[float]
    """The best evaluation of each run."""
    last: list[float]
    curves: list[list[tuple[int, float]]]
    """Epoch and value of every evaluation."""
    seconds: list[float]
    """Training time of each run."""
    parameters: int | None
    samples_per_s: list[float]
    """Median over epochs."""


def result_rows(spec: ExperimentSpec) -> list[ResultRow]:
    """Return a row for each variant that has a finished run."""
    rows = (_result_row(spec, variant) for variant in spec.variants)
    return [row for row in rows if row is not None]


def _result_row(spec: ExperimentSpec, variant: str) -> ResultRow | None:
    key = f"val_{spec.metric}"
    trials = [trial for trial in spec.trials if trial.variant == variant]
    histories = [history for trial in trials if (history := read_history(trial))]
    curves = [
        [(r["epoch"], float(r[key])) for r in history if isinstance(r.get(key), int | float)] for history in histories
    ]
    curves = [curve for curve in curves if curve]
    if not curves:
        return None
    run = next(run for trial in trials if (run := finished_run(trial)))
    return ResultRow(
        variant,
        [(max if spec.higher else min)(value for _, value in curve) for curve in curves],
        [curve[-1][1] for curve in curves],
        curves,
        [sum(record["seconds"] for record in history) for history in histories],
        run.read_results(_SavedSizes).get("parameters"),
        [statistics.median(record["samples_per_s"] for record in history) for history in histories],
    )


def format_rows(spec: ExperimentSpec, rows: Sequence[ResultRow]) -> list[tuple[str, ...]]:
    """Return the table's rows as text."""
    mean = statistics.fmean
    base = next((row for row in rows if row.variant == spec.baseline), None)
    return [
        (
            row.variant,
            _mean_and_deviation(row.best),
            _mean_and_deviation(row.last),
            "" if base is None else "baseline" if row is base else f"{mean(row.best) - mean(base.best):+.4f}",
            format_duration(mean(row.seconds)),
            "-" if row.parameters is None else f"{row.parameters:,}",
            f"{mean(row.samples_per_s):,.0f}",
            str(len(row.best)),
        )
        for row in rows
    ]


def write_summary(spec: ExperimentSpec, rows: Sequence[ResultRow]) -> Path:
    """Write ``table.md``, ``results.json`` and the plots into the experiment's folder; return the folder of plots."""
    lines = [HEADINGS, tuple("---" for _ in HEADINGS), *format_rows(spec, rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    with atomic_write(spec.folder / "table.md") as file:
        file.write(f"{spec.name}: {spec.metric}\n\n{table}\n".encode())
    with atomic_write(spec.folder / "results.json") as file:
        file.write(f"{json.dumps([asdict(row) for row in rows], indent=2)}\n".encode())
    folder = spec.folder / "plots"
    best = [(row.variant, row.best) for row in rows]
    plots.plot_bars(folder / "best.png", spec.metric, best)
    plots.plot_curves(folder / "curves.png", spec.metric, [(row.variant, row.curves) for row in rows])
    plots.plot_differences(folder / "contribution.png", spec.metric, spec.baseline, best, higher=spec.higher)
    return folder


def _mean_and_deviation(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}"
