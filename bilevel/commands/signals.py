"""Signals that ask a command to end: the first one lets it keep what it has, the second ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, final

_LOCKS = "bilevel.outer.lock"  # which loads torch, and is not imported for a command that needs none
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is unknown on Windows


@final
class Received:
    """Which signal has arrived: `number`, None before there is one; and what was `before` there to handle it."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.before: dict[int, Any] = {}
        self.over = False  # what comes now has nothing to interrupt
        self._process = os.getpid()

    def handle(self, number: int, _: FrameType | None) -> None:
        """Raise `KeyboardInterrupt`; the second time, leave by the way that nothing stops.

        Raises:
            KeyboardInterrupt: the first time.
        """
        if os.getpid() != self._process:  # a worker that was forked: it has nothing to keep
            signal.signal(number, self.before[number])
            os.kill(os.getpid(), number)
            return
        if self.over:
            return
        if self.number is not None:
            if _LOCKS in sys.modules:  # else no lock was ever held
                sys.modules[_LOCKS].abandon()
            os._exit(128 + number)
        self.number = number
        raise KeyboardInterrupt

    @property
    def code(self) -> int:
        """The exit code of what it ended; that of Ctrl-C where `KeyboardInterrupt` was raised without a signal."""
        return 128 + (signal.SIGINT if self.number is None else self.number)


@contextlib.contextmanager
def received() -> Iterator[Received]:
    """Turn SIGINT, SIGTERM and SIGHUP into `KeyboardInterrupt`.

    Those that are ignored, as SIGHUP under `nohup`, stay ignored. Outside the main thread nothing is changed: Python
    delivers no signals there. The handlers of before come back at the end.
    """
    found = Received()
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                found.before[number] = signal.signal(number, found.handle)
    try:
        yield found
    finally:
        found.over = True
        for number, handler in found.before.items():
            signal.signal(number, handler)
