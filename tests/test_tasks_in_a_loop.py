"""Tasks one after the other: the numbers of all at once, also for functions that `torch.vmap` cannot take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bilevel_strategies import normal
from cases import distance
from test_tasks import DATA, ESTIMATORS, TASKS, Y0, X, f, g, joined, start
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from bilevel import (
    AID,
    ESJ,
    KKT,
    BilevelProblem,
    Constants,
    FiniteDifference,
    Penalty,
    Split,
    certify,
    check,
    compare,
    hypergradient,
    hyperobjective,
    minimize,
)
from bilevel._numerics.batched import batched, looped
from bilevel.few_shot import evaluate, predict, train
from bilevel.few_shot.adapt import adapt
from bilevel.inner_problems.polytope import Polytope
from bilevel.problems import GaussianPrior, MonteCarlo, PosteriorDescent, ibaml, maml
from bilevel.prox import L1
from bilevel.solvers import CG, LBFGS, GradientDescent, Iterate, ProximalGradient, QuadraticProgram
from bilevel.tasks import AbstractTasks

FEW = ("aid-cg", "itd", "itd-forward", "esj", "penalty", "finite-difference")


def same(a: Any, b: Any, rtol: float) -> None:
    assert a.value == pytest.approx(b.value, rel=1e-11)
    assert distance(a.grad, b.grad) <= rtol
    assert a.status is b.status
    assert [report.statuses for report in a.reports] == [report.statuses for report in b.reports]
    for key in Y0:
        assert torch.allclose(a.y[key], b.y[key], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_loop_gives_the_numbers_of_all_at_once(name: str) -> None:
    estimator, rtol = ESTIMATORS[name]
    init = start if name == "first-order" else None
    together, by_turns = (BilevelProblem(f, g, init=init, tasks=tasks) for tasks in (True, "loop"))
    options: Any = {"estimator": estimator, "data": DATA, "throw": False}
    found = hypergradient(by_turns, X, Y0, **options)
    same(found, hypergradient(together, X, Y0, **options), rtol)
    if name in FEW:
        same(hypergradient(by_turns, X, Y0, chunk_size=2, **options), found, rtol)
        split: Any = {**options, "data": Split(f=DATA, g=DATA)}
        same(hypergradient(by_turns, X, Y0, **split), found, rtol)


@pytest.mark.parametrize("name", FEW)
def test_starts_and_encodings_of_x_in_a_loop(name: str) -> None:
    estimator, rtol = ESTIMATORS[name]

    def encode(x: Any, task: Any) -> Any:
        return {"a": x["a"] * task["t"], "b": x["b"].exp()}

    found = [
        hypergradient(
            BilevelProblem(f, g, init=start, encode=encode, tasks=tasks),
            X,
            Y0,
            estimator=estimator,
            data=DATA,
            throw=False,
        )
        for tasks in ("loop", True)
    ]
    same(found[0], found[1], rtol)


# What `torch.vmap` cannot take


def item(q: Tensor, t: Tensor) -> Any:
    return t.abs().sum().item() * q.square().sum()


def branch(q: Tensor, t: Tensor) -> Tensor:
    return q.square().sum() if t.sum() > 0 else 2 * q.square().sum()


def asserting(q: Tensor, t: Tensor) -> Tensor:
    assert bool(t.isfinite().all())
    return q.square().sum()


def masked(q: Tensor, t: Tensor) -> Tensor:
    return (q[t > 0] - 1).square().sum()


def listed(q: Tensor, t: Tensor) -> Any:
    return q.square().sum() * sum(abs(number) for number in t.tolist())


def array(q: Tensor, t: Tensor) -> Tensor:
    return q.square().sum() * float(abs(t.numpy()).sum())


@pytest.mark.parametrize(
    ("extra", "few"),
    [
        (item, FEW[:2]),
        (branch, FEW[2:4]),
        (asserting, FEW[4:]),
        (masked, FEW[:1]),
        (listed, FEW[1:2]),
        (array, FEW[3:4]),
    ],
)
def test_what_vmap_cannot_take_names_the_loop_which_is_the_mean_of_single_problems(
    extra: Callable[[Tensor, Tensor], Any], few: tuple[str, ...]
) -> None:
    def own(x: Any, y: Any, task: Any) -> Tensor:
        value: Tensor = g(x, y, task) + extra(joined(y), task["t"])
        return value

    for name in few:
        estimator, rtol = ESTIMATORS[name]
        with pytest.raises(ValueError, match=r"`torch\.vmap`.*Write `BilevelProblem\(\.\.\., tasks='loop'\)`"):
            hypergradient(BilevelProblem(f, own, tasks=True), X, Y0, estimator=estimator, data=DATA)
        found = hypergradient(BilevelProblem(f, own, tasks="loop"), X, Y0, estimator=estimator, data=DATA, throw=False)
        tasks = [{key: table[k] for key, table in DATA.items()} for k in range(TASKS)]
        single = [
            hypergradient(BilevelProblem(f, own), X, Y0, estimator=estimator, data=task, throw=False) for task in tasks
        ]
        mean = {key: sum(each.grad[key] for each in single) / TASKS for key in X}
        assert distance(found.grad, mean) <= 10 * rtol


@pytest.mark.parametrize(
    "estimator", [ESJ(Iterate(GradientDescent(0.1), 6), directions=3, radius=1e-2), FiniteDifference(LBFGS(1e-12))]
)
def test_directions_fall_back_to_a_loop_where_vmap_cannot_take_f_or_g(estimator: Any) -> None:
    task = {key: table[0] for key, table in DATA.items()}

    def scale(y: Any) -> float:
        return 1.0 if bool(joined(y).isfinite().all()) else 0.0

    plain = BilevelProblem(f, g)
    stubborn = BilevelProblem(lambda x, y, d: scale(y) * f(x, y, d), lambda x, y, d: scale(y) * g(x, y, d))
    a, b = (hypergradient(problem, X, Y0, estimator=estimator, data=task) for problem in (stubborn, plain))
    assert distance(a.grad, b.grad) <= 1e-9
    assert a.stats == b.stats


def test_random_numbers_are_the_same_for_every_problem_of_a_loop() -> None:
    def noisy(y: Tensor) -> Tensor:
        return y * torch.rand(3) + torch.rand(())

    found = []
    for each in (batched, looped):
        torch.manual_seed(1)
        found += [each(noisy, 4, (0,))(torch.ones(4, 3)), torch.rand(())]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert torch.equal(found[2][0], found[2][3])


def test_errors_of_ones_own_stay_what_they_are() -> None:
    def wrong(x: Any, y: Any, task: Any) -> Tensor:
        return (joined(y) @ torch.zeros(7, dtype=torch.float64)).sum()

    def raising(x: Any, y: Any, task: Any) -> Tensor:
        raise KeyError("mine")

    for tasks in (True, "loop"):
        with pytest.raises(ValueError, match="size"):  # which torch says of what did not fit
            hypergradient(BilevelProblem(f, wrong, tasks=tasks), X, Y0, data=DATA)
        with pytest.raises(KeyError, match="mine"):
            hypergradient(BilevelProblem(f, raising, tasks=tasks), X, Y0, data=DATA)


@pytest.mark.parametrize("tasks", [True, "loop"])
def test_a_start_of_all_tasks_is_named(tasks: Any) -> None:
    stacked = {key: torch.stack([leaf] * TASKS) for key, leaf in Y0.items()}
    with pytest.raises(ValueError, match=r"`y0` must be the start of one task.*the number of tasks, 3"):
        hypergradient(BilevelProblem(f, g, tasks=tasks), X, stacked, data=DATA)


@pytest.mark.parametrize("tasks", ["no", "", "LOOP", 1, 0, None, torch.tensor(True), ["loop"]])
def test_a_way_to_treat_tasks_that_there_is_not_is_refused(tasks: Any) -> None:
    with pytest.raises(ValueError, match=r"`BilevelProblem\(tasks=\.\.\.\)` must be True .*, \"loop\" .* or False"):
        BilevelProblem(f, g, tasks=tasks)

    class Own(BilevelProblem):
        def f(self, x: Any, y: Any, *data: Any) -> Tensor:
            return f(x, y, *data)

        def g(self, x: Any, y: Any, *data: Any) -> Tensor:
            return g(x, y, *data)

    own = Own.__new__(Own)
    own.tasks = tasks
    with pytest.raises(ValueError, match=r"`Own\(tasks=\.\.\.\)` must be True"):
        hypergradient(own, X, Y0, data=DATA)
    assert "tasks='loop'" in repr(BilevelProblem(f, g, tasks="loop"))


# Kinds of inner problem, and entry points

A = normal(TASKS, 3, seed=4)


def near(x: Tensor, y: Tensor, task: Tensor) -> Tensor:
    return (y - x * task).square().sum() / 2 + 0.1 * y[0] * y[1]


def stubborn(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def own(x: Tensor, y: Tensor, task: Tensor) -> Tensor:
        assert bool(task.isfinite().all())
        return function(x, y, task)

    return own


@pytest.mark.parametrize(
    ("kind", "estimator"),
    [
        (
            {"constraints": lambda x, task: Polytope(lower=task.clamp(max=0.3) * x.exp().mean())},
            KKT(QuadraticProgram()),
        ),
        (
            {"prox": lambda x, task: L1(0.1 * x.exp().mean())},
            AID(ProximalGradient(max_steps=2000, tol=1e-13), CG(1e-12)),
        ),
    ],
)
def test_constraints_and_prox_terms_in_a_loop(kind: dict[str, Any], estimator: Any) -> None:
    x, y0 = normal(3, seed=5), torch.zeros(3, dtype=torch.float64)
    outer = lambda x, y, task: (y - 1).square().sum()  # noqa: E731
    together = BilevelProblem(outer, near, tasks=True, **kind)
    by_turns = BilevelProblem(stubborn(outer), stubborn(near), tasks="loop", **kind)
    a, b = (hypergradient(p, x, y0, estimator=estimator, data=A, throw=False) for p in (by_turns, together))
    assert distance(a.grad, b.grad) <= 1e-10 and a.status is b.status


def test_every_entry_point_takes_a_loop() -> None:
    x, y0 = normal(3, seed=5), torch.zeros(3, dtype=torch.float64)
    outer = lambda x, y, task: (y - 1).square().sum() + x.square().sum()  # noqa: E731
    by_turns = BilevelProblem(stubborn(outer), stubborn(near), tasks="loop")
    together = BilevelProblem(outer, near, tasks=True)
    runs = [minimize(p, x, y0, data=A, outer=GradientDescent(0.1), max_steps=5) for p in (by_turns, together)]
    assert distance(runs[0].x, runs[1].x) <= 1e-9
    leaf = x.clone().requires_grad_()
    phis = [hyperobjective(p, y0) for p in (by_turns, together)]
    grads = [torch.autograd.grad(phi(leaf, data=A), leaf)[0] for phi in phis]
    assert distance(grads[0], grads[1]) <= 1e-9
    known = Constants(mu=0.9, L=1.1, L_fyy=2.0, L_fxy=0.0, M_yy=0.0, M_xy=0.0)
    bounds = []
    for p in (by_turns, together):
        estimate = hypergradient(p, x, y0, estimator=Penalty(LBFGS(1e-10), weight=50.0), data=A)
        bounds.append(certify(p, x, estimate, known, data=A).bound)
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-6)
    checks = [check(p, x, y0, data=A) for p in (by_turns, together)]
    assert checks[0].ok and checks[0].estimators == checks[1].estimators
    rows = [compare(p, x, y0, data=A, estimators=["aid-cg", "itd", "esj"]) for p in (by_turns, together)]
    assert str(rows[0]).count("aid-cg") == str(rows[1]).count("aid-cg")
    with pytest.raises(ValueError, match="tasks='loop'"):
        minimize(BilevelProblem(outer, stubborn(near), tasks=True), x, y0, data=A)


# Few-shot learning


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory, self.head = nn.LSTM(1, 2, batch_first=True), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.head(self.memory(x.unsqueeze(-1))[0][:, -1])
        return value


class Sums(AbstractTasks):
    def sample(self, count: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 5, 3, generator=generator)
        y = x.sum(-1, keepdim=True)
        return {"support_x": x[:, :3], "support_y": y[:, :3], "query_x": x[:, 3:], "query_y": y[:, 3:]}


def test_recurrent_modules_are_learned_one_task_after_the_other() -> None:
    torch.manual_seed(0)
    learner = maml(Reader(), mse_loss, step=0.1)
    by_turns = learner.looped()
    for refused in (
        lambda: train(learner, Sums(), max_steps=1, batch=2),
        lambda: evaluate(learner, learner.x0, Sums(), episodes=2),
        lambda: predict(learner, learner.x0, adapt(by_turns, by_turns.x0, Sums().sample(2, 0))),
    ):
        with pytest.raises(ValueError, match=r"learner\.looped\(\)"):
            refused()
    trained = train(by_turns, Sums(), max_steps=2, batch=2)
    assert trained.ended == "max_steps" and not trained.failed
    found = evaluate(by_turns, trained.x, Sums(), episodes=4, batch=2)
    alone = [evaluate(by_turns, trained.x, Sums(), episodes=2, batch=2).scores]
    assert torch.equal(found.scores[:2], alone[0])


def test_recurrent_modules_with_a_posterior_draw_one_after_the_other() -> None:
    torch.manual_seed(0)
    module, prior, descent = Reader(), GaussianPrior(kl_weight=0.1, log_variance=-3.0), PosteriorDescent(1, 0.1)
    given: Any = {"prior": prior, "inner": descent}
    together = ibaml(module, mse_loss, draws=MonteCarlo(2, 2), **given)
    with pytest.raises(ValueError, match=r"`draws=MonteCarlo\(\.\.\., loop=True\)`"):
        train(together, Sums(), max_steps=1, batch=2)
    by_turns = ibaml(module, mse_loss, draws=MonteCarlo(2, 2, loop=True), **given)
    assert train(by_turns, Sums(), max_steps=1, batch=2).ended == "max_steps"
    assert evaluate(by_turns, by_turns.x0, Sums(), episodes=2).episodes == 2
    plain = nn.Linear(3, 1)
    both = [ibaml(plain, mse_loss, draws=MonteCarlo(2, 2, loop=loop), **given) for loop in (False, True)]
    runs = [train(each, Sums(), max_steps=2, batch=2).x for each in both]
    assert distance(runs[0]["mean"], runs[1]["mean"]) <= 1e-5
