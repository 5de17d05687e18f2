"""The support vector head: optimality, duality, what supports nothing, and its hypergradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import distance
from hypothesis import given, settings, strategies as st
from strategies import SEEDS, gaussian
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from bilevel import AID, BilevelError, BilevelProblem, FiniteDifference, Status, hypergradient, ravel
from bilevel.few_shot.learner import Learner
from bilevel.problems import svm_head
from bilevel.solvers.cg import CG
from bilevel.solvers.quadratic_program import QuadraticProgram

WAYS, SHOTS, INPUTS, FEATURES, TASKS = 4, 3, 3, 4, 2
SUPPORT = WAYS * SHOTS


def body(features: int = FEATURES) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, features), nn.Tanh()).double()


def batch(seed: int = 0, noise: float = 1.0, tasks: int = TASKS) -> dict[str, Tensor]:
    """Tasks of Gaussian classes, their support labels in an order of their own."""
    labels = torch.arange(WAYS).repeat(SHOTS)
    centers = gaussian(tasks * WAYS * INPUTS, seed=seed).reshape(tasks, WAYS, INPUTS)
    sets = {}
    for k, side in enumerate(("support", "query")):
        off = gaussian(tasks * SUPPORT * INPUTS, seed=seed + 1 + k).reshape(tasks, SUPPORT, INPUTS)
        sets[f"{side}_x"] = centers[:, labels] + noise * off
        sets[f"{side}_y"] = labels.expand(tasks, -1).clone()
    return sets


def task(data: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    return {name: value[k] for name, value in data.items()}


@dataclass(frozen=True)
class Machine:
    """A task's solved machine."""

    F: Tensor
    Y: Tensor
    a: Tensor
    W: Tensor


def machines(learner: Learner, data: Mapping[str, Tensor], estimator: Any = None) -> list[Machine]:
    net, x = learner.export(learner.x0), learner.x0
    found = hypergradient(learner.problem, x, learner.y0, data=data, estimator=estimator or learner.estimator)
    solved = []
    for k in range(len(data["support_y"])):
        F = net(data["support_x"][k]).detach()
        Y = one_hot(data["support_y"][k], learner.y0.shape[1]).double()
        solved.append(Machine(F, Y, found.y[k], found.y[k].T @ F))
    return solved


def margins(m: Machine) -> Tensor:
    """1 - [k = y_i] - <w_{y_i} - w_k, phi_i>: at most xi_i."""
    scores = m.F @ m.W.T
    return 1 - m.Y - ((scores * m.Y).sum(1, keepdim=True) - scores)


# The machine


@settings(max_examples=10)
@given(SEEDS, st.sampled_from([0.01, 0.1, 1.0, 10.0]))
def test_without_a_ridge_the_primal_and_the_dual_agree(seed: int, C: float) -> None:
    """Strong duality: |W|^2 / 2 + C sum xi = <Y, a> - |W|^2 / 2."""
    learner = svm_head(body(), FEATURES, WAYS, SUPPORT, C=C, dual_ridge=1e-9)
    for m in machines(learner, batch(seed)):
        slacks = margins(m).amax(1)
        primal = m.W.square().sum() / 2 + C * slacks.sum()
        dual = (m.Y * m.a).sum() - m.W.square().sum() / 2
        assert float(slacks.min()) >= -1e-12  # the true class itself: 0
        assert abs(float(primal - dual)) < 1e-6 * max(1.0, float(primal))


def test_with_a_ridge_it_is_the_machine_with_one_more_feature_a_sample() -> None:
    r, C, data = 0.7, 0.3, batch(1)
    for m in machines(svm_head(body(), FEATURES, WAYS, SUPPORT, C=C, dual_ridge=r), data):
        extended = torch.cat([m.F, r**0.5 * torch.eye(SUPPORT)], 1)
        wide = Machine(extended, m.Y, m.a, m.a.T @ extended)
        primal = wide.W.square().sum() / 2 + C * margins(wide).amax(1).sum()
        dual = (m.Y * m.a).sum() - wide.W.square().sum() / 2
        assert abs(float(primal - dual)) < 1e-12 * max(1.0, float(primal))


