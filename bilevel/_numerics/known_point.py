"""A g that knows its derivatives, in vectors: expanded at a point, for one problem or for several side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bilevel._flat import FlatProblem
    from bilevel._numerics.known_objective import AbstractKnownObjective


@final
class KnownObjective:
    """g(x, .) at one x: its coefficients c(x) are evaluated once, with their graph, for all points y.

    Args:
        known: g.
        problem: whose g it is; vectors and batches are its.
        x: `(p,)`, or several `(k, p)`.
    """

    def __init__(self, known: AbstractKnownObjective, problem: FlatProblem, x: Tensor) -> None:
        self.known, self.problem, self.x = known, problem, x.detach()

    @functools.cached_property
    def graph(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x as a leaf, and c(x) with its graph."""
        with torch.enable_grad():
            leaf = self.x.detach().requires_grad_()
            of: Callable[..., Any] = self.known.coefficients
            found: Any = self.problem.map(lambda x, *data: of(x, *data), "g", leaf)
        return leaf, found

    @functools.cached_property
    def c(self) -> tuple[Tensor, ...]:
        """c(x) `(*batch, ...)` each."""
        return tuple(each.detach() for each in self.graph[1])

    def value_and_gradient(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """g `(*batch,)` and grad_y g `(*batch, q)`; not counted."""

        def one(_: Any, y: Tensor, *rest: Any) -> Any:
            c, data = rest[: len(self.c)], rest[len(self.c) :]
            value, gradient = self.known.value_and_gradient(c, self.problem.y.unravel(y), *data)
            return value, self.problem.y.ravel(gradient, "grad_y g")

        value, gradient = self._mapped(one, y, *self.c)
        return value, gradient

    def at(self, y: Tensor) -> KnownPoint:
        """g to second order at y; one gradient, not counted."""
        return KnownPoint(self, y)

    def pull(self, slopes: tuple[Tensor, ...]) -> Tensor | None:
        """(dc/dx)' s, summed over tasks; None where c does not depend on x."""
        leaf, graph = self.graph
        pairs = [(c, s) for c, s in zip(graph, slopes, strict=True) if c.requires_grad]
        if not pairs:
            return None
        outputs, seeds = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, leaf, seeds, retain_graph=True, allow_unused=True)[0]

    @torch.no_grad()
    def _mapped(self, function: Callable[..., Any], *rows: Tensor) -> Any:
        return self.problem.map(function, "g", self.x, *rows)


@final
class KnownPoint:
    """g to second order at y `(*batch, q)`: its value, its gradient, and products from what the expansion kept.

    Attributes:
        value: g `(*batch,)`.
        gradient: grad_y g.
    """

    def __init__(self, objective: KnownObjective, y: Tensor) -> None:
        self.objective, self.count = objective, len(objective.c)
        known, structure, count = objective.known, objective.problem.y, self.count

        def one(_: Any, y: Tensor, *rest: Any) -> Any:
            value, gradient, kept = known.expand(rest[:count], structure.unravel(y), *rest[count:])
            return value, structure.ravel(gradient, "grad_y g"), *kept

        self.value, self.gradient, *kept = objective._mapped(one, y.detach(), *objective.c)
        self.kept = tuple(kept)

    def mv(self, v: Tensor) -> Tensor:
        """H v."""
        structure = self.objective.problem.y

        def one(v: Tensor, c: Any, kept: Any, data: Any) -> Any:
            return structure.ravel(self.objective.known.product(c, kept, structure.unravel(v), *data), "H v")

        found: Tensor = self._of(one, v)
        return found

    def products(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """H v, and G v or None."""
        structure = self.objective.problem.y

        def one(v: Tensor, c: Any, kept: Any, data: Any) -> Any:
            hv, slopes = self.objective.known.products(c, kept, structure.unravel(v), *data)
            return structure.ravel(hv, "H v"), *slopes

        hv, *slopes = self._of(one, v)
        return hv, self.objective.pull(tuple(slopes))

    def cross(self, v: Tensor) -> Tensor | None:
        """G v or None."""
        structure = self.objective.problem.y

        def one(v: Tensor, c: Any, kept: Any, data: Any) -> Any:
            return self.objective.known.slopes(c, kept, structure.unravel(v), *data)

        return self.objective.pull(self._of(one, v))

    def diagonal(self) -> Tensor:
        """The diagonal of H `(*batch, q)`."""
        structure = self.objective.problem.y

        def one(_: Tensor, c: Any, kept: Any, data: Any) -> Any:
            return structure.ravel(self.objective.known.diagonal(c, kept, *data), "diagonal")

        found: Tensor = self._of(one, self.gradient)
        return found

    def _of(self, one: Callable[[Tensor, Any, Any, Any], Any], v: Tensor) -> Any:
        """A formula for each problem: of v, its coefficients, what was kept, and its data."""
        count, both = self.count, self.count + len(self.kept)

        def call(_: Any, v: Tensor, *rest: Any) -> Any:
            return one(v, rest[:count], rest[count:both], rest[both:])

        return self.objective._mapped(call, v, *self.objective.c, *self.kept)
