"""What an inner problem offers and an estimator requires, as data."""

from __future__ import annotations

import enum
from typing import Any, final


class Property(enum.Enum):
    """A property of an inner problem; the value says it in words.

    A kind of inner problem declares which of the first five it offers, an estimator which of all it requires, and one
    place compares them before every estimate (`bilevel.requirements.why_not`). The last is whether the problem has an
    `init`; those between are taken for granted until they are found missing, where a derivative is formed or by
    `check`.

    Example:
        >>> Property.stationary.value
        'y solves an optimality condition F(x, y) = 0'
    """

    stationary = "y solves an optimality condition F(x, y) = 0"
    minimum = "y minimizes a function g(x, .) that can be evaluated"
    smooth = "g alone describes y: there are no constraints, no non-smooth term and no steps of the problem's own"
    valued = "the least value of the inner problem has a derivative in x"  # what is a minimum of g alone has one
    steps = "differentiable steps lead to y"
    second_derivatives = "g has second derivatives in torch"
    beyond_start = "y depends on x by more than the start of the inner iteration"
    outer_gradient = "f has the derivatives that its values have"
    start_in_x = "the start of the inner iteration depends on x"


FOUND = frozenset({Property.second_derivatives, Property.beyond_start, Property.outer_gradient})  # missing, if they are


class Feature(enum.Enum):
    """What an inner problem has beyond a smooth objective, and an inner solver must heed; its value is in words."""

    constraints = "the constraints on y"
    nonlinear_constraints = "the nonlinear constraints on y"
    many_constraints = "the constraints on y, which are known by products only"
    cones = "the cone program that the inner problem is"
    prox = "the non-smooth term of the inner problem"
    own_steps = "the steps that the inner problem consists of"
    fixed_point = "the map whose fixed point y is"


STRICTEST = frozenset(Property) - {
    Property.start_in_x,
    Property.valued,
}  # what an estimator that declares nothing requires


def implied(offers: frozenset[Property]) -> frozenset[Property]:
    """What is offered, and what follows from it: the least value of a g that is minimized alone has a derivative.

    Example:
        >>> Property.valued in implied(frozenset({Property.minimum, Property.smooth}))
        True
    """
    return offers | {Property.valued} if {Property.minimum, Property.smooth} <= offers else offers


START_ONLY = (
    "g does not depend on x, so y depends on x only through its start `init(x)`, which the implicit function theorem"
    " does not see. Use `ITD` or `ESJ`, or add a term in x to g (iMAML: a proximal term)."
)


@final
class DoesNotApply(ValueError):  # noqa: N818  (what it says is what is wrong)
    """An estimator does not apply to a problem, for a reason that is seen on the way only.

    Attributes:
        reason: a sentence or two: what the problem is, and what to use instead.
    """

    def __init__(self, reason: str) -> None:
        from bilevel.arguments.fits import demand_type

        demand_type("DoesNotApply", "reason", reason, str)
        ValueError.__init__(self, f"the estimator does not apply: {reason}")
        self.reason = reason

    def __reduce__(self) -> Any:
        return DoesNotApply, (self.reason,), self.__dict__
