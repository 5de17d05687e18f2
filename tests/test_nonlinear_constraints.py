"""Convex constraints c(x, y) <= 0 and e(x, y) = 0 on y: the right number, against the same posed otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from strategies import SEEDS, gaussian, spd
from test_inequalities import optnet, problem as posed_as_polytope
from torch import Tensor

from bilevel import AID, ESJ, KKT, BilevelProblem, FiniteDifference, FullKKT, Polytope, Status, check, hypergradient
from bilevel.inner_problems.nonlinear_constraints import FlatConstraints
from bilevel.solvers import GMRES, MINRES, Dense, InteriorPoint, QuadraticProgram

SOLVER = InteriorPoint(tol=1e-12)


def slope(problem: BilevelProblem, x: Tensor, y0: Tensor, d: Tensor, t: float = 1e-3, data: Any = None) -> float:
    """dPhi/dt along d by differences of fourth order, of solutions to 1e-12."""

    def phi(step: float) -> float:
        found = hypergradient(problem, x + step * d, y0, data=data, estimator=KKT(SOLVER), throw=False)
        assert found.reports[0].status.ok
        return found.value

    return (8 * (phi(t) - phi(-t)) - (phi(2 * t) - phi(-2 * t))) / (12 * t)


def ball(x: Tensor, y: Tensor) -> Tensor:
    return y.square().sum() - x[0].exp()


def ellipsoid(x: Tensor, y: Tensor) -> list[Tensor]:
    return [(y - x[:3]) @ spd(torch.arange(1.0, 4.0), 3) @ (y - x[:3]) / 2 - 1, y[:1] + x[1] * y[1] - 1]


def soft_maximum(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"top": torch.logsumexp(y * (2 + x.sin()), 0) - 1.5, "low": -y - 1}


# The right number


@pytest.mark.parametrize("constraint", [ball, ellipsoid, soft_maximum])
@pytest.mark.parametrize("with_equality", [False, True])
def test_the_derivative_is_that_of_the_minimizer_solved_again(
    constraint: Callable[..., Any], with_equality: bool
) -> None:
    x, y0, Q, c = gaussian(3, seed=5) / 2, torch.zeros(3), spd(torch.arange(1.0, 4.0), 1), gaussian(3, seed=7)
    problem = BilevelProblem(
        lambda x, y: (y - c).square().sum() / 2 + x.sum() * y[0],
        lambda x, y: y @ Q @ y / 2 - 4 * (x + c).sin() @ y + y.exp().sum() / 3,
        inequalities=constraint,
        equalities=(lambda x, y: (1 + x[0]) * y[0] + y[1] - 0.2 * x[2]) if with_equality else None,
    )
    exact = hypergradient(problem, x, y0)
    assert exact.status.ok and exact.reports[0].residual < 1e-10
    assert exact.multipliers is not None
    held = torch.cat([leaf.reshape(-1) for leaf in leaves(exact.multipliers.inequalities)])
    assert float(held.max()) > 1e-3  # the constraint holds, so that it matters
    d = gaussian(3, seed=1)
    assert abs(float(exact.grad @ d) - slope(problem, x, y0, d)) < 1e-8 * (1 + float(exact.grad.norm()))


def leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for part in (tree.values() if isinstance(tree, dict) else tree) for leaf in leaves(part)]


@settings(max_examples=4)
@given(SEEDS, st.integers(2, 4), st.integers(1, 3))
def test_random_convex_quadratic_constraints_have_the_derivative_of_differences(seed: int, q: int, k: int) -> None:
    """(y - a_i)'P_i (y - a_i) / 2 <= r_i + x_i, the origin strictly inside; also by the whole system."""
    P = [spd(torch.rand(q, generator=torch.Generator().manual_seed(seed + i)) + 0.2, seed + i) for i in range(k)]
    a = [0.3 * gaussian(q, seed=seed + 10 + i) for i in range(k)]
    r = torch.stack([each @ p @ each / 2 for p, each in zip(P, a, strict=True)]) + 0.2
    c = 2 * gaussian(q, seed=seed + 20)
    problem = BilevelProblem(
        lambda x, y: (y - 1).square().sum() / 2 + x.sum() * y[0],
        lambda x, y: (y - c * (1 + x[0])).square().sum() / 2,
        inequalities=lambda x, y: torch.stack([(y - m) @ p @ (y - m) / 2 for p, m in zip(P, a, strict=True)]) - r - x,
    )
    x, y0 = torch.zeros(k), torch.zeros(q)
    found = hypergradient(problem, x, y0, throw=False)
    assert found.reports[0].status is Status.successful
    if found.reports[1].residual < 1e-2 or found.reports[2].residual < 1e-2:  # differences straddle the kink
        return
    assert found.status.ok
    d = gaussian(k, seed=seed + 30)
    assert abs(float(found.grad @ d) - slope(problem, x, y0, d, 1e-4)) < 1e-6 * (1 + float(found.grad.norm()))
    whole = hypergradient(problem, x, y0, estimator=FullKKT(SOLVER))
    assert torch.allclose(whole.grad, found.grad, rtol=1e-7, atol=1e-9)


