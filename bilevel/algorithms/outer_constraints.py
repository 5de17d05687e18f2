"""Constraints on x and on (x, y*(x)): their values, and what a run knows of them at a point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._flat import FlatProblem
from bilevel._numerics.misfits import called
from bilevel._tree import Tree, tree_leaves
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.portable.pickling import AbstractPortable


@final
@dataclass(frozen=True)
class OuterConstraints(AbstractPortable):
    """c(x, y*(x)) <= 0 and e(x, y*(x)) = 0 at a point, with multipliers: what makes it a solution, or not.

    Attributes:
        violation: max(c, |e|, 0) over all entries.
        complementarity: max_i |min(-c_i, lambda_i)|, which is at least the violation of the inequalities.
        weight: of the augmented Lagrangian there; 0: before it has one.
        inequalities: lambda >= 0, one for each entry of c in order (with tasks those of task 0, then of task 1, ...).
        equalities: nu, likewise.

    Example:
        >>> OuterConstraints(0.0, 0.0, 10.0, (2.0,), ()).inequalities
        (2.0,)
    """

    violation: float
    complementarity: float
    weight: float
    inequalities: tuple[float, ...]
    equalities: tuple[float, ...]

    def __post_init__(self) -> None:
        demand_types(self)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {**vars(self), "inequalities": [*self.inequalities], "equalities": [*self.equalities]}

    @staticmethod
    @checked("OuterConstraints.from_dict")
    def from_dict(content: dict[str, Any]) -> OuterConstraints:
        """The inverse of :meth:`as_dict`.

        Raises:
            ValueError: if it is no such data.
        """
        try:
            violation, complementarity, weight = (float(content[name]) for name in _NUMBERS)
            inequalities, equalities = (tuple(map(float, content[name])) for name in _VECTORS)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"`OuterConstraints.from_dict(content=...)` must be what `as_dict` made. Got {error!r:.200}."
            ) from error
        return OuterConstraints(violation, complementarity, weight, inequalities, equalities)


_NUMBERS, _VECTORS = ("violation", "complementarity", "weight"), ("inequalities", "equalities")


def outer_values(problem: FlatProblem, function: Callable[..., Tree] | None, name: str, x: Tensor, y: Tensor) -> Tensor:
    """The entries of a constraint at x `(p,)` and y `(*tasks, q)`: `(*tasks, k)`, without a graph."""
    if function is None:
        return x.new_zeros(*y.shape[:-1], 0)
    given = function
    with torch.no_grad():
        return problem.map(lambda x, y, *data: entries(given, name, x, problem.y.unravel(y), *data), "f", x, y)


def entries(function: Callable[..., Tree], name: str, x: Tree, y: Tree, *data: Any) -> Tensor:
    """What a constraint says, a structure of tensors, as one vector.

    Raises:
        TypeError: if it holds anything else.
    """
    try:
        values = called(f"{name}(x, y, data)", function, x, y, *data)
    except Exception as error:
        error.add_note(f"It is the function of `minimize({name}=...)`.")
        raise
    leaves = tree_leaves(values)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.is_complex():
            got = f"a tensor of {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"`minimize({name}=...)` must return real tensors. Got {got}.")
    return torch.cat([leaf.reshape(-1) for leaf in leaves]) if len(leaves) != 1 else leaves[0].reshape(-1)
