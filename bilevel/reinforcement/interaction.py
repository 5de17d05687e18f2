"""Outer steps on episodes that are collected as x moves: for environments that are no functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._apply import apply_estimator
from bilevel._estimate import FlatStart
from bilevel._flat import FlatProblem
from bilevel._optimizer import AbstractOptimizer, OptimizerState, demand_numbers
from bilevel._tree import Tree
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.oracle import Oracle
from bilevel.arguments.fits import demand_types
from bilevel.few_shot.adapt import adapt
from bilevel.reinforcement.offline import OfflinePolicy
from bilevel.reinforcement.policy import Params
from bilevel.reinforcement.trajectories import Trajectories
from bilevel.requirements.properties import Property
from bilevel.tasks._random import seed_of_step

Collect = Callable[[dict[str, Tensor], Params, int], Trajectories]


@final
@dataclass(frozen=True, eq=False)
class InteractionState:
    """Where a run is.

    Attributes:
        x: the policy `(p,)`.
        y: what inner steps start from `(q,)`, for its structure.
        memory: the optimizer's state.
    """

    x: Tensor
    y: Tensor
    memory: OptimizerState


@final
@dataclass(frozen=True, eq=False)
class Interaction(AbstractAlgorithm[InteractionState]):
    """x <- step(x, h), h from episodes of x, and of what x adapts to, that are collected at each step in each task.

    With these episodes as data the problem is that of `OfflinePolicy`, whose weights are 1 where the episodes come
    from; a `clip` then changes no value, and `regularization=0` is the plain objective. Episodes are collected by a
    function of yours, such as one that calls `vector_episodes`; from equal seeds it is to give equal ones, and a run is
    then resumed to the same bits. The data of a run are tasks: a batch of what the function is given.

    Cost of a step: two collections in each task, one hypergradient by ITD.

    Args:
        policy: the problem.
        collect: (task, parameters, seed) -> episodes; the task is one row of the batch.
        outer: the optimizer of x.
        seed: of all episodes.

    Raises:
        ValueError: if the optimizer's step size is left open.

    Example:
        >>> from bilevel import minimize
        >>> from bilevel.reinforcement import (
        ...     BanditTasks,
        ...     CategoricalPolicy,
        ...     GaussianBandit,
        ...     rollout,
        ... )
        >>> from bilevel.solvers import Adam
        >>> from bilevel.tasks import batches
        >>> policy, bandit = CategoricalPolicy(torch.nn.Linear(1, 3)), GaussianBandit(3)
        >>> def collect(task, params, seed):
        ...     noise = torch.randn(10, 1, 2, generator=torch.Generator().manual_seed(seed))
        ...     return rollout(bandit, policy, params, task, torch.zeros(10, 0), noise)
        >>> offline = OfflinePolicy(policy, step=1.0, regularization=0.0)
        >>> learner, data = offline.learner(), batches(BanditTasks(3), 4, seed=0)
        >>> algorithm = Interaction(offline, collect, Adam(0.1))
        >>> minimize(
        ...     learner.problem, learner.x0, learner.y0, algorithm=algorithm, data=data, max_steps=2
        ... ).status
        Status.steps_used_up
    """

    policy: OfflinePolicy
    collect: Collect
    outer: AbstractOptimizer
    seed: int = 0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_numbers("Interaction", "outer", self.outer)
        if self.outer.needs_curvature:
            raise ValueError(f"`Interaction(outer={type(self.outer).__name__}())` needs a step size: pass `step=...`.")

    @property
    def requires(self) -> frozenset[Property]:
        return frozenset()

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> InteractionState:
        x = oracle.project(x)
        return InteractionState(x, y, self.outer.init(x))

    def evaluate(self, oracle: Oracle, state: InteractionState) -> Evaluated:
        problem = oracle.problem()
        data = self.episodes(problem.x.unravel(state.x), problem.data, oracle.step)
        seen = FlatProblem(problem.problem, problem.x, problem.y, data, problem.tally)
        start = FlatStart(state.y, None, oracle.step)
        return Evaluated(apply_estimator(self.policy.learner().estimator, seen, state.x, start, None))

    def step(self, oracle: Oracle, state: InteractionState, found: Evaluated) -> InteractionState:
        x, memory = self.outer.step(found.estimate.grad, state.x, state.memory)
        return InteractionState(oracle.project(x).detach(), state.y, memory)

    def stationarity(self, oracle: Oracle, state: InteractionState, found: Evaluated) -> Tensor:
        return oracle.residual(state.x, found.estimate.grad)

    def point(self, state: InteractionState) -> tuple[Tensor, Tensor]:
        return state.x, state.y

    def episodes(self, x: Tree, tasks: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The tasks with the episodes of x as `support_...`, and those of what it adapts to as `query_...`."""
        count = len(next(iter(tasks.values())))
        rows = [{name: value[k] for name, value in tasks.items()} for k in range(count)]
        seeds = [seed_of_step(self.seed, 2 * (step * count + k)) for k in range(count)]
        start = self.policy.init(x, None)
        first = [self.collect(row, start, seed) for row, seed in zip(rows, seeds, strict=True)]
        support = {**tasks, **_stacked("support", first), **_stacked("query", first)}  # y needs no query
        y = adapt(self.policy.learner(), x, support).y
        second = [
            self.collect(row, {name: leaf[k] for name, leaf in y.items()}, seed + 1)
            for k, (row, seed) in enumerate(zip(rows, seeds, strict=True))
        ]
        return {**support, **_stacked("query", second)}


def _stacked(name: str, episodes: list[Trajectories]) -> dict[str, Tensor]:
    parts: dict[str, Any] = {
        f"{name}_{part}": torch.stack([getattr(each, part) for each in episodes]) for part in Trajectories._fields
    }
    return parts
