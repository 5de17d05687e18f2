"""Constants completed by products, where they were not given."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from bilevel._calculus import Exact, cross_operator
from bilevel._flat import FlatProblem
from bilevel._numerics.spectrum import largest_eigenvalue
from bilevel.certificates.certificate import Assumption, Constants

FAILURE = 0.01  # of the bound on |G|, where it is bounded from products


def completed(
    problem: FlatProblem, x: Tensor, y: Tensor, constants: Constants
) -> tuple[Constants, tuple[Assumption, ...]]:
    """The constants with C_G bounded from the operator at y where it was not given, and a note that it was.

    Also L in float32, where rounding matters and it is part of the rounding of residuals.
    """
    notes: tuple[Assumption, ...] = ()
    margin = 1 + 100 * torch.finfo(y.dtype).eps
    if constants.C_G is None:
        squared, like, unit = cross_operator(problem, x, y)
        c_g = margin * unit * math.sqrt(max(float(largest_eigenvalue(squared, like, failure=FAILURE)), 0.0))
        notes += (Assumption("C_G", c_g, f"|G| at y, by Lanczos' method with confidence {1 - FAILURE:g}"),)
        confidence = constants.confidence * (1 - FAILURE)
        constants = replace(constants, C_G=c_g, local=constants.local | {"C_G"}, confidence=confidence)
    if constants.L is None and y.dtype != torch.float64:
        L = margin * float(largest_eigenvalue(Exact().linearize(problem, x, y).operator, y, failure=FAILURE).max())
        notes += (Assumption("L", L, f"at y, by Lanczos' method with confidence {1 - FAILURE:g}; for rounding"),)
        confidence = constants.confidence * (1 - FAILURE)
        constants = replace(constants, L=L, local=constants.local | {"L"}, confidence=confidence)
    return constants, notes
