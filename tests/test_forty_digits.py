"""No certificate that is called proven is below the error, down to the last digit: against 40-digit references."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mpmath
import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor

from bilevel import BilevelProblem, Constants, Estimate, Stats, Status, certify

THIRD = 4 / (3 * math.sqrt(3))  # the greatest |third derivative| of log cosh
DIGITS = 40


@dataclass(frozen=True, eq=False)
class Scaled:
    """f = sf f0(x / sx, y / sy) and g = sg g0(x / sx, y / sy), with every constant, and h to 40 digits.

    g0 = w'A w / 2 + c u_0 |w|^2 / 2 + s sum log cosh w - u'B w - a'w,
    f0 = k |w - t|^2 / 2 + b'w + e u_0 sum w + r'u.
    """

    A: Tensor
    B: Tensor
    a: Tensor
    t: Tensor
    b: Tensor
    r: Tensor
    c: float
    s: float
    k: float
    e: float
    sf: float
    sg: float
    sx: float
    sy: float

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        """The outer objective."""
        u, w = x.double() / self.sx, y.double() / self.sy
        square = (w - self.t).square().sum() / 2
        return self.sf * (self.k * square + self.b @ w + self.e * u[0] * w.sum() + self.r @ u)

    def g(self, x: Tensor, y: Tensor) -> Tensor:
        """The inner objective."""
        u, w = x.double() / self.sx, y.double() / self.sy
        logcosh = torch.logaddexp(w, -w).sum() if self.s else 0.0  # softplus is linear from 20 on
        square = (w @ self.A @ w + self.c * u[0] * w.square().sum()) / 2
        return self.sg * (square + self.s * logcosh - u @ self.B @ w - self.a @ w)

    def constants(self, x: Tensor) -> Constants:
        """As sharp as float64 allows."""
        eigenvalues = torch.linalg.eigvalsh(self.A.double())
        q, top = self.A.shape[0], float(eigenvalues[-1])
        blur = 10 * q * 2.3e-16 * top
        shift = self.c * float(x[0].double()) / self.sx
        mu, L = float(eigenvalues[0]) - blur + shift, top + blur + shift + self.s
        f_yy, f_xy = self.sf / self.sy**2, self.sf / self.sx / self.sy
        g_yy, g_xy = self.sg / self.sy**2, self.sg / self.sx / self.sy
        up = 1 + 1e-12
        return Constants(
            mu=g_yy * mu / up,
            L=g_yy * L * up,
            L_fyy=f_yy * self.k * up,
            L_fxy=f_xy * abs(self.e) * math.sqrt(q) * up,
            M_yy=g_yy / self.sy * self.s * THIRD * up,
            M_xy=g_xy / self.sy * abs(self.c) * up,
            C_G=None if self.c else g_xy * float(torch.linalg.matrix_norm(self.B, 2)) * up,
            source="structural",
        )

    def exactly(self, x: Tensor, near: Tensor) -> tuple[list[Any], list[Any], list[Any]]:
        """(y*, v at y* and h) by Newton's method from a point in float64, to 40 digits."""
        q, p = self.A.shape[0], self.B.shape[0]
        A, B = matrix(self.A), matrix(self.B)
        a, t, b, r = vector(self.a), vector(self.t), vector(self.b), vector(self.r)
        u = [value / mpf(self.sx) for value in vector(x)]
        w = [value / mpf(self.sy) for value in vector(near)]
        c, s, k, e = (mpf(number) for number in (self.c, self.s, self.k, self.e))
        H = mpmath.matrix(q, q)
        for _ in range(4 if self.s else 2):
            tanh = [mpmath.tanh(value) for value in w]
            rhs = mpmath.matrix(q, 1)
            for i in range(q):
                rhs[i] = sum(A[i][j] * w[j] for j in range(q)) + c * u[0] * w[i] + s * tanh[i] - a[i]
                rhs[i] -= sum(u[j] * B[j][i] for j in range(p))
                for j in range(q):
                    H[i, j] = A[i][j]
                H[i, i] += c * u[0] + s * (1 - tanh[i] ** 2)
            step = mpmath.lu_solve(H, rhs)
            w = [w[i] - step[i] for i in range(q)]
        fy = mpmath.matrix([k * (w[i] - t[i]) + b[i] + e * u[0] for i in range(q)])
        v = mpmath.lu_solve(H, fy)
        h = []
        for j in range(p):
            cross = -sum(B[j][i] * v[i] for i in range(q))
            own = r[j]
            if j == 0:
                cross += c * sum(w[i] * v[i] for i in range(q))
                own += e * sum(w)
            h.append(mpf(self.sf) / mpf(self.sx) * (own - cross))
        ratio = mpf(self.sf) / mpf(self.sg) * mpf(self.sy)
        return [value * mpf(self.sy) for value in w], [ratio * value for value in v], h


