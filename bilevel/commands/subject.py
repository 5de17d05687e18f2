"""The point that `bilevel check` and `bilevel compare` look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from bilevel._instance import Instance
from bilevel.commands.arguments import split
from bilevel.commands.loading import load
from bilevel.outer.batches import first_batch


@final
@dataclass(frozen=True, eq=False)
class NamedProblem:
    """A problem at its start, with the first of its data.

    Attributes:
        instance: the problem, x0 and y0.
        data: the third argument of f and g, or None.
        seeded: whether the seed was used in building it.
    """

    instance: Instance
    data: Any
    seeded: bool


def subject(problem: str, settings: Sequence[str], seed: int | None) -> NamedProblem:
    """What PROBLEM, `--set` and `--seed` name; see :func:`bilevel.commands.loading.load`."""
    instance, seeded = load(problem, split(settings), seed)
    return NamedProblem(instance, first_batch(instance.settings.get("data")), seeded)
