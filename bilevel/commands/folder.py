"""The folder of a run: which file is where, and how each is written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from bilevel._files import write_atomically
from bilevel._tree import Tree
from bilevel.commands.result import plain
from bilevel.outer.checkpoint import unreadable
from bilevel.outer.solution import Record


@final
@dataclass(frozen=True)
class Folder:
    """A run's files; each is replaced whole, so that a crash leaves none of them half written.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def result(self) -> Path:
        """Final values, settings, versions, oracle counts, seconds: JSON."""
        return self.path / "result.json"

    @property
    def history(self) -> Path:
        """One JSON record a line and outer step."""
        return self.path / "history.jsonl"

    @property
    def plot(self) -> Path:
        """The picture."""
        return self.path / "plot.png"

    @property
    def checkpoint(self) -> Path:
        """What `--resume` continues from."""
        return self.path / "checkpoint.pt"

    @property
    def solution(self) -> Path:
        """The tensors x and y, for `torch.load`."""
        return self.path / "solution.pt"

    @property
    def best(self) -> Path:
        """Of a few-shot experiment: the x of the best validation, and all validations."""
        return self.path / "best.pt"

    @property
    def model(self) -> Path:
        """Of a few-shot experiment: the state dict of the module with what was learned."""
        return self.path / "model.pt"

    @property
    def occupied(self) -> bool:
        """Whether a run wrote here before."""
        return self.result.exists() or self.history.exists()

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them."""
        return self.result, self.history, self.plot, self.checkpoint, self.solution, self.best, self.model

    def clear(self) -> None:
        """Remove the files of an earlier run, and nothing else."""
        for file in self.files:
            file.unlink(missing_ok=True)

    @property
    def replaced(self) -> Path:
        """Where the files of the run that is being replaced wait until the new one has something to show."""
        return self.path / ".replaced"

    def set_aside(self) -> None:
        """Move the files of an earlier run to :attr:`replaced`."""
        for file in self.files:
            if file.exists():
                self.replaced.mkdir(exist_ok=True)
                file.replace(self.replaced / file.name)

    def bring_back(self) -> bool:
        """Undo :meth:`set_aside`, removing what a new run has written meanwhile; whether there was something."""
        if not self.replaced.is_dir():
            return False
        self.clear()
        for file in self.files:
            if (self.replaced / file.name).exists():
                (self.replaced / file.name).replace(file)
        self.replaced.rmdir()
        return True

    def forget(self) -> None:
        """Remove what was set aside."""
        if self.replaced.is_dir():
            Folder(self.replaced).clear()
            self.replaced.rmdir()

    def read_result(self) -> dict[str, Any]:
        """What an earlier run recorded.

        Raises:
            ValueError: if there is none that can be read.
        """
        if not self.result.exists() or not self.checkpoint.exists():
            raise ValueError(
                f"there is no run to resume in {str(self.path)!r}. Start it with the same `--out`, without `--resume`."
            )
        try:
            content = json.loads(self.result.read_text())
        except ValueError as error:
            raise ValueError(f"{str(self.result)!r} is not readable ({error}).") from error
        if not isinstance(content, dict) or "settings" not in content:
            raise ValueError(f"{str(self.result)!r} is not the result of a run.")
        return content

    def read_checkpoint(self) -> dict[str, Any]:
        """The checkpoint's content: x, y, history and the rest.

        Raises:
            ValueError: if it cannot be read.
        """
        try:
            content = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(unreadable(self.checkpoint)) from error
        if not isinstance(content, dict) or not {"x", "y", "history"} <= content.keys():
            raise ValueError(f"{str(self.checkpoint)!r} is not a checkpoint of this version of bilevel.")
        return content

    def write_result(self, content: Mapping[str, Any]) -> None:
        """Replace result.json."""
        text = json.dumps(plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        write_atomically(self.result, lambda file: file.write(text.encode()))

    def write_history(self, records: Iterable[Record | Mapping[str, Any]]) -> None:
        """Replace history.jsonl."""
        text = "".join(map(_line, records))
        write_atomically(self.history, lambda file: file.write(text.encode()))

    def append_history(self, record: Record | Mapping[str, Any]) -> None:
        """Add a line to history.jsonl by one write at its end."""
        handle = os.open(self.history, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, _line(record).encode())
        finally:
            os.close(handle)

    def write_solution(self, x: Tree, y: Tree) -> None:
        """Replace solution.pt."""
        write_atomically(self.solution, lambda file: torch.save({"x": x, "y": y}, file))


def _line(record: Record | Mapping[str, Any]) -> str:
    content = record.as_dict() if isinstance(record, Record) else record
    return json.dumps(plain(content), allow_nan=False) + "\n"