@settings(max_examples=6)
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(1, 5), st.integers(0, 1))
def test_linear_constraints_as_functions_are_those_of_a_polytope_in_every_coefficient(
    seed: int, q: int, k: int, m: int
) -> None:
    x, target = optnet(seed, q, k, m), torch.arange(float(q))
    linear = posed_as_polytope(target)
    written = BilevelProblem(
        linear.f,
        linear.g,
        inequalities=lambda x, y: x["G"] @ y - x["h"],
        equalities=(lambda x, y: x["A"] @ y - x["b"]) if m else None,
    )
    one = hypergradient(linear, x, torch.zeros(q), throw=False)
    other = hypergradient(written, x, torch.zeros(q), throw=False)
    assert one.status is other.status
    if not one.status.ok:
        return
    for name in x:
        torch.testing.assert_close(other.grad[name], one.grad[name], rtol=1e-9, atol=1e-9)
    assert one.multipliers is not None and other.multipliers is not None
    torch.testing.assert_close(
        other.multipliers.inequalities, one.multipliers.linear_inequalities, rtol=1e-8, atol=1e-9
    )
    if m:
        torch.testing.assert_close(
            other.multipliers.equalities, one.multipliers.linear_equalities, rtol=1e-8, atol=1e-9
        )


def test_the_formulas_of_optnet_hold_in_every_coefficient() -> None:
    """c: d_y, h: -d_l, Q: (d_y y' + y d_y') / 2, G: d_l y' + lambda d_y', A: d_n y' + nu d_y', b: -d_n (K d = -f_y)."""
    x, target = optnet(6, 4, 5, 1), torch.ones(4)
    linear = posed_as_polytope(target)
    found = hypergradient(
        BilevelProblem(
            linear.f,
            linear.g,
            inequalities=lambda x, y: x["G"] @ y - x["h"],
            equalities=lambda x, y: x["A"] @ y - x["b"],
        ),
        x,
        torch.zeros(4),
    )
    assert found.multipliers is not None
    mu, nu, y = found.multipliers.inequalities, found.multipliers.equalities, found.y
    held = mu > 0
    assert 0 < int(held.sum()) < 5
    rows = torch.cat([x["G"][held], x["A"]])
    n = len(rows)
    K = torch.cat([torch.cat([x["Q"], rows.T], 1), torch.cat([rows, torch.zeros(n, n)], 1)])
    d = torch.linalg.solve(K, torch.cat([-(y - target), torch.zeros(n)]))
    d_y, d_l, d_n = d[:4], d[4:-1], d[-1:]
    torch.testing.assert_close(found.grad["c"], d_y)
    Q = found.grad["Q"]
    torch.testing.assert_close((Q + Q.T) / 2, (torch.outer(d_y, y) + torch.outer(y, d_y)) / 2)
    torch.testing.assert_close(found.grad["h"][held], -d_l)
    torch.testing.assert_close(found.grad["G"][held], torch.outer(d_l, y) + torch.outer(mu[held], d_y))
    torch.testing.assert_close(found.grad["A"], torch.outer(d_n, y) + torch.outer(nu, d_y))
    torch.testing.assert_close(found.grad["b"], -d_n)


