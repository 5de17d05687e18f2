"""Nested structures of tensors as one vector, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from bilevel._numerics.nesting import (
    Node,
    Tree as Tree,
    aligned,
    builder,
    flatten,
    places,
    tree_leaves as tree_leaves,
    tree_map as tree_map,
    tree_parts as tree_parts,
)
from bilevel.arguments.fits import demand_type


@final
@dataclass(frozen=True)
class Structure:
    """The shape of a nested structure of tensors: how a vector `(n,)` is cut into its leaves.

    Attributes:
        spec: the nesting.
        shapes: the shape of each leaf.
        dtype: the floating dtype of all leaves.
        device: the device of all leaves.
    """

    spec: Node | None
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device

    def __reduce__(self) -> Any:
        """Without what was derived of it, in which there are functions without a name."""
        return Structure, (self.spec, self.shapes, self.dtype, self.device)

    @cached_property
    def sizes(self) -> list[int]:
        """The number of entries of each leaf."""
        return [shape.numel() for shape in self.shapes]

    @cached_property
    def size(self) -> int:
        """The number of entries of the whole: n."""
        return sum(self.sizes)

    def unravel(self, vector: Tensor) -> Tree:
        """Cut a vector `(*batch, n)` into leaves `(*batch, *shape)`; views where possible, differentiable."""
        lead = vector.shape[:-1] if vector.dim() > 1 else None
        if len(self.shapes) == 1:  # no split: one node less in every graph
            shape = self.shapes[0] if lead is None else lead + self.shapes[0]
            return self._build((vector if vector.shape == shape else vector.reshape(shape),))
        parts = vector.split_with_sizes(self.sizes, dim=-1)  # one split, not many slices: its backward is one `cat`
        leaves = [
            part if shape is None else part.reshape(shape if lead is None else lead + shape)
            for part, shape in zip(parts, self._shapes_to_give, strict=True)
        ]
        return self._build(leaves)

    @cached_property
    def _shapes_to_give(self) -> list[torch.Size | None]:
        """The shapes that leaves do not have as parts of a vector."""
        return [None if len(shape) == 1 else shape for shape in self.shapes]

    @cached_property
    def _build(self) -> Callable[[Sequence[Any]], Tree]:
        return builder(self.spec)

    def ravel(self, tree: Tree, name: str) -> Tensor:
        """Join the leaves of `tree` into a vector `(n,)`; differentiable. `name` is for error messages.

        Dicts are matched by their keys, in whatever order these are.

        Raises:
            ValueError: if `tree` has another nesting, other shapes, dtype or device than this structure.
        """
        if self.spec is None and type(tree) is Tensor and self._is_of(tree):  # one tensor, as y and v mostly are
            return tree.reshape(-1)
        leaves = self.leaves(tree, name)
        if len(leaves) == 1:
            return leaves[0].reshape(-1)
        return torch.cat([leaf if leaf.dim() == 1 else leaf.reshape(-1) for leaf in leaves])

    def leaves(self, tree: Tree, name: str) -> list[Tensor]:
        """The leaves of `tree`, in the order of this structure.

        Raises:
            ValueError: if `tree` has another nesting, other shapes, dtype or device than this structure.
        """
        leaves, other = _taken_apart(tree, name[:200])
        if other.spec != self.spec:
            leaves, other = _taken_apart(self.aligned(tree), name[:200])
        if other.spec != self.spec or other.shapes != self.shapes:
            raise ValueError(f"{name} must have the structure {self.describe()}. Got {other.describe()}.")
        if other.dtype != self.dtype or other.device != self.device:
            raise ValueError(
                f"{name} must be {self.dtype} on {self.device}. Got {other.dtype} on {other.device}."
                f" Convert it with `.to(...)`."
            )
        return leaves

    def _is_of(self, leaf: Tensor) -> bool:
        """Whether a tensor is one that the only leaf of this structure may be."""
        same = leaf.dtype == self.dtype and leaf.device == self.device and leaf.layout == torch.strided
        return same and not leaf.is_nested and leaf.shape == self.shapes[0]

    def aligned(self, tree: Tree) -> Tree:
        """The tree with its dicts in the order of this structure, wherever their keys are the same."""
        return aligned(tree, self._build([None] * len(self.shapes)))

    def describe(self) -> str:
        """The nesting with the shape of each leaf in its place."""
        return str(self._build([tuple(shape) for shape in self.shapes]))


def ravel(tree: Tree, name: str = "`ravel(tree=...)`") -> tuple[Tensor, Structure]:
    """Join the leaves of a nested structure into one vector `(n,)`, and say how to undo it.

    Differentiable, never an alias of its input where there is one leaf or more that is not flat.

    Args:
        tree: a tensor, or a nested dict, list, tuple or named tuple of tensors, of one dtype and device.
        name: how error messages call it.

    Returns:
        The vector and the :class:`Structure` whose `unravel` undoes it.

    Raises:
        TypeError: if a leaf is not a dense floating-point tensor, or there is none.
        ValueError: if leaves differ in dtype or device.

    Example:
        >>> vector, structure = ravel({"w": torch.ones(2, 2), "b": torch.zeros(())})
        >>> structure.unravel(vector)["b"]
        tensor(0.)
    """
    if type(name) is not str:  # at every estimate
        demand_type("ravel", "name", name, str)
    leaves, structure = _taken_apart(tree, name[:200])
    if len(leaves) == 1:
        return leaves[0].reshape(-1), structure
    return torch.cat([leaf if leaf.dim() == 1 else leaf.reshape(-1) for leaf in leaves]), structure


def _taken_apart(tree: Tree, name: str) -> tuple[list[Tensor], Structure]:
    """The leaves, each of which may be part of a vector, and the structure."""
    leaves: list[Any] = []
    spec = flatten(tree, leaves, name)
    for leaf in leaves:
        if not (isinstance(leaf, Tensor) and leaf.dtype in _REAL and leaf.layout == torch.strided and _whole(leaf)):
            _refuse_leaf(tree, name)
    if not leaves:
        raise TypeError(f"{name} must hold at least one tensor. Got {tree!r}.")
    for attribute in ("dtype", "device") if len(leaves) > 1 else ():
        found = {getattr(leaf, attribute) for leaf in leaves}
        if len(found) > 1:
            raise ValueError(
                f"all tensors of {name} must have one {attribute}. Got {sorted(map(str, found))}. Convert them with"
                f" `.to(...)`."
            )
    return leaves, Structure(spec, tuple([leaf.shape for leaf in leaves]), leaves[0].dtype, leaves[0].device)


def demand_alike(call: str, x: Structure, y: Structure) -> None:
    """Refuse x and y that cannot meet in one computation, and those that hold no numbers.

    Args:
        call: which call, with the names that it gives them: `"minimize(x0, y0)"`.
        x: the structure of x.
        y: the structure of y.

    Raises:
        ValueError: if their dtypes or devices differ, or one of them has no entries.
    """
    if x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            f"`{call}` need one dtype and device. Got {x.dtype} on {x.device} and {y.dtype} on {y.device}."
            f" Convert one of them with `.to(...)`."
        )
    if x.device.type == "meta":
        raise ValueError(f"`{call}` must hold numbers. Got tensors on the device 'meta', which have none.")
    if x.size and y.size:
        return
    function, _, names = call.removesuffix(")").partition("(")
    for name, structure, without in zip(names.split(", "), (x, y), _WITHOUT, strict=True):
        if not structure.size:
            raise ValueError(
                f"`{function}({name}=...)` must have at least one entry. Got {structure.describe()}. {without}"
            )


_WITHOUT = (
    "Without x there is nothing to differentiate in: minimize g alone.",
    "Without y there is no inner problem: differentiate f alone, by `torch.autograd.grad`.",
)
_REAL = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})  # those that torch computes in
_DISPATCH = "__torch_dispatch__"  # which type checkers take for a method
_PLAIN = getattr(Tensor, _DISPATCH)


def _whole(leaf: Tensor) -> bool:
    """Whether a tensor is one dense block of numbers; a subclass that replaces torch's operations need not be."""
    return not leaf.is_nested and getattr(type(leaf), _DISPATCH) is _PLAIN


