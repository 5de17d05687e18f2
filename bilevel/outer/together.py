"""What ranks have to have in common before a run over all of them begins."""

from __future__ import annotations

from typing import Any

import torch

from bilevel._flat import FlatProblem
from bilevel._problem import Split
from bilevel.algorithms.oracle import AbstractData
from bilevel.outer.batches import first_shares
from bilevel.outer.fingerprint import Fingerprint, differences
from bilevel.ranks.across import Across
from bilevel.ranks.ranks import Ranks, demand_alike
from bilevel.ranks.shard import Shard


def demand_same_everywhere(ranks: Ranks | None, settings: dict[str, object], made_of: dict[str, Any]) -> None:
    """Refuse ranks that have not the same code, settings and data; those of a `Shard` may differ.

    Args:
        ranks: the processes; None: there is one.
        settings: what is told by its text.
        made_of: the problem, the data and the start.

    Raises:
        ValueError: on every rank, naming what is otherwise.
    """
    if ranks is None or ranks.size == 1:
        return
    made_of = {**made_of, **settings, "data": without_shards(made_of["data"])}
    print_of = Fingerprint(settings, made_of)
    demand_alike(ranks, "minimize", {**print_of.parts, "torch": str(torch.__version__)}, differences)


def without_shards(data: Any) -> Any:
    """The data, without what each rank alone has."""
    if isinstance(data, Split):
        return Split(without_shards(data.f), without_shards(data.g))
    return "a shard" if isinstance(data, Shard) else data


def over_ranks(problem: FlatProblem, ranks: Ranks | None, data: AbstractData | Split) -> None:
    """Have a problem's tasks, or its samples, be over ranks; one rank has them all."""
    if ranks is None or ranks.size == 1:
        return
    if problem.tasks is not None:
        problem.tasks_over = ranks
        return
    f, g = first_shares(data)
    problem.across = Across(ranks, f, g)
