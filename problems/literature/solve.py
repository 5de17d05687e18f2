"""One call that solves a test problem from starts that know nothing of its solution."""

from __future__ import annotations

from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_1, SEED
from bilevel.outer.solution import Solution
from bilevel.problems.literature.instances import STARTS, load
from bilevel.problems.literature.search import OptimisticValue, Search


@checked("literature.solve", seed=SEED, starts=AT_LEAST_1)
def solve(name: str, seed: int = 0, starts: int = STARTS) -> Solution:
    """Solve a problem of the literature: the best of descents from `starts` points of a seeded sequence.

    `Solution.value` is f at (x, y), `Solution.y` an inner minimizer, the best for f of those that satisfy the outer
    constraints (the optimistic convention); `Instance.metrics` compares it with the best known solution. The history
    holds the points that improved on all before them. What is searched, and how, is said at :class:`Search`.

    Cost: fractions of a second for problems of one variable each, up to minutes for those of five. Needs
    `pip install "bilevel[scipy]"`.

    Args:
        name: of the problem.
        seed: of the starts.
        starts: how many.

    Raises:
        ValueError: if there is no such problem.
        ImportError: if scipy is missing.

    Example:
        >>> solution = solve("Bard1988Ex1", starts=4)
        >>> round(solution.value, 6), round(float(solution.x), 6)
        (17.0, 1.0)
    """
    from bilevel.outer.minimize import minimize

    instance = load(name)
    return minimize(
        instance.problem,
        instance.x0,
        instance.y0,
        estimator=OptimisticValue(name, seed),
        outer=Search(name, seed),
        max_steps=starts,
        throw=False,
    )
