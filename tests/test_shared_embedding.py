"""Shared embedding: linear features and a ridge head, on which all estimators must meet; then networks."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from bilevel_strategies import normal
from cases import distance
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from bilevel import AID, ESJ, ITD, AbstractEstimator, Estimate, FirstOrder, Penalty, Start, Status, hypergradient
from bilevel.few_shot.learner import Learner
from bilevel.problems.meta_learning.shared_embedding import shared_embedding
from bilevel.solvers.cg import CG
from bilevel.solvers.dense import Dense
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.heavy_ball import HeavyBall
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.neumann import Neumann

R, INPUTS, FEATURES, N, TASKS = 0.5, 4, 3, 6, 3


def half_mse(output: Tensor, target: Tensor) -> Tensor:
    return mse_loss(output, target) / 2


def regression_tasks() -> dict[str, Tensor]:
    names = ("support_x", "support_y", "query_x", "query_y")
    return {name: normal(TASKS, N, INPUTS if "x" in name else 1, seed=k + 1) for k, name in enumerate(names)}


def linear() -> Learner:
    torch.manual_seed(2)
    body, head = nn.Linear(INPUTS, FEATURES, bias=False), nn.Linear(FEATURES, 1, bias=False)
    return shared_embedding(body, head, half_mse, regularization=R)


def curvatures() -> tuple[float, float]:
    """The least and the largest eigenvalue of any task's inner Hessian."""
    W = linear().x0["weight"]
    F = regression_tasks()["support_x"] @ W.T
    eigenvalues = torch.linalg.eigvalsh(F.mT @ F / N) + R
    return float(eigenvalues.min()), float(eigenvalues.max())


def closed_form() -> tuple[Tensor, Tensor, Tensor]:
    """Phi's gradient by autograd through u* = (F'F / n + r)^-1 F't / n; that at constant u*; and u*."""
    W, tasks = linear().x0["weight"].clone().requires_grad_(), regression_tasks()
    F, G = tasks["support_x"] @ W.T, tasks["query_x"] @ W.T
    u = torch.linalg.solve(F.mT @ F / N + R * torch.eye(FEATURES), F.mT @ tasks["support_y"] / N)
    whole, direct = (
        torch.autograd.grad(half_mse(G @ head, tasks["query_y"]), W, retain_graph=True)[0] for head in (u, u.detach())
    )
    return whole, direct, u.detach()


def estimate(learner: Learner, tasks: dict[str, Tensor], **options: Any) -> Estimate:
    options = {"estimator": learner.estimator, **options}
    return hypergradient(learner.problem, options.pop("x", learner.x0), learner.y0, data=tasks, **options)


def descent(steps: int) -> Iterate:
    return Iterate(GradientDescent(1 / curvatures()[1]), steps)


ESTIMATORS: dict[str, tuple[AbstractEstimator, float]] = {
    "aid-cg": (AID(LBFGS(1e-12), CG(rtol=1e-12)), 1e-10),
    "aid-neumann": (AID(LBFGS(1e-12), Neumann(1 / curvatures()[1], 300)), 1e-10),
    "aid-descent": (AID(descent(300), CG(rtol=1e-12)), 1e-10),
    "itd": (ITD(descent(300)), 1e-10),
    "itd-momentum": (ITD(Iterate(HeavyBall(0.1, 0.9), 600)), 1e-6),
    "penalty": (Penalty(LBFGS(1e-12), weight=1e3, extrapolate=True), 1e-4),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_finds_the_closed_form(name: str) -> None:
    estimator, rtol = ESTIMATORS[name]
    found = estimate(linear(), regression_tasks(), estimator=estimator)
    whole, _, u = closed_form()
    assert distance(found.grad["weight"], whole) <= rtol
    assert torch.allclose(found.y["weight"].mT, u, rtol=0, atol=1e-8)


def test_the_default_finds_the_closed_form_to_its_tolerances() -> None:
    found = estimate(linear(), regression_tasks())
    assert found.status is Status.successful
    assert distance(found.grad["weight"], closed_form()[0]) <= 1e-3


def test_plain_penalty_is_first_order_in_one_over_its_weight() -> None:
    whole = closed_form()[0]
    errors = [
        distance(estimate(linear(), regression_tasks(), estimator=Penalty(LBFGS(1e-12), w)).grad["weight"], whole)
        for w in (1e4, 1e5)
    ]
    assert errors[1] <= 1e-4
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.05)


