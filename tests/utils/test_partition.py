"""Parts of a range, compared with ``torch.tensor_split``."""

from __future__ import annotations

import pytest
import torch

from duoka.utils.partition import chunk_bounds, chunk_sizes


@pytest.mark.parametrize("total", [0, 1, 2, 5, 7, 12, 100])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7, 13])
def test_parts_are_those_of_tensor_split(total: int, parts: int) -> None:
    expected = [part.tolist() for part in torch.arange(total).tensor_split(parts)]
    assert chunk_sizes(total, parts) == [len(part) for part in expected]
    bounds = [chunk_bounds(total, index, parts) for index in range(parts)]
    assert [list(range(start, stop)) for start, stop in bounds] == expected
