"""What may be registered under a name: the same for estimators and for algorithms."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from bilevel._validate import demand_type

AUTO = "auto"  # a wish, not an estimator or algorithm: see `Auto`


_LONGEST = 50  # so that lists of names can be read


def demand_registration(
    call: str, name: Any, build: Any, description: Any, *, known: Collection[str], registered: Collection[str]
) -> None:
    """Refuse a registration that is none.

    Args:
        call: who registers.
        name: must be one word, and new.
        build: must be a function that can be called with a setting alone.
        description: must be one line.
        known: the names that are taken, beside "auto", which is nobody's.
        registered: those of them that users registered.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if the name is taken, or it is not one word, or the description not one line.

    Example:
        >>> demand_registration("register", "two words", abs, "by abs", known=(), registered=())
        Traceback (most recent call last):
        ValueError: `register(name=...)` must be one word, of at most 50 letters. Got 'two words'.
    """
    demand_type(call, "name", name, str)
    demand_type(call, "description", description, str)
    wrong = _no_function_of_one_argument(build)
    if wrong:
        raise TypeError(
            f"`{call}(build=...)` must be a function of a setting. Got {wrong}. Write `lambda setting: ...`."
        )
    if name.split() != [name] or len(name) > _LONGEST:
        raise ValueError(f"`{call}(name=...)` must be one word, of at most {_LONGEST} letters. Got {name[:100]!r}.")
    if len(description.splitlines()) != 1 or not description.strip():
        raise ValueError(f"`{call}(description=...)` must be one line. Got {description[:200]!r}.")
    if name == AUTO or name in known:
        whose = "registered already" if name in registered else "a name of the library"
        raise ValueError(f"`{call}` has no name twice: {name!r} is {whose}. Choose another.")


def _no_function_of_one_argument(build: Any) -> str:
    """What it is instead; empty if it is one, or if it does not tell what it takes."""
    if isinstance(build, type):  # callable, but with its fields and not with a setting
        return f"the class {build.__name__} itself"
    if not callable(build):
        return type(build).__name__
    try:
        signature = inspect.signature(build)
    except Exception:  # written in C, or of no mind to tell
        return ""
    try:
        signature.bind(None)
    except TypeError:
        return f"a function of the arguments {signature}"
    return ""
