"""What estimators that take differences say of their own error: true where it is small, a status where it is not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from bilevel_strategies import normal
from torch import Tensor

from bilevel import ESJ, BilevelProblem, Estimate, FiniteDifference, Penalty, Start, Status, hypergradient, minimize
from bilevel._flat import FlatProblem
from bilevel._inner import Objective
from bilevel._tree import ravel
from bilevel.named.setting import Setting
from bilevel.named.solved_on import SolvedOn
from bilevel.solvers import LBFGS, GradientDescent, Iterate, Newton, QuadraticProgram

Y0 = torch.zeros(3)
X = torch.tensor([0.7, -0.4])


def ill_conditioned(kappa: float, q: int, in_range: bool) -> tuple[BilevelProblem, Tensor]:
    """Curvatures of g from 1 / kappa to 1 and of f 1; `in_range`: x moves y through directions that g sees."""
    basis = torch.linalg.qr(normal(q, q, seed=1)).Q
    A = basis @ torch.diag(torch.logspace(-math.log10(kappa), 0, q)) @ basis.T
    B, target = normal(2, q, seed=2), normal(q, seed=3)
    B = B @ A if in_range else B

    def f(x: Tensor, y: Tensor) -> Tensor:
        return (y - target).square().sum() / 2 + x.square().sum() / 2

    exact = X + B @ torch.linalg.solve(A, torch.linalg.solve(A, X @ B) - target)
    return BilevelProblem(f, lambda x, y: y @ A @ y / 2 - (x @ B) @ y), exact


def off(found: Estimate, exact: Tensor) -> float:
    return float((found.grad - exact).norm())


@pytest.mark.parametrize("in_range", [True, False])
@pytest.mark.parametrize("kappa", [1e1, 1e3, 1e4, 1e5])
def test_the_weight_by_name_follows_the_curvatures_that_matter(kappa: float, in_range: bool) -> None:
    problem, exact = ill_conditioned(kappa, 3, in_range)
    found = hypergradient(problem, X, Y0, estimator="penalty", throw=False)
    assert off(found, exact) <= 0.01 * float(exact.norm())
    assert found.status in (Status.successful, Status.stagnated)  # of y, whose tolerance is at the rounding of g
    assert found.bias is not None and off(found, exact) <= found.bias <= 0.1 * float(exact.norm())


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kappa", [1e4, 1e5, 1e6])
def test_a_weight_too_low_for_the_least_curvature_is_biased(kappa: float, first: bool) -> None:
    problem, exact = ill_conditioned(kappa, 3, True)
    penalty = Penalty(LBFGS(1e-9), weight=1e4, extrapolate=True, accuracy=0.01)
    found = hypergradient(problem, X, Y0, estimator=penalty, start=Start(Y0, count=0 if first else 1), throw=False)
    assert off(found, exact) > 0.01 * float(exact.norm())
    assert found.reports[-1].status is Status.biased
    assert found.bias is not None
    assert found.bias >= (0.8 if first else 0.2) * off(found, exact)


def test_what_cannot_be_met_by_any_weight_is_a_status() -> None:
    problem, _ = ill_conditioned(1e12, 3, True)
    assert not hypergradient(problem, X, Y0, estimator="penalty", throw=False).status.ok


@pytest.mark.parametrize("extrapolate", [False, True])
@pytest.mark.parametrize("w", [10.0, 100.0, 1e4])
def test_a_weight_that_was_asked_for_is_used_and_its_bias_reported(w: float, extrapolate: bool) -> None:
    problem, exact = ill_conditioned(10.0, 3, False)
    found = hypergradient(problem, X, Y0, estimator=Penalty(LBFGS(1e-11), w, extrapolate))
    assert found.bias is not None
    assert 0.9 * off(found, exact) <= found.bias <= 20 * off(found, exact) + 1e-4


def test_the_probe_is_not_counted_and_later_estimates_do_without() -> None:
    problem, _ = ill_conditioned(10.0, 3, False)
    calls = [0]

    def g(x: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        return problem.g(x, y)

    penalty, counted = Penalty(Iterate(GradientDescent(0.5), 5), 10.0), BilevelProblem(problem.f, g)
    first = hypergradient(counted, X, Y0, estimator=penalty)
    calls[0] = 0
    later = hypergradient(counted, X, Y0, estimator=penalty, start=Start(Y0, count=1))
    assert first.stats == later.stats and calls[0] == later.stats.gradients
    assert torch.equal(first.grad, later.grad)


def far_apart(pull: float, offset: float = 0.0) -> BilevelProblem:
    """Curvatures of g from 1e5 to 1e8, y* = (x, x); f pulls by `pull`. All in float32."""
    h = torch.tensor([1.0, 1000.0], dtype=torch.float32)
    return BilevelProblem(
        lambda x, y: 1e5 * (pull * ((y - 1).square().sum() / 2 + x[0] * y[0]) + offset * x.square().sum()),
        lambda x, y: 1e5 * (h * (y - x).square()).sum() / 2,
    )


STEPS = Iterate(GradientDescent(1e-8), 100)
ENDS = [QuadraticProgram(), QuadraticProgram(1e-3), LBFGS(1e-3), LBFGS(1e3), LBFGS(0.0, 50), Newton(1e-3), STEPS]


@pytest.mark.parametrize("extrapolate", [False, True])
@pytest.mark.parametrize("inner", ENDS)
def test_a_shift_of_y_that_rounding_takes_is_imprecise_whatever_the_solver(inner: Any, extrapolate: bool) -> None:
    x, y0 = torch.tensor([1.764], dtype=torch.float32), torch.tensor([1.764, 1.764], dtype=torch.float32)
    for w, count in ((1e6, 0), (1e12, 0), (1e12, 1)):
        penalty = Penalty(inner, w, extrapolate)
        found = hypergradient(far_apart(1.0), x, y0, estimator=penalty, start=Start(y0, count=count), throw=False)
        assert float(found.grad) != pytest.approx(1e5 * (4 * 1.764 - 2), rel=0.05)
        assert found.reports[-1].status is Status.imprecise
        assert found.bias is not None and found.bias > 0.1 * abs(float(found.grad))


@pytest.mark.parametrize("inner", ENDS)
def test_where_f_hardly_pulls_at_y_nothing_is_lost_with_the_shift(inner: Any) -> None:
    x, y0 = torch.tensor([1.764], dtype=torch.float32), torch.tensor([1.764, 1.764], dtype=torch.float32)
    for pull in (0.0, 1e-5):
        for count in (0, 1):
            found = hypergradient(
                far_apart(pull, 1.0), x, y0, estimator=Penalty(inner, 1e12), start=Start(y0, count=count)
            )
            assert float(found.grad) == pytest.approx(1e5 * (2 * 1.764 + pull * (4 * 1.764 - 2)), rel=1e-4)


@pytest.mark.parametrize("inner", [QuadraticProgram(), Iterate(GradientDescent(0.1), 500)])
def test_a_weight_whose_shift_can_be_seen_is_precise_without_a_tolerance(inner: Any) -> None:
    x, y0 = torch.tensor([1.764], dtype=torch.float32), torch.zeros(2, dtype=torch.float32)
    h = torch.tensor([1.0, 10.0], dtype=torch.float32)
    problem = BilevelProblem(
        lambda x, y: (y - 1).square().sum() / 2 + x[0] * y[0], lambda x, y: (h * (y - x).square()).sum() / 2
    )
    found = hypergradient(problem, x, y0, estimator=Penalty(inner, 1e3))
    assert float(found.grad) == pytest.approx(4 * 1.764 - 2, rel=5e-3)


def quartic(sign: float) -> BilevelProblem:
    """At y = x a minimum of g along y_0; along y_1 one, or a maximum between two of them."""

    def g(x: Tensor, y: Tensor) -> Tensor:
        a, b = y[0] - x[0], y[1] - x[0]
        return a * a / 2 + sign * b * b / 2 + b**4 / 8

    return BilevelProblem(lambda x, y: (y - 3).square().sum() / 2, g)


@pytest.mark.parametrize("solver", [LBFGS(1e-9), Newton(1e-9)])
def test_at_a_saddle_or_a_maximum_of_g_a_penalty_does_not_succeed(solver: Any) -> None:
    x = torch.ones(1)
    maximum = BilevelProblem(
        lambda x, y: (y - 3).square().sum() / 2,
        lambda x, y: -(y - x).square().sum() / 2 + (y - x).pow(4).sum() / 1e4,
    )
    blind = BilevelProblem(lambda x, y: (y[0] - 3) ** 2 / 2, quartic(-1.0).g)  # f does not pull y_1 away
    for problem, y0 in ((maximum, x), (quartic(-1.0), torch.ones(2)), (blind, torch.ones(2))):
        for extrapolate in (False, True):
            penalty = Penalty(solver, 1e3, extrapolate)
            found = hypergradient(problem, x, y0.clone(), estimator=penalty, throw=False)
            assert found.status is Status.negative_curvature
    assert not hypergradient(maximum, x, x.clone(), estimator="penalty", throw=False).status.ok


def test_at_a_minimum_of_a_g_that_is_not_convex_it_does() -> None:
    x = torch.ones(1)
    well = BilevelProblem(lambda x, y: (y - 3).square().sum() / 2, lambda x, y: ((y - x).square() - 1).square().sum())
    found = hypergradient(well, x, 2.1 * torch.ones(1), estimator="penalty")  # y* = x + 1
    torch.testing.assert_close(found.grad, torch.tensor([-1.0]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["penalty", "esj"])
def test_a_run_that_ends_at_a_stationary_x_is_not_refused_there(name: str) -> None:
    problem = BilevelProblem(lambda x, y: (y[0] - 3) ** 2 / 2 + y[1] / 2, lambda x, y: (y - x).square().sum() / 2)
    bound = BilevelProblem(lambda x, y: problem.f(x, y) + x[1] ** 2 / 2, problem.g)
    found = minimize(bound, torch.zeros(2), torch.zeros(2), estimator=name, outer=GradientDescent(0.5), max_steps=40)
    torch.testing.assert_close(found.x, torch.tensor([3.0, -0.5]), rtol=1e-4, atol=0)
    again = hypergradient(bound, found.x, torch.zeros(2), estimator=name)
    assert float(again.grad.norm()) <= 1e-3


A, B = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([[1.0, 0.2, 0.5], [0.3, -1.0, 0.5]])
DESCENT = Iterate(GradientDescent(0.09), 150)


def curved(dtype: torch.dtype) -> BilevelProblem:
    a, b = A.to(dtype), B.to(dtype)

    def g(x: Tensor, y: Tensor) -> Tensor:
        return (a * x[0].exp() * y * y).sum() / 2 - (x.sin() @ b) @ y + 0.05 * (y**4).sum()

    return BilevelProblem(lambda x, y: (y - 1).square().sum() / 2 + x.square().sum() / 10, g)


@pytest.fixture(scope="module")
def exact() -> Tensor:
    found: Tensor = hypergradient(curved(torch.float64), X, Y0, estimator="aid-dense").grad
    return found


@pytest.mark.parametrize("radius", [1e-1, 1e-3, 1e-5, None])
def test_the_bias_of_a_radius_is_reported(radius: float | None, exact: Tensor) -> None:
    found = hypergradient(curved(torch.float64), X, Y0, estimator=ESJ(DESCENT, 2, radius=radius))
    assert found.standard_error == 0 and found.bias is not None
    assert 0.5 * off(found, exact) <= found.bias <= 3 * off(found, exact)


def test_a_radius_that_is_all_rounding_is_reported_with_an_error_of_its_size(exact: Tensor) -> None:
    for radius in (1e-11, 1e-13):
        found = hypergradient(curved(torch.float64), X, Y0, estimator=ESJ(DESCENT, 2, radius=radius), throw=False)
        assert found.bias is not None and off(found, exact) <= found.bias
    short = ESJ(DESCENT, 2, radius=1e-16)
    for count in (0, 1):
        found = hypergradient(curved(torch.float64), X, Y0, estimator=short, start=Start(Y0, count=count), throw=False)
        assert found.status is Status.imprecise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_radius_that_x_does_not_see_is_imprecise_though_nothing_moves(dtype: torch.dtype) -> None:
    short = ESJ(DESCENT, 2, radius=1e-12)  # in float16 it is zero
    found = hypergradient(curved(dtype), X.to(dtype), Y0.to(dtype), estimator=short, throw=False)
    assert found.status is Status.imprecise


def test_the_other_side_is_looked_at_once_and_not_counted() -> None:
    esj = ESJ(DESCENT, 2)
    first = hypergradient(curved(torch.float64), X, Y0, estimator=esj)
    later = hypergradient(curved(torch.float64), X, Y0, estimator=esj, start=Start(Y0, count=1))
    assert first.stats == later.stats and later.bias is None


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-4), (torch.float32, 0.05), (torch.float16, 0.15), (torch.bfloat16, 0.4)]
)
def test_the_radius_fits_the_dtype(dtype: torch.dtype, error: float) -> None:
    """Of a y*(x) that bends little, so that what is left is rounding; a radius of 1e-3 is lost in bfloat16."""
    a, b = A.to(dtype), B.to(dtype)
    problem = BilevelProblem(
        lambda x, y: (y - 1).square().sum() / 2, lambda x, y: (a * y * y).sum() / 2 - (x.sin() @ b) @ y
    )
    descent, x, y0 = Iterate(GradientDescent(0.2), 60), X.to(dtype), Y0.to(dtype)
    exact = (B @ ((X.sin() @ B / A - 1) / A)) * X.cos()
    found = hypergradient(problem, x, y0, estimator=ESJ(descent, 2), throw=False)
    assert float((found.grad.double() - exact).norm() / exact.norm()) <= error
    if dtype is torch.bfloat16:
        lost = hypergradient(problem, x, y0, estimator=ESJ(descent, 2, radius=1e-3), throw=False)
        assert not lost.status.ok


DIFFERENCES = {
    "finite-difference": FiniteDifference(LBFGS(1e4), step=2e-2),
    "esj": ESJ(LBFGS(1e4), 1, distribution="orthonormal"),
}


@pytest.mark.parametrize(("start", "arrives"), [((1.7, 0.0), False), ((0.0, 0.0), True)])
@pytest.mark.parametrize("name", ["finite-difference", "esj"])
def test_differences_of_solves_that_stop_where_they_begin_are_imprecise(
    name: str, start: tuple[float, float], arrives: bool
) -> None:
    """Of y* = (x, x) the first entry is at its solution already, and its curvature is below the tolerance's share.

    By name it is not, since y is solved for as its condition number asks for.
    """
    problem, at = far_apart(1.0), 1.7
    x, y0 = torch.tensor([at], dtype=torch.float32), torch.tensor(start, dtype=torch.float32)
    right = 1e5 * (2 * (at - 1) + 2 * at)
    found = hypergradient(problem, x, y0, estimator=DIFFERENCES[name], throw=False)
    if arrives:
        assert found.status.ok and float(found.grad) == pytest.approx(right, rel=1e-3)
    else:
        assert found.status is Status.imprecise
    assert float(hypergradient(problem, x, y0, estimator=name).grad) == pytest.approx(right, rel=1e-3)


@pytest.mark.parametrize(
    ("start", "tol"), [((0.1, 0.6, 1.0), 0.03), ((-1.4, 0.8, 0.6), 0.006), ((-0.4, -0.4, 0.2), 0.03)]
)
def test_a_fiftieth_of_the_differences_that_others_are_tested_by_is_imprecise(
    start: tuple[float, ...], tol: float
) -> None:
    """The tolerance of y leaves 4 to 10 % of them there, and 0.01 % where it is a hundredth."""
    h, x = torch.tensor([1.0, 30.0, 1000.0]), torch.tensor([0.8])
    problem = BilevelProblem(
        lambda x, y: (y - 1).square().sum() / 2, lambda x, y: (h * (y - x.sin()).square()).sum() / 2
    )
    exact = 3 * (x.sin() - 1) * x.cos()
    coarse, fine = (FiniteDifference(LBFGS(t), step=1e-2) for t in (tol, 1e-5))
    found = hypergradient(problem, x, torch.tensor(start), estimator=coarse, throw=False)
    assert off(found, exact) > 0.03 * float(exact.norm()) and found.status is Status.imprecise
    assert off(hypergradient(problem, x, torch.tensor(start), estimator=fine), exact) <= 1e-3 * float(exact.norm())


FLAT = {
    # float64 at 1e6 and more, float32 at 1e3: what the tolerance leaves over the least curvature is 0.1 % and more
    "1e8": (torch.float64, 1e8, 1e-3),
    "1e10": (torch.float64, 1e10, 1e-3),
    "float32": (torch.float32, 1e3, 1e-2),
}


@pytest.mark.parametrize("which", FLAT)
@pytest.mark.parametrize("name", ["aid-cg", "aid-minres", "aid-gmres", "aid-dense", "kkt", "esj", "finite-difference"])
def test_by_name_y_is_as_accurate_as_the_condition_number_asks_for(name: str, which: str) -> None:
    """From starts on which L-BFGS meets its tolerance where y is still off along the flattest direction."""
    dtype, kappa, allowed = FLAT[which]
    h = torch.logspace(0, math.log10(kappa), 3, dtype=dtype)
    B = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=dtype)
    c = torch.tensor([0.0, -0.3, 0.5], dtype=dtype)
    problem = BilevelProblem(
        lambda x, y: (y - c).square().sum() / 2 + x @ y[:2], lambda x, y: (h * (y - B @ x).square()).sum() / 2
    )
    for x, start in (
        ([0.0, -3.0], [-0.4, -0.7, 2.3]),
        ([-0.594, 0.581], [-0.745, -1.363, 0.002]),
        ([0.0, 1.3], [2.0] * 3),
    ):
        at, y0 = torch.tensor(x, dtype=dtype), torch.tensor(start, dtype=dtype)
        found = hypergradient(problem, at, y0, estimator=name, throw=False)
        y = (B @ at).double()
        exact = y[:2] + B.double().T @ (y - c.double()) + B[:2].double().T @ at.double()
        size = float(y.norm() + exact.norm())
        loose = max(allowed, 2e-2 if name in ("esj", "finite-difference") else 0.0)
        assert off(replace(found, grad=found.grad.double()), exact) <= loose * size + (found.bias or 0.0)
        assert found.reports[0].status.ok


def test_by_name_the_solver_is_the_same_where_conditions_are_good_or_hopeless() -> None:
    for least, changed in ((1e-2, False), (1e-7, True), (0.0, False), (-1.0, False)):
        h = torch.tensor([1.0, least, 0.5])
        g = BilevelProblem(lambda x, y: y.sum(), lambda x, y, h=h: (h * (y - x).square()).sum() / 2)
        x, structure = ravel(torch.ones(3), "x")
        for y0 in (torch.zeros(3), torch.ones(3)):
            inner = Setting(FlatProblem(g, structure, structure, None), x, y0).inner()
            assert isinstance(inner, SolvedOn if changed else LBFGS)


def test_a_tolerance_that_rounding_does_not_let_be_reached_is_not_asked_for_twice() -> None:
    """Success is what was promised; a solver that fails keeps its own status, and a better y of the other."""
    c, start = torch.tensor([1.7, 2.3, 0.9, 3.1]), torch.zeros(4)
    objective = Objective(lambda y: (y.exp() - c * y).sum())
    for enough, ended in ((1e-3, Status.successful), (0.0, Status.max_steps)):
        found = SolvedOn(LBFGS(1e-30, 3), Newton(1e-30, 3), enough).solve(objective, start)
        assert found.status is ended and 0 < float(found.residual) <= 1e-3 and found.steps == 6
    worse = SolvedOn(LBFGS(1e-30, 3), Newton(1e-30, 0), 1.0).solve(objective, start)
    assert torch.equal(worse.value, LBFGS(1e-30, 3).solve(objective, start).value) and worse.status.ok
    assert SolvedOn(LBFGS(1e-30, 3), Newton(1e-8), 0.0).solve(objective, start).status.ok


@pytest.mark.parametrize("signs", [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0)])
def test_that_no_y_moves_within_a_tolerance_is_no_zero(signs: tuple[float, float]) -> None:
    """At y0 = y* the gradients at x + r u are below the tolerance, and at a maximum no solver goes on."""
    s, x = torch.tensor(signs), torch.zeros(2)
    problem = BilevelProblem(lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (s * (y - x).square()).sum() / 2)
    short = ESJ(LBFGS(0.01, 20), 2, radius=1e-9)
    assert hypergradient(problem, x, x.clone(), estimator=short, throw=False).status is Status.imprecise


def test_where_y_is_the_same_for_all_x_nearby_zero_is_right() -> None:
    problem = BilevelProblem(
        lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (y - torch.relu(x)).square().sum() / 2
    )
    for y0 in (torch.zeros(2), torch.full((2,), 1e-3)):
        found = hypergradient(problem, torch.full((2,), -0.5), y0, estimator=ESJ(LBFGS(0.01, 20), 2, radius=1e-9))
        assert not bool(found.grad.any())
