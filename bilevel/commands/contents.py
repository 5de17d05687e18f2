"""How each file of a run is read and written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from bilevel._files import write_atomically
from bilevel._tree import Tree
from bilevel.commands.folder import Folder
from bilevel.commands.result import plain
from bilevel.outer.checkpoint import read_checkpoint as checkpoint_content
from bilevel.outer.solution import Record


def read_result(folder: Folder) -> dict[str, Any]:
    """What an earlier run recorded.

    Raises:
        ValueError: if there is none that can be read.
    """
    if not folder.result.exists() or not folder.checkpoint.exists():
        raise ValueError(
            f"there is no run to resume in {str(folder.path)!r}. Start it with the same `--out`, without `--resume`."
        )
    try:
        content = json.loads(folder.result.read_text())
    except ValueError as error:
        raise ValueError(f"{str(folder.result)!r} is not readable ({error}).") from error
    if not isinstance(content, dict) or "settings" not in content:
        raise ValueError(f"{str(folder.result)!r} is not the result of a run.")
    return content


def read_checkpoint(folder: Folder) -> dict[str, Any]:
    """The checkpoint's content: x, y, history and the rest.

    Raises:
        ValueError: if it cannot be read.
    """
    return checkpoint_content(folder.checkpoint)


def write_result(folder: Folder, content: Mapping[str, Any]) -> None:
    """Replace result.json."""
    text = json.dumps(plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomically(folder.result, lambda file: file.write(text.encode()))


def write_history(folder: Folder, records: Iterable[Record | Mapping[str, Any]]) -> None:
    """Replace history.jsonl."""
    text = "".join(map(_line, records))
    write_atomically(folder.history, lambda file: file.write(text.encode()))


def append_history(folder: Folder, record: Record | Mapping[str, Any]) -> None:
    """Add a line to history.jsonl at its end, whole or not at all.

    Raises:
        OSError: if there is no room for it.
    """
    handle = os.open(folder.history, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        line, end = _line(record).encode(), os.fstat(handle).st_size
        try:
            written = os.write(handle, line)
            if written < len(line):  # the disk is full in the middle of it
                os.write(handle, line[written:])
        except OSError:
            os.ftruncate(handle, end)
            raise
    finally:
        os.close(handle)


def write_solution(folder: Folder, x: Tree, y: Tree) -> None:
    """Replace solution.pt."""
    write_atomically(folder.solution, lambda file: torch.save({"x": x, "y": y}, file))


def _line(record: Record | Mapping[str, Any]) -> str:
    content = record.as_dict() if isinstance(record, Record) else record
    return json.dumps(plain(content), allow_nan=False) + "\n"
