"""Several terms, each of its own part of one vector; and sums of which one is of a linear image, as one such term."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from bilevel._tree import Structure, Tree, ravel
from bilevel.prox.conjugate import Conjugate
from bilevel.prox.derivative import Parts, ProxDerivative
from bilevel.prox.linear_image import LinearImage
from bilevel.prox.structured import on_vector
from bilevel.prox.term import AbstractProxTerm


@final
@dataclass(frozen=True, eq=False)
class Stacked(AbstractProxTerm):
    """(z_1, z_2, ...) -> sum_i h_i(z_i), the parts of one vector `(m,)`; its map is theirs, side by side.

    Attributes:
        terms: h_1, h_2, ...
        structures: what each takes its part for.
    """

    terms: tuple[AbstractProxTerm, ...]
    structures: tuple[Structure, ...]

    def value(self, y: Tree) -> Tensor:
        values = [term.value(part) for term, part in self._parts(y)]
        return torch.stack(values).sum()

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        return torch.cat([ravel(term.prox(part, step))[0] for term, part in self._parts(v)])

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        margins = [term.margin(part, step) for term, part in self._parts(v)]
        return torch.stack(margins).min()

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        return torch.cat([term.active(part, step) for term, part in self._parts(v)])

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative | None:
        found = list[ProxDerivative]()
        for term, part in self._parts(v):
            P = term.derivative(part, step)
            if P is None:
                return None
            found.append(P)
        counts = tuple(len(P.parts) for P in found)
        products = [
            on_vector(partial(_side_by_side, tuple(made), counts, self.structures))
            for made in ([P.times for P in found], [P.inverse for P in found])
        ]
        return ProxDerivative(tuple(part for P in found for part in P.parts), *products)

    def conjugate(self) -> Conjugate:
        return Conjugate(self)

    @property
    def separable(self) -> bool:
        return all(term.separable for term in self.terms)

    def _parts(self, y: Tree) -> list[tuple[AbstractProxTerm, Tree]]:
        flat = ravel(y, "z")[0]
        cut = torch.split(flat, [structure.size for structure in self.structures])
        return [(t, s.unravel(part)) for t, s, part in zip(self.terms, self.structures, cut, strict=True)]


def stacked(terms: Sequence[AbstractProxTerm], y: Tree, tol: float, max_steps: int) -> LinearImage | None:
    """sum_i h_i(y) as one term of a linear image, where one of them is of one; None: none is.

    Those that are not are of the image of the identity.
    """
    flat, structure = ravel(y, "y")
    images = [term.composition(y) for term in terms]
    if all(image is None for image in images):
        return None
    unit = torch.eye(structure.size, dtype=flat.dtype, device=flat.device)
    made, structures, A, b = list[AbstractProxTerm](), list[Structure](), list[Tensor](), list[Tensor]()
    for term, image in zip(terms, images, strict=True):
        if image is None:
            made.append(term)
            structures.append(structure)
            A.append(unit)
            b.append(torch.zeros_like(flat))
        else:
            made.append(image.term)
            structures.append(ravel(image.b)[1])
            A.append(image.A)
            b.append(image.b)
    return LinearImage(Stacked(tuple(made), tuple(structures)), torch.cat(A), torch.cat(b), tol, max_steps)


def _side_by_side(
    products: tuple[Callable[[Parts, Tree], Tree], ...],
    counts: tuple[int, ...],
    structures: tuple[Structure, ...],
    parts: Parts,
    w: Tensor,
) -> Tensor:
    found, start = list[Tensor](), 0
    cut = torch.split(w, [structure.size for structure in structures])
    for product, count, structure, part in zip(products, counts, structures, cut, strict=True):
        found.append(ravel(product(parts[start : start + count], structure.unravel(part)))[0])
        start += count
    return torch.cat(found)
