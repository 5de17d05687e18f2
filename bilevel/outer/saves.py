"""When a run is saved, and how: its state anew, and its records at the end of those before."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel._files import write_atomically
from bilevel.outer.checkpoint import Checkpoint
from bilevel.outer.journal import Journal, journal_of, remove_journal
from bilevel.outer.solution import Record

Seconds: TypeAlias = Callable[[], float]

_HELD = 100  # records that the checkpoint holds itself, as long as there are no more


@final
class NotSavedError(Exception):
    """That a checkpoint could not be written; its cause is what the system said."""


@final
class Saves:
    """The checkpoints of one run.

    A run of few records is one file. Of a longer one the file tells how many of the records in the file beside it are
    its own: these are written first, at the end of the ones before, so that a crash between the two, or within one,
    leaves the checkpoint before, with its records. Cost: the state and the new records, whatever came before.

    Args:
        checkpoint: the file.
        every: how many steps lie between two saves.
        seconds: how much time lies between two saves at most, a step more or less.
        clock: tells the time.
        before: called before each save.
        writes: whether this process is the one that does; of several ranks one is.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        every: int,
        seconds: float | None = None,
        clock: Seconds = time.monotonic,
        before: Callable[[], None] | None = None,
        writes: bool = True,
    ) -> None:
        self._before, self._writes = before, writes
        self.checkpoint, self.every, self.seconds, self.clock = checkpoint, every, seconds, clock
        self._latest, self._count = clock(), 0
        self._journal: Journal | None = None  # where the file on the disk has one
        self._begun = False  # whether the file on the disk is of this run
        self._changing: list[str] = []

    def due(self, steps: int) -> bool:
        """Whether it is time, after so many steps."""
        return steps % self.every == 0 or (self.seconds is not None and self.clock() - self._latest >= self.seconds)

    def go_on_from(self, content: dict[str, Any]) -> None:
        """The file on the disk is what this run began with."""
        self._begun = True
        self._changing = [*content.get("changing", ())]
        self._journal = content.get("journal")

    def save(
        self,
        steps: int,
        point: tuple[Tensor, Tensor],
        records: Sequence[Record],
        *,
        last: bool,
        kept: int | None = None,
        evaluations: Callable[[int], dict[str, Any]] | None = None,
        **state: Any,
    ) -> None:
        """Write a state and the records so far; a crash leaves the checkpoint before or this one, never half of one.

        Args:
            steps: how many were taken.
            point: x and y, for whoever looks at the file.
            records: of the run, those of the state and maybe more.
            last: whether the run ends here.
            kept: how many of the records belong to the state; None: one for each step.
            evaluations: number -> what else there is to keep of a record.
            state: everything that the rest of the run depends on, as plain data.

        Raises:
            NotSavedError: if the disk is full or the like.
        """
        if not self._writes:
            return
        kept = steps if kept is None else kept
        self._count += 1
        if last or self._count & (self._count - 1) == 0:  # ever more rarely: what changes has changed before
            self._changing = sorted({*self._changing, *self.checkpoint.made_of.changing()})
        content = {
            "settings": dict(self.checkpoint.made_of.parts),
            "changing": self._changing,
            "step": steps,
            "kept": kept,
            "x": point[0],
            "y": point[1],
            **state,
        }
        held = _HELD if evaluations is None or point[0].numel() + point[1].numel() < _HELD else 0
        try:
            if self._before is not None:
                self._before()
            if self._holds_all(kept, held):
                content |= {"format": 2, "history": [record.as_dict() for record in records[:kept]]}
                if evaluations is not None:
                    content["evaluations"] = [evaluations(i) for i in range(kept)]
                self._write(content)
                remove_journal(self.checkpoint.place)
                self._journal = None
            else:
                self._add(kept, records, evaluations)
                assert self._journal is not None
                self._write({**content, "format": 3, "journal": {"run": self._journal.run, "entries": kept}})
        except OSError as error:
            raise NotSavedError(
                f"the checkpoint {str(self.checkpoint.path)!r} could not be written: {error}"
            ) from error
        self._begun, self._latest = True, self.clock()

    def _holds_all(self, kept: int, held: int) -> bool:
        """Whether the file is to hold all records: it is not this run's yet, they are few, or fewer than before."""
        if not self._begun:
            return True
        return kept <= held if self._journal is None else kept < self._journal.entries

    def _add(self, kept: int, records: Sequence[Record], evaluations: Callable[[int], dict[str, Any]] | None) -> None:
        first = 0 if self._journal is None else self._journal.entries
        new = [
            {"record": record.as_dict(), **({} if evaluations is None else {"evaluation": evaluations(i)})}
            for i, record in enumerate(records[first:kept], first)
        ]
        if self._journal is not None:
            self._journal.add(new)
        else:  # the file on the disk holds its records itself, and needs no other
            journal = Journal(journal_of(self.checkpoint.place))
            journal.begin(new)
            self._journal = journal

    def _write(self, content: dict[str, Any]) -> None:
        write_atomically(self.checkpoint.place, lambda file: torch.save(content, file))
