"""What a program returns, as an estimate."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from bilevel._estimate import FlatEstimate
from bilevel._result import Report, Status, Tally
from bilevel.compiled.packed import Legend
from bilevel.compiled.programs import Program

Backend: TypeAlias = Literal["inductor", "eager"]


def fine(h: Tensor, value: Tensor, rows: list[Tensor]) -> Tensor:
    """Whether all is well `()`: what is looked at first."""
    good = h.isfinite().all() & value.isfinite()
    for code in rows[1::2]:
        good = good & (code == 0).all()
    return good


def results(
    found: Program, vectors: list[Tensor], data: tuple[Tensor, ...], has_v: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """h, y, v and the row of numbers."""
    made = found.run(vectors, data)
    return (made[0], made[1], made[2], made[3]) if has_v else (made[0], made[1], None, made[2])


def read(legend: Legend, row: list[float], h: Tensor, y: Tensor, v: Tensor | None, tally: Tally) -> FlatEstimate:
    """An estimate from what a program returns."""
    tally.add(legend.stats(row))
    value = torch.tensor(row[1], dtype=h.dtype)
    error = None if v is None else row[3]
    return FlatEstimate(h, value, y, legend.reports(row), v, value_error=error, substitute=legend.substituted(row))


def unlike(own: FlatEstimate, found: FlatEstimate) -> tuple[Report, ...]:
    """A report where the estimator itself finds something else than its program; none where it does not.

    A program is what f and g did while they were traced. Where that is not what they do (they look at global state, or
    a kernel is wrong), it shows here, and is no success.
    """
    apart, size = float((own.grad - found.grad).norm()), float(own.grad.norm())
    relative = 1e-6 if own.grad.dtype == torch.float64 else 1e-2
    if not math.isfinite(apart) or apart <= relative * size + torch.finfo(own.grad.dtype).tiny:
        return ()
    return (Report("compiled program", Status.imprecise, apart / size if size else apart, 0),)
