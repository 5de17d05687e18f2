"""Certificates on the active manifold: true where they are given, and refused where the support is not certain."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, final

import pytest
import torch
from composite_terms import Rows, Without
from hypothesis import given, settings, strategies as st
from torch import Tensor

from bilevel import AID, BilevelProblem, Certificate, Constants, Estimate, certify, hypergradient
from bilevel.inner_problems import ProximalFixedPoint
from bilevel.prox import (
    L1,
    TV1D,
    TV2D,
    AbstractProxTerm,
    Affine,
    GroupLasso,
    L1Ball,
    L2Ball,
    LInf,
    LInfBall,
    NuclearNorm,
    ProxDerivative,
    Simplex,
    Sum,
)
from bilevel.prox.derivative import diagonal
from bilevel.solvers import CG, FISTA, GMRES, ProximalGradient

DOUBLE = torch.float64
FINE = AID(FISTA(tol=1e-13, max_steps=50_000), CG(1e-13))


@final
@dataclass(frozen=True)
class Case:
    """g = |A y - b|^2 / 2 + x' N y, f = |y - c|^2 / 2, h = |w y|_1 with w = exp(x): n rows, q entries of x and y."""

    seed: int
    n: int = 20
    q: int = 6

    @property
    def data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        A, N = (torch.randn(n, self.q, generator=generator, dtype=DOUBLE) for n in (self.n, self.q))
        b, c = (torch.randn(n, generator=generator, dtype=DOUBLE) for n in (self.n, self.q))
        return A, A[:, 0] - A[:, 1] + 0.3 * b, c, 0.1 * N

    @property
    def problem(self) -> BilevelProblem:
        A, b, c, N = self.data
        return BilevelProblem(
            lambda x, y: (y - c).square().sum() / 2,
            lambda x, y: (A @ y - b).square().sum() / 2 + x @ N @ y,
            prox=lambda x: L1(x.exp()),
        )

    @property
    def x(self) -> Tensor:
        return torch.linspace(-1, 0.7, self.q, dtype=DOUBLE)

    def constants(self, mu: bool = False) -> Constants:
        A, _, _, N = self.data
        ends = torch.linalg.eigvalsh(A.T @ A)
        return Constants(
            mu=float(ends[0]) if mu else None,
            L=float(ends[-1]),
            L_fyy=1.0,
            L_fxy=0.0,
            M_yy=0.0,
            M_xy=0.0,
            C_G=float(torch.linalg.matrix_norm(N, 2)),
        )


def estimated(case: Case, tol: float) -> Estimate:
    solver = AID(ProximalGradient(tol=tol, max_steps=50_000, settled=0), CG(rtol=min(tol, 0.5)))
    return hypergradient(case.problem, case.x, torch.zeros(case.q, dtype=DOUBLE), estimator=solver, throw=False)


@settings(max_examples=6)
@given(st.integers(0, 300), st.integers(1, 9), st.booleans())
def test_a_bound_that_is_given_holds(seed: int, digits: int, mu: bool) -> None:
    case = Case(seed)
    found = estimated(case, 10.0**-digits)
    exact = hypergradient(case.problem, case.x, torch.zeros(case.q, dtype=DOUBLE), estimator=FINE)
    certificate = certify(case.problem, case.x, found, case.constants(mu))
    error = float((found.grad - exact.grad).norm())
    assert error <= certificate.bound and certificate.theorem == "manifold"
    if math.isfinite(certificate.bound):
        assert float((found.y - exact.y).norm()) <= certificate.distance + 10.0**-digits
        assert certificate.proven


GROUPS = [[0, 3], [1, 4], [2, 5]]


def in_groups(case: Case, several: bool) -> tuple[BilevelProblem, Tensor]:
    """The same with h = sum_g exp(x_g) |y_g|, or one weight for all."""
    A, b, c, _ = case.data
    problem = BilevelProblem(
        lambda x, y: (y - c).square().sum() / 2 + (x.sum() * y).sum(),
        lambda x, y: (A @ y - b).square().sum() / 2,
        prox=lambda x: GroupLasso(x.exp(), GROUPS),
    )
    return problem, torch.tensor([2.0, 2.5, 1.0] if several else 2.0, dtype=DOUBLE)


