"""Which linear system an implicit estimator solves in the place of H v = grad_y f, and how far that is from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel._calculus import Linearization
from bilevel._numerics.rows import safe_row_norms
from bilevel._result import Solved, Substitute
from bilevel.hypergrad.abstract_implicit import AbstractImplicit


def substituted(estimator: AbstractImplicit, at: Linearization, b: Tensor, system: Solved) -> Substitute | None:
    """What was solved instead of H v = b, with |b - H v| / |b| at the v that was found; None: H v = b itself was.

    With products that stand for others the residual is measured by an exact one, which came with the last product. With
    damping rho it is at most |b - (H + rho I) v| + rho |v|, which is what is given: no product more.

    Args:
        estimator: the estimator, with its products, damping and linear solver.
        at: the optimality condition to first order.
        b: the right-hand side.
        system: the solution v.
    """
    solver, products = estimator.linear, estimator.products
    parts = [products.stands_in] if products.stands_in else []
    parts += [f"damping {estimator.damping:.3g}"] if estimator.damping else []
    parts += [f"`{type(solver).__name__}`"] if solver.is_approximate else []
    if not parts:
        return None
    v = system.value
    if not products.stands_in:
        left = system.residual + estimator.damping * safe_row_norms(v)
    elif at.exact is not None and v.shape == b.shape:
        left = safe_row_norms(b - at.exact(v))
    else:
        left = torch.full_like(system.residual, math.nan)
    size = safe_row_norms(b)
    shares = torch.where((left == 0) & (size == 0), torch.zeros_like(left), left / size)
    return Substitute(", ".join(parts), float(shares.max()), system.concave)
