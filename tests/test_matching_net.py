"""Matching networks as a bilevel problem: what autograd says of attention, by every route."""

from __future__ import annotations

import pytest
import torch
from bilevel_strategies import normal
from torch import Tensor, nn

from bilevel import AID, ITD, Estimate, Status, hypergradient
from bilevel.few_shot import adapt, predict
from bilevel.few_shot.learner import Learner
from bilevel.problems import matching_net
from bilevel.solvers import CG, GradientDescent, Iterate

CLASSES, SHOTS, FEATURES = 3, 2, 4
SUPPORT = CLASSES * SHOTS


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, FEATURES))


def tasks(count: int = 3, shots: int = SHOTS) -> dict[str, Tensor]:
    labels = torch.arange(CLASSES).repeat(shots).expand(count, -1)
    return {
        "support_x": normal(count, CLASSES * shots, 2, seed=1), "support_y": labels,
        "query_x": normal(count, 5, 2, seed=2), "query_y": torch.tensor([0, 2, 1, 1, 0]).expand(count, -1),
    }  # fmt: skip


def estimate(learner: Learner, batch: dict[str, Tensor], estimator: AID | ITD | None = None) -> Estimate:
    chosen = learner.estimator if estimator is None else estimator
    return hypergradient(learner.problem, learner.x0, learner.y0, data=batch, estimator=chosen)


def by_hand(batch: dict[str, Tensor], scale: float) -> tuple[float, dict[str, Tensor]]:
    """Cosine by cosine."""
    net, losses = network(), []
    for sx, sy, qx, qy in zip(*(batch[k] for k in ("support_x", "support_y", "query_x", "query_y")), strict=True):
        for query, label in zip(net(qx), qy, strict=True):
            cosines = torch.stack([torch.cosine_similarity(query, each, dim=0) for each in net(sx)])
            losses.append(-(scale * cosines).softmax(0)[sy == label].sum().log())
    value = torch.stack(losses).mean()
    names = dict(net.named_parameters())
    return float(value.detach()), dict(zip(names, torch.autograd.grad(value, list(names.values())), strict=True))


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_one_step_of_conjugate_gradients_is_exact_and_equals_autograd(scale: float) -> None:
    value, grad = by_hand(tasks(), scale)
    learner = matching_net(network(), FEATURES, CLASSES, SUPPORT, scale=scale)
    unit = Iterate(GradientDescent(1.0), max_steps=1)
    for estimator in (None, ITD(unit), AID(unit, CG(rtol=1e-12))):
        found = estimate(learner, tasks(), estimator)
        assert found.value == pytest.approx(value, rel=1e-12)
        torch.testing.assert_close(found.grad["body"], grad, rtol=1e-10, atol=1e-13)
    own = estimate(learner, tasks())
    assert own.status is Status.successful and own.stats.linear_steps == 1


def test_probabilities_sum_to_one_and_those_of_one_shot_are_a_softmax_of_cosines() -> None:
    learner = matching_net(network(), FEATURES, CLASSES, CLASSES, scale=7.0)
    batch = tasks(shots=1)
    logs = predict(learner, learner.x0, adapt(learner, learner.x0, batch))
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(3, 5))
    net = network()
    cosines = torch.cosine_similarity(net(batch["query_x"]).unsqueeze(2), net(batch["support_x"]).unsqueeze(1), dim=-1)
    torch.testing.assert_close(logs, (7.0 * cosines).log_softmax(-1))


def test_a_learned_scale_has_the_gradient_of_differences() -> None:
    def value(scale: float) -> float:
        return estimate(matching_net(network(), FEATURES, CLASSES, SUPPORT, scale=scale), tasks()).value

    found = estimate(matching_net(network(), FEATURES, CLASSES, SUPPORT, scale=3.0, learn_scale=True), tasks())
    assert float(found.grad["scale"]) == pytest.approx((value(3.0 + 1e-5) - value(3.0 - 1e-5)) / 2e-5, rel=1e-7)


def test_padded_samples_do_not_count() -> None:
    long = tasks(shots=SHOTS + 1)
    mask = torch.cat([torch.ones(SUPPORT), torch.zeros(CLASSES)]).expand(3, -1)
    padded = long | {"support_mask": mask, "query_mask": torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]).expand(3, -1)}
    short = {name: each[:, :SUPPORT] for name, each in long.items()}
    short |= {name: each[:, :3] for name, each in long.items() if name.startswith("query")}
    found = estimate(matching_net(network(), FEATURES, CLASSES, SUPPORT + CLASSES), padded)
    expected = estimate(matching_net(network(), FEATURES, CLASSES, SUPPORT), short)
    assert found.value == pytest.approx(expected.value, rel=1e-12)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-13)


def test_a_class_without_support_samples_is_never_predicted() -> None:
    batch = tasks() | {"support_y": torch.zeros(3, SUPPORT).long()}
    learner = matching_net(network(), FEATURES, CLASSES, SUPPORT)
    logs = predict(learner, learner.x0, adapt(learner, learner.x0, batch))
    torch.testing.assert_close(logs[..., 0], torch.zeros(3, 5))
    assert bool((logs[..., 1:] == -torch.inf).all())


def test_a_support_set_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"matching_net\(support=4, features=4\).*must be what a task has"):
        estimate(matching_net(network(), FEATURES, CLASSES, 4), tasks())
    with pytest.raises(ValueError, match="scale"):
        matching_net(network(), FEATURES, CLASSES, SUPPORT, scale=-1.0)
