"""Every property of a whole algorithm at once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from bilevel._instance import Instance
from bilevel._problem import BilevelProblem, Split
from bilevel._result import Stats, Status
from bilevel._tree import tree_leaves
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.finite_sum import FiniteSum, Order
from bilevel.algorithms.oracle import Draws, Oracle
from bilevel.arguments.checked import checked
from bilevel.arguments.ranges import AT_LEAST_0, COUNT
from bilevel.outer.encoding import encoded
from bilevel.outer.minimize import minimize
from bilevel.outer.solution import Solution
from bilevel.problems.quadratic import random_quadratic
from bilevel.requirements.properties import Property
from bilevel.testing.properties import close

Algorithm = AbstractAlgorithm[Any]


@checked(max_steps=COUNT, tol=AT_LEAST_0, calls=COUNT)
def check_algorithm(
    algorithm: Algorithm,
    *,
    exact: bool = True,
    max_steps: int = 2000,
    tol: float = 1e-4,
    whole: bool = False,
    calls: int | None = None,
) -> None:
    """Assert that `minimize(algorithm=...)` works as promised: same bits, resumable at any step, honest about NaN.

    Its problem is a quadratic with p = 3, q = 4, eigenvalues of d2g/dy2 from 0.5 to 1 and of d2Phi/dx2 from 1.6 to 5.2,
    and the same with shifted targets for batches: as a loader, and as a finite sum whose last block is smaller. On a
    finite sum in one block the algorithm must be what it is on the whole data.

    Args:
        algorithm: with step lengths for that problem, such as 0.5 for y and 0.02 for x.
        exact: whether it converges to the minimizer of Phi on the whole data, in `max_steps`.
        max_steps: of that run.
        tol: of its distance from the minimizer, relative to max(1, |x*|).
        whole: whether it needs the whole data, so that it is given no loaders, but finite sums alone.
        calls: how many oracle calls a step takes for each sample of a batch, as `Stats.sample_calls` counts them, where
            they are the same at every step; None: that is not compared.

    Raises:
        AssertionError: naming the failed property, what was found and what was expected.

    Example:
        >>> from bilevel.algorithms import SOBA
        >>> check_algorithm(SOBA(inner_step=0.5, outer_step=0.03), max_steps=600, calls=4)
    """
    checks = algorithm_checks(algorithm, exact=exact, max_steps=max_steps, tol=tol, whole=whole, calls=calls)
    for _, check in checks:
        check()


@checked(max_steps=COUNT, tol=AT_LEAST_0, calls=COUNT)
def algorithm_checks(
    algorithm: Algorithm,
    *,
    exact: bool = True,
    max_steps: int = 2000,
    tol: float = 1e-4,
    whole: bool = False,
    calls: int | None = None,
) -> list[tuple[str, Callable[[], None]]]:
    """The properties that `check_algorithm` asserts, by name, each a function without arguments.

    Raises:
        TypeError: if it is not an algorithm.
    """
    if not isinstance(algorithm, AbstractAlgorithm):
        raise TypeError(
            f"`check_algorithm(algorithm)` must be an algorithm. Got {type(algorithm).__name__}. Pass an instance of a"
            f" subclass of `AbstractAlgorithm`."
        )
    found: list[tuple[str, Callable[[], None]]] = [
        ("inputs untouched", partial(inputs_untouched, algorithm)),
        ("same bits", partial(same_bits, algorithm, whole)),
        ("one state, one step", partial(one_state_one_step, algorithm, whole)),
        ("resumed at any step", partial(resumed_at_any_step, algorithm, None)),
        ("NaN is reported", partial(nan_is_reported, algorithm)),
        ("counts", partial(counts_add_up, algorithm)),
        ("one block", partial(one_block_is_the_whole, algorithm)),
        ("resumed on a finite sum", partial(resumed_at_any_step, algorithm, _sum(2))),
    ]
    if calls is not None:
        found.append(("calls by sample", partial(calls_by_sample, algorithm, calls)))
    if not whole:
        found.append(("resumed on batches", partial(resumed_at_any_step, algorithm, _batches())))
    if exact:
        found.append(("convergence", partial(converges, algorithm, max_steps, tol)))
    return found


def inputs_untouched(algorithm: Algorithm) -> None:
    """x0 and y0 are what they were."""
    known = _quadratic()
    x0, y0 = known.x0 + 0.5, known.y0 + 0.5
    before = x0.clone(), y0.clone()
    solution = minimize(known.problem, x0, y0, algorithm=algorithm, max_steps=3, throw=False)
    for name, now, then in (("x0", x0, before[0]), ("y0", y0, before[1])):
        assert torch.equal(now, then), f"inputs untouched: {name} was modified, to {now.tolist()}."
    graphs = [leaf for leaf in tree_leaves((solution.x, solution.y)) if leaf.requires_grad]
    assert not graphs, "inputs untouched: found a solution that requires grad, expected tensors without a graph."


def same_bits(algorithm: Algorithm, whole: bool = False) -> None:
    """Two runs from the same arguments are equal; on the whole data for what needs that, else on batches."""
    known, data = (_quadratic(), None) if whole else (_batched(), _batches())
    _equal("same bits", *(_run(algorithm, known, data=data, max_steps=5) for _ in range(2)))


def one_state_one_step(algorithm: Algorithm, whole: bool = False) -> None:
    """An evaluation and a step that are repeated, from the same state and on the same batches, give the same."""
    known, data = (_quadratic(), None) if whole else (_batched(), _batches())
    _run(_Twice(algorithm), known, data=data, max_steps=4)


def resumed_at_any_step(algorithm: Algorithm, data: Any) -> None:
    """A run that is stopped after 0, 1, 2 or 5 steps, and resumed from its file, is the whole run."""
    known = _quadratic() if data is None else _batched()
    whole = _run(algorithm, known, data=data, max_steps=7)
    for steps in (0, 1, 2, 5):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "checkpoint.pt")
            _run(algorithm, known, data=data, max_steps=steps, checkpoint=file)
            again = _run(algorithm, known, data=data, max_steps=7, checkpoint=file, resume=True)
        _equal(f"resumed at step {steps}", again, whole)


def nan_is_reported(algorithm: Algorithm) -> None:
    """Where f becomes NaN the run ends at once, with that status."""
    known, seen = _quadratic(), [0]

    def f(x: Tensor, y: Tensor) -> Tensor:
        seen[0] += 1
        return known.problem.f(x, y) * (1.0 if seen[0] <= 1 else torch.nan)

    broken = BilevelProblem(f, known.problem.g)
    solution = minimize(broken, known.x0, known.y0, algorithm=algorithm, max_steps=20, throw=False)
    assert solution.status is Status.nonfinite, (
        f"NaN is reported: found the status {solution.status.name}, expected nonfinite, after f had become NaN."
    )
    steps = solution.history[-1].step
    assert steps < 20, f"NaN is reported: found {steps} steps, expected the run to end where f became NaN."


def counts_add_up(algorithm: Algorithm) -> None:
    """Every record has oracle calls, none of them negative, and those of the run are their sum."""
    solution = _run(algorithm, _quadratic(), max_steps=4)
    total = sum((record.stats for record in solution.history), Stats())
    assert solution.stats == total, f"counts: found {solution.stats}, expected the sum of the records, {total}."
    for record in solution.history:
        counts = record.stats.as_dict()
        assert min(counts.values()) >= 0 < sum(counts.values()), (
            f"counts: found {counts} at step {record.step}, expected oracle calls, and no negative ones."
        )
    assert total.gradients > 0, f"counts: found {total}, expected gradients of g."
    assert total.outer_gradients + total.values > 0, f"counts: found {total}, expected evaluations of f."


def one_block_is_the_whole(algorithm: Algorithm) -> None:
    """On a finite sum in one block, and in its order "full", a run is that on all samples as one batch."""
    known, data = _batched(), Split(f=_sum(2).f.tensors, g=_sum(2).g.tensors)
    expected = _run(algorithm, known, data=data, max_steps=6)
    for name, sums in (("one block", _sum(100)), ("order='full'", _sum(2, "full"))):
        found = _run(algorithm, known, data=sums, max_steps=6)
        for part, a, b in (("x", found.x, expected.x), ("y", found.y, expected.y)):
            close(f"{name}: {part}", a, b, 1e-11, " That is what it is on the whole data.")


def calls_by_sample(algorithm: Algorithm, calls: int) -> None:
    """From one step to the next of a run on a finite sum, each sample of the batch is asked so many times."""
    data, counts = _sum(3, samples=6), []
    for steps in (3, 4):
        counts.append(_run(algorithm, _batched(), data=data, max_steps=steps, evaluate_every=100).stats.sample_calls)
    found, samples = counts[1] - counts[0], 3
    assert found == calls * samples, f"calls by sample: found {found} for {samples} samples, expected {calls} for each."


def converges(algorithm: Algorithm, max_steps: int, tol: float) -> None:
    """On the whole data x tends to the minimizer of Phi, and the measure of stationarity to zero."""
    known = _quadratic()
    solution = _run(algorithm, known, max_steps=max_steps)
    close("convergence", solution.x, known.minimizer, tol, f" That is after {max_steps} steps.")
    first, last = max(record.grad_norm for record in solution.history), solution.history[-1].grad_norm
    assert last <= 100 * tol * first, (
        f"convergence: found a measure of stationarity of {last:.3g} at the minimizer, expected at most"
        f" {100 * tol * first:.3g}: it must vanish where the algorithm has arrived."
    )


@final
@dataclass(frozen=True)
class _Twice(AbstractAlgorithm[Any]):
    """An algorithm that does everything twice, and compares."""

    algorithm: Algorithm

    @property
    def requires(self) -> frozenset[Property]:
        return self.algorithm.requires

    @property
    def draws(self) -> Draws:
        return self.algorithm.draws

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> Any:
        return self.algorithm.init(oracle, x, y)

    def evaluate(self, oracle: Oracle, state: Any) -> Evaluated:
        first, second = (self.algorithm.evaluate(oracle, state) for _ in range(2))
        _same("evaluation", (second.estimate.grad, second.estimate.value), (first.estimate.grad, first.estimate.value))
        return first

    def step(self, oracle: Oracle, state: Any, found: Evaluated) -> Any:
        first, second = (self.algorithm.step(oracle, state, found) for _ in range(2))
        _same("step", encoded(second, second), encoded(first, first))
        return second

    def stationarity(self, oracle: Oracle, state: Any, found: Evaluated) -> Tensor:
        return self.algorithm.stationarity(oracle, state, found)

    def point(self, state: Any) -> tuple[Tensor, Tensor]:
        return self.algorithm.point(state)


def _same(what: str, found: Any, expected: Any) -> None:
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        alike = torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        assert alike, f"one state, one step: found {a} in the second {what} from a state, expected {b} as in the first."


def _run(algorithm: Algorithm, known: Instance, **options: Any) -> Solution:
    return minimize(known.problem, known.x0, known.y0, algorithm=algorithm, throw=False, **options)


def _quadratic() -> Instance:
    return random_quadratic(3, 4, eigenvalues=[0.5, 0.63, 0.79, 1.0], seed=0).instance()


def _batched() -> Instance:
    """The same; batch b of f and of g moves their targets by b."""
    known = _quadratic()
    problem = BilevelProblem(
        lambda x, y, b: known.problem.f(x, y) + b.mean() * y.sum(),
        lambda x, y, b: known.problem.g(x, y) + b.mean() * y.sum(),
    )
    return Instance(problem, known.x0, known.y0)


def _batches() -> Split:
    loader = [torch.tensor(0.1 * k, dtype=torch.float64, device="cpu") for k in (1, -2, 3, -1, 2)]
    return Split(f=loader, g=lambda index: torch.tensor(0.1 * (index * 7 % 5 - 2), dtype=torch.float64, device="cpu"))


def _sum(batch_size: int, order: Order = "shuffle", samples: int = 7) -> Split:
    """Such shifts as samples of finite sums: of seven the last block of two has one."""
    shifts = torch.tensor([0.1 * k for k in (1, -2, 3, -1, 2, -3, 0)], dtype=torch.float64, device="cpu")[:samples]
    return Split(f=FiniteSum(shifts, batch_size, order), g=FiniteSum(shifts.flip(0), batch_size, order, seed=1))


def _equal(name: str, found: Solution, expected: Solution) -> None:
    for part, a, b in (("x", found.x, expected.x), ("y", found.y, expected.y)):
        assert torch.equal(a, b), f"{name}: found {part} = {a.tolist()}, expected the same bits as {b.tolist()}."
    records = [
        [(record.step, record.value, record.grad_norm, record.status, record.stats) for record in solution.history]
        for solution in (found, expected)
    ]
    for a, b in zip(*records, strict=True):
        assert a == b, f"{name}: found the record {a}, expected {b}."
