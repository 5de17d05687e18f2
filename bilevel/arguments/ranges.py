"""The ranges of numbers: declared once for an argument, and refused in the same words everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor


@final
@dataclass(frozen=True)
class Range:
    """The numbers t with least <= t < below, or least < t < below; NaN is in none, and infinity only where it is said.

    Attributes:
        least: the lower end.
        below: the upper end, which is not in it.
        open: whether the lower end is not in it either.
        infinite: whether infinity is in it as well.
        closed: whether the upper end is in it.

    Example:
        >>> (
        ...     Range(below=1.0).refuses(1.0),
        ...     Range(open=True).refuses(float("nan")),
        ...     Range().refuses(0),
        ... )
        ('below 1', 'positive and finite', '')
    """

    least: float = 0.0
    below: float = math.inf
    open: bool = False
    infinite: bool = False
    closed: bool = False

    def refuses(self, number: float) -> str:
        """What the number would have to be, in words; empty if it is."""
        if self.infinite and number == math.inf:
            return ""
        if self.open and not (self.least < number and self._under(number)):
            end = " and finite" if self.below == math.inf and not self.infinite else ""
            upper = "" if self.below == math.inf else f" and {self._upper}"
            return ("positive" if self.least == 0 else f"above {self.least:g}") + end + upper
        if not number >= self.least:
            return "finite" if self.least == -math.inf else f"at least {self.least:g}"
        if not self._under(number):
            return "finite" if self.below == math.inf else self._upper
        return ""

    def refuses_entries(self, entries: Tensor) -> str:
        """The same of a tensor."""
        if entries.device.type == "meta" or not entries.is_floating_point():
            return "a number, or a tensor of floating point numbers"
        return "" if bool(self.holds(entries).all()) else self.refuses(math.nan)

    def holds(self, entries: Tensor) -> Tensor:
        """Which entries of a tensor are in it."""
        upper = entries <= self.below if self.closed or self.infinite else entries < self.below
        return upper & (entries > self.least if self.open else entries >= self.least)

    def _under(self, number: float) -> bool:
        return number <= self.below if self.closed else number < self.below

    @property
    def _upper(self) -> str:
        return f"at most {self.below:g}" if self.closed else f"below {self.below:g}"


AT_LEAST_0, AT_LEAST_1, POSITIVE = Range(), Range(least=1.0), Range(open=True)
BELOW_1 = Range(below=1.0)  # a relative tolerance of 1 is met by zero
WEIGHT = Range(open=True, below=1.0, closed=True)
SHARE, BETWEEN_0_AND_1 = Range(below=1.0, closed=True), Range(below=1.0, open=True)
FINITE = Range(least=-math.inf)
NUMBERS = Range(least=-math.inf, infinite=True)  # what is one, infinite or not
SIZE = Range(least=1.0, below=2.0**31)  # of what is held in memory
COUNT = Range(below=2.0**31)  # the same, and there may be none
SEED = Range(least=-(2.0**63), below=2.0**63)  # 64 bits


def demand_range(call: str, name: str, value: Any, allowed: Range, hint: str = "") -> None:
    """Refuse a number out of range, a tensor with such an entry, and a list or tuple with such a number.

    What is no number is for the type of the argument to allow.

    Raises:
        ValueError: naming the argument, what is required and what arrived.

    Example:
        >>> demand_range("CG", "rtol", float("inf"), BELOW_1)
        Traceback (most recent call last):
        ValueError: `CG(rtol=...)` must be below 1. Got inf.
    """
    wrong: Any = value
    if isinstance(value, float | int):
        why, place = allowed.refuses(value), ""
    elif isinstance(value, Tensor):
        why, place = allowed.refuses_entries(value), "in every entry"
    elif isinstance(value, list | tuple):
        wrong = next((part for part in value if isinstance(part, float | int) and allowed.refuses(part)), None)
        why, place = "" if wrong is None else allowed.refuses(wrong), "in every entry"
    else:
        return
    if why:
        from bilevel.arguments.words import got  # which are read where something is wrong only

        long = isinstance(wrong, int) and wrong.bit_length() > 63
        text = got(wrong) if isinstance(wrong, Tensor) or (long and wrong is value) else f"{wrong}"
        raise ValueError(f"`{call}({name}=...)` must be {why}{place and ' '}{place}. Got {text}.{hint and ' '}{hint}")


def demand_ranges(owner: Any, hints: Mapping[str, str] | None = None, **allowed: Range) -> None:
    """Refuse a dataclass with a field out of its range; for its `__post_init__`, after `demand_types`.

    Raises:
        ValueError: naming the argument, what is required and what arrived.
    """
    for name, range_ in allowed.items():
        demand_range(type(owner).__name__, name, getattr(owner, name), range_, (hints or {}).get(name, ""))


def demand_step(call: str, step: float | Tensor | None) -> None:
    """Refuse a step length that is no number, is not positive and finite, or a tensor whose entries are not numbers.

    A tensor has a step for each entry. Those that are learned may be zero or negative on the way: what they lead to is
    seen where they lead.

    Raises:
        TypeError: if it is neither a number nor a tensor.
        ValueError: if it is out of range, or a tensor of integers.
    """
    from bilevel.arguments.fits import demand_type

    demand_type(call, "step", step, float | Tensor | None)
    if not isinstance(step, Tensor):
        demand_range(call, "step", step, POSITIVE)
        return
    if not step.is_floating_point():
        raise ValueError(f"`{call}(step=...)` must be a tensor of floating point numbers. Got one of {step.dtype}.")
    try:
        finite = bool(step.detach().isfinite().all())
    except RuntimeError:  # one that stands for many, or for none yet: inside `torch.vmap`, or on the meta device
        return
    if not finite:
        raise ValueError(f"`{call}(step=...)` must be finite. Got a tensor with NaN or Inf.")
