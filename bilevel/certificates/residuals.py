"""The residuals that a certificate is made of, measured at a point (x, y, v)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import Exact, outer_gradients
from bilevel._flat import FlatProblem
from bilevel._tree import row_dots, row_norms
from bilevel.certificates.certificate import Constants

ROUNDING = 8.0  # how many units of rounding a sum of products is granted, times the size of its terms


class SinglePrecisionError(RuntimeError):
    """f or g computes in a lower precision than its arguments have."""


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
    size, norm_v, norm_fy = (row_norms(t.double()) for t in (y, v, fy))
    e, r = row_norms(gradient.double()), row_norms(residual.double())
    norm_fx, norm_gv = float(row_norms(fx.double())), float(row_norms(gv.double()))
    L = max(largest, known.L or 0.0)
    e = e + eps * (L * size + e)
    r = rows * (r + eps * (L * norm_v + norm_fy)) + eps * (known.L_fyy or 0.0) * size
    terms = norm_fx + (known.L_fxy or 0.0) * float(size.mean()) + max(norm_gv, (known.C_G or 0.0) * float(norm_v.sum()))
    return Measured(e, r, rows * norm_v, fx - gv, eps * terms)


def measure(
    problem: FlatProblem, x: Tensor, y: Tensor, v: Tensor, known: Constants, suspicious: bool = False
) -> Measured:
    """Two gradients, one Hessian product and one cross product, in the dtype of y.

    Args:
        problem: the problem, at whose tally the calls are counted.
        x: `(p,)`.
        y: `(*tasks, q)`.
        v: alike.
        known: the constants, as far as they are; for rounding.
        suspicious: whether f and g were written for another dtype than that of y.

    Raises:
        SinglePrecisionError: if they are, and computed in float32 inside.
    """
    at = Exact().linearize(problem, x, y)
    value, fx, fy = outer_gradients(problem, x, y)
    hv, gv = at.products(v)
    if suspicious and (_single(at.gradient, hv) or _single(value, fx, fy)) and _single_inside(problem, x, y):
        raise SinglePrecisionError
    squares = row_dots(v, v).double().clamp_min(torch.finfo(torch.float64).tiny)
    seen = row_dots(v, hv).double() / squares
    largest = float((row_norms(hv.double()) / squares.sqrt()).max())
    found = measured(y, v, at.gradient, fy - hv, fx, fy, gv, known, largest)
    if not bool((v != 0).any(-1).all()):
        return found
    coupling = 0.0 if gv is None else float(row_norms(gv.double()) / squares.sqrt().sum())
    curvatures = (float(seen.min()), float(seen.max()))
    return Measured(found.e, found.r, found.v, found.h, found.rounding, curvatures, coupling)


def _single_inside(problem: FlatProblem, x: Tensor, y: Tensor) -> bool:
    """Whether f or g computes in float32: its values fit into it at a point at which those of float64 do not."""
    x, y = (t + 1e-3 * torch.sin(1.0 + torch.arange(t.numel()).to(t)).reshape(t.shape) for t in (x, y))
    at = Exact().linearize(problem, x, y)
    value, fx, fy = outer_gradients(problem, x, y)
    products = at.products(torch.cos(1.0 + torch.arange(y.numel()).to(y)).reshape(y.shape))
    return _single(at.gradient, products[0]) or _single(value, fx, fy)


def _single(*tensors: Tensor) -> bool:
    """Whether float32 holds all of these exactly: then they were computed in it, or are so simple that it may be."""
    return any(bool(t.any()) for t in tensors) and all(torch.equal(t, t.float().double()) for t in tensors)
