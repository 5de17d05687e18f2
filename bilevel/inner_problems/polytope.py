"""Linear constraints on the inner variable: equalities, inequalities and bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from bilevel._numerics.misfits import called
from bilevel._numerics.rows import matrix_times, positive_or_one
from bilevel._numerics.sparse_rows import SparseRows
from bilevel._tree import Structure, Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import FINITE, NUMBERS, demand_ranges
from bilevel.arguments.shapes import Shape, demand_shapes

if TYPE_CHECKING:
    from bilevel._flat import FlatProblem


@final
@dataclass(frozen=True, eq=False)
class Polytope:
    """{y : A y = b, G y <= h, lower <= y <= upper}, what `BilevelProblem(constraints=...)` returns at x.

    Args:
        A: the rows of the equalities `(m, q)`, for y as one vector (see `bilevel.ravel`); None: no equality. They
            may be a sparse tensor where the problem is `ManyConstraints`.
        b: their right-hand sides `(m,)`, or one number.
        lower: lower bounds: a structure like y, or a number for all entries; None or -inf: unbounded.
        upper: upper bounds, likewise. Entries with equal bounds are fixed.
        G: the rows of the inequalities `(k, q)`, likewise; None: no inequality. A bound on one entry is better said by
            `lower` and `upper`, which cost no unknown.
        h: their right-hand sides `(k,)`, or one number; inf: this one is none.

    Raises:
        TypeError: if an argument is of the wrong type, as a function in the place of a matrix is.
        ValueError: if A or G is no matrix.

    Example:
        >>> simplex = Polytope(A=torch.ones(1, 3), b=1.0, lower=0.0)
        >>> simplex.A.shape
        torch.Size([1, 3])
        >>> below_the_diagonal = Polytope(G=torch.tensor([[-1.0, 1.0]]), h=0.0)  # y_2 <= y_1
    """

    A: Tensor | None = None
    b: Tensor | float = 0.0
    lower: Tree | None = None
    upper: Tree | None = None
    G: Tensor | None = None
    h: Tensor | float = 0.0

    def __post_init__(self) -> None:
        for name, rows in (("A", self.A), ("G", self.G)):
            _demand_matrix(name, rows)
        demand_types(self)
        given = {name: value for name, value in vars(self).items() if not _is_sparse(value)}
        shapes = {"A": Shape("m q"), "b": Shape(), "G": Shape("k q"), "h": Shape(finite=False)}
        demand_shapes("Polytope", {name: shape for name, shape in shapes.items() if name in given}, given)
        if isinstance(self.b, float):
            demand_ranges(self, b=FINITE)
        if isinstance(self.h, float):
            demand_ranges(self, h=NUMBERS)

    @checked()
    def flat(self, y: Structure) -> FlatPolytope:
        """The same in vectors, for y of this structure, with slacks; differentiable.

        Raises:
            ValueError: if the number of columns of A or G, or the structure of a bound, is not that of y.
        """
        return FlatPolytope.lifted(*self.parts(y))

    @checked()
    def parts(self, y: Structure) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A, b, lower, upper, G and h in vectors, for y of this structure; differentiable.

        Raises:
            ValueError: if the number of columns of A or G, or the structure of a bound, is not that of y.
        """
        for name, rows in (("A", self.A), ("G", self.G)):
            if _is_sparse(rows):
                raise ValueError(
                    f"`Polytope({name}=...)` is sparse, and has to be dense here. Sparse rows are for one problem at"
                    f" one x, without tasks, as `inner=ManyConstraints(g, constraints=...)`; or pass"
                    f" `{name}.to_dense()`."
                )
        like = torch.zeros((), dtype=y.dtype, device=y.device)
        A, G = (like.new_zeros(0, y.size) if rows is None else rows.to(like) for rows in (self.A, self.G))
        self._demand_columns(y.size)
        b, h = _like(self.b, like).expand(len(A)), _like(self.h, like).expand(len(G))
        return A, b, *self._limits(y, like), G, h

    @property
    def is_sparse(self) -> bool:
        """Whether there are rows as a sparse matrix."""
        return _is_sparse(self.A) or _is_sparse(self.G)

    @checked()
    def sparse_parts(self, y: Structure) -> tuple[SparseRows, Tensor, Tensor, Tensor, SparseRows, Tensor]:
        """The same with A and G by their entries that are not zero.

        Raises:
            ValueError: if the number of columns of A or G, or the structure of a bound, is not that of y.
        """
        like = torch.zeros((), dtype=y.dtype, device=y.device)
        self._demand_columns(y.size)
        A, G = (SparseRows.of(like.new_zeros(0, y.size) if rows is None else rows, like) for rows in (self.A, self.G))
        b, h = _like(self.b, like).expand(A.shape[0]), _like(self.h, like).expand(G.shape[0])
        return A, b, *self._limits(y, like), G, h

    def _demand_columns(self, size: int) -> None:
        for name, rows in (("A", self.A), ("G", self.G)):
            if rows is not None and rows.shape[1] != size:
                raise ValueError(
                    f"`Polytope({name}=...)` must have {size} columns, as y has entries. Got {rows.shape[1]}."
                )

    def _limits(self, y: Structure, like: Tensor) -> tuple[Tensor, Tensor]:
        limits = []
        for name, bound, none in (("lower", self.lower, -torch.inf), ("upper", self.upper, torch.inf)):
            scalar = bound is None or isinstance(bound, float | int) or (isinstance(bound, Tensor) and not bound.dim())
            if scalar and y.shapes != (torch.Size([]),):
                limits.append(_like(none if bound is None else bound, like).expand(y.size))
            elif scalar:
                limits.append(_like(none if bound is None else bound, like).reshape(1))
            else:
                limits.append(y.ravel(bound, f"Polytope({name}=...)"))
        return limits[0], limits[1]


