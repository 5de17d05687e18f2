"""An algorithm on an objective as the inner problem of a bilevel one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from bilevel._problem import BilevelProblem, Tasks
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_1
from bilevel.arguments.words import got
from bilevel.inner_problems.iteration import Iteration
from bilevel.portable.pickling import AbstractPortable
from bilevel.terms.scheme import Scheme, State


@checked(steps=AT_LEAST_1)
def proximal_problem(
    f: Callable[..., Tensor],
    scheme: Callable[..., Scheme],
    *,
    steps: int | None = None,
    tasks: Tasks = False,
) -> BilevelProblem:
    """min_x f(x, y(x)), y(x) the image that an algorithm with settings and weights of x reaches.

    Without `steps` it is the fixed point, y = T(x, y): "implicit" differentiates it, with a memory that does not depend
    on how it was found; `ITD(FixedPointIteration(N, tol=None))` its steps. With `steps` it is what so many steps make
    of y0, whose settings may differ: `ITD(OwnSteps())`, with `Checkpointed()`, or `ESJ(OwnSteps())`, which needs no
    derivative of anything.

    The inner variable is the state of the algorithm: y0 of an estimate is `scheme(x).start(first image)`.

    Solvers of fixed points stop where |T(x, z) - z| is small, which very short steps or a very large rho make it
    anywhere: `scheme(x).residual(estimate.y)` tells how far the image is from the minimizer of its objective.

    Args:
        f: `f(x, y)` of the image, or `f(x, y, data)`.
        scheme: `scheme(x)`, or `scheme(x, data)`: the algorithm on the objective at x.
        steps: see there.
        tasks: as for `BilevelProblem`: images as tasks, each with a system of its own.

    Example:
        >>> import torch
        >>> from bilevel import hypergradient
        >>> from bilevel.terms import ADMM, norm1, sum_squares, variable
        >>> b, y = torch.tensor([3.0, 0.1]), variable(2)
        >>> def scheme(x):
        ...     return ADMM().on(0.5 * sum_squares(y - b) + x.exp() * norm1(y))
        >>> problem = proximal_problem(lambda x, y: y.sum(), scheme)  # y = (3 - exp(x), 0)
        >>> x = torch.tensor(0.0)
        >>> hypergradient(problem, x, scheme(x).start(torch.zeros(2))).grad.round(decimals=4)
        tensor(-1.)
    """
    made = _Inner(f, scheme)
    if steps is None:
        return BilevelProblem(made.f, fixed_point=_Map(made), tasks=tasks)
    return BilevelProblem(made.f, inner=Iteration(made.step, steps), tasks=tasks)


@final
@dataclass(frozen=True, eq=False)
class _Inner(AbstractPortable):
    outer: Callable[..., Tensor]
    scheme: Callable[..., Scheme]

    def f(self, x: Tree, y: Any, *data: Any) -> Tensor:
        return self.outer(x, _state(y)["y"], *data)

    def step(self, x: Tree, y: State, k: int, *data: Any) -> State:
        return self.made(x, *data).step(_state(y), k)

    def made(self, x: Tree, *data: Any) -> Scheme:
        found = self.scheme(x, *data)
        if not isinstance(found, Scheme):
            raise TypeError(
                "`proximal_problem(scheme=...)` must return a scheme, such as `ADMM().on(objective)`. Got"
                f" {type(found).__name__}."
            )
        return found


@final
@dataclass(frozen=True, eq=False)
class _Map(AbstractPortable):
    """T."""

    inner: _Inner

    def __call__(self, x: Tree, y: State, *data: Any) -> State:
        return self.at(x, *data)(y)

    def at(self, x: Tree, *data: Any) -> Callable[[State], State]:
        """y -> T(x, y): a scheme is made once for all steps of a solver."""
        scheme = self.inner.made(x, *data)
        return lambda y: scheme.step(_state(y), 0)


def _state(y: Any) -> State:
    if not isinstance(y, Mapping) or "y" not in y:
        raise TypeError(
            "the inner variable of `proximal_problem` is the state of the algorithm: `y0` must be"
            f" `scheme(x).start(image)`. Got {got(y)}."
        )
    return dict(y)
