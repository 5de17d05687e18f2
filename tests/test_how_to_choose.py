"""What the page "How to choose" says of names and of costs, on a quadratic problem."""

from __future__ import annotations

import math

import pytest
from torch import Tensor

from bilevel import (
    AID,
    ESJ,
    ITD,
    AbstractEstimator,
    Checkpointed,
    FiniteDifference,
    Forward,
    Penalty,
    Start,
    Truncated,
    hypergradient,
)
from bilevel.problems.quadratic import quadratic
from bilevel.solvers import CG, GMRES, MINRES, Dense, GradientDescent, Iterate, Neumann, Nystrom

p, q, D, N, K, Q = 4, 6, 30, 3, 5, 2
KEPT = -(-D // (math.isqrt(D - 1) + 1))  # about sqrt(D) states
inner = Iterate(GradientDescent(0.1), max_steps=D)
instance = quadratic(p=p, q=q, kappa=10.0)
x: Tensor = instance.x0 + 1.0

ACCURATE = ["aid-cg", "aid-neumann", "aid-dense", "aid-minres", "aid-gmres", "itd", "itd-forward", "esj", "penalty"]
KRYLOV = {"cg": CG(rtol=0, max_steps=N), "minres": MINRES(rtol=0, max_steps=N), "gmres": GMRES(rtol=0, max_steps=N)}
# gradients of g, of f, Hessian products, cross products: the table of what each costs
COSTS: dict[str, tuple[AbstractEstimator, tuple[int, int, int, int]]] = {
    **{name: (AID(inner, solver), (D + 1, 1, N + 1, 1)) for name, solver in KRYLOV.items()},
    "neumann": (AID(inner, Neumann(0.1, terms=K)), (D + 1, 1, K, 1)),
    "dense": (AID(inner, Dense()), (D + 1, 1, q + 1, 1)),
    "nystrom": (AID(inner, Nystrom(rank=3, damping=0.1)), (D + 1, 1, 3 + 1, 1)),
    "nystrom, damping chosen": (AID(inner, Nystrom(rank=3, damping=None)), (D + 1, 1, 3 + 2, 1)),
    "itd": (ITD(inner), (D + 1, 1, D - 1, D)),
    "checkpointed": (ITD(inner, Checkpointed()), (3 * D - KEPT + 1, 1, D - 1, D)),
    "forward": (ITD(inner, Forward()), (D + 1, 1, p * D, p * D)),
    "truncated": (ITD(inner, Truncated(K)), (D + 1, 1, K - 1, K)),
    "esj": (ESJ(inner, directions=Q), ((Q + 1) * (D + 1), 1, 0, 0)),
    "penalty": (Penalty(inner), (2 * (D + 1) + 2, D + 3, 0, 0)),
    "penalty, extrapolated": (Penalty(inner, extrapolate=True), (3 * (D + 1) + 3, 2 * (D + 1) + 3, 0, 0)),
    "differences": (FiniteDifference(inner), ((2 * p + 1) * (D + 1), 0, 0, 0)),
}


def counts(estimator: AbstractEstimator, start: Start | None = None) -> tuple[int, int, int, int]:
    stats = hypergradient(instance.problem, x, instance.y0, estimator=estimator, start=start).stats
    return stats.gradients, stats.outer_gradients, stats.hvps, stats.cross_products


@pytest.mark.parametrize("name", ACCURATE)
def test_accurate_names_agree_with_the_closed_form(name: str) -> None:
    h = instance.gradient
    assert h is not None
    found = hypergradient(instance.problem, x, instance.y0, estimator=name).grad
    assert (found - h(x)).norm() < 1e-5 * h(x).norm()


@pytest.mark.parametrize("name", COSTS)
def test_an_estimate_costs_what_the_table_says(name: str) -> None:
    estimator, cost = COSTS[name]
    assert counts(estimator) == cost


@pytest.mark.parametrize("name", KRYLOV)
def test_a_warm_start_costs_a_product(name: str) -> None:
    estimator = AID(inner, KRYLOV[name])
    start = hypergradient(instance.problem, x, instance.y0, estimator=estimator).start
    assert counts(estimator, start) == (D + 1, 1, N + 2, 1)
