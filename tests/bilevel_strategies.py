"""The strategies of the testing kit, by the names that the tests use."""

from bilevel.testing.logistic import Logistic as Logistic
from bilevel.testing.strategies import (
    gaussian as normal,
    logistics as logistic,
    quadratics as families,
    smooth_problems as smooth_problems,
    structures as nestings,
)

__all__ = ["Logistic", "families", "logistic", "nestings", "normal", "smooth_problems"]
