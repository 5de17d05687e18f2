"""Half precision, in which torch multiplies and adds, and factors no matrix."""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = frozenset({torch.bfloat16, torch.float16})


def widened(tensor: Tensor) -> Tensor:
    """A tensor that torch's linear algebra takes: in float32 where it is in half precision, else as it is.

    What is done with it is then more accurate than its entries are: thresholds for their rounding are those of the
    dtype that they had.
    """
    return tensor.float() if tensor.dtype in _HALF else tensor
