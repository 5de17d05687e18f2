"""What is checked: a problem at a point, and the random directions along which it is tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver
from bilevel._result import Solved
from bilevel.inner_problems.kind import AbstractInnerProblem
from bilevel.inner_problems.kinds import inner_objective, inner_problem
from bilevel.named.setting import Setting
from bilevel.requirements.properties import Feature, Property


@final
@dataclass(frozen=True, eq=False)
class Subject:
    """A problem at a point, as the tests behind `check` see it.

    Attributes:
        problem: f and g on flat vectors.
        x: the outer point `(p,)`.
        given: the start of y `(q,)` as it was passed to `check`.
        y0: where the inner iteration starts, `init(x)` in place of `given` where there is one: `(*tasks, q)`.
        inner: the user's inner solver, if any.
        generator: the random directions; each test draws from it in turn, so that their order is part of a verdict.
    """

    problem: FlatProblem
    x: Tensor
    given: Tensor
    y0: Tensor
    inner: AbstractInnerSolver | None
    generator: torch.Generator

    @property
    def setting(self) -> Setting:
        """The same, as named estimators and default solvers are built from."""
        return Setting(self.problem, self.x, self.given)

    @property
    def constrained(self) -> bool:
        """Whether y is constrained."""
        return bool({Feature.constraints, Feature.nonlinear_constraints} & self.kind.features)

    @property
    def kind(self) -> AbstractInnerProblem:
        """What y is: a minimizer, a fixed point, the end of an iteration."""
        return inner_problem(self.problem.problem)

    @property
    def functions(self) -> tuple[tuple[str, Callable[[Tensor, Tensor], Tensor]], ...]:
        """What there is of f, g and a map T whose fixed point y is, by name: not every inner problem has a g."""
        if Feature.fixed_point in self.kind.features:
            return (("f", self.f), ("T", self.T))
        return (("f", self.f), ("g", self.g)) if self.has_g else (("f", self.f),)

    @property
    def has_g(self) -> bool:
        """Whether the inner problem has a g."""
        return self.kind.g is not None

    @property
    def stationary(self) -> bool:
        """Whether y solves an equation, from wherever a solver starts; else it is what the steps make of its start."""
        own = "" if self.inner is None else self.inner.why_iteration
        return Property.stationary in self.kind.offers and not own

    @property
    def minimizes_g(self) -> bool:
        """Whether that equation is grad_y g(x, y) = 0."""
        return self.stationary and self.has_g and Property.smooth in self.kind.offers

    def solver(self) -> AbstractInnerSolver:
        """The user's inner solver, or the default one."""
        if self.inner is not None:
            return self.inner
        return self.setting.inner() if self.stationary else self.setting.unrolled()

    def solved(self, x: Tensor, start: Tensor) -> Solved:
        """What the inner solver makes of a start at x."""
        return self.solver().solve(inner_objective(self.problem, x), start)

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        """f, a number."""
        return self.problem.f(x, y)

    def g(self, x: Tensor, y: Tensor) -> Tensor:
        """g, summed over tasks."""
        return self.problem.g(x, y).sum()

    def T(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: N802  (as the letter is written)
        """A linear function of T(x, y) in which every entry has a part, summed over tasks."""
        image = inner_objective(self.problem, x).fixed_point
        assert image is not None
        weights = torch.cos(1.0 + torch.arange(y.shape[-1], device=y.device)).to(y)
        return (image(y) * weights).sum()

    def direction(self, like: Tensor) -> Tensor:
        """A random vector of length 1."""
        d = torch.randn(like.shape, generator=self.generator, dtype=torch.float64, device="cpu").to(like)
        unit: Tensor = d / torch.linalg.vector_norm(d)
        return unit

    def near(self, point: Tensor, distance: float) -> Tensor:
        """A random point near this one, at a distance relative to its size: off special points, such as zero."""
        length = distance * (1 + torch.linalg.vector_norm(point))
        near: Tensor = point + length * self.direction(point)
        return near

    def moves(self, function: Callable[[Tensor], Tensor]) -> bool:
        """Whether a function of x has other values nearby."""
        return not torch.equal(function(self.x), function(self.near(self.x, 1e-2)))
