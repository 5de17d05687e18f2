"""What an outer run leaves: a record a step, and where it ended."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, final

from bilevel._estimate import Estimate
from bilevel._result import Stats, Status
from bilevel._tree import Tree


@final
@dataclass(frozen=True)
class Record:
    """One outer step.

    Attributes:
        step: which.
        value: Phi at the iterate, as the inner solution found it.
        grad_norm: |h|; with a constraint |x - P(x - h)|; plus the error bound, where one was asked for. Of an algorithm
            with another measure of stationarity, that measure: what `tol` is compared with.
        status: the name of the estimate's status.
        stats: the oracle calls of this step: those since the record before.
        seconds: their wall-clock time.
    """

    step: int
    value: float
    grad_norm: float
    status: str
    stats: Stats
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The record as plain data."""
        return asdict(self)

    @staticmethod
    def from_dict(content: dict[str, Any]) -> Record:
        """The inverse of :meth:`as_dict`."""
        return Record(**{**content, "stats": Stats(**content["stats"])})


@final
@dataclass(frozen=True, eq=False)
class Solution:
    """Where an outer run ended.

    Attributes:
        x: the last outer iterate: the structure of x0.
        y: the inner solution there, or the inner iterate: the structure of y0 (stacked in task mode).
        value: Phi(x).
        status: why the run stopped, or the worst status of an estimate on the way.
        message: what to do about it; empty on success.
        stats: the oracle calls of the whole run.
        history: one record a step; the last is of x itself.
        estimate: the hypergradient at x, or the direction that the algorithm has for it.
    """

    x: Tree = field(repr=False)
    y: Tree = field(repr=False)
    value: float
    status: Status
    message: str = field(repr=False)
    stats: Stats
    history: tuple[Record, ...] = field(repr=False)
    estimate: Estimate = field(repr=False)
