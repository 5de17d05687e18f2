"""How the test problems are solved: Phi by the best of the inner minimizers, and a descent from many starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._optimizer import AbstractOuterDriver
from bilevel._result import Report, Status
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import SEED, demand_ranges
from bilevel.problems.literature.collection import statement
from bilevel.problems.literature.cuts import Cuts
from bilevel.problems.literature.inner import Inner
from bilevel.problems.literature.pieces import Branch, Found, Pieces
from bilevel.problems.literature.programs import Model, Program, minimized
from bilevel.problems.literature.starts import box, sobol
from bilevel.requirements.properties import Property

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

_PROGRAMS, _AT_A_POINT = 40, 12  # that are solved from a start, and to find the best y at an x
_FEASIBLE = 1e-6
_BETTER, _TIE = 1e-9, 1e-7  # relative


@final
@dataclass(frozen=True)
class OptimisticValue(AbstractEstimator):
    """Phi(x) = min {f(x, y) : y in argmin g(x, .), outer(x, y) <= 0}, with its derivative along a piece.

    V(x) = min_y g(x, y) is found by a global solve: from many points where g or a constraint is not convex. Of the
    minimizers, the best for f is sought by `Pieces` and `Cuts` at this x. The derivative is that of f(x, y(x)) where
    y(x) is held by the constraints that push at y, by one dense solve of the optimality conditions; where y* jumps, Phi
    has none, and this is the one along y(x). Outer constraints play no part in it.

    Statuses: `infeasible` where no inner minimizer satisfies the outer constraints at x, or there is none.

    Args:
        name: of the problem.
        seed: of the points from which it is solved.
    """

    name: str
    seed: int = 0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, seed=SEED)

    @property
    def requires(self) -> frozenset[Property]:
        return frozenset()

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        model = Model(statement(self.name))
        inner = Inner(model, self.seed)
        at = x.detach().numpy().copy()
        minima = inner.minimizers(at, start.y.detach().numpy())
        if not minima:
            report = Report("inner", Status.infeasible, float("inf"), 0)
            return FlatEstimate(torch.zeros_like(x), problem.f(x, start.y).detach(), start.y.clone(), (report,))
        pieces, cuts = Pieces(model, inner, _AT_A_POINT, fixed=True), Cuts(model, inner, fixed=True)
        lowest = minima[0][0]
        ties = [z for value, z in minima if value <= lowest + _TIE * max(1.0, abs(lowest))]
        here = [found for z in ties for found in (*pieces.descend(at, z), *cuts.descend(at, z))]
        best = min(here, key=lambda found: found.value, default=None)
        branch = pieces.branch(at, ties[0]) if best is None else best.branch
        grad, violation = _derivative(model, at, branch)
        status = Status.successful if violation <= _FEASIBLE else Status.infeasible
        y = torch.from_numpy(branch.y.copy())
        report = Report("inner", status, violation, 1)
        return FlatEstimate(torch.from_numpy(grad), problem.f(x, y).detach(), y, (report,))


@final
@dataclass(frozen=True)
class Search(AbstractOuterDriver):
    """Descent over pieces from the points of a scrambled Sobol sequence; `minimize(max_steps=)` says from how many.

    Each point is moved to the nearest that satisfies the constraints of both levels, y to a local minimizer of g there,
    and from it `Pieces` and `Cuts` descend. What is evaluated, and so recorded, is each point that improves on all
    before it.

    The box of the points is that of :func:`bilevel.problems.literature.starts.box`, shrunk to what the constraints of
    both levels let each entry be, as far as local solves tell. It depends on no solution.

    Args:
        name: of the problem.
        seed: of the sequence.

    Raises:
        ImportError: at its use, without scipy.
    """

    name: str
    seed: int = 0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, seed=SEED)

    def drive(
        self,
        evaluate: Callable[[Tensor], tuple[float, Tensor]],
        x0: Tensor,
        *,
        bounds: tuple[Tensor, Tensor] | None,
        max_steps: int,
        tol: float | None,
    ) -> tuple[Tensor, Status]:
        best: Found | None = None
        for found in self._found(max_steps):
            if best is None or found.value < best.value - _BETTER * max(1.0, abs(best.value)):
                best = found
                evaluate(torch.from_numpy(found.x.copy()))
        if best is None:
            return x0.detach().clone(), Status.stagnated
        return torch.from_numpy(best.x.copy()), Status.successful

    def _found(self, count: int) -> Iterator[Found]:
        """Points of the bilevel problem, from each start."""
        model = Model(statement(self.name))
        inner = Inner(model, self.seed)
        for z in reachable(model, count, self.seed):
            point, violation = _nearest(model, z)
            if not violation <= _FEASIBLE:
                continue
            x = point[: model.p]
            _, y, violation = inner.local(x, point[model.p :])
            if not violation <= _FEASIBLE:
                continue
            yield from Pieces(model, inner, _PROGRAMS).descend(x, y)
            yield from Cuts(model, inner).descend(x, y)


def reachable(model: Model, count: int, seed: int) -> Array:
    """Points of a scrambled Sobol sequence in the box of what the constraints let z = (x, y) be: `(count, p + q)`."""
    import numpy as np

    low, high = (bound.numpy().copy() for bound in box(model.statement))
    program = _feasible(model, low.copy(), high.copy())
    middle, violation = minimized(_toward(program, (low + high) / 2), (low + high) / 2)
    for i in range(model.n if violation <= _FEASIBLE else 0):
        for bound, sign in ((low, 1.0), (high, -1.0)):
            direction = np.zeros(model.n)
            direction[i] = sign
            found, violation = minimized(_along(program, direction), middle)
            if violation <= _FEASIBLE:
                bound[i] = found[i]
    low, high = np.minimum(low, high), np.maximum(low, high)
    unit = sobol(model.n, count, seed).numpy()
    points: Array = low + unit * (high - low)
    return points


def _nearest(model: Model, z: Array) -> tuple[Array, float]:
    """The nearest point that satisfies the constraints of both levels, as far as a local solve tells."""
    import numpy as np

    free = np.full(model.n, np.inf)
    return minimized(_toward(_feasible(model, -free, free), z), z)


def _feasible(model: Model, lower: Array, upper: Array) -> Program:
    """The constraints of both levels."""
    import numpy as np

    def below(z: Array) -> tuple[Array, Array]:
        v = model.values(z)
        rows = [*range(model.outer.start, model.outer.stop), *range(model.inner.start, model.inner.stop)]
        return v.at[rows], v.first[rows]

    def zero(z: Array) -> tuple[Array, Array]:
        v = model.values(z)
        return v.at[model.equal], v.first[model.equal]

    return Program(lambda z: (0.0, np.zeros(model.n)), below, zero, lower, upper)


def _toward(program: Program, target: Array) -> Program:
    return Program(
        lambda z: (float(((z - target) ** 2).sum()), 2 * (z - target)),
        *(program.below, program.zero, program.lower, program.upper),
    )


def _along(program: Program, direction: Array) -> Program:
    return Program(
        lambda z: (float(direction @ z), direction), program.below, program.zero, program.lower, program.upper
    )


def _derivative(model: Model, x: Array, branch: Branch) -> tuple[Array, float]:
    """grad of f(x, y(x)) along a branch, by least squares, and by how much outer constraints are violated there."""
    import numpy as np

    z, p, q = np.concatenate([x, branch.y]), model.p, model.q
    v, second = model.values(z), model.second(z)
    largest = max(1.0, float(branch.pushes.max(initial=0.0)))
    strong = [i for i, push in zip(branch.active, branch.pushes, strict=True) if push > 1e-7 * largest]
    pushes = np.array([push for push in branch.pushes if push > 1e-7 * largest])
    rows = np.concatenate([v.first[model.inner][strong], v.first[model.equal]])
    weights = np.concatenate([pushes, branch.holds])
    curved = np.concatenate([second[model.inner][strong], second[model.equal]])
    L = second[1] / branch.scale + np.tensordot(weights, curved, 1)
    k = len(rows)
    K = np.block([[L[p:, p:], rows[:, p:].T], [rows[:, p:], np.zeros((k, k))]])
    moves = np.linalg.lstsq(K, -np.concatenate([L[p:, :p], rows[:, :p]]), rcond=None)[0][:q]
    grad: Array = v.first[0, :p] + moves.T @ v.first[0, p:]
    return grad, float(v.at[model.outer].max(initial=0.0))
