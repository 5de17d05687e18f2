"""The alternating direction method of multipliers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._linear import AbstractLinearSolver, LinearOperator
from bilevel._numerics.rows import positive_or_one, safe_row_norms
from bilevel._result import Solved, judged_rows
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, POSITIVE, demand_ranges
from bilevel.inner_problems.flat_image import FlatImage
from bilevel.requirements.properties import Feature
from bilevel.solvers._proximal_steps import Settling
from bilevel.solvers._split_admm import split_admm
from bilevel.solvers.cg import CG

_DENSE = 512  # up to so many entries of y, H + rho I is factorized, once where g is quadratic
_PART = 0.1  # of the residuals before, which Newton's steps for y leave
_DAMPED = 1e-12  # of |A|^2, that is added to A'A
_NEWTON = 10  # at most so many of them an iteration
_BALANCE, _EVERY, _LATEST = (
    10.0,
    10,
    200,
)  # rho is changed where residuals are further apart, at times, and not for ever


@final
@dataclass(frozen=True)
class ADMM(AbstractInnerSolver):
    """y <- argmin g(x, y) + rho / 2 |y - z + u|^2, z <- prox_{h / rho}(y + u), u <- u + y - z.

    Converges for convex g and any rho > 0; for strongly convex g with curvatures in [mu, L] linearly, at
    rho = sqrt(mu L) about like (1 - sqrt(mu / L))^k, as `FISTA` does, but by steps that solve a system in H + rho I. It
    is for g whose curvatures are far apart, or few y, where a factorization is cheap. z is returned, so that what the
    map sets to zero is zero; the residual |z - prox_{t h}(z - t grad_y g)| / t, t = 1 / L, is taken there.

    Of a term k(A y + b) (`Affine` with a matrix) it takes k and A apart, A y + b - z in the place of y - z, and H +
    rho A'A in that of H + rho I: with maps of k alone, over-relaxed by 1.6, up to the end, where the image of y under
    the map of the whole term is returned. That is what it is best for.

    The minimization over y is by Newton's steps: one where g is quadratic. Up to 512 entries of y their matrix is
    factorized, and used as long as it serves; above that it is solved with `linear`.

    Cost: one or two gradients and one proximal map a step; q Hessian products for each factorization, or those that
    `linear` takes; some 14 for rho. Memory O(q), or O(q^2) with a factorization. Its steps cannot be unrolled.

    Source: Boyd, Parikh, Chu, Peleato, Eckstein, "Distributed optimization and statistical learning via the alternating
    direction method of multipliers", Found. Trends Mach. Learn. 3 (2011), sections 3.1 and 3.4.1.

    Args:
        rho: the weight of the penalty; None: sqrt(mu L) as some 14 products see the curvatures at y0, doubled or halved
            on the way where the residuals of both conditions are a factor of 10 apart.
        max_steps: at most so many steps.
        tol: stop when the residual is at most this.
        settled: go on until the manifold of z has been the same for so many steps; see `ProximalGradient`.
        linear: solves the systems in H + rho I of many y.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> objective = Objective(
        ...     lambda y: (y - 3).square().sum() / 2, prox=lambda v, t: (v - t).relu()
        ... )
        >>> ADMM(tol=1e-6).solve(objective, torch.zeros(2)).value.round(decimals=4)
        tensor([2., 2.])
    """

    rho: float | None = None
    max_steps: int = 1000
    tol: float = 1e-8
    settled: int = 3
    linear: AbstractLinearSolver = field(default_factory=lambda: CG(rtol=1e-2))

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, rho=POSITIVE, max_steps=AT_LEAST_0, tol=AT_LEAST_0, settled=AT_LEAST_0)

    @property
    def heeds(self) -> frozenset[Feature]:
        return frozenset({Feature.prox})

    @property
    def forgets_start(self) -> bool:
        return self.tol > 0

    @property
    def tolerance(self) -> float | None:
        return self.tol or None

    def with_tolerance(self, tol: float) -> ADMM:
        return replace(self, tol=tol)

    def with_steps(self, steps: int) -> ADMM:
        return replace(self, max_steps=steps)

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        top, low = objective.curvature_ends(y0)
        L = positive_or_one(torch.where(top.isfinite(), top, 1.0)).unsqueeze(-1)
        low = torch.where(low.isfinite(), low, 0.0).unsqueeze(-1).clamp_min(1e-6 * L)
        rho = (L * low).sqrt() if self.rho is None else torch.full_like(L, self.rho)
        t = 1 / L
        settling = Settling(objective, t, self.settled)
        if objective.image is not None:
            image, system = objective.image, _System(self.linear, objective.image)
            return split_admm(
                objective,
                image,
                y0,
                rho=self.rho,
                curvatures=(L, low),
                max_steps=self.max_steps,
                tol=self.tol,
                settled=self.settled,
                minimize=lambda y, c, rho, size: system.minimize(objective, y, c, rho, size),
                changed=system.forget,
            )
        system = _System(self.linear)
        y = z = y0.detach().clone()
        u, steps, size = torch.zeros_like(y), 0, safe_row_norms(y).unsqueeze(-1) + 1
        gradient = objective.gradient(z)
        while True:
            residual = _generalized(objective, z, gradient, t)
            moving = (residual > self.tol) & residual.isfinite() | settling.still(
                z, gradient, residual <= self.tol, residual
            )
            if steps == self.max_steps or not moving.any():
                break
            held = moving.unsqueeze(-1)
            y = torch.where(held, system.minimize(objective, y, z - u, rho, size), y)
            v = y + u
            before, z = z, torch.where(held, v if objective.prox is None else objective.prox(v, 1 / rho), z)
            u = torch.where(held, v - z, u)
            primal = safe_row_norms(y - z).unsqueeze(-1)
            dual = safe_row_norms(z - before).unsqueeze(-1)
            size = torch.maximum(primal, dual)
            steps += 1
            objective.tally.inner_steps += int(moving.sum())
            if self.rho is None and steps % _EVERY == 0 and steps <= _LATEST:
                one = torch.ones_like(rho)
                less = torch.where(dual > _BALANCE * primal, one / 2, one)
                factor = torch.where(primal > _BALANCE * dual, 2 * one, less)
                rho, u = rho * factor, u / factor
                if not bool((factor == 1).all()):
                    system.forget()
            gradient = objective.gradient(z)
        objective.last_gradient(z)
        return Solved(z, judged_rows(residual, self.tol or math.inf), residual, steps)


@final
class _System:
    """Newton's steps for argmin_y g(y) + rho / 2 |A y - c|^2, and what is kept of one minimization for the next."""

    def __init__(self, linear: AbstractLinearSolver, image: FlatImage | None = None) -> None:
        self.linear, self.image = linear, image
        self.matrix: Tensor | None = None  # the Cholesky factor of H + rho A'A

    def forget(self) -> None:
        """Rho is another."""
        self.matrix = None

    def _off(self, y: Tensor, c: Tensor) -> Tensor:
        """A' (A y - c)."""
        if self.image is None:
            return y - c
        return self.image.back((self.image.A @ y.unsqueeze(-1)).squeeze(-1) - c)

    def _gram(self, y: Tensor) -> Tensor:
        """A'A, as a matrix; by so little more than it that the sum with H is definite where neither is."""
        unit = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
        if self.image is None:
            return unit
        gram = self.image.A.detach().mT @ self.image.A.detach()
        return gram + _DAMPED * self.image.squared_norm.unsqueeze(-1) * unit

    def minimize(self, objective: Objective, y: Tensor, c: Tensor, rho: Tensor, size: Tensor) -> Tensor:
        """From y, until the gradient is a part of rho times the size of the latest move."""
        dense = y.shape[-1] <= _DENSE
        before = torch.full_like(size, math.inf)
        for k in range(_NEWTON):
            if dense and self.matrix is not None:
                gradient, hessian = objective.gradient(y), None
            else:
                _, gradient, hessian = objective.hessian(y)
            r = gradient + rho * self._off(y, c)
            norm = safe_row_norms(r).unsqueeze(-1)
            if k and bool((norm <= _PART * rho * size).all() | ~norm.isfinite().all()):
                break
            if dense and (self.matrix is None or bool((norm > 0.5 * before).any())):
                hessian = objective.hessian(y)[2] if hessian is None else hessian
                matrix = hessian.dense(y) + rho.unsqueeze(-1) * self._gram(y)
                self.matrix = torch.linalg.cholesky_ex(matrix).L
            before = norm
            if dense and self.matrix is not None:
                y = y - torch.cholesky_solve(r.unsqueeze(-1), self.matrix).squeeze(-1)
            elif hessian is not None:
                y = y - self.linear.solve(self._shifted(hessian, rho), r).value
        return y

    def _shifted(self, hessian: LinearOperator, rho: Tensor) -> LinearOperator:
        def mv(v: Tensor) -> Tensor:
            return hessian.mv(v) + rho * self._off(v, v.new_zeros(()))

        return LinearOperator(mv, hessian.size, positive_definite=True)


def _generalized(objective: Objective, z: Tensor, gradient: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        v = z - t * gradient
        moved = (v if objective.prox is None else objective.prox(v, t)) - z
        return safe_row_norms(moved) / t.squeeze(-1)
