"""Certificates under linear constraints: at least the true error, refused without a margin."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from strategies import SEEDS, gaussian, spd
from torch import Tensor

from bilevel import BilevelProblem, Constants, Estimate, Polytope, certify, hypergradient

C = torch.tensor([1.0, -2.0, 0.5, 0.3])


def posed(seed: int = 0, moving: bool = True, curved: float = 0.1) -> BilevelProblem:
    """g = y'Qy / 2 - <Bx, y> + curved sum log cosh y: M_yy <= 0.77 curved, 1 <= Q <= 2."""
    Q, B = spd(torch.linspace(1, 2, 4), seed), gaussian(12, seed=seed + 1).reshape(4, 3)

    def constraints(x: Tensor) -> Polytope:
        t = x[0] / 2 if moving else 0.0
        return Polytope(
            A=torch.tensor([[1.0, 1.0, 0.0, 1.0]]),
            b=0.5 + t,
            G=torch.tensor([[0.0, 2.0, 1.0, 0.0]]),
            h=0.2 - t,
            lower=torch.tensor([-0.5, -9.0, -9.0, -9.0]),
            upper=0.6 + t * torch.ones(4),
        )

    return BilevelProblem(
        lambda x, y: (y - C).square().sum() / 2 + x.sum() * y[0],
        lambda x, y: y @ Q @ y / 2 - 2 * (B @ x) @ y + curved * torch.log(torch.cosh(y)).sum(),
        constraints=constraints,
    )


def known(seed: int = 0, curved: float = 0.1) -> Constants:
    B = gaussian(12, seed=seed + 1).reshape(4, 3)
    G = 2 * float(torch.linalg.matrix_norm(B, 2))
    return Constants(mu=1.0, L=2.0 + curved, L_fyy=1.0, L_fxy=3**0.5, M_yy=0.77 * curved, M_xy=0.0, C_G=G)


def off_by(estimate: Estimate, distance: float, seed: int) -> Estimate:
    noise = gaussian(4, seed=seed)
    return replace(estimate, y=estimate.y + distance * noise / noise.norm(), grad=estimate.grad * (1 + distance))


@settings(max_examples=15)
@given(SEEDS, st.sampled_from([0.0, 1e-8, 1e-5, 1e-3]), st.booleans(), st.booleans())
def test_the_bound_is_at_least_the_error_wherever_there_is_one(
    seed: int, distance: float, moving: bool, measured: bool
) -> None:
    problem, x = posed(seed, moving), 0.3 * gaussian(3, seed=seed + 3)
    exact = hypergradient(problem, x, torch.zeros(4), throw=False)
    if not exact.status.ok:
        return
    near = off_by(exact, distance, seed)
    constants = known(seed)
    found = certify(problem, x, near, replace(constants, mu=None, C_G=None, L=None) if measured else constants)
    error = float((near.grad - exact.grad).norm())
    assert found.bound >= error * (1 - 1e-9)
    assert found.theorem == "face"
    if distance == 0.0 and exact.reports[1].residual > 1e-6:
        assert found.bound < 1e-10 and not found.reason


def test_a_margin_below_the_error_is_refused_and_one_above_is_not() -> None:
    """y* = max(x, 0) at x = -0.01: held with a multiplier of 0.01."""
    problem = BilevelProblem(
        lambda x, y: y.sum(), lambda x, y: (y - x).square().sum() / 2, constraints=lambda x: Polytope(lower=0.0)
    )
    constants = Constants(mu=1.0, L=1.0, L_fyy=0.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=1.0)
    x = torch.tensor([-0.01, 1.0])
    exact = hypergradient(problem, x, torch.zeros(2))
    good = certify(problem, x, exact, constants)
    assert good.bound < 1e-12 and good.proven
    for distance, refused in ((0.005, False), (0.02, True)):
        near = replace(exact, y=exact.y + torch.tensor([0.0, distance]))
        found = certify(problem, x, near, constants)
        assert math.isinf(found.bound) is refused and bool(found.reason) is refused
    assert "multiplier" in found.reason


def test_a_vertex_needs_no_curvature() -> None:
    T = torch.tensor([[-1.0, 2.0], [3.0, -1.0]]) / 5
    program = BilevelProblem(
        lambda x, y: y.square().sum(),
        lambda x, y: -y.sum(),
        constraints=lambda x: Polytope(G=torch.tensor([[1.0, 2.0], [3.0, 1.0]]), h=x, lower=0.0),
    )
    constants = Constants(mu=None, L=0.0, L_fyy=2.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, C_G=0.0)
    x = torch.tensor([4.0, 6.0])
    exact = hypergradient(program, x, torch.zeros(2))
    found = certify(program, x, exact, constants)
    assert found.proven and found.bound < 1e-12
    wrong = certify(program, x, replace(exact, grad=exact.grad + 0.1), constants)
    assert 0.1 < wrong.bound < 0.2
    torch.testing.assert_close(exact.grad, 2 * T.T @ (T @ x))


def test_what_no_theorem_covers_is_refused_with_the_reason() -> None:
    x, constants = 0.3 * gaussian(3, seed=3), known()

    def reason(problem: BilevelProblem, **keywords: Any) -> str:
        data = keywords.get("data")
        return certify(problem, x, hypergradient(problem, x, torch.zeros(4), data=data), constants, data=data).reason

    f, g = posed().f, posed().g
    turned = BilevelProblem(f, g, constraints=lambda x: Polytope(A=torch.ones(1, 4) * x[0].exp(), b=1.0))
    assert "rows of constraints move" in reason(turned)
    assert not reason(BilevelProblem(f, g, constraints=lambda x: Polytope(A=torch.ones(1, 4), b=1.0)))
    ball = BilevelProblem(f, g, inequalities=lambda x, y: y.square().sum() - 1)
    with pytest.raises(ValueError, match=r"needs the constants L_cyy, L_cxy, M_cyy, M_cxy of nonlinear constraints"):
        reason(ball)


@pytest.mark.parametrize("distance", [0.0, 1e-7, 1e-4])
def test_tasks_are_certified_one_after_the_other(distance: float) -> None:
    problem, x, constants = posed(2), 0.3 * gaussian(3, seed=5), known(2)
    constraints = problem.constraints
    assert constraints is not None
    tasks = BilevelProblem(
        lambda x, y, t: problem.f(x, y) * t,
        lambda x, y, t: problem.g(x, y) + 0.1 * (t - 1) * y.sum(),
        constraints=lambda x, t: constraints(x),
        tasks=True,
    )
    data = torch.tensor([1.0, 0.8, 1.2])
    exact = hypergradient(tasks, x, torch.zeros(4), data=data)
    off = replace(exact, y=exact.y + distance * gaussian(12, seed=9).reshape(3, 4), grad=exact.grad * (1 + distance))
    found = certify(tasks, x, off, replace(constants, L_fyy=1.2, L_fxy=1.2 * 3**0.5), data=data)
    error = float((off.grad - exact.grad).norm())
    assert found.proven and error <= found.bound <= 1e-9 + 1e3 * distance
    elsewhere = replace(exact, grad=1.1 * exact.grad)  # right y, wrong vector
    far = certify(tasks, x, elsewhere, replace(constants, L_fyy=1.2, L_fxy=1.2 * 3**0.5), data=data)
    assert float((0.1 * exact.grad).norm()) <= far.bound * (1 + 1e-9)
    kinked = replace(off, y=off.y + 0.3)  # far from all constraints that hold
    refused = certify(tasks, x, kinked, constants, data=data)
    assert math.isinf(refused.bound) and refused.reason.startswith("task 0: ")
