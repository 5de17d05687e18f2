"""States of algorithms as plain data, which a file can hold and nothing is executed to read, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def encoded(state: Any, like: Any, where: str = "state") -> Any:
    """A state as nested dicts, lists and tuples of tensors, numbers, texts and None.

    Args:
        state: a dataclass, named tuple, tuple, list or dict of such things, nested in any way.
        like: the state that the run began with: what :func:`decoded` will be given.
        where: how an error calls it.

    Raises:
        TypeError: if it holds something else, or could not be read back.

    Example:
        >>> from bilevel import Stats
        >>> encoded((Stats(hvps=2), None), (Stats(), None))[0]["hvps"]
        2
    """
    if state is None or isinstance(state, Tensor | bool | int | float | str):
        return state
    if is_dataclass(state) or _is_named(state):
        if type(like) is not type(state):
            raise TypeError(
                f"{where} is a {type(state).__name__} where the algorithm's initial state has a {type(like).__name__}:"
                f" a checkpoint of it could not be read back. Let `init` return the same nesting, with None in it."
            )
        names = _names(state)
        return {name: encoded(getattr(state, name), getattr(like, name), f"{where}.{name}") for name in names}
    if isinstance(state, dict):
        known = like if isinstance(like, dict) else {}
        return {key: encoded(item, known.get(key), f"{where}[{key!r}]") for key, item in state.items()}
    if isinstance(state, list | tuple):
        known_items = like if isinstance(like, list | tuple) and len(like) == len(state) else [None] * len(state)
        items = [
            encoded(item, own, f"{where}[{i}]") for i, (item, own) in enumerate(zip(state, known_items, strict=True))
        ]
        return items if isinstance(state, list) else tuple(items)
    raise TypeError(
        f"{where} is a {type(state).__name__}, which a checkpoint cannot hold. A state is made of dataclasses, named"
        f" tuples, dicts, lists and tuples of tensors, numbers, texts and None."
    )


def decoded(content: Any, like: Any) -> Any:
    """The state that :func:`encoded` made `content` of.

    Args:
        content: plain data.
        like: a state of the same algorithm on the same problem.

    Raises:
        ValueError: saying which entries it has and which it should have.

    Example:
        >>> from bilevel import Stats
        >>> decoded({**Stats(hvps=2).as_dict()}, Stats()).hvps
        2
    """
    if is_dataclass(like) or _is_named(like):
        names = _names(like)
        _demand_entries(content, names)
        kind: Any = type(like)
        return kind(**{name: decoded(content[name], getattr(like, name)) for name in names})
    if isinstance(like, dict) and like:
        _demand_entries(content, list(like))
        return {key: decoded(content[key], like[key]) if _has_kinds(like[key]) else content[key] for key in content}
    if _has_kinds(like):
        if not isinstance(content, list | tuple) or len(content) != len(like):
            raise ValueError(f"its state has a {type(content).__name__} in the place of {len(like)} entries")
        return type(like)(decoded(item, own) for item, own in zip(content, like, strict=True))
    return content  # plain already: its entries may have changed since the start


def _demand_entries(content: Any, names: list[Any]) -> None:
    found = set(content) if isinstance(content, Mapping) else {type(content).__name__}
    if found != set(names):
        raise ValueError(f"its state has {sorted(map(str, found))}, this one {sorted(map(str, names))}")


def _has_kinds(like: Any) -> bool:
    """Whether there is something to be made of plain data: a dataclass or a named tuple, however deep."""
    if is_dataclass(like) or _is_named(like):
        return True
    items = like.values() if isinstance(like, dict) else like if isinstance(like, list | tuple) else ()
    return any(map(_has_kinds, items))


def _names(state: Any) -> list[str]:
    return list(state._fields) if _is_named(state) else [field.name for field in fields(state)]


def _is_named(state: Any) -> bool:
    """Whether this is a named tuple."""
    return isinstance(state, tuple) and hasattr(state, "_fields")
