"""The cheapest estimator that is accurate enough on the problem at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._tree import Tree
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, demand_ranges
from bilevel.bounds.beforehand import Beforehand
from bilevel.bounds.bound import Bound
from bilevel.certificates.certificate import Constants
from bilevel.portable.pickling import AbstractPortable
from bilevel.requirements.properties import Property


@final
@dataclass(frozen=True)
class Auto(AbstractPortable):
    """A wish instead of an estimator: the cheapest one whose error meets a target on this problem.

    Give it wherever an estimator goes; the string "auto" is `Auto(relative_error=0.01)`. Where the problem is first
    met, each estimator that applies is tried at budgets of oracle calls that double until its error meets the target --
    its certificate where constants are given, else its distance to an accurate reference -- and the one that spent the
    fewest gradients and products is taken for the rest of the run. `Estimate.note` says which and why.

    The reference has to agree with a difference of Phi along a random direction, so that estimators are not called
    accurate for sharing what they do not see. Where it does not, as where g has a kink at y*, central differences of
    Phi are taken.

    Cost: at most a few times the cost of the estimators' own convergence, once.

    Args:
        relative_error: the target relative to |h|.
        target_error: the target itself; with both, the larger counts.
        constants: what is known of f and g, or a function of x that tells; None: errors are measured, not certified.
        compile: whether an implicit estimator that is chosen may have `CompiledProducts`. It then has them where the
            graph of grad_y g says that they are faster: where its tensors are so small that calling operations is what
            a product costs. That is a rule fitted to measurements (the page on compiled steps), and nothing is timed.
            Making the program takes a minute, which is why it is asked for.

    Raises:
        ValueError: if both targets are 0 or one is negative; where it is used, if there is nothing to measure errors
            against, as where Phi has a kink at x.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem, hypergradient
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square().sum(), lambda x, y: (y - x).square().sum()
        ... )
        >>> x = torch.ones(2, dtype=torch.float64)
        >>> hypergradient(problem, x, torch.zeros_like(x), estimator="auto").note[:6]
        'chosen'
    """

    relative_error: float = 0.01
    target_error: float = 0.0
    constants: Constants | Callable[[Tree], Constants] | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, relative_error=AT_LEAST_0, target_error=AT_LEAST_0)
        if not (self.relative_error or self.target_error):
            raise ValueError("`Auto(relative_error=..., target_error=...)` need one of them positive. Got 0 twice.")


@final
@dataclass(frozen=True)
class Chosen(AbstractEstimator):
    """An estimator with the reason why it was chosen."""

    estimator: AbstractEstimator
    why: str

    @property
    def requires(self) -> frozenset[Property]:
        return self.estimator.requires

    @property
    def takes_encoding(self) -> bool:
        return self.estimator.takes_encoding

    @property
    def forgets_start(self) -> bool:
        return self.estimator.forgets_start

    @property
    def online(self) -> bool:
        return self.estimator.online

    @property
    def accurate(self) -> bool:
        return self.estimator.accurate

    def with_seed(self, seed: int) -> Chosen | None:
        seeded = self.estimator.with_seed(seed)
        return None if seeded is None else replace(self, estimator=seeded)

    def certified(
        self,
        target_error: float | None,
        relative_error: float | None,
        constants: Constants | Callable[[Tree], Constants] | None,
    ) -> Chosen | None:
        certified = self.estimator.certified(target_error, relative_error, constants)
        return None if certified is None else replace(self, estimator=certified)

    def error_bound(self, about: Beforehand) -> Bound:
        return self.estimator.error_bound(about)

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        return replace(self.estimator.estimate(problem, x, start), note=self.why)
