"""Forms of unrolling as values: the same numbers as the keywords, and steps that use more than a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast, final

import pytest
import torch
from bilevel_strategies import families, normal
from hypothesis import given, settings, strategies as st
from torch import Tensor

from bilevel import (
    ITD,
    AbstractUnrollable,
    BilevelProblem,
    Checkpointed,
    FiniteDifference,
    Forward,
    Reverse,
    Solved,
    Status,
    Truncated,
    hypergradient,
)
from bilevel._flat import FlatProblem
from bilevel._inner import OwnStep
from bilevel._tree import ravel
from bilevel.extending import Objective, State
from bilevel.hypergrad.unrolling.ending import carried, solved
from bilevel.hypergrad.unrolling.form import AbstractUnrolling, Unrolled
from bilevel.hypergrad.unrolling.walk import Walk
from bilevel.inner_problems import Iteration
from bilevel.problems.quadratic import QuadraticFamily
from bilevel.solvers import GradientDescent, HeavyBall, Iterate, OwnSteps

N, P, Q = 7, 3, 4
A, B, W = normal(Q, Q, seed=1), normal(Q, P, seed=2), normal(Q, P, seed=3)
H = A.T @ A / Q + torch.eye(Q)
X, Y0 = normal(P, seed=4) / 3, normal(Q, seed=5)
STEP = 0.9 / float(torch.linalg.eigvalsh(H)[-1])
SAME: list[AbstractUnrolling] = [Reverse(), Checkpointed(), Forward(), Truncated(N), Truncated(10**6)]


def f(x: Tensor, y: Tensor) -> Tensor:
    return (y - 1).square().sum() / 2 + x.square().sum() * y.sum()


def smooth(x: Tensor, y: Tensor) -> Tensor:
    """|A y - b|^2 / 2 up to a constant and a multiple of |y|^2, with b = B x; rows of y side by side."""
    return ((y @ H) * y).sum(-1) / 2 - (y * (B @ x)).sum(-1)


def threshold(x: Tensor) -> Callable[[Tensor, Tensor | float], Tensor]:
    """The proximal map of exp(x_0) |y|_1."""
    return lambda v, step: v.sign() * (v.abs() - step * x[0].exp() / 4).clamp_min(0)


def at_composite(x: Tensor) -> Objective:
    return Objective(lambda y: smooth(x, y), prox=threshold(x))


def at_iteration(x: Tensor) -> Objective:
    """A step whose length depends on x and on its number; what g is must not matter."""
    return Objective(
        lambda y: pytest.fail("g was evaluated"),
        own=OwnStep(lambda y, _, k: y - x[1].exp() * 0.02 * (k + 1) * (y @ H - B @ x), N, needs_gradient=False),
    )


@final
@dataclass(frozen=True)
class ProximalDescent(AbstractUnrollable):
    """y <- prox(y - a grad g(y), a)."""

    step: float
    max_steps: int = N
    tol: float | None = None
    min_steps: int = 0

    @property
    def residual_step(self) -> float:
        return self.step

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        raise NotImplementedError

    def tuned(self, objective: Objective, y0: Tensor) -> ProximalDescent:
        return self

    def begin(self, y0: Tensor) -> State:
        return (y0,)

    def advance(self, objective: Objective, gradient: Tensor | None, state: State, index: int) -> State:
        assert gradient is not None
        assert objective.prox is not None
        return (objective.prox(state[0] - self.step * gradient, self.step),)


@final
@dataclass(frozen=True)
class MovingSteps(AbstractUnrollable):
    """y <- the problem's own step, and 0.3 of the last move, which is kept in the state as a momentum is."""

    max_steps: int = N
    tol: float | None = None
    min_steps: int = 0
    with_gradient: bool = False

    @property
    def needs_gradient(self) -> bool:
        return self.with_gradient

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        raise NotImplementedError

    def tuned(self, objective: Objective, y0: Tensor) -> MovingSteps:
        return self

    def begin(self, y0: Tensor) -> State:
        return (y0, torch.zeros_like(y0))

    def advance(self, objective: Objective, gradient: Tensor | None, state: State, index: int) -> State:
        assert objective.own is not None
        y, move = state
        new = objective.own.step(y, gradient, index) + 0.3 * move
        return (new, new - y)


def at_learned_descent(x: Tensor) -> Objective:
    """Descent on g whose step length depends on x and on its number."""
    step = OwnStep(lambda y, d, k: y - x[1].exp() * 0.02 * (k + 1) * cast(Tensor, d), N, needs_gradient=True)
    return Objective(lambda y: smooth(x, y), own=step)


