"""The quasi-Newton outer method: how fast, where under constraints, and that any evaluation may be its last."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import bits, distance
from hypothesis import given, settings, strategies as st
from torch import Tensor

from bilevel import AID, ESJ, ITD, BilevelError, BilevelProblem, Box, Simplex, Status, minimize
from bilevel._numerics.compact_bfgs import CompactBFGS, inverse_product
from bilevel._optimizer import Move, Told
from bilevel._sets import AbstractSet
from bilevel.hypergrad.certified import Certified
from bilevel.hypergrad.finite_difference import FiniteDifference
from bilevel.hypergrad.first_order import FirstOrder
from bilevel.hypergrad.kkt import KKT
from bilevel.hypergrad.penalty import Penalty
from bilevel.named.auto import Chosen
from bilevel.named.registry import default_outer
from bilevel.problems.quadratic import quadratic
from bilevel.solvers import (
    CG,
    LBFGS,
    Adam,
    Dense,
    GradientDescent,
    Iterate,
    Neumann,
    Nystrom,
    QuadraticProgram,
    QuasiNewton,
)

AID_CG = AID(LBFGS(1e-10), CG(1e-10))
Phi = Callable[[Tensor], tuple[float, Tensor]]


def walk(phi: Phi, x: Tensor, region: AbstractSet | None = None, outer: QuasiNewton | None = None) -> Any:
    """The point, how it ended, and at how many points Phi was evaluated."""
    outer = outer or QuasiNewton()
    x = x if region is None else region.project(x)
    state = outer.init(x)
    for count in range(1, 1001):
        value, grad = phi(x)
        norm = float((grad if region is None else x - region.project(x - grad)).norm())
        move: Move = outer.tell(Told(value, grad, None, norm, 0.0), x, state, region)
        assert region is None or torch.allclose(region.project(x), x, atol=1e-14)
        if not move.rejected and move.tol is not None and norm <= move.tol:
            return x, Status.successful, count
        if move.ended is not None:
            return move.stands, move.ended, count
        x, state = move.point, move.state
    return x, Status.max_steps, 1000


def convex(size: int, condition: float, seed: int = 0) -> tuple[Phi, Tensor, Tensor]:
    """x'A x / 2 - b'x with A of this condition number; A and b."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    A = basis @ torch.diag(torch.logspace(0, math.log10(condition), size)) @ basis.mT
    b = torch.randn(size, generator=generator) * condition**0.5
    return lambda x: (float(x @ A @ x / 2 - b @ x), A @ x - b), A, b


