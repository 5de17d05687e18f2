"""The best iterate of a run, kept as it goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

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
        """Plain data, which `sound_best` reads."""
        return {"x": self.x, "y": self.y, "record": self.record.as_dict(), "counts": self.counts}


@final
class Keeper:
    """The best so far; see `Best` for what that means.

    Args:
        compares: whether values of different steps are of one function.
        by_norm: whether it is the measure of stationarity that is compared, and not the value.
    """

    def __init__(self, compares: bool, by_norm: bool = False) -> None:
        self.compares, self.by_norm = compares, by_norm
        self.best: Candidate | None = None

    def see(self, candidate: Candidate) -> None:
        """Take it if it is better than the one before."""
        best = self.best
        if best is None:
            self.best = candidate
        elif candidate.counts:
            first_or_latest = not best.counts or not self.compares
            new, old = candidate.record, best.record
            if first_or_latest or (new.grad_norm <= old.grad_norm if self.by_norm else new.value <= old.value):
                self.best = candidate

    def told(self, x: Structure, y: Structure) -> Best:
        """In the user's structures."""
        assert self.best is not None
        at, record = self.best, self.best.record
        return Best(
            record.step, x.unravel(at.x.clone()), y.unravel(at.y.clone()), record.value, record.grad_norm, self.compares
        )
