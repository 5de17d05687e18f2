"""Every non-smooth term, in one table: what it takes, where it is evaluated, what it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel.prox import L1, AbstractProxTerm, LInfBall

DOUBLE = torch.float64


@final
@dataclass(frozen=True)
class Case:
    """A term, as a function of its parameters.

    Attributes:
        make: parameters -> the term.
        parameters: those that it is made of in the tests.
        shape: of y, or a dict of shapes.
        has_derivative: in closed form.
    """

    make: Callable[..., AbstractProxTerm]
    parameters: tuple[Tensor, ...]
    shape: Any = (4,)
    has_derivative: bool = True

    def term(self) -> AbstractProxTerm:
        return self.make(*self.parameters)

    def point(self, entries: Tensor) -> Any:
        """A structure like y of these entries, repeated as often as it takes."""
        if isinstance(self.shape, dict):
            return {name: _shaped(entries.roll(k), shape) for k, (name, shape) in enumerate(self.shape.items())}
        return _shaped(entries, self.shape)


def _shaped(entries: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = torch.Size(shape).numel()
    return entries.repeat(-(-count // len(entries)))[:count].reshape(shape)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=DOUBLE)


def points(size: int = 12) -> st.SearchStrategy[Tensor]:
    """Entries of v: shrinks to zero, with ties and zeros."""
    entry = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-4, 4, width=32))
    return st.lists(entry, min_size=size, max_size=size).map(lambda v: torch.tensor(v, dtype=DOUBLE))


TWO = {"a": (3,), "b": (2, 2)}

CASES: dict[str, Case] = {
    "L1": Case(L1, (number(0.9),)),
    "L1-weights": Case(L1, (numbers(0.9, 0.0, 2.0, 0.3),)),
    "L1-leaves": Case(lambda a, b: L1({"a": a, "b": b}), (number(0.9), numbers(0.3, 2.0)), TWO),
    "LInfBall": Case(LInfBall, (number(0.9),)),
    "LInfBall-radii": Case(LInfBall, (numbers(0.9, 0.0, 2.0, 0.3),)),
}
