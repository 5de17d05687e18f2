"""Steps of an interior-point method for convex programs with sparse rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from bilevel._linear import LinearOperator
from bilevel._numerics.sparse_rows import SparseRows
from bilevel.inner_problems.constraint_products import ConstraintProducts
from bilevel.solvers._multiplier_steps import Primal, Relaxed
from bilevel.solvers._sparse_saddle import SaddleFactor, diagonal_of, products_of

if TYPE_CHECKING:
    import numpy as np

    Vector = np.ndarray[Any, Any]
else:
    Vector = Any

_BACK = 0.995  # of the way to the nearest boundary
_ENOUGH = 1e-9  # an error that tells what holds: Newton's method on that does the rest
_IDLE = 30  # steps without a tenth less error
_KRYLOV = 1e-8  # relative residual of a step
_SURE = 1e-6  # relative to the multipliers: what Farkas' inequality has to be violated by
_CONCAVE = 1e-8  # of the curvature along a step
_HUGE = 1e10
_BEYOND = 1e4  # distances within which no point satisfies the constraints


@final
@dataclass(frozen=True, eq=False)
class Ended:
    """Where the interior-point method ended.

    Attributes:
        y: `(q,)`.
        w: the multipliers of inequalities and equalities, over the lengths of their rows.
        steps: taken.
        concave: whether H was found not to be positive semidefinite.
        contradictory: whether multipliers prove that no point is feasible.
    """

    y: Tensor
    w: Tensor
    steps: int
    concave: bool
    contradictory: bool


@final
@dataclass(frozen=True, eq=False)
class Iterate:
    """A point, or a step: y, multipliers of equalities and of inequalities, their slacks, and those of bounds.

    Attributes:
        y: `(q,)`.
        nu: of equalities.
        z: of inequalities.
        s: their slacks.
        zl: of lower bounds.
        zu: of upper bounds.
        sl: distances from lower bounds.
        su: distances from upper bounds.
    """

    y: Vector
    nu: Vector
    z: Vector
    s: Vector
    zl: Vector
    zu: Vector
    sl: Vector
    su: Vector

    @property
    def parts(self) -> tuple[Vector, ...]:
        """All of it."""
        return self.y, self.nu, self.z, self.s, self.zl, self.zu, self.sl, self.su

    def moved(self, step: Iterate, t: float) -> Iterate:
        """The point after t times a step."""
        return Iterate(*(part + t * change for part, change in zip(self.parts, step.parts, strict=True)))

    def products(self, low: Vector, high: Vector) -> Vector:
        """Slacks times multipliers."""
        import numpy as np

        found: Vector = np.concatenate([self.s * self.z, (self.sl * self.zl)[low], (self.su * self.zu)[high]])
        return found

    def longest(self, step: Iterate, low: Vector, high: Vector) -> float:
        """The longest step, a little more than one at most, that leaves slacks and multipliers positive."""
        import numpy as np

        longest = 1 / _BACK
        some = [(self.s, step.s), (self.z, step.z), (self.sl[low], step.sl[low]), (self.zl[low], step.zl[low])]
        for value, change in (*some, (self.su[high], step.su[high]), (self.zu[high], step.zu[high])):
            falling = change < 0
            if falling.any():
                longest = min(longest, float(np.min(-value[falling] / change[falling])))
        return longest


@final
@dataclass(frozen=True, eq=False)
class SparseProgram:
    """Min g(y) s.t. A y = b, G y <= h, lower <= y <= upper, with rows of length one.

    Attributes:
        sparse: the module `scipy.sparse`.
        relaxed: the program by products.
        G: inequalities, those with a finite side only, `scipy.sparse`.
        h: `(k,)`.
        A: equalities.
        b: `(m,)`.
        lower: bounds `(q,)`.
        upper: the same.
        told: which inequalities are in G, of all.
    """

    sparse: Any
    relaxed: Relaxed
    G: Any
    h: Vector
    A: Any
    b: Vector
    lower: Vector
    upper: Vector
    told: Vector

    @staticmethod
    def of(sparse: Any, relaxed: Relaxed, rows: tuple[SparseRows, SparseRows], like: Tensor) -> SparseProgram:
        """From the constraints as functions, and the rows that they are."""
        import numpy as np

        scale = 1 / _array(relaxed.lengths)
        k = relaxed.k
        c, e = (_array(part) for part in relaxed.constraints.values(torch.zeros_like(like)))
        h, b = -c * scale[:k], -e * scale[k:]
        told = np.isfinite(h)
        G, A = (each.scipy(sparse) for each in rows)
        G = (sparse.diags(scale[:k]) @ G)[told]
        A = sparse.diags(scale[k:]) @ A
        return SparseProgram(
            sparse, relaxed, G.tocsr(), h[told], A.tocsr(), b, _array(relaxed.lower), _array(relaxed.upper), told
        )

    def run(self, y0: Tensor, tol: float, max_steps: int) -> Ended:
        """From y0, moved inside its bounds."""
        import numpy as np

        at = best = self._start(_array(y0))
        steps, idle, least, concave = 0, 0, np.inf, False
        while True:
            H, slope, _ = self._model(at.y)
            error = self._error(at, slope, H)
            idle = 0 if error < 0.9 * least else idle + 1
            if error < least:
                best, least = at, error
            if not max(_ENOUGH, 0.1 * tol) < error < np.inf or steps >= max_steps or idle >= _IDLE:
                break
            steps += 1
            step = self._step(at, H, slope)
            if step is None or not all(np.isfinite(part).all() for part in step.parts):
                break
            concave = concave or float(step.y @ H(step.y)) < -_CONCAVE * float(np.linalg.norm(step.y)) * float(
                np.linalg.norm(H(step.y))
            )
            at = at.moved(step, min(1.0, _BACK * at.longest(step, self.low, self.high)))
        contradictory = self._contradictory(at)
        w = np.zeros(len(self.told) + len(self.b))
        w[: len(self.told)][self.told], w[len(self.told) :] = best.z, best.nu
        y = np.where(self.fixed, self.lower, np.clip(best.y, self.lower, self.upper))
        found, multipliers = torch.from_numpy(y).to(y0), torch.from_numpy(w).to(self.relaxed.lengths)
        return Ended(found, multipliers, steps, concave, contradictory)

    @property
    def fixed(self) -> Vector:
        """Which entries have one value only."""
        return self.lower >= self.upper

    @property
    def low(self) -> Vector:
        """Which others have a lower bound."""
        import numpy as np

        return np.isfinite(self.lower) & ~self.fixed

    @property
    def high(self) -> Vector:
        """Which others have an upper bound."""
        import numpy as np

        return np.isfinite(self.upper) & ~self.fixed

    def _start(self, y0: Vector) -> Iterate:
        """Y inside its bounds, slacks at least a tenth of what there is, and multipliers as large as the gradient."""
        import numpy as np

        y = _inside(y0, self.lower, self.upper)
        sides = np.concatenate([y, self.h[np.abs(self.h) < _HUGE], self.b])
        s = np.maximum(self.h - self.G @ y, 0.1 * (1 + float(np.abs(sides).max(initial=0.0))))
        dual = _size(self._model(y)[1])
        sl, su = np.where(self.low, y - self.lower, 1.0), np.where(self.high, self.upper - y, 1.0)
        z, zl, zu = np.full(len(s), dual), dual * self.low, dual * self.high
        return Iterate(y, np.zeros(len(self.b)), z, s, zl, zu, sl, su)

    def _error(self, at: Iterate, slope: Vector, H: Callable[[Vector], Vector]) -> float:
        """The largest relative violation of the optimality conditions."""
        import numpy as np

        force = self.A.T @ at.nu + self.G.T @ at.z
        primal, dual = _size(at.y), _size(np.concatenate([slope, force, H(at.y)]))
        parts = [
            np.where(self.fixed, 0.0, slope + force - at.zl + at.zu) / dual,
            (self.A @ at.y - self.b) / primal,
            (self.G @ at.y + at.s - self.h) / primal,
            at.products(self.low, self.high) / primal / dual,
        ]
        return max(float(np.abs(part).max(initial=0.0)) for part in parts)

    def _step(self, at: Iterate, H: Callable[[Vector], Vector], slope: Vector) -> Iterate | None:
        """Mehrotra's step: towards the boundary, then with what that leaves of the products; None: no factor."""
        import numpy as np

        q, m, free = len(at.y), len(self.b), (~self.fixed).astype(float)
        S = self.sparse.vstack([self.A, self.G], format="csr") @ self.sparse.diags(free)
        diagonal = diagonal_of(H, q) * free + self.fixed
        D = at.zl / at.sl + at.zu / at.su
        E = np.concatenate([np.zeros(m), at.s / at.z])
        try:
            saddle = SaddleFactor.of(self.sparse, lambda u: H(u * free) * free + u * self.fixed, diagonal, D, S, E)
        except RuntimeError:  # singular
            return None
        rd = slope + self.A.T @ at.nu + self.G.T @ at.z - at.zl + at.zu
        rp, rs = self.A @ at.y - self.b, self.G @ at.y + at.s - self.h

        def towards(t: Vector, tl: Vector, tu: Vector) -> Iterate:
            """To products s z + t, and the like of bounds."""
            right = -rd + np.where(self.low, tl / at.sl, 0.0) - np.where(self.high, tu / at.su, 0.0)
            found = saddle.solve(np.concatenate([right * free, -rp, -rs - t / at.z]), _KRYLOV).value
            dy, dnu, dz = found[:q] * free, found[q : q + m], found[q + m :]
            dl = np.where(self.low, (tl - at.zl * dy) / at.sl, 0.0)
            du = np.where(self.high, (tu + at.zu * dy) / at.su, 0.0)
            return Iterate(dy, dnu, dz, (t - at.s * dz) / at.z, dl, du, dy * self.low, -dy * self.high)

        products = at.products(self.low, self.high)
        first = towards(-at.s * at.z, -at.sl * at.zl, -at.su * at.zu)
        if not len(products):
            return first
        mu = float(products.mean())
        ahead = at.moved(first, at.longest(first, self.low, self.high)).products(self.low, self.high)
        aim = mu * min(max(float(ahead.mean()) / mu, 0.0), 1.0) ** 3 if mu > 0 else 0.0
        return towards(
            aim - at.s * at.z - first.s * first.z,
            aim - at.sl * at.zl - first.sl * first.zl,
            aim - at.su * at.zu - first.su * first.zu,
        )

    def _model(self, y: Vector) -> tuple[Any, Vector, LinearOperator]:
        """Products with H, the gradient, and H, at y."""
        like = self.relaxed.lower
        _, slope, hessian = self.relaxed.objective.hessian(torch.from_numpy(y).to(like))
        return products_of(hessian, like), _array(slope), hessian

    def _contradictory(self, at: Iterate) -> bool:
        """Farkas' lemma: multipliers whose forces cancel and whose sides are negative leave no feasible point."""
        import numpy as np

        size = max(_size(part) for part in (at.z, at.nu, at.zl, at.zu))
        if not np.isfinite(size):
            return False
        z, nu, zl, zu = (part / size for part in (at.z, at.nu, at.zl, at.zu))
        force = self.A.T @ nu + self.G.T @ z - zl + zu
        side = float(
            self.b @ nu + self.h @ z - self.lower[self.low] @ zl[self.low] + self.upper[self.high] @ zu[self.high]
        )
        side -= float(force[self.fixed] @ self.lower[self.fixed])
        force = np.where(self.fixed, 0.0, force)
        reach = 1 + float(np.median(np.abs(at.y)))
        return side < -_SURE * reach and float(np.linalg.norm(force)) * _BEYOND * reach < -side

    def end(
        self,
        rows: ConstraintProducts,
        hessian: LinearOperator,
        free: Tensor,
        on: Tensor,
        at: Primal,
        y: Tensor,
        E: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """A Newton step with what holds as equalities; see `Relaxed.newton`."""
        import numpy as np

        relaxed, q, k = self.relaxed, y.shape[-1], self.relaxed.k
        held = torch.where(on, at.w, 0.0)
        plain = ConstraintProducts.at(relaxed.constraints, y)
        slope = _array(relaxed.objective.gradient(y) + plain.transposed(held / relaxed.lengths))
        mask, holds = _array(free), _array(on) > 0
        among = np.concatenate([holds[:k][self.told], holds[k:]])
        S = self.sparse.vstack([self.G, self.A], format="csr")[among] @ self.sparse.diags(mask)
        H = products_of(hessian, y)

        def masked(u: Vector) -> Vector:
            found: Vector = H(u * mask) * mask + u * (1 - mask)
            return found

        diagonal = diagonal_of(H, q) * mask + (1 - mask)
        right = np.concatenate([-slope * mask, -_array(E)[holds]])
        try:
            saddle = SaddleFactor.of(self.sparse, masked, diagonal, np.zeros(q), S, np.zeros(S.shape[0]))
            found = saddle.solve(right, 1e-15).value
        except RuntimeError:
            return y, held
        moved = y + torch.from_numpy(found[:q] * mask).to(y)
        change = np.zeros(len(holds))
        change[holds] = found[q:]
        moved = torch.maximum(torch.minimum(moved, relaxed.upper), relaxed.lower)
        return moved, held + torch.from_numpy(change).to(held)


def _array(tensor: Tensor) -> Vector:
    array: Vector = tensor.detach().double().cpu().numpy()
    return array.copy()


def _size(part: Vector) -> float:
    """The largest modulus; 1 if that is zero."""
    import numpy as np

    return float(np.abs(part).max(initial=0.0)) or 1.0


def _inside(y: Vector, lower: Vector, upper: Vector) -> Vector:
    """Y with a tenth of the room between its bounds, or of one, to the next bound."""
    import numpy as np

    width = np.where(np.isfinite(upper - lower), upper - lower, 1.0)
    room = 0.1 * np.maximum(width, 0.0)
    room = np.where(np.isfinite(upper) & np.isfinite(lower), room, np.maximum(room, 0.1 * np.abs(y)))
    found: Vector = np.minimum(np.maximum(y, lower + room), upper - room)
    return np.where(lower >= upper, lower, found)
