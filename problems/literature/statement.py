"""What a test problem of the literature says: its functions, and its best known solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, final, get_args

from torch import Tensor

from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import FINITE, demand_ranges
from bilevel.portable.pickling import AbstractPortable

Function: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Functions: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
Kind: TypeAlias = Literal[
    "strict_unconstrained",
    "strict_box",
    "strict_poly",
    "strict_nonlinear",
    "convex_poly",
    "convex_nonlinear",
    "lp",
    "fractional_lp",
    "nonconvex",
    "simple",
]
KINDS: tuple[Kind, ...] = get_args(Kind)


@final
@dataclass(frozen=True)
class Point(AbstractPortable):
    """The best known solution.

    Attributes:
        x: `(p,)`.
        y: an inner minimizer at x, of several the best for f `(q,)`.
        f: the outer value.
        g: the inner value.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    f: float
    g: float

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, f=FINITE, g=FINITE)


@final
@dataclass(frozen=True, eq=False)
class Statement(AbstractPortable):
    """min over x and y of f(x, y)  s.t.  outer(x, y) <= 0,  y in argmin {g(x, .) : inner(x, .) <= 0, equal(x, .) = 0}.

    Where the inner problem has several minimizers, y is the best of them for f (the optimistic convention), among those
    that satisfy the outer constraints.

    Attributes:
        name: author, year and number.
        kind: the class of the inner problem.
        sizes: p and q, the numbers of entries of x and y.
        f: the outer objective.
        g: the inner objective.
        best: the best known solution.
        outer: the outer constraints, which may depend on y; None: there are none.
        inner: the inner inequalities; None: there are none.
        equal: the inner equalities; None: there are none.
        certain: whether numerical evidence beyond the source says that `best` is the global solution (all active sets
            enumerated, dense grids, or a closed form). Otherwise it is feasible, its inner optimality was checked from
            many starts, and that it is the best is what the source says.
        source: where the problem was published; empty: the reference was not checked.
    """

    name: str
    kind: Kind
    sizes: tuple[int, int]
    f: Function = field(repr=False)
    g: Function = field(repr=False)
    best: Point = field(repr=False)
    outer: Functions | None = field(default=None, repr=False)
    inner: Functions | None = field(default=None, repr=False)
    equal: Functions | None = field(default=None, repr=False)
    certain: bool = True
    source: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        demand_types(self)
