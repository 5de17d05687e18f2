"""The certificate of a penalty hypergradient from first-order residuals alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel._calculus import outer_gradients
from bilevel._flat import FlatProblem
from bilevel._numerics.rows import safe_row_norms
from bilevel.certificates.assumptions import assumptions, moved
from bilevel.certificates.certificate import Certificate, Constants, NonfiniteError
from bilevel.certificates.certify_flat import NOT_FINITE, beyond, distance, nothing, precise
from bilevel.certificates.completed import with_cross, with_curvature
from bilevel.certificates.measured import ROUNDING
from bilevel.certificates.remarks import remark
from bilevel.requirements.properties import START_ONLY, DoesNotApply


def certify_penalty(
    problem: FlatProblem, x: Tensor, z: Tensor, y: Tensor, y_w: Tensor, w: float, constants: Constants
) -> Certificate:
    """A bound on |z - h(x)|, z = grad_x f(x, y_w) + w [grad_x g(x, y_w) - grad_x g(x, y)], without Hessian products.

    With e_g = |grad_y g(x, y)|, e_w = |grad_y (f + w g)(x, y_w)|, k = C_G / mu, and the distances d_g = e_g / mu >=
    |y - y*| and d = |y_w - y| + d_g >= |y_w - y*|:

        |z - h| <= (L_fxy + k L_fyy) d + w/2 (M_xy + k M_yy) d^2 + k e_w + w C_G d_g.

    It holds for any y and y_w, whether or not the penalized problem has a minimizer: with s = y_w - y* and the vector E
    of norm e_w, w int H s = E - grad_y f(y_w), int along the segment from y* to y_w, is solved for w s in
    w [grad_x g(y_w) - grad_x g(y*)] = w int G s. Derived in docs/theory.md.

    Two gradients of g and one of f; C_G, where it is not given, takes products, and so does L, which is part of the
    rounding. In float64 wherever f and g can be evaluated in it.

    Raises:
        DoesNotApply: if y depends on x through its start only.
    """

    def certificate(problem: FlatProblem, to: Any, _: bool) -> Certificate:
        try:
            return _certify(problem, to(x), to(z), to(y), to(y_w), w, constants)
        except NonfiniteError:
            return nothing(problem, to(z), constants, "penalty")

    return precise(certificate, problem)


def _certify(
    problem: FlatProblem, x: Tensor, z: Tensor, y: Tensor, y_w: Tensor, w: float, constants: Constants
) -> Certificate:
    known, notes = with_cross(problem, x, y, constants)
    reason = ""
    try:
        known, more = with_curvature(problem, x, y, known)
        notes += more
    except NotImplementedError:
        reason = "L is not known, and g has no second derivatives that would bound it: what rounding adds is modelled"
    assert known.mu is not None and known.C_G is not None
    assert known.L_fxy is not None and known.L_fyy is not None and known.M_xy is not None and known.M_yy is not None
    rows = y.shape[:-1].numel()

    def g_gradients(at: Tensor) -> tuple[Tensor, Tensor]:
        problem.tally.gradients += rows
        with torch.enable_grad():
            xs, ys = x.detach().requires_grad_(), at.detach().requires_grad_()
            value = problem.g(xs, ys).sum()
            none: tuple[Tensor | None, ...] = (None, None)
            in_x, in_y = torch.autograd.grad(value, (xs, ys), allow_unused=True) if value.requires_grad else none
        if in_x is None and problem.problem.init is not None:
            raise DoesNotApply(START_ONLY)
        return torch.zeros_like(x) if in_x is None else in_x, torch.zeros_like(at) if in_y is None else in_y

    gx, gy = g_gradients(y)
    gx_w, gy_w = g_gradients(y_w)
    _, fx, fy = outer_gradients(problem, x, y_w)
    recomputed = fx + w / rows * (gx_w - gx)

    eps = ROUNDING * torch.finfo(y.dtype).eps
    apart = safe_row_norms(y_w.double() - y.double())
    L, L_w = (known.mu if L is None else L for L in (known.L, moved(known, float(apart.max())).L))  # at y, and at y_w
    size, size_w = safe_row_norms(y.double()), safe_row_norms(y_w.double())
    f_y = rows * safe_row_norms(fy.double()) + known.L_fyy * size_w
    e_g, e_w = safe_row_norms(gy.double()), safe_row_norms(rows * fy.double() + w * gy_w.double())
    e_g, e_w = e_g + eps * (L * size + e_g), e_w + eps * (w * (L_w * size_w + safe_row_norms(gy_w.double())) + f_y)
    d_g = e_g / known.mu
    d = apart + d_g
    farthest = float(d.max())
    C_G = moved(known, float(d_g.max())).C_G  # at y* too, and between
    assert C_G is not None
    k = C_G / known.mu
    quadratic = 0.5 * w * (known.M_xy + k * known.M_yy) * d.square()
    bias = float(((known.L_fxy + k * known.L_fyy) * d + quadratic).mean())
    inexact = float((k * e_w + w * C_G * d_g).mean())
    reason = beyond(farthest, constants) or reason
    gx_size = max(float(safe_row_norms(t.double())) for t in (gx, gx_w)) / rows + C_G * float((size + size_w).mean())
    rounding = eps * (float(safe_row_norms(fx.double())) + known.L_fxy * float(size_w.mean()) + w * gx_size)
    off = distance(z, recomputed)
    total, norm = bias + inexact + off + rounding, float(safe_row_norms(z.double()))
    if not math.isfinite(total):
        total, reason = math.inf, reason or NOT_FINITE
    terms = {"penalty": bias, "inner": inexact, "estimate": off, "rounding": rounding}
    return Certificate(
        bound=total,
        terms=terms,
        theorem="penalty",
        proven=not constants.heuristic and not reason and math.isfinite(total),
        confidence=known.confidence,
        assumed=tuple(assumptions(constants, replace(known, C_G=C_G), known.mu)) + notes,
        distance=farthest,
        grad_norm=norm,
        stats=problem.tally.stats(),
        reason=reason,
        remark=remark(total, norm, terms, None if known.L is None else known.L / known.mu, refined=True),
    )
