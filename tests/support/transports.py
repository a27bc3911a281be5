"""Transports of ``DataParallel`` on CPU workers: shared memory, and over gloo the collectives of accelerators."""

from __future__ import annotations

import pytest

TRANSPORTS = ["shared", pytest.param("collective", marks=pytest.mark.extended)]
"""Parameters of the fixture ``transport``: by default a test runs over collectives in ``make test-all`` only."""
both_transports = pytest.mark.parametrize("transport", ["shared", "collective"], indirect=True)
"""Marks a test that runs over both transports every time."""
only_collective = pytest.mark.parametrize("transport", ["collective"], indirect=True)
"""Marks a test of the collective transport."""
