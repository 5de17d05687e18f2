"""Objectives as sums of terms: what they are minimized to, by which algorithm, and how that moves with parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from bilevel import AID, ESJ, ITD, BilevelProblem, Checkpointed, hypergradient
from bilevel.prox import L1, Simplex
from bilevel.solvers import CG, GMRES, LBFGS, Anderson, Dense, FixedPointIteration, Neumann, OwnSteps
from bilevel.terms import (
    ADMM,
    HQS,
    PDHG,
    AbstractAlgorithm,
    AbstractLinearMap,
    Convolution,
    Diagonal,
    FourierSamples,
    Gradient,
    Gram,
    Identity,
    LinearizedADMM,
    LinearMap,
    Matrix,
    Mosaic,
    ProximalGradient,
    Scheme,
    Stacked,
    SumOfTerms,
    Wavelets,
    adjoint_gap,
    bayer,
    box,
    denoised,
    denoiser_start,
    equal,
    inner,
    nonnegative,
    norm1,
    norm2_sum,
    penalty,
    prior,
    proximal_problem,
    sum_squares,
    variable,
)

N, W = 30, 0.05
F64 = torch.float64


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def kernel(width: float = 1.0, radius: int = 4) -> Tensor:
    k = (-torch.arange(-radius, radius + 1, dtype=F64).square() / (2 * width**2)).exp()
    return k / k.sum()


BLUR, D = Convolution(kernel(), (N,)), Gradient((N,))
TRUTH = torch.zeros(N, dtype=F64)
TRUTH[5:12], TRUTH[17:23] = 1.0, -0.5
SEEN = BLUR.forward(TRUTH) + 0.01 * drawn(N, seed=1)
ZERO = torch.zeros(N, dtype=F64)


def deblurred(w: Any = W, seen: Tensor = SEEN) -> SumOfTerms:
    y = variable(N)
    objective: SumOfTerms = 0.5 * sum_squares(BLUR @ y - seen) + w * norm1(D @ y)
    return objective


def dense(A: AbstractLinearMap) -> Tensor:
    count = math.prod(A.in_shape)
    columns = torch.eye(count, dtype=F64).reshape(count, *A.in_shape)
    return A.forward(columns).reshape(count, -1).mT


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# Linear maps

FREE = Gradient((4, 6), boundary="free")
MAPS: dict[str, AbstractLinearMap] = {
    "convolution": Convolution(drawn(3, 5), (6, 7)),
    "convolution of channels": Convolution(drawn(3, 3), (2, 6, 7)),
    "gradient": Gradient((4, 6)),
    "gradient of a stack": Gradient((3, 4, 6), axes=2),
    "free gradient": FREE,
    "wavelets": Wavelets((2, 8, 4), 2),
    "samples of frequencies": FourierSamples(drawn(5, 6) < 0),
    "mosaic": Mosaic(bayer(4, 6)),
    "mask": Diagonal((drawn(4, 6) < 0).double()),
    "matrix": Matrix(drawn(3, 5)),
    "composition": Gradient((6, 7)) @ Convolution(drawn(3, 3), (6, 7)),
    "multiple": 2.0 * Gradient((4,)),
    "stack": Stacked((Gradient((6, 7)), Convolution(drawn(3, 3), (6, 7)))),
    "adjoint": Gradient((4, 6)).T,
    "adjoint of a convolution": Convolution(drawn(3, 3), (6, 7)).T,
}


@pytest.mark.parametrize("name", MAPS)
def test_the_adjoint_of_a_map_is_one_and_its_gram_matrix_that_of_its_columns(name: str) -> None:
    A = MAPS[name]
    assert adjoint_gap(A) < 1e-14
    columns = dense(A)
    assert columns.shape == (math.prod(A.out_shape), math.prod(A.in_shape))
    if not A.gram.known:
        return
    shifted = A.gram + Gram(scalar=0.7)
    r = drawn(2, *A.in_shape)
    wanted = torch.linalg.solve(columns.mT @ columns + 0.7 * torch.eye(columns.shape[1]), r.reshape(2, -1).mT).mT
    for found in (shifted.solve(r), shifted.prepared()(r)):
        torch.testing.assert_close(found.reshape(2, -1), wanted, rtol=1e-10, atol=1e-12)
    assert float(A.gram.largest()) >= float(torch.linalg.matrix_norm(columns, 2)) ** 2 * (1 - 1e-10)


def test_what_has_no_closed_form_says_so_and_two_forms_at_once_have_none() -> None:
    assert not FREE.gram.known and not Gradient((4, 6)).T.gram.known
    assert not (MAPS["gradient"].gram + MAPS["mask"].gram).closed
    assert (MAPS["gradient"].gram + Identity((4, 6)).gram).closed


def test_an_adjoint_that_is_none_is_told_and_a_map_that_forgets_batches_is_refused() -> None:
    half = LinearMap(lambda y: 2 * y, lambda z: z, (3,), (3,))
    assert adjoint_gap(half) > 0.1
    assert adjoint_gap(LinearMap(lambda y: 2 * y, lambda z: 2 * z, (3,), (3,))) < 1e-14
    with pytest.raises(ValueError, match="axes in front"):
        adjoint_gap(LinearMap(lambda y: y.sum().reshape(1), lambda z: z.expand(2, 3), (3,), (1,)))


@given(st.integers(1, 5), st.sampled_from(["haar"]), st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_wavelets_are_orthogonal(levels: int, name: str, seed: int) -> None:
    A, y = Wavelets((32, 32), levels, name), drawn(32, 32, seed=seed)
    torch.testing.assert_close(A.adjoint(A.forward(y)), y)
    assert float(A.forward(y).norm()) == pytest.approx(float(y.norm()))


def test_wavelets_by_name_are_those_of_pywavelets() -> None:
    pywt: Any = pytest.importorskip("pywt")
    A, y = Wavelets((16, 16), 1, "db2"), drawn(16, 16)
    assert adjoint_gap(A) < 1e-14
    means = torch.tensor(pywt.dwt2(y.numpy(), "db2", mode="periodization")[0])  # which begins a pixel earlier
    torch.testing.assert_close(A.forward(y.roll((1, 1), (0, 1)))[:8, :8], means)
    for name, shape, levels in (("sym4", (16, 24), 3), ("db8", (8, 8), 3), ("coif1", (2, 16, 16), 2)):
        basis, z = Wavelets(shape, levels, name), drawn(*shape)
        assert adjoint_gap(basis) < 1e-14  # filters that are longer than what is left of a side as well
        torch.testing.assert_close(basis.adjoint(basis.forward(z)), z, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="orthogonal wavelet"):
        Wavelets((16, 16), 1, "bior2.2")


# What is minimized

EXACT: dict[str, AbstractAlgorithm] = {
    "admm": ADMM(0.3),
    "admm, another rho": ADMM(1.0),
    "admm, v first": ADMM(0.3, order="vyu"),
    "admm, v and u first": ADMM(0.3, order="vuy"),
    "admm, relaxed": ADMM(0.3, relaxation=1.6),
    "linearized admm": LinearizedADMM(0.3),
    "primal-dual": PDHG(1.0),
}


@pytest.fixture(scope="module")
def minimizer() -> Tensor:
    """By a long run, which `test_the_minimizer_is_that_of_cvxpy` compares."""
    found = ADMM(0.3).on(deblurred()).solve(ZERO, tol=1e-13, max_steps=6000, every=50)
    assert found.status.ok
    return found.y


def by_cvxpy(blur: Convolution, seen: Tensor, w: float) -> Tensor:
    cp: Any = pytest.importorskip("cvxpy")
    n = len(seen)
    y = cp.Variable(n)
    A, K = dense(blur).numpy(), dense(Gradient((n,))).numpy()
    cost = 0.5 * cp.sum_squares(A @ y - seen.numpy()) + w * cp.norm1(K @ y)
    cp.Problem(cp.Minimize(cost)).solve("CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return torch.tensor(y.value)


def test_the_minimizer_is_that_of_cvxpy(minimizer: Tensor) -> None:
    assert relative(minimizer, by_cvxpy(BLUR, SEEN, W)) <= 1e-6


def test_two_thousand_steps_deblur_a_signal_of_sixty_as_cvxpy_does() -> None:
    blur, truth = Convolution(kernel(2.0, 7), (60,)), torch.zeros(60, dtype=F64)
    truth[10:25], truth[35:45] = 1.0, -0.5
    seen = blur.forward(truth) + 0.01 * drawn(60, seed=1)
    y = variable(60)
    objective = 0.5 * sum_squares(blur @ y - seen) + 0.02 * norm1(Gradient((60,)) @ y)
    exact = by_cvxpy(blur, seen, 0.02)
    with torch.no_grad():
        found = ADMM(0.1).on(objective).run(seen, 2000)
        early = objective.value(ADMM(0.1).on(objective).run(seen, 500))
    assert relative(found, exact) <= 1e-6
    least = objective.value(exact)
    assert float(early - least) <= 1e-3 * float(least)


@pytest.mark.parametrize("name", EXACT)
def test_whatever_the_algorithm_and_its_rho_the_minimizer_is_that_of_the_objective(
    name: str, minimizer: Tensor
) -> None:
    found = EXACT[name].on(deblurred()).solve(ZERO, tol=1e-9, max_steps=4000, every=20)
    assert found.status.ok
    assert relative(found.y, minimizer) <= 1e-6


def test_terms_without_a_closed_system_are_minimized_by_conjugate_gradients() -> None:
    y, free = variable(12), Gradient((12,), boundary="free")
    b = drawn(12)
    objective = 0.5 * sum_squares(y - b) + 0.3 * norm1(free @ y) + box(y, -0.5, 0.5)
    found = ADMM(1.0).on(objective).solve(torch.zeros(12, dtype=F64), tol=1e-10, max_steps=2000)
    K = torch.cat([dense(free), torch.eye(12, dtype=F64)])
    same = 0.5 * sum_squares(y - b) + 0.3 * norm1(Matrix(dense(free)) @ y) + box(y, -0.5, 0.5)
    other = PDHG(1.0).on(same).solve(torch.zeros(12, dtype=F64), tol=1e-10, max_steps=6000)
    assert K.shape == (24, 12) and found.status.ok and other.status.ok
    torch.testing.assert_close(found.y, other.y, rtol=0, atol=1e-7)


def test_proximal_gradient_minimizes_with_one_term_of_an_orthogonal_map_and_refuses_others() -> None:
    y, b, basis = variable(8, 8), drawn(8, 8), Wavelets((8, 8), 2)
    objective = 0.5 * sum_squares(y - b) + 0.4 * norm1(basis @ y - 0.1)
    soft = L1(1.0).prox(basis.forward(b) - 0.1, 0.4) + 0.1  # the minimizer in the basis
    for algorithm in (ProximalGradient(), ProximalGradient(step=0.3)):
        found = algorithm.on(objective).solve(torch.zeros(8, 8, dtype=F64), tol=1e-12)
        torch.testing.assert_close(found.y, basis.adjoint(soft), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="`ADMM`, or `PDHG`"):
        ProximalGradient().on(deblurred())


def test_half_quadratic_splitting_minimizes_the_objective_with_moreau_envelopes_and_not_the_objective(
    minimizer: Tensor,
) -> None:
    rho = 0.5

    def smoothed(y: Tensor) -> Tensor:
        z = D.forward(y)
        huber = torch.where(z.abs() <= W / rho, rho / 2 * z.square(), W * z.abs() - W**2 / (2 * rho))
        return 0.5 * (BLUR.forward(y) - SEEN).square().sum() + huber.sum()

    found = HQS(rho).on(deblurred()).solve(ZERO, tol=1e-12, max_steps=20_000, every=50)
    y = found.y.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(smoothed(y), y)
    assert float(gradient.norm()) <= 1e-8
    assert relative(found.y, minimizer) > 1e-3
    nearer = HQS(50 * rho).on(deblurred()).solve(found.y, tol=1e-9, max_steps=3000, every=50)
    assert relative(nearer.y, minimizer) < relative(found.y, minimizer)


def test_the_value_is_what_is_written() -> None:
    y, at = variable(2, 3), drawn(2, 3)
    c = drawn(2, 3, seed=3)
    objective = 2.0 * sum_squares(y - 1.0) + 0.5 * norm1(3.0 * y + 1) + norm2_sum(y) + inner(c, y) + nonnegative(y + 9)
    wanted = 2 * (at - 1).square().sum() + 0.5 * (3 * at + 1).abs().sum() + at.norm(dim=0).sum() + (c * at).sum()
    torch.testing.assert_close(objective.value(at), wanted)
    torch.testing.assert_close(objective.value(torch.stack([at, at])), torch.stack([wanted, wanted]))
    assert math.isinf(float((objective + equal(y, 5.0)).value(at)))
    assert math.isinf(float((sum_squares(y) + box(1 - y, upper=-10.0)).value(at)))
    torch.testing.assert_close((3.0 * (sum_squares(y) + norm1(y))).value(at), 3 * (at.square().sum() + at.abs().sum()))


@pytest.mark.parametrize("algorithm", [ADMM(0.5), PDHG(1.0), LinearizedADMM(0.5), HQS(2.0), ADMM(0.5, order="vyu")])
def test_images_side_by_side_are_each_by_itself_with_a_weight_of_its_own(algorithm: AbstractAlgorithm) -> None:
    shape = (4, 6)
    y, b, w = variable(*shape), drawn(3, *shape), torch.tensor([0.1, 0.3, 0.5], dtype=F64)
    blur = Convolution(torch.full((3, 3), 1 / 9, dtype=F64), shape)

    def on(b: Tensor, w: Any) -> SumOfTerms:
        grad = Gradient(shape) @ y
        found: SumOfTerms = 0.5 * sum_squares(blur @ y - b) + w * norm1(grad) + w * norm2_sum(grad)
        return found

    together = algorithm.on(on(b, w)).run(torch.zeros(3, *shape, dtype=F64), 7)
    for k in range(3):
        alone = algorithm.on(on(b[k], float(w[k]))).run(torch.zeros(*shape, dtype=F64), 7)
        torch.testing.assert_close(together[k], alone, rtol=1e-9, atol=1e-11)


def test_any_proximal_term_is_a_term_alone_and_in_a_batch() -> None:
    b = drawn(3, 4)
    objective = 0.5 * sum_squares(variable(4) - b) + penalty(Simplex(), variable(4))
    found = ADMM(1.0).on(objective).solve(torch.zeros(3, 4, dtype=F64), tol=1e-12).y
    torch.testing.assert_close(found, torch.stack([Simplex().prox(row, 1.0) for row in b]), rtol=0, atol=1e-8)


def test_single_precision_is_kept() -> None:
    b = SEEN.float()
    y = variable(N)
    objective = 0.5 * sum_squares(Convolution(kernel().float(), (N,)) @ y - b) + 0.02 * norm1(D @ y)
    for algorithm in EXACT.values():
        assert algorithm.on(objective).run(b, 2).dtype == torch.float32


# How the minimizer moves

LOG_W = torch.tensor(W, dtype=F64).log()


def of_weight(x: Tensor, algorithm: AbstractAlgorithm = ADMM(0.3)) -> Scheme:
    return algorithm.on(deblurred(x.exp()))


def loss(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (y - TRUTH).square().sum()


@pytest.fixture(scope="module")
def slope() -> float:
    def value(x: Tensor) -> float:
        return float(loss(x, of_weight(x).solve(ZERO, tol=1e-14, max_steps=5000, every=50).y))

    return (value(LOG_W + 1e-4) - value(LOG_W - 1e-4)) / 2e-4


@pytest.mark.parametrize("algorithm", [ADMM(0.3), PDHG(1.0), LinearizedADMM(0.3)])
def test_the_derivative_of_the_fixed_point_is_that_of_the_minimizer(algorithm: AbstractAlgorithm, slope: float) -> None:
    problem = proximal_problem(loss, lambda x: of_weight(x, algorithm))
    state = of_weight(LOG_W, algorithm).solve(ZERO, tol=1e-12, max_steps=6000, every=50).state
    implicit = AID(Anderson(1e-9), GMRES(1e-10, max_steps=400))
    assert float(hypergradient(problem, LOG_W, state, estimator=implicit).grad) == pytest.approx(slope, rel=1e-5)


def test_the_derivative_of_the_steps_is_that_of_the_fixed_point_where_they_have_converged(slope: float) -> None:
    x = LOG_W.clone().requires_grad_()
    (whole,) = torch.autograd.grad(loss(x, of_weight(x).run(ZERO, 300)), x)
    assert float(whole) == pytest.approx(slope, rel=1e-4)


def test_segments_and_the_forms_of_unrolling_have_one_derivative() -> None:
    x, steps = LOG_W.clone().requires_grad_(), 12
    (whole,) = torch.autograd.grad(loss(x, of_weight(x).run(ZERO, steps)), x)
    (again,) = torch.autograd.grad(loss(x, of_weight(x).run(ZERO, steps, segment=4)), x)
    torch.testing.assert_close(again, whole, rtol=1e-12, atol=0)
    start = of_weight(LOG_W).start(ZERO)
    unrolled = proximal_problem(loss, of_weight, steps=steps)
    for estimator in (ITD(OwnSteps()), ITD(OwnSteps(), Checkpointed())):
        torch.testing.assert_close(hypergradient(unrolled, LOG_W, start, estimator=estimator).grad, whole)
    fixed = ITD(FixedPointIteration(steps, tol=None))
    torch.testing.assert_close(
        hypergradient(proximal_problem(loss, of_weight), LOG_W, start, estimator=fixed).grad, whole
    )


def saved_bytes(run: Callable[[], object]) -> int:
    """The most that graphs hold at once."""
    held, most = 0, 0

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal held, most
            self.tensor = tensor
            held += tensor.numel() * tensor.element_size()
            most = max(most, held)

        def __del__(self) -> None:
            nonlocal held
            held -= self.tensor.numel() * self.tensor.element_size()

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda kept: kept.tensor):
        run()
    return most


def test_the_memory_of_the_implicit_derivative_does_not_grow_with_the_steps_and_segments_grow_little() -> None:
    problem, start = proximal_problem(loss, of_weight), of_weight(LOG_W).start(ZERO)

    def implicit(steps: int) -> int:
        estimator = AID(FixedPointIteration(steps, tol=None), GMRES(1e-3, max_steps=20))
        return saved_bytes(lambda: hypergradient(problem, LOG_W, start, estimator=estimator, throw=False))

    def unrolled(steps: int, segment: int = 0) -> int:
        x = LOG_W.clone().requires_grad_()
        return saved_bytes(lambda: torch.autograd.grad(loss(x, of_weight(x).run(ZERO, steps, segment=segment)), x))

    assert implicit(20) == implicit(80) > 0
    assert unrolled(80) > 3 * unrolled(20)
    assert unrolled(80, 9) < 0.5 * unrolled(80)


def test_conjugate_gradients_have_the_derivative_of_the_exact_solution() -> None:
    def value(k: Tensor, closed: bool) -> Tensor:
        blur = Convolution(k, (N,))
        A: AbstractLinearMap = blur if closed else LinearMap(blur.forward, blur.adjoint, (N,), (N,))
        y = variable(N)
        objective = 0.5 * sum_squares(A @ y - SEEN) + W * norm1(D @ y)
        return ADMM(0.3, rtol=1e-12).on(objective).run(ZERO, 5).square().sum()

    found = []
    for closed in (True, False):
        k = kernel().requires_grad_()
        found.append(torch.autograd.grad(value(k, closed), k)[0])
    assert relative(found[1], found[0]) <= 1e-8


def test_images_as_tasks_have_one_hypergradient_together() -> None:
    seen = torch.stack([SEEN, SEEN.flip(0) + 0.1])

    def scheme(x: Tensor, b: Tensor) -> Scheme:
        return ADMM(0.5).on(0.5 * sum_squares(variable(N) - b) + x.exp() * norm1(D @ variable(N)))

    def f(x: Tensor, y: Tensor, b: Tensor) -> Tensor:
        return (y - b.roll(1)).square().sum()

    x, estimator = torch.tensor(-2.0, dtype=F64), AID(Anderson(1e-10, max_steps=3000), GMRES(1e-11, max_steps=300))
    tasks = proximal_problem(f, scheme, tasks=True)
    own = [
        hypergradient(proximal_problem(f, scheme), x, scheme(x, b).start(ZERO), data=b, estimator=estimator).grad
        for b in seen
    ]
    start = scheme(x, SEEN).start(ZERO)
    found = hypergradient(tasks, x, start, data=seen, estimator=estimator).grad
    torch.testing.assert_close(found, (own[0] + own[1]) / 2, rtol=1e-6, atol=1e-9)


def test_a_schedule_is_differentiated_by_steps_and_by_evolution_strategies_alike() -> None:
    def scheme(x: Any) -> Scheme:
        return ADMM(x["rho"].exp(), x["threshold"].exp()).on(deblurred(1.0))

    x = {"rho": torch.full((3,), -1.5, dtype=F64), "threshold": torch.full((3,), -3.0, dtype=F64)}
    problem, start = proximal_problem(loss, scheme, steps=3), scheme(x).start(SEEN)
    exact = hypergradient(problem, x, start, estimator=ITD(OwnSteps())).grad
    around = hypergradient(problem, x, start, estimator=ESJ(OwnSteps(), directions=6)).grad
    for name in x:
        torch.testing.assert_close(around[name], exact[name], rtol=2e-3, atol=1e-5)
    with pytest.raises(ValueError, match="OwnSteps"):
        hypergradient(problem, x, start, estimator=AID(LBFGS(), CG()))


def test_cg_is_refused_for_the_fixed_point_which_has_no_symmetry() -> None:
    problem, start = proximal_problem(loss, of_weight), of_weight(LOG_W).start(ZERO)
    with pytest.raises(ValueError, match="symmetric"):
        hypergradient(problem, LOG_W, start, estimator=AID(Anderson(), CG()))


# The denoiser that contracts


@given(st.integers(0, 1000), st.floats(0.3, 1.0), st.floats(0.01, 30.0))
@settings(max_examples=15, deadline=None)
def test_the_denoiser_contracts_whatever_its_parameters(seed: int, modulus: float, size: float) -> None:
    x = denoiser_start(4, 3, scale=0.1, seed=seed)
    x = {"filters": size * x["filters"], "log_scales": x["log_scales"]}
    a, b = drawn(6, 8, seed=seed), drawn(6, 8, seed=seed + 1)
    assert float((denoised(x, a, modulus) - denoised(x, b, modulus)).norm()) <= modulus * float((a - b).norm()) * (
        1 + 1e-12
    )


def test_a_learned_prior_is_differentiated_as_a_fixed_point_and_the_series_converges_as_the_modulus_says() -> None:
    b = drawn(8, 8)
    x = denoiser_start(3, 3, scale=0.3)
    y = variable(8, 8)
    blur = Convolution(torch.full((3, 3), 1 / 9, dtype=F64), (8, 8))

    def scheme(x: Any) -> Scheme:
        term = prior(lambda v, sigma: denoised(x, v, 0.9), y)
        return ProximalGradient(step=1.0).on(0.5 * sum_squares(blur @ y - b) + term)

    def f(x: Any, y: Tensor) -> Tensor:
        return (y - 1).square().sum()

    problem, start = proximal_problem(f, scheme), scheme(x).start(b)

    def value(t: float) -> float:
        moved = {"filters": x["filters"] + t * direction, "log_scales": x["log_scales"]}
        return float(f(moved, scheme(moved).solve(b, tol=1e-14, max_steps=2000, every=50).y))

    direction = drawn(3, 3, 3, seed=5)
    exact = hypergradient(problem, x, start, estimator=AID(Anderson(1e-12), GMRES(1e-12, max_steps=200))).grad
    along = float((exact["filters"] * direction).sum())
    assert along == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-5)
    wanted = exact["filters"]
    errors = [
        relative(
            hypergradient(problem, x, start, estimator=AID(Anderson(1e-12), Neumann(1.0, terms)), throw=False).grad[
                "filters"
            ],
            wanted,
        )
        for terms in (10, 30, 100)
    ]
    assert errors[2] <= 1e-4
    assert errors[1] <= 0.9**20 * errors[0] * 5 and errors[2] < errors[1] < errors[0]


def test_a_denoiser_has_no_value_and_gets_the_deviation_of_its_noise() -> None:
    asked: list[Any] = []

    def denoise(v: Tensor, sigma: Any) -> Tensor:
        asked.append(sigma)
        return v

    objective = sum_squares(variable(2)) + 0.5 * prior(denoise, variable(2))
    with pytest.raises(ValueError, match="no value"):
        objective.value(torch.zeros(2))
    ADMM(2.0).on(objective).run(torch.ones(2), 1)
    assert asked == [0.5]  # sqrt(w / rho)


# Refusals


def test_what_does_not_fit_is_refused_in_words() -> None:
    y = variable(4)
    with pytest.raises(ValueError, match="takes what B gives"):
        _ = D @ Gradient((N,))
    with pytest.raises(ValueError, match="arrays \\(4,\\)"):
        _ = D @ y
    with pytest.raises(ValueError, match="one variable"):
        _ = sum_squares(y) + sum_squares(variable(5))
    with pytest.raises(ValueError, match=r"`w \* term\(w=...\)` must be at least 0"):
        _ = -1.0 * norm1(y)
    with pytest.raises(ValueError, match="must be 1 with the order"):
        ADMM(order="vyu", relaxation=1.5)
    with pytest.raises(ValueError, match="a schedule"):
        ADMM(torch.ones(2, 2))
    with pytest.raises(ValueError, match="columns"):
        _ = drawn(2, 3) @ variable(4)
    assert (drawn(2, 4) @ y).map.out_shape == (2,)


def test_a_run_that_is_not_finite_or_not_at_its_end_says_so() -> None:
    scheme = ADMM(0.3).on(deblurred())
    assert not scheme.solve(ZERO, tol=1e-12, max_steps=5).status.ok
    assert scheme.solve(ZERO * math.nan, max_steps=5).status.name == "nonfinite"


def test_the_problem_is_one_of_the_library() -> None:
    problem = proximal_problem(loss, of_weight)
    assert isinstance(problem, BilevelProblem) and problem.fixed_point is not None
    direct = AID(Anderson(1e-9), Dense())
    state = of_weight(LOG_W).solve(ZERO, tol=1e-11, max_steps=4000, every=50).state
    assert hypergradient(problem, LOG_W, state, estimator=direct).status.ok
