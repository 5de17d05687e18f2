"""MAML whose inner step is a policy gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from bilevel._estimate import AbstractEstimator
from bilevel._problem import BilevelProblem
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import COUNT, POSITIVE, SIZE
from bilevel.few_shot.learner import Learner
from bilevel.hypergrad.first_order import FirstOrder
from bilevel.hypergrad.itd import ITD
from bilevel.inner_problems.iteration import Iteration
from bilevel.reinforcement.dice import DiCE
from bilevel.reinforcement.environment import AbstractEnvironment
from bilevel.reinforcement.low_variance import ScoreFunction
from bilevel.reinforcement.policy import AbstractPolicy, Params
from bilevel.reinforcement.surrogate import AbstractSurrogate
from bilevel.reinforcement.trajectories import Trajectories, rollout
from bilevel.solvers.own_steps import OwnSteps

Objective: TypeAlias = Literal["expected", "sampled"]


@checked(step=POSITIVE, inner_steps=COUNT, evaluation_steps=COUNT, episodes=SIZE, outer_episodes=SIZE)
def maml_policy(
    policy: AbstractPolicy,
    environment: AbstractEnvironment,
    *,
    objective: Objective = "expected",
    step: float = 0.1,
    inner_steps: int = 1,
    evaluation_steps: int | None = None,
    episodes: int = 20,
    outer_episodes: int | None = None,
    inner: AbstractSurrogate | None = None,
    outer: AbstractSurrogate | None = None,
    first_order: bool = False,
    learn_steps: bool = False,
) -> Learner:
    """max_x E_t J_t(y_N),  y_0 = x,  y_{k+1} = y_k + step grad J_t(y_k), J_t(y) the expected return of y on task t.

    Two objectives go by the name of MAML for policies, and their derivatives differ:

    (I) "expected", the default: J(x) = E_t J_t(y(x)) with the expected inner gradients, as written above. For one step
    its derivative is (I + step d2J_t(x)) grad J_t(y): the Hessian of the *expected* return, which the surrogate `inner`
    must estimate: `DiCE` without bias, `LowVarianceCurvature` with less variance and a bias. `ScoreFunction` leaves out
    the derivative of where the episodes come from, and is refused.

    (II) "sampled", E-MAML: J(x) = E_t E_D J_t(y(x, D)), the episodes D ~ p_x drawn, and y moved by the gradient that
    they give. Its derivative is that of y(x, D) with D held fixed, for which `inner` is a `ScoreFunction`, plus
    J_t(y(x, D)) grad log p(D), the credit of having drawn D. A surrogate of (I) would count that a second time, and is
    refused.

    Both are estimated from episodes, `episodes` for each inner step and `outer_episodes` after the last. (II) is so
    without bias. (I) is not: y is moved by a sampled gradient and multiplied by a Hessian of the same episodes, which
    leaves a bias of order 1 / episodes. The return that is subtracted in the credit of (II) is that of the policy x on
    other episodes, so that it does not depend on D.

    Gradients are those of the discounted return; scores are sums of rewards without a discount.

    Cost of one hypergradient for T tasks, N steps: T (N + 1) rollouts, as many gradients of the surrogate, and T N
    Hessian products; for (II) T (N + 1) rollouts more. Memory of N graphs of log-probabilities of all episodes.

    Source: Finn, Abbeel, Levine, "Model-agnostic meta-learning for fast adaptation of deep networks", ICML 2017;
    (II): Stadie, Yang, Houthooft, Chen, Duan, Wu, Abbeel, Sutskever, "Some considerations on learning to explore via
    meta-reinforcement learning", NeurIPS 2018; the difference: Fallah, Georgiev, Mokhtari, Ozdaglar, "On the
    convergence theory of debiased model-agnostic meta-reinforcement learning", NeurIPS 2021.

    Args:
        policy: with the user's module, such as `GaussianPolicy(module, actions=2)`.
        environment: where it acts.
        objective: "expected" (I) or "sampled" (II).
        step: the inner step; where steps are learned, what they start from.
        inner_steps: N; 0: one policy for all tasks, the baseline that is called joint training.
        evaluation_steps: the number of steps on a new task; None: N.
        episodes: of each inner step.
        outer_episodes: after the last step; None: as many.
        inner: the surrogate that y moves along; None: `DiCE()` for (I), `ScoreFunction()` for (II).
        outer: that which x moves along, at y_N; None: `ScoreFunction()`.
        first_order: h = E_t grad J_t(y_N), without second derivatives.
        learn_steps: learn a step for each entry of the parameters, exp(log_steps), beside them.

    Returns:
        The learner: x is the dict of parameters; with `learn_steps`, {"params": ..., "log_steps": ...}. Tasks are what
        the environment's functions are given, such as `GoalTasks()`; noise is added to them by `prepare`.

    Raises:
        ValueError: if a number is out of range, or the surrogate does not fit the objective.

    Example:
        >>> from bilevel.few_shot import train
        >>> from bilevel.reinforcement import BanditTasks, CategoricalPolicy, GaussianBandit
        >>> policy = CategoricalPolicy(nn.Linear(1, 3))
        >>> learner = maml_policy(policy, GaussianBandit(3), step=1.0)
        >>> train(learner, BanditTasks(3), max_steps=2, batch=5).history[0].status
        Status.successful
    """
    made = _surrogate(objective, inner)
    steps = max(1, inner_steps, inner_steps if evaluation_steps is None else evaluation_steps)
    own = _Adapted(
        policy,
        environment,
        made,
        ScoreFunction() if outer is None else outer,
        step,
        (steps, episodes, episodes if outer_episodes is None else outer_episodes),
        sampled=objective == "sampled",
        learn_steps=learn_steps,
    )
    inner_solver = OwnSteps(inner_steps)
    estimator: AbstractEstimator = FirstOrder(inner_solver) if first_order else ITD(inner_solver)
    x0: Tree = policy.params
    if learn_steps:
        log_step = torch.tensor(step, dtype=torch.float64, device="cpu").log()
        x0 = {"params": x0, "log_steps": {name: torch.full_like(p, float(log_step)) for name, p in x0.items()}}
    name = "FOMAML" if first_order else ("MAML" if objective == "expected" else "E-MAML")
    return Learner(
        name=name if inner_steps else "joint training",
        problem=BilevelProblem(
            own.f, inner=Iteration(own.step, inner_steps, objective_function=own.g), init=own.init, tasks=True
        ),
        x0=x0,
        y0=own.begun(policy.params),
        estimator=estimator,
        adapt=OwnSteps(inner_steps if evaluation_steps is None else evaluation_steps),
        predict=own.predict,
        export=own.export,
        prepare=own.prepare,
        score=own.score,
    )


def _surrogate(objective: Objective, inner: AbstractSurrogate | None) -> AbstractSurrogate:
    """The inner surrogate of an objective.

    Raises:
        ValueError: if the one that is given is of the other.
    """
    if inner is None:
        return DiCE() if objective == "expected" else ScoreFunction()
    if inner.curvature == objective:
        return inner
    why = (
        "its second derivative is that of the sampled gradient, biased for that of the expected return."
        " Take `DiCE()` or `LowVarianceCurvature()`, or `objective='sampled'`."
        if objective == "expected"
        else "its second derivative has the score of the episodes in it, which the objective adds: they would count"
        " twice. Take `ScoreFunction()`, or `objective='expected'`."
    )
    raise ValueError(
        f"`maml_policy(inner=...)` must be a surrogate with {objective!r} curvature for `objective={objective!r}`."
        f" Got {inner!r}: {why}"
    )


@final
@dataclass(frozen=True, eq=False)
class _Adapted:
    """The functions of the learner. y is the policy's parameters, the number of the step, and log p(D) for (II)."""

    policy: AbstractPolicy
    environment: AbstractEnvironment
    inner: AbstractSurrogate
    outer: AbstractSurrogate
    step_size: float
    sizes: tuple[int, int, int]
    sampled: bool
    learn_steps: bool

    def g(self, x: Tree, y: Tree, task: Any) -> Tensor:
        return -self.inner.value(self.policy, y["policy"], self._inside(y, task))

    def step(self, x: Tree, y: Tree, gradient: Tree, k: int, task: Any) -> Tree:
        if k >= self.sizes[0]:
            raise ValueError(
                f"this learner has noise for {self.sizes[0]} inner steps. Got step number {k}. Build it by"
                f" `maml_policy(evaluation_steps=...)` with the greatest number of steps that it will take."
            )
        moved = {name: leaf - self._step(x, name) * gradient["policy"][name] for name, leaf in y["policy"].items()}
        if not self.sampled:
            return {"policy": moved, "number": y["number"] + 1}
        drawn = self._inside(y, task)
        own = self.policy.log_prob(y["policy"], drawn.observations, drawn.actions) * drawn.alive
        return {"policy": moved, "number": y["number"] + 1, "log_prob": y["log_prob"] + own.sum()}

    def f(self, x: Tree, y: Tree, task: Any) -> Tensor:
        after = self._after(y["policy"], task)
        value = self.outer.value(self.policy, y["policy"], after)
        if self.sampled:
            before = self._after(self._params(x), task)  # of x, on episodes that D has no part in
            credit = self.outer.gain(after) - self.outer.gain(before)
            value = value + credit * (y["log_prob"] - y["log_prob"].detach())
        return -value

    def init(self, x: Tree, task: Any) -> Tree:
        return self.begun(self._params(x))

    def begun(self, params: Params) -> Tree:
        zero = next(iter(params.values())).new_zeros(())
        found: Tree = {"policy": dict(params), "number": zero}
        return {**found, "log_prob": zero} if self.sampled else found

    def score(self, x: Tree, y: Tree, task: Any) -> Tensor:
        return self._after(y["policy"], task).returns().mean()

    def predict(self, x: Tree, y: Tree, task: Any) -> Tensor:
        return self._after(y["policy"], task).returns()

    def export(self, x: Tree) -> nn.Module:
        return self.policy.export(self._params(x))

    def prepare(self, batch: Any, seed: int) -> Any:
        """The batch with the noise of all episodes."""
        steps, episodes, after = self.sizes
        like = next(iter(batch.values()))
        generator = torch.Generator().manual_seed(seed)
        wide = self.policy.noise + self.environment.step_noise
        shapes = {
            "inner_start": (steps, episodes, self.environment.start_noise),
            "inner_noise": (steps, episodes, self.environment.horizon, wide),
            "outer_start": (after, self.environment.start_noise),
            "outer_noise": (after, self.environment.horizon, wide),
        }
        drawn = {
            name: torch.randn(len(like), *shape, generator=generator, dtype=torch.float64, device="cpu").to(like)
            for name, shape in shapes.items()
        }
        return {**batch, **drawn}

    def _inside(self, y: Tree, task: Any) -> Trajectories:
        """The episodes of the step that y is at."""
        number = y["number"].detach().round().long().clamp(max=self.sizes[0] - 1).reshape(1)
        start, noise = (task[name].index_select(0, number).squeeze(0) for name in ("inner_start", "inner_noise"))
        return rollout(self.environment, self.policy, y["policy"], task, start, noise)

    def _after(self, params: Params, task: Any) -> Trajectories:
        return rollout(self.environment, self.policy, params, task, task["outer_start"], task["outer_noise"])

    def _params(self, x: Tree) -> Params:
        found: Params = x["params"] if self.learn_steps else x
        return found

    def _step(self, x: Tree, name: str) -> Tensor | float:
        found: Tensor | float = x["log_steps"][name].exp() if self.learn_steps else self.step_size
        return found
