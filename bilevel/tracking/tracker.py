"""What a tracker is told, and when."""

from __future__ import annotations

import math
from abc import abstractmethod
from types import TracebackType
from typing import Self

from bilevel._estimate import Estimate
from bilevel.arguments.fits import demand_type
from bilevel.outer.solution import Record
from bilevel.outer.watcher import AbstractWatcher


class AbstractTracker(AbstractWatcher):
    """A callback of `minimize` that hands the numbers of each record on; it never ends a run.

    Numbers are value, grad_norm, seconds, failed (0 or 1), and the oracle calls of the step as calls/hvps, ...; those
    that are not finite are left out, as trackers draw them as zero or refuse them. A rejected trial point of a line
    search is no step of the run, and is not told.

    Use it as a context, or call `close`: what is open until then may not be written.
    """

    @abstractmethod
    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Hand on the numbers of a step."""

    @abstractmethod
    def settings(self, settings: dict[str, str | int | float | bool]) -> None:
        """Hand on what the run was begun with; before its first step."""

    @abstractmethod
    def flush(self) -> None:
        """Have what was handed on where it belongs."""

    @abstractmethod
    def close(self) -> None:
        """Have everything there, and end."""

    def __call__(self, told: Record, estimate: Estimate) -> None:
        if not told.rejected:
            self.log(told.step, numbers_of(told))

    def before_save(self) -> None:
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def numbers_of(record: Record) -> dict[str, float]:
    """The numbers of a record that are finite.

    Example:
        >>> from bilevel import Stats, Status
        >>> numbers_of(Record(3, 1.5, float("nan"), Status.successful, Stats(hvps=2), 0.5))
        {'value': 1.5, 'seconds': 0.5, 'failed': 0.0, 'calls/hvps': 2.0}
    """
    demand_type("numbers_of", "record", record, Record)
    found = {"value": record.value, "grad_norm": record.grad_norm, "seconds": record.seconds}
    found["failed"] = 0.0 if record.status.ok else 1.0
    found |= {f"calls/{name}": float(count) for name, count in record.stats.as_dict().items() if count}
    return {name: number for name, number in found.items() if math.isfinite(number)}
