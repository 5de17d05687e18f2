"""What a forward reads beside its parameters, its inputs and the constants of the module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bilevel._numerics.batched import is_batched
from bilevel._numerics.graphs import ancestors
from bilevel.modules.attributes import reached, where_is

# Of these an argument tells a shape, a type or a device.
_FOR_ITS_FORM = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as", "is_same_size"})


@final
class Foreign(TorchFunctionMode):
    """Watches a call for tensors that require a gradient and are neither given nor made in it.

    Operations show their arguments under `torch.vmap` too, where outputs have no graph; custom functions do not, and
    the graph shows theirs.

    Args:
        module: what is called, whose places are searched for what was found.
        original: what it is a copy of, with its parameters.
        given: the arguments of the call.
    """

    def __init__(self, module: nn.Module, original: nn.Module, given: Any) -> None:
        TorchFunctionMode.__init__(self)
        self._module, self._original = module, original
        self._given = [found for _, found in reached(given, "") if isinstance(found, Tensor)]
        self._known = {id(tensor): tensor for tensor in (*self._given, *original.buffers())}
        self._found: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        strange = [t for t in _tensors((args, keywords)) if self._is_strange(t)] if torch.is_grad_enabled() else []
        output = func(*args, **keywords)
        made = list(_tensors(output))
        if strange and func.__name__ not in _FOR_ITS_FORM and any(map(_may_depend, made)):
            self._found = self._found if self._found is not None else strange[0]
        self._known.update((id(t), t) for t in made)  # kept, so that ids are not another's
        return output

    def refuse(self, output: Any) -> None:
        """Refuse what was found.

        Raises:
            ValueError: it names the place.
        """
        if self._found is None:
            strange = [leaf for leaf in _leaves(_tensors(output)) if self._is_strange(leaf)]
            given = set(map(id, _leaves(self._given))) if strange else set()
            self._found = next((leaf for leaf in strange if id(leaf) not in given), None)
        if self._found is None:
            return
        shape, registered = tuple(self._found.shape), dict(self._original.named_parameters())
        names = [repr(name) for name, parameter in registered.items() if parameter is self._found]
        what = f"parameter {names[0]}, which it reads by" if names else "a tensor that is not registered, from"
        raise ValueError(
            f"`functional(module)`: the forward uses {what} {where_is(self._found, self._module)}, of shape {shape},"
            f" which requires a gradient: it would keep its value whatever `params` say. "
            + (
                f"Read it as the attribute {names[0]} of the module."
                if names
                else "Register it (an `nn.Parameter` as an attribute, `nn.ParameterList`, `nn.ModuleList`), give it as"
                " an input of the forward, or `.detach()` it if it is a constant."
            )
        )

    def _is_strange(self, tensor: Tensor) -> bool:
        return tensor.requires_grad and tensor.is_leaf and id(tensor) not in self._known


def _may_depend(made: Tensor) -> bool:
    """Whether an output may depend on an argument that requires a gradient: under vmap there is no telling."""
    return made.requires_grad or (is_batched(made) and (made.is_floating_point() or made.is_complex()))


def _leaves(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The leaves of their graphs."""
    for tensor in tensors:
        for node in ancestors(tensor.grad_fn):
            if (leaf := getattr(node, "variable", None)) is not None:
                yield leaf


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, list | tuple | dict):
        for part in nested.values() if isinstance(nested, dict) else nested:
            yield from _tensors(part)
