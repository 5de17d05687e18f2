"""What an augmented Lagrangian makes of the values of constraints, and beside what it can stand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel._problem import Split
from bilevel.algorithms.augmented_f import Lagrange
from bilevel.algorithms.oracle import AbstractData, is_fixed
from bilevel.algorithms.outer_constraints import OuterConstraints

FAILED = 2  # rounds in a row in which the violation did not fall, although the weight rose tenfold
STATIONARY = 1e-3  # of a gradient of the violation, in terms of it


def demand_steady(data: AbstractData | Split, accuracy: str | None) -> None:
    """Refuse what constraints on x cannot stand beside them.

    Raises:
        ValueError: naming it, and what to do.
    """
    if not is_fixed(data):
        raise ValueError(
            "`minimize(outer_inequalities=..., outer_equalities=...)` needs the same data at every step: multipliers"
            " that follow the violations of single batches converge to nothing. Pass all samples as one batch."
        )
    if accuracy not in (None, "fixed"):
        raise ValueError(
            "`minimize(accuracy='adaptive')` certifies by constants of f, and with `outer_inequalities` or"
            " `outer_equalities` it is an augmented Lagrangian that is minimized. Leave out `accuracy`."
        )


def conditions(c: Tensor, e: Tensor, at: Lagrange) -> tuple[Tensor, Tensor, float, OuterConstraints]:
    """lambda+ and nu+, max(c, -lambda / w, |e|), and what is recorded."""
    w, multipliers = at.weight, at.inequalities
    raised, shifted = (multipliers + w * c).clamp_min(0), at.equalities + w * e
    gap = max(largest(torch.maximum(c, -multipliers / w).abs()) if w else math.inf, largest(e.abs()))
    told = OuterConstraints(
        max(largest(c.clamp_min(0)), largest(e.abs())),
        largest(torch.minimum(-c, raised).abs()),
        w,
        tuple(raised.flatten().tolist()),
        tuple(shifted.flatten().tolist()),
    )
    return raised, shifted, gap, told


def first_weight(value: float, c: Tensor, e: Tensor) -> float:
    """10 max(1, |f|) / max(1, |(max(c, 0), e)|^2 / 2), within [1e-6, 10]."""
    square = float(c.clamp_min(0).square().sum() + e.square().sum()) / 2
    w = 10 * max(1.0, abs(value)) / max(1.0, square)
    return min(max(w, 1e-6), 10.0) if math.isfinite(w) else 10.0


def largest(values: Tensor) -> float:
    """The largest entry; 0 where there is none."""
    return float(values.max()) if values.numel() else 0.0
