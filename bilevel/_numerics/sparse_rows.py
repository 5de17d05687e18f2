"""A sparse matrix by its entries that are not zero, which may have a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, eq=False)
class SparseRows:
    """S with S[rows[i], columns[i]] = values[i]; products are differentiable in the values, twice.

    Attributes:
        rows: `(n,)` integers.
        columns: likewise.
        values: `(n,)`.
        shape: `(k, q)`.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, int]

    @staticmethod
    def of(matrix: Tensor, like: Tensor) -> SparseRows:
        """The entries of a matrix `(k, q)`, dense or sparse, in the dtype and on the device of another tensor."""
        if matrix.layout == torch.strided:
            rows, columns = matrix.detach().nonzero(as_tuple=True)
            values = matrix[rows, columns]
        else:
            entries = matrix.to_sparse_coo().coalesce()  # type: ignore[no-untyped-call]
            (rows, columns), values = entries.indices(), entries.values()
        return SparseRows(
            rows.to(like.device), columns.to(like.device), values.to(like), (matrix.shape[0], matrix.shape[1])
        )

    def times(self, y: Tensor) -> Tensor:
        """S y, `(*batch, q) -> (*batch, k)`."""
        return y.new_zeros(*y.shape[:-1], self.shape[0]).index_add(-1, self.rows, self.values * y[..., self.columns])

    def scipy(self, module: Any) -> Any:
        """The matrix as one of `scipy.sparse`, without its graph."""
        where = (self.rows.cpu().numpy(), self.columns.cpu().numpy())
        return module.csr_matrix((self.values.detach().double().cpu().numpy(), where), shape=self.shape)


def joined(first: SparseRows, second: SparseRows) -> SparseRows:
    """The rows of both, one after the other."""
    return SparseRows(
        torch.cat([first.rows, second.rows + first.shape[0]]),
        torch.cat([first.columns, second.columns]),
        torch.cat([first.values, second.values]),
        (first.shape[0] + second.shape[0], first.shape[1]),
    )
