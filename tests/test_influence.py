"""Influence of training samples: against retraining without them, dense solves and hypergradients in weights."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from bilevel import (
    AID,
    AbstractPreconditioner,
    BilevelError,
    BilevelProblem,
    FiniteDifferences,
    Influence,
    functional,
    hypergradient,
    influence,
)
from bilevel._inner import Objective
from bilevel._result import Status
from bilevel._tree import ravel
from bilevel.attribution import KFAC
from bilevel.solvers import CG, LBFGS, MINRES, ClosedForm, Dense

L2 = 0.02


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logistic(y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    return binary_cross_entropy_with_logits(inputs @ y, labels, reduction="none")


def trained(data: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
    """argmin (1/n) sum_i w_i loss_i(y) + L2/2 |y|^2 by Newton's method, the weights `(..., n)`."""
    inputs, labels = data
    y = inputs.new_zeros(*weights.shape[:-1], inputs.shape[1])
    for _ in range(12):
        p = (y @ inputs.T).sigmoid()
        gradient = (weights * (p - labels)) @ inputs / len(inputs) + L2 * y
        curvature = torch.einsum("...n,ni,nj->...ij", weights * p * (1 - p), inputs, inputs) / len(inputs)
        y = y - torch.linalg.solve(curvature + L2 * torch.eye(inputs.shape[1]).double(), gradient)
    return y


@functools.cache
def classification() -> tuple[Any, Any, Tensor]:
    """Train and test sets, some labels wrong, and the minimizer."""
    truth = normal(5, seed=0)
    inputs, others = normal(60, 5, seed=1), normal(30, 5, seed=2)
    labels, targets = ((x @ truth + normal(len(x), seed=3) > 0).double() for x in (inputs, others))
    labels[::9] = 1 - labels[::9]
    return (inputs, labels), (others, targets), trained((inputs, labels), torch.ones(60).double())


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort().double(), b.argsort().argsort().double()])
    return float(torch.corrcoef(ranks)[0, 1])


def test_scores_of_logistic_regression_are_those_of_retraining_without_each_sample() -> None:
    train, test, y = classification()
    n = len(train[0])
    without = trained(train, torch.ones(n, n).double() - torch.eye(n).double())
    targets = test[1].expand(n, -1)
    losses = binary_cross_entropy_with_logits(without @ test[0].T, targets, reduction="none").mean(-1)
    found = influence(logistic, y, train, test, l2=L2, solver=CG(rtol=1e-10))
    retrained = losses - logistic(y, test).mean()
    assert spearman(found.scores, retrained) >= 0.99
    assert float((found.scores - retrained).norm() / retrained.norm()) <= 0.2  # of the order of the leverages, 5 / 60
    assert found.value == pytest.approx(float(logistic(y, test).mean()))
    assert found.stationarity <= 1e-10


def test_scores_are_minus_the_hypergradient_in_the_weights() -> None:
    train, test, y = classification()
    problem = BilevelProblem(
        lambda w, y: logistic(y, test).mean(),
        lambda w, y: (w * logistic(y, train)).mean() + L2 / 2 * y.square().sum(),
    )
    aid = AID(ClosedForm(lambda w: trained(train, w)), Dense())
    ones = torch.ones(len(train[0])).double()
    expected = hypergradient(problem, ones, y, estimator=aid).grad
    found = influence(logistic, y, train, test, l2=L2, solver=Dense())
    torch.testing.assert_close(found.scores, -expected, rtol=1e-9, atol=1e-12)


# A network


