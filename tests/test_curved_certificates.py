"""Certificates under nonlinear constraints: at least the true error, refused without a margin or constants."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from curved_cases import CONSTANTS, Bent
from hypothesis import given, settings, strategies as st
from strategies import SEEDS, gaussian, spd
from torch import Tensor

from bilevel import BilevelProblem, Certificate, Constants, Estimate, Polytope, certify, hypergradient
from bilevel.certificates.curved_face import of_conditions

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
        lambda x, y, t: f(x, y),
        lambda x, y, t: nearest(x, y),
        inequalities=lambda x, y, t: y.square().sum() - t.square() * x[3].square(),
        tasks=True,
    )
    data = torch.tensor([1.0, 1.1])
    found = hypergradient(tasks, x, torch.zeros(3), data=data)
    by_task = certify(tasks, x, off_by(found, 1e-6, 0), QUADRATIC, data=data)
    apart = float((off_by(found, 1e-6, 0).grad - found.grad).norm())
    assert by_task.proven and apart <= by_task.bound < 1e-4
    narrow = certify(on_ball(), x, off_by(exact, 1e-2, 0), replace(QUADRATIC, radius=1e-3))
    assert not narrow.proven and "hold within" in narrow.reason


SIZES = {"L_cyy": 1.0, "M_cyy": 10.0, "L_cxy": 1.0, "M_cxy": 10.0, "M_yy": 3.0, "M_xy": 3.0, "L_fyy": 3.0, "L_fxy": 3.0}


def beside(case: Bent, like: Estimate, distance: float, seed: int) -> tuple[Estimate, float]:
    """The implicit gradient at a point beside y*, and its error."""
    (y, h), noise = case.exact(), gaussian(3, seed=seed)
    near = y + distance * noise / noise.norm()
    found = replace(like, y=near, grad=case.implicit(near))
    return found, float((found.grad - h).norm())


@pytest.fixture(scope="module")
def estimate() -> Estimate:
    case = Bent.drawn(0, {})
    return hypergradient(case.problem(), case.x, torch.zeros(3))


@pytest.mark.parametrize("name", CONSTANTS)
def test_every_constant_is_needed_without_it_the_bound_is_below_the_error(name: str, estimate: Estimate) -> None:
    below = 0
    for seed in range(3):
        case = Bent.drawn(seed, {name: SIZES[name]})
        near, error = beside(case, estimate, 1e-5, seed)
        constants = case.constants(near.y)
        bound = certify(case.problem(), case.x, near, constants).bound
        assert error <= bound
        if math.isfinite(bound):
            assert bound <= 100 * error
            without: dict[str, Any] = {name: 0.0}
            below += certify(case.problem(), case.x, near, replace(constants, **without)).bound < error
    assert below >= 2


@pytest.mark.slow
def test_of_many_problems_the_bound_is_never_below_the_error_and_mostly_within_a_factor_of_20(
    estimate: Estimate,
) -> None:
    """`pytest -m slow tests/test_curved_certificates.py`."""
    factors = []
    for seed in range(300):
        shares = gaussian(8, seed=seed).abs().tolist()
        sizes = {name: size * share for (name, size), share in zip(SIZES.items(), shares, strict=True)}
        case = Bent.drawn(seed, sizes)
        for distance in (1e-6, 1e-5, 1e-4, 1e-3):
            near, error = beside(case, estimate, distance, seed)
            found = certify(case.problem(), case.x, near, case.constants(near.y))
            assert found.bound >= error
            assert not found.proven or found.distance >= distance * (1 - 1e-9)
            if math.isfinite(found.bound):
                factors.append(found.bound / error)
    assert len(factors) > 900 and sorted(factors)[len(factors) // 2] < 20


def test_the_conditions_change_by_no_more_than_their_constants_say_and_by_more_than_any_part_of_them() -> None:
    """c = |y|^2 / 2 and c = x y + k x y^2 / 2 along the (dy, dw) for which the derivatives change the most."""
    plain = Constants(mu=None, L_fyy=0.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0)

    def known(**of_c: Any) -> tuple[float, float]:
        found = of_conditions(replace(plain, **of_c), 2.0, 3.0, 1.0, 1.0, torch.ones(2, 1))
        assert found.M_yy is not None and found.M_xy is not None
        return found.M_yy, found.M_xy

    dw, dy = 2.0 * torch.tensor([1 / 3, 2 / 3]).sqrt()  # of c times 2
    change = float(torch.linalg.matrix_norm(torch.stack([torch.stack([dw, dy]), torch.stack([dy, 0 * dy])]), 2))
    assert 2.0 < change <= known(L_cyy=1.0)[0] < 1.3 * change
    assert known(M_cyy=1.0)[0] == 2 * 3 and known(M_cxy=1.0)[1] == 2 * 3
    both = torch.tensor([[2.0 * 3, 2.0], [2.0, 0.0]])  # |w| = 3, k = 1
    exact = float(torch.linalg.matrix_norm(both, 2))
    assert abs(known(L_cxy=1.0, M_cxy=1.0)[1] - exact) < 1e-12


def test_a_constraint_that_bends_towards_y_is_seen_although_its_tangent_is_far() -> None:
    """c = 50 y_1^2 - room has no slope at y = 0, and y* would be (0.01, 0): it is if the room is above 0.005."""
    for room, refused in ((0.004, True), (0.006, False)):
        problem = BilevelProblem(
            lambda x, y: y[0],
            lambda x, y: (y - x).square().sum() / 2,
            inequalities=lambda x, y, room=room: 50 * y[0].square() - room,
        )
        x = torch.tensor([0.01, 0.0])
        exact = hypergradient(problem, x, torch.zeros(2))
        assert abs(float(exact.grad[0]) - (not refused)) < 1e-9
        near = replace(exact, y=torch.zeros(2), grad=torch.tensor([1.0, 0.0]))
        found = certify(problem, x, near, replace(QUADRATIC, L_fyy=0.0, L_cyy=100.0))
        assert math.isinf(found.bound) is refused and ("may hold" in found.reason) is refused


def test_where_only_a_constraint_is_violated_the_distance_is_at_least_that_of_the_violation() -> None:
    """y = (1 + t) y* on the ball: grad_y g is a multiple of grad_y c there, as it is at y*."""
    x = torch.tensor([2.0, 1.0, -1.0, 1.0])
    exact = hypergradient(on_ball(), x, torch.zeros(3))
    for t in (1e-6, 1e-3, -1e-3):
        near = replace(exact, y=(1 + t) * exact.y)
        assert abs(t) * (1 - 1e-6) <= certify(on_ball(), x, near, QUADRATIC).distance < 1e2 * abs(t)


def test_the_distance_is_that_of_newton_and_kantorovich_for_some_scale_of_the_constraints() -> None:
    """g = (y - 3)^2 / 2, c = y^2 - 1, at y = 1.001, with a constant M_cyy that is larger than it need be."""
    problem = BilevelProblem(
        lambda x, y: y[0], lambda x, y: (y - x).square().sum() / 2, inequalities=lambda x, y: y.square() - 1
    )
    x, y, M_cyy = torch.tensor([3.0]), 1.001, 10.0
    near = replace(hypergradient(problem, x, torch.zeros(1)), y=torch.tensor([y]))
    found = certify(problem, x, near, replace(QUADRATIC, L_fyy=0.0, M_cyy=M_cyy))
    w = (3 - y) / (2 * y)
    each = []
    for k in range(-8, 9, 2):
        s = 2.0**k * (1 + 2 * w) / (2 * y)
        m = float(torch.linalg.svdvals(torch.tensor([[1 + 2 * w, 2 * s * y], [2 * s * y, 0.0]])).min())
        e = s * (y * y - 1)
        M = math.hypot(s * M_cyy * (w / s + 2 * e / m) + 2 * s, 2 * s)
        room = m * m - 2 * M * e
        each.append(2 * e / (m + math.sqrt(room)) if room >= 0 else math.inf)
    assert min(abs(found.distance / d - 1) for d in each) < 1e-9