@final
@dataclass(frozen=True, eq=False)
class FlatPolytope:
    """A polytope in vectors, inequalities as equalities with slacks: {y : A (y, s) = b, lower <= (y, s) <= upper}.

    G y <= h is G y + s = h, s >= 0, each row over its length, so that a slack is a distance. With k inequalities A is
    `(*batch, m + k, q + k)`, the slacks the last columns, and b, lower and upper are vectors alike.
    """

    A: Tensor
    b: Tensor
    lower: Tensor
    upper: Tensor

    @staticmethod
    def lifted(A: Tensor, b: Tensor, lower: Tensor, upper: Tensor, G: Tensor, h: Tensor) -> FlatPolytope:
        """With a slack for each inequality: A `(*batch, m, q)`, G `(*batch, k, q)`, the rest vectors."""
        k = G.shape[-2]
        if not k:
            return FlatPolytope(A, b, lower, upper)
        length = lengths(G)
        none = h == torch.inf  # such a row has a slack without a bound
        G = torch.where(none.unsqueeze(-1), 0.0, G) / length.unsqueeze(-1)
        h = torch.where(none, 0.0, h) / length
        slack = torch.eye(k, dtype=A.dtype, device=A.device).expand(*G.shape[:-1], k)
        rows = torch.cat([torch.cat([A, A.new_zeros(*A.shape[:-1], k)], -1), torch.cat([G, slack], -1)], -2)
        least = torch.where(none, -torch.inf, torch.zeros_like(h))
        return FlatPolytope(
            rows,
            torch.cat([b, h], -1),
            torch.cat([lower, least], -1),
            torch.cat([upper, torch.full_like(h, torch.inf)], -1),
        )

    def natural(self, q: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A, b, lower, upper, G and h without slacks, for y of q entries; rows of G have length one, or are zero."""
        k = self.A.shape[-1] - q
        m = self.A.shape[-2] - k
        h = torch.where(self.lower[..., q:] == -torch.inf, torch.inf, self.b[..., m:])
        return (
            self.A[..., :m, :q],
            self.b[..., :m],
            self.lower[..., :q],
            self.upper[..., :q],
            self.A[..., m:, :q],
            h,
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, b, lower, upper."""
        return self.A, self.b, self.lower, self.upper

    def with_slacks(self, y: Tensor) -> Tensor:
        """(y, s) for y `(*batch, q)`, with the slacks that the inequalities leave."""
        k = self.A.shape[-1] - y.shape[-1]
        if not k:
            return y
        G, h = self.A[..., -k:, : y.shape[-1]], self.b[..., -k:]
        return torch.cat([y, h - matrix_times(G, y)], -1)

    @property
    def fixed(self) -> Tensor:
        """Which entries have one value only: `(*batch, q + k)`."""
        return self.lower >= self.upper


def polytope_at(problem: FlatProblem, x: Tensor, constraints: Callable[..., Polytope]) -> FlatPolytope:
    """`constraints(x)` in vectors, one row for each problem of the batch; differentiable."""

    def flat(x: Tree, *data: Any) -> Any:
        return called("constraints(x, data)", constraints, x, *data).flat(problem.y).tensors()

    return FlatPolytope(*problem.map(flat, "g", x))


def lengths(rows: Tensor) -> Tensor:
    """The lengths of rows `(*batch, k, q)`, and 1 for those that are zero: `(*batch, k)`."""
    found: Tensor = positive_or_one(torch.linalg.vector_norm(rows, dim=-1))
    return found


def padded(vector: Tensor, like: Tensor) -> Tensor:
    """A vector `(*batch, q)` with zeros for the slacks of another, `(*batch, q + k)`."""
    k = like.shape[-1] - vector.shape[-1]
    return torch.nn.functional.pad(vector, (0, k)) if k else vector


def _like(value: float | Tensor, like: Tensor) -> Tensor:
    """A number or tensor in the dtype and on the device of another, whatever torch's own default is."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def _is_sparse(rows: Any) -> bool:
    return isinstance(rows, Tensor) and rows.layout != torch.strided


def _demand_matrix(name: str, rows: Any) -> None:
    """Refuse rows that are known by products only, and sparse ones that are no matrix, saying what to do."""
    if callable(rows) and not isinstance(rows, Tensor):
        raise TypeError(
            f"`Polytope({name}=...)` must be a matrix, dense or sparse, and not a function that multiplies by one. Got"
            f" {type(rows).__name__}. Constraints that are functions of y are `inequalities=` and `equalities=` of"
            f" `ManyConstraints`; or pass the matrix, `torch.func.jacrev` of the function at any y."
        )
    if _is_sparse(rows) and rows.dim() != 2:
        raise ValueError(f"`Polytope({name}=...)` must be a matrix. Got a sparse tensor of shape {tuple(rows.shape)}.")
