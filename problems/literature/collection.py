"""The test problems by name, their functions, and what is known of them."""

from __future__ import annotations

import copyreg
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Literal, final

import torch
from torch import Tensor

from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.nearest import nearest
from bilevel.arguments.ranges import FINITE, demand_ranges
from bilevel.arguments.words import got
from bilevel.portable.pickling import AbstractPortable
from bilevel.problems.literature import (
    convex,
    linear,
    linear_in_y,
    nonconvex,
    nonconvex_several,
    simple,
    strict_box,
    strict_nonlinear,
    strict_poly,
)
from bilevel.problems.literature.statement import KINDS, Kind, Statement

_MODULES = (
    *(strict_box, strict_poly, strict_nonlinear, convex, linear, linear_in_y),
    *(nonconvex, nonconvex_several, simple),
)
_ALL = sorted(
    (each for module in _MODULES for each in module.STATEMENTS), key=lambda each: (KINDS.index(each.kind), each.name)
)
STATEMENTS: Mapping[str, Statement] = MappingProxyType({each.name: each for each in _ALL})


@final
@dataclass(frozen=True)
class Reference(AbstractPortable):
    """A point at which the hypergradient is known to ten digits; outer constraints play no part in it.

    Attributes:
        x: `(p,)`.
        y: the inner minimizer `(q,)`; constraints hold there with a margin, or with multipliers that have one.
        value: Phi(x) = f(x, y).
        grad: of Phi `(p,)`.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    value: float
    grad: tuple[float, ...]

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, value=FINITE)


@checked("literature.names")
def names(kind: Kind | None = None) -> tuple[str, ...]:
    """The names of the problems, or of those of one class.

    Args:
        kind: one of `literature.KINDS`; None: all of them.

    Example:
        >>> names("strict_unconstrained")
        ('HenrionSurowiec2011', 'HenrionSurowiec2011_c2', 'MacalHurter1997')
        >>> len(names())
        109
    """
    return tuple(name for name, each in STATEMENTS.items() if kind in (None, each.kind))


@checked("literature.statement")
def statement(name: str) -> Statement:
    """What the problem of that name says.

    Raises:
        ValueError: if there is none.

    Example:
        >>> statement("Bard1988Ex1").best
        Point(x=(1.0,), y=(0.0,), f=17.0, g=1.0)
    """
    if name not in STATEMENTS:
        raise ValueError(
            f"`literature.statement(name=...)` must be the name of a problem. Got {got(name)}."
            f" {nearest(name, list(STATEMENTS))}`bilevel list --literature` shows the names."
        )
    return STATEMENTS[name]


@checked("literature.references")
def references(name: str) -> tuple[Reference, ...]:
    """The points at which the hypergradient of a problem is known; of some problems there are none.

    Source: KKT systems solved by Newton's method to 1e-11, with strict complementarity and independent gradients of the
    active constraints, compared with differences of fourth order.

    Raises:
        ValueError: if there is no problem of that name.

    Example:
        >>> len(references("Bard1988Ex1"))
        3
    """
    statement(name)
    return _references().get(name, ())


def _by_name(said: Statement) -> tuple[Callable[[str], Statement], tuple[str]]:
    return statement, (said.name,)


copyreg.pickle(Statement, _by_name)  # its functions have no names of their own


def evaluate(name: str, role: Literal["f", "g", "outer", "inner", "equal"], x: Tensor, y: Tensor) -> Tensor:
    """The value of a function of a problem: `()` of f and g, `(k,)` of constraints."""
    found = statement(name)
    if role == "f":
        return found.f(x, y)
    if role == "g":
        return found.g(x, y)
    functions = {"outer": found.outer, "inner": found.inner, "equal": found.equal}[role]
    return x.new_zeros(0) if functions is None else torch.stack(functions(x, y))


def gaps(name: str, x: Tree, y: Tree) -> dict[str, float]:
    """How far a point is from the best known one: by value, and by how much constraints are violated."""
    best = statement(name).best
    with torch.no_grad():
        f, g = (float(evaluate(name, role, x, y)) for role in ("f", "g"))
        outer, inner, equal = (evaluate(name, role, x, y) for role in ("outer", "inner", "equal"))
    both = torch.cat([inner, equal.abs()])
    return {
        "gap to the best known": (f - best.f) / max(1.0, abs(best.f)),
        "inner value": g,
        "violation of outer constraints": float(outer.clamp_min(0).max()) if len(outer) else 0.0,
        "violation of inner constraints": float(both.clamp_min(0).max()) if len(both) else 0.0,
    }


@cache
def _references() -> dict[str, tuple[Reference, ...]]:
    text = files("bilevel.problems.literature").joinpath("references.json").read_text(encoding="utf-8")
    return {
        name: tuple(Reference(tuple(r["x"]), tuple(r["y"]), r["phi"], tuple(r["hypergrad"])) for r in rows)
        for name, rows in json.loads(text).items()
    }
