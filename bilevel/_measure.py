"""The residuals that a certificate is made of, measured at a point (x, y, v)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import Exact, outer_gradients
from bilevel._flat import FlatProblem
from bilevel._result import Tally
from bilevel._tree import Structure, tree_map

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
        value: f there.
        rounding: a bound on the rounding of h itself.
    """

    e: Tensor
    r: Tensor
    v: Tensor
    h: Tensor
    value: Tensor
    rounding: float


def measure(problem: FlatProblem, x: Tensor, y: Tensor, v: Tensor, largest: float | None) -> Measured:
    """Two gradients, one Hessian product and one cross product; in float64 wherever f and g can be evaluated in it.

    Where they cannot (closures over float32 data), the rounding of each residual is added to it, estimated as some
    units of rounding times the size of its terms.

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
            add(problem.tally, trial)
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


def add(tally: Tally, other: Tally) -> None:
    """Count another tally's calls in this one."""
    for name, count in other.stats().as_dict().items():
        setattr(tally, name, getattr(tally, name) + count)


def _measure(problem: FlatProblem, x: Tensor, y: Tensor, v: Tensor, largest: float | None) -> Measured:
    at = Exact().linearize(problem, x, y)
    value, fx, fy = outer_gradients(problem, x, y)
    hv, gv = at.products(v)
    gv = torch.zeros_like(x) if gv is None else gv
    rows = 1 if y.dim() == 1 else y.shape[0]  # the mean over tasks put 1/rows into fy and v

    def norm(t: Tensor) -> Tensor:
        return torch.linalg.vector_norm(t, dim=-1)

    # What it costs to evaluate in this dtype: the products' terms are at most |H| times the vector, and |H| is at
    # least what was seen of it.
    eps = _ROUNDING * torch.finfo(y.dtype).eps
    seen = (norm(hv) / norm(v).clamp_min(torch.finfo(y.dtype).tiny)).max()
    scale = max(float(seen), 0.0 if largest is None else largest)
    e = norm(at.gradient) + eps * (scale * norm(y) + norm(at.gradient))
    r = rows * (norm(fy - hv) + eps * (scale * norm(v) + norm(fy)))
    rounding = float(eps * (norm(fx) + norm(gv)))
    return Measured(e, r, rows * norm(v), fx - gv, value, rounding)
