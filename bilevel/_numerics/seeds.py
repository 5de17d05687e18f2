"""Seeds that torch takes, from products of seeds with numbers of steps."""

from __future__ import annotations


def within_64_bits(seed: int) -> int:
    """The seed itself where `manual_seed` takes it, else its remainder by 2^63, of either sign.

    A seed such as a date, 20261128, times a million twice, is longer. Since the factors are odd, seeds of 63 bits that
    differ stay different.

    Example:
        >>> within_64_bits(-3), within_64_bits(2**64 + 5)
        (-3, 5)
    """
    return seed if -(2**63) <= seed < 2**64 else seed % 2**63