KINDS: dict[str, tuple[AbstractUnrollable, Callable[[Tensor], Objective]]] = {
    "proximal": (ProximalDescent(STEP), at_composite),
    "own steps": (MovingSteps(), at_iteration),
    "own steps with the gradient": (MovingSteps(with_gradient=True), at_learned_descent),
}
STARTS: dict[str, Callable[[Tensor], Tensor] | None] = {"constant": None, "from x": lambda x: (W @ x).sin()}


def walk_of(
    inner: AbstractUnrollable,
    at: Callable[[Tensor], Objective],
    x: Tensor,
    init: Callable[[Tensor], Tensor] | None = None,
    y0: Tensor = Y0,
    g: Callable[[Tensor, Tensor], Tensor] = smooth,
) -> Walk:
    problem = FlatProblem(BilevelProblem(f, g, init=init), ravel(x)[1], ravel(Y0)[1])
    leaf = x.clone().requires_grad_()
    fixed = at(x)
    fixed.tally = problem.tally  # as where an objective is made from the problem
    return Walk(problem, inner, at(leaf), fixed, leaf, problem.start(leaf, y0), bool(inner.tol))


def plainly(inner: AbstractUnrollable, at: Callable[[Tensor], Objective], x: Tensor, state: State, begin: int) -> State:
    """The state after the last step, by a loop over the steps from number `begin`."""
    objective = at(x)
    for k in range(begin, inner.max_steps):
        gradient = None
        if inner.needs_gradient:
            gradient = state[0] @ H - B @ x
        state = inner.advance(objective, gradient, state, k)
    return state


def differences(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-3) -> Tensor:
    """The gradient by central differences of fourth order."""

    def along(e: Tensor) -> Tensor:
        near, far = function(x + e) - function(x - e), function(x + 2 * e) - function(x - 2 * e)
        return (8 * near - far) / (12 * step)

    return torch.stack([along(e) for e in step * torch.eye(len(x))])


@pytest.mark.parametrize("form", SAME, ids=str)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_differentiated_in_x_through_all_that_they_use(
    kind: str, start: str, form: AbstractUnrolling
) -> None:
    """Through the gradient, the proximal map, the number of the step and the start: against finite differences."""
    (inner, at), init = KINDS[kind], STARTS[start]

    def final_f(x: Tensor) -> Tensor:
        y0 = Y0 if init is None else init(x)
        return f(x, plainly(inner, at, x, inner.begin(y0), 0)[0])

    found = form.differentiate(walk_of(inner, at, X, init))
    assert torch.allclose(found.value, final_f(X), rtol=1e-12)
    assert torch.allclose(found.grad, differences(final_f, X), rtol=1e-9, atol=1e-10)
    assert found.grad.norm() > 0.1
    assert not found.end[0].requires_grad


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_truncated_steps_keep_their_numbers(kind: str, k: int) -> None:
    """Truncated(K) is the derivative of the last K of the N steps, from the state before them as it was at x."""
    inner, at = KINDS[kind]
    before = plainly(replace(inner, max_steps=N - k), at, X, inner.begin(Y0), 0)  # type: ignore[type-var]
    expected = differences(lambda x: f(x, plainly(inner, at, x, before, N - k)[0]), X)
    found = Truncated(k).differentiate(walk_of(inner, at, X))
    assert torch.allclose(found.grad, expected, rtol=1e-9, atol=1e-10)


def test_a_step_is_given_its_number_once_in_each_pass() -> None:
    """0, 1, ..., N - 1; checkpoints take the steps between again, from the first of them on, and then with a graph."""
    seen: list[int] = []

    def at(x: Tensor) -> Objective:
        def own_step(y: Tensor, gradient: Tensor | None, k: int) -> Tensor:
            seen.append(k)
            return y * x.sum() / 2

        return Objective(lambda y: y.sum(), own=OwnStep(own_step, N, needs_gradient=False))

    for form in (Reverse(), Forward(), Truncated(3)):
        seen.clear()
        form.differentiate(walk_of(MovingSteps(), at, X))
        assert seen == list(range(N))
    seen.clear()
    Checkpointed().differentiate(walk_of(MovingSteps(), at, X))
    assert seen == [*range(N), 6, 3, 4, 5, 4, 3, 0, 1, 2, 1, 0]


def test_nothing_of_g_is_evaluated_or_counted_where_steps_need_no_gradient() -> None:
    for form in SAME:
        walk = walk_of(MovingSteps(), at_iteration, X)
        found = form.differentiate(walk)
        verdict = solved(walk, found.end)
        stats = walk.problem.tally.stats()
        assert (stats.gradients, stats.hvps, stats.cross_products, stats.values) == (0, 0, 0, 0)
        assert (stats.inner_steps, stats.outer_gradients) == (N, 1)
        assert verdict.statuses == (Status.successful,)
        last = plainly(MovingSteps(N - 1), at_iteration, X, MovingSteps().begin(Y0), 0)[0]
        assert verdict.residual == pytest.approx(float((found.end[0] - last).norm()))


