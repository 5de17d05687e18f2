"""Iterations: y is what so many steps make of a start, and no minimizer of anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from bilevel._calculus import AbstractProducts
from bilevel._flat import FlatProblem
from bilevel._inner import Objective, OwnStep, smooth_objective
from bilevel._numerics.misfits import called
from bilevel._tree import Tree
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, demand_ranges
from bilevel.inner_problems.kind import AbstractInnerProblem
from bilevel.requirements.properties import Feature, Property


@final
@dataclass(frozen=True, eq=False)
class Iteration(AbstractInnerProblem):
    """y_N(x) with y_{k+1} = step(x, y_k, k), or step(x, y_k, grad_y g(x, y_k), k), from the start y_0 (or `init(x)`).

    What a step does may depend on x: a learned step length makes the inner problem an iteration, whatever g looks like,
    for dy_N/dx has then a part that no optimality condition sees. A step knows its number k. What it chooses on the way
    and needs again (a momentum, a step length that it searched for) is an entry of y, which may be any structure, f
    reading what it wants of it; forms of unrolling that take a step again start from the same y_k, and so choose alike.

    Without a `step`, the steps are those of the estimator's inner solver on g: `BilevelProblem(f, g, iterative=True)`.
    Those whose settings are functions of x (`GradientDescent(step=lambda x: ...)`) need no such declaration.

    `ITD` in all its forms, `ESJ` and `FiniteDifference` apply, with `OwnSteps()` as the inner solver where there is a
    step; implicit estimators refuse: there is no condition F(x, y) = 0.

    Args:
        step: the step, in the user's structures, without the gradient where there is no g; data come last.
        steps: N, for inner solvers that are not told otherwise.
        objective_function: g, where steps use its gradient: `g(x, y)`, or `g(x, y, data)`.

    Raises:
        TypeError: if there is neither a step nor a g, or something cannot be called.
        ValueError: if `steps` is negative.

    Example:
        >>> import torch
        >>> from bilevel import ITD, BilevelProblem, hypergradient
        >>> from bilevel.solvers import OwnSteps
        >>> descent = Iteration(
        ...     lambda x, y, gradient, k: y - x * gradient,
        ...     steps=2,
        ...     objective_function=lambda x, y: y.square() / 2,
        ... )
        >>> problem = BilevelProblem(lambda x, y: y, inner=descent)  # y_2 = (1 - x)^2 y_0
        >>> hypergradient(
        ...     problem, torch.tensor(0.25), torch.tensor(1.0), estimator=ITD(OwnSteps())
        ... ).grad
        tensor(-1.5000)
    """

    step: Callable[..., Tree] | None = None
    steps: int = 1
    objective_function: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, steps=AT_LEAST_0)
        if self.step is None and self.objective_function is None:
            raise TypeError("`Iteration` needs a step, or a g whose steps the inner solver takes. Got neither.")

    @property
    def offers(self) -> frozenset[Property]:
        return frozenset({Property.steps, Property.smooth} if self.step is None else {Property.steps})

    @property
    def refusal(self) -> str:
        if self.step is None:
            return (
                "the problem is declared `iterative`: y is what so many steps make of their start, not a minimizer of"
                " g. Use `ITD` or `ESJ`, which differentiate the steps."
            )
        return (
            "the inner problem is an iteration: y is what so many steps make of their start, not the solution of an"
            " equation. Use `ITD(OwnSteps())`, or `ESJ` or `FiniteDifference` with it, which differentiate the steps."
        )

    @property
    def g(self) -> Callable[..., Tensor] | None:
        return self.objective_function

    @property
    def functions(self) -> Mapping[str, tuple[Callable[..., Any], tuple[str, ...]]]:
        if self.step is None:
            return {}
        names = ("x", "y", "k") if self.objective_function is None else ("x", "y", "gradient", "k")
        return {"step": (self.step, names)}

    @property
    def features(self) -> frozenset[Feature]:
        return frozenset() if self.step is None else frozenset({Feature.own_steps})

    def objective(self, problem: FlatProblem, x: Tensor, products: AbstractProducts | None) -> Objective:
        step = self.step
        if step is None:
            return smooth_objective(problem, x, products, solves=False)
        structure = problem.y

        def own_step(y: Tensor, gradient: Tensor | None, number: int) -> Tensor:
            given = (y,) if gradient is None else (y, gradient)
            count = len(given)
            form = "step(x, y, k, data)" if gradient is None else "step(x, y, gradient, k, data)"

            def one(x: Tree, *arguments: Any) -> Tensor:
                vectors, data = arguments[:count], arguments[count:]
                found = called(form, step, x, *map(structure.unravel, vectors), number, *data)
                return structure.ravel(found, "step(...)")

            return problem.map(one, "g", x, *given)

        own = OwnStep(own_step, self.steps, needs_gradient=self.objective_function is not None)
        return smooth_objective(problem, x, products, own=own)
