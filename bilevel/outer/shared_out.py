"""What parameters that are shared out over ranks can be used with: the refusals, by name."""

from __future__ import annotations

from typing import Any

from bilevel._problem import BilevelProblem
from bilevel.algorithms.algorithm import AbstractAlgorithm
from bilevel.algorithms.registry import DESCENT
from bilevel.inner_problems.kinds import inner_problem
from bilevel.inner_problems.smooth import SmoothMinimization
from bilevel.named.registration import AUTO
from bilevel.ranks.sharded import REMEDY


def demand_first_order(problem: BilevelProblem, algorithm: Any, estimator: Any, checkpoint: Any, sweep: Any) -> None:
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
    if checkpoint is not None or sweep is not None:
        raise ValueError(
            "`minimize(checkpoint=..., sweep=...)` do not apply to parameters that are shared out over ranks"
            " (`DTensor`). Leave them out, and save the module by `torch.distributed.checkpoint` in a callback."
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
