"""The test problems by name: what they say, and what they are as problems of this library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Literal, final

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel._tree import Tree
from bilevel._validate import nearest
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
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
from bilevel.problems.literature.starts import starts
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
            f"the literature has no problem {name!r} here. {nearest(name, list(STATEMENTS))}`bilevel list --literature`"
            f" shows the names."
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


@checked("literature.load")
def load(name: str) -> Instance:
    """The problem of that name in float64, with its best known solution as `minimizer` and its gaps as `metrics`.

    f, g and the inner constraints are those of `Instance.problem`. The outer constraints are the setting
    `outer_inequalities`, as `minimize(outer_inequalities=...)` takes them, where there are any. The start is the first
    of :func:`bilevel.problems.literature.starts.starts`, which knows nothing of the solution.

    Raises:
        ValueError: if there is no problem of that name.

    Example:
        >>> instance = load("Bard1988Ex1")
        >>> instance.minimizer
        tensor([1.], dtype=torch.float64)
        >>> instance.metrics(instance.minimizer, torch.zeros(1, dtype=torch.float64))["gap to the best known"]
        0.0
    """
    found = statement(name)
    x0, y0 = starts(found, 1, seed=0)[0]
    constraints: dict[str, Any] = {}
    if found.inner is not None:
        constraints["inequalities"] = partial(evaluate, name, "inner")
    if found.equal is not None:
        constraints["equalities"] = partial(evaluate, name, "equal")
    outer = {} if found.outer is None else {"outer_inequalities": partial(evaluate, name, "outer")}
    problem = BilevelProblem(
        partial(evaluate, name, "f"), partial(evaluate, name, "g"), allow_unused=found.kind == "simple", **constraints
    )
    return Instance(
        problem=problem,
        x0=x0,
        y0=y0,
        description=f"{found.kind}: {found.source}" if found.source else found.kind,
        minimizer=torch.tensor(found.best.x, dtype=torch.float64),
        metrics=partial(gaps, name),
        settings=outer,
    )


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
