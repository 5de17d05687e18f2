"""Constants estimated from products, each labelled with what it is worth."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bilevel._calculus import Exact, cross_operator, grad
from bilevel._certificate import Constants
from bilevel._flat import FlatProblem
from bilevel._linear import LinearOperator
from bilevel._problem import BilevelProblem, check_signature
from bilevel._spectrum import largest_eigenvalue
from bilevel._tree import Tree, ravel

_DENSE = 200  # up to so many inner variables the least eigenvalue is computed, not estimated
_SAFETY = 2.0  # what sampled Lipschitz constants are multiplied by


def estimate_constants(
    problem: BilevelProblem,
    x: Tree,
    y: Tree,
    *,
    data: Any = None,
    mu: float | None = None,
    radius: float | None = None,
    samples: int = 3,
    seed: int = 0,
    failure: float = 0.01,
) -> Constants:
    """mu, L, L_fyy, L_fxy, M_yy, M_xy and C_G of f and g near y, from products with their second derivatives.

    L and C_G are upper bounds at y that fail with probability `failure` each (Kuczynski-Wozniakowski). The others are
    heuristics, and named so in `Constants.heuristic`: mu, where it is not given, is the least eigenvalue of H at y
    (by q products for q <= 200, else by the spectral shift L - lambda_max(L - H), which is only as sharp as 10 % of L
    and may leave None); L_fyy and L_fxy are norms of f's second derivatives at y, exact where f is quadratic; M_yy and
    M_xy are twice the largest change of H and G over `samples` random displacements by `radius`.

    Cost: some 15 products for each of L, C_G, L_fyy, L_fxy, and twice that for each sample of M_yy and M_xy.

    Args:
        problem: f and g.
        x: the outer variable.
        y: the inner solution, or a point near it.
        data: the third argument of f and g, if they take one.
        mu: strong convexity where it is known from the formula of g (a ridge weight), which beats any estimate.
        radius: how far to displace y; None is a hundredth of 1 + |y|.
        samples: how many displacements.
        seed: of the random directions.
        failure: of each bound.

    Returns:
        The constants, with source "estimated".

    Raises:
        ValueError: in task mode: give the constants, which hold for every task.

    Example:
        >>> problem = BilevelProblem(lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2)
        >>> found = estimate_constants(problem, torch.ones(2), torch.ones(2))
        >>> round(found.mu, 3), round(found.L_fyy, 3), round(found.M_yy, 3)
        (1.0, 1.0, 0.0)
    """
    check_signature(problem, data)
    if problem.tasks:
        raise ValueError("`estimate_constants` needs one inner problem. Got tasks=True: give constants valid for each.")
    x_vector, x_structure = ravel(x, "x")
    y_vector, y_structure = ravel(y, "y")
    flat = FlatProblem(problem, x_structure, y_structure, data)
    return estimated(flat, x_vector.detach(), y_vector.detach(), mu, radius, samples, seed, failure)


def estimated(
    flat: FlatProblem,
    at_x: Tensor,
    at_y: Tensor,
    mu: float | None = None,
    radius: float | None = None,
    samples: int = 3,
    seed: int = 0,
    failure: float = 0.01,
) -> Constants:
    """The constants in vectors; see :func:`estimate_constants`."""
    hessian = Exact().linearize(flat, at_x, at_y).operator
    L = float(largest_eigenvalue(hessian, at_y, failure=failure, seed=seed))
    cross, like = cross_operator(flat, at_x, at_y)
    C_G = _root(largest_eigenvalue(cross, like, failure=failure, seed=seed))
    heuristic = {"L_fyy", "L_fxy", "M_yy", "M_xy"}
    if mu is None:
        mu = _least(hessian, at_y, L, failure, seed)
        heuristic.add("mu")
    fyy, fxy = _outer_operators(flat, at_x, at_y)
    distance = 0.01 * (1 + float(torch.linalg.vector_norm(at_y))) if radius is None else radius
    M_yy, M_xy = _sampled(flat, at_x, at_y, distance, samples, seed)
    return Constants(
        mu=mu,
        L=L,
        L_fyy=_root(largest_eigenvalue(fyy[0], fyy[1], failure=failure, seed=seed)),
        L_fxy=_root(largest_eigenvalue(fxy[0], fxy[1], failure=failure, seed=seed)),
        M_yy=M_yy,
        M_xy=M_xy,
        C_G=C_G,
        source="estimated",
        heuristic=frozenset(heuristic),
        confidence=(1 - failure) ** 2,
    )


def _root(square: Tensor) -> float:
    return math.sqrt(max(float(square), 0.0))


def _least(hessian: LinearOperator, like: Tensor, L: float, failure: float, seed: int) -> float | None:
    if hessian.size <= _DENSE:
        matrix = hessian.dense(like)
        least = float(torch.linalg.eigvalsh((matrix + matrix.mT) / 2)[0])
    else:
        shifted = LinearOperator(lambda v: L * v - hessian.mv(v), hessian.size)
        least = L - float(largest_eigenvalue(shifted, like, failure=failure, seed=seed))
    return least if least > 0 else None


def _outer_operators(
    problem: FlatProblem, x: Tensor, y: Tensor
) -> tuple[tuple[LinearOperator, Tensor], tuple[LinearOperator, Tensor]]:
    """The squares of d2f/dy2 and of d2f/dxdy (on y), whose largest eigenvalues are squared norms."""
    problem.tally.outer_gradients += 1
    with torch.enable_grad():
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        value = problem.f(x, y)
        fx, fy = grad(value, x, create_graph=True), grad(value, y, create_graph=True)

    def pull(gradient: Tensor, leaf: Tensor, v: Tensor) -> Tensor:
        if not gradient.requires_grad:
            return torch.zeros_like(leaf)
        return torch.autograd.grad(gradient, leaf, v, retain_graph=True, allow_unused=True, materialize_grads=True)[0]

    q = y.numel()
    square = LinearOperator(lambda v: pull(fy, y, pull(fy, y, v)), q)
    cross = LinearOperator(lambda v: pull(fx, y, pull(fy, x, v)), q)
    return (square, y.detach()), (cross, y.detach())


def _sampled(
    problem: FlatProblem, x: Tensor, y: Tensor, distance: float, samples: int, seed: int
) -> tuple[float, float]:
    """Twice the largest |H(y + d) - H(y)| / |d| and |G(y + d) - G(y)| / |d| over random d."""
    generator = torch.Generator().manual_seed(seed)
    here = Exact().linearize(problem, x, y)
    most_h = most_g = 0.0
    for _ in range(samples):
        d = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
        d = distance * d / torch.linalg.vector_norm(d)
        there = Exact().linearize(problem, x, y + d)

        def change(v: Tensor, there: Any = there) -> tuple[Tensor, Tensor]:
            (h1, g1), (h0, g0) = there.products(v), here.products(v)
            zero = torch.zeros_like(x)
            return h1 - h0, (zero if g1 is None else g1) - (zero if g0 is None else g0)

        def squared(v: Tensor, change: Any = change) -> Tensor:
            first: Tensor = change(change(v)[0])[0]
            return first

        most_h = max(most_h, _root(largest_eigenvalue(LinearOperator(squared, y.numel()), y)))
        for _ in range(samples):  # |G(y + d) - G(y)| from below, by products with random vectors and with d
            v = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
            for w in (v, d):
                moved = float(torch.linalg.vector_norm(change(w)[1]) / torch.linalg.vector_norm(w))
                most_g = max(most_g, moved)
    return _SAFETY * most_h / distance, _SAFETY * most_g / distance
