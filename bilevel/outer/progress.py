"""What a person sees of a run while it goes: a bar by rich in terminals and notebooks, else a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO, TypeAlias, final

from bilevel._estimate import Estimate
from bilevel.outer.records import Callback
from bilevel.outer.solution import Record
from bilevel.outer.watcher import AbstractWatcher, before_save

Show: TypeAlias = Callable[[Record], None]
State: TypeAlias = Callable[[Record], str]
LINES = 10  # of progress where there is no terminal


@contextlib.contextmanager
def shown(max_steps: int, name: str = "", state: State | None = None) -> Iterator[Show]:
    """A function to be called with the record of each step; on stderr.

    Args:
        max_steps: how many steps there are.
        name: of the run, in front of each line.
        state: what is shown of a record; None: Phi, |h|, and a status that is no success.
    """
    state = in_short if state is None else state
    if is_fancy(sys.stderr):
        with _bar(max_steps, name, state) as show:
            yield show
        return
    every, begun, prefix = max(1, max_steps // LINES), time.monotonic(), f"{name}: " if name else ""

    def line(record: Record) -> None:
        if record.step % every == 0 or record.step == max_steps:
            left = remaining(record.step, max_steps, time.monotonic() - begun)
            step = f"step {record.step:>{len(str(max_steps))}}/{max_steps}"
            sys.stderr.write(f"{prefix}{step}  {state(record)}{left}\n")

    yield line


def remaining(step: int, max_steps: int, seconds: float) -> str:
    """How long the steps that are left take, at the pace so far; nothing before that can be told.

    Example:
        >>> remaining(1, 100, 0.1), remaining(25, 100, 50.0), remaining(100, 100, 50.0)
        ('', '  150 s left', '')
    """
    if step == 0 or step >= max_steps or seconds < 1:
        return ""
    return f"  {seconds / step * (max_steps - step):.0f} s left"


@final
class Shown(AbstractWatcher):
    """A callback that shows each record, and asks another whether the run is to end."""

    def __init__(self, show: Show, callback: Callback | None) -> None:
        self._show, self._callback = show, callback

    def __call__(self, told: Record, estimate: Estimate) -> bool:
        self._show(told)
        return bool(self._callback(told, estimate)) if self._callback is not None else False

    def before_save(self) -> None:
        before_save(self._callback)


def in_short(record: Record) -> str:
    """Phi and |h|, and a status that is no success."""
    failed = "" if record.status.ok else f"  {record.status.name}"
    return f"Phi {record.value:.6g}  |h| {record.grad_norm:.2e}{failed}"


def is_fancy(stream: TextIO) -> bool:
    """Whether to draw with rich: where it is installed, in a terminal or a notebook."""
    import importlib.util

    return (stream.isatty() or "ipykernel" in sys.modules) and importlib.util.find_spec("rich") is not None


@contextlib.contextmanager
def _bar(max_steps: int, name: str, state: State) -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    named: list[ProgressColumn] = [TextColumn("{task.description}", markup=False)] if name else []
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    columns: list[Any] = [*named, BarColumn(20), MofNCompleteColumn(), *times]
    columns.append(TextColumn("{task.fields[state]}", markup=False))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=max_steps, state="")
        yield lambda record: bar.update(task, completed=record.step, state=state(record))
