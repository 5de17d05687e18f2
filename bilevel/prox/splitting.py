"""The proximal map of a sum, by that of each term."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from bilevel._tree import Structure, Tree, ravel
from bilevel.prox.derivative import Parts, ProxDerivative
from bilevel.prox.differentiated import differentiated
from bilevel.prox.structured import on_vector
from bilevel.prox.term import AbstractProxTerm, tiny

Maps = Sequence[Callable[[Tensor], Tensor]]


_RELAXED = 1.5  # in (1, 2): a third fewer steps than at 1 on sums of two norms, balls and total variations
_LOOKS = 4  # steps from one look at the residual to the next: a look is as dear as a step of cheap maps


def at_rest(maps: Maps, v: Tensor, tol: float, max_steps: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """The y with y = v + sum_i d_i and y = map_i(y - d_i), of firmly nonexpansive maps.

    Steps are over-relaxed: a map and its d_i see 1.5 y - 0.5 y_i, with the last image y_i, in the place of y.

    Inside of `torch.vmap` the rows end together, so that branching on the residual is legitimate.

    Returns:
        y, the points y - d_i, and whether it has come to rest.
    """
    count = len(maps)
    stop, size = max(tol, 4 * torch.finfo(v.dtype).eps), v.abs().max()
    images, duals, y = [v] * count, [torch.zeros_like(v)] * count, v
    rest = torch.zeros_like(size, dtype=torch.bool)
    for k in range(max_steps):
        before, total = y, v
        for image, d in zip(images, duals, strict=True):
            total = total + image + d
        y = total / (count + 1)
        seen = [torch.lerp(image, y, _RELAXED) for image in images]
        images = [each(z - d) for each, z, d in zip(maps, seen, duals, strict=True)]
        duals = [d + image - z for d, image, z in zip(duals, images, seen, strict=True)]
        if (k + 1) % _LOOKS and k + 1 < max_steps:
            continue
        largest = torch.stack([y - before, *(image - y for image in images)]).abs().max()
        rest = largest <= stop * torch.maximum(size, y.abs().max()).clamp_min(tiny(v))
        if bool((torch.func.debug_unwrap(rest | largest.isnan(), recurse=True)).all()):
            break
    return y, [y - d for d in duals], rest


@final
@dataclass(frozen=True, eq=False)
class Split:
    """A sum at rest.

    Attributes:
        terms: the terms.
        structure: of y.
        y: the image `(q,)`.
        vectors: where the maps of the terms are evaluated, `(q,)` each.
        rest: whether the iteration has come to rest.
        tol: of the iterations.
        max_steps: of these.
    """

    terms: tuple[AbstractProxTerm, ...]
    structure: Structure
    y: Tensor
    vectors: list[Tensor]
    rest: Tensor
    tol: float
    max_steps: int

    @staticmethod
    def of(terms: tuple[AbstractProxTerm, ...], v: Tree, step: Tensor | float, tol: float, max_steps: int) -> Split:
        """From the point v, without a graph."""
        flat, structure = ravel(v, "v")

        def image(term: AbstractProxTerm, point: Tensor) -> Tensor:
            return structure.ravel(term.prox(structure.unravel(point), step), "prox")

        with torch.no_grad():
            y, vectors, rest = at_rest([partial(image, term) for term in terms], flat, tol, max_steps)
        return Split(terms, structure, y, vectors, rest, tol, max_steps)

    @property
    def points(self) -> list[Tree]:
        """The points of the terms, as structures."""
        return [self.structure.unravel(vector) for vector in self.vectors]

    def margin(self, step: Tensor | float) -> Tensor:
        """The least margin of a term; NaN where there is no rest."""
        margins = [term.margin(point, step) for term, point in zip(self.terms, self.points, strict=True)]
        return torch.where(self.rest, torch.stack(margins).min(), torch.nan)

    def derivatives(self, step: Tensor | float) -> list[ProxDerivative] | None:
        """Those of the terms; None if one has none."""
        found = []
        with torch.no_grad():
            for term, point in zip(self.terms, self.points, strict=True):
                P = term.derivative(point, step)
                if P is None:
                    return None
                found.append(P)
        return found


def split_prox(at: Split, v: Tree, step: Tensor | float) -> Tree:
    """y, differentiable in v and in what the terms depend on.

    The multipliers a_i, with P_i a_i = a_0 and a_0 + sum_i (a_i - a_0) = w, are the rest of the same iteration with
    the derivatives P_i for the maps: a_0 is the derivative times w, a_i that of the image of term i.
    """
    Ps = at.derivatives(step)
    images = [
        at.structure.ravel(term.prox(point, step), "prox") for term, point in zip(at.terms, at.points, strict=True)
    ]
    parts, pull = ((), _refuse) if Ps is None else (_joined(Ps), partial(_multipliers, _of(at, Ps)))
    return at.structure.unravel(differentiated(at.y, (ravel(v, "v")[0], *images), parts, pull))


def split_derivative(at: Split, step: Tensor | float) -> ProxDerivative | None:
    """P, by the same iteration."""
    Ps = at.derivatives(step)
    if Ps is None:
        return None
    of = _of(at, Ps)
    return ProxDerivative(_joined(Ps), on_vector(partial(_times, of)), on_vector(partial(_inverse, of)))


@final
@dataclass(frozen=True)
class _Linear:
    """The derivatives of the terms, without what they are made of."""

    products: tuple[tuple[int, Callable[[Parts, Tree], Tree], Callable[[Parts, Tree], Tree]], ...]
    structure: Structure
    tol: float
    max_steps: int

    def maps(self, parts: Parts) -> list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
        """P_i and P_i^+ for each term."""
        found: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = []
        start = 0
        for count, times, inverse in self.products:
            own = parts[start : start + count]
            found.append((partial(self._flat, times, own), partial(self._flat, inverse, own)))
            start += count
        return found

    def _flat(self, product: Callable[[Parts, Tree], Tree], parts: Parts, w: Tensor) -> Tensor:
        return ravel(product(parts, self.structure.unravel(w)))[0]


def _of(at: Split, Ps: list[ProxDerivative]) -> _Linear:
    products = tuple((len(P.parts), P.times, P.inverse) for P in Ps)
    return _Linear(products, at.structure, at.tol, at.max_steps)


def _joined(Ps: list[ProxDerivative]) -> Parts:
    return tuple(part for P in Ps for part in P.parts)


def _multipliers(of: _Linear, parts: Parts, w: Tensor) -> Parts:
    y, points, _ = at_rest([times for times, _ in of.maps(parts)], w, of.tol, of.max_steps)
    return (y, *points)


def _times(of: _Linear, parts: Parts, w: Tensor) -> Tensor:
    return _multipliers(of, parts, w)[0]


def _inverse(of: _Linear, parts: Parts, w: Tensor) -> Tensor:
    """With Pi onto the intersection of the ranges: Pi (I + sum_i (P_i^+ - Pi_i)) Pi w."""
    maps = of.maps(parts)
    onto = [lambda u, times=times, inverse=inverse: times(inverse(u)) for times, inverse in maps]
    inside = at_rest(onto, w, of.tol, of.max_steps)[0]
    moved = inside + torch.stack([inverse(inside) - inside for _, inverse in maps]).sum(0)
    return at_rest(onto, moved, of.tol, of.max_steps)[0]


def _refuse(parts: Parts, w: Tensor) -> Parts:
    raise NotImplementedError(
        "a sum by splitting is differentiated through the derivatives of its terms, and one of them has none. Use"
        " `FiniteDifference` or `ESJ`."
    )
