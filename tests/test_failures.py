"""What does not converge, diverges or does not apply is reported, with what was computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bilevel import (
    AID,
    ESJ,
    ITD,
    BilevelError,
    BilevelProblem,
    FiniteDifference,
    Penalty,
    Status,
    hypergradient,
)
from bilevel.problems.quadratic import quadratic
from bilevel.solvers.cg import CG
from bilevel.solvers.dense import Dense
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.heavy_ball import HeavyBall
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.minres import MINRES
from bilevel.solvers.neumann import Neumann
from bilevel.solvers.scipy_inner import Scipy

INSTANCE = quadratic(p=3, q=5, kappa=10.0)  # L = 10
X = torch.tensor([0.5, -1.0, 2.0])
ON_INNER: dict[str, Any] = {
    "aid": lambda inner: AID(inner, CG(1e-10)),
    "itd": lambda inner: ITD(inner),
    "itd-forward": lambda inner: ITD(inner, forward=True),
    "itd-checkpointed": lambda inner: ITD(inner, checkpoint=True),
    "itd-truncated": lambda inner: ITD(inner, truncate=3),
    "esj": lambda inner: ESJ(inner, 3),
    "penalty": lambda inner: Penalty(inner, weight=100.0),
    "finite-difference": lambda inner: FiniteDifference(inner),
}
every = pytest.mark.parametrize("build", ON_INNER.values(), ids=list(ON_INNER))


@every
@pytest.mark.parametrize("tol", [None, 1e-8])
@pytest.mark.parametrize("optimizer", [GradientDescent(0.25), HeavyBall(0.45, 0.5)], ids=["descent", "ball"])
def test_too_large_inner_steps_are_reported_as_divergence(build: Any, tol: float | None, optimizer: Any) -> None:
    estimator = build(Iterate(optimizer, 60, tol=tol))
    found = hypergradient(INSTANCE.problem, X, INSTANCE.y0, estimator=estimator, throw=False)
    assert found.status is Status.diverged
    assert "Lower the step below 2 / L" in found.message


@every
def test_steps_so_large_that_numbers_overflow_are_reported(build: Any) -> None:
    estimator = build(Iterate(GradientDescent(1e3), 200))
    found = hypergradient(INSTANCE.problem, X, INSTANCE.y0, estimator=estimator, throw=False)
    assert found.status is Status.nonfinite


@every
def test_missed_inner_tolerance_raises_with_the_estimate(build: Any) -> None:
    estimator = build(Iterate(GradientDescent(0.05), 7, tol=1e-8))
    found = hypergradient(INSTANCE.problem, X, INSTANCE.y0, estimator=estimator, throw=False)
    assert found.reports[0].part == "inner solver"
    assert found.reports[0].status is Status.max_steps
    assert found.reports[0].steps == 7
    assert found.reports[0].residual > 1e-8
    with pytest.raises(BilevelError, match=r"did not succeed. inner solver: The maximum number of steps") as caught:
        hypergradient(INSTANCE.problem, X, INSTANCE.y0, estimator=estimator)
    assert caught.value.status is found.status
    assert torch.equal(caught.value.partial.grad, found.grad)
    assert torch.equal(caught.value.partial.y, found.y)


@every
def test_steps_without_a_tolerance_are_a_success(build: Any) -> None:
    found = hypergradient(INSTANCE.problem, X, INSTANCE.y0, estimator=build(Iterate(GradientDescent(0.05), 3)))
    assert found.status is Status.successful


@pytest.mark.parametrize(
    ("linear", "status"),
    [
        (CG(1e-10, max_steps=2), Status.max_steps),
        (MINRES(1e-10, max_steps=2), Status.max_steps),
        (Neumann(step=0.1, terms=5, rtol=1e-8), Status.max_steps),
        (Neumann(step=0.5, terms=50), Status.diverged),
    ],
)
def test_linear_solver_that_fails_is_named(linear: Any, status: Status) -> None:
    aid = AID(Iterate(GradientDescent(0.1), 400, tol=1e-8), linear)
    found = hypergradient(INSTANCE.problem, X, INSTANCE.y0, estimator=aid, throw=False)
    assert found.status is status
    assert [report.status.ok for report in found.reports] == [True, False]
    assert found.message.startswith("linear solver: ")
    with pytest.raises(BilevelError, match="linear solver") as caught:
        hypergradient(INSTANCE.problem, X, INSTANCE.y0, estimator=aid)
    assert caught.value.partial.v is not None


def test_indefinite_inner_hessian() -> None:
    """At a saddle point of g: CG and Cholesky refuse, MINRES solves the system as it stands."""
    problem = BilevelProblem(
        lambda x, y: (y - 1).square().sum() / 2, lambda x, y: (y[0] ** 2 - y[1] ** 2) / 2 - (x * y).sum()
    )
    still, x, y0 = Iterate(GradientDescent(0.1), 0), torch.zeros(2), torch.zeros(2)
    for linear, status in ((CG(), Status.negative_curvature), (Dense(), Status.not_positive_definite)):
        found = hypergradient(problem, x, y0, estimator=AID(still, linear), throw=False)
        assert found.status is status
    found = hypergradient(problem, x, y0, estimator=AID(still, MINRES(1e-10)))
    assert found.grad.tolist() == pytest.approx([-1.0, 1.0])


@pytest.mark.parametrize("build", [lambda inner: AID(inner, CG()), Penalty], ids=["aid", "penalty"])
def test_init_is_allowed_where_g_sees_x_as_well(build: Any) -> None:
    """iMAML: the proximal term, not the start, carries the dependence."""
    problem = BilevelProblem(
        lambda x, y: y.sum(), lambda x, y: (y - 1).square().sum() + (y - x).square().sum(), init=lambda x: x
    )
    estimator = build(Iterate(GradientDescent(0.1), 60))
    found = hypergradient(problem, torch.ones(2), torch.zeros(2), estimator=estimator)
    assert float((found.grad - 0.5).abs().max()) <= 0.01


def test_itd_refuses_what_cannot_be_unrolled() -> None:
    from bilevel.solvers.lbfgs import LBFGS

    with pytest.raises(TypeError, match=r"must be an iteration of differentiable steps. Got LBFGS"):
        ITD(LBFGS())
    inner = Iterate(GradientDescent(0.1), 5)
    with pytest.raises(ValueError, match="at most one of"):
        ITD(inner, truncate=2, forward=True)
    with pytest.raises(ValueError, match=r"ITD\(truncate=\.\.\.\)` must be at least 1"):
        ITD(inner, truncate=0)
    with pytest.raises(ValueError, match=r"min_steps=\.\.\.\)` must be between 0 and max_steps=5"):
        Iterate(GradientDescent(0.1), 5, min_steps=6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda i: AID(i, CG(), damping=-1.0), r"AID\(damping=\.\.\.\)"),
        (lambda i: Penalty(i, weight=0.0), r"Penalty\(weight=\.\.\.\)"),
        (lambda i: Penalty(i, weight=float("nan")), r"Penalty\(weight=\.\.\.\)"),
        (lambda i: FiniteDifference(i, step=0.0), r"FiniteDifference\(step=\.\.\.\)"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(Iterate(GradientDescent(0.1), 5))


def test_active_bounds_on_y_are_refused_by_implicit_estimators() -> None:
    pytest.importorskip("scipy")
    problem = BilevelProblem(lambda x, y: (y - 3).square().sum(), lambda x, y: (y - x).square().sum())
    x = torch.tensor([2.0, 0.5])
    tight, loose = (AID(Scipy(bounds=(-bound, bound)), CG()) for bound in (1.0, 5.0))
    with pytest.raises(ValueError, match="1 entries of y are held by bounds"):
        hypergradient(problem, x, torch.zeros(2), estimator=tight)
    assert torch.allclose(hypergradient(problem, x, torch.zeros(2), estimator=loose).grad, 2 * (x - 3), atol=1e-5)
