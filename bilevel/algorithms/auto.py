"""The algorithm that is chosen for a problem on batches, and the steps that are tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch

from bilevel._calculus import Exact, FiniteDifferences
from bilevel._problem import Split
from bilevel._result import Tally
from bilevel.algorithms.algorithm import AbstractAlgorithm
from bilevel.algorithms.ma_soba import MASOBA
from bilevel.algorithms.oracle import AbstractData
from bilevel.algorithms.saba import SABA
from bilevel.algorithms.srba import SRBA
from bilevel.algorithms.step_lengths import REDUCED, inner_step, is_convex, outer_step
from bilevel.named.setting import Setting
from bilevel.requirements.why_not import why_not
from bilevel.solvers.adam import Adam

TABLES = 2**30  # bytes that the tables of SABA may take: a gibibyte
_ADAM = 0.01  # of x, where Phi has no curvature to go by: entries that matter are about 1, and move by a hundredth
ALIKE = 0.03  # of how far rows of the sweep differ: of those that come so near to the best the most cautious is taken
_EPOCHS = 1  # of a row of the sweep at least: before that not all blocks have been heard of
_OUTER = (1.0, 3.0, 10.0, 30.0, 100.0)  # times the cautious gamma, which is the scale of x, and not its best step


@final
@dataclass(frozen=True, eq=False)
class Choice:
    """What "auto" stands for.

    Attributes:
        algorithm: that was chosen.
        sweep: over which steps, the most cautious first; None: over none.
        why: this one.
        least: how many steps a row takes at least that tells how far it will come.
    """

    algorithm: AbstractAlgorithm[Any]
    sweep: dict[str, list[float]] | None
    why: str
    least: int = 1

    def affordable(self, max_steps: int) -> tuple[dict[str, list[float]] | None, int]:
        """The sweep of a run of so many steps, and how many each of its rows takes: together a quarter of all.

        Steps of x that are too long look best for a while: no row is shorter than `least`, for which a sweep may take
        a half. Where that is not enough for all of them, fewer are tried, the cautious ones; None: not even two.
        """
        for count in range(0 if self.sweep is None else len(self.sweep["outer_step"]), 1, -1):
            assert self.sweep is not None
            if 2 * count * self.least <= max_steps:
                length = max(self.least, max_steps // (4 * count))
                return {"outer_step": self.sweep["outer_step"][:count]}, length
        return None, 0


def chosen(s: Setting, data: AbstractData | Split) -> Choice:
    """SABA where its tables fit, else SRBA, by differences where there is no double backward; MA-SOBA for networks.

    Where H has a negative eigenvalue at the start, as that of a network has, or data are batches only, x is stepped by
    Adam along a moving average: neither tables nor recursive differences are of use there.

    Raises:
        ValueError: if the inner problem is none that these algorithms apply to.
    """
    why = why_not(SABA(1.0, 1.0, products=FiniteDifferences()), s.problem.problem)
    if why:
        raise ValueError(why)
    twice = _differentiable_twice(s)
    products = Exact() if twice else FiniteDifferences()
    told = "" if twice else ", by differences of gradients, as g has no double backward"
    rho = REDUCED * inner_step(s)
    blocks = _blocks(data)
    if blocks is None or (twice and not is_convex(s)):
        because = "the data are batches only" if blocks is None else "g is not convex in y, as of a network"
        algorithm = MASOBA(rho, Adam(_ADAM), rho, products=products)
        return Choice(algorithm, None, f"auto chose MA-SOBA with Adam: {because}{told}")
    gamma = outer_step(s, rho) if twice else rho
    sweep = {"outer_step": [gamma * k for k in _OUTER]}
    size, least = _tables(s, *blocks), _EPOCHS * max(blocks)
    if twice and size * len(_OUTER) <= TABLES:
        why = f"its tables take {size:.1e} bytes, below {TABLES / len(_OUTER):.1e}"
        return Choice(SABA(rho, gamma), sweep, f"auto chose SABA: {why}", least)
    why = f"tables would take {size:.1e} bytes" if twice else "it is accurate to rounding all the same"
    return Choice(SRBA(rho, gamma, products=products), sweep, f"auto chose SRBA: {why}{told}", least)


def _differentiable_twice(s: Setting) -> bool:
    quiet = s.problem.with_tally(Tally())
    y = quiet.start(s.x, s.y0).detach()
    try:
        Exact().at_once(quiet, s.x, y, torch.ones_like(y))
    except NotImplementedError:
        return False
    return True


def _blocks(data: AbstractData | Split) -> tuple[int, int] | None:
    """How many blocks f and g have, one where all samples are one batch; None where one of them has none."""
    if not isinstance(data, Split):
        return None
    first = data.f.block(0, 0), data.g.block(0, 0)
    return None if any(block.number is None for block in first) else (first[0].count, first[1].count)


def _tables(s: Setting, of_f: int, of_g: int) -> int:
    """Bytes of SABA's tables: N_g (2q + p) + N_f (q + p) numbers."""
    q, p = s.problem.start(s.x, s.y0).numel(), s.x.numel()
    return (of_g * (2 * q + p) + of_f * (q + p)) * s.x.element_size()
