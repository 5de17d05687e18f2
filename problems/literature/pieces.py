"""Minimization over the pieces of the inner optimality conditions, one set of active constraints at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, final

from bilevel.problems.literature.inner import Inner
from bilevel.problems.literature.programs import Model, Program, minimized

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

_TOUCHES = 1e-6  # of a constraint: it is active
_PUSHES = 1e-7  # of a multiplier, over the largest: the constraint is strongly active
GAP = 1e-7  # violation of a program, and gap of g over its size
_BETTER = 1e-9  # relative
_RIVALS = 4  # other minimizers that are kept track of
_DROPPED = 2  # active constraints that a neighboring piece may lack


@final
@dataclass(frozen=True, eq=False)
class Branch:
    """A stationary point of the inner problem that moves with x: y, the constraints that hold it, multipliers.

    Attributes:
        y: `(q,)`.
        active: the inequalities that hold with equality.
        pushes: their multipliers, over `scale`.
        holds: the multipliers of the equalities, over `scale`.
        scale: of the gradient of g.
    """

    y: Array
    active: tuple[int, ...]
    pushes: Array
    holds: Array
    scale: float

    @property
    def size(self) -> int:
        """How many unknowns it has."""
        return len(self.y) + len(self.active) + len(self.holds)


@final
@dataclass(frozen=True, eq=False)
class Found:
    """A feasible point whose y is a global inner minimizer, as far as the inner solver sees.

    Attributes:
        x: `(p,)`.
        branch: y and what holds it.
        value: f.
    """

    x: Array
    branch: Branch
    value: float


@final
class Pieces:
    """Descent over pieces.

    Where y*(x) is held by the active constraints A, (x, y, w) satisfies grad_y g + sum_A w_i grad_y c_i = 0, c_A = 0,
    w >= 0, and the other constraints. On such a piece everything is smooth: f is minimized there, under the outer
    constraints, by sequential quadratic programming, and then on the pieces that meet at the point that was found, as
    long as one of them has a better point. Where the inner problem is convex these points are its minimizers. Where it
    is not, V(x) = min_y g(x, y) is looked up by a global solve, and each minimizer z that is better than y becomes a
    rival: a branch of stationary points of its own, with g(x, y) <= g(x, z(x)) as a constraint.

    Args:
        model: the problem.
        inner: solves the inner problem at an x.
        limit: programs that are solved from a start.
        fixed: x stays what it is: the best y for f is sought among the inner minimizers there.
    """

    def __init__(self, model: Model, inner: Inner, limit: int, *, fixed: bool = False) -> None:
        self.model, self.inner, self.limit, self.fixed = model, inner, limit, fixed

    def descend(self, x: Array, y: Array) -> Iterator[Found]:
        """The points that improve on each other, from an x with a stationary point y of the inner problem."""
        best = float("inf")
        queue = list(self._around(x, self.branch(x, y)))
        tried = set[tuple[int, ...]]()
        solved = 0
        while queue and solved < self.limit:
            at, branch = queue.pop(0)
            if branch.active in tried:
                continue
            tried.add(branch.active)
            found, cost = self._solved(at, branch, self.limit - solved)
            solved += cost
            if found is not None and found.value < best - _BETTER * max(1.0, abs(found.value)):
                best = found.value
                tried = {branch.active}
                queue = list(self._around(found.x, found.branch))
                yield found

    def branch(self, x: Array, y: Array) -> Branch:
        """What holds y at x: multipliers w >= 0 of the active constraints, by least squares."""
        import numpy as np
        from scipy.optimize import nnls

        model = self.model
        v = model.values(np.concatenate([x, y]))
        slope = v.first[1, model.p :]
        scale = max(1.0, float(abs(slope).max()))
        inner = v.at[model.inner]
        active = np.flatnonzero(inner > -_TOUCHES)
        equal = v.first[model.equal, model.p :]
        rows = np.concatenate([v.first[model.inner, model.p :][active], equal, -equal])
        w = nnls(rows.T, -slope / scale)[0] if len(rows) else np.zeros(0)
        a, e = len(active), len(equal)
        return Branch(y, tuple(active.tolist()), w[:a], w[a : a + e] - w[a + e :], scale)

    def _around(self, x: Array, branch: Branch) -> Iterator[tuple[Array, Branch]]:
        """The pieces that meet at a point: what pushes stays, what only touches may be in or out; then fewer."""
        import numpy as np

        v = self.model.values(np.concatenate([x, branch.y]))
        known = dict(zip(branch.active, branch.pushes, strict=True))
        touching = [int(i) for i in np.flatnonzero(v.at[self.model.inner] > -_TOUCHES)]
        least = _PUSHES * max(1.0, max(known.values(), default=0.0))
        strong = [i for i in touching if known.get(i, 0.0) > least]
        weak = [i for i in touching if i not in strong]
        sets = [tuple(strong), *(tuple(sorted([*strong, i])) for i in weak), tuple(touching)]
        for count in range(1, _DROPPED + 1):
            sets += [tuple(i for i in touching if i not in out) for out in itertools.combinations(touching, count)]
        for active in dict.fromkeys(sets):
            pushes = np.array([known.get(i, 0.0) for i in active])
            yield x, replace(branch, active=active, pushes=pushes)

    def _solved(self, x: Array, branch: Branch, left: int) -> tuple[Found | None, int]:
        """The best point of a piece that is globally optimal for the inner problem, and how many programs it took."""
        import numpy as np

        rivals: list[Branch] = []
        for cost in range(1, min(left, _RIVALS) + 1):
            x, branch, violation = self._program(x, branch, rivals)
            if not violation <= GAP:
                return None, cost
            v = self.model.values(np.concatenate([x, branch.y]))
            if self.inner.convex:  # the conditions are sufficient
                return Found(x, branch, float(v.at[0])), cost
            lowest = self.inner.lowest(x, branch.y)
            if lowest is None:
                return None, cost
            value, z = lowest
            if v.at[1] - value <= GAP * max(1.0, abs(value)):
                return Found(x, branch, float(v.at[0])), cost
            rivals.append(self.branch(x, z))
        return None, min(left, _RIVALS)

    def _program(self, x: Array, branch: Branch, rivals: Sequence[Branch]) -> tuple[Array, Branch, float]:
        """Minimize f over x and a branch, under the outer constraints, and g no larger than that of the rivals."""
        import numpy as np

        model, p, q = self.model, self.model.p, self.model.q
        branches = [branch, *rivals]
        firsts = list(itertools.accumulate([p, *(each.size for each in branches)]))
        total = firsts[-1]
        rest = [i for i in range(model.inner.stop - model.inner.start) if i not in branch.active]

        def spread(rows: Array, first: int) -> Array:
            """Derivatives in (x, y) among all unknowns."""
            wide = np.zeros((len(rows), total))
            wide[:, :p], wide[:, first : first + q] = rows[:, :p], rows[:, p:]
            return wide

        def at(w: Array, first: int) -> Array:
            return np.concatenate([w[:p], w[first : first + q]])

        def objective(w: Array) -> tuple[float, Array]:
            v = model.values(at(w, p))
            return float(v.at[0]), spread(v.first[:1], p)[0]

        def below(w: Array) -> tuple[Array, Array]:
            v = model.values(at(w, p))
            values = [v.at[model.outer], v.at[model.inner][rest]]
            slopes = [spread(v.first[model.outer], p), spread(v.first[model.inner][rest], p)]
            for first in firsts[1:-1]:
                other = model.values(at(w, first))
                values.append(v.at[1:2] - other.at[1:2])
                slopes.append(spread(v.first[1:2], p) - spread(other.first[1:2], first))
            return np.concatenate(values), np.concatenate(slopes)

        def zero(w: Array) -> tuple[Array, Array]:
            values, slopes = [], []
            for each, first in zip(branches, firsts, strict=False):
                z, active = at(w, first), list(each.active)
                v, second = model.values(z), model.second(z)
                C, E = v.first[model.inner][active], v.first[model.equal]
                rows = np.concatenate([C, E])
                inside = slice(first + q, first + each.size)
                weights = w[inside]
                curved = np.concatenate([second[model.inner][active], second[model.equal]])
                stationary = v.first[1] / each.scale + weights @ rows
                moves = spread((second[1] / each.scale + np.tensordot(weights, curved, 1))[p:], first)
                moves[:, inside] = rows[:, p:].T
                values += [stationary[p:], v.at[model.inner][active], v.at[model.equal]]
                slopes += [moves, spread(rows, first)]
            return np.concatenate(values), np.concatenate(slopes)

        lower, upper = np.full(total, -np.inf), np.full(total, np.inf)
        lower[p + q : p + q + len(branch.active)] = 0
        if self.fixed:
            lower[:p] = upper[:p] = x
        start = [x]
        for each in branches:
            start += [each.y, each.pushes, each.holds]
        w, violation = minimized(Program(objective, below, zero, lower, upper), np.concatenate(start))
        found = w[p : p + branch.size]
        pushes = found[q : q + len(branch.active)]
        return w[:p], replace(branch, y=found[:q], pushes=pushes, holds=found[q + len(pushes) :]), violation
