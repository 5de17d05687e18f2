"""Branch and bound over the active sets of an inner linear program, where all constraints are affine in (x, y)."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel._calculus import grad
from bilevel.algorithms.engine.optimistic import Optimistic
from bilevel.algorithms.engine.programs import Program, in_numpy, values_and_rows
from bilevel.solvers._scipy import as_numpy, scipy_optimize

if TYPE_CHECKING:
    import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"

_COMPLEMENTARY = 1e-9


@final
@dataclass(frozen=True, eq=False)
class LinearConditions:
    """The optimality conditions of an inner linear program whose data are affine in x, over z = (x, y, lambda, nu).

        A z = b (E, e and grad_y (g + lambda'c + nu'e)),   G z <= h (C and c),   lambda >= 0,   lambda_i c_i = 0

    Attributes:
        A: `(m, n)`.
        b: `(m,)`.
        G: `(k, n)`; the last rows are those of c.
        h: `(k,)`.
        sizes: p, q, how many c there are, and how many e.
        slope: the gradient of f `(p + q,)` and f at zero, where f is affine too; None: it is not.
    """

    A: Array
    b: Array
    G: Array
    h: Array
    sizes: tuple[int, int, int, int]
    slope: tuple[Array, float] | None

    @staticmethod
    def of(problem: Optimistic, x: Tensor, y: Tensor) -> LinearConditions | None:
        """Those of a problem; None where it has others, as far as its values at random points tell."""
        import numpy as np

        p, q = x.numel(), y.numel()

        def slope(z: Tensor) -> Tensor:
            at = z[p:] if z.requires_grad else z[p:].detach().requires_grad_()
            with torch.enable_grad():
                return grad(problem.problem.g(z[:p], at), at, create_graph=True)

        def constraints(z: Tensor) -> Tensor:
            (C, E), (c, e) = problem.outer(z[:p], z[p:]), problem.inner(z[:p], z[p:])
            return torch.cat([C, c, E, e])

        def f(z: Tensor) -> Tensor:
            return problem.problem.f(z[:p], z[p:]).reshape(1)

        (C, E), (c, e) = problem.outer(x, y), problem.inner(x, y)
        zero = torch.zeros_like(torch.cat([x, y]))
        if not (_is_affine(constraints, zero) and _is_affine(slope, zero) and _is_constant(slope, zero, p)):
            return None
        a, rows = (as_numpy(part).reshape(part.shape) for part in values_and_rows(constraints, zero))
        s, bend = (as_numpy(part).reshape(part.shape) for part in values_and_rows(slope, zero))
        k, m, outer = len(c), len(e), len(C)
        wide = np.hstack([rows, np.zeros((len(rows), k + m))])
        inner = rows[outer : outer + k, p:].T, rows[outer + k + len(E) :, p:].T
        A = np.vstack([wide[outer + k :], np.hstack([bend, *inner])])
        b = -np.concatenate([a[outer + k :], s])
        affine = None
        if _is_affine(f, zero):
            value, (row,) = values_and_rows(f, zero)
            affine = as_numpy(row), float(value[0])
        return LinearConditions(A, b, wide[: outer + k], -a[: outer + k], (p, q, k, m), affine)

    def solve(
        self, problem: Optimistic, start: Array, like: Tensor, bounds: tuple[Array, Array], max_nodes: int
    ) -> tuple[Array | None, bool]:
        """The best (x, y) that was found, and whether every branch was looked at.

        Each node has some c_i fixed at zero, and some lambda_i; the least of f on what remains bounds it from below
        where f is affine, and a local minimum of f does where f is convex.

        Args:
            problem: for f.
            start: (x, y), where local searches begin.
            like: a tensor of the dtype and device of x.
            bounds: of x.
            max_nodes: how many nodes are looked at at most.
        """
        import numpy as np

        p, q, k, m = self.sizes
        low = np.concatenate([bounds[0], np.full(q, -np.inf), np.zeros(k), np.full(m, -np.inf)])
        high = np.concatenate([bounds[1], np.full(q + k + m, np.inf)])
        count = itertools.count()
        queue: list[tuple[float, int, tuple[int, ...]]] = [(-np.inf, next(count), (0,) * k)]
        best, found, nodes = np.inf, None, 0
        first = np.concatenate([start, np.zeros(k + m)])
        while queue and nodes < max_nodes:
            bound, _, fixed = heapq.heappop(queue)
            if bound >= best - 1e-9 * max(1.0, abs(best)):
                continue
            nodes += 1
            z, value = self._node(problem, fixed, low, high, first, like)
            if z is None or value >= best - 1e-9 * max(1.0, abs(best)):
                continue
            gaps = z[p + q : p + q + k] * np.maximum(self.h - self.G @ z, 0.0)[len(self.h) - k :]
            free = [i for i in range(k) if not fixed[i]]
            worst = max(free, key=lambda i: gaps[i], default=None)
            if worst is None or (np.isfinite(value) and gaps[worst] <= _COMPLEMENTARY):
                if np.isfinite(value):
                    best, found = value, z[: p + q]
                continue
            for side in (1, 2):  # c_i = 0, or lambda_i = 0
                child = (*fixed[:worst], side, *fixed[worst + 1 :])
                heapq.heappush(queue, (value, next(count), child))
        return found, not queue

    def _node(
        self, problem: Optimistic, fixed: tuple[int, ...], low: Array, high: Array, first: Array, like: Tensor
    ) -> tuple[Array | None, float]:
        import numpy as np

        p, q, k, _ = self.sizes
        high, h = high.copy(), self.h
        held = [len(h) - k + i for i in range(k) if fixed[i] == 1]
        for i in range(k):
            if fixed[i] == 2:
                high[p + q + i] = 0.0
        cost = np.zeros(len(low))
        if self.slope is not None:
            cost[: p + q] = self.slope[0]
        program = dict(
            A_ub=self.G if len(h) else None,
            b_ub=h if len(h) else None,
            A_eq=np.vstack([self.A, self.G[held]]),
            b_eq=np.concatenate([self.b, h[held]]),
            bounds=np.stack([low, high], -1),
            method="highs",
        )
        linprog = scipy_optimize("ValueFunction").linprog
        found = linprog(cost, **program)
        if found.status == 3 or (found.status == 4 and self.slope is not None):  # unbounded: no bound, but a point
            found = linprog(0 * cost, **program)
            return (found.x, -np.inf) if found.success else (None, np.inf)
        if not found.success:
            return None, np.inf
        if self.slope is not None:
            return found.x, float(found.fun) + self.slope[1]
        rows = np.vstack([self.G, -self.G[held]]), np.concatenate([h, -h[held]])
        objective = in_numpy(lambda z: problem.problem.f(z[:p], z[p : p + q]).reshape(1), like)

        def function(z: Array) -> tuple[Array, Array]:
            value, row = objective(z)
            a = np.concatenate([value, self.A @ z - self.b, rows[0] @ z - rows[1]])
            return a, np.vstack([row, self.A, rows[0]])

        best: tuple[Array | None, float] = (found.x, -np.inf)
        for begin in (found.x, first):
            z, value, left = Program(function, len(self.b), low, high).solve(begin, max_steps=60)
            if left <= 1e-8 and (best[1] == -np.inf or value < best[1]):
                best = z, value
        return best


def _is_affine(function: Any, zero: Tensor) -> bool:
    """Whether values between random points are between those at the points."""
    generator = torch.Generator(device="cpu").manual_seed(1)
    ends = 3 * torch.randn(3, 2, zero.numel(), generator=generator, dtype=torch.float64).to(zero)
    with torch.no_grad():
        for one, other in ends:
            here, there, middle = (function(at) for at in (one, other, 0.3 * one + 0.7 * other))
            if not here.numel():
                return True
            size = 1 + torch.stack([here.abs(), there.abs()]).amax()
            if not bool(((middle - 0.3 * here - 0.7 * there).abs() <= 1e-10 * size).all()):
                return False
    return True


def _is_constant(function: Any, zero: Tensor, p: int) -> bool:
    """Whether the entries of z after the first p do not matter."""
    noise = torch.ones_like(zero)
    noise[:p] = 0
    with torch.no_grad():
        one, other = function(zero), function(zero + noise * 1.7)
    return bool(((one - other).abs() <= 1e-10 * (1 + one.abs())).all())
