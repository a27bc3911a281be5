"""What finished trials came to: a row a variant, a table in Markdown, and pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from duoka.recipes.experiments import plots as charts
from duoka.recipes.experiments.experiment_spec import ExperimentSpec, Variant
from duoka.recipes.experiments.runner import finished, history

__all__ = ["HEADINGS", "ResultRow", "cells", "rows_of", "write_summary"]

HEADINGS = ("variant", "best", "last", "against baseline", "time", "parameters", "images/s", "seeds")


@dataclass(frozen=True)
class ResultRow:
    """A variant's results; lists have a value a seed."""

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


def rows_of(plan: ExperimentSpec) -> list[ResultRow]:
    """Return a row for each variant that has a finished run."""
    rows = []
    for variant in plan.variants:
        histories = [
            (trial, records) for trial in plan.trials if trial.variant == variant and (records := history(trial))
        ]
        curves = [
            [(r["epoch"], float(r[f"val_{plan.metric}"])) for r in h if f"val_{plan.metric}" in r] for _, h in histories
        ]
        if not any(curves):
            continue
        curves = [curve for curve in curves if curve]
        best = [(max if plan.higher else min)(value for _, value in curve) for curve in curves]
        rows.append(
            ResultRow(
                variant,
                best,
                [curve[-1][1] for curve in curves],
                curves,
                [sum(record["seconds"] for record in records) for _, records in histories],
                _parameters(histories[0][0]),
                [statistics.median(record["samples_per_s"] for record in records) for _, records in histories],
            )
        )
    return rows


def _parameters(trial: Variant) -> int | None:
    run = finished(trial)
    return None if run is None else run.read_results().get("parameters")


def cells(plan: ExperimentSpec, rows: Sequence[ResultRow]) -> list[tuple[str, ...]]:
    """Return the table's rows as text."""
    base = next((row for row in rows if row.variant == plan.baseline), None)
    return [
        (
            row.variant,
            mean_in_words(row.best),
            mean_in_words(row.last),
            "" if base is None else "baseline" if row is base else f"{mean(row.best) - mean(base.best):+.4f}",
            _time(mean(row.seconds)),
            "-" if row.parameters is None else f"{row.parameters:,}",
            f"{mean(row.samples_per_s):,.0f}",
            str(len(row.best)),
        )
        for row in rows
    ]


def write_summary(plan: ExperimentSpec, rows: Sequence[ResultRow]) -> Path:
    """Write ``table.md``, ``results.json`` and the pictures into the comparison's folder; return the folder of pictures."""
    lines = [HEADINGS, tuple("---" for _ in HEADINGS), *cells(plan, rows)]
    plan.folder.mkdir(parents=True, exist_ok=True)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    (plan.folder / "table.md").write_text(f"{plan.name}: {plan.metric}\n\n{table}\n", encoding="utf-8")
    (plan.folder / "results.json").write_text(
        json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8"
    )
    plots = plan.folder / "plots"
    named = [(row.variant, row.best) for row in rows]
    charts.bars(plots / "best.png", plan.metric, named)
    charts.curves(plots / "curves.png", plan.metric, [(row.variant, row.curves) for row in rows])
    charts.contributions(plots / "contribution.png", plan.metric, plan.baseline, named, higher=plan.higher)
    return plots


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return statistics.fmean(values)


def mean_in_words(values: Sequence[float]) -> str:
    """Return the mean, and of several seeds the deviation."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{mean(values):.4f} ± {statistics.stdev(values):.4f}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{seconds:.1f} s" if seconds < 60 else f"{minutes} min {rest} s" if minutes < 60 else f"{minutes / 60:.1f} h"
    )
