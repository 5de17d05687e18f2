"""The default for modules on three networks: runs, the error it declares, and bfloat16 under autocast."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import AID, BilevelProblem, GaussNewton, Start, Status, hypergradient, minimize
from bilevel._calculus import outer_gradients
from bilevel._flat import FlatProblem
from bilevel._inner import Objective
from bilevel._numerics.graphs import rounding_unit
from bilevel._numerics.wolfe import jump
from bilevel._tree import ravel
from bilevel.named import builders
from bilevel.problems import small_network
from bilevel.requirements import kinks
from bilevel.requirements.kinks import kinked
from bilevel.solvers import LBFGS, Adam, TruncatedCG

NETWORKS = ("mlp", "conv", "transformer")
each = pytest.mark.parametrize("network", NETWORKS)


def small(network: Any, decay: float = -1.0, **more: Any) -> Any:
    """Of width 4 for the transformer: layer normalization of fewer features has a curvature of up to 1 / eps."""
    width = 4 if network == "transformer" else 2
    return small_network(**{"network": network, "n_train": 30, "n_val": 30, "width": width, "decay": decay, **more})


def trained(of: Any, steps: int = 30) -> Any:
    found = hypergradient(of.problem, of.x0, of.y0, estimator=AID(LBFGS(0.0, steps), TruncatedCG(1)), throw=False)
    return found.y


@each
def test_the_name_runs_and_brings_the_held_out_loss_down(network: str) -> None:
    of = small(network, -3.0)
    found = minimize(of.problem, of.x0, of.y0, estimator="network", outer=Adam(0.1), max_steps=3)
    assert found.status.ok
    values = [record.value for record in found.history]
    assert values[-1] < values[0]


def dense(of: Any, found: Any) -> dict[str, Any]:
    """H, G, both gradients of f and what was found, at the y where it was."""
    (x, of_x), (y, of_y) = ravel(of.x0, "x"), ravel(found.y, "y")
    problem = FlatProblem(of.problem, of_x, of_y, None)
    _, fx, b = outer_gradients(problem, x, y)
    leaf, leaf_y = x.clone().requires_grad_(), y.clone().requires_grad_()
    in_x, in_y = torch.autograd.grad(problem.g(leaf, leaf_y), (leaf, leaf_y), create_graph=True)
    H = torch.autograd.grad(in_y, leaf_y, torch.eye(len(y), dtype=y.dtype), is_grads_batched=True, retain_graph=True)[0]
    G = torch.stack([torch.autograd.grad(entry, leaf_y, retain_graph=True)[0] for entry in in_x])
    return {
        "H": H,
        "G": G,
        "fx": fx,
        "b": b,
        "h": ravel(found.grad, "x")[0],
        "v": ravel(found.v, "v")[0],
        "system": GaussNewton().linearize(problem, x, y).operator,
    }


def demand_within_the_declared_error(found: Any, at: dict[str, Any]) -> None:
    """h - h* = -G H^-1 (b - H v), where |b - H v| / |b| is declared; whatever the signs of the curvatures of H."""
    H, G, b = at["H"], at["G"], at["b"]
    exact = at["fx"] - G @ torch.linalg.solve(H, b)
    declared = found.substitute.residual * b.norm()
    assert (b - H @ at["v"]).norm() <= 1.0001 * declared
    torch.testing.assert_close(at["h"], at["fx"] - G @ at["v"], rtol=1e-9, atol=1e-12)
    assert (at["h"] - exact).norm() <= torch.linalg.matrix_norm(torch.linalg.solve(H, G.T), 2) * declared


@each
def test_the_hypergradient_is_that_of_a_dense_solve_within_the_error_it_declares(network: str) -> None:
    of = small(network, double=True)
    cold = hypergradient(of.problem, of.x0, trained(of), estimator="network")
    warm = hypergradient(of.problem, of.x0, cold.y, estimator="network", start=Start(cold.y, cold.v, 1))
    torch.testing.assert_close(ravel(warm.y)[0], ravel(cold.y)[0], rtol=0, atol=1e-10)
    at = dense(of, cold)
    assert torch.linalg.eigvalsh(at["H"])[0] > 0
    exact = at["fx"] - at["G"] @ torch.linalg.solve(at["H"], at["b"])
    for found in (cold, warm):
        at |= {"h": ravel(found.grad, "x")[0], "v": ravel(found.v, "v")[0]}
        demand_within_the_declared_error(found, at)
        assert torch.nn.functional.cosine_similarity(at["h"], exact, dim=0) > 0.99


def test_of_a_transformer_in_training_it_is_that_of_the_damped_gauss_newton_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of float64; its Hessian is indefinite, which is met on the way: the system is another one, and says how far."""
    monkeypatch.setattr(builders, "_FROM_COLD", (10, 50))
    of = small("transformer", -3.0, double=True, width=3)
    found = hypergradient(of.problem, of.x0, of.y0, estimator="network")
    at = dense(of, found)
    assert torch.linalg.eigvalsh(at["H"])[0] < 0
    assert found.substitute is not None and found.substitute.concave
    demand_within_the_declared_error(found, at)
    damping = float(re.findall(r"damping ([\d.e+-]+)", found.substitute.system)[0])
    v, b = at["v"], at["b"]
    GN = at["system"].dense(v) + damping * torch.eye(len(v), dtype=v.dtype)
    assert torch.linalg.eigvalsh(GN)[0] >= 0.99 * damping
    assert (b - GN @ v).norm() < 0.05 * b.norm()
    assert (b - at["H"] @ v).norm() > 0.2 * b.norm()


