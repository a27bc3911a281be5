"""Data sets of the recipes, each module with one source: images, tables and time series, and MovieLens ratings."""
