"""Inner solvers: against closed forms and scipy; statuses, batches, counts, and the residual they return."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from bilevel import AID, BilevelProblem, hypergradient
from bilevel._calculus import Linearization
from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._linear import LinearOperator
from bilevel._numerics.wolfe import CURVATURE, DECREASE, strong_wolfe
from bilevel._result import Solved, Status
from bilevel.solvers.adam import Adam
from bilevel.solvers.armijo import Armijo
from bilevel.solvers.cg import CG
from bilevel.solvers.dense import Dense
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.heavy_ball import HeavyBall
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.nesterov import Nesterov
from bilevel.solvers.newton import Newton
from bilevel.solvers.newton_pcg import NewtonPCG
from bilevel.solvers.scipy_inner import Scipy
from bilevel.solvers.torch_optim import TorchOptim

Make = Callable[[float, int], AbstractInnerSolver]
SOLVERS: dict[str, Make] = {
    "gradient-descent": lambda tol, n: Iterate(GradientDescent(), n, tol),
    "armijo": lambda tol, n: Iterate(GradientDescent(), n, tol, line_search=Armijo()),
    "heavy-ball": lambda tol, n: Iterate(HeavyBall(), n, tol),
    "nesterov": lambda tol, n: Iterate(Nesterov(momentum=0.8), n, tol),
    "adam": lambda tol, n: Iterate(Adam(0.02), n, tol),
    "torch-sgd": lambda tol, n: Iterate(TorchOptim(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5)), n, tol),
    "lbfgs": lambda tol, n: LBFGS(tol, n),
    "newton": lambda tol, n: Newton(tol, n),
    "newton-dense": lambda tol, n: Newton(tol, n, linear=Dense()),
    "newton-pcg": lambda tol, n: NewtonPCG(tol, n),
    "scipy": lambda tol, n: Scipy(tol=tol, max_steps=n),
}
SECOND_ORDER = ("lbfgs", "newton", "newton-dense", "newton-pcg", "scipy")
EXACT = (SOLVERS["newton-dense"], SOLVERS["newton-pcg"])  # in two steps, on quadratics of three variables
every = pytest.mark.parametrize("make", SOLVERS.values(), ids=SOLVERS)


def tensor(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64)


def quadratic(spectrum: Tensor, seed: int = 0, offset: float = 0.0) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """(y - y*)' H (y - y*) / 2 + offset with the given eigenvalues of H, and y*."""
    generator = torch.Generator().manual_seed(seed)
    n = spectrum.numel()
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    H = (Q * spectrum) @ Q.T
    solution = torch.randn(n, generator=generator, dtype=torch.float64)

    def function(y: Tensor) -> Tensor:
        d = y - solution.to(y)
        value: Tensor = 0.5 * (d * (d @ H.to(y))).sum(-1) + offset
        return value

    return function, solution


def rosenbrock(y: Tensor) -> Tensor:
    value: Tensor = (100 * (y[..., 1:] - y[..., :-1].square()).square() + (1 - y[..., :-1]).square()).sum(-1)
    return value


