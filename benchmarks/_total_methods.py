"""Ways to minimize Phi in total work: bilevel, and the same by hand, HOAG, jaxopt and betty."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import _threads  # noqa: F401
import numpy as np
import torch
from _harness import UnavailableError
from _total_cases import Case, D
from torch import Tensor

from bilevel import AID, minimize
from bilevel.algorithms import hoag as falling
from bilevel.solvers import CG, Jacobi, NewtonPCG, QuasiNewton

RTOL = 2e-7  # of the first |h|: below the last level that is judged


@dataclass
class Trace:
    """Every x at which f was evaluated, when in CPU seconds, after how many passes over the training data.

    Attributes:
        most: seconds after which a run is ended.
    """

    most: float
    points: list[np.ndarray] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    calls: list[tuple[int, int]] = field(default_factory=list)
    gradients: int = 0
    products: int = 0
    _start: float = field(default_factory=time.process_time)

    def see(self, x: Any) -> None:
        """Take down a point; it is not timed."""
        now = time.process_time()
        point = x.detach().numpy().copy() if isinstance(x, Tensor) else np.array(x, dtype=np.float64)
        if not self.points or not np.array_equal(self.points[-1], point):
            self.points.append(point)
            self.seconds.append(now - self._start)
            self.calls.append((self.gradients, self.products))
        if now - self._start > self.most:
            raise OverTimeError
        self._start += time.process_time() - now


class OverTimeError(Exception):
    """A run has had its time."""


Method = Callable[[Case, Trace], None]


def ours(structured: bool = True, accuracy: str = "last") -> Method:
    """`minimize` with Newton-PCG inside, preconditioned CG, and quasi-Newton steps; all solves start warm.

    Tolerances are 0.01 of the last |h| (`hoag` with quasi-Newton steps), fixed at what the end needs, or certified.
    """

    def run(case: Case, trace: Trace) -> None:
        problem = case.problem(trace.see, structured)
        tol = float(np.linalg.norm(Hand(case).gradient(case.x0.numpy(), None, 1e-3, 1e-3)[1])) * RTOL
        trace._start = time.process_time()  # the level is no part of the work
        linear = CG(rtol=1e-7, preconditioner=Jacobi() if structured else None)
        outer, last = QuasiNewton(memory=50, rtol=0.0), [tol / RTOL]

        def told(record: Any, _: Any) -> None:
            last.append(record.grad_norm)
            trace.gradients += record.stats.gradients
            trace.products += record.stats.hvps

        given: dict[str, Any] = {
            "last": {"algorithm": falling(NewtonPCG(), linear, outer, 1.0, lambda _: 0.01 * last[-1], 0.01 * tol)},
            "fixed": {"estimator": AID(NewtonPCG(tol=0.1 * tol), linear), "outer": outer},
            "adaptive": {"estimator": AID(NewtonPCG(), linear), "outer": outer, "accuracy": "adaptive"},
        }[accuracy]
        minimize(
            problem,
            case.x0,
            case.y0,
            max_steps=case.most,
            tol=tol,
            data=case.data,
            throw=False,
            callback=told,
            **given,
        )

    return run


class Hand:
    """g, f and their products in numpy and scipy, Newton-PCG with warm starts, and CG with the diagonal: by hand."""

    def __init__(self, case: Case, trace: Trace | None = None) -> None:
        self.case, self.trace = case, Trace(1e9) if trace is None else trace
        self.X, self.U = (_matrix(each) for each in (case.X, case.U))
        self.XT, self.UT = (_transposed(each) for each in (self.X, self.U))
        self.b, self.c = case.b.numpy(), case.c.numpy()
        self.n, self.C = self.X.shape[-2], case.outputs
        self.squares = self.X.power(2).T.tocsr() if _is_sparse(self.X) else None
        lead = self.X.shape[:-2]
        self.y = self.v = np.zeros((*lead, self.X.shape[-1]) if case.loss != "softmax" else tuple(case.y0.shape))

    def coefficients(self, x: np.ndarray) -> tuple[Any, Any]:
        """w and a."""
        if self.case.penalty is None:
            return 1 / self.n, np.exp(x)
        return 1 / (1 + np.exp(-x)) / self.n, self.case.penalty

    def times(self, X: Any, y: np.ndarray) -> np.ndarray:
        """X y, of all outputs or tasks."""
        if y.ndim == 1 or self.case.loss == "softmax":
            return X @ y if y.ndim == 1 else X @ y.T
        return np.matmul(X, y[..., None])[..., 0]

    def back(self, XT: Any, u: np.ndarray) -> np.ndarray:
        """X'u."""
        if self.case.loss == "softmax":
            return u.T @ XT.T if not _is_sparse(XT) else (XT @ u).T
        return XT @ u if u.ndim == 1 else np.matmul(XT, u[..., None])[..., 0]

    def losses(self, z: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Losses, slopes and curvatures."""
        if self.case.loss == "squared":
            return (z - b) ** 2 / 2, z - b, np.ones_like(z)
        if self.case.loss == "logistic":
            p = 1 / (1 + np.exp(-z))
            return np.logaddexp(0, z) - b * z, p - b, p * (1 - p)
        top = z.max(1, keepdims=True)
        e = np.exp(z - top)
        total = e.sum(1, keepdims=True)
        p, rows = e / total, np.arange(len(z))
        slope = p.copy()
        slope[rows, b] -= 1
        return np.log(total[:, 0]) + top[:, 0] - z[rows, b], slope, p

    def expand(self, w: Any, a: Any, y: np.ndarray) -> tuple[Any, ...]:
        """g, its gradient, slopes and curvatures."""
        self.trace.gradients += 1 if y.ndim == 1 or self.C > 1 else len(y)
        loss, slope, curvature = self.losses(self.times(self.X, y), self.b)
        value = (w * loss).sum() + (a * y * y).sum() / 2
        return value, self.back(self.XT, self._weighed(w, slope)) + a * y, slope, curvature

    def _weighed(self, w: Any, u: np.ndarray) -> np.ndarray:
        return w[:, None] * u if np.ndim(w) and u.ndim == 2 else w * u

    def product(self, w: Any, a: Any, curvature: np.ndarray, v: np.ndarray) -> np.ndarray:
        """H v."""
        self.trace.products += 1 if v.ndim == 1 or self.C > 1 else len(v)
        u = self.times(self.X, v)
        u = curvature * u
        if self.case.loss == "softmax":
            u -= curvature * u.sum(1, keepdims=True)
        return self.back(self.XT, self._weighed(w, u)) + a * v

    def diagonal(self, w: Any, a: Any, curvature: np.ndarray) -> np.ndarray:
        """The diagonal of H."""
        s = curvature * (1 - curvature) if self.case.loss == "softmax" else curvature
        s = self._weighed(w, s)
        if self.squares is not None:
            return self.squares @ s + a
        if s.ndim == 1:
            return (self.X**2).T @ s + a
        if self.case.loss == "softmax":
            return s.T @ self.X**2 + a
        return np.matmul(s[:, None, :], self.X**2)[:, 0] + a

    def solve(self, w: Any, a: Any, curvature: Any, b: np.ndarray, v: np.ndarray | None, tol: float) -> np.ndarray:
        """H v = b by preconditioned CG to |r| <= tol; each task has its own steps."""
        inverse = 1 / self.diagonal(w, a, curvature)
        axes = -1 if self.case.is_tasks else None

        def dot(p: np.ndarray, q: np.ndarray) -> Any:
            return (p * q).sum(axis=axes, keepdims=self.case.is_tasks)

        if v is None:
            v, r = np.zeros_like(b), b.copy()
        else:
            v, r = v.copy(), b - self.product(w, a, curvature, v)
        z = inverse * r
        p, rz = z, dot(r, z)
        for _ in range(2000):
            if np.all(dot(r, r) <= tol**2):
                break
            Hp = self.product(w, a, curvature, p)
            t = np.divide(rz, dot(p, Hp), out=np.zeros_like(np.asarray(rz)), where=np.asarray(dot(p, Hp)) > 0)
            v, r = v + t * p, r - t * Hp
            z = inverse * r
            before, rz = rz, dot(r, z)
            p = z + np.divide(rz, before, out=np.zeros_like(np.asarray(rz)), where=np.asarray(before) > 0) * p
        return v

    def minimum(self, w: Any, a: Any, tol: float, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """y* from y, with slopes and curvatures there."""
        before = None
        value, g, slope, curvature = self.expand(w, a, y)
        for _ in range(50):
            size = float(np.linalg.norm(g))
            if size <= tol:
                break
            eta = 0.1 if before is None else min(0.1, (size / before) ** 1.5)
            d = self.solve(w, a, curvature, g, None, max(eta * size, 0.25 * tol))
            t, descent = 1.0, float((d * g).sum())
            while True:
                trial = self.expand(w, a, y - t * d)
                if trial[0] <= value - 1e-4 * t * descent + 1e-13 * abs(value) or t < 1e-8:
                    break
                t /= 2
            y, before = y - t * d, size
            value, g, slope, curvature = trial
        return y, slope, curvature

    def gradient(
        self, x: np.ndarray, see: Any, tol: float, linear_tol: float, relative: bool = True
    ) -> tuple[float, np.ndarray]:
        """Phi and its gradient, from where the last solutions are."""
        w, a = self.coefficients(x)
        y, slope, curvature = self.minimum(w, a, tol, self.y)
        if see is not None:
            see(x)
        loss, outer, _ = self.losses(self.times(self.U, y), self.c)
        scale = 1 / loss.size
        fy = self.back(self.UT, scale * outer)
        v = self.solve(
            w, a, curvature, fy, self.v if self.v.any() else None,
            linear_tol * float(np.linalg.norm(fy)) if relative else linear_tol,
        )  # fmt: skip
        self.y, self.v = y, v
        away = x - self.case.x0.numpy()
        value = float(scale * loss.sum()) + self.case.rho / 2 * float(away @ away)
        return value, self.implicit(x, y, v, slope) + self.case.rho * away

    def implicit(self, x: np.ndarray, y: np.ndarray, v: np.ndarray, slope: np.ndarray) -> np.ndarray:
        """-G v."""
        if self.case.penalty is None:
            by_entry = y * v
            return -np.exp(x) * (by_entry if y.ndim == 1 else by_entry.sum(0))
        s = 1 / (1 + np.exp(-x))
        return -s * (1 - s) / self.n * (slope * self.times(self.X, v)).sum(1)


def by_hand(case: Case, trace: Trace) -> None:
    """scipy's L-BFGS-B on Phi; both residuals at most 0.01 of the last |h|, all solves from where the last ended."""
    from scipy.optimize import minimize as scipy_minimize

    hand = Hand(case, trace)
    last = [float(np.linalg.norm(hand.gradient(case.x0.numpy(), None, 1e-3, 1e-3)[1]))]

    def phi(x: np.ndarray) -> tuple[float, np.ndarray]:
        tol = 0.01 * last[-1]
        value, h = hand.gradient(x, trace.see, tol, tol, relative=False)
        last.append(float(np.linalg.norm(h)))
        if last[-1] <= RTOL * last[0]:
            raise OverTimeError
        return value, h

    scipy_minimize(
        phi, case.x0.numpy(), jac=True, method="L-BFGS-B",
        options={"maxcor": 50, "maxfun": case.most, "maxiter": case.most, "gtol": 0.0, "ftol": 0.0},
    )  # fmt: skip


def hoag(case: Case, trace: Trace) -> None:
    """HOAG: gradient steps of a length that adapts, along h whose tolerances fall as 0.1 0.9^k; products as by hand."""
    hand, x = Hand(case, trace), case.x0.numpy().copy()
    eps, before, value_before, eps_before, steepness = 0.1, x, np.inf, 0.1, 0.0
    scale = 1.0
    for k in range(100_000):
        if k == 0:
            _, h = hand.gradient(x, None, 1e-3, 1e-3)
            scale = float(np.linalg.norm(h))
        value, h = hand.gradient(x, trace.see, eps * scale, eps * scale, relative=False)
        size = float(np.linalg.norm(h))
        if size <= RTOL * scale:
            return
        if k == 0:
            steepness = size / np.sqrt(len(x))  # the first step moves every entry by about one
        else:
            moved = float(np.linalg.norm(x - before))
            slack = scale * (eps + eps_before) * (1 + moved)
            if value <= value_before - 0.5 * steepness * moved**2 + slack:
                steepness *= 0.95
            elif value > 1.2 * value_before:
                steepness *= 2
                x = before
                continue
            else:
                steepness *= 1.05
        before, value_before, eps_before = x, value, eps
        x = x - h / steepness
        eps = max(0.1 * 0.9**k, 1e-10)


def jaxopt(case: Case, trace: Trace) -> None:
    """`jaxopt.LBFGS` with `implicit_diff` inside, scipy's L-BFGS-B outside; compiled before the clock starts."""
    try:
        import jax
        import jax.numpy as jnp
        import jaxopt as peer
    except ImportError as error:
        raise UnavailableError(f"skipped: not installed ({error})") from error
    from scipy.optimize import minimize as scipy_minimize

    jax.config.update("jax_enable_x64", True)
    X, U = (jnp.asarray(each.to_dense().numpy()) for each in (case.X, case.U))
    b, c = jnp.asarray(case.b.numpy()), jnp.asarray(case.c.numpy())

    def loss(y: Any, X: Any, b: Any) -> Any:
        if case.loss == "softmax":
            z = X @ y.T
            return jax.nn.logsumexp(z, axis=1) - jnp.take_along_axis(z, b[:, None], axis=1)[:, 0]
        z = jnp.einsum("...nd,...d->...n", X, y)
        return (z - b) ** 2 / 2 if case.loss == "squared" else jnp.logaddexp(0.0, z) - b * z

    def inner(y: Any, x: Any) -> Any:
        w, a = (1.0, jnp.exp(x)) if case.penalty is None else (jax.nn.sigmoid(x), case.penalty)
        total = (w * loss(y, X, b)).sum() / X.shape[-2]
        return total + (a * y * y).sum() / 2

    solver = peer.LBFGS(inner, maxiter=2000, tol=1e-9, history_size=30, implicit_diff=True, jit=True)

    @jax.jit
    def phi(x: Any, y: Any) -> Any:
        def value(x: Any) -> Any:
            found = solver.run(y, x).params
            away = x - x0
            return loss(found, U, c).mean() + case.rho / 2 * (away @ away), found

        return jax.value_and_grad(value, has_aux=True)(x)

    lead, x0 = case.X.shape[:-2], jnp.asarray(case.x0.numpy())
    y = jnp.zeros((*lead, *case.y0.shape))
    jax.block_until_ready(phi(jnp.asarray(case.x0.numpy()), y))
    trace._start = time.process_time()
    first: list[float] = []

    def call(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal y
        trace.see(x)
        (value, y), h = phi(jnp.asarray(x), y)
        found = np.asarray(h, dtype=np.float64)
        first.append(float(np.linalg.norm(found)))
        if first[-1] <= RTOL * first[0]:
            raise OverTimeError
        return float(value), found

    scipy_minimize(
        call, case.x0.numpy(), jac=True, method="L-BFGS-B",
        options={"maxcor": 50, "maxfun": case.most, "maxiter": case.most, "gtol": 0.0, "ftol": 0.0},
    )  # fmt: skip


def betty(case: Case, trace: Trace) -> None:
    """betty's CG, 10 inner steps of Adam(0.01) an outer step of Adam(0.1): it has no tolerances and no line search."""
    try:
        from betty.configs import Config, EngineConfig
        from betty.engine import Engine
        from betty.problems import ImplicitProblem
    except Exception as error:
        raise UnavailableError(f"skipped: not installed ({error})") from error
    if case.is_tasks:
        raise UnavailableError("skipped: no tasks side by side")
    f, g = case.model(held_out=True), case.model()

    class Leaf(torch.nn.Module):
        def __init__(self, start: Tensor) -> None:
            torch.nn.Module.__init__(self)
            self.leaf = torch.nn.Parameter(start.clone())

    class Inner(ImplicitProblem):
        def training_step(self, batch: object) -> Tensor:
            return g(self.outer.module.leaf, self.module.leaf)

    class Outer(ImplicitProblem):
        def training_step(self, batch: object) -> Tensor:
            trace.see(self.module.leaf)
            away = self.module.leaf - case.x0
            return f(None, self.inner.module.leaf) + case.rho / 2 * away.square().sum()

    y, x = Leaf(case.y0), Leaf(case.x0)
    loader = [(torch.zeros(1), torch.zeros(1))]
    inner = Inner(
        name="inner", module=y, optimizer=torch.optim.Adam(y.parameters(), lr=0.01), train_data_loader=loader,
        config=Config(type="cg", unroll_steps=10, cg_iterations=20, cg_alpha=1.0),
    )  # fmt: skip
    outer = Outer(
        name="outer", module=x, optimizer=torch.optim.Adam(x.parameters(), lr=0.1), train_data_loader=loader,
        config=Config(retain_graph=True),
    )  # fmt: skip
    engine = Engine(
        problems=[outer, inner], config=EngineConfig(train_iters=100_000, valid_step=10**9),
        dependencies={"l2u": {inner: [outer]}, "u2l": {outer: [inner]}},
    )  # fmt: skip
    trace._start = time.process_time()
    engine.run()


METHODS: dict[str, Method] = {
    "bilevel": ours(),
    "bilevel, fixed tolerances": ours(accuracy="fixed"),
    "bilevel, certified accuracy": ours(accuracy="adaptive"),
    "bilevel, structure not known": ours(structured=False),
    "by hand": by_hand,
    "HOAG": hoag,
    "jaxopt": jaxopt,
    "betty": betty,
}


def exact(case: Case, x: np.ndarray, near: Hand) -> np.ndarray:
    """grad Phi(x), of dense Hessians and y* to 1e-13; with more than 3000 inner variables by CG to 1e-12."""
    w, a = near.coefficients(x)
    near.y = near.minimum(w, a, 1e-13, near.y if np.isfinite(near.y).all() else np.zeros_like(near.y))[0]
    near.v = np.where(np.isfinite(near.v), near.v, 0.0)
    q = int(np.prod(case.y0.shape))
    if q > 3000:
        return near.gradient(x, None, 1e-13, 1e-12)[1]
    y, slope, curvature = near.minimum(w, a, 1e-13, near.y)
    _, outer, _ = near.losses(near.times(near.U, y), near.c)
    fy = near.back(near.UT, outer / (outer.size / (case.outputs if case.loss == "softmax" else 1)))
    v = _dense(case, near, w, a, curvature, fy)
    return near.implicit(x, y, v, slope) + case.rho * (x - case.x0.numpy())


def _dense(case: Case, near: Hand, w: Any, a: Any, curvature: np.ndarray, fy: np.ndarray) -> np.ndarray:
    """H^-1 grad f by factorization."""
    X = near.X.toarray() if _is_sparse(near.X) else near.X
    d = X.shape[-1]
    if case.loss != "softmax":
        H = np.matmul(np.swapaxes(X, -1, -2), (np.broadcast_to(w, curvature.shape) * curvature)[..., None] * X)
        return np.linalg.solve(H + np.diag(np.broadcast_to(a, d)), fy[..., None])[..., 0]
    C = case.outputs
    H = np.zeros((C, d, C, d))
    for i in range(C):
        for j in range(C):
            s = np.broadcast_to(w, len(X)) * curvature[:, i] * ((i == j) - curvature[:, j])
            H[i, :, j] = X.T @ (s[:, None] * X)
    whole = H.reshape(C * d, C * d) + np.diag(np.broadcast_to(a, (C, d)).ravel())
    return np.linalg.solve(whole, fy.ravel()).reshape(C, d)


def _matrix(X: Tensor) -> Any:
    if X.layout == torch.strided:
        return X.numpy()
    from scipy.sparse import csr_matrix

    return csr_matrix((X.values().numpy(), X.col_indices().numpy(), X.crow_indices().numpy()), shape=tuple(X.shape))


def _transposed(X: Any) -> Any:
    return X.T.tocsr() if _is_sparse(X) else np.swapaxes(X, -1, -2)


def _is_sparse(X: Any) -> bool:
    return not isinstance(X, np.ndarray)


assert D is torch.float64