@settings(max_examples=8)
@given(st.integers(0, 300), st.integers(1, 9), st.booleans(), st.booleans())
def test_on_active_groups_a_bound_that_is_given_holds(seed: int, digits: int, mu: bool, several: bool) -> None:
    case, tol = Case(seed), 10.0**-digits
    problem, x = in_groups(case, several)
    zero = torch.zeros(case.q, dtype=DOUBLE)
    solver = AID(ProximalGradient(tol=tol, max_steps=50_000, settled=0), CG(rtol=min(tol, 0.5)))
    found = hypergradient(problem, x, zero, estimator=solver, throw=False)
    exact = hypergradient(problem, x, zero, estimator=FINE)
    constants = replace(case.constants(mu), L_fxy=case.q**0.5, C_G=0.0)
    certificate = certify(problem, x, found, constants)
    error = float((found.grad - exact.grad).norm())
    assert error <= certificate.bound and certificate.theorem == "manifold"
    if math.isfinite(certificate.bound):
        assert certificate.proven and float((found.y - exact.y).norm()) <= certificate.distance + tol


def test_groups_are_certified_where_they_are_certain_and_not_before() -> None:
    case = Case(1)
    problem, x = in_groups(case, several=True)
    zero, constants = torch.zeros(case.q, dtype=DOUBLE), replace(case.constants(), L_fxy=case.q**0.5, C_G=0.0)
    fine = certify(problem, x, hypergradient(problem, x, zero, estimator=FINE), constants)
    assert fine.bound < 1e-8 and fine.proven
    rough = hypergradient(problem, x, zero, estimator=AID(ProximalGradient(max_steps=2, tol=None), CG()), throw=False)
    assert certify(problem, x, rough, constants).bound == math.inf
    A, b, _, _ = case.data
    slopes = torch.stack([(A.T @ b)[group].norm() for group in GROUPS]).log()
    above = hypergradient(problem, slopes + 0.1, zero, estimator=FINE)
    nothing = certify(problem, slopes + 0.1, above, constants)
    assert nothing.bound < 1e-14 and nothing.proven and nothing.distance == 0
    x[2] = 9.0
    y = hypergradient(problem, x, zero, estimator=FINE).y
    x[2] = (A.T @ (A @ y - b))[GROUPS[2]].norm().log() + 1e-6  # the third group is zero, and just so
    for tol, certain in ((1e-4, False), (1e-9, True)):
        solver = AID(ProximalGradient(tol=tol, max_steps=50_000, settled=0), CG(1e-10))
        near = certify(problem, x, hypergradient(problem, x, zero, estimator=solver, throw=False), constants)
        assert math.isfinite(near.bound) == certain
        assert certain or near.reason  # the margin, or what it leaves of the ball around y


def test_it_is_given_where_the_support_is_certain_and_not_before() -> None:
    case = Case(0)
    bounds = [
        certify(case.problem, case.x, estimated(case, 10.0**-digits), case.constants()) for digits in (-1, 3, 6, 9)
    ]
    assert bounds[0].bound == math.inf and not bounds[0].proven and bounds[0].reason
    assert all(math.isfinite(each.bound) for each in bounds[2:])
    assert bounds[3].bound < 1e-2 * bounds[2].bound and bounds[3].bound < 1e-6


def refused(problem: BilevelProblem, x: Tensor, y0: Tensor, words: str, aid: AID = FINE) -> Certificate:
    found = hypergradient(problem, x, y0, estimator=aid, throw=False)
    constants = Constants(mu=None, L=10.0, L_fyy=1.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=0.0)
    certificate = certify(problem, x, found, constants)
    assert certificate.bound == math.inf and not certificate.proven and words in certificate.reason, certificate
    return certificate


