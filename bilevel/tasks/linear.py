"""Bayesian linear regression: tasks of which everything is known in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.arguments.checked import checked, fitting
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, FINITE, SEED, SIZE, demand_ranges
from bilevel.tasks._random import generator, normal
from bilevel.tasks.images import put
from bilevel.tasks.source import AbstractTasks, Batch, chosen, demand_placement


@final
@dataclass(frozen=True, eq=False)
class LinearTasks(AbstractTasks):
    """y = X w + noise N(0, 1), w ~ N(mean, diag(variance)); x is `(tasks, n, features)`, y is `(tasks, n, 1)`.

    A batch also holds the tasks' `weights` `(tasks, features)`. The attributes `mean` and `variance` `(features,)` are
    the prior that learning should recover, `posterior` is what adapting to a support set should find.

    Args:
        features: dimension of w.
        mean: of w; one number, or one a feature.
        variance: of w; one number, or one a feature.
        shots: rows of a support set.
        queries: rows of a query set, whose entries are N(0, 1).
        noise: standard deviation of the noise on all targets.
        orthogonal: the columns of a support set's X are orthogonal, so that a mean-field posterior is exact; otherwise
            they are in random directions.
        condition: of a support set's X^T X, whose eigenvalues lie in geometric progression from shots / condition to
            shots (in the order of the features, if orthogonal). None: all equal to shots if orthogonal, otherwise X has
            entries N(0, 1).
        dtype: of all tensors; None: torch's default.
        device: of all tensors.

    Raises:
        ValueError: if an argument is out of its range, or `shots < features` where X^T X is prescribed.

    Example:
        >>> source = LinearTasks(features=3, variance=(1.0, 0.5, 2.0), shots=6, orthogonal=True)
        >>> batch = source.sample(2, seed=0)
        >>> X = batch["support_x"][0]
        >>> (X.mT @ X).round(decimals=4).abs()
        tensor([[6., 0., 0.],
                [0., 6., 0.],
                [0., 0., 6.]])
    """

    features: int = 4
    mean: float | Sequence[float] | Tensor = 0.0
    variance: float | Sequence[float] | Tensor = 1.0
    shots: int = 10
    queries: int = 10
    noise: float = 0.5
    orthogonal: bool = False
    condition: float | None = None
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, features=SIZE, shots=SIZE, queries=SIZE, noise=AT_LEAST_0, condition=AT_LEAST_1)
        demand_ranges(self, mean=FINITE, variance=AT_LEAST_0)
        demand_placement("LinearTasks", self.dtype, self.device)
        for name in ("mean", "variance"):
            given = torch.as_tensor(getattr(self, name), dtype=torch.float64, device="cpu").detach()
            if given.shape not in ((), (self.features,)) or not bool(given.isfinite().all()):
                raise ValueError(
                    f"`LinearTasks({name}=...)` must be a finite number, or {self.features} of them (`features`)."
                    f" Got {getattr(self, name)}."
                )
            put(self, name, given.expand(self.features).clone())
        if (self.orthogonal or self.condition is not None) and self.shots < self.features:
            raise ValueError(
                f"`LinearTasks(shots=...)` must be at least `features`, {self.features}, to prescribe X^T X. Got"
                f" {self.shots}. Take more, or leave `orthogonal` and `condition` out."
            )

    @checked(count=SIZE, seed=SEED)
    def sample(self, count: int, seed: int) -> Batch:
        draws = generator(seed)
        mean, variance = (torch.as_tensor(given, device="cpu") for given in (self.mean, self.variance))
        weights = mean + variance.sqrt() * normal(count, self.features, generator=draws)
        support, query = self._design(count, draws), normal(count, self.queries, self.features, generator=draws)
        targets = [
            x @ weights.unsqueeze(-1) + self.noise * normal(count, x.shape[1], 1, generator=draws)
            for x in (support, query)
        ]
        batch = {
            "support_x": support,
            "support_y": targets[0],
            "query_x": query,
            "query_y": targets[1],
            "weights": weights,
        }
        dtype = chosen(self.dtype)
        return {name: tensor.to(self.device, dtype).contiguous() for name, tensor in batch.items()}

    def _design(self, count: int, draws: torch.Generator) -> Tensor:
        if not self.orthogonal and self.condition is None:
            return normal(count, self.shots, self.features, generator=draws)
        exponents = torch.linspace(-1.0, 0.0, self.features, dtype=torch.float64, device="cpu")
        eigenvalues = self.shots * (self.condition or 1.0) ** exponents
        X = _orthonormal(count, self.shots, self.features, draws) * eigenvalues.sqrt()
        return X if self.orthogonal else X @ _orthonormal(count, self.features, self.features, draws).mT

    @fitting
    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The exact posterior of w given the support sets: its means `(tasks, p)` and covariances `(tasks, p, p)`.

        Raises:
            ValueError: if there is no noise or no variance: the posterior is degenerate.
        """
        X, y = batch["support_x"], batch["support_y"]
        mean, variance = (torch.as_tensor(given, device="cpu").to(X) for given in (self.mean, self.variance))
        if not self.noise or not bool((variance > 0).all()):
            raise ValueError("`LinearTasks.posterior` needs noise > 0 and variance > 0.")
        covariance = (X.mT @ X / self.noise**2 + variance.reciprocal().diag()).inverse()
        pull = X.mT @ y / self.noise**2 + (mean / variance).unsqueeze(-1)
        return (covariance @ pull).squeeze(-1), covariance


def _orthonormal(count: int, rows: int, columns: int, draws: torch.Generator) -> Tensor:
    """Matrices with orthonormal columns, uniform among all: of a QR factorization with positive diagonal."""
    Q, R = torch.linalg.qr(normal(count, rows, columns, generator=draws))
    found: Tensor = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return found
