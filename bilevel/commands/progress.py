"""What a person sees: progress on stderr, a table on stdout; by rich where it is installed and there is a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO, TypeAlias

from bilevel._minimize import Record

Show: TypeAlias = Callable[[Record], None]
_LINES = 10  # of progress where there is no terminal


@contextlib.contextmanager
def progress(max_steps: int, *, quiet: bool) -> Iterator[Show]:
    """A function to be called with the record of each step."""
    if quiet:
        yield lambda record: None  # noqa: ARG005
    elif _fancy(sys.stderr):
        with _bar(max_steps) as show:
            yield show
    else:
        every = max(1, max_steps // _LINES)

        def line(record: Record) -> None:
            if record.step % every == 0 or record.step == max_steps:
                print(f"step {record.step:>{len(str(max_steps))}}/{max_steps}  {_state(record)}", file=sys.stderr)

        yield line


def table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values."""
    if _fancy(sys.stdout):
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
        print(f"  {name:<{width}}  {value}")


def note(text: str) -> None:
    """Print one line on stderr."""
    print(f"bilevel: note: {text}", file=sys.stderr)


def number(value: float) -> str:
    """Six digits."""
    return f"{value:.6g}"


@contextlib.contextmanager
def _bar(max_steps: int) -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=max_steps, state="")
        yield lambda record: bar.update(task, completed=record.step, state=_state(record))


def _state(record: Record) -> str:
    failed = "" if record.status == "successful" else f"  {record.status}"
    return f"Phi {number(record.value)}  |h| {record.grad_norm:.2e}{failed}"


def _fancy(stream: TextIO) -> bool:
    """Whether to draw with rich."""
    import importlib.util

    return stream.isatty() and importlib.util.find_spec("rich") is not None
