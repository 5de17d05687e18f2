"""What parameters that are shared out over ranks can be used with: the refusals, by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bilevel._problem import BilevelProblem
from bilevel.algorithms.algorithm import AbstractAlgorithm
from bilevel.algorithms.registry import DESCENT
from bilevel.inner_problems.kinds import inner_problem
from bilevel.inner_problems.smooth import SmoothMinimization
from bilevel.named.registration import AUTO
from bilevel.outer.partial import attach
from bilevel.outer.solution import Solution
from bilevel.ranks.sharded import REMEDY, Shards


def demand_first_order(problem: BilevelProblem, algorithm: Any, estimator: Any, sweep: Any) -> None:
    """Refuse what parameters that are shared out over ranks cannot be used with, whatever the algorithm.

    Raises:
        ValueError: naming it, and what to do.
    """
    from bilevel.algorithms.descent import Descent  # a floor of imports less

    if algorithm is None or algorithm in (DESCENT, AUTO) or isinstance(algorithm, Descent):
        named = "implicit" if estimator is None else estimator
        raise ValueError(
            f"`minimize(estimator={named!r})` does not apply to parameters that are shared out over ranks (`DTensor`):"
            f" hypergradient estimates differentiate grad_y g once more, and FSDP has gradients by `backward()` alone."
            f" {REMEDY}"
        )
    if isinstance(algorithm, str):
        raise ValueError(
            f"`minimize(algorithm={algorithm!r})` derives its steps from products with Hessians, which parameters that"
            f" are shared out over ranks (`DTensor`) do not have. {REMEDY}"
        )
    smooth = type(inner_problem(problem)) is SmoothMinimization
    if problem.tasks or problem.init is not None or problem.encode is not None or not smooth:
        raise ValueError(
            "`minimize(y0=...)` of parameters that are shared out over ranks (`DTensor`) needs a problem of f and g"
            " alone, without tasks, init, encode or another kind of inner problem."
        )
    if sweep is not None:
        raise ValueError(
            "`minimize(sweep=...)` does not apply to parameters that are shared out over ranks (`DTensor`): rows side"
            " by side are as many copies of what does not fit once. Call `minimize` for each setting."
        )


def demand_takes_shards(algorithm: AbstractAlgorithm[Any]) -> None:
    """Refuse an algorithm that would take a part of y for the whole.

    Raises:
        ValueError: naming it, and what to do.
    """
    if not algorithm.takes_shards:
        raise ValueError(
            f"`minimize(algorithm={algorithm!r:.200})` does not apply to parameters that are shared out over ranks"
            f" (`DTensor`): it asks for second derivatives, or for norms and products of all of y. {REMEDY}"
        )


def with_shards(solution: Solution, shards: Shards) -> Solution:
    """The solution of this rank's part of y as one whose y is shared out as the parameters are."""
    best = replace(solution.best, y=shards.shared_out(solution.best.y))
    return replace(solution, y=shards.shared_out(solution.y), best=best)


@contextlib.contextmanager
def all_shared_out(shards: Shards) -> Iterator[None]:
    """What an error keeps of the run has a y that is shared out likewise."""
    try:
        yield
    except Exception as error:
        partial = getattr(error, "partial", None)
        if isinstance(partial, Solution):
            attach(error, with_shards(partial, shards))
        raise
