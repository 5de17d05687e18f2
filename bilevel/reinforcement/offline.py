"""Policies that adapt to fixed data: no environment is asked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from bilevel._problem import BilevelProblem
from bilevel._tree import Tree
from bilevel.arguments.checked import fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, COUNT, POSITIVE, SHARE, SIZE, Range, demand_ranges
from bilevel.few_shot.adapt import adapt
from bilevel.few_shot.learner import Learner
from bilevel.hypergrad.itd import ITD
from bilevel.portable.pickling import AbstractPortable
from bilevel.reinforcement.baseline import AbstractBaseline, Advantages, LinearBaseline, powers
from bilevel.reinforcement.dice import cumulative_weights
from bilevel.reinforcement.environment import AbstractEnvironment
from bilevel.reinforcement.policy import AbstractPolicy, Params
from bilevel.reinforcement.surrogate import AbstractSurrogate, Curvature
from bilevel.reinforcement.trajectories import Trajectories, rollout
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.iterate import Iterate

_NIL = 1e-6  # a mean weight of episodes below this is none: a thousand of them would not hold one that counts


@final
@dataclass(frozen=True)
class ImportanceWeighted(AbstractSurrogate):
    """mean_e sum_t discount^t (W_t r_t + (W_{t-1} - W_t) V(o_t)),  W_t = min(prod_{l <= t} p_y / p, clip), off policy.

    `DiCE` at a distance from the policy p that acted, with weights that are clipped: a bias, and a variance that stays
    finite. Where a weight is clipped it has no derivative. Where the mean weight of whole episodes is below 1e-6, the
    data say nothing of the policy, and the value is NaN.

    Products over long episodes leave few that count. With `cumulative=False` an action has the weight of itself alone,
    mean_e sum_t discount^t [r_t + (w_t - 1) A_t], w_t = min(p_y / p, clip): right to first order where y is near p, for
    the states are still those that p visits.

    Source: Precup, Sutton, Singh, "Eligibility traces for off-policy policy evaluation", ICML 2000; clipped: Ionides,
    "Truncated importance sampling", J. Comp. Graph. Stat. 17 (2008).

    Args:
        discount: in [0, 1].
        clip: the greatest weight; infinite: none is clipped.
        baseline: V.
        cumulative: whether weights are products over the episode so far, or of single actions.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> ImportanceWeighted(clip=5.0).curvature
        'expected'
    """

    discount: float = 0.99
    clip: float = 10.0
    baseline: AbstractBaseline = LinearBaseline()
    cumulative: bool = True
    curvature: Curvature = field(init=False, default="expected", repr=False)

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, discount=SHARE, clip=Range(least=1.0, infinite=True))

    @property
    def factor(self) -> float:
        return self.discount

    def value(self, policy: AbstractPolicy, params: Params, trajectories: Trajectories) -> Tensor:
        weights = self.weights(policy, params, trajectories)
        covered = counted(weights, trajectories, self.cumulative).detach().mean() > _NIL
        weights = weights.clamp(max=self.clip)
        if self.cumulative:
            before = torch.cat([torch.ones_like(weights[:, :1]), weights[:, :-1]], 1)
            with torch.no_grad():
                V = self.baseline.values(trajectories, self.discount) * trajectories.alive
            terms = weights * trajectories.rewards + (before - weights) * V
        else:
            A = Advantages(self.discount, 1.0, self.baseline).of(trajectories) / powers(self.discount, weights)
            terms = trajectories.rewards + (weights - 1) * A
        value = (powers(self.discount, terms) * terms).sum(1).mean()
        return value * torch.where(covered, 1.0, math.nan).to(
            value.dtype
        )  # as a factor: the gradient is NaN, or is as it is

    def weights(self, policy: AbstractPolicy, params: Params, trajectories: Trajectories) -> Tensor:
        """W_t, or w_t, `(episodes, horizon)`, before they are clipped."""
        if self.cumulative:
            return cumulative_weights(policy, params, trajectories)[0]
        own = policy.log_prob(params, trajectories.observations, trajectories.actions) * trajectories.alive
        return (own - trajectories.log_probs).exp()


def counted(weights: Tensor, trajectories: Trajectories, cumulative: bool) -> Tensor:
    """The weights that tell what the data say: those of whole episodes `(episodes,)`, or of all actions `(n,)`."""
    return weights[:, -1] if cumulative else (weights * trajectories.alive).flatten()


@final
@dataclass(frozen=True, eq=False)
class Coverage:
    """How much fixed data say of the policies of tasks.

    Attributes:
        before: of each task the effective share of the episodes (or of the actions, where each has a weight of its own)
            under x: (sum W)^2 / (n sum W^2) `(tasks,)`, 1 where the policy is that which acted, 1 / n where one counts.
        after: the same under the adapted y.
        clipped: the share of weights above the clip, under y `(tasks,)`.
        episodes: how many there are a task.
    """

    before: Tensor
    after: Tensor
    clipped: Tensor
    episodes: int

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, episodes=SIZE)

    def __str__(self) -> str:
        return (
            f"{float(self.before.mean()):.1%} of {self.episodes} episodes are effective at x,"
            f" {float(self.after.mean()):.1%} after adaptation, at least {float(self.after.min()):.1%};"
            f" {float(self.clipped.mean()):.1%} of the weights clipped"
        )


@final
@dataclass(frozen=True, eq=False)
class OfflinePolicy(AbstractPortable):
    """max_x mean_t [J_t(y) - c KL_t(y)],  y_0 = x,  y_{k+1} = y_k + step grad J_t(y_k), from fixed episodes.

    J_t is estimated by importance weights from episodes of a known policy, those of the inner steps (`support_...`)
    and of the outer objective (`query_...`) apart: each side has `observations` `(episodes, horizon, o)`, `actions`,
    `rewards`, `alive` and `log_probs` `(episodes, horizon)` of the policy that acted, in a task as in `OfflineTasks`.
    KL_t(y) = mean log p - log p_y over its actions: what keeps y where there are data.

    Cost: N Hessian products of the inner surrogate; no environment is asked but for the score.

    Source: the importance-weighted inner step and the regularized outer loss follow Mitchell, Rafailov, Peng, Levine,
    Finn, "Offline meta-reinforcement learning with advantage weighting", ICML 2021, with weights for theirs.

    Args:
        policy: whose parameters are adapted.
        environment: what scores are measured in, by `episodes` new ones; None: they are estimated from the query data.
        step: the inner step; where steps are learned, what they start from.
        inner_steps: N.
        surrogate: J.
        regularization: c.
        episodes: of a score.
        learn_steps: learn a step for each entry of the parameters.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> from bilevel.reinforcement import CategoricalPolicy
        >>> OfflinePolicy(CategoricalPolicy(nn.Linear(1, 3))).learner().name
        'offline MAML'
    """

    policy: AbstractPolicy
    environment: AbstractEnvironment | None = None
    step: float = 0.1
    inner_steps: int = 1
    surrogate: ImportanceWeighted = ImportanceWeighted()
    regularization: float = 0.1
    episodes: int = 20
    learn_steps: bool = False

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, step=POSITIVE, inner_steps=COUNT, regularization=AT_LEAST_0, episodes=SIZE)

    def learner(self) -> Learner:
        """The learner."""
        inner = Iterate(GradientDescent(_steps if self.learn_steps else self.step), self.inner_steps)
        params = self.policy.params
        log_step = math.log(self.step)
        steps = {name: torch.full_like(p, log_step) for name, p in params.items()}
        return Learner(
            name="offline MAML",
            problem=BilevelProblem(self.f, self.g, init=self.init, iterative=self.learn_steps, tasks=True),
            x0={"params": params, "log_steps": steps} if self.learn_steps else params,
            y0=params,
            estimator=ITD(inner),
            adapt=inner,
            predict=self.predict,
            export=self.export,
            prepare=self.prepare,
            score=self.score,
        )

    def f(self, x: Tree, y: Tree, task: Any) -> Tensor:
        """Minus the return of y on the query data, and what it costs to leave them."""
        data = side(task, "query")
        own = self.policy.log_prob(y, data.observations, data.actions) * data.alive
        apart = (data.log_probs - own).sum() / data.alive.sum()
        return self.regularization * apart - self.surrogate.value(self.policy, y, data)

    def g(self, x: Tree, y: Tree, task: Any) -> Tensor:
        """Minus the return of y on the support data."""
        return -self.surrogate.value(self.policy, y, side(task, "support"))

    def init(self, x: Tree, task: Any) -> Tree:
        """x."""
        return x["params"] if self.learn_steps else x

    def score(self, x: Tree, y: Tree, task: Any) -> Tensor:
        """The mean sum of rewards of y: in the environment, or of the query data by weights."""
        if self.environment is None:
            return self.surrogate.value(self.policy, y, side(task, "query"))
        return self.predict(x, y, task).mean()

    def predict(self, x: Tree, y: Tree, task: Any) -> Tensor:
        """The sums of rewards of new episodes; without an environment those of the query data."""
        if self.environment is None:
            return side(task, "query").returns()
        return rollout(self.environment, self.policy, y, task, task["score_start"], task["score_noise"]).returns()

    def export(self, x: Tree) -> nn.Module:
        """The module of x."""
        return self.policy.export(x["params"] if self.learn_steps else x)

    def prepare(self, batch: Any, seed: int) -> Any:
        """The batch with the noise of episodes that are scored.

        Raises:
            ValueError: if data are missing, or the policy that acted could not have done what it is said to have done.
        """
        for name in SIDES:
            _demand_data(batch, name)
        if self.environment is None:
            return batch
        like = batch["query_rewards"]
        generator = torch.Generator().manual_seed(seed)
        wide = self.policy.noise + self.environment.step_noise
        shapes = {
            "score_start": (self.episodes, self.environment.start_noise),
            "score_noise": (self.episodes, self.environment.horizon, wide),
        }
        drawn = {
            name: torch.randn(len(like), *shape, generator=generator, dtype=torch.float64, device="cpu").to(like)
            for name, shape in shapes.items()
        }
        return {**batch, **drawn}

    @fitting
    def coverage(self, x: Tree, tasks: dict[str, Tensor]) -> Coverage:
        """How much the support data of tasks say of x, and of what it adapts to.

        Args:
            x: what was learned.
            tasks: a batch of them.

        Raises:
            ValueError: if they say nothing of a task's policy: no episode has a weight that counts.
        """
        learner = self.learner()
        found = adapt(learner, x, tasks)
        start = self.init(x, None)
        count = len(tasks["support_rewards"])
        before = {name: leaf.expand(count, *leaf.shape) for name, leaf in start.items()}
        with torch.no_grad():
            weigh = torch.vmap(lambda y, task: self.surrogate.weights(self.policy, y, side(task, "support")))
            weights = [weigh(y, tasks) for y in (before, found.y)]
            tell = torch.vmap(lambda w, task: counted(w, side(task, "support"), self.surrogate.cumulative))
            whole = [tell(w, tasks) for w in weights]
        empty = [k for k in range(count) if any(not float(w[k].mean()) > _NIL for w in whole)]
        if empty:
            raise ValueError(
                f"`OfflinePolicy.coverage(tasks=...)` must hold episodes that the policies could have made. Got none"
                f" of any weight in task {empty[0]} ({len(empty)} of {count} tasks). Start from a policy that was fit"
                f" to the data, take a shorter `step`, or more `regularization`."
            )
        alive = tasks["support_alive"].flatten(1).sum(1)
        numbers = weights[0].shape[1] if self.surrogate.cumulative else alive
        shares = [w.sum(1).square() / w.square().sum(1) / numbers for w in whole]
        clipped = (weights[1] > self.surrogate.clip).to(weights[1].dtype).flatten(1).mean(1)
        return Coverage(shares[0], shares[1], clipped, weights[0].shape[1])


SIDES = ("support", "query")
_PARTS = Trajectories._fields


def side(task: Any, name: str) -> Trajectories:
    """The episodes of one side of a task."""
    return Trajectories(*(task[f"{name}_{part}"] for part in _PARTS))


def _demand_data(batch: Any, name: str) -> None:
    missing = [f"{name}_{part}" for part in _PARTS if f"{name}_{part}" not in batch]
    if missing:
        raise ValueError(
            f"a task of `OfflinePolicy` must have {', '.join(f'{name}_{part}' for part in _PARTS)}."
            f" Got none of {', '.join(missing)}."
        )
    _demand_shapes(batch, name)
    acted = batch[f"{name}_log_probs"]
    if not bool(acted.isfinite().all()):
        raise ValueError(
            f"`{name}_log_probs` of a task of `OfflinePolicy` must be finite: logarithms of the probabilities with"
            f" which the policy that acted chose what it did. Got {int((~acted.isfinite()).sum())} that are not."
            " An action that it could not choose says nothing of any policy. Leave such episodes out."
        )


def _demand_shapes(batch: Any, name: str) -> None:
    """Refuse episodes whose parts do not go together, or that were over before they began."""
    rewards, alive = batch[f"{name}_rewards"], batch[f"{name}_alive"]
    shapes = {part: tuple(batch[f"{name}_{part}"].shape) for part in _PARTS}
    if rewards.dim() != 3 or any(shape[:3] != shapes["rewards"] for shape in shapes.values()):
        raise ValueError(
            f"the parts of `{name}_...` of tasks of `OfflinePolicy` must begin with the axes (tasks, episodes,"
            f" horizon), and rewards, alive and log_probs have no others. Got {shapes}."
        )
    lives = bool(((alive == 0) | (alive == 1)).all()) and bool((alive[..., 0] == 1).all())
    if not lives or not bool((alive.diff(dim=-1) <= 0).all()):
        raise ValueError(
            f"`{name}_alive` of a task of `OfflinePolicy` must be 1 from the first step of an episode to its last, and"
            " 0 after it. Got something else."
        )
    if not bool(rewards.isfinite().all()):
        raise ValueError(f"`{name}_rewards` of a task of `OfflinePolicy` must be finite. Got some that are not.")


def _steps(x: Tree) -> Tree:
    return {name: log_step.exp() for name, log_step in x["log_steps"].items()}
