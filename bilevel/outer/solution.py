"""What an outer run leaves: a record a step, where it ended, and the best that it saw."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, final

from bilevel._estimate import Estimate
from bilevel._result import Stats, Status
from bilevel._tree import Tree
from bilevel.arguments.fits import demand_types


@final
@dataclass(frozen=True)
class Record:
    """One outer step.

    Attributes:
        step: which.
        value: Phi at the iterate, as the inner solution found it.
        grad_norm: |h|; with a constraint |x - P(x - h)|; plus the error bound, where one was asked for. Of an algorithm
            with another measure of stationarity, that measure: what `tol` is compared with.
        status: the estimate's status.
        stats: the oracle calls of this step: those since the record before.
        seconds: their wall-clock time.
        rejected: whether it is a trial point that a line search went back from: if the estimate failed there, that is
            no failure of the run.
    """

    step: int
    value: float
    grad_norm: float
    status: Status
    stats: Stats
    seconds: float
    rejected: bool = False

    def __post_init__(self) -> None:
        demand_types(self)

    def as_dict(self) -> dict[str, Any]:
        """The record as plain data: the status by its name."""
        return {**asdict(self), "status": self.status.name}

    @staticmethod
    def from_dict(content: dict[str, Any]) -> Record:
        """The inverse of :meth:`as_dict`."""
        return Record(**{**content, "status": Status[content["status"]], "stats": Stats(**content["stats"])})


@final
@dataclass(frozen=True, eq=False)
class Best:
    """The best iterate that a run has seen.

    That is the one of the lowest value, the later one of equals, among those that are in the constraint and whose
    estimate succeeded; where there is none of them, the first iterate.

    Values are compared only where they are of one function Phi: the data are the same at every step, and the algorithm
    solves the inner problem at each. Those of different batches, and those of a single loop such as `SOBA`, at whose
    inner iterate f may be anything, tell nothing: there it is the last iterate whose estimate succeeded.

    Attributes:
        step: the step of its record.
        x: the iterate: the structure of x0.
        y: the inner solution there: the structure of y0.
        value: Phi(x).
        grad_norm: as in its record.
        compared: whether it was chosen by its value.
    """

    step: int
    x: Tree = field(repr=False)
    y: Tree = field(repr=False)
    value: float
    grad_norm: float
    compared: bool

    def __post_init__(self) -> None:
        demand_types(self)


@final
@dataclass(frozen=True, eq=False)
class Solution:
    """Where an outer run ended.

    Attributes:
        x: the last outer iterate: the structure of x0.
        y: the inner solution there, or the inner iterate: the structure of y0 (stacked in task mode).
        value: Phi(x).
        status: why the run stopped, or the worst status of an estimate on the way: `successful` if the tolerance was
            met, `steps_used_up` if the steps ended first and no tolerance was given, `max_steps` if one was;
            `stagnated` or `line_search_failed` if the outer method could go no further, `stopped` if the callback ended
            it.
        message: what to do about it; empty on success.
        stats: the oracle calls of the whole run.
        history: one record a step; the last is of x itself.
        estimate: the hypergradient at x, or the direction that the algorithm has for it.
        failed: whether something did not succeed that was asked for: an estimate, or the tolerance that was given. The
            outer method's own tolerance was not, and to miss it, or to go no further short of it, is no failure.
        converged: whether the tolerance was met at x: the one that was given, or the outer method's own. With
            accuracy="adaptive" that is certified.
        best: the best iterate.
    """

    x: Tree = field(repr=False)
    y: Tree = field(repr=False)
    value: float
    status: Status
    message: str = field(repr=False)
    stats: Stats
    history: tuple[Record, ...] = field(repr=False)
    estimate: Estimate = field(repr=False)
    failed: bool
    converged: bool
    best: Best

    def __post_init__(self) -> None:
        demand_types(self)
