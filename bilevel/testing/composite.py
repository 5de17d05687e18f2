"""Every property of a composite problem at once: what y*(x) solves, and that all ways to its derivative agree."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel._flat import FlatProblem
from bilevel._problem import BilevelProblem
from bilevel._tree import Tree, ravel
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0
from bilevel.hypergrad.aid import AID
from bilevel.hypergrad.finite_difference import FiniteDifference
from bilevel.inner_problems.kinds import inner_problem
from bilevel.inner_problems.proximal_fixed_point import ProximalFixedPoint
from bilevel.solvers.cg import CG
from bilevel.solvers.dense import Dense
from bilevel.solvers.fista import FISTA
from bilevel.testing.properties import close, estimate

_STEPS = (0.01, 0.3, 1.0)


@checked(tol=AT_LEAST_0)
def check_composite(problem: BilevelProblem, x: Tree, y0: Tree, *, tol: float = 1e-5) -> None:
    """Assert that y*(x) = argmin_y g(x, y) + h_x(y) is found, and differentiated rightly, at a point off kinks.

    y solves y = prox_{t h}(y - t grad_y g) at three t; the gradient on the active manifold, by conjugate gradients
    where the term knows the derivative of its map, is that of the fixed point at two steps, by a factorization; and
    both are central differences of Phi. So a term of one's own is tested: its map, the derivative of that in v and in
    x, and its products.

    Args:
        problem: with a `prox`, in float64, small enough for a dense system.
        x: an outer point, no kink of y*(x).
        y0: where the inner solver starts.
        tol: relative, of the gradients; of the differences a hundred times that.

    Raises:
        AssertionError: naming the failed property, what was found and what was expected.
        ValueError: if there is no `prox`.

    Example:
        >>> from bilevel.prox import L1
        >>> a = torch.tensor([3.0, 0.5], dtype=torch.float64)
        >>> problem = BilevelProblem(
        ...     lambda x, y: y.square().sum(),
        ...     lambda x, y: (y - a).square().sum() / 2,
        ...     prox=lambda x: L1(x),
        ... )
        >>> check_composite(problem, torch.tensor(1.0, dtype=torch.float64), torch.zeros_like(a))
    """
    kind = inner_problem(problem)
    x_vector, x_structure = ravel(x)
    y_vector, y_structure = ravel(y0)
    flat = FlatProblem(problem, x_structure, y_structure)
    term = kind.term(flat)
    if term is None or kind.g is None:
        raise ValueError("`check_composite(problem)` must have a `prox=`. Got none. See `check_problem` for others.")
    solver = FISTA(tol=1e-12, max_steps=100_000)
    known = term.derivative(x_vector, y_vector, 1.0) is not None
    found = estimate(AID(solver, CG(1e-12) if known else Dense()), problem, x, y0)
    if found.status.lost:
        raise ValueError(
            f"`check_composite(problem=..., x=..., y0=...)` must be where AID finds a number. Got {found.status.name}."
        )
    y = ravel(found.y)[0]
    objective = kind.objective(flat, x_vector.detach(), None)
    gradient = objective.gradient(y)
    for t in _STEPS:
        moved = _mapped(objective.prox, y - t * gradient, t)
        close(f"y = prox(y - t grad g) at t = {t:g}", moved, y, 1e-9 * max(t, 1.0))
    L = float(objective.largest_curvature(y))
    for share in (0.5, 1.5):
        fixed = BilevelProblem(problem.f, inner=ProximalFixedPoint(kind.g, term.function, share / L))
        other = estimate(AID(solver, Dense()), fixed, x, y0)
        close(f"as a fixed point with t = {share:g} / L", other.grad, found.grad, tol, " That is on the manifold.")
    differences = estimate(FiniteDifference(solver, step=1e-6), problem, x, y0)
    close("central differences of Phi", found.grad, differences.grad, 100 * tol, " Expected are the differences.")


def _mapped(prox: Callable[..., Tensor] | None, v: Tensor, t: float) -> Tensor:
    assert prox is not None
    with torch.no_grad():
        return prox(v, t)
