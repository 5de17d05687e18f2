"""Closed convex sets for the outer variable, known by their projections."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from bilevel._tree import Structure, Tree, ravel
from bilevel.arguments.checked import fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, demand_ranges
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.portable.pickling import AbstractPortable


class AbstractSet(AbstractPortable, abc.ABC):
    """A closed convex set of vectors."""

    @abc.abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the set to x `(n,)`."""

    def face(self, toward: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The orthogonal projection onto the directions along the face that the projection of a point lies within.

        That is the derivative of `project` there, where it has one. Methods that use curvature along faces ask for it
        (`QuasiNewton`); where it is None, as of a set that says nothing, they go along projected gradients.

        Args:
            toward: the point `(n,)`, outside of the set or not.

        Returns:
            The map of directions `(..., n)`, or None.
        """
        return None


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
        demand_types(self)
        demand_shapes("Box", dict.fromkeys(("lower", "upper"), Shape(kind="number", finite=False)), vars(self))
        lower, upper = -torch.inf if self.lower is None else self.lower, torch.inf if self.upper is None else self.upper
        try:
            ordered: bool | Tensor = lower <= upper
        except RuntimeError as error:
            shapes = " and ".join(str(tuple(each.shape)) for each in (lower, upper) if isinstance(each, Tensor))
            raise ValueError(
                f"`Box(lower=..., upper=...)` must be of shapes that fit together. Got {shapes}."
            ) from error
        if not (bool(ordered.all()) if isinstance(ordered, Tensor) else ordered):
            raise ValueError("`Box(lower, upper)` must have lower <= upper everywhere, and no NaN.")

    @fitting
    def project(self, x: Tensor) -> Tensor:
        lower, upper = self.bounds(x)
        return x.clamp(lower, upper)

    @fitting
    def face(self, toward: Tensor) -> Callable[[Tensor], Tensor]:
        lower, upper = self.bounds(toward)
        inside = (toward > lower) & (toward < upper)
        return lambda d: torch.where(inside, d, torch.zeros_like(d))

    @fitting
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
        demand_types(self)
        demand_ranges(self, total=POSITIVE)

    @fitting
    def project(self, x: Tensor) -> Tensor:
        x = x - x.max()  # changes nothing, and the total is not lost in the rounding of large entries
        ordered = x.sort(descending=True).values
        excess = ordered.cumsum(0) - self.total
        counts = torch.arange(1, x.numel() + 1, dtype=x.dtype, device=x.device)
        k = int((ordered * counts > excess).sum())  # how many entries stay positive
        return (x - excess[k - 1] / k).clamp_min(0)

    @fitting
    def face(self, toward: Tensor) -> Callable[[Tensor], Tensor]:
        inside = self.project(toward) > 0

        def along(d: Tensor) -> Tensor:
            kept = torch.where(inside, d, torch.zeros_like(d))
            return torch.where(inside, kept - kept.sum(-1, keepdim=True) / inside.sum(), kept)

        return along


Constraint: TypeAlias = AbstractSet | Mapping[str, AbstractSet] | None


@final
@dataclass(frozen=True, eq=False)
class _Product(AbstractSet):
    """A set for each of some entries of x; the others are free."""

    parts: tuple[tuple[Tensor, AbstractSet], ...]

    def project(self, x: Tensor) -> Tensor:
        projected = x.clone()
        for where, part in self.parts:
            projected[where] = part.project(x[where])
        return projected

    def face(self, toward: Tensor) -> Callable[[Tensor], Tensor] | None:
        faces = [(where, part.face(toward[where])) for where, part in self.parts]
        if any(face is None for _, face in faces):
            return None

        def along(d: Tensor) -> Tensor:
            kept = d.clone()
            for where, face in faces:
                if face is not None:
                    kept[..., where] = face(d[..., where])
            return kept

        return along


def region(constraint: Constraint, x: Structure) -> AbstractSet | None:
    """The set for the vector of x, from a set for all of it or from sets for entries of its top-level dict.

    Raises:
        TypeError: if `constraint` is neither.
        ValueError: if it names an entry that x does not have.
    """
    if constraint is None or isinstance(constraint, AbstractSet):
        return constraint
    return _Product(tuple(_parts(constraint, x)))


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
            raise ValueError(f"this outer method handles bounds only. Got {type(part).__name__}. Use `QuasiNewton`.")
        lower[where], upper[where] = part.bounds(like[where])
    return lower, upper


def corners(constraint: Constraint, x: Structure, like: Tensor) -> tuple[Tensor, ...]:
    """The two corners of the boxes of a constraint, where they are bounded, with the rest of x as it is."""
    if constraint is None:
        return ()
    pieces = [(slice(None), constraint)] if isinstance(constraint, AbstractSet) else _parts(constraint, x)
    found = []
    for side in (0, 1):
        corner = like.clone()
        for where, part in pieces:
            if isinstance(part, Box):
                bound = part.bounds(like[where])[side]
                corner[where] = torch.where(bound.isfinite(), bound, corner[where])
        if not torch.equal(corner, like):
            found.append(corner)
    return tuple(found)


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
