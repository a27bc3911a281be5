"""Experiments: named variants of a recipe, trained one after another or side by side, and compared in a table and pictures."""

from __future__ import annotations

from duoka.recipes.comparison.plan import Plan, Trial, read_plan
from duoka.recipes.comparison.running import run_all
from duoka.recipes.comparison.summary import Row, rows_of, write_summary

__all__ = ["Plan", "Row", "Trial", "read_plan", "rows_of", "run_all", "write_summary"]
