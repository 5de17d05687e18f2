"""The penalty hypergradient with a non-smooth term: its limit is the implicit one, also of sets that move with x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from composite_terms import Rows
from torch import Tensor

from bilevel import AID, BilevelProblem, Penalty, Status, hypergradient
from bilevel.inner_problems import ProximalFixedPoint
from bilevel.prox import L1, AbstractProxTerm, LInfBall
from bilevel.solvers import CG, FISTA, LBFGS

DOUBLE = torch.float64
GENERATOR = torch.Generator().manual_seed(3)
A = torch.randn(30, 6, generator=GENERATOR, dtype=DOUBLE)
B = torch.randn(30, generator=GENERATOR, dtype=DOUBLE)
C = torch.randn(6, generator=GENERATOR, dtype=DOUBLE)
X = torch.tensor([0.4, -0.2], dtype=DOUBLE)
FINE = FISTA(tol=1e-13, max_steps=20_000)

TERMS: dict[str, Callable[[Any], AbstractProxTerm]] = {
    "L1": lambda x: L1(x[0].exp() / 2),
    "box": lambda x: LInfBall(x[0] / 2),
    "rows": lambda x: Rows(x[0].exp() / 2),
}


def problem(name: str, kind: Any = None) -> BilevelProblem:
    def f(x: Tensor, y: Tensor) -> Tensor:
        return (y.reshape(-1) - C).square().sum() / 2 + x.square().sum()

    def g(x: Tensor, y: Tensor) -> Tensor:
        return (A @ y.reshape(-1) - B).square().sum() / 2 + x[1] * y.sum()

    return BilevelProblem(f, g, prox=TERMS[name]) if kind is None else BilevelProblem(f, inner=kind(g, TERMS[name]))


def start(name: str) -> Tensor:
    return torch.zeros((3, 2) if name == "rows" else 6, dtype=DOUBLE)


@pytest.mark.parametrize("name", TERMS)
def test_its_error_falls_with_the_weight_and_is_what_it_says(name: str) -> None:
    exact = hypergradient(problem(name), X, start(name), estimator=AID(FINE, CG(1e-13))).grad
    errors = []
    for weight in (1e2, 1e3):
        found = hypergradient(problem(name), X, start(name), estimator=Penalty(FINE, weight))
        errors.append(float((found.grad - exact).norm()))
        assert found.bias is not None and 0.4 * errors[-1] <= found.bias <= errors[-1] + 1e-6
    assert errors[1] < 0.15 * errors[0]
    better = hypergradient(problem(name), X, start(name), estimator=Penalty(FINE, 1e3, extrapolate=True))
    assert float((better.grad - exact).norm()) < 0.1 * errors[1]
    fixed = hypergradient(problem(name, ProximalFixedPoint), X, start(name), estimator=Penalty(FINE, 1e3))
    assert float((fixed.grad - exact).norm()) == pytest.approx(errors[1], rel=1e-3)


@pytest.mark.parametrize("name", ["box"])
def test_by_name_it_is_as_accurate_as_it_says(name: str) -> None:
    exact = hypergradient(problem(name), X, start(name), estimator=AID(FINE, CG(1e-13))).grad
    found = hypergradient(problem(name), X, start(name), estimator="penalty")
    assert found.status.ok and float((found.grad - exact).norm()) < 1e-2 * float(exact.norm())


def test_what_is_lost_by_residuals_times_the_weight_is_said() -> None:
    rough = Penalty(FISTA(tol=1e-3), weight=1e4)
    assert hypergradient(problem("L1"), X, start("L1"), estimator=rough, throw=False).status is Status.imprecise
    assert hypergradient(problem("L1"), X, start("L1"), estimator=Penalty(FISTA(tol=1e-3), weight=10.0)).status.ok
    with pytest.raises(ValueError, match=r"`Penalty\(inner=...\)` must heed the non-smooth term"):
        hypergradient(problem("L1"), X, start("L1"), estimator=Penalty(LBFGS()))


def test_tasks_are_a_loop_over_tasks() -> None:
    targets = torch.stack([B, -0.5 * B, 0.1 * B.flip(0)])

    def built(tasks: Any) -> BilevelProblem:
        return BilevelProblem(
            lambda x, y, task: (y - C).square().sum() / 2 + task[0] * x.sum(),
            lambda x, y, task: (A @ y - task).square().sum() / 2 + x[1] * y.sum(),
            prox=lambda x, task: L1(x[0].exp() / 3 + task[1] ** 2),
            tasks=tasks,
        )

    penalty = Penalty(FINE, 1e3)
    whole = hypergradient(built(True), X, start("L1"), data=targets, estimator=penalty)
    each = [hypergradient(built(False), X, start("L1"), data=t, estimator=penalty) for t in targets]
    torch.testing.assert_close(whole.grad, torch.stack([e.grad for e in each]).mean(0), rtol=1e-5, atol=1e-6)
