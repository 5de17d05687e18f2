"""The functions of a policy that adapts by policy gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from bilevel._problem import BilevelProblem
from bilevel._tree import Tree
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import COUNT, POSITIVE, SIZE, demand_ranges
from bilevel.few_shot.learner import Learner
from bilevel.hypergrad.first_order import FirstOrder
from bilevel.hypergrad.itd import ITD
from bilevel.inner_problems.iteration import Iteration
from bilevel.portable.pickling import AbstractPortable
from bilevel.reinforcement.baseline import Advantages
from bilevel.reinforcement.dice import DiCE
from bilevel.reinforcement.environment import AbstractEnvironment
from bilevel.reinforcement.low_variance import LowVarianceCurvature, ScoreFunction
from bilevel.reinforcement.policy import AbstractPolicy, Params
from bilevel.reinforcement.surrogate import AbstractSurrogate
from bilevel.reinforcement.trajectories import Trajectories, rollout
from bilevel.solvers.own_steps import OwnSteps

Objective: TypeAlias = Literal["expected", "sampled"]


@final
@dataclass(frozen=True, eq=False)
class MetaPolicy(AbstractPortable):
    """f, g and the steps of a policy that adapts; `maml_policy` makes a learner of it, and says what is computed.

    y is a dict of the policy's parameters "policy", the number of the step, and for (II) the logarithm of the
    probability of all episodes so far. Noise comes with the tasks, by `prepare`.

    Args:
        policy: as for `maml_policy`, and so are the others.

    Raises:
        ValueError: if a number is out of range, or the surrogate does not fit the objective.

    Example:
        >>> from bilevel.reinforcement import CategoricalPolicy, GaussianBandit
        >>> MetaPolicy(CategoricalPolicy(nn.Linear(1, 3)), GaussianBandit(3)).learner().name
        'MAML'
    """

    policy: AbstractPolicy
    environment: AbstractEnvironment
    objective: Objective = "expected"
    step: float = 0.1
    inner_steps: int = 1
    evaluation_steps: int | None = None
    episodes: int = 20
    outer_episodes: int | None = None
    inner: AbstractSurrogate | None = None
    outer: AbstractSurrogate | None = None
    first_order: bool = False
    learn_steps: bool = False

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(
            self, step=POSITIVE, inner_steps=COUNT, evaluation_steps=COUNT, episodes=SIZE, outer_episodes=SIZE
        )
        if self.inner is not None and self.inner.curvature != self.objective:
            raise ValueError(_misfit(self.objective, self.inner))

    def learner(self) -> Learner:
        """The learner: f, g, the inner steps, and how tasks are scored."""
        params, taken = self.policy.params, OwnSteps(self.inner_steps)
        kind = Iteration(self.advance, self.inner_steps, objective_function=self.g)
        name = "FOMAML" if self.first_order else ("MAML" if self.objective == "expected" else "E-MAML")
        return Learner(
            name=name if self.inner_steps else "joint training",
            problem=BilevelProblem(self.f, inner=kind, init=self.init, tasks=True),
            x0=self.start(),
            y0=self.begun(params),
            estimator=FirstOrder(taken) if self.first_order else ITD(taken),
            adapt=OwnSteps(self.inner_steps if self.evaluation_steps is None else self.evaluation_steps),
            predict=self.predict,
            export=self.export,
            prepare=self.prepare,
            score=self.score,
        )

    def start(self) -> Tree:
        """x before training."""
        params = self.policy.params
        if not self.learn_steps:
            return params
        log_step = float(torch.tensor(self.step, dtype=torch.float64, device="cpu").log())
        return {"params": params, "log_steps": {name: torch.full_like(p, log_step) for name, p in params.items()}}

    @property
    def most_steps(self) -> int:
        """How many inner steps there is noise for."""
        return max(1, self.inner_steps, self.evaluation_steps or 0)

    @property
    def surrogate(self) -> AbstractSurrogate:
        """That of the inner steps."""
        if self.inner is not None:
            return self.inner
        return DiCE() if self.objective == "expected" else ScoreFunction()

    @property
    def gain(self) -> AbstractSurrogate:
        """That after them."""
        return ScoreFunction() if self.outer is None else self.outer

    @property
    def advantages(self) -> Advantages:
        """Those after the last step, for weights of single actions."""
        gain = self.gain
        return gain.advantages if isinstance(gain, ScoreFunction | LowVarianceCurvature) else Advantages(gain.factor)

    def g(self, x: Tree, y: Tree, task: Any) -> Tensor:
        """Minus the inner surrogate, of the episodes of this step."""
        return -self.surrogate.value(self.policy, y["policy"], self.inside(y, task))

    def advance(self, x: Tree, y: Tree, gradient: Tree, k: int, task: Any) -> Tree:
        """One policy gradient step."""
        if k >= self.most_steps:
            raise ValueError(
                f"this learner has noise for {self.most_steps} inner steps. Got step number {k}. Build it by"
                f" `maml_policy(evaluation_steps=...)` with the greatest number of steps that it will take."
            )
        moved = {name: leaf - self.step_of(x, name) * gradient["policy"][name] for name, leaf in y["policy"].items()}
        if not self._sampled:
            return {"policy": moved, "number": y["number"] + 1}
        drawn = self.inside(y, task)
        own = self.policy.log_prob(y["policy"], drawn.observations, drawn.actions) * drawn.alive
        return {"policy": moved, "number": y["number"] + 1, "log_prob": y["log_prob"] + own.sum()}

    def f(self, x: Tree, y: Tree, task: Any) -> Tensor:
        """Minus the return of y_N, with its derivative in x."""
        after = self.after_steps(y["policy"], task)
        value = self.gain.value(self.policy, y["policy"], after)
        if self._sampled:
            before = self.after_steps(self.params_of(x), task)  # of x, on episodes that D has no part in
            credit = self.gain.gain(after) - self.gain.gain(before)
            value = value + credit * (y["log_prob"] - y["log_prob"].detach())
        return -value

    def init(self, x: Tree, task: Any) -> Tree:
        """The start of a task."""
        return self.begun(self.params_of(x))

    def begun(self, params: Params) -> Tree:
        """y before the first step, at these parameters."""
        zero = next(iter(params.values())).new_zeros(())
        found: Tree = {"policy": dict(params), "number": zero}
        return {**found, "log_prob": zero} if self._sampled else found

    def score(self, x: Tree, y: Tree, task: Any) -> Tensor:
        """The mean sum of rewards of y."""
        return self.after_steps(y["policy"], task).returns().mean()

    def predict(self, x: Tree, y: Tree, task: Any) -> Tensor:
        """The sum of rewards of each episode."""
        return self.after_steps(y["policy"], task).returns()

    def export(self, x: Tree) -> nn.Module:
        """The module of x."""
        return self.policy.export(self.params_of(x))

    def prepare(self, batch: Any, seed: int) -> Any:
        """The batch with the noise of all episodes."""
        steps, episodes = self.most_steps, self.episodes
        after = episodes if self.outer_episodes is None else self.outer_episodes
        count, like = len(next(iter(batch.values()))), next(iter(self.policy.params.values()))
        generator = torch.Generator().manual_seed(seed)
        wide = self.policy.noise + self.environment.step_noise
        shapes = {
            "inner_start": (steps, episodes, self.environment.start_noise),
            "inner_noise": (steps, episodes, self.environment.horizon, wide),
            "outer_start": (after, self.environment.start_noise),
            "outer_noise": (after, self.environment.horizon, wide),
        }
        drawn = {
            name: torch.randn(count, *shape, generator=generator, dtype=torch.float64, device="cpu").to(like)
            for name, shape in shapes.items()
        }
        return {**batch, **drawn}

    def inside(self, y: Tree, task: Any) -> Trajectories:
        """The episodes of the step that y is at."""
        number = y["number"].detach().round().long().clamp(max=self.most_steps - 1).reshape(1)
        start, noise = (task[name].index_select(0, number).squeeze(0) for name in ("inner_start", "inner_noise"))
        return rollout(self.environment, self.policy, y["policy"], task, start, noise)

    def after_steps(self, params: Params, task: Any) -> Trajectories:
        """The episodes of parameters after the last step."""
        return rollout(self.environment, self.policy, params, task, task["outer_start"], task["outer_noise"])

    def params_of(self, x: Tree) -> Params:
        """The policy's parameters in x."""
        found: Params = x["params"] if self.learn_steps else x
        return found

    def step_of(self, x: Tree, name: str) -> Tensor | float:
        """The inner step of a parameter."""
        found: Tensor | float = x["log_steps"][name].exp() if self.learn_steps else self.step
        return found

    @property
    def _sampled(self) -> bool:
        return self.objective == "sampled"


def _misfit(objective: Objective, inner: AbstractSurrogate) -> str:
    """Why a surrogate is not one for the inner steps of an objective."""
    why = (
        "its second derivative is that of the sampled gradient, biased for that of the expected return."
        " Take `DiCE()` or `LowVarianceCurvature()`, or `objective='sampled'`."
        if objective == "expected"
        else "its second derivative has the score of the episodes in it, which the objective adds: they would count"
        " twice. Take `ScoreFunction()`, or `objective='expected'`."
    )
    return (
        f"`maml_policy(inner=...)` must be a surrogate with {objective!r} curvature for `objective={objective!r}`."
        f" Got {inner!r}: {why}"
    )
