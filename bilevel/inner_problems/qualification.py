"""What makes the derivative of a constrained minimizer valid, measured: independent constraints, and curvature."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel._linear import SaddleBlocks
from bilevel._numerics.rows import matrix_times, positive_or_one
from bilevel._numerics.saddle_point import SaddlePoint
from bilevel._result import Report, Status

SEEN = 1e-6  # of a motion of all constraints: less is none
_REGULAR = 1e-6  # squares of singular values above which these are exact to ten digits by their squares


def independence(A: Tensor, free: Tensor, moved: Callable[[Tensor], Tensor] | None, least: float) -> Report:
    """Whether gradients of the constraints that hold are linearly independent (LICQ), or dependent without harm.

    The residual is the least singular value of the rows on the free entries, each over its whole length. Where it is
    zero, a combination w of the constraints does not depend on y. If it depends on x, the constraints that hold at y*
    do not meet any more at other x: y* has a kink or ceases to exist. If it does not, as where one constraint repeats
    another, y* is differentiable all the same, and only multipliers are not unique.

    Args:
        A: rows of constraints `(*batch, m, n)`.
        free: entries that no bound holds `(*batch, n)`.
        moved: w `(*batch, m)` -> the derivative of w'E in x, with held entries on their bounds; None: E stays.
        least: singular values up to this are zero.
    """
    part = "independence of active constraints"
    m = A.shape[-2]
    if not m:
        return Report(part, Status.successful, 1.0, 0)
    rows = A * free.unsqueeze(-2) / positive_or_one(torch.linalg.vector_norm(A, dim=-1)).unsqueeze(-1)
    lost = ~rows.isfinite().all(-1).all(-1)
    rows = torch.where(lost[..., None, None], 0.0, rows)
    sizes = _singular_values(rows)
    dependent = sizes.amin(-1) <= least
    if bool(dependent.any()) and moved is not None:
        U = torch.linalg.svd(rows, full_matrices=True)[0]
        generator = torch.Generator(device="cpu").manual_seed(0)
        noise = torch.randn(sizes.shape, generator=generator, dtype=torch.float64, device="cpu").to(A)
        weights = matrix_times(U, torch.where(sizes <= least, matrix_times(U.mT, noise), 0.0))
        length = torch.linalg.vector_norm(A, dim=-1)
        weights, noise = weights / positive_or_one(length), noise / positive_or_one(length)
        apart = moved(weights).abs().amax() > SEEN * moved(noise).abs().amax()
    else:
        apart = torch.zeros((), dtype=torch.bool, device=A.device)
    statuses = tuple(
        Status.nonfinite if a else Status.dependent_constraints if b and bool(apart) else Status.successful
        for a, b in zip(lost.reshape(-1).tolist(), dependent.reshape(-1).tolist(), strict=True)
    )
    return Report(part, Status.worst(statuses), float(sizes.amin()), 0, statuses if A.dim() > 2 else ())


def widths(lower: Tensor, upper: Tensor, in_x: Callable[[Tensor], Tensor]) -> tuple[Report, ...]:
    """Whether bounds that meet keep meeting as x moves, or do so at this x only; nothing where none meet.

    In the latter case y* has a kink there, or there is no y at other x. The residual is the derivative in x of their
    distance, over that of the bounds themselves.

    Args:
        lower: bounds, with a graph from x where they move.
        upper: the same.
        in_x: a number -> its derivative in x.
    """
    fixed = lower >= upper
    if not (lower.requires_grad or upper.requires_grad) or not bool(fixed.any()):
        return ()
    lower, upper = (bound.expand(fixed.shape)[fixed] for bound in (lower, upper))
    generator = torch.Generator(device="cpu").manual_seed(0)
    w = torch.randn(lower.shape, generator=generator, dtype=torch.float64, device="cpu").to(lower)
    moves = [float(torch.linalg.vector_norm(in_x((w * part).sum()))) for part in (upper - lower, upper, lower)]
    apart = moves[0] / max(*moves, torch.finfo(lower.dtype).tiny)
    status = Status.dependent_constraints if apart > SEEN else Status.successful
    return (Report("bounds that meet", status, apart, 0),)


def _singular_values(rows: Tensor) -> Tensor:
    """Those of rows of at most length one `(*batch, m, n)`, with zeros for what has none: `(*batch, m)`."""
    m, n = rows.shape[-2:]
    if m <= n and rows.dtype == torch.float64:  # of a batch in half the time, where no root of rounding is taken
        squares = torch.linalg.eigvalsh(rows @ rows.mT)
        if bool(squares.amin() > _REGULAR):
            found: Tensor = squares.sqrt()
            return found
    sizes = torch.linalg.svdvals(rows)
    return torch.nn.functional.pad(sizes, (0, m - sizes.shape[-1]))


def second_order(blocks: SaddleBlocks, like: Tensor) -> Report:
    """Whether the Hessian of the Lagrangian is positive definite on the null space of the constraints that hold.

    Cost: q products, q^3 / 3 + q^2 m flops. The residual is 0 where it is and 1 where it is not.

    Args:
        blocks: the saddle-point matrix.
        like: a vector of the shape of its first unknowns.
    """
    M = blocks.M.dense(like).double() if like.device.type != "mps" else blocks.M.dense(like)
    A = blocks.A.to(M)
    scale = positive_or_one((torch.diagonal(M, dim1=-2, dim2=-1).abs() * blocks.free).amax(-1))
    found = SaddlePoint.factor((M + M.mT) / 2, A, scale, torch.finfo(like.dtype).eps).definite
    statuses = tuple(Status.successful if good else Status.not_positive_definite for good in found.reshape(-1).tolist())
    worst = Status.worst(statuses)
    return Report(
        "second-order sufficiency", worst, float(not worst.ok), like.shape[-1], statuses if like.dim() > 1 else ()
    )
