"""What an annotation admits: values that fit are passed on, numbers as Python's own, and others are refused."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import math
import numbers
import operator
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

_WORD = 2**63  # integers are of 64 bits, as torch's are


class UnfitError(Exception):
    """A value that is not what an annotation says, `where` it is in the argument, and which error it is."""

    def __init__(self, value: Any, where: str = "", error: type[Exception] = TypeError) -> None:
        self.value = value
        self.where = where
        self.error = error


class Fit(NamedTuple):
    """What an annotation admits.

    Attributes:
        exact: types whose values are passed on without a further look.
        take: a value -> the value to pass on; raises `UnfitError`.
    """

    exact: set[type]
    take: Callable[[Any], Any]


ANYTHING = Fit(set(), lambda value: value)


@functools.cache
def fit(hint: Any) -> Fit:
    """What a type admits: numbers of numpy and tensors without axes are numbers, True and False are none.

    Containers are looked into, functions are asked how many arguments they take.

    Example:
        >>> import torch
        >>> fit(float).take(torch.tensor(0.5)), fit(tuple[int, ...]).take((1, 2))
        (0.5, (1, 2))
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint in (Any, object) or getattr(hint, "_is_protocol", False):
        return ANYTHING
    if hint is float:
        return Fit({float}, _number)
    if hint is int:
        return Fit(set(), _integer)
    if hint is bool:
        return Fit({bool}, _truth)
    if origin in (typing.Union, types.UnionType):
        return _union([fit(option) for option in options])
    if origin is typing.Literal:
        return Fit(set(), lambda value: _literal(value, options))
    if origin is collections.abc.Callable:
        count = len(options[0]) if options and isinstance(options[0], list) else None
        return Fit(set(), lambda value: _function(value, count))
    kind = hint if origin is None else origin
    if not isinstance(kind, type):
        return ANYTHING
    if issubclass(kind, tuple) and options and options[-1] is not Ellipsis:
        return Fit(set(), lambda value: _tuple(value, [fit(option) for option in options]))
    if issubclass(kind, collections.abc.Mapping) and options:
        return Fit(set(), lambda value: _mapping(value, kind, fit(options[0]), fit(options[1])))
    if issubclass(kind, collections.abc.Collection) and options:
        return Fit(set(), lambda value: _collection(value, kind, fit(options[0])))
    return _instance(kind)


def demand_type(call: str, name: str, value: Any, hint: Any, wanted: str | None = None) -> None:
    """Refuse one argument of a call that is not of the type `hint`.

    Raises:
        TypeError: naming the argument, what is required, what arrived and what to do.

    Example:
        >>> demand_type("minimize", "tol", "small", float | None)
        Traceback (most recent call last):
        TypeError: `minimize(tol=...)` must be a number or None. Got 'small' (str).
    """
    try:
        fit(hint).take(value)
    except UnfitError as unfit:
        raise refused(call, name, unfit, hint, wanted) from None


def demand_types(owner: Any, wanted: Mapping[str, str] | None = None) -> None:
    """Refuse a dataclass whose fields are not what their annotations say; for its `__post_init__`.

    Numbers of numpy and tensors without axes become numbers.

    Args:
        owner: the instance.
        wanted: what a field must be, in words, where its type does not say it well.

    Raises:
        TypeError: naming the argument, what is required, what arrived and what to do.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Solver:
        ...     max_steps: int
        ...
        ...     def __post_init__(self):
        ...         demand_types(self)
        >>> Solver(2.5)
        Traceback (most recent call last):
        TypeError: `Solver(max_steps=...)` must be an integer. Got 2.5 (float).
    """
    kind: Any = type(owner)
    given = vars(owner)
    every, values, known = _read(kind)
    types_ = tuple(map(type, values(given)))
    # Whether a field is to be looked at follows from the types alone: what is left of it is known from the last time.
    left = known.get(types_)
    for name, hint, admitted in every if left is None else left:
        value = given[name]
        if type(value) in admitted.exact:
            continue
        try:
            taken = admitted.take(value)
        except UnfitError as unfit:
            more = _better(kind, name, value) if unfit.error is TypeError else ""
            raise refused(kind.__name__, name, unfit, hint, (wanted or {}).get(name), more) from None
        if taken is not value:
            object.__setattr__(owner, name, taken)
    if left is None and len(known) < _KNOWN:
        known[types_] = tuple(field for field, kind in zip(every, types_, strict=True) if kind not in field[2].exact)


