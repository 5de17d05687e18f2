"""The shapes of tensors: declared with letters for the axes that must agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

_KINDS = {"real": "floating point numbers", "integer": "integers", "number": "real numbers"}
_REAL = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


@final
@dataclass(frozen=True)
class Shape:
    """A dense tensor of numbers with these axes.

    Attributes:
        axes: a letter or number for each, such as "n d"; "..." for any, in front; one letter has one size in all
            arguments of a call. None: any axes.
        kind: what its entries are; real ones are of one dtype and device in all arguments of a call.
        finite: whether its entries must be finite.

    Example:
        >>> sizes = {}
        >>> Shape("q p").refuses(torch.ones(3, 2), sizes), Shape("q").refuses(torch.ones(2), sizes)
        ('', 'of shape (q,) = (3,)')
    """

    axes: str | None = None
    kind: Literal["real", "integer", "number"] = "real"
    finite: bool = True

    def refuses(self, value: Tensor, sizes: dict[str, Any]) -> str:
        """What the tensor would have to be, in words; empty if it is. Sizes that are not known yet are kept."""
        real = value.dtype in _REAL
        whole = not value.is_floating_point() and not value.is_complex() and value.dtype is not torch.bool
        if value.layout != torch.strided or value.is_nested or value.device.type == "meta":
            return "a dense tensor that holds numbers"
        if not ((real and self.kind != "integer") or (whole and self.kind != "real")):
            return f"a tensor of {_KINDS[self.kind]}"
        why = "" if self.axes is None else self._misfit(tuple(value.shape), sizes)
        if why:
            return why
        if real and self.finite and not _all_finite(value):
            return "finite in every entry"
        if self.kind == "real":
            for name, own in (("dtype", value.dtype), ("device", value.device)):
                if sizes.setdefault(name, own) != own:
                    return f"of the {name} of the others, {sizes[name]}"
        return ""

    def _misfit(self, shape: tuple[int, ...], sizes: dict[str, Any]) -> str:
        assert self.axes is not None
        letters = self.axes.split()
        free = letters[:1] == ["..."]
        own = letters[1:] if free else letters
        tail = shape[len(shape) - len(own) :] if len(own) <= len(shape) else ()
        fits = len(shape) == len(own) or (free and len(shape) > len(own))
        known = [sizes.get(letter, letter) if not letter.isdigit() else int(letter) for letter in own]
        if fits and all(not isinstance(a, int) or a == b for a, b in zip(known, tail, strict=True)) and _new(own, tail):
            sizes.update((letter, size) for letter, size in zip(own, tail, strict=True) if not letter.isdigit())
            return ""
        end = "," if len(own) == 1 else ""
        named, meant = (f"({', '.join(['...'] * free + list(map(str, each)))}{end})" for each in (own, known))
        return f"of shape {named}" + (f" = {meant}" if meant != named else "")


def _all_finite(value: Tensor) -> bool:
    """Whether all entries are; of a tensor that `vmap` goes over, all that it goes over."""
    whole = torch.func.debug_unwrap(value, recurse=True).detach()
    # One pass over it: a sum is finite only where all of it is, and overflows where it is not certain.
    return bool(whole.sum().isfinite()) or bool(whole.isfinite().all())


def _new(letters: list[str], sizes: tuple[int, ...]) -> bool:
    """Whether each letter has one size, and none is empty."""
    return all(sizes) and len({*zip(letters, sizes, strict=True)}) == len({*letters})


def demand_shapes(call: str, shapes: Mapping[str, Shape], given: Mapping[str, Any]) -> None:
    """Refuse tensors that are not of the declared shapes, in the order of their declaration.

    Raises:
        ValueError: naming the argument, what is required and what arrived.
    """
    sizes: dict[str, Any] = {}
    seen: list[str] = []
    for name, shape in shapes.items():
        value = given.get(name)
        why = shape.refuses(value, sizes) if isinstance(value, Tensor) else ""
        if why:
            from bilevel.arguments.words import got

            finite = ", not all of them finite" if why.startswith("finite") else ""
            others = ", ".join(f"{other} {tuple(given[other].shape)}" for other in seen)
            beside = f" beside {others}" if others else ""
            raise ValueError(f"`{call}({name}=...)` must be {why}. Got {got(value)}{finite}{beside}.")
        if isinstance(value, Tensor):
            seen.append(name)
