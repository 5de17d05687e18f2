"""Certificates under nonlinear constraints: at least the true error, refused without a margin or constants."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from strategies import SEEDS, gaussian, spd
from torch import Tensor

from bilevel import BilevelProblem, Certificate, Constants, Estimate, Polytope, certify, hypergradient

C = torch.tensor([1.0, -2.0, 0.5])
QUADRATIC = Constants(mu=None, L_fyy=1.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, L_cyy=2.0, L_cxy=0.0, M_cyy=0.0, M_cxy=0.0)


def f(x: Tensor, y: Tensor) -> Tensor:
    return (y - C).square().sum() / 2


def nearest(x: Tensor, y: Tensor) -> Tensor:
    return (y - x[:3]).square().sum() / 2


def on_ball() -> BilevelProblem:
    """y* = r t / |t| for x = (t, r) with |t| > r."""
    return BilevelProblem(f, nearest, inequalities=lambda x, y: y.square().sum() - x[3].square())


def exact_on_ball(x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(f(leaf, leaf[3] * leaf[:3] / leaf[:3].norm()), leaf)[0]


def off_by(estimate: Estimate, distance: float, seed: int) -> Estimate:
    noise = gaussian(3, seed=seed)
    return replace(estimate, y=estimate.y + distance * noise / noise.norm(), grad=estimate.grad * (1 + distance))


def sound(found: Certificate, estimate: Estimate, exact: Tensor) -> bool:
    return found.bound >= float((estimate.grad - exact).norm()) * (1 - 1e-9)


@settings(max_examples=12)
@given(SEEDS, st.sampled_from([0.0, 1e-8, 1e-5, 1e-3, 1e-2]), st.sampled_from([0.1, 1.0, 10.0]))
def test_on_a_ball_the_bound_is_at_least_the_error_of_the_closed_form(seed: int, distance: float, size: float) -> None:
    t = gaussian(3, seed=seed)
    x = torch.cat([2 * size * t / t.norm(), torch.tensor([size])])
    near = off_by(hypergradient(on_ball(), x, torch.zeros(3)), distance, seed + 1)
    found = certify(on_ball(), x, near, QUADRATIC)
    assert sound(found, near, exact_on_ball(x))
    y = x[3] * x[:3] / x[:3].norm()
    assert found.distance >= float((near.y - y).norm()) * (1 - 1e-9) - 1e-15
    if distance <= 1e-5 * size:
        assert found.proven and found.theorem == "kkt" and found.bound <= 1e-9 * (1 + size) + 300 * distance / size


def bent(curved: float = 0.1) -> BilevelProblem:
    """Log-sum-exp and a ball that both depend on x, an equality, bounds; g is not quadratic. Nothing else is."""
    Q, B = spd(torch.linspace(1, 2, 3), 0), gaussian(6, seed=1).reshape(3, 2)
    return BilevelProblem(
        lambda x, y: (y - C).square().sum() / 2 + x.sum() * y[0],
        lambda x, y: y @ Q @ y / 2 - 2 * (B @ x) @ y + curved * torch.log(torch.cosh(y)).sum(),
        inequalities=lambda x, y: [torch.logsumexp(y, 0) - 1 - x[0] / 4, (1 + x[1] / 4) * y.square().sum() - 4],
        equalities=lambda x, y: y @ torch.tensor([1.0, 1.0, -1.0]) - x.sum() / 2,
        constraints=lambda x: Polytope(lower=-1.0, upper=torch.tensor([9.0, 0.4, 9.0])),
    )


# Within |y| <= 3 and |x| <= 1: the ball has second derivatives 2.5 and 1.5 in x, log-sum-exp at most 1/2, third 0.28.
BENT = Constants(
    mu=None, L_fyy=1.0, L_fxy=2**0.5, M_yy=0.077, M_xy=0.0, L_cyy=2.6, L_cxy=1.5, M_cyy=0.28, M_cxy=0.5, radius=1.0
)


@settings(max_examples=12)
@given(SEEDS, st.sampled_from([0.0, 1e-8, 1e-5, 1e-3]))
def test_of_several_constraints_the_bound_is_at_least_the_error(seed: int, distance: float) -> None:
    x = 0.4 * torch.tanh(gaussian(2, seed=seed))
    exact = hypergradient(bent(), x, torch.zeros(3), throw=False)
    if not exact.status.ok:
        return
    near = off_by(exact, distance, seed)
    found = certify(bent(), x, near, BENT)
    assert sound(found, near, exact.grad)
    if distance == 0.0 and exact.reports[1].residual > 1e-6:
        assert found.bound < 1e-9 and found.proven


def test_a_margin_below_the_error_is_refused_and_one_above_is_not() -> None:
    """The ball holds y with a multiplier of 0.01, or is 0.01 away."""
    for reach, word in ((1.02, "multiplier"), (0.99, "may hold")):
        x = torch.tensor([reach, 0.0, 0.0, 1.0])
        good = hypergradient(on_ball(), x, torch.zeros(3))
        assert certify(on_ball(), x, good, QUADRATIC).bound < 1e-9
        for distance, refused in ((5e-4, False), (0.02, True)):
            near = replace(good, y=good.y + torch.tensor([0.0, distance, 0.0]))
            found = certify(on_ball(), x, near, QUADRATIC)
            assert math.isinf(found.bound) is refused and bool(found.reason) is refused
        assert word in found.reason


def test_rows_that_turn_with_x_have_a_certificate_if_their_derivative_is_bounded() -> None:
    """y* = (t - <n, t> n) on the line through 0 that x turns: n = (cos x, sin x)."""
    t = torch.tensor([1.0, 2.0])

    def line(x: Tensor) -> Polytope:
        return Polytope(A=torch.stack([x[0].cos(), x[0].sin()]).unsqueeze(0), b=0.0, upper=torch.tensor([9.0, 9.0]))

    problem = BilevelProblem(lambda x, y: y[0], lambda x, y: (y - t).square().sum() / 2, constraints=line)
    x, constants = torch.tensor([0.3]), Constants(mu=1.0, L_fyy=0.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0, L_cxy=1.0)
    leaf = x.clone().requires_grad_()
    n = torch.stack([leaf[0].cos(), leaf[0].sin()])
    exact = torch.autograd.grad((t - (n @ t) * n)[0], leaf)[0]
    found = hypergradient(problem, x, torch.zeros(2))
    assert certify(problem, x, found, constants).proven
    for distance in (0.0, 1e-6, 1e-3):
        near = replace(found, y=found.y + distance, grad=found.grad + distance)
        certificate = certify(problem, x, near, constants)
        assert sound(certificate, near, exact) and certificate.bound < 1e-9 + 100 * distance
    assert "L_cxy" in certify(problem, x, found, replace(constants, L_cxy=None)).reason


def test_fixed_entries_have_multipliers_of_any_sign() -> None:
    fixed = Polytope(lower=torch.tensor([0.1, -9.0, -9.0]), upper=torch.tensor([0.1, 9.0, 9.0]))
    for sign in (1.0, -1.0):
        problem = BilevelProblem(
            f, nearest, inequalities=lambda x, y: y.square().sum() - x[3].square(), constraints=lambda x: fixed
        )
        x = torch.tensor([sign, 2.0, 1.0, 1.0])
        exact = hypergradient(problem, x, torch.full((3,), 0.1))
        assert certify(problem, x, exact, QUADRATIC).bound < 1e-9


def test_what_no_theorem_covers_is_refused_with_the_reason() -> None:
    x = torch.tensor([3.0, 0.0, 0.0, 1.0])
    exact = hypergradient(on_ball(), x, torch.zeros(3))
    with pytest.raises(ValueError, match="Missing: M_cyy"):
        certify(on_ball(), x, exact, replace(QUADRATIC, M_cyy=None))
    twice = BilevelProblem(f, nearest, inequalities=lambda x, y: (y.square().sum() - x[3].square()) * torch.ones(2))
    repeated = hypergradient(twice, x, torch.zeros(3), throw=False)
    assert "LICQ" in certify(twice, x, repeated, QUADRATIC).reason
    tasks = BilevelProblem(
        lambda x, y, t: f(x, y), lambda x, y, t: nearest(x, y), inequalities=lambda x, y, t: y.sum() - t, tasks=True
    )
    found = hypergradient(tasks, x, torch.zeros(3), data=torch.ones(2))
    assert "without tasks" in certify(tasks, x, found, QUADRATIC, data=torch.ones(2)).reason
    narrow = certify(on_ball(), x, off_by(exact, 1e-2, 0), replace(QUADRATIC, radius=1e-3))
    assert not narrow.proven and "hold within" in narrow.reason
