"""A linear model and a separable term at one x, in vectors: what coordinate descent reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import Linearization
from bilevel._linear import LinearOperator
from bilevel._result import Tally
from bilevel.inner_problems.linear_model import LinearModel


@final
@dataclass(frozen=True, eq=False)
class SeparableObjective:
    """sum_i w_i l(X_i y, b_i) + q'y + sum_j a_j |y_j| + c_j y_j^2 / 2 on l <= y <= u, for each problem of a batch.

    Attributes:
        model: X, l and q, which all problems share.
        targets: b `(*batch, n)`.
        weights: w `(*batch, n)`.
        pieces: a, c, l, u `(*batch, 4, d)`; see `AbstractProxTerm.pieces`.
        tally: where calls are counted.
    """

    model: LinearModel
    targets: Tensor
    weights: Tensor
    pieces: Tensor
    tally: Tally

    def predictions(self, y: Tensor) -> Tensor:
        """X y `(*batch, n)`, from the columns where y is not zero."""
        if y.dim() > 1:
            return torch.stack([self.predictions(row) for row in y.reshape(-1, y.shape[-1])]).reshape(*y.shape[:-1], -1)
        support = y.nonzero().squeeze(-1)
        if 2 * support.numel() > y.numel():
            return torch.mv(self.model.X, y)
        return torch.mv(self.columns(support), y[support])

    def columns(self, which: Tensor) -> Tensor:
        """X_W `(n, |W|)`."""
        return self.model.X.mT[which].mT

    def gradient(self, z: Tensor) -> Tensor:
        """X' (w l'(z)) + q `(*batch, d)`, where z = X y."""
        self.tally.gradients += z.shape[:-1].numel()
        slopes = self.weights * self.model.loss.slope(z, self.targets)
        found = slopes @ self.model.X
        return found if self.model.linear is None else found + self.model.linear

    def curvatures(self, z: Tensor) -> Tensor:
        """w l''(z) `(*batch, n)`."""
        return self.weights * self.model.loss.curvature(z, self.targets)

    def linearized(self, y: Tensor, z: Tensor, gradient: Tensor) -> Linearization:
        """grad_y g to first order at y; products on a set S cost n |S|."""
        D, X, rows = self.curvatures(z), self.model.X, y.shape[:-1].numel()

        def mv(v: Tensor) -> Tensor:
            self.tally.hvps += rows
            return (D * self.predictions(v)) @ X

        def on(S: Tensor) -> Callable[[Tensor], Tensor]:
            return self._product_on(S, D)

        operator = LinearOperator(mv, y.shape[-1], positive_definite=True)
        return Linearization(y, gradient, mv, lambda v: (mv(v), None), operator=operator, on=on)

    def _product_on(self, S: Tensor, D: Tensor) -> Callable[[Tensor], Tensor]:
        """v -> (H v)_S for v = 0 off S, zero off S."""
        if S.dim() > 1:
            each = [self._product_on(s, d) for s, d in zip(S, D, strict=True)]
            return lambda v: torch.stack([product(row) for product, row in zip(each, v, strict=True)])
        index = S.nonzero().squeeze(-1)
        rows = self.model.X.mT[index] * D.sqrt()  # as many products follow as there are directions
        H = rows @ rows.mT if index.numel() <= D.numel() else None

        def product(v: Tensor) -> Tensor:
            self.tally.hvps += 1
            inner = v[index]
            found = torch.mv(H, inner) if H is not None else torch.mv(rows, torch.mv(rows.mT, inner))
            return torch.zeros_like(v).index_copy(0, index, found)

        return product
