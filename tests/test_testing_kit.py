"""The testing kit passes what is right, and names what is wrong with what is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import pytest
import torch
from torch import Tensor

from bilevel import AID, ITD, AbstractEstimator, BilevelProblem, Constants, Instance
from bilevel._calculus import Exact, outer_gradients
from bilevel._estimate import FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._result import report
from bilevel.inner_problems.kinds import inner_objective
from bilevel.problems import catalogue
from bilevel.solvers.cg import CG
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.lbfgs import LBFGS
from bilevel.testing import check_estimator, check_problem, parametrize_with_checks

GOOD = AID(LBFGS(1e-10), CG(1e-10))


@final
@dataclass(frozen=True)
class Mine(AbstractEstimator):
    """An implicit gradient in one file; `wrong` chooses what is wrong with it."""

    wrong: str = ""

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        solved = LBFGS(1e-10).solve(inner_objective(problem, x), start.y)
        at = Exact().linearize(problem, x, solved.value)
        value, fx, fy = outer_gradients(problem, x, solved.value)
        system = CG(1e-10).solve(at.operator, fy, start.v)
        v = fy if self.wrong == "identity" else system.value
        cross = at.cross(v)
        h = fx if cross is None else fx - cross
        if self.wrong == "sign" and cross is not None:
            h = fx + cross
        if self.wrong == "no grad_x f" and cross is not None:
            h = -cross
        if self.wrong == "first leaf":
            h = torch.cat([h[: problem.x.sizes[0]], torch.zeros_like(h[problem.x.sizes[0] :])])
        if self.wrong == "in place x":
            x += 1
        if self.wrong == "in place y":
            start.y.add_(1)
        if self.wrong == "random":
            h = h + 1e-9 * torch.randn(h.shape, dtype=h.dtype)
        if self.wrong == "unfinished":
            return FlatEstimate(h, value, solved.value, ())
        reports = (report("inner solver", solved), report("linear solver", system))
        return FlatEstimate(h, value, solved.value, reports, system.value)


@parametrize_with_checks([Mine(), GOOD])
def test_right_estimators_pass(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("sign", "exactness: found"),
        ("identity", "exactness: found"),
        ("no grad_x f", "a term in x only of f: found"),
        ("first leaf", "one leaf or several: found"),
        ("in place x", "inputs untouched: x was modified"),
        ("in place y", "inputs untouched: start.y was modified"),
        ("random", "same seed, same bits"),
        ("unfinished", "failure is reported"),
    ],
)
def test_a_wrong_estimator_is_caught_by_name(wrong: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_estimator(Mine(wrong))


def test_a_biased_estimator_passes_as_such() -> None:
    one_step = ITD(Iterate(GradientDescent(0.5), 50), truncate=1)
    check_estimator(one_step, exact=False)
    check_estimator(Mine("identity"), exact=False)
    with pytest.raises(AssertionError, match="exactness"):
        check_estimator(one_step)


def test_what_is_no_estimator_is_refused() -> None:
    with pytest.raises(TypeError, match="must be an estimator"):
        check_estimator("aid-cg")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["quadratic", "nested", "asinh", "log-sum-exp", "ridge-orthonormal", "weighted-logit"])
def test_problems_of_the_catalogue_pass(name: str) -> None:
    check_problem(catalogue()[name].build())


def _wrong_constant(name: str, factor: float) -> Instance:
    known = catalogue()["quadratic"].build(cross=0.5)
    assert known.constants is not None
    constants = known.constants(known.x0)
    wrong = replace(constants, **{name: factor * getattr(constants, name)})
    return replace(known, constants=lambda _: wrong)


@pytest.mark.parametrize(("name", "factor"), [("mu", 1.5), ("L", 0.7), ("C_G", 0.7), ("L_fyy", 0.3), ("L_fxy", 0.2)])
def test_a_wrong_constant_is_caught(name: str, factor: float) -> None:
    with pytest.raises(AssertionError, match=f"constants: .*{name} ="):
        check_problem(_wrong_constant(name, factor))


@pytest.mark.parametrize("name", ["M_yy", "M_xy"])
def test_a_wrong_lipschitz_constant_of_a_second_derivative_is_caught(name: str) -> None:
    """g = (1 + x) (cosh y + y^2 / 2) - x y: at x = 0 and |y| <= 1 they are sinh 1 and 1 + cosh 1."""
    problem = BilevelProblem(
        lambda x, y: (y - 1).square().sum(), lambda x, y: ((1 + x) * (y.cosh() + y.square() / 2) - x * y).sum()
    )
    right = Constants(2.0, 2.6, 2.0, 0.0, 1.18, 2.6, 3.2, radius=1.0)
    x, y = torch.zeros(1), torch.zeros(1)
    check_problem(Instance(problem, x, y, constants=lambda _: right))
    wrong = replace(right, **{name: 0.3 * getattr(right, name)})
    with pytest.raises(AssertionError, match=f"constants: .*{name} ="):
        check_problem(Instance(problem, x, y, constants=lambda _: wrong))


def test_wrong_closed_forms_are_caught() -> None:
    known = catalogue()["quadratic"].build()
    assert known.solution is not None and known.gradient is not None
    solution, gradient = known.solution, known.gradient
    with pytest.raises(AssertionError, match="solution: found"):
        check_problem(replace(known, solution=lambda x: solution(x) + 1e-2))
    with pytest.raises(AssertionError, match="gradient: found"):
        check_problem(replace(known, gradient=lambda x: -gradient(x)))


def test_noise_is_caught_and_what_cannot_be_batched_is_looped_over() -> None:
    known = catalogue()["quadratic"].build()
    noisy = BilevelProblem(known.problem.f, lambda x, y: known.problem.g(x, y) + torch.randn(()).double())
    with pytest.raises(AssertionError, match="same value twice"):
        check_problem(Instance(noisy, known.x0, known.y0))
    item = BilevelProblem(known.problem.f, lambda x, y: known.problem.g(x, y) + 0 * float(y[0].detach()))
    check_problem(Instance(item, known.x0, known.y0))  # which is evaluated one after the other
