"""Checkpoints of an outer run: written atomically, read without executing anything."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from bilevel.outer.entries import MISREAD, fault, unreadable
from bilevel.outer.fingerprint import Fingerprint, differences
from bilevel.outer.journal import Journal, journal_of
from bilevel.outside.checkpoints import load_plain

# 1 held the state of a descent, entry by entry, and nothing else; 2 holds all records, and 3 tells how many of them are
# in the file beside it
FORMATS = (1, 2, 3)
_TOLD = 6  # differences of two runs


@final
@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The file of a run.

    Attributes:
        path: where it is.
        made_of: what the run is told by.
        forced: whether a run goes on from the file of one that is told to be another.
        of_rank: what this process has of what a file holds, on a device, where that is not all of it.
        place: where it is, whatever the current directory will be.
    """

    path: str | os.PathLike[str]
    made_of: Fingerprint
    forced: bool = False
    of_rank: Callable[[Any, torch.device], Any] | None = None
    place: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "place", Path(os.path.abspath(self.path)))

    def load(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Read what was saved, for a run that begins at x and y: the state and, as `history`, all records.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a checkpoint that this version reads, is of a problem with other sizes or dtype, or
                of another algorithm.
        """
        if not Path(self.path).exists():
            raise FileNotFoundError(
                f"there is no checkpoint at {str(self.path)!r} to resume from. Run without `resume` first."
            )
        content = read_checkpoint(self.path, x.device if self.of_rank is None else "cpu")
        if self.of_rank is not None:
            parts = {name: content[name] for name in ("x", "y", "state", "best", "least") if name in content}
            content |= self.of_rank(parts, x.device)
        for name, saved, wanted in (("x", content["x"], x), ("y", content["y"], y)):
            # What y has before its last axis are tasks, for each of which the run begins at the same y.
            if saved.shape[-1:] != wanted.shape[-1:] or saved.dtype != wanted.dtype:
                raise ValueError(
                    f"the checkpoint {str(self.path)!r} is of another problem: its {name} has {tuple(saved.shape)}"
                    f" entries of {saved.dtype}, this one {tuple(wanted.shape)} of {wanted.dtype}."
                )
        self.demand(content, "algorithm")
        return _upgraded(content) if content["format"] == 1 else content

    def demand(self, content: Mapping[str, Any], *names: str) -> None:
        """Refuse the checkpoint of another run; what the file does not tell is taken on trust.

        Warns of what cannot be compared.

        Args:
            content: what was read.
            names: of the parts that are compared; none: all of them.

        Raises:
            ValueError: naming what has changed.
        """
        if self.forced:
            return
        told: Mapping[str, str] = content.get("settings", {})
        now = self.made_of.parts
        old = content.get("format") == 1
        saved = {
            name: text
            for name, text in told.items()
            if (not names or name in names) and not (old and _alike(text, now.get(name, text)))
        }
        changed = differences(saved, now, content.get("changing", ()))
        if changed:
            more = f"; and {len(changed) - _TOLD} more" if len(changed) > _TOLD else ""
            raise ValueError(
                f"the checkpoint {str(self.path)!r} is of a run with other settings:"
                f" {'; '.join(changed[:_TOLD])}{more}. Resume it as it was begun, or begin another run, with another"
                f' file, from its x and y; to go on all the same, say `resume="force"`.'
            )
        if self.made_of.unread and not names:
            warnings.warn(
                f"whether the checkpoint {str(self.path)!r} is of this very run was not compared for"
                f" {', '.join(self.made_of.unread[:_TOLD])}{' and more' * (len(self.made_of.unread) > _TOLD)}.",
                stacklevel=2,
            )

    @contextlib.contextmanager
    def intact(self, content: Mapping[str, Any]) -> Iterator[None]:
        """What goes wrong with what was read is one error, that names the file.

        Raises:
            ValueError: from whatever is raised.
        """
        try:
            yield
        except MISREAD as error:
            why = str(error) if isinstance(error, ValueError) else "an entry is of another kind"
            journal = content.get("journal")
            if isinstance(journal, Journal) and " of step " in why:
                raise journal.damaged(why) from error
            raise ValueError(unreadable(self.path, why)) from error

    def foreign(self, what: object) -> ValueError:
        """What to say of a checkpoint whose state is another algorithm's."""
        return ValueError(
            f"the checkpoint {str(self.path)!r} was written with another outer optimizer or algorithm: {what}."
        )


def read_checkpoint(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a checkpoint holds: x, y, `history` and the rest, also where its records are in the file beside it.

    Raises:
        ValueError: if it is none that this version reads.
    """
    content = _content(path, device)
    if content.get("format") not in FORMATS or not {"x", "y", "step"} <= content.keys():
        raise ValueError(f"{str(path)!r} is not a checkpoint of this version of bilevel.")
    if "journal" in content:
        journal = Journal(journal_of(os.path.abspath(path)), content["journal"]["run"])
        entries = journal.read(content["journal"]["entries"], ("record",))
        content["journal"] = journal  # where the next ones are added
        content["history"] = [entry["record"] for entry in entries]
        if entries and "evaluation" in entries[0]:
            content["evaluations"] = [_moved(entry.get("evaluation"), device) for entry in entries]
    if "history" not in content:
        raise ValueError(f"{str(path)!r} is not a checkpoint of this version of bilevel.")
    return content


def demand_same(path: str | os.PathLike[str], problem: Any, data: Any = None) -> None:
    """Refuse to go on from the checkpoint of another problem, or one with other data, before anything is done.

    `minimize(resume=True)` does the same, and compares settings too.

    Args:
        path: the checkpoint.
        problem: the problem that would go on.
        data: what `minimize(data=...)` would be given.

    Raises:
        ValueError: naming what is otherwise; also if the checkpoint cannot be read.
    """
    Checkpoint(path, Fingerprint({}, {"problem": problem, "data": data})).demand(_content(path, "cpu"))


def loaders_of(path: str | os.PathLike[str]) -> list[Any] | None:
    """Where the loaders of a run were, which have to be told before they are begun; None where that is not known."""
    with contextlib.suppress(ValueError):  # which `Checkpoint.load` reports
        return _content(path, "cpu").get("loaders")
    return None


def trials_of(path: str | os.PathLike[str]) -> list[Any]:
    """The rows of the sweep that a run began with; empty where it did not, or that is not known."""
    with contextlib.suppress(ValueError):  # which `Checkpoint.load` reports
        found = _content(path, "cpu").get("trials")
        return found if isinstance(found, list) else []
    return []


def begun_with(path: str | os.PathLike[str], name: str, setting: str) -> bool:
    """Whether a checkpoint tells that this was a setting of its run; one without settings tells what was the default.

    False where there is none that can be read, which :meth:`Checkpoint.load` reports.
    """
    try:
        content = _content(path, "cpu")
    except ValueError:
        return False
    saved = content.get("settings", {}).get(name, setting)
    return bool(saved == setting or (content.get("format") == 1 and saved.split("(")[0] == setting.split("(")[0]))


def _content(path: str | os.PathLike[str], device: torch.device | str) -> dict[str, Any]:
    """The file without its journal.

    Raises:
        ValueError: if it is no checkpoint that can be read.
    """
    try:
        content = load_plain(path, device)
    except Exception as error:
        raise ValueError(unreadable(path)) from error
    if not isinstance(content, dict):
        return {}
    why = fault(content)
    if why is not None:
        raise ValueError(unreadable(path, why))
    return content


def _moved(evaluation: Any, device: torch.device | str) -> Any:
    if not isinstance(evaluation, dict):
        return evaluation
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in evaluation.items()}


def _alike(saved: str, now: str) -> bool:
    """Whether a setting of a file of format 1, with all its fields of then, may be this one: it has the same name."""
    names = [text.split("(")[0] for text in (saved, now)]
    return names[0] == names[1] or (now == "implicit" and saved in ("aid-cg", "kkt"))  # what the default stood for


def _upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a file of format 1, as it would be written now."""
    state = {name: content[name] for name in ("x", "y", "v", "memory")}
    return {**content, "state": state, "calls": {}}
