"""Graphs of tensor operations: their constants as inputs, and a graph in two parts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

_Operation = type(torch.ops.aten.detach.default)


def lift(traced: GraphModule) -> list[Tensor]:
    """Make inputs, behind those that it has, of the tensors that a graph has for constants; these, in that order."""
    graph, found, made = traced.graph, list[Tensor](), dict[object, Node]()
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.nodes):
        if node.op != "get_attr" or not isinstance(getattr(traced, str(node.target)), Tensor):
            continue
        if node.target not in made:
            with graph.inserting_after(last):
                made[node.target] = last = graph.placeholder(f"constant_{len(found)}")
            found.append(getattr(traced, str(node.target)).detach())
        node.replace_all_uses_with(made[node.target])
        graph.erase_node(node)
    graph.eliminate_dead_code()
    traced.recompile()
    return found


def parted(
    traced: GraphModule, vectors: int, first: int
) -> tuple[GraphModule, GraphModule, GraphModule, tuple[int, ...]]:
    """A graph in two: what does not depend on input number `vectors` - 1, and the rest; which inputs the rest takes.

    The rest twice: for its first result alone, and for all of them. It takes that input, what was kept, and those.

    Args:
        traced: without constants.
        vectors: the number of the input, and 1.
        first: how many results belong to the first part, whose other results are what is kept.
    """
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    (end,) = (node for node in traced.graph.nodes if node.op == "output")
    results: tuple[Node, ...] = tuple(end.args[0])
    last, late = inputs[vectors - 1], set[Node]()
    for node in traced.graph.nodes:
        if node is last or any(each in late for each in node.all_input_nodes):
            late.add(node)
    late.discard(end)
    if any(node in late for node in results[:first]):
        raise AssertionError("a first result depends on the last vector")
    needed = [n for node in traced.graph.nodes if node in late for n in node.all_input_nodes]
    pending, again, kept = [n for n in (*needed, *results[first:]) if n not in late], set[Node](), dict[Node, None]()
    while pending:  # a view is made again, of what it is a view of
        node = pending.pop()
        if _is_view(node) and node not in again:
            again.add(node)
            pending += node.all_input_nodes
        elif not _is_view(node):
            kept[node] = None
    saved = [node for node in kept if node.op != "placeholder"]
    used = [node for node in kept if node.op == "placeholder"]
    others = [node for node in inputs if node is not last]

    def graph(takes: list[Node], nodes: list[Node], gives: list[Node]) -> GraphModule:
        made, copies = Graph(), dict[Node, Node]()
        for node in takes:
            copies[node] = made.placeholder(node.name)
        for node in nodes:
            if node not in copies:
                copies[node] = made.node_copy(node, lambda n: copies[n])
        made.output(tuple(copies[node] for node in gives))
        made.eliminate_dead_code()
        return GraphModule(traced, made)

    body = [node for node in traced.graph.nodes if node.op not in ("placeholder", "output")]
    early = graph(others, [node for node in body if node not in late], [*results[:first], *saved])
    rest, takes = [node for node in body if node in late or node in again], [last, *saved, *used]
    one, every = (graph(takes, rest, list(gives)) for gives in (results[first : first + 1], results[first:]))
    return early, one, every, tuple(others.index(node) for node in used)


def _is_view(node: Node) -> bool:
    """Whether what it gives shares the memory of what it takes."""
    return isinstance(node.target, _Operation) and any(
        argument.alias_info is not None for argument in node.target._schema.arguments
    )
