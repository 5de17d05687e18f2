"""Whatever is `successful` is right: problems, estimators, entry points and settings drawn without mercy.

`DOUBT_CASES=20000 pytest tests/test_doubt.py` draws that many; a few hundred are drawn by default.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from doubt import CASES, Case
from hypothesis import HealthCheck, Phase, assume, event, given, settings, strategies as st

from bilevel import (
    AID,
    ESJ,
    ITD,
    KKT,
    BilevelError,
    Certified,
    Checkpointed,
    Estimate,
    FiniteDifference,
    FiniteDifferences,
    FirstOrder,
    Forward,
    Penalty,
    estimators,
    hypergradient,
    hyperobjective,
    minimize,
)
from bilevel.solvers import (
    CG,
    GMRES,
    LBFGS,
    MINRES,
    Dense,
    GradientDescent,
    HeavyBall,
    Iterate,
    Nesterov,
    Neumann,
    Newton,
    OwnSteps,
    ProximalGradient,
    QuadraticProgram,
)

COUNT = int(os.environ.get("DOUBT_CASES", "250"))
BIASED = {"itd-truncated", "one-step", "first-order", "aid-nystrom", "network"}  # by construction, and named so
SLOW = {"itd", "itd-forward", "itd-checkpointed", "auto"}  # tens of thousands of steps where conditions are bad
EXACT_NAMES = [*sorted(set(estimators()) - BIASED), "auto"]
# What a success states: 1 % for what is unrolled, sampled, penalized or differenced, and a tenth of it for the implicit
# ones, beside what their own tolerances allow.
IMPLICIT, OTHERS = 1e-3, 2e-2


def inner_solvers() -> st.SearchStrategy[Any]:
    tols = st.sampled_from([1e-12, 1e-8, 1e-4, 1e-2])
    steps = st.sampled_from([1, 3, 10, 100, 1000])
    descents = st.sampled_from(
        [GradientDescent(), GradientDescent(0.1), GradientDescent(1.0), HeavyBall(0.1, 0.5), Nesterov(0.1)]
    )
    return st.one_of(
        st.builds(LBFGS, tol=tols, max_steps=st.sampled_from([2, 20, 1000])),
        st.builds(Newton, tol=tols),
        st.builds(lambda o, n, t: Iterate(o, max_steps=n, tol=t), descents, steps, tols),
        st.builds(lambda t: ProximalGradient(tol=t), tols),
        st.builds(lambda: QuadraticProgram()),
        st.builds(OwnSteps),
    )


def linear_solvers() -> st.SearchStrategy[Any]:
    rtols = st.sampled_from([1e-12, 1e-6, 1e-3])
    return st.one_of(
        st.builds(CG, rtol=rtols),
        st.builds(MINRES, rtol=rtols),
        st.builds(GMRES, rtol=rtols),
        st.builds(Dense),
        st.builds(lambda r, n: Neumann(step=None, terms=n, rtol=r), rtols, st.sampled_from([5, 100, 5000])),
    )


def unrollable() -> st.SearchStrategy[Any]:
    return inner_solvers().filter(lambda s: isinstance(s, Iterate | ProximalGradient | OwnSteps))


def certified(inner: Any, linear: Any, error: float) -> Certified:
    return Certified(AID(inner, linear), relative_error=error)


def sampled(inner: Any, radius: float) -> ESJ:
    return ESJ(inner, directions=40, radius=radius, distribution="gaussian")  # enough for a standard error


RADII, STEPS = st.sampled_from([1e-16, 1e-9, 1e-4, 1e-2, 1.0]), st.sampled_from([None, 1e-16, 1e-9, 1e-4, 1e-2])
WEIGHTS = st.sampled_from([1.0, 1e2, 1e4, 1e8, 1e12])
ESTIMATORS: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(EXACT_NAMES),
    st.sampled_from(EXACT_NAMES),
    st.builds(AID, inner_solvers(), linear_solvers()),
    st.builds(AID, inner_solvers(), linear_solvers(), products=st.just(FiniteDifferences())),
    st.builds(certified, inner_solvers(), linear_solvers(), st.sampled_from([0.1, 1e-3])),
    st.builds(KKT, inner_solvers()),
    st.builds(ITD, unrollable(), st.sampled_from([Checkpointed(), Forward()])),
    st.builds(ITD, unrollable()),
    st.builds(sampled, inner_solvers(), RADII),
    st.builds(Penalty, inner_solvers(), WEIGHTS, st.booleans()),
    st.builds(FiniteDifference, inner_solvers(), STEPS),
    st.builds(FirstOrder, inner_solvers()),
)


def by_hypergradient(case: Case, estimator: Any) -> tuple[torch.Tensor, Estimate]:
    return case.x, hypergradient(case.problem, case.x, case.y0, estimator=estimator, throw=False)


def by_second_call(case: Case, estimator: Any) -> tuple[torch.Tensor, Estimate]:
    phi = hyperobjective(case.problem, case.y0, estimator=estimator, throw=False)
    for _ in range(2):
        phi(case.x)
    assert phi.last is not None
    return case.x, phi.last


def by_minimize(case: Case, estimator: Any) -> tuple[torch.Tensor, Estimate]:
    outer = GradientDescent(1e-2 / max(case.size(case.x.double()), 1e-300))
    found = minimize(case.problem, case.x, case.y0, estimator=estimator, outer=outer, max_steps=2, throw=False)
    return found.x, replace(found.estimate, status=found.status)  # of the whole run


ENTRIES: st.SearchStrategy[Callable[[Case, Any], tuple[torch.Tensor, Estimate]]] = st.sampled_from(
    [by_hypergradient, by_hypergradient, by_second_call, by_minimize]
)


def stated(case: Case, estimator: Any, found: Estimate, x: torch.Tensor) -> float:
    """How far from the truth a success may be, in the unit of the terms that the hypergradient is made of."""
    name = estimator if isinstance(estimator, str) else type(estimator).__name__
    implicit = name.startswith(("aid", "implicit", "kkt", "AID", "KKT", "Certified"))
    allowed = IMPLICIT if implicit else OTHERS
    if x.dtype == torch.float32:
        allowed = max(allowed, 1e-2)
    if name == "auto":
        allowed = 2e-2
    if not isinstance(estimator, str):  # its own tolerances are its statement
        left = sum(report.residual for report in found.reports if report.part in ("inner solver", "linear solver"))
        allowed += 10 * left / case.mu / max(case.size(x.double()), 1e-300)
    if isinstance(estimator, Certified):
        allowed += float(found.bound or 0.0) / max(case.size(x.double()), 1e-300)
    return allowed


def doubted(case: Case, estimator: Any, entry: Callable[[Case, Any], tuple[torch.Tensor, Estimate]]) -> str:
    """What came of it: "refused", "failed" or "right"."""
    try:
        x, found = entry(case, estimator)
    except (ValueError, NotImplementedError, BilevelError, TypeError):
        return "refused"
    if not found.status.ok:
        assert found.message or entry is by_minimize
        return "failed"
    if case.steps is not None and not _takes(estimator, case.steps):
        return "other steps"  # whose truth is another one
    assert not case.zero, f"a structural zero was successful: {case}, {estimator}"
    truth = case.stationary if case.truth is None and _tolerates_indefinite(estimator) else case.truth
    assert truth is not None, f"there is nothing to be found: {case}, {estimator} gave {found.grad}"
    at = x.double()
    off = float((found.grad.double() - truth(at)).norm())
    size = case.size(at)
    allowed = stated(case, estimator, found, at if x.dtype == torch.float64 else x)
    extra = 5 * (found.standard_error or 0.0) + 5 * (found.bias or 0.0)
    assert off <= allowed * size + extra, (
        f"{off / size:.3g} of its terms off, {allowed:.3g} allowed: {case}, {estimator}, {entry.__name__}: {found}"
    )
    return "right"


def _tolerates_indefinite(estimator: Any) -> bool:
    linear = getattr(estimator, "linear", None)
    return estimator in ("aid-minres", "aid-gmres") or (linear is not None and linear.tolerates_indefinite)


def _takes(estimator: Any, steps: int) -> bool:
    inner = getattr(estimator, "inner", None)
    return isinstance(inner, Iterate) and inner == Iterate(GradientDescent(0.3), max_steps=steps)


@settings(
    max_examples=COUNT,
    derandomize="DOUBT_CASES" not in os.environ,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
@given(CASES, ESTIMATORS, ENTRIES)
def test_whatever_is_successful_is_right(case: Case, estimator: Any, entry: Any) -> None:
    assume(not (1e3 * case.mu < case.L and isinstance(estimator, str) and estimator in SLOW))
    torch.manual_seed(0)
    outcome = doubted(case, estimator, entry)
    event(outcome)
