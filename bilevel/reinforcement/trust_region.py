"""Natural policy gradients: outer steps of a bounded divergence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel._apply import apply_estimator
from bilevel._estimate import AbstractEstimator, FlatStart
from bilevel._flat import FlatProblem
from bilevel._linear import LinearOperator
from bilevel._tree import Tree
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.oracle import Oracle
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, POSITIVE, SIZE, demand_ranges
from bilevel.reinforcement.low_variance import LowVarianceCurvature
from bilevel.reinforcement.meta_policy import MetaPolicy
from bilevel.reinforcement.policy import Params
from bilevel.reinforcement.trajectories import Trajectories
from bilevel.requirements.properties import Property
from bilevel.solvers.cg import CG


@final
@dataclass(frozen=True, eq=False)
class TrustRegionState:
    """Where a run is.

    Attributes:
        x: the policy `(p,)`.
        y: what inner steps start from `(q,)`, for its structure.
        refused: how many steps in a row found no decrease.
    """

    x: Tensor
    y: Tensor
    refused: int


@final
@dataclass(frozen=True, eq=False)
class TrustRegion(AbstractAlgorithm[TrustRegionState]):
    """x <- x + b s,  F s = -h,  b = sqrt(2 delta / s'F s), halved until f falls and the divergence is at most delta.

    h is the meta-gradient, and F = d2 D / dx'2 at x of the mean divergence, over the states that were visited, of the
    adapted policies of another x', through the inner steps: D(x') = mean_t E_o KL(y_t(x)(. | o), y_t(x')(. | o)).
    The episodes of inner and outer steps are those of x, and weighted by their likelihoods at x'. Products with F are
    exact, J'F_y J with J = dy_N/dx through the inner steps, and the system is solved by conjugate gradients.

    Where no step of the line search is accepted, x stays, and the next batch of episodes comes.

    Cost of a step: one hypergradient, up to `linear_steps` products, each of three second derivatives
    of all episodes, and one evaluation of f and D for each halving. Memory of the graphs of all episodes.

    Source: Schulman, Levine, Moritz, Jordan, Abbeel, "Trust region policy optimization", ICML 2015, appendix C; as the
    outer step of MAML: Finn, Abbeel, Levine, ICML 2017, section 5.3.

    Args:
        meta: the functions of the learner, `maml_policy(...).problem` of which is solved.
        delta: the greatest divergence of a step.
        damping: added to F.
        linear_steps: of conjugate gradients.
        halvings: of a step, at most.

    Raises:
        ValueError: if a number is out of range, or the learner is that of sampled gradients, whose episodes' credit is
            no function of x' here.

    Example:
        >>> from torch import nn
        >>> from bilevel.few_shot import OuterLoop, train
        >>> from bilevel.reinforcement import (
        ...     BanditTasks,
        ...     CategoricalPolicy,
        ...     GaussianBandit,
        ...     MetaPolicy,
        ... )
        >>> meta = MetaPolicy(CategoricalPolicy(nn.Linear(1, 3)), GaussianBandit(3), step=1.0)
        >>> loop = OuterLoop(algorithm=TrustRegion(meta, delta=0.05))
        >>> train(meta.learner(), BanditTasks(3), max_steps=2, batch=5, outer=loop).history[
        ...     1
        ... ].status
        Status.successful
    """

    meta: MetaPolicy
    delta: float = 0.01
    damping: float = 1e-3
    linear_steps: int = 10
    halvings: int = 10

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, delta=POSITIVE, damping=AT_LEAST_0, linear_steps=SIZE, halvings=SIZE)
        if self.meta.objective == "sampled":
            raise ValueError(
                "`TrustRegion(meta=...)` must be of the objective 'expected'. Got 'sampled', whose episodes' credit is"
                " not a function of another x. Use `Adam`."
            )

    @property
    def requires(self) -> frozenset[Property]:
        return frozenset()

    @property
    def estimator(self) -> AbstractEstimator:
        """What h is estimated by."""
        return self.meta.learner().estimator

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> TrustRegionState:
        return TrustRegionState(oracle.project(x), y, 0)

    def evaluate(self, oracle: Oracle, state: TrustRegionState) -> Evaluated:
        start = FlatStart(state.y, None, oracle.step)
        return Evaluated(apply_estimator(self.estimator, oracle.problem(), state.x, start, None))

    def step(self, oracle: Oracle, state: TrustRegionState, found: Evaluated) -> TrustRegionState:
        problem, h = oracle.problem(), found.estimate.grad
        seen = _Seen.by(self.meta, problem.x.unravel(state.x), problem.data)

        fisher = seen.fisher(problem, state.x)

        def product(v: Tensor) -> Tensor:
            return fisher(v) + self.damping * v

        system = LinearOperator(product, size=len(h), symmetric=True, positive_definite=True)
        s = CG(rtol=0.0, max_steps=self.linear_steps).solve(system, -h).value
        curved = float(s @ product(s))
        x = None if not 0 < curved < math.inf else self._search(oracle, state, seen, problem, s, curved)
        return TrustRegionState(state.x, state.y, state.refused + 1) if x is None else replace(state, x=x, refused=0)

    def _search(
        self, oracle: Oracle, state: TrustRegionState, seen: _Seen, problem: FlatProblem, s: Tensor, curved: float
    ) -> Tensor | None:
        """The first x of the line search at which f has fallen and the divergence is small; None: there is none."""
        before, length = float(seen.loss(problem.x.unravel(state.x)).detach()), math.sqrt(2 * self.delta / curved)
        for _ in range(self.halvings + 1):
            x = oracle.project(state.x + length * s).detach()
            tree = problem.x.unravel(x)
            if float(seen.loss(tree).detach()) < before and float(seen.divergence(tree).detach()) <= self.delta:
                return x
            length /= 2
        return None

    def stationarity(self, oracle: Oracle, state: TrustRegionState, found: Evaluated) -> Tensor:
        return oracle.residual(state.x, found.estimate.grad)

    def point(self, state: TrustRegionState) -> tuple[Tensor, Tensor]:
        return state.x, state.y


@final
@dataclass(frozen=True, eq=False)
class _Seen:
    """The episodes of a policy x on a batch of tasks, and f and the divergence of others by them."""

    meta: MetaPolicy
    inner: tuple[Trajectories, ...]
    outer: Trajectories
    old: Params

    @staticmethod
    def by(meta: MetaPolicy, x: Tree, tasks: Any) -> _Seen:
        """What the policy of x sees."""
        count = len(next(iter(tasks.values())))
        y = {name: leaf.expand(count, *leaf.shape) for name, leaf in meta.params_of(x).items()}
        drawn: list[Trajectories] = []
        for k in range(meta.inner_steps):
            number = torch.full((count,), float(k), dtype=next(iter(y.values())).dtype)
            inside = torch.vmap(lambda y, number, task: meta.inside({"policy": y, "number": number}, task))
            drawn.append(inside(y, number.to(next(iter(y.values())).device), tasks))
            y = _moved(meta, x, y, drawn[-1])
            y = {name: leaf.detach() for name, leaf in y.items()}
        return _Seen(meta, tuple(drawn), torch.vmap(meta.after_steps)(y, tasks), y)

    def adapted(self, x: Tree) -> Params:
        """y_N of another x, by the same episodes: differentiable in it."""
        y = {name: leaf.expand(len(self.outer.rewards), *leaf.shape) for name, leaf in self.meta.params_of(x).items()}
        for episodes in self.inner:
            y = _moved(self.meta, x, y, episodes)
        return y

    def fisher(self, problem: FlatProblem, x: Tensor) -> Callable[[Tensor], Tensor]:
        """v -> F v at the x that the episodes are of: F = J' F_y J, J = dy_N/dx, for D has no slope there.

        J v is the derivative in u of J'u, which is linear in it.
        """
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            y = list(self.adapted(problem.x.unravel(leaf)).values())
            u = [torch.zeros_like(part, requires_grad=True) for part in y]
            (pulled,) = torch.autograd.grad(y, leaf, u, create_graph=True)
            at = {name: part.detach().requires_grad_() for name, part in self.old.items()}
            inside = list(at.values())
            slopes = torch.autograd.grad(self._apart(at), inside, create_graph=True)

        def product(v: Tensor) -> Tensor:
            Jv = torch.autograd.grad(pulled, u, v, retain_graph=True)
            FJv = torch.autograd.grad(slopes, inside, Jv, retain_graph=True)
            (found,) = torch.autograd.grad(y, leaf, FJv, retain_graph=True)
            return found

        return product

    def loss(self, x: Tree) -> Tensor:
        """Minus the mean return of another x, by weights of single actions."""
        gain = LowVarianceCurvature(self.meta.advantages)
        value = torch.vmap(lambda y, *parts: gain.value(self.meta.policy, y, Trajectories(*parts)))
        return -value(self.adapted(x), *self.outer).mean()

    def divergence(self, x: Tree) -> Tensor:
        """D: the mean over tasks and the states that were visited."""
        return self._apart(self.adapted(x))

    def _apart(self, y: Params) -> Tensor:
        apart = torch.vmap(self.meta.policy.divergence)(self.old, y, self.outer.observations)
        alive = self.outer.alive
        return ((apart * alive).flatten(1).sum(1) / alive.flatten(1).sum(1)).mean()


def _moved(meta: MetaPolicy, x: Tree, y: Params, episodes: Trajectories) -> Params:
    """One inner step of every task."""
    with torch.enable_grad():
        y = {name: leaf if leaf.requires_grad else leaf.detach().requires_grad_() for name, leaf in y.items()}
        value = torch.vmap(lambda y, *parts: meta.surrogate.value(meta.policy, y, Trajectories(*parts)))
        whole = not meta.first_order  # else y moves as x does
        gradients = torch.autograd.grad(value(y, *episodes).sum(), list(y.values()), create_graph=whole)
        return {
            name: leaf + meta.step_of(x, name) * gradient
            for (name, leaf), gradient in zip(y.items(), gradients, strict=True)
        }
