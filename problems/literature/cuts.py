"""Minimization over x and y where the value function is kept by cuts: g no larger than at other points y_k."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, final

from bilevel.problems.literature.inner import Inner
from bilevel.problems.literature.pieces import GAP, Found, Pieces
from bilevel.problems.literature.programs import Model, Program, minimized

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

_ROUNDS = 6
_INSIDE = 1e-9  # of a constraint at the point of a cut: it satisfies it
# What a cut leaves of the gap that is taken for none. A cut from a y_k beside y holds with equality there and has next
# to no gradient, whose direction is chance: linearized, it would hold (x, y) where it is.
_ROOM = 0.25 * GAP


@final
class Cuts:
    """min f over (x, y) under all constraints and g(x, y) <= g(x, y_k) + room, for points y_k that satisfy those at x.

    V(x) is at most g(x, y_k) there. Each y_k is a global inner minimizer at the x that was found last, until g(x, y)
    is V(x). Nothing is asked of gradients in y, so that this works where there are no multipliers, and where g is
    constant in y at the solution; there `Pieces`, which follows minimizers that move with x, does not.

    Source: Mitsos, Lemonidis, Barton, "Global solution of bilevel programs with a nonconvex inner program", J. Glob.
    Optim. 42 (2008), the lower bounding procedure, with local solves.

    Args:
        model: the problem.
        inner: solves the inner problem at an x.
        fixed: x stays what it is.
    """

    def __init__(self, model: Model, inner: Inner, *, fixed: bool = False) -> None:
        self.model, self.inner, self.fixed = model, inner, fixed

    def descend(self, x: Array, y: Array) -> Iterator[Found]:
        """The point that is found from (x, y), if it is one of the bilevel problem."""
        import numpy as np

        z = np.concatenate([x, y])
        for room in (_ROOM, 0.0):
            end = self._from(z, room)
            if end is not None:
                at, y = end[: self.model.p], end[self.model.p :]
                branch = Pieces(self.model, self.inner, 0).branch(at, y)
                yield Found(at, branch, float(self.model.values(end).at[0]))
                return

    def _from(self, z: Array, room: float) -> Array | None:
        """With room for each cut, and at last with none: f takes what there is, which may be a root of it, of x or y.

        None where that comes to nothing.
        """
        points: list[Array] = []
        last = room == 0
        for _ in range(_ROUNDS + 1):
            z, violation = self._program(z, points, 0.0 if last else room)
            if not violation <= (_INSIDE if room and last else GAP):
                return None
            lowest = self.inner.lowest(z[: self.model.p], z[self.model.p :])
            if lowest is None:
                return None
            points.append(lowest[1])
            if self.model.values(z).at[1] - lowest[0] <= GAP * max(1.0, abs(lowest[0])):
                if last or len(points) == 1:
                    return z
                last = True
        return None

    def _program(self, z: Array, points: Sequence[Array], room: float = _ROOM) -> tuple[Array, float]:
        import numpy as np

        model, p = self.model, self.model.p

        def below(w: Array) -> tuple[Array, Array]:
            v = model.values(w)
            values, slopes = [v.at[model.outer], v.at[model.inner]], [v.first[model.outer], v.first[model.inner]]
            for point in points:
                value, slope = self._cut(v.at[1], v.first[1], np.concatenate([w[:p], point]), room)
                values.append(np.array([value]))
                slopes.append(slope[None])
            return np.concatenate(values), np.concatenate(slopes)

        def zero(w: Array) -> tuple[Array, Array]:
            v = model.values(w)
            return v.at[model.equal], v.first[model.equal]

        def objective(w: Array) -> tuple[float, Array]:
            v = model.values(w)
            return float(v.at[0]), v.first[0]

        lower, upper = np.full(model.n, -np.inf), np.full(model.n, np.inf)
        if self.fixed:
            lower[:p] = upper[:p] = z[:p]
        return minimized(Program(objective, below, zero, lower, upper), z)

    def _cut(self, g: float, slope: Array, other: Array, room: float) -> tuple[float, Array]:
        """min(g(x, y) - g(x, y_k) - room, -max c(x, y_k)), which is to be at most 0, and its derivative."""
        import numpy as np

        v, p = self.model.values(other), self.model.p
        value = g - v.at[1] - room * max(1.0, abs(v.at[1]))
        grows = 1 + room * np.sign(v.at[1]) if abs(v.at[1]) > 1 else 1.0
        moves = slope - np.concatenate([grows * v.first[1, :p], np.zeros(self.model.q)])
        inside = v.at[self.model.inner]
        if len(inside) and inside.max() > _INSIDE and -inside.max() < value:
            row = v.first[self.model.inner][int(inside.argmax())]
            return -float(inside.max()), -np.concatenate([row[:p], np.zeros(self.model.q)])
        return float(value), moves
