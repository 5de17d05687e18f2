"""The norms that a certificate is made of, at a point (x, y, v), with their rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._numerics.rows import safe_row_norms
from bilevel.certificates.certificate import Constants

ROUNDING = 8.0  # how many units of rounding a sum of products is granted, times the size of its terms


@final
@dataclass(frozen=True, eq=False)
class Measured:
    """Norms at (x, y, v) in float64, one row a task, as if each task's system were H_i v_i = grad_y f_i.

    Attributes:
        e: |grad_y g|, with its rounding.
        r: |grad_y f - H v|, with its rounding.
        v: |v|.
        h: the implicit gradient grad_x f - G v at this point `(p,)`.
        rounding: a bound on the rounding of h itself.
        curvatures: the least and the largest <v, H v> / |v|^2 over the tasks, where that is known.
        coupling: |G v| / |v|, where that is known; what C_G cannot be less than.
    """

    e: Tensor
    r: Tensor
    v: Tensor
    h: Tensor
    rounding: float
    curvatures: tuple[float, float] | None = None
    coupling: float | None = None


def measured(
    y: Tensor,
    v: Tensor,
    gradient: Tensor,
    residual: Tensor,
    fx: Tensor,
    fy: Tensor,
    gv: Tensor | None,
    known: Constants,
    largest: float = 0.0,
) -> Measured:
    """Norms from what an implicit estimator has at hand anyway: no oracle call.

    The rounding of each is added, as `ROUNDING` units of it times the size of the terms: |H| |y| + |e| for the
    gradient e, |H| |v| + |grad_y f| + L_fyy |y| for the residual, |grad_x f| + L_fxy |y| + |G| |v| for h.

    Args:
        y: `(*tasks, q)`.
        v: alike; the solution of the linear system.
        gradient: grad_y g there.
        residual: grad_y f - H v, or its norms `(*tasks, 1)`.
        fx: grad_x f `(p,)`.
        fy: grad_y f `(*tasks, q)`.
        gv: G v `(p,)`, or None for zero.
        known: the constants, as far as they are.
        largest: the largest curvature that has been seen, in case L is not known.
    """
    rows = y.shape[:-1].numel()  # the mean over tasks put 1 / rows into fy and v
    gv = torch.zeros_like(fx) if gv is None else gv
    eps = ROUNDING * torch.finfo(y.dtype).eps
    size, norm_v, norm_fy = (safe_row_norms(t.double()) for t in (y, v, fy))
    e, r = safe_row_norms(gradient.double()), safe_row_norms(residual.double())
    norm_fx, norm_gv = float(safe_row_norms(fx.double())), float(safe_row_norms(gv.double()))
    L = max(largest, known.L or 0.0)
    e = e + eps * (L * size + e)
    r = rows * (r + eps * (L * norm_v + norm_fy)) + eps * (known.L_fyy or 0.0) * size
    terms = norm_fx + (known.L_fxy or 0.0) * float(size.mean()) + max(norm_gv, (known.C_G or 0.0) * float(norm_v.sum()))
    return Measured(e, r, rows * norm_v, fx - gv, eps * terms)
