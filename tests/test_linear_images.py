"""Terms k(A y + b) with any matrix A: solvers that take them apart, estimators, batches, and what they cannot do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import (
    AID,
    ESJ,
    ITD,
    BilevelProblem,
    Constants,
    FiniteDifference,
    Penalty,
    Status,
    certify,
    hypergradient,
)
from bilevel._inner import AbstractInnerSolver
from bilevel.inner_problems import ProximalFixedPoint
from bilevel.prox import L1, L2, TV1D, AbstractProxTerm, Affine, Box, Nonnegative, Sum
from bilevel.solvers import ADMM, CG, FISTA, GMRES, PrimalDual

DOUBLE = torch.float64
N = 8
GENERATOR = torch.Generator().manual_seed(0)
K = torch.eye(N, dtype=DOUBLE).diff(dim=0)
M = torch.randn(N + 3, N, generator=GENERATOR, dtype=DOUBLE) / 3
TRUE = torch.tensor([0.0] * 2 + [1.0] * 3 + [-0.5] * 3, dtype=DOUBLE)
B = M @ TRUE + 0.1 * torch.randn(N + 3, generator=GENERATOR, dtype=DOUBLE)
W = torch.randn(5, N, generator=GENERATOR, dtype=DOUBLE)
X, Y0 = torch.tensor([-1.5, 0.4], dtype=DOUBLE), torch.zeros(N, dtype=DOUBLE)


def f(x: Tensor, y: Tensor) -> Tensor:
    return (y - TRUE).square().sum() / 2 + x[1] * y[0]


def g(x: Tensor, y: Tensor) -> Tensor:
    return (M @ y - B * x[1].exp()).square().sum() / 2


def scaled(x: Tensor) -> Tensor:
    """A matrix that moves with x."""
    return W * (1 + x[1] ** 2)


TERMS: dict[str, Any] = {
    "differences": lambda x: Affine(L1(x[0].exp()), K),
    "any": lambda x: Affine(L1(x[0].exp()), scaled(x), x[0] / 10),
    "norm": lambda x: Affine(L2(x[0].exp()), W, 0.1 * x[1]),
    "bounds": lambda x: Sum((Affine(Box(None, 0.2 * x[0].exp()), W[:3], 0.0), L1(0.05))),
    "fused": lambda x: Sum((Affine(L1(x[0].exp()), K, 0.1 * x[1]), L1(0.1 * x[1].exp()), Nonnegative())),
}
SOLVERS: list[AbstractInnerSolver] = [
    ADMM(tol=1e-11, max_steps=20_000),
    PrimalDual(tol=1e-11, max_steps=100_000),
    FISTA(tol=1e-11, max_steps=20_000),
]
EXACT = AID(SOLVERS[0], CG(1e-13))


@pytest.mark.parametrize("name", TERMS)
def test_the_gradient_on_the_manifold_is_that_of_differences_of_accurate_solves(name: str) -> None:
    problem = BilevelProblem(f, g, prox=TERMS[name])
    found = hypergradient(problem, X, Y0, estimator=EXACT)
    differences = hypergradient(problem, X, Y0, estimator=FiniteDifference(SOLVERS[0], step=1e-5))
    assert found.status is Status.successful
    torch.testing.assert_close(found.grad, differences.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS[1:], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("name", ["any"])
def test_solvers_that_take_the_term_apart_and_those_that_do_not_find_the_same(
    name: str, solver: AbstractInnerSolver
) -> None:
    problem = BilevelProblem(f, g, prox=TERMS[name])
    exact = hypergradient(problem, X, Y0, estimator=EXACT)
    found = hypergradient(problem, X, Y0, estimator=AID(solver, CG(1e-13)))
    torch.testing.assert_close(found.y, exact.y, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.grad, exact.grad, rtol=0, atol=1e-8)


def test_differences_of_neighbors_are_total_variation() -> None:
    exact = hypergradient(BilevelProblem(f, g, prox=lambda x: TV1D(x[0].exp())), X, Y0, estimator=AID(SOLVERS[2], CG()))
    problem = BilevelProblem(f, g, prox=TERMS["differences"])
    for estimator in (EXACT, "implicit"):
        found = hypergradient(problem, X, Y0, estimator=estimator)
        torch.testing.assert_close(found.y, exact.y, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.grad, exact.grad, rtol=1e-5, atol=1e-6)


def test_every_estimator_that_applies_to_a_term_applies_to_one_of_a_linear_image() -> None:
    problem = BilevelProblem(f, g, prox=TERMS["any"])
    exact = hypergradient(problem, X, Y0, estimator=EXACT).grad
    fixed = BilevelProblem(f, inner=ProximalFixedPoint(g, TERMS["any"]))
    found = hypergradient(fixed, X, Y0, estimator=AID(SOLVERS[0], GMRES(1e-12)))
    torch.testing.assert_close(found.grad, exact, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="`CG` requires"):
        hypergradient(fixed, X, Y0, estimator=AID(SOLVERS[0], CG()))
    for steps in (FISTA(tol=None, max_steps=40), PrimalDual(tol=None, max_steps=400)):
        unrolled = hypergradient(problem, X, Y0, estimator=ITD(steps), throw=False)
        torch.testing.assert_close(unrolled.grad, exact, rtol=1e-3, atol=1e-3)
    jolted = hypergradient(problem, X, Y0, estimator=ESJ(ADMM(tol=1e-10), directions=2, radius=1e-5), throw=False)
    torch.testing.assert_close(jolted.grad, exact, rtol=1e-2, atol=1e-3)
    penalized = hypergradient(problem, X, Y0, estimator=Penalty(ADMM(tol=1e-10), weight=1e3), throw=False)
    torch.testing.assert_close(penalized.grad, exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("tasks", [True, "loop"])
def test_tasks_with_matrices_of_their_own_are_single_problems(tasks: Any) -> None:
    data = {"W": torch.stack([W, W.flip(0) * 0.7]), "b": torch.stack([B, -B.flip(0)])}

    def inner(x: Tensor, y: Tensor, task: dict[str, Tensor]) -> Tensor:
        return (M @ y - task["b"] * x[1].exp()).square().sum() / 2

    def term(x: Tensor, task: Any) -> AbstractProxTerm:
        return Affine(L1(x[0].exp()), task["W"])

    both = BilevelProblem(lambda x, y, _: f(x, y), inner, prox=term, tasks=tasks)
    for solver in SOLVERS[: 2 if tasks is True else 1]:
        together = hypergradient(both, X, Y0, data=data, estimator=AID(solver, CG(1e-13)))
        singly = []
        for k in range(2):
            one = {key: part[k] for key, part in data.items()}
            alone = BilevelProblem(lambda x, y, _: f(x, y), inner, prox=term)
            singly.append(hypergradient(alone, X, Y0, data=one, estimator=EXACT))
        torch.testing.assert_close(together.y, torch.stack([each.y for each in singly]), rtol=0, atol=1e-8)
        mean = (singly[0].grad + singly[1].grad) / 2
        torch.testing.assert_close(together.grad, mean, rtol=1e-7, atol=1e-7)


def test_a_g_without_curvature_on_what_the_matrix_does_not_see_is_solved() -> None:
    """g sees y_0 + y_1 alone, and the term the rest: H + rho A'A is definite though neither part is."""
    A = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.5, -1.0]], dtype=DOUBLE)
    problem = BilevelProblem(
        lambda x, y: y.square().sum(),
        lambda x, y: (y[0] + y[1] - 2).square() / 2,
        prox=lambda x: Affine(L1(x.exp()), A),
    )
    for solver in SOLVERS:
        found = hypergradient(problem, torch.tensor(-1.0, dtype=DOUBLE), Y0[:3], estimator=AID(solver, CG(1e-12)))
        torch.testing.assert_close(found.y, torch.tensor([1.0, 1.0, 0.5], dtype=DOUBLE), rtol=0, atol=1e-8)
        assert abs(float(found.grad)) < 1e-9


