"""ANIL against its formulas and its theory, and the test without an inner loop."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bilevel_strategies import normal
from cases import distance, flat
from hypothesis import given, strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

from bilevel import (
    AID,
    ESJ,
    ITD,
    BilevelProblem,
    Estimate,
    FirstOrder,
    Start,
    functional,
    hypergradient,
    minimize,
    ravel,
)
from bilevel.few_shot.learner import Learner
from bilevel.problems.meta_learning.anil import anil, no_inner_loop
from bilevel.problems.meta_learning.maml import maml
from bilevel.solvers.dense import Dense
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.lbfgs import LBFGS

TASKS, N, STEP = 3, 5, 0.3
NO_STEPS = Iterate(GradientDescent(1.0), 0)


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().double()


def body() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh()))


def head(outputs: int = 1) -> nn.Module:
    return seeded(lambda: nn.Linear(3, outputs), seed=1)


def regression(tasks: int = TASKS, n: int = 6, m: int = 5) -> dict[str, Tensor]:
    return {
        "support_x": normal(tasks, n, 2, seed=1),
        "support_y": normal(tasks, n, 1, seed=2),
        "query_x": normal(tasks, m, 2, seed=3),
        "query_y": normal(tasks, m, 1, seed=4),
    }


def classification(tasks: int = TASKS, n: int = 6, m: int = 5) -> dict[str, Tensor]:
    batch = regression(tasks, n, m)
    return {**batch, "support_y": torch.arange(n).expand(tasks, n) % 3, "query_y": torch.arange(m).expand(tasks, m) % 3}


def one(batch: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """Task k, as a batch of one."""
    return {name: leaf[k : k + 1] for name, leaf in batch.items()}


def estimate(learner: Learner, batch: dict[str, Tensor], x: Any = None, estimator: Any = None) -> Estimate:
    estimator = learner.estimator if estimator is None else estimator
    x = learner.x0 if x is None else x
    return hypergradient(learner.problem, x, learner.y0, estimator=estimator, data=batch)


PHI, W = (ravel(dict(module().named_parameters()))[1] for module in (body, head))


def at_end(y: Any) -> dict[str, Tensor]:
    """The y of the first task."""
    return {name: leaf[0] for name, leaf in y.items()}


def loss(phi: Tensor, w: Tensor, batch: dict[str, Tensor], k: int, side: str) -> Tensor:
    """L(phi, w) of one side of task k, phi and w as vectors."""
    features = functional_call(body(), PHI.unravel(phi), (batch[f"{side}_x"][k],))
    output = functional_call(head(), W.unravel(w), (features,))
    value: Tensor = (output - batch[f"{side}_y"][k]).square().mean()
    return value


def start() -> tuple[Tensor, Tensor]:
    return tuple(ravel(dict(module.named_parameters()))[0].detach() for module in (body(), head()))  # type: ignore[return-value]


# Formulas


def reverse_sweep(phi: Tensor, w: Tensor, batch: dict[str, Tensor], k: int, steps: int) -> tuple[Tensor, Tensor]:
    """h_phi and h_w by the sums and products of Ji et al., with second derivatives from autograd of one gradient."""
    path = [w]
    for _ in range(steps):
        leaf = path[-1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(phi, leaf, batch, k, "support"), leaf)
        path.append(path[-1] - STEP * gradient)
    phi_leaf, w_leaf = phi.clone().requires_grad_(), path[-1].clone().requires_grad_()
    h_phi, v = torch.autograd.grad(loss(phi_leaf, w_leaf, batch, k, "query"), (phi_leaf, w_leaf))
    for y in reversed(path[:-1]):
        phi_leaf, w_leaf = phi.clone().requires_grad_(), y.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(phi_leaf, w_leaf, batch, k, "support"), w_leaf, create_graph=True)
        cross, Hv = torch.autograd.grad(gradient, (phi_leaf, w_leaf), v)
        h_phi, v = h_phi - STEP * cross, v - STEP * Hv  # the cross product takes v before it is multiplied
    return h_phi, v


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_hypergradient_is_the_product_formula(steps: int) -> None:
    batch, (phi, w) = regression(), start()
    sweeps = [reverse_sweep(phi, w, batch, k, steps) for k in range(TASKS)]
    learner = anil(body(), head(), mse_loss, step=STEP, inner_steps=steps)
    found = estimate(learner, batch)
    assert distance(found.grad["body"], sum(h for h, _ in sweeps) / TASKS) <= 1e-10
    assert distance(found.grad["head"], sum(v for _, v in sweeps) / TASKS) <= 1e-10
    assert found.stats.hvps == TASKS * steps


def test_hypergradient_is_that_of_autograd_through_the_loop() -> None:
    batch, (phi, w) = regression(), start()
    phi, w = phi.requires_grad_(), w.requires_grad_()
    total = phi.new_zeros(())
    for k in range(TASKS):
        y = w
        for _ in range(N):
            (gradient,) = torch.autograd.grad(loss(phi, y, batch, k, "support"), y, create_graph=True)
            y = y - STEP * gradient
        total = total + loss(phi, y, batch, k, "query") / TASKS
    in_phi, in_w = torch.autograd.grad(total, (phi, w))
    learner = anil(body(), head(), mse_loss, step=STEP, inner_steps=N)
    for form in (learner.estimator, ITD(learner.adapt, checkpoint=True), ITD(learner.adapt, forward=True)):
        found = estimate(learner, batch, estimator=form)
        assert distance(found.grad["body"], in_phi) <= 1e-10
        assert distance(found.grad["head"], in_w) <= 1e-10
        assert found.value == pytest.approx(float(total.detach()), rel=1e-12)


def test_features_are_computed_once_for_each_set() -> None:
    calls = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.inner = body()

        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return self.inner(x)  # type: ignore[no-any-return]

    learner = anil(Counting(), head(), mse_loss, step=STEP, inner_steps=7)
    later = Start(estimate(learner, regression()).y, count=1)  # the first estimate of a run looks at f and g besides
    calls.clear()
    hypergradient(learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=regression(), start=later)
    assert len(calls) == 2


def test_perturbed_solves_agree() -> None:
    learner = anil(body(), head(), mse_loss, step=STEP, inner_steps=3)
    p = flat(learner.x0).numel()
    esj = ESJ(learner.adapt, directions=p, radius=1e-5)
    batch = regression()
    assert distance(estimate(learner, batch, estimator=esj).grad, estimate(learner, batch).grad) <= 1e-4


@pytest.mark.parametrize("criterion", [mse_loss, cross_entropy])
def test_batch_is_the_mean_of_a_loop_and_padding_changes_nothing(criterion: Any) -> None:
    """Each task by itself, unpadded; all in one batch, padded and masked."""
    batch = classification() if criterion is cross_entropy else regression()
    learner = anil(body(), head(3 if criterion is cross_entropy else 1), criterion, step=STEP, inner_steps=N)
    whole = estimate(learner, batch)
    singles = [estimate(learner, one(batch, k)) for k in range(TASKS)]
    assert distance(whole.grad, sum(flat(single.grad) for single in singles) / TASKS) <= 1e-12
    sizes = {"support": (6, 4, 1), "query": (5, 3, 2)}
    cut, padded = [], {name: leaf.clone() for name, leaf in batch.items()}
    for k in range(TASKS):
        own = {
            f"{side}_{part}": one(batch, k)[f"{side}_{part}"][:, : sizes[side][k]] for side in sizes for part in "xy"
        }
        cut.append(estimate(learner, own))
    for side, counts in sizes.items():
        width = padded[f"{side}_x"].shape[1]
        padded[f"{side}_mask"] = (torch.arange(width) < torch.tensor(counts)[:, None]).double()
        for k, count in enumerate(counts):
            padded[f"{side}_x"][k, count:] = 7.0
            padded[f"{side}_y"][k, count:] = 2
    assert distance(estimate(learner, padded).grad, sum(flat(single.grad) for single in cut) / TASKS) <= 1e-10


def test_first_order_takes_the_features_of_the_support_set_as_constant() -> None:
    batch, (phi, w) = regression(), start()
    learner = anil(body(), head(), mse_loss, step=STEP, inner_steps=N)
    found = estimate(learner, batch, estimator=FirstOrder(learner.adapt))
    h_phi, h_w = torch.zeros_like(phi), torch.zeros_like(w)
    for k in range(TASKS):
        y = w
        for _ in range(N):
            leaf = y.clone().requires_grad_()
            y = y - STEP * torch.autograd.grad(loss(phi, leaf, batch, k, "support"), leaf)[0]
        leaves = phi.clone().requires_grad_(), y.clone().requires_grad_()
        in_phi, in_w = torch.autograd.grad(loss(*leaves, batch, k, "query"), leaves)
        h_phi, h_w = h_phi + in_phi / TASKS, h_w + in_w / TASKS
    assert distance(found.grad["body"], h_phi) <= 1e-10
    assert distance(found.grad["head"], h_w) <= 1e-10


def test_with_an_identity_for_a_body_it_is_maml() -> None:
    """A body that only scales its input by one learned number: h_w is MAML's on the head."""
    batch = regression()

    class Scale(nn.Module):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x

    top = seeded(lambda: nn.Linear(2, 1))
    ours = estimate(anil(Scale(), top, mse_loss, step=STEP, inner_steps=N), batch)
    assert distance(ours.grad["head"], estimate(maml(top, mse_loss, step=STEP, inner_steps=N), batch).grad) <= 1e-12


