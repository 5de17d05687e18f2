"""A quadratic problem whose variables are nested structures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import torch

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel._tree import Structure, Tree, ravel, tree_map
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, SEED
from bilevel.problems.quadratic import QuadraticFamily, random_quadratic


@checked(kappa=AT_LEAST_1, cross=AT_LEAST_0, seed=SEED)
def nested(*, kappa: float = 10.0, cross: float = 0.0, seed: int = 0) -> Instance:
    """The quadratic family with x and y cut into nested dicts, lists and tuples, some leaves being 0-d.

    Every leaf is coupled with every other, so that an order of leaves that is not kept shows. Constants are those
    of :class:`QuadraticFamily`.

    Args:
        kappa: condition number of the inner Hessian.
        cross: the norm of the term x'Ey of f.
        seed: of the draw.

    Example:
        >>> nested().x0["scale"]["log"].shape
        torch.Size([])
    """

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device="cpu")

    outer, inner = (
        _flat({"shift": zeros(3), "scale": {"log": zeros(), "rows": [zeros(1, 2), zeros(2)]}}),
        _flat({"weight": zeros(2, 3), "bias": zeros(), "rest": (zeros(1), {"deep": zeros(2)})}),
    )
    family = random_quadratic(
        outer.size,
        inner.size,
        eigenvalues=torch.logspace(0.0, 1.0, inner.size, base=kappa, dtype=torch.float64, device="cpu").tolist(),
        cross=cross,
        seed=seed,
    )
    flat = family.instance()
    own = _Cut(family, outer, inner)
    return replace(
        flat,
        problem=BilevelProblem(own.f, own.g),
        x0=outer.unravel(flat.x0),
        y0=inner.unravel(flat.y0),
        description="quadratics in nested dicts, lists and tuples with 0-d leaves",
        solution=own.solution,
        gradient=own.gradient,
        minimizer=None if flat.minimizer is None else outer.unravel(flat.minimizer),
    )


@final
@dataclass(frozen=True, eq=False)
class _Cut:
    """A family whose variables are cut into structures."""

    family: QuadraticFamily
    outer: Structure
    inner: Structure

    def f(self, x: Tree, y: Tree) -> torch.Tensor:
        return self.family.f(self.outer.ravel(x, "x"), self.inner.ravel(y, "y"))

    def g(self, x: Tree, y: Tree) -> torch.Tensor:
        return self.family.g(self.outer.ravel(x, "x"), self.inner.ravel(y, "y"))

    def solution(self, x: Tree) -> Tree:
        return self.inner.unravel(self.family.solution(self.outer.ravel(x, "x")))

    def gradient(self, x: Tree) -> Tree:
        return self.outer.unravel(self.family.gradient(self.outer.ravel(x, "x")))


def _flat(tree: Any) -> Structure:
    return ravel(tree_map(torch.clone, tree))[1]
