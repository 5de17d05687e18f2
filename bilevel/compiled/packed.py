"""Everything about an estimate that is not a vector, as one row of numbers: what is read once a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._result import Report, Stats, Status, Substitute

HEAD = ("fine", "value", "norm", "value_error", "share", "inner_steps", "linear_steps")
COUNTS = ("gradients", "hvps", "cross_products", "inner_taken")


def packed(numbers: dict[str, Tensor], rows: Sequence[Tensor]) -> Tensor:
    """The row: numbers by name, and what there is of each problem of the batch."""
    head = [numbers[name].reshape(1).double() for name in (*HEAD, *COUNTS)]
    return torch.cat([*head, *(row.reshape(-1).double() for row in rows)])


@final
@dataclass(frozen=True)
class Legend:
    """How such a row is read.

    Attributes:
        parts: the solvers, each with its statuses by their codes.
        rows: problems in the batch.
        is_batch: whether there is a batch.
        substitute: the system that is solved in the place of the problem's, in words; empty: none is.
    """

    parts: tuple[tuple[str, tuple[Status, ...]], ...]
    rows: int
    is_batch: bool
    substitute: str = ""

    def reports(self, row: Sequence[float]) -> tuple[Report, ...]:
        """How each part ended."""
        found, at = [], len(HEAD) + len(COUNTS)
        for (part, statuses), steps in zip(self.parts, (row[5], row[6]), strict=False):
            residuals, codes = row[at : at + self.rows], row[at + self.rows : at + 2 * self.rows]
            at += 2 * self.rows
            ends = tuple(statuses[int(code)] for code in codes)
            worst = max(residuals, key=lambda r: (r != r, r))
            found.append(Report(part, Status.worst(ends), worst, int(steps), ends if self.is_batch else ()))
        return tuple(found)

    def stats(self, row: Sequence[float]) -> Stats:
        """The oracle calls."""
        gradients, hvps, crosses, taken = (int(count) for count in row[7:11])
        rows = self.rows
        return Stats(gradients * rows, hvps * rows, crosses * rows, rows, inner_steps=taken, linear_steps=int(row[6]))

    def substituted(self, row: Sequence[float]) -> Substitute | None:
        """The other system, and its residual against the problem's own."""
        return Substitute(self.substitute, row[4]) if self.substitute else None
