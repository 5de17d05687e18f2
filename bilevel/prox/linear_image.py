"""Terms of a linear image, y -> k(A y + b) for any matrix A: their proximal map, by its dual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from bilevel.prox.derivative import Parts, ProxDerivative
from bilevel.prox.differentiated import differentiated
from bilevel.prox.structured import on_vector
from bilevel.prox.term import AbstractProxTerm, tiny

_RELAXED = 1.5  # in (1, 2), as for sums
_LOOKS = 8  # steps of the method of multipliers from one step of Newton's to the next
_BETTER = 0.5  # of the residual: what a step of Newton's has to bring it to
_DAMPED = 1e-13  # of the matrix of Newton's steps: what makes it definite where A' is not injective
_KINK, _TURNS = 1e-6, 3  # a margin of k that is looked into, and from how many pairs of starts
_PROJECTED = 2 / 3  # power of the rounding unit below which an eigenvalue of P is zero


@final
class AtRest(NamedTuple):
    """The image y, w with z = A y + b, p = z + w, the weight c, and whether it has come to rest."""

    y: Tensor
    w: Tensor
    p: Tensor
    c: Tensor
    rest: Tensor


@final
class Bend(NamedTuple):
    """Q, the derivative of the map of k, by its eigenvalues: those, 1 less them, and the vectors; None: the units."""

    q: Tensor
    gap: Tensor
    V: Tensor | None

    def root(self, M: Tensor) -> Tensor:
        """(I - Q)^(1/2) M, for a vector or a matrix."""
        e = self.gap.sqrt()
        if self.V is None:
            return (e if M.dim() == 1 else e.unsqueeze(-1)) * M
        turned = self.V.mT @ M
        found: Tensor = self.V @ ((e if M.dim() == 1 else e.unsqueeze(-1)) * turned)
        return found

    def whole(self) -> Tensor:
        """Q as a matrix."""
        return torch.diag_embed(self.q) if self.V is None else (self.V * self.q) @ self.V.mT


@final
@dataclass(frozen=True, eq=False)
class LinearImage:
    """h(y) = k(A y + b), for vectors.

    prox_{t h}(v) = v - c A' w for the w with z = A y + b, z = prox_{t k / c}(z + w), whatever c > 0: found by the
    alternating direction method of multipliers, with a step of Newton's for that equation in w every few of its own,
    taken where it at least halves the residual. Where k is polyhedral one of these is the last, once the piece is
    found.

    With Q the derivative of prox_{t k / c} at z + w, E = (I - Q)^(1/2) and S = c E A A' E + Q, the derivative is

        P = I - c A' E S^+ E A,

    the inverse of I + t A' D A, where D is the second derivative of k along its manifold, and infinite across it. For
    a cotangent u, a = P u and m = c E S^+ E A u give those of v, A, b and of the image of the map of k itself: a,
    -(c w) a' - m y', -m, and m + c A a.

    Cost: O(m^3 + m^2 q) for the map, and O(q^3) more for P; some tens of maps of k, and a factorization for every
    step of Newton's. Memory O(m q + m^2 + q^2).

    Attributes:
        term: k, of vectors `(m,)`.
        A: `(m, q)`.
        b: `(m,)`.
        tol: of the equation, relative to A v + b, and to what A A' w has.
        max_steps: of the method of multipliers.
    """

    term: AbstractProxTerm
    A: Tensor
    b: Tensor
    tol: float
    max_steps: int

    def prox(self, v: Tensor, step: Tensor | float) -> Tensor:
        """prox_{t h}(v), differentiable once in v, t, A, b and what k is made of."""
        at = self.inside(v, step)
        Q = self._bend(at.p, step / at.c)
        image = self.term.prox(at.p, step / at.c)
        assert isinstance(image, Tensor)
        inputs = v, self.A, self.b, image
        if Q is None:
            return differentiated(at.y, inputs, (), _refuse)
        parts = (self.A.detach(), _gain(self.A.detach(), Q, at.c), at.c * at.w, at.y, at.c)
        return differentiated(at.y, inputs, parts, _pull)

    def margin(self, v: Tensor, step: Tensor | float) -> Tensor:
        """That of k at z + w; NaN where there is no rest."""
        at = self.inside(v, step)
        return torch.where(at.rest, self.term.margin(at.p, step / at.c), torch.nan)

    def active(self, v: Tensor, step: Tensor | float) -> Tensor:
        """The manifold of k."""
        at = self.at_rest(v, step)
        return self.term.active(at.p, step / at.c)

    def derivative(self, v: Tensor, step: Tensor | float) -> ProxDerivative | None:
        """P; None where k has none."""
        at = self.inside(v, step)
        Q = self._bend(at.p, step / at.c)
        if Q is None:
            return None
        A = self.A.detach()
        P = torch.eye(A.shape[1], dtype=v.dtype, device=v.device) - A.mT @ _gain(A, Q, at.c)
        p, V = torch.linalg.eigh(_finite((P + P.mT) / 2))
        p = torch.where(p > torch.finfo(v.dtype).eps ** _PROJECTED, p.clamp_max(1.0), 0.0)
        rest = torch.where(1 - p > torch.finfo(v.dtype).eps ** _PROJECTED, 1 - p, 0.0)
        return ProxDerivative((V, p, rest), on_vector(_times), on_vector(_inverse), on_vector(_co_inverse))

    def at_rest(self, v: Tensor, step: Tensor | float) -> AtRest:
        """Where the iteration ends, without a graph; inside of `torch.vmap` for all rows at once."""
        with torch.no_grad():
            return self._at_rest(v.detach(), step, None)

    def inside(self, v: Tensor, step: Tensor | float) -> AtRest:
        """The same, with a w in the midst of all that there are where A' is not injective.

        At an end of them k may be at a kink though h is at none. The mean of several is no end; they are found from
        starts that are moved by what A' does not see, and only where the first is at a kink.
        """
        with torch.no_grad():
            at = self._at_rest(v.detach(), step, None)
            G = self.A.detach() @ self.A.detach().mT
            values, V = torch.linalg.eigh(_finite(G))
            unseen = values <= 1e-10 * values[-1]
            near = at.rest & (self.term.margin(at.p, step / at.c) < _KINK) & unseen.any()
            if not bool(torch.func.debug_unwrap(near, recurse=True).any()):
                return at
            found, size = [at.w], at.w.abs().max()
            for turn in range(1, _TURNS + 1):
                moved = torch.cos(turn * (1.0 + torch.arange(len(at.w), device="cpu").to(at.w)))
                off = V @ torch.where(unseen, V.mT @ moved, 0.0)
                found += [self._at_rest(v.detach(), step, at.w + sign * size * off).w for sign in (1.0, -1.0)]
            w = torch.stack(found).mean(0)
            y = v.detach() - at.c * (self.A.detach().mT @ w)
            p = self.A.detach() @ y + self.b.detach() + w
            better = near & (self.term.margin(p, step / at.c) > self.term.margin(at.p, step / at.c))
            return AtRest(at.y, torch.where(better, w, at.w), torch.where(better, p, at.p), at.c, at.rest)

    def _at_rest(self, v: Tensor, step: Tensor | float, start_at: Tensor | None) -> AtRest:
        A, b = self.A.detach(), self.b.detach()
        G = A @ A.mT
        values, V = torch.linalg.eigh(_finite(G))
        top = values[-1].clamp_min(tiny(v))
        low = torch.where(values > 1e-10 * top, values, torch.inf).min()
        c = (top * low.clamp_min(1e-4 * top)).rsqrt()  # of the best rate of the method of multipliers
        start, inner = A @ v + b, step / c
        unit = max(self.tol, 16 * torch.finfo(v.dtype).eps)

        def mapped(p: Tensor) -> Tensor:
            found = self.term.prox(p, inner)
            assert isinstance(found, Tensor)
            return found

        def seen(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """The residual of the equation, where the map is taken, its image, and the relative size of the first."""
            pulled = c * (G @ w)
            p = start - pulled + w
            z = mapped(p)
            size = torch.stack([start.abs().max(), b.abs().max(), pulled.abs().max()]).max().clamp_min(tiny(v))
            r = start - pulled - z
            return r, p, z, r.abs().max() / size

        convex = ~self.term.margin(start, inner).isnan()  # a negative weight, which nothing comes to rest with
        w, z = torch.zeros_like(start), start
        if start_at is not None:
            w, z = start_at, seen(start_at)[2]
        for k in range(self.max_steps + 1):
            if k % _LOOKS == 0:
                r, p, _, off = seen(w)
                if _every((off <= unit) | off.isnan() | ~convex):
                    break
                Q = self._bend(p, inner)
                if Q is not None:
                    newton = w + _newton(G, Q, c, r)
                    _, _, image, less = seen(newton)
                    taken = less <= _BETTER * off
                    w, z = torch.where(taken, newton, w), torch.where(taken, image, z)
                    if _every((torch.where(taken, less, off) <= unit) | off.isnan() | ~convex):
                        break
            e = start - b + c * (G @ (z - b - w))  # of y = (I + c A'A)^-1 (v + c A' (z - b - w)) only A y + b is needed
            s = torch.lerp(z, V @ ((V.mT @ e) / (1 + c * values)) + b, _RELAXED)
            z = mapped(s + w)
            w = w + s - z
        _, p, _, off = seen(w)
        return AtRest(v - c * (A.mT @ w), w, p, c, (off <= unit) & convex)

    def _bend(self, p: Tensor, step: Tensor) -> Bend | None:
        with torch.no_grad():
            P = self.term.derivative(p, step)
            if P is None:
                return None
            few = 16 * torch.finfo(p.dtype).eps
            if self.term.separable:
                q = P.times(P.parts, torch.ones_like(p))
                assert isinstance(q, Tensor)
                return Bend(q, torch.where(1 - q > few, 1 - q, 0.0), None)
            units = torch.eye(len(p), dtype=p.dtype, device=p.device)
            Q = torch.stack([_vector(P.times(P.parts, unit)) for unit in units])
            q, V = torch.linalg.eigh(_finite((Q + Q.mT) / 2))
            q = q.clamp(0.0, 1.0)
            return Bend(q, torch.where(1 - q > few * len(p), 1 - q, 0.0), V)


def _vector(found: object) -> Tensor:
    assert isinstance(found, Tensor)
    return found


def _every(done: Tensor) -> bool:
    return bool(torch.func.debug_unwrap(done, recurse=True).all())


def _finite(matrix: Tensor) -> Tensor:
    """Zeros in the place of what eigenvalues cannot be found of; what is made of it is NaN elsewhere."""
    return torch.where(matrix.isfinite(), matrix, 0.0)


def _system(G: Tensor, Q: Bend, c: Tensor) -> Tensor:
    """S = c E G E + Q."""
    found: Tensor = c * Q.root(Q.root(G).mT) + Q.whole()
    return (found + found.mT) / 2


def _newton(G: Tensor, Q: Bend, c: Tensor, r: Tensor) -> Tensor:
    """E S^-1 E r, with S slightly damped."""
    S = _finite(_system(G, Q, c))
    unit = torch.eye(len(r), dtype=r.dtype, device=r.device)
    L = torch.linalg.cholesky_ex(S + _DAMPED * S.diagonal().max() * unit).L
    found: Tensor = Q.root(torch.cholesky_solve(Q.root(r).unsqueeze(-1), L).squeeze(-1))
    return torch.where(found.isfinite(), found, 0.0)


def _gain(A: Tensor, Q: Bend, c: Tensor) -> Tensor:
    """c E S^+ E A."""
    s, V = torch.linalg.eigh(_finite(_system(A @ A.mT, Q, c)))
    least = 8 * len(s) * torch.finfo(s.dtype).eps * s[-1]
    inverse = torch.where(s > least, 1 / torch.where(s > least, s, 1.0), 0.0)
    found: Tensor = c * Q.root(V @ (inverse.unsqueeze(-1) * (V.mT @ Q.root(A))))
    return found


def _pull(parts: Parts, u: Tensor) -> Parts:
    A, gain, dual, y, c = parts
    m = gain @ u
    a = u - A.mT @ m
    return a, -torch.outer(dual, a) - torch.outer(m, y), -m, m + c * (A @ a)


def _refuse(parts: Parts, w: Tensor) -> Parts:
    raise NotImplementedError(
        "`Affine(h, A)` with a matrix A is differentiated through the derivative of h, which has none in closed form."
        " Use `FiniteDifference` or `ESJ`, or give the term a `derivative`."
    )


def _times(parts: Parts, w: Tensor) -> Tensor:
    V, p, _ = parts
    return V @ (p * (V.mT @ w))


def _inverse(parts: Parts, w: Tensor) -> Tensor:
    V, p, _ = parts
    return V @ torch.where(p > 0, (V.mT @ w) / torch.where(p > 0, p, 1.0), 0.0)


def _co_inverse(parts: Parts, w: Tensor) -> Tensor:
    V, _, rest = parts
    return V @ torch.where(rest > 0, (V.mT @ w) / torch.where(rest > 0, rest, 1.0), 0.0)
