"""MAML and its relatives against product formulas, closed forms, loops over tasks and hand-written Meta-SGD."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from bilevel_strategies import normal
from cases import distance, flat
from hypothesis import given, strategies as st
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn.functional import cross_entropy, huber_loss, mse_loss

from bilevel import (
    AID,
    ESJ,
    ITD,
    KKT,
    BilevelProblem,
    Estimate,
    FirstOrder,
    Penalty,
    Reptile,
    Start,
    functional,
    hypergradient,
    minimize,
    ravel,
)
from bilevel._tree import tree_map
from bilevel.diagnostics.memory import peak_memory
from bilevel.few_shot.learner import Learner
from bilevel.problems.meta_learning._tasks import task_loss
from bilevel.problems.meta_learning.maml import maml
from bilevel.problems.meta_learning.reptile import reptile
from bilevel.solvers.cg import CG
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.lbfgs import LBFGS

TASKS, N, STEP = 3, 4, 0.3


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().double()


def network(outputs: int = 1) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, outputs)))


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


def estimate(learner: Learner, batch: dict[str, Tensor], x: Any = None, estimator: Any = None) -> Estimate:
    estimator = learner.estimator if estimator is None else estimator
    x = learner.x0 if x is None else x
    return hypergradient(learner.problem, x, learner.y0, estimator=estimator, data=batch)


def one(batch: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """Task k, as a batch of one."""
    return {name: leaf[k : k + 1] for name, leaf in batch.items()}


def losses(module: nn.Module, batch: dict[str, Tensor], k: int, side: str) -> Callable[[Tensor], Tensor]:
    """The loss of one side of task k as a function of the parameters in one vector, without the library's losses."""
    structure = ravel(dict(module.named_parameters()))[1]

    def loss(theta: Tensor) -> Tensor:
        output = functional_call(module, structure.unravel(theta), (batch[f"{side}_x"][k],))
        value: Tensor = (output - batch[f"{side}_y"][k]).square().mean()
        return value

    return loss


def gradient(function: Callable[[Tensor], Tensor], theta: Tensor, create_graph: bool = False) -> Tensor:
    leaf = theta if theta.requires_grad else theta.detach().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, create_graph=create_graph)[0]


# Formulas


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_hypergradient_is_the_product_formula(steps: int) -> None:
    """prod_k (I - step H_k) grad L(y_N), the factor k = 0 leftmost, with dense Hessians; mean over tasks."""
    module, batch = network(), regression()
    theta = ravel(dict(module.named_parameters()))[0].detach()
    exact, first = torch.zeros_like(theta), torch.zeros_like(theta)
    for k in range(TASKS):
        support, query = (losses(module, batch, k, side) for side in ("support", "query"))
        path = [theta]
        for _ in range(steps):
            path.append(path[-1] - STEP * gradient(support, path[-1]))
        v = gradient(query, path[-1])
        first += v / TASKS
        for y in reversed(path[:-1]):
            H: Tensor = hessian(support, y)  # type: ignore[no-untyped-call, assignment, unused-ignore]  # pyright: ignore
            v = v - STEP * H @ v
        exact += v / TASKS
    learner = maml(module, mse_loss, step=STEP, inner_steps=steps)
    found = estimate(learner, batch)
    assert distance(found.grad, exact) <= 1e-10
    assert found.stats.hvps == TASKS * steps
    fomaml = estimate(maml(module, mse_loss, step=STEP, inner_steps=steps, first_order=True), batch)
    assert distance(fomaml.grad, first) <= 1e-10
    assert fomaml.stats.hvps == fomaml.stats.cross_products == 0
    assert distance(found.grad, first) > 0.05


def test_hypergradient_is_that_of_autograd_through_the_loop() -> None:
    module, batch = network(), regression()
    theta = ravel(dict(module.named_parameters()))[0].detach().requires_grad_()
    total = theta.new_zeros(())
    for k in range(TASKS):
        y: Tensor = theta
        for _ in range(N):
            y = y - STEP * gradient(losses(module, batch, k, "support"), y, create_graph=True)
        total = total + losses(module, batch, k, "query")(y) / TASKS
    (expected,) = torch.autograd.grad(total, theta)
    value = float(total.detach())
    learner = maml(module, mse_loss, step=STEP, inner_steps=N)
    for form in (learner.estimator, ITD(learner.adapt, checkpoint=True), ITD(learner.adapt, forward=True)):
        found = estimate(learner, batch, estimator=form)
        assert distance(found.grad, expected) <= 1e-10
        assert found.value == pytest.approx(value, rel=1e-12)


