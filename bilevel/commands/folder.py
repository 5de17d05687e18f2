"""The folder of a run: which file is where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

from bilevel.outer.journal import journal_of


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
    def config(self) -> Path:
        """What was asked for, as `bilevel run --config` reads it: TOML."""
        return self.path / "config.toml"

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
    def records(self) -> Path:
        """Of a long run: the records that are no longer in the checkpoint itself."""
        return journal_of(self.checkpoint)

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
    def saved(self) -> bool:
        """Whether there is something to continue from: an empty file is nothing."""
        return self.checkpoint.exists() and self.checkpoint.stat().st_size > 0

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them."""
        own = self.result, self.config, self.history, self.plot, self.checkpoint, self.records
        return *own, self.solution, self.best, self.model

    def demand_files(self) -> None:
        """Refuse a folder in which something else is where a file of a run is to be.

        Raises:
            ValueError: naming it.
        """
        for file in self.files:
            if file.is_symlink() and not file.exists():
                raise ValueError(f"{str(file)!r} is a link to nothing: remove it, or name another `--out`.")
            if file.exists() and not file.is_file():
                what = "a folder" if file.is_dir() else "no file"
                raise ValueError(f"{str(file)!r} is {what}, and a run writes that file: name another `--out`.")

    def clear(self, *, but_result: bool = False) -> None:
        """Remove the files of an earlier run, and nothing else; last its result, which says what was to be run.

        Args:
            but_result: leave that, until a new one takes its place: who is killed in between has one of them.
        """
        for file in reversed(self.files):
            if not (but_result and file == self.result):
                file.unlink(missing_ok=True)

    def remove_halves(self) -> None:
        """Remove what a process that was killed had half written; for who holds the folder."""
        for file in self.files:
            for half in self.path.glob(f".{file.name}.*.part"):
                half.unlink(missing_ok=True)

    @property
    def replaced(self) -> Path:
        """Where the files of the run that is being replaced wait until the new one has something to show."""
        return self.path / ".replaced"
