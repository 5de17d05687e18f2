"""Coordinate descent: minimizers by their optimality condition, supports that are stable, folds, derivatives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from bilevel import AID, BilevelProblem, FiniteDifference, hypergradient, solution_path
from bilevel._inner import Objective
from bilevel._numerics.pieces import Pieces
from bilevel._result import Status, Tally
from bilevel.inner_problems import Huber, LinearModel, LogLoss, Squared
from bilevel.inner_problems.linear_model import AbstractSampleLoss
from bilevel.inner_problems.separable import SeparableObjective
from bilevel.prox import L1, AbstractProxTerm, BoundedL1, Box, ElasticNet, GroupLasso, LInfBall, Nonnegative
from bilevel.solvers import CG, CoordinateDescent, ProximalGradient

DOUBLE = torch.float64
LOSSES: dict[str, AbstractSampleLoss] = {"squared": Squared(), "log": LogLoss(), "huber": Huber(0.7)}
TERMS: dict[str, AbstractProxTerm] = {
    "L1": L1(0.1),
    "L1-weights": L1(torch.linspace(0, 0.4, 12, dtype=DOUBLE)),
    "ElasticNet": ElasticNet(0.1, 0.3),
    "Box": Box(-0.2, torch.linspace(0, 0.5, 12, dtype=DOUBLE)),
    "Nonnegative": Nonnegative(),
    "LInfBall": LInfBall(0.3),
    "BoundedL1": BoundedL1(0.05, 0.2),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def model(loss: AbstractSampleLoss, n: int = 20, d: int = 12, seed: int = 0) -> LinearModel:
    X = normal(n, d, seed=seed)
    targets = X @ normal(d, seed=seed + 1) + normal(n, seed=seed + 2)
    return LinearModel(X, targets.sign() if isinstance(loss, LogLoss) else targets, loss)


def objective(g: LinearModel, term: AbstractProxTerm) -> Objective:
    y = g.X.new_zeros(g.X.shape[1])
    rows = term.pieces(y)
    assert rows is not None
    separable = SeparableObjective(g, g.sample_targets(), g.sample_weights(), rows, Tally())
    return Objective(lambda y: g(None, y), prox=term.prox, separable=separable)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("term", TERMS)
def test_a_solution_is_a_fixed_point_of_the_proximal_step(loss: str, term: str) -> None:
    g, h = model(LOSSES[loss]), TERMS[term]
    found = CoordinateDescent(1e-11).solve(objective(g, h), normal(12, seed=9))
    y = found.value.requires_grad_()
    (slope,) = torch.autograd.grad(g(None, y), y)
    assert found.status is Status.successful
    assert torch.allclose(h.prox(y.detach() - 0.7 * slope, 0.7), y.detach(), atol=1e-10, rtol=0)
    assert bool(torch.isfinite(h.value(y.detach())))


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 8),
    d=st.integers(1, 8),
    seed=st.integers(0, 1000),
    weight=st.sampled_from([0.0, 0.01, 0.3, 100.0]),
    twice=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_any_lasso_is_solved_whatever_the_columns(
    n: int, d: int, seed: int, weight: float, twice: bool, scale: float
) -> None:
    g = model(Squared(), n, d, seed)
    X = torch.cat([g.X, g.X, 0 * g.X], 1) if twice else g.X
    g = LinearModel(scale * X, g.targets)
    found = CoordinateDescent(1e-9 * scale).solve(objective(g, L1(weight)), X.new_zeros(X.shape[1]))
    slope = g.X.mT @ (g.X @ found.value - g.sample_targets()) / n
    left = Pieces.of(L1(weight).pieces(found.value)).subgradient(found.value, slope)  # type: ignore[arg-type]
    assert found.status is Status.successful
    assert float(left.norm()) <= 1e-9 * scale * (1 + 1e-3) + 1e-14 * scale


def test_a_start_within_the_tolerance_is_not_taken_before_its_support_is_stable() -> None:
    g = model(Squared())
    exact = CoordinateDescent(1e-12).solve(objective(g, L1(0.2)), normal(12))
    off = exact.value.clone()
    j = int((off == 0).nonzero()[0])
    off[j] = 1e-9  # a support of one entry more, at a residual of 1e-9 or so: no, it is off by twice the weight
    off[int((off != 0).nonzero()[0])] += 1e-9
    near = CoordinateDescent(1.0).solve(objective(g, L1(0.2)), off)
    assert torch.equal(near.value != 0, exact.value != 0)


def test_no_steps_are_taken_from_a_minimizer_and_zero_is_one_above_the_largest_penalty() -> None:
    g = model(Squared())
    top = float((g.X.mT @ g.sample_targets()).abs().max()) / 20
    zero = CoordinateDescent(1e-10).solve(objective(g, L1(1.001 * top)), g.X.new_zeros(12))
    below = CoordinateDescent(1e-10).solve(objective(g, L1(0.999 * top)), g.X.new_zeros(12))
    assert not bool(zero.value.any())
    assert int((below.value != 0).sum()) == 1


def test_too_few_rounds_and_negative_weights_are_reported() -> None:
    g = model(LogLoss())
    few = CoordinateDescent(1e-14, max_steps=1).solve(objective(g, L1(0.01)), g.X.new_zeros(12))
    assert few.status is Status.max_steps
    bad = CoordinateDescent().solve(objective(g, L1(-0.1)), g.X.new_zeros(12))
    assert bad.status is Status.nonfinite


FOLDS = torch.arange(4).unsqueeze(1) != torch.arange(20) % 4  # what each of four folds trains on


def test_folds_are_tasks_that_share_their_columns() -> None:
    whole = model(Squared())
    g = LinearModel(whole.X, whole.targets, weights=lambda data: data["train"])
    f = LinearModel(whole.X, whole.targets, weights=lambda data: data["held"])
    train = FOLDS / FOLDS.sum(1, keepdim=True).to(DOUBLE)
    held = ~FOLDS / (~FOLDS).sum(1, keepdim=True).to(DOUBLE)
    data, x = {"train": train, "held": held}, torch.tensor(-2.0, dtype=DOUBLE)
    problem = BilevelProblem(f, g, prox=lambda x, _: L1(x.exp()), tasks=True)
    est = hypergradient(problem, x, torch.zeros(12, dtype=DOUBLE), data=data)
    total, b = 0.0, whole.sample_targets()
    for k in range(4):
        one = LinearModel(whole.X[FOLDS[k]], b[FOLDS[k]])
        test = LinearModel(whole.X[~FOLDS[k]], b[~FOLDS[k]])
        alone = BilevelProblem(test, one, prox=lambda x: L1(x.exp()))
        single = hypergradient(alone, x, torch.zeros(12, dtype=DOUBLE))
        assert torch.allclose(single.y, est.y[k], atol=1e-9, rtol=0)
        total += float(single.grad) / 4
    assert float(est.grad) == pytest.approx(total, rel=1e-8)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("term", ["L1", "ElasticNet", "Box", "BoundedL1"])
def test_the_derivative_on_the_support_is_that_of_differences_and_of_other_solvers(loss: str, term: str) -> None:
    g, f = model(LOSSES[loss]), model(LOSSES[loss], seed=5)
    make = {
        "L1": lambda x: L1(x.exp()),
        "ElasticNet": lambda x: ElasticNet(x.exp(), 2 * x.exp()),
        "Box": lambda x: Box(-x.exp(), 2 * x.exp()),
        "BoundedL1": lambda x: BoundedL1(x.exp() / 4, x.exp()),
    }[term]
    problem = BilevelProblem(f, g, prox=make)
    x, y0 = torch.tensor(-2.1, dtype=DOUBLE), torch.zeros(12, dtype=DOUBLE)
    est = hypergradient(problem, x, y0, estimator=AID(CoordinateDescent(1e-11), CG(rtol=1e-12)))
    other = AID(ProximalGradient(tol=1e-11, max_steps=20000), CG(rtol=1e-12))
    assert torch.allclose(est.grad, hypergradient(problem, x, y0, estimator=other).grad, rtol=1e-8, atol=1e-10)
    differences = FiniteDifference(CoordinateDescent(1e-12), step=1e-5)
    assert torch.allclose(est.grad, hypergradient(problem, x, y0, estimator=differences).grad, rtol=1e-6, atol=1e-8)


def test_names_take_coordinate_descent_where_the_structure_is_declared_and_only_there() -> None:
    g = model(Squared())
    y0 = torch.zeros(12, dtype=DOUBLE)
    declared = BilevelProblem(lambda x, y: y.sum(), g, prox=lambda x: L1(x))
    plain = BilevelProblem(lambda x, y: y.sum(), lambda x, y: g(x, y), prox=lambda x: L1(x))
    x = torch.tensor(0.1, dtype=DOUBLE)
    fast, slow = hypergradient(declared, x, y0), hypergradient(plain, x, y0)
    assert fast.stats.gradients < slow.stats.gradients
    assert torch.allclose(fast.grad, slow.grad, rtol=1e-6)
    with pytest.raises(ValueError, match="LinearModel"):
        hypergradient(plain, x, y0, estimator=AID(CoordinateDescent(), CG()))
    groups = BilevelProblem(lambda x, y: y.sum(), g, prox=lambda x: GroupLasso(x, [[*range(6)], [*range(6, 12)]]))
    with pytest.raises(ValueError, match="pieces"):
        hypergradient(groups, x, y0, estimator=AID(CoordinateDescent(), CG()))


def test_a_path_is_the_solutions_one_by_one() -> None:
    g, f = model(Squared()), model(Squared(), seed=5)
    problem = BilevelProblem(f, g, prox=lambda x: L1(x.exp()))
    xs = [torch.tensor(t, dtype=DOUBLE) for t in (-0.5, -1.5, -3.0)]
    path = solution_path(problem, xs, torch.zeros(12, dtype=DOUBLE))
    for x, y, value in zip(path.x, path.y, path.values, strict=True):
        est = hypergradient(problem, x, torch.zeros(12, dtype=DOUBLE))
        assert torch.allclose(est.y, y, atol=1e-9, rtol=0)
        assert value == pytest.approx(est.value)
    assert path.values[path.best] == min(path.values)
    with pytest.raises(ValueError, match="at least one point"):
        solution_path(problem, [], torch.zeros(12, dtype=DOUBLE))
