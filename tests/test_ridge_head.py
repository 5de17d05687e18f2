"""The ridge head: dual and primal solutions, and the hypergradient that autograd finds through either."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from bilevel_strategies import normal
from cases import distance
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from bilevel import AID, Estimate, hypergradient
from bilevel._tree import Tree, tree_map
from bilevel.few_shot.learner import Learner
from bilevel.problems.meta_learning.ridge_head import ridge_head
from bilevel.solvers.cg import CG
from bilevel.solvers.dense import Dense

CLASSES, SHOTS = 3, 4


def network(features: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, features))


def tasks(count: int = 3, shots: int = SHOTS, regression: bool = False) -> dict[str, Tensor]:
    n = CLASSES * shots
    labels = torch.arange(CLASSES).repeat(shots).expand(count, -1)
    targets = (labels, labels.flip(-1))
    if regression:
        targets = (normal(count, n, 2, seed=3), normal(count, n, 2, seed=4))
    return {
        "support_x": normal(count, n, 2, seed=1), "support_y": targets[0],
        "query_x": normal(count, n, 2, seed=2), "query_y": targets[1],
    }  # fmt: skip


def estimate(learner: Learner, batch: dict[str, Tensor], **options: Any) -> Estimate:
    options = {"estimator": learner.estimator, **options}
    return hypergradient(learner.problem, options.pop("x", learner.x0), learner.y0, data=batch, **options)


def by_autograd(learner: Learner, x: Tree, batch: dict[str, Tensor], dual: bool, loss: Any = cross_entropy) -> Any:
    """The gradient through one formula or the other, one task after the other; and the heads."""
    x = tree_map(lambda leaf: leaf.clone().requires_grad_(), x)
    net, losses, heads = learner.export(learner.x0), [], []
    for k in range(len(batch["support_y"])):
        F, G = (torch.func.functional_call(net, x["body"], batch[f"{side}_x"][k]) for side in ("support", "query"))
        T = batch["support_y"][k]
        T = T if T.is_floating_point() else one_hot(T, CLASSES).to(F)
        lambda_ = x["log_regularization"].exp()
        if dual:
            W = F.T @ torch.linalg.inv(F @ F.T + lambda_ * torch.eye(len(F))) @ T
        else:
            W = torch.linalg.inv(F.T @ F + lambda_ * torch.eye(F.shape[1])) @ F.T @ T
        losses.append(loss(x["scale"] * (G @ W) + x["bias"], batch["query_y"][k]))
        heads.append(W.detach())
    value = torch.stack(losses).mean()
    leaves = [*x["body"].values(), x["bias"], x["log_regularization"], x["scale"]]
    found = torch.autograd.grad(value, leaves, materialize_grads=True, allow_unused=True)
    body = dict(zip(x["body"], found[:-3], strict=True))
    grad = {"body": body, "bias": found[-3], "log_regularization": found[-2], "scale": found[-1]}
    return value.detach(), grad, torch.stack(heads)


def moved(learner: Learner) -> Tree:
    return {**learner.x0, "scale": torch.tensor(2.5), "bias": torch.tensor(0.3)}


@pytest.mark.parametrize("features", [5, 12, 30])  # fewer, as many and more than the 12 support samples
@pytest.mark.parametrize("dual", [False, True])
def test_either_solution_and_the_gradient_through_it(features: int, dual: bool) -> None:
    learner = ridge_head(network(features), features, CLASSES, regularization=0.7, learn_regularization=True)
    x, estimator = moved(learner), AID(learner.adapt, CG(rtol=1e-13))
    found = estimate(learner, tasks(), x=x, estimator=estimator)
    value, grad, heads = by_autograd(learner, x, tasks(), dual)
    assert found.value == pytest.approx(float(value), rel=1e-12)
    assert torch.allclose(found.y, heads, rtol=0, atol=1e-12)
    for name in ("log_regularization", "scale"):
        assert distance(found.grad[name], grad[name]) <= 1e-10
    assert distance(found.grad["body"], grad["body"]) <= 1e-10
    assert abs(float(found.grad["bias"])) <= 1e-12  # a softmax does not see it


@pytest.mark.parametrize(("features", "size"), [(5, 5), (12, 12), (30, 12)])
def test_the_smaller_system_is_solved(features: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, solve = [], torch.linalg.solve

    def recorded(matrix: Tensor, right: Tensor) -> Tensor:
        shapes.append(tuple(matrix.shape))
        found: Tensor = solve(matrix, right)
        return found

    monkeypatch.setattr(torch.linalg, "solve", recorded)
    estimate(ridge_head(network(features), features, CLASSES), tasks())
    assert shapes == [(size, size)]


def test_inner_objective_is_half_of_the_squares_and_the_penalty() -> None:
    learner = ridge_head(network(5), 5, CLASSES, regularization=0.7)
    task, y = {name: entry[0] for name, entry in tasks(1).items()}, normal(5, CLASSES, seed=3)
    F = network(5)(task["support_x"]).detach()
    expected = ((F @ y - one_hot(task["support_y"], CLASSES)).square().sum() + 0.7 * y.square().sum()) / 2
    assert learner.problem.encode is not None
    z = learner.problem.encode(learner.x0, task)
    assert torch.allclose(learner.problem.g(z, y, task), expected, rtol=1e-13)


@pytest.mark.parametrize("features", [5, 30])
def test_regression(features: int) -> None:
    learner = ridge_head(network(features), features, 2, mse_loss, regularization=0.7, learn_regularization=True)
    batch, x = tasks(regression=True), moved(learner)
    found = estimate(learner, batch, x=x, estimator=AID(learner.adapt, Dense()))
    value, grad, _ = by_autograd(learner, x, batch, True, mse_loss)
    assert found.value == pytest.approx(float(value), rel=1e-12)
    for name in ("bias", "log_regularization", "scale", "body"):
        assert distance(found.grad[name], grad[name]) <= 1e-10


def test_regression_on_one_column_without_its_axis() -> None:
    batch = tasks(regression=True)
    batch = {name: entry[..., 0] if name.endswith("_y") else entry for name, entry in batch.items()}
    column = {name: entry.unsqueeze(-1) if name.endswith("_y") else entry for name, entry in batch.items()}
    learner = ridge_head(network(5), 5, 1, mse_loss)
    assert distance(estimate(learner, batch).grad, estimate(learner, column).grad) <= 1e-14


def test_conjugate_gradients_need_one_step_more_than_there_are_samples() -> None:
    learner = ridge_head(network(30), 30, CLASSES, regularization=0.5)
    batch = tasks(shots=1)
    exact = estimate(learner, batch, estimator=AID(learner.adapt, Dense()))
    found = estimate(learner, batch, estimator=AID(learner.adapt, CG(rtol=0.0, max_steps=CLASSES + 1)))
    assert distance(found.grad, exact.grad) <= 1e-10


def test_the_default_estimator_is_accurate_in_single_precision() -> None:
    learner = ridge_head(network(30), 30, CLASSES)
    exact = estimate(learner, tasks(), estimator=AID(learner.adapt, Dense()))
    single = ridge_head(network(30).float(), 30, CLASSES)
    batch = {name: entry.float() if entry.is_floating_point() else entry for name, entry in tasks().items()}
    found = estimate(single, batch)
    assert found.status.ok
    assert distance(found.grad, exact.grad) <= 1e-4


def test_labels_that_are_no_integers_are_refused() -> None:
    """As many samples as classes: they would be taken as one row of numbers, the same for every sample."""
    learner = ridge_head(nn.Linear(1, 4), 4, 3)
    batch = {"support_x": torch.ones(2, 3, 1), "support_y": torch.arange(3.0).expand(2, -1)}
    batch |= {"query_x": torch.ones(2, 3, 1), "query_y": torch.zeros(2, 3).long()}
    with pytest.raises(ValueError, match=r"needs support_y of \(n, 3\) numbers, or of \(n,\) integers"):
        hypergradient(learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=batch)


@pytest.mark.parametrize("features", [5, 30])
def test_padded_samples_do_not_count(features: int) -> None:
    batch = tasks(shots=SHOTS + 1)
    mask = torch.cat([torch.ones(CLASSES * SHOTS), torch.zeros(CLASSES)]).expand(3, -1)
    learner = ridge_head(network(features), features, CLASSES, learn_regularization=True)
    learner = replace(learner, estimator=AID(learner.adapt, Dense()))
    found = estimate(learner, {**batch, "support_mask": mask, "query_mask": mask})
    short = estimate(learner, {name: entry[:, : CLASSES * SHOTS] for name, entry in batch.items()})
    assert found.reports[0].residual <= 1e-13
    assert torch.allclose(found.y, short.y, rtol=0, atol=1e-12)
    assert found.value == pytest.approx(short.value, rel=1e-13)
    for name in ("body", "log_regularization", "scale"):
        assert distance(found.grad[name], short.grad[name]) <= 1e-11


def test_batch_is_the_mean_of_a_loop() -> None:
    learner = ridge_head(network(30), 30, CLASSES, learn_regularization=True)
    learner = replace(learner, estimator=AID(learner.adapt, CG(rtol=1e-12)))
    batch = estimate(learner, tasks())
    singles = [estimate(learner, {name: entry[k : k + 1] for name, entry in tasks().items()}) for k in range(3)]
    for name in ("scale", "log_regularization"):
        assert distance(batch.grad[name], torch.stack([s.grad[name] for s in singles]).mean(0)) <= 1e-10
    for name, leaf in batch.grad["body"].items():
        assert distance(leaf, torch.stack([s.grad["body"][name] for s in singles]).mean(0)) <= 1e-10


def test_what_is_not_learned_is_not_in_x_and_is_constant() -> None:
    learned = ridge_head(network(5), 5, CLASSES, regularization=3.0, learn_regularization=True, scale=2.0)
    fixed = ridge_head(network(5), 5, CLASSES, regularization=3.0, scale=2.0, calibrate=False)
    assert set(fixed.x0) == {"body"}
    assert float(learned.x0["log_regularization"]) == pytest.approx(math.log(3.0), rel=1e-15)
    a, b = estimate(learned, tasks()), estimate(fixed, tasks())
    assert a.value == pytest.approx(b.value, rel=1e-14)
    assert distance(a.grad["body"], b.grad["body"]) <= 1e-12


def test_predictions_are_what_the_outer_objective_judges() -> None:
    learner = ridge_head(network(5), 5, CLASSES)
    x = moved(learner)
    found = estimate(learner, tasks(1), x=x)
    task = {name: entry[0] for name, entry in tasks(1).items()}
    predicted = learner.predict(x, found.y[0], task)
    picked = predicted[torch.arange(len(predicted)), task["query_y"]]
    assert float(-picked.mean()) == pytest.approx(found.value, rel=1e-13)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [((0, 3), {}), ((5, 0), {}), ((5, 3), {"regularization": 0.0}), ((5, 3), {"scale": -1.0})],
)
def test_what_makes_no_sense_is_refused(arguments: tuple[int, int], options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        ridge_head(network(5), *arguments, **options)  # type: ignore[arg-type]
