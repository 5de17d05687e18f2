"""The residuals that a certificate is made of, computed at a point (x, y, v)."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel._calculus import Exact, outer_gradients
from bilevel._flat import FlatProblem
from bilevel.certificates.certificate import Constants
from bilevel.certificates.measured import Measured, measured


class SinglePrecisionError(RuntimeError):
    """f or g computes in a lower precision than its arguments have."""


def measure(
    problem: FlatProblem, x: Tensor, y: Tensor, v: Tensor, known: Constants, suspicious: bool = False
) -> Measured:
    """Two gradients, one Hessian product and one cross product, in the dtype of y.

    Args:
        problem: the problem, at whose tally the calls are counted.
        x: `(p,)`.
        y: `(*tasks, q)`.
        v: alike.
        known: the constants, as far as they are; for rounding.
        suspicious: whether f and g were written for another dtype than that of y.

    Raises:
        SinglePrecisionError: if they are, and computed in float32 inside.
    """
    at = Exact().linearize(problem, x, y)
    value, fx, fy = outer_gradients(problem, x, y)
    hv, gv = at.products(v)
    if suspicious and (_single(at.gradient, hv) or _single(value, fx, fy)) and _single_inside(problem, x, y):
        raise SinglePrecisionError
    return measured(y, v, at.gradient, fy - hv, fx, fy, gv, known, hv)


def _single_inside(problem: FlatProblem, x: Tensor, y: Tensor) -> bool:
    """Whether f or g computes in float32: its values fit into it at a point at which those of float64 do not."""
    x, y = (t + 1e-3 * torch.sin(1.0 + torch.arange(t.numel(), device="cpu").to(t)).reshape(t.shape) for t in (x, y))
    at = Exact().linearize(problem, x, y)
    value, fx, fy = outer_gradients(problem, x, y)
    products = at.products(torch.cos(1.0 + torch.arange(y.numel(), device="cpu").to(y)).reshape(y.shape))
    return _single(at.gradient, products[0]) or _single(value, fx, fy)


def _single(*tensors: Tensor) -> bool:
    """Whether float32 holds all of these exactly: then they were computed in it, or are so simple that it may be."""
    return any(bool(t.any()) for t in tensors) and all(torch.equal(t, t.float().double()) for t in tensors)
