"""f and g as means over samples that the ranks share: the one seam, below every derivative.

With w_r the share of rank r of the samples, g(x, y) = sum_r w_r g_r(x, y). Two maps that are each other's transpose,

    S : z -> z on every rank,  S' : (a_r) -> sum_r a_r on every rank,

make it g = S' (w_r g_r (S x, S y)): what reaches x or y in a backward pass is summed over the ranks on the way, at
every order, so that whoever differentiates g has the derivatives of the whole sum, the same bits on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel.ranks.ranks import Ranks


@final
class _Spread(torch.autograd.Function):
    """S: what all ranks have alike goes into what each does by itself."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, z: Tensor) -> Tensor:
        ctx.ranks = ranks
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return None, _applied(_Summed, ctx.ranks, grad_outputs[0])


@final
class _Summed(torch.autograd.Function):
    """S': what each rank has found by itself, in sum."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, a: Tensor) -> Tensor:
        ctx.ranks = ranks
        return ranks.total(a.detach())[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return None, _applied(_Spread, ctx.ranks, grad_outputs[0])


def _applied(function: type[torch.autograd.Function], ranks: Ranks, z: Tensor) -> Tensor:
    apply: Callable[[Ranks, Tensor], Tensor] = function.apply
    return apply(ranks, z)


@final
@dataclass(frozen=True, eq=False)
class Across:
    """How a problem's f and g are put together from those of the ranks.

    Attributes:
        ranks: the processes.
        f: w_r of the samples of f.
        g: that of those of g.
        alone: whether nothing is summed: values and derivatives are this rank's parts.
        sharded: whether y is this rank's part of one that is shared out: its derivatives are whole as they come, and
            values and those of x alone are summed.
    """

    ranks: Ranks
    f: float = 1.0
    g: float = 1.0
    alone: bool = False
    sharded: bool = False

    def by_itself(self) -> Across:
        """The same without sums."""
        return replace(self, alone=True)

    def on(self, f: float, g: float) -> Across:
        """The same for other batches."""
        return replace(self, f=f, g=g)

    def share(self, level: str) -> float:
        """w_r."""
        return self.f if level == "f" else self.g

    def spread(self, z: Tensor) -> Tensor:
        """S z."""
        return _applied(_Spread, self.ranks, z) if z.requires_grad else z

    def summed(self, a: Tensor) -> Tensor:
        """S' a."""
        return _applied(_Summed, self.ranks, a)

    def part(self, level: str, function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """w_r g_r(S x, S y): derivatives are of the whole, the value is this rank's part of it."""
        if self.alone:
            return self.share(level) * function(x, y)
        return self.share(level) * function(self.spread(x), y if self.sharded else self.spread(y))

    def whole(self, level: str, function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """g(x, y), with its derivatives."""
        part = self.part(level, function, x, y)
        return part if self.alone else self.summed(part)