@settings(max_examples=10)
@given(SEEDS, st.sampled_from([0.03, 0.1, 1.0]))
def test_the_dual_variable_is_feasible_and_complementary(seed: int, C: float) -> None:
    """a_ik < C [k = y_i] only where the constraint of class k is the tightest of sample i."""
    r = 0.5
    for m in machines(svm_head(body(), FEATURES, WAYS, SUPPORT, C=C, dual_ridge=r), batch(seed)):
        assert float(m.a.sum(1).abs().max()) < 1e-12
        assert bool((m.a <= C * m.Y).all())
        extended = torch.cat([m.F, r**0.5 * torch.eye(SUPPORT)], 1)
        slack = margins(Machine(extended, m.Y, m.a, m.a.T @ extended))
        behind = slack.amax(1, keepdim=True) - slack
        assert float(((C * m.Y - m.a) * behind).abs().max()) < 1e-11


def test_no_weights_are_better() -> None:
    C = 0.5
    for m in machines(svm_head(body(16), 16, WAYS, SUPPORT, C=C, dual_ridge=0.0), batch(2)):

        def primal(W: Tensor, m: Machine = m) -> float:
            return float(W.square().sum() / 2 + C * margins(Machine(m.F, m.Y, m.a, W)).amax(1).clamp_min(0).sum())

        best = primal(m.W)
        for seed in range(20):
            d = gaussian(m.W.numel(), seed=seed).reshape(m.W.shape)
            assert min(primal(m.W + t * d) for t in (-1e-2, -1e-4, 1e-4, 1e-2)) >= best - 1e-12


def test_where_no_bound_holds_it_is_ridge_regression_on_centered_labels() -> None:
    """With C large and r larger, a = (K + r)^-1 (Y - 1/n), whose rows sum to zero."""
    r = 1e3
    for m in machines(svm_head(body(), FEATURES, WAYS, SUPPORT, C=1.0, dual_ridge=r), batch(3)):
        free = torch.linalg.solve(m.F @ m.F.T + r * torch.eye(SUPPORT), m.Y - 1 / WAYS)
        assert bool((free < m.Y).all()) == bool((free[m.Y == 0] < 0).all())
        assert torch.allclose(m.a, free, rtol=0, atol=1e-14)


def test_two_classes_are_the_ordinary_machine() -> None:
    """With w = w_0 - w_1 and w_0 = -w_1 the primal is |w|^2 / 4 + C sum max(0, 1 - s <w, phi>)."""
    svm = pytest.importorskip("sklearn.svm")
    C, data = 0.5, batch(4)
    data = data | {"support_y": data["support_y"] % 2, "query_y": data["query_y"] % 2}
    for m in machines(svm_head(body(), FEATURES, 2, SUPPORT, C=C, dual_ridge=1e-9), data):
        assert torch.allclose(m.W[0], -m.W[1], rtol=0, atol=1e-10)
        binary = svm.LinearSVC(loss="hinge", fit_intercept=False, C=2 * C, tol=1e-10, max_iter=1_000_000)
        binary.fit(m.F.numpy(), m.Y[:, 0].numpy())
        assert torch.allclose(m.W[0] - m.W[1], torch.tensor(binary.coef_[0]), rtol=0, atol=1e-6)


# The hypergradient


@pytest.mark.parametrize("options", [{}, {"C": 1.0, "dual_ridge": 0.1}, {"label_smoothing": 0.1, "scale": 5.0}])
def test_the_hypergradient_is_that_of_the_machine_solved_again(options: dict[str, float]) -> None:
    learner = svm_head(body(), FEATURES, WAYS, SUPPORT, **options)  # type: ignore[arg-type]
    exact = hypergradient(learner.problem, learner.x0, learner.y0, data=batch(5), estimator=learner.estimator)
    oracle = FiniteDifference(QuadraticProgram(), step=1e-5)
    differences = hypergradient(learner.problem, learner.x0, learner.y0, data=batch(5), estimator=oracle)
    assert exact.reports[1].residual > 1e-4  # far from a kink on the scale of the step
    assert distance(exact.grad, differences.grad) < 1e-6
    assert sorted(exact.grad) == ["body", "scale"]
    held = (exact.y == 0) | (exact.y == options.get("C", 0.1))
    assert 0.1 < float(held.double().mean()) < 0.9  # some bounds hold, so that there is something to get wrong


