"""Linear systems known by their products: the operator, and what a linear solver is."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from bilevel._numerics.sparse_rows import SparseRows
from bilevel.arguments.fits import demand_type, demand_types
from bilevel.portable.pickling import AbstractPortable

if TYPE_CHECKING:
    from bilevel._result import Solved
    from bilevel.certificates.certificate import Constants


@final
@dataclass(frozen=True)
class OperatorProperties:
    """What is declared of a matrix, and what a solver demands of one; positive definite implies symmetric.

    Attributes:
        symmetric: A = A'.
        positive_definite: symmetric, and v'Av > 0 for v != 0.
        transposed: products with A' can be formed; symmetric implies it.
        contraction: the spectral radius of I - A has been estimated: A is that of a fixed point.

    Example:
        >>> OperatorProperties(symmetric=True).admits(OperatorProperties(positive_definite=True))
        False
    """

    symmetric: bool = False
    positive_definite: bool = False
    transposed: bool = False
    contraction: bool = False

    def __post_init__(self) -> None:
        demand_types(self)

    def admits(self, demanded: OperatorProperties) -> bool:
        """Whether a matrix with these properties has all that are demanded."""
        demand_type("OperatorProperties.admits", "demanded", demanded, OperatorProperties)
        symmetric = self.symmetric or self.positive_definite
        transposed = self.transposed or symmetric
        return (
            (symmetric or not demanded.symmetric)
            and (self.positive_definite or not demanded.positive_definite)
            and (transposed or not demanded.transposed)
            and (self.contraction or not demanded.contraction)
        )


@cache
def _declared(symmetric: bool, positive_definite: bool, transposed: bool, contraction: bool) -> OperatorProperties:
    return OperatorProperties(symmetric, positive_definite, transposed, contraction)


ANY = OperatorProperties()
SYMMETRIC = OperatorProperties(symmetric=True)
TRANSPOSED = OperatorProperties(transposed=True)
FIXED_POINT = OperatorProperties(transposed=True, contraction=True)
ESTIMATED_CONTRACTION = OperatorProperties(contraction=True)
POSITIVE_DEFINITE = OperatorProperties(symmetric=True, positive_definite=True)


@final
@dataclass(frozen=True, eq=False)
class SaddleBlocks:
    """The blocks of a saddle-point matrix [[M, A'], [A, 0]], for solvers that know what to do with them.

    Attributes:
        M: the leading block, as an operator of size q.
        A: the rows of the equalities `(*batch, m, q)`.
        free: the entries of the first q unknowns that are coupled to anything `(*batch, q)`; M is the identity on the
            others, and A zero.
        slacks: k, if the last k of the first q unknowns are slacks, each in one of the last k rows of A, with
            coefficient one, and M is zero on those that are free.
    """

    M: LinearOperator
    A: Tensor
    free: Tensor
    slacks: int = 0


@final
@dataclass(frozen=True, eq=False)
class SparseBlocks:
    """The blocks of a matrix [[M, S'], [S, 0]] with sparse S, for solvers that factor it.

    Attributes:
        M: the leading block, as an operator of size q.
        S: the rows.
        free: the entries of the first q unknowns that are coupled to anything `(q,)`.
        on: the rows that count.
        size: what the matrix is on the diagonal, for the other unknowns and rows.
    """

    M: LinearOperator
    S: SparseRows
    free: Tensor
    on: Tensor
    size: Tensor


@final
@dataclass(frozen=True, eq=False)
class LinearOperator(AbstractPortable):
    """A matrix A known by its products `mv(v) = A v`; its properties are declared, and solvers demand them.

    Vectors are `(n,)`, or `(batch, n)` for independent systems side by side (a block-diagonal A).

    Attributes:
        mv: the product; what it returns may alias its argument and must not be modified.
        size: n.
        positive_definite: whether A is declared symmetric positive definite. Unchecked; solvers that meet the
            contrary report it by their status.
        symmetric: whether A is declared symmetric.
        last_mv: the product at the vector that a solver is about to return, for its true residual; an operator
            may prepare there what its owner needs at that vector. None: the same as `mv`.
        diagonal: a positive diagonal near A, of the shape of a vector, where its owner knows one; for preconditioners.
            A function without arguments makes it where it is asked for.
        blocks: those of a saddle-point matrix, where it is one.
        sparse: the same with sparse rows, of one problem.
        transposed_mv: the product A' v, where there is one and A is not symmetric.
        contraction: the spectral radius of I - A, `()` or `(batch,)`, where its owner has estimated it: what decides
            whether the series of its powers converges.

    Example:
        >>> A = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
        >>> LinearOperator(lambda v: v @ A, 2, positive_definite=True).dense(torch.zeros(2))
        tensor([[2., 0.],
                [0., 3.]])
    """

    mv: Callable[[Tensor], Tensor]
    size: int
    positive_definite: bool = False
    symmetric: bool = True
    last_mv: Callable[[Tensor], Tensor] | None = None
    diagonal: Tensor | Callable[[], Tensor] | None = None
    blocks: SaddleBlocks | None = None
    transposed_mv: Callable[[Tensor], Tensor] | None = None
    contraction: Tensor | None = None
    sparse: SparseBlocks | None = None

    def __post_init__(self) -> None:
        demand_types(self, {"diagonal": "a tensor, a function that returns one, or None"})

    @property
    def known_diagonal(self) -> Tensor | None:
        """The diagonal, made if need be; None: its owner knows none."""
        return self.diagonal if self.diagonal is None or isinstance(self.diagonal, Tensor) else self.diagonal()

    @property
    def properties(self) -> OperatorProperties:
        """What is declared of A."""
        symmetric = self.symmetric or self.positive_definite
        transposed = symmetric or self.transposed_mv is not None
        return _declared(symmetric, self.positive_definite, transposed, self.contraction is not None)

    @property
    def transposed(self) -> Callable[[Tensor], Tensor]:
        """The product with A'.

        Raises:
            ValueError: if none is known.
        """
        if self.symmetric or self.positive_definite:
            return self.mv
        if self.transposed_mv is None:
            raise ValueError("`LinearOperator.transposed` needs a symmetric A, or `transposed_mv=`. Got neither.")
        return self.transposed_mv

    def residual(self, b: Tensor, v: Tensor) -> Tensor:
        """The true residual b - A v at a vector that is about to be returned; one product."""
        return b - (self.mv if self.last_mv is None else self.last_mv)(v)

    def shifted(self, damping: float) -> LinearOperator:
        """A + damping I, with the same declared properties (for damping >= 0)."""
        if damping == 0.0:
            return self
        last = self.mv if self.last_mv is None else self.last_mv
        other, known = self.transposed_mv, self.diagonal
        diagonal = (
            known + damping if isinstance(known, Tensor) else None if known is None else lambda: known() + damping
        )
        return LinearOperator(
            lambda v: self.mv(v).add(v, alpha=damping),
            self.size,
            self.positive_definite,
            self.symmetric,
            lambda v: last(v).add(v, alpha=damping),
            diagonal,
            transposed_mv=None if other is None else lambda v: other(v).add(v, alpha=damping),
        )

    def dense(self, like: Tensor, columns_only: int | None = None) -> Tensor:
        """A as a matrix `(n, n)`, or `(batch, n, n)`, by n products; `like` is a vector of the right shape.

        Its first `columns_only` columns alone, where that is given.
        """
        columns = []
        for j in range(self.size if columns_only is None else columns_only):
            unit = torch.zeros_like(like)
            unit[..., j] = 1.0
            columns.append(self.mv(unit).clone())
        return torch.stack(columns, dim=-1)


class AbstractLinearSolver(AbstractPortable, abc.ABC):
    """Solves A v = b to a tolerance or for a number of steps.

    The contract of every solver: a zero right-hand side gives zero; the returned vector is the one that met the
    tolerance, and `Solved.residual` is its true residual, recomputed with one product; exact convergence before
    the last step is success; NaN is a status, never replaced; b and guess are not modified; rows of a batch are
    independent systems, each with its own step lengths and status.
    """

    @property
    def demands(self) -> OperatorProperties:
        """What the method needs of A: the strictest unless it says otherwise. Without it, an estimate is refused."""
        return POSITIVE_DEFINITE

    @property
    def tolerates_indefinite(self) -> bool:
        """Whether it solves with a symmetric A that was declared positive definite and is not; False unless it says so.

        Others report it by a status. What `check` finds of the curvature is held against this.
        """
        return False

    @property
    def finds_indefinite(self) -> bool:
        """Whether it reports a saddle-point matrix that is not positive definite on the null space of its constraints.

        Where it does not say so, that is measured beside it, at the cost of more products.
        """
        return False

    @property
    def forgets_start(self) -> bool:
        """Whether the v that it returns does not depend on the guess: it has a tolerance, or is a factorization.

        One that says nothing is taken to remember it: a run of estimates then starts it at zero each time.
        """
        return False

    @abc.abstractmethod
    def solve(self, operator: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Solved:
        """Solve A v = b.

        Args:
            operator: A, with its declared properties.
            b: the right-hand side `(n,)` or `(batch, n)`.
            guess: where to start, of the shape of b; None is zero, and saves one product.

        Raises:
            ValueError: if the operator is not declared to have a property that the method needs.
        """

    def with_tolerance(self, tol: float, size: float, trusting: bool = False) -> AbstractLinearSolver | None:
        """This solver, stopping where |b - A v| <= tol; None: it has no tolerance (a factorization).

        One that says nothing is taken to have none: certified accuracy then uses it as it is.

        Args:
            tol: the tolerance, absolute.
            size: |b|, for solvers that know relative tolerances only.
            trusting: do without the true residual of the system, where the solver can: nothing rests on it.
        """
        return None

    def with_preconditioner(self, preconditioner: AbstractPreconditioner) -> AbstractLinearSolver | None:
        """This solver, preconditioned, where it has no preconditioner of its own, which it keeps; None: it takes none.

        One that says nothing is taken to take none, and is used without.
        """
        return None

    @property
    def is_approximate(self) -> bool:
        """Whether what it solves is another system, by construction: of low rank, or damped. No, unless it says so."""
        return self.own_damping > 0

    @property
    def own_damping(self) -> float:
        """rho, where the system that it solves is (A + rho I) v = b: a bias that no accuracy removes."""
        return 0.0

    def relative_error(self, constants: Constants, damping: float) -> float:
        """A bound on |v - v_exact| from zero, in units of |b| / (mu + damping + own_damping); for `error_bound`.

        A relative residual that it reaches is one.

        Args:
            constants: mu and L of A.
            damping: what is added to the eigenvalues of A.

        Raises:
            ValueError: if none is known, as here, for a solver that says nothing; or if a constant is missing.
        """
        raise unknown_error(self)


def unknown_error(solver: AbstractLinearSolver) -> ValueError:
    """That it is not known in advance what a linear solver reaches, and what to call instead."""
    return ValueError(
        f"no bound is known for {solver!r}: what it reaches is not known in advance. Call `bounds.aid` with"
        f" linear_error=..., the relative residual that it reaches."
    )


class AbstractPreconditioner(AbstractPortable, abc.ABC):
    """Builds r -> M^-1 r with M ~ A symmetric positive definite, once a solve."""

    @abc.abstractmethod
    def build(self, operator: LinearOperator, like: Tensor) -> Callable[[Tensor], Tensor]:
        """The map, for vectors of the shape of `like`; products with the operator are counted as any other."""


def unmet(demanded: OperatorProperties, declared: OperatorProperties) -> str:
    """Which demanded property is not declared, and what to use instead; empty if none is missing."""
    if declared.admits(demanded):
        return ""
    if demanded.positive_definite:
        return (
            "requires an operator declared symmetric positive definite. Got one that is not."
            " Use `MINRES` if it is symmetric, `GMRES` or `Dense` otherwise."
        )
    if demanded.symmetric:
        return "requires an operator declared symmetric. Got one that is not. Use `GMRES` or `Dense`."
    if demanded.contraction and not declared.contraction:
        return (
            "requires the system of a fixed point, with an estimate of the spectral radius of I - A. Got another. Use"
            " `Neumann`, or a solver that solves the system."
        )
    return "requires products with the transpose. Got an operator without. Use `GMRES`, `BiCGStab` or `Dense`."


def demand(operator: LinearOperator, solver: str, demanded: OperatorProperties) -> None:
    """Refuse an operator without a declared property.

    Raises:
        ValueError: naming the solver, what it requires and what to use instead.
    """
    why = unmet(demanded, operator.properties)
    if why:
        raise ValueError(f"`{solver}` {why}")
