"""Constants estimated from products, each labelled with what it is worth."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel._calculus import Exact, cross_operator, grad
from bilevel._flat import FlatProblem, ravel_rows, row_structure
from bilevel._linear import LinearOperator
from bilevel._numerics.rows import safe_row_norms
from bilevel._numerics.spectrum import largest_eigenvalue, least_eigenvalue
from bilevel._numerics.transforms import demand_autograd
from bilevel._problem import BilevelProblem, check_signature
from bilevel._tree import Tree, demand_alike, ravel
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import BETWEEN_0_AND_1, COUNT, POSITIVE, SEED
from bilevel.certificates.certificate import Constants, NonfiniteError

_DENSE = 200  # up to so many inner variables the least eigenvalue is computed, not estimated
_SAFETY = 2.0  # what sampled Lipschitz constants are multiplied by


@checked(
    mu=POSITIVE,
    radius=POSITIVE,
    samples=COUNT,
    seed=SEED,
    failure=BETWEEN_0_AND_1,
    shift_steps=COUNT,
)
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
    shift_steps: int = 100,
) -> Constants:
    """mu, L, L_fyy, L_fxy, M_yy, M_xy and C_G of f and g near y, from products with their second derivatives.

    L and C_G are upper bounds at y that fail with probability `failure` each (Kuczynski, Wozniakowski), and are named
    in `Constants.local`. So is mu, where it is not given, the least eigenvalue of H at y: computed by q products for
    q <= 200; beyond, mu = s - lambda_max(s I - H) with s = L, whose bound by k = `shift_steps` steps of Lanczos'
    method fails with probability `failure` and lies at most e L below the least eigenvalue, e = (ln(1.648 sqrt(q) /
    failure) / (2k - 1))^2: it says something only for condition numbers below 1 / e, and is None where it does not.
    Certificates extend these along the segment from y to y*, by M_yy and M_xy, with the theorem for local constants.

    The others are heuristics, and named in `Constants.heuristic`, which makes every certificate a heuristic: L_fyy and
    L_fxy are norms of f's second derivatives at y, exact where f is quadratic; M_yy and M_xy are twice the largest
    change of H and G over `samples` random displacements by `radius`. Replace those that you know by formula.

    Cost: some 15 products for each of L, C_G, L_fyy, L_fxy, and twice that for each sample of M_yy and M_xy; for mu q
    or `shift_steps` products. With tasks that is done for one after the other, and what is returned holds for each of
    them: the least mu, and of the others the largest.

    Source: Kuczynski, Wozniakowski, "Estimating the largest eigenvalue by the power and Lanczos algorithms with a
    random start", SIAM J. Matrix Anal. Appl. 13 (1992).

    Args:
        problem: f and g.
        x: the outer variable.
        y: the inner solution, or a point near it: the y of the estimate that is to be certified, with tasks stacked.
        data: the third argument of f and g, if they take one.
        mu: strong convexity where it is known from the formula of g (a ridge weight), which beats any estimate.
        radius: how far to displace y; None is a hundredth of 1 + |y|.
        samples: how many displacements.
        seed: of the random directions.
        failure: of each bound.
        shift_steps: products that are spent on mu for q > 200. Memory `shift_steps` q.

    Returns:
        The constants, with source "estimated", and their confidence.

    Raises:
        ValueError: if a number is out of range; if NaN or Inf is met.

    Example:
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2
        ... )
        >>> found = estimate_constants(problem, torch.ones(2), torch.ones(2))
        >>> round(found.mu, 3), round(found.L_fyy, 3), round(found.M_yy, 3)
        (1.0, 1.0, 0.0)
    """
    demand_autograd("estimate_constants")
    check_signature(problem, data)
    if not (0 < failure < 1 / 3 and shift_steps >= 1 and samples >= 1):
        raise ValueError(
            "`estimate_constants` needs 0 < failure < 1/3, shift_steps >= 1 and samples >= 1. Got"
            f" {failure}, {shift_steps} and {samples}."
        )
    for name, number in (("mu", mu), ("radius", radius)):
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"`estimate_constants({name}=...)` must be positive and finite, or None. Got {number}.")
    x_vector, x_structure = ravel(x, "x")
    y_structure = row_structure(y, "y", several=bool(problem.tasks))
    demand_alike("estimate_constants(x, y)", x_structure, y_structure)
    flat = FlatProblem(problem, x_structure, y_structure, data)
    y_vector = ravel_rows(flat, y, "`estimate_constants(y=...)`, the y of all tasks,") if problem.tasks else ravel(y)[0]
    try:
        return estimated(flat, x_vector.detach(), y_vector.detach(), mu, radius, samples, seed, failure, shift_steps)
    except NonfiniteError:
        raise ValueError(
            "`estimate_constants(problem, x, y)` needs a y at which f and g have finite second derivatives. Met NaN or"
            " Inf: look at x, y and the functions there."
        ) from None


def estimated(
    flat: FlatProblem,
    at_x: Tensor,
    at_y: Tensor,
    mu: float | None = None,
    radius: float | None = None,
    samples: int = 3,
    seed: int = 0,
    failure: float = 0.01,
    shift_steps: int = 100,
) -> Constants:
    """The constants in vectors; see :func:`estimate_constants`. With tasks `at_y` is `(tasks, q)`.

    Raises:
        NonfiniteError: if a product is not finite.
    """
    if flat.tasks is not None and flat.tasks > 1:
        each = (flat.part(slice(k, k + 1)) for k in range(flat.tasks))
        share = failure / flat.tasks  # no task may fail
        return _for_each(
            [
                estimated(one, at_x, at_y[k : k + 1], mu, radius, samples, seed, share, shift_steps)
                for k, one in enumerate(each)
            ]
        )
    hessian = Exact().linearize(flat, at_x, at_y).operator
    L = _finite(largest_eigenvalue(hessian, at_y, failure=failure, seed=seed))
    info = torch.finfo(at_y.dtype)
    if L != 0 and not info.tiny**0.5 / info.eps < abs(L) < info.max**0.5:
        raise ValueError(
            f"constants can be estimated where the squares of curvatures are numbers of {at_y.dtype}. Got a curvature"
            f" of g of {L:.1e}. Give the constants, or multiply f and g by a number that makes it about 1."
        )
    L = max(L, 0.0)
    cross, like, unit = cross_operator(flat, at_x, at_y)
    C_G = unit * _root(largest_eigenvalue(cross, like, failure=failure, seed=seed))
    local, bounds = {"L", "C_G"}, 2
    if mu is None:
        local.add("mu")
        if hessian.size <= _DENSE:
            mu = float(least_eigenvalue(hessian.dense(at_y)))
        else:
            mu, bounds = _shifted(hessian, at_y, L, failure, seed, shift_steps), 3
        mu = mu if mu > 0 else None
    fyy, fxy = _outer_operators(flat, at_x, at_y)
    distance = 0.01 * (1 + float(safe_row_norms(at_y))) if radius is None else radius
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
        heuristic=frozenset({"L_fyy", "L_fxy", "M_yy", "M_xy"}),
        confidence=1 - bounds * failure,
        local=frozenset(local),
    )


def _for_each(found: list[Constants]) -> Constants:
    """Those that hold for each of several inner problems."""

    def most(name: str) -> float | None:
        known = [getattr(one, name) for one in found]
        return None if None in known else float(max(known))

    mus = [one.mu for one in found if one.mu is not None]
    return replace(
        found[0],
        mu=min(mus) if len(mus) == len(found) else None,
        L=most("L"),
        L_fyy=most("L_fyy"),
        L_fxy=most("L_fxy"),
        M_yy=most("M_yy"),
        M_xy=most("M_xy"),
        C_G=most("C_G"),
        confidence=max(0.0, 1 - sum(1 - one.confidence for one in found)),
    )


def _finite(number: Tensor | float) -> float:
    if not math.isfinite(number):
        raise NonfiniteError
    return float(number)


def _root(square: Tensor) -> float:
    return math.sqrt(max(_finite(square), 0.0))


def overshoot(steps: int, size: int, failure: float) -> float:
    """The relative error e that so many steps of Lanczos' method leave; 1 and more says nothing.

    It solves steps = (1 + ln(1.648 sqrt n / failure) / sqrt e) / 2.
    """
    return (math.log(1.648 * math.sqrt(size) / failure) / max(2 * steps - 1, 1)) ** 2


def _shifted(hessian: LinearOperator, like: Tensor, L: float, failure: float, seed: int, steps: int) -> float:
    """L - lambda_max(L I - H), bounded from below; valid if L is above the spectrum."""
    e = overshoot(min(steps, hessian.size), hessian.size, failure)
    if e >= 1:
        return 0.0
    shifted = LinearOperator(lambda v: L * v - hessian.mv(v), hessian.size)
    # The products round, and the difference has lost what they rounded.
    rounding = 10 * torch.finfo(like.dtype).eps * L
    return L - float(largest_eigenvalue(shifted, like, overshoot=e, failure=failure, seed=seed + 1)) - rounding


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
        d = torch.randn(y.shape, generator=generator, dtype=torch.float64, device="cpu").to(y)
        d = distance * d / safe_row_norms(d)
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
            v = torch.randn(y.shape, generator=generator, dtype=torch.float64, device="cpu").to(y)
            for w in (v, d):
                moved = float(safe_row_norms(change(w)[1]) / safe_row_norms(w))
                most_g = max(most_g, _finite(moved))
    return _SAFETY * most_h / distance, _SAFETY * most_g / distance
