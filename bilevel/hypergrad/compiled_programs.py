"""A computation with a problem as a program that torch compiles: traced once for each problem and shape, and kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, final

import torch
from torch import Tensor
from torch.fx import GraphModule

from bilevel._flat import FlatProblem
from bilevel._numerics.graph_parts import lift, parted
from bilevel._problem import Split
from bilevel._tree import tree_parts

Computation: TypeAlias = Callable[..., tuple[Tensor, ...]]  # (problem, *vectors) -> tensors


@final
class Programs:
    """Compiled forms of computations with a problem.

    What is traced is what is run from then on: f, g and init must be functions of their arguments alone. A tensor that
    they close over is a constant as it was at the first call, and so is the way taken through their `if`s. What in the
    data is no tensor is a constant too: another number, or another object, is another program.

    Args:
        name: of the class for whose users they are, for messages.
        backend: of `torch.compile`.
    """

    def __init__(self, name: str, backend: str) -> None:
        self._name, self._backend = name, backend
        self._known: dict[Any, tuple[tuple[Any, ...], tuple[Computation, ...]]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def of(self, computation: Computation, problem: FlatProblem, *vectors: Tensor) -> Computation:
        """`computation(problem, ...)` as a function of its vectors, compiled for the shapes of these.

        Computations that compare equal are the same one: a function of a module, or a method of one object.

        Raises:
            ValueError: if f and g have data of their own, or samples are over ranks.
        """
        (compiled, *_), tensors = self._found(computation, problem, vectors, 0)
        return lambda *arguments: compiled(*arguments, *tensors)

    def parts(
        self, computation: Computation, first: int, problem: FlatProblem, *vectors: Tensor
    ) -> tuple[Computation, Computation, Computation]:
        """The same in two parts: the `first` results, which do not depend on the last vector, and the others.

        Returns:
            Of the vectors without the last one: the first results, and what is kept. Of the last vector and what was
            kept: the first of the other results alone, and all of them.
        """
        (early, one, every), tensors = self._found(computation, problem, vectors, first)
        return lambda *arguments: early(*arguments, *tensors), one, every

    def _found(
        self, computation: Computation, problem: FlatProblem, vectors: tuple[Tensor, ...], first: int
    ) -> tuple[tuple[Computation, ...], list[Tensor]]:
        """The programs, and the tensors in the data."""
        if problem.across is not None:
            raise ValueError(
                f"`{self._name}` compiles f and g of one process. Got samples over the ranks of a group. Leave it out,"
                f" or pass all samples to each rank without `group=`."
            )
        if isinstance(problem.data, Split):
            raise ValueError(
                f"`{self._name}` needs one batch of data for f and g. Got a Split. Put both into one dict."
            )
        leaves, build = tree_parts({} if problem.data is None else problem.data)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        nestings = (problem.x.describe(), problem.y.describe(), str(build([isinstance(t, Tensor) for t in leaves])))
        shapes = tuple((tuple(t.shape), t.dtype, t.device) for t in (*vectors, *tensors))
        constants = tuple(map(_constant, others))
        key = (computation, first, id(problem.problem), problem.is_encoded, nestings, shapes, constants)
        if key not in self._known:
            from torch.fx.experimental.proxy_tensor import make_fx  # takes a second to import

            def program(*arguments: Tensor) -> tuple[Tensor, ...]:
                given = iter(arguments[len(vectors) :])
                made = build([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves])
                data = None if problem.data is None else made
                at = FlatProblem(problem.problem, problem.x, problem.y, data, is_encoded=problem.is_encoded)
                return computation(at, *arguments[: len(vectors)])

            # Tensors that are the same object would become one input, for other tensors too: each is one of its own.
            with torch.enable_grad():
                traced = make_fx(program)(*(each.detach() for each in (*vectors, *tensors)))
            # The problem and the constants are kept, so that their ids are not another's.
            self._known[key] = (problem.problem, *others), self._compiled(traced, len(vectors), first)
        return self._known[key][1], tensors

    def _compiled(self, traced: GraphModule, vectors: int, first: int) -> tuple[Computation, ...]:
        """The programs of a graph, in parts where `first` results are the first part."""
        if not first:
            return (self._program(traced),)
        captured = lift(traced)
        early, *late, used = parted(traced, vectors, first)
        begin, then = self._program(early), [self._program(each) for each in late]

        def before(*inputs: Tensor) -> tuple[Tensor, ...]:
            everything = (*inputs, *captured)
            return (*begin(*everything), *(everything[k] for k in used))

        return before, *then

    def _program(self, traced: GraphModule) -> Computation:
        compiled = torch.compile(traced, backend=self._backend, dynamic=False)

        def run(*arguments: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                found: tuple[Tensor, ...] = compiled(*(argument.detach() for argument in arguments))
                return found

        return run


def _constant(leaf: Any) -> Any:
    """What tells a leaf of the data that is no tensor from others: its value, or for other objects which it is."""
    return (type(leaf), leaf) if isinstance(leaf, int | float | complex | str | bytes | None) else id(leaf)
