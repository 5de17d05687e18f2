"""Text within the width of a terminal."""

from __future__ import annotations

import textwrap

COLUMNS = 80


def folded(text: str, first: str = "", rest: str | None = None) -> str:
    """The text in lines of at most 80 columns, the first with `first` in front, the others with `rest`.

    Words are left whole: a word that is longer than a line, such as a path, has a line of its own.

    Example:
        >>> len(folded("word " * 40, "  name  ").splitlines())
        3
    """
    rest = " " * len(first) if rest is None else rest
    wrapper = textwrap.TextWrapper(
        COLUMNS, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return wrapper.fill(text) or first.rstrip()