def test_the_least_loss_of_a_fair_classifier_falls_with_its_tolerance_by_the_multiplier() -> None:
    """Covariance |s'X theta| <= c in logistic regression: d f*/dc = -mu*, as f = g and the envelope theorem have it."""
    generator = torch.Generator().manual_seed(0)
    X, s = (
        torch.randn(40, 3, generator=generator, dtype=torch.float64),
        (torch.rand(40, generator=generator) > 0.5).double() - 0.5,
    )
    X[:, 0] += s
    labels = (
        X @ torch.tensor([2.0, -1.0, 0.5]) + 0.3 * torch.randn(40, generator=generator, dtype=torch.float64) > 0
    ).double()

    def loss(x: Tensor, theta: Tensor) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(X @ theta, labels) + 0.01 * theta.square().sum()

    def fairness(c: Tensor, theta: Tensor) -> list[Tensor]:
        covariance = s @ (X @ theta) / 40
        return [covariance - c, -covariance - c]

    found = hypergradient(BilevelProblem(loss, loss, inequalities=fairness), torch.tensor(0.02), torch.zeros(3))
    assert found.multipliers is not None
    mu = found.multipliers.inequalities
    assert float(mu[0]) > 0.1 and float(mu[1]) == 0
    assert abs(float(found.grad + mu[0])) < 1e-10


def test_a_linear_objective_over_a_ball_and_a_quartic_have_their_closed_forms() -> None:
    """argmin <x, y>, |y|^2 <= 4 is -2 x / |x|; argmin (x + 2 y - 30)^4, y >= x - 14 is x - 14 or (30 - x) / 2."""
    linear = BilevelProblem(lambda x, y: y[0], lambda x, y: x @ y, inequalities=lambda x, y: y.square().sum() - 4)
    x = torch.tensor([1.0, 2.0, -2.0])
    found = hypergradient(linear, x, torch.zeros(3))
    torch.testing.assert_close(found.y, -2 * x / 3)
    torch.testing.assert_close(found.grad, -2 * (torch.eye(3)[0] / 3 - x * x[0] / 27))
    quartic = BilevelProblem(
        lambda x, y: y, lambda x, y: (x + 2 * y - 30) ** 4, inequalities=lambda x, y: [x - y - 14, -y]
    )
    held = hypergradient(quartic, torch.tensor(20.0), torch.tensor(0.0))
    assert abs(held.y - 6) < 1e-12 and abs(held.grad - 1) < 1e-12
    between = hypergradient(quartic, torch.tensor(10.0), torch.tensor(0.0))
    # The gradient of a quartic tells its zero to the third root of what rounding leaves of it.
    assert abs(between.y - 10) < 1e-6 and abs(between.grad + 0.5) < 1e-6


def test_a_linear_program_at_a_vertex_has_no_curvature_and_needs_none() -> None:
    T = torch.tensor([[-1.0, 2.0], [3.0, -1.0]]) / 5
    vertex = BilevelProblem(
        lambda x, y: y.square().sum(),
        lambda x, y: -y.sum(),
        inequalities=lambda x, y: torch.tensor([[1.0, 2.0], [3.0, 1.0]]) @ y - x,
        constraints=lambda x: Polytope(lower=0.0),
    )
    x = torch.tensor([4.0, 6.0])
    for linear in (None, MINRES(rtol=1e-12), GMRES(rtol=1e-12), Dense()):
        estimator = KKT(SOLVER) if linear is None else AID(SOLVER, linear)
        found = hypergradient(vertex, x, torch.zeros(2), estimator=estimator)
        torch.testing.assert_close(found.grad, 2 * T.T @ (T @ x))


# Every form


