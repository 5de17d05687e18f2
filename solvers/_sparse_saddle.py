"""Sparse saddle-point systems whose leading block is known by products: a sparse factor, corrected by CG."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch

from bilevel._linear import LinearOperator

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Vector = np.ndarray[Any, Any]
else:
    Vector = Any

_PROBES = 8  # of the diagonal of the Hessian
_STEPS = 2000  # of conjugate gradients
_ROUNDING = 1e-10
_RUNS = 6  # from the true residual
_SHIFT = 1e-12  # relative


def scipy_sparse(user: str) -> Any:
    """The module scipy.sparse, with its linear algebra.

    Raises:
        ImportError: naming the extra.
    """
    try:
        from scipy import sparse
        from scipy.sparse import linalg  # noqa: F401  (an attribute of `sparse` from here on)
    except ImportError as error:
        raise ImportError(f'`{user}` needs scipy: pip install "bilevel[scipy]"') from error
    return sparse


@final
@dataclass(frozen=True, eq=False)
class Found:
    """The solution of a system, and what it took.

    Attributes:
        value: v.
        residual: of the system, relative.
        products: taken.
        concave: whether a curvature that is not positive was met.
    """

    value: Vector
    residual: float
    products: int
    concave: bool


@final
@dataclass(frozen=True, eq=False)
class SaddleFactor:
    """N = [[H + D, S'], [S, -E]] with D, E >= 0 diagonal, S sparse, and H positive semidefinite, known by products.

    K, the same with the diagonal of H in the place of H, is factored; conjugate gradients with K as preconditioner
    solve with N. Since K has the constraints exactly, residuals stay in the first equations, and N is positive definite
    on what is left: as many steps as H differs from its diagonal, one where it is one, and none that come from S.

    Source: Gould, Hribar, Nocedal, "On the solution of equality constrained quadratic programming problems arising in
    optimization", SIAM J. Sci. Comput. 23 (2001).

    Attributes:
        factor: of K, `scipy.sparse.linalg.SuperLU`.
        matrix: K.
        rest: u -> (H - its diagonal) u.
        q: the number of the first equations.
    """

    factor: Any
    matrix: Any
    rest: Callable[[Vector], Vector]
    q: int

    @staticmethod
    def of(sparse: Any, H: Callable[[Vector], Vector], diagonal: Vector, D: Vector, S: Any, E: Vector) -> SaddleFactor:
        """Factor K, with a little more in E, so that rows may depend on each other; `diagonal` is near that of H."""
        import numpy as np

        K = sparse.bmat([[sparse.diags(diagonal + D), S.T], [S, sparse.diags(-E)]], format="csc")
        steep = float(np.square(S.data).max(initial=0.0)) or 1.0
        little = _SHIFT * steep / float((diagonal + D).max())
        shift = np.concatenate([np.zeros(len(diagonal)), np.full(len(E), -little)])
        options = {"SymmetricMode": True}
        factor = sparse.linalg.splu(
            (K + sparse.diags(shift)).tocsc(), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.01, options=options
        )
        return SaddleFactor(factor, K, lambda u: H(u) - diagonal * u, len(diagonal))

    def solve(self, b: Vector, rtol: float) -> Found:
        """N v = b."""
        import numpy as np

        v, size, products, concave = np.zeros_like(b), float(np.linalg.norm(b)), 0, False
        left, best, residual = b, v, np.inf
        for _ in range(_RUNS):
            d, steps, bent = self._from_zero(left, rtol)
            v, concave = v + d, concave or bent
            left = b - self._times(v)
            products += steps + 1
            now = float(np.linalg.norm(left)) / size if size else 0.0
            if not now < residual:
                break
            best, residual = v, now
            if residual <= rtol:
                break
        return Found(best, residual, products, concave)

    def _times(self, v: Vector) -> Vector:
        found: Vector = self.matrix @ v
        found[: self.q] += self.rest(v[: self.q])
        return found

    def _from_zero(self, b: Vector, rtol: float) -> tuple[Vector, int, bool]:
        import numpy as np

        q, size = self.q, float(np.linalg.norm(b))
        v = self.factor.solve(b)
        v = v + self.factor.solve(b - self.matrix @ v)
        r = -self.rest(v[:q])
        steps = 1
        p = kp = None
        before = 1.0
        while np.linalg.norm(r) > 0.5 * rtol * size and steps < _STEPS:
            z = self.factor.solve(np.concatenate([r, np.zeros(len(b) - q)]))
            now = float(r @ z[:q])
            if not now > 0:
                break
            p = z if p is None else z + now / before * p
            kp = r.copy() if kp is None else r + now / before * kp
            before = now
            product = kp + self.rest(p[:q])
            steps += 1
            curvature = float(p[:q] @ product)
            if not curvature > 0:
                return v, steps, curvature < -_ROUNDING * float(np.linalg.norm(p[:q]) * np.linalg.norm(product))
            alpha = now / curvature
            v = v + alpha * p
            r = r - alpha * product
        return v, steps, False


def products_of(hessian: LinearOperator, like: Tensor) -> Callable[[Vector], Vector]:
    """U -> H u of arrays."""

    def times(u: Vector) -> Vector:
        found: Vector = hessian.mv(torch.from_numpy(u).to(like)).detach().double().cpu().numpy()
        return found

    return times


def diagonal_of(H: Callable[[Vector], Vector], q: int) -> Vector:
    """About the diagonal of H, positive: the mean of r H r over random signs r; the diagonal itself, if H is one."""
    import numpy as np

    random = np.random.default_rng(0)
    found = np.zeros(q)
    for count in range(_PROBES):
        r = random.choice([-1.0, 1.0], q)
        one = r * H(r)
        if count == 1 and np.abs(one - found).max() <= 1e-12 * np.abs(found).max():
            break
        found = (count * found + one) / (count + 1)
    size = float(np.abs(found).max()) or 1.0
    return np.maximum(found, 1e-3 * size if found.max() > 0 else 1e-8)
