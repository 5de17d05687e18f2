"""Trying estimators at doubling budgets until their errors meet a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from bilevel._apply import apply_estimator
from bilevel._calculus import Exact
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._numerics.misfits import called
from bilevel._numerics.rows import safe_row_norms
from bilevel._problem import Split
from bilevel._result import BilevelError, Status, Tally
from bilevel.certificates.applies import no_certificate
from bilevel.certificates.certificate import Constants
from bilevel.certificates.certify_flat import certify_flat
from bilevel.inner_problems.kinds import inner_problem
from bilevel.named.auto import Auto, Chosen
from bilevel.named.implicit import IMPLICIT, implicit_name
from bilevel.named.reference import Reference, reference
from bilevel.named.setting import BudgetError, Setting
from bilevel.requirements.properties import Feature, Property
from bilevel.solvers.cg import accurate_cg

# Oracle calls, doubled until the target is met, so that all tries of a name cost at most twice the last one: from less
# than anything useful takes to more than accurate defaults take on problems that are well posed.
_BUDGETS = tuple(2**k for k in range(3, 14))
_DIFFERENCES = "finite-difference"  # all the same what to take where derivatives of g are of no use
_PASSED_OVER = {
    _DIFFERENCES: "an oracle for tests",
    "itd-checkpointed": "the number of itd for more calls",
    "aid-gmres": "the number of aid-minres for the same calls and more memory, as the inner Hessian is symmetric",
    "first-order": "an error that no budget makes smaller",
    "network": "an error that damping leaves, and y that is not solved for",
    "kkt": "for constraints, where nothing is chosen",
    IMPLICIT: "another name of one that is tried",
}
_DENSE = 500  # y: beyond, a dense Hessian costs more products than the largest useful budgets
_FORWARD = 50  # x: beyond, forward mode takes more products a step than reverse mode takes for the whole gradient


def choose(wish: Auto, s: Setting, names: Sequence[str], build: Callable[[str, Setting], AbstractEstimator]) -> Chosen:
    """Try names at doubling budgets; see `Auto`.

    Args:
        wish: the target.
        s: the problem where it is first met.
        names: of all estimators.
        build: (name, setting) -> estimator.

    Raises:
        ValueError: if the problem is not one on which estimators can take each other's place.
    """
    _demand_choice(wish, s)
    constants = wish.constants
    known = called("constants(x)", constants, s.problem.x.unravel(s.x)) if callable(constants) else constants
    measured = _reference(s)
    if measured.wrong:
        why = f"taking {_DIFFERENCES}, as {measured.wrong}, which budgets of steps do not show"
        return Chosen(build(_DIFFERENCES, s), why)
    accurate = measured.estimate
    target = max(wish.target_error, wish.relative_error * float(safe_row_norms(accurate.grad)))
    best: tuple[int, str, AbstractEstimator, float] | None = None
    tried = refused = 0
    for name in _candidates(names, s):
        for budget in _BUDGETS:
            if best is not None and budget > 2 * best[0]:  # what it would spend is more than what was found spends
                break
            quiet = s.problem.with_tally(Tally())
            try:
                estimator = build(name, replace(s, budget=budget))
                found = apply_estimator(estimator, quiet, s.x, FlatStart(s.y0))
            except BudgetError:
                continue
            except (ValueError, NotImplementedError):
                refused += 1
                break
            tried += 1
            stats = quiet.tally.stats()
            cost = stats.gradients + stats.hvps + stats.cross_products
            error = _error(found, accurate, known, s.problem, s.x)
            if not Status.worst(report.status for report in found.reports).ok:
                error = float("inf")  # it would be refused wherever it is used
            if error <= target:
                if best is None or cost < best[0]:
                    best = (cost, name, estimator, error)
                break
    kind = "measured" if known is None else "certified"
    if best is None:
        fallback = _fallback(s)
        why = f"no estimator met the {kind} target {target:.3g} of {tried} tries: taking {fallback}"
        return Chosen(build(fallback, s), why)
    cost, name, estimator, error = best
    estimator, how = _with_programs(estimator, s) if wish.compile else (estimator, "")
    return Chosen(
        estimator,
        f"chosen: {name}, whose {kind} error {error:.3g} met the target {target:.3g} for {cost} gradients and products,"
        f" the fewest of {tried} tries ({refused} estimators do not apply){how}",
    )


def _with_programs(estimator: AbstractEstimator, s: Setting) -> tuple[AbstractEstimator, str]:
    """The estimator, its products compiled where that makes them faster, and what was done, in words."""
    from bilevel.hypergrad.aid import AID
    from bilevel.hypergrad.compiled_products import CompiledProducts
    from bilevel.hypergrad.product_costs import work_of

    if not isinstance(estimator, AID) or not isinstance(estimator.products, Exact):
        return estimator, "; it forms no products that could be compiled"
    problem = s.problem
    apart = problem.across is not None or problem.tasks_over is not None or isinstance(problem.data, Split)
    if apart or problem.known is not None or s.x.device.type != "cpu":
        return estimator, "; its products are not compiled: g's own formulas, data apart, ranks or the device forbid it"
    quiet = problem.with_tally(Tally())
    work = work_of(quiet, s.x, problem.start(s.x, s.y0).detach())
    told = f"{work.entries} entries in {work.calls} operations"
    if not work.is_small:
        return estimator, f"; its products are not compiled: of {told}, that is no faster"
    return replace(estimator, products=CompiledProducts()), f"; its products are compiled: of {told}, that is faster"


def _reference(s: Setting) -> Reference:
    """What errors are measured against.

    Raises:
        ValueError: if there is nothing to measure them against.
    """
    try:
        return reference(s)
    except BilevelError as error:
        raise ValueError(f"`Auto` does not apply: {error}") from error


def _demand_choice(wish: Auto, s: Setting) -> None:
    problem = s.problem.problem
    if problem.init is not None:
        raise ValueError(
            "`Auto` does not apply to a problem with `init`: how many inner steps are taken is then part of the"
            " problem. Name the estimator, e.g. `ITD(Iterate(GradientDescent(0.1), max_steps=5))`."
        )
    if {
        Feature.constraints,
        Feature.nonlinear_constraints,
        Feature.many_constraints,
        Feature.cones,
    } & s.features:
        raise ValueError("`Auto` does not apply to a problem with constraints on y. Name the estimator: 'kkt'.")
    if wish.constants is not None and (why := no_certificate(problem)):
        raise ValueError(
            f"`Auto(constants=...)` does not apply: it certifies, and {why} Leave the constants out: errors are then"
            f" measured."
        )


def _fallback(s: Setting) -> str:
    """The most accurate name that applies: an iteration has no condition to differentiate implicitly."""
    kind = inner_problem(s.problem.problem)
    if kind.implicit or {Property.stationary, Property.smooth} <= kind.offers:
        return implicit_name(s.problem, s.x, s.y0)
    return "itd" if Property.steps in kind.offers else "finite-difference"


def _candidates(names: Sequence[str], s: Setting) -> list[str]:
    without = set(_PASSED_OVER)
    if s.y0.shape[-1] > _DENSE:
        without.add("aid-dense")
    if s.x.shape[-1] > _FORWARD:
        without.add("itd-forward")
    return [name for name in names if name not in without]


def _error(
    found: FlatEstimate, accurate: FlatEstimate, known: Constants | None, problem: FlatProblem, x: Tensor
) -> float:
    if not bool(found.grad.isfinite().all()):
        return float("inf")
    if known is None:
        return float(safe_row_norms(found.grad - accurate.grad))
    quiet = problem.with_tally(Tally())
    return certify_flat(quiet, x, found.grad, found.y, found.v, known, accurate_cg(found.y)).bound