_KNOWN = 64  # combinations of types that are kept of a class


@functools.cache
def _read(kind: Any) -> tuple[tuple[tuple[str, Any, Fit], ...], Callable[[Any], Any], dict[Any, Any]]:
    """The fields of a dataclass, a function that reads them all, and what is to be looked at, by their types."""
    every = fields(kind)
    names = [name for name, _, _ in every]
    if len(names) > 1:
        return every, operator.itemgetter(*names), {}
    return every, lambda given: [given[name] for name in names], {}


@functools.cache
def fields(kind: Any) -> tuple[tuple[str, Any, Fit], ...]:
    """(name, type, what it admits) of the fields of a dataclass."""
    found = resolved(str(kind.__module__), {field.name: field.type for field in dataclasses.fields(kind) if field.init})
    return tuple((name, hint, fit(hint)) for name, hint in found.items() if fit(hint) is not ANYTHING)


def resolved(module: str, annotations: Mapping[str, Any]) -> dict[str, Any]:
    """Annotations that a module wrote, as types; `Any` for those that only type checkers import."""
    names, found = vars(sys.modules[module]), {}
    for name, annotation in annotations.items():
        try:
            found[name] = eval(annotation, names) if isinstance(annotation, str) else annotation
        except NameError:
            found[name] = Any
    return found


def refused(call: str, name: str, unfit: UnfitError, hint: Any, wanted: str | None = None, more: str = "") -> Exception:
    """The error that says what the argument must be, and what arrived."""
    from bilevel.arguments.words import described, got  # which are read where something is wrong only

    where = f" at {name}{unfit.where}" if unfit.where else ""
    text = f"`{call}({name}=...)` must be {wanted or described(hint)}. Got {got(unfit.value)}{where}.{more}"
    return unfit.error(text)


def _better(kind: Any, name: str, value: Any) -> str:
    """Another argument that the value would fit, in words."""
    if isinstance(value, numbers.Number | str | Tensor) or callable(value):
        return ""
    for other, _, admitted in fields(kind):
        try:
            admitted.take(value)
        except UnfitError:
            continue
        if other != name:
            return f" Write `{kind.__name__}({other}=...)`."
    return ""


def _number(value: Any) -> float:
    if isinstance(value, float | int) and not isinstance(value, bool):
        return value if type(value) is float else _own(value)
    if isinstance(value, Tensor) and _scalar(value):
        return value.item()
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return _own(value)
    raise UnfitError(value)


def _own(value: Any) -> float:
    """Python's own number; an integer that no float reaches is infinite."""
    if isinstance(value, numbers.Integral):
        whole = int(value)
        return whole if abs(whole) < 2**1023 else math.inf if whole > 0 else -math.inf
    return float(value)


def _integer(value: Any) -> int:
    if type(value) is int and -_WORD <= value < _WORD:
        return value
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        whole = int(cast(Any, value))
        if not -_WORD <= whole < _WORD:
            raise UnfitError(value, error=ValueError)
        return whole
    if isinstance(value, Tensor) and _scalar(value) and not value.is_floating_point():
        return int(value.item())
    raise UnfitError(value)


def _scalar(value: Tensor) -> bool:
    """Whether it is a real number, and nobody's gradient would be lost with the tensor."""
    plain = not value.dim() and not value.requires_grad and not value.is_complex() and value.layout == torch.strided
    return plain and value.dtype is not torch.bool and value.device.type != "meta"


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise UnfitError(value)


