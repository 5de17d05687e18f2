"""Tasks of different sizes in one batch: each has the values that it has by itself, or the batch is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bilevel_strategies import normal
from cases import distance
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from bilevel import ITD, BilevelProblem, Estimate, Split, check, hypergradient
from bilevel.few_shot import Learner, adapt, evaluate, predict, train
from bilevel.few_shot.training_run import TrainingBatches
from bilevel.inner_problems.iteration import Iteration
from bilevel.modules.functional import functional
from bilevel.problems import (
    GaussianPrior,
    MonteCarlo,
    OuterObjective,
    PosteriorDescent,
    abml,
    anil,
    ibaml,
    ibaml_head,
    imaml,
    maml,
    proto_net,
    reptile,
    ridge_head,
    shared_embedding,
)
from bilevel.solvers.own_steps import OwnSteps
from bilevel.tasks import AbstractTasks, batches, pad

Loss = Callable[[Tensor, Tensor], Tensor]
WEIGHTS = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)
SIZES = ((4, 3), (9, 5), (6, 8))


def task(support: int, query: int, seed: int, classes: int = 3) -> dict[str, Tensor]:
    x = normal(support + query, 2, seed=seed)
    y = torch.arange(support + query) % classes
    return {"support_x": x[:support], "support_y": y[:support], "query_x": x[support:], "query_y": y[support:]}


def alone(task: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: entry.unsqueeze(0) for name, entry in task.items()}


TASKS = [task(*sizes, seed=k) for k, sizes in enumerate(SIZES)]
PADDED = pad(TASKS)


def weighted(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output, target, weight=WEIGHTS)


def body(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), *layers, nn.Tanh()).double()


def whole(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(body(*layers), nn.Linear(4, 3).double())


class Centered(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def normalized() -> nn.Module:
    return nn.BatchNorm1d(4).double()


DRAWS = MonteCarlo(2, 2)
DESCENT = PosteriorDescent(steps=2, step=0.1)
PRIOR = GaussianPrior(kl_weight=0.1, log_variance=-3.0)
EXPECTED = OuterObjective()
PREDICTIVE = OuterObjective("predictive")

LEARNERS: dict[str, Callable[[Loss, nn.Module], Learner]] = {
    "maml": lambda loss, layer: maml(whole(layer), loss, step=0.1, inner_steps=2),
    "meta-sgd": lambda loss, layer: maml(whole(layer), loss, step=0.1, inner_steps=2, learn_steps=True),
    "reptile": lambda loss, layer: reptile(whole(layer), loss, step=0.1, inner_steps=2),
    "anil": lambda loss, layer: anil(body(layer), nn.Linear(4, 3).double(), loss, inner_steps=2),
    "imaml": lambda loss, layer: imaml(whole(layer), loss, step=0.1, inner_steps=3),
    "embedding": lambda loss, layer: shared_embedding(body(layer), nn.Linear(4, 3).double(), loss),
    "ibaml": lambda loss, layer: ibaml(whole(layer), loss, prior=PRIOR, draws=DRAWS, inner=DESCENT),
    "ibaml-head": lambda loss, layer: ibaml_head(
        body(layer), nn.Linear(4, 3).double(), loss, prior=PRIOR, draws=DRAWS, inner=DESCENT
    ),
    "abml": lambda loss, layer: abml(whole(layer), loss, prior=PRIOR, draws=DRAWS, inner=DESCENT),
    "proto": lambda _, layer: proto_net(body(layer), 4, 3),
    "ridge": lambda _, layer: ridge_head(body(layer), 4, 3),
}
SEES = [name for name in LEARNERS if name not in ("proto", "ridge")]  # the loss that is given


def estimate(learner: Learner, batch: Any, seed: int = 0) -> Estimate:
    if learner.prepare is not None and "support_noise" not in batch:
        batch = learner.prepare(batch, seed)
    return hypergradient(learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=batch, throw=False)


def loop(learner: Learner) -> Any:
    """The mean of the estimates of the tasks, each by itself and without padding."""
    noise = {} if learner.prepare is None else learner.prepare(PADDED, 0)
    found = []
    for k, own in enumerate(TASKS):
        drawn = {name: noise[name][k : k + 1] for name in ("support_noise", "query_noise") if name in noise}
        found.append(estimate(learner, {**alone(own), **drawn}))
    flat = [torch.cat([leaf.reshape(-1) for leaf in leaves(each.grad)]) for each in found]
    return torch.stack(flat).mean(0), sum(each.value for each in found) / len(found)


def leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, dict):
        return [leaf for key in tree for leaf in leaves(tree[key])]
    return [tree]


def assert_is_the_loop(learner: Learner, found: Estimate, unpadded: Learner | None = None) -> None:
    grad, value = loop(learner if unpadded is None else unpadded)
    assert distance(torch.cat([leaf.reshape(-1) for leaf in leaves(found.grad)]), grad) < 1e-10
    assert found.value == pytest.approx(value, rel=1e-11)


@pytest.mark.parametrize(
    ("name", "layer"), [*((name, normalized) for name in LEARNERS), ("maml", Centered), ("ibaml-head", Centered)]
)
def test_what_mixes_the_examples_of_a_task_is_refused_with_padding_and_right_one_task_at_a_time(
    name: str, layer: Callable[[], nn.Module]
) -> None:
    learner = LEARNERS[name](cross_entropy, layer())
    with pytest.raises(ValueError, match=r"sees rows whose mask is 0.*learner\.looped\(\)"):
        estimate(learner, PADDED)
    assert_is_the_loop(learner, estimate(learner.looped(), PADDED))


@pytest.mark.parametrize("name", SEES)
def test_a_loss_that_weighs_classes_is_refused_with_padding_and_right_one_task_at_a_time(name: str) -> None:
    learner = LEARNERS[name](weighted, nn.Identity())
    with pytest.raises(ValueError, match=r"is not the mean over its samples.*learner\.looped\(\)"):
        estimate(learner, PADDED)
    assert_is_the_loop(learner, estimate(learner.looped(), PADDED))


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(weight=WEIGHTS), nn.CrossEntropyLoss(reduction="sum")])
def test_torchs_own_losses_with_settings_are_refused_by_name_and_right_one_task_at_a_time(loss: Loss) -> None:
    learner = LEARNERS["maml"](loss, nn.Identity())
    with pytest.raises(ValueError, match="each of the same weight"):
        estimate(learner, PADDED)
    assert_is_the_loop(learner, estimate(learner.looped(), PADDED))


@pytest.mark.parametrize(("name", "looped"), [*((name, False) for name in LEARNERS), ("anil", True), ("ibaml", True)])
def test_padding_of_sound_modules_changes_nothing(name: str, looped: bool) -> None:
    learner = LEARNERS[name](lambda o, t: cross_entropy(o, t), nn.LayerNorm(4).double())
    assert_is_the_loop(learner, estimate(learner.looped() if looped else learner, PADDED))


def test_dropout_and_frozen_statistics_are_no_reason_to_refuse() -> None:
    for layers in ((nn.Dropout(0.5),), (nn.Dropout(0.3), nn.Linear(4, 4), nn.Dropout(0.3))):
        estimate(maml(whole(*layers).double(), cross_entropy, step=0.1), PADDED)
    frozen = functional(whole(normalized()), batch_norm="frozen")
    learner = maml(frozen, cross_entropy, step=0.1)
    assert_is_the_loop(learner, estimate(learner, PADDED))


def test_tasks_of_one_size_are_not_looked_at() -> None:
    same = [task(4, 4, seed=k) for k in range(2)]
    learner = LEARNERS["maml"](weighted, normalized())
    found = estimate(learner, {name: torch.stack([each[name] for each in same]) for name in same[0]})
    whole = estimate(LEARNERS["maml"](cross_entropy, normalized()), pad(same))  # masks of ones
    assert found.status.ok and whole.status.ok


def own(normalize: Callable[[Tensor, Tensor], Tensor], tasks: Any = True) -> BilevelProblem:
    """Weighted least squares, written by hand: the mask weighs, and `normalize` divides."""

    def loss(y: Tensor, task: Any, side: str) -> Tensor:
        errors = (task[f"{side}_x"] @ y - task[f"{side}_y"]).square()
        return normalize(errors, task[f"{side}_mask"])

    return BilevelProblem(
        lambda x, y, task: loss(y, task, "query"),
        lambda x, y, task: loss(y, task, "support") + (y - x).square().sum(),
        tasks=tasks,
    )


@pytest.mark.parametrize("tasks", [True, "loop"])
def test_a_problem_of_ones_own_may_weigh_by_masks_as_it_likes_and_not_see_the_padding(tasks: Any) -> None:
    x, y0 = normal(2, seed=1), torch.zeros(2, dtype=torch.float64)
    for sound in (lambda e, m: (e * m).sum() / m.sum(), lambda e, m: (e * m).sum(), lambda e, m: (e * m).mean()):
        assert hypergradient(own(sound, tasks), x, y0, data=PADDED).status.ok
    both = Split(f=PADDED, g=PADDED)
    for blind in (lambda e, _: e.mean(), lambda e, m: ((e - e.mean()) * m).sum().square()):
        for data in (PADDED, both):
            with pytest.raises(ValueError, match=r"changes by .* % with what is in the padding"):
                hypergradient(own(blind, tasks), x, y0, data=data)
        found = check(own(blind, tasks), x, y0, data=PADDED)
        assert not found.ok and "what is in the padding" in " ".join(str(found).split())
    assert check(own(lambda e, m: (e * m).sum() / m.sum(), tasks), x, y0, data=PADDED).ok


def test_dual_variables_of_padded_examples_are_no_leak() -> None:
    """Kernel ridge, y one number an example; those of padding stay zero, wherever their inputs are."""

    def kernel(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return (-(a.unsqueeze(-2) - b).square().sum(-1) * x.exp()).exp()

    def inner(x: Tensor, y: Tensor, task: Any) -> Any:
        m, K = task["support_mask"], kernel(task["support_x"], task["support_x"], x)
        K = m.unsqueeze(1) * K * m
        return (y @ K @ y + y @ y) / 2 - (m * task["support_y"] * y).sum()

    def outer(x: Tensor, y: Tensor, task: Any) -> Any:
        errors = kernel(task["query_x"], task["support_x"], x) @ y - task["query_y"]
        return (task["query_mask"] * errors.square()).sum()

    x, y0 = torch.tensor(0.1, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    assert hypergradient(BilevelProblem(outer, inner, tasks=True), x, y0, data=PADDED).status.ok


def test_iterations_without_an_objective_may_be_padded() -> None:
    def step(x: Tensor, y: Tensor, k: int, task: Any) -> Any:
        return y + 0.1 * (x - y) * task["support_mask"].mean()

    problem = BilevelProblem(own(lambda e, m: (e * m).sum()).f, inner=Iteration(step, steps=3), tasks=True)
    x, y0 = normal(2, seed=1), torch.zeros(2, dtype=torch.float64)
    assert hypergradient(problem, x, y0, estimator=ITD(OwnSteps()), data=PADDED).status.ok


def test_padding_by_copies_of_the_examples_hides_nothing() -> None:
    single = {name: entry[:1].expand(3, *entry.shape[1:]) for name, entry in TASKS[1].items()}
    masks = {f"{side}_mask": torch.tensor([[1.0, 0.0, 0.0]]) for side in ("support", "query")}
    x, y0 = normal(2, seed=1), torch.zeros(2, dtype=torch.float64)
    for blind in (lambda e, _: e.mean(), lambda e, m: (e * m).sum() + e.std()):
        with pytest.raises(ValueError, match="with what is in the padding"):
            hypergradient(own(blind), x, y0, data={**alone(single), **masks})


class Ragged(AbstractTasks):
    """Tasks of different sizes from the second batch on."""

    def __init__(self) -> None:
        self.batches = 0

    def sample(self, count: int, seed: int) -> dict[str, Tensor]:
        self.batches += 1
        return pad([task(4, 3 if self.batches == 1 else 3 + k, seed=seed % 1000 + k) for k in range(count)])


def test_padding_is_looked_at_where_it_first_comes_in_training_and_in_evaluation() -> None:
    learner = LEARNERS["maml"](cross_entropy, normalized())
    with pytest.raises(ValueError, match="sees rows whose mask is 0"):
        train(learner, Ragged(), max_steps=3, batch=2)
    with pytest.raises(ValueError, match="sees rows whose mask is 0"):
        evaluate(learner, learner.x0, Ragged(), episodes=4, batch=2)
    with pytest.raises(ValueError, match="sees rows whose mask is 0"):
        adapt(learner, learner.x0, PADDED)
    looped = learner.looped()
    data = TrainingBatches(looped, batches(Ragged(), 2, 0), 0)
    for step in range(4):
        data(step)
    assert data.looked_at == [1]  # the first that has any, and no other
    assert train(looped, Ragged(), max_steps=2, batch=2).ended == "max_steps"
    assert evaluate(looped, looped.x0, Ragged(), episodes=4, batch=2).episodes == 4


@pytest.mark.parametrize("name", ["maml", "anil", "ibaml-head", "proto", "ridge"])
def test_predictions_of_padded_tasks_are_those_of_each_by_itself_one_at_a_time(name: str) -> None:
    learner = LEARNERS[name](weighted, normalized())
    padded = predict(learner.looped(), learner.x0, adapt(learner.looped(), learner.x0, PADDED))
    noise = {} if learner.prepare is None else learner.prepare(PADDED, 0)
    for k, single in enumerate(TASKS):
        drawn = {key: noise[key][k : k + 1] for key in ("support_noise", "query_noise") if key in noise}
        batch = {**alone(single), **drawn}
        found = predict(learner, learner.x0, adapt(replace(learner, prepare=None), learner.x0, batch))[0]
        assert torch.allclose(padded[k, : len(found)], found, rtol=0, atol=1e-12)


def test_a_regression_loss_that_is_no_mean_is_seen() -> None:
    def root(output: Tensor, target: Tensor) -> Tensor:
        return mse_loss(output, target).sqrt()

    batch = {**PADDED, "support_y": PADDED["support_x"][..., :1], "query_y": PADDED["query_x"][..., :1]}
    torch.manual_seed(0)
    learner = maml(nn.Linear(2, 1).double(), root, step=0.1)
    with pytest.raises(ValueError, match="is not the mean over its samples"):
        estimate(learner, batch)
    assert estimate(learner.looped(), batch).status.ok
