"""Small nonlinear programs in numpy, their functions written in torch: sequential quadratic programming of scipy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel.solvers._scipy import as_numpy, scipy_optimize

if TYPE_CHECKING:
    import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"


def values_and_rows(function: Callable[[Tensor], Tensor], point: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of a function `(n,) -> (m,)` at a point, and its Jacobian `(m, n)`; one backward pass."""
    with torch.enable_grad():
        leaf = point.detach().requires_grad_()
        found = function(leaf)
        if not found.requires_grad:
            return found.detach(), leaf.new_zeros(found.numel(), leaf.numel())
        one = torch.eye(found.numel(), dtype=found.dtype, device=found.device)
        try:
            (rows,) = torch.autograd.grad(found, leaf, one, retain_graph=True, is_grads_batched=True)
        except RuntimeError:  # an operation whose backward pass `torch.vmap` cannot take
            each = [torch.autograd.grad(found, leaf, row, retain_graph=True)[0] for row in one]
            rows = torch.stack(each)
    return found.detach(), rows


@final
@dataclass(frozen=True, eq=False)
class Program:
    """min a_0(z)  s.t.  a_i(z) = 0 for the next `equalities` entries, a_i(z) <= 0 for the others, z in a box.

    Attributes:
        function: z `(n,)` -> (a `(m,)`, its Jacobian `(m, n)`), in numpy.
        equalities: how many.
        lower: bounds `(n,)`, with infinities.
        upper: the same.
    """

    function: Callable[[Array], tuple[Array, Array]]
    equalities: int
    lower: Array
    upper: Array

    def solve(self, start: Array, max_steps: int = 100, ftol: float = 1e-12) -> tuple[Array, float, float]:
        """A local solution from a start: the point, its value, and by how much it violates a constraint.

        A point with values that are not finite ends the search; what is returned is the last finite one.
        """
        import numpy as np

        optimize = scipy_optimize("ValueFunction")
        kept: list[tuple[Array, Array, Array]] = []

        def at(z: Array) -> tuple[Array, Array]:
            if not kept or not np.array_equal(kept[0][0], z):
                a, rows = self.function(z)
                kept[:] = [(z.copy(), a, rows)]
            return kept[0][1], kept[0][2]

        m = self.equalities + 1
        count = len(at(np.clip(start, self.lower, self.upper))[0])
        constraints = []
        if m > 1:
            constraints.append({"type": "eq", "fun": lambda z: at(z)[0][1:m], "jac": lambda z: at(z)[1][1:m]})
        if count > m:
            constraints.append({"type": "ineq", "fun": lambda z: -at(z)[0][m:], "jac": lambda z: -at(z)[1][m:]})
        with np.errstate(all="ignore"):
            found = optimize.minimize(
                lambda z: float(at(z)[0][0]),
                np.clip(start, self.lower, self.upper),
                jac=lambda z: at(z)[1][0],
                method="SLSQP",
                bounds=optimize.Bounds(self.lower, self.upper),
                constraints=constraints,
                options={"maxiter": max_steps, "ftol": ftol},
            )
        z = found.x if np.isfinite(found.x).all() else start
        a = at(z)[0]
        if not np.isfinite(a).all():
            return z, float("inf"), float("inf")
        return z, float(a[0]), self.violation(a)

    def violation(self, a: Array) -> float:
        """The largest violation of a constraint, from the entries of the function."""
        m = self.equalities + 1
        return float(max([0.0, *abs(a[1:m]), *a[m:]]))


def in_numpy(function: Callable[[Tensor], Tensor], like: Tensor) -> Callable[[Array], tuple[Array, Array]]:
    """A function in torch as one in numpy, with its Jacobian."""

    def both(z: Array) -> tuple[Array, Array]:
        import numpy as np

        a, rows = values_and_rows(function, torch.from_numpy(np.asarray(z, dtype=float)).to(like))
        return as_numpy(a), as_numpy(rows).reshape(rows.shape)

    return both
