"""What had been computed goes along with every exception."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", bound=BaseException)


def attach(error: E, partial: Any) -> E:
    """The exception, which is of its own type still, with `error.partial`.

    Example:
        >>> attach(KeyboardInterrupt(), "so far").partial
        'so far'
    """
    with contextlib.suppress(AttributeError, TypeError):  # a class of exceptions that takes no attributes
        error.partial = partial  # type: ignore[attr-defined]
    return error


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
