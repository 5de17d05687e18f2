"""A non-smooth term h_x in vectors, row by row: its proximal map, the derivative of that, its margin and manifold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from bilevel._numerics.batched import batched
from bilevel._numerics.misfits import called
from bilevel._tree import Tree
from bilevel.inner_problems.flat_image import FlatImage

if TYPE_CHECKING:
    from bilevel._flat import FlatProblem
    from bilevel.prox.linear_image import LinearImage
    from bilevel.prox.term import AbstractProxTerm


@final
class _NoPiecesError(Exception):
    """A term is not of the form that a solver asks for."""


@final
@dataclass(frozen=True, eq=False)
class FlatDerivative:
    """P = d prox_{t h}(v) / dv for each row: a symmetric matrix, 0 <= P <= I.

    Attributes:
        times: w -> P w, `(*batch, q)`.
        inverse: w -> P^+ w.
    """

    times: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]

    def onto(self, w: Tensor) -> Tensor:
        """P P^+ w, the projection onto the range of P."""
        return self.times(self.inverse(w))


@final
@dataclass(frozen=True, eq=False)
class FlatTerm:
    """h_x for vectors v `(*batch, q)`, one x `(p,)` or several `(k, p)`, and a step for each row or for all of them.

    Args:
        problem: the problem in vectors.
        function: `prox(x)`, or `prox(x, data)`, of the user.
    """

    problem: FlatProblem
    function: Callable[..., AbstractProxTerm]

    def prox(self, x: Tensor, v: Tensor, step: Tensor | float) -> Tensor:
        """prox_{step h_x}(v); differentiable in x, v and the step."""
        structure = self.problem.y

        def one(x: Tree, v: Tensor, step: Tensor, *data: Any) -> Tensor:
            found = self.at(x, *data).prox(structure.unravel(v), step.squeeze(-1))
            return structure.ravel(found, "prox(x).prox(v, step)")

        return self.problem.map(one, "g", x, v, _column(step, v))

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """h_x(y): `(*batch,)`, infinite where y is not admitted."""

        def one(x: Tree, y: Tensor, *data: Any) -> Tensor:
            return self.at(x, *data).value(self.problem.y.unravel(y))

        return self.problem.map(one, "g", x, y)

    def margin(self, x: Tensor, v: Tensor, step: Tensor | float) -> Tensor:
        """How far v is from a kink of the map, relative to its entries: `(*batch,)`."""

        def one(x: Tree, v: Tensor, step: Tensor, *data: Any) -> Tensor:
            return self.at(x, *data).margin(self.problem.y.unravel(v), step.squeeze(-1))

        return self.problem.map(one, "g", x, v, _column(step, v))

    def active(self, x: Tensor, v: Tensor, step: Tensor | float) -> Tensor:
        """Codes of the manifold that the map sends v to `(*batch, k)`; k = 0 where the term has none."""

        def one(x: Tree, v: Tensor, step: Tensor, *data: Any) -> Tensor:
            return self.at(x, *data).active(self.problem.y.unravel(v), step.squeeze(-1))

        with torch.no_grad():
            return self.problem.map(one, "g", x.detach(), v.detach(), _column(step, v))

    def derivative(self, x: Tensor, v: Tensor, step: Tensor | float) -> FlatDerivative | None:
        """P at v in closed form, or by autograd where the term is separable, so that it is diagonal; None: neither."""
        kept: list[tuple[AbstractProxTerm, Any]] = []

        def one(x: Tree, v: Tensor, step: Tensor, *data: Any) -> Any:
            term = self.at(x, *data)
            found = term.derivative(self.problem.y.unravel(v), step.squeeze(-1))
            kept.append((term, found))
            return (v, *(() if found is None else found.parts))

        with torch.no_grad():
            made: Any = self.problem.map(one, "g", x.detach(), v.detach(), _column(step, v))
        term, found = kept[-1]
        if found is None:
            return self._diagonal(x, v, step) if term.separable else None
        parts = tuple(part.detach() for part in made[1:])
        return FlatDerivative(self._rows(found.times, parts), self._rows(found.inverse, parts))

    def pieces(self, x: Tensor) -> Tensor | None:
        """Rows a, c, l, u of `AbstractProxTerm.pieces`, `(*batch, 4, q)`; None where the term has none."""
        structure = self.problem.y
        y = structure.unravel(x.new_zeros(sum(shape.numel() for shape in structure.shapes)))

        def one(x: Tree, *data: Any) -> Tensor:
            found = self.at(x, *data).pieces(y)
            if found is None:
                raise _NoPiecesError
            return found

        with torch.no_grad():
            try:
                return self.problem.map(one, "g", x)
            except _NoPiecesError:
                return None

    def image(self, x: Tensor) -> FlatImage | None:
        """k, A and b of h_x(y) = k(A y + b); None where the term is not one of a linear image."""
        structure, ones = self.problem.y, x.new_zeros(self.problem.y.size)

        def at(x: Tree, *data: Any) -> LinearImage:
            found = self.at(x, *data).composition(structure.unravel(ones))
            if found is None:
                raise _NoPiecesError
            return found

        def whole(x: Tree, *data: Any) -> Tensor:
            found = at(x, *data)
            return torch.cat([found.A, found.b.unsqueeze(-1)], dim=-1)

        def prox(x: Tree, p: Tensor, step: Tensor, *data: Any) -> Any:
            return at(x, *data).term.prox(p, step.squeeze(-1))

        def active(x: Tree, p: Tensor, step: Tensor, *data: Any) -> Tensor:
            return at(x, *data).term.active(p, step.squeeze(-1))

        def margin(x: Tree, p: Tensor, step: Tensor, *data: Any) -> Tensor:
            return at(x, *data).term.margin(p, step.squeeze(-1))

        try:
            both = self.problem.map(whole, "g", x)
        except _NoPiecesError:
            return None
        return FlatImage(
            both[..., :-1],
            both[..., -1],
            lambda p, step: self.problem.map(prox, "g", x, p, _column(step, p)),
            lambda p, step: self.problem.map(active, "g", x.detach(), p.detach(), _column(step, p)),
            lambda p, step: self.problem.map(margin, "g", x.detach(), p.detach(), _column(step, p)),
        )

    def is_separable(self, x: Tensor) -> bool:
        """Whether the term at x says that it is a sum over entries."""
        return self.one_at(x).separable

    def one_at(self, x: Tensor) -> AbstractProxTerm:
        """A term at x, of tasks that of one of them: to ask for what does not depend on values."""
        found: list[AbstractProxTerm] = []

        def one(x: Tree, *data: Any) -> Tensor:
            found.append(self.at(x, *data))
            return torch.zeros((), device="cpu")

        self.problem.map(one, "g", x)
        return found[-1]

    def at(self, x: Tree, *data: Any) -> AbstractProxTerm:
        """The term at one x in the user's structure, with the data of g."""
        from bilevel.prox.term import AbstractProxTerm

        found = called("prox(x, data)", self.function, x, *data)
        if not isinstance(found, AbstractProxTerm):
            raise TypeError(
                f"`prox(x)` must return a term with a proximal map, such as `bilevel.prox.L1(x.exp())`."
                f" Got {type(found).__name__}."
            )
        return found

    def _diagonal(self, x: Tensor, v: Tensor, step: Tensor | float) -> FlatDerivative:
        with torch.enable_grad():
            leaf = v.detach().requires_grad_()
            image = self.prox(x.detach(), leaf, step)
            P = torch.zeros_like(v)
            if image.requires_grad:
                P = torch.autograd.grad(image.sum(), leaf, allow_unused=True, materialize_grads=True)[0]
        S = P > 0
        inverse = torch.where(S, 1 / torch.where(S, P, 1.0), 0.0)
        return FlatDerivative(lambda w: P * w, lambda w: inverse * w)

    def _rows(
        self, product: Callable[[tuple[Tensor, ...], Tree], Tree], parts: tuple[Tensor, ...]
    ) -> Callable[[Tensor], Tensor]:
        """The product in vectors, for one row or for each of several."""
        structure = self.problem.y

        def one(w: Tensor, *parts: Tensor) -> Tensor:
            return structure.ravel(product(parts, structure.unravel(w)), "derivative(v, step).times(parts, w)")

        def of(w: Tensor) -> Tensor:
            if w.dim() == 1:
                return one(w, *parts)
            found: Tensor = batched(one, len(w), (0,) * (1 + len(parts)))(w, *parts)
            return found

        return of


def _column(step: Tensor | float, v: Tensor) -> Tensor:
    return torch.as_tensor(step, dtype=v.dtype, device=v.device).expand(*v.shape[:-1], 1)
