"""Whether y is to an estimator what steps make of a start, by the inner solver that it is made of."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, cast

from bilevel._estimate import AbstractRequiring
from bilevel._inner import AbstractInnerSolver


def why_iteration(estimator: object) -> str:
    """Why the inner problem is an iteration to an estimator or algorithm, by its inner solver; empty: it is not.

    Such as a step length that is a function of x. What implicit estimators, references and certificates are about,
    y*(x), is then not what y is.
    """
    is_solver, requires = _sort(cast(Any, estimator).__class__)
    if is_solver:
        found: str = cast(AbstractInnerSolver, estimator).why_iteration
        return found
    if requires:
        for name in parts_of(cast(Any, estimator).__class__):
            part = getattr(estimator, name)
            if _sort(part.__class__) != _NEITHER and (why := why_iteration(part)):
                return why
    return ""


_NEITHER = (False, False)


@cache
def _sort(kind: type) -> tuple[bool, bool]:
    """Whether it is a class of inner solvers, and of what declares what it requires; asked before every estimate."""
    return issubclass(kind, AbstractInnerSolver), issubclass(kind, AbstractRequiring)


@cache
def parts_of(kind: type) -> tuple[str, ...]:
    """The names of what a dataclass is made of."""
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) else ()
