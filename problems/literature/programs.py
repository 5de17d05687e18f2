"""The functions of a statement with their derivatives, as arrays, and nonlinear programs made of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel.problems.literature.statement import Statement

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

_STEP = 1e-5  # of differences of first derivatives, which are exact: what they leave out is about its square
_TINY = 1e-40  # of the imaginary parts
_SATISFIED, _SLACK = 1e-8, 1e-9
_EXACT = 1e-12  # at which changes of f a program has been solved


@final
@dataclass(frozen=True, eq=False)
class Values:
    """f, g and the constraints at a point z = (x, y), in this order: f, g, outer, inner, equal.

    Attributes:
        at: their values `(k,)`.
        first: their first derivatives `(k, p + q)`.
    """

    at: Array
    first: Array


@final
class Model:
    """A statement as functions of z = (x, y) in float64 arrays.

    Args:
        statement: the problem.
    """

    def __init__(self, statement: Statement) -> None:
        self.statement = statement
        self.p, self.q = statement.sizes
        self.n = self.p + self.q
        z = torch.zeros(self.n, 1, dtype=torch.float64)
        lists = (statement.outer, statement.inner, statement.equal)
        sizes = [0 if each is None else len(each(z[: self.p], z[self.p :])) for each in lists]
        first = 2
        ranges = []
        for size in sizes:
            ranges.append(slice(first, first + size))
            first += size
        self.outer, self.inner, self.equal = ranges

    def _all(self, z: Tensor) -> Tensor:
        """All functions at columns of z: `(k, columns)`."""
        x, y = z[: self.p], z[self.p :]
        found = [self.statement.f(x, y), self.statement.g(x, y)]
        for each in (self.statement.outer, self.statement.inner, self.statement.equal):
            found += [] if each is None else list(each(x, y))
        return torch.stack(found)

    def many(self, z: Array) -> Array:
        """All functions at the columns of z: `(k, columns)`."""
        found: Array = self._all(torch.from_numpy(z)).numpy()
        return found

    def values(self, z: Array) -> Values:
        """Values and first derivatives, which are the imaginary parts at steps so short that nothing is left out.

        Source: Squire, Trapp, "Using complex variables to estimate derivatives of real functions", SIAM Rev. 40 (1998).
        """
        import numpy as np

        point = [complex(entry) for entry in z]
        columns = []
        for i, entry in enumerate(point):
            columns.append(self._complex([*point[:i], entry + _TINY * 1j, *point[i + 1 :]]))
        found: Any = np.array(columns)
        return Values(found[0].real.copy(), np.ascontiguousarray(found.T.imag) / _TINY)

    def second(self, z: Array) -> Array:
        """Second derivatives `(k, p + q, p + q)`: central differences of exact first ones."""
        import numpy as np

        n = self.n
        moved = z[:, None] + np.concatenate([np.eye(n), -np.eye(n)], 1) * _STEP
        columns = np.repeat(moved, n, 1) + _TINY * 1j * np.tile(np.eye(n), 2 * n)
        values: Any = np.stack(self._complex(list(columns)))
        slopes = values.imag.reshape(-1, 2, n, n) / _TINY
        found: Array = (slopes[:, 0] - slopes[:, 1]) / (2 * _STEP)
        return found

    def _complex(self, z: Any) -> list[Any]:
        """All functions at complex entries of z, numbers or arrays."""
        x, y = z[: self.p], z[self.p :]
        found: list[Any] = [self.statement.f(x, y), self.statement.g(x, y)]
        for each in (self.statement.outer, self.statement.inner, self.statement.equal):
            found += [] if each is None else list(each(x, y))
        return found


@final
@dataclass(frozen=True, eq=False)
class Program:
    """min objective(w)  s.t.  below(w) <= 0, zero(w) = 0, lower <= w <= upper; each function with its derivatives.

    Attributes:
        objective: w -> value and gradient.
        below: w -> values `(k,)` and derivatives `(k, n)`.
        zero: the same.
        lower: bounds, infinite where there are none.
        upper: the same.
    """

    objective: Callable[[Array], tuple[float, Array]]
    below: Callable[[Array], tuple[Array, Array]]
    zero: Callable[[Array], tuple[Array, Array]]
    lower: Array
    upper: Array


def minimized(program: Program, w: Array, max_steps: int = 100) -> tuple[Array, float]:
    """A local minimizer by scipy's SLSQP from w, and the largest violation there; w itself where that fails.

    Raises:
        ImportError: if scipy is missing, naming the extra to install.
    """
    _, np = _scipy()
    found = _minimized(program, w, max_steps)
    if not found[1] <= _SATISFIED:  # SLSQP gives up where gradients of equations depend on each other
        with contextlib.suppress(ArithmeticError), np.errstate(all="ignore"):  # nothing is defined at w
            loose = _minimized(_loosened(program, w), np.concatenate([w, np.zeros(len(program.zero(w)[0]))]), max_steps)
            violation = _violation(program, loose[0][: len(w)])
            if violation < found[1]:
                return loose[0][: len(w)], violation
    return found


def _loosened(program: Program, w: Array) -> Program:
    """The program with a slack in each equation, so short that it is none: the gradients are then independent."""
    import numpy as np

    n, k = len(w), len(program.zero(w)[0])

    def objective(v: Array) -> tuple[float, Array]:
        value, slope = program.objective(v[:n])
        return value, np.concatenate([slope, np.zeros(k)])

    def below(v: Array) -> tuple[Array, Array]:
        values, slopes = program.below(v[:n])
        return values, np.hstack([slopes, np.zeros((len(slopes), k))])

    def zero(v: Array) -> tuple[Array, Array]:
        values, slopes = program.zero(v[:n])
        return values + v[n:], np.hstack([slopes, np.eye(k)])

    slack = np.full(k, _SLACK)
    return Program(
        objective, below, zero, np.concatenate([program.lower, -slack]), np.concatenate([program.upper, slack])
    )


def _minimized(program: Program, w: Array, max_steps: int) -> tuple[Array, float]:
    optimize, np = _scipy()
    exact = Program(
        _remembered(program.objective),
        _remembered(program.below),
        _remembered(program.zero),
        program.lower,
        program.upper,
    )
    start = found = np.clip(w, exact.lower, exact.upper)
    with contextlib.suppress(ValueError, ArithmeticError), np.errstate(all="ignore"):  # a function is not finite
        constraints = [
            {"type": "ineq", "fun": lambda v: -exact.below(v)[0], "jac": lambda v: -exact.below(v)[1]},
            {"type": "eq", "fun": lambda v: exact.zero(v)[0], "jac": lambda v: exact.zero(v)[1]},
        ]
        sizes = [len(function(start)[0]) for function in (exact.below, exact.zero)]
        found = optimize.minimize(
            exact.objective,
            start,
            jac=True,
            method="SLSQP",
            constraints=[each for each, size in zip(constraints, sizes, strict=True) if size],
            bounds=optimize.Bounds(exact.lower, exact.upper),
            options={"ftol": _EXACT, "maxiter": max_steps},
        ).x
    if not np.isfinite(found).all():
        found = start
    found = np.clip(found, exact.lower, exact.upper)
    return found, _violation(exact, found)


def _violation(program: Program, w: Array) -> float:
    """The largest violation of a constraint; infinite where a function is not finite."""
    _, np = _scipy()
    try:
        with np.errstate(all="ignore"):
            below, zero = program.below(w)[0], program.zero(w)[0]
    except ArithmeticError:
        return float("inf")
    found = max(float(below.max(initial=0.0)), float(abs(zero).max(initial=0.0)))
    return found if np.isfinite(found) else float("inf")


def _remembered(function: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """A function that knows its last value; scipy's SLSQP reads arrays as if they were contiguous, so they are."""
    import numpy as np

    last: list[Any] = [None, None]

    def found(w: Array) -> Any:
        if last[0] is None or not (last[0] == w).all():
            value, slope = function(w)
            last[:] = w.copy(), (value, np.ascontiguousarray(slope))
        return last[1]

    return found


def _scipy() -> tuple[Any, Any]:
    try:
        import numpy
        from scipy import optimize
    except ImportError as error:
        raise ImportError('`literature.solve` needs scipy: `pip install "bilevel[scipy]"`.') from error
    return optimize, numpy
