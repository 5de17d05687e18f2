"""The default for modules on three networks: runs, the error it declares, and bfloat16 under autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import AID, BilevelProblem, Start, Status, hypergradient, minimize
from bilevel._calculus import Exact, outer_gradients
from bilevel._flat import FlatProblem
from bilevel._inner import Objective
from bilevel._numerics.graphs import rounding_unit
from bilevel._numerics.wolfe import jump
from bilevel._tree import ravel
from bilevel.problems import small_network
from bilevel.requirements import kinks
from bilevel.requirements.kinks import kinked
from bilevel.solvers import LBFGS, Adam, TruncatedCG

NETWORKS = ("mlp", "conv", "transformer")
each = pytest.mark.parametrize("network", NETWORKS)


def small(network: Any, decay: float = -1.0, **more: Any) -> Any:
    return small_network(network=network, n_train=30, n_val=30, width=2, decay=decay, **more)


def trained(of: Any, steps: int = 200) -> Any:
    found = hypergradient(of.problem, of.x0, of.y0, estimator=AID(LBFGS(0.0, steps), TruncatedCG(1)), throw=False)
    return found.y


@each
def test_the_name_runs_and_brings_the_held_out_loss_down(network: str) -> None:
    of = small(network, -3.0)
    assert hypergradient(of.problem, of.x0, of.y0, estimator="network").status.ok
    found = minimize(of.problem, of.x0, of.y0, estimator="network", outer=Adam(0.1), max_steps=5)
    assert found.status.ok
    values = [record.value for record in found.history]
    assert values[-1] < values[0]


@pytest.mark.parametrize("network", ["mlp", "conv"])
@pytest.mark.parametrize("warm", [False, True])
def test_the_hypergradient_is_that_of_a_dense_solve_within_the_error_it_declares(network: str, warm: bool) -> None:
    """h - h* = -G H^-1 (b - H v), where |b - H v| / |b| is declared."""
    of = small(network, double=True)
    y = trained(of)
    at_y = hypergradient(of.problem, of.x0, y, estimator="network")
    found = at_y
    if warm:
        found = hypergradient(of.problem, of.x0, y, estimator="network", start=Start(at_y.y, at_y.v, 1))
    (x, of_x), (y, of_y) = ravel(of.x0, "x"), ravel(found.y, "y")
    problem = FlatProblem(of.problem, of_x, of_y, None)
    at = Exact().linearize(problem, x, y)
    H = at.operator.dense(y)
    assert torch.linalg.eigvalsh(H)[0] > 0
    _, fx, b = outer_gradients(problem, x, y)
    cross = at.cross(torch.linalg.solve(H, b))
    assert cross is not None and found.substitute is not None
    h, exact = ravel(found.grad, "x")[0], fx - cross
    G = torch.stack([at.cross(e) for e in torch.eye(len(y), dtype=y.dtype)], dim=1)  # type: ignore[misc]
    declared = found.substitute.residual * b.norm()
    assert (b - H @ ravel(found.v, "v")[0]).norm() <= 1.0001 * declared
    assert (h - exact).norm() <= torch.linalg.matrix_norm(torch.linalg.solve(H, G.T), 2) * declared
    assert torch.nn.functional.cosine_similarity(h, exact, dim=0) > 0.99


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_under_autocast_to_bfloat16_it_is_within_2_percent_of_float32(network: str) -> None:
    of, half = small(network), small(network, half=True)
    y = trained(of)
    single, rounded = (hypergradient(i.problem, i.x0, y, estimator="network") for i in (of, half))
    h, rough = ravel(single.grad, "x")[0], ravel(rounded.grad, "x")[0]
    assert rough.dtype == torch.float32
    assert 0 < (rough - h).norm() < 0.02 * h.norm()
    assert [report.part for report in rounded.reports][-1] == "rounding of f and g"
    assert len(single.reports) == len(rounded.reports) - 1


@pytest.mark.parametrize(("network", "decay", "steps"), [("conv", -4.0, 30), ("transformer", -1.0, 100)])
def test_where_rounding_moves_it_by_more_the_status_says_so(network: str, decay: float, steps: int) -> None:
    of, half = small(network, decay), small(network, decay, half=True)
    y = trained(of, steps)
    single, rounded = (hypergradient(i.problem, i.x0, y, estimator="network", throw=False) for i in (of, half))
    h, rough = ravel(single.grad, "x")[0], ravel(rounded.grad, "x")[0]
    assert (rough - h).norm() > 0.02 * h.norm()
    assert rounded.status is Status.imprecise


def test_without_a_tolerance_the_floor_of_rounded_values_is_measured_and_passed_by_slopes() -> None:
    """Without that the search fails after some 40 steps, where the gradient is five times as long."""
    half = small_network(n_train=100, n_val=10, width=4, decay=-4.0, half=True)
    (x, of_x), (y, of_y) = ravel(half.x0, "x"), ravel(half.y0, "y")
    objective = Objective(lambda y: FlatProblem(half.problem, of_x, of_y, None).g(x, y))
    found = LBFGS(0.0, 100).solve(objective, y)
    assert found.status is Status.successful
    assert found.steps == 100


def test_a_gradient_that_is_wrong_is_still_a_failed_line_search() -> None:
    found = LBFGS(0.0, 30).solve(Objective(lambda y: (2 * y.detach() - y - 1).square().sum() / 2), torch.zeros(2))
    assert found.status is Status.line_search_failed


def test_values_jump_where_no_slope_explains_it() -> None:
    smooth = [(t, 3 - t + 40 * t * t, -1 + 80 * t) for t in (0.0, 0.01, 0.02, 0.5, 1.0)]
    assert jump(smooth) == 0.0
    assert jump([*smooth, (0.0101, 3.5, 0.0)]) == pytest.approx(3.5 - smooth[1][1])
    assert jump([*smooth, (0.0101, float("nan"), 0.0)]) == 0.0


@pytest.mark.parametrize(("width", "kink"), [(0.0, True), (1e-4, False)])
def test_a_bend_that_is_resolved_is_no_kink_in_float32(
    width: float, kink: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By probes alone, without the solves of the last test."""
    monkeypatch.setattr(kinks, "_moves_as_derivatives_say", lambda problem, x, y, jumps: torch.zeros_like(jumps))
    d = torch.ones(3, dtype=torch.float32)

    def g(x: Tensor, y: Tensor) -> Tensor:
        return ((y - x).square() + width**2).sqrt().sum() if width else (y - x).abs().sum()

    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: g(0 * x + 1, y) + (y - 3 * x).square().sum() / 2)
    flat = FlatProblem(problem, ravel(d, "x")[1], ravel(d, "y")[1])
    assert bool(kinked(flat, 0.4 * d, d.clone()).any()) == kink


def test_the_rounding_unit_is_that_of_the_coarsest_dtype_on_the_way_from_the_leaf() -> None:
    y = torch.ones(2, dtype=torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = torch.nn.functional.linear(y[None], torch.eye(2, dtype=torch.float32)).float().sum()
    assert rounding_unit(value, y) == torch.finfo(torch.bfloat16).eps
    constant = torch.ones(2, dtype=torch.bfloat16).float().sum()
    assert rounding_unit(y.sum() + constant, y) == torch.finfo(torch.float32).eps