def vector(tensor: Tensor) -> list[Any]:
    """The entries of a tensor, exactly."""
    return [mpf(value) for value in tensor.double().tolist()]


def matrix(tensor: Tensor) -> list[list[Any]]:
    """The rows of a matrix, exactly."""
    return [vector(row) for row in tensor]


def cases(seed: int, dtype: torch.dtype) -> Iterator[tuple[str, Scaled, Tensor, Estimate, list[Any]]]:
    """A problem of any condition and scale, and estimates at it: exact and sloppy, of every size of error."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def chosen(*options: float) -> float:
        return options[int(torch.randint(len(options), (), generator=generator))]

    def scale() -> float:
        return 10.0 ** int(torch.randint(-8, 9, (), generator=generator)) if chosen(0, 1) else 1.0

    single = dtype == torch.float32
    q, p = int(chosen(1, 2, 3, 5)), int(chosen(1, 2, 3))
    kappa = chosen(*(10.0**k for k in range(0, 4 if single else 9)))
    Q, _ = torch.linalg.qr(normal(q, q))
    A = Q @ torch.diag(torch.logspace(0, math.log10(kappa), q, dtype=torch.float64)) @ Q.T
    A = (A + A.T).to(dtype).double() / 2
    curved = chosen(0, 1)
    B = normal(p, q) if chosen(0, 1) else normal(p, 1) * Q[:, :1].T  # along the least curvature: the bound is attained
    a, t = (normal(q) if chosen(0, 1) else chosen(1, 100) * Q[:, int(chosen(0, -1))] for _ in range(2))
    b = torch.randint(-2, 3, (q,), generator=generator).double()  # round numbers: residuals that are computed as 0
    B, a, t, b, r = (tensor.to(dtype).double() for tensor in (B, a, t, b, normal(p)))
    data = Scaled(
        A=A,
        B=B,
        a=a,
        t=t,
        b=b,
        r=r,
        c=curved * chosen(0.0, 0.5),
        s=curved * chosen(0.25, 1.0, 8.0),
        k=chosen(0.0, 1.0, 4.0),
        e=chosen(0.0, 0.5),
        sf=scale(),
        sg=scale(),
        sx=scale(),
        sy=scale(),
    )
    x = (normal(p) * data.sx).to(dtype)
    x[0] = x[0].abs()
    with mp.workdps(DIGITS):
        rough = data.sy * torch.linalg.solve(A, (x.double() / data.sx) @ data.B + data.a)
        for _ in range(60 if data.s else 0):  # damped Newton steps in float64, for where those of 40 digits start
            before, rough = rough, newton(data, x.double(), rough)
            if (rough - before).norm() <= 1e-12 * rough.norm():
                break
        exact_y, exact_v, h = data.exactly(x, rough)
    problem = BilevelProblem(data.f, data.g)
    y_star, v_star = (torch.tensor([float(value) for value in values]) for values in (exact_y, exact_v))
    for sloppy in (0.0, 0.0, 1e-15, 1e-12, 1e-8, 1e-4, 1e-1):
        y = y_star + sloppy * y_star.norm() * directed(normal(q), Q, chosen(0, 1, 2))
        v = v_star + chosen(0.0, 1.0) * sloppy * v_star.norm() * directed(normal(q), Q, chosen(0, 1, 2))
        if sloppy == 0:  # what solvers end with: the least residuals as they are computed, rounding and all
            y, v = polished(problem, x.double(), y, v, generator)
        y, v = y.to(dtype), v.to(dtype)
        z = implicit(problem, x.double(), y.double(), v.double()).to(dtype)
        if chosen(0, 0, 1):
            z = torch.tensor([float(value) for value in h]).to(dtype)
        yield (
            f"{'curved' if data.s or data.c else 'quadratic'}",
            data,
            x,
            Estimate(z, 0.0, y, v, Status.successful, (), Stats()),
            h,
        )


def polished(
    problem: BilevelProblem, x: Tensor, y: Tensor, v: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Of several Newton steps from (y, v), the point with the least residuals in float64."""

    def inner(y: Tensor) -> tuple[Tensor, Tensor]:
        y = y.clone().requires_grad_()
        e = torch.autograd.grad(problem.g(x, y), y, create_graph=True)[0]
        H = torch.stack([torch.autograd.grad(entry, y, retain_graph=True)[0] for entry in e])
        return e.detach(), H

    def least(start: Tensor, residual: Callable[[Tensor], tuple[Tensor, Tensor]], steps: int) -> Tensor:
        best, point = (math.inf, start), start
        for k in range(steps):
            left, H = residual(point)
            if float(left.norm()) < best[0]:
                best = float(left.norm()), point
            near = best[1] * (1 + 2e-16 * torch.randn(len(start), generator=generator))
            point = near if k % 4 else point - torch.linalg.solve(H, left)
        return best[1]

    y = least(y, inner, 12)
    free, H = y.clone().requires_grad_(), inner(y)[1]
    fy = torch.autograd.grad(problem.f(x, free), free)[0]
    return y, least(v, lambda v: (H @ v - fy, H), 40)


