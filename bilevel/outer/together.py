"""What ranks have to have in common before a run over all of them begins."""

from __future__ import annotations

from typing import Any

import torch

from bilevel._problem import Split
from bilevel.outer.fingerprint import Fingerprint, differences
from bilevel.ranks.ranks import Ranks, demand_alike
from bilevel.ranks.shard import Shard


def demand_same_everywhere(
    ranks: Ranks | None, settings: dict[str, object], made_of: dict[str, Any], call: str = "minimize"
) -> None:
    """Refuse ranks that have not the same code, settings and data; those of a `Shard` may differ.

    Args:
        ranks: the processes; None: there is one.
        settings: what is told by its text.
        made_of: the problem, the data and the start.
        call: what they are about to do.

    Raises:
        ValueError: on every rank, naming what is otherwise.
    """
    if ranks is None or ranks.size == 1:
        return
    made_of = {**made_of, **settings, "data": without_shards(made_of.get("data"))}
    print_of = Fingerprint(settings, made_of)
    demand_alike(ranks, call, {**print_of.parts, "torch": str(torch.__version__)}, differences)


def without_shards(data: Any) -> Any:
    """The data, without what each rank alone has."""
    if isinstance(data, Split):
        return Split(without_shards(data.f), without_shards(data.g))
    return "a shard" if isinstance(data, Shard) else data
