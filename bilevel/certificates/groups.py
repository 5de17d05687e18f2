"""Certificates of the group lasso: on its active groups the term is smooth, and so is the problem."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel._calculus import Exact, outer_gradients
from bilevel._flat import FlatProblem
from bilevel._linear import AbstractLinearSolver
from bilevel._numerics.rows import safe_row_norms
from bilevel._problem import BilevelProblem
from bilevel._tree import Tree, ravel
from bilevel.certificates.certificate import Certificate, Constants
from bilevel.certificates.certify_flat import certify_flat, distance, nothing
from bilevel.certificates.measured import ROUNDING
from bilevel.inner_problems.flat_term import FlatTerm
from bilevel.prox.group_lasso import GroupLasso
from bilevel.prox.structured import norms_of

_TWIST = 2 / math.sqrt(3)  # times 1 / r^2 is the Lipschitz constant of the second derivative of |y| where |y| >= r
_NO_MARGIN = "the margin of the support, by which |grad g| on a group that is zero is below its weight, is not above"


def group_lasso_at(term: FlatTerm, x: Tensor) -> GroupLasso | None:
    """The term at x, with a graph to x, where it is a group lasso of one problem; else None."""
    found: list[Any] = []

    def one(_: Tree, y: Tensor, *data: Any) -> Tensor:
        found.append(term.at(_, *data))
        return y.sum()

    if term.problem.tasks is not None:
        return None
    term.problem.map(one, "g", x, x.new_zeros(()))
    return found[0] if isinstance(found[0], GroupLasso) else None


def certify_groups(
    problem: FlatProblem,
    term: FlatTerm,
    x: Tensor,
    z: Tensor,
    y: Tensor,
    known: Constants,
    linear: AbstractLinearSolver,
) -> Certificate | str:
    """A bound on |z - h(x)| for y*(x) = argmin_y g + sum_g w_g(x) |y_g|, or why there is none.

    The entries of the active groups, y_g != 0, are a subspace on which F = g + sum_g w_g |y_g| is smooth wherever
    |y_g| >= r_g / 2, r_g = |y_g| at y: a ball of radius min r_g / 2. There second derivatives of F have the Lipschitz
    constants

        M_yy + max_g w_g 2 / (sqrt(3) (r_g / 2)^2),     M_xy + |dw/dx| max_g 2 / r_g,

    and the theorems of smooth problems bound the error d of y from the stationary point of F on the subspace, and that
    of the hypergradient. That point is y* if |grad_g g| + L d < w_g for every other group, which the margin of the
    support is; and d has to be within the ball. g has to be convex in y.

    Args:
        problem: in vectors, without tasks.
        term: h.
        x: `(p,)`.
        z: the estimate.
        y: `(q,)`, an image of the proximal map.
        known: constants of f and g, complete but for mu.
        linear: for the linear system.
    """
    assert known.L is not None and known.C_G is not None and known.M_yy is not None and known.M_xy is not None
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        lasso = group_lasso_at(term, leaf)
        assert lasso is not None
        labels, count = lasso.labels(problem.y)
        graph = torch.as_tensor(lasso.weight, dtype=y.dtype, device=y.device).expand(count)
    weights, sizes = graph.detach(), norms_of(y, labels, count)
    active = (sizes > 0) | (weights == 0)
    if not bool((weights >= 0).all()):
        return "a weight of the group lasso is negative."
    gradient = Exact().linearize(problem, x, y).gradient
    slack = weights - norms_of(gradient, labels, count)
    eps = ROUNDING * torch.finfo(y.dtype).eps
    rounded = eps * float(known.L * safe_row_norms(y) + safe_row_norms(gradient))
    if not bool(active.any()):
        if not bool((slack > rounded).all()):
            return f"{_NO_MARGIN} {rounded:.3g}: move x away from a kink of y*(x)."
        fx = outer_gradients(problem, x, y)[1]
        terms = {"estimate": distance(z, fx), "rounding": eps * float(safe_row_norms(fx))}
        proven, none = not known.heuristic, nothing(problem, z, known, "manifold")  # y* = 0, and stays there
        return replace(none, bound=sum(terms.values()), terms=terms, proven=proven, distance=0.0, reason="")
    kinked = active & (weights > 0)
    radius = float(sizes[kinked].min()) / 2 if bool(kinked.any()) else math.inf
    bends = float((weights[kinked] / (sizes[kinked] / 2)).max()) if bool(kinked.any()) else 0.0
    twists = _TWIST * float((weights[kinked] / (sizes[kinked] / 2).square()).max()) if bool(kinked.any()) else 0.0
    slopes = _norm(graph[active], leaf)
    on = active[labels].nonzero().squeeze(-1)
    own, structure = problem.problem, problem.y

    def embedded(u: Tensor) -> Tree:
        return structure.unravel(y.new_zeros(len(labels)).index_copy(0, on, u))

    def f(x: Tree, u: Tensor, *data: Any) -> Tensor:
        found: Tensor = own.f(x, embedded(u), *data)
        return found

    def g(x: Tree, u: Tensor, *data: Any) -> Tensor:
        there = embedded(u)
        found: Tensor = own.g(x, there, *data) + term.at(x, *data).value(there)
        return found

    restricted = FlatProblem(
        BilevelProblem(f, g, encode=own.encode), problem.x, ravel(y[on])[1], problem.data, problem.tally
    )
    constants = replace(
        known,
        L=known.L + bends,
        M_yy=known.M_yy + twists,
        M_xy=known.M_xy + (slopes / radius if slopes else 0.0),
        C_G=known.C_G + slopes,
        radius=min(known.radius, radius),
    )
    found = certify_flat(restricted, x, z, y[on], None, constants, linear)
    if not math.isfinite(found.bound):
        return found.reason
    if not found.distance <= radius:
        far = f"y may be {found.distance:.3g} from y*, and a group may vanish within {2 * radius:.3g}"
        return f"{far}: solve the inner problem more accurately."
    top = known.L + (known.M_yy * found.distance if "L" in known.local else 0.0)
    drift = top * found.distance + rounded
    if not bool((slack > drift)[~active].all()):
        return (
            f"{_NO_MARGIN} {drift:.3g}: solve the inner problem more accurately, or move x away from a kink of y*(x)."
        )
    return replace(found, theorem="manifold")


def _norm(weights: Tensor, x: Tensor) -> float:
    """A bound on |dw/dx|, the root of the sum of squares; one product for each weight of its own."""
    if not weights.requires_grad:
        return 0.0
    rows = [torch.autograd.grad(w, x, retain_graph=True, allow_unused=True)[0] for w in weights]
    return math.hypot(*(float(torch.linalg.vector_norm(row)) for row in rows if row is not None))
