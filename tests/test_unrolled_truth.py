"""An unrolled derivative that is called successful is that of y*(x), wherever and however fast y gets there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from bilevel_strategies import normal
from hypothesis import example, given, settings, strategies as st
from torch import Tensor

from bilevel import (
    AID,
    ITD,
    BilevelProblem,
    Checkpointed,
    Forward,
    Reverse,
    Status,
    Truncated,
    check,
    hypergradient,
    minimize,
)
from bilevel._inner import Objective
from bilevel.hypergrad.unrolling.form import AbstractUnrolling
from bilevel.prox import L1
from bilevel.solvers import (
    CG,
    Adam,
    GradientDescent,
    HeavyBall,
    Iterate,
    Nesterov,
    ProximalGradient,
)

FORMS: list[AbstractUnrolling] = [Reverse(), Checkpointed(), Forward()]
NAMES = ["itd", "itd-checkpointed", "itd-forward"]
every_form = pytest.mark.parametrize("form", FORMS, ids=str)
every_name = pytest.mark.parametrize("name", NAMES)


class Family(NamedTuple):
    """A g of numbers, the slope of g in y at x = 0, the curvature d2g/dy2, and -d2g/dxdy."""

    g: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[float, float], float]
    curvature: Callable[[float, float], float]
    pull: Callable[[float, float], float]
    reach: float  # of x

    def solution(self, x: float) -> float:
        """By bisection: the slope grows with y."""
        low, high = -60.0, 60.0
        while high - low > 1e-15 * max(1.0, abs(low)):
            mid = (low + high) / 2
            if mid in (low, high):
                break
            low, high = (mid, high) if self.slope(x, mid) < 0 else (low, mid)
        return (low + high) / 2

    def moves(self, x: float) -> float:
        """dy*/dx."""
        y = self.solution(x)
        return self.pull(x, y) / self.curvature(x, y)


FAMILIES = {
    "exponential": Family(  # one step of 1 / L lands on y* = x exp(-x), from anywhere
        lambda x, y: x.exp() * y.square() / 2 - x * y,
        lambda x, y: math.exp(x) * y - x,
        lambda x, y: math.exp(x),
        lambda x, y: 1 - math.exp(x) * y,
        2.0,
    ),
    "bump": Family(  # from y = 0 too, at x = 1, with a Hessian that changes and a cross derivative that does not
        lambda x, y: y.square() / 2 + (y.pow(4) / 4 - y.pow(3) / 3) / 2 - x * y,
        lambda x, y: y + (y**3 - y**2) / 2 - x,
        lambda x, y: 1 + (3 * y * y - 2 * y) / 2,
        lambda x, y: 1.0,
        2.0,
    ),
    "cosh": Family(
        lambda x, y: y.cosh() - x * y,
        lambda x, y: math.sinh(y) - x,
        lambda x, y: math.cosh(y),
        lambda x, y: 1.0,
        50.0,
    ),
    "quartic": Family(
        lambda x, y: y.pow(4) / 4 + y.square() / 2 - x * y,
        lambda x, y: y**3 + y - x,
        lambda x, y: 3 * y * y + 1,
        lambda x, y: 1.0,
        50.0,
    ),
    "asinh": Family(  # the curvature is largest between y0 and y*
        lambda x, y: y * y.asinh() - (1 + y.square()).sqrt() - x * y,
        lambda x, y: math.asinh(y) - x,
        lambda x, y: 1 / math.sqrt(1 + y * y),
        lambda x, y: 1.0,
        2.0,
    ),
    "quadratic": Family(
        lambda x, y: 3 * (y - x).square(),
        lambda x, y: 6 * (y - x),
        lambda x, y: 6.0,
        lambda x, y: 6.0,
        5.0,
    ),
}


def posed(family: Family, c: float) -> BilevelProblem:
    """f = (y - c)^2 / 2."""
    return BilevelProblem(lambda x, y: (y - c).square() / 2, family.g)


def number(value: float) -> Tensor:
    return torch.tensor(value)


def exponential(q: int = 1) -> BilevelProblem:
    """f = |y - 1|^2, g = exp(x) |y|^2 / 2 - x sum y: H is a multiple of the identity; G changes with y."""
    return BilevelProblem(
        lambda x, y: (y - 1).square().sum() / q, lambda x, y: x.exp() * y.square().sum() / 2 - x * y.sum()
    )


TRUTH = 2 * (0.3 * math.exp(-0.3) - 1) * 0.7 * math.exp(-0.3)  # of `exponential` at x = 0.3


OPTIMIZERS = [
    GradientDescent(),
    GradientDescent(0.02),
    HeavyBall(None, 0.5),
    Nesterov(None, 0.3),
    Nesterov(),
    Adam(0.1),
]


@st.composite
def estimators(draw: st.DrawFn) -> Any:
    if draw(st.booleans()):
        return draw(st.sampled_from(NAMES))
    inner = Iterate(
        draw(st.sampled_from(OPTIMIZERS)), max_steps=300, tol=1e-9, min_steps=draw(st.sampled_from([0, 0, 1, 40]))
    )
    return ITD(inner, draw(st.sampled_from(FORMS)))


@settings(max_examples=12)
@given(st.sampled_from(sorted(FAMILIES)), st.floats(-1, 1), st.floats(-5, 5), st.floats(-3, 3), estimators())
@example("exponential", 0.15, 0.0, 1.0, "itd")
@example("exponential", 0.15, 5.0, 1.0, ITD(Iterate(GradientDescent(), 1000, tol=1e-9)))
@example("exponential", 0.5, 2.0, 1.0, "itd-forward")  # x = 1, where y* is largest: the derivative is zero
@example("bump", 0.5, 0.0, 3.0, "itd-checkpointed")
@example("quadratic", 0.0, 0.0, 1.0, ITD(Iterate(GradientDescent(0.02), 1000, tol=1e-9, min_steps=40), Forward()))
@example("asinh", 0.75, -5.0, 1.0, "itd")
@example("bump", 0.0, 5.0, 1.0, "itd")
def test_what_is_called_successful_is_right_and_the_names_are(
    kind: str, part: float, y0: float, c: float, estimator: Any
) -> None:
    """Within 1e-4 of h, or of |dy*/dx| where h is small by y* being near c; dy*/dx itself passes through zero."""
    family = FAMILIES[kind]
    x = part * family.reach
    found = hypergradient(posed(family, c), number(x), number(y0), estimator=estimator, throw=False)
    if found.status.ok:
        moves = family.moves(x)
        h = (family.solution(x) - c) * moves
        assert float(found.grad) == pytest.approx(h, rel=1e-4, abs=1e-4 * max(abs(moves), 1e-3))
    else:
        assert not isinstance(estimator, str)
        assert found.status in (Status.truncated, Status.max_steps, Status.diverged, Status.nonfinite)


@every_form
@pytest.mark.parametrize(
    ("problem", "x", "y0", "wrong", "left"),
    [
        # the cross derivative -1 + exp(x) y at 0 instead of at y* = x exp(-x): h is off by x of 1
        (exponential(), 0.3, 0.0, TRUTH / 0.7, {"reverse": 0.3, "forward": 0.3 / 0.7}),
        # grad_y f = -2 at y* = 1; H is 1 at 0 and 1.5 at 1, so that H Z - 1 = 1/2
        (posed(FAMILIES["bump"], 3.0), 1.0, 0.0, -2.0, {"reverse": 0.5, "forward": 0.5}),
    ],
    ids=["cross derivative", "Hessian"],
)
def test_a_step_that_lands_on_the_solution_lacks_what_changed_on_the_way(
    problem: BilevelProblem, x: float, y0: float, wrong: float, left: dict[str, float], form: AbstractUnrolling
) -> None:
    iterate = Iterate(GradientDescent(), max_steps=100, tol=1e-9)
    found = hypergradient(problem, number(x), number(y0), estimator=ITD(iterate, form), throw=False)
    assert float(found.grad) == pytest.approx(wrong)
    assert found.status is Status.truncated
    assert found.reports[0].status is Status.successful
    assert found.reports[1].residual == pytest.approx(left["forward" if form == Forward() else "reverse"])
    last = ITD(Iterate(GradientDescent(), max_steps=1, tol=1e-9), form)  # where the tolerance is met by the last step
    assert hypergradient(problem, number(x), number(y0), estimator=last, throw=False).status is Status.truncated


@every_form
def test_what_is_lacking_is_measured_in_many_variables(form: AbstractUnrolling) -> None:
    """With g quartic: the terms of its definition, from Hessians and cross derivatives along the path."""
    A, B, W, c, x = (
        normal(5, 5, seed=1),
        normal(5, 3, seed=2),
        normal(5, 5, seed=3),
        normal(5, seed=4),
        normal(3, seed=5),
    )
    A = A @ A.T / 5 + torch.eye(5)

    def f(x: Tensor, y: Tensor) -> Tensor:
        return (y - c).square().sum() / 2 + x @ x * y.sum()

    def g(x: Tensor, y: Tensor) -> Tensor:
        return y @ A @ y / 2 + (W @ y).pow(4).sum() / 12 - (y * torch.sin(B @ x)).sum() * (1 + y @ y / 4)

    problem, y0, step, steps = BilevelProblem(f, g), normal(5, seed=6) / 5, 0.05, 30
    estimator = ITD(Iterate(HeavyBall(step, 0.3), max_steps=steps, tol=1e-6), form)
    found = hypergradient(problem, x, y0, estimator=estimator, throw=False)
    grad_y = torch.func.grad(g, argnums=1)
    leaf, probe = x.clone().requires_grad_(), torch.zeros(5, requires_grad=True)
    y, move = y0, torch.zeros(5)
    for _ in range(found.reports[0].steps):
        move = 0.3 * move - step * (grad_y(leaf, y) + probe)
        y = y + move
    end = y.detach()
    fy = torch.func.grad(f, argnums=1)(x, end)
    H, G = torch.func.jacrev(grad_y, argnums=1)(x, end), torch.func.jacrev(grad_y, argnums=0)(x, end).T
    in_x, in_probe = torch.autograd.grad(y @ fy, (leaf, probe), retain_graph=True)
    v, fx = -in_probe, torch.func.grad(f)(x, end)
    scale = max(float(part.norm()) for part in (in_x, G @ v, fx + in_x))
    left = float((in_x + G @ v).norm()) / scale + float((fy - H @ v).norm() / fy.norm())
    if form == Forward():
        J = torch.stack([torch.autograd.grad(y[i], leaf, retain_graph=True)[0] for i in range(5)])
        left = float((H @ J + G.T).norm() / G.norm())
    assert found.reports[1].residual == pytest.approx(left, rel=1e-6)
    assert left > 1e-4


@every_name
@pytest.mark.parametrize("y0", [0.0, 5.0, 0.3 * math.exp(-0.3)])
def test_by_name_the_steps_go_on_until_the_derivative_is_right(name: str, y0: float) -> None:
    found = hypergradient(exponential(3), number(0.3), torch.full((3,), y0), estimator=name)
    assert float(found.grad) == pytest.approx(TRUTH, rel=1e-9)


@every_name
def test_minimize_by_name_ends_at_the_minimizer_with_warm_starts(name: str) -> None:
    """Phi = (x exp(-x) - 1 / 5)^2 is least where x exp(-x) = 1 / 5."""
    problem = BilevelProblem(lambda x, y: (y - 0.2).square(), lambda x, y: x.exp() * y.square() / 2 - x * y)
    solution = minimize(problem, number(0.9), number(0.0), estimator=name, outer=GradientDescent(1.0), max_steps=60)
    x = float(solution.x)
    assert solution.status.ok
    assert x * math.exp(-x) == pytest.approx(0.2, abs=1e-6)


@every_name
def test_what_check_calls_applicable_is_right(name: str) -> None:
    found = check(exponential(), number(0.3), number(0.0))
    assert found.ok
    assert found.estimators[name] == ""


# Neighbours: what is right is not refused, and costs what it did


@every_name
@pytest.mark.parametrize("at_solution", [False, True], ids=["cold", "at the solution"])
def test_one_step_is_enough_where_neither_derivative_changes(name: str, at_solution: bool) -> None:
    problem = BilevelProblem(lambda x, y: (y - 3).square().sum(), lambda x, y: 2 * (y - x).square().sum())
    x = normal(4, seed=1)
    found = hypergradient(problem, x, x if at_solution else torch.zeros(4), estimator=name)
    assert torch.allclose(found.grad, 2 * (x - 3), rtol=1e-12)
    assert found.stats.inner_steps == 1


def test_the_measure_takes_one_product_of_each_kind() -> None:
    """In forward mode p of each. The gradient is the one that the residual took before."""
    problem = BilevelProblem(lambda x, y: (y - 3).square().sum(), lambda x, y: (y.cosh() - x * y).sum())
    x, y0, p, most = normal(3, seed=1), torch.ones(3), 3, 500
    for form in FORMS:
        found = hypergradient(problem, x, y0, estimator=ITD(Iterate(GradientDescent(0.5), most, tol=1e-8), form))
        n = found.stats.inner_steps
        products = {Reverse(): (n, n + 1), Checkpointed(): (n, n + 1), Forward(): (p * (n + 1), p * (n + 1))}[form]
        again = 2 * n - math.ceil(n / (math.isqrt(most - 1) + 1)) if form == Checkpointed() else 0
        assert (found.stats.hvps, found.stats.cross_products) == products
        assert found.stats.gradients == n + 2 + again


@every_form
def test_a_derivative_that_is_small_by_cancellation_is_not_refused(form: AbstractUnrolling) -> None:
    """At a minimizer of Phi with y* = 0: J' grad_y f vanishes, neither grad_y f nor d2g/dxdy does, which changes."""
    A, b = torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.ones(3)
    J, t = torch.linalg.solve(A, b), torch.tensor([1.0, -2.0, 0.0])
    c = t - J * (t @ J) / (J @ J)

    def g(x: Tensor, y: Tensor) -> Tensor:
        value: Tensor = y @ A @ y / 2 - x * (b * y).sum() + x * y[0].square()
        return value

    problem, y0 = BilevelProblem(lambda x, y: (y - c).square().sum() / 2, g), torch.ones(3)
    found = hypergradient(problem, number(0.0), y0, estimator=ITD(Iterate(GradientDescent(0.2), 1000, tol=1e-9), form))
    assert abs(float(found.grad)) <= 1e-6