@functools.cache
def network() -> tuple[Any, Any, Any, Any]:
    """A small network that is trained a little, its training and its test set."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    net = functional(module)
    train = normal(24, 3, seed=4), torch.arange(24) % 3
    test = normal(7, 3, seed=5), torch.arange(7) % 3
    vector, structure = ravel(dict(net.params))

    def g(y: Tensor) -> Tensor:
        return of_network(structure.unravel(y), train).mean() + L2 / 2 * y.square().sum()

    solved = LBFGS(tol=1e-8).solve(Objective(g), vector.detach())
    return net, structure.unravel(solved.value), train, test


def of_network(params: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    x = (batch[0] @ params["0.weight"].T + params["0.bias"]).tanh()
    return cross_entropy(x @ params["2.weight"].T + params["2.bias"], batch[1], reduction="none")


@functools.cache
def dense(damping: float) -> Tensor:
    """The scores for each test sample `(m, n)`, by a dense system."""
    _, params, train, test = network()
    y, structure = ravel(params)

    def losses(y: Tensor) -> Tensor:
        return of_network(structure.unravel(y), train)

    derivatives: Any = torch.autograd.functional
    hessian = derivatives.hessian(lambda y: losses(y).mean() + L2 / 2 * y.square().sum(), y)
    slopes = derivatives.jacobian(losses, y)
    sides = derivatives.jacobian(lambda y: of_network(structure.unravel(y), test), y)
    system = hessian + damping * torch.eye(len(y)).double()
    scores: Tensor = (slopes @ torch.linalg.solve(system, sides.T)).T / len(train[0])
    return scores


@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_scores_of_a_network_are_those_of_a_dense_damped_solve(damping: float) -> None:
    _, params, train, test = network()
    expected = dense(damping)
    solver = MINRES(rtol=1e-10)
    found = influence(of_network, params, train, test, l2=L2, damping=damping, solver=solver)
    assert float((found.scores - expected.mean(0)).norm() / expected.mean(0).norm()) <= 1e-6
    each = influence(of_network, params, train, test, l2=L2, damping=damping, solver=solver, per_test=True, block=3)
    assert each.scores.shape == each.errors.shape == (7, 24)
    assert float((each.scores - expected).norm() / expected.norm()) <= 1e-6
    order = each.most_harmful(2)
    assert order.shape == (7, 2) and torch.equal(order[:, 0], expected.argmin(1))


def test_batches_of_either_set_give_the_scores_of_the_whole() -> None:
    _, params, train, test = network()
    whole = influence(of_network, params, train, test, l2=L2, damping=0.05)
    for batches in (
        DataLoader(TensorDataset(*train), batch_size=10),
        [tuple(leaf[k : k + 7] for leaf in train) for k in range(0, 24, 7)],
    ):
        tests = DataLoader(TensorDataset(*test), batch_size=3)
        found = influence(of_network, params, batches, tests, l2=L2, damping=0.05)
        torch.testing.assert_close(found.scores, whole.scores, rtol=1e-5, atol=1e-9)
        assert found.value == pytest.approx(whole.value)
        assert found.stationarity == pytest.approx(whole.stationarity, rel=2)
    rows = [influence(of_network, params, train, [test], l2=L2, damping=0.05, per_test=True, block=b) for b in (1, 99)]
    torch.testing.assert_close(rows[0].scores, rows[1].scores, rtol=1e-5, atol=1e-9)


def test_products_of_differences_give_nearly_the_same_scores() -> None:
    _, params, train, test = network()
    found = influence(of_network, params, train, test, l2=L2, damping=0.05, products=FiniteDifferences())
    expected = dense(0.05).mean(0)
    assert float((found.scores - expected).norm() / expected.norm()) <= 1e-5


# What is known of them


def test_errors_are_those_of_the_linear_system_and_the_bound_holds() -> None:
    train, test, y = classification()
    exact = influence(logistic, y, train, test, l2=L2, solver=Dense()).scores
    for rtol in (0.3, 1e-2):  # of five unknowns there is nothing left after five steps
        found = influence(logistic, y, train, test, l2=L2, solver=CG(rtol=rtol), certify=True)
        off = (found.scores - exact).abs()
        assert float((found.errors - off).norm()) <= 0.2 * float(off.norm())
        assert found.bound is not None and bool((off <= found.bound).all())
        assert float(found.bound.max()) <= 100 * float(off.max())
    known = influence(logistic, y, train, test, l2=L2, certify=True, mu=2 * L2)
    usual = influence(logistic, y, train, test, l2=L2, certify=True)
    assert known.bound is not None and usual.bound is not None
    torch.testing.assert_close(2 * known.bound, usual.bound)
    assert influence(logistic, y, train, test, l2=L2).bound is None
    every = influence(logistic, y, train, test, l2=L2, certify=True, per_test=True)
    assert every.bound is not None and every.bound.shape == (30, 60)


def test_parameters_that_are_no_minimizer_are_refused_and_those_of_a_looser_tolerance_are_not() -> None:
    train, test, y = classification()
    with pytest.raises(BilevelError, match="no minimizer of the training objective") as raised:
        influence(logistic, y + 1.0, train, test, l2=L2)
    assert raised.value.status is Status.not_stationary
    partial = raised.value.partial
    assert isinstance(partial, Influence) and partial.scores.shape == (60,) and partial.stationarity > 0.1
    assert influence(logistic, y + 1.0, train, test, l2=L2, tol=100.0).status is Status.successful
    assert influence(logistic, y + 1e-3, train, test, l2=L2).status is Status.successful
    # Of another l2 than the parameters were trained with.
    assert influence(logistic, y, train, test, l2=20 * L2, throw=False).status is Status.not_stationary


def test_an_indefinite_hessian_and_an_unmet_tolerance_are_statuses() -> None:
    ones = torch.ones(2).double()
    found = influence(
        lambda y, b: (y[0] ** 2 - y[1] ** 2) * b + y.sum() * (b - 1), 0 * ones, ones, 0 * ones[:1], throw=False
    )
    assert found.status is Status.negative_curvature
    train, test, y = classification()
    short = influence(logistic, y, train, test, l2=L2, solver=CG(rtol=1e-8, max_steps=2), throw=False)
    assert short.status is Status.max_steps and short.stats.linear_steps == 2


def test_losses_that_change_from_pass_to_pass_are_reported() -> None:
    train, test, y = classification()
    shuffled = DataLoader(TensorDataset(*train), batch_size=20, shuffle=True)
    found = influence(logistic, y, shuffled, test, l2=L2, throw=False)
    assert found.status is Status.not_repeatable
    assert "a loader that shuffles" in found.message
    assert influence(logistic, y, DataLoader(TensorDataset(*train), batch_size=20), test, l2=L2).status.ok


def test_arguments_that_mean_nothing_are_refused() -> None:
    train, test, y = classification()
    with pytest.raises(ValueError, match=r"must return one loss for each sample of the batch, shape \(n,\)"):
        influence(lambda y, batch: logistic(y, batch).mean(), y, train, test)
    for given in ({"train": iter([train])}, {"test": 3}):
        with pytest.raises(TypeError, match="batches that can be passed over"):
            influence(logistic, y, **{"train": train, "test": test, **given})
    for name in ("train", "test"):
        for per_test in (False, True):
            with pytest.raises(ValueError, match=f"`influence\\({name}=...\\)` must hold at least one sample"):
                influence(logistic, y, **{"train": train, "test": test, name: []}, l2=L2, per_test=per_test)
    with pytest.raises(ValueError, match="needs a lower bound on the eigenvalues"):
        influence(logistic, y, train, test, certify=True)
    with pytest.raises(ValueError, match="at least 0"):
        influence(logistic, y, train, test, damping=-0.1)


def test_removing_a_sample_of_a_mean_moves_it_as_the_example_says() -> None:
    """Of squared distances y is the mean: without sample i, with n fixed, y moves by (y - t_i) / (n - 1)."""
    train, test = torch.tensor([0.0, 1.0, 5.0]).double(), torch.tensor([0.5]).double()
    found = influence(lambda y, b: (y - b).square() / 2, train.mean(), train, test)
    torch.testing.assert_close(found.scores, (2.0 - train) * 1.5 / 3)


# Curvature of curvlinops


def test_kfac_is_a_preconditioner_that_leaves_the_scores() -> None:
    pytest.importorskip("curvlinops")
    net, params, train, test = network()
    given: dict[str, Any] = {"l2": L2, "damping": 0.05}
    kfac = KFAC(net.load(params), nn.CrossEntropyLoss(), [train], damping=L2 + 0.05)
    for per_test in (False, True):
        plain = influence(of_network, params, train, test, **given, solver=CG(rtol=1e-9), per_test=per_test)
        solver = CG(rtol=1e-9, preconditioner=kfac)
        found = influence(of_network, params, train, test, **given, solver=solver, per_test=per_test)
        torch.testing.assert_close(found.scores, plain.scores, rtol=1e-6, atol=1e-9)
    linear = KFAC(nn.Linear(3, 3).double(), nn.CrossEntropyLoss(), [train], damping=0.1)
    with pytest.raises(ValueError, match=r"must have the parameters of the system, 31 of them\. Got 12"):
        influence(of_network, params, train, test, l2=L2, solver=CG(preconditioner=linear))


def test_kfac_saves_two_steps_of_three_where_curvature_is_a_kronecker_product() -> None:
    """Of one linear layer with equal probabilities, up to what couples weights and bias."""
    pytest.importorskip("curvlinops")
    net = functional(nn.Linear(6, 3).double())
    params = {name: torch.zeros_like(p) for name, p in net.params.items()}
    train = normal(40, 6, seed=1) * torch.logspace(-1, 1, 6).double(), torch.arange(40) % 3

    def loss(params: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(net(params, batch[0]), batch[1], reduction="none")

    def steps(preconditioner: AbstractPreconditioner | None) -> int:
        solver = CG(rtol=1e-8, preconditioner=preconditioner)
        return influence(loss, params, train, train, damping=1e-3, solver=solver, tol=1e9).stats.linear_steps

    kfac = KFAC(net.load(params), nn.CrossEntropyLoss(), [train], damping=1e-3)
    assert 3 * steps(kfac) <= steps(None)


def test_kfac_says_which_extra_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "curvlinops", None)
    _, params, train, test = network()
    kfac = KFAC(nn.Linear(3, 3), nn.CrossEntropyLoss(), [train], damping=0.1)
    with pytest.raises(ImportError, match=r"bilevel\[curvature\]"):
        influence(of_network, params, train, test, l2=L2, solver=CG(preconditioner=kfac))


def test_planted_wrong_labels_have_the_lowest_scores() -> None:
    train, test, y = classification()
    scores = influence(logistic, y, train, test, l2=L2).scores
    wrong = torch.zeros(60, dtype=torch.bool)
    wrong[::9] = True
    auc = (scores[wrong].unsqueeze(1) < scores[~wrong]).double().mean()
    assert float(auc) >= 0.8
