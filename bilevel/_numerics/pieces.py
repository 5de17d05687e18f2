"""min u'Gu / 2 + p'u + sum_i a_i |u_i| + c_i u_i^2 / 2 on l <= u <= u: coordinate descent, and steps on faces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

_JITTER = 1e-10  # of the mean diagonal, where a matrix on a face is singular to rounding: a direction of descent still
_MOST_FACES = 30  # in a row, each smaller than the one before


@final
@dataclass(frozen=True, eq=False)
class Pieces:
    """a |u| + c u^2 / 2 on l <= u <= u, entry by entry; each `(m,)`.

    Example:
        >>> one = torch.ones(1)
        >>> Pieces(one, 0 * one, -10 * one, 10 * one).least(
        ...     torch.tensor([2.0]), torch.tensor([-3.0]), torch.zeros(1)
        ... )
        tensor([1.])
    """

    a: Tensor
    c: Tensor
    lower: Tensor
    upper: Tensor

    @staticmethod
    def of(rows: Tensor) -> Pieces:
        """From the rows a, c, l, u `(4, m)`."""
        return Pieces(*rows.unbind(-2))

    def on(self, which: Tensor) -> Pieces:
        """Those of some entries."""
        return Pieces(self.a[which], self.c[which], self.lower[which], self.upper[which])

    def value(self, u: Tensor) -> Tensor:
        """The sum of all entries, within the bounds."""
        return (self.a * u.abs()).sum() + (self.c * u.square()).sum() / 2

    def subgradient(self, u: Tensor, s: Tensor) -> Tensor:
        """The least element of s + dh(u), entry by entry: zero at a minimizer."""
        smooth = s + self.c * u
        signed = smooth + self.a * u.sign()
        at_zero = smooth.sign() * (smooth.abs() - self.a).relu()
        found = torch.where((u == 0) & (self.a > 0), at_zero, signed)
        found = torch.where(u <= self.lower, found.clamp_max(0), found)
        return torch.where(u >= self.upper, found.clamp_min(0), found)

    def least(self, g: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """argmin over each entry alone, where the smooth part has slope s at u and curvature g > 0."""
        v = g * u - s
        found: Tensor = v.sign() * (v.abs() - self.a).relu() / (g + self.c)
        return found.clamp(self.lower, self.upper)

    def free(self, u: Tensor) -> Tensor:
        """Which entries are at no kink."""
        return ((u != 0) | (self.a == 0)) & (u > self.lower) & (u < self.upper)

    def codes(self, u: Tensor) -> Tensor:
        """Which piece each entry is on."""
        return u.sign() * (self.a > 0) + 2.0 * ((u >= self.upper).to(u) - (u <= self.lower).to(u))

    def clamped(self, to: Tensor, nearest: Tensor, end: float) -> Tensor:
        """`to` within the bounds, where end < 1 with the entry that came to its bound first exactly on it."""
        inside = to.clamp(self.lower, self.upper)
        if end < 1:
            j = int(nearest)
            bounds = torch.stack([self.lower[j], self.upper[j]])
            inside[j] = bounds[(bounds - to[j]).abs().argmin()]
        return inside

    def beyond(self, u: Tensor, to: Tensor) -> Tensor:
        """`to`, with entries that left their piece put back to the kink that they came to first."""
        crossed = (self.a > 0) & (u * to < 0)
        return torch.where(crossed, torch.zeros_like(to), to).clamp(self.lower, self.upper)


def minimize(G: Tensor, p: Tensor, h: Pieces, u: Tensor, tol: float, max_sweeps: int) -> tuple[Tensor, int, float]:
    """The minimizer from u, the number of sweeps, and the norm of the least subgradient.

    A sweep goes once over the entries that are not at their minimum. After it, the entries that are at no kink move to
    the minimizer of their quadratic piece, or as far as that falls: where the right piece is found, that is the end.

    Args:
        G: positive semidefinite `(m, m)`.
        p: `(m,)`.
        h: the pieces.
        u: `(m,)`.
        tol: on the norm.
        max_sweeps: at most so many.
    """
    u = u.clamp(h.lower, h.upper)
    diagonal = G.diagonal()
    rows, steep = G.unbind(0), (diagonal + h.c > 0)
    curvature = torch.where(steep, diagonal, torch.ones_like(diagonal))
    sweeps = 0
    while True:
        s = torch.mv(G, u) + p
        left = h.subgradient(u, s)
        norm = float(torch.linalg.vector_norm(left))
        if not norm > tol or sweeps == max_sweeps:
            return u, sweeps, norm
        sweeps += 1
        _sweep(rows, h, curvature, u, s, left)
        u = _faces(G, p, h, u)


def _sweep(rows: tuple[Tensor, ...], h: Pieces, curvature: Tensor, u: Tensor, s: Tensor, left: Tensor) -> None:
    """Each entry that is not at its minimum goes there, with all others as they are: u and s change in place."""
    which = (left != 0).nonzero().squeeze(-1).tolist()
    a, c, lower, upper = (part.tolist() for part in (h.a, h.c, h.lower, h.upper))
    g, values = curvature.tolist(), u.tolist()
    for j in which:
        v = g[j] * values[j] - float(s[j])
        size = abs(v) - a[j]
        to = 0.0 if size <= 0 else (size if v > 0 else -size) / (g[j] + c[j])
        to = min(max(to, lower[j]), upper[j])
        if to != values[j]:
            s.add_(rows[j], alpha=to - values[j])
            values[j] = to
    u.copy_(u.new_tensor(values))


def _faces(G: Tensor, p: Tensor, h: Pieces, u: Tensor) -> Tensor:
    """Newton steps on faces, each at most as large as the one before, as long as the objective falls."""

    def value(u: Tensor) -> float:
        return float(u @ (torch.mv(G, u) / 2 + p) + h.value(u))

    at = value(u)
    for _ in range(_MOST_FACES):
        F = h.free(u).nonzero().squeeze(-1)
        if not F.numel():
            return u
        part = h.on(F)
        slope = (torch.mv(G, u) + p)[F] + part.c * u[F] + part.a * u[F].sign()
        H = G[F][:, F]
        H.diagonal().add_(part.c)
        L, info = torch.linalg.cholesky_ex(H)
        if int(info):
            H.diagonal().add_(_JITTER * H.diagonal().mean() + torch.finfo(H.dtype).tiny)
            L, info = torch.linalg.cholesky_ex(H)
            if int(info):
                return u
        to = u[F] - torch.cholesky_solve(slope.unsqueeze(-1), L).squeeze(-1)
        inside = part.beyond(u[F], to)
        whole = torch.equal(inside, to)
        moved = u.index_copy(0, F, inside)
        new = value(moved)
        if not new < at:
            if whole:  # to rounding it is the minimizer of the piece
                return moved if new <= at + 4 * torch.finfo(u.dtype).eps * abs(at) else u
            moved = u.index_copy(0, F, _along(G, p, h, u, F, to))
            new = value(moved)
            if not new < at:
                return u
        u, at = moved, new
        if whole:
            return u
    return u


def _along(G: Tensor, p: Tensor, h: Pieces, u: Tensor, F: Tensor, to: Tensor) -> Tensor:
    """The minimizer on the segment from u_F to `to`, as far as bounds allow; at a kink, exactly there."""
    part, start = h.on(F), u[F]
    d = to - start
    most = torch.where(d > 0, (part.upper - start) / d, torch.where(d < 0, (part.lower - start) / d, torch.inf))
    nearest = most.argmin()
    end = min(1.0, float(most[nearest]))
    Gd = torch.mv(G.index_select(1, F), d)
    slope = (torch.mv(G, u) + p)[F] @ d + (part.c * start + part.a * start.sign()) @ d
    bend = Gd[F] @ d + part.c @ d.square()
    kinks = torch.where((part.a > 0) & (start * d < 0), -start / d, torch.inf)
    order = kinks.argsort()
    times = kinks[order]
    jumps = torch.cumsum(2 * part.a[order] * d[order].abs(), 0)
    before = slope + times * bend  # the slope just before each kink, without the jumps of those passed
    passed = torch.cat([torch.zeros_like(jumps[:1]), jumps[:-1]])
    stops = (before + jumps >= 0) & (times < end)
    if bool(stops.any()):
        k = int(stops.to(torch.int8).argmax())
        free = float(-(slope + passed[k]) / bend)
        if free < float(times[k]):
            return start + free * d
        return (start + times[k] * d).index_fill(0, order[k], 0.0)
    count = int((times < end).sum())
    free = float(-(slope + (jumps[count - 1] if count else 0.0)) / bend) if float(bend) > 0 else end
    if free < end:
        return start + free * d
    return part.clamped(start + end * d, nearest, end)