# Theory: a head loss that is strongly convex, here by ridge


@given(seed=st.integers(0, 20), steps=st.integers(1, 40), ridge=st.floats(0.1, 1.0))
def test_the_head_is_forgotten_geometrically(seed: int, steps: int, ridge: float) -> None:
    """|h_w| <= (1 - step mu)^N |grad_w L(w_N)| for step <= 1 / L."""
    F, t, Q, s = (
        normal(6, 3, seed=seed),
        normal(6, seed=seed + 1),
        normal(5, 3, seed=seed + 2),
        normal(5, seed=seed + 3),
    )
    H = F.T @ F / 6 + ridge * torch.eye(3)
    eigenvalues = torch.linalg.eigvalsh(H)
    mu, L = float(eigenvalues[0]), float(eigenvalues[-1])
    problem = BilevelProblem(
        lambda x, y: (Q @ y - s).square().mean() / 2,
        lambda x, y: (F @ y - t).square().mean() / 2 + ridge / 2 * y.square().sum(),
        init=lambda x: x,
    )
    found = hypergradient(
        problem, normal(3, seed=9), torch.zeros(3), estimator=ITD(Iterate(GradientDescent(1 / L), steps))
    )
    left = Q.T @ (Q @ found.y - s) / 5
    bound = (1 - mu / L) ** steps * float(torch.linalg.vector_norm(left))
    assert float(torch.linalg.vector_norm(found.grad)) <= bound * (1 + 1e-9) + 1e-15