def gradient_norm(function: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(Objective(function).gradient(y), dim=-1)
    return norm


# The contract


@every
@settings(max_examples=8)
@given(
    kappa=st.sampled_from([1.0, 3.0, 10.0]),
    n=st.integers(1, 6),
    seed=st.integers(0, 100),
    offset=st.sampled_from([0.0, 10.0]),
)
def test_quadratics_are_minimized_to_the_tolerance(make: Make, kappa: float, n: int, seed: int, offset: float) -> None:
    if make in (SOLVERS["adam"], SOLVERS["torch-sgd"]):
        n = min(n, 2)
    function, solution = quadratic(torch.linspace(1.0, kappa, n, dtype=torch.float64), seed, offset)
    y0 = torch.zeros(n, dtype=torch.float64)
    solved = make(1e-7, 3000).solve(Objective(function), y0)
    assert solved.statuses == (Status.successful,)
    assert float(torch.linalg.vector_norm(solved.value - solution)) <= 1e-7  # mu = 1
    assert float(solved.residual) <= 1e-7
    assert not y0.any()


@every
@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_the_residual_is_that_of_the_returned_point(make: Make, steps: int) -> None:
    function, _ = quadratic(tensor(1.0, 4.0, 9.0), 1)
    y0 = tensor(5.0, -3.0, 2.0)
    solved = make(0.0, steps).solve(Objective(function), y0)
    torch.testing.assert_close(solved.residual, gradient_norm(function, solved.value), rtol=1e-9, atol=1e-14)
    assert solved.residual.shape == ()
    assert solved.steps <= steps
    assert torch.equal(y0, tensor(5.0, -3.0, 2.0))
    assert solved.value.data_ptr() != y0.data_ptr()


@every
def test_no_steps_return_the_start(make: Make) -> None:
    function, _ = quadratic(tensor(1.0, 4.0), 1)
    y0 = tensor(5.0, -3.0)
    for tol, status in ((1e-6, Status.max_steps), (0.0, Status.successful)):
        solved = make(tol, 0).solve(Objective(function), y0)
        assert torch.equal(solved.value, y0)
        assert solved.statuses == (status,)
        assert solved.steps == 0


@every
def test_a_stationary_start_is_returned_at_once(make: Make) -> None:
    solution = tensor(1.0, -2.0)
    objective = Objective(lambda y: (y - solution).square().sum(-1))
    solved = make(1e-8, 50).solve(objective, solution)
    assert torch.equal(solved.value, solution)
    assert solved.statuses == (Status.successful,)
    assert float(solved.residual) == 0.0
    assert solved.steps == 0


@every
def test_steps_that_run_out_fail_only_a_tolerance(make: Make) -> None:
    spectrum = tensor(1.0, 10.0, 100.0)
    function = (lambda y: rosenbrock(y)) if make in EXACT else quadratic(spectrum)[0]
    if make is SOLVERS["torch-sgd"]:
        function = quadratic(tensor(1.0, 3.0, 10.0))[0]
    y0 = tensor(5.0, -3.0, 2.0)
    assert make(1e-12, 2).solve(Objective(function), y0).statuses == (Status.max_steps,)
    assert make(0.0, 2).solve(Objective(function), y0).statuses == (Status.successful,)


@every
def test_single_precision_stays_single_and_converges(make: Make) -> None:
    function, solution = quadratic(tensor(1.0, 3.0, 9.0), 2)
    solved = make(1e-4, 3000).solve(Objective(function), torch.zeros(3, dtype=torch.float32))
    assert solved.value.dtype == solved.residual.dtype == torch.float32
    assert solved.status is Status.successful
    torch.testing.assert_close(solved.value.double(), solution, rtol=0, atol=1e-4)


@every
def test_a_nan_objective_is_a_status(make: Make) -> None:
    solved = make(1e-6, 20).solve(Objective(lambda y: (y * float("nan")).sum(-1)), torch.ones(2, dtype=torch.float64))
    assert solved.statuses == (Status.nonfinite,)
    assert torch.isnan(solved.residual)


@every
@pytest.mark.parametrize("lead", [(3,), (2, 2), (1,)])
def test_a_batch_is_its_rows(make: Make, lead: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    curvature = 1 + 8 * torch.rand(*lead, 4, generator=generator, dtype=torch.float64)
    solution = torch.randn(*lead, 4, generator=generator, dtype=torch.float64)
    y0 = torch.randn(*lead, 4, generator=generator, dtype=torch.float64)

    def function(y: Tensor) -> Tensor:
        d = y - solution
        return (0.5 * curvature * d.square() + 0.05 * d.pow(4)).sum(-1)

    solved = make(1e-8, 3000).solve(Objective(function), y0)
    assert solved.value.shape == y0.shape
    assert solved.residual.shape == lead
    assert solved.statuses == (Status.successful,) * math.prod(lead)
    torch.testing.assert_close(solved.value, solution, rtol=0, atol=1e-8)
    torch.testing.assert_close(solved.residual, gradient_norm(function, solved.value), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "scipy"])
def test_each_row_takes_the_steps_it_takes_alone(name: str) -> None:
    """Scipy minimizes rows jointly."""
    make = SOLVERS[name]
    spectrum = torch.tensor([[1.0, 2.0, 3.0], [1.0, 5.0, 18.0], [0.5, 0.6, 0.7]], dtype=torch.float64)
    y0 = torch.tensor([[1.0, 1.0, 1.0], [3.0, -2.0, 1.0], [10.0, 0.1, -5.0]], dtype=torch.float64)

    def of(spectrum: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda y: (spectrum * y.square() / 2 + 0.01 * y.pow(4)).sum(-1)

    together = make(1e-6, 3000).solve(Objective(of(spectrum)), y0)
    alone = [make(1e-6, 3000).solve(Objective(of(spectrum[r])), y0[r]) for r in range(3)]
    assert together.steps == max(solved.steps for solved in alone)
    for row, solved in zip(together.value, alone, strict=True):
        torch.testing.assert_close(row, solved.value, rtol=1e-7, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "scipy"])
def test_a_bad_row_spoils_no_other(name: str) -> None:
    """Scipy, which minimizes the sum, is the exception."""
    weight = torch.tensor([1.0, float("nan"), 2.0], dtype=torch.float64)
    y0 = torch.tensor([[1.0, 2.0], [1.0, 2.0], [-3.0, 1.0]], dtype=torch.float64)
    objective = Objective(lambda y: weight * ((y - 1).square().sum(-1) + 0.1 * (y - 1).pow(4).sum(-1)))
    solved = SOLVERS[name](1e-7, 3000).solve(objective, y0)
    assert solved.statuses == (Status.successful, Status.nonfinite, Status.successful)
    torch.testing.assert_close(solved.value[[0, 2]], torch.ones(2, 2, dtype=torch.float64), rtol=0, atol=1e-7)
    assert solved.steps < 3000


@every
@pytest.mark.parametrize("max_steps", [3, 3000])
def test_the_last_gradient_is_asked_for_at_most_once_and_at_the_returned_point(make: Make, max_steps: int) -> None:
    function, _ = quadratic(tensor(1.0, 4.0, 9.0), 1)
    asked: list[Tensor] = []

    def linearize(y: Tensor) -> Linearization:
        asked.append(y)
        gradient = Objective(function).gradient(y)
        operator = LinearOperator(lambda v: v, 3, positive_definite=True)
        return Linearization(y, gradient, operator.mv, lambda v: (v, None))

    solved = make(1e-7, max_steps).solve(Objective(function, linearize=linearize), tensor(5.0, -3.0, 2.0))
    runs = 2 if make is SOLVERS["heavy-ball"] and max_steps > 3 else 1  # its step was too long, and is derived again
    assert len(asked) <= runs
    assert all(y.data_ptr() == solved.value.data_ptr() for y in asked[runs - 1 :])
    if make in [SOLVERS[name] for name in ("gradient-descent", "heavy-ball", "nesterov", "adam", "torch-sgd", "scipy")]:
        assert len(asked) == runs


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_serves_an_implicit_estimator(name: str) -> None:
    problem = BilevelProblem(
        lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (y - x).square().sum() + (y - x).pow(4).sum()
    )
    x = tensor(1.0, -1.0)
    aid = AID(inner=SOLVERS[name](1e-10, 5000), linear=CG(rtol=1e-10))
    estimate = hypergradient(problem, x, torch.zeros_like(x), estimator=aid)
    torch.testing.assert_close(estimate.grad, x - 3, rtol=0, atol=1e-8)


# Curved objectives


@pytest.mark.parametrize("name", SECOND_ORDER)
@pytest.mark.parametrize("n", [2, 10])
def test_rosenbrock_is_minimized_to_a_tight_tolerance(name: str, n: int) -> None:
    objective = Objective(rosenbrock)
    solved = SOLVERS[name](1e-9, 500).solve(objective, torch.full((n,), -0.5, dtype=torch.float64))
    assert solved.status is Status.successful
    torch.testing.assert_close(solved.value, torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-8)
    assert objective.tally.gradients < 200


def logistic() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Logistic regression with a ridge, and its minimizer by scipy's exact trust region."""
    optimize = pytest.importorskip("scipy.optimize")
    generator = torch.Generator().manual_seed(5)
    A = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    b = torch.sign(torch.randn(60, generator=generator, dtype=torch.float64))

    def function(y: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-b * (y @ A.T)).mean(-1) + 0.05 * y.square().sum(-1)

    objective = Objective(function)
    found = optimize.minimize(
        lambda y: tuple(part.numpy() for part in objective.value_and_gradient(torch.from_numpy(y))),
        torch.zeros(5, dtype=torch.float64).numpy(),
        jac=True,
        hess=lambda y: objective.hessian(torch.from_numpy(y))[2].dense(torch.from_numpy(y)).numpy(),
        method="trust-exact",
        options={"gtol": 1e-13},
    )
    return function, torch.from_numpy(found.x)


@every
def test_logistic_regression_agrees_with_a_reference(make: Make) -> None:
    function, expected = logistic()
    solved = make(1e-9, 6000).solve(Objective(function), torch.zeros(5, dtype=torch.float64))
    assert solved.status is Status.successful
    torch.testing.assert_close(solved.value, expected, rtol=0, atol=2e-8)


@pytest.mark.parametrize("name", ["lbfgs", "newton", "armijo"])
@pytest.mark.parametrize("offset", [0.0, 1.0, 1e3])
def test_tolerances_far_below_the_root_of_rounding_are_reached(name: str, offset: float) -> None:
    """The values cannot tell points apart whose gradients differ a thousandfold: slopes must decide."""
    function, solution = quadratic(torch.logspace(-1, 1, 12, dtype=torch.float64), 4, offset)
    solved = SOLVERS[name](1e-11, 5000).solve(Objective(function), torch.zeros(12, dtype=torch.float64))
    assert solved.status is Status.successful
    torch.testing.assert_close(solved.value, solution, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["lbfgs", "newton", "armijo"])
def test_the_rounding_floor_is_stagnation_and_success_without_a_tolerance(name: str) -> None:
    solution = torch.linspace(1.0, 2.0, 5, dtype=torch.float64).sqrt() * math.pi

    def function(y: Tensor) -> Tensor:  # a gradient whose own rounding is 1e-13
        return (torch.cosh(y - solution) + 100 * (y - solution).sin().square()).sum(-1) + 3.0

    y0 = solution + 0.1
    solved = SOLVERS[name](1e-300, 5000).solve(Objective(lambda y: function(y) + 1e-3 * y.sum(-1)), y0)
    assert solved.status is Status.stagnated
    assert float(solved.residual) < 1e-11
    assert solved.steps < 1000
    without = SOLVERS[name](0.0, 5000).solve(Objective(lambda y: function(y) + 1e-3 * y.sum(-1)), y0)
    assert without.status is Status.successful


@pytest.mark.parametrize("name", ["lbfgs", "armijo", "newton"])
def test_a_wrong_gradient_is_a_failed_line_search(name: str) -> None:
    class Flipped(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: object, *grads: Tensor) -> Tensor:
            return -grads[0]

    def function(y: Tensor) -> Tensor:
        flipped: Tensor = Flipped.apply(y)  # type: ignore[no-untyped-call]
        return (flipped - 1).square().sum(-1)

    solved = SOLVERS[name](1e-8, 50).solve(Objective(function), tensor(3.0, 4.0))
    assert solved.status is Status.line_search_failed
    assert torch.equal(solved.value, tensor(3.0, 4.0))


# Iterate


@pytest.mark.parametrize("tol", [None, 1e-6])
@pytest.mark.parametrize("optimizer", [GradientDescent(0.21), HeavyBall(0.4, momentum=0.5)], ids=str)
def test_too_large_a_step_is_reported_as_divergence(optimizer: GradientDescent | HeavyBall, tol: float | None) -> None:
    function, _ = quadratic(tensor(1.0, 12.0), 0)
    solved = Iterate(optimizer, max_steps=100, tol=tol).solve(Objective(function), torch.zeros(2, dtype=torch.float64))
    assert solved.status is Status.diverged
    enough = Iterate(optimizer, max_steps=8000).solve(Objective(function), torch.zeros(2, dtype=torch.float64))
    assert enough.status is Status.nonfinite


def test_divergence_is_reported_row_by_row_and_from_a_start_at_the_minimum() -> None:
    curvature = torch.tensor([[1.0], [30.0], [5.0]], dtype=torch.float64)
    objective = Objective(lambda y: (curvature * y.square()).sum(-1) / 2)
    y0 = torch.full((3, 1), 1e-12, dtype=torch.float64)
    solved = Iterate(GradientDescent(0.1), max_steps=20).solve(objective, y0)
    assert solved.statuses == (Status.successful, Status.diverged, Status.successful)


def test_a_cycle_around_the_minimum_is_divergence() -> None:
    """g has curvature 1 at most, so a step of 2.5 leaves a neighbourhood of the minimum for a cycle of two points."""
    objective = Objective(lambda y: y.cosh().log().sum(-1))
    solved = Iterate(GradientDescent(2.5), max_steps=200).solve(objective, tensor(1e-3))
    assert solved.status is Status.diverged
    assert float(solved.residual) < 1


def test_a_gradient_that_grows_on_the_way_down_is_not_divergence() -> None:
    objective = Objective(lambda y: y.cos().sum(-1))
    solved = Iterate(GradientDescent(0.5), max_steps=14).solve(objective, tensor(1e-3))
    assert float(solved.residual) > 10 * 1e-3
    assert solved.status is Status.successful


def test_a_row_that_met_the_tolerance_stands_still() -> None:
    y0 = torch.tensor([[1e-9, 0.0], [1.0, 1.0]], dtype=torch.float64)
    objective = Objective(lambda y: y.square().sum(-1) / 2)
    solved = Iterate(GradientDescent(0.5), max_steps=100, tol=1e-6).solve(objective, y0)
    assert torch.equal(solved.value[0], y0[0])
    assert solved.statuses == (Status.successful,) * 2
    assert objective.tally.inner_steps == solved.steps == 21
    assert objective.tally.gradients == 2 * (21 + 2)  # all rows, at each step, at the last check and at the end


@pytest.mark.parametrize("optimizer", [GradientDescent(0.1), HeavyBall(0.1), Nesterov(0.1), Adam(0.1)], ids=str)
def test_solve_takes_exactly_the_steps_of_the_unrolled_iteration(
    optimizer: GradientDescent | HeavyBall | Nesterov | Adam,
) -> None:
    function, _ = quadratic(tensor(1.0, 4.0, 9.0), 1)
    inner, y0, objective = Iterate(optimizer, max_steps=6), tensor(5.0, -3.0, 2.0), Objective(function)
    state = inner.begin(y0)
    for k in range(6):
        state = inner.advance(objective, objective.gradient(state[0]), state, k)
    counted = Objective(function)
    assert torch.equal(inner.solve(counted, y0).value, state[0])
    assert counted.tally.gradients == 7
    assert counted.tally.inner_steps == 6


def test_a_line_search_cannot_be_unrolled_and_is_for_gradient_descent() -> None:
    with pytest.raises(ValueError, match="cannot differentiate through a line search"):
        Iterate(GradientDescent(), 5, line_search=Armijo()).begin(torch.zeros(2))
    with pytest.raises(ValueError, match="applies to `GradientDescent` only"):
        Iterate(Adam(0.1), 5, line_search=Armijo())


# Armijo


@given(st.floats(-3, 3), st.floats(0.2, 0.8), st.floats(1e-4, 0.4))
def test_the_first_step_that_decreases_enough_is_taken(log_curvature: float, shrink: float, slope: float) -> None:
    """For L y^2 / 2 from y = 1 the condition on t is t L <= 2 (1 - slope)."""
    L = 10.0**log_curvature
    rule = Armijo(initial=1.0, shrink=shrink, slope=slope, max_halvings=200)
    solver = Iterate(GradientDescent(), max_steps=1, line_search=rule)
    solved = solver.solve(Objective(lambda y: L * y.square().sum(-1) / 2), tensor(1.0))
    t = float((1 - solved.value) / L)
    assert t * L <= 2 * (1 - slope) * (1 + 1e-9)
    power = math.log(t) / math.log(shrink)
    assert abs(power - round(power)) < 1e-6
    if t < 0.999:
        assert t / shrink * L > 2 * (1 - slope) * (1 - 1e-9)


def test_the_next_search_starts_from_the_last_step_doubled() -> None:
    tried: list[float] = []

    def function(y: Tensor) -> Tensor:
        if not y.requires_grad:
            tried.append(float(y))
        return y.sum() * 1.0

    Iterate(GradientDescent(), max_steps=4, line_search=Armijo(initial=0.5)).solve(Objective(function), tensor(0.0))
    assert tried == [-0.5, -1.5, -3.5, -7.5]


def test_each_row_has_its_own_step_length() -> None:
    curvature = torch.tensor([[1.0], [1e3], [1e6]], dtype=torch.float64)
    objective = Objective(lambda y: (curvature * y.square()).sum(-1) / 2)
    solver = Iterate(GradientDescent(), max_steps=200, tol=1e-8, line_search=Armijo(slope=0.3))
    solved = solver.solve(objective, torch.ones(3, 1, dtype=torch.float64))
    assert solved.statuses == (Status.successful,) * 3


def test_a_given_step_scales_the_search() -> None:
    once = Iterate(GradientDescent(0.125), max_steps=1, line_search=Armijo())
    solved = once.solve(Objective(lambda y: y.square().sum(-1) / 2), tensor(1.0))
    assert float(solved.value) == 0.875


def test_a_search_that_is_cut_short_says_so() -> None:
    rule = Armijo(max_halvings=3)
    solver = Iterate(GradientDescent(), max_steps=10, tol=1e-6, line_search=rule)
    solved = solver.solve(Objective(lambda y: 1e4 * y.square().sum(-1)), tensor(1.0))
    assert solved.status is Status.line_search_failed
    assert float(solved.value) == 1.0


def test_a_search_that_fails_below_rounding_is_stagnation() -> None:
    """At 1e6 + 1.5 y^2 the values do not change, and by its slope t = 1 is too long."""
    rule = Armijo(max_halvings=0)
    solver = Iterate(GradientDescent(), max_steps=10, tol=1e-9, line_search=rule)
    solved = solver.solve(Objective(lambda y: 1e6 + 1.5 * y.square().sum(-1)), tensor(1e-7))
    assert solved.status is Status.stagnated
    assert float(solved.value) == 1e-7


# L-BFGS


def search(phi: Callable[[float], tuple[float, float]], t: float, noise: float = 0.0) -> tuple[float, Status, int]:
    value, slope = phi(0.0)
    trial = strong_wolfe(value, slope, t, noise)
    t = next(trial)
    for count in range(1, 100):
        try:
            t, last = trial.send(phi(t)), t
        except StopIteration as stop:
            return t, stop.value, count
        assert last > 0
    raise AssertionError("the search does not end")


LINES: dict[str, Callable[[float], tuple[float, float]]] = {
    "quadratic": lambda t: ((t - 3) ** 2, 2 * (t - 3)),
    "far": lambda t: ((t - 1e5) ** 2, 2 * (t - 1e5)),
    "near": lambda t: ((t - 1e-5) ** 2, 2 * (t - 1e-5)),
    "sine": lambda t: (-math.sin(5 * t) + 0.1 * t, -5 * math.cos(5 * t) + 0.1),
    "barrier": lambda t: (-math.log(1 - t) - 2 * t, 1 / (1 - t) - 2) if t < 1 else (float("nan"), float("nan")),
    "quartic": lambda t: (t**4 / 4 - t**3 - t, t**3 - 3 * t**2 - 1),
    "rational": lambda t: (-t / (t * t + 2), (t * t - 2) / (t * t + 2) ** 2),
}


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("t", [1e-3, 0.1, 1.0, 10.0, 1e3])
def test_the_line_search_ends_at_a_strong_wolfe_point(line: str, t: float) -> None:
    phi = LINES[line]
    (value0, slope0), (t, status, count) = phi(0.0), search(phi, t)
    value, slope = phi(t)
    assert status is Status.successful
    assert value <= value0 + DECREASE * t * slope0
    assert abs(slope) <= CURVATURE * abs(slope0)
    assert count <= 20


def test_the_line_search_tells_how_it_failed() -> None:
    assert search(lambda t: (-t, -1.0), 1.0)[1] is Status.diverged
    assert search(lambda t: (t, -1.0), 1.0)[1] is Status.line_search_failed
    assert search(lambda t: (float("nan") if t else 0.0, -1.0), 1.0)[1] is Status.nonfinite


@pytest.mark.parametrize("jitter", [3e-15, -3e-15])
def test_below_the_noise_of_values_the_line_search_goes_by_slopes(jitter: float) -> None:
    def phi(t: float) -> tuple[float, float]:
        return 1.0 + (jitter if t else 0.0) * math.cos(t), 1e-16 * (t - 3)

    for first in (1e-2, 1.0, 50.0, 100.0):
        t, status, count = search(phi, first, noise=1e-14)
        assert status is Status.successful
        assert abs(t - 3) <= CURVATURE * 3
        assert count <= 4


def test_the_line_search_takes_the_best_point_of_a_kink() -> None:
    t, status, _ = search(lambda t: (abs(t - 1), math.copysign(1.0, t - 1)), 0.3)
    assert status is Status.successful
    assert t == pytest.approx(1.0, abs=1e-3)


def test_lbfgs_with_full_memory_needs_few_steps_on_a_quadratic() -> None:
    function, _ = quadratic(torch.linspace(1.0, 100.0, 8, dtype=torch.float64), 7)
    y0 = torch.zeros(8, dtype=torch.float64)
    full = LBFGS(tol=1e-9, memory=20).solve(Objective(function), y0)
    assert full.status is Status.successful
    assert full.steps <= 30
    assert LBFGS(tol=1e-9, memory=1).solve(Objective(function), y0).steps > full.steps


def test_lbfgs_takes_about_as_many_gradients_as_scipy() -> None:
    for function, n in ((rosenbrock, 20), (quadratic(torch.logspace(-1, 2, 20, dtype=torch.float64), 3)[0], 20)):
        y0, ours, theirs = torch.full((n,), -0.5, dtype=torch.float64), Objective(function), Objective(function)
        assert LBFGS(tol=1e-7).solve(ours, y0).status is Status.successful
        assert Scipy(tol=1e-7).solve(theirs, y0).status is Status.successful
        assert ours.tally.gradients <= 1.25 * theirs.tally.gradients


def test_rows_of_lbfgs_do_not_wait_for_one_another() -> None:
    """Each row needs another number of trials at each step, and takes those that it takes alone."""
    y0 = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = LBFGS(tol=1e-9).solve(Objective(rosenbrock), y0)
    objectives = [Objective(rosenbrock) for _ in y0]
    alone = [LBFGS(tol=1e-9).solve(o, row) for o, row in zip(objectives, y0, strict=True)]
    batch = Objective(rosenbrock)
    for row, solved in zip(LBFGS(tol=0.0, max_steps=15).solve(batch, y0).value, y0, strict=True):
        expected = LBFGS(tol=0.0, max_steps=15).solve(Objective(rosenbrock), solved).value
        torch.testing.assert_close(row, expected, rtol=1e-6, atol=1e-6)
    assert together.statuses == (Status.successful,) * 5
    assert abs(together.steps - max(solved.steps for solved in alone)) <= 1
    assert len({objective.tally.gradients - objective.tally.inner_steps for objective in objectives}) > 1


def test_lbfgs_reaches_the_floor_of_gradients_under_noisy_values() -> None:
    """The sum of 200 squares far from zero jitters by some 1e-12, a step at the end changes it by 1e-21."""
    generator = torch.Generator().manual_seed(9)
    A = torch.randn(200, 10, generator=generator, dtype=torch.float64)
    b = 10 * torch.randn(200, generator=generator, dtype=torch.float64)
    for seed in range(5):
        y0 = torch.randn(10, generator=generator, dtype=torch.float64) + seed
        solved = LBFGS(tol=2e-10).solve(Objective(lambda y: (A @ y - b).square().sum(-1) / 2), y0)
        assert solved.status is Status.successful
        torch.testing.assert_close(solved.value, torch.linalg.lstsq(A, b).solution, rtol=0, atol=1e-11)


def test_lbfgs_spends_no_gradient_on_its_residual() -> None:
    points: list[Tensor] = []

    def function(y: Tensor) -> Tensor:
        points.append(y.detach().clone())
        return rosenbrock(y)

    objective = Objective(function)
    LBFGS(tol=1e-6).solve(objective, torch.zeros(3, dtype=torch.float64))
    assert objective.tally.gradients == len(points)
    assert len({tuple(point.tolist()) for point in points}) == len(points)


@pytest.mark.parametrize("power", [1, 2, 4])
def test_an_unbounded_objective_is_reported(power: int) -> None:
    function = (lambda y: -y.sum(-1)) if power == 1 else lambda y: -y.pow(power).sum(-1)
    solved = LBFGS(tol=1e-8).solve(Objective(function), torch.full((3,), 0.7, dtype=torch.float64))
    assert solved.status in (Status.diverged, Status.nonfinite)
    assert solved.value.isfinite().all()


def test_lbfgs_stays_inside_the_domain_of_a_barrier() -> None:
    solved = LBFGS(tol=1e-10).solve(Objective(lambda y: (y - y.log()).sum(-1)), tensor(0.01, 0.9, 30.0))
    assert solved.status is Status.successful
    torch.testing.assert_close(solved.value, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-9)


def test_curvature_that_is_not_positive_is_not_remembered() -> None:
    solved = LBFGS(tol=1e-9).solve(Objective(lambda y: (y.square() - 1).square().sum(-1)), tensor(0.05, -0.01, 0.3))
    assert solved.status is Status.successful
    torch.testing.assert_close(solved.value.abs(), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-8)


# Newton


def test_newton_takes_one_step_on_a_quadratic() -> None:
    function, solution = quadratic(torch.logspace(-3, 3, 10, dtype=torch.float64), 6)
    for linear in (Dense(), CG(rtol=1e-12, max_steps=1000)):
        solved = Newton(tol=1e-7, linear=linear).solve(Objective(function), torch.zeros(10, dtype=torch.float64))
        assert solved.steps == 1
        assert solved.status is Status.successful
        torch.testing.assert_close(solved.value, solution, rtol=0, atol=1e-6)


def test_newton_converges_faster_than_linearly() -> None:
    norms = []
    for steps in range(12):
        function = lambda y: (y.exp() - 2 * y).sum(-1) + 0.5 * (y.square().sum(-1)) ** 2  # noqa: E731
        norms.append(float(Newton(0.0, steps).solve(Objective(function), tensor(1.0, -1.0, 2.0)).residual))
    below = [k for k in range(1, 12) if 1e-11 < norms[k] < 1e-2]
    assert below
    for k in below:
        assert norms[k] <= 5 * norms[k - 1] ** 1.5


@pytest.mark.parametrize("linear", [None, CG(rtol=1e-6)])
def test_newton_descends_along_negative_curvature(linear: CG | None) -> None:
    start = torch.tensor([[0.05, -0.01, 0.3], [0.4, 0.3, -0.2]], dtype=torch.float64)
    objective = Objective(lambda y: (y.square() - 1).square().sum(-1))
    solved = Newton(tol=1e-9, linear=linear).solve(objective, start)
    assert solved.statuses == (Status.successful,) * 2
    torch.testing.assert_close(solved.value, start.sign(), rtol=0, atol=1e-8)


def test_newton_converges_from_where_full_steps_diverge() -> None:
    """On sqrt(1 + y^2) a full step takes y to -y^3."""
    y0 = torch.tensor([[5.0], [-0.5]], dtype=torch.float64)
    solved = Newton(tol=1e-9).solve(Objective(lambda y: (1 + y.square()).sqrt().sum(-1)), y0)
    assert solved.statuses == (Status.successful,) * 2
    torch.testing.assert_close(solved.value, torch.zeros_like(y0), rtol=0, atol=2e-9)


def test_newton_counts_its_products_and_gradients() -> None:
    function, _ = quadratic(torch.linspace(1.0, 3.0, 4, dtype=torch.float64), 6)
    objective = Objective(function)
    solved = Newton(tol=1e-7, linear=Dense()).solve(objective, torch.zeros(4, dtype=torch.float64))
    assert objective.tally.gradients == 2
    assert objective.tally.values == 1
    assert 4 <= objective.tally.hvps <= 5
    assert objective.tally.inner_steps == solved.steps == 1


# scipy


@pytest.mark.parametrize("method", ["L-BFGS-B", "BFGS", "CG", "SLSQP", "TNC", "trust-constr"])
def test_every_method_of_scipy_minimizes(method: str) -> None:
    function, solution = quadratic(tensor(1.0, 2.0, 5.0), 8)
    solved = Scipy(method, tol=1e-5).solve(Objective(function), torch.zeros(3, dtype=torch.float64))
    assert solved.status is Status.successful
    torch.testing.assert_close(solved.value, solution, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["L-BFGS-B", "SLSQP", "TNC"])
@pytest.mark.parametrize("batch", [False, True])
def test_bounds_are_kept_and_the_residual_is_projected(method: str, batch: bool) -> None:
    upper = tensor(2.0, 2.5, math.inf)
    y0 = torch.zeros(2, 3, dtype=torch.float64) if batch else torch.zeros(3, dtype=torch.float64)
    solver = Scipy(method, bounds=(-1.0, upper), tol=1e-6)
    solved = solver.solve(Objective(lambda y: (y - tensor(3.0, -3.0, 4.0)).square().sum(-1)), y0)
    assert solved.statuses == (Status.successful,) * (2 if batch else 1)
    torch.testing.assert_close(solved.value, tensor(2.0, -1.0, 4.0).expand_as(y0), rtol=0, atol=1e-6)
    assert float(solved.residual.max()) <= 1e-6


def test_scipy_minimizes_rows_as_their_sum() -> None:
    """So many that the decrease of their mean along the gradient of the sum would be no sufficient one."""
    curvature = torch.linspace(1.0, 9.0, 20_000, dtype=torch.float64)
    objective = Objective(lambda y: curvature * (y - 1).square().sum(-1) / 2)
    solved = Scipy(tol=1e-6).solve(objective, torch.zeros(20_000, 1, dtype=torch.float64))
    assert set(solved.statuses) == {Status.successful}
    torch.testing.assert_close(solved.value, torch.ones(20_000, 1, dtype=torch.float64), rtol=0, atol=1e-6)
    assert objective.tally.gradients % 20_000 == 0


@pytest.mark.parametrize("method", ["L-BFGS-B", "BFGS", "CG", "SLSQP", "TNC", "trust-constr"])
def test_a_step_budget_of_scipy_that_is_used_up_is_told_from_stagnation(method: str) -> None:
    function, _ = logistic()
    for max_steps in (1, 2):
        solved = Scipy(method, tol=1e-9, max_steps=max_steps).solve(
            Objective(function), torch.zeros(5, dtype=torch.float64)
        )
        assert solved.status is Status.max_steps


def test_a_missed_tolerance_of_scipy_is_not_success() -> None:
    function, _ = logistic()
    solved = Scipy(tol=1e-300).solve(Objective(function), torch.zeros(5, dtype=torch.float64))
    assert solved.status in (Status.stagnated, Status.line_search_failed)


def test_one_sided_bounds_and_a_start_outside() -> None:
    solved = Scipy(bounds=(1.0, None)).solve(Objective(lambda y: y.square().sum(-1)), tensor(-5.0, 4.0))
    assert torch.equal(solved.value, tensor(1.0, 1.0))
    untouched = Scipy(bounds=(1.0, None), max_steps=0).solve(Objective(lambda y: y.square().sum(-1)), tensor(-5.0, 4.0))
    assert torch.equal(untouched.value, tensor(1.0, 4.0))


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r'pip install "bilevel\[scipy\]"'):
        Scipy().solve(Objective(lambda y: y.square().sum()), tensor(1.0))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Iterate(GradientDescent(), -1), r"Iterate\(max_steps=...\)"),
        (lambda: Iterate(GradientDescent(), 1, tol=-1.0), r"Iterate\(tol=...\)"),
        (lambda: Armijo(initial=0.0), r"Armijo\(initial=...\)"),
        (lambda: Armijo(shrink=1.0), r"Armijo\(shrink=...\)"),
        (lambda: Armijo(slope=0.5), r"Armijo\(slope=...\)"),
        (lambda: Armijo(max_halvings=-1), r"Armijo\(max_halvings=...\)"),
        (lambda: LBFGS(tol=-1.0), r"LBFGS\(tol=...\)"),
        (lambda: LBFGS(tol=math.nan), r"LBFGS\(tol=...\)"),
        (lambda: LBFGS(max_steps=-1), r"LBFGS\(max_steps=...\)"),
        (lambda: LBFGS(memory=0), r"LBFGS\(memory=...\)"),
        (lambda: Newton(tol=-1.0), r"Newton\(tol=...\)"),
        (lambda: Newton(max_steps=-1), r"Newton\(max_steps=...\)"),
        (lambda: Scipy("Powell"), r"Scipy\(method=...\)"),
        (lambda: Scipy("BFGS", bounds=(0.0, 1.0)), r"Scipy\(bounds=...\)"),
        (lambda: Scipy(bounds=(1.0, 0.0)), r"Scipy\(bounds=\(lower, upper\)\)"),
        (lambda: Scipy(tol=-1.0), r"Scipy\(tol=...\)"),
        (lambda: Scipy(max_steps=-1), r"Scipy\(max_steps=...\)"),
        (
            lambda: Scipy(bounds=(tensor(1.0, 2.0), None)).solve(Objective(lambda y: y.sum()), tensor(1.0)),
            r"Scipy\(bounds=...\)` must be numbers or flat tensors of 1",
        ),
    ],
)
def test_wrong_settings_are_refused_by_name(make: Callable[[], Solved | AbstractInnerSolver], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
