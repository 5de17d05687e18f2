"""First-order estimates: no second derivative of g anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import outer_gradients
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver, AbstractUnrollable
from bilevel._numerics.second_derivatives import explained
from bilevel._result import Tally, report
from bilevel._validate import demand_types
from bilevel.inner_problems.kinds import inner_objective
from bilevel.requirements.properties import DoesNotApply, Property


@final
@dataclass(frozen=True)
class FirstOrder(AbstractEstimator):
    """h = grad_x f(x, y_N) + (d init/dx)' grad_y f(x, y_N): y_N is taken to move with x exactly as its start does.

    What `ITD` gives with every gradient of g held constant. Where the start is x itself this is first-order MAML,
    h = grad f(y_N). Where the problem has no `init` nothing would be left of J' grad_y f, and the problem is refused.
    Settings of the inner solver that are functions of x are differentiated through its steps, gradients held constant.

    Biased, whatever N. For MAML on a quadratic with inner Hessian H the true gradient is (I - step H)^N h: near h only
    while N step |H| is small.

    Cost: the inner solve and one gradient of f. Memory O(q), whatever N. With settings in x the steps are
    taken twice, and memory is N times that of their elementwise operations.

    Source: Finn, Abbeel, Levine, "Model-agnostic meta-learning for fast adaptation of deep networks", ICML 2017.

    Args:
        inner: any inner solver.

    Raises:
        ValueError: from `estimate`, if the start of y does not depend on x (there is no `init`).

    Example:
        >>> from bilevel import BilevelProblem, hypergradient
        >>> from bilevel.solvers import GradientDescent, Iterate
        >>> maml = BilevelProblem(
        ...     lambda x, y: y.square().sum() / 2,
        ...     lambda x, y: (y - 1).square().sum() / 2,
        ...     init=lambda x: x,
        ... )
        >>> inner = Iterate(GradientDescent(0.5), max_steps=1)
        >>> hypergradient(
        ...     maml, torch.zeros(1), torch.zeros(1), estimator=FirstOrder(inner)
        ... ).grad  # grad f at y = 0.5
        tensor([0.5000])
    """

    inner: AbstractInnerSolver

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def forgets_start(self) -> bool:
        return self.inner.forgets_start

    @property
    def requires(self) -> frozenset[Property]:
        return frozenset({Property.outer_gradient, Property.start_in_x})

    @property
    def takes_encoding(self) -> bool:
        return True

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        y0, leaf = start_at(problem, x, start)
        solved = self.inner.solve(inner_objective(problem, x), y0.detach())
        value, fx, fy = outer_gradients(problem, x, solved.value)
        if self.inner.why_iteration and isinstance(self.inner, AbstractUnrollable):
            y0 = _held_constant(self.inner, problem, leaf, y0, solved.steps)
        return FlatEstimate(fx + pulled_back(y0, leaf, fy), value, solved.value, (report("inner solver", solved),))


@final
@dataclass(frozen=True)
class Reptile(AbstractEstimator):
    """(d init/dx)' mean_t [init(x) - y_N]: Reptile's direction. Not a hypergradient; a baseline.

    Where the start is x itself, a step x <- x - e h moves x by the fraction e of the way to the mean of the adapted
    y_N. f is evaluated for `Estimate.value` only: the direction does not see it, and its length is that of |x - y_N|,
    not of grad Phi. For small inner steps it is along the sum of the inner gradients met on the way; with N = 1 that is
    joint training on the tasks.

    Cost: the inner solve and one value of f. Memory O(q), whatever N.

    Source: Nichol, Achiam, Schulman, "On first-order meta-learning algorithms", arXiv 2018.

    Args:
        inner: any inner solver; several steps.

    Raises:
        ValueError: from `estimate`, if the start of y does not depend on x.

    Example:
        >>> from bilevel import BilevelProblem, hypergradient
        >>> from bilevel.solvers import GradientDescent, Iterate
        >>> maml = BilevelProblem(
        ...     lambda x, y: y.square().sum() / 2,
        ...     lambda x, y: (y - 1).square().sum() / 2,
        ...     init=lambda x: x,
        ... )
        >>> inner = Iterate(GradientDescent(0.5), max_steps=2)
        >>> hypergradient(
        ...     maml, torch.zeros(1), torch.zeros(1), estimator=Reptile(inner)
        ... ).grad  # 0 - y_2
        tensor([-0.7500])
    """

    inner: AbstractInnerSolver

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def forgets_start(self) -> bool:
        return self.inner.forgets_start

    @property
    def requires(self) -> frozenset[Property]:
        return frozenset({Property.start_in_x})

    @property
    def takes_encoding(self) -> bool:
        return True

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        y0, leaf = start_at(problem, x, start)
        if not y0.requires_grad:  # there is an `init`, in which x does not occur
            raise DoesNotApply(
                "the start of y does not depend on x, and its direction is from the end of the inner iteration to its"
                " start. Give the problem `init=lambda x: x`, or use `ITD`."
            )
        solved = self.inner.solve(inner_objective(problem, x), y0.detach())
        y = solved.value
        problem.tally.values += y.shape[:-1].numel()
        with torch.no_grad():
            value = problem.f(x, y)
        direction = (y0.detach() - y) / (problem.tasks or 1)
        return FlatEstimate(pulled_back(y0, leaf, direction), value, y, (report("inner solver", solved),))


def _held_constant(inner: AbstractUnrollable, problem: FlatProblem, leaf: Tensor, y0: Tensor, steps: int) -> Tensor:
    """y_N again, differentiable in the leaf x through the start and the settings of the steps."""
    at, fixed = inner_objective(problem, leaf), inner_objective(problem.with_tally(Tally()), leaf.detach())
    inner = inner.tuned(fixed, y0.detach())
    with torch.enable_grad():
        state = inner.begin(y0)
        for k in range(steps):
            state = inner.advance(at, fixed.gradient(state[0].detach()), state, k)
    return state[0]


def start_at(problem: FlatProblem, x: Tensor, start: FlatStart) -> tuple[Tensor, Tensor]:
    """The start of the inner iteration `(*tasks, q)`, differentiable in the leaf that is returned with it."""
    with torch.enable_grad(), explained():
        leaf = x.detach().requires_grad_()
        return problem.start(leaf, start.y), leaf


def pulled_back(y0: Tensor, leaf: Tensor, v: Tensor) -> Tensor:
    """(d y0/dx)' v `(p,)`."""
    if not y0.requires_grad:
        return torch.zeros_like(leaf)
    with explained():
        found = torch.autograd.grad(y0, leaf, v, allow_unused=True, materialize_grads=True)
    return found[0]
