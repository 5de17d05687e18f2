"""Small values that the library makes of what it has itself computed, at every step: nothing of them is looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
Made = TypeVar("Made")


def unchecked(kind: Callable[P, Made]) -> Callable[P, Made]:
    """What makes instances of a class as its constructor does, but for the look at the arguments.

    Some ten values are made in each estimate. Looking at what cannot be wrong, and setting the fields of a frozen class
    one by one, takes as long as a small gradient. For types that a type checker has seen only: nothing is converted.

    Args:
        kind: a dataclass whose `__post_init__` does nothing but look, or a class whose constructor is `@checked`.

    Returns:
        A function of the arguments of the constructor.

    Example:
        >>> from bilevel._result import Report, Status
        >>> made = unchecked(Report)("inner solver", Status.successful, 0.0, steps=3)
        >>> made == Report("inner solver", Status.successful, 0.0, 3)
        True
    """
    owner: Any = kind
    new, given_by_decorator = object.__new__, is_dataclass(kind)
    if not given_by_decorator:
        fill = owner.__init__.__wrapped__

        def put_together(*args: P.args, **given: P.kwargs) -> Made:
            found = new(owner)
            fill(found, *args, **given)
            return cast(Made, found)

        return put_together
    names = [field.name for field in fields(owner)]
    empty = {field.name: None if field.default is MISSING else field.default for field in fields(owner)}

    def put(*args: P.args, **given: P.kwargs) -> Made:
        found = new(owner)
        content = found.__dict__
        content.update(empty)  # in the order of the fields, as they are listed
        content.update(zip(names, args, strict=False))
        content.update(given)
        return cast(Made, found)

    return put