def test_on_a_cycle_of_equal_entries_the_derivative_is_their_mean_though_multipliers_are_not_unique() -> None:
    """A' has a kernel of dimension one, which all edges of the cycle are in."""
    cycle = torch.eye(4, dtype=DOUBLE) - torch.eye(4, dtype=DOUBLE).roll(1, 0)
    for v in (torch.zeros(4, dtype=DOUBLE), torch.tensor([0.1, -0.2, 0.15, 0.0], dtype=DOUBLE)):
        term = Affine(L1(1.0), cycle)
        torch.testing.assert_close(term.prox(v, 1.0), v.mean().expand(4), rtol=0, atol=1e-11)
        P = term.derivative(v, 1.0)
        assert P is not None
        columns = [P.times(P.parts, unit) for unit in torch.eye(4, dtype=DOUBLE)]
        torch.testing.assert_close(torch.stack(columns), torch.full((4, 4), 0.25, dtype=DOUBLE), rtol=0, atol=1e-10)
        assert float(term.margin(v, 1.0)) > 0.1


def test_of_a_polyhedral_term_steps_of_newton_find_the_end_that_the_method_of_multipliers_only_nears() -> None:
    v = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=DOUBLE).cumsum(0)
    term = Affine(L1(0.7), torch.eye(30, dtype=DOUBLE).diff(dim=0), max_steps=64)
    torch.testing.assert_close(term.prox(v, 1.0), TV1D(0.7).prox(v, 1.0), rtol=0, atol=1e-11)
    assert float(term.margin(v, 1.0)) > 0


