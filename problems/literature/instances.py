"""The test problems as problems of this library."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem
from bilevel.arguments.checked import checked
from bilevel.problems.literature.collection import evaluate, gaps, statement
from bilevel.problems.literature.search import OptimisticValue, Search
from bilevel.problems.literature.starts import starts

STARTS = 12  # of a run


@checked("literature.load")
def load(name: str) -> Instance:
    """The problem of that name in float64, with its best known solution as `minimizer` and its gaps as `metrics`.

    f, g and the inner constraints are those of `Instance.problem`. The outer constraints are the setting
    `outer_inequalities`, as `minimize(outer_inequalities=...)` takes them, where there are any. The other settings are
    those of :func:`bilevel.problems.literature.solve`. The start is the first of
    :func:`bilevel.problems.literature.starts.starts`, which knows nothing of the solution.

    Args:
        name: of the problem.

    Raises:
        ValueError: if there is no problem of that name.

    Example:
        >>> instance = load("Bard1988Ex1")
        >>> instance.minimizer
        tensor([1.], dtype=torch.float64)
        >>> instance.metrics(instance.minimizer, torch.zeros(1, dtype=torch.float64))[
        ...     "gap to the best known"
        ... ]
        0.0
    """
    found = statement(name)
    x0, y0 = starts(found, 1, seed=0)[0]
    constraints: dict[str, Any] = {}
    if found.inner is not None:
        constraints["inequalities"] = partial(evaluate, name, "inner")
    if found.equal is not None:
        constraints["equalities"] = partial(evaluate, name, "equal")
    outer = {} if found.outer is None else {"outer_inequalities": partial(evaluate, name, "outer")}
    problem = BilevelProblem(
        partial(evaluate, name, "f"), partial(evaluate, name, "g"), allow_unused=found.kind == "simple", **constraints
    )
    return Instance(
        problem=problem,
        x0=x0,
        y0=y0,
        description=f"{found.kind}: {found.source}" if found.source else found.kind,
        minimizer=torch.tensor(found.best.x, dtype=torch.float64),
        metrics=partial(gaps, name),
        settings={"estimator": OptimisticValue(name), "outer": Search(name), "max_steps": STARTS, **outer},
    )
