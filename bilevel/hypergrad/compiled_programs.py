"""A computation with a problem as a program that torch compiles: traced once for each problem and shape, and kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel._flat import FlatProblem
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
        self._known: dict[Any, tuple[tuple[Any, ...], Computation]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def of(self, computation: Computation, problem: FlatProblem, *vectors: Tensor) -> Computation:
        """`computation(problem, ...)` as a function of its vectors, compiled for the shapes of these.

        Computations that compare equal are the same one: a function of a module, or a method of one object.

        Raises:
            ValueError: if f and g have data of their own, or samples are over ranks.
        """
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
        key = (computation, id(problem.problem), problem.is_encoded, nestings, shapes, constants)
        if key not in self._known:
            from torch.fx.experimental.proxy_tensor import make_fx  # takes a second to import

            def program(*arguments: Tensor) -> tuple[Tensor, ...]:
                given = iter(arguments[len(vectors) :])
                made = build([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves])
                data = None if problem.data is None else made
                at = FlatProblem(problem.problem, problem.x, problem.y, data, is_encoded=problem.is_encoded)
                return computation(at, *arguments[: len(vectors)])

            with torch.enable_grad():
                traced = make_fx(program)(*(vector.detach() for vector in vectors), *tensors)
            # The problem and the constants are kept, so that their ids are not another's.
            kept = (problem.problem, *others)
            self._known[key] = kept, torch.compile(traced, backend=self._backend, dynamic=False)
        compiled = self._known[key][1]

        def run(*arguments: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return compiled(*(argument.detach() for argument in arguments), *tensors)

        return run


def _constant(leaf: Any) -> Any:
    """What tells a leaf of the data that is no tensor from others: its value, or for other objects which it is."""
    return (type(leaf), leaf) if isinstance(leaf, int | float | complex | str | bytes | None) else id(leaf)