def _refuse_leaf(tree: Tree, name: str) -> None:
    for where, leaf in places(tree, name):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{name} must be a tensor or a nested dict, list or tuple of tensors."
                f" Got {type(leaf).__name__} at {where}. {_instead(leaf)}"
            )
        if leaf.dtype not in _REAL:
            raise TypeError(
                f"{name} must hold real floating-point tensors. Got {leaf.dtype} at {where}. {_real(leaf.dtype)}"
            )
        if leaf.is_nested:
            raise TypeError(
                f"{name} must hold dense tensors. Got a nested one at {where}. Pass the list of its parts:"
                f" `list(tensor.unbind())`."
            )
        if leaf.layout != torch.strided:
            raise TypeError(f"{name} must hold dense tensors. Got {leaf.layout} at {where}. Write `.to_dense()`.")
        if type(leaf).__name__ == "DTensor":
            raise TypeError(
                f"{name} must hold whole tensors. Got a DTensor at {where}, which is shared out over ranks. First-order"
                f" algorithms take such a y: `minimize(..., algorithm=F2SA(...), group=)`. For all else pass"
                f" parameters that are whole on every rank, such as `tensor.full_tensor()`."
            )
        if not _whole(leaf):
            raise TypeError(
                f"{name} must hold plain tensors. Got a {type(leaf).__name__} at {where}, a subclass with operations of"
                f" its own. Pass the plain tensor, and wrap it in f and g."
            )


def _instead(leaf: Any) -> str:
    """What to write for what is no tensor."""
    if leaf is None:
        return "Leave it out of the structure, or pass a tensor."
    if isinstance(leaf, torch.nn.ParameterDict):
        return "Write `dict(parameters)`."
    if isinstance(leaf, torch.nn.ParameterList):
        return "Write `list(parameters)`."
    if isinstance(leaf, torch.nn.Module):
        return "Write `net = bilevel.functional(module)`, pass `net.params`, and call `net(params, ...)` in f and g."
    if isinstance(leaf, torch.optim.Optimizer):
        return "Pass the tensors that it moves."
    if type(leaf).__module__ == "numpy":
        return "Write `torch.as_tensor(...)`."
    if isinstance(leaf, Iterator):
        return "It can be read once only. Write `dict(module.named_parameters())`, or `list(...)`."
    if isinstance(leaf, bool | int | float | complex):
        number = repr(leaf) if isinstance(leaf, float) or abs(leaf) < 2**63 else "..."
        return f"Write `torch.tensor({number}, dtype=torch.float64)`."
    return "Write `torch.tensor(...)`."


def _real(dtype: torch.dtype) -> str:
    """What to do with a dtype that does not hold real numbers, or not well enough to compute with."""
    if dtype.is_complex:
        return "Pass `torch.view_as_real(z)`, and write `torch.view_as_complex(x)` in f and g."
    if dtype.is_floating_point:
        return "Torch has no arithmetic in it. Convert it with `.float()`, or with `.double()`."
    closures = "otherwise keep it in the closures of f and g"
    if dtype is torch.bool:
        return f"Convert it with `.double()` if its entries are to become numbers between 0 and 1; {closures}."
    return f"Convert it with `.double()` if it is to be optimized; {closures}."
