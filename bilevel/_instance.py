"""A problem together with everything known about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from bilevel._problem import BilevelProblem
from bilevel._tree import Tree
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.certificates.certificate import Constants
from bilevel.portable.pickling import AbstractPortable


@final
@dataclass(frozen=True, eq=False)
class Instance(AbstractPortable):
    """A bilevel problem, a point to start from, and what is known in closed form.

    Attributes:
        problem: f and g.
        x0: where the outer iteration starts.
        y0: where the inner one starts.
        description: one line.
        solution: x -> y*(x), where there is a formula (or an exact solver of its own).
        gradient: x -> grad Phi(x), where there is one.
        constants: x -> the constants of error bounds at x, valid for every y unless the problem says otherwise.
        minimizer: the outer minimizer x*, where it is known.
        metrics: (x, y) -> named numbers that tell a person how good a solution is (accuracies, errors).
        plot: (figure, x, y) -> None: draws a solution on a matplotlib figure.
        settings: defaults for a run: `estimator`, `outer`, `max_steps`, as `minimize` takes them.
    """

    problem: BilevelProblem
    x0: Tree = field(repr=False)
    y0: Tree = field(repr=False)
    description: str = ""
    solution: Callable[[Tree], Tree] | None = field(default=None, repr=False)
    gradient: Callable[[Tree], Tree] | None = field(default=None, repr=False)
    constants: Callable[[Tree], Constants] | None = field(default=None, repr=False)
    minimizer: Tree | None = field(default=None, repr=False)
    metrics: Callable[[Tree, Tree], Mapping[str, float]] | None = field(default=None, repr=False)
    plot: Callable[[Any, Tree, Tree], None] | None = field(default=None, repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        demand_types(self)

    @checked()
    def value(self, x: Tree) -> float:
        """Phi(x) = f(x, y*(x)), from the closed form of y*.

        Raises:
            ValueError: if there is none.
        """
        if self.solution is None:
            raise ValueError("`Instance.value` needs a closed form of the inner solution, and this problem has none.")
        return float(self.problem.f(x, self.solution(x)))
