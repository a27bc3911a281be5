"""A training package with relative imports, run as `python -m pkg.train` from the folder above it."""
