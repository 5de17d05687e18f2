"""Entries of a run, a line each, that are added at the end of a file."""

from __future__ import annotations

import base64
import ctypes
import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from bilevel._files import sync_folder, write_atomically

_DTYPES = ("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "int64", "int32", "uint8", "bool")


@final
class Journal:
    """Lines of JSON after a first one that names their run; reading executes nothing.

    What `add` has written is on the disk when it returns, and costs what is new, not what there is. A line that was
    cut off by a crash, and all those beyond the number that was read, are dropped where the next ones are written.

    Args:
        path: the file.
        run: of which run; None: of one that begins.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     journal = Journal(Path(folder) / "a.history")
        ...     journal.begin([{"step": 0}])
        ...     journal.add([{"step": 1, "x": torch.ones(2)}])
        ...     Journal(journal.path, journal.run).read(2)
        [{'step': 0}, {'step': 1, 'x': tensor([1., 1.])}]
    """

    def __init__(self, path: Path, run: str | None = None) -> None:
        self.path = path
        self.run = secrets.token_hex(8) if run is None else run
        self.entries = 0
        self._end = 0  # in bytes

    def begin(self, entries: Iterable[Any]) -> None:
        """Replace the file by these entries."""
        lines = [_line({"run": self.run}), *map(_line, entries)]
        write_atomically(self.path, lambda file: file.writelines(lines))
        self.entries, self._end = len(lines) - 1, sum(map(len, lines))

    def add(self, entries: Iterable[Any]) -> None:
        """Add these at the end.

        Raises:
            OSError: if that cannot be done; what was there is then as it was.
        """
        lines = [*map(_line, entries)]
        with self.path.open("r+b", buffering=0) as file:
            file.truncate(self._end)
            try:
                file.seek(self._end)
                left = memoryview(b"".join(lines))
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(self._end)
                raise
        self.entries += len(lines)
        self._end += sum(map(len, lines))

    def read(self, count: int, names: tuple[str, ...] = ()) -> list[Any]:
        """The first `count` entries; the next ones come after them.

        Args:
            count: how many.
            names: what each has to have.

        Raises:
            ValueError: if there are not so many, or they are another run's; naming the line.
        """
        found: list[Any] = []
        number = 1
        try:
            with self.path.open("rb") as file:
                header = file.readline()
                if json.loads(header).get("run") != self.run:
                    raise ValueError(f"{str(self.path)!r} is of another run")
                self._end = len(header)
                for number in range(2, count + 2):
                    line = file.readline()
                    if not line:
                        raise ValueError(f"the file ends there; of {count} records {number - 2} are left")
                    found.append(json.loads(line, object_hook=_tensor))
                    if names and not (isinstance(found[-1], dict) and found[-1].keys() >= set(names)):
                        raise ValueError("it is no record")
                    self._end += len(line)
        except OSError as error:
            raise self.damaged(str(error)) from error
        except (ValueError, AttributeError, RecursionError, TypeError, LookupError, RuntimeError) as error:
            raise self.damaged(f"line {number}: {' '.join(str(error).split())[:200]}") from error
        self.entries = count
        return found

    def damaged(self, why: str) -> ValueError:
        """What to say of a file that is not as it was written."""
        return ValueError(
            f"{str(self.path)!r}, which holds the records of the checkpoint beside it, cannot be read ({why}). Put it"
            f" back as it was, or begin another run, with another file, from the x and y of the checkpoint."
        )


def journal_of(path: str | os.PathLike[str]) -> Path:
    """The file of the records that are no longer in the checkpoint itself."""
    return Path(f"{os.fspath(path)}.history")


def remove_journal(path: str | os.PathLike[str]) -> None:
    """Of a checkpoint that holds its records itself."""
    file = journal_of(path)
    if file.exists():
        file.unlink(missing_ok=True)
        sync_folder(file.parent)


def _line(entry: Any) -> bytes:
    return json.dumps(entry, default=_plain).encode() + b"\n"


def _plain(value: Any) -> dict[str, Any]:
    if not isinstance(value, Tensor):
        raise TypeError(f"a record cannot hold a {type(value).__name__}")
    whole = value.detach().to("cpu").contiguous().reshape(-1)
    content = ctypes.string_at(whole.data_ptr(), whole.numel() * whole.element_size()) if whole.numel() else b""
    name = str(value.dtype).removeprefix("torch.")
    return {"tensor": base64.b64encode(content).decode(), "dtype": name, "shape": list(value.shape)}


def _tensor(entry: dict[str, Any]) -> Any:
    if entry.keys() != {"tensor", "dtype", "shape"}:
        return entry
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"there is no dtype {entry['dtype']!r}")
    content, dtype = bytearray(base64.b64decode(entry["tensor"], validate=True)), getattr(torch, entry["dtype"])
    flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
    return flat.reshape(entry["shape"])
