"""What sums of terms must reach: gates A, B, D and E, and that a run which calls itself successful is one.

C, a learned schedule against the best constant one, is the first test of test_proximal_recipes.py.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import AID, ITD, hypergradient
from bilevel.solvers import CG, GMRES, Anderson, FixedPointIteration, Neumann
from bilevel.terms import (
    ADMM,
    HQS,
    PDHG,
    AbstractAlgorithm,
    Convolution,
    Diagonal,
    FourierSamples,
    Gradient,
    LinearizedADMM,
    Matrix,
    Mosaic,
    ProximalGradient,
    Scheme,
    Stacked,
    SumOfTerms,
    Wavelets,
    bayer,
    box,
    denoised,
    denoiser_start,
    equal,
    inner,
    norm1,
    prior,
    proximal_problem,
    sum_squares,
    variable,
)

F64, N = torch.float64, 60


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def kernel() -> Tensor:
    k = (-torch.arange(-7, 8, dtype=F64).square() / 8).exp()
    return k / k.sum()


BLUR, D, Y = Convolution(kernel(), (N,)), Gradient((N,)), variable(N)
TRUTH = torch.zeros(N, dtype=F64)
TRUTH[10:25], TRUTH[35:45] = 1.0, -0.5
SEEN = BLUR.forward(TRUTH) + 0.01 * drawn(N, seed=1)
ZERO = torch.zeros(N, dtype=F64)


def deblurred(w: Any, sparse: bool = False) -> SumOfTerms:
    found: SumOfTerms = 0.5 * sum_squares(BLUR @ Y - SEEN) + w * norm1(Y if sparse else D @ Y)
    return found


# A: against cvxpy


@pytest.mark.parametrize("sparse", [False, True])
def test_a_objectives_and_images_are_those_of_cvxpy(sparse: bool) -> None:
    cp: Any = pytest.importorskip("cvxpy")
    y = cp.Variable(N)
    A, K = BLUR.forward(torch.eye(N, dtype=F64)).mT.numpy(), D.forward(torch.eye(N, dtype=F64)).flatten(1).mT.numpy()
    cost = 0.5 * cp.sum_squares(A @ y - SEEN.numpy()) + 0.02 * cp.norm1(y if sparse else K @ y)
    cp.Problem(cp.Minimize(cost)).solve("CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    exact, objective = torch.tensor(y.value), deblurred(0.02, sparse)
    with torch.no_grad():
        early, late = (ADMM(0.1).on(objective).run(SEEN, steps) for steps in (500, 2000))
    least = float(objective.value(exact))
    assert float(objective.value(early)) - least <= 1e-3 * least
    if not sparse:  # sparse deconvolution with this blur is ill-posed: the objective says little of the image
        assert float((late - exact).norm() / exact.norm()) <= 1e-6


# B: the derivative in the logarithm of a weight


def loss(_: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (y - TRUTH).square().sum()


def test_b_the_implicit_and_the_unrolled_derivative_are_those_of_differences() -> None:
    def scheme(x: Tensor) -> Scheme:
        return ADMM(0.1).on(deblurred(x.exp()))

    def value(x: Tensor) -> float:
        return float(loss(x, scheme(x).solve(ZERO, tol=1e-13, max_steps=8000, every=100).y))

    x = torch.tensor(0.02, dtype=F64).log()
    differences = (value(x + 1e-4) - value(x - 1e-4)) / 2e-4
    implicit = hypergradient(
        proximal_problem(loss, scheme), x, scheme(x).start(ZERO), estimator=AID(Anderson(1e-10), GMRES(1e-11))
    )
    assert float(implicit.grad) == pytest.approx(differences, rel=1e-5)
    leaf = x.clone().requires_grad_()
    (unrolled,) = torch.autograd.grad(loss(leaf, scheme(leaf).run(ZERO, 2000)), leaf)
    assert float(unrolled) == pytest.approx(differences, rel=1e-4)


def diabetes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data: Any = pytest.importorskip("sklearn.datasets")
    X, b = (torch.tensor(part, dtype=F64) for part in data.load_diabetes(return_X_y=True))
    X, b = (X - X.mean(0)) / X.std(0), (b - b.mean()) / b.std()
    return X[:220], b[:220], X[220:], b[220:]


@pytest.mark.parametrize("name", ["lasso", "weighted lasso", "elastic net"])
@pytest.mark.parametrize("share", [0.5, 0.1, 0.02])
def test_b_sparse_regression_on_diabetes_moves_as_differences_do(name: str, share: float) -> None:
    X, b, U, c = diabetes()
    n, y = len(b), variable(10)
    largest = float((X.mT @ b).abs().max()) / n
    weights = torch.linspace(0.5, 1.5, 10, dtype=F64) if name == "weighted lasso" else torch.ones(10, dtype=F64)

    def scheme(x: Tensor) -> Scheme:
        fit = (0.5 / n) * sum_squares(X @ y - b) + x.exp() * norm1(Diagonal(weights) @ y)
        return ADMM(0.3).on(fit + 0.05 * sum_squares(y) if name == "elastic net" else fit)

    def f(_: Tensor, y: Tensor) -> Tensor:
        return (U @ y - c).square().mean() / 2

    def value(x: Tensor) -> float:
        return float(f(x, scheme(x).solve(torch.zeros(10, dtype=F64), tol=1e-13, max_steps=2000).y))

    x = torch.tensor(share * largest, dtype=F64).log()
    differences = (value(x + 1e-5) - value(x - 1e-5)) / 2e-5
    problem = proximal_problem(f, scheme)
    start = scheme(x).solve(torch.zeros(10, dtype=F64), tol=1e-13, max_steps=2000).state
    found = hypergradient(problem, x, start, estimator=AID(Anderson(1e-10), GMRES(1e-11)))
    assert float(found.grad) == pytest.approx(differences, rel=1e-6)
    with pytest.raises(ValueError, match="symmetric"):
        hypergradient(problem, x, start, estimator=AID(Anderson(), CG()))


def test_b_above_the_largest_weight_nothing_moves_and_at_a_knot_each_side_has_its_own_derivative() -> None:
    X, b, U, c = diabetes()
    n, y = len(b), variable(10)
    correlations = (X.mT @ b).abs() / n
    largest = correlations.max()

    def scheme(x: Tensor) -> Scheme:
        return ADMM(0.3).on((0.5 / n) * sum_squares(X @ y - b) + x.exp() * norm1(y))

    def f(_: Tensor, y: Tensor) -> Tensor:
        return (U @ y - c).square().mean() / 2

    def slope(x: Tensor) -> float:
        start = scheme(x).start(torch.zeros(10, dtype=F64))
        estimator = AID(Anderson(1e-12, max_steps=3000), GMRES(1e-10))
        return float(hypergradient(proximal_problem(f, scheme), x, start, estimator=estimator, throw=False).grad)

    assert abs(slope((1.1 * largest).log())) <= 1e-12
    below, above = slope(largest.log() - 1e-3), slope(largest.log() + 1e-3)
    k = int(correlations.argmax())  # just below y_k = sign (largest - w) n / |X_k|^2
    curvature, sign = float(X[:, k].square().sum()) / n, float((X.mT @ b)[k].sign())
    wanted = float(-largest / curvature * sign * -(U[:, k] @ c) / len(c))
    assert abs(above) <= 1e-12 and below == pytest.approx(wanted, rel=5e-3)


# D: a denoiser learned by implicit differentiation


@pytest.mark.parametrize("modulus", [0.8, 0.94])
def test_d_the_neumann_series_of_a_contractive_denoiser_decays_as_its_modulus(modulus: float) -> None:
    b, y, x = drawn(8, 8), variable(8, 8), denoiser_start(3, 3, scale=0.3)
    blur = Convolution(torch.full((3, 3), 1 / 9, dtype=F64), (8, 8))

    def scheme(x: Any) -> Scheme:
        term = prior(lambda v, _: denoised(x, v, modulus), y)
        return ProximalGradient(step=1.0).on(0.5 * sum_squares(blur @ y - b) + term)

    problem = proximal_problem(lambda _, y: (y - 1).square().sum(), scheme)

    def grad(linear: Any) -> Tensor:
        found = hypergradient(problem, x, scheme(x).start(b), estimator=AID(Anderson(1e-12), linear), throw=False).grad
        return torch.cat([found[name].flatten() for name in sorted(found)])

    exact = grad(GMRES(1e-12, max_steps=200))
    errors = [float((grad(Neumann(1.0, terms)) - exact).norm() / exact.norm()) for terms in (20, 60, 100)]
    assert errors[-1] <= max(1e-4, 5 * modulus**100)
    assert all(later <= max(1e-9, 5 * modulus**40 * earlier) for earlier, later in itertools.pairwise(errors))


# E: linear programs


@pytest.mark.parametrize("seed", range(3, 8))
def test_e_random_linear_programs_cost_what_they_do_for_highs(seed: int) -> None:
    optimize: Any = pytest.importorskip("scipy.optimize")
    A, c = drawn(6, 15, seed=seed), drawn(15, seed=seed + 100)
    b = A @ torch.rand(15, generator=torch.Generator().manual_seed(seed), dtype=F64)
    exact = optimize.linprog(c.numpy(), A_eq=A.numpy(), b_eq=b.numpy(), bounds=(0, 1), method="highs").fun
    y = variable(15)
    objective = inner(c, y) + box(y, 0.0, 1.0) + equal(A @ y - b)
    found = PDHG(0.3).on(objective).solve(torch.zeros(15, dtype=F64), tol=1e-7, max_steps=20_000, every=50)
    assert found.status.ok
    assert float(c @ found.y) == pytest.approx(exact, abs=1e-3 * (1 + abs(exact)))


# Success is earned

SMALL = variable(20)
STEPS = torch.linspace(0, 1, 20, dtype=F64).round() + 0.1 * drawn(20)
SHORT: dict[str, AbstractAlgorithm] = {
    "large rho": ADMM(1e6),
    "small rho": ADMM(1e-7),
    "linearized, large rho": LinearizedADMM(1e7),
    "linearized, short steps": LinearizedADMM(step=1e-9),
    "primal-dual, large rho": PDHG(1e7),
    "primal-dual, small rho": PDHG(1e-7),
    "primal-dual, short steps": PDHG(step=1e-9),
    "splitting, large rho": HQS(1e8),
}


def jumps(unit: float = 1.0) -> SumOfTerms:
    found: SumOfTerms = 0.5 * sum_squares(SMALL - unit * STEPS) + 0.3 * unit * norm1(Gradient((20,)) @ SMALL)
    return found


@pytest.mark.parametrize("name", SHORT)
def test_short_steps_are_no_success(name: str) -> None:
    found = SHORT[name].on(jumps()).solve(torch.zeros(20, dtype=F64), max_steps=300)
    assert found.status.name == "max_steps" and found.residual > 1e-3


def test_short_steps_of_proximal_gradient_are_no_success() -> None:
    objective = 0.5 * sum_squares(SMALL - STEPS) + 0.3 * norm1(SMALL)
    found = ProximalGradient(step=1e-9).on(objective).solve(torch.zeros(20, dtype=F64), max_steps=100)
    assert found.status.name == "max_steps"


@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_the_unit_of_data_and_the_scale_of_an_objective_change_no_status(unit: float) -> None:
    zero = torch.zeros(20, dtype=F64)
    exact = ADMM(1.0).on(jumps()).solve(zero, tol=1e-12, every=20)
    found = ADMM(1.0).on(jumps(unit)).solve(zero, tol=1e-12, every=20)
    assert exact.steps == found.steps
    torch.testing.assert_close(found.y / unit, exact.y, rtol=1e-9, atol=1e-10)
    scaled = ADMM(unit).on(unit * jumps()).solve(zero, tol=1e-12, every=20)
    assert scaled.steps == exact.steps and scaled.status.ok


def test_every_image_of_a_batch_must_be_there() -> None:
    objective = 0.5 * sum_squares(SMALL - torch.stack([1e6 * STEPS, STEPS])) + 0.3 * norm1(Gradient((20,)) @ SMALL)
    start = torch.stack([ADMM(1.0).on(jumps(1e6)).solve(STEPS).y * 0 + 1e6 * STEPS, torch.zeros(20, dtype=F64)])
    found = ADMM(1.0).on(objective).solve(start, tol=1e-6, max_steps=5, every=1)
    alone = ADMM(1.0).on(jumps()).solve(torch.zeros(20, dtype=F64), tol=1e-6, max_steps=5, every=1)
    assert found.residual >= alone.residual > 1e-6


def test_a_minimizer_of_zeros_is_found() -> None:
    heavy = 0.5 * sum_squares(SMALL - STEPS) + 100.0 * norm1(SMALL)
    for algorithm in (ADMM(1.0), PDHG(1.0), ProximalGradient(), LinearizedADMM()):
        found = algorithm.on(heavy).solve(STEPS, tol=1e-8)
        assert found.status.ok and float(found.y.abs().max()) <= 1e-6


@pytest.mark.parametrize(
    "algorithm", [ADMM(0.7), ADMM(0.7, order="vyu"), ADMM(0.7, order="vuy"), PDHG(1.0), LinearizedADMM(0.5), HQS(2.0)]
)
def test_the_residual_is_zero_at_the_fixed_point_and_nowhere_else(algorithm: AbstractAlgorithm) -> None:
    scheme = algorithm.on(jumps())
    found = scheme.solve(STEPS, tol=1e-13, max_steps=50_000, every=50)
    assert float(scheme.residual(found.state)) <= 1e-12
    after = scheme.step(found.state)
    assert max(float((a - b).norm()) for a, b in zip(leaves(after), leaves(found.state), strict=True)) <= 1e-10
    moved = {name: [v + 0.1 * drawn(*v.shape) for v in each] for name, each in found.state.items() if name != "y"}
    assert float(scheme.residual({"y": found.state["y"] + 0.1 * drawn(20), **moved})) > 1e-3


def leaves(state: dict[str, Any]) -> list[Tensor]:
    return [state["y"], *(leaf for name in sorted(state) if name != "y" for leaf in state[name])]


def test_single_precision_reaches_its_tolerance() -> None:
    objective = 0.5 * sum_squares(SMALL - STEPS.float()) + 0.3 * norm1(Gradient((20,)) @ SMALL)
    for algorithm in (ADMM(1.0), PDHG(1.0), LinearizedADMM(1.0)):
        found = algorithm.on(objective).solve(torch.zeros(20, dtype=torch.float32), tol=1e-5)
        assert found.status.ok and found.y.dtype == torch.float32


def test_starts_are_taken_to_the_batch_and_the_precision_of_what_was_measured() -> None:
    objective = 0.5 * sum_squares(SMALL - STEPS.expand(3, 20)) + torch.tensor([0.1, 0.2, 0.3]) * norm1(SMALL)
    for algorithm in (ADMM(), HQS(), PDHG(), LinearizedADMM(), ProximalGradient()):
        found = algorithm.on(objective).run(torch.zeros(20, dtype=torch.float32), 2)
        assert found.shape == (3, 20) and found.dtype == F64


def test_constants_of_an_expression_are_of_its_shape() -> None:
    y = variable(2, 6)
    for K, shape in ((Convolution(drawn(1, 3), (2, 6)), (2, 6)), (Gradient((2, 6)), (2, 2, 6))):
        one = 0.5 * sum_squares(K @ y - 1.0) + sum_squares(y)
        whole = 0.5 * sum_squares(K @ y - torch.ones(shape, dtype=F64)) + sum_squares(y)
        start = torch.zeros(2, 6, dtype=F64)
        torch.testing.assert_close(ADMM().on(one).solve(start).y, ADMM().on(whole).solve(start).y)
    with pytest.raises(
        ValueError, match=r"`expression - c\(c=...\)` must be a dense tensor of the shape of the expression, \(2, 6\)"
    ):
        _ = y - torch.zeros(5)
    with pytest.raises(ValueError, match=r"`inner\(c=...\)`"):
        inner(torch.zeros(5), y)
    with pytest.raises(ValueError, match=r"`box\(upper=...\)`"):
        box(y, 0.0, torch.ones(5))
    with pytest.raises(ValueError, match=r"`equal\(value=...\)`"):
        equal(y, torch.ones(5))


def test_terms_are_divided_and_multiplied_from_either_side_and_one_is_an_objective() -> None:
    at = drawn(20)
    for found in (sum_squares(SMALL) / 2, sum_squares(SMALL) * 0.5):
        torch.testing.assert_close(found.value(at), 0.5 * at.square().sum())
    torch.testing.assert_close((jumps() * 2).value(at), 2 * jumps().value(at))
    torch.testing.assert_close((jumps() / 2).value(at), jumps().value(at) / 2)
    torch.testing.assert_close(norm1(SMALL / 2).value(at), norm1(SMALL * 0.5).value(at))
    torch.testing.assert_close(ADMM().on(sum_squares(SMALL - STEPS)).solve(at).y, STEPS)


REFUSED: dict[str, tuple[Any, str]] = {
    "start of another size": (lambda: ADMM().on(jumps()).solve(torch.zeros(5, dtype=F64)), "shape of the variable"),
    "start of integers": (lambda: PDHG().on(jumps()).run(torch.zeros(20, dtype=torch.int64), 1), "floating-point"),
    "weights of another batch": (
        lambda: ADMM().on(0.5 * sum_squares(SMALL - STEPS.expand(3, 20)) + torch.ones(2) * norm1(SMALL)).start(STEPS),
        "axes of batches",
    ),
    "schedule that is too short": (lambda: ADMM(torch.ones(3)).on(jumps()).run(STEPS, 4), "has no step 4"),
    "thresholds that are too few": (lambda: ADMM(1.0, torch.ones(3)).on(jumps()).run(STEPS, 4), "has no step 4"),
    "thresholds of one block": (
        lambda: ADMM(1.0, torch.ones(3, 1)).on(jumps() + box(SMALL, 0.0)).run(STEPS, 1),
        "a column for each block",
    ),
    "rho": (lambda: ADMM(torch.tensor(-1.0)), r"`ADMM\(rho=...\)` must be positive"),
    "step": (lambda: PDHG(step=torch.tensor([1.0, 0.0])), r"`PDHG\(step=...\)` must be positive"),
    "weight": (lambda: torch.tensor(-1.0) * norm1(SMALL), "at least 0"),
    "singular system": (lambda: ADMM().on(0.5 * sum_squares(drawn(4, 20) @ SMALL)).start(STEPS), "singular"),
    "singular in frequencies": (lambda: ADMM().on(norm1(Gradient((20,)) @ SMALL)).solve(STEPS), "singular"),
    "array of numpy": (lambda: drawn(3, 20).numpy() @ SMALL, r"`A @ expression\(A=...\)`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_named(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=words):
        call()


@pytest.mark.parametrize(
    "A",
    [
        Convolution(torch.ones(3), (8,)),
        Gradient((8,)),
        Wavelets((8, 8)),
        FourierSamples(torch.ones(8, dtype=torch.bool)),
        Diagonal(torch.ones(8)),
        Mosaic(bayer(4, 4)),
        Matrix(torch.ones(2, 8)),
        Stacked((Gradient((8,)), Diagonal(torch.ones(8)))),
    ],
)
def test_maps_refuse_arrays_of_other_shapes(A: Any) -> None:
    for call, shape in ((A.forward, A.in_shape), (A.adjoint, A.out_shape)):
        with pytest.raises(ValueError, match="takes arrays of shape"):
            call(torch.ones(*shape[:-1], 2 * shape[-1]))


def test_states_and_schemes_that_are_none_are_named() -> None:
    def scheme(x: Tensor) -> Scheme:
        return ADMM().on(0.5 * sum_squares(SMALL - STEPS) + x.exp() * norm1(SMALL))

    x, start = torch.tensor(0.0, dtype=F64), scheme(torch.tensor(0.0, dtype=F64)).start(STEPS)
    with pytest.raises(TypeError, match=r"`scheme\(x\).start\(image\)`"):
        hypergradient(proximal_problem(loss, scheme), x, STEPS)
    with pytest.raises(TypeError, match=r"`proximal_problem\(scheme=...\)` must return a scheme"):
        hypergradient(proximal_problem(loss, lambda x: jumps()), x, start)  # type: ignore[arg-type, return-value]


def test_a_map_is_prepared_once_for_all_steps_of_a_solver() -> None:
    made = []

    def scheme(x: Tensor) -> Scheme:
        made.append(x)
        return ADMM().on(0.5 * sum_squares(SMALL - STEPS) + x.exp() * norm1(Gradient((20,)) @ SMALL))

    x = torch.tensor(-1.0, dtype=F64)
    problem = proximal_problem(lambda _, y: y.square().sum(), scheme)
    estimator = AID(FixedPointIteration(200, tol=None), GMRES(1e-10))
    found = hypergradient(problem, x, scheme(x).start(STEPS), estimator=estimator, throw=False)
    assert len(made) <= 10
    unrolled = hypergradient(
        problem, x, scheme(x).start(STEPS), estimator=ITD(FixedPointIteration(200, tol=None)), throw=False
    )
    torch.testing.assert_close(found.grad, unrolled.grad, rtol=1e-5, atol=0)
    assert math.isfinite(found.value)


def test_a_matrix_beside_a_mask_has_a_closed_form() -> None:
    A, d, r = drawn(7, 5), drawn(5).abs(), drawn(3, 5)
    gram = Matrix(A).gram.plus(2.0, Diagonal(d).gram)
    assert gram.closed
    wanted = torch.linalg.solve(A.mT @ A + 2 * torch.diag(d.square()), r.mT).mT
    torch.testing.assert_close(gram.solve(r), wanted)


@pytest.mark.parametrize("segment", [0, 2])
def test_a_scheme_that_has_run_without_a_graph_has_the_graph_of_its_making(segment: int) -> None:
    """Also in segments, which are computed twice: nothing is kept from the first time that has no derivative."""
    seen = STEPS + 0.1 * drawn(20, seed=2)

    def value(k: Tensor, before: bool) -> Tensor:
        blur = Convolution(k, (20,))
        scheme = ADMM(k.sum()).on(0.5 * sum_squares(blur @ SMALL - seen) + 0.1 * norm1(Gradient((20,)) @ SMALL))
        if before:
            scheme.solve(seen, max_steps=3)
        return scheme.run(seen, 4, segment=segment).square().sum()

    found = []
    for before in (False, True):
        k = torch.tensor([0.25, 0.5, 0.25], dtype=F64).requires_grad_()
        found.append(torch.autograd.grad(value(k, before), k)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)
    k, d = torch.tensor([0.25, 0.5, 0.25], dtype=F64), torch.tensor([1.0, -0.5, 0.3], dtype=F64)
    differences = (value(k + 1e-6 * d, False) - value(k - 1e-6 * d, False)) / 2e-6
    assert float(found[0] @ d) == pytest.approx(float(differences), rel=1e-6)
