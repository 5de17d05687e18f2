"""Total variation on a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from bilevel._tree import Tree, tree_parts
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, SIZE, demand_ranges
from bilevel.arguments.shapes import Shape, demand_shapes
from bilevel.prox.conjugate import Conjugate
from bilevel.prox.derivative import Parts, ProxDerivative
from bilevel.prox.differentiated import differentiated
from bilevel.prox.every_row import for_every_row
from bilevel.prox.grid_dual import bottleneck, components, differences, dual, pulled_back
from bilevel.prox.term import AbstractProxTerm, demand_number, tiny
from bilevel.prox.total_variation import means

_ALIKE = 1e-6  # relative to the range of v: neighbors that differ by less are on one piece


@final
@dataclass(frozen=True, eq=False)
class TV2D(AbstractProxTerm):
    """h(Y) = w sum |Y_{i+1,j} - Y_ij| + |Y_{i,j+1} - Y_ij|, or w sum of the Euclidean norms of those pairs (isotropic).

    With D the differences, prox_{t h}(v) = v - D' z for the z that minimizes |v - D' z|^2 / 2 within |z| <= t w: by
    projected gradients with momentum that starts anew where it leads uphill, until D' times the projected gradient is
    at most tol max|v|. The anisotropic y is then made exact, up to rounding, from the pieces where it is constant and
    the signs of the jumps between them, as far as the duality gap is no larger that way. |y - y*| is at most
    `error(v, step)`, the root of twice that gap, whose own rounding is sqrt(eps) |v|.

    On the pieces, with M their means and g the pairs of differences across them, the derivative in v is M; where it is
    isotropic, M (I + t w M D' H D M)^-1 M with H the second derivatives of the norms at g, by conjugate gradients. That
    in w is the same, applied to -t D' (g / |g|), with signs for those in the anisotropic case. A second derivative is
    an error.

    Source: Chambolle, "An algorithm for total variation minimization and applications", J. Math. Imaging Vis. 20
    (2004); Beck and Teboulle, "Fast gradient-based algorithms for constrained total variation image denoising and
    deblurring problems", IEEE Trans. Image Process. 18 (2009).

    Args:
        weight: w >= 0, a number. An estimate at a negative one, or where `max_steps` do not suffice, ends with
            `Status.nonfinite`.
        isotropic: whether the two differences of an entry are one pair.
        tol: of the iteration, relative to the largest entry of v.
        max_steps: of it.

    Example:
        >>> TV2D(1.0).prox(torch.tensor([[0.0, 0.0], [0.0, 4.0]]), 0.5)
        tensor([[0.3333, 0.3333],
                [0.3333, 3.0000]])
    """

    weight: float | Tensor = 1.0
    isotropic: bool = False
    tol: float = 1e-11
    max_steps: int = 20_000

    def __post_init__(self) -> None:
        demand_types(self)
        demand_number("TV2D", "weight", self.weight)
        demand_ranges(self, tol=POSITIVE, max_steps=SIZE)
        demand_shapes("TV2D", {"weight": Shape("", kind="number", finite=False)}, vars(self))

    def value(self, y: Tree) -> Tensor:
        return self.weight * self._sizes(differences(_image(y)[0])).sum()

    def prox(self, v: Tree, step: Tensor | float) -> Tree:
        (image, build), radius = _image(v), self._radius(v, step)
        at = self._at_rest(image.detach(), radius.detach())
        return build([differentiated(at.y, (image, radius), at.parts, partial(_pull, self.isotropic))])

    def error(self, v: Tree, step: Tensor | float) -> Tensor:
        """sqrt(2 (P(y) - D(z))), a bound on |y - y*| for the y that `prox` returns: a number."""
        return self._at_rest(_image(v)[0].detach(), self._radius(v, step).detach()).error

    def margin(self, v: Tree, step: Tensor | float) -> Tensor:
        image, radius = _image(v)[0].detach(), self._radius(v, step).detach()
        at = self._at_rest(image, radius)
        spread = (image.max() - image.min()).clamp_min(tiny(image))
        sizes = self._sizes(at.units / at.curvature.clamp_min(tiny(image)))
        jumps = torch.where(self._sizes(at.units) > 0, sizes / spread, 1.0)
        slack = 1 - self._on_edges(self._sizes(at.z)) / torch.where(radius > 0, radius, 1.0)
        least = torch.minimum(jumps.min(), for_every_row(bottleneck, slack, at.labels))
        least = torch.where(radius == 0, torch.ones_like(least), least)
        good = (radius >= 0) & (at.error <= _COARSE * torch.linalg.vector_norm(image))
        return torch.where(good, least, torch.nan)

    def derivative(self, v: Tree, step: Tensor | float) -> ProxDerivative:
        at = self._at_rest(_image(v)[0].detach(), self._radius(v, step).detach())
        kinds = (_times, _inverse) if self.isotropic else (_averaged, _averaged, _rest)
        return ProxDerivative(at.parts, *(partial(_on_image, kind) for kind in kinds))

    def active(self, v: Tree, step: Tensor | float) -> Tensor:
        return self._at_rest(_image(v)[0].detach(), self._radius(v, step).detach()).labels

    def conjugate(self) -> Conjugate:
        return Conjugate(self)

    def conjugate_value(self, u: Tree) -> Tensor:
        image = _image(u)[0].detach()
        at = self._at_rest(image, self._radius(u, 1.0).detach())  # zero for what is a subgradient at zero
        within = torch.linalg.vector_norm(at.y) <= at.error + _COARSE * torch.linalg.vector_norm(image)
        return torch.where(within, torch.zeros_like(at.error), torch.inf)

    def _radius(self, v: Tree, step: Tensor | float) -> Tensor:
        image = _image(v)[0]
        return torch.as_tensor(step * self.weight, dtype=image.dtype, device=image.device)

    def _sizes(self, g: Tensor) -> Tensor:
        """|g| of what is one term of the sum: `(2, m, n)`, or `(1, m, n)` where it is isotropic."""
        return torch.linalg.vector_norm(g, dim=-3, keepdim=True) if self.isotropic else g.abs()

    @staticmethod
    def _on_edges(sizes: Tensor) -> Tensor:
        return sizes.expand(2, *sizes.shape[-2:])

    def _at_rest(self, v: Tensor, radius: Tensor) -> _AtRest:
        def solve(v: Tensor, radius: Tensor) -> Tensor:
            return dual(v, radius, self.isotropic, self.tol, self.max_steps)

        with torch.no_grad():
            z = for_every_row(solve, v, radius)
            y = v - pulled_back(z)
            g, spread = differences(y), v.max() - v.min()
            within = radius * (1 - 16 * torch.finfo(v.dtype).eps)  # to which a projection onto the bound rounds
            flat_or_slack = (self._sizes(z) < within) | (self._sizes(g) <= _ALIKE * spread)
            labels = for_every_row(components, self._on_edges(flat_or_slack & (radius > 0)))
            across = differences(labels.reshape(v.shape).to(v.dtype)) != 0
            signs = torch.where(across, g, 0.0)
            units = signs / torch.where(self._sizes(signs) > 0, self._sizes(signs), 1.0)
            smooth = y if self.isotropic else v - radius * pulled_back(units)
            exact = means((labels,), smooth.reshape(-1)).reshape(v.shape)
            gaps = [self._gap(each, y, z, radius) for each in (exact, y)]
            found = torch.where(gaps[0] <= gaps[1], exact, y)
            g = torch.where(across, differences(found), 0.0)
            sizes = self._sizes(g)
            curvature = torch.where(sizes > 0, 1 / torch.where(sizes > 0, sizes, 1.0), 0.0)
            return _AtRest(found, z, labels, g * curvature, curvature, radius, (2 * torch.minimum(*gaps)).sqrt())

    def _gap(self, y: Tensor, at_dual: Tensor, z: Tensor, radius: Tensor) -> Tensor:
        """The duality gap, as a sum of terms that are not negative: |y - (v - D' z)|^2 / 2 + r sum |D y| - <z, D y>."""
        g = differences(y)
        terms = radius * self._sizes(g) - ((z * g).sum(-3, keepdim=True) if self.isotropic else z * g)
        return (y - at_dual).square().sum() / 2 + terms.clamp_min(0).sum()


_COARSE = 1e-5  # an error relative to v above which no estimate is to succeed


class _AtRest(NamedTuple):
    """The image y, the dual z, the pieces, the directions and the reciprocal sizes of what is across them."""

    y: Tensor
    z: Tensor
    labels: Tensor
    units: Tensor
    curvature: Tensor
    radius: Tensor
    error: Tensor

    @property
    def parts(self) -> Parts:
        return self.labels, self.units, self.curvature, self.radius


def _image(y: Tree) -> tuple[Tensor, Callable[[Sequence[Any]], Tree]]:
    leaves, build = tree_parts(y)
    if len(leaves) != 1 or leaves[0].dim() != 2:
        shapes = [tuple(leaf.shape) for leaf in leaves]
        raise ValueError(f"y must be one matrix where there is a `TV2D`. Got shapes {shapes}.")
    return leaves[0], build


def _on_image(product: Callable[[Parts, Tensor], Tensor], parts: Parts, w: Tree) -> Tree:
    image, build = _image(w)
    return build([product(parts, image)])


def _pull(isotropic: bool, parts: Parts, w: Tensor) -> Parts:
    own = (_times if isotropic else _averaged)(parts, w)
    return own, -(pulled_back(parts[1]) * own).sum()


def _averaged(parts: Parts, w: Tensor) -> Tensor:
    return means(parts[:1], w.reshape(-1)).reshape(w.shape)


def _rest(parts: Parts, w: Tensor) -> Tensor:
    return w - _averaged(parts, w)


def _inverse(parts: Parts, w: Tensor) -> Tensor:
    """M (I + r D' H D) M w, H = (I - e e') / |g|."""
    _, e, curvature, radius = parts
    own = _averaged(parts, w)
    g = differences(own)
    return _averaged(parts, own + radius * pulled_back(curvature * (g - e * (e * g).sum(-3, keepdim=True))))


def _times(parts: Parts, w: Tensor) -> Tensor:
    """What `_inverse` takes to M w, by conjugate gradients."""
    r = _averaged(parts, w)
    u, d, rho = torch.zeros_like(r), r, r.square().sum()
    stop = (4 * torch.finfo(w.dtype).eps) ** 2 * rho
    for _ in range(4 * w.numel()):
        if bool(torch.func.debug_unwrap((rho <= stop) | rho.isnan(), recurse=True).all()):
            break
        image = _inverse(parts, d)
        going = rho > stop
        step = torch.where(going, rho / torch.where(going, (d * image).sum(), 1.0), 0.0)
        u, r = u + step * d, r - step * image
        rho, before = r.square().sum(), rho
        d = r + torch.where(going, rho / torch.where(going, before, 1.0), 0.0) * d
    return u
