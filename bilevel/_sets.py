"""Closed convex sets for the outer variable, known by their projections."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from bilevel._numerics.ranges import POSITIVE, demand_ranges
from bilevel._tree import Structure, Tree, ravel


class AbstractSet(abc.ABC):
    """A closed convex set of vectors."""

    @abc.abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the set to x `(n,)`."""


@final
@dataclass(frozen=True, eq=False)
class Box(AbstractSet):
    """{x : lower <= x <= upper}, entry by entry; the projection clips.

    Args:
        lower: a number, a tensor of all entries, or None for no bound.
        upper: the same.

    Raises:
        ValueError: if a lower bound exceeds an upper bound.

    Example:
        >>> Box(0.0, 1.0).project(torch.tensor([-1.0, 0.5, 2.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """

    lower: float | Tensor | None = None
    upper: float | Tensor | None = None

    def __post_init__(self) -> None:
        lower, upper = -torch.inf if self.lower is None else self.lower, torch.inf if self.upper is None else self.upper
        ordered: bool | Tensor = lower <= upper
        if not (bool(ordered.all()) if isinstance(ordered, Tensor) else ordered):
            raise ValueError("`Box(lower, upper)` must have lower <= upper everywhere, and no NaN.")

    def project(self, x: Tensor) -> Tensor:
        lower, upper = self.bounds(x)
        return x.clamp(lower, upper)

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of the shape of `like`, infinite where there are none.

        Raises:
            ValueError: if a tensor of bounds has another number of entries.
        """
        found = []
        for name, bound, default in (("lower", self.lower, -torch.inf), ("upper", self.upper, torch.inf)):
            tensor = torch.as_tensor(default if bound is None else bound, dtype=like.dtype, device=like.device).reshape(
                -1
            )
            if tensor.numel() not in (1, like.numel()):
                raise ValueError(
                    f"`Box({name}=...)` must be a number or hold {like.numel()} entries, as x does."
                    f" Got {tensor.numel()}."
                )
            found.append(tensor.expand_as(like))
        return found[0], found[1]


@final
@dataclass(frozen=True)
class Simplex(AbstractSet):
    """{x : x >= 0, sum x = total}; the projection is max(x - t, 0) with t found by sorting, O(n log n).

    Source: Held, Wolfe, Crowder, "Validation of subgradient optimization", Math. Programming 6 (1974).

    Args:
        total: what the entries sum to.

    Raises:
        ValueError: if `total` is not positive.

    Example:
        >>> Simplex().project(torch.tensor([0.5, 0.5, -1.0]))
        tensor([0.5000, 0.5000, 0.0000])
    """

    total: float = 1.0

    def __post_init__(self) -> None:
        demand_ranges(self, total=POSITIVE)

    def project(self, x: Tensor) -> Tensor:
        x = x - x.max()  # changes nothing, and the total is not lost in the rounding of large entries
        ordered = x.sort(descending=True).values
        excess = ordered.cumsum(0) - self.total
        counts = torch.arange(1, x.numel() + 1, dtype=x.dtype, device=x.device)
        k = int((ordered * counts > excess).sum())  # how many entries stay positive
        return (x - excess[k - 1] / k).clamp_min(0)


Constraint: TypeAlias = AbstractSet | Mapping[str, AbstractSet] | None


def projection(constraint: Constraint, x: Structure) -> Callable[[Tensor], Tensor] | None:
    """The projection of the vector of x onto a set for all of it, or onto sets for entries of its top-level dict.

    Raises:
        TypeError: if `constraint` is neither.
        ValueError: if it names an entry that x does not have.
    """
    if constraint is None:
        return None
    if isinstance(constraint, AbstractSet):
        return constraint.project
    parts = _parts(constraint, x)

    def project(vector: Tensor) -> Tensor:
        projected = vector.clone()
        for where, part in parts:
            projected[where] = part.project(vector[where])
        return projected

    return project


def bounds(constraint: Constraint, x: Structure, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """The constraint as bounds on the vector of x, for methods that take nothing else.

    Raises:
        ValueError: if a set is not a box.
    """
    if constraint is None:
        return None
    pieces = [(slice(None), constraint)] if isinstance(constraint, AbstractSet) else _parts(constraint, x)
    lower, upper = torch.full_like(like, -torch.inf), torch.full_like(like, torch.inf)
    for where, part in pieces:
        if not isinstance(part, Box):
            raise ValueError(
                f"this outer method handles bounds only. Got {type(part).__name__}. Use an optimizer such as `Adam`."
            )
        lower[where], upper[where] = part.bounds(like[where])
    return lower, upper


def _parts(constraint: Mapping[str, AbstractSet], x: Structure) -> list[tuple[Tensor, AbstractSet]]:
    if not isinstance(constraint, Mapping):
        raise TypeError(
            f"`minimize(constraint=...)` must be a set such as `Box(0, 1)`, or a dict of sets for entries of x."
            f" Got {type(constraint).__name__}."
        )
    places: Tree = x.unravel(torch.arange(x.size, dtype=torch.float64, device="cpu"))
    found = []
    for key, part in constraint.items():
        if not isinstance(part, AbstractSet):
            raise TypeError(
                f"`minimize(constraint=...)` must be a set for {key!r}, such as `Box(0, 1)`. Got {type(part).__name__}."
            )
        if not isinstance(places, Mapping) or key not in places:
            raise ValueError(f"`minimize(constraint=...)` names {key!r}, which x does not have: x is {x.describe()}.")
        found.append((ravel(places[key])[0].long().to(x.device), part))
    return found
