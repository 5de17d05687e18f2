"""Whether y is to an estimator what steps make of a start, by the inner solver that it is made of."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import cache

from bilevel._estimate import AbstractRequiring
from bilevel._inner import AbstractInnerSolver


def why_iteration(estimator: object) -> str:
    """Why the inner problem is an iteration to an estimator or algorithm, by its inner solver; empty: it is not.

    Such as a step length that is a function of x. What implicit estimators, references and certificates are about,
    y*(x), is then not what y is.
    """
    if isinstance(estimator, AbstractInnerSolver):
        return estimator.why_iteration
    if not isinstance(estimator, AbstractRequiring):
        return ""
    parts = (getattr(estimator, name) for name in parts_of(type(estimator)))
    return next((why for why in map(why_iteration, parts) if why), "")


@cache
def parts_of(kind: type) -> tuple[str, ...]:
    """The names of what a dataclass is made of."""
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) else ()