def test_tasks_and_structures_are_what_they_are_alone() -> None:
    data = {"t": gaussian(10, seed=1).reshape(5, 2), "r": torch.linspace(0.3, 2.0, 5)}
    f = lambda x, y, d: (y["b"] * x[0] + y["a"].square()).sum()  # noqa: E731
    g = lambda x, y, d: (y["a"] - x - d["t"]).square().sum() + (y["b"] - x[0]).square()  # noqa: E731
    inequalities = lambda x, y, d: {"ball": y["a"].square().sum() - d["r"], "b": [y["b"] - 0.5]}  # noqa: E731
    constraints = lambda x, d: Polytope(lower={"a": torch.full((2,), -1.0), "b": torch.tensor(-1.0)})  # noqa: E731
    x, y0 = torch.tensor([0.4, 0.9]), {"a": torch.zeros(2), "b": torch.tensor(0.0)}

    def posed(tasks: Any) -> BilevelProblem:
        return BilevelProblem(f, g, inequalities=inequalities, constraints=constraints, tasks=tasks)

    together = hypergradient(posed(True), x, y0, data=data)
    looped = hypergradient(posed("loop"), x, y0, data=data)
    parts = hypergradient(posed(True), x, y0, data=data, chunk_size=2)
    alone = [hypergradient(posed(False), x, y0, data={n: v[i] for n, v in data.items()}) for i in range(5)]
    for found in (together, looped, parts):
        torch.testing.assert_close(found.grad, torch.stack([each.grad for each in alone]).mean(0))
        torch.testing.assert_close(found.y["a"], torch.stack([each.y["a"] for each in alone]))
        assert found.multipliers is not None
        z = found.multipliers.inequalities
        assert z["ball"].shape == (5,) and z["b"][0].shape == (5,)
        for i, each in enumerate(alone):
            assert each.multipliers is not None
            torch.testing.assert_close(z["ball"][i], each.multipliers.inequalities["ball"])
            torch.testing.assert_close(found.multipliers.lower["a"][i], each.multipliers.lower["a"])


def test_an_encoding_stands_for_x_in_constraints() -> None:
    plain = BilevelProblem(
        lambda x, y: y[0] * x.sum(), lambda x, y: (y - x).square().sum(), inequalities=lambda x, y: y.square().sum() - 1
    )
    encoded = BilevelProblem(plain.f, plain.g, inequalities=plain.inequalities, encode=lambda x: 2 * x)
    x, y0 = torch.tensor([1.0, 2.0]), torch.zeros(2)
    torch.testing.assert_close(hypergradient(encoded, x, y0).grad, 2 * hypergradient(plain, 2 * x, y0).grad)


def test_single_precision_will_do() -> None:
    x, y0 = torch.tensor([3.0, 4.0]), torch.zeros(2)
    posed = BilevelProblem(
        lambda x, y: y[0], lambda x, y: (y - x).square().sum(), inequalities=lambda x, y: y.square().sum() - 1
    )
    single, double = hypergradient(posed, x.float(), y0.float()), hypergradient(posed, x, y0)
    assert single.grad.dtype == torch.float32 and single.status.ok
    assert torch.allclose(single.grad.double(), double.grad, atol=1e-6)


def test_the_value_does_not_depend_on_the_start_or_on_units() -> None:
    x = torch.tensor([3.0, 4.0])

    def posed(unit: float, weight: float) -> BilevelProblem:
        return BilevelProblem(
            lambda x, y: y[0],
            lambda x, y: weight * (y - x).square().sum(),
            inequalities=lambda x, y: [unit * (y.square().sum() - 1), (y[0] - 0.5) * unit],
        )

    truth = hypergradient(posed(1.0, 1.0), x, torch.zeros(2)).grad
    for start in (torch.tensor([1e3, -1e3]), torch.tensor([1e-9, 0.0]), torch.tensor([0.5, 0.75**0.5])):
        torch.testing.assert_close(hypergradient(posed(1.0, 1.0), x, start).grad, truth, rtol=1e-9, atol=1e-9)
    for unit, weight in ((1e6, 1.0), (1e-6, 1.0), (1.0, 1e8), (1.0, 1e-8)):
        torch.testing.assert_close(
            hypergradient(posed(unit, weight), x, torch.zeros(2)).grad, truth, rtol=1e-7, atol=1e-9
        )


# Who applies


