"""Nearly equal, contiguous parts of a range, cut as ``torch.tensor_split`` cuts."""


def chunk_sizes(total: int, parts: int) -> list[int]:
    """Return the sizes of ``parts`` parts of ``total`` items; the larger parts come first.

    >>> chunk_sizes(5, 3)
    [2, 2, 1]
    """
    return [total // parts + (index < total % parts) for index in range(parts)]


def chunk_bounds(total: int, index: int, parts: int) -> tuple[int, int]:
    """Return where part ``index`` of ``parts`` begins and ends.

    >>> chunk_bounds(5, 1, 3)
    (2, 4)
    """
    size, larger = divmod(total, parts)
    start = index * size + min(index, larger)
    return start, start + size + (index < larger)
