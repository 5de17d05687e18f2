"""Products with features: dense ones in blocks of rows that fit the cache, sparse ones as they are."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel._numerics.batched import is_batched

_CACHE = 1 << 19  # bytes of a block: half of a core's own cache, where it stays for X v and for X'u
_LEAST, _MOST = 64, 1024  # rows of a block: fewer cost more in calls than they save, more gain nothing


class Block(NamedTuple):
    """Some rows of the features, X_b `(B, d)`, and where their samples stand among all."""

    X: Tensor
    XT: Tensor
    samples: slice
    is_far: bool  # from the processor: among others, of which it takes its turn

    def times(self, V: Tensor) -> Tensor:
        """V X_b' `(C, B)` for V `(C, d)`."""
        if self.is_far:
            self.X.sum()  # brings it near by a plain pass, twice as fast as products with few columns fetch it
        return torch.mm(V, self.XT)

    def back(self, U: Tensor, total: Tensor | None) -> Tensor:
        """total + U X_b `(C, d)` for U `(C, B)`; the total is written to."""
        return torch.mm(U, self.X) if total is None else total.addmm_(U, self.X)

    def back_squared(self, U: Tensor, total: Tensor | None) -> Tensor:
        """total + U X_b^2 entry by entry `(C, d)`."""
        found = torch.mm(U, self.X.square())
        return found if total is None else total.add_(found)


class SparseRows(NamedTuple):
    """All rows of sparse features, and their transpose, as `torch.sparse_csr` matrices."""

    X: Tensor
    XT: Tensor
    samples: slice = slice(None)

    @staticmethod
    def of(X: Tensor) -> SparseRows:
        with warnings.catch_warnings():  # torch says once that it is still at work on this layout
            warnings.simplefilter("ignore", UserWarning)
            coo = X.to_sparse_coo().coalesce()  # type: ignore[no-untyped-call]
            return SparseRows(_short(coo.to_sparse_csr()), _short(coo.t().coalesce().to_sparse_csr()))

    def times(self, V: Tensor) -> Tensor:
        return _times(self.X, self.XT, V)

    def back(self, U: Tensor, total: Tensor | None) -> Tensor:
        found = _times(self.XT, self.X, U)
        return found if total is None else total + found

    def back_squared(self, U: Tensor, total: Tensor | None) -> Tensor:
        found = _times(_squared(self.XT), _squared(self.X), U)
        return found if total is None else total + found


def _times(X: Tensor, XT: Tensor, V: Tensor) -> Tensor:
    """V X'."""
    if is_batched(V) or (V.requires_grad and torch.is_grad_enabled()):
        found: Tensor = _SparseProduct.apply(X, XT, V)  # type: ignore[no-untyped-call]
        return found
    return _SparseProduct.forward(X, XT, V)  # a call of autograd's takes as long as a small product


def _short(X: Tensor) -> Tensor:
    """The same with 32-bit indices where these do: products then take two thirds of the time."""
    rows, columns = X.crow_indices(), X.col_indices()
    if X.values().numel() < 2**31 and max(X.shape) < 2**31:
        rows, columns = rows.int(), columns.int()
    return torch.sparse_csr_tensor(rows, columns, X.values(), X.shape, check_invariants=False)


def _squared(X: Tensor) -> Tensor:
    squares = X.values().square()
    return torch.sparse_csr_tensor(X.crow_indices(), X.col_indices(), squares, X.shape, check_invariants=False)


class _SparseProduct(torch.autograd.Function):
    """V -> V X' for a sparse X, which is constant; differentiable any number of times, and by `torch.vmap` over V."""

    @staticmethod
    def forward(X: Tensor, XT: Tensor, V: Tensor) -> Tensor:  # noqa: ARG004
        if V.shape[0] == 1:
            return torch.mv(X, V.squeeze(0)).unsqueeze(0)
        return torch.mm(X, V.mT.contiguous()).mT.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.X, ctx.XT, _ = inputs

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        return None, None, _SparseProduct.apply(ctx.XT, ctx.X, slopes[0])  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _SparseProduct.apply(ctx.X, ctx.XT, tangents[2])  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]  # what it is called with
        info: Any,  # noqa: ARG004
        in_dims: tuple[int | None, ...],
        X: Tensor,
        XT: Tensor,
        V: Tensor,
    ) -> tuple[Tensor, int]:
        each = V.movedim(in_dims[2] or 0, 0)
        found = _SparseProduct.apply(X, XT, each.reshape(-1, each.shape[-1]))  # type: ignore[no-untyped-call]
        return found.reshape(*each.shape[:-1], -1), 0


Blocks = tuple[Block, ...] | tuple[SparseRows]


def blocks_of(X: Tensor, *, whole: bool = False) -> Blocks:
    """X `(n, d)` in blocks of rows; in one, where it is sparse or `whole` says so: several problems side by side."""
    if X.layout != torch.strided:
        return (SparseRows.of(X),)
    if whole or X.shape[0] <= _LEAST:
        return (Block(X, X.mT, slice(None), is_far=False),)
    rows = max(_LEAST, min(_MOST, _CACHE // max(1, X.shape[1] * X.element_size())))
    parts = torch.split(X, rows)
    if len(parts) == 1:
        return (Block(X, X.mT, slice(None), is_far=False),)
    far = X.device.type == "cpu"
    return tuple(Block(part, part.mT, slice(k * rows, k * rows + len(part)), far) for k, part in enumerate(parts))