def quadratic(term: Any) -> BilevelProblem:
    target = torch.tensor([2.0, -0.5, 0.1, 1.5], dtype=DOUBLE)
    return BilevelProblem(
        lambda x, y: y.square().sum() / 2, lambda x, y: (y - target.reshape(y.shape)).square().sum() / 2, prox=term
    )


@final
@dataclass(frozen=True, eq=False)
class Ridged(AbstractProxTerm):
    """h = |y|_1 + c |y|^2 / 2: how the map moves with c depends on v."""

    c: Tensor

    def value(self, y: Any) -> Tensor:
        return y.abs().sum() + self.c * y.square().sum() / 2  # type: ignore[no-any-return]

    def prox(self, v: Any, step: Tensor | float) -> Tensor:
        return L1(1.0).prox(v, step) / (1 + step * self.c)  # type: ignore[no-any-return]

    def margin(self, v: Any, step: Tensor | float) -> Tensor:
        return L1(1.0).margin(v, step)

    def derivative(self, v: Any, step: Tensor | float) -> ProxDerivative:
        return diagonal((v.abs() > step).to(v.dtype) / (1 + step * self.c))

    def active(self, v: Any, step: Tensor | float) -> Tensor:
        return L1(1.0).active(v, step)

    def conjugate(self) -> AbstractProxTerm:
        raise NotImplementedError

    @property
    def separable(self) -> bool:
        return True


def test_it_is_refused_with_the_reason_where_no_theorem_applies() -> None:
    y0, rough = torch.zeros(4, dtype=DOUBLE), AID(ProximalGradient(step=0.1, tol=1e-3), CG(1e-6))
    refused(quadratic(lambda x: L1(x)), torch.tensor(0.5001, dtype=DOUBLE), y0, "margin of the support", rough)
    refused(quadratic(lambda x: Rows(x)), torch.tensor(0.3, dtype=DOUBLE), y0.reshape(2, 2), "curved")
    at = torch.tensor(0.3, dtype=DOUBLE)
    refused(quadratic(lambda x: Ridged(x)), at, y0, "moves with x changes")
    refused(quadratic(lambda x: Without(L1(x))), at, y0, "separable", AID(FISTA(tol=1e-12), GMRES(1e-12)))
    flat = BilevelProblem(
        lambda x, y: y.square().sum() / 2, lambda x, y: (y.sum() - 3).square() / 2, prox=lambda x: L1(x)
    )
    refused(flat, at, torch.tensor([1.0, 0.5, 0.2, 0.1], dtype=DOUBLE), "strongly convex")


@pytest.mark.parametrize(
    ("term", "shape"),
    [
        (lambda x: Simplex(x), (4,)),
        (lambda x: L1Ball(x), (4,)),
        (lambda x: L2Ball(x), (4,)),
        (lambda x: LInf(x), (4,)),
        (lambda x: TV1D(x), (4,)),
        (lambda x: TV2D(x), (2, 2)),
        (lambda x: NuclearNorm(x), (2, 2)),
        (lambda x: Affine(L1(x), torch.eye(4, dtype=DOUBLE).diff(dim=0)), (4,)),
        (lambda x: Sum((TV1D(x), L1(x))), (4,)),
    ],
    ids=["Simplex", "L1Ball", "L2Ball", "LInf", "TV1D", "TV2D", "NuclearNorm", "Affine", "Sum"],
)
def test_terms_on_other_manifolds_are_refused_by_their_name(
    request: pytest.FixtureRequest, term: Any, shape: tuple[int, ...]
) -> None:
    name = request.node.callspec.id
    y0 = torch.zeros(shape, dtype=DOUBLE)
    reason = f"no theorem covers the manifold of `{name}`"
    refused(quadratic(term), torch.tensor(0.3, dtype=DOUBLE), y0, reason, AID(FISTA(tol=1e-10), GMRES(1e-10)))


