"""Composite problems: on the active manifold and as a fixed point the gradient is the same, and the right one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import pytest
import torch
from composite_terms import Rows, Simplex, Without
from torch import Tensor

from bilevel import AID, BilevelProblem, Split, Status, hypergradient
from bilevel._linear import AbstractLinearSolver, LinearOperator, OperatorProperties
from bilevel._result import Solved
from bilevel.inner_problems import Composite, ProximalFixedPoint
from bilevel.prox import L1, AbstractProxTerm, LInfBall
from bilevel.solvers import CG, FISTA, GMRES, BiCGStab, Dense, Neumann, NormalCG

DOUBLE = torch.float64
FINE = FISTA(tol=1e-13, max_steps=20_000)

GENERATOR = torch.Generator().manual_seed(0)
A = torch.randn(18, 6, generator=GENERATOR, dtype=DOUBLE)
B = torch.randn(18, generator=GENERATOR, dtype=DOUBLE)
C = torch.randn(6, generator=GENERATOR, dtype=DOUBLE)
X = torch.tensor([0.8, -0.3], dtype=DOUBLE)
LARGEST = float(torch.linalg.eigvalsh(A.T @ A)[-1])

TERMS: dict[str, Callable[[Any], AbstractProxTerm]] = {
    "L1": lambda x: L1(0.5 * x[0].exp()),
    "box": lambda x: LInfBall(0.02 + x[0] ** 2 / 8),
    "rows": lambda x: Rows(0.9 * x[0].exp()),
    "simplex": lambda x: Simplex(1 + x[0]),
}


def f(x: Tensor, y: Tensor) -> Tensor:
    return C @ y.reshape(-1) + y.square().sum() / 2 + x.square().sum()


def g(x: Tensor, y: Tensor) -> Tensor:
    y = y.reshape(-1)
    return (A @ y - B * x[1].exp()).square().sum() / 2 + x[1] * y.sum()


def start(name: str) -> Tensor:
    return torch.zeros((3, 2) if name == "rows" else 6, dtype=DOUBLE)


def written_out(term: Callable[[Any], AbstractProxTerm], y: Tensor) -> Tensor:
    """h = grad_x f + (dT/dx)' (I - dT/dy)^-T grad_y f by dense Jacobians of T, t = 0.7 / L."""

    def image(x: Tensor, y: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(g(x, y), y, create_graph=True)
        found = term(x).prox(y - 0.7 / LARGEST * gradient, 0.7 / LARGEST)
        assert isinstance(found, Tensor)
        return found

    in_x, in_y = torch.autograd.functional.jacobian(image, (X, y))  # type: ignore[no-untyped-call]
    in_x, in_y = in_x.reshape(6, 2), in_y.reshape(6, 6)
    leaves = X.clone().requires_grad_(), y.clone().requires_grad_()
    fx, fy = torch.autograd.grad(f(*leaves), leaves)
    w = torch.linalg.solve((torch.eye(6, dtype=DOUBLE) - in_y).T, fy.reshape(-1))
    found: Tensor = fx + in_x.T @ w
    return found


@pytest.mark.parametrize("name", TERMS)
def test_on_the_manifold_conjugate_gradients_give_the_derivative_of_the_fixed_point(name: str) -> None:
    problem = BilevelProblem(f, g, prox=TERMS[name])
    found = hypergradient(problem, X, start(name), estimator=AID(FINE, CG(1e-13)))
    torch.testing.assert_close(found.grad, written_out(TERMS[name], found.y), rtol=1e-9, atol=1e-9)
    implicit = hypergradient(problem, X, start(name))
    torch.testing.assert_close(implicit.grad, found.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "linear", [GMRES(1e-12), BiCGStab(1e-12), NormalCG(1e-12), Dense(), Neumann(1.0, 20_000, 1e-12)]
)
@pytest.mark.parametrize("name", TERMS)
def test_as_a_fixed_point_it_is_the_same_whatever_the_step_and_the_solver(
    name: str, linear: AbstractLinearSolver
) -> None:
    exact = hypergradient(BilevelProblem(f, g, prox=TERMS[name]), X, start(name), estimator=AID(FINE, CG(1e-13)))
    for step in (None, 1.8 / LARGEST):
        problem = BilevelProblem(f, inner=ProximalFixedPoint(g, TERMS[name], step))
        found = hypergradient(problem, X, start(name), estimator=AID(FINE, linear))
        torch.testing.assert_close(found.grad, exact.grad, rtol=1e-8, atol=1e-8)


@final
@dataclass(frozen=True)
class Watching(AbstractLinearSolver):
    """Another solver, and the operators that it was given."""

    solver: AbstractLinearSolver
    seen: list[LinearOperator]

    @property
    def demands(self) -> OperatorProperties:
        return self.solver.demands

    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        self.seen.append(operator)
        return self.solver.solve(operator, b, guess)


def test_the_transpose_that_the_operator_offers_is_its_own() -> None:
    problem = BilevelProblem(f, inner=ProximalFixedPoint(g, TERMS["rows"], 0.5))
    seen: list[LinearOperator] = []
    found = hypergradient(problem, X, start("rows"), estimator=AID(FINE, Watching(Dense(), seen)))
    (operator,) = seen
    matrix = operator.dense(torch.zeros(6, dtype=DOUBLE))
    columns = [operator.transposed(unit) for unit in torch.eye(6, dtype=DOUBLE)]
    torch.testing.assert_close(torch.stack(columns), matrix)
    assert float((matrix - matrix.T).abs().max()) > 0.1  # which is not symmetric
    radius = next(each.residual for each in found.reports if each.part.startswith("spectral radius"))
    exact = float(torch.linalg.eigvals(torch.eye(6, dtype=DOUBLE) - matrix).abs().max())
    assert 0.98 * exact <= radius <= exact * (1 + 1e-9)


def test_what_needs_a_symmetric_system_is_refused_on_the_fixed_point_by_name() -> None:
    problem = BilevelProblem(f, inner=ProximalFixedPoint(g, TERMS["L1"]))
    for linear in (CG(), Neumann(None, 10)):
        name = type(linear).__name__
        with pytest.raises(
            ValueError, match=rf"`AID` does not apply: .*differentiated as a fixed point.*`{name}` requires"
        ):
            hypergradient(problem, X, start("L1"), estimator=AID(FINE, linear))
    assert hypergradient(problem, X, start("L1")).status.ok  # "implicit" picks what fits


@pytest.mark.parametrize("name", ["L1", "simplex"])
def test_a_term_that_does_not_know_its_derivative_is_differentiated_as_a_fixed_point(name: str) -> None:
    expected = hypergradient(BilevelProblem(f, g, prox=TERMS[name]), X, start(name), estimator=AID(FINE, CG(1e-13)))
    problem = BilevelProblem(f, g, prox=lambda x: Without(TERMS[name](x)))
    found = hypergradient(problem, X, start(name), estimator=AID(FINE, GMRES(1e-12)))
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(hypergradient(problem, X, start(name)).grad, expected.grad, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"`AID` does not apply: .*no derivative in closed form.*`CG` requires"):
        hypergradient(problem, X, start(name), estimator=AID(FINE, CG()))


def test_the_series_of_a_map_that_expands_is_refused_with_its_spectral_radius() -> None:
    for step, good in ((1.9 / LARGEST, True), (3.0 / LARGEST, False)):
        problem = BilevelProblem(f, inner=ProximalFixedPoint(g, TERMS["L1"], step))
        found = hypergradient(problem, X, start("L1"), estimator=AID(FINE, Neumann(1.0, 20_000, 1e-10)), throw=False)
        radius = next(each.residual for each in found.reports if each.part.startswith("spectral radius"))
        assert (radius < 1) is good and found.status.ok is good
        if not good:
            linear = next(each for each in found.reports if each.part == "linear solver")
            assert linear.status is Status.expanding and linear.steps == 0
            assert hypergradient(problem, X, start("L1"), estimator=AID(FINE, GMRES())).status.ok  # a neighbour


def test_products_are_counted_as_on_a_smooth_problem() -> None:
    """One Hessian product a step of CG, one for the true residual, none for the cross product."""
    problem = BilevelProblem(f, g, prox=TERMS["rows"])
    found = hypergradient(problem, X, start("rows"), estimator=AID(FINE, CG(rtol=0, max_steps=3)))
    assert (found.stats.hvps, found.stats.cross_products) == (4 + _CURVATURE, 1)


_CURVATURE = 6  # products of the estimate of 1 / L, as many as y has entries


def test_the_report_says_how_many_entries_move_and_how_far_a_kink_is() -> None:
    for name, dimension in (("L1", 4.0), ("rows", 4.0), ("simplex", 2.0)):
        found = hypergradient(BilevelProblem(f, g, prox=TERMS[name]), X, start(name), estimator=AID(FINE, CG()))
        reports = {each.part: each for each in found.reports}
        expected = int((found.y != 0).sum()) - (name == "simplex")
        assert reports["dimension of the support"].residual == expected, (name, dimension)
        assert 0 < reports["support"].residual < 1


def test_batches_of_composite_problems_are_single_ones() -> None:
    targets = torch.stack([B, -0.5 * B, 0.1 * B.flip(0)])

    def built(tasks: Any, kind: Any) -> BilevelProblem:
        def inner(x: Tensor, y: Tensor, task: Tensor) -> Tensor:
            return (A @ y.reshape(-1) - task).square().sum() / 2

        def prox(x: Tensor, task: Tensor) -> AbstractProxTerm:
            return Rows(2 * x[0].exp() + task[0] ** 2)

        return BilevelProblem(lambda x, y, task: (y.sum() - x.sum()) ** 2, inner=kind(inner, prox), tasks=tasks)

    for kind, linear in ((Composite, CG(1e-12)), (ProximalFixedPoint, GMRES(1e-12))):
        aid = AID(FINE, linear)
        each = [hypergradient(built(False, kind), X, start("rows"), data=t, estimator=aid) for t in targets]
        for tasks in (True, "loop"):
            whole = hypergradient(built(tasks, kind), X, start("rows"), data=targets, estimator=aid)
            torch.testing.assert_close(whole.grad, torch.stack([e.grad for e in each]).mean(0), rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(whole.y, torch.stack([e.y for e in each]), rtol=1e-8, atol=1e-10)


def test_the_term_takes_the_data_of_g_the_encoding_and_a_start_that_depends_on_x() -> None:
    data = Split(f=torch.tensor(5.0, dtype=DOUBLE), g=torch.tensor(0.4, dtype=DOUBLE))
    expected = hypergradient(
        BilevelProblem(f, g, prox=lambda x: L1(0.4 * x[0].exp())), X, start("L1"), estimator=AID(FINE, CG(1e-13))
    )
    encoded = BilevelProblem(
        lambda z, y, _: f(z["x"], y),
        lambda z, y, _: g(z["x"], y),
        encode=lambda x, _: {"x": x, "w": x[0].exp()},
        prox=lambda z, part: L1(part * z["w"]),
        init=lambda z, _: z["w"] * torch.ones(6, dtype=DOUBLE),
    )
    found = hypergradient(encoded, X, start("L1"), data=data, estimator=AID(FINE, CG(1e-13)))
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="must have one kind of inner problem"):
        BilevelProblem(f, g, prox=TERMS["L1"], iterative=True)
