"""Prototypical networks as a bilevel problem: every route to the same gradient, without tolerance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from bilevel_strategies import normal
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bilevel import AID, ITD, Estimate, Status, hypergradient
from bilevel.few_shot.learner import Learner
from bilevel.problems.meta_learning.proto_net import proto_net
from bilevel.solvers.cg import CG
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate

CLASSES, SHOTS, FEATURES = 3, 4, 5


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, FEATURES))


def tasks(count: int = 3, shots: int = SHOTS) -> dict[str, Tensor]:
    labels = torch.arange(CLASSES).repeat(shots).expand(count, -1)
    return {
        "support_x": normal(count, CLASSES * shots, 2, seed=1), "support_y": labels,
        "query_x": normal(count, CLASSES * shots, 2, seed=2), "query_y": labels.flip(-1),
    }  # fmt: skip


def estimate(learner: Learner, batch: dict[str, Tensor], **options: Any) -> Estimate:
    options = {"estimator": learner.estimator, **options}
    return hypergradient(learner.problem, learner.x0, options.pop("y0", learner.y0), data=batch, **options)


def by_autograd(batch: dict[str, Tensor], scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Written as one would without any of this: means of a class one after the other, distances, cross-entropy."""
    net = network()
    losses = []
    for sx, sy, qx, qy in zip(*(batch[k] for k in ("support_x", "support_y", "query_x", "query_y")), strict=True):
        means = torch.stack([net(sx[sy == k]).mean(0) for k in range(CLASSES)])
        away = torch.stack([(net(qx) - mean).square().sum(-1) for mean in means], -1)
        losses.append(cross_entropy(-scale * away, qy))
    value = torch.stack(losses).mean()
    return value.detach(), dict(
        zip(dict(net.named_parameters()), torch.autograd.grad(value, list(net.parameters())), strict=True)
    )


def assert_same(found: Estimate, value: Tensor, grad: dict[str, Tensor], atol: float = 1e-13) -> None:
    assert found.value == pytest.approx(float(value), rel=1e-13)
    for name, leaf in grad.items():
        assert torch.allclose(found.grad[name], leaf, rtol=1e-10, atol=atol)


def test_one_step_of_conjugate_gradients_is_exact_and_equals_autograd() -> None:
    found = estimate(proto_net(network(), FEATURES, CLASSES), tasks())
    assert_same(found, *by_autograd(tasks()))
    assert found.status is Status.successful
    assert found.stats.linear_steps == 1
    assert found.reports[1].residual <= 1e-15
    learner = proto_net(network(), FEATURES, CLASSES)
    forced = replace(learner, estimator=AID(learner.adapt, CG(rtol=0.0, max_steps=1, recompute=False)))
    assert_same(estimate(forced, tasks()), *by_autograd(tasks()))


def test_one_gradient_step_of_length_one_over_shots_is_exact_from_any_start() -> None:
    learner = proto_net(network(), FEATURES, CLASSES)
    descent = Iterate(GradientDescent(1 / SHOTS), max_steps=1)
    reference = estimate(learner, tasks())
    for y0 in (learner.y0, normal(CLASSES, FEATURES, seed=5)):
        for estimator in (AID(descent, CG(rtol=1e-12)), ITD(descent)):
            found = estimate(learner, tasks(), estimator=estimator, y0=y0)
            assert torch.allclose(found.y, reference.y, rtol=0, atol=1e-14)
            assert_same(found, *by_autograd(tasks()))


def test_prototypes_are_stationary() -> None:
    found = estimate(proto_net(network(), FEATURES, CLASSES), tasks())
    assert found.reports[0].residual <= 1e-13


def test_distances_are_divided_by_the_number_of_features_where_asked() -> None:
    found = estimate(proto_net(network(), FEATURES, CLASSES, normalize=True), tasks())
    assert_same(found, *by_autograd(tasks(), 1 / FEATURES))


