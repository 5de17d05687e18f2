"""The certificate of a penalty hypergradient from first-order residuals alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel._calculus import outer_gradients
from bilevel._certificate import Certificate, Constants
from bilevel._flat import FlatProblem

_ROUNDING = 8.0


def certify_penalty(
    problem: FlatProblem, x: Tensor, z: Tensor, y: Tensor, y_w: Tensor, w: float, known: Constants
) -> Certificate:
    """A bound on |z - h(x)|, z = grad_x f(x, y_w) + w [grad_x g(x, y_w) - grad_x g(x, y)], without Hessian products.

    With e_g = |grad_y g(x, y)|, e_w = |grad_y (f + w g)(x, y_w)|, l = L_f_minus, k = C_G / mu, and the distances
    d_g = e_g / mu, d_w = e_w / (w mu - l), d = |y_w - y| + d_g + d_w >= |y_w* - y*| between the exact solutions:

        |z - h| <= (L_fxy + k L_fyy) d + w/2 (M_xy + k M_yy) d^2 + (L_fxy + w C_G) d_w + w C_G d_g.

    Needs w mu > l: the weight must dominate f's negative curvature. Two gradients of g and one of f.
    """
    assert known.mu is not None and known.C_G is not None
    assert known.L_fxy is not None and known.L_fyy is not None and known.M_xy is not None and known.M_yy is not None
    rows = 1 if y.dim() == 1 else y.shape[0]

    def g_gradients(at: Tensor) -> tuple[Tensor, Tensor]:
        problem.tally.gradients += rows
        with torch.enable_grad():
            xs, ys = x.detach().requires_grad_(), at.detach().requires_grad_()
            value = problem.g(xs, ys).sum()
            in_x, in_y = torch.autograd.grad(value, (xs, ys), allow_unused=True, materialize_grads=True)
            return in_x, in_y

    gx, gy = g_gradients(y)
    gx_w, gy_w = g_gradients(y_w)
    _, fx, fy = outer_gradients(problem, x, y_w)
    recomputed = fx + w / rows * (gx_w - gx)

    eps = _ROUNDING * torch.finfo(y.dtype).eps
    L = known.L if known.L is not None else known.mu
    e_g = torch.linalg.vector_norm(gy, dim=-1) + eps * L * torch.linalg.vector_norm(y, dim=-1)
    e_w = torch.linalg.vector_norm(rows * fy + w * gy_w, dim=-1)
    e_w = e_w + eps * (w * L * torch.linalg.vector_norm(y_w, dim=-1) + rows * torch.linalg.vector_norm(fy, dim=-1))
    negative = known.L_fyy if known.L_f_minus is None else known.L_f_minus
    dominance = w * known.mu - negative
    k = known.C_G / known.mu
    reason = ""
    if dominance > 0:
        d_g, d_w = e_g / known.mu, e_w / dominance
        d = torch.linalg.vector_norm(y_w - y, dim=-1) + d_g + d_w
        bias = (known.L_fxy + k * known.L_fyy) * d + 0.5 * w * (known.M_xy + k * known.M_yy) * d.square()
        inexact = (known.L_fxy + w * known.C_G) * d_w + w * known.C_G * d_g
        parts, distance = (float(bias.mean()), float(inexact.mean())), float(d_g.max())
    else:
        parts, distance = (math.inf, 0.0), math.inf
        reason = (
            f"the weight does not dominate f: weight times mu = {w * known.mu:.3g} must exceed {negative:.3g}."
            f" Raise the weight, or give L_f_minus (0 where f is convex in y)."
        )
    rounding = float(
        eps
        * (
            torch.linalg.vector_norm(fx)
            + w / rows * torch.linalg.vector_norm(gx).maximum(torch.linalg.vector_norm(gx_w))
        )
    )
    off = float(torch.linalg.vector_norm(z - recomputed))
    total = sum(parts) + off + rounding
    return Certificate(
        bound=total,
        terms={"penalty": parts[0], "inner": parts[1], "estimate": off, "rounding": rounding},
        theorem="penalty",
        proven=not known.heuristic and math.isfinite(total),
        confidence=known.confidence,
        assumed=(),
        distance=distance,
        grad_norm=float(torch.linalg.vector_norm(z)),
        stats=problem.tally.stats(),
        reason=reason,
    )