def test_a_sum_with_an_image_is_the_image_of_all_of_its_parts() -> None:
    b, v = torch.linspace(-1, 1, 5, dtype=DOUBLE), torch.linspace(1, -2, N, dtype=DOUBLE).sin() * 2
    both = Sum((Affine(L1(0.4), W, b), L1(0.2)))
    weights = torch.cat([torch.full((5,), 0.4, dtype=DOUBLE), torch.full((N,), 0.2, dtype=DOUBLE)])
    A, shift = torch.cat([W, torch.eye(N, dtype=DOUBLE)]), torch.cat([b, Y0])
    one = Affine(L1(weights), A, shift)
    torch.testing.assert_close(both.prox(v, 0.8), one.prox(v, 0.8), rtol=0, atol=1e-10)
    torch.testing.assert_close(both.value(v), one.value(v))


def test_a_weight_that_is_negative_ends_at_once_with_a_status() -> None:
    problem = BilevelProblem(f, g, prox=lambda x: Affine(L1(x[0]), W))
    found = hypergradient(problem, X, Y0, throw=False)
    assert found.status is Status.nonfinite
    assert found.stats.inner_steps <= 20_000


def test_a_matrix_of_integers_is_one_of_numbers() -> None:
    A = torch.tensor([[1, -1, 0], [0, 2, -1]])
    v = torch.tensor([2.0, -0.5, 1.0], dtype=DOUBLE)
    torch.testing.assert_close(Affine(L1(0.3), A).prox(v, 1.0), Affine(L1(0.3), A.double()).prox(v, 1.0))


def test_where_curvature_grows_on_the_way_the_steps_are_derived_anew_and_u_keeps_its_entries() -> None:
    """G = y^2 / 2 + 25 y^4 has curvature 1 at the start and 300 at y = 1, which the first steps fly past."""
    problem = BilevelProblem(
        lambda x, y: y.sum(),
        lambda x, y: (y - 2).square().sum() / 2 + 25 * y.square().square().sum(),
        prox=lambda x: Affine(L1(x.exp()), K[:5, :3] + W[:, :3]),
    )
    x, start = torch.tensor(-3.0, dtype=DOUBLE), Y0[:3]
    found = [
        hypergradient(problem, x, start, estimator=AID(solver, CG(1e-12)))
        for solver in (PrimalDual(tol=1e-9, max_steps=20_000), ADMM(tol=1e-9))
    ]
    torch.testing.assert_close(found[0].grad, found[1].grad, rtol=1e-6, atol=1e-7)


def test_what_neither_g_nor_the_matrix_sees_stays_where_it_starts() -> None:
    """H + rho A'A is singular there; y is found all the same, and a system that tells its derivative is not."""
    A, start = (
        torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], dtype=DOUBLE),
        torch.tensor([0.0, 0.0, 3.0], dtype=DOUBLE),
    )
    problem = BilevelProblem(
        lambda x, y: y.square().sum(), lambda x, y: (y[0] - 2).square() / 2, prox=lambda x: Affine(L1(x.exp()), A)
    )
    found = hypergradient(problem, torch.tensor(-1.0, dtype=DOUBLE), start, estimator=EXACT, throw=False)
    torch.testing.assert_close(found.y, torch.tensor([2 - math.exp(-1), math.exp(-1) - 2, 3.0], dtype=DOUBLE))
    assert found.reports[0].status is Status.successful
    assert not found.status.ok


def test_sets_that_the_image_does_not_meet_end_with_a_status() -> None:
    far = Affine(Box(1.0, 2.0), torch.tensor([[1.0, 0.0], [-1.0, 1e-9]], dtype=DOUBLE), max_steps=200)
    assert bool(far.margin(torch.ones(2, dtype=DOUBLE), 1.0).isnan())
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - x).square().sum() / 2, prox=lambda _: far)
    solver = FISTA(step=1.0, max_steps=3)
    found = hypergradient(problem, X, Y0[:2], estimator=AID(solver, CG()), throw=False)
    assert not found.status.ok


def test_numbers_of_32_bits_are_solved_to_their_own_accuracy() -> None:
    def narrow(x: Tensor) -> AbstractProxTerm:
        return Affine(L1(x[0].exp()), W.float())

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (M.float() @ y - B.float()).square().sum() / 2

    problem = BilevelProblem(lambda x, y: (y - TRUE.float()).square().sum() / 2, inner, prox=narrow)
    found = hypergradient(problem, X.float(), Y0.float())
    wide = BilevelProblem(
        lambda x, y: (y - TRUE).square().sum() / 2,
        lambda x, y: (M @ y - B).square().sum() / 2,
        prox=lambda x: Affine(L1(x[0].exp()), W),
    )
    exact = hypergradient(wide, X, Y0, estimator=EXACT)
    assert found.status is Status.successful
    torch.testing.assert_close(found.grad.double(), exact.grad, rtol=1e-3, atol=1e-3)


def test_certificates_refuse_it_with_the_reason() -> None:
    problem = BilevelProblem(f, g, prox=TERMS["differences"])
    known = Constants(mu=None, L=None, L_fyy=1.0, L_fxy=1.0, M_yy=0.0, M_xy=1.0, C_G=None)
    found = certify(problem, X, hypergradient(problem, X, Y0), known)
    assert found.bound == float("inf") and "manifold of `Affine`" in found.reason