@pytest.mark.parametrize("sign", [1, -4])
def test_steps_of_ones_own_are_what_was_asked_for_though_they_climb_g(sign: int) -> None:
    """The residual is the last move, as the solver's own is; a gradient that has grown is no divergence."""
    step = Iteration(lambda x, y, d, k: y - sign * x[0] * d, steps=5, objective_function=lambda x, y: y @ y / 2)
    problem = BilevelProblem(f, inner=step)
    x, y0 = torch.tensor([0.3, 0.0, 0.0]), torch.ones(2)
    alone = hypergradient(problem, x, y0, estimator=FiniteDifference(OwnSteps()))
    for form in (Reverse(), Checkpointed(), Forward(), Truncated(5)):
        found = hypergradient(problem, x, y0, estimator=ITD(OwnSteps(), form))
        assert torch.allclose(found.grad, alone.grad, rtol=1e-6, atol=1e-9)
        assert found.status is Status.successful
        y = [(1 - sign * 0.3) ** k for k in (4, 5)]
        assert found.reports[0].residual == pytest.approx(2**0.5 * abs(y[1] - y[0]))
        assert len(found.reports) == 1
        assert found.stats.gradients == (13 if form == Checkpointed() else 5)


def test_the_gradients_of_proximal_steps_are_counted_as_those_of_descent() -> None:
    for form in SAME:
        walk, plain = walk_of(ProximalDescent(STEP), at_composite, X), BilevelProblem(f, smooth)
        solved(walk, form.differentiate(walk).end)
        descent = hypergradient(plain, X, Y0, estimator=ITD(Iterate(GradientDescent(STEP), N), form))
        assert walk.problem.tally.stats() == descent.stats


@pytest.mark.parametrize("form", SAME, ids=str)
def test_a_proximal_iteration_stops_at_its_own_residual(form: AbstractUnrolling) -> None:
    """At |y - y+| / a <= tol, and not at a small gradient, which a minimum of g + h has not."""
    inner = ProximalDescent(STEP, 500, 1e-11)
    form = Truncated(500) if isinstance(form, Truncated) else form
    walk = walk_of(inner, at_composite, X)
    found = form.differentiate(walk)
    verdict = solved(walk, found.end)
    assert verdict.statuses == (Status.successful,)
    assert 10 < verdict.steps < 500
    y = found.end[0]
    after = plainly(replace(inner, max_steps=1), at_composite, X, (y,), 0)[0]
    before = plainly(replace(inner, max_steps=verdict.steps - 1), at_composite, X, (Y0,), 0)[0]
    assert float(verdict.residual) == pytest.approx(float((after - y).norm()) / STEP, rel=1e-9)
    assert float(verdict.residual) <= 1e-11 < float((before - y).norm()) / STEP
    assert float((y @ H - B @ X).norm()) > 0.1
    limit = differences(lambda x: f(x, plainly(ProximalDescent(STEP, 500), at_composite, x, (Y0,), 0)[0]), X)
    assert torch.allclose(found.grad, limit, rtol=1e-7)
    if not isinstance(form, Truncated):
        assert found.left is not None
        verdict_of_derivative = carried(walk, found)
        assert verdict_of_derivative is not None
        assert verdict_of_derivative.status is Status.successful


@pytest.mark.parametrize("form", [Reverse(), Checkpointed(), Forward()], ids=str)
def test_a_proximal_iteration_that_stops_too_early_for_its_derivative_says_so(form: AbstractUnrolling) -> None:
    """From the solution no step is taken, also where x reaches y by the proximal map alone; `min_steps` prevents it."""

    def g(x: Tensor, y: Tensor) -> Tensor:
        return smooth(X, y)

    def at(x: Tensor) -> Objective:
        return Objective(lambda y: g(x, y), prox=threshold(x))

    start = plainly(ProximalDescent(STEP, 2000), at, X, (Y0,), 0)[0]
    for least, status in ((0, Status.truncated), (200, Status.successful)):
        walk = walk_of(ProximalDescent(STEP, 2000, 1e-8, least), at, X, y0=start, g=g)
        found = form.differentiate(walk)
        assert found.left is not None
        assert walk.steps == least
        verdict = carried(walk, found)
        assert verdict is not None
        assert verdict.status is status


