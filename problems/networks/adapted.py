"""Where the steps of an inner iteration lead, for many tasks side by side: what is judged after training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel._tree import Tree, tree_parts
from bilevel.inner_problems.iteration import Iteration


def adapted(
    iteration: Iteration, init: Callable[[Tree, Any], Tree], x: Tree, tasks: Any, steps: int, *, graph: bool = False
) -> Tree:
    """y_N of each task, y_{k+1} = step(x, y_k, grad_y g(x, y_k), k) from init(x): `(tasks, ...)` for each leaf.

    Gradients are taken outside of the vectorized map, of the sum over tasks, as everywhere in the library.

    Cost: N gradients of g for each task. Memory O(q) for each, and with a graph that of N gradients.

    Args:
        iteration: with a step that uses the gradient of its g.
        init: (x, task) -> y_0.
        x: the outer variable.
        tasks: a dict of tensors with a leading axis.
        steps: N.
        graph: keep the graph to x, for a baseline that is trained by torch alone.
    """
    step, g = iteration.step, iteration.objective_function
    assert step is not None and g is not None
    with torch.set_grad_enabled(graph):
        y = torch.vmap(lambda task: init(x, task), randomness="same")(tasks)
        for k in range(steps):
            y, gradient = _slopes(lambda y, task: g(x, y, task), y, tasks, graph)

            def one(y: Tree, gradient: Tree, task: Any, k: int = k) -> Tree:
                return step(x, y, gradient, k, task)

            y = torch.vmap(one, randomness="same")(y, gradient, tasks)
    return y


def _slopes(g: Callable[[Tree, Any], Tensor], y: Tree, tasks: Any, graph: bool) -> tuple[Tree, Tree]:
    leaves, build = tree_parts(y)
    with torch.enable_grad():
        own = [leaf if graph and leaf.requires_grad else leaf.detach().requires_grad_() for leaf in leaves]
        total = torch.vmap(g, randomness="same")(build(own), tasks).sum()  # rows are independent
        slopes = torch.autograd.grad(total, own, allow_unused=True, create_graph=graph)
    found = [torch.zeros_like(leaf) if d is None else d for leaf, d in zip(own, slopes, strict=True)]
    return build(own), build(found)
