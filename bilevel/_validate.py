"""Arguments of a wrong type, refused where they are given and not where they are first used."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any

from torch import Tensor

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
    """Refuse a loader where one batch is needed.

    Raises:
        TypeError: saying how to get one.
    """
    names = {f"{base.__module__}.{base.__name__}" for base in type(data).__mro__}
    loader = "torch.utils.data.dataloader.DataLoader" in names  # known by its name: nothing is imported for it
    if loader or isinstance(data, collections.abc.Iterator):
        raise TypeError(
            f"`data=...` must be one batch here: f and g are called with it. Got a {type(data).__name__}. Pass"
            f" `next(iter(loader))`; a loader goes to `minimize(data=...)`."
        )


@functools.cache
def _annotated(kind: Any) -> tuple[tuple[str, Any], ...]:
    hints = typing.get_type_hints(kind)
    return tuple((field.name, hints[field.name]) for field in dataclasses.fields(kind))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as far as that can be told without looking into containers."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
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
