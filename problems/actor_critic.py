"""An actor and its critic: the value function of a policy as the fixed point of its Bellman equation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, SEED, SIZE
from bilevel.arguments.shapes import Shape, demand_shapes

_SWEEPS = 100_000  # of value iteration, at most


@final
@dataclass(frozen=True, eq=False)
class TabularMDP:
    """A Markov decision process with a softmax actor pi_x(a | s) ~ exp(x_sa), and the critic y = r_x + discount P_x y.

    r_x and P_x are the rewards and transitions under pi_x, y(s) is the expected discounted return from s, and f = -
    start'y. T(x, y) = r_x + discount P_x y contracts by the discount in the maximum norm, and dT/dy = discount P_x has
    that spectral radius. (I - discount P_x)' w = start makes w the discounted visits of states, so that the
    hypergradient is the policy gradient theorem:

        d start'y / d x_sa = w(s) pi(a | s) [Q(s, a) - y(s)],   Q(s, a) = r(s, a) + discount sum_t P(t | s, a) y(t).

    Source: Sutton, McAllester, Singh, Mansour, "Policy gradient methods for reinforcement learning with function
    approximation", NeurIPS 1999, theorem 1; as a bilevel problem: Hong, Wai, Wang, Yang, "A two-timescale stochastic
    algorithm framework for bilevel optimization", SIAM J. Optim. 33 (2023).

    Args:
        P: transitions `(s, a, s)`, rows of which sum to 1.
        r: rewards `(s, a)`.
        start: the distribution of the first state `(s,)`.
        discount: in (0, 1).

    Raises:
        ValueError: if the shapes do not fit, or the discount is not in (0, 1).

    Example:
        >>> one = torch.ones(1, 1, 1)
        >>> mdp = TabularMDP(one, torch.ones(1, 1), torch.ones(1), 0.5)
        >>> mdp.solution(torch.zeros(1, 1))
        tensor([2.])
    """

    P: Tensor
    r: Tensor
    start: Tensor
    discount: float = 0.9

    def __post_init__(self) -> None:
        demand_types(self)
        demand_shapes("TabularMDP", {"P": Shape("s a s"), "r": Shape("s a"), "start": Shape("s")}, vars(self))
        if not 0 < self.discount < 1:
            raise ValueError(f"`TabularMDP(discount=...)` must be between 0 and 1. Got {self.discount}.")

    @fitting
    def f(self, x: Tensor, y: Tensor) -> Tensor:
        """Minus the return."""
        return -(self.start * y).sum()

    @fitting
    def bellman(self, x: Tensor, y: Tensor) -> Tensor:
        """T(x, y) = r_x + discount P_x y."""
        return (x.softmax(-1) * self.actions(y)).sum(-1)

    @fitting
    def actions(self, y: Tensor) -> Tensor:
        """Q(s, a)."""
        return self.r + self.discount * (self.P * y).sum(-1)

    @fitting
    def solution(self, x: Tensor) -> Tensor:
        """The critic of the actor x."""
        policy = x.softmax(-1)
        y: Tensor = torch.linalg.solve(self._system(policy), (policy * self.r).sum(-1))
        return y

    @fitting
    def gradient(self, x: Tensor) -> Tensor:
        """Minus the policy gradient."""
        policy, y = x.softmax(-1), self.solution(x)
        visits: Tensor = torch.linalg.solve(self._system(policy).mT, self.start)
        return -visits.unsqueeze(-1) * policy * (self.actions(y) - y.unsqueeze(-1))

    def best(self) -> float:
        """The return of the best policy, by value iteration."""
        y = torch.zeros_like(self.start)
        for _ in range(_SWEEPS):
            new = self.actions(y).amax(-1)
            moved, y = float((new - y).abs().max()), new
            if moved <= 1e-12 * float(y.abs().max()):
                break
        return float(self.start @ y)

    @fitting
    def metrics(self, x: Tensor, y: Tensor) -> Mapping[str, float]:
        """The return, and that of the best policy."""
        return {"return": -float(self.f(x, y)), "best return": self.best()}

    def _system(self, policy: Tensor) -> Tensor:
        under = (policy.unsqueeze(-1) * self.P).sum(-2)
        return torch.eye(len(self.start), dtype=self.P.dtype, device=self.P.device) - self.discount * under


@checked(states=SIZE, actions=SIZE, discount=POSITIVE, seed=SEED)
def actor_critic(*, states: int = 8, actions: int = 3, discount: float = 0.9, seed: int = 0) -> Instance:
    """A small Markov decision process that is drawn at random: actor x, critic y, and the exact policy gradient.

    Args:
        states: the number of states.
        actions: the number of actions.
        discount: in (0, 1): the modulus of the contraction.
        seed: of the draw.

    Raises:
        ValueError: if the discount is not below 1.

    Example:
        >>> instance = actor_critic(states=3, actions=2)
        >>> y = instance.solution(instance.x0)
        >>> bool((instance.problem.fixed_point(instance.x0, y) - y).abs().max() < 1e-12)
        True
    """
    generator = torch.Generator().manual_seed(seed)
    P = torch.rand(states, actions, states, generator=generator, dtype=torch.float64, device="cpu").pow(4)
    r = torch.rand(states, actions, generator=generator, dtype=torch.float64, device="cpu")
    start = torch.full((states,), 1 / states, dtype=torch.float64, device="cpu")
    mdp = TabularMDP(P / P.sum(-1, keepdim=True), r, start, discount)
    return Instance(
        problem=BilevelProblem(mdp.f, fixed_point=mdp.bellman),
        x0=torch.zeros_like(r),
        y0=torch.zeros_like(start),
        description=f"actor and critic: {states} states, {actions} actions, discount {discount:g}",
        solution=mdp.solution,
        gradient=mdp.gradient,
        metrics=mdp.metrics,
        settings={"estimator": "implicit", "max_steps": 100},
    )
