"""Numbers out of range are refused, and problems of any scale are solved or say that they are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import (
    AID,
    ESJ,
    KKT,
    Auto,
    BilevelProblem,
    Certified,
    Constants,
    FiniteDifference,
    FiniteDifferences,
    Penalty,
    Simplex,
    Status,
    estimators,
    hypergradient,
)
from bilevel.algorithms import SOBA
from bilevel.arguments.ranges import Range
from bilevel.solvers import (
    CG,
    GMRES,
    LBFGS,
    MINRES,
    Adam,
    Armijo,
    Clipped,
    CoordinateDescent,
    Dense,
    GradientDescent,
    HeavyBall,
    Iterate,
    Jacobi,
    Nesterov,
    Neumann,
    Newton,
    Nystrom,
    NystromPreconditioner,
    ProximalGradient,
    QuadraticProgram,
    SaddleCholesky,
)

INF, NAN = math.inf, math.nan
DESCENT = GradientDescent(0.1)

# Each constructor with a number in a place where it means something; NaN, infinity and the others do not.
PLACES: dict[str, tuple[Callable[[Any], object], list[float], list[float]]] = {
    "CG rtol": (lambda t: CG(rtol=t), [0.0, 0.5], [2.0, 1.0, -1.0, INF, NAN]),
    "CG atol": (lambda t: CG(atol=t), [0.0, 10.0], [-1.0, INF, NAN]),
    "MINRES": (lambda t: MINRES(rtol=t), [0.0, 0.5], [2.0, INF, NAN]),
    "GMRES": (lambda t: GMRES(rtol=t), [0.0, 0.5], [2.0, INF, NAN]),
    "Neumann rtol": (lambda t: Neumann(None, 3, t), [0.0, 0.5], [2.0, INF, NAN]),
    "Neumann step": (lambda t: Neumann(t, 3), [1e-300], [0.0, -1.0, INF, NAN]),
    "Nystrom": (lambda t: Nystrom(2, t), [1e-9], [0.0, INF, NAN]),
    "NystromPreconditioner": (lambda t: NystromPreconditioner(2, t), [0.0], [-1.0, INF, NAN]),
    "LBFGS": (lambda t: LBFGS(tol=t), [0.0, 5.0], [-1.0, INF, NAN]),
    "Newton": (lambda t: Newton(tol=t), [0.0, 5.0], [-1.0, INF, NAN]),
    "Iterate": (lambda t: Iterate(DESCENT, 5, tol=t), [0.0, 5.0], [-1.0, INF, NAN]),
    "ProximalGradient": (lambda t: ProximalGradient(tol=t), [0.0], [-1.0, INF, NAN]),
    "ProximalGradient step": (lambda t: ProximalGradient(step=t), [2.0], [0.0, INF, NAN]),
    "CoordinateDescent": (lambda t: CoordinateDescent(tol=t), [0.0], [-1.0, INF, NAN]),
    "QuadraticProgram": (lambda t: QuadraticProgram(tol=t), [0.0], [-1.0, INF, NAN]),
    "Armijo": (lambda t: Armijo(initial=t), [2.0], [0.0, INF, NAN]),
    "Clipped": (lambda t: Clipped(DESCENT, max_norm=t), [2.0, INF], [0.0, -1.0, NAN]),
    **{
        f"{kind.__name__} step": (lambda t, kind=kind: kind(t), [1e-9, 10.0], [0.0, -1.0, INF, NAN])  # type: ignore[misc]
        for kind in (GradientDescent, HeavyBall, Nesterov, Adam)
    },
    "Adam eps": (lambda t: Adam(0.1, eps=t), [0.0], [-1.0, INF, NAN]),
    "AID damping": (lambda t: AID(LBFGS(), CG(), damping=t), [0.0], [-1.0, INF, NAN]),
    "AID margin": (lambda t: AID(LBFGS(), CG(), margin=t), [0.0], [-1.0, INF, NAN]),
    "KKT": (lambda t: KKT(LBFGS(), weak=t), [0.0], [-1.0, INF, NAN]),
    "Penalty": (lambda t: Penalty(LBFGS(), weight=t), [1e-3, 1e12], [0.0, -1.0, INF, NAN]),
    "Penalty accuracy": (lambda t: Penalty(LBFGS(), accuracy=t), [0.1], [0.0, INF, NAN]),
    "ESJ": (lambda t: ESJ(LBFGS(), radius=t), [1e-3, 1e-16], [0.0, -1.0, INF, NAN]),
    "FiniteDifference": (lambda t: FiniteDifference(LBFGS(), step=t), [1e-3, 1e-16], [0.0, INF, NAN]),
    "FiniteDifferences": (lambda t: FiniteDifferences(step=t), [1e-3], [0.0, -1.0, INF, NAN]),
    "target_error of Certified": (
        lambda t: Certified(AID(LBFGS(), CG()), target_error=t),
        [1e-3],
        [0.0, -1.0, INF, NAN],
    ),
    "Auto": (lambda t: Auto(relative_error=t), [1e-3], [0.0, -1.0, INF, NAN]),
    "Constants": (lambda t: Constants(mu=t), [1e-3], [0.0, -1.0, INF, NAN]),
    "SOBA": (lambda t: SOBA(t, 0.1), [1e-3], [0.0, -1.0, INF, NAN]),
    "Simplex": (lambda t: Simplex(t), [1e-3], [0.0, -1.0, INF, NAN]),
}


@pytest.mark.parametrize("place", PLACES)
def test_numbers_that_mean_nothing_are_refused_and_others_are_not(place: str) -> None:
    build, meant, meaningless = PLACES[place]
    for number in meant:
        build(number)
    for number in meaningless:
        with pytest.raises(ValueError, match=place.split()[0]):
            build(number)


@pytest.mark.parametrize("kind", [GradientDescent, HeavyBall, Nesterov, Adam])
def test_steps_may_be_tensors_of_finite_floating_point_numbers(kind: Any) -> None:
    kind(torch.tensor(0.1))
    kind(torch.tensor([0.1, 0.0, -0.1], dtype=torch.float32))  # learned ones pass through zero
    for wrong in (torch.tensor(1), torch.tensor([0.1, NAN]), torch.tensor(INF)):
        with pytest.raises(ValueError, match=rf"`{kind.__name__}\(step=\.\.\.\)` must be"):
            kind(wrong)
    assert torch.equal(torch.vmap(lambda t: t - kind(t).step_size)(torch.ones(2)), torch.zeros(2))


def test_a_range_says_what_is_required() -> None:
    assert Range(least=1).refuses(0) == "at least 1"
    assert Range().refuses(INF) == "finite"
    assert Range(open=True, below=1.0).refuses(1.0) == "positive and below 1"
    assert not Range(open=True, infinite=True).refuses(INF)


# f and g times s have the same y*(x), and the hypergradient times s.
A, B = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([[1.0, 0.2, 0.5], [0.3, -1.0, 0.5]])
C = torch.tensor([1.0, 0.5, 2.0])
X = torch.tensor([0.7, -0.4])
EXACT = X + B @ (C * (X @ B / A - 1) / A)
SCALES = [("float32", s) for s in (1e-22, 1e-30, 1e30)] + [("float64", s) for s in (1e-200, 1e200)]


def scaled(dtype: torch.dtype, s: float) -> BilevelProblem:
    a, b, c = A.to(dtype), B.to(dtype), C.to(dtype)

    def f(x: Tensor, y: Tensor) -> Tensor:
        return s * ((c * (y - 1).square()).sum() / 2 + x.square().sum() / 2)

    return BilevelProblem(f, lambda x, y: s * ((a * y.square()).sum() / 2 - (x @ b) @ y))


def test_the_closed_form_is_right() -> None:
    found = hypergradient(scaled(torch.float64, 1.0), X, torch.zeros(3), estimator="aid-dense").grad
    torch.testing.assert_close(found, EXACT)


def settings(s: float) -> dict[str, Any]:
    tol = 1e-5 * s
    linear = {
        "minres": MINRES(rtol=1e-4),
        "gmres": GMRES(rtol=1e-4),
        "dense": Dense(),
        "neumann": Neumann(None, 1000, 1e-4),
        "nystrom": Nystrom(3),
        "jacobi": CG(rtol=1e-4, preconditioner=Jacobi()),
        "sketch": CG(rtol=1e-4, preconditioner=NystromPreconditioner(2)),
        "saddle": SaddleCholesky(),
        "steps": CG(rtol=0, max_steps=3),
    }
    inner = {
        "lbfgs": LBFGS(tol),
        "lbfgs-steps": LBFGS(0, 100),
        "newton": Newton(tol),
        "newton-dense": Newton(tol, linear=Dense()),
        "descent": Iterate(GradientDescent(), 2000, tol),
        "ball": Iterate(HeavyBall(momentum=0.5), 2000, tol),
        "nesterov": Iterate(Nesterov(), 2000, tol),
        "armijo": Iterate(GradientDescent(), 2000, tol, line_search=Armijo()),
        "proximal": ProximalGradient(None, 2000, tol),
    }
    known = Constants(mu=s, L=5 * s, L_fyy=2 * s, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=1.3 * s)
    return {
        **{name: AID(LBFGS(tol), solver) for name, solver in linear.items()},
        **{name: AID(solver, CG(rtol=1e-4)) for name, solver in inner.items()},
        "differences": AID(LBFGS(tol), CG(rtol=1e-3), products=FiniteDifferences()),
        "certified": Certified(AID(LBFGS(), CG()), relative_error=1e-2, constants=known),
        "esj-": ESJ(LBFGS(tol), 2, radius=1e-2),
        "penalty-": Penalty(LBFGS(0.01 * tol), 1e3),
        "differences-of-phi": FiniteDifference(LBFGS(tol), step=1e-2),
    }


NAMES = [name for name in estimators() if name not in ("first-order", "kkt", "one-step", "itd-truncated")]


@pytest.mark.parametrize(("precision", "s"), SCALES)
@pytest.mark.parametrize("name", [*NAMES, *settings(1.0)])
def test_the_scale_of_f_and_g_is_that_of_the_hypergradient(name: str, precision: str, s: float) -> None:
    dtype = getattr(torch, precision)
    estimator = settings(s).get(name, name)
    found = hypergradient(scaled(dtype, s), X.to(dtype), torch.zeros(3, dtype=dtype), estimator=estimator, throw=False)
    error = float((found.grad.double() / s - EXACT).norm() / EXACT.norm())
    assert error <= 2e-2 or not found.status.ok
    if name in (*NAMES, "lbfgs", "newton", "descent", "certified"):  # and these are right
        assert error <= 2e-2 and found.status.ok


@pytest.mark.parametrize("s", [1.0, 1e-22])
@pytest.mark.parametrize("solver", [LBFGS(0.0, 50), Newton(0.0, 50)])
def test_the_residual_is_that_of_the_problem_at_its_own_scale(solver: Any, s: float) -> None:
    found = hypergradient(
        scaled(torch.float32, s), X.float(), torch.zeros(3, dtype=torch.float32), estimator=AID(solver, Dense())
    )
    assert found.reports[0].residual <= 1e-5 * s


FINE = {
    "penalty": Penalty(LBFGS(1e-10), weight=1e12),
    "penalty-extrapolated": Penalty(LBFGS(1e-10), weight=1e12, extrapolate=True),
    "esj": ESJ(LBFGS(1e-10), 2, radius=1e-16),
    "esj-steps": ESJ(Iterate(GradientDescent(0.1), 100), 2, radius=1e-15),
    "differences-of-phi": FiniteDifference(LBFGS(1e-10), step=1e-16),
    "products": AID(LBFGS(1e-10), Neumann(0.1, 200), products=FiniteDifferences(step=1e-16)),
}


@pytest.mark.parametrize("name", FINE)
def test_differences_over_so_little_that_rounding_takes_them_are_imprecise(name: str) -> None:
    found = hypergradient(scaled(torch.float64, 1.0), X, torch.zeros(3), estimator=FINE[name], throw=False)
    assert any(report.status is Status.imprecise for report in found.reports) and not found.status.ok


COARSE = {
    "penalty": Penalty(LBFGS(1e-10), weight=1e5),
    "esj": ESJ(LBFGS(1e-10), 2, radius=1e-7),
    "differences-of-phi": FiniteDifference(LBFGS(1e-10), step=1e-7),
    "products": AID(LBFGS(1e-10), CG(rtol=1e-5), products=FiniteDifferences(step=1e-8)),
}


@pytest.mark.parametrize("name", COARSE)
def test_differences_over_more_are_right(name: str) -> None:
    found = hypergradient(scaled(torch.float64, 1.0), X, torch.zeros(3), estimator=COARSE[name]).grad
    torch.testing.assert_close(found, EXACT, rtol=1e-4, atol=1e-6)