@every_form
@pytest.mark.parametrize("x", [1.0, 1 + 1e-7])
def test_a_derivative_that_vanishes_as_the_cross_derivative_does_is_not_refused(
    x: float, form: AbstractUnrolling
) -> None:
    """d2g/dxdy = exp(x) y - 1 is zero at y* = 1 / e, for x = 1."""
    iterate = Iterate(GradientDescent(0.2), max_steps=1000, tol=1e-8)
    found = hypergradient(exponential(), number(x), number(2.0), estimator=ITD(iterate, form))
    assert abs(float(found.grad)) <= 1e-6


def test_nothing_is_measured_where_nothing_was_asked() -> None:
    """Fixed steps are what was asked for, and so is a number of steps back."""
    for estimator in (
        *(ITD(Iterate(GradientDescent(), max_steps=1), form) for form in FORMS),
        ITD(Iterate(GradientDescent(), max_steps=100, tol=1e-9), Truncated(3)),
    ):
        found = hypergradient(exponential(), number(0.3), number(0.0), estimator=estimator)
        assert found.stats.inner_steps == 1
        assert float(found.grad) == pytest.approx(TRUTH / 0.7)
        assert len(found.reports) == 1


# Composite problems


def lasso() -> BilevelProblem:
    """G = exp(x) |y|^2 / 2 - y_1, h = x |y|_1 / 4: y* = (1 - x / 4) exp(-x) and 0."""
    return BilevelProblem(
        lambda x, y: (y - 1).square().sum(),
        lambda x, y: x.exp() * y.square().sum() / 2 - y[0],
        prox=lambda x: L1(x / 4),
    )


