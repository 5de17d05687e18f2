"""What a hypergradient estimator is, and what it returns."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, final

from torch import Tensor

from bilevel._result import Report, Stats, Status
from bilevel._tree import Tree
from bilevel.arguments.fits import demand_types
from bilevel.requirements.properties import STRICTEST, Property

if TYPE_CHECKING:
    from bilevel._flat import FlatProblem
    from bilevel._linear import AbstractLinearSolver
    from bilevel.bounds.beforehand import Beforehand
    from bilevel.bounds.bound import Bound
    from bilevel.certificates.certificate import Constants


@final
@dataclass(frozen=True, eq=False)
class Start:
    """A warm start: what one estimate hands to the next.

    Attributes:
        y: where the inner solver starts: the structure of y.
        v: where the linear solver starts, or None: the structure of y.
        count: how many estimates came before; estimators that draw random numbers draw other ones at each count.
    """

    y: Tree
    v: Tree | None = None
    count: int = 0

    def __post_init__(self) -> None:
        demand_types(self)


@final
@dataclass(frozen=True, eq=False)
class Estimate:
    """A hypergradient and everything that is known about it.

    Attributes:
        grad: the estimate of grad Phi(x): the structure of x.
        value: Phi at x, as the inner solution found it.
        y: the inner solution: the structure of y (in task mode stacked along a leading axis).
        v: the solution of the linear system H v = grad_y f, where the estimator solves one.
        status: the worst status of its parts.
        reports: how each part ended (inner solver, linear solver), with its residual.
        stats: oracle counts.
        standard_error: for estimators that sample: an estimate of the root-mean-square distance |grad - E grad|.
        bias: for estimators that take differences over a radius, a step or a weight: an estimate of the systematic part
            of |grad - grad Phi|, from that and from rounding and tolerances over it; no bound. Some is measured at the
            first estimate of a run only, at the cost of further inner solves; None: not measured.
        bound: a certified bound on the error, where the estimator was asked for an accuracy.
        note: why this estimator, where it was chosen for you.
        penalized: for the penalty estimator: y_w and the weight w.
        second_level: how `error_estimate` is computed.
        x: where: the structure of x.
        warm: how `start` is made.
    """

    grad: Tree = field(repr=False)
    value: float
    y: Tree = field(repr=False)
    v: Tree | None = field(repr=False)
    status: Status
    reports: tuple[Report, ...]
    stats: Stats
    standard_error: float | None = None
    bias: float | None = None
    bound: float | None = None
    note: str = ""
    penalized: tuple[Tree, float] | None = field(default=None, repr=False)
    second_level: Callable[[], float] | None = field(default=None, repr=False)
    x: Tree = field(default=None, repr=False)
    warm: Callable[[], Start] = field(default=lambda: Start(None), repr=False)

    def __post_init__(self) -> None:
        demand_types(self)

    @cached_property
    def start(self) -> Start:
        """The warm start for the next call: `hypergradient(..., start=estimate.start)`; made when it is read."""
        return self.warm()

    @property
    def error_estimate(self) -> float:
        """An estimate of |grad - grad Phi(x)| that needs no constants; not a bound (see `certify` for one).

        The distance to the implicit gradient after one Newton correction of y, whose own error is of second order in
        |y - y*|. Computed when it is read, at the cost of two linear solves, two gradients of g and one of f, which
        `stats` does not count. NaN where the correction does not exist.
        """
        return float("nan") if self.second_level is None else self.second_level()

    @property
    def message(self) -> str:
        """The reports of the parts that failed, one sentence each; empty if none did.

        Where f or g is no function only that, as the failures of solvers follow from it.
        """
        failed = [report for report in self.reports if not report.status.ok]
        causes = [report for report in failed if report.status is Status.not_repeatable]
        return " ".join(map(str, causes or failed))


@final
@dataclass(frozen=True, eq=False)
class FlatStart:
    """A warm start in vectors: y `(*tasks, q)`, v alike or None; see `Start`."""

    y: Tensor
    v: Tensor | None = None
    count: int = 0

    def __post_init__(self) -> None:
        demand_types(self)


@final
@dataclass(frozen=True, eq=False)
class FlatEstimate:
    """An estimate in vectors: grad `(p,)`, value `()`, y `(*tasks, q)`; see `Estimate`.

    `value_error` is how far the value may be from Phi(x) to first order, which is |v'grad_y g|, where that is known:
    what a line search must not take for a change of Phi.
    """

    grad: Tensor
    value: Tensor
    y: Tensor
    reports: tuple[Report, ...]
    v: Tensor | None = None
    standard_error: float | None = None
    penalized: tuple[Tensor, float] | None = None
    bound: float | None = None
    note: str = ""
    bias: float | None = None
    value_error: float | None = None

    def __post_init__(self) -> None:
        demand_types(self)


class AbstractRequiring(abc.ABC):  # noqa: B024  (it has a declaration, and a default for it)
    """What declares what it requires of an inner problem: estimators, and whole algorithms."""

    @property
    def requires(self) -> frozenset[Property]:
        """What it requires of the inner problem: the strictest, a smooth minimization, unless it says otherwise.

        One place checks it before every estimate, so that an estimator is refused by name where its mathematics does
        not apply; and `check`, `compare` and "auto" read it.
        """
        return STRICTEST

    @property
    def solves_with(self) -> tuple[AbstractLinearSolver, ...]:
        """The linear solvers that it uses beside those among its fields; their demands are part of its own."""
        return ()


class AbstractEstimator(AbstractRequiring):
    """Estimates the hypergradient h = grad Phi(x), Phi(x) = f(x, y*(x)).

    An estimator is a frozen value that holds its solvers. It never raises for a failure to converge: that is in
    the reports. It refuses problems to which its mathematics does not apply by a ValueError that says why.
    """

    @property
    def takes_encoding(self) -> bool:
        """Whether it may be given z = encode(x) in the place of x, and the chain rule applied after.

        True for one that only forms products with derivatives of f and g; one that moves x, or states its error in x,
        must see x itself.
        """
        return False

    @property
    def forgets_start(self) -> bool:
        """Whether an estimate does not depend on where y and v start, but for the tolerances of its solvers.

        A run of estimates then starts each where the one before ended, which saves work and changes nothing. Where the
        start is part of the answer (a fixed number of steps), it begins each at y0. One that says nothing is taken to
        remember its start.
        """
        return False

    @property
    def accurate(self) -> bool:
        """Whether h is the gradient of the value that comes with it, up to the tolerances of its solvers.

        True of one that is neither biased by construction (truncated, damped, of low rank, of first order, penalized),
        nor random, nor of a fixed number of steps. Where the data do not change either, `minimize` takes `QuasiNewton`
        by default, and else `Adam`. One that says nothing is taken to be inaccurate.
        """
        return False

    def with_seed(self, seed: int) -> AbstractEstimator | None:
        """This estimator, drawing its random numbers from another seed; None: it draws none.

        One that says nothing is taken to draw none: `bilevel run --seed` then says that it has no effect.
        """
        return None

    def certified(
        self,
        target_error: float | None,
        relative_error: float | None,
        constants: Constants | Callable[[Tree], Constants] | None,
    ) -> AbstractEstimator | None:
        """This estimator with targets for its certified error, the larger of which counts; None: it certifies none.

        Its estimates have a `bound`, which is at most max(target_error, relative_error |h|) where they succeed.
        `minimize(accuracy="adaptive")` asks for it, and refuses an estimator that says nothing.

        Args:
            target_error: the target for the bound; None: there is only the other.
            relative_error: the same, relative to |h|.
            constants: what is known of f and g, or a function of x that tells; None: what the estimator itself knows.
        """
        return None

    def error_bound(self, about: Beforehand) -> Bound:
        """|estimate - h| <= total, before anything is computed, from the configuration; what `error_bound` returns.

        The functions of `bilevel.bounds` are what it is made of, with `AbstractInnerSolver.solution_bound` and
        `AbstractLinearSolver.relative_error` for the solvers.

        Raises:
            ValueError: if no bound is known for the configuration, as here, for an estimator that says nothing.
        """
        raise ValueError(
            f"no bound is known for {type(self).__name__}. Bound a computed hypergradient by `certify`, or call the"
            f" function of `bilevel.bounds` that describes it."
        )

    @abc.abstractmethod
    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        """The estimate at x `(p,)`, from a warm start; oracle calls are counted in `problem.tally`.

        Raises:
            ValueError: if the estimator does not apply to the problem.
        """