def rosenbrock(x: Tensor) -> tuple[float, Tensor]:
    return (
        float((1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2),
        torch.stack([-2 * (1 - x[0]) - 400 * x[0] * (x[1] - x[0] ** 2), 200 * (x[1] - x[0] ** 2)]),
    )


# How fast


@pytest.mark.parametrize(("condition", "most"), [(10.0, 25), (1e3, 60), (1e5, 130)])
def test_quadratics_take_tens_of_evaluations(condition: float, most: int) -> None:
    phi, A, b = convex(20, condition)
    x, status, count = walk(phi, torch.zeros(20))
    assert status is Status.successful
    assert distance(x, torch.linalg.solve(A, b)) <= 1e-4 * float(b.norm())
    assert count <= most


def test_a_curved_valley_is_followed_as_by_scipy() -> None:
    x, status, count = walk(rosenbrock, torch.tensor([-1.2, 1.0]))
    assert status is Status.successful
    assert distance(x, torch.ones(2)) <= 1e-4
    assert count <= 60
    optimize = pytest.importorskip("scipy.optimize")
    theirs = optimize.minimize(
        lambda z: (rosenbrock(torch.from_numpy(z))[0], rosenbrock(torch.from_numpy(z))[1].numpy()),
        [-1.2, 1.0], jac=True, method="L-BFGS-B", options={"gtol": 1e-5, "ftol": 0.0},
    )  # fmt: skip
    assert count <= 1.5 * theirs.nfev


@pytest.mark.parametrize("scale", [1e-150, 1e-8, 1e8])
def test_the_scale_of_phi_changes_the_number_of_evaluations_little(scale: float) -> None:
    phi, A, b = convex(5, 30.0)
    x, status, count = walk(lambda x: (scale * phi(x)[0], scale * phi(x)[1]), torch.zeros(5))
    assert status is Status.successful
    assert distance(x, torch.linalg.solve(A, b)) <= 1e-3
    assert count <= 25


def test_a_tiny_phi_has_not_converged_at_the_start() -> None:
    """An absolute tolerance would call this done."""
    phi, _, _ = convex(5, 30.0)
    small = walk(lambda x: (1e-12 * phi(x)[0], 1e-12 * phi(x)[1]), torch.zeros(5))
    assert small[2] > 5


def test_a_bad_start_does_not_loosen_the_tolerance() -> None:
    """|h(x0)| is 1e9: a share of that alone would be met far from the minimizer, which is 1."""
    x, status, _ = walk(lambda x: (float((x**4).sum() - 4 * x.sum()), 4 * x**3 - 4), torch.full((1,), 700.0))
    assert status is Status.successful
    assert distance(x, torch.ones(1)) <= 1e-5


# Under constraints


@given(
    st.integers(2, 8), st.sampled_from([3.0, 100.0]), st.sampled_from([Box(-0.3, 0.3), Simplex()]), st.integers(0, 99)
)
@settings(max_examples=25, deadline=None)
def test_constrained_minimizers_of_quadratics_meet_the_optimality_conditions(
    size: int, condition: float, region: AbstractSet, seed: int
) -> None:
    phi, A, b = convex(size, condition, seed)
    x, status, count = walk(phi, torch.zeros(size), region, QuasiNewton(rtol=1e-8))
    assert status in (Status.successful, Status.stagnated)
    assert distance(x, region.project(x - (A @ x - b) / condition)) <= 1e-6 * float(b.norm())
    assert count <= 40


def test_projections_onto_the_simplex_and_a_box_are_found_in_a_few_steps() -> None:
    """min |x - t|^2 / 2 over a set is its projection of t."""
    t = torch.tensor([0.9, 0.4, -0.3, 0.1])
    for region in (Simplex(), Box(0.0, 0.5)):
        x, status, count = walk(lambda x: (float((x - t).square().sum()) / 2, x - t), torch.ones(4), region)
        assert status is Status.successful
        assert distance(x, region.project(t)) <= 1e-5
        assert count <= 10


def test_a_set_without_faces_is_walked_along_projected_gradients() -> None:
    class Ball(AbstractSet):
        def project(self, x: Tensor) -> Tensor:
            return x / max(1.0, float(x.norm()))

    t = torch.tensor([3.0, 4.0])
    x, status, _ = walk(lambda x: (float((x - t).square().sum()) / 2, x - t), torch.zeros(2), Ball())
    assert status is Status.successful
    assert distance(x, t / 5) <= 1e-4


def test_where_phi_falls_ever_more_steeply_the_steps_grow_to_the_bound() -> None:
    x, status, count = walk(lambda x: (float(-x.square().sum()), -2 * x), torch.full((3,), 1e-6), Box(-1e6, 1e6))
    assert status is Status.successful
    assert torch.equal(x, torch.full((3,), 1e6))
    assert count <= 20


def test_a_dict_of_sets_holds_for_its_entries() -> None:
    target = {"a": torch.tensor([3.0, -3.0]), "b": torch.tensor([0.2, 0.9, 0.1]), "c": torch.tensor(5.0)}
    problem = BilevelProblem(
        lambda x, y: torch.stack([(y[k] - target[k]).square().sum() for k in target]).sum(),
        lambda x, y: torch.stack([(y[k] - x[k]).square().sum() for k in target]).sum(),
    )
    start = {k: torch.zeros_like(v) for k, v in target.items()}
    found = minimize(problem, start, start, constraint={"a": Box(-1.0, 2.0), "b": Simplex()})
    assert found.converged
    assert found.x["a"].tolist() == [2.0, -1.0]
    assert distance(found.x["b"], Simplex().project(target["b"])) <= 1e-4
    assert float(found.x["c"]) == pytest.approx(5.0, abs=1e-4)
    assert float(start["c"]) == 0.0


# What line searches meet


def test_a_wrong_gradient_ends_as_a_failed_line_search_and_is_no_success() -> None:
    x0 = torch.tensor([-1.2, 1.0])
    x, status, _ = walk(lambda x: (rosenbrock(x)[0], -rosenbrock(x)[1]), x0)
    assert status is Status.line_search_failed
    assert torch.equal(x, x0)


def test_a_kink_ends_and_its_neighbour_without_one_converges() -> None:
    x, status, _ = walk(lambda x: (1 + float(x.abs().sum()), x.sign()), torch.tensor([0.7, -0.3]))
    assert status in (Status.line_search_failed, Status.stagnated)
    assert float(x.abs().sum()) < 0.05
    assert walk(lambda x: (float(x.square().sum()), 2 * x), torch.tensor([0.7, -0.3]))[1] is Status.successful


def test_noise_below_the_error_of_the_values_does_not_stop_the_search() -> None:
    """Values are off by up to 1e-6, which would hide the last decreases: slopes decide."""
    phi, A, b = convex(5, 30.0)

    def noisy(x: Tensor) -> tuple[float, Tensor]:
        value, grad = phi(x)
        return value + 1e-6 * math.sin(1e9 * float(x.sum())), grad

    outer, x = QuasiNewton(rtol=1e-7), torch.zeros(5)
    state, count = outer.init(x), 0
    while True:
        value, grad = noisy(x)
        move = outer.tell(Told(value, grad, None, float(grad.norm()), 1e-6), x, state, None)
        count += 1
        assert move.ended is None
        if not move.rejected and move.tol is not None and float(grad.norm()) <= move.tol:
            break
        x, state = move.point, move.state
    assert count < 40
    assert distance(x, torch.linalg.solve(A, b)) <= 1e-5


def test_an_estimate_that_fails_at_a_trial_point_is_gone_back_from() -> None:
    """log x is NaN beyond 0, where the first step leads to: h = 1 - 0.1 / x, x* = 0.1."""
    problem = BilevelProblem(lambda x, y: (x - 0.1 * y.log()).sum(), lambda x, y: (y - x).square().sum() / 2)
    found = minimize(problem, torch.ones(1), torch.ones(1), estimator=AID_CG)
    assert found.converged and not found.failed
    assert [record.status for record in found.history if record.rejected].count(Status.nonfinite) > 0
    assert float(found.x) == pytest.approx(0.1, abs=1e-4)
    # and where there is no other way, it is a failure
    walled = BilevelProblem(lambda x, y: (y - 3).square().sum() + 0 * (1 - x).sqrt().sum(), problem.g)
    with pytest.raises(BilevelError) as caught:
        minimize(walled, torch.ones(1), torch.ones(1), estimator=AID_CG)
    assert caught.value.status is Status.nonfinite
    assert float(caught.value.partial.best.x) == 1.0


# Resuming


@pytest.mark.parametrize("constraint", [None, Box(-0.5, 0.3), {"w": Simplex(4.0)}])
def test_a_run_that_is_cut_anywhere_is_the_whole_run_bit_for_bit(constraint: Any, tmp_path: Path) -> None:
    instance = quadratic(p=3, q=4)
    problem, x0 = instance.problem, instance.x0
    if isinstance(constraint, dict):
        problem = BilevelProblem(lambda x, y: instance.problem.f(x["w"], y), lambda x, y: instance.problem.g(x["w"], y))
        x0 = {"w": instance.x0}
    arguments: dict[str, Any] = {"constraint": constraint, "outer": QuasiNewton(), "estimator": AID_CG}
    whole = minimize(problem, x0, instance.y0, **arguments)
    assert whole.converged
    file = tmp_path / "state.pt"
    for step in range(len(whole.history)):
        cut = minimize(problem, x0, instance.y0, **arguments, max_steps=step, checkpoint=file)
        assert cut.best.value <= min(record.value for record in cut.history if not record.rejected)
        again = minimize(problem, x0, instance.y0, **arguments, checkpoint=file, resume=True)
        assert bits((again.x, again.y, again.best.x)) == bits((whole.x, whole.y, whole.best.x))
        for one, other in zip(again.history, whole.history, strict=True):
            assert {**one.as_dict(), "seconds": 0} == {**other.as_dict(), "seconds": 0}


def test_a_run_that_ends_within_a_line_search_returns_the_point_it_stands_at() -> None:
    """The second evaluation is far beyond the minimizer; what is returned is no worse than what was accepted."""
    stiff = BilevelProblem(lambda x, y: 50 * (y - 0.01).square().sum(), lambda x, y: (y - x).square().sum() / 2)
    for steps in range(1, 5):
        found = minimize(stiff, torch.zeros(1), torch.zeros(1), estimator=AID_CG, max_steps=steps)
        assert found.value <= found.history[0].value + 1e-12
        assert found.history[-1].value == found.value
        assert not found.history[-1].rejected


# The matrix


def test_the_compact_form_is_the_bfgs_recursion_and_its_inverses() -> None:
    generator = torch.Generator().manual_seed(0)
    S = torch.randn(3, 5, generator=generator)
    root = torch.randn(5, 5, generator=generator)
    Y = S @ (root @ root.mT + torch.eye(5))
    B = float(Y[-1] @ Y[-1] / (S[-1] @ Y[-1])) * torch.eye(5)
    for s, w in zip(S, Y, strict=True):
        B = B - torch.outer(B @ s, B @ s) / (s @ B @ s) + torch.outer(w, w) / (s @ w)
    compact, v = CompactBFGS(S, Y, sigma=1.0), torch.randn(5, generator=generator)
    torch.testing.assert_close(compact.product(v), B @ v)
    torch.testing.assert_close(compact.solve(v, lambda d: d), torch.linalg.solve(B, v))
    torch.testing.assert_close(inverse_product(S, Y, v), torch.linalg.solve(B, v))
    free = torch.tensor([True, False, True, True, False])
    r = torch.where(free, v, torch.zeros(5))
    d = compact.solve(r, lambda d: torch.where(free, d, torch.zeros(5)))
    torch.testing.assert_close(d[free], torch.linalg.solve(B[free][:, free], r[free]))
    assert torch.equal(d[~free], torch.zeros(2))


# Which problems get it

STEPS = Iterate(GradientDescent(0.1), max_steps=10)
CONVERGED = Iterate(GradientDescent(0.1), max_steps=1000, tol=1e-9, min_steps=100)


@pytest.mark.parametrize(
    ("estimator", "accurate"),
    [
        (AID_CG, True),
        (AID(LBFGS(1e-10), Dense()), True),
        (KKT(QuadraticProgram()), True),
        (ITD(CONVERGED), True),
        (ITD(CONVERGED, forward=True), True),
        (Chosen(AID_CG, "because"), True),
        (AID(LBFGS(0.0), CG(1e-10)), False),
        (AID(LBFGS(1e-10), CG(rtol=0.0, max_steps=3)), False),
        (AID(LBFGS(1e-10), Neumann(0.1, 5)), False),
        (AID(LBFGS(1e-10), Nystrom(rank=2)), False),
        (AID(LBFGS(1e-10), CG(1e-10), damping=0.1), False),
        (Certified(AID_CG, relative_error=0.5), False),
        (Chosen(ITD(STEPS), "because"), False),
        (ITD(STEPS), False),
        (ITD(CONVERGED, truncate=3), False),
        (ESJ(LBFGS(1e-10)), False),
        (Penalty(LBFGS(1e-10)), False),
        (FirstOrder(LBFGS(1e-10)), False),
        (FiniteDifference(LBFGS(1e-10)), False),
    ],
)
def test_accurate_estimates_of_one_function_get_it_and_others_adam(estimator: Any, accurate: bool) -> None:
    assert isinstance(default_outer(estimator, is_fixed=True), QuasiNewton if accurate else Adam)
    assert isinstance(default_outer(estimator, is_fixed=False), Adam)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`QuasiNewton\(memory=...\)` must be at least 1"):
        QuasiNewton(memory=0)
    with pytest.raises(ValueError, match=r"`QuasiNewton\(rtol=...\)` must be in \[0, 1\)"):
        QuasiNewton(rtol=1.0)


def test_a_flat_trial_point_that_is_worse_is_no_convergence() -> None:
    """Phi is a narrow well around 0.2; a step of length 1 from 0.1 leads out of it, to where h is 1e-15."""
    well = BilevelProblem(lambda x, y: -(-50 * (y - 0.2).square().sum()).exp(), lambda x, y: (y - x).square().sum() / 2)
    found = minimize(well, torch.full((1,), 0.1), torch.zeros(1), estimator=AID_CG)
    assert found.history[1].rejected and found.history[1].grad_norm < 1e-12
    assert found.converged
    assert float(found.x) == pytest.approx(0.2, abs=1e-5)


def test_at_the_edge_of_where_estimates_succeed_it_ends_soon_and_is_not_converged() -> None:
    """Phi = -x falls all the way to 1, beyond which it is NaN."""
    edge = BilevelProblem(lambda x, y: -y.sum() + 0 * (0.99 - x).sqrt().sum(), lambda x, y: (y - x).square().sum() / 2)
    found = minimize(edge, torch.zeros(1), torch.zeros(1), estimator=AID_CG)
    assert (found.status, found.converged, found.failed) == (Status.line_search_failed, False, False)
    assert 0.9 < float(found.x) < 0.99
    assert len(found.history) < 40
