"""What had been computed goes along with every exception."""

from __future__ import annotations

import contextlib
import copyreg
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from bilevel._result import BilevelError
from bilevel.portable.pickling import copied, what_travels

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", bound=BaseException)


def attach(error: E, partial: Any) -> E:
    """The exception, which is of its own type still, with `error.partial`.

    It arrives from a worker also where that cannot be pickled: with the fields that can be, and a note that says so.

    Example:
        >>> attach(KeyboardInterrupt(), "so far").partial
        'so far'
    """
    with contextlib.suppress(AttributeError, TypeError):  # a class of exceptions that takes no attributes
        error.partial = partial  # type: ignore[attr-defined]
        if partial is not None and not isinstance(error, BilevelError):  # which sees to it itself
            copyreg.dispatch_table.setdefault(type(error), _reduced)
    return error


def _reduced(error: BaseException) -> Any:
    """How pickle takes an exception, of which `partial` may hinder it."""
    found: Any = error.__reduce_ex__(4)
    state = found[2] if isinstance(found, tuple) and len(found) > 2 else None
    if copied(2) or not isinstance(state, dict) or "partial" not in state:
        return found
    partial, lost = what_travels(state["partial"])
    if lost is None:
        return found
    notes = [*state.get("__notes__", ()), lost]
    return *found[:2], {**state, "partial": partial, "__notes__": notes}, *found[3:]


def tells_partial(function: Callable[P, R]) -> Callable[P, R]:
    """Every exception that leaves `function` has an attribute `partial`: None where nothing had been computed."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            if not hasattr(error, "partial"):
                attach(error, None)
            raise

    return wrapped