def test_neighbours_of_what_is_refused_are_certified() -> None:
    y0, constants = torch.zeros(4, dtype=DOUBLE), Constants(mu=1.0, L=1.0, L_fyy=1.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0)
    for term, at in ((lambda x: L1(x), 0.3), (lambda x: LInfBall(x), 0.3)):
        x = torch.tensor(at, dtype=DOUBLE)
        for kind in (
            quadratic(term),
            BilevelProblem(quadratic(term).f, inner=ProximalFixedPoint(quadratic(term).g, term)),
        ):
            found = hypergradient(kind, x, y0, estimator=AID(FISTA(tol=1e-12), GMRES(1e-12)))
            certificate = certify(kind, x, found, constants)
            assert certificate.bound < 1e-9 and certificate.proven
    lasso = quadratic(lambda x: L1(x))
    found = hypergradient(lasso, x, y0, estimator=FINE)
    wrong = certify(lasso, x, found, replace(constants, mu=1.5, L=2.0))
    assert wrong.bound == math.inf and "mu = 1.5 does not hold" in wrong.reason
    with pytest.raises(ValueError, match="is for smooth inner problems"):
        certify(quadratic(term), x, found, constants, refine=True)


def test_tasks_are_certified_together() -> None:
    targets = torch.tensor([[3.0, 0.2], [0.1, -4.0], [1.5, 1.6]], dtype=DOUBLE)
    problem = BilevelProblem(
        lambda x, y, task: (y - task).square().sum() / 2,
        lambda x, y, task: (y - task).square().sum() / 2,
        prox=lambda x, task: L1(x.exp()),
        tasks=True,
    )
    x, y0 = torch.tensor(0.1, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)
    constants = Constants(mu=1.0, L=1.0, L_fyy=1.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0)
    exact = hypergradient(problem, x, y0, data=targets, estimator=FINE).grad
    for tol in (1e-2, 1e-6):
        aid = AID(ProximalGradient(step=0.3, tol=tol), CG(1e-12))
        found = hypergradient(problem, x, y0, data=targets, estimator=aid)
        certificate = certify(problem, x, found, constants, data=targets)
        assert float((found.grad - exact).abs()) <= certificate.bound <= 100 * tol


def test_tasks_of_the_group_lasso_are_certified_one_after_the_other() -> None:
    case = Case(2)
    A, b, c, _ = case.data
    problem = BilevelProblem(
        lambda x, y, t: (y - c).square().sum() / 2,
        lambda x, y, t: (A @ y - t * b).square().sum() / 2,
        prox=lambda x, t: GroupLasso(x.exp(), GROUPS),
        tasks=True,
    )
    x, data = torch.tensor([2.0, 2.5, 1.0], dtype=DOUBLE), torch.tensor([1.0, 1.2], dtype=DOUBLE)
    zero, constants = torch.zeros(case.q, dtype=DOUBLE), replace(case.constants(True), L_fxy=0.0, C_G=0.0)
    exact = hypergradient(problem, x, zero, data=data, estimator=FINE)
    found = hypergradient(
        problem, x, zero, data=data, estimator=AID(ProximalGradient(tol=1e-6, max_steps=50_000), CG(1e-8))
    )
    certificate = certify(problem, x, found, constants, data=data)
    assert float((found.grad - exact.grad).norm()) <= certificate.bound < 1e-3
    assert certificate.proven and certificate.theorem == "manifold"


def test_in_single_precision_rounding_is_in_the_bound() -> None:
    target = torch.tensor([2.0, -0.5, 0.1, 1.5])

    def built(dtype: torch.dtype) -> BilevelProblem:
        return BilevelProblem(
            lambda x, y: y.square().sum() / 2,
            lambda x, y: (y - target.to(dtype)).square().sum() / 2,
            prox=lambda x: L1(x),
        )

    x, y0 = torch.tensor(0.3), torch.zeros(4)
    constants = Constants(mu=1.0, L=1.0, L_fyy=1.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0)
    exact = float(hypergradient(built(DOUBLE), x.double(), y0.double(), estimator=FINE).grad)
    found = hypergradient(built(torch.float32), x, y0, estimator=AID(FISTA(tol=1e-5), CG(1e-6)))
    certificate = certify(built(torch.float32), x, found, constants)
    assert abs(float(found.grad) - exact) <= certificate.bound < 1e-4
