"""An estimator as one compiled program."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor

from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._result import Tally
from bilevel.arguments.fits import demand_types
from bilevel.bounds.beforehand import Beforehand
from bilevel.bounds.bound import Bound
from bilevel.compiled.applicable import demand_compilable, demand_steps_at
from bilevel.compiled.code import Code
from bilevel.compiled.implicit import Implicit
from bilevel.compiled.norms import row_norm
from bilevel.compiled.packed import Legend, packed
from bilevel.compiled.plain import demand_smooth
from bilevel.compiled.programs import program
from bilevel.compiled.reading import Backend, fine, read, results, unlike
from bilevel.compiled.tracing import Traced, Tracing
from bilevel.compiled.unrolled import Unrolled
from bilevel.hypergrad.aid import AID
from bilevel.hypergrad.itd import ITD
from bilevel.requirements.properties import Property


@final
@dataclass(frozen=True, eq=False)
class Compiled(AbstractEstimator):
    """The estimate of another estimator, by one program: the inner steps, the linear solve and the cross product.

    The numbers are those of the estimator up to rounding, the statuses those of the residuals that the program measures
    on its way, which it returns in one row with the value. Loops end where the estimator's do: at a tolerance, or after
    so many steps; with tasks, rows that have arrived stand still while others go on.

    What is traced is what is run from then on: f, g and init must be functions of their arguments and of what they
    close over. Tensors that they close over are inputs of the program, so that what is written to them is seen; another
    captured number is another program. The first estimate by a program is compared with that of the estimator itself.

    Cost: the oracle calls of the estimator; to compile, some 10 to 40 seconds, once for each code, shape and machine.

    Args:
        of: `AID` with `Iterate` and `CG` or `Neumann`, or `ITD` with a fixed number of steps.
        backend: "inductor"; "eager" runs the graph that would be compiled as it is.

    Raises:
        NotCompilableError: naming the part that is no fixed program.

    Example:
        >>> import torch
        >>> from bilevel import AID, BilevelProblem, hypergradient
        >>> from bilevel.solvers import CG, GradientDescent, Iterate
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2
        ... )
        >>> aid = AID(Iterate(GradientDescent(1.0), max_steps=1), CG(rtol=1e-6))
        >>> compiled = Compiled(aid, backend="eager")
        >>> hypergradient(problem, torch.ones(1), torch.zeros(1), estimator=compiled).grad
        tensor([-2.])
    """

    of: AbstractEstimator
    backend: Backend = "inductor"

    def __post_init__(self) -> None:
        demand_types(self)
        demand_compilable(self.of)

    @property
    def requires(self) -> frozenset[Property]:
        return self.of.requires

    @property
    def takes_encoding(self) -> bool:
        return self.of.takes_encoding

    @property
    def forgets_start(self) -> bool:
        return self.of.forgets_start

    @property
    def accurate(self) -> bool:
        return self.of.accurate

    def error_bound(self, about: Beforehand) -> Bound:
        return self.of.error_bound(about)

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        y0 = problem.spread(start.y)
        guess = start.v if isinstance(self.of, AID) else None
        vectors = [x.contiguous(), y0.contiguous(), *(() if guess is None else (guess.contiguous(),))]
        code, is_new = Code.of(problem), list[bool]()
        found = program(
            (code.key(self.of), *(tuple(v.shape) for v in vectors), str(x.dtype)),
            self.backend,
            lambda: self._traced(code, vectors, is_new),
            [*vectors, *code.data.tensors],
            f"an estimate by {type(self.of).__name__} ({x.numel()} outer, {y0.numel()} inner variables)",
        )
        h, y, v, row = results(found, vectors, code.data.tensors, self.has_v)
        estimate = read(found.notes, row.tolist(), h, y, v, problem.tally)
        return compared(self.of, problem, x, start, estimate) if is_new else estimate

    @property
    def has_v(self) -> bool:
        """Whether there is a linear system."""
        return isinstance(self.of, AID)

    def _traced(self, code: Code, vectors: list[Tensor], is_new: list[bool]) -> tuple[Traced, Legend]:
        is_new.append(True)
        tracing = Tracing(code)
        parts = computation(tracing, self.of, vectors[0], vectors[1])

        def whole(x: Tensor, y0: Tensor, *guess: Tensor) -> tuple[Tensor, ...]:
            h, y, v, numbers, rows = parts.compute(x, y0, guess[0] if guess else None)
            numbers |= {"norm": row_norm(h), "fine": fine(h, numbers["value"], rows)}
            return h, y, *(() if v is None else (v,)), packed(numbers, rows)

        return tracing.whole(whole, *vectors), parts.legend


def computation(tracing: Tracing, estimator: AbstractEstimator, x: Tensor, y: Tensor) -> Implicit | Unrolled:
    """The parts of an estimate, traced.

    Args:
        tracing: the computation.
        estimator: one that `demand_compilable` lets pass.
        x: an example.
        y: an example.
    """
    demand_smooth(tracing.code.problem)
    demand_steps_at(estimator, y)
    if isinstance(estimator, AID):
        return Implicit(tracing, estimator, x, y)
    assert isinstance(estimator, ITD)
    return Unrolled(tracing, estimator, x, y)


def compared(
    estimator: AbstractEstimator, problem: FlatProblem, x: Tensor, start: FlatStart, found: FlatEstimate
) -> FlatEstimate:
    """The same, with a report where the estimator itself finds something else: once for each program."""
    own = estimator.estimate(problem.with_tally(Tally()), x, start)
    return replace(found, reports=(*found.reports, *unlike(own, found)))


def compiled(estimator: Any, backend: Backend = "inductor") -> Compiled:
    """An estimator as one program; itself where it is one.

    Raises:
        NotCompilableError: naming the part that is no fixed program.
    """
    return estimator if isinstance(estimator, Compiled) else Compiled(estimator, backend)
