"""Trying estimators at doubling budgets until their errors meet a target."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from bilevel._apply import apply_estimator
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._linear import AbstractLinearSolver
from bilevel._result import Tally
from bilevel.certificates.certificate import Constants
from bilevel.certificates.certify_flat import certify_flat
from bilevel.named.auto import Auto, Chosen

_BUDGETS = tuple(2**k for k in range(3, 14))  # oracle calls, doubled until the target is met


def choose(
    wish: Auto,
    problem: FlatProblem,
    x: Tensor,
    y0: Tensor,
    names: Iterable[str],
    build: Callable[[str, int], AbstractEstimator],
    accurate: FlatEstimate,
    linear: Callable[[Tensor], AbstractLinearSolver],
    fallback: AbstractEstimator,
) -> Chosen:
    """Try names at doubling budgets; see `Auto`.

    Args:
        wish: the target.
        problem: the problem.
        x: where it is first met.
        y0: where the inner solvers start.
        names: the candidates.
        build: (name, budget) -> estimator; raises ValueError where the budget is too small.
        accurate: the reference.
        linear: for certificates: y -> a linear solver.
        fallback: what is taken if no candidate meets the target.
    """
    constants = wish.constants
    known = constants(problem.x.unravel(x)) if callable(constants) else constants
    target = max(wish.target_error, wish.relative_error * float(torch.linalg.vector_norm(accurate.grad)))
    best: tuple[int, str, AbstractEstimator, float] | None = None
    tried = refused = 0
    for name in names:
        for budget in _BUDGETS:
            if best is not None and budget > 2 * best[0]:
                break
            try:
                estimator = build(name, budget)
                quiet = problem.with_tally(Tally())
                found = apply_estimator(estimator, quiet, x, FlatStart(y0))
            except (ValueError, NotImplementedError) as reason:
                refused += "budget" not in str(reason)
                if "budget" in str(reason):
                    continue
                break
            tried += 1
            stats = quiet.tally.stats()
            cost = stats.gradients + stats.hvps + stats.cross_products
            error = _error(found, accurate, known, problem, x, linear)
            if error <= target:
                if best is None or cost < best[0]:
                    best = (cost, name, estimator, error)
                break
    kind = "measured" if known is None else "certified"
    if best is None:
        return Chosen(fallback, f"no estimator met the {kind} target {target:.3g} of {tried} tries: taking aid-cg")
    cost, name, estimator, error = best
    return Chosen(
        estimator,
        f"chosen: {name}, whose {kind} error {error:.3g} met the target {target:.3g} for {cost} gradients and products,"
        f" the fewest of {tried} tries ({refused} estimators do not apply)",
    )


def _error(
    found: FlatEstimate,
    accurate: FlatEstimate,
    known: Constants | None,
    problem: FlatProblem,
    x: Tensor,
    linear: Callable[[Tensor], AbstractLinearSolver],
) -> float:
    if not bool(found.grad.isfinite().all()):
        return float("inf")
    if known is None:
        return float(torch.linalg.vector_norm(found.grad - accurate.grad))
    quiet = problem.with_tally(Tally())
    return certify_flat(quiet, x, found.grad, found.y, found.v, known, linear(found.y)).bound