def test_a_proximal_step_that_lands_on_the_solution_is_measured_too() -> None:
    x, y0 = number(0.3), torch.tensor([3.0, 1.0])
    y = (1 - 0.3 / 4) * math.exp(-0.3)
    truth = 2 * (y - 1) * (-math.exp(-0.3) / 4 - y)
    for form in FORMS:
        found = hypergradient(lasso(), x, y0, estimator=ITD(ProximalGradient(tol=1e-9), form), throw=False)
        assert found.stats.inner_steps == 1
        assert abs(float(found.grad) - truth) > 0.1
        assert found.status is Status.truncated
        right = hypergradient(lasso(), x, y0, estimator=ITD(ProximalGradient(tol=1e-9, min_steps=2), form))
        assert float(right.grad) == pytest.approx(truth, rel=1e-9)
    for name in NAMES:
        assert float(hypergradient(lasso(), x, y0, estimator=name).grad) == pytest.approx(truth, rel=1e-6)


def test_one_step_by_name_is_not_taken_at_the_start() -> None:
    """Through the last step, of two: -a G(y*) grad_y f with a = exp(-x)."""
    found = hypergradient(exponential(), number(0.3), number(5.0), estimator="one-step")
    assert float(found.grad) == pytest.approx(TRUTH, rel=1e-9)  # here H a = 1, so that it has no bias


