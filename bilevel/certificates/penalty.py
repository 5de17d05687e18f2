"""The certificate of a penalty hypergradient from first-order residuals alone."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from bilevel._calculus import outer_gradients
from bilevel._flat import FlatProblem
from bilevel._numerics.rows import row_norms
from bilevel.certificates.assumptions import assumptions, moved
from bilevel.certificates.certificate import Certificate, Constants
from bilevel.certificates.certify_flat import beyond, distance, precise
from bilevel.certificates.completed import completed
from bilevel.certificates.measured import ROUNDING


def certify_penalty(
    problem: FlatProblem, x: Tensor, z: Tensor, y: Tensor, y_w: Tensor, w: float, constants: Constants
) -> Certificate:
    """A bound on |z - h(x)|, z = grad_x f(x, y_w) + w [grad_x g(x, y_w) - grad_x g(x, y)], without Hessian products.

    With e_g = |grad_y g(x, y)|, e_w = |grad_y (f + w g)(x, y_w)|, l = L_f_minus, k = C_G / mu, and the distances
    d_g = e_g / mu, d_w = e_w / (w mu - l), d = |y_w - y| + d_g + d_w >= |y_w* - y*| between the exact solutions:

        |z - h| <= (L_fxy + k L_fyy) d + w/2 (M_xy + k M_yy) d^2 + (L_fxy + w C_G) d_w + w C_G d_g.

    Needs w mu > l: the weight must dominate f's negative curvature. Two gradients of g and one of f; C_G, where it is
    not given, takes products. In float64 wherever f and g can be evaluated in it.
    """
    return precise(lambda problem, to, _: _certify(problem, to(x), to(z), to(y), to(y_w), w, constants), problem)


def _certify(
    problem: FlatProblem, x: Tensor, z: Tensor, y: Tensor, y_w: Tensor, w: float, constants: Constants
) -> Certificate:
    known, notes = completed(problem, x, y, constants)
    assert known.mu is not None and known.C_G is not None
    assert known.L_fxy is not None and known.L_fyy is not None and known.M_xy is not None and known.M_yy is not None
    rows = y.shape[:-1].numel()

    def g_gradients(at: Tensor) -> tuple[Tensor, Tensor]:
        problem.tally.gradients += rows
        with torch.enable_grad():
            xs, ys = x.detach().requires_grad_(), at.detach().requires_grad_()
            value = problem.g(xs, ys).sum()
            if not value.requires_grad:
                return torch.zeros_like(x), torch.zeros_like(at)
            in_x, in_y = torch.autograd.grad(value, (xs, ys), allow_unused=True, materialize_grads=True)
        return in_x, in_y

    gx, gy = g_gradients(y)
    gx_w, gy_w = g_gradients(y_w)
    _, fx, fy = outer_gradients(problem, x, y_w)
    recomputed = fx + w / rows * (gx_w - gx)

    eps = ROUNDING * torch.finfo(y.dtype).eps
    L, size, size_w = known.L or known.mu, row_norms(y.double()), row_norms(y_w.double())
    f_y = rows * row_norms(fy.double()) + known.L_fyy * size_w
    e_g, e_w = row_norms(gy.double()), row_norms(rows * fy.double() + w * gy_w.double())
    e_g, e_w = e_g + eps * (L * size + e_g), e_w + eps * (w * L * size_w + f_y)
    negative = known.L_fyy if known.L_f_minus is None else known.L_f_minus
    dominance = w * known.mu - negative
    apart = row_norms(y_w.double() - y.double())
    reason, bias, inexact, farthest, C_G = "", math.inf, 0.0, math.inf, known.C_G
    if dominance > 0:
        d_g, d_w = e_g / known.mu, e_w / dominance
        d = apart + d_g + d_w
        farthest = float(d.max())
        C_G = moved(known, float(torch.maximum(d_g, apart + d_w).max())).C_G or 0.0  # at y*, y_w and y_w* too
        k = C_G / known.mu
        quadratic = 0.5 * w * (known.M_xy + k * known.M_yy) * d.square()
        bias = float(((known.L_fxy + k * known.L_fyy) * d + quadratic).mean())
        inexact = float(((known.L_fxy + w * C_G) * d_w + w * C_G * d_g).mean())
        reason = beyond(farthest, constants)
    else:
        reason = (
            f"the weight does not dominate f: weight times mu = {w * known.mu:.3g} must exceed {negative:.3g}."
            f" Raise the weight, or give L_f_minus (0 where f is convex in y)."
        )
    gx_size = max(float(row_norms(t.double())) for t in (gx, gx_w)) / rows + C_G * float((size + size_w).mean())
    rounding = eps * (float(row_norms(fx.double())) + known.L_fxy * float(size_w.mean()) + w * gx_size)
    off = distance(z, recomputed)
    total = bias + inexact + off + rounding
    return Certificate(
        bound=total,
        terms={"penalty": bias, "inner": inexact, "estimate": off, "rounding": rounding},
        theorem="penalty",
        proven=not constants.heuristic and not reason and math.isfinite(total),
        confidence=known.confidence,
        assumed=tuple(assumptions(constants, replace(known, C_G=C_G), known.mu)) + notes,
        distance=farthest,
        grad_norm=float(torch.linalg.vector_norm(z.double())),
        stats=problem.tally.stats(),
        reason=reason,
    )