def newton(data: Scaled, x: Tensor, y: Tensor) -> Tensor:
    """A Newton step on g, halved until the gradient does not grow."""
    u, w = x / data.sx, y / data.sy
    shift = data.c * u[0]

    def gradient(w: Tensor) -> Any:
        return data.A @ w + shift * w + data.s * torch.tanh(w) - u @ data.B - data.a

    H = data.A + torch.diag(shift + data.s * (1 - torch.tanh(w) ** 2))
    step, t = torch.linalg.solve(H, gradient(w)), 1.0
    while t > 1e-6 and gradient(w - t * step).norm() > gradient(w).norm():
        t /= 2
    found: Tensor = data.sy * (w - t * step) if t > 1e-6 else y
    return found


def directed(random: Tensor, Q: Tensor, way: float) -> Tensor:
    """A unit vector: random, or along the least or the greatest curvature."""
    unit: Tensor = random / random.norm() if way == 0 else Q[:, 0 if way == 1 else -1]
    return unit


def implicit(problem: BilevelProblem, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """grad_x f - G v, by autograd."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    fx = torch.autograd.grad(problem.f(x, y), x)[0]
    in_y = torch.autograd.grad(problem.g(x, y), y, create_graph=True)[0]
    return (fx - torch.autograd.grad(in_y, x, v)[0]).detach()


def count(seeds: Iterable[int]) -> tuple[Counter[str], list[str]]:
    """How many certificates there were of each sort, and the violations among those called proven."""
    counts: Counter[str] = Counter()
    violations = []
    for seed in seeds:
        dtype = torch.float32 if seed % 3 == 0 else torch.float64
        for i, (kind, data, x, estimate, h) in enumerate(cases(seed, dtype)):
            known, problem = data.constants(x), BilevelProblem(data.f, data.g)
            known = replace(known, L=None) if (seed + i) % 2 else known
            variants = {"A": known, "B": replace(known, mu=None)}
            for name, constants in variants.items():
                if name == "B" and (seed + i) % 4:
                    continue
                found = certify(problem, x, estimate, constants, refine=(seed + i) % 5 == 0)
                with mp.workdps(DIGITS):
                    error = mp.norm([z - exact for z, exact in zip(vector(estimate.grad), h, strict=True)])
                    size = mp.norm(h)
                counts["heuristic" if not found.proven else f"{kind} {name}"] += 1
                if found.proven and error > found.bound:
                    violations.append(
                        f"seed {seed}, case {i}, {kind}, {name}, {dtype}: error {mpmath.nstr(error, 6)} ="
                        f" {mpmath.nstr(error / size, 3)} |h| is {mpmath.nstr(error / found.bound, 4)} times the bound"
                    )
                if found.proven and found.refined is not None:
                    assert found.refined_bound is not None
                    with mp.workdps(DIGITS):
                        error = mp.norm([z - exact for z, exact in zip(vector(found.refined), h, strict=True)])
                    counts["refined"] += 1
                    if error > found.refined_bound:
                        violations.append(f"seed {seed}, case {i}, refined {error} > {found.refined_bound}")
    return counts, violations


# Where residuals are computed as 0 although v is far from exact, and L is not given: the rounding of H v is |H| |v|,
# and not the curvature along v times it, which is 5000 times too small here.
LUCKY = (329, 655, 703)


def test_no_proven_certificate_is_below_the_error_of_forty_digits() -> None:
    counts, violations = count((*LUCKY, *range(10)))
    assert not violations, "\n".join(violations)
    assert sum(counts.values()) - counts["heuristic"] >= 100, counts


@pytest.mark.slow
def test_no_proven_certificate_of_twenty_thousand_is_below_the_error_of_forty_digits() -> None:
    counts, violations = count(range(1000, 3200))
    assert not violations, "\n".join(violations)
    assert sum(counts.values()) - counts["heuristic"] >= 20_000, counts
