"""Experiments: variants of a recipe, trained in turn or in parallel, and compared in a table and plots."""

from duoka.recipes.experiments.experiment_spec import ExperimentSpec, Trial, read_experiment
from duoka.recipes.experiments.results import ResultRow, result_rows, write_summary
from duoka.recipes.experiments.runner import run_all

__all__ = ["ExperimentSpec", "ResultRow", "Trial", "read_experiment", "result_rows", "run_all", "write_summary"]