def test_rows_of_a_proximal_iteration_stand_still_one_by_one() -> None:
    """With tasks, each row takes the steps that it takes alone, and its derivative is theirs."""
    starts = torch.stack([Y0, 0.01 * Y0, 30 * Y0])
    inner, data = ProximalDescent(STEP, 500, 1e-4), torch.zeros(3, 1)
    structures = ravel(X)[1], ravel(Y0)[1]

    def tasks_walk() -> Walk:
        problem = BilevelProblem(lambda x, y, d: f(x, y), lambda x, y, d: smooth(x, y), tasks=True)
        flat, leaf = FlatProblem(problem, *structures, data), X.clone().requires_grad_()
        return Walk(flat, inner, at_composite(leaf), at_composite(X), leaf, starts, to_converge=True)

    for form in (Reverse(), Checkpointed(), Forward(), Truncated(500)):
        alone = [form.differentiate(walk_of(inner, at_composite, X, y0=start)) for start in starts]
        together = form.differentiate(tasks_walk())
        assert torch.allclose(together.end[0], torch.stack([found.end[0] for found in alone]), rtol=1e-12)
        mean = torch.stack([found.grad for found in alone]).mean(0)
        assert torch.allclose(together.grad, mean, rtol=1e-10)


def test_forward_mode_refuses_a_step_whose_derivative_cannot_be_differentiated() -> None:
    """It would lose the tangents without a word."""

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: Tensor) -> Tensor:
            return y / 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: object, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return grads[0] / 2

    def at(x: Tensor) -> Objective:
        own = OwnStep(lambda y, *_: Halved.apply(y) + x.sum(), N, needs_gradient=False)  # type: ignore[no-untyped-call]
        return Objective(lambda y: y.sum(), own=own)

    expected = Reverse().differentiate(walk_of(MovingSteps(), at, X)).grad
    assert expected.norm() > 0
    with pytest.raises(NotImplementedError, match="Halved"):
        Forward().differentiate(walk_of(MovingSteps(), at, X))


def test_a_step_may_ignore_all_that_it_is_given() -> None:
    def at(x: Tensor) -> Objective:
        return Objective(lambda y: smooth(x, y), prox=lambda v, step: torch.ones_like(v))

    for form in SAME:
        found: Unrolled = form.differentiate(walk_of(ProximalDescent(STEP), at, X))
        assert torch.equal(found.end[0], torch.ones(Q))
        assert torch.allclose(found.grad, 2 * X * Q)


# The forms as values of ITD, and the keywords of old

KEYWORDS: list[tuple[AbstractUnrolling, dict[str, int]]] = [
    (Reverse(), {}),
    (Truncated(2), {"truncate": 2}),
    (Checkpointed(), {"checkpoint": True}),
    (Forward(), {"forward": True}),
]


@settings(max_examples=10)
@given(families(max_p=3, max_q=4), st.integers(0, 9), st.sampled_from([None, 0.3]), st.sampled_from(KEYWORDS))
def test_a_form_and_its_keyword_are_the_same_estimator(
    family: QuadraticFamily, steps: int, tol: float | None, both: tuple[AbstractUnrolling, dict[str, int]]
) -> None:
    form, keyword = both
    inner = Iterate(HeavyBall(0.5 / float(torch.linalg.eigvalsh(family.A)[-1]), 0.5), steps, tol=tol)
    old, new = ITD(inner, **keyword), ITD(inner, form)  # type: ignore[arg-type]
    assert old == new == ITD(inner, unrolling=form) == replace(old)
    x, y0 = normal(family.s.numel(), seed=1), normal(family.c.numel(), seed=2)
    a, b = (hypergradient(BilevelProblem(family.f, family.g), x, y0, estimator=e, throw=False) for e in (old, new))
    assert torch.equal(a.grad, b.grad)
    assert (a.stats, a.reports) == (b.stats, b.reports)


def test_every_form_makes_the_same_report_where_y_is_not_to_solve_anything() -> None:
    """The residual before the last step, also where steps are taken again on the way back; and one verdict."""
    problem = BilevelProblem(f, smooth, init=lambda x: (W @ x).sin())
    for step in (STEP, 9 * STEP):
        inner = Iterate(GradientDescent(step), 5)
        found = [hypergradient(problem, X, Y0, estimator=ITD(inner, form), throw=False) for form in SAME]
        for other in found[1:]:
            assert other.reports[0].residual == pytest.approx(found[0].reports[0].residual, rel=1e-12)
            assert other.status is found[0].status
        assert found[0].status is (Status.successful if step == STEP else Status.diverged)


def test_one_form_at_most_is_taken() -> None:
    inner = Iterate(GradientDescent(0.1), 5)
    with pytest.raises(ValueError, match=r"at most one of .* Got Forward\(\) and the keyword for Truncated"):
        ITD(inner, Forward(), truncate=2)
    with pytest.raises(ValueError, match=r"`Truncated\(steps=\.\.\.\)` must be at least 1. Got 0"):
        Truncated(0)
    with pytest.raises(TypeError, match=r"`ITD\(unrolling=\.\.\.\)` must be a form of unrolling such as"):
        ITD(inner, 3)  # type: ignore[arg-type]
    assert replace(ITD(inner, truncate=3), unrolling=Forward()) == ITD(inner, Forward())