def test_unequal_classes_take_as_many_steps_as_their_sizes_differ() -> None:
    batch = tasks()
    batch["support_y"] = torch.tensor([0, 1, 2, 2, 2, 2, 1, 2, 2, 2, 1, 2]).expand(3, -1)  # sizes 1, 3, 8
    found = estimate(proto_net(network(), FEATURES, CLASSES), batch)
    assert_same(found, *by_autograd(batch), atol=1e-11)
    assert found.stats.linear_steps == 3


def test_padded_samples_do_not_count() -> None:
    batch = tasks(shots=SHOTS + 1)
    mask = torch.cat([torch.ones(CLASSES * SHOTS), torch.zeros(CLASSES)]).expand(3, -1)
    learner = proto_net(network(), FEATURES, CLASSES)
    found = estimate(learner, {**batch, "support_mask": mask, "query_mask": mask})
    short = {name: entry[:, : CLASSES * SHOTS] for name, entry in batch.items()}
    reference = estimate(learner, short)
    assert found.stats.linear_steps == 1
    assert torch.allclose(found.y, reference.y, rtol=0, atol=1e-14)
    assert_same(found, torch.tensor(reference.value), reference.grad)


def test_batch_is_the_mean_of_a_loop() -> None:
    learner = proto_net(network(), FEATURES, CLASSES)
    batch = estimate(learner, tasks())
    singles = [estimate(learner, {name: entry[k : k + 1] for name, entry in tasks().items()}) for k in range(3)]
    for name, leaf in batch.grad.items():
        assert torch.allclose(leaf, torch.stack([s.grad[name] for s in singles]).mean(0), rtol=1e-12, atol=1e-15)


def test_a_class_without_support_samples_is_named() -> None:
    batch = tasks()
    batch["support_y"] = batch["support_y"].clamp(max=CLASSES - 2)
    learner = proto_net(network(), FEATURES, CLASSES)
    for each, which in ((learner, "Task 0 of the batch"), (learner.looped(), "A task")):
        with pytest.raises(ValueError, match=rf"every class in every task.* {which} has none of class {CLASSES - 1}"):
            estimate(each, batch)
    whole = tasks()
    other = {**whole, "support_y": torch.cat([whole["support_y"][:2], batch["support_y"][2:]])}
    with pytest.raises(ValueError, match="Task 2 of the batch"):
        estimate(learner, other)
    mask = torch.ones(whole["support_y"].shape).masked_fill(whole["support_y"] == 1, 0.0)
    with pytest.raises(ValueError, match="none of class 1"):
        estimate(learner, {**whole, "support_mask": mask})


def test_what_was_learned_serves_another_number_of_classes() -> None:
    trained, other = (proto_net(network(), FEATURES, classes) for classes in (CLASSES, 2))
    assert trained.x0.keys() == other.x0.keys()
    task = {name: entry[0] for name, entry in tasks().items()}
    task = {name: entry[task[f"{name.split('_')[0]}_y"] < 2] for name, entry in task.items()}
    y = hypergradient(
        other.problem, trained.x0, other.y0, estimator=other.estimator, data={k: v[None] for k, v in task.items()}
    ).y[0]
    predicted = other.predict(trained.x0, y, task)
    assert predicted.shape == (2 * SHOTS, 2)
    assert torch.allclose(predicted.exp().sum(-1), torch.ones(2 * SHOTS))
    net = network()
    away = (net(task["query_x"]).unsqueeze(1) - y).square().sum(-1)
    assert torch.equal(predicted.argmax(-1), away.argmin(-1))


def test_features_of_any_shape_are_flattened() -> None:
    body = nn.Sequential(network(), nn.Unflatten(-1, (FEATURES, 1, 1)))
    found = estimate(proto_net(body, FEATURES, CLASSES), tasks())
    value, grad = by_autograd(tasks())
    assert_same(found, value, {f"0.{name}": leaf for name, leaf in grad.items()})


@pytest.mark.parametrize("numbers", [(0, 3), (3, 0)])
def test_counts_must_be_positive(numbers: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        proto_net(nn.Linear(2, 2), *numbers)
