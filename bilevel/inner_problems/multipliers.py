"""Lagrange multipliers of the constraints on y, in the user's structures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from bilevel._tree import Tree
from bilevel.arguments.checked import checked as arguments
from bilevel.arguments.fits import demand_types
from bilevel.portable.plain import plain, refused, restored
from bilevel.portable.result import AbstractResult


@final
@dataclass(frozen=True, eq=False)
class Multipliers(AbstractResult):
    """Of c(x, y) <= 0, e(x, y) = 0, A y = b, G y <= h and lower <= y <= upper at y*(x): what `Estimate.multipliers` is.

    With those of inequalities and bounds at least zero, and zero where these do not hold with equality,

        grad_y g + sum z grad_y c + sum nu grad_y e + A' alpha + G' gamma + upper - lower = 0.

    Moving the right-hand side of a constraint by t changes the least value of g by -t times its multiplier. Each is
    None where there is no such constraint. With tasks all are stacked along a leading axis. Where gradients of
    constraints that hold are dependent, these are those of many that the solver ended with.

    Attributes:
        inequalities: z, in the structure of c(x, y).
        equalities: nu, in the structure of e(x, y).
        linear_inequalities: gamma `(k,)`.
        linear_equalities: alpha `(m,)`.
        lower: in the structure of y.
        upper: in the structure of y.
    """

    inequalities: Tree = None
    equalities: Tree = None
    linear_inequalities: Tensor | None = None
    linear_equalities: Tensor | None = None
    lower: Tree = None
    upper: Tree = None

    def __post_init__(self) -> None:
        demand_types(self)

    def to_dict(self) -> dict[str, Any]:
        """The multipliers as plain data; :meth:`from_dict` is the inverse."""
        return {name: None if part is None else plain(part, name) for name, part in vars(self).items()}

    @staticmethod
    @arguments("Multipliers.from_dict")
    def from_dict(content: Mapping[str, Any]) -> Multipliers:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: if it is no such data.
        """
        with refused("Multipliers"):
            names = Multipliers.__dataclass_fields__
            return Multipliers(**{n: None if content[n] is None else restored(content[n]) for n in names})
