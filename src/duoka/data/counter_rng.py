"""Counter-based random numbers: each is a function of (stream, place, number), so any device can compute it."""

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E37_79B9_7F4A_7C15
_FACTORS = ((30, 0xBF58_476D_1CE4_E5B9), (27, 0x94D0_49BB_1331_11EB))


def seed_at(stream: int, index: int) -> int:
    """Return seed ``index`` of ``stream``, 64 bits of splitmix64: cheap enough for each sample."""
    bits = (stream + (index + 1) * _GOLDEN) & _MASK
    for shift, factor in _FACTORS:
        bits = ((bits ^ (bits >> shift)) * factor) & _MASK
    return bits ^ (bits >> 31)


def counter_uniform(stream: int, places: Tensor, count: int) -> Tensor:
    """Return ``count`` numbers in [0, 1) for each of ``places``: float32 ``(len(places), count)``.

    ``stream`` is a 64-bit seed; ``places`` is int64 on any device, which the result is on too. The numbers are the top
    24 bits of splitmix64 (Steele, Lea and Flood, 2014), and independent between places.

    >>> counter_uniform(7, torch.tensor([0, 1]), 3)[1].equal(counter_uniform(7, torch.tensor([1]), 3)[0])
    True
    """
    counter = places[:, None] * count + torch.arange(1, count + 1, device=places.device)
    bits = counter * _signed(_GOLDEN) + _signed(stream)
    return _shift_right(splitmix64(bits), 40).float() * 2.0**-24


def splitmix64(bits: Tensor) -> Tensor:
    """Return splitmix64's hash of each of ``bits``, int64 of any shape."""
    for shift, factor in _FACTORS:
        bits = (bits ^ _shift_right(bits, shift)) * _signed(factor)
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, by: int) -> Tensor:
    """Shift 64 bits to the right without extending the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """Return the signed integer with the same 64 bits."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value
