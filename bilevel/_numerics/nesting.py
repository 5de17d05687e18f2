"""Nested dicts, lists, tuples and named tuples: their leaves in order, and the same nesting of other leaves."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

_ANY = "a nested structure of tensors (x, y, data, a batch)"

Tree: TypeAlias = Any  # a tensor, or a nested dict, list, tuple or named tuple of tensors


class Node(NamedTuple):
    """One level of a nesting: its type, what that needs to be built again, and what is inside (None for a leaf)."""

    kind: type
    context: Any
    children: tuple[Node | None, ...]


class _Kind(NamedTuple):
    """How nodes of a type are taken apart, to (children, context), and built."""

    parts: Callable[[Any], tuple[Iterable[Any], Any]]
    build: Callable[[Iterable[Any], Any], Any]


# Types are matched exactly: an instance of a subclass is a leaf.
_KINDS: dict[type, _Kind] = {
    dict: _Kind(lambda d: (d.values(), tuple(d)), lambda parts, keys: dict(zip(keys, parts, strict=True))),
    list: _Kind(lambda values: (values, None), lambda parts, _: list(parts)),
    tuple: _Kind(lambda values: (values, None), lambda parts, _: tuple(parts)),
    deque: _Kind(lambda values: (values, values.maxlen), deque),
    OrderedDict: _Kind(
        lambda d: (d.values(), tuple(d)), lambda parts, keys: OrderedDict(zip(keys, parts, strict=True))
    ),
    defaultdict: _Kind(
        lambda d: (d.values(), (d.default_factory, tuple(d))),
        lambda parts, context: defaultdict(context[0], zip(context[1], parts, strict=True)),
    ),
}
# What others have registered with torch's own nestings, whose module is private: without it these types are leaves.
_REGISTERED: Mapping[type, Any] = getattr(getattr(torch.utils, "_pytree", None), "SUPPORTED_NODES", {})


def tree_map(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """Apply `function` to every leaf."""
    leaves, build = tree_parts(tree)
    return build([function(leaf) for leaf in leaves])


def tree_parts(tree: Tree) -> tuple[list[Any], Callable[[Sequence[Any]], Tree]]:
    """The leaves, in order, and what makes the same nesting of other leaves."""
    leaves: list[Any] = []
    return leaves, builder(flatten(tree, leaves))


def tree_leaves(tree: Tree, name: str = _ANY) -> list[Any]:
    """The leaves, in order; `name` is what errors call the tree."""
    leaves: list[Any] = []
    flatten(tree, leaves, name)
    return leaves


def tree_children(tree: Tree) -> list[Any] | None:
    """What one level of a nesting holds, in order; None of a leaf."""
    known = None if type(tree) is Tensor else _kind(type(tree))
    return None if known is None else list(known.parts(tree)[0])


def flatten(tree: Tree, leaves: list[Any], name: str = _ANY) -> Node | None:
    """The nesting of `tree`, whose leaves are appended to `leaves`.

    Raises:
        ValueError: if it holds itself, or is nested too deeply to be walked through, by its name.
    """
    try:
        return _flattened(tree, leaves)
    except RecursionError:
        text = (
            f"{name} must not hold itself, nor be nested hundreds of levels deep. Got a {type(tree).__name__} that is."
        )
        raise ValueError(text) from None


def _flattened(tree: Tree, leaves: list[Any]) -> Node | None:
    kind = type(tree)
    known = None if kind is Tensor else _kind(kind)
    if known is None:
        leaves.append(tree)
        return None
    children, context = known.parts(tree)
    return Node(kind, context, tuple([_flattened(child, leaves) for child in children]))


def _kind(kind: type) -> _Kind | None:
    """How nodes of this type are taken apart and built; None where it is that of a leaf."""
    known = _KINDS.get(kind)
    if known is not None:
        return known
    if _is_named_tuple(kind):
        return _Kind(lambda values: (values, None), lambda parts, _: kind(*parts))
    theirs = _REGISTERED.get(kind)
    if theirs is not None:
        return _Kind(theirs.flatten_fn, lambda parts, context: theirs.unflatten_fn(list(parts), context))
    return None


def _is_named_tuple(kind: type) -> bool:
    return issubclass(kind, tuple) and hasattr(kind, "_fields")


def builder(node: Node | None) -> Callable[[Sequence[Any]], Tree]:
    """What makes the nesting of as many leaves as it has."""
    if node is None:
        return lambda leaves: leaves[0]
    known = _kind(node.kind)
    assert known is not None  # as it was when the node was made
    build, context = known.build, node.context
    if not any(node.children):  # leaves only, as the parameters of a network: built in one stroke
        return lambda leaves: build(leaves, context)
    return lambda leaves: _built(node, iter(leaves))


def _built(node: Node | None, leaves: Iterator[Any]) -> Tree:
    if node is None:
        return next(leaves)
    known = _kind(node.kind)
    assert known is not None
    return known.build([_built(child, leaves) for child in node.children], node.context)


def places(tree: Tree, where: str) -> Iterator[tuple[str, Any]]:
    """The leaves, in order, each after the expression that reaches it, where `where` is the name of the tree."""
    kind: Any = type(tree)
    known = _kind(kind)
    if known is None:
        yield where, tree
        return
    children = list(known.parts(tree)[0])
    steps = [f"[{k}]" for k in range(len(children))]
    if isinstance(tree, dict) and kind in _KINDS:
        steps = [f"[{key!r}]" for key in tree]
    elif _is_named_tuple(kind):
        steps = [f".{name}" for name in kind._fields]
    for step, child in zip(steps, children, strict=True):
        yield from places(child, where + step)


def aligned(tree: Tree, like: Tree) -> Tree:
    """The tree with its dicts in the order of those of `like`, wherever their keys are the same."""
    known = _kind(type(tree))
    if type(tree) is not type(like) or known is None:
        return tree
    if isinstance(tree, dict) and tree.keys() == like.keys():
        ordered = copy.copy(tree)  # of the same kind: a defaultdict keeps its default
        ordered.clear()
        ordered.update((key, aligned(tree[key], like[key])) for key in like)
        return ordered
    (parts, context), (others, _) = known.parts(tree), known.parts(like)
    children, models = list(parts), list(others)
    if isinstance(tree, dict) or len(children) != len(models):
        return tree
    return known.build([aligned(a, b) for a, b in zip(children, models, strict=True)], context)
