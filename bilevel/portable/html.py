"""Results as small pieces of HTML, for notebooks and reports: everything escaped, no scripts, no outside links."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_TABLE = "border-collapse:collapse;font-size:90%"
_CELL = "padding:2px 8px;text-align:{};vertical-align:top;border-bottom:1px solid #8884"


def card(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """A title and names with values; rows without a value are left out.

    Example:
        >>> "&lt;1" in card("Estimate", [("error", "<1"), ("note", "")])
        True
    """
    body = "".join(
        f'<tr><th style="{_CELL.format("left")}">{html.escape(name)}</th>'
        f'<td style="{_CELL.format("left")}">{html.escape(value)}</td></tr>'
        for name, value in rows
        if value
    )
    return f'<div><strong>{html.escape(title)}</strong><table style="{_TABLE}">{body}</table></div>'


def grid(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = ()) -> str:
    """A title, a table whose first column is of names and whose others of numbers, and notes below.

    Example:
        >>> grid("Comparison", ["name", "calls"], [["aid-cg", "12"]]).count("<tr>")
        2
    """

    def line(cells: Sequence[str], tag: str) -> str:
        sides = ["left"] + ["right"] * (len(cells) - 1)
        return "".join(
            f'<{tag} style="{_CELL.format(side)}">{html.escape(cell)}</{tag}>'
            for cell, side in zip(cells, sides, strict=True)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    below = "".join(f"<div>{html.escape(note)}</div>" for note in notes)
    top = f"<thead><tr>{line(head, 'th')}</tr></thead>"
    table = f'<table style="{_TABLE}">{top}<tbody>{body}</tbody></table>'
    return f"<div><strong>{html.escape(title)}</strong>{table}{below}</div>"
