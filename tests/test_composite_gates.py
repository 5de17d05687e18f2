"""Gates of composite problems on known data: the lasso on diabetes, a knot of its path, its dead zone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import pytest
import torch
from torch import Tensor

from bilevel import AID, BilevelProblem, FiniteDifference, Status, hypergradient
from bilevel._calculus import Linearization
from bilevel._inner import OwnStep
from bilevel._linear import LinearOperator
from bilevel.extending import AbstractInnerProblem, Feature, FlatProblem, Objective, Property, Solved
from bilevel.inner_problems import ProximalFixedPoint
from bilevel.prox import L1, TV1D
from bilevel.solvers import CG, FISTA, GMRES, Dense, Neumann, OwnSteps

DOUBLE = torch.float64
FINE = FISTA(tol=1e-13, max_steps=100_000)


@pytest.fixture(scope="module")
def diabetes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """220 rows to train on and 222 held out, columns and targets standardized."""
    numpy, datasets = pytest.importorskip("numpy"), pytest.importorskip("sklearn.datasets")
    X, Y = datasets.load_diabetes(return_X_y=True)
    X, Y = (X - X.mean(0)) / X.std(0), (Y - Y.mean()) / Y.std()
    order = numpy.random.RandomState(0).permutation(len(Y))
    A, b, V, w = (torch.tensor(part) for part in (X[order[:220]], Y[order[:220]], X[order[220:]], Y[order[220:]]))
    return A, b, V, w


def held_out(diabetes: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Any, Any, float]:
    A, b, V, w = diabetes
    return (
        lambda x, y: (V @ y - w).square().mean() / 2,
        lambda x, y: (A @ y - b).square().sum() / (2 * len(b)),
        float((A.T @ b).abs().max() / len(b)),
    )


Y0 = torch.zeros(10, dtype=DOUBLE)


@pytest.mark.parametrize(
    ("part", "support", "value", "radius"), [(0.5, 2, 0.621, 0.46), (0.1, 6, 0.617, 1.41), (0.02, 8, 0.232, 2.12)]
)
def test_the_lasso_on_diabetes(diabetes: Any, part: float, support: int, value: float, radius: float) -> None:
    f, g, largest = held_out(diabetes)
    x = torch.tensor(part * largest, dtype=DOUBLE)
    problem = BilevelProblem(f, g, prox=lambda x: L1(x))
    found = hypergradient(problem, x, Y0, estimator=AID(FINE, CG(1e-13)))
    assert float(found.grad) == pytest.approx(value, abs=5e-4)
    reports = {each.part: each for each in found.reports}
    assert reports["dimension of the support"].residual == support == int((found.y != 0).sum())
    differences = hypergradient(problem, x, Y0, estimator=FiniteDifference(FINE, step=1e-5 * float(x)))
    assert float(found.grad) == pytest.approx(float(differences.grad), rel=1e-7)
    fixed = BilevelProblem(f, inner=ProximalFixedPoint(g, lambda x: L1(x), step=1.0))
    for linear in (GMRES(1e-13), Dense()):
        other = hypergradient(fixed, x, Y0, estimator=AID(FINE, linear))
        assert float(other.grad) == pytest.approx(float(found.grad), rel=1e-9)
    series = hypergradient(fixed, x, Y0, estimator=AID(FINE, Neumann(1.0, 10_000, 1e-12)), throw=False)
    measured = next(each for each in series.reports if each.part.startswith("spectral radius"))
    assert measured.residual == pytest.approx(radius, abs=0.01)
    assert (series.status is Status.successful) is (radius < 1)
    if radius >= 1:
        assert series.status is Status.expanding
    with pytest.raises(ValueError, match=r"`AID` does not apply: .*`CG` requires"):
        hypergradient(fixed, x, Y0, estimator=AID(FINE, CG()))


def knot_below(A: Tensor, b: Tensor, x: float) -> float:
    """The next knot of the path of lassos: where an entry off the support of that at x reaches |grad_j g| = lambda.

    On the support y(l) = (A_S'A_S)^-1 (A_S'b - n l s), so that gradients are affine in l.
    """
    n = len(b)
    problem = BilevelProblem(
        lambda x, y: y.sum(), lambda x, y: (A @ y - b).square().sum() / (2 * n), prox=lambda x: L1(x)
    )
    y = hypergradient(problem, torch.tensor(x, dtype=DOUBLE), Y0, estimator=AID(FINE, CG())).y
    assert isinstance(y, Tensor)
    S = y != 0
    inverse = torch.linalg.inv(A[:, S].T @ A[:, S])
    at_0, slope = inverse @ (A[:, S].T @ b), -n * inverse @ y[S].sign()
    c, d = A.T @ (A[:, S] @ at_0 - b) / n, A.T @ (A[:, S] @ slope) / n  # the gradient is c + l d
    crossings = torch.cat([c[~S] / (1 - d[~S]), -c[~S] / (1 + d[~S]), -at_0 / slope])
    return float(crossings[crossings < x * (1 - 1e-9)].max())


def test_each_side_is_right_at_a_knot_of_the_path_and_a_status_says_that_it_is_one(diabetes: Any) -> None:
    """At the largest lambda below lambda_max / 2 at which the support of the lasso changes."""
    f, g, largest = held_out(diabetes)
    problem = BilevelProblem(f, g, prox=lambda x: L1(x))

    knot = torch.tensor(knot_below(diabetes[0], diabetes[1], 0.5 * largest), dtype=DOUBLE)
    at = hypergradient(problem, knot, Y0, estimator=AID(FINE, CG(1e-13)), throw=False)
    assert at.status is Status.weakly_active
    slopes = {}
    for side, sign in (("left", -1.0), ("right", 1.0)):
        found = hypergradient(problem, knot, Y0, estimator=AID(FINE, CG(1e-13), side=side))  # type: ignore[arg-type]
        assert found.status.ok and any(each.part == f"the {side} side of x" for each in found.reports)
        t = 1e-4 * largest  # a parabola through three values on one side
        values = []
        for k in range(3):
            moved = knot + sign * k * t
            y = hypergradient(problem, moved, Y0, estimator=AID(FINE, CG(1e-13)), throw=False).y
            values.append(float(f(moved, y)))
        slopes[side] = sign * (-3 * values[0] + 4 * values[1] - values[2]) / (2 * t)
        assert float(found.grad) == pytest.approx(slopes[side], rel=1e-6)
    assert abs(slopes["left"] - slopes["right"]) > 0.02 * abs(slopes["left"])


def test_above_lambda_max_the_gradient_is_zero_legal_and_named(diabetes: Any) -> None:
    f, g, largest = held_out(diabetes)
    problem = BilevelProblem(f, g, prox=lambda x: L1(x))
    for estimator in (AID(FINE, CG()), None):
        options = {} if estimator is None else {"estimator": estimator}
        found = hypergradient(problem, torch.tensor(1.2 * largest, dtype=DOUBLE), Y0, **options)  # type: ignore[arg-type]
        assert found.status is Status.successful and float(found.grad) == 0.0
        assert {each.part: each.residual for each in found.reports}["dimension of the support"] == 0.0


@final
@dataclass(frozen=True, eq=False)
class FixedPoint(AbstractInnerProblem):
    """z*(x) = T(x, z*(x)) by steps of T, for z any structure: (I - (dT/dz)') w = grad_z f, without symmetry."""

    T: Any

    @property
    def offers(self) -> frozenset[Property]:
        return frozenset({Property.stationary})

    @property
    def refusal(self) -> str:
        return "z is a fixed point. Use `AID` with `GMRES`."

    @property
    def features(self) -> frozenset[Feature]:
        return frozenset({Feature.own_steps})

    def objective(self, problem: FlatProblem, x: Tensor, products: Any) -> Objective:
        own = OwnStep(lambda z, _, k: self.flat(problem, x, z), 1, needs_gradient=False)
        return Objective(lambda z: z.sum(-1), problem.tally, own=own)

    def linearize(
        self, problem: FlatProblem, x: Tensor, solved: Solved, smooth: Any, margin: float | None
    ) -> Linearization:
        with torch.enable_grad():
            x, z = x.detach().requires_grad_(), solved.value.detach().requires_grad_()
            image = self.flat(problem, x, z)

        def products(w: Tensor) -> tuple[Tensor, Tensor | None]:
            in_z, in_x = torch.autograd.grad(image, (z, x), w, retain_graph=True)
            return w - in_z, -in_x

        operator = LinearOperator(lambda w: products(w)[0], z.shape[-1], symmetric=False)
        return Linearization(z.detach(), z.detach(), operator.mv, products, operator=operator)

    def flat(self, problem: FlatProblem, x: Tensor, z: Tensor) -> Tensor:
        return problem.map(lambda x, z: problem.y.ravel(self.T(x, problem.y.unravel(z)), "T(x, z)"), "g", x, z)


@pytest.mark.slow
def test_the_fixed_point_of_admm_for_total_variation_is_differentiated() -> None:
    """y = Q (A'b + rho K'(v - u)), v+ = soft(K y + u, w / rho), u+ = u + K y - v+: T hardly contracts."""
    n, rho = 60, 0.1
    generator = torch.Generator().manual_seed(0)
    shift = torch.roll(torch.eye(n, dtype=DOUBLE), 1, 0)
    K = torch.eye(n, dtype=DOUBLE).diff(dim=0)
    A = sum(weight * torch.linalg.matrix_power(shift, k) for k, weight in enumerate((0.1, 0.2, 0.4, 0.2, 0.1)))
    assert isinstance(A, Tensor)
    true = torch.zeros(n, dtype=DOUBLE)
    true[10:25], true[35:40] = 1.0, -0.5
    b = A @ true + 0.05 * torch.randn(n, generator=generator, dtype=DOUBLE)
    Q = torch.linalg.inv(A.T @ A + rho * K.T @ K)

    def image(z: Any) -> Tensor:
        found: Tensor = Q @ (A.T @ b + rho * K.T @ (z["v"] - z["u"]))
        return found

    def T(x: Tensor, z: Any) -> Any:  # noqa: N802
        moved = K @ image(z) + z["u"]
        v = L1(x.exp() / rho).prox(moved, 1.0)
        return {"v": v, "u": moved - v}

    problem = BilevelProblem(lambda x, z: (image(z) - true).square().sum() / 2, inner=FixedPoint(T))
    x, z0 = torch.tensor(0.02, dtype=DOUBLE).log(), {key: torch.zeros(n - 1, dtype=DOUBLE) for key in "vu"}
    steps = OwnSteps(3000)
    start = hypergradient(problem, x, z0, estimator=AID(steps, GMRES(1e-12)))
    differences = []
    for sign in (1, -1):
        moved = hypergradient(problem, x + sign * 1e-4, start.y, estimator=AID(steps, GMRES(0.5)))
        differences.append(float(moved.value))
    slope = (differences[0] - differences[1]) / 2e-4
    for linear in (GMRES(1e-12), Dense()):
        found = hypergradient(problem, x, start.y, estimator=AID(OwnSteps(1), linear))
        assert float(found.grad) == pytest.approx(slope, rel=3e-7)
    composite = BilevelProblem(
        lambda x, y: (y - true).square().sum() / 2,
        lambda x, y: (A @ y - b).square().sum() / 2,
        prox=lambda x: TV1D(x.exp()),
    )
    manifold = AID(FISTA(tol=1e-11, max_steps=50_000), CG(1e-12))
    found = hypergradient(composite, x, torch.zeros(n, dtype=DOUBLE), estimator=manifold)
    assert float(found.grad) == pytest.approx(slope, rel=1e-6)
