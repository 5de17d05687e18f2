"""First-order methods of the value function: closed forms on quadratics, costs, batches, resumed runs."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import pytest
import torch
from bilevel_strategies import families
from hypothesis import given, settings, strategies as st
from torch import Tensor

from bilevel import (
    BilevelProblem,
    Box,
    Constants,
    FiniteSum,
    Polytope,
    Split,
    Status,
    bounds,
    error_bound,
    minimize,
    prox,
)
from bilevel._flat import FlatProblem
from bilevel._linear import LinearOperator
from bilevel._numerics.lanczos import ritz_ends
from bilevel._tree import ravel
from bilevel.algorithms import (
    BOME,
    ESJS,
    F2SA,
    MEHA,
    PBGD,
    SAMA,
    AbstractAlgorithm,
    AbstractData,
    Growth,
    Oracle,
    Power,
    ScaleBiO,
)
from bilevel.algorithms.bome import Descended, Pair
from bilevel.algorithms.esj_s import Perturbed
from bilevel.algorithms.f2sa import Copies
from bilevel.algorithms.meha import Envelope
from bilevel.algorithms.oracle import Block
from bilevel.algorithms.pbgd import Penalized
from bilevel.algorithms.sama import Adapted, update_diagonal
from bilevel.outer.batches import sources
from bilevel.problems.quadratic import QuadraticFamily
from bilevel.solvers import Adam, GradientDescent, HeavyBall, TorchOptim
from bilevel.testing import check_algorithm

P, Q = 3, 5
EXACT = 1e-11


def samples(n: int, seed: int) -> tuple[Tensor, ...]:
    """Of sums of rank-one quadratics: u, w, c, e, a, b of g_i = (u y)^2/2 + (w x)^2/2 + (c x)(e y) + a y + b x."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (Q, P, P, Q, Q, P)
    return tuple(torch.randn(n, size, generator=generator, dtype=torch.float64) * 0.7 for size in sizes)


def objective(x: Tensor, y: Tensor, data: tuple[Tensor, ...]) -> Tensor:
    u, w, c, e, a, b = data
    terms: Tensor = (u @ y).square() / 2 + (w @ x).square() / 2 + 0.3 * (c @ x) * (e @ y) + a @ y + b @ x
    found: Tensor = terms.mean() + (y.square().sum() + x.square().sum()) / 2
    return found


PROBLEM = BilevelProblem(objective, objective)
OF_G, OF_F = samples(8, 0), samples(5, 1)  # in blocks of 3, the last ones of 2
X, Y = torch.full((P,), 0.5, dtype=torch.float64), torch.zeros(Q, dtype=torch.float64)
FULL = Split(g=FiniteSum(OF_G, 3, "full"), f=FiniteSum(OF_F, 3, "full"))
BATCHES = Split(g=FiniteSum(OF_G, 3), f=FiniteSum(OF_F, 3))


@final
@dataclass(frozen=True, eq=False)
class Sum:
    """The whole of one: x'Wx/2 + x'Gy + y'Hy/2 + a'y + b'x."""

    W: Tensor
    G: Tensor
    H: Tensor
    a: Tensor
    b: Tensor

    @staticmethod
    def of(data: tuple[Tensor, ...]) -> Sum:
        u, w, c, e, a, b = data
        n = len(u)
        return Sum(w.T @ w / n + eye(P), 0.3 * c.T @ e / n, u.T @ u / n + eye(Q), a.mean(0), b.mean(0))

    def x(self, x: Tensor, y: Tensor) -> Tensor:
        return self.W @ x + self.G @ y + self.b

    def y(self, x: Tensor, y: Tensor) -> Tensor:
        return self.H @ y + self.G.T @ x + self.a


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


g, f = Sum.of(OF_G), Sum.of(OF_F)
J_T = -g.G @ torch.linalg.inv(g.H)  # J', J = dy*/dx


def minimizer(x: Tensor, nu: float) -> Tensor:
    """Of g + nu f in y."""
    right = -(g.G.T @ x + g.a) - nu * (f.G.T @ x + f.a)
    found: Tensor = torch.linalg.solve(g.H + nu * f.H, right)
    return found


def phi_gradient(x: Tensor) -> Tensor:
    y = minimizer(x, 0.0)
    found: Tensor = f.x(x, y) + J_T @ f.y(x, y)
    return found


def f2sa_gradient(x: Tensor, order: int, weight: float) -> Tensor:
    if order == 1:
        low, high = minimizer(x, 0.0), minimizer(x, 1 / weight)
        return f.x(x, high) + weight * (g.x(x, high) - g.x(x, low))
    low, high = minimizer(x, -1 / weight), minimizer(x, 1 / weight)
    return (f.x(x, high) + f.x(x, low)) / 2 + weight / 2 * (g.x(x, high) - g.x(x, low))


def root(of: Any, size: int = P) -> Tensor:
    """Where an affine map is zero."""
    zero = torch.zeros(size, dtype=torch.float64)
    slopes = torch.stack([of(row) - of(zero) for row in eye(size)], dim=1)
    found: Tensor = torch.linalg.solve(slopes, -of(zero))
    return found


