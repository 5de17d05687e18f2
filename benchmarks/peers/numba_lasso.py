"""The lasso's hyperparameter by coordinate descent in numba: what sparse-ho does, written from the paper.

Bertrand, Klopfenstein, Massias, Blondel, Vaiter, Gramfort, Salmon, "Implicit differentiation for fast hyperparameter
selection in non-smooth convex learning", JMLR 23 (2022): cyclic coordinate descent on y with its residual, from the
last solution (`cyclic=True`, their algorithm 1), or on working sets (what they use celer for); the implicit derivative
db_S / d log lambda = -lambda n (X_S'X_S)^-1 sign(b_S) on the support; gradient descent on log lambda whose step is
halved where the criterion grew and raised by a fifth where it fell.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

CHECK_EVERY = 10  # sweeps, between two looks at the residual: each costs a pass over X


@numba.njit(cache=False, fastmath=False)
def _sweeps(X, r, y, lam, norms, which, count):  # type: ignore[no-untyped-def]
    """Sweeps over some columns, with r = b - X y kept up to date: |Xy - b|^2 / 2n + lam |y|_1."""
    n = X.shape[0]
    for _ in range(count):
        for j in which:
            if norms[j] == 0.0:
                continue
            old = y[j]
            v = old + X[:, j] @ r / (norms[j] * n)
            size = abs(v) - lam / norms[j]
            new = 0.0
            if size > 0:
                new = size if v > 0 else -size
            if new != old:
                r += (old - new) * X[:, j]
                y[j] = new


@numba.njit
def _left(X, r, y, lam, which):  # type: ignore[no-untyped-def]
    """The least subgradient of some entries."""
    n, found = X.shape[0], np.zeros(len(which))
    for i in range(len(which)):
        j = which[i]
        slope = -(X[:, j] @ r) / n
        if y[j] != 0:
            found[i] = slope + math.copysign(lam, y[j])
        elif abs(slope) > lam:
            found[i] = slope - math.copysign(lam, slope)
    return found


def solve(X: Any, b: Any, lam: float, y: Any, tol: float, norms: Any, cyclic: bool) -> tuple[Any, Any]:
    """y*(lam) from y, to a norm of the least subgradient of tol; and its residual."""
    r = b - X @ y if np.any(y) else b.copy()
    y, everything = y.copy(), np.arange(X.shape[1])
    if cyclic:
        while True:
            _sweeps(X, r, y, lam, norms, everything, CHECK_EVERY)
            if np.linalg.norm(_left(X, r, y, lam, everything)) <= tol:
                return y, r
    while True:
        left = _left(X, r, y, lam, everything)
        if np.linalg.norm(left) <= tol:
            return y, r
        support = np.flatnonzero(y)
        score = np.abs(left)
        score[support] = np.inf
        size = min(max(100, 2 * len(support)), np.count_nonzero(score))
        working = np.sort(np.argpartition(score, -size)[-size:])
        while True:
            _sweeps(X, r, y, lam, norms, working, CHECK_EVERY)
            if np.linalg.norm(_left(X, r, y, lam, working)) <= 0.3 * tol:
                break


@dataclass(frozen=True)
class Point:
    """One evaluation: CPU seconds since the start, log lambda and the validation loss."""

    seconds: float
    log_lambda: float
    value: float


def search(
    X: Any, b: Any, U: Any, c: Any, log_lambda: float, target: float, tol: float, cyclic: bool, most: int = 30
) -> list[Point]:
    """Evaluations from log_lambda on until the value is at most the target."""
    begun, points = time.process_time(), list[Point]()
    norms = np.einsum("ij,ij->j", X, X) / X.shape[0]
    y, step, x, value, slope = np.zeros(X.shape[1]), 0.0, log_lambda, math.inf, 0.0
    trial = x
    while len(points) < most:
        lam = math.exp(trial)
        found, _ = solve(X, b, lam, y, tol, norms, cyclic)
        S = np.flatnonzero(found)
        left = U[:, S] @ found[S] - c
        new = float(left @ left) / (2 * len(c))
        points.append(Point(time.process_time() - begun, trial, new))
        if new <= target:
            break
        if new < value:
            gram = X[:, S].T @ X[:, S]
            jacobian = -lam * len(b) * np.linalg.solve(gram, np.sign(found[S]))
            slope = float((U[:, S].T @ left) @ jacobian) / len(c)
            step = 1 / abs(slope) if not step else 1.2 * step
            x, y, value = trial, found, new
        else:
            step /= 2
        trial = x - step * slope
    return points


def path(X: Any, b: Any, U: Any, c: Any, lambdas: list[float], tol: float, cyclic: bool) -> list[float]:
    """Validation losses along a warm-started path."""
    norms = np.einsum("ij,ij->j", X, X) / X.shape[0]
    y, values = np.zeros(X.shape[1]), []
    for lam in lambdas:
        y, _ = solve(X, b, lam, y, tol, norms, cyclic)
        left = U @ y - c
        values.append(float(left @ left) / (2 * len(c)))
    return values
