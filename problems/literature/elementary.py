"""The exponential function of whatever statements are evaluated at."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor

Number = TypeVar("Number", bound=Any)


def exp(t: Number) -> Number:
    """Of a tensor, or of complex numbers, by numpy."""
    if isinstance(t, Tensor):
        return t.exp()
    import numpy as np

    with np.errstate(over="ignore"):  # infinite: a step too far, which is taken back
        found: Number = np.exp(t)
    return found