def linear_tasks(low: float, high: float, q: int, seed: int) -> tuple[dict[str, Tensor], list[tuple[Tensor, ...]]]:
    """Linear regressions with support loss (y - a)'A(y - a)/2, spectrum of A in [low, high], and query loss with B, b.

    `mse_loss` of X y against X a is |X (y - a)|^2 / n, so that A = 2 X'X / n.
    """
    batch: dict[str, list[Tensor]] = {name: [] for name in ("support_x", "support_y", "query_x", "query_y")}
    known = []
    for k in range(TASKS):
        made = []
        for side, offset in (("support", 0), ("query", 50)):
            rotation = torch.linalg.qr(normal(q, q, seed=seed + k + offset))[0]
            matrix = rotation @ torch.diag(torch.linspace(low, high, q)) @ rotation.T
            X = torch.linalg.cholesky(matrix * q / 2).T
            center = normal(q, seed=seed + k + offset + 25)
            batch[f"{side}_x"].append(X)
            batch[f"{side}_y"].append((X @ center).unsqueeze(-1))
            made += [matrix, center]
        known.append(tuple(made))
    return {name: torch.stack(leaves) for name, leaves in batch.items()}, known


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_quadratic_closed_form(steps: int) -> None:
    """y_N = a + P^N (x - a), h = P^N B (y_N - b) with P = I - step A; first order leaves P^N out."""
    step, q = 0.05, 8
    batch, known = linear_tasks(0.1, 10.0, q, seed=1)
    net = seeded(lambda: nn.Linear(q, 1, bias=False))
    x = normal(q, seed=9)
    exact, first = torch.zeros(q), torch.zeros(q)
    for A, a, B, b in known:
        P = torch.linalg.matrix_power(torch.eye(q) - step * A, steps)
        left = B @ (a + P @ (x - a) - b)
        exact, first = exact + P @ left / TASKS, first + left / TASKS
    learner = maml(net, mse_loss, step=step, inner_steps=steps)
    assert distance(estimate(learner, batch, {"weight": x[None]}).grad, exact) <= 1e-10
    fomaml = maml(net, mse_loss, step=step, inner_steps=steps, first_order=True)
    found = estimate(fomaml, batch, {"weight": x[None]}).grad
    assert distance(found, first) <= 1e-10
    error = float(torch.linalg.vector_norm(first - exact) / torch.linalg.vector_norm(exact))
    assert distance(found, exact) == pytest.approx(error, rel=1e-8)
    assert error > {1: 0.3, 5: 1.0, 20: 3.0}[steps]  # no small perturbation


@given(seed=st.integers(0, 30), steps=st.integers(1, 30), low=st.floats(0.05, 1.0))
def test_a_long_adaptation_forgets_its_start(seed: int, steps: int, low: float) -> None:
    """|h| <= (1 - step mu)^N |grad L(y_N)| on quadratics, for step <= 1 / L."""
    q, high = 4, 2.0
    batch, known = linear_tasks(low, high, q, seed=seed)
    net = seeded(lambda: nn.Linear(q, 1, bias=False))
    learner = maml(net, mse_loss, step=1 / high, inner_steps=steps)
    found = estimate(learner, one(batch, 0))
    _, _, B, b = known[0]
    left = B @ (found.y["weight"].flatten() - b)
    bound = (1 - low / high) ** steps * float(torch.linalg.vector_norm(left))
    assert float(torch.linalg.vector_norm(flat(found.grad))) <= bound * (1 + 1e-9)


# Learned steps


