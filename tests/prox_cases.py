"""Every non-smooth term, in one table: what it takes, where it is evaluated, what it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel.prox import (
    L1,
    L2,
    TV1D,
    TV2D,
    AbstractProxTerm,
    Affine,
    BoundedL1,
    Box,
    ElasticNet,
    GroupBall,
    GroupLasso,
    L1Ball,
    L2Ball,
    LInf,
    LInfBall,
    Nonnegative,
    NuclearNorm,
    Quadratic,
    Simplex,
    SpectralBall,
    Sum,
)

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
LABELS = torch.tensor([0, 1, 0, 2])
GRAM = torch.tensor([[2.0, 1, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]], dtype=DOUBLE)
TIGHT = torch.tensor([[1.0, 1, 0, 0], [1, -1, 0, 0]], dtype=DOUBLE)

TALL = torch.tensor(
    [[1.0, 0.5, 0, 0.2], [0, 1, -1, 0.3], [0.4, 0, 1, 1], [-0.7, 0.2, 0.5, 0], [0.3, 0.3, -0.2, 0.9]], dtype=DOUBLE
)
CYCLE = torch.eye(4, dtype=DOUBLE) - torch.eye(4, dtype=DOUBLE).roll(1, 0)  # A' is not injective: rank 3
TWO_BY_TWO = {"a": (2,), "b": (2, 1)}

CASES: dict[str, Case] = {
    "L1": Case(L1, (number(0.9),)),
    "L1-weights": Case(L1, (numbers(0.9, 0.0, 2.0, 0.3),)),
    "L1-leaves": Case(lambda a, b: L1({"a": a, "b": b}), (number(0.9), numbers(0.3, 2.0)), TWO),
    "LInfBall": Case(LInfBall, (number(0.9),)),
    "LInfBall-radii": Case(LInfBall, (numbers(0.9, 0.0, 2.0, 0.3),)),
    "ElasticNet": Case(ElasticNet, (number(0.9), numbers(0.5, 0.0, 2.0, 1.0))),
    "ElasticNet-conjugate": Case(lambda a, b: ElasticNet(a, b).conjugate(), (number(0.9), number(2.0))),
    "Nonnegative": Case(Nonnegative, (), TWO),
    "Nonpositive": Case(lambda: Nonnegative().conjugate(), ()),
    "Box": Case(Box, (number(-0.7), numbers(0.9, 0.0, 2.0, -0.7))),
    "Box-conjugate": Case(lambda a, b: Box(a, b).conjugate(), (number(-0.7), number(0.8))),
    "BoundedL1": Case(BoundedL1, (number(0.3), numbers(0.9, 0.5, 2.0, 0.3))),
    "GroupLasso": Case(lambda w: GroupLasso(w, LABELS), (numbers(2.0, 0.0, 0.6),)),
    "GroupLasso-rows": Case(lambda w: GroupLasso(w, "rows"), (number(2.0),), (3, 2)),
    "GroupLasso-leaves": Case(lambda w: GroupLasso(w, "leaves"), (numbers(2.0, 1.5),), TWO),
    "GroupBall": Case(lambda r: GroupBall(r, [[0, 2], [1], [3]]), (numbers(2.0, 0.0, 0.6),)),
    "Simplex": Case(Simplex, (number(1.7),), TWO),
    "Simplex-conjugate": Case(lambda s: Simplex(s).conjugate(), (number(1.7),)),
    "L1Ball": Case(L1Ball, (number(1.7),)),
    "LInf": Case(LInf, (number(1.7),), TWO),
    "L2Ball": Case(L2Ball, (number(1.7),)),
    "L2": Case(L2, (number(1.7),), TWO),
    "NuclearNorm": Case(NuclearNorm, (number(1.7),), (3, 2)),
    "NuclearNorm-wide": Case(NuclearNorm, (number(1.7),), {"a": (2, 4), "b": (2, 2)}),
    "SpectralBall": Case(SpectralBall, (number(1.7),), (2, 3)),
    "TV1D": Case(TV1D, (number(0.7),), (7,)),
    "TV1D-weights": Case(TV1D, (numbers(0.7, 0.0, 2.0, 0.3, 0.5, 1.0),), TWO),
    "TV1D-conjugate": Case(lambda w: TV1D(w).conjugate(), (number(0.7),), (5,)),
    "Sum-L1-Nonnegative": Case(lambda w: Sum((L1(w), Nonnegative())), (numbers(0.9, 0.0, 2.0, 0.3),)),
    "Sum-quadratic-Box": Case(
        lambda q, c, r: Sum((Quadratic(q, c), L1(0.4), Box(-r, r))),
        (number(0.5), numbers(1.0, -0.5, 0.2, 0.0), number(0.8)),
    ),
    "Sum-TV1D-L1": Case(lambda w, a: Sum((L1(a), TV1D(w), Nonnegative())), (number(0.7), number(0.2)), (7,)),
    "Sum-groups-L1": Case(lambda w, a: Sum((GroupLasso(w, LABELS), L1(a))), (number(1.1), number(0.4))),
    "Sum-L1-L2Ball": Case(lambda w, r: Sum((L2Ball(r), L1(w))), (numbers(0.3, 0.0, 0.6, 0.1), number(0.8))),
    "Quadratic": Case(Quadratic, (GRAM, numbers(1.0, -0.5, 0.2, 0.0))),
    "Quadratic-diagonal": Case(Quadratic, (numbers(1.0, 0.0, 2.0, 3.0), number(0.3))),
    "Quadratic-conjugate": Case(lambda Q, c: Quadratic(Q, c).conjugate(), (GRAM, numbers(1.0, -0.5, 0.2, 0.0))),
    "Affine-number": Case(lambda w, s, b: Affine(L1(w), s, b), (number(0.9), number(-1.5), number(0.4)), TWO),
    "Affine-matrix": Case(lambda w, b: Affine(L1(w), TIGHT, b), (number(0.9), numbers(0.3, -0.2))),
    "AffineAny": Case(lambda w, A, b: Affine(L1(w), A, b), (number(1.2), TALL, numbers(0.3, -0.2, 0.1, 0.5, 0.0))),
    "AffineAny-cycle": Case(lambda w: Affine(L1(w), CYCLE), (numbers(0.9, 0.4, 0.7, 0.3),), TWO_BY_TWO),
    "Affine-conjugate": Case(lambda w, b: Affine(L1(w), TIGHT, b).conjugate(), (number(0.9), numbers(0.3, -0.2))),
}

# By iterations to a tolerance, a call of which takes milliseconds.
ITERATED: dict[str, Case] = {
    "TV2D": Case(TV2D, (number(0.4),), (3, 4)),
    "TV2D-isotropic": Case(lambda w: TV2D(w, isotropic=True), (number(0.4),), (3, 4)),
    "Sum-TV2D-L1": Case(lambda w, a: Sum((L1(a), TV2D(w))), (number(0.4), number(0.2)), (3, 4)),
    "Sum-split": Case(
        lambda w, q: Sum((L1(w), L2(0.5), Quadratic(q * GRAM))), (numbers(0.7, 0.2, 0.6, 0.4), number(1.0))
    ),
    "Sum-split-sets": Case(lambda r, s: Sum((L2Ball(r), Simplex(s))), (number(0.9), number(1.3))),
}
