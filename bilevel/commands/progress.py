"""What a person sees: progress on stderr, a table on stdout; by rich where it is installed and there is a terminal."""

from __future__ import annotations

import contextlib
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, final

from bilevel.outer.progress import LINES, Show, State, is_fancy, remaining, shown
from bilevel.portable.folded import COLUMNS

if TYPE_CHECKING:
    from bilevel.few_shot.train import Progress


@contextlib.contextmanager
def progress(max_steps: int, *, quiet: bool, state: State | None = None, name: str = "") -> Iterator[Show]:
    """A function to be called with the record of each step; `state` says what is shown of it."""
    if quiet:
        yield lambda record: None  # noqa: ARG005
    else:
        with shown(max_steps, name, state) as show:
            yield show


@contextlib.contextmanager
def training_progress(max_steps: int, *, quiet: bool, name: str = "") -> Iterator[Callable[[Progress], None]]:
    """A function to be called with the progress of each training step; without a terminal, a line a validation."""
    if quiet:
        yield lambda progress: None  # noqa: ARG005
    elif is_fancy(sys.stderr):
        latest: list[Progress] = []
        told_so_far = _Training()
        with shown(max_steps, name, lambda _: told_so_far.of(latest[-1])) as show:

            def update(progress: Progress) -> None:
                latest[:] = [progress]
                show(progress.record)

            yield update
    else:
        every, told, prefix = max(1, max_steps // LINES), _Training(), f"{name}: " if name else ""
        begun = time.monotonic()

        def line(progress: Progress) -> None:
            text, step = told.of(progress), progress.record.step
            if progress.validation is not None or step % every == 0 or step == max_steps:
                left = remaining(step, max_steps, time.monotonic() - begun)
                print(f"{prefix}step {step:>{len(str(max_steps))}}/{max_steps}  {text}{left}", file=sys.stderr)

        yield line


@final
class _Training:
    """The outer loss, the scores and the seconds a step, each as last known."""

    def __init__(self) -> None:
        self.score: float | None = None
        self.validation: str = ""
        self.pace: float | None = None

    def of(self, progress: Progress) -> str:
        record = progress.record
        self.score = self.score if progress.score is None else progress.score
        self.pace = record.seconds if self.pace is None else 0.9 * self.pace + 0.1 * record.seconds
        if progress.validation is not None:
            found = progress.validation
            self.validation = f"  validation {found.metric} {found.score:.4g}"
        score = "" if self.score is None else f"  adapted {self.score:.4g}"
        failed = "" if record.status.ok else f"  {record.status.name}"
        return f"loss {record.value:.4g}{score}{self.validation}  {self.pace:.3f} s/step{failed}"


def table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values."""
    if is_fancy(sys.stdout):
        from rich import box
        from rich.console import Console
        from rich.table import Table

        drawn = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=box.SIMPLE_HEAD)
        drawn.add_column(style="cyan", no_wrap=True)
        drawn.add_column(overflow="fold")
        for name, value in rows:
            drawn.add_row(name, value)
        Console().print(drawn, markup=False)
        return
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, value in rows:
        for line in textwrap.wrap(value, max(20, COLUMNS - width - 4), break_long_words=False) or [""]:
            print(f"  {name:<{width}}  {line}".rstrip())
            name = ""


def note(text: str) -> None:
    """Print one line on stderr."""
    print(f"bilevel: note: {text}", file=sys.stderr)


def number(value: float | str) -> str:
    """Six digits; of a number that JSON does not have, also of its text."""
    return f"{float(value):.6g}"
