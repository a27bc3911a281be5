"""Folders of the repository, and real data that stand beside it on some machines."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_DATA = ROOT.parent / "shared" / "data"
TINY_IMAGENET = SHARED_DATA / "tiny-imagenet-10.tar"
ETTH1 = SHARED_DATA / "ETTh1.csv"


def needs_file(path: Path) -> pytest.MarkDecorator:
    """Return the marker that skips a test on machines without ``path``."""
    return pytest.mark.skipif(not path.exists(), reason=f"needs ../{path.relative_to(ROOT.parent)}")
