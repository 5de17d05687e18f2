"""The constants that a certificate rests on: extended along the segment, confronted with what was seen, listed."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from bilevel.certificates.certificate import Assumption, Constants, NonfiniteError
from bilevel.certificates.measured import ROUNDING, Measured

NEEDED = ("L_fyy", "L_fxy", "M_yy", "M_xy")
_SLACK = 1e-9  # a constant is contradicted by more than rounding


def moved(known: Constants, distance: float) -> Constants:
    """Constants measured at a point, made valid at another one at this distance: mu may be None then.

    Raises:
        NonfiniteError: if one of them is not finite there.
    """
    assert known.M_yy is not None and known.M_xy is not None
    mu, C_G, L = known.mu, known.C_G, known.L
    if "mu" in known.local and mu is not None:
        less = mu - known.M_yy * distance
        mu = None if less <= 0 else less
    if "C_G" in known.local and C_G is not None:
        C_G += known.M_xy * distance
    if "L" in known.local and L is not None:
        L += known.M_yy * distance
    if not all(math.isfinite(constant) for constant in (mu, C_G, L) if constant is not None):
        raise NonfiniteError
    return replace(known, mu=mu, C_G=C_G, L=L)


def contradiction(found: Measured, known: Constants) -> str:
    """Which of the constants is refuted by the products that were taken anyway; empty if none is."""
    slack = max(_SLACK, 8 * ROUNDING * torch.finfo(found.h.dtype).eps)
    if known.mu is not None and known.L is not None and known.mu * (1 - slack) > known.L:
        return f"mu = {known.mu:.3g} does not hold: no curvature at y is above {known.L:.3g}"
    if known.mu is not None and found.curvature is not None and found.curvature < known.mu * (1 - slack):
        return f"mu = {known.mu:.3g} does not hold: the curvature along v is {found.curvature:.3g} at y"
    tiny = torch.finfo(torch.float64).tiny
    if known.C_G is not None and found.coupling is not None and found.coupling > known.C_G * (1 + slack) + tiny:
        return f"C_G = {known.C_G:.3g} does not hold: |G v| / |v| is {found.coupling:.3g} at y"
    return ""


def assumptions(constants: Constants, known: Constants, mu: float) -> list[Assumption]:
    """Each constant with its value as it entered the bound, and its source as the user gave it."""

    def source(name: str) -> str:
        where = f"{constants.source} at y" if name in constants.local else constants.source
        return f"{where}, heuristic" if name in constants.heuristic else where

    listed = [Assumption("mu", mu, source("mu") if constants.mu is not None else "from the least eigenvalue of H at y")]
    for name in (*NEEDED, "C_G"):
        if getattr(constants, name) is not None:
            listed.append(Assumption(name, getattr(known, name), source(name)))
    return listed
