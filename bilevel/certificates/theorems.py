"""The theorems behind certificates: from residuals and constants to a bound."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel.certificates.assumptions import contradiction, moved
from bilevel.certificates.certificate import Constants
from bilevel.certificates.measured import Measured


@final
@dataclass(frozen=True)
class Terms:
    """The bound of one point: its parts, the distance |y - y*|, the mu and the constants that it used.

    `unique` is the radius of the ball around y in which y* is the only stationary point.
    """

    inner: float
    linear: float
    distance: float
    mu: float
    known: Constants
    unique: float = math.inf
    reason: str = ""

    @property
    def total(self) -> float:
        """The bound on |h_v - h|."""
        return self.inner + self.linear


def theorem_a(found: Measured, mu: float | Tensor, delta: Tensor, known: Constants) -> Terms:
    """The bound with a strong convexity mu valid on the segment, and delta >= |y - y*|; the mean over tasks.

    h - h_v = (a* - a) - (G* - G) v - G* (v* - v) with v* - v = H*^-1 [(b* - b) + r + (H - H*) v], stars at y*.
    C_G must hold at y*.
    """
    assert known.L_fxy is not None and known.M_xy is not None and known.L_fyy is not None and known.M_yy is not None
    assert known.C_G is not None
    kappa_g = known.C_G / mu
    inner = delta * (known.L_fxy + known.M_xy * found.v) + kappa_g * delta * (known.L_fyy + known.M_yy * found.v)
    linear = kappa_g * found.r
    least = float(mu.min()) if isinstance(mu, Tensor) else mu
    return Terms(float(inner.mean()), float(linear.mean()), float(delta.max()), least, known)


def theorem_b(found: Measured, least: Tensor, known: Constants) -> Terms:
    """Theorem A from the least eigenvalue m of H at y alone, by Newton and Kantorovich.

    If 2 M_yy |e| <= m^2, with m* = sqrt(m^2 - 2 M_yy |e|): a stationary point y* lies within d = (m - m*) / M_yy of
    y, H >= m* there and on the segment, and it is the only one within (m + m*) / M_yy.
    """
    assert known.M_yy is not None
    room = least * least - 2 * known.M_yy * found.e
    if not bool((least > 0).all()) or not bool((room >= 0).all()):
        why = (
            "the inner Hessian is not known to be positive definite at y: no strict minimum of g(x, .) can be certified"
            if not bool((least > 0).all())
            else "|grad_y g| is too large for a stationary point nearby to be certain: solve the inner problem better"
        )
        return Terms(math.inf, 0.0, math.inf, float(least.min()), known, 0.0, why)
    mu = room.sqrt()
    delta = 2 * found.e / (least + mu)  # (m - m*) / M_yy without cancellation, which also covers M_yy = 0
    unique = float(((least + mu) / known.M_yy).min()) if known.M_yy > 0 else math.inf
    return replace(theorem_a(found, mu, delta, along(known, float(delta.max()))), unique=unique)


def along(known: Constants, delta: float) -> Constants:
    """C_G valid at y*, if it was measured at y: |G(y*)| <= |G(y)| + M_xy delta."""
    return replace(moved(known, delta), mu=known.mu)


def bounded(found: Measured, known: Constants) -> Terms:
    """Theorem A where mu is known along the segment; B where it was measured at y."""
    assert known.mu is not None
    if "mu" in known.local:
        terms = theorem_b(found, torch.full_like(found.e, known.mu), known)
    else:
        delta = found.e / known.mu
        terms = theorem_a(found, known.mu, delta, along(known, float(delta.max())))
    return confronted(found, terms)


def confronted(found: Measured, terms: Terms) -> Terms:
    """The terms, infinite where the products that were taken anyway refute a constant."""
    refuted = contradiction(found, terms.known)
    return replace(terms, inner=math.inf, distance=math.inf, reason=refuted) if refuted else terms
