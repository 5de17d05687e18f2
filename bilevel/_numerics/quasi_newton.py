"""What a few Hessian products tell of the inverse Hessian: the BFGS matrix of their pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._linear import AbstractPreconditioner, LinearOperator
from bilevel._numerics.rows import chosen_rows, row_dots


@final
class Pairs:
    """The last steps s and changes of gradient w of each row, newest first; a row without some has rho = 0."""

    def __init__(self, size: int, like: Tensor) -> None:
        self.size, self.tiny = size, torch.finfo(like.dtype).tiny
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self.gamma = torch.ones_like(like[:, :1])

    def copy(self) -> Pairs:
        """The same pairs, whatever is pushed later."""
        other = Pairs(self.size, self.gamma)
        other.pairs, other.gamma = list(self.pairs), self.gamma
        return other

    def push(self, s: Tensor, w: Tensor, curvatures: list[float]) -> None:
        """Remember s and w = H s in the rows where s'w is positive."""
        good = [c > self.tiny for c in curvatures]
        if not any(good):
            return
        sw = self.gamma.new_tensor([[c if ok else 1.0] for c, ok in zip(curvatures, good, strict=True)])
        self.gamma = chosen_rows(good, sw / row_dots(w, w).unsqueeze(-1), self.gamma)
        new = (s, w, 1 / sw)
        if all(good):
            self.pairs = [new, *self.pairs][: self.size]
            return
        if len(self.pairs) < self.size:
            self.pairs.append((torch.zeros_like(s), torch.zeros_like(w), torch.zeros_like(sw)))
        shifted = [new, *self.pairs]
        self.pairs = [
            (chosen_rows(good, s, older_s), chosen_rows(good, w, older_w), chosen_rows(good, rho, older_rho))
            for (s, w, rho), (older_s, older_w, older_rho) in zip(shifted, self.pairs, strict=False)
        ]

    def forget(self, which: list[bool]) -> None:
        """Empty the memory of some rows."""
        if all(which):
            self.pairs.clear()
        self.pairs = [(s, w, chosen_rows(which, torch.zeros_like(rho), rho)) for s, w, rho in self.pairs]
        self.gamma = chosen_rows(which, torch.ones_like(self.gamma), self.gamma)

    def product(self, g: Tensor) -> Tensor:
        """B g by two loops over the pairs."""
        q, alphas = g.clone(), []
        for s, w, rho in self.pairs:
            alphas.append(rho * row_dots(s, q).unsqueeze(-1))
            q.addcmul_(alphas[-1], w, value=-1)
        q.mul_(self.gamma)
        for (s, w, rho), alpha in zip(reversed(self.pairs), reversed(alphas), strict=True):
            q.addcmul_(alpha - rho * row_dots(w, q).unsqueeze(-1), s)
        return q


@final
@dataclass(frozen=True, eq=False)
class Recycled(AbstractPreconditioner):
    """The BFGS inverse of the products that were taken in solves before, of the same matrix or of one nearby.

    Directions of conjugate gradients are conjugate: on their span this is the inverse itself, so that another
    right-hand side takes as many steps less as it has a part in it.

    Cost: no product; 4 n flops a pair each time. Memory 2 n a pair.

    Source: Morales, Nocedal, "Automatic preconditioning by limited memory quasi-Newton updating", SIAM J. Optim. 10
    (2000).

    Args:
        pairs: what the products left.
    """

    pairs: Pairs

    def build(self, operator: LinearOperator, like: Tensor) -> Callable[[Tensor], Tensor]:
        pairs = self.pairs.copy()  # what the solve itself adds must not change it on the way
        return lambda r: pairs.product(r.reshape(-1, r.shape[-1])).reshape(r.shape)

    def watched(self, operator: LinearOperator) -> LinearOperator:
        """The operator, whose products are remembered."""

        def mv(v: Tensor) -> Tensor:
            w = operator.mv(v)
            s = v.reshape(-1, v.shape[-1]).clone()  # solvers write over their directions
            s, image = self._of_order_one(s, w.reshape(s.shape))
            self.pairs.push(s, image, row_dots(s, image).tolist())
            return w

        return LinearOperator(mv, operator.size, operator.positive_definite, operator.symmetric, operator.last_mv)

    @staticmethod
    def _of_order_one(s: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """A multiple of the pair, which says the same, whose squares are not lost."""
        sizes = float(s.abs().amax()), float(w.abs().amax())
        low, high = torch.finfo(s.dtype).tiny ** 0.25, torch.finfo(s.dtype).max ** 0.25
        if all(low < size < high for size in sizes) or not all(0 < size < math.inf for size in sizes):
            return s, w
        exponent = -(math.frexp(sizes[0])[1] + math.frexp(sizes[1])[1]) // 2
        factor = math.ldexp(1.0, exponent)
        return factor * s, factor * w
