"""Experiments: named variants of a recipe, trained one after another or side by side, and compared in a table and pictures."""

from __future__ import annotations

from duoka.recipes.experiments.experiment_spec import ExperimentSpec, Variant, read_plan
from duoka.recipes.experiments.results import ResultRow, rows_of, write_summary
from duoka.recipes.experiments.runner import run_all

__all__ = ["ExperimentSpec", "ResultRow", "Variant", "read_plan", "rows_of", "run_all", "write_summary"]
