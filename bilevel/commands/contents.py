"""How each file of a run is read and written."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from bilevel._files import write_atomically
from bilevel._result import Status
from bilevel._tree import Tree
from bilevel.commands.config import written
from bilevel.commands.folder import Folder
from bilevel.commands.result import plain
from bilevel.outer.checkpoint import read_checkpoint as checkpoint_content
from bilevel.outer.solution import Record
from bilevel.outside.checkpoints import load_plain

_REMEDY = "`--overwrite` begins the run anew."

# What result.json says of a run that has not ended by itself; else the name of a `Status`.
BEGUN = "running"
FINISHING = "finishing"  # it has ended, and its metrics and its picture are being made
INTERRUPTED = "interrupted"
STOPPED = "failed"  # by an exception

_STATUSES = {BEGUN, FINISHING, INTERRUPTED, STOPPED, *Status.__members__}
_LARGEST = 2**62  # of a number that is read

_SETTINGS: Mapping[str, Any] = MappingProxyType(
    {
        "problem": str,
        "set": dict,
        "seed": int | None,
        "algorithm": str | None,
        "estimator": str | None,
        "outer": str | None,
        "step": int | float | None,
        "steps": int | None,
        "tol": int | float | None,
        "seconds": int | float | None,
        "device": str | None,
    }
)
_NEEDED = ("problem", "set")  # the others were not there in all versions, and None says the same
_LONGEST = 1 << 26  # bytes that are read of result.json: no run writes so many


def read_result(folder: Folder) -> dict[str, Any]:
    """What an earlier run recorded, checked as far as it is relied upon.

    Raises:
        ValueError: if that cannot be read, or is no record of a run.
    """
    content = _json(folder.result)
    settings = content.get("settings") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(settings, dict) or not isinstance(content.get("status"), str):
        raise ValueError(f"{str(folder.result)!r} is not the result of a run. {_REMEDY}")
    wrong = [name for name, kind in _SETTINGS.items() if not _is(settings.get(name), kind, needed=name in _NEEDED)]
    if not wrong:
        wrong = [name for name, text in settings["set"].items() if not isinstance(text, str)]
    if wrong:
        raise ValueError(f"{str(folder.result)!r} is damaged: what it says of {wrong[0]!r} makes no sense. {_REMEDY}")
    seconds = content.get("seconds")
    wrong = [] if _is(seconds, int | float | None) and (seconds or 0) >= 0 else ["seconds"]
    wrong += [] if content["status"] in _STATUSES else ["status"]
    if wrong:
        raise ValueError(f"{str(folder.result)!r} is damaged: what it says of {wrong[0]!r} makes no sense. {_REMEDY}")
    return content


def _is(value: Any, kind: Any, *, needed: bool = False) -> bool:
    if value is None:
        return not needed
    if isinstance(value, int | float) and not (-_LARGEST < value < _LARGEST):  # NaN neither
        return False
    return isinstance(value, kind) and not isinstance(value, bool)


def _json(path: Path) -> Any:
    """What a file says.

    Raises:
        ValueError: if it is not JSON, or too large or too deep to be one that a run has written.
    """
    try:
        if path.stat().st_size > _LONGEST:
            raise ValueError("it is too large")
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{str(path)!r} is not readable ({error}). {_REMEDY}") from error
    except RecursionError as error:
        raise ValueError(f"{str(path)!r} is not readable (it is nested too deeply). {_REMEDY}") from error


def read_checkpoint(folder: Folder) -> dict[str, Any]:
    """The checkpoint's content: x, y, history and the rest.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        content = checkpoint_content(folder.checkpoint)
    except ValueError as error:
        raise ValueError(f"{str(error).partition(' Run without `resume`')[0]} {_REMEDY}") from error
    except Exception as error:  # its content is of other types than was written
        raise damaged(folder) from error
    told = isinstance(content.get("settings", {}), dict) and _is(content["step"], int, needed=True)
    if not told or not all(isinstance(content[name], Tensor) for name in ("x", "y")):
        raise damaged(folder)
    return content


def read_records(folder: Folder) -> list[Record]:
    """Those of the steps that the checkpoint knows.

    Raises:
        ValueError: if they cannot be read.
    """
    content = read_checkpoint(folder)
    try:
        return [Record.from_dict(record) for record in content["history"]]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise damaged(folder) from error


def read_history(folder: Folder) -> list[dict[str, Any]]:
    """The lines of history.jsonl by step, the last one of each; without those that a crash cut short."""
    if not folder.history.exists():
        return []
    found: dict[int, dict[str, Any]] = {}
    for text in folder.history.read_bytes().decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and _is(line.get("step"), int, needed=True):
                found[line["step"]] = line
    return [found[step] for step in sorted(found)]


def read_solution(folder: Folder) -> tuple[Tree, Tree] | None:
    """x and y as they were written; None where they cannot be read."""
    try:
        content = load_plain(folder.solution)
        return content["x"], content["y"]
    except Exception:
        return None


def damaged(folder: Folder) -> ValueError:
    """What to say of a checkpoint that is none."""
    return ValueError(f"{str(folder.checkpoint)!r} is not a readable checkpoint: it is damaged, or is none. {_REMEDY}")


def write_result(folder: Folder, content: Mapping[str, Any]) -> None:
    """Replace result.json, and config.toml, which says how to ask for the same again."""
    text = json.dumps(plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    settings = content.get("settings")
    asked = written(settings if isinstance(settings, Mapping) else {})
    if not folder.config.is_file() or folder.config.read_text(encoding="utf-8") != asked:
        write_atomically(folder.config, lambda file: file.write(asked.encode()))
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


def sync_history(folder: Folder) -> None:
    """Have the lines of history.jsonl on the disk.

    Raises:
        OSError: if that cannot be.
    """
    handle = os.open(folder.history, os.O_RDWR)  # a handle for reading cannot be synced everywhere
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_solution(folder: Folder, x: Tree, y: Tree) -> None:
    """Replace solution.pt."""
    write_atomically(folder.solution, lambda file: torch.save({"x": x, "y": y}, file))


def _line(record: Record | Mapping[str, Any]) -> str:
    content = record.as_dict() if isinstance(record, Record) else record
    return json.dumps(plain(content), allow_nan=False) + "\n"
