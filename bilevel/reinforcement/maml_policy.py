"""MAML whose inner step is a policy gradient."""

from __future__ import annotations

from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import COUNT, POSITIVE, SIZE
from bilevel.few_shot.learner import Learner
from bilevel.reinforcement.environment import AbstractEnvironment
from bilevel.reinforcement.meta_policy import MetaPolicy, Objective
from bilevel.reinforcement.policy import AbstractPolicy
from bilevel.reinforcement.surrogate import AbstractSurrogate


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
        >>> from torch import nn
        >>> from bilevel.few_shot import train
        >>> from bilevel.reinforcement import BanditTasks, CategoricalPolicy, GaussianBandit
        >>> policy = CategoricalPolicy(nn.Linear(1, 3))
        >>> learner = maml_policy(policy, GaussianBandit(3), step=1.0)
        >>> train(learner, BanditTasks(3), max_steps=2, batch=5).history[0].status
        Status.successful
    """
    return MetaPolicy(
        policy,
        environment,
        objective=objective,
        step=step,
        inner_steps=inner_steps,
        evaluation_steps=evaluation_steps,
        episodes=episodes,
        outer_episodes=outer_episodes,
        inner=inner,
        outer=outer,
        first_order=first_order,
        learn_steps=learn_steps,
    ).learner()
