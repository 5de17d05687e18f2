"""The exponential function of whatever statements are evaluated at."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def exp(t: Any) -> Any:
    """Of a tensor, or of complex numbers, by numpy."""
    if isinstance(t, Tensor):
        return t.exp()
    import numpy as np

    with np.errstate(over="ignore"):  # infinite: a step too far, which is taken back
        return np.exp(t)
