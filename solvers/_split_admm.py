"""The alternating direction method of multipliers for g(y) + k(A y + b)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bilevel._inner import Objective
from bilevel._numerics.rows import positive_or_one, safe_row_norms
from bilevel._result import Solved, judged_rows
from bilevel.inner_problems.flat_image import FlatImage
from bilevel.solvers._proximal_steps import Settling, image_of_steps

_RELAXED = 1.6  # in (1, 2)
_BALANCE, _EVERY, _LATEST = 5.0, 20, 400  # rho is changed where residuals are further apart, at times, not for ever
_LOWER = 0.3  # of the residual to stop at, where that of the image of y was above the tolerance

Minimize = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (y, c, rho, size) -> argmin g + rho / 2 |A y - c|^2


def split_admm(
    objective: Objective,
    image: FlatImage,
    y0: Tensor,
    *,
    rho: float | None,
    curvatures: tuple[Tensor, Tensor],
    max_steps: int,
    tol: float,
    settled: int,
    minimize: Minimize,
    changed: Callable[[], None],
) -> Solved:
    """y <- argmin g + rho / 2 |A y + b - z + u|^2, z <- prox_{k / rho}(A y + b + u), u <- u + A y + b - z.

    On the way it goes by grad_y g + rho A'u, and by |A y + b - z| in units of L y. What is returned is the proximal
    gradient step from y, whose residual is the true one.

    Args:
        objective: g and the term.
        image: the term taken apart.
        y0: where it starts.
        rho: the weight, or None: derived, and changed on the way.
        curvatures: the largest and the least of g, `(*batch, 1)`.
        max_steps: at most so many.
        tol: of the residual.
        settled: how long the manifold of z has to stay.
        minimize: the step for y.
        changed: what is told that rho is another.
    """
    top, low = curvatures
    t, scale = 1 / top, image.squared_norm.sqrt()
    weight = (top * low).sqrt() / scale.square() if rho is None else torch.full_like(top, rho)
    settling = Settling(objective, t, settled if tol else 0)
    y = y0.detach().clone()
    z = seen = image.image(y)
    u, steps, aim = torch.zeros_like(z), 0, tol
    size = safe_row_norms(seen).unsqueeze(-1) + 1
    residual = torch.full_like(top.squeeze(-1), math.inf)
    moving = convex = ~image.margin(z, 1 / weight).isnan()  # where k is not convex nothing is to be found
    while True:
        if steps == max_steps or not moving.any():
            found, residual = image_of_steps(objective, y, t)
            if steps == max_steps or not tol or not bool((convex & (residual > tol)).any()):
                return Solved(found, judged_rows(residual, tol or math.inf), residual, steps)
            aim, moving = _LOWER * aim, convex & (residual > tol)
        held = moving.unsqueeze(-1)
        y = torch.where(held, minimize(y, z - u - image.b, weight, size), y)
        seen = image.image(y)
        p = torch.lerp(z, seen, _RELAXED) + u
        before, z = z, torch.where(held, image.prox(p, 1 / weight), z)
        u = torch.where(held, p - z, u)
        steps += 1
        objective.tally.inner_steps += int(moving.sum())
        gradient, force = objective.gradient(y), weight * image.back(u)
        primal = safe_row_norms(seen - z).unsqueeze(-1)
        dual = safe_row_norms(weight * image.back(z - before)).unsqueeze(-1)
        size = torch.maximum(primal, safe_row_norms(z - before).unsqueeze(-1))
        residual = torch.maximum(safe_row_norms(gradient + force), (top * primal / scale).squeeze(-1))
        low = residual <= aim
        still = settling.at(partial(image.active, p, 1 / weight), low, residual)
        moving = moving & (~low & residual.isfinite() | still)
        if rho is None and steps % _EVERY == 0 and steps <= _LATEST:
            one = torch.ones_like(weight)
            of_primal = primal / positive_or_one(torch.maximum(safe_row_norms(seen), safe_row_norms(z))).unsqueeze(-1)
            of_dual = dual / positive_or_one(safe_row_norms(force)).unsqueeze(-1)
            less = torch.where(of_dual > _BALANCE * of_primal, one / 2, one)
            factor = torch.where(of_primal > _BALANCE * of_dual, 2 * one, less)
            if bool((factor != 1).any()):
                weight, u = weight * factor, u / factor
                changed()