def test_a_sample_that_supports_nothing_has_no_influence() -> None:
    """W does not depend on it: the gradient in its features is exactly zero."""
    learner = svm_head(body(), FEATURES, WAYS, SUPPORT, C=10.0, dual_ridge=0.01)
    data = task(batch(6, noise=0.2), 0)
    z = learner.problem.encode(learner.x0, data)  # type: ignore[misc]
    features = {"F": z["support"].detach()}

    def in_features(level: str) -> Any:
        def function(x: Any, y: Tensor) -> Tensor:
            F = x["F"]
            inner = {"kernel": F @ F.T, "support": F, "query": z["query"].detach(), "scale": z["scale"].detach()}
            value: Tensor = getattr(learner.problem, level)(inner, y, data)
            return value

        return function

    polytope = learner.problem.constraints
    assert polytope is not None
    problem = BilevelProblem(in_features("f"), in_features("g"), constraints=lambda x: polytope(None, data))
    found = hypergradient(problem, features, learner.y0, estimator=learner.estimator)
    idle = (found.y == 0).all(1)
    assert 0 < int(idle.sum()) < SUPPORT
    assert torch.equal(found.grad["F"][idle], torch.zeros_like(found.grad["F"][idle]))
    assert bool((found.grad["F"][~idle] != 0).any(1).all())


def test_tasks_are_a_loop_over_tasks() -> None:
    learner, data = svm_head(body(), FEATURES, WAYS, SUPPORT), batch(7)
    together = hypergradient(learner.problem, learner.x0, learner.y0, data=data, estimator=learner.estimator)
    each = [
        hypergradient(
            learner.problem,
            learner.x0,
            learner.y0,
            data={name: value[k : k + 1] for name, value in data.items()},
            estimator=learner.estimator,
        )
        for k in range(TASKS)
    ]
    mean = torch.stack([ravel(e.grad)[0] for e in each]).mean(0)
    assert torch.allclose(ravel(together.grad)[0], mean, rtol=0, atol=1e-12)


def test_padding_changes_nothing() -> None:
    data, learner = batch(8), svm_head(body(), FEATURES, WAYS, SUPPORT)
    plain = hypergradient(learner.problem, learner.x0, learner.y0, data=data, estimator=learner.estimator)
    padded = svm_head(body(), FEATURES, WAYS, SUPPORT + 2)
    more = {
        side: torch.cat([data[f"{side}_x"], 100 + torch.zeros(TASKS, 2, INPUTS)], 1) for side in ("support", "query")
    }
    mask = torch.cat([torch.ones(TASKS, SUPPORT), torch.zeros(TASKS, 2)], 1)
    filled = {f"{side}_x": points for side, points in more.items()}
    filled |= {f"{side}_y": torch.cat([data[f"{side}_y"], torch.zeros(TASKS, 2).long()], 1) for side in more}
    filled |= {f"{side}_mask": mask for side in more}
    found = hypergradient(padded.problem, padded.x0, padded.y0, data=filled, estimator=padded.estimator)
    assert torch.equal(found.y[:, SUPPORT:], torch.zeros(TASKS, 2, WAYS))
    assert torch.allclose(found.y[:, :SUPPORT], plain.y, rtol=0, atol=1e-12)
    assert torch.allclose(ravel(found.grad)[0], ravel(plain.grad)[0], rtol=0, atol=1e-12)


def test_few_interior_point_steps_do_not_give_a_hypergradient() -> None:
    learner = svm_head(body(), FEATURES, WAYS, SUPPORT, solver=QuadraticProgram(max_steps=3))
    with pytest.raises(BilevelError) as caught:
        hypergradient(learner.problem, learner.x0, learner.y0, data=batch(9), estimator=learner.estimator)
    assert caught.value.status is Status.max_steps
    full = svm_head(body(), FEATURES, WAYS, SUPPORT)
    exact = hypergradient(full.problem, full.x0, full.y0, data=batch(9), estimator=full.estimator)
    early = caught.value.partial
    assert float((early.y - exact.y).norm() / exact.y.norm()) > 0.02
    assert distance(early.grad, exact.grad) > 0.02


