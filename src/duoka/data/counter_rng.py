"""Random numbers without a state: each is a function of (stream, place, which), so any device can make any of them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["splitmix64", "counter_uniform"]

_GOLDEN = 0x9E37_79B9_7F4A_7C15
_FACTORS = ((30, 0xBF58_476D_1CE4_E5B9), (27, 0x94D0_49BB_1331_11EB))


def counter_uniform(stream: int, places: Tensor, count: int) -> Tensor:
    """Return ``count`` numbers from 0 (included) to 1 (not) for each of ``places``: float32 ``(len(places), count)``.

    ``stream`` is a 64-bit seed and ``places`` int64 on any device, which the result is on, too. Places are independent of each
    other: splitmix64 (Steele, Lea and Flood, 2014), whose top 24 bits are used.

    >>> counter_uniform(7, torch.tensor([0, 1]), 3)[1].equal(counter_uniform(7, torch.tensor([1]), 3)[0])
    True
    """
    number = places[:, None] * count + torch.arange(1, count + 1, device=places.device)
    bits = number * _signed(_GOLDEN) + _signed(stream)
    return _shifted(splitmix64(bits), 40).float() * 2.0**-24


def splitmix64(bits: Tensor) -> Tensor:
    """Return a hash of each of ``bits``, int64 of any shape: splitmix64's finalizer."""
    for shift, factor in _FACTORS:
        bits = (bits ^ _shifted(bits, shift)) * _signed(factor)
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shift 64 bits to the right without their sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """Return the number that torch takes for these 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