# Steps that hold all the way


GROWING = {"cosh": (100.0, 0.0), "quartic": (30.0, 0.0), "asinh": (1.5, -5.0)}


@pytest.mark.parametrize("kind", GROWING)
def test_an_open_step_suits_the_whole_way(kind: str) -> None:
    """Where 1 / L at the start overshoots or cycles: in ITD, in AID, and in a batch beside rows that need no other."""
    family, (x, y0) = FAMILIES[kind], GROWING[kind]
    y, h = family.solution(x), (family.solution(x) - 1) * family.moves(x)
    iterate = Iterate(GradientDescent(), max_steps=2000, tol=1e-9)
    estimators: list[Any] = [ITD(iterate), AID(iterate, CG(rtol=1e-10)), *NAMES]
    for estimator in estimators:
        found = hypergradient(posed(family, 1.0), number(x), number(y0), estimator=estimator)
        assert float(found.grad) == pytest.approx(h, rel=1e-4)
    batch = Objective(lambda y: family.g(number(x), y).sum(-1))
    solved = iterate.solve(batch, torch.tensor([[y0], [y], [y + 0.1]]))
    assert solved.status is Status.successful
    assert torch.allclose(solved.value, torch.full((3, 1), y), rtol=1e-7)
    assert torch.equal(solved.residual, batch.gradient(solved.value).abs().squeeze(-1))
    assert bool((solved.residual <= 1e-9).all())


