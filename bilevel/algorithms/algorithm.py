"""What a whole bilevel algorithm is: a state, an evaluation at it, and a step."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar, final

from torch import Tensor

from bilevel._estimate import AbstractRequiring, FlatEstimate
from bilevel._optimizer import AbstractOptimizer
from bilevel._result import Status
from bilevel.algorithms.oracle import Draws, Oracle
from bilevel.algorithms.outer_constraints import OuterConstraints
from bilevel.arguments.fits import demand_types
from bilevel.ranks.ranks import Ranks

S = TypeVar("S")
RowStep: TypeAlias = float | Tensor | AbstractOptimizer  # a tensor `(rows,)` has one for each of several runs at once


@final
@dataclass(frozen=True, eq=False)
class Evaluated:
    """What an algorithm finds at its state.

    Attributes:
        estimate: at the current x: the direction that x moves along as `grad`, the value of f as `value`, the inner
            iterate `y` (and `v`), and how each part ended. A part that is not finite has the status `nonfinite`.
        kept: whatever the step needs besides; it does not outlive the step, and is not saved.
        back: where a line search goes back to from this x, as a state; None: x is as good as those before. A run does
            not end at a point that is gone back from, neither for a tolerance nor for an estimate that failed there.
        ended: why the algorithm goes no further of itself; None: it does.
        tol: at which stationarity it has arrived where no tolerance is asked for; None: it has none of its own.
        outer: what is known of constraints on x and y*(x), where there are any: it is recorded.
    """

    estimate: FlatEstimate
    kept: Any = None
    back: Any = None
    ended: Status | None = None
    tol: float | None = None
    outer: OuterConstraints | None = None

    def __post_init__(self) -> None:
        demand_types(self)


class AbstractAlgorithm(AbstractRequiring, Generic[S]):
    """A bilevel algorithm: from the state s_k, an evaluation e_k at x_k, and the step s_{k+1} from both.

    `minimize` evaluates `max_steps` + 1 times, the last time at the x that it returns, and steps in between:

        s_0 = init(x0, y0);   e_k = evaluate(s_k);   stop, or s_{k+1} = step(s_k, e_k)

    An algorithm is a final frozen value: its settings are fields, everything that changes is in the state. A state is
    any frozen structure (dataclass, named tuple, tuple, dict) of tensors, numbers, texts and None; what a checkpoint
    holds is its state, so that its evaluations and steps must be functions of the state and the oracle alone, without
    hidden random numbers. Nested dataclasses are read back where `init` has them; what is None there may become a
    tensor.

    No method modifies a tensor of a state, but for one liberty: rows of a large table may be written in place where
    writing them again changes nothing, as a step that is interrupted is taken again from the same state.

    What it requires of the inner problem it declares as estimators do, `requires`; one that says nothing is refused
    wherever y is not the unconstrained minimizer of a smooth g.

    Oracle calls, wherever they are made, count for the record that is written next: that of e_k has those of `step`
    before it. Batches are drawn from the oracle, as many at a step as `draws` declares.
    """

    @property
    def draws(self) -> Draws:
        """How many batches of f and of g it draws at a step."""
        return Draws()

    @property
    def values_are_phi(self) -> bool:
        """Whether the values of its evaluations are those of Phi at x, and not of f at an inner iterate on the way.

        Where the data are fixed too, the best iterate is that of the lowest value; for one that says nothing it is the
        last, or, where the run is lost, that of the least measure of stationarity: see `bilevel.outer.solution.Best`.
        """
        return False

    @property
    def best_by_measure(self) -> bool:
        """Whether, on fixed data, the best iterate is that of the least measure of stationarity. No, unless said."""
        return False

    @property
    def sees_everything(self) -> bool:
        """Whether its measure of stationarity, on data that are the same at every step, is one of all of them.

        Of one that asks some parts of the data only, the luckiest would end a run: `tol` is refused. Yes, unless said.
        """
        return True

    @abc.abstractmethod
    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> S:
        """The state before the first step, at x `(p,)` and y `(q,)`, one task's; x may have to be projected."""

    @abc.abstractmethod
    def evaluate(self, oracle: Oracle, state: S) -> Evaluated:
        """What there is to know at the current x."""

    @abc.abstractmethod
    def step(self, oracle: Oracle, state: S, found: Evaluated) -> S:
        """The state after a step."""

    def beside(self, inner_step: RowStep, outer_step: RowStep) -> AbstractAlgorithm[S] | None:
        """The same for several x side by side, each with steps of its own: every tensor of its state has one axis more.

        Args:
            inner_step: of y `(rows,)`; where it is stepped by optimizers, one that steps each row by its own.
            outer_step: the same of x.

        Returns:
            None, unless said: its runs are made one after the other.
        """
        return None

    def of_seeds(self, seeds: tuple[int, ...]) -> AbstractAlgorithm[S] | None:
        """What `beside` has given, with coins of its own for each row: what is decided by a seed is decided by its.

        Asked of algorithms that have a `seed` themselves, beside that of the order of the data.

        Returns:
            None, unless said: runs of different seeds are made one after the other.
        """
        return None

    @abc.abstractmethod
    def stationarity(self, oracle: Oracle, state: S, found: Evaluated) -> Tensor:
        """What `tol` is compared with: `()`; zero where the algorithm has arrived, and only there."""

    def on_everything(self, oracle: Oracle, state: S, found: Evaluated) -> FlatEstimate | None:
        """An estimate on all the data, `oracle.whole()`, where the algorithm has one of its own.

        In a run on batches that is what is recorded, now and then. None, unless said: then it is f, the hypergradient
        and the residuals at the inner and the linear iterate of `found`.
        """
        return None

    @property
    def takes_shards(self) -> bool:
        """Whether y may be shared out over ranks, each of which has a part of its entries and of all that is like y.

        So it is where nothing but first derivatives and operations entry by entry are taken of it, and norms by
        `FlatProblem.row_norms`. No, unless said.
        """
        return False

    def is_apart(self, state: S) -> bool:
        """Whether a part of a state is this rank's own, in a run over ranks. No, unless said."""
        return False

    def gathered(self, state: S, ranks: Ranks) -> S:
        """The state as one rank alone would have it, for a checkpoint; every rank takes part."""
        return state

    def of_rank(self, state: S, ranks: Ranks) -> S:
        """From such a state that of this rank."""
        return state

    @abc.abstractmethod
    def point(self, state: S) -> tuple[Tensor, Tensor]:
        """The current x `(p,)` and y `(*tasks, q)`."""
