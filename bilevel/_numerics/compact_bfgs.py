"""The BFGS matrix of a few pairs, in compact form: its products, its inverse, and its inverse on a face."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor


@final
class CompactBFGS:
    """B = sigma I - W M W' with s'(B s) = s'w for the newest pair: the BFGS matrix of k pairs (s, w), oldest first.

        W = [sigma S', Y'],   M^-1 = [[sigma S S', L], [L', -D]],   sigma = w'w / s'w of the newest pair

    with S, Y `(k, p)`, L the part of S Y' below its diagonal D. B is positive definite where every s'w is positive.

    Cost: a product 4 k p flops and a system of 2 k; without pairs B = sigma I.

    Source: Byrd, Nocedal, Schnabel, "Representations of quasi-Newton matrices and their use in limited memory methods",
    Math. Program. 63 (1994), theorem 2.3.

    Args:
        steps: S `(k, p)`.
        changes: Y `(k, p)`.
        sigma: of the matrix without pairs.

    Example:
        >>> B = CompactBFGS(torch.tensor([[1.0, 0.0]]), torch.tensor([[4.0, 0.0]]), sigma=1.0)
        >>> B.product(torch.tensor([1.0, 0.0]))
        tensor([4., 0.])
    """

    def __init__(self, steps: Tensor, changes: Tensor, sigma: float) -> None:
        self.sigma, self.wide = sigma, steps.new_zeros(0, steps.shape[-1])
        if not steps.shape[0]:
            return
        roots = (steps * changes).sum(-1, keepdim=True).sqrt()  # pairs of any length are the same pair: here s'w = 1
        S, Y = steps / roots, changes / roots
        self.sigma = float(Y[-1] @ Y[-1])
        dots = S @ Y.mT
        lower = dots.tril(-1)
        top = torch.cat([self.sigma * (S @ S.mT), lower], dim=1)
        below = torch.cat([lower.mT, -torch.diag(dots.diagonal())], dim=1)
        self.middle = torch.cat([top, below])  # M^-1
        self.wide = torch.cat([self.sigma * S, Y])  # W'

    def product(self, v: Tensor) -> Tensor:
        """B v `(p,)`."""
        if not self.wide.shape[0]:
            return self.sigma * v
        found: Tensor = self.sigma * v - self.wide.mT @ torch.linalg.solve_ex(self.middle, self.wide @ v)[0]
        return found

    def solve(self, r: Tensor, along: Callable[[Tensor], Tensor]) -> Tensor:
        """The d with T B T d = r in the range of an orthogonal projection T, which r is in: `(p,)`.

        Not finite where the system of the pairs is singular.
        """
        if not self.wide.shape[0]:
            return r / self.sigma
        narrow = along(self.wide)
        small = self.middle - narrow @ narrow.mT / self.sigma
        found: Tensor = (r + narrow.mT @ torch.linalg.solve_ex(small, narrow @ r)[0] / self.sigma) / self.sigma
        return found


def inverse_product(steps: Tensor, changes: Tensor, r: Tensor) -> Tensor:
    """B^-1 r of the same matrix by two loops over its pairs: positive definite to the last bit, without a system.

    Args:
        steps: S `(k, p)`, k at least 1.
        changes: Y `(k, p)`.
        r: `(p,)`.
    """
    q, alphas, pairs = r.clone(), [], list(zip(steps, changes, (steps * changes).sum(-1).tolist(), strict=True))
    for s, w, curvature in reversed(pairs):
        alphas.append(float(s @ q) / curvature)
        q.add_(w, alpha=-alphas[-1])
    _, newest, curvature = pairs[-1]
    q.mul_(curvature / float(newest @ newest))
    for (s, w, curvature), alpha in zip(pairs, reversed(alphas), strict=True):
        q.add_(s, alpha=alpha - float(w @ q) / curvature)
    return q
