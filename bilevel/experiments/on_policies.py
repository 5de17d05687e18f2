"""Experiments with policies: bandits, a point that looks for a goal, and fixed data of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from bilevel._tree import Tree
from bilevel.few_shot.adapt import adapt
from bilevel.few_shot.experiment import Experiment, NamedExperiment, Paths
from bilevel.few_shot.learner import Learner
from bilevel.few_shot.options import OuterLoop, Validating
from bilevel.few_shot.training import Evaluating, Training
from bilevel.reinforcement.bandit import GaussianBandit
from bilevel.reinforcement.baseline import Advantages
from bilevel.reinforcement.categorical import CategoricalPolicy
from bilevel.reinforcement.dice import DiCE
from bilevel.reinforcement.environment import AbstractEnvironment
from bilevel.reinforcement.gaussian import GaussianPolicy
from bilevel.reinforcement.low_variance import LowVarianceCurvature, ScoreFunction
from bilevel.reinforcement.meta_policy import MetaPolicy, Objective
from bilevel.reinforcement.navigation import Navigation
from bilevel.reinforcement.offline import ImportanceWeighted, OfflinePolicy
from bilevel.reinforcement.offline_tasks import OfflineTasks, collect
from bilevel.reinforcement.policy import AbstractPolicy, Params
from bilevel.reinforcement.surrogate import AbstractSurrogate
from bilevel.reinforcement.tasks import BanditTasks, GoalTasks
from bilevel.reinforcement.trajectories import rollout
from bilevel.reinforcement.trust_region import TrustRegion
from bilevel.solvers.adam import Adam
from bilevel.solvers.clipped import Clipped
from bilevel.solvers.own_steps import OwnSteps
from bilevel.tasks.source import AbstractTasks

_SHOWN = 5  # tasks with a path in the picture
_GOAL_SEED = 1  # of the tasks that fixed data are of
_DATA_SEED = 2


def maml_bandits(
    arms: int = 5,
    batch: int = 40,
    objective: Objective = "expected",
    step: float = 1.0,
    inner_steps: int = 1,
    episodes: int = 20,
    first_order: bool = False,
    seed: int = 0,
) -> Experiment:
    """Bandits whose means are drawn anew: which arm to take after `episodes` pulls and a policy gradient."""
    made = _seeded(lambda: nn.Linear(1, arms, bias=False), seed)
    meta = MetaPolicy(
        CategoricalPolicy(made),
        GaussianBandit(arms),
        objective=objective,
        step=step,
        inner_steps=inner_steps,
        evaluation_steps=max(3, inner_steps),
        episodes=episodes,
        inner=DiCE(1.0) if objective == "expected" else ScoreFunction(Advantages(1.0)),
        outer=ScoreFunction(Advantages(1.0)),
        first_order=first_order,
        learn_steps=True,
    )
    tasks = BanditTasks(arms)
    return _experiment(
        meta.learner(), tasks, f"bandits of {arms} arms", Training(300, batch, Adam(0.05)), 100, inner_steps
    )


def maml_navigation(
    horizon: int = 50,
    batch: int = 20,
    objective: Objective = "expected",
    step: float = 1e-4,
    inner_steps: int = 1,
    episodes: int = 20,
    hidden: int = 64,
    first_order: bool = False,
    curvature: Literal["low-variance", "dice"] = "low-variance",
    outer: Literal["trust-region", "adam"] = "trust-region",
    rate: float = 0.003,
    delta: float = 0.01,
    seed: int = 0,
) -> Experiment:
    """A point that finds a goal it does not see after `episodes` tries; `inner_steps=0` is joint training."""
    environment, advantages = Navigation(horizon), Advantages(0.99, 0.97)
    unbiased: AbstractSurrogate = DiCE(0.99) if curvature == "dice" else LowVarianceCurvature(advantages)
    meta = MetaPolicy(
        _walker(hidden, -1.5, seed),
        environment,
        objective=objective,
        step=step,
        inner_steps=inner_steps,
        evaluation_steps=max(3, inner_steps),
        episodes=episodes,
        inner=unbiased if objective == "expected" else ScoreFunction(advantages),
        outer=ScoreFunction(advantages),
        first_order=first_order,
        learn_steps=True,
    )
    loop = OuterLoop(Clipped(Adam(rate), 10.0))
    if outer == "trust-region":
        loop = OuterLoop(algorithm=TrustRegion(meta, delta=delta))
    learner, tasks = meta.learner(), GoalTasks()

    def paths(x: Tree, seed: int) -> Paths:
        batch = tasks.sample(_SHOWN, seed)
        return _paths(learner, environment, meta.policy, x, batch, meta.params_of(x), "policy")

    return _experiment(learner, tasks, "2-D navigation", Training(25, batch, loop), 10, inner_steps, paths=paths)


def offline_navigation(
    horizon: int = 10,
    batch: int = 30,
    step: float = 1e-3,
    episodes: int = 40,
    training_tasks: int = 300,
    clip: float = 5.0,
    regularization: float = 0.3,
    hidden: int = 32,
    rate: float = 0.02,
    seed: int = 0,
) -> Experiment:
    """The same from fixed episodes of a random walk: nothing is tried in training."""
    environment, policy = Navigation(horizon), _walker(hidden, math.log(0.15), seed)
    offline = OfflinePolicy(
        policy,
        environment,
        step=step,
        surrogate=ImportanceWeighted(0.99, clip, cumulative=False),
        regularization=regularization,
        learn_steps=True,
    )

    def walked(count: int, number: int) -> OfflineTasks:
        goals = GoalTasks().sample(count, seed + _GOAL_SEED + 10 * number)
        return collect(environment, policy, policy.params, goals, episodes=episodes, seed=seed + _DATA_SEED + number)

    learner, test = offline.learner(), walked(100, 2)

    def paths(x: Tree, seed: int) -> Paths:
        return _paths(learner, environment, policy, x, test.sample(_SHOWN, seed), offline.init(x, None), None)

    def numbers(x: Tree, seed: int) -> dict[str, float]:
        try:
            found = offline.coverage(x, test.sample(test.count, seed))
        except ValueError:  # it names a task of no coverage
            return {"effective share at x": 0.0}
        return {
            "effective share at x": float(found.before.mean()),
            "effective share after": float(found.after.mean()),
            "least of a task": float(found.after.min()),
            "weights clipped": float(found.clipped.mean()),
        }

    return _experiment(
        learner,
        walked(training_tasks, 0),
        "2-D navigation from fixed data",
        Training(200, batch, Clipped(Adam(rate), 10.0)),
        25,
        1,
        others=(walked(50, 1), test),
        numbers=numbers,
        paths=paths,
    )


def _walker(hidden: int, log_std: float, seed: int) -> GaussianPolicy:
    """A policy that walks at random at first."""

    def build() -> nn.Module:
        last = nn.Linear(hidden, 2)
        with torch.no_grad():
            last.weight.mul_(0.1)
            last.bias.zero_()
        return nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), last)

    return GaussianPolicy(_seeded(build, seed), 2, log_std)


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A module whose start depends on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _experiment(
    learner: Learner,
    tasks: AbstractTasks,
    description: str,
    training: Training,
    every: int,
    inner_steps: int,
    *,
    others: tuple[AbstractTasks, AbstractTasks] | None = None,
    numbers: Callable[[Tree, int], Mapping[str, float]] | None = None,
    paths: Callable[[Tree, int], Paths] | None = None,
) -> Experiment:
    if others is None:  # there is noise for more steps, but those of training are the score
        learner = replace(learner, adapt=OwnSteps(inner_steps))
    validation, test = (tasks, tasks) if others is None else others
    curve = (0, 1, 2, 3) if inner_steps and others is None else ()
    return Experiment(
        learner,
        tasks=tasks,
        validation=Validating(validation, every=every, episodes=40 if others is None else 50),
        test=test,
        description=f"{learner.name}: {description}",
        settings=training,
        evaluation=Evaluating(episodes=100, batch=25, curve=curve),
        numbers=numbers,
        paths=paths,
    )


def _paths(
    learner: Learner,
    environment: AbstractEnvironment,
    policy: AbstractPolicy,
    x: Tree,
    batch: dict[str, Tensor],
    before: Params,
    entry: str | None,
) -> Paths:
    """One path in each task, by x and by what it adapts to."""
    found = adapt(learner, x, batch).y
    after: Params = found if entry is None else found[entry]
    like = next(iter(before.values()))
    generator = torch.Generator().manual_seed(0)
    shape = (_SHOWN, 1, environment.horizon, policy.noise + environment.step_noise)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(like)
    task = {name: value.to(like) for name, value in batch.items() if name == "goal"}
    start = like.new_zeros(_SHOWN, 1, environment.start_noise)

    def walk(params: Params, task: dict[str, Tensor], start: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        made = rollout(environment, policy, params, task, start, noise)
        return made.observations[0], made.alive[0]

    def lines(params: Params, dims: int | None) -> list[list[list[float]]]:
        seen, alive = torch.vmap(walk, in_dims=(dims, 0, 0, 0))(params, task, start, noise)
        return [points[on > 0].tolist() for points, on in zip(seen, alive, strict=True)]

    return Paths(task["goal"].tolist(), lines(before, None), lines(after, 0))


POLICIES = (
    NamedExperiment("maml-bandits", "MAML over policy gradients: bandits of five arms", maml_bandits),
    NamedExperiment("maml-navigation", "the same: a point that finds a goal it does not see", maml_navigation),
    NamedExperiment("offline-navigation", "the same from fixed episodes of a random walk", offline_navigation),
)
