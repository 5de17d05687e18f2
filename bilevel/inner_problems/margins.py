"""How far y*(x) is from a kink: when that is reported, and how."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel._result import Report, Status


def kink_report(part: str, margins: Tensor, least: float) -> Report:
    """How far y*(x) is from a kink, `(*batch,)`, in words."""
    statuses = tuple(
        Status.nonfinite if margin != margin else Status.successful if margin > least else Status.weakly_active
        for margin in margins.reshape(-1).tolist()
    )
    return Report(part, Status.worst(statuses), float(margins.min()), 0, statuses if margins.dim() else ())


def default_margin(like: Tensor) -> float:
    """The relative distance from a kink that rounding and the tolerances of solvers leave uncertain."""
    return 1e-10 if like.dtype == torch.float64 else 1e-6
