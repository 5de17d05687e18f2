"""Inner problems at a fixed x, solved globally: the value function V(x) = min_y g(x, y)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, final

from bilevel.problems.literature.programs import Model, Program, minimized
from bilevel.problems.literature.starts import bounds, box, sobol

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

_SAMPLE = 512  # points that are looked at where the inner problem may have several minimizers
_KEPT = 5  # of them, from which a descent begins
_WEIGHT = 1e3  # of violations in their comparison
_VERTICES = 20  # that are gone to, at most
_SOLVED = 1e-7  # violation of a solution


@final
class Inner:
    """Solves min_y g(x, y) under the inner constraints.

    Args:
        model: the problem.
        seed: of the points from which a problem that is not convex is solved.
    """

    def __init__(self, model: Model, seed: int) -> None:
        self.model = model
        self.linear = model.statement.kind in ("lp", "fractional_lp")
        self.convex = model.statement.kind not in ("nonconvex", "simple")
        low, high = (bound[model.p :] for bound in box(model.statement))
        unit = sobol(model.q, _SAMPLE, seed)
        self.points: Array = (low + unit * (high - low)).numpy()
        self.lower, self.upper = (bound[model.p :].numpy() for bound in bounds(model.statement))

    def local(self, x: Array, y: Array) -> tuple[float, Array, float]:
        """A local minimizer from y: g, the point, and the largest violation there."""
        import numpy as np

        if self.linear:
            return self._vertex(x, y)

        model, p = self.model, self.model.p

        def at(u: Array) -> Any:
            return model.values(np.concatenate([x, u]))

        program = Program(
            lambda u: (float(at(u).at[1]), at(u).first[1, p:]),
            lambda u: (at(u).at[model.inner], at(u).first[model.inner, p:]),
            lambda u: (at(u).at[model.equal], at(u).first[model.equal, p:]),
            self.lower,
            self.upper,
        )
        found, violation = minimized(program, y)
        return float(at(found).at[1]), found, violation

    def _vertex(self, x: Array, y: Array) -> tuple[float, Array, float]:
        """A vertex that minimizes g, by linear programs with its gradient until g falls no more.

        That is the first one where g is linear. A linear-fractional g falls along a direction exactly where its
        gradient says so, and there are finitely many vertices.
        """
        import numpy as np
        from scipy.optimize import linprog

        model, p = self.model, self.model.p
        best, violation = float("inf"), float("inf")
        for _ in range(_VERTICES):
            v = model.values(np.concatenate([x, y]))
            G, A = v.first[model.inner, p:], v.first[model.equal, p:]
            found: Any = linprog(
                v.first[1, p:],
                *(G if len(G) else None, G @ y - v.at[model.inner] if len(G) else None),
                *(A if len(A) else None, A @ y - v.at[model.equal] if len(A) else None),
                bounds=(None, None),
            )
            if found.status != 0 or found.x is None:
                break
            at = model.values(np.concatenate([x, found.x])).at
            if at[1] >= best - 1e-12 * max(1.0, abs(at[1])):
                break
            best, y = float(at[1]), found.x
            violation = max(float(at[model.inner].max(initial=0.0)), float(abs(at[model.equal]).max(initial=0.0)))
        return best, y, violation

    def minimizers(self, x: Array, y: Array) -> list[tuple[float, Array]]:
        """Local minimizers that satisfy the constraints, the lowest first.

        Of a convex problem from y, of others also from the best of many points.
        """
        import numpy as np

        starts = [y]
        if not self.convex:
            many = np.concatenate([np.repeat(x[:, None], _SAMPLE, 1), self.points.T])
            values = self.model.many(np.ascontiguousarray(many))
            violation = values[self.model.inner].clip(0).sum(0) + abs(values[self.model.equal]).sum(0)
            starts += list(self.points[np.argsort(values[1] + _WEIGHT * violation)[:_KEPT]])
        found = [self.local(x, start) for start in starts]
        return sorted(((value, z) for value, z, left in found if left <= _SOLVED), key=lambda each: each[0])

    def lowest(self, x: Array, y: Array) -> tuple[float, Array] | None:
        """V(x) and where it is taken; None where no feasible point was found."""
        found = self.minimizers(x, y)
        return found[0] if found else None
