"""The first call of a module that may be no function: what it reads, what it changes, whether it repeats itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from bilevel._tree import tree_leaves, tree_map
from bilevel.modules.attributes import attributes, trace
from bilevel.modules.foreign import Foreign
from bilevel.modules.module_call import Slots

Call: TypeAlias = tuple[Mapping[str, Tensor], tuple[Any, ...], dict[str, Any]]


@final
@dataclass(frozen=True)
class Examined:
    """What the first call of a form was found to do.

    Attributes:
        mutable: plain attributes whose value it changes in place, by layer and name.
        writes_inputs: whether it writes to its inputs.
    """

    mutable: tuple[tuple[str, str], ...]
    writes_inputs: bool


def examine(original: nn.Module, slots: Slots, run: Callable[[Slots, Call], Any], call: Call) -> Examined:
    """One evaluation at copies of the arguments, in a working copy that is not used again.

    Raises:
        ValueError: if the forward uses a parameter that is not given, or writes to one that is.
    """
    constants = [id(t) for t in (*original.parameters(), *original.buffers())]
    parts = dict(slots.module.named_modules())
    seen = [*map(id, parts.values()), *constants]
    held = {(name, key): value for name, part in parts.items() for key, value in attributes(part).items()}
    before = {place: trace(value, seen) for place, value in held.items()}
    params, inputs, keywords = cloned(call)
    marks = _versions(params), _versions((inputs, keywords))
    with torch.enable_grad(), Foreign(slots.module, original, (params, inputs, keywords)) as foreign:
        output = run(slots, (params, inputs, keywords))
    foreign.refuse(output)
    written = [name for name, old, new in zip(params, marks[0], _versions(params), strict=True) if old != new]
    if written:
        raise ValueError(
            f"`functional(module)`: the forward writes to parameter {written[0]!r}, and so to the caller's tensors"
            f" (`embedding(max_norm=...)` does). Compute a new tensor from it instead."
        )
    mutable = tuple(place for place, value in held.items() if trace(value, seen) != before[place])
    return Examined(mutable, _versions((inputs, keywords)) != marks[1])


def demand_repeatable(slots: tuple[Slots, Slots], run: Callable[[Slots, Call], Any], call: Call) -> None:
    """Two evaluations, which are to be equal up to rounding. Under vmap they cannot be compared, and pass.

    Raises:
        ValueError: if they differ.
    """
    with contextlib.suppress(RuntimeError), torch.no_grad():
        first, second = (tree_leaves(run(each, cloned(call))) for each in slots)
        if not all(map(_equal, first, second)):
            raise ValueError(
                "`functional(module)`: two calls with the same arguments return different values. The forward depends"
                " on something outside of the module that changes: a variable of a class or of a module of Python, a"
                " closure, the random numbers of Python or NumPy. Keep it in an attribute or in a buffer, or give it as"
                " an input; draw random numbers by torch."
            )


def cloned(call: Any) -> Any:
    """The same arguments in new tensors."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, call)


def _versions(tree: Any) -> list[int]:
    return [t._version for t in tree_leaves(tree) if isinstance(t, Tensor) and not t.is_inference()]


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    rounding = 1e3 * torch.finfo(a.dtype).eps
    return a.shape == b.shape and torch.allclose(a, b, rtol=rounding, atol=rounding, equal_nan=True)