def _union(fits: list[Fit]) -> Fit:
    if ANYTHING in fits:
        return ANYTHING

    def take(value: Any) -> Any:
        deepest = UnfitError(value)
        for each in fits:
            if type(value) in each.exact:
                return value
        for each in fits:
            try:
                return each.take(value)
            except UnfitError as unfit:
                deepest = max(deepest, unfit, key=lambda error: (error.error is ValueError, len(error.where)))
        raise deepest

    return Fit({kind for each in fits for kind in each.exact}, take)


def _literal(value: Any, options: tuple[Any, ...]) -> Any:
    kinds = set(map(type, options))
    if type(value) not in kinds:
        raise UnfitError(value)
    if value not in options:
        raise UnfitError(value, error=ValueError)
    return value


def _function(value: Any, count: int | None) -> Any:
    code = value.__code__ if type(value) is types.FunctionType else None
    if code is not None and code.co_argcount == count and not code.co_kwonlyargcount:
        return value  # what most are
    if callable(value) and (count is None or takes(value, count)):
        return value
    raise UnfitError(value)


def takes(function: Any, count: int) -> bool:
    """Whether a function can be called with so many arguments, as far as its code tells; True where it does not."""
    bound = isinstance(function, types.MethodType | type)
    plain = vars(function).get("__init__") if isinstance(function, type) else getattr(function, "__func__", function)
    if not isinstance(plain, types.FunctionType) or hasattr(plain, "__wrapped__"):
        return True
    code, defaults = plain.__code__, plain.__defaults__ or ()
    most = code.co_argcount - bound
    needed = code.co_kwonlyargcount - len(plain.__kwdefaults__ or ())
    return most - len(defaults) <= count and (count <= most or bool(code.co_flags & inspect.CO_VARARGS)) and not needed


def _tuple(value: Any, fits: list[Fit]) -> Any:
    if not isinstance(value, tuple) or len(value) != len(fits):
        raise UnfitError(value)
    return _rebuilt(
        value, [_part(part, each, f"[{k}]") for k, (part, each) in enumerate(zip(value, fits, strict=True))]
    )


def _collection(value: Any, kind: Any, each: Fit) -> Any:
    if not isinstance(value, kind) or isinstance(value, str | bytes | Tensor):
        raise UnfitError(value)
    if type(value) is tuple and all([type(part) in each.exact for part in value]):
        return value
    parts = [
        part if type(part) in each.exact else _part(part, each, f"[{k}]") for k, part in enumerate(_iterated(value))
    ]
    return _rebuilt(value, parts)


def _mapping(value: Any, kind: Any, key: Fit, each: Fit) -> Any:
    if not isinstance(value, kind):
        raise UnfitError(value)
    for name, part in value.items():
        _part(name, key, ", a key")
        _part(part, each, f"[{name!r}]")
    return value


def _part(value: Any, each: Fit, where: str) -> Any:
    try:
        return value if type(value) in each.exact else each.take(value)
    except UnfitError as unfit:
        raise UnfitError(unfit.value, where + unfit.where, unfit.error) from None


def _iterated(value: Any) -> Iterable[Any]:
    try:
        return list(value)
    except Exception:
        raise UnfitError(value) from None


def _rebuilt(value: Any, parts: list[Any]) -> Any:
    """The container with these parts: itself, where none was converted."""
    if type(value) in (tuple, list) and any(new is not old for new, old in zip(parts, value, strict=True)):
        return type(value)(parts)
    return value


def _instance(kind: type) -> Fit:
    exact: set[type] = {kind}

    def take(value: Any) -> Any:
        if not isinstance(value, kind):
            raise UnfitError(value)
        exact.add(type(value))  # a subclass that was met once is known from then on
        return value

    return Fit(exact, take)
