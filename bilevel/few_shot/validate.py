"""The validations of a training run, and the best x among them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch

from bilevel._files import write_atomically
from bilevel._tree import Tree, ravel
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.words import got
from bilevel.few_shot.evaluate import Evaluation
from bilevel.outer.saves import NotSavedError
from bilevel.outside.checkpoints import load_plain
from bilevel.ranks.ranks import Ranks, first_says

_FORMAT = 1


@final
@dataclass(frozen=True)
class Validation:
    """The scores at one step.

    Attributes:
        step: which.
        metric: "accuracy", "mse" or "return".
        score: its mean over the validation tasks after adaptation.
        interval: its 95 % interval is score +- interval.
        before: the mean before adaptation.
        loss: the mean loss after adaptation.
        failed: tasks whose adaptation did not succeed.
        seconds: since training began, this validation included.
        own_seconds: those of this validation.
    """

    step: int
    metric: str
    score: float
    interval: float
    before: float
    loss: float
    failed: int
    seconds: float
    own_seconds: float

    def __post_init__(self) -> None:
        demand_types(self)

    @checked()
    def better_than(self, other: Validation | None) -> bool:
        """Whether it is strictly better; NaN is better than nothing."""
        if self.score != self.score or other is None:
            return self.score == self.score
        return self.score < other.score if self.metric == "mse" else self.score > other.score

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@final
class Validations:
    """Validations by step, and x at the best of them; in a file, if there is one, that is replaced at each.

    After a crash the file may be ahead of the checkpoint: those validations are not made again. What they chose stays
    chosen; for the patience of a run they count when their step is reached again.

    Args:
        path: the file, or None.
        ranks: the processes that all make the same validations, of which the first writes; None: this one alone.
    """

    def __init__(self, path: Path | None, ranks: Ranks | None = None) -> None:
        self.path, self._ranks = path, ranks
        self.x: Tree = None
        self._found: dict[int, Validation] = {}

    @staticmethod
    def begin(path: Path | None, x0: Tree, *, resume: bool, ranks: Ranks | None = None) -> Validations:
        """Those of a new run, or what the file of an earlier part of it holds.

        Raises:
            ValueError: if the file cannot be read, or is of another learner.
        """
        validations = Validations(path, ranks)
        if resume and path is not None and path.exists():
            content = read_best(path)
            structure = ravel(x0, "x0")[1]
            validations.x = structure.unravel(structure.ravel(content["x"], f"x in {str(path)!r}").to(structure.device))
            validations._found = {entry["step"]: Validation(**entry) for entry in content["validations"]}
        elif path is not None and (ranks is None or ranks.rank == 0):
            path.unlink(missing_ok=True)
        return validations

    def at(
        self, step: int, x: Tree, validate: Callable[[Tree], Evaluation], seconds: Callable[[], float]
    ) -> Validation:
        """The validation of x at a step; x is kept if it is the best so far."""
        if step not in self._found:
            before = self.best()
            found = validate(x)
            made = Validation(
                step=step,
                metric=found.metric,
                score=found.score.mean,
                interval=found.score.interval,
                before=found.before.mean,
                loss=found.loss.mean,
                failed=sum(found.failed.values()),
                seconds=seconds(),
                own_seconds=found.seconds,
            )
            self._found[step] = made
            if made.better_than(before) or self.x is None:
                self.x = x
            self._save()
        return self._found[step]

    def until(self, step: float = math.inf) -> tuple[Validation, ...]:
        """The validations up to a step, in order."""
        return tuple(self._found[key] for key in sorted(self._found) if key <= step)

    def best(self, step: float = math.inf) -> Validation | None:
        """The best up to a step, the first of equals; `x` belongs to the best of all."""
        best: Validation | None = None
        for validation in self.until(step):
            if validation.better_than(best):
                best = validation
        return best

    def stale(self, step: int) -> int:
        """How many validations up to a step came after the best."""
        best = self.best(step)
        return 0 if best is None else sum(validation.step > best.step for validation in self.until(step))

    def _save(self) -> None:
        if self.path is None:
            return
        if self._ranks is None:
            self._write(self.path)
        else:
            first_says(self._ranks, partial(self._write, self.path))

    def _write(self, path: Path) -> None:
        best = self.best()
        content = {
            "format": _FORMAT,
            "x": self.x,
            "step": None if best is None else best.step,
            "validations": [entry.as_dict() for entry in self.until()],
        }
        try:
            write_atomically(path, lambda file: torch.save(content, file))
        except OSError as error:
            raise NotSavedError(f"{str(path)!r} could not be written: {error}") from error


@checked()
def read_best(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `best.pt` holds: `x`, `step` and `validations`.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        content = load_plain(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"`read_best(path=...)`: {got(str(path))} is not readable ({str(error)[:200]}).") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{str(path)!r} was not written by this version of bilevel.")
    try:
        made = [Validation(**entry) for entry in content["validations"]]
        sound = [*map(float, (number for each in made for number in (each.seconds, each.own_seconds)))]
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise ValueError(f"{str(path)!r} is damaged: one of its validations makes no sense.") from error
    if "x" not in content or not all(0 <= seconds < math.inf for seconds in sound):
        raise ValueError(f"{str(path)!r} is damaged: it has no `x`, or seconds that make no sense.")
    return content
