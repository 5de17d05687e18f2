"""Arguments as they are given: those of a wrong type are refused, and keywords of old are put where they belong now."""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import inspect
import numbers
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, final

from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_LONG = 150  # characters of an argument in a message, beyond which it hides what the message says
_NEAR = 0.65  # the part of letters in common from which on a name may have been meant
_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a string",
    types.NoneType: "None",
    Tensor: "a tensor",
}
_EXAMPLES = {
    "AbstractInnerSolver": "an inner solver such as `LBFGS()`",
    "AbstractUnrollable": "an iteration of differentiable steps such as `Iterate(GradientDescent(0.1), 100)`",
    "AbstractLinearSolver": "a linear solver such as `CG()`",
    "AbstractPreconditioner": "a preconditioner such as `Jacobi()`",
    "AbstractOptimizer": "an optimizer such as `GradientDescent(0.1)`",
    "AbstractUnrolling": "a form of unrolling such as `Checkpointed()`",
    "AbstractProducts": "`bilevel.FiniteDifferences()` or the like",
}


def demand_types(owner: Any, wanted: Mapping[str, str] | None = None) -> None:
    """Refuse a dataclass whose fields are not what their annotations say; for its `__post_init__`.

    Args:
        owner: the instance.
        wanted: what a field must be, in words, where its type does not say it well.

    Raises:
        TypeError: naming the argument, what is required, what arrived and what to do.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Solver:
        ...     max_steps: int
        ...     def __post_init__(self):
        ...         demand_types(self)
        >>> Solver(2.5)
        Traceback (most recent call last):
        TypeError: `Solver(max_steps=...)` must be an integer. Got 2.5 (float).
    """
    kind: Any = type(owner)
    fields = _annotated(kind)
    for name, hint in fields:
        value = getattr(owner, name)
        if not _fits(value, hint):
            others = [] if isinstance(value, numbers.Number | str | Tensor) else fields
            better = next((f" Write `{kind.__name__}({other}=...)`." for other, own in others if _fits(value, own)), "")
            raise TypeError(_refusal(kind.__name__, name, value, hint, (wanted or {}).get(name)) + better)


def demand_type(call: str, name: str, value: Any, hint: Any, wanted: str | None = None) -> None:
    """Refuse one argument of a call that is not of the type `hint`.

    Raises:
        TypeError: naming the argument, what is required, what arrived and what to do.

    Example:
        >>> demand_type("minimize", "tol", "small", float | None)
        Traceback (most recent call last):
        TypeError: `minimize(tol=...)` must be a number or None. Got 'small' (str).
    """
    if not _fits(value, hint):
        raise TypeError(_refusal(call, name, value, hint, wanted))


def demand_batch(data: Any) -> None:
    """Refuse a loader where one batch is needed, and a tuple, list or dict of loaders.

    Raises:
        TypeError: saying how to get one.
    """
    if _is_loader(data):
        raise TypeError(
            f"`data=...` must be one batch here: f and g are called with it. Got a {type(data).__name__}. Pass"
            f" `next(iter(loader))`; a loader goes to `minimize(data=...)`."
        )
    if isinstance(data, tuple | list | dict):
        parts = list(data.values() if isinstance(data, dict) else data)
        if parts and all(map(_is_loader, parts)):
            raise TypeError(
                f"`data=...` must be one batch: f and g are called with it. Got a {type(data).__name__} of"
                f" {len(parts)} loaders ({', '.join(type(part).__name__ for part in parts)}). One loader for f and one"
                f" for g are `minimize(data=Split(f=loader, g=loader))`; elsewhere pass a batch of each, such as"
                f" `data=Split(f=next(iter(loader)), g=next(iter(loader)))`."
            )


def _is_loader(data: Any) -> bool:
    names = {f"{base.__module__}.{base.__name__}" for base in type(data).__mro__}
    loader = "torch.utils.data.dataloader.DataLoader" in names  # known by its name: nothing is imported for it
    return loader or isinstance(data, collections.abc.Iterator)


def nearest(name: Any, known: Iterable[str]) -> str:
    """A sentence with the known name that a mistaken one comes nearest to, and a space; empty where none is near.

    Example:
        >>> nearest("lerning_rate", ["learning_rate", "steps"])
        "Did you mean 'learning_rate'? "
    """
    text, names = str(name), list(known)
    longer = [other for other in names if len(text) > 1 and other.startswith(text)]
    found = longer or difflib.get_close_matches(text, names, n=1, cutoff=_NEAR)
    return f"Did you mean {found[0]!r}? " if found else ""


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


@functools.cache
def _annotated(kind: Any) -> tuple[tuple[str, Any], ...]:
    hints = typing.get_type_hints(kind)
    return tuple((field.name, hints[field.name]) for field in dataclasses.fields(kind))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as far as that can be told without looking into containers."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return True
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in options)
    if origin is collections.abc.Callable:
        return callable(value)
    if origin is typing.Literal:
        return isinstance(value, tuple(map(type, options)))  # which one it may be is for a ValueError to say
    if origin is tuple and Ellipsis not in options:
        return isinstance(value, tuple) and len(value) == len(options) and all(map(_fits, value, options))
    kind = hint if origin is None else origin
    return isinstance(value, kind) if isinstance(kind, type) else True


def _refusal(call: str, name: str, value: Any, hint: Any, wanted: str | None) -> str:
    if isinstance(value, type):
        got = f"the class {value.__name__} itself: write `{value.__name__}(...)`"
    elif isinstance(value, numbers.Number | str):
        got = f"{value!r} ({type(value).__name__})"
    else:
        got = type(value).__name__
    return f"`{call}({name}=...)` must be {wanted or ' or '.join(_described(hint))}. Got {got}."


def _described(hint: Any) -> list[str]:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return [text for option in options for text in _described(option)]
    if origin is typing.Literal:
        return [repr(option) for option in options]
    if origin is collections.abc.Callable:
        return ["a function"]
    if origin is tuple and Ellipsis not in options:
        return [f"a tuple of {len(options)}"]
    name = getattr(hint if origin is None else origin, "__name__", str(hint))
    return [_WORDS.get(hint) or _EXAMPLES.get(name) or f"a `{name}`"]
