"""Linear constraints on the inner variable: equalities and bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._tree import Structure, Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import FINITE, demand_ranges
from bilevel.arguments.shapes import Shape, demand_shapes


@final
@dataclass(frozen=True, eq=False)
class Polytope:
    """{y : A y = b, lower <= y <= upper}, what `BilevelProblem(constraints=...)` returns at x.

    Args:
        A: the rows of the equalities `(m, q)`, for y as one vector (see `bilevel.ravel`); None: no equality.
        b: their right-hand sides `(m,)`, or one number.
        lower: lower bounds: a structure like y, or a number for all entries; None or -inf: unbounded.
        upper: upper bounds, likewise. Entries with equal bounds are fixed.

    Raises:
        ValueError: if A is not a matrix.

    Example:
        >>> simplex = Polytope(A=torch.ones(1, 3), b=1.0, lower=0.0)
        >>> simplex.A.shape
        torch.Size([1, 3])
    """

    A: Tensor | None = None
    b: Tensor | float = 0.0
    lower: Tree | None = None
    upper: Tree | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_shapes("Polytope", {"A": Shape("m q"), "b": Shape()}, vars(self))
        if isinstance(self.b, float):
            demand_ranges(self, b=FINITE)

    @checked()
    def flat(self, y: Structure) -> FlatPolytope:
        """The same in vectors, for y of this structure; differentiable.

        Raises:
            ValueError: if the number of columns of A, or the structure of a bound, is not that of y.
        """
        like = torch.zeros((), dtype=y.dtype, device=y.device)
        A = like.new_zeros(0, y.size) if self.A is None else self.A.to(like)
        if A.shape[1] != y.size:
            raise ValueError(f"`Polytope(A=...)` must have {y.size} columns, as y has entries. Got {A.shape[1]}.")
        limits = []
        for name, bound, none in (("lower", self.lower, -torch.inf), ("upper", self.upper, torch.inf)):
            scalar = bound is None or isinstance(bound, float | int) or (isinstance(bound, Tensor) and not bound.dim())
            if scalar and y.shapes != (torch.Size([]),):
                limits.append(_like(none if bound is None else bound, like).expand(y.size))
            elif scalar:
                limits.append(_like(none if bound is None else bound, like).reshape(1))
            else:
                limits.append(y.ravel(bound, f"Polytope({name}=...)"))
        return FlatPolytope(A, _like(self.b, like).expand(len(A)), *limits)


@final
@dataclass(frozen=True, eq=False)
class FlatPolytope:
    """A polytope in vectors: A `(*batch, m, q)`, b `(*batch, m)`, lower and upper `(*batch, q)`; see `Polytope`."""

    A: Tensor
    b: Tensor
    lower: Tensor
    upper: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, b, lower, upper."""
        return self.A, self.b, self.lower, self.upper

    @property
    def fixed(self) -> Tensor:
        """Which entries have one value only: `(*batch, q)`."""
        return self.lower >= self.upper


def _like(value: float | Tensor, like: Tensor) -> Tensor:
    """A number or tensor in the dtype and on the device of another, whatever torch's own default is."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)
