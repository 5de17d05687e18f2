"""A computation put together of traced pieces, with loops around them: what becomes one program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor
from torch.fx import GraphModule

from bilevel._numerics.graph_parts import lift, parted
from bilevel.compiled.code import Code
from bilevel.compiled.refused import refused
from bilevel.compiled.torch_inside import loop, trace

Tensors: TypeAlias = tuple[Tensor, ...]
Piece: TypeAlias = Callable[..., Tensors]


@final
@dataclass(frozen=True, eq=False)
class Traced:
    """A whole computation as a graph.

    Attributes:
        graph: of vectors, the tensors of the data, and the constants.
        constants: the tensors that f and g close over: inputs, so that what is written to them is seen.
        versions: how often each had been written to.
    """

    graph: GraphModule
    constants: Tensors
    versions: tuple[int, ...]

    @property
    def is_fresh(self) -> bool:
        """Whether nothing has been written to the constants since: what was read of their values on the way holds."""
        return self.versions == tuple(map(_version, self.constants))


@final
class Tracing:
    """Where pieces of one computation are traced, each once: loops then call them as often as it takes.

    Derivatives are taken within pieces, by autograd. What f and g close over is lifted to inputs of the whole.

    Args:
        code: the problem.
    """

    def __init__(self, code: Code) -> None:
        self.code = code
        self._constants: list[Tensor] = []
        self._now: Tensors = ()  # the data and the constants, as the part at hand sees them

    def piece(self, function: Callable[..., Tensors], *examples: Tensor) -> Piece:
        """`function(problem, *vectors)` as a piece.

        Args:
            function: returns tensors.
            examples: vectors of the shapes that it will be given.
        """
        traced, places = self._traced(function, examples)
        return lambda *vectors: tuple(traced(*vectors, *self._given(places)))

    def split(self, function: Callable[..., Tensors], first: int, *examples: Tensor) -> tuple[Piece, Piece, Piece]:
        """The same in two parts: all that does not depend on the last vector, once, and the rest, as often as need be.

        For products: the graph of a gradient is the first part, and what is pulled back through it the second, which
        does not compute the first one again.

        Args:
            function: returns tensors, of which the first ones do not depend on the last vector.
            first: how many of them.
            examples: vectors of the shapes that it will be given.

        Returns:
            Of the vectors without the last one: the first results, and what is to be kept. Of the last vector and what
            was kept: the first of the other results alone, and all of them.
        """
        traced, places = self._traced(function, examples)
        early, one, late, used = parted(traced, len(examples), first)

        def before(*vectors: Tensor) -> Tensors:
            everything = (*vectors, *self._given(places))
            found = tuple(early(*everything))
            return (*found, *(everything[k] for k in used))

        return before, lambda last, *kept: tuple(one(last, *kept)), lambda last, *kept: tuple(late(last, *kept))

    def loop(
        self,
        going: Callable[..., Tensor],
        body: Callable[..., Tensors],
        carried: Sequence[Tensor],
        fixed: Sequence[Tensor] = (),
    ) -> Tensors:
        """`while going(*carried): carried = body(carried, fixed)`; bodies may call pieces and loops.

        Inductor (2.13) thinks the memory of what a loop begins with is free after it, though it is what the loop ends
        with where its body never ran: what is read of the end is read together with the beginning.
        """
        outer, n, m = self._now, len(carried), len(fixed)
        others: dict[int, Tensor] = {id(each): each for each in (*fixed, *outer)}  # each once
        places = [list(others).index(id(each)) for each in (*fixed, *outer)]

        def within(*inputs: Tensor) -> Tensors:
            given = [inputs[n + k] for k in places]
            self._now = tuple(given[m:])
            found = body(inputs[:n], tuple(given[:m]))
            self._now = outer
            return tuple(_apart(found, inputs))

        def asked(*inputs: Tensor) -> Tensor:
            return _apart((going(*inputs[:n]),), inputs)[0]  # a flag that is carried is no answer by itself either

        copies = [each.clone() for each in carried]
        goes = going(*copies)
        ended = loop(asked, within, copies, list(others.values()))
        return tuple(torch.where(goes, end, begun) for end, begun in zip(ended, copies, strict=True))

    def whole(self, function: Callable[..., Tensors], *examples: Tensor) -> Traced:
        """The computation of vectors that `function` puts together of pieces."""
        data, n = self.code.data.tensors, len(examples)
        constants = tuple(self._constants)

        def everything(*inputs: Tensor) -> Tensors:
            self._now = inputs[n:]
            return tuple(_apart(function(*inputs[:n]), inputs))

        graph = trace(everything, (*examples, *data, *constants), fake=True)
        lifted = tuple(lift(graph))  # numbers that were made tensors on the way
        constants = (*constants, *lifted)
        return Traced(graph, constants, tuple(map(_version, constants)))

    def _traced(
        self, function: Callable[..., Tensors], examples: Sequence[Tensor]
    ) -> tuple[GraphModule, tuple[int, ...]]:
        n, data = len(examples), self.code.data.tensors

        def of_tensors(*inputs: Tensor) -> Tensors:
            return function(self.code.at(inputs[n:]), *inputs[:n])

        traced = trace(of_tensors, (*examples, *data))
        places = []
        for constant in lift(traced):
            if constant.layout is not torch.strided:
                raise refused("f and g", "they close over a sparse tensor")
            known = [k for k, each in enumerate(self._constants) if _same(each, constant)]
            if not known:
                self._constants.append(constant)
            places.append(known[0] if known else len(self._constants) - 1)
        return traced, tuple(places)

    def _given(self, places: Sequence[int]) -> Tensors:
        count = len(self.code.data.tensors)
        return (*self._now[:count], *(self._now[count + k] for k in places))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same entries in memory."""
    alike = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    return alike and a.numel() > 0


def _apart(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """The same, none of them twice, and none of them another one: as loops want their inputs and outputs."""
    seen = {id(other) for other in others}
    found = []
    for each in tensors:
        found.append(each.clone() if id(each) in seen else each)
        seen.add(id(found[-1]))
    return found
