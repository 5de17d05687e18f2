"""Values that are pickled, and say which of their fields cannot be: functions that no module has by their name."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import pickle
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

_DEPTH = 20  # of nestings that are looked into
_CACHED = type(functools.cache(len))
_PLAIN = (str, bytes, bool, int, float, complex, type(None))


class AbstractPortable:
    """A value that pickle takes with every protocol from 2 on, and `copy` with all of its functions.

    Pickle takes functions by the name that their module has for them: lambdas and functions defined inside of others
    have none. Where a field holds one, pickling is refused with the name of the field. Picklers that take functions by
    their code (cloudpickle, with it joblib's workers, and dill) are let through.

    Raises:
        pickle.PicklingError: from pickling, naming the class, the field, and where its function is defined.

    Example:
        >>> from bilevel import BilevelProblem
        >>> problem = BilevelProblem(lambda x, y: (y - 1).square().sum(), print)
        >>> try:
        ...     pickle.dumps(problem)
        ... except pickle.PicklingError as error:
        ...     print(str(error).split(" defined at ")[0])
        `pickle of BilevelProblem`: field `f` is a lambda
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not copied(2):
            demand_portable(self)
        return object.__reduce_ex__(self, protocol)


def demand_portable(owner: object) -> None:
    """Refuse to pickle a value one of whose fields holds a function or class that pickle cannot take.

    Raises:
        pickle.PicklingError: naming the field.
    """
    found = hindrance(owner)
    if found is not None and not taken_by_value():
        raise pickle.PicklingError(f"`pickle of {type(owner).__name__}`: {found}. {_REMEDY}")


def hindrance(owner: object, name: str | None = None) -> str | None:
    """Which field of a value holds a function or class that pickle cannot take, and what that is; None: no one.

    Args:
        owner: the value.
        name: the field whose value it is; None: its own fields are looked at.
    """
    for field, value in vars(owner).items() if name is None else ((name, owner),):
        found = obstacle(value)
        if found is not None:
            return f"field `{field.removeprefix('_')}{found[0]}` is {found[1]}"
    return None


def what_travels(partial: Any) -> tuple[Any, str | None]:
    """What an error can bring along from a worker: its partial result, or those fields of it that can be pickled.

    Returns:
        The value itself and None; or a namespace of the fields that pickle takes, None where there are no such, and a
        sentence about it.

    Example:
        >>> what_travels([1.0])
        ([1.0], None)
        >>> what_travels([lambda: 1.0])[0] is None
        True
    """
    try:
        pickle.dumps(partial)
    except Exception as error:
        taken = {}
        for each in fields(partial) if is_dataclass(partial) and not isinstance(partial, type) else ():
            with contextlib.suppress(Exception):
                own = getattr(partial, each.name)
                pickle.dumps(own)
                taken[each.name] = own
        kind = type(partial).__name__
        kept = (
            f"Of its `partial`, a {kind}, {', '.join(taken)} came along, and the rest"
            if taken
            else (f"Its `partial`, a {kind},")
        )
        return SimpleNamespace(**taken) if taken else None, f"{kept} stayed where it was raised: {error}"
    return partial, None


_REMEDY = (
    "Define it at the top of a module, where pickle finds it by its name; arguments that it needs go into a"
    " `functools.partial`, or into the fields of a class whose method it is."
)


def obstacle(value: Any) -> tuple[str, str] | None:
    """The first function or class in a value that pickle cannot take, as pickle takes them by their names.

    Functions, methods and partials are looked at, what lists, tuples, sets and dicts hold, and the attributes of
    objects that say nothing of how they are pickled themselves.

    Returns:
        Where it is in the value, as one would write it after the value's name, and what it is, in words; None: there is
        none.

    Example:
        >>> obstacle({"a": [print, len]}) is None
        True
        >>> where, what = obstacle({"a": [len, lambda x: x]})
        >>> where, what.split(" defined at ")[0]
        ("['a'][1]", 'a lambda')
    """
    return _obstacle(value, set(), 0)


def _obstacle(value: Any, seen: set[int], depth: int) -> tuple[str, str] | None:
    if isinstance(value, _PLAIN) or id(value) in seen or depth > _DEPTH:
        return None
    seen.add(id(value))
    kind: Any = type(value)
    if isinstance(value, FunctionType | type | _CACHED):
        return None if _has_its_name(value) else ("", described(value))
    written = "__module__" in vars(kind) and kind not in copyreg.dispatch_table
    if written and _says_nothing(kind) and not _has_its_name(kind):
        return "", f"an instance of {described(kind)}"
    for where, part in _parts(value):
        found = _obstacle(part, seen, depth + 1)
        if found is not None:
            return where + found[0], found[1]
    return None


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, functools.partial):
        yield ".func", value.func
        yield from ((f".args[{k}]", part) for k, part in enumerate(value.args))
        yield from ((f".keywords[{key!r}]", part) for key, part in value.keywords.items())
    elif isinstance(value, MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, dict):
        yield from ((f"[{key!r}]", part) for key, part in list(value.items()))
        if getattr(value, "default_factory", None) is not None:
            yield ".default_factory", value.default_factory  # type: ignore[attr-defined]
    elif isinstance(value, list | tuple | deque):
        yield from ((f"[{k}]", part) for k, part in enumerate(value))
    elif isinstance(value, set | frozenset):
        yield from (("", part) for part in value)
    elif _says_nothing(type(value)):
        yield from ((f".{name}", part) for name, part in list(getattr(value, "__dict__", {}).items()))


def _says_nothing(kind: type) -> bool:
    """Whether the objects of a class are pickled by their attributes."""
    own = ("__reduce__", "__reduce_ex__", "__getstate__")
    return all(getattr(kind, name) is getattr(object, name) for name in own)


def _has_its_name(value: Any) -> bool:
    """Whether a function or class is what its module has under its name, by which pickle takes it."""
    found: Any = sys.modules.get(getattr(value, "__module__", None) or "builtins")
    for name in getattr(value, "__qualname__", "").split("."):
        found = getattr(found, name, None)
    return found is value


def described(value: Any) -> str:
    """A function or class in words, with where it is defined."""
    inside = getattr(value, "__wrapped__", value)
    name = getattr(inside, "__qualname__", repr(inside))
    kind = "class" if isinstance(value, type) else "function"
    code = getattr(inside, "__code__", None)
    where = f"in {inside.__module__}" if code is None else f"at {code.co_filename}:{code.co_firstlineno}"
    if name.endswith("<lambda>"):
        return f"a lambda defined {where}"
    if "<locals>" in name:
        return f"the local {kind} `{name.rpartition('.')[2]}` defined {where}"
    return f"the {kind} `{name}` defined {where}, which its module does not have under that name"


def copied(depth: int) -> bool:
    """Whether it is the module `copy` that calls, so many frames up: it takes functions as they are."""
    return bool(sys._getframe(depth).f_globals.get("__name__") == "copy")


def taken_by_value() -> bool:
    """Whether a pickler is at work that takes functions by their code, as those of cloudpickle and dill do."""
    frame = sys._getframe(1)
    while frame is not None:
        pickler = frame.f_locals.get("self")
        if isinstance(pickler, pickle.Pickler | pickle._Pickler):
            by_name = pickle._Pickler.save_global  # type: ignore[attr-defined]
            dispatch = getattr(type(pickler), "dispatch", {})
            if hasattr(pickler, "reducer_override") or dispatch.get(FunctionType, by_name) is not by_name:
                return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
