"""Processes that have already imported everything: a fork takes a millisecond, an interpreter with torch seconds."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

LOST = 77  # the exit code of a fork that an exception left


def forked(call: Callable[[], int]) -> int:
    """Run a function in a fork of this process, which prints nothing, and exits with what it returns; its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads; those of a test runner hold nothing we use
        number = os.fork()
    if number == 0:
        code = LOST
        try:
            nothing = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(nothing, stream)
            code = call()
        finally:
            os._exit(code)
    return number


def ended(number: int) -> int:
    """The exit code of a fork; -n where signal n ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def killed_after(call: Callable[[], int], seconds: float) -> int:
    """Run a function in a fork and kill it after a time, unless it has ended by then; how it ended."""
    number, deadline = forked(call), time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(min(0.001, max(deadline - time.monotonic(), 0.0)))
    os.kill(number, signal.SIGKILL)
    return ended(number)


def wait_for(file: Path) -> None:
    """Until a file is there."""
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