def test_zeroth_order_and_differences_apply_and_others_refuse_by_name() -> None:
    posed = BilevelProblem(
        lambda x, y: y[0] * x[1], lambda x, y: (y - x).square().sum(), inequalities=lambda x, y: y.square().sum() - 1
    )
    x, y0 = torch.tensor([3.0, 4.0]), torch.zeros(2)
    exact = hypergradient(posed, x, y0).grad
    esj = ESJ(SOLVER, 2, radius=1e-4, distribution="orthonormal")
    for estimator in (FiniteDifference(SOLVER), esj, "esj", "finite-difference"):
        assert torch.allclose(hypergradient(posed, x, y0, estimator=estimator).grad, exact, atol=1e-5)
    for name in ("aid-cg", "itd", "penalty", "first-order"):
        with pytest.raises(ValueError, match="does not apply"):
            hypergradient(posed, x, y0, estimator=name)
    with pytest.raises(ValueError, match=r"must heed the nonlinear constraints on y.*Use `InteriorPoint`"):
        hypergradient(posed, x, y0, estimator=KKT(QuadraticProgram()))
    linear = BilevelProblem(posed.f, posed.g, constraints=lambda x: Polytope(upper=1.0))
    torch.testing.assert_close(
        hypergradient(linear, x, y0, estimator=KKT(InteriorPoint())).grad, hypergradient(linear, x, y0).grad
    )


def test_the_whole_conditions_agree_for_polytopes_and_without_constraints() -> None:
    x, target = optnet(5, 4, 4, 1), torch.ones(4)
    one = hypergradient(posed_as_polytope(target), x, torch.zeros(4))
    other = hypergradient(posed_as_polytope(target), x, torch.zeros(4), estimator=FullKKT(QuadraticProgram()))
    for name in x:
        torch.testing.assert_close(other.grad[name], one.grad[name], rtol=1e-7, atol=1e-9)
    fixed = BilevelProblem(
        lambda x, y: y @ torch.tensor([1.0, 2.0, 3.0]),
        lambda x, y: (y - x).square().sum() + y[0] * y[1],
        constraints=lambda x: Polytope(
            lower=torch.stack([x[0], -x[1], x[0] * 0]), upper=torch.stack([x[0], x[1], x[0] + torch.inf])
        ),
    )
    at = torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(
        hypergradient(fixed, at, torch.zeros(3), estimator=FullKKT(QuadraticProgram())).grad,
        hypergradient(fixed, at, torch.zeros(3)).grad,
    )


def test_equalities_that_are_bent_are_refused_and_affine_ones_are_not() -> None:
    def nearest(e: Callable[..., Any]) -> Any:
        posed = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - x).square().sum(), equalities=e)
        return hypergradient(posed, torch.tensor([3.0, 4.0]), torch.ones(2))

    with pytest.raises(ValueError, match="equalities are not affine in y"):
        nearest(lambda x, y: y.square().sum() - 1)
    found = nearest(lambda x, y: x[0].exp() * (y[0] - y[1]) - 1e-3 * x[1])
    assert found.status.ok and abs(float(3.0 * 0 + found.y[0] - found.y[1]) - 4e-3 / 20.085536923187668) < 1e-12


def test_check_finds_such_a_problem_sound() -> None:
    posed = BilevelProblem(
        lambda x, y: y[0] * x[1], lambda x, y: (y - x).square().sum(), inequalities=lambda x, y: y.square().sum() - 1
    )
    found = check(posed, torch.tensor([3.0, 4.0]), torch.zeros(2))
    assert found.ok and not found.estimators["kkt"]
    assert {"independence", "whole conditions"} <= {verdict.name for verdict in found.verdicts}


def test_the_curvature_of_constraints_is_the_hessian_of_their_combination_bent_equalities_included() -> None:
    """Solvers meet bent equalities, which are refused only where derivatives are taken."""
    bent = FlatConstraints(lambda y: y.pow(3)[..., :2], lambda y: (y[..., :1] * y[..., 1:2]).exp())
    y, z, nu = gaussian(3, seed=0), torch.tensor([0.5, 2.0]), torch.tensor([3.0])
    hessian: Any = torch.autograd.functional.hessian
    exact = hessian(lambda y: z @ bent.inequalities(y) + nu @ bent.equalities(y), y)
    torch.testing.assert_close(bent.tangents(y).curvature(z, nu).dense(y), exact)
