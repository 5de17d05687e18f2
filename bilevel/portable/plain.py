"""Nested structures as plain data, which a file can hold and nothing is executed to read, and back."""

from __future__ import annotations

import sys
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bilevel._numerics.nesting import Tree, tree_children

_TAG = "$"  # the key of a dict that stands for something that is no plain dict; dicts with keys like it are such too
_PLAIN = (str, int, float, bool, type(None))
_FACTORIES: dict[str, Callable[[], Any]] = {kind.__name__: kind for kind in (list, dict, int, float)}


def plain(tree: Tree, name: str = "tree") -> Any:
    """A structure as dicts with texts for keys, lists, tensors, numbers, texts and None.

    Dicts with such keys and lists are as they were; a tuple, a named tuple and the like is a dict whose entry "$" says
    what it is.

    Args:
        tree: what `bilevel.ravel` takes, and numbers, texts and None for leaves too.
        name: how error messages call it.

    Raises:
        TypeError: if it holds something else.

    Example:
        >>> plain({"a": [1.0, ("b", None)]})
        {'a': [1.0, {'$': 'tuple', 'items': ['b', None]}]}
    """
    if isinstance(tree, Tensor):
        return tree.detach().as_subclass(Tensor)
    kind: Any = type(tree)
    if kind in _PLAIN:
        return tree
    if kind is list:
        return [plain(part, f"{name}[{k}]") for k, part in enumerate(tree)]
    if kind is dict and all(type(key) is str and not key.startswith(_TAG) for key in tree):
        return {key: plain(part, f"{name}[{key!r}]") for key, part in tree.items()}
    children = tree_children(tree)
    if children is None:
        raise TypeError(
            f"plain data are nested dicts, lists and tuples of tensors, numbers, texts and None. Got a {kind.__name__}"
            f" at {name}."
        )
    found: dict[str, Any] = {_TAG: _kind_of(tree)}
    if isinstance(tree, dict):
        found["keys"] = [plain(key, f"a key of {name}") for key in tree]
    if isinstance(tree, defaultdict) and tree.default_factory in _FACTORIES.values():
        found["default"] = tree.default_factory.__name__  # type: ignore[union-attr]
    if isinstance(tree, deque):
        found["longest"] = tree.maxlen
    if found[_TAG] == "named tuple":
        found |= {"name": f"{kind.__module__}:{kind.__qualname__}", "fields": _fields(tree)}
    return {**found, "items": [plain(part, f"{name}[{k}]") for k, part in enumerate(children)]}


def _fields(tree: Any) -> list[str]:
    return list(tree._fields)


_NAMES: dict[Any, str] = {dict: "dict", OrderedDict: "ordered", defaultdict: "default", deque: "deque"}


def _kind_of(tree: Tree) -> str:
    if hasattr(tree, "_fields"):
        return "named tuple"
    return _NAMES.get(type(tree), "tuple")


def restored(content: Any) -> Tree:
    """The structure that :func:`plain` made `content` of.

    A named tuple is one of the class of that name, if the program has it already, and else of a class of the same name
    and fields that is made for it: nothing is imported. What torch knows as a nesting and this library does not is a
    tuple of its parts, and a defaultdict has its default where that is a list, a dict, or zero.

    Raises:
        ValueError: if it is no such data.

    Example:
        >>> restored({"a": [1.0, {"$": "tuple", "items": ["b", None]}]})
        {'a': [1.0, ('b', None)]}
    """
    if isinstance(content, Tensor) or type(content) in _PLAIN:
        return content
    if isinstance(content, list | tuple):
        return [restored(part) for part in content]
    if not isinstance(content, Mapping):
        raise ValueError(f"a {type(content).__name__} is no plain data")
    if _TAG not in content:
        return {str(key): restored(part) for key, part in content.items()}
    kind, items = content[_TAG], [restored(part) for part in demanded(content, "items", list)]
    if kind in ("dict", "ordered", "default"):
        keys = [restored(key) for key in demanded(content, "keys", list)]
        pairs = list(zip((tuple(k) if isinstance(k, list) else k for k in keys), items, strict=True))
        if kind == "default":
            return defaultdict(_FACTORIES.get(str(content.get("default"))), pairs)
        return OrderedDict(pairs) if kind == "ordered" else dict(pairs)
    if kind == "deque":
        longest = content.get("longest")
        return deque(items, None if longest is None else demanded(content, "longest", int))
    if kind == "named tuple":
        names = [str(name) for name in demanded(content, "fields", list)]
        if len(names) != len(items):
            raise ValueError(f"a named tuple of {len(names)} fields has {len(items)} entries")
        return tuple.__new__(_named(demanded(content, "name", str), names), items)
    if kind == "tuple":
        return tuple(items)
    raise ValueError(f"there is no kind of structure {kind!r}")


def _named(name: str, fields: list[str]) -> Any:
    """The class of named tuples of this name, where the program has it; else one like it."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, "__dict__", {}).get(part)  # no attribute that is computed
    if isinstance(found, type) and issubclass(found, tuple) and list(found.__dict__.get("_fields", ())) == fields:
        return found
    return namedtuple(path.rpartition(".")[2], fields)


def demanded(content: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """An entry of plain data, of a type.

    Raises:
        ValueError: naming the entry.

    Example:
        >>> demanded({"steps": "3"}, "steps", int)
        Traceback (most recent call last):
        ValueError: entry 'steps' must be int. Got str.
    """
    if not isinstance(content, Mapping) or name not in content:
        raise ValueError(f"entry {name!r} is missing")
    value = content[name]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("None" if each is type(None) else each.__name__ for each in kinds)
        raise ValueError(f"entry {name!r} must be {names}. Got {type(value).__name__}.")
    return value


@contextmanager
def refused(kind: str) -> Iterator[None]:
    """Whatever is wrong with plain data is one error that names the class that was to be made of them.

    Raises:
        ValueError: from any error that data of another form lead to.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError, OverflowError) as error:
        why = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"`{kind}.from_dict(content)` needs what `{kind}.to_dict()` makes: {why}") from error


def checked(content: Mapping[str, Any], **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """Plain data that has these entries, of these types, and no others.

    Raises:
        ValueError: naming an entry.
    """
    if not isinstance(content, Mapping) or content.keys() != kinds.keys():
        found = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"the entries must be {', '.join(kinds)}. Got {found}.")
    return {name: demanded(content, name, kind) for name, kind in kinds.items()}


def number(content: Mapping[str, Any], name: str) -> float:
    """An entry that is a number."""
    return float(demanded(content, name, (float, int)))


def optional_number(content: Mapping[str, Any], name: str) -> float | None:
    """An entry that is a number or None."""
    return None if content.get(name) is None else number(content, name)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor of any dtype and shape, `(n,)`."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bits(a: Tree, b: Tree) -> bool:
    """Whether two structures of tensors in plain data are equal, bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape and a.device == b.device
        return alike and torch.equal(as_bytes(a), as_bytes(b))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return bool(a == b)