def strongly_convex(ridge: float) -> tuple[Learner, dict[str, Tensor], float, float]:
    """One task, with a ridge on the head in g: the learner, the task, and mu and L of the head's loss."""
    learner = anil(body(), head(), mse_loss, step=STEP, inner_steps=N)
    own, sizes = learner.problem, {"support_x": (12, 2), "support_y": (12, 1), "query_x": (5, 2), "query_y": (5, 1)}
    batch = {name: normal(TASKS, *size, seed=k)[:1] for k, (name, size) in enumerate(sizes.items())}

    def g(z: Any, y: Any, task: Any) -> Tensor:
        return own.g(z, y, task) + ridge / 2 * torch.stack([leaf.square().sum() for leaf in y.values()]).sum()

    problem = BilevelProblem(own.f, g, init=own.init, encode=own.encode, tasks=True)
    design = torch.cat([body()(batch["support_x"][0]).detach(), torch.ones(12, 1)], 1)
    eigenvalues = torch.linalg.eigvalsh(2 * design.T @ design / 12 + ridge * torch.eye(4))
    return replace(learner, problem=problem), batch, float(eigenvalues[0]), float(eigenvalues[-1])


def test_more_steps_tend_to_the_implicit_gradient_at_the_rate_of_the_contraction() -> None:
    """|h_phi(N) - h_phi(inf)| <= c N (1 - step mu)^N, |h_w| <= (1 - step mu)^N |grad_w L(w_N)|: 1 - step mu a step."""
    learner, batch, mu, L = strongly_convex(ridge=0.9)
    limit = estimate(learner, batch, estimator=AID(LBFGS(1e-13, max_steps=500), Dense()))
    assert float(flat(limit.grad["head"]).abs().max()) == 0.0
    rate = 1 - mu / L
    assert 0.7 < rate < 0.8

    def at(steps: int) -> tuple[float, float, float]:
        found = estimate(learner, batch, estimator=ITD(Iterate(GradientDescent(1 / L), steps)))
        error = float(torch.linalg.vector_norm(flat(found.grad["body"]) - flat(limit.grad["body"])))
        last = estimate(learner, batch, {"body": learner.x0["body"], "head": at_end(found.y)}, ITD(NO_STEPS))
        h_w, left = (float(torch.linalg.vector_norm(flat(h.grad["head"]))) for h in (found, last))
        return error, h_w, left

    counts = [5, 10, 20, 40, 60]
    errors, heads, lasts = zip(*(at(steps) for steps in counts), strict=True)
    for sequence, settled in ((errors, (2, 3)), (heads, (3,))):
        assert all(second < first for first, second in itertools.pairwise(sequence))
        for k in settled:
            assert (sequence[k + 1] / sequence[k]) ** (1 / 20) == pytest.approx(rate, abs=0.02)
    assert min(lasts) > 0.5 * max(lasts)  # while the gradient at the end stays what it is
    assert all(h <= rate**steps * last for h, steps, last in zip(heads, counts, lasts, strict=True))


