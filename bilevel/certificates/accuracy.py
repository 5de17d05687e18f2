"""Certified accuracy: how accurate the inner and the linear solution have to be for a hypergradient to be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._estimate import AbstractEstimator
from bilevel._flat import FlatProblem
from bilevel._tree import Tree
from bilevel.certificates.assumptions import NEEDED
from bilevel.certificates.certificate import Constants
from bilevel.certificates.completed import with_cross, with_curvature
from bilevel.certificates.estimate_constants import estimated
from bilevel.certificates.measured import Measured

_TINY = torch.finfo(torch.float64).tiny


@final
@dataclass(frozen=True)
class Accuracy:
    """Make an error bound at most max(absolute, relative |h|).

    Args:
        constants: what is known of f and g, mu included; or a function of x, in the user's structure, that tells;
            None: estimated where they are first needed.
        absolute: the target for the bound.
        relative: the target relative to the hypergradient's norm; below 1 it certifies a descent direction.

    Raises:
        ValueError: if both targets are 0, or one is negative or not finite.

    Example:
        >>> Accuracy(Constants(mu=1.0), absolute=1e-3).target(torch.tensor(5.0))
        0.001
    """

    constants: Constants | Callable[[Tree], Constants] | None
    absolute: float = 0.0
    relative: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.absolute < math.inf and 0 <= self.relative < math.inf and self.absolute + self.relative > 0):
            raise ValueError(
                f"the targets of a `Certified` accuracy, `target_error` and `relative_error`, must be at least 0 and"
                f" finite, and one of them positive. Got {self.absolute} and {self.relative}."
            )

    def target(self, norm: Tensor) -> float:
        """What the bound must be at most, at a hypergradient of this norm."""
        return max(self.absolute, self.relative * float(norm))

    def known(self, problem: FlatProblem, x: Tensor, y: Tensor) -> Constants:
        """The constants at x; C_G is bounded from the operator at y if it is not among them, and so is L in float32.

        Raises:
            ValueError: if mu or another needed constant is unknown.
            NonfiniteError: if a product is not finite.
        """
        if self.constants is None and problem.tasks is not None:
            raise ValueError(
                "certified accuracy of a problem with tasks needs `constants=`, valid for each of them. Pass those of"
                " your formulas, or a function x -> `estimate_constants(problem, x, y, data=data)` with the y of all"
                " tasks stacked, as an estimate has it."
            )
        if self.constants is None:
            given = estimated(problem, x, y)
        elif isinstance(self.constants, Constants):
            given = self.constants
        else:
            given = self.constants(problem.x.unravel(x))
        missing = [name for name in ("mu", *NEEDED) if getattr(given, name) is None]
        if missing:
            raise ValueError(
                f"certified accuracy needs the constants {', '.join(missing)}"
                f"{', which could not be estimated' if self.constants is None else ''}. Give them in `constants=`."
            )
        known = with_cross(problem, x, y, given)[0]
        return known if y.dtype == torch.float64 else with_curvature(problem, x, y, known)[0]


def inner_tolerance(part: float, found: Measured, known: Constants) -> float:
    """The |grad_y g| at which the inner part of the bound is this: theorem A solved for it."""
    assert known.mu is not None and known.C_G is not None
    assert known.L_fxy is not None and known.M_xy is not None and known.L_fyy is not None and known.M_yy is not None
    slope = known.L_fxy + known.M_xy * found.v + known.C_G / known.mu * (known.L_fyy + known.M_yy * found.v)
    return part * known.mu / max(float(slope.max()), _TINY)


def linear_tolerance(part: float, known: Constants) -> float:
    """The |grad_y f - H v| at which the linear part of the bound is this."""
    assert known.mu is not None and known.C_G is not None
    return part * known.mu / max(known.C_G, _TINY)


RELATIVE = 0.5  # of adaptive accuracy: below 1, so that every step is certified to be along a descent direction


def adaptive(
    estimator: AbstractEstimator,
    accuracy: str,
    constants: Constants | Callable[[Tree], Constants] | None,
    tol: float | None,
) -> AbstractEstimator:
    """The estimator with its accuracy tied to the hypergradient's norm, down to what `tol` needs.

    Raises:
        ValueError: if `accuracy` is not "adaptive".
        TypeError: if the estimator does not certify its error.
    """
    if accuracy != "adaptive":
        raise ValueError(f"`minimize(accuracy=...)` must be 'fixed' or 'adaptive'. Got {accuracy!r}.")
    # The run ends at |h| + bound <= tol: a quarter of it for the bound leaves most of it to |h|.
    floor = None if tol is None else tol / 4
    certified = estimator.certified(floor, RELATIVE, constants)
    if certified is None:
        raise TypeError(
            f"`minimize(accuracy='adaptive')` needs an estimator that certifies its error. Got"
            f" {type(estimator).__name__}, which has no `certified`. Use `AID(...)` or one of the names 'aid-...'."
        )
    return certified
