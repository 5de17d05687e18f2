"""What a bound consists of, and the demands on the constants that it is computed from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from bilevel.arguments.fits import demand_types
from bilevel.certificates.certificate import Constants


@final
@dataclass(frozen=True)
class Bound:
    """|estimate - h| <= inner + linear + bias + sampling + rounding, h = grad Phi(x).

    A term that overflows is infinite, and so is the sum; what is not a number is no bound, and infinite as well.

    Attributes:
        inner: from the distance of the inner iterate to y*; zero for an exact inner solution.
        linear: from the linear system, or the derivative of the iterates: what more products or steps remove.
        bias: what neither removes: truncation, damping, a finite weight or radius.
        sampling: of random directions, in root mean square; the sum then bounds the root mean square of the error.
        rounding: of the values that are subtracted from each other.
        assumptions: what the bound rests on, in words.

    Example:
        >>> Bound(inner=0.5, bias=0.25).total
        0.75
    """

    inner: float = 0.0
    linear: float = 0.0
    bias: float = 0.0
    sampling: float = 0.0
    rounding: float = 0.0
    assumptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def terms(self) -> dict[str, float]:
        """The terms by name."""
        names = ("inner", "linear", "bias", "sampling", "rounding")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> float:
        """The sum of the terms."""
        total = sum(self.terms.values())
        return math.inf if math.isnan(total) else total

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value:.3g}" for name, value in self.terms.items() if value > 0)
        lines = [f"|estimate - h| <= {self.total:.3g}", f"  parts: {parts or 'none'}"]
        return "\n".join(lines + [f"  assumed: {assumption}" for assumption in self.assumptions])


def known(call: str, constants: Constants, *names: str, within: float = 0.0) -> list[float]:
    """The named constants as numbers, valid within this distance of y*; `L_f_minus` falls back on `L_fyy`.

    Raises:
        ValueError: if one is unknown, or they do not hold there.
    """
    if constants.local:
        raise ValueError(
            f"`{call}` needs constants that hold wherever the iterates go. Got {', '.join(sorted(constants.local))}"
            f" measured at one point. Give them by hand, or bound a computed hypergradient by `certify`."
        )
    if within > constants.radius:
        raise ValueError(
            f"`{call}` needs constants that hold within {within:.3g} of y*. Got radius={constants.radius:g}. Start"
            f" closer, or give constants that hold on a larger ball."
        )
    values = []
    for name in names:
        value: float | None = getattr(constants, name)
        if value is None and name == "L_f_minus":
            value = constants.L_fyy
        if value is None:
            raise ValueError(
                f"`{call}` needs `Constants({name}=...)`. Got None. Give an upper bound (for mu, a lower one)."
            )
        values.append(value)
    return values


def assumed(constants: Constants, *more: str) -> tuple[str, ...]:
    """What every bound rests on, and more."""
    mu = "" if constants.mu is None else f" with mu = {constants.mu:.3g}"
    where = "everywhere" if constants.radius == math.inf else f"within {constants.radius:g} of y*"
    notes = [f"g(x, .) is strongly convex{mu}, and the constants ({constants.source}) hold {where}"]
    if constants.heuristic:
        notes.append(f"{', '.join(sorted(constants.heuristic))}: estimated without a guarantee")
    if constants.confidence < 1:
        notes.append(f"the estimated constants hold with probability {constants.confidence:.3g}")
    return (*notes, *more)


def power(base: float, exponent: float) -> float:
    """Base^exponent of a factor >= 0; infinite where it overflows, which Python raises for."""
    try:
        found: float = base**exponent
    except OverflowError:
        return math.inf
    return found
