"""Instances with fixed points: Cournot games, an actor and its critic, a deep equilibrium network; certificates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import AID, ITD, BilevelProblem, Constants, Status, certify, error_bound, hypergradient, minimize
from bilevel._tree import ravel
from bilevel.cli import main
from bilevel.problems import actor_critic, cournot, deep_equilibrium
from bilevel.problems.cournot import CournotGame
from bilevel.solvers import GMRES, Anderson, Broyden, FixedPointIteration, JacobianFree, LinearAnderson, Neumann
from bilevel.testing.strategies import gaussian

D: dict[str, Any] = {"dtype": torch.float64}


@pytest.mark.parametrize("players", [2, 3, 4, 5])
@pytest.mark.parametrize("d", [0.0, 0.5])
def test_taxes_on_a_cournot_game_have_the_hypergradient_of_its_closed_form(players: int, d: float) -> None:
    known = cournot(players=players, d=d)
    x = known.x0 + 0.3 * gaussian(players, seed=1)
    assert known.solution is not None and known.gradient is not None
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(known.problem.f(leaf, known.solution(leaf)), leaf)
    torch.testing.assert_close(known.gradient(x), wanted, rtol=1e-12, atol=1e-12)
    for estimator in ("implicit", AID(Broyden(1e-12), LinearAnderson(1e-12)), AID(Anderson(1e-12), GMRES(1e-12))):
        est = hypergradient(known.problem, x, known.y0, estimator=estimator)
        torch.testing.assert_close(est.grad, wanted, rtol=0, atol=1e-10)
        torch.testing.assert_close(est.y, known.solution(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("players", [2, 3, 4, 5])
def test_best_responses_converge_for_two_players_and_are_refused_for_three_and_more(players: int) -> None:
    known = cournot(players=players)
    x, contracts = known.x0 + 0.1, players == 2
    assert known.gradient is not None
    for estimator in (
        AID(FixedPointIteration(), GMRES()),
        AID(Anderson(), Neumann(1.0, 200, 1e-9)),
        AID(Anderson(), JacobianFree()),
    ):
        est = hypergradient(known.problem, x, known.y0, estimator=estimator, throw=False)
        assert est.status is (Status.successful if contracts else Status.expanding)
    radius = next(r.residual for r in est.reports if r.part == "spectral radius of the fixed-point map")
    assert radius == pytest.approx((players - 1) / 2, rel=1e-9)


def test_the_best_taxes_are_found() -> None:
    known = cournot(players=5)
    found = minimize(known.problem, known.x0, known.y0, max_steps=200)
    assert found.status.ok and known.minimizer is not None
    torch.testing.assert_close(found.x, known.minimizer, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="shape"):
        CournotGame(1.0, 1.0, torch.ones(2), torch.ones(3))


@pytest.mark.parametrize("seed", range(3))
def test_an_actor_and_its_critic_have_the_exact_policy_gradient(seed: int) -> None:
    known = actor_critic(seed=seed)
    x = gaussian(24, seed=seed).reshape(8, 3)
    assert known.gradient is not None and known.solution is not None
    for estimator in ("implicit", "aid-dense", AID(FixedPointIteration(tol=1e-13), Neumann(1.0, 1000, 1e-13))):
        est = hypergradient(known.problem, x, known.y0, estimator=estimator)
        torch.testing.assert_close(est.grad, known.gradient(x), rtol=0, atol=1e-10)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(known.problem.f(leaf, known.solution(leaf)), leaf)
    torch.testing.assert_close(known.gradient(x), wanted, rtol=0, atol=1e-12)


def test_an_actor_improves() -> None:
    known = actor_critic()
    found = minimize(known.problem, known.x0, known.y0, max_steps=40)
    assert known.metrics is not None
    begun = hypergradient(known.problem, known.x0, known.y0).y
    now, start = known.metrics(found.x, found.y), known.metrics(known.x0, begun)
    assert start["return"] < now["return"] <= now["best return"] + 1e-9
    assert now["return"] > 0.98 * now["best return"]


def _saved(run: Callable[[], object]) -> int:
    """The most bytes of graphs that are held at once while it runs."""
    held = most = 0

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal held, most
            self.tensor = tensor.detach() if not tensor.requires_grad else tensor
            held += tensor.numel() * tensor.element_size()
            most = max(most, held)

        def __del__(self) -> None:
            nonlocal held
            held -= self.tensor.numel() * self.tensor.element_size()

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda kept: kept.tensor):
        run()
    return most


def test_a_deep_equilibrium_is_its_unrolled_layers_and_its_memory_does_not_grow_with_them() -> None:
    known = deep_equilibrium(samples=12, width=5)
    implicit = hypergradient(known.problem, known.x0, known.y0, estimator=AID(Anderson(1e-13), GMRES(1e-13)))
    unrolled = ITD(FixedPointIteration(400, tol=None))
    wanted = ravel(hypergradient(known.problem, known.x0, known.y0, estimator=unrolled).grad)[0]
    assert float((ravel(implicit.grad)[0] - wanted).norm()) <= 1e-8 * float(wanted.norm())

    def memory(make: Callable[[FixedPointIteration], Any], steps: int) -> int:
        estimator = make(FixedPointIteration(steps, tol=None))
        warm = hypergradient(known.problem, known.x0, known.y0, estimator=estimator, throw=False)
        del warm
        return _saved(lambda: hypergradient(known.problem, known.x0, known.y0, estimator=estimator, throw=False))

    few, many = (memory(lambda inner: AID(inner, GMRES()), steps) for steps in (10, 100))
    assert few == many > 0
    assert memory(ITD, 100) > 5 * memory(ITD, 10) > 5 * many


def test_a_deep_equilibrium_contracts_whatever_its_weights_and_trains() -> None:
    known = deep_equilibrium(samples=40)
    x = known.x0
    big = {"layer": {name: 100 * w for name, w in x["layer"].items()}, "head": x["head"]}
    est = hypergradient(known.problem, big, known.y0, estimator=AID(FixedPointIteration(), Neumann(1.0, 500, 1e-8)))
    assert next(r.residual for r in est.reports if "radius" in r.part) < 0.9
    found = minimize(known.problem, x, known.y0, max_steps=40)
    assert known.metrics is not None
    assert float(found.value) < 0.1 * float(known.problem.f(x, est.y)) or float(found.value) < 0.05
    assert known.metrics(found.x, found.y)["training accuracy"] == 1.0


@pytest.mark.parametrize("radius", [0.8, 1.4])
def test_certificates_of_fixed_points_hold_and_shrink_with_the_residual(radius: float) -> None:
    q, p = 6, 3
    A, B, t = gaussian(q, q, seed=0), gaussian(q, p, seed=1), gaussian(q, seed=2)
    A = A * (radius / torch.linalg.matrix_norm(A, 2))
    problem = BilevelProblem(
        lambda x, y: (y - t).square().sum() / 2, fixed_point=lambda x, y: torch.tanh(A @ y) + B @ x.sin()
    )
    x, y0 = torch.tensor([0.1, 0.5, -1.0], **D), torch.zeros(q, **D)
    exact = hypergradient(problem, x, y0, estimator=AID(Anderson(1e-15), GMRES(1e-14)), throw=False)
    M = 0.77 * radius**2  # |tanh''| <= 4 / sqrt(27)
    mus = (None,) if radius > 1 else (None, 1 - radius)
    for mu in mus:
        known = Constants(mu=mu, L_fyy=1.0, L_fxy=0.0, M_yy=M, M_xy=0.0, C_G=float(torch.linalg.matrix_norm(B, 2)))
        bounds = []
        for tol in (1e-3, 1e-6, 1e-9):
            est = hypergradient(problem, x, y0, estimator=AID(Anderson(tol), GMRES(1e-8)))
            found = certify(problem, x, est, known)
            assert found.proven and float((est.grad - exact.grad).norm()) <= found.bound
            assert float((est.y - exact.y).norm()) <= found.distance
            if mu is not None:
                residual = float((est.y - torch.tanh(A @ est.y) - B @ x.sin()).norm())
                assert found.distance == pytest.approx(residual / mu, rel=1e-4)
            bounds.append(found.bound)
        assert bounds[2] < 1e-4 * bounds[0]
    est = hypergradient(problem, x, y0)
    false = Constants(mu=5.0, L_fyy=1.0, L_fxy=0.0, M_yy=M, M_xy=0.0, C_G=1.0)
    assert certify(problem, x, est, false).bound == float("inf")
    if radius < 1:
        bound = error_bound(
            AID(Anderson(1e-6), GMRES(1e-6)),
            Constants(mu=1 - radius, L_fyy=1.0, L_fxy=0.0, M_yy=M, M_xy=0.0, C_G=4.0),
            distance=10.0,
            outer_gradient_norm=10.0,
        )
        assert 0 < bound.total < 1


def test_the_command_line_runs_and_compares_problems_with_fixed_points(tmp_path: Path, capsys: Any) -> None:
    assert main(["run", "cournot", "--steps", "3", "--out", str(tmp_path / "cournot")]) == 0
    assert main(["compare", "cournot", "--estimator", "aid-gmres", "--estimator", "aid-dense"]) == 0
    assert "aid-gmres" in capsys.readouterr().out
