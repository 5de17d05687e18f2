"""All tasks as one batch against a loop over tasks: every estimator, to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bilevel_strategies import normal
from cases import distance
from torch import Tensor

from bilevel import AID, ESJ, ITD, KKT, BilevelProblem, FiniteDifference, FirstOrder, Penalty, hypergradient
from bilevel._tree import tree_leaves
from bilevel.certificates.certificate import Constants
from bilevel.solvers.cg import CG
from bilevel.solvers.dense import Dense
from bilevel.solvers.gmres import GMRES
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.heavy_ball import HeavyBall
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.minres import MINRES
from bilevel.solvers.neumann import Neumann
from bilevel.solvers.nystrom import Nystrom

TASKS, P = 3, 4
DATA = {
    "A": torch.stack([torch.eye(3) * (k + 1) + 0.3 for k in range(TASKS)]),
    "B": normal(TASKS, 3, P, seed=1),
    "t": normal(TASKS, 3, seed=2),
}
X = {"a": normal(3, seed=3), "b": torch.tensor(0.4)}
Y0 = {"u": torch.zeros(2), "w": torch.tensor(0.1)}


def joined(tree: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in tree_leaves(tree)])


def g(x: Any, y: Any, task: Any) -> Tensor:
    p, q = joined(x), joined(y)
    value: Tensor = (q * (task["A"] @ q / 2 - task["B"] @ p) + q.cosh()).sum()
    return value


def f(x: Any, y: Any, task: Any) -> Tensor:
    p, q = joined(x), joined(y)
    value: Tensor = (q - task["t"]).square().sum() + (p.square() * q[0]).sum()
    return value


def start(x: Any, task: Any) -> Any:
    return {"u": x["a"][:2].sin() * task["t"][0], "w": x["b"] * 2}


FIXED = Iterate(GradientDescent(0.1), 6)
ESTIMATORS: dict[str, tuple[Any, float]] = {
    "aid-cg": (AID(LBFGS(1e-11), CG(1e-12)), 1e-9),
    "aid-cg-few-steps": (AID(FIXED, CG(rtol=0.0, max_steps=2)), 1e-11),
    "aid-minres": (AID(LBFGS(1e-11), MINRES(1e-12)), 1e-9),
    "aid-gmres": (AID(LBFGS(1e-11), GMRES(1e-12)), 1e-9),
    "aid-dense": (AID(LBFGS(1e-11), Dense()), 1e-9),
    "aid-neumann": (AID(LBFGS(1e-11), Neumann(step=0.05, terms=40)), 1e-9),
    "aid-nystrom": (AID(LBFGS(1e-11), Nystrom(rank=3, damping=1e-3)), 1e-9),
    "kkt": (KKT(LBFGS(1e-11)), 1e-9),
    "first-order": (FirstOrder(FIXED), 1e-12),
    "one-step": (ITD(FIXED, truncate=1), 1e-12),
    "itd": (ITD(FIXED), 1e-12),
    "itd-forward": (ITD(FIXED, forward=True), 1e-12),
    "itd-checkpointed": (ITD(FIXED, checkpoint=True), 1e-12),
    "itd-truncated": (ITD(FIXED, truncate=2), 1e-12),
    "itd-adaptive": (ITD(Iterate(GradientDescent(0.2), 500, tol=1e-3)), 1e-11),
    "itd-adaptive-forward": (ITD(Iterate(GradientDescent(0.2), 500, tol=1e-3), forward=True), 1e-11),
    "itd-adaptive-checkpointed": (ITD(Iterate(GradientDescent(0.2), 500, tol=1e-3), checkpoint=True), 1e-11),
    "itd-least": (ITD(Iterate(GradientDescent(0.2), 500, tol=0.5, min_steps=9)), 1e-11),
    "itd-heavy-ball": (ITD(Iterate(HeavyBall(0.1, 0.5), 6)), 1e-12),
    "itd-tuned": (ITD(Iterate(GradientDescent(), 6)), 1e-11),
    "esj": (ESJ(FIXED, directions=3, radius=1e-2), 1e-9),
    "penalty": (Penalty(LBFGS(1e-12), weight=50.0, extrapolate=True), 1e-8),
    "finite-difference": (FiniteDifference(FIXED), 1e-8),
}


def loop(estimator: Any, init: Any) -> list[Any]:
    found = []
    for k in range(TASKS):
        task = {key: table[k] for key, table in DATA.items()}
        problem = BilevelProblem(f, g, init=init)
        found.append(hypergradient(problem, X, Y0, estimator=estimator, data=task, throw=False))
    return found


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("has_init", [False, True])
def test_batch_is_the_mean_of_a_loop(name: str, has_init: bool) -> None:
    estimator, rtol = ESTIMATORS[name]
    init = start if has_init else None
    if name == "first-order" and not has_init:  # it is of the start
        return
    batch = hypergradient(
        BilevelProblem(f, g, init=init, tasks=True), X, Y0, estimator=estimator, data=DATA, throw=False
    )
    singles = loop(estimator, init)
    assert batch.value == pytest.approx(sum(single.value for single in singles) / TASKS, rel=1e-10)
    mean = {key: sum(single.grad[key] for single in singles) / TASKS for key in X}
    assert distance(batch.grad, mean) <= rtol
    for key in Y0:
        assert torch.allclose(batch.y[key], torch.stack([single.y[key] for single in singles]), atol=1e-9)
    assert batch.grad["b"].shape == ()
    assert batch.y["u"].shape == (TASKS, 2)
    assert batch.status is max((single.status for single in singles), key=lambda s: not s.ok)


@pytest.mark.parametrize("name", ["aid-cg", "penalty", "finite-difference"])
def test_warm_start_of_a_batch(name: str) -> None:
    estimator, rtol = ESTIMATORS[name]
    problem = BilevelProblem(f, g, tasks=True)
    cold = hypergradient(problem, X, Y0, estimator=estimator, data=DATA)
    assert cold.start.y["u"].shape == (TASKS, 2)
    if name == "finite-difference":
        return  # from another start, fixed steps go elsewhere
    warm = hypergradient(problem, X, Y0, estimator=estimator, data=DATA, start=cold.start)
    assert distance(warm.grad, cold.grad) <= 100 * rtol
    assert warm.stats.inner_steps < cold.stats.inner_steps


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_chunks_of_tasks_give_the_estimate_of_all(name: str, chunk_size: int) -> None:
    estimator, rtol = ESTIMATORS[name]
    problem = BilevelProblem(f, g, init=start if name == "first-order" else None, tasks=True)
    whole = hypergradient(problem, X, Y0, estimator=estimator, data=DATA, throw=False)
    found = hypergradient(problem, X, Y0, estimator=estimator, data=DATA, chunk_size=chunk_size, throw=False)
    assert distance(found.grad, whole.grad) <= rtol
    assert found.value == pytest.approx(whole.value, rel=1e-12)
    for key in Y0:
        assert torch.allclose(found.y[key], whole.y[key], atol=1e-9)
        if whole.v is not None:
            assert found.v is not None
            assert torch.allclose(found.v[key], whole.v[key], atol=1e-8)
    if not has_tolerances(name):
        assert found.stats == whole.stats
    assert [report.part for report in found.reports] == [report.part for report in whole.reports]
    assert [report.statuses for report in found.reports] == [report.statuses for report in whole.reports]


def has_tolerances(name: str) -> bool:
    return name not in ("itd", "itd-truncated", "itd-checkpointed", "itd-forward", "itd-heavy-ball")


def test_a_warm_start_is_cut_into_chunks() -> None:
    estimator, rtol = ESTIMATORS["aid-cg"]
    problem = BilevelProblem(f, g, tasks=True)
    cold = hypergradient(problem, X, Y0, estimator=estimator, data=DATA)
    warm = hypergradient(problem, X, Y0, estimator=estimator, data=DATA, start=cold.start, chunk_size=2)
    assert distance(warm.grad, cold.grad) <= rtol
    assert warm.stats.linear_steps == 0


@pytest.mark.parametrize(("tasks", "chunk_size"), [(True, 0), (False, 2)])
def test_a_chunk_size_that_means_nothing_is_refused(tasks: bool, chunk_size: int) -> None:
    with pytest.raises(ValueError, match=r"`hypergradient\(chunk_size=...\)` must be at least 1"):
        hypergradient(BilevelProblem(f, g, tasks=tasks), X, Y0, data=DATA, chunk_size=chunk_size)


def test_every_task_has_a_status() -> None:
    """One task cannot be solved; the others stop where they would without it."""
    data = {"c": torch.tensor([1.0, -1.0, 2.0])}
    problem = BilevelProblem(
        lambda x, y, d: (x * y).sum(), lambda x, y, d: d["c"] * y.square().sum() / 2 - (x * y).sum(), tasks=True
    )
    x = torch.tensor([1.0, 2.0])
    estimate = hypergradient(problem, x, torch.zeros(2), estimator=AID(FIXED, CG()), data=data, throw=False)
    linear = estimate.reports[-1]
    assert [status.name for status in linear.statuses] == ["successful", "negative_curvature", "successful"]
    assert "1 of 3 tasks" in estimate.message
    assert estimate.v is not None
    assert torch.allclose(estimate.v[2], x / 2 / 3)


def test_errors_of_chunks_add_up_by_their_shares_of_the_tasks() -> None:
    """Two tasks and one: 2/3 and 1/3."""
    constants = Constants(mu=0.5, L_fyy=10.0, L_fxy=10.0, M_yy=1.0, M_xy=10.0)
    certified = AID(LBFGS(1e-9), CG(1e-9), target_error=1e-3, constants=constants)
    problem = BilevelProblem(f, g, tasks=True)
    for estimator in (ESTIMATORS["esj"][0], certified):
        whole = hypergradient(problem, X, Y0, estimator=estimator, data=DATA, chunk_size=2, throw=False)
        parts = []
        for rows in (slice(0, 2), slice(2, 3)):
            data = {key: table[rows] for key, table in DATA.items()}
            parts.append(hypergradient(problem, X, Y0, estimator=estimator, data=data, throw=False))
        for name in ("standard_error", "bound"):
            first, second = (getattr(part, name) for part in parts)
            if first is not None:
                assert getattr(whole, name) == pytest.approx(2 / 3 * first + 1 / 3 * second, rel=1e-9)
                assert first > 0


def test_no_tasks_are_refused() -> None:
    none = {key: table[:0] for key, table in DATA.items()}
    with pytest.raises(ValueError, match="needs `data=` of at least one task"):
        hypergradient(BilevelProblem(f, g, tasks=True), X, Y0, data=none)
