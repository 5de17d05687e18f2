"""The condition y = prox_{t h}(y - t grad_y g) to first order: on the active manifold, or as a fixed point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import Linearization
from bilevel._linear import LinearOperator
from bilevel._numerics.rows import row_dots
from bilevel._numerics.spectrum import largest_eigenvalue
from bilevel._result import Report, Status
from bilevel.inner_problems.flat_term import FlatDerivative, FlatTerm
from bilevel.inner_problems.margins import default_margin, kink_report

_PROBES = 256  # up to so many entries the dimension of a manifold is counted by its products, if signs do not tell it
_SIGNAL = 1e3  # times its residual: a gradient that is not zero but for the solver's error
_SLIGHT = 1e-6  # of y: what v may differ from it by where the gradient is
_POWERS = 16  # products of the power method for the spectral radius


@final
@dataclass(frozen=True, eq=False)
class StationaryPoint:
    """F(x, y) = y - prox_{t h_x}(v), v = y - t grad_y g(x, y), at a point, with P the derivative of the map at v.

    The unknown of both forms is u = t P w, where (I - (dT/dy)') w = grad_y f is the adjoint system of the fixed point
    T(x, y) = prox_{t h_x}(v); it is in the range of P, and the hypergradient is, with G = d2g/dxdy and H = d2g/dy2,

        h = grad_x f - G u + (d prox / dx)' w,   w = grad_y f + u / t - H u.

    On the range of P, where P^+ is the inverse: the projected (H + (P^+ - I) / t) u = grad_y f, symmetric, and positive
    definite where y* is locally unique; off it u = 0. As a fixed point: (I - P (I - t H)) u = t P grad_y f, which has
    no symmetry, and whose transpose is I - (I - t H) P.

    Args:
        term: h.
        x: `(p,)`.
        y: `(*batch, q)`.
        at: grad_y g there, to first order.
        step: t, `(*batch, 1)`; the values do not depend on it.
        start_in_x: whether y starts where x says.
        least: the relative distance from a kink that is reported; None: that of the dtype.
    """

    term: FlatTerm
    x: Tensor
    y: Tensor
    at: Linearization
    step: Tensor
    start_in_x: bool
    least: float | None

    @property
    def v(self) -> Tensor:
        """Where the map is taken."""
        return (self.y - self.step * self.at.gradient).detach()

    def on_manifold(self, P: FlatDerivative) -> Linearization:
        """The symmetric form; one product with H a product, and two with P and P^+ each."""
        at, t = self.at, self.step
        leaf, image = self._image(self.v)

        def whole(u: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
            steep = P.inverse(u)
            on = P.times(steep)
            return P.onto(product(on)) + (steep - on) / t + (u - on)  # the identity off the range

        seen = _Seen()

        def products(u: Tensor) -> tuple[Tensor, Tensor | None]:
            cross: list[Tensor | None] = []

            def both(on: Tensor) -> Tensor:
                hu, gu = at.products(on)
                cross.append(gu)
                seen.keep(u, hu)
                return hu

            return whole(u, both), cross[0]

        def moved(u: Tensor, fy: Tensor) -> Tensor | None:
            if not image.requires_grad:
                return None
            steep, off = P.inverse(u), fy - seen.product(u, lambda u: at.operator.mv(P.onto(u)))
            weights = steep / t + (off - P.onto(off))  # off the range y moves as the map itself does
            return _minus(torch.autograd.grad(image, leaf, weights, retain_graph=True, allow_unused=True)[0])

        # Of a diagonal P what is off its support is dropped, and need not be computed.
        product = at.operator.mv if at.on is None else at.on(P.onto(torch.ones_like(self.y)) > 0.5)

        def mv(u: Tensor) -> Tensor:
            return whole(u, product)

        operator = LinearOperator(mv, self.y.shape[-1], positive_definite=True)
        return self._made(mv, products, operator, P.onto, moved, (self._kinks(), self._dimension(P)))

    def as_fixed_point(self) -> Linearization:
        """The form without symmetry; one product with H and one backward pass through the map a product."""
        at, t = self.at, self.step
        v = self.v.requires_grad_()
        leaf, image = self._image(v)

        def through(w: Tensor) -> Tensor:
            if not image.requires_grad:
                return torch.zeros_like(w)
            return torch.autograd.grad(image, v, w, retain_graph=True, allow_unused=True, materialize_grads=True)[0]

        seen = _Seen()

        def products(u: Tensor) -> tuple[Tensor, Tensor | None]:
            hu, gu = at.products(u)
            seen.keep(u, hu)
            return u - through(u - t * hu), gu

        def moved(u: Tensor, fy: Tensor) -> Tensor | None:
            if not image.requires_grad:
                return None
            weights = fy + u / t - seen.product(u, at.operator.mv)
            return _minus(torch.autograd.grad(image, leaf, weights, retain_graph=True, allow_unused=True)[0])

        def mv(u: Tensor) -> Tensor:
            return u - through(u - t * at.operator.mv(u))

        def transposed(w: Tensor) -> Tensor:
            on = through(w)
            return w - on + t * at.operator.mv(on)

        radius = spectral_radius(through, at.operator.mv, t, self.y)
        report = Report("spectral radius of the fixed-point map", Status.successful, float(radius.max()), _POWERS)
        operator = LinearOperator(mv, self.y.shape[-1], symmetric=False, transposed_mv=transposed, contraction=radius)
        reports = (self._kinks(), report)
        return self._made(mv, products, operator, lambda fy: t * through(fy), moved, reports)

    def _made(
        self,
        mv: Callable[[Tensor], Tensor],
        products: Callable[[Tensor], tuple[Tensor, Tensor | None]],
        operator: LinearOperator,
        right_hand_side: Callable[[Tensor], Tensor],
        moved: Callable[[Tensor, Tensor], Tensor | None],
        reports: tuple[Report, ...],
    ) -> Linearization:
        return Linearization(
            self.y,
            self.at.gradient,
            mv,
            products,
            operator=operator,
            right_hand_side=right_hand_side,
            moved=moved,
            reports=reports,
            start_in_x=self.start_in_x,
        )

    def _image(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """X as a leaf, and prox_{t h_x}(v) with its graph from there, and from v if that is a leaf too."""
        with torch.enable_grad():
            leaf = self.x.detach().requires_grad_()
            return leaf, self.term.prox(leaf, v, self.step)

    def _dimension(self, P: FlatDerivative) -> Report:
        """The dimension of the active manifold, of tasks the largest; estimated where nothing tells it."""
        size = self.y.shape[-1]
        signs = torch.randint(0, 2, (size,), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        s = (signs.to(self.y) * 2 - 1).expand_as(self.y).contiguous()
        found = row_dots(s, P.onto(s))  # exact for a diagonal projection, and for whole groups
        if bool((found - found.round()).abs().max() > 1e-4) and size <= _PROBES:
            units = torch.eye(size, dtype=self.y.dtype, device=self.y.device)
            found = sum(
                (P.onto(unit.expand_as(self.y).contiguous())[..., i] for i, unit in enumerate(units)),
                torch.zeros_like(found),
            )
        return Report("dimension of the support", Status.successful, float(found.round().max()), 0)

    def _kinks(self) -> Report:
        margins = self.term.margin(self.x.detach(), self.v, self.step)
        return kink_report("support", margins, default_margin(self.y) if self.least is None else self.least)


@final
class _Seen:
    """The latest u, and H u there."""

    def __init__(self) -> None:
        self.last: tuple[Tensor, int, Tensor] | None = None

    def keep(self, u: Tensor, hu: Tensor) -> None:
        """Remember it."""
        self.last = u, u._version, hu

    def product(self, u: Tensor, otherwise: Callable[[Tensor], Tensor]) -> Tensor:
        """H u, by a product only if it is not known."""
        if self.last is not None and self.last[0] is u and self.last[1] == u._version:
            return self.last[2]
        return otherwise(u)


def _minus(found: Tensor | None) -> Tensor | None:
    return None if found is None else -found


def contracting(point: StationaryPoint) -> StationaryPoint:
    """The same with t = 1 / L, L the largest curvature at y, for which its map does not expand; some 14 products."""
    largest = largest_eigenvalue(point.at.operator, point.y).unsqueeze(-1)
    return replace(point, step=torch.where((largest > 0) & largest.isfinite(), 1 / largest, 1.0))


def balanced_step(y: Tensor, gradient: Tensor, residual: Tensor) -> Tensor:
    """t `(*batch, 1)` that makes both terms of v = y - t grad_y g alike in size, so that kinks are seen best.

    Where the term holds nothing the gradient is what the solver left of zero, and a t of that size would make v of it:
    there t is so small that v is y.

    Args:
        y: the solution.
        gradient: grad_y g there.
        residual: of the solver, of proximal steps: by how much the gradient is off, `(*batch,)`.
    """
    size, force = y.abs().amax(-1, keepdim=True), gradient.abs().amax(-1, keepdim=True)
    left = residual.to(y).unsqueeze(-1)
    t = torch.where(force > _SIGNAL * left, size / force, _SLIGHT * size / torch.maximum(force, left))
    return torch.where(t.isfinite() & (t > 0), t, torch.ones_like(t))


def spectral_radius(
    P: Callable[[Tensor], Tensor], H: Callable[[Tensor], Tensor], step: Tensor, like: Tensor, powers: int = _POWERS
) -> Tensor:
    """The spectral radius of P (I - t H), from below, by the power method: `(*batch,)`.

    (I - t H) P, which has the same eigenvalues, is symmetric in the inner product <w, P w>, so that they are real, and
    the growth of the norm of that is at most the largest modulus, and tends to it.

    Cost: `powers` products with P and with H, and one with P.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    z = torch.randn(like.shape[-1], generator=generator, dtype=torch.float64, device="cpu").to(like).expand_as(like)
    on = P(z)
    size, growth = row_dots(z, on), torch.zeros_like(like[..., 0])
    for _ in range(powers):
        z = on - step * H(on)
        on = P(z)
        new = row_dots(z, on)
        growth = torch.where(size > 0, (new.clamp_min(0) / torch.where(size > 0, size, 1.0)).sqrt(), 0.0)
        scale = torch.where(new > 0, new, 1.0).rsqrt().unsqueeze(-1)
        z, on, size = z * scale, on * scale, torch.where(new > 0, 1.0, 0.0).to(new)
    return torch.where(z.isfinite().all(-1), growth, torch.nan)
