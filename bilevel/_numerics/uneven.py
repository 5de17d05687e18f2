"""Data of several runs side by side whose batches are not of one size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._tree import tree_map


@final
@dataclass(frozen=True, eq=False)
class Uneven:
    """Batches of several runs, in groups of one size each: of a finite sum the whole blocks, and the last ones.

    Attributes:
        runs: which runs `(count,)` are in a group; each run is in one of them.
        data: of a group, with an axis of its runs in front.
    """

    runs: tuple[Tensor, ...]
    data: tuple[Any, ...]

    def each(self, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """function(data, *rows) of each group, put together in the order of the runs."""
        found = [function(data, *(row[runs] for row in rows)) for runs, data in zip(self.runs, self.data, strict=True)]
        return torch.cat(found)[torch.cat(self.runs).argsort()]

    def of_runs(self, runs: Tensor) -> Any:
        """The batches of these runs, in this order: groups again, or one batch for each where they are of one size.

        A run may be asked for several times.
        """
        groups, data = [], []
        for members, batch in zip(self.runs, self.data, strict=True):
            row = {run: k for k, run in enumerate(members.tolist())}
            kept = [(k, row[run]) for k, run in enumerate(runs.tolist()) if run in row]
            if kept:
                where, rows = (torch.tensor(part, device="cpu") for part in zip(*kept, strict=True))
                groups.append(where)
                data.append(of_rows(batch, rows))
        if len(groups) == 1:
            return data[0]
        return Uneven(tuple(groups), tuple(data))


def of_rows(batch: Any, rows: Tensor) -> Any:
    """These rows of every tensor of a structure."""
    return tree_map(lambda leaf: leaf[rows.to(leaf.device)], batch)
