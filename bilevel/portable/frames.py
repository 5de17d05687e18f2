"""Rows of plain data as a table of pandas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def frame(call: str, rows: Sequence[dict[str, Any]]) -> Any:
    """A `pandas.DataFrame` with a row for each; entries that are dicts become columns "name.entry".

    Raises:
        ImportError: if pandas is missing, naming the extra to install.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError(f'`{call}` needs pandas: `pip install "bilevel[pandas]"`.') from error
    return pandas.DataFrame([_flat(row) for row in rows])


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {f"{name}.{entry}": each for entry, each in value.items()}
        else:
            found[name] = value
    return found