def close(found: Any, expected: Any, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def oracle_of(data: Any, algorithm: AbstractAlgorithm[Any], step: int = 0, problem: BilevelProblem = PROBLEM) -> Oracle:
    flat = FlatProblem(problem, ravel(X, "x")[1], ravel(Y, "y")[1])
    return Oracle(flat, sources(data), algorithm.draws, step=step)


def normal(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(algorithm: AbstractAlgorithm[Any], data: Any, steps: int, **given: Any) -> Any:
    return minimize(PROBLEM, X, Y, algorithm=algorithm, data=data, max_steps=steps, **given)


# F2SA on quadratics


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("weight", [2.0, 10.0])
def test_at_the_minimizers_of_its_copies_f2sa_is_off_as_the_closed_form_says(order: int, weight: float) -> None:
    x, algorithm = normal(P, 0), F2SA(0.2, 0.1, weight, order=order, inner_steps=2)
    low, high = minimizer(x, 0.0 if order == 1 else -1 / weight), minimizer(x, 1 / weight)
    found = algorithm.evaluate(oracle_of(FULL, algorithm), Copies(x, low, high, order, math.nan)).estimate
    close(found.grad, f2sa_gradient(x, order, weight))
    best = minimizer(x, 0.0)
    b = f.y(x, best)
    at = high if order == 1 else (low + high) / 2
    close(high - best, -torch.linalg.solve(f.H + weight * g.H, b))
    close(found.grad - phi_gradient(x), (f.G + J_T @ f.H) @ (at - best))
    close(found.y, best if order == 1 else at)
    if order == 2:
        off = torch.linalg.solve(g.H + f.H / weight, f.H @ torch.linalg.solve(g.H - f.H / weight, b)) / weight**2
        close(at - best, off)


def test_doubling_the_weight_divides_the_bias_by_two_and_by_four() -> None:
    x = normal(P, 1)
    for order, factor in ((1, 2.0), (2, 4.0)):
        once, twice = ((f2sa_gradient(x, order, w) - phi_gradient(x)).norm() for w in (400.0, 800.0))
        assert float(once / twice) == pytest.approx(factor, rel=1e-2)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_f2sa_ends_where_its_closed_form_is_zero_and_grad_phi_is_the_bias(order: int, inner_steps: int) -> None:
    algorithm = F2SA(0.4, 0.4, weight=4.0, order=order, inner_steps=inner_steps)
    found = run(algorithm, FULL, 70)
    expected = root(lambda x: f2sa_gradient(x, order, 4.0))
    close(found.x, expected)
    at = minimizer(expected, 0.25)
    best = minimizer(expected, 0.0) if order == 1 else (at + minimizer(expected, -0.25)) / 2
    close(found.y, best)
    off = (f.G + J_T @ f.H) @ ((at if order == 1 else best) - minimizer(expected, 0.0))
    close(phi_gradient(found.x), -off)
    assert float(off.norm()) > 1e-3
    assert found.history[-1].grad_norm < 1e-10 < 1e-2 < found.history[0].grad_norm


def test_the_step_of_the_copies_fits_g_whatever_the_weight() -> None:
    """What is stepped is g + f / weight, also by PBGD: f + weight g would diverge."""
    for weight in (10.0, 1e6):
        for algorithm in (F2SA(0.4, 1e-12, weight, order=1), F2SA(0.4, 1e-12, weight), PBGD(0.4, 1e-12, weight)):
            found = run(algorithm, FULL, 60)
            middle = (minimizer(X, 1 / weight) + minimizer(X, -1 / weight)) / 2
            close(found.y, middle if algorithm == F2SA(0.4, 1e-12, weight) else minimizer(X, 0.0), 1e-8)


def test_where_f_is_zero_both_copies_and_all_of_h_see_the_same_samples() -> None:
    """Otherwise h would be weight times the noise of grad_x g."""
    nothing = BilevelProblem(lambda x, y, data: 0.0 * (x.sum() + y.sum()), objective)
    still = PBGD(1e-30, 0.1, 1e3)  # its y and omega see different samples, but the two grad_x g the same
    for algorithm in (F2SA(0.2, 0.1, 1e3, order=1, inner_steps=3), F2SA(0.2, 0.1, 1e3), MEHA(1e-30, 0.1), still):
        found = minimize(nothing, X, Y, algorithm=algorithm, data=BATCHES, max_steps=4)
        close(found.x, X, 1e-9)


# The order of F2SA


def tilted(curvatures: list[float]) -> BilevelProblem:
    """H = diag(1, 0.1), and the curvatures of f in y."""
    H, C = torch.tensor([1.0, 0.1]).double(), torch.tensor(curvatures).double()
    return BilevelProblem(
        lambda x, y: (C * y.square()).sum() / 2 + (x - 1).square().sum(),
        lambda x, y: (H * y.square() / 2 - x * y).sum(),
    )


TWO = torch.zeros(2, dtype=torch.float64)


def said(problem: BilevelProblem, algorithm: AbstractAlgorithm[Any], **given: Any) -> set[str]:
    """What the estimates of a run note."""
    found: set[str] = set()

    def see(_: Any, estimate: Any) -> None:
        found.add(estimate.note)

    minimize(problem, TWO, TWO, algorithm=algorithm, max_steps=2, callback=see, **given)
    return found


def test_order_two_is_the_default_where_it_is_measured_to_apply_and_not_only_where_it_is_known_to() -> None:
    problem = tilted([5.0, 0.5])  # weight mu = 1 < 5, and yet 10 H - C = diag(5, 0.5)
    assert said(problem, F2SA(0.3, 0.01)) == {""}
    two, one = (minimize(problem, TWO, TWO, algorithm=F2SA(0.3, 0.01, order=k), max_steps=5).x for k in (2, 1))
    assert torch.equal(minimize(problem, TWO, TWO, algorithm=F2SA(0.3, 0.01), max_steps=5).x, two)
    assert not torch.equal(one, two)


@pytest.mark.parametrize("curvatures", [[5.0, 3.0], [11.0, 0.0], [10.0, 0.5]])  # the last: exactly zero
def test_where_order_two_does_not_apply_the_default_is_order_one_and_says_so(curvatures: list[float]) -> None:
    problem = tilted(curvatures)
    least = min(1.0 - curvatures[0] / 10, 0.1 - curvatures[1] / 10)
    (note,) = said(problem, F2SA(0.3, 0.01))
    assert note.startswith("order 1: g - f / weight is not strongly convex in y (least curvature ")
    assert float(note.split("least curvature ")[1].split()[0]) == pytest.approx(least, abs=1e-15)
    with pytest.raises(ValueError, match=r"`F2SA` does not apply: `order=2` needs .* curvature .* is -?\d.* weight 10"):
        minimize(problem, TWO, TWO, algorithm=F2SA(0.3, 0.01, order=2), max_steps=2)
    minimize(problem, TWO, TWO, algorithm=F2SA(0.3, 0.01, weight=100.0, order=2), max_steps=2)  # enough
    assert said(problem, F2SA(0.3, 0.01, order=1)) == {""}  # nobody asked


def test_what_decides_is_all_of_the_data_where_they_are_known() -> None:
    a = torch.tensor([0.0, 0.0, 0.0, 30.0], dtype=torch.float64)  # f is curved on the last sample only
    problem = BilevelProblem(
        lambda x, y, a: (a.mean() * y.square() / 2 + (x - 1).square()).sum(),
        lambda x, y, a: ((y - x).square() / 2).sum(),
    )
    order = F2SA(0.3, 0.01, weight=5.0)
    given = {"data": Split(f=FiniteSum(a, 1), g=FiniteSum(a, 1))}
    (note,) = said(problem, order, **given)
    assert "curvature -0.5 " in note
    of_loader = {"data": [torch.zeros(1).double()] * 20}
    assert said(problem, order, **of_loader) == {""}


def test_the_order_is_measured_without_second_derivatives_too() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            ctx.save_for_backward(y)
            return y.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            found: Tensor = 2 * grad_outputs[0] * ctx.saved_tensors[0]
            return found

    square: Any = Square.apply
    for curvature, refused in ((9.0, False), (11.0, True)):
        problem = BilevelProblem(
            lambda x, y, c=curvature: (c * square(y) / 2 + (x - 1).square()).sum(),
            lambda x, y: (square(y) / 2 - x * y).sum(),
        )
        assert said(problem, F2SA(0.3, 0.01)) != {""} if refused else said(problem, F2SA(0.3, 0.01)) == {""}


@given(st.integers(1, 12), st.integers(0, 99), st.booleans())
@settings(max_examples=25, deadline=None)
def test_lanczos_steps_see_both_ends_of_a_small_spectrum(n: int, seed: int, rows: bool) -> None:
    A = torch.randn(2, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    A = A + A.mT
    each = A if rows else A[:1]
    like = torch.zeros(len(each), n, dtype=torch.float64)
    least, most = ritz_ends(LinearOperator(lambda v: (each @ v.unsqueeze(-1)).squeeze(-1), n), like)
    values = torch.linalg.eigvalsh(each)
    close(least, values[:, 0], 1e-8)
    close(most, values[:, -1], 1e-8)


# Limits of the others


def test_pbgd_ends_where_f2sa_of_order_one_does() -> None:
    found = run(PBGD(0.3, 0.15, weight=4.0), FULL, 180)
    expected = root(lambda x: f2sa_gradient(x, 1, 4.0))
    close(found.x, expected)
    close(found.y, minimizer(expected, 0.0))
    assert found.history[-1].grad_norm < 1e-9
    algorithm = PBGD(0.3, 0.15, weight=4.0)
    state = Penalized(expected, minimizer(expected, 0.25), minimizer(expected, 0.0))
    there = algorithm.step(oracle_of(FULL, algorithm), state, algorithm.evaluate(oracle_of(FULL, algorithm), state))
    close((there.x, there.y, there.omega), (state.x, state.y, state.omega))


def test_the_gradient_form_of_pbgd_ends_where_its_closed_form_is_zero() -> None:
    weight = 4.0

    def lagging(x: Tensor) -> Tensor:  # y of f + weight |grad_y g|^2 / 2
        best = minimizer(x, 0.0)
        off: Tensor = torch.linalg.solve(weight * g.H @ g.H + f.H, f.y(x, best))
        return best - off

    def h(x: Tensor) -> Tensor:
        return f.x(x, lagging(x)) + weight * g.G @ g.y(x, lagging(x))

    x = normal(P, 2)
    close(h(x) - phi_gradient(x), (f.G + J_T @ f.H) @ (lagging(x) - minimizer(x, 0.0)))
    found = run(PBGD(0.25, 0.3, weight, form="gradient"), FULL, 110)
    close(found.x, root(h))
    close(found.y, lagging(found.x))


def test_meha_at_rest_is_descent_on_the_gap_between_g_and_its_moreau_envelope() -> None:
    x, y, c, s = normal(P, 3).requires_grad_(), normal(Q, 4).requires_grad_(), 3.0, 0.7

    def at(x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = torch.linalg.solve(g.H + eye(Q) / s, y / s - g.G.T @ x - g.a)
        return found

    theta = at(x, y)
    envelope = objective(x, theta, OF_G) + (theta - y).square().sum() / (2 * s)
    v_x, v_y = torch.autograd.grad(envelope, (x, y), retain_graph=True)
    close((v_x, v_y), (g.x(x, theta).detach(), ((y - theta) / s).detach()))
    gap = objective(x, y, OF_F) + c * (objective(x, y, OF_G) - envelope)
    expected = torch.autograd.grad(gap, (x, y))
    still = MEHA(1e-30, 0.1, weight=c, smoothing=s)
    found = still.evaluate(oracle_of(FULL, still), Envelope(x.detach(), y.detach(), theta.detach()))
    close((found.estimate.grad, found.kept[1]), expected)
    close(found.kept[2], torch.zeros_like(Y))


def test_meha_ends_at_the_stationary_point_of_its_penalized_problem() -> None:
    c, s = 4.0, 0.7

    def conditions(z: Tensor) -> Tensor:
        x, y, theta = torch.split(z, [P, Q, Q])
        d_y = f.y(x, y) / c + g.y(x, y) - (y - theta) / s
        return torch.cat([f.x(x, y) + c * (g.x(x, y) - g.x(x, theta)), d_y, g.y(x, theta) + (theta - y) / s])

    expected = root(conditions, P + 2 * Q)
    found = run(MEHA(0.3, 0.3, weight=c, smoothing=s), FULL, 110)
    close((found.x, found.y), (expected[:P], expected[P : P + Q]))


def test_meha_takes_a_prox_term_that_depends_on_x() -> None:
    """The gap of a lasso, y >= 0 small enough that nothing is at a kink: theta = (y/s + a - w) / (1 + 1/s)."""
    a, c, s = torch.tensor([3.0, 2.0]).double(), 5.0, 0.5
    lasso = BilevelProblem(
        lambda x, y: (y - 1).square().sum() / 2,
        lambda x, y: (y - a).square().sum() / 2,
        prox=lambda x: prox.L1(x.exp()),
    )
    x, y = torch.tensor([0.1, -0.2]).double().requires_grad_(), torch.tensor([0.9, 1.2]).double()
    theta = (y / s + a - x.exp()) / (1 + 1 / s)

    def inner(y: Tensor) -> Tensor:
        return (y - a).square().sum() / 2 + (x.exp() * y.abs()).sum()

    gap = (y - 1).square().sum() / 2 + c * (inner(y) - inner(theta) - (theta - y).square().sum() / (2 * s))
    (expected,) = torch.autograd.grad(gap, x)
    still = MEHA(1e-12, 0.1, weight=c, smoothing=s)
    flat = FlatProblem(lasso, ravel(x.detach(), "x")[1], ravel(y, "y")[1])
    state = Envelope(x.detach(), y, theta.detach())
    found = still.evaluate(Oracle(flat, sources(None), still.draws), state)
    close(found.estimate.grad, expected, 1e-9)
    assert float(found.kept[2].norm()) < 1e-3  # theta is at rest, as seen over a step of 1e-12
    ended = minimize(lasso, x.detach(), y, algorithm=MEHA(0.2, 0.1, weight=40.0, smoothing=s), max_steps=120)
    close(ended.x.exp(), a - 1, 0.03)  # y* = a - e^x = 1


def test_prox_terms_that_meha_cannot_take_are_refused_with_the_reason() -> None:
    def of(term: Any) -> BilevelProblem:
        return BilevelProblem(lambda x, y: (y - 1).square().sum(), lambda x, y: (y - x).square().sum(), prox=term)

    two = torch.ones(2).double()
    with pytest.raises(ValueError, match="`MEHA` does not apply: the `prox` term is a set that moves with x"):
        minimize(of(prox.LInfBall), two, two, algorithm=MEHA(0.1, 0.1), max_steps=1)
    with pytest.raises(ValueError, match=r"`MEHA` does not apply: .* Pass numbers as `inner_step=`"):
        minimize(of(prox.L1), two, two, algorithm=MEHA(Adam(0.1), 0.1), max_steps=1)
    minimize(of(lambda x: prox.LInfBall(2.0)), two, two, algorithm=MEHA(0.1, 0.1), max_steps=1)  # one that stays
    bounded = BilevelProblem(PROBLEM.f, PROBLEM.g, constraints=lambda x, data: Polytope(upper=torch.ones(Q).double()))
    for algorithm in EVERY.values():
        with pytest.raises(ValueError, match=rf"`{type(algorithm).__name__}` does not apply: y is constrained"):
            minimize(bounded, X, Y, algorithm=algorithm, data=FULL, max_steps=1)
        if not isinstance(algorithm, MEHA):
            with pytest.raises(ValueError, match=rf"`{type(algorithm).__name__}` does not apply: .*non-smooth"):
                minimize(of(prox.L1), two, two, algorithm=algorithm, max_steps=1)


@given(st.integers(0, 999), st.sampled_from(["gradient", "value"]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_bome_lets_q_fall_as_its_barrier_says_and_no_faster_than_it_must(seed: int, barrier: Any, full: bool) -> None:
    algorithm = BOME(0.2, 0.1, inner_steps=3, rate=0.5, barrier=barrier)
    x, y = normal(P, seed), 3 * normal(Q, seed + 1)
    state = Pair(x, y)
    d: Descended = algorithm.evaluate(oracle_of(FULL if full else BATCHES, algorithm, seed), state).kept
    falls = float((d.q_x * d.x).sum() + (d.q_y * d.y).sum() - d.barrier)
    scale = float(d.barrier.abs()) + float(d.x.norm() + d.y.norm()) * float(d.q_x.norm() + d.q_y.norm())
    assert falls >= -1e-12 * scale
    assert (falls <= 1e-12 * scale) == (float(d.multiplier) > 0)
    if full:
        back = torch.matrix_power(eye(Q) - 0.2 * g.H, 3)
        off = y - minimizer(x, 0.0)
        close((d.q_x, d.q_y), (g.G @ (off - back @ off), g.H @ off), 1e-10)
        last = minimizer(x, 0.0) + back @ off
        fall = objective(x, y, OF_G) - objective(x, last, OF_G)
        square = d.q_x.square().sum() + d.q_y.square().sum()
        close(d.barrier, 0.5 * (square if barrier == "gradient" else fall), 1e-10)


def test_bome_at_the_inner_solution_follows_f() -> None:
    algorithm = BOME(0.2, 0.1)
    problem = BilevelProblem(lambda x, y: (x * y).sum() + x.sum(), lambda x, y: (y.square() + 0 * x).sum())
    flat = FlatProblem(problem, ravel(X, "x")[1], ravel(X, "y")[1])
    found = algorithm.evaluate(Oracle(flat, sources(None), algorithm.draws), Pair(X, 0 * X))
    assert float(found.kept.multiplier) == 0.0
    close((found.kept.x, found.kept.y), (torch.ones_like(X), X))


# SAMA


def test_the_diagonal_of_sama_is_the_derivative_of_the_optimizers_step() -> None:
    adam, beta1, beta2, eps = Adam(0.3, eps=0.1), 0.9, 0.999, 0.1
    y, u = normal(Q, 5), normal(Q, 6)
    state = adam.init(y)
    for seed in (7, 8):
        y, state = adam.step(normal(Q, seed), y, state)
    found = update_diagonal(adam, u, y, state)
    for k in range(Q):  # by differences of the third step
        e = 1e-5 * eye(Q)[k]
        slope = -(adam.step(u + e, y, state)[0] - adam.step(u - e, y, state)[0]) / 2e-5
        close(found[k], slope[k], 1e-8)
    m, v = beta1 * state["m"] + (1 - beta1) * u, beta2 * state["v"] + (1 - beta2) * u.square()
    a, b = 1 - beta1**3, 1 - beta2**3
    size = (v / b).sqrt()
    expected = 0.3 * ((1 - beta1) / a / (size + eps) - m / a * (1 - beta2) * u / b / (size * (size + eps).square()))
    close(found, expected, 1e-10)  # Adam's own term under the root is 1e-24
    close(update_diagonal(GradientDescent(0.3), u, y, {}), torch.full_like(u, 0.3))


@pytest.mark.parametrize("step", [0.2, Adam(0.05, eps=0.1), HeavyBall(0.1, 0.5)])
def test_sama_is_the_derivative_through_one_step_of_its_optimizer(step: Any) -> None:
    """h = grad_x f - G D grad_y f, G on the batch after those of the inner steps; D is the identity for a number."""
    algorithm = SAMA(step, 0.1, inner_steps=2, radius=0.3)
    oracle = oracle_of(BATCHES, algorithm, 3)
    state = algorithm.init(oracle, normal(P, 9), normal(Q, 10))
    found = algorithm.evaluate(oracle, state)
    x, y, memory, diagonal = state.x, state.y, state.inner, torch.ones_like(state.y)
    for number in range(2):
        block = oracle.block("g", number)
        gradient = block.scale * Sum.of(block.data).y(x, y)
        if memory is None:
            y = y - step * gradient
        else:
            diagonal = update_diagonal(step, gradient, y, memory)
            y, memory = step.step(gradient, y, memory)
    of_f, of_g = oracle.block("f"), oracle.block("g", 2)
    seen = Sum.of(of_f.data)
    expected = of_f.scale * (seen.x(x, y) - of_g.scale * Sum.of(of_g.data).G @ (diagonal * seen.y(x, y)))
    close(found.estimate.grad, expected)


def test_sama_refuses_an_optimizer_whose_step_it_cannot_differentiate() -> None:
    sgd = TorchOptim(lambda params: torch.optim.SGD(params, lr=0.1))
    with pytest.raises(ValueError, match="`SAMA` does not apply: `TorchOptim` as `inner_step=` has a step that is not"):
        run(SAMA(sgd, 0.1), FULL, 2)
    assert run(SAMA(0.1, sgd), FULL, 2).status.ok


# ESJ-S


@pytest.mark.parametrize("step", [0.2, Adam(0.05, eps=0.1)])
def test_orthonormal_directions_in_all_dimensions_are_the_derivative_along_the_batches(step: Any) -> None:
    adaptive: bool = isinstance(step, Adam)
    algorithm = ESJS(step, 0.1, 4, P, radius=1e-6 if adaptive else 2.0, distribution="orthonormal")
    oracle = oracle_of(BATCHES, algorithm, 2)
    start = normal(Q, 11)
    found = algorithm.evaluate(oracle, Perturbed(normal(P, 12), start)).estimate
    x, y = normal(P, 12).requires_grad_(), start
    memory: Any = step.init(y) if adaptive else None
    for number in range(4):
        block = oracle.block("g", number)
        gradient = block.scale * Sum.of(block.data).y(x, y)
        if memory is None:
            y = y - step * gradient
        else:
            y, memory = step.step(gradient, y, memory)
    of_f = oracle.block("f")
    (expected,) = torch.autograd.grad(of_f.scale * objective(x, y, of_f.data), x)
    close(found.grad, expected, 1e-6 if adaptive else EXACT)
    close(found.y, y.detach())


def test_the_mean_over_signs_is_that_of_the_dense_jacobian_whatever_the_radius() -> None:
    x, y = normal(P, 13), normal(Q, 14)
    algorithm = ESJS(0.2, 0.1, inner_steps=2, directions=4000, radius=3.0)
    found = algorithm.evaluate(oracle_of(FULL, algorithm), Perturbed(x, y)).estimate
    back = eye(Q) - 0.2 * g.H
    J = -0.2 * (eye(Q) + back) @ g.G.T
    w = J.T @ f.y(x, found.y)
    off = float((found.grad - f.x(x, found.y) - w).norm() / w.norm())
    assert off < 4 * math.sqrt((P - 1) / 4000)
    other = algorithm.evaluate(oracle_of(FULL, algorithm, 1), Perturbed(x, y)).estimate.grad
    assert not torch.equal(other, found.grad)  # every step has directions of its own


def test_esj_s_differentiates_through_a_start_that_depends_on_x() -> None:
    maml = BilevelProblem(lambda x, y: y.square().sum() / 2, lambda x, y: (y - 1).square().sum() / 2, init=lambda x: x)
    algorithm = ESJS(0.5, 1.0, inner_steps=1, directions=2, distribution="orthonormal")
    two = torch.ones(2).double() * 3
    close(minimize(maml, two, algorithm=algorithm, max_steps=40).x, -torch.ones_like(two), 1e-3)  # y_1 = (1 + x) / 2
    for other in (F2SA(0.1, 0.1), PBGD(0.1, 0.1), PBGD(0.1, 0.1, form="gradient"), BOME(0.1, 0.1), SAMA(0.1, 0.1)):
        with pytest.raises(ValueError, match=rf"`{type(other).__name__}` does not apply: g does not depend on x"):
            minimize(maml, two, algorithm=other, max_steps=1)


# ScaleBiO


@pytest.mark.parametrize("order", [1, 2])
def test_scalebio_is_a_loop_of_three_adamw_by_hand(order: Any) -> None:
    found = run(ScaleBiO(0.02, 0.03, weight=8.0, weight_decay=0.1, order=order), FULL, 6)
    x, u, w = (t.clone().requires_grad_() for t in (X, Y, Y))
    opt_x = torch.optim.AdamW([x], lr=0.03, weight_decay=0.0)
    opt_u, opt_w = (torch.optim.AdamW([t], lr=0.02, weight_decay=0.1) for t in (u, w))
    for _ in range(6):
        u.grad = (g.y(x, u) - (f.y(x, u) / 8 if order == 2 else 0)).detach()
        w.grad = (g.y(x, w) + f.y(x, w) / 8).detach()
        opt_u.step()
        opt_w.step()
        h = f.x(x, w) if order == 1 else (f.x(x, u) + f.x(x, w)) / 2
        x.grad = (h + 8 / order * (g.x(x, w) - g.x(x, u))).detach()
        opt_x.step()
    close(found.x, x.detach(), 1e-9)


def test_one_batch_serves_all_of_a_step_of_scalebio() -> None:
    algorithm = ScaleBiO(0.1, 0.1)
    assert (algorithm.draws.f, algorithm.draws.g) == (1, 1)
    assert (F2SA(0.1, 0.1, inner_steps=3).draws.f, F2SA(0.1, 0.1, inner_steps=3).draws.g) == (4, 4)


# All of them

EVERY: dict[str, AbstractAlgorithm[Any]] = {
    "f2sa": F2SA(0.2, 0.05, order=1, inner_steps=2, schedule=Power(0.5)),
    "f2sa-2": F2SA(0.2, 0.05, weight=Growth(5.0)),
    "f2sa with Adam": F2SA(Adam(0.05), Adam(0.05), order=1),
    "f2sa with AdamW": F2SA(
        TorchOptim(lambda params: torch.optim.AdamW(params, lr=0.05)),
        TorchOptim(lambda params: torch.optim.AdamW(params, lr=0.05)),
    ),
    "pbgd": PBGD(0.2, 0.05, inner_steps=2),
    "pbgd with Adam": PBGD(Adam(0.05), Adam(0.05), weight=Growth(5.0)),
    "g-pbgd": PBGD(0.1, 0.05, form="gradient"),
    "bome": BOME(0.2, 0.05, inner_steps=3),
    "bome with Adam": BOME(Adam(0.05), Adam(0.05), barrier="value"),
    "meha": MEHA(0.2, 0.05),
    "meha with Adam": MEHA(Adam(0.05), Adam(0.05), proximal_step=0.1),
    "sama": SAMA(0.2, 0.05, inner_steps=2),
    "sama with Adam": SAMA(Adam(0.05), Adam(0.05)),
    "esj-s": ESJS(0.2, 0.05, inner_steps=3, directions=2),
    "esj-s with Adam": ESJS(Adam(0.05), Adam(0.05), inner_steps=2, directions=2),
    "scalebio": ScaleBiO(0.05, 0.05),
}


@pytest.mark.parametrize("name", EVERY)
def test_a_run_that_is_resumed_is_the_uninterrupted_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole, file = run(EVERY[name], BATCHES, 4), tmp_path / "state.pt"
    run(EVERY[name], BATCHES, 2, checkpoint=file)
    found = run(EVERY[name], BATCHES, 4, checkpoint=file, resume=True)
    assert torch.equal(found.x, whole.x) and torch.equal(found.y, whole.y)
    assert found.stats == whole.stats
    assert [record.grad_norm for record in found.history] == [record.grad_norm for record in whole.history]


@pytest.mark.parametrize("name", ["f2sa", "f2sa-2", "pbgd", "g-pbgd", "bome", "meha", "sama", "esj-s", "scalebio"])
def test_it_has_all_that_an_algorithm_promises(name: str) -> None:
    check_algorithm(EVERY[name], exact=False)


CALLS: dict[str, tuple[AbstractAlgorithm[Any], int]] = {
    "f2sa": (F2SA(0.1, 0.1, order=1, inner_steps=2), 3 * 3),
    "f2sa-2": (F2SA(0.1, 0.1, inner_steps=2), 4 * 3),
    "pbgd": (PBGD(0.1, 0.1, inner_steps=2), 2 + 4),
    "g-pbgd": (PBGD(0.1, 0.1, form="gradient"), 5),
    "bome": (BOME(0.1, 0.1, inner_steps=2), 2 + 4),
    "bome by values": (BOME(0.1, 0.1, inner_steps=2, barrier="value"), 2 + 4),
    "meha": (MEHA(0.1, 0.1), 6),
    "sama": (SAMA(0.1, 0.1, inner_steps=2), 2 + 3),
    "esj-s": (ESJS(0.1, 0.1, inner_steps=2, directions=3), 4 * 2 + 1),
    "scalebio": (ScaleBiO(0.1, 0.1), 6),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_those_of_the_table(name: str) -> None:
    algorithm, calls = CALLS[name]
    oracle = oracle_of(Split(g=FiniteSum(samples(8, 0), 4), f=FiniteSum(samples(8, 1), 4)), algorithm, 1)
    state = algorithm.init(oracle, X, Y)
    assert oracle.like.tally.stats().sample_calls == 0
    algorithm.step(oracle, state, algorithm.evaluate(oracle, state))
    stats = oracle.like.tally.stats()
    assert (stats.sample_calls, stats.hvps) == (4 * calls, 1 if name == "g-pbgd" else 0)


@final
@dataclass(frozen=True, eq=False)
class Picked(AbstractData):
    """Blocks of a sum by hand."""

    whole_sum: FiniteSum
    picks: tuple[int, ...]

    def block(self, index: int, first: int) -> Block:
        return self.whole_sum.block_number(self.picks[index])

    def batch(self, index: int, first: int) -> Any:
        return self.block(index, first).data

    def whole(self) -> Any:
        return self.whole_sum.whole()


@pytest.mark.parametrize(
    "algorithm",
    [
        F2SA(0.2, 0.1, order=1),
        F2SA(0.2, 0.1),
        PBGD(0.2, 0.1),
        PBGD(0.2, 0.1, form="gradient"),
        MEHA(0.2, 0.1),
        SAMA(0.2, 0.1),
    ],
    ids=["f2sa", "f2sa-2", "pbgd", "g-pbgd", "meha", "sama"],
)
def test_directions_over_all_batches_have_the_mean_of_everything_the_ragged_ones_too(algorithm: Any) -> None:
    g_sum, f_sum = FiniteSum(OF_G, 3), FiniteSum(OF_F, 3)
    state = algorithm.init(oracle_of(FULL, algorithm), normal(P, 15), normal(Q, 16))
    away = [normal(Q, 17), normal(Q, 18)]
    match state:
        case Copies():
            state = replace(state, low=away[0], high=away[1])
        case Penalized():
            state = replace(state, omega=None if state.omega is None else away[0])
        case Envelope():
            state = replace(state, theta=away[0])
        case Adapted():
            pass
    expected = algorithm.evaluate(oracle_of(FULL, algorithm), state).estimate.grad
    draws, found = algorithm.draws, []
    for of_g in itertools.product(range(g_sum.blocks), repeat=draws.g):
        for of_f in itertools.product(range(f_sum.blocks), repeat=draws.f):
            each = oracle_of(Split(g=Picked(g_sum, of_g), f=Picked(f_sum, of_f)), algorithm)
            found.append(algorithm.evaluate(each, state).estimate.grad)
    close(torch.stack(found).mean(0), expected)
    assert float((found[0] - expected).norm()) > 1e-3


@pytest.mark.parametrize("name", EVERY)
def test_x_is_projected(name: str) -> None:
    found = run(EVERY[name], BATCHES, 4, constraint=Box(0.4, 0.45))
    assert bool((found.x >= 0.4).all() and (found.x <= 0.45).all())
    assert math.isfinite(found.history[-1].grad_norm)


TARGETS = torch.tensor([[1.0, -1.0, 0.5], [0.2, 0.3, 2.0]], dtype=torch.float64)
MANY = BilevelProblem(
    lambda x, y, t: ((y - t).square() * x.exp()).sum() / 2 + (x * y).sum(),
    lambda x, y, t: (y.square() / 2 - t * x * y + y.square() * x / 8).sum(),
    tasks=True,
)
STACKED = BilevelProblem(
    lambda x, y, t: (((y - t).square() * x.exp()).sum() / 2 + (x * y).sum()) / 2,
    lambda x, y, t: (y.square() / 2 - t * x * y + y.square() * x / 8).sum(),
)
OF_TASKS: dict[str, AbstractAlgorithm[Any]] = {  # with the weight divided by the number of tasks where they are one
    "f2sa": F2SA(0.3, 0.01, weight=8.0, order=1, inner_steps=2),
    "f2sa-2": F2SA(0.3, 0.01, weight=8.0),
    "pbgd": PBGD(0.3, 0.01, weight=8.0),
    "g-pbgd": PBGD(0.3, 0.01, weight=8.0, form="gradient"),
    "sama": SAMA(0.3, 0.01),
    "esj-s": ESJS(0.3, 0.01, directions=2),
}


@pytest.mark.parametrize("name", OF_TASKS)
def test_tasks_are_one_problem_whose_f_is_their_mean(name: str) -> None:
    algorithm: Any = OF_TASKS[name]
    alone = replace(algorithm, weight=4.0) if hasattr(algorithm, "weight") else algorithm
    y0 = torch.zeros(3, dtype=torch.float64)
    found = minimize(MANY, X, y0, algorithm=algorithm, data=TARGETS, max_steps=5)
    expected = minimize(STACKED, X, torch.zeros_like(TARGETS), algorithm=alone, data=TARGETS, max_steps=5)
    close((found.x, found.y), (expected.x, expected.y))


@pytest.mark.parametrize("algorithm", [BOME(0.3, 0.01), MEHA(0.3, 0.01), ScaleBiO(0.1, 0.01)])
def test_tasks_side_by_side_run(algorithm: AbstractAlgorithm[Any]) -> None:
    found = minimize(MANY, X, torch.zeros(3).double(), algorithm=algorithm, data=TARGETS, max_steps=5)
    assert found.y.shape == (2, 3) and found.status is Status.steps_used_up


# Arguments

KNOWN = Constants(mu=1.0, L_fyy=2.0, L_fxy=0.5, M_yy=0.0, M_xy=0.0, C_G=1.5, L_f_minus=0.0)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: F2SA(0.0, 0.1), r"F2SA\(inner_step=...\)` must be positive"),
        (lambda: F2SA(0.1, 0.1, weight=-1.0), r"F2SA\(weight=...\)` must be positive"),
        (lambda: F2SA(0.1, 0.1, order=3), r"F2SA\(order=...\)` must be 1 or 2"),
        (lambda: F2SA(0.1, 0.1, inner_steps=0), r"inner_steps=...\)` must be at least 1"),
        (lambda: F2SA(GradientDescent(), 0.1), r"F2SA\(inner_step=GradientDescent\(\)\)` needs a step size"),
        (lambda: PBGD(0.1, 0.1, form="g"), r"PBGD\(form=...\)` must be one of value, gradient"),  # type: ignore[arg-type]
        (lambda: BOME(0.1, 0.1, barrier="g"), r"BOME\(barrier=...\)` must be one of gradient, value"),  # type: ignore[arg-type]
        (lambda: BOME(0.1, 0.1, rate=0.0), r"BOME\(rate=...\)` must be positive"),
        (lambda: MEHA(0.1, 0.1, smoothing=0.0), r"MEHA\(smoothing=...\)` must be positive"),
        (lambda: MEHA(0.1, 0.1, proximal_step=-0.1), r"MEHA\(proximal_step=...\)` must be positive"),
        (lambda: SAMA(0.1, 0.1, radius=0.0), r"SAMA\(radius=...\)` must be positive"),
        (lambda: ESJS(0.1, 0.1, distribution="x"), r"ESJS\(distribution=...\)` must be one of"),  # type: ignore[arg-type]
        (lambda: ScaleBiO(0.1, 0.1, order=3), r"ScaleBiO\(order=...\)` must be one of 1, 2"),  # type: ignore[arg-type]
        (lambda: Growth(0.0), r"Growth\(start=...\)` must be positive"),
        (lambda: Growth(1.0, exponent=-1.0), r"Growth\(exponent=...\)` must be at least 0"),
        (lambda: bounds.f2sa(KNOWN, weight=5.0, outer_gradient_norm=1.0, order=3), r"bounds.f2sa\(order=...\)` must"),
        (lambda: bounds.f2sa(KNOWN, weight=1.0, outer_gradient_norm=1.0), r"must exceed L_fyy / mu = 2"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(make: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        make()


def test_orthonormal_directions_are_at_most_as_many_as_outer_variables() -> None:
    with pytest.raises(ValueError, match=r"`ESJS\(directions=..., distribution='orthonormal'\)` must be at most"):
        run(ESJS(0.1, 0.1, directions=P + 1, distribution="orthonormal"), FULL, 1)


# The bias in advance


@given(
    families(kappa=10.0),
    st.floats(0.05, 50.0),
    st.sampled_from([1, 2]),
    st.integers(1, 12),
    st.floats(0, 2),
    st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_the_first_direction_of_f2sa_is_within_its_bound(
    family: QuadraticFamily, more: float, order: int, steps: int, distance: float, seed: int
) -> None:
    known = family.constants()
    assert known.mu is not None and known.L_fyy is not None and known.L is not None
    weight = known.L_fyy / known.mu * (1 + more) + 1e-3
    x = normal(family.s.numel(), seed)
    best = family.solution(x)
    b = family.C @ (best - family.t) + family.E.T @ x
    away = normal(best.numel(), seed + 1)
    algorithm = F2SA(0.9 / (known.L + known.L_fyy / weight), 0.1, weight, order=order, inner_steps=steps)
    found: list[Tensor] = []
    minimize(
        BilevelProblem(family.f, family.g),
        x,
        best + distance * away / away.norm(),
        algorithm=algorithm,
        max_steps=0,
        callback=lambda record, estimate: bool(found.append(estimate.grad)),  # type: ignore[func-returns-value]
    )
    given = {"distance": distance, "outer_gradient_norm": float(b.norm())}
    bound = error_bound(algorithm, known, **given, quadratic=True)  # type: ignore[arg-type]
    error = float((found[0] - family.gradient(x)).norm())
    assert error <= bound.total + 1e-11 * (1 + float(found[0].norm())) * weight
    loose = error_bound(algorithm, known, **given)  # type: ignore[arg-type]
    assert bound.inner == loose.inner and bound.bias <= 2 * loose.bias * (1 + 1e-12)
    if order == 1:
        assert bound.bias == loose.bias


def test_the_bound_of_f2sa_is_attained_and_falls_with_the_square_of_the_weight() -> None:
    """H = 1, C = 2, G = -1, d2f/dxdy = 0.5, b = 3: nothing cancels but for the sign of J' C against d2f/dxdy."""
    known = replace(KNOWN, L_fxy=0.0, C_G=1.0, L_f_minus=None, L=1.0)

    def bias(weight: float, order: int) -> float:
        high, low = -3 / weight / (1 + 2 / weight), 3 / weight / (1 - 2 / weight)
        return abs(2 * (high if order == 1 else (low + high) / 2))

    def bound(weight: float, order: int, **given: Any) -> float:
        algorithm = F2SA(0.1, 0.1, weight, order=order)
        return error_bound(algorithm, known, distance=0.0, outer_gradient_norm=3.0, **given).bias

    for weight in (5.0, 40.0):
        assert bias(weight, 2) <= bound(weight, 2, quadratic=True) <= bias(weight, 2) * (1 + 5 / weight) ** 2
    assert bound(80.0, 2, quadratic=True) == pytest.approx(bound(40.0, 2, quadratic=True) / 4, rel=0.06)
    assert bound(80.0, 1) == pytest.approx(bound(40.0, 1) / 2, rel=0.06)
    assert bound(80.0, 2) == pytest.approx(bound(40.0, 2) / 2, rel=0.06)  # true, without the order
    with pytest.raises(ValueError, match="needs the order, which is derived"):
        error_bound(F2SA(0.1, 0.1), known, distance=0.0, outer_gradient_norm=3.0)
    with pytest.raises(ValueError, match=r"no bound is known .* an optimizer as `inner_step`"):
        error_bound(F2SA(Adam(0.1), 0.1, order=1), known, distance=0.0, outer_gradient_norm=3.0)
    with pytest.raises(ValueError, match=r"needs a weight above 2 for a bound. Got 1.5"):
        error_bound(F2SA(0.1, 0.1, 1.5, order=2), known, distance=0.0, outer_gradient_norm=3.0)
    with pytest.raises(ValueError, match="no bound is known for BOME"):
        error_bound(BOME(0.1, 0.1), known, distance=0.0, outer_gradient_norm=3.0)
    with pytest.raises(ValueError, match="measured at one point"):
        bounds.f2sa(replace(known, local=frozenset({"mu"})), weight=9.0, outer_gradient_norm=1.0)
