"""The best iterate of a run, kept as it goes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor

from bilevel._result import Status
from bilevel._tree import Structure
from bilevel.outer.solution import Best, Record


@final
@dataclass(frozen=True, eq=False)
class Candidate:
    """An iterate that may be the best.

    Attributes:
        x: `(p,)`.
        y: `(*tasks, q)`.
        record: its record.
        counts: whether its estimate succeeded, in the constraint.
    """

    x: Tensor
    y: Tensor
    record: Record
    counts: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain data, which `sound_candidate` reads."""
        return {"x": self.x, "y": self.y, "record": self.record.as_dict(), "counts": self.counts}


@final
@dataclass(frozen=True, eq=False)
class Kept:
    """What is kept of a run so far.

    Attributes:
        best: the best iterate; None: there is none yet.
        least: the one of the least measure of stationarity, which is the best of a run that is lost; None: there is
            none yet, or values alone decide.
    """

    best: Candidate | None = None
    least: Candidate | None = None


@final
class Keeper:
    """The best so far; see `Best` for what that means.

    Where values are not compared, the best is the latest iterate whose estimate succeeded: of a run that went well the
    one that came furthest, and of one that ran away the last that was a number, wherever that is. So the iterate of the
    least measure is kept beside it, for that end alone. On its way a run is not judged by the measure: at a start with
    v = 0 it may be small though x is nowhere, and that of a batch, or of coins, is luck.

    Cost: an x and a y are held beside those of the run.

    Args:
        compares: whether values of different steps are of one function.
        by_norm: whether it is the measure of stationarity that is compared, and not the value.
    """

    def __init__(self, compares: bool, by_norm: bool = False) -> None:
        self.compares, self.by_norm = compares, by_norm
        self.kept = Kept()

    def see(self, candidate: Candidate) -> None:
        """Take it if it is better than the one before."""
        best, least = self.kept.best, self.kept.least
        if self._is_best(candidate):
            best = candidate
        if self._is_least(candidate):  # a copy, so that as much is held whether it is the latest or not
            same = self.compares and best is candidate
            least = candidate if same else replace(candidate, x=candidate.x.clone(), y=candidate.y.clone())
        self.kept = Kept(best, least)

    def _is_best(self, candidate: Candidate) -> bool:
        best, new = self.kept.best, candidate.record
        if best is None or not candidate.counts:
            return best is None
        if not best.counts or not self.compares:  # the first, or the latest
            return True
        return new.grad_norm <= best.record.grad_norm if self.by_norm else new.value <= best.record.value

    def _is_least(self, candidate: Candidate) -> bool:
        new, least = candidate.record, self.kept.least
        if (self.compares and not self.by_norm) or not new.status.ok or not math.isfinite(new.grad_norm):
            return False
        return least is None or new.grad_norm <= least.record.grad_norm

    def told(self, x: Structure, y: Structure, ended: Status) -> Best:
        """In the user's structures, for a run that has ended so."""
        assert self.kept.best is not None
        least = self.kept.least if ended.lost else None
        at = least or self.kept.best
        record, compared = at.record, self.compares or least is not None
        return Best(
            record.step, x.unravel(at.x.clone()), y.unravel(at.y.clone()), record.value, record.grad_norm, compared
        )