def test_estimators_without_constraints_refuse() -> None:
    learner = svm_head(body(), FEATURES, WAYS, SUPPORT)
    with pytest.raises(ValueError, match="`AID` does not apply: y is constrained"):
        hypergradient(learner.problem, learner.x0, learner.y0, data=batch(), estimator=AID(QuadraticProgram(), CG()))


# The learner


def test_the_outer_objective_is_the_cross_entropy_of_scaled_scores() -> None:
    learner, data = svm_head(body(), FEATURES, WAYS, SUPPORT, scale=3.0), batch(10)
    value = hypergradient(learner.problem, learner.x0, learner.y0, data=data, estimator=learner.estimator).value
    net, losses = learner.export(learner.x0), []
    for k, m in enumerate(machines(learner, data)):
        scores = 3.0 * net(data["query_x"][k]).detach() @ m.W.T
        losses.append(float(cross_entropy(scores, data["query_y"][k])))
        predicted = learner.predict(learner.x0, m.a, task(data, k))
        assert torch.allclose(predicted, scores.log_softmax(-1), rtol=0, atol=1e-12)
    assert value == pytest.approx(sum(losses) / TASKS, abs=1e-12)


def test_label_smoothing_leaves_1_minus_eps_to_the_class() -> None:
    eps, data = 0.2, batch(11)
    learner = svm_head(body(), FEATURES, WAYS, SUPPORT, label_smoothing=eps)
    value = hypergradient(learner.problem, learner.x0, learner.y0, data=data, estimator=learner.estimator).value
    expected = []
    for k, m in enumerate(machines(learner, data)):
        logs = learner.predict(learner.x0, m.a, task(data, k))
        right = one_hot(data["query_y"][k], WAYS).double()
        expected.append(float(-((right * (1 - eps) + (1 - right) * eps / (WAYS - 1)) * logs).sum(1).mean()))
    assert value == pytest.approx(sum(expected) / TASKS, abs=1e-12)


def test_the_machine_classifies_what_can_be_separated() -> None:
    learner, data = svm_head(body(), FEATURES, WAYS, SUPPORT, C=10.0, dual_ridge=0.01), batch(12, noise=0.03)
    for k, m in enumerate(machines(learner, data)):
        guessed = learner.predict(learner.x0, m.a, task(data, k)).argmax(1)
        assert torch.equal(guessed, data["query_y"][k])


def test_the_scale_is_learned_only_if_asked_for() -> None:
    learner = svm_head(body(), FEATURES, WAYS, SUPPORT, scale=2.0, learn_scale=False)
    assert sorted(learner.x0) == ["body"]
    found = hypergradient(learner.problem, learner.x0, learner.y0, data=batch(), estimator=learner.estimator)
    learned = svm_head(body(), FEATURES, WAYS, SUPPORT, scale=2.0)
    other = hypergradient(learned.problem, learned.x0, learned.y0, data=batch(), estimator=learned.estimator)
    assert distance(found.grad["body"], other.grad["body"]) < 1e-14


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"classes": 1}, "classes"),
        ({"features": 0}, "features"),
        ({"C": 0.0}, r"C=\.\.\.\)` must be positive"),
        ({"scale": -1.0}, r"scale=\.\.\.\)` must be positive"),
        ({"dual_ridge": -1.0}, r"dual_ridge=\.\.\.\)` must be at least 0"),
        ({"label_smoothing": 0.75}, "label_smoothing"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], complaint: str) -> None:
    arguments: dict[str, Any] = {"features": FEATURES, "classes": WAYS, "support": SUPPORT}
    with pytest.raises(ValueError, match=complaint):
        svm_head(body(), **(arguments | options))


def test_another_number_of_samples_or_features_is_refused() -> None:
    for features, support, complaint in ((FEATURES, 7, "support"), (FEATURES + 1, SUPPORT, "features")):
        learner = svm_head(body(), features, WAYS, support)
        with pytest.raises(ValueError, match=rf"`svm_head\({complaint}=...\)` must be what a task has"):
            hypergradient(learner.problem, learner.x0, learner.y0, data=batch(), estimator=learner.estimator)