def meta_sgd(module: nn.Module, x: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The mean query loss after N steps y <- y - a grad L(y), a learned, and its gradients in x and log a."""
    theta = flat(x["params"]).clone().requires_grad_()
    log_steps = flat(x["log_steps"]).clone().requires_grad_()
    total = theta.new_zeros(())
    for k in range(TASKS):
        y: Tensor = theta
        for _ in range(N):
            y = y - log_steps.exp() * gradient(losses(module, batch, k, "support"), y, create_graph=True)
        total = total + losses(module, batch, k, "query")(y) / TASKS
    in_params, in_log_steps = torch.autograd.grad(total, (theta, log_steps))
    return total.detach(), in_params, in_log_steps


def test_learned_steps_are_meta_sgd() -> None:
    module, batch = network(), regression()
    learner = maml(module, mse_loss, step=STEP, inner_steps=N, learn_steps=True)
    spread = tree_map(lambda leaf: leaf + 0.5 * normal(*leaf.shape, seed=leaf.numel()), learner.x0)
    for x in (learner.x0, spread):
        value, in_params, in_log_steps = meta_sgd(module, x, batch)
        found = estimate(learner, batch, x)
        assert found.value == pytest.approx(float(value), rel=1e-12)
        assert distance(found.grad["params"], in_params) <= 1e-10
        assert distance(found.grad["log_steps"], in_log_steps) <= 1e-10
    plain = estimate(maml(module, mse_loss, step=STEP, inner_steps=N), batch)
    assert distance(estimate(learner, batch).grad["params"], plain.grad) <= 1e-12


def test_learned_steps_adapt_predict_and_export_the_parameters_themselves() -> None:
    module, batch = network(), regression()
    learner = maml(module, mse_loss, step=STEP, inner_steps=2, evaluation_steps=3, learn_steps=True)
    x = tree_map(lambda leaf: leaf + 0.5 * normal(*leaf.shape, seed=leaf.numel()), learner.x0)
    y = estimate(learner, batch, x, ESJ(learner.adapt, directions=1)).y
    task = {name: leaf[1] for name, leaf in batch.items()}
    adapted, log_steps = flat(x["params"]), flat(x["log_steps"])
    for _ in range(3):
        adapted = adapted - log_steps.exp() * gradient(losses(module, batch, 1, "support"), adapted)
    structure = ravel(x["params"])[1]
    expected = functional_call(module, structure.unravel(adapted), (task["query_x"],))
    found = learner.predict(x, {name: leaf[1] for name, leaf in y.items()}, task)
    assert torch.allclose(found, expected, atol=1e-12)
    exported = dict(learner.export(x).named_parameters())
    assert all(torch.equal(exported[name], x["params"][name]) for name in x["params"])


def test_first_order_with_learned_steps_holds_the_gradients_constant() -> None:
    module, batch = network(), regression()
    learner = maml(module, mse_loss, step=STEP, inner_steps=N, learn_steps=True, first_order=True)
    found = estimate(learner, batch)
    theta = flat(learner.x0["params"])
    in_params, in_log_steps = torch.zeros_like(theta), torch.zeros_like(theta)
    for k in range(TASKS):
        y = theta
        for _ in range(N):
            y = y - STEP * gradient(losses(module, batch, k, "support"), y)
        v = gradient(losses(module, batch, k, "query"), y)
        in_params += v / TASKS
        in_log_steps += (y - theta) * v / TASKS  # d/d log a of theta - a (sum of gradients)
    assert distance(found.grad["params"], in_params) <= 1e-10
    assert distance(found.grad["log_steps"], in_log_steps) <= 1e-10


# Which estimators apply


@pytest.mark.parametrize("learn_steps", [False, True])
@pytest.mark.parametrize("name", ["AID", "Penalty", "KKT"])
def test_implicit_estimators_refuse(name: str, learn_steps: bool) -> None:
    learner = maml(network(), mse_loss, learn_steps=learn_steps)
    solver = LBFGS(1e-3, max_steps=5)
    estimators = {"AID": AID(solver, CG(max_steps=3)), "Penalty": Penalty(solver), "KKT": KKT(solver)}
    reason = "declared `iterative`" if learn_steps else "only through its\\s+start"
    with pytest.raises(ValueError, match=rf"`{name}` does not apply(.|\n)*{reason}(.|\n)*Use `ITD` or `ESJ`"):
        estimate(learner, regression(), estimator=estimators[name])


@pytest.mark.parametrize("learn_steps", [False, True])
def test_unrolling_and_perturbed_solves_agree(learn_steps: bool) -> None:
    module = seeded(lambda: nn.Linear(2, 1))
    learner = maml(module, mse_loss, step=0.1, inner_steps=3, learn_steps=learn_steps)
    p = flat(learner.x0).numel()
    esj = ESJ(learner.adapt, directions=p, radius=1e-5)
    batch = regression()
    assert distance(estimate(learner, batch, estimator=esj).grad, estimate(learner, batch).grad) <= 1e-4


def test_an_iterative_problem_has_no_implicit_error_estimate_and_says_what_it_is() -> None:
    learner = maml(seeded(lambda: nn.Linear(2, 1)), mse_loss, learn_steps=True)  # g is strongly convex in y
    assert repr(learner.problem) == "BilevelProblem(f, g, init=..., iterative=True, tasks=True)"
    found = estimate(learner, regression())
    assert found.error_estimate != found.error_estimate


# Directions without second derivatives


def curved(init: Any) -> BilevelProblem:
    return BilevelProblem(
        lambda x, y: (y.square() * x["a"]).sum() + y.cosh().sum(),
        lambda x, y: (y - x["a"].exp()).square().sum() / 2 + y.cosh().sum(),
        init=init,
    )


def held_constant(x: Tensor, problem: BilevelProblem, start: Tensor, steps: int) -> Tensor:
    """The derivative of f(x, y_N) with every gradient of g detached."""
    tree = {"a": x}
    y = start if problem.init is None else problem.init(tree)
    for _ in range(steps):
        y = y - 0.2 * gradient(lambda y: problem.g({"a": x.detach()}, y), y.detach())
    return torch.autograd.grad(problem.f(tree, y), x)[0]


@pytest.mark.parametrize("init", [lambda x: x["a"], lambda x: x["a"].sin() * 3])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_first_order_is_the_unrolled_derivative_with_gradients_held_constant(init: Any, steps: int) -> None:
    x, y0 = normal(3, seed=1), normal(3, seed=2)
    problem = curved(init)
    inner = Iterate(GradientDescent(0.2), steps)
    found = hypergradient(problem, {"a": x}, y0, estimator=FirstOrder(inner))
    assert distance(found.grad, held_constant(x.clone().requires_grad_(), problem, y0, steps)) <= 1e-12
    unrolled = hypergradient(problem, {"a": x}, y0, estimator=ITD(inner))
    if steps == 0:
        assert distance(found.grad, unrolled.grad) <= 1e-12
    else:
        assert distance(found.grad, unrolled.grad) > 1e-2


def test_first_order_takes_any_inner_solver_and_reports_its_failure() -> None:
    x, y0 = {"a": normal(3, seed=1)}, normal(3, seed=2)
    problem = curved(lambda x: x["a"])
    found = hypergradient(problem, x, y0, estimator=FirstOrder(LBFGS(1e-12)))
    expected = found.y.square() + 2 * x["a"] * found.y + found.y.sinh()  # grad_x f + grad_y f
    assert distance(found.grad, {"a": expected}) <= 1e-9
    stopped = hypergradient(problem, x, y0, estimator=FirstOrder(LBFGS(1e-12, max_steps=1)), throw=False)
    assert not stopped.status.ok
    assert "inner solver" in stopped.message


def test_first_order_without_a_start_in_x_would_leave_out_all_of_the_implicit_term_and_is_refused() -> None:
    x, y0 = {"a": normal(3, seed=1)}, normal(3, seed=2)
    for estimator in (FirstOrder(LBFGS(1e-12)), "first-order"):
        with pytest.raises(ValueError, match="`FirstOrder` does not apply: the start of y does not depend on x"):
            hypergradient(curved(None), x, y0, estimator=estimator)


def test_reptile_points_from_the_mean_of_the_adapted_parameters() -> None:
    module, batch = network(), regression()
    theta = ravel(dict(module.named_parameters()))[0].detach()
    mean = torch.zeros_like(theta)
    for k in range(TASKS):
        y = theta
        for _ in range(N):
            y = y - STEP * gradient(losses(module, batch, k, "support"), y)
        mean += y / TASKS
    learner = reptile(module, mse_loss, step=STEP, inner_steps=N)
    found = estimate(learner, batch)
    assert distance(found.grad, theta - mean) <= 1e-12
    other = estimate(learner, {**batch, "query_y": batch["query_y"] + 1})
    assert distance(other.grad, found.grad) == 0.0  # the query sets are not seen
    assert other.value != found.value
    assert found.value == pytest.approx(estimate(maml(module, mse_loss, step=STEP, inner_steps=N), batch).value)


def test_reptile_needs_a_start_that_depends_on_x() -> None:
    reptile_estimator = Reptile(Iterate(GradientDescent(0.1), 2))
    for init in (None, lambda x: torch.zeros(3)):
        with pytest.raises(ValueError, match="start of y does not depend on x"):
            hypergradient(curved(init), {"a": torch.ones(3)}, torch.zeros(3), estimator=reptile_estimator)


# Batches, padding


VARIANTS: dict[str, dict[str, Any]] = {
    "maml": {},
    "fomaml": {"first_order": True},
    "meta-sgd": {"learn_steps": True},
}


@pytest.mark.parametrize("name", [*VARIANTS, "reptile"])
@pytest.mark.parametrize("loss", [mse_loss, cross_entropy])
def test_batch_is_the_mean_of_a_loop(name: str, loss: Any) -> None:
    batch = classification() if loss is cross_entropy else regression()
    module = network(3 if loss is cross_entropy else 1)
    build = reptile if name == "reptile" else maml
    learner = build(module, loss, step=STEP, inner_steps=N, **VARIANTS.get(name, {}))
    found = estimate(learner, batch)
    singles = [estimate(learner, one(batch, k)) for k in range(TASKS)]
    mean = sum(flat(single.grad) for single in singles) / TASKS
    assert distance(found.grad, mean) <= 1e-12
    assert found.value == pytest.approx(sum(single.value for single in singles) / TASKS, rel=1e-12)


@pytest.mark.parametrize("name", [*VARIANTS, "reptile"])
def test_a_convolutional_network_with_batch_statistics_is_the_mean_of_a_loop_in_chunks_too(name: str) -> None:
    def build() -> nn.Module:
        block = [nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), nn.ReLU()]
        return nn.Sequential(*block, nn.Flatten(), nn.Linear(12, 3))

    batch = {f"{side}_x": normal(TASKS, 6, 1, 4, 4, seed=k) for k, side in enumerate(("support", "query"))}
    batch |= {f"{side}_y": torch.arange(6).expand(TASKS, 6) % 3 for side in ("support", "query")}
    module = seeded(build)
    method = reptile if name == "reptile" else maml
    learner = method(module, cross_entropy, step=STEP, inner_steps=2, **VARIANTS.get(name, {}))
    mean = sum(flat(estimate(learner, one(batch, k)).grad) for k in range(TASKS)) / TASKS
    assert distance(estimate(learner, batch).grad, mean) <= 1e-10
    parts = hypergradient(
        learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=batch, chunk_size=2
    )
    assert distance(parts.grad, mean) <= 1e-10
    statistics = module[1].running_mean  # type: ignore[index]
    assert isinstance(statistics, Tensor)
    assert not statistics.any()  # the user's module is not written to


def rounded_huber(output: Tensor, target: Tensor) -> Tensor:
    return huber_loss(output, target, delta=0.5)


@pytest.mark.parametrize("loss", [mse_loss, cross_entropy, rounded_huber])
@pytest.mark.parametrize("name", VARIANTS)
def test_padding_changes_nothing(name: str, loss: Any) -> None:
    """Tasks of 6, 4 and 1 support and 5, 3 and 2 query samples: padded and masked against each by itself."""
    batch = classification() if loss is cross_entropy else regression()
    module = network(3 if loss is cross_entropy else 1)
    learner = maml(module, loss, step=STEP, inner_steps=N, **VARIANTS[name])
    sizes = {"support": (6, 4, 1), "query": (5, 3, 2)}
    singles = []
    for k in range(TASKS):
        cut = {
            f"{side}_{part}": one(batch, k)[f"{side}_{part}"][:, : sizes[side][k]] for side in sizes for part in "xy"
        }
        singles.append(estimate(learner, cut))
    padded = {name: leaf.clone() for name, leaf in batch.items()}
    for side, counts in sizes.items():
        width = padded[f"{side}_x"].shape[1]
        padded[f"{side}_mask"] = (torch.arange(width) < torch.tensor(counts)[:, None]).double()
        for k, count in enumerate(counts):
            padded[f"{side}_x"][k, count:] = 7.0
            padded[f"{side}_y"][k, count:] = 2
    found = estimate(learner, padded)
    mean = sum(flat(single.grad) for single in singles) / TASKS
    assert distance(found.grad, mean) <= 1e-10
    unmasked = estimate(learner, {name: leaf for name, leaf in padded.items() if not name.endswith("mask")})
    assert distance(unmasked.grad, mean) > 1e-2


def test_targets_of_one_column_may_be_flat() -> None:
    module, batch = network(), regression()
    learner = maml(module, mse_loss, step=STEP)
    flattened = {name: leaf.squeeze(-1) if name.endswith("y") else leaf for name, leaf in batch.items()}
    assert distance(estimate(learner, flattened).grad, estimate(learner, batch).grad) <= 1e-14


# What a user gets


@pytest.mark.parametrize("loss", [mse_loss, nn.MSELoss(), nn.functional.l1_loss])
@pytest.mark.parametrize(("outputs", "target"), [(1, torch.arange(4)), (2, torch.ones(4, 1)), (2, torch.ones(4))])
def test_targets_that_torch_would_spread_over_the_outputs_are_refused(loss: Any, outputs: int, target: Tensor) -> None:
    with pytest.raises(ValueError, match=r"support_y of a task must have the shape of the outputs, \(4, \d\)"):
        task_loss(loss, torch.zeros(4, outputs), {"support_y": target}, "support")


@pytest.mark.parametrize("loss", [cross_entropy, nn.CrossEntropyLoss(), partial(cross_entropy, label_smoothing=0.1)])
def test_numbers_that_are_no_classes_are_refused(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"query_y of a task must be numbers of classes.*Got torch\.float64 \(3,\)"):
        task_loss(loss, torch.zeros(3, 2), {"query_y": torch.ones(3)}, "query")
    soft = {"query_y": torch.full((3, 2), 0.5)}
    assert float(task_loss(loss, torch.zeros(3, 2), soft, "query")) == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0])),
        nn.CrossEntropyLoss(reduction="sum"),
        partial(cross_entropy, weight=torch.tensor([1.0, 2.0])),
    ],
)
def test_with_masks_a_loss_that_is_no_plain_mean_is_refused_side_by_side_and_right_by_itself(loss: Any) -> None:
    task = {"query_y": torch.tensor([0, 1, 0]), "query_mask": torch.tensor([1.0, 1.0, 0.0])}
    output = torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, -9.0]])
    assert torch.equal(task_loss(loss, output, task, "query"), loss(output[:2], torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="must be a mean over samples, each of the same weight"):
        torch.vmap(lambda output, task: task_loss(loss, output, task, "query"))(
            output.unsqueeze(0), {name: entry.unsqueeze(0) for name, entry in task.items()}
        )


def test_labels_give_log_probabilities_and_numbers_give_outputs() -> None:
    for module, loss, batch in (
        (network(3), cross_entropy, classification()),
        (network(1), mse_loss, regression()),
    ):
        learner = maml(module, loss, step=STEP)
        task = {name: leaf[0] for name, leaf in batch.items()}
        output = module(task["query_x"])
        expected = output.log_softmax(-1) if loss is cross_entropy else output
        assert torch.allclose(learner.predict(learner.x0, learner.x0, task), expected, atol=1e-14)


def test_export_is_the_module_with_what_was_learned_and_the_module_stays() -> None:
    module, batch = network(), regression()
    before = copy.deepcopy(module.state_dict())
    learner = maml(functional(module), mse_loss, step=0.1, inner_steps=1)
    solution = minimize(learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=batch, max_steps=20)
    assert solution.value < 0.9 * solution.history[0].value
    exported = learner.export(solution.x).state_dict()
    assert exported.keys() == before.keys()
    assert all(torch.equal(exported[name], solution.x[name]) for name in before)
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in before)


def test_evaluation_takes_its_own_number_of_steps() -> None:
    learner = maml(network(), mse_loss, inner_steps=1, evaluation_steps=10)
    assert isinstance(learner.adapt, Iterate)
    assert learner.adapt.max_steps == 10
    assert maml(network(), mse_loss, inner_steps=3).adapt == Iterate(GradientDescent(0.01), 3)


@pytest.mark.parametrize("wrong", [{"step": 0.0}, {"step": float("nan")}, {"inner_steps": 0}, {"evaluation_steps": -1}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`maml"):
        maml(network(), mse_loss, **wrong)


# Memory


def held_for_backward(function: Callable[[], object]) -> int:
    """The most bytes of tensors that graphs held for their backward passes at once."""
    held = most = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def let_go(size: int) -> None:
        nonlocal held
        held -= size

    def keep(tensor: Tensor) -> Kept:
        nonlocal held, most
        kept, size = Kept(tensor), tensor.numel() * tensor.element_size()
        weakref.finalize(kept, let_go, size)
        held += size
        most = max(most, held)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        function()
    return most


def sine_network() -> tuple[nn.Module, dict[str, Tensor]]:
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    x = {side: 5 * normal(1, 10, 1, seed=k) for k, side in enumerate(("support", "query"))}
    batch = {f"{side}_x": x[side] for side in x} | {f"{side}_y": x[side].sin() for side in x}
    return net, batch


def test_memory_grows_with_the_steps_unrolled_with_their_root_checkpointed_and_not_at_all_implicitly() -> None:
    net, batch = sine_network()
    proximal = functional(net)

    def g(x: Any, y: Any, task: Any) -> Tensor:
        distances = [(y[name] - x[name]).square().sum() for name in x]
        return mse_loss(proximal(y, task["support_x"]), task["support_y"]) + 2.0 * torch.stack(distances).sum()

    def f(_: Any, y: Any, task: Any) -> Tensor:
        return mse_loss(proximal(y, task["query_x"]), task["query_y"])

    problem = BilevelProblem(f, g, init=lambda x, task: x, tasks=True)

    def implicit(steps: int) -> int:
        aid = AID(Iterate(GradientDescent(0.01), steps), CG(rtol=0.0, max_steps=3))
        start = dict(proximal.params)
        first = hypergradient(problem, start, start, estimator=aid, data=batch, throw=False)
        later = Start(first.y, count=1)  # the first estimate of a run looks at f and g besides
        return held_for_backward(
            lambda: hypergradient(problem, start, start, estimator=aid, data=batch, throw=False, start=later)
        )

    learner = maml(net, mse_loss, step=0.01)

    def unrolled(steps: int, checkpoint: bool) -> Callable[[], Estimate]:
        itd = ITD(Iterate(GradientDescent(0.01), steps), checkpoint=checkpoint)
        later = Start(estimate(learner, batch, estimator=itd).y, count=1)
        return lambda: hypergradient(learner.problem, learner.x0, learner.y0, estimator=itd, data=batch, start=later)

    counts = (1, 2, 4, 8, 16)
    whole = [held_for_backward(unrolled(steps, False)) for steps in counts]
    slope = whole[1] - whole[0]
    assert slope > 20_000
    assert whole == [whole[0] + slope * (steps - 1) for steps in counts]
    assert len({implicit(steps) for steps in counts}) == 1
    graph = [held_for_backward(unrolled(steps, True)) for steps in counts]
    assert set(graph) == {graph[0]}
    assert graph[0] <= whole[0]
    # Besides the graph of one step, 2 sqrt(N) states.
    peaks = [peak_memory(unrolled(steps, True), torch.device("cpu"))[1] for steps in (4, 16, 64)]
    assert (peaks[2] - peaks[1]) / (peaks[1] - peaks[0]) == pytest.approx(2.0, abs=0.2)
    size = flat(learner.x0).numel() * 8
    assert peaks[1] - peaks[0] == pytest.approx(4 * size, rel=0.1)