def test_the_mean_of_sampled_estimates_is_the_unrolled_gradient() -> None:
    inner = descent(60)
    learner, tasks = linear(), regression_tasks()
    exact = estimate(learner, tasks, estimator=ITD(inner)).grad["weight"]
    batches = torch.stack([
        estimate(learner, tasks, estimator=ESJ(inner, 100, 1e-4, "gaussian", seed=seed)).grad["weight"]
        for seed in range(40)
    ])  # fmt: skip
    error = batches.std(0) / len(batches) ** 0.5
    direct = closed_form()[1]
    assert bool(((batches.mean(0) - exact).abs() <= 4 * error).all())
    assert float((exact - direct).norm()) > 10 * float(error.norm())  # or it would tell nothing


def test_first_order_would_hold_the_head_constant_and_is_refused() -> None:
    whole, direct, _ = closed_form()
    assert distance(direct, whole) > 0.05
    with pytest.raises(ValueError, match="`FirstOrder` does not apply"):
        estimate(linear(), regression_tasks(), estimator=FirstOrder(LBFGS(1e-12)))


def test_error_of_unrolling_falls_by_the_contraction_of_a_step() -> None:
    mu, L = curvatures()
    whole = closed_form()[0]
    errors = [
        distance(estimate(linear(), regression_tasks(), estimator=ITD(descent(n))).grad["weight"], whole)
        for n in (60, 80)
    ]
    assert (errors[1] / errors[0]) ** (1 / 20) == pytest.approx(1 - mu / L, abs=0.02)


def test_calls_are_those_of_the_formulas() -> None:
    learner, tasks = linear(), regression_tasks()
    S, Q, directions = 7, 4, 5
    itd = estimate(learner, tasks, estimator=ITD(descent(S))).stats
    assert (itd.hvps, itd.cross_products) == ((S - 1) * TASKS, S * TASKS)  # the start is a constant
    cg = estimate(learner, tasks, estimator=AID(descent(S), CG(rtol=0.0, max_steps=2, recompute=False))).stats
    assert (cg.hvps, cg.gradients) == (2 * TASKS, (S + 1) * TASKS)
    neumann = estimate(learner, tasks, estimator=AID(descent(S), Neumann(0.1, Q))).stats
    assert neumann.hvps == (Q - 1 + 1) * TASKS  # from zero; and one for the residual
    esj = estimate(learner, tasks, estimator=ESJ(descent(S), directions)).stats
    assert (esj.hvps, esj.gradients) == (0, (directions + 1) * (S + 1) * TASKS)


# Networks


CLASSES, SHOTS = 3, 4


def classification_tasks(shots: int = SHOTS) -> dict[str, Tensor]:
    labels = torch.arange(CLASSES).repeat(shots).expand(TASKS, -1)
    return {
        "support_x": normal(TASKS, CLASSES * shots, INPUTS, seed=1), "support_y": labels,
        "query_x": normal(TASKS, CLASSES * shots, INPUTS, seed=2), "query_y": labels.flip(-1),
    }  # fmt: skip


def modules() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(INPUTS, 6), nn.Tanh()), nn.Linear(6, CLASSES)


def classifier(**options: Any) -> Learner:
    return shared_embedding(*modules(), cross_entropy, regularization=R, **options)


def test_hypergradient_of_a_network_is_that_of_finite_differences() -> None:
    learner = classifier(estimator=AID(LBFGS(1e-12), Dense()))
    tasks, step = classification_tasks(), 1e-5
    found = estimate(learner, tasks)
    direction = {name: normal(*leaf.shape, seed=7) for name, leaf in learner.x0.items()}
    up, down = (
        estimate(learner, tasks, x={k: v + s * step * direction[k] for k, v in learner.x0.items()}).value
        for s in (1, -1)
    )
    slope = sum(float((found.grad[name] * direction[name]).sum()) for name in direction)
    assert (up - down) / (2 * step) == pytest.approx(slope, rel=1e-7)


def test_features_are_computed_once_whatever_the_inner_steps() -> None:
    calls: list[None] = []

    class Counted(nn.Module):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.inner = modules()[0]

        def forward(self, x: Tensor) -> Tensor:
            calls.append(None)
            y: Tensor = self.inner(x)
            return y

    learner = shared_embedding(Counted(), modules()[1], cross_entropy, regularization=R)
    for estimator in (learner.estimator, ITD(Iterate(GradientDescent(0.1), 20))):
        first = estimate(learner, classification_tasks(), estimator=estimator)  # which looks at f and g besides
        calls.clear()
        later = Start(first.y, count=1)
        estimate(learner, classification_tasks(), estimator=estimator, start=later)
        assert len(calls) == 2  # support and query


