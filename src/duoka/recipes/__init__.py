"""Workloads that `duoka train` runs, built on the public API; `registry` lists them."""
