"""Anderson's mixing: the next iterate of a fixed point from the images of the last ones, row by row."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from bilevel._numerics.half import widened
from bilevel._numerics.rows import safe_row_norms


@final
class Mixing:
    """y + s r - sum_i c_i (dy_i + s dr_i) with the c of least |r - sum_i c_i dr_i|^2 + lambda sum_i c_i^2 |dr_i|^2.

    dy_i and dr_i are differences of the last iterates and of their residuals r = T(y) - y. One for each solve; each row
    of a batch has its own differences, and forgets them on its own.

    Args:
        like: y `(*batch, q)`.
        memory: at most so many differences.
        regularization: lambda.
    """

    def __init__(self, like: Tensor, memory: int, regularization: float) -> None:
        self.memory, self.root = memory, regularization**0.5
        self.moves = like.new_zeros(*like.shape[:-1], 0, like.shape[-1])
        self.changes = self.moves.clone()
        self.last: tuple[Tensor, Tensor] | None = None

    def told(self, y: Tensor, r: Tensor) -> None:
        """Take an iterate and its residual."""
        if self.last is not None and self.memory:
            before, old = self.last
            self.moves = torch.cat([self.moves, (y - before).unsqueeze(-2)], dim=-2)[..., -self.memory :, :]
            self.changes = torch.cat([self.changes, (r - old).unsqueeze(-2)], dim=-2)[..., -self.memory :, :]
        self.last = y, r

    def forgotten(self, rows: Tensor, y: Tensor, r: Tensor) -> None:
        """Begin anew in some rows, from y and its residual there."""
        keep = ~rows[..., None, None]
        self.moves = torch.where(keep, self.moves, 0.0)
        self.changes = torch.where(keep, self.changes, 0.0)
        assert self.last is not None
        self.last = (
            torch.where(rows.unsqueeze(-1), y, self.last[0]),
            torch.where(rows.unsqueeze(-1), r, self.last[1]),
        )

    def next(self, y: Tensor, r: Tensor, damping: Tensor | float) -> Tensor:
        """The next iterate, after `told` of this one."""
        sizes = safe_row_norms(self.changes)
        used = (sizes > 0) & sizes.isfinite()
        if not bool(used.any()):
            return y + damping * r
        unit = torch.where(used, sizes, 1.0).unsqueeze(-1)
        D = torch.where(used.unsqueeze(-1), self.changes / unit, 0.0).mT  # (*batch, q, k), columns of length 1 or 0
        k, scale = D.shape[-1], safe_row_norms(r).unsqueeze(-1)
        scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
        below = self.root * torch.eye(k, dtype=D.dtype, device=D.device).expand(*D.shape[:-2], k, k)
        tall = widened(torch.cat([D, below], dim=-2))
        right = widened(torch.cat([r / scale, r.new_zeros(*r.shape[:-1], k)], dim=-1).unsqueeze(-1))
        Q, R = torch.linalg.qr(tall)
        c = torch.linalg.solve_triangular(R, Q.mT @ right, upper=True).to(r.dtype) * scale.unsqueeze(-1) / unit
        c = torch.where(used.unsqueeze(-1) & c.isfinite(), c, 0.0)
        mixed: Tensor = y + damping * r - (c * self.moves).sum(-2) - damping * (c * self.changes).sum(-2)
        return mixed