def test_an_exact_head_does_not_depend_on_its_start() -> None:
    learner = classifier(inner=LBFGS(1e-12))
    learner = replace(learner, estimator=AID(LBFGS(1e-12), Dense()))
    other = replace(learner, y0={name: normal(*leaf.shape, seed=3) for name, leaf in learner.y0.items()})
    assert distance(estimate(learner, classification_tasks()).grad, estimate(other, classification_tasks()).grad) < 1e-9


def test_few_unrolled_steps_start_from_the_head_as_it_was_given() -> None:
    learner, tasks, step = classifier(), classification_tasks(), 0.2
    body, head = modules()
    task = {name: entry[:1] for name, entry in tasks.items()}
    found = estimate(learner, task, estimator=ITD(Iterate(GradientDescent(step), 1)))
    g = cross_entropy(head(body(task["support_x"][0])), task["support_y"][0])
    g = g + R / 2 * (head.weight.square().sum() + head.bias.square().sum())  # type: ignore[operator]
    weight, bias = torch.autograd.grad(g, list(head.parameters()), create_graph=True)
    w, b = (p - step * d for p, d in zip(head.parameters(), (weight, bias), strict=True))
    value = cross_entropy(body(task["query_x"][0]) @ w.T + b, task["query_y"][0])
    assert found.value == pytest.approx(float(value.detach()), rel=1e-13)
    by_hand = torch.autograd.grad(value, list(body.parameters()))
    for leaf, expected in zip(found.grad.values(), by_hand, strict=True):
        assert torch.allclose(leaf, expected, rtol=1e-11, atol=1e-14)


def test_batch_is_the_mean_of_a_loop() -> None:
    learner = replace(classifier(), estimator=AID(LBFGS(1e-12), CG(rtol=1e-12)))
    tasks = classification_tasks()
    batch = estimate(learner, tasks)
    singles = [estimate(learner, {name: entry[k : k + 1] for name, entry in tasks.items()}) for k in range(TASKS)]
    for name, leaf in batch.grad.items():
        assert torch.allclose(leaf, torch.stack([s.grad[name] for s in singles]).mean(0), rtol=1e-9, atol=1e-11)


def test_padded_samples_do_not_count() -> None:
    learner = replace(classifier(), estimator=AID(LBFGS(1e-12), Dense()))
    tasks = classification_tasks(SHOTS + 1)
    mask = torch.cat([torch.ones(CLASSES * SHOTS), torch.zeros(CLASSES)]).expand(TASKS, -1)
    padded = estimate(learner, {**tasks, "support_mask": mask, "query_mask": mask})
    short = estimate(learner, {name: entry[:, : CLASSES * SHOTS] for name, entry in tasks.items()})
    assert padded.value == pytest.approx(short.value, rel=1e-12)
    assert distance(padded.grad, short.grad) <= 1e-9


def test_the_default_is_reliable_in_single_precision() -> None:
    torch.manual_seed(5)
    body, head = nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU()), nn.Linear(64, CLASSES)
    tasks = classification_tasks()
    exact = shared_embedding(body, head, cross_entropy, estimator=AID(LBFGS(1e-11), Dense()))
    single = shared_embedding(copy.deepcopy(body).float(), copy.deepcopy(head).float(), cross_entropy)
    for scale in (0.1, 1.0, 10.0):
        scaled = {name: scale * entry if name.endswith("_x") else entry for name, entry in tasks.items()}
        found = estimate(
            single, {name: entry.float() if entry.is_floating_point() else entry for name, entry in scaled.items()}
        )
        assert found.status is Status.successful
        assert distance(found.grad, estimate(exact, scaled).grad) <= 2e-2


def test_predictions_are_what_the_outer_objective_judges_and_the_body_is_exported() -> None:
    learner, tasks = classifier(), classification_tasks()
    task = {name: entry[0] for name, entry in tasks.items()}
    found = estimate(learner, {name: entry[:1] for name, entry in tasks.items()})
    predicted = learner.predict(learner.x0, {name: leaf[0] for name, leaf in found.y.items()}, task)
    picked = predicted[torch.arange(len(predicted)), task["query_y"]]
    assert float(-picked.mean()) == pytest.approx(found.value, rel=1e-12)
    exported = learner.export(learner.x0).state_dict()
    body = modules()[0].state_dict()
    assert exported.keys() == body.keys()
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(exported.values(), body.values()))


def test_a_negative_regularization_is_refused() -> None:
    with pytest.raises(ValueError, match="regularization"):
        shared_embedding(*modules(), cross_entropy, regularization=-1.0)