# What a user gets


def test_predictions_adapt_the_head_only() -> None:
    batch = classification()
    phi, top = body(), head(3)
    learner = anil(phi, top, cross_entropy, step=STEP, inner_steps=2)
    y = estimate(learner, batch).y
    task = {name: leaf[1] for name, leaf in batch.items()}
    weights: dict[str, Tensor] = dict(top.named_parameters())
    for _ in range(2):
        output = functional_call(top, weights, (phi(task["support_x"]).detach(),))
        gradients = torch.autograd.grad(cross_entropy(output, task["support_y"]), list(weights.values()))
        weights = {
            name: leaf.detach().sub(STEP * g).requires_grad_()
            for (name, leaf), g in zip(weights.items(), gradients, strict=True)
        }
    expected = functional_call(top, weights, (phi(task["query_x"]),)).log_softmax(-1)
    found = learner.predict(learner.x0, {name: leaf[1] for name, leaf in y.items()}, task)
    assert torch.allclose(found, expected, atol=1e-12)


def test_training_lowers_the_loss_and_export_is_body_and_head() -> None:
    phi, top, batch = body(), head(), regression()
    before = copy.deepcopy((phi.state_dict(), top.state_dict()))
    learner = anil(phi, top, mse_loss, step=STEP, inner_steps=2)
    solution = minimize(learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=batch, max_steps=20)
    assert solution.value < 0.9 * solution.history[0].value
    exported = learner.export(solution.x)
    x = batch["query_x"][0]
    expected = functional_call(top, solution.x["head"], (functional_call(phi, solution.x["body"], (x,)),))
    assert torch.allclose(exported(x), expected, atol=1e-14)
    for module, state in zip((phi, top), before, strict=True):
        assert all(torch.equal(module.state_dict()[name], state[name]) for name in state)


@pytest.mark.parametrize("wrong", [{"step": 0.0}, {"inner_steps": 0}, {"evaluation_steps": -1}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`anil"):
        anil(body(), head(), mse_loss, **wrong)


# No inner loop


def nil(classes: int = 3) -> tuple[Learner, nn.Module]:
    phi = body()
    net = functional(phi)
    learner = anil(net, head(classes), cross_entropy, step=STEP)
    return no_inner_loop(learner, lambda x, inputs: net(x["body"], inputs), classes=classes), phi


def test_without_an_inner_loop_labels_are_weighted_by_cosine_similarity() -> None:
    learner, phi = nil()
    task = {name: leaf[0] for name, leaf in classification().items()}
    found = learner.predict(learner.x0, learner.y0, task)
    support, query = phi(task["support_x"]), phi(task["query_x"])
    for i in range(5):
        scores = torch.zeros(3)
        for j in range(6):
            cosine = query[i] @ support[j] / (query[i].norm() * support[j].norm())
            scores[task["support_y"][j]] += cosine.detach()
        assert torch.allclose(found[i], scores.log_softmax(0), atol=1e-12)
    assert learner.name == "NIL"
    assert learner.adapt == Iterate(GradientDescent(1.0), 0)


def test_padding_has_no_say_without_an_inner_loop() -> None:
    learner, _ = nil()
    task = {name: leaf[0] for name, leaf in classification().items()}
    cut = {name: leaf[:4] if name.startswith("support") else leaf for name, leaf in task.items()}
    masked = {**task, "support_mask": (torch.arange(6) < 4).double()}
    expected = learner.predict(learner.x0, learner.y0, cut)
    assert torch.allclose(learner.predict(learner.x0, learner.y0, masked), expected, atol=1e-12)
    assert not torch.allclose(learner.predict(learner.x0, learner.y0, task), expected, atol=1e-3)


def test_without_an_inner_loop_the_head_does_not_matter() -> None:
    learner, _ = nil()
    task = {name: leaf[0] for name, leaf in classification().items()}
    other = {**learner.x0, "head": {name: leaf + 1 for name, leaf in learner.x0["head"].items()}}
    assert torch.equal(learner.predict(other, learner.y0, task), learner.predict(learner.x0, learner.y0, task))


def test_a_maml_learner_may_be_tested_without_an_inner_loop() -> None:
    module = nn.Sequential(body(), head(3))
    front = functional(module[:-1])
    learner = maml(module, cross_entropy, step=STEP)
    names = front.params.keys()
    tested = no_inner_loop(learner, lambda x, inputs: front({name: x[name] for name in names}, inputs), classes=3)
    task = {name: leaf[0] for name, leaf in classification().items()}
    assert torch.allclose(tested.predict(learner.x0, learner.y0, task), nil()[0].predict(nil()[0].x0, {}, task))
    assert tested.problem is learner.problem
