"""What is known of a problem so far, while it is checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from bilevel.diagnostics.verdict import Outcome, Verdict


@final
@dataclass(frozen=True, eq=False)
class Findings:
    """What the tests behind `check` found so far; each is a function that returns this with its own findings added.

    Attributes:
        y: the inner solution as far as it is known; the start until it is looked for.
        constrained: whether y is constrained.
        verdicts: in the order of the tests.
        wrong: "values" where f or g do not run or are not finite; or which derivatives are not those of the values:
            "f in x", "f in y", "g in x", "g in y", or "Phi" that of Phi by derivatives of the inner problem.
        deterministic: whether f and g give the same value twice.
        smooth: whether Taylor remainders vanish like t^2.
        second_order: whether torch has the second derivatives of g.
        solvable: whether the inner solver succeeds.
        definite: whether the inner Hessian at y is positive definite.
        kinked: whether g has a kink at y, where its derivatives say nothing of how y moves.
        no_condition: why there is no optimality condition to differentiate, where that is seen on the way only.
        dependence: how y depends on x, as in `Check`; empty while it is not known.
        detached: whether grad_y g changes with x, but autograd does not see it.
    """

    y: Tensor
    constrained: bool
    verdicts: tuple[Verdict, ...] = ()
    wrong: frozenset[str] = frozenset()
    deterministic: bool = True
    smooth: bool = True
    second_order: bool = True
    solvable: bool = True
    definite: bool = True
    kinked: bool = False
    no_condition: str = ""
    dependence: str = ""
    detached: bool = False

    def saying(self, name: str, good: bool | None, found: str, remedy: str = "") -> Findings:
        """With one verdict more; `good` is None for a note, and what is good needs no remedy."""
        outcome = {True: Outcome.passed, None: Outcome.warning, False: Outcome.failed}[good]
        return replace(self, verdicts=(*self.verdicts, Verdict(name, outcome, found, "" if good else remedy)))
