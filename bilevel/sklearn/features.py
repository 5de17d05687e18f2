"""Features as the solvers take them: on one scale, with a column for the intercept; and the way back."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor


@final
@dataclass(frozen=True, eq=False)
class Features:
    """X with columns of spread 1 (dense ones centered too, where there is an intercept), and a last column of ones.

    It is another way to write the same model: coefficients w_j = y_j / s_j, and the penalty a_j w_j^2 is a_j / s_j^2
    for y_j. The intercept is not penalized, so that centering changes nothing but the condition of the problem.

    Attributes:
        X: `(n, d)`, or `(n, d + 1)` with an intercept; dense or `torch.sparse_csr`.
        scale: s `(d,)`, the standard deviations; without an intercept the root mean squares; 1 where they are 0.
        center: what was subtracted `(d,)`.
        intercept: whether there is one.
    """

    X: Tensor
    scale: Tensor
    center: Tensor
    intercept: bool

    @staticmethod
    def of(X: Any, intercept: bool) -> Features:
        """From an array or a scipy matrix of float64."""
        import scipy.sparse as sp

        is_sparse = bool(sp.issparse(X))
        mean = np.asarray(X.mean(axis=0)).reshape(-1)
        squares = np.asarray((X.multiply(X) if is_sparse else X * X).mean(axis=0)).reshape(-1)
        variance = squares if not intercept else squares - mean * mean if is_sparse else X.var(axis=0)
        scale = np.sqrt(np.where(variance > 1e-12 * squares, variance, 1.0))
        center = mean if intercept and not is_sparse else np.zeros_like(mean)
        found = Features(torch.zeros(0), torch.from_numpy(scale), torch.from_numpy(center), intercept)
        return replace(found, X=found.like(X))

    def like(self, X: Any) -> Tensor:
        """Other samples, with the same columns."""
        import scipy.sparse as sp

        scale, center, ones = self.scale.numpy(), self.center.numpy(), np.ones((X.shape[0], int(self.intercept)))
        if bool(sp.issparse(X)):
            return _csr(sp.hstack([X.multiply(1 / scale), sp.csr_matrix(ones)]).tocsr())
        return torch.from_numpy(np.hstack([(X - center) / scale, ones]))

    @property
    def count(self) -> int:
        """d."""
        return self.scale.numel()

    def dense(self) -> Tensor:
        """X with contiguous columns, which is what coordinate descent reads."""
        X = self.X.to_dense() if self.X.layout != torch.strided else self.X
        return X.mT.contiguous().mT

    def back(self, y: Tensor) -> tuple[Any, Any]:
        """Coefficients `(..., d)` and intercepts `(...)` of the features as they came, as arrays."""
        y = y.detach()
        w = y[..., : self.count] / self.scale
        b = y[..., -1] - w @ self.center if self.intercept else y.new_zeros(y.shape[:-1])
        return w.numpy(), b.numpy()


def _csr(X: Any) -> Tensor:
    X.sort_indices()
    with warnings.catch_warnings():  # torch says once that it is still at work on this layout
        warnings.simplefilter("ignore", UserWarning)
        rows, columns = (torch.from_numpy(part.astype(np.int64)) for part in (X.indptr, X.indices))
        return torch.sparse_csr_tensor(rows, columns, torch.from_numpy(X.data), X.shape)
