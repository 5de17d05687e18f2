"""The constants that a certificate rests on: completed, extended along the segment, confronted with what was seen."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from bilevel._calculus import Exact, cross_operator
from bilevel._flat import FlatProblem
from bilevel._numerics.spectrum import largest_eigenvalue
from bilevel.certificates.certificate import Assumption, Constants
from bilevel.certificates.residuals import ROUNDING, Measured

NEEDED = ("L_fyy", "L_fxy", "M_yy", "M_xy")
FAILURE = 0.01  # of the bound on |G|, where it is bounded from products
_SLACK = 1e-9  # a constant is contradicted by more than rounding


def completed(
    problem: FlatProblem, x: Tensor, y: Tensor, constants: Constants
) -> tuple[Constants, tuple[Assumption, ...]]:
    """The constants with C_G bounded from the operator at y where it was not given, and a note that it was.

    Also L in float32, where rounding matters and it is part of the rounding of residuals.
    """
    notes: tuple[Assumption, ...] = ()
    margin = 1 + 100 * torch.finfo(y.dtype).eps
    if constants.C_G is None:
        squared, like = cross_operator(problem, x, y)
        c_g = margin * math.sqrt(max(float(largest_eigenvalue(squared, like, failure=FAILURE)), 0.0))
        notes += (Assumption("C_G", c_g, f"|G| at y, by Lanczos' method with confidence {1 - FAILURE:g}"),)
        confidence = constants.confidence * (1 - FAILURE)
        constants = replace(constants, C_G=c_g, local=constants.local | {"C_G"}, confidence=confidence)
    if constants.L is None and y.dtype != torch.float64:
        L = margin * float(largest_eigenvalue(Exact().linearize(problem, x, y).operator, y, failure=FAILURE).max())
        notes += (Assumption("L", L, f"at y, by Lanczos' method with confidence {1 - FAILURE:g}; for rounding"),)
        confidence = constants.confidence * (1 - FAILURE)
        constants = replace(constants, L=L, local=constants.local | {"L"}, confidence=confidence)
    return constants, notes


def moved(known: Constants, distance: float) -> Constants:
    """Constants measured at a point, made valid at another one at this distance: mu may be None then."""
    assert known.M_yy is not None and known.M_xy is not None
    mu, C_G, L = known.mu, known.C_G, known.L
    if "mu" in known.local and mu is not None:
        mu = mu - known.M_yy * distance if mu > known.M_yy * distance else None
    if "C_G" in known.local and C_G is not None:
        C_G += known.M_xy * distance
    if "L" in known.local and L is not None:
        L += known.M_yy * distance
    return replace(known, mu=mu, C_G=C_G, L=L)


def contradiction(found: Measured, known: Constants) -> str:
    """Which of the constants is refuted by the products that were taken anyway; empty if none is."""
    if found.curvatures is None or found.coupling is None:
        return ""
    least, largest = found.curvatures
    slack = max(_SLACK, 8 * ROUNDING * torch.finfo(found.h.dtype).eps)
    if known.mu is not None and least < known.mu - slack * max(known.mu, abs(largest)):
        return f"mu = {known.mu:.3g} does not hold: the curvature along v is {least:.3g} at y"
    if known.C_G is not None and found.coupling > known.C_G * (1 + slack) + torch.finfo(torch.float64).tiny:
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
