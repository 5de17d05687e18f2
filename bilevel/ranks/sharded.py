"""y whose tensors are shared out over ranks, as `torch.distributed.fsdp.fully_shard` does: a vector of what is here."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._problem import BilevelProblem
from bilevel._tree import Tree, tree_leaves, tree_map, tree_parts

REMEDY = (
    "Pass `algorithm=F2SA(...)`, `SAMA(...)`, `ScaleBiO(...)` or `SOBA(..., products=FiniteDifferences())`, which take"
    " first derivatives alone, to `minimize(..., group=)`; or parameters that are whole on every rank."
)


@final
@dataclass(frozen=True, eq=False)
class Shards:
    """The parameters of FSDP2 modules that y is made of.

    Gradients in them arrive by `backward()`, in `.grad`: `torch.autograd.grad` does not see them, and what is passed to
    `torch.func.functional_call` in their place is not what the module computes with. So f(x, y), as a function of x and
    of this rank's part of y, writes that part into the parameters, calls the module, takes what `backward()` leaves in
    `.grad`, and puts values and `.grad` back. Of it there are first derivatives only.

    Cost: of a value one forward pass, of a gradient another one and a backward pass; memory that of FSDP.

    Attributes:
        y0: the structure of y, with the parameters themselves.
    """

    y0: Tree

    def local(self) -> Tree:
        """This rank's part of y, as plain tensors."""
        return tree_map(lambda leaf: _local(leaf).detach().clone(), self.y0)

    def describe(self) -> str:
        """The nesting with the shape of each whole tensor in its place."""
        parts, build = tree_parts(self.y0)
        return str(build([tuple(part.shape) for part in parts]))

    def shared_out(self, y: Tree) -> Tree:
        """A y of plain parts as one of tensors that are shared out as the parameters are."""
        from torch.distributed.tensor import DTensor

        parts, build = tree_parts(self.y0)
        whole = [
            DTensor.from_local(
                part.detach().clone(), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
            )
            for part, like in zip(tree_leaves(y), parts, strict=True)
        ]
        found: Tree = build(whole)
        return found

    def problem(self, problem: BilevelProblem) -> BilevelProblem:
        """f and g of x and this rank's part of y."""
        f, g = self._of_parts(problem.f), self._of_parts(problem.g)
        return BilevelProblem(f, g, allow_unused=problem.allow_unused)

    def _of_parts(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def of_parts(x: Tree, y: Tree, *data: Any) -> Tensor:
            leaves, build = tree_parts(x)

            def value(xs: Sequence[Tensor]) -> Tensor:
                return function(build(xs), self.y0, *data)

            apply: Callable[..., Tensor] = _ByBackward.apply
            return apply(self, value, len(leaves), *leaves, *tree_leaves(y))

        return of_parts

    @contextlib.contextmanager
    def at(self, parts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """The parameters with other values and without gradients, until it is left."""
        parameters: list[Any] = tree_leaves(self.y0)
        with torch.no_grad():
            before = [(_local(each).clone(), each.grad) for each in parameters]
            for each, part in zip(parameters, parts, strict=True):
                _local(each).copy_(part)
                each.grad = None
        try:
            yield parameters
        finally:
            with torch.no_grad():
                for each, (value, slope) in zip(parameters, before, strict=True):
                    _local(each).copy_(value)
                    each.grad = slope

    @property
    def size(self) -> int:
        """Over how many ranks FSDP takes the mean of gradients."""
        count: int = next(iter(tree_leaves(self.y0))).device_mesh.size()
        return count


@final
class _ByBackward(torch.autograd.Function):
    """value(x, y) with the derivatives that `backward()` finds."""

    @staticmethod
    def forward(ctx: Any, shards: Shards, value: Any, count: int, *leaves: Tensor) -> Tensor:
        ctx.shards, ctx.value, ctx.count = shards, value, count
        ctx.save_for_backward(*leaves)
        with shards.at(leaves[count:]):
            found: Tensor = value(leaves[:count])
            return found.detach().clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> Any:
        shards, count = ctx.shards, ctx.count
        xs = [leaf.detach().requires_grad_() for leaf in ctx.saved_tensors[:count]]
        with torch.enable_grad(), shards.at(ctx.saved_tensors[count:]) as parameters:
            found = ctx.value(xs)
            if found.requires_grad:
                found.backward(grad_outputs[0].reshape(found.shape))
            # FSDP leaves the mean over ranks, and what is asked for is the sum
            ys = [
                torch.zeros_like(_local(each)) if each.grad is None else shards.size * _local(each.grad).clone()
                for each in parameters
            ]
        slopes = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in xs]
        return (None, None, None, *slopes, *ys)


def _local(tensor: Any) -> Tensor:
    found: Tensor = tensor.to_local() if is_shared_out(tensor) else tensor
    return found


def is_shared_out(tensor: Any) -> bool:
    """Whether a tensor is one of `torch.distributed.tensor`."""
    module = sys.modules.get("torch.distributed.tensor")  # which nobody has one without
    return module is not None and isinstance(tensor, module.DTensor)


def shards_of(call: str, y0: Tree, ranks: Any) -> Shards | None:
    """The shards of a y that is shared out; None: it is not.

    Args:
        call: what was given it.
        y0: the start of y.
        ranks: the processes of `group=`; None: none were given.

    Raises:
        ValueError: if only some of its tensors are, or they are over other ranks than those of the group.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return None
    leaves = tree_leaves(y0)
    shared = [leaf for leaf in leaves if is_shared_out(leaf)]
    if not shared:
        return None
    sizes = {leaf.device_mesh.size() for leaf in shared}
    if len(shared) < len(leaves) or ranks is None or sizes != {ranks.size}:
        raise ValueError(
            f"`{call}(y0=...)` has {len(shared)} of {len(leaves)} tensors that are shared out over {sorted(sizes)}"
            f" ranks (`DTensor`). It needs all parameters of a module on which `fully_shard` was called, such as"
            f" `dict(module.named_parameters())`, and `group=` of the same ranks: got"
            f" {'none' if ranks is None else ranks.size}."
        )
    return Shards(y0)
