"""Several callbacks as one."""

from __future__ import annotations

from typing import final

from bilevel._estimate import Estimate
from bilevel.arguments.fits import demand_type
from bilevel.outer.records import Callback
from bilevel.outer.solution import Record
from bilevel.outer.watcher import AbstractWatcher, before_save


@final
class Several(AbstractWatcher):
    """All of the callbacks are told of each record, in order; the run ends where one of them says so.

    Example:
        >>> told = []
        >>> both = Several(lambda record, estimate: told.append("a"), lambda record, estimate: True)
        >>> both(None, None), told
        (True, ['a'])
    """

    def __init__(self, *callbacks: Callback) -> None:
        for callback in callbacks:
            demand_type("Several", "callbacks", callback, Callback)
        self._callbacks = callbacks

    def __call__(self, told: Record, estimate: Estimate) -> bool:
        return any([callback(told, estimate) for callback in self._callbacks])

    def before_save(self) -> None:
        for callback in self._callbacks:
            before_save(callback)
