"""The diagonal preconditioner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._linear import AbstractPreconditioner, LinearOperator
from bilevel._validate import demand_types


@final
@dataclass(frozen=True, eq=False)
class Jacobi(AbstractPreconditioner):
    """Jacobi: M = diag(A), given, known to the operator, or estimated as the mean of z * A z over random signs z.

    The estimate is unbiased; entry i has variance sum_{j != i} A_ij^2 / samples, and is exact for a diagonal A.
    Helps where the diagonal spreads over decades, as it does for features on different scales; may harm where A is
    far from diagonal, so that it is never a default.

    Entries must be positive: an estimate below its own standard error is replaced by that, and anything below the
    rounding error of the largest entry by the latter.

    Cost: none if given, what its formula takes where the operator knows it (a g of `bilevel.problems.glm`: less than a
    product), `samples` products once a solve otherwise; n flops a step. Memory 3n.

    Source: Bekas, Kokiopoulou, Saad, "An estimator for the diagonal of a matrix", Appl. Numer. Math. 57 (2007).

    Args:
        diagonal: diag(A), `(n,)` or of the shape of the right-hand side, or a callable without arguments that
            returns it and is called once a solve; None to take the operator's, or else have it estimated.
        samples: the number of random signs, at least 2.
        seed: of the signs.

    Raises:
        ValueError: if `samples` is less than 2; from `build`, if the diagonal given has another size.

    Example:
        >>> A = LinearOperator(
        ...     lambda v: torch.tensor([2.0, 4.0]) * v, size=2, positive_definite=True
        ... )
        >>> Jacobi().build(A, torch.zeros(2))(torch.ones(2))
        tensor([0.5000, 0.2500])
    """

    diagonal: Tensor | Callable[[], Tensor] | None = None
    samples: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        demand_types(self, {"diagonal": "a tensor, a function that returns one, or None"})
        if self.samples < 2:
            raise ValueError(
                f"`Jacobi(samples=...)` must be at least 2. Got {self.samples}. Each costs one Hessian product."
            )

    def build(self, operator: LinearOperator, like: Tensor) -> Callable[[Tensor], Tensor]:
        if self.diagonal is None:
            known = operator.known_diagonal
            diagonal = self._estimate(operator, like) if known is None else known
        else:
            diagonal = (self.diagonal if isinstance(self.diagonal, Tensor) else self.diagonal()).detach().to(like)
            if diagonal.shape not in (like.shape, like.shape[-1:]):
                raise ValueError(
                    f"`Jacobi(diagonal=...)` must have the shape {tuple(like.shape[-1:])}: one entry for each inner"
                    f" variable. Got {tuple(diagonal.shape)}."
                )
        # NaN passes through: the solver reports it.
        floor = torch.finfo(like.dtype).eps * diagonal.amax(-1, keepdim=True)
        safe = torch.maximum(diagonal, torch.where(floor > 0, floor, torch.ones_like(floor)))
        inverse = torch.where(diagonal.isnan(), diagonal, safe).reciprocal()
        return lambda r: inverse * r

    def _estimate(self, operator: LinearOperator, like: Tensor) -> Tensor:
        """The mean of z * A z, or its standard error where that is larger."""
        generator = torch.Generator().manual_seed(self.seed)
        mean = squares = torch.zeros_like(like)
        for k in range(self.samples):
            signs = torch.randint(0, 2, like.shape[-1:], generator=generator, device="cpu").mul(2).sub(1).to(like)
            z = signs.expand_as(like).contiguous()
            sample = z * operator.mv(z)
            deviation = sample - mean
            mean = mean + deviation / (k + 1)
            squares = squares + deviation * (sample - mean)
        return torch.maximum(mean, (squares / (self.samples * (self.samples - 1))).sqrt())
