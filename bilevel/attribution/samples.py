"""Losses of samples, batch by batch: their gradients, and what they do along vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._numerics.misfits import called
from bilevel._tree import Structure


@final
@dataclass(frozen=True, eq=False)
class Samples:
    """y -> the losses of some samples, of one batch or of several; passes over them hold one batch at a time.

    Attributes:
        loss: (params, batch) -> one loss for each sample.
        structure: of the parameters.
        batches: to be passed over again and again, in one order.
        name: of the argument.
    """

    loss: Callable[[Any, Any], Tensor]
    structure: Structure
    batches: Iterable[Any]
    name: str

    @staticmethod
    def of(loss: Callable[[Any, Any], Tensor], structure: Structure, data: Any, name: str) -> Samples:
        """From one batch (a tensor, mapping or tuple) or an iterable of batches (a list, a `DataLoader`).

        Raises:
            TypeError: if it is neither, or can be passed over once only.
        """
        if isinstance(data, Tensor | Mapping | tuple):
            return Samples(loss, structure, (data,), name)
        if isinstance(data, Iterator) or not isinstance(data, Iterable) or isinstance(data, str | bytes):
            raise TypeError(
                f"`influence({name}=...)` must be a batch (a tensor, dict or tuple) or batches that can be passed over"
                f" again (a list, a DataLoader that does not shuffle). Got {type(data).__name__}."
            )
        return Samples(loss, structure, data, name)

    @property
    def is_one(self) -> bool:
        """Whether there is one batch, whose graph can be kept."""
        return isinstance(self.batches, Sequence) and len(self.batches) == 1

    def __iter__(self) -> Iterator[Any]:
        try:
            return iter(self.batches)
        except Exception as error:
            kind = type(self.batches).__name__
            raise TypeError(f"`influence({self.name}=...)` must be batches. Got {kind}, which gives none.") from error

    def losses(self, y: Tensor, batch: Any) -> Tensor:
        """The losses of a batch `(b,)`.

        Raises:
            ValueError: if they are not one for each sample.
        """
        try:
            found = called("loss(params, batch)", self.loss, self.structure.unravel(y), batch)
        except Exception as error:
            error.add_note(f"In `influence(loss, params, {self.name}=...)`, of a batch of `{self.name}`.")
            raise
        if not isinstance(found, Tensor) or found.dim() != 1 or not found.is_floating_point():
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"`influence(loss=...)` must return one loss for each sample of the batch, shape (n,). Got {got}, for"
                f" these params and a batch of {self.name}. Pass `reduction='none'`, and take the mean over whatever"
                f" else a sample has."
            )
        return found

    def gradients(self, y: Tensor) -> tuple[Tensor, Tensor, float]:
        """The losses `(n,)`, the sum of their gradients `(q,)`, and an estimate of the sum of their squared norms.

        The estimate is |sum_i s_i grad loss_i|^2 with random signs s_i, the same each time.

        Raises:
            ValueError: if there are no samples.
        """
        signs = torch.Generator(device="cpu").manual_seed(0)
        total, mixed, values = torch.zeros_like(y), torch.zeros_like(y), list[Tensor]()
        for batch in self:
            with torch.enable_grad():
                leaf = y.detach().requires_grad_()
                losses = self.losses(leaf, batch)
            values.append(losses.detach())
            if not losses.numel() or not losses.requires_grad:
                continue
            s = torch.randint(0, 2, (len(losses),), generator=signs, device="cpu").to(losses) * 2 - 1
            total += torch.autograd.grad(losses.sum(), leaf, retain_graph=True)[0]
            mixed += torch.autograd.grad(losses @ s, leaf)[0]
        found = torch.cat(values) if values else y.new_zeros(0)
        if not found.numel():
            raise ValueError(f"`influence({self.name}=...)` must hold at least one sample. Got none.")
        return found, total, float(mixed.square().sum())

    def rows(self, y: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The losses of up to `count` samples at a time `(k,)`, and the gradient of each `(k, q)`."""
        for batch in self:
            with torch.enable_grad():
                leaf = y.detach().requires_grad_()
                losses = self.losses(leaf, batch)
            for begin in range(0, len(losses), count):
                some = losses[begin : begin + count]
                yield some.detach(), torch.stack([_gradient(each, leaf) for each in some])

    def along(self, y: Tensor, vectors: Tensor, norms: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """The losses `(n,)`, their derivatives along each vector `(k, n)`, and the norms of their gradients `(n,)`.

        J v is the derivative of w -> J'w along v, a backward pass for each v and batch; norms take one for each sample.
        """
        values, slopes, sizes = list[Tensor](), list[Tensor](), list[Tensor]()
        for batch in self:
            with torch.enable_grad():
                leaf = y.detach().requires_grad_()
                losses = self.losses(leaf, batch)
                w = torch.zeros_like(losses, requires_grad=True)
                pulled = torch.autograd.grad(losses, leaf, w, create_graph=True)[0]
            values.append(losses.detach())
            slopes.append(torch.stack([torch.autograd.grad(pulled, w, v, retain_graph=True)[0] for v in vectors]))
            if norms:
                sizes.append(torch.stack([torch.linalg.vector_norm(_gradient(each, leaf)) for each in losses]))
        return torch.cat(values), torch.cat(slopes, dim=-1), torch.cat(sizes) if norms else None


def _gradient(loss: Tensor, y: Tensor) -> Tensor:
    return torch.autograd.grad(loss, y, retain_graph=True, materialize_grads=True, allow_unused=True)[0]
