"""Constants completed by products, where they were not given."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from bilevel._calculus import Exact, cross_operator
from bilevel._flat import FlatProblem
from bilevel._numerics.spectrum import largest_eigenvalue
from bilevel.certificates.certificate import Assumption, Constants, NonfiniteError

FAILURE = 0.01  # of the bound on |G|, and of that on |H|, where they are bounded from products


def completed(
    problem: FlatProblem, x: Tensor, y: Tensor, constants: Constants
) -> tuple[Constants, tuple[Assumption, ...]]:
    """The constants with C_G and L bounded from the operators at y where they were not given, and a note of each.

    L is part of the rounding of residuals: the curvature along one direction bounds |H| from below only.

    Raises:
        NonfiniteError: if a product is not finite.
    """
    constants, notes = with_cross(problem, x, y, constants)
    constants, more = with_curvature(problem, x, y, constants)
    return constants, notes + more


def with_cross(
    problem: FlatProblem, x: Tensor, y: Tensor, constants: Constants
) -> tuple[Constants, tuple[Assumption, ...]]:
    """The constants with C_G; some 14 products with G and as many with G', where it was not given."""
    if constants.C_G is not None:
        return constants, ()
    squared, like, unit = cross_operator(problem, x, y)
    c_g = unit * math.sqrt(max(_bound(largest_eigenvalue(squared, like, failure=FAILURE)), 0.0)) * _margin(y)
    note = Assumption("C_G", c_g, f"|G| at y, by Lanczos' method with confidence {1 - FAILURE:g}")
    local, confidence = _measured(constants, "C_G")
    return replace(constants, C_G=c_g, local=local, confidence=confidence), (note,)


def with_curvature(
    problem: FlatProblem, x: Tensor, y: Tensor, constants: Constants
) -> tuple[Constants, tuple[Assumption, ...]]:
    """The constants with L >= |H|; one gradient and some 14 products with H, where it was not given."""
    if constants.L is not None:
        return constants, ()
    operator = Exact().linearize(problem, x, y).operator
    each = FAILURE / y.shape[:-1].numel()  # tasks share the start of Lanczos' method, and none of them may fail
    largest = _bound(largest_eigenvalue(operator, y, failure=each).max())
    L = max(largest, 0.0) * _margin(y)
    note = Assumption("L", L, f"|H| at y, by Lanczos' method with confidence {1 - FAILURE:g}; for rounding")
    local, confidence = _measured(constants, "L")
    return replace(constants, L=L, local=local, confidence=confidence), (note,)


def _measured(constants: Constants, name: str) -> tuple[frozenset[str], float]:
    """The names of what was measured at y, with this one, and the probability that all of it holds."""
    return constants.local | {name}, constants.confidence * (1 - FAILURE)


def _bound(eigenvalue: Tensor) -> float:
    if not bool(eigenvalue.isfinite()):
        raise NonfiniteError
    return float(eigenvalue)


def _margin(y: Tensor) -> float:
    return 1 + 100 * torch.finfo(y.dtype).eps
