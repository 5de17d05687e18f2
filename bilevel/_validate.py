"""Arguments as they are given: those of a wrong type are refused, and keywords of old are put where they belong now."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import numbers
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, final

from bilevel.arguments.batch import demand_batch as demand_batch
from bilevel.arguments.fits import demand_type as demand_type, demand_types as demand_types

P = ParamSpec("P")
R = TypeVar("R")

_LONG = 150  # characters of an argument in a message, beyond which it hides what the message says


def changed(value: Any, changes: dict[str, Any]) -> Any:
    """A dataclass with some of its fields changed."""
    return dataclasses.replace(value, **changes)


@final
@dataclass(frozen=True, eq=False)
class Group:
    """Keywords that a function had, and that are fields of the value of one of its arguments now.

    Attributes:
        fields: the keyword of old -> the field.
        build: (the argument as given or by default, the fields) -> the argument with them.
    """

    fields: Mapping[str, str]
    build: Callable[[Any, dict[str, Any]], Any] = changed


def grouped(**groups: Group) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function take, with a DeprecationWarning that says what to write, the keywords that a group has now.

    Type checkers, `help` and `inspect.signature` see the function as it is defined. A keyword that it never had is a
    TypeError as ever. None for an argument that is a group is its default.

    Args:
        groups: by the name of the argument that is the group.

    Example:
        >>> @dataclass(frozen=True)
        ... class Stopping:
        ...     steps: int = 10
        ...     tol: float = 0.0
        >>> @grouped(stopping=Group({"max_steps": "steps"}))
        ... def run(stopping: Stopping = Stopping()):
        ...     return stopping
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     run(max_steps=3)
        Stopping(steps=3, tol=0.0)
        >>> str(caught[0].message)
        '`run(max_steps=...)` is an old form, and will go: write `run(stopping=Stopping(steps=3))`.'
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
        call = getattr(function, "__name__", repr(function))

        @functools.wraps(function)
        def called(*args: P.args, **keywords: P.kwargs) -> R:
            return function(*args, **_regrouped(call, groups, defaults, keywords))

        return called

    return decorate


def _regrouped(
    call: str, groups: Mapping[str, Group], defaults: Mapping[str, Any], keywords: Mapping[str, Any]
) -> dict[str, Any]:
    """The keywords with those of old in their groups; warns, on behalf of the caller's caller, if there were any."""
    found, old, new = dict(keywords), [], []
    for name, group in groups.items():
        if found.get(name, ...) is None:
            del found[name]
        changes = {field: found.pop(key) for key, field in group.fields.items() if key in found}
        if changes:
            found[name] = group.build(found.get(name, defaults[name]), changes)
            old += [f"{key}=..." for key, field in group.fields.items() if field in changes]
            new += [f"{name}={_written(found[name])}"]
    if old:
        text = f"`{call}({', '.join(old)})` is an old form, and will go: write `{call}({', '.join(new)})`."
        warnings.warn(text, DeprecationWarning, stacklevel=3)
    return found


def _written(value: Any) -> str:
    """How to write the value of a group in a call: what differs from its defaults, `...` for what is long."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return _short(value)
    own = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
    parts = [f"{field.name}={_short(given)}" for field, given in own if not _is_default(given, field.default)]
    return f"{type(value).__name__}({', '.join(parts)})"


def _short(value: Any) -> str:
    text = repr(value)
    if len(text) <= _LONG and not text.startswith("<"):
        return text
    return f"{type(value).__name__}(...)" if dataclasses.is_dataclass(value) else "..."


def _is_default(value: Any, default: Any) -> bool:
    plain = isinstance(value, numbers.Number | str | tuple) and isinstance(default, type(value))
    return value is default or (plain and value == default)
