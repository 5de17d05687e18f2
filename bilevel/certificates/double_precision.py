"""A problem of float32 data evaluated in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel._flat import FlatProblem
from bilevel._problem import BilevelProblem, Split
from bilevel._result import Tally
from bilevel._tree import Structure, tree_map

_LOW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


def in_double(problem: FlatProblem, tally: Tally) -> FlatProblem:
    """The same problem for vectors in float64: its data, and whatever tensors f and g close over, are promoted."""

    def double(structure: Structure) -> Structure:
        return Structure(structure.spec, structure.shapes, torch.float64, structure.device)

    data, own = problem.data, problem.problem
    if isinstance(data, Split):
        data = Split(tree_map(_promoted, data.f), tree_map(_promoted, data.g))
    elif data is not None:
        data = tree_map(_promoted, data)
    init = None if own.init is None else _within(own.init)
    encode = None if own.encode is None else _within(own.encode)
    promoted = BilevelProblem(
        _within(own.f), _within(own.g), init=init, encode=encode, iterative=own.iterative, tasks=own.tasks
    )
    found = FlatProblem(promoted, double(problem.x), double(problem.y), data, tally, is_encoded=problem.is_encoded)
    found.across = problem.across
    return found


def _within(function: Callable[..., Any]) -> Callable[..., Any]:
    def promoted(*args: Any) -> Any:
        with _Promotion():
            return function(*args)

    return promoted


@final
class _Promotion(TorchFunctionMode):
    """Every operation sees float64 where it would have seen a lower precision, as a tensor or as a dtype."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = Tensor.double if func in _CASTS else func
        return func(*tree_map(_promoted, args), **tree_map(_promoted, kwargs or {}))


def _promoted(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.double() if leaf.dtype in _LOW else leaf
    return torch.float64 if isinstance(leaf, torch.dtype) and leaf in _LOW else leaf
