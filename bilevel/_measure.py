"""The residuals that a certificate is made of, measured at a point (x, y, v)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import Exact, outer_gradients
from bilevel._flat import FlatProblem
from bilevel._result import Tally
from bilevel._tree import Structure, row_norms, tree_map

_ROUNDING = 8.0  # how many units of rounding a sum of products is granted, times its largest term


@final
@dataclass(frozen=True, eq=False)
class Measured:
    """Norms at (x, y, v), one row a task, as if each task's system were H_i v_i = grad_y f_i.

    Attributes:
        e: |grad_y g|, with its rounding.
        r: |grad_y f - H v|, with its rounding.
        v: |v|.
        h: the implicit gradient grad_x f - G v at this point `(p,)`.
        rounding: a bound on the rounding of h itself.
    """

    e: Tensor
    r: Tensor
    v: Tensor
    h: Tensor
    rounding: float


def measured(
    y: Tensor, v: Tensor, gradient: Tensor, residual: Tensor, fx: Tensor, fy: Tensor, gv: Tensor | None, largest: float
) -> Measured:
    """Norms from what an implicit estimator has at hand anyway: no oracle call.

    The rounding of each is added: some units of it times the size of the terms, |H| |y| for the gradient and |H| |v|
    for the residual, with `largest` for |H|.

    Args:
        y: `(*tasks, q)`.
        v: alike; the solution of the linear system.
        gradient: grad_y g there.
        residual: grad_y f - H v.
        fx: grad_x f `(p,)`.
        fy: grad_y f `(*tasks, q)`.
        gv: G v `(p,)`, or None for zero.
        largest: the largest curvature L, or what has been seen of it.
    """
    rows = 1 if y.dim() == 1 else y.shape[0]  # the mean over tasks put 1 / rows into fy and v
    gv = torch.zeros_like(fx) if gv is None else gv
    eps = _ROUNDING * torch.finfo(y.dtype).eps
    e, norm_v = row_norms(gradient), row_norms(v)
    e = e + eps * (largest * row_norms(y) + e)
    r = rows * (row_norms(residual) + eps * (largest * norm_v + row_norms(fy)))
    return Measured(e, r, rows * norm_v, fx - gv, float(eps * (row_norms(fx) + row_norms(gv))))


def measure(problem: FlatProblem, x: Tensor, y: Tensor, v: Tensor, largest: float | None) -> Measured:
    """Two gradients, one Hessian product and one cross product; in float64 wherever f and g can be evaluated in it.

    Where they cannot (closures over float32 data), the rounding that is granted is that of the dtype.

    Args:
        problem: the problem, at whose tally the calls are counted.
        x: `(p,)`.
        y: `(*tasks, q)`.
        v: alike.
        largest: the largest curvature L, if it is known; for rounding.
    """
    if y.dtype != torch.float64:
        trial = Tally()
        try:
            found = _measure(in_double(problem, trial), x.double(), y.double(), v.double(), largest)
        except RuntimeError as error:
            if "dtype" not in str(error) and "scalar type" not in str(error):
                raise
        else:
            problem.tally.add(trial.stats())
            return found
    return _measure(problem, x, y, v, largest)


def in_double(problem: FlatProblem, tally: Tally) -> FlatProblem:
    """The same problem on float64 vectors and data; what f and g close over is theirs."""

    def double(structure: Structure) -> Structure:
        return Structure(structure.spec, structure.shapes, torch.float64, structure.device)

    def convert(leaf: object) -> object:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.dtype.is_floating_point else leaf

    data = None if problem.data is None else tree_map(convert, problem.data)
    return FlatProblem(problem.problem, double(problem.x), double(problem.y), data, tally)


def _measure(problem: FlatProblem, x: Tensor, y: Tensor, v: Tensor, largest: float | None) -> Measured:
    at = Exact().linearize(problem, x, y)
    _, fx, fy = outer_gradients(problem, x, y)
    hv, gv = at.products(v)
    return measured(y, v, at.gradient, fy - hv, fx, fy, gv, curvature_seen(hv, v, largest))


def curvature_seen(hv: Tensor, v: Tensor, largest: float | None) -> float:
    """L where it is known, and at least what the product H v shows of it."""
    seen = float((row_norms(hv) / row_norms(v).clamp_min(torch.finfo(v.dtype).tiny)).max())
    return max(seen, 0.0 if largest is None else largest)