def half_and_single(network: str, decay: float, y: Any, **more: Any) -> tuple[Any, float]:
    """The estimate with the network under autocast, and how far it is from that in float32."""
    of, half = small(network, decay, **more), small(network, decay, half=True, **more)
    single, rounded = (hypergradient(i.problem, i.x0, y, estimator="network", throw=False) for i in (of, half))
    assert len(single.reports) == len(rounded.reports) - 1
    h, rough = ravel(single.grad, "x")[0], ravel(rounded.grad, "x")[0]
    assert rough.dtype == torch.float32
    return rounded, float((rough - h).norm() / h.norm())


@each
def test_under_autocast_to_bfloat16_it_is_within_2_percent_of_float32(network: str) -> None:
    rounded, apart = half_and_single(network, -1.0, trained(small(network)))
    assert 0 < apart < 0.02
    assert rounded.status.ok
    assert rounded.reports[-1].part == "rounding of f and g"


@pytest.mark.parametrize(
    ("network", "decay", "steps", "width"),
    [("mlp", -3.0, 30, 8), ("conv", -4.0, 30, 2)],
)
def test_where_rounding_moves_it_by_more_the_status_says_so(network: str, decay: float, steps: int, width: int) -> None:
    y = trained(small(network, decay, width=width), steps)
    rounded, apart = half_and_single(network, decay, y, width=width)
    assert apart > 0.02
    assert rounded.status is Status.imprecise


def test_what_bfloat16_leaves_of_the_gradient_is_seen_in_the_hypergradient() -> None:
    """The decay is small: y is off by the rounding of the gradient over it, and h by a tenth."""
    y = trained(small("mlp", -3.0, width=8))
    rounded, apart = half_and_single("mlp", -3.0, y, width=8)
    measured = next(report.residual for report in rounded.reports if report.part == "rounding of f and g")
    assert apart / 3 < measured < 3 * apart


def test_a_sign_of_curvature_that_bfloat16_decides_is_imprecise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "_FROM_COLD", (10, 50))
    half = small("transformer", -4.0, half=True)
    found = hypergradient(half.problem, half.x0, half.y0, estimator="network", throw=False)
    assert found.substitute is not None and found.substitute.concave
    assert found.reports[-1].part == "rounding of f and g, by which a curvature is negative"
    assert found.status is Status.imprecise


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
