"""Results: values whose tensors are parts of longer vectors, pickled without these."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel._numerics.nesting import tree_map
from bilevel.portable.pickling import AbstractPortable, copied, demand_portable


class AbstractResult(AbstractPortable):
    """A value that holds tensors in nested structures; each is pickled by itself.

    Torch pickles a tensor with all of the memory that it is a view of: twenty leaves that are cut from one vector would
    be twenty such vectors in a pickle.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        if copied(2):
            return object.__reduce_ex__(self, protocol)
        demand_portable(self)
        reduced: Any = object.__reduce_ex__(self, protocol)
        made, arguments, state, *rest = reduced
        return made, arguments, {name: tree_map(alone, value) for name, value in state.items()}, *rest


def alone(leaf: Any) -> Any:
    """A tensor with memory of its own, where it is a view of more; anything else as it is."""
    if not isinstance(leaf, Tensor) or leaf.requires_grad or leaf.layout is not torch.strided:
        return leaf
    return leaf.clone() if leaf.untyped_storage().nbytes() > leaf.numel() * leaf.element_size() else leaf
