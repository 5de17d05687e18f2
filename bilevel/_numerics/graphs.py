"""Walks over the graph that autograd keeps of a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def ancestors(node: Any, end: Any = None) -> Iterator[Any]:
    """The nodes of a graph, each once, and not beyond `end`; some 0.5 microseconds a node.

    Args:
        node: where the walk begins, such as `value.grad_fn`; None is no graph.
        end: a node that is not passed, such as that of a leaf.
    """
    stack, seen = [node], {None}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if node is not end:
            stack.extend([parent for parent, _ in node.next_functions])


def leads_to(value: Tensor, *leaves: Tensor) -> list[bool]:
    """For each leaf whether a path of the graph leads from the value to it, whatever the derivative along it is.

    Example:
        >>> x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> leads_to((0 * x * y.detach()).sum(), x, y)
        [True, False]
    """
    ends = [end_of(leaf) for leaf in leaves]
    met = set(ancestors(value.grad_fn))
    return [end in met for end in ends]


def rounding_unit(value: Tensor, leaf: Tensor) -> float:
    """The largest rounding unit among the dtypes that the value is computed in on its way from the leaf.

    Example:
        >>> y = torch.ones(2, requires_grad=True)
        >>> rounding_unit(y.bfloat16().sum().float(), y) == torch.finfo(torch.bfloat16).eps
        True
    """
    units = [torch.finfo(leaf.dtype).eps]
    for node in ancestors(value.grad_fn, end_of(leaf)):
        dtypes = [metadata.dtype for metadata in node._input_metadata]  # of what it made, forward
        units += [torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point]
    return max(units)


def end_of(leaf: Tensor) -> Any:
    """The node at which graphs end in a tensor. Of a leaf of a subclass torch names a view of it, which ends there."""
    node = torch.autograd.graph.get_gradient_edge(leaf).node
    return [*ancestors(node)][-1] if leaf.is_leaf and node.next_functions else node