def test_an_open_proximal_step_suits_the_whole_way() -> None:
    """sinh(y) + 1 = 100, from where the curvature is 1."""
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y.cosh() - x * y).sum(), prox=lambda x: L1(x / 100))
    y0 = torch.zeros(2)
    for estimator in (ITD(ProximalGradient(tol=1e-9)), AID(ProximalGradient(tol=1e-9), CG()), "itd"):
        found = hypergradient(problem, number(100.0), y0, estimator=estimator)
        assert float(found.y[0]) == pytest.approx(math.asinh(99), rel=1e-6)
        assert float(found.grad) == pytest.approx(2 * 0.99 / math.cosh(math.asinh(99)), rel=1e-4)


def test_a_step_that_was_given_and_a_slow_descent_are_left_as_they_are() -> None:
    """No other step is tried for a step of one's own, nor where the steps were too few and not too long."""
    family = FAMILIES["cosh"]
    objective = Objective(lambda y: family.g(number(100.0), y).sum(-1))
    assert Iterate(GradientDescent(1.0), 50, tol=1e-9).solve(objective, torch.zeros(1)).status is Status.nonfinite
    slow = Objective(lambda y: (torch.tensor([1.0, 1e-3]) * (y - 1).square()).sum())
    before = slow.tally.gradients
    assert Iterate(GradientDescent(), 20, tol=1e-9).solve(slow, torch.zeros(2)).status is Status.max_steps
    assert slow.tally.gradients - before == 22  # the steps, the residual, and the graph for the curvature


def test_an_open_step_that_is_not_to_blame_is_kept() -> None:
    """Gradients of a g that is not convex may grow on the way to its minimum; where all is NaN nothing is repeated."""
    ramp = Objective(lambda y: -(-(y - 6).square() / 8).exp().sum(-1))  # the curvature is largest at its minimum
    solved = Iterate(GradientDescent(), max_steps=3000, tol=1e-9).solve(ramp, torch.zeros(1))
    assert solved.status is Status.successful
    assert float(solved.value) == pytest.approx(6.0, abs=1e-6)
    nothing = Objective(lambda y: y.sum() * math.nan)
    assert Iterate(GradientDescent(), max_steps=50, tol=1e-9).solve(nothing, torch.ones(2)).status is Status.nonfinite
