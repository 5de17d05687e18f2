"""First-order optimizers: against their recursions and torch's own loops; purity; derivatives of their steps."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import AID, BilevelProblem, Box, minimize
from bilevel._inner import Objective
from bilevel._optimizer import AbstractOptimizer, OptimizerState
from bilevel._result import BilevelError, Status
from bilevel._tree import tree_leaves
from bilevel.problems import quadratic
from bilevel.solvers.adam import Adam
from bilevel.solvers.cg import CG
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.heavy_ball import HeavyBall
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.nesterov import Nesterov
from bilevel.solvers.scipy_minimize import ScipyMinimize
from bilevel.solvers.torch_optim import TorchOptim

lr_scheduler = torch.optim.lr_scheduler

DIFFERENTIABLE: list[AbstractOptimizer] = [
    GradientDescent(0.1),
    HeavyBall(0.1, momentum=0.7),
    Nesterov(0.1),
    Nesterov(0.1, momentum=0.6),
    Adam(0.05),
    Adam(0.05, beta1=0.0, beta2=0.5),
]
OPTIMIZERS = [*DIFFERENTIABLE, TorchOptim(lambda params: torch.optim.Adam(params, lr=0.1))]


def named(optimizer: AbstractOptimizer) -> str:
    """The same in every process: without the addresses of functions."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(optimizer))


CURVATURES = torch.tensor([0.5, 1.0, 4.0, 9.0], dtype=torch.float64)


def gradient(y: Tensor) -> Tensor:
    return CURVATURES * (y - 1) + 0.3 * y.pow(3)


def start() -> Tensor:
    return torch.tensor([2.0, -1.0, 0.3, -0.7], dtype=torch.float64)


def run(optimizer: AbstractOptimizer, steps: int, y: Tensor | None = None) -> Tensor:
    y = start() if y is None else y
    state = optimizer.init(y)
    for _ in range(steps):
        y, state = optimizer.step(gradient(y), y, state)
    return y


def torch_loop(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], steps: int, scheduler: Callable[[Any], Any] | None = None
) -> Tensor:
    y = start().requires_grad_()
    optimizer = make([y])
    schedule = None if scheduler is None else scheduler(optimizer)
    for _ in range(steps):
        y.grad = gradient(y.detach())
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return y.detach()


# The recursions


def test_gradient_descent_is_its_recursion() -> None:
    y = start()
    for _ in range(20):
        y = y - 0.03 * gradient(y)
    torch.testing.assert_close(run(GradientDescent(0.03), 20), y, rtol=1e-14, atol=0)


def test_heavy_ball_is_the_two_term_recursion() -> None:
    y, before = start(), start()
    for _ in range(20):
        y, before = y - 0.03 * gradient(y) + 0.8 * (y - before), y
    torch.testing.assert_close(run(HeavyBall(0.03, momentum=0.8), 20), y, rtol=1e-12, atol=1e-13)


def test_heavy_ball_is_torch_sgd_with_momentum() -> None:
    expected = torch_loop(lambda params: torch.optim.SGD(params, lr=0.03, momentum=0.8), 20)
    torch.testing.assert_close(run(HeavyBall(0.03, momentum=0.8), 20), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("momentum", [None, 0.8])
def test_nesterov_is_the_two_sequence_scheme(momentum: float | None) -> None:
    u, z = start(), start()
    for k in range(1, 21):
        beta = (k - 1) / (k + 2) if momentum is None else momentum
        new = z - 0.03 * gradient(z)
        z, u = new + beta * (new - u), new
    torch.testing.assert_close(run(Nesterov(0.03, momentum=momentum), 20), z, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.5, 0.0)])
def test_adam_is_torch_adam(betas: tuple[float, float]) -> None:
    expected = torch_loop(lambda params: torch.optim.Adam(params, lr=0.05, betas=betas), 50)
    torch.testing.assert_close(run(Adam(0.05, *betas), 50), expected, rtol=1e-12, atol=1e-12)


def test_adam_in_single_precision_is_torch_adam_in_double() -> None:
    y = start().float()
    adam = Adam(0.05)
    moved, state = adam.step(gradient(start()).float(), y, adam.init(y))
    expected = torch_loop(lambda params: torch.optim.Adam(params, lr=0.05), 1)
    torch.testing.assert_close(moved.double(), expected, rtol=2e-7, atol=0)
    assert moved.dtype == torch.float32
    assert all(entry.dtype == torch.float32 for entry in state.values())


# What every optimizer promises


def flat_tensors(state: OptimizerState) -> list[Tensor]:
    leaves = tree_leaves(state)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=named)
def test_a_step_modifies_none_of_its_arguments(optimizer: AbstractOptimizer) -> None:
    y = start()
    y, state = optimizer.step(gradient(y), y, optimizer.init(y))
    g = gradient(y)
    arguments = [y, g, *flat_tensors(state)]
    before = [argument.clone() for argument in arguments]
    first = optimizer.step(g, y, state)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))
    assert y.grad is None
    again = optimizer.step(g, y, state)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], y)
    for a, b in zip(flat_tensors(first[1]), flat_tensors(again[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=named)
def test_rows_of_a_batch_are_optimized_row_by_row(optimizer: AbstractOptimizer) -> None:
    rows = torch.stack([start(), -start(), 2 * start()])
    together = run(optimizer, 7, rows)
    for row, found in zip(rows, together, strict=True):
        torch.testing.assert_close(found, run(optimizer, 7, row), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=named)
def test_a_state_survives_saving_without_pickled_code(optimizer: AbstractOptimizer) -> None:
    y = start()
    y, state = optimizer.step(gradient(y), y, optimizer.init(y))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(optimizer.step(gradient(y), y, state)[0], optimizer.step(gradient(y), y, loaded)[0])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own use of it
@pytest.mark.parametrize("optimizer", DIFFERENTIABLE, ids=named)
def test_two_steps_are_differentiable(optimizer: AbstractOptimizer) -> None:
    def two_steps(y: Tensor, scale: Tensor) -> Tensor:
        state = optimizer.init(y)
        for _ in range(2):
            y, state = optimizer.step(scale * gradient(y), y, state)
        return y

    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(two_steps, (start().requires_grad_(), scale))
    direction = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    forward: Tensor = torch.func.jvp(lambda y: two_steps(y, scale.detach()), (start(),), (direction,))[1]
    jacobian = torch.func.jacrev(lambda y: two_steps(y, scale.detach()))(start())
    torch.testing.assert_close(forward, jacobian @ direction, rtol=1e-12, atol=1e-12)


def test_adam_has_finite_derivatives_where_a_gradient_is_zero() -> None:
    adam = Adam(0.05)
    g = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    y = torch.zeros(2, dtype=torch.float64)
    moved, _ = adam.step(g, y, adam.init(y))
    (derivative,) = torch.autograd.grad(moved.sum(), g)
    torch.testing.assert_close(derivative[0], torch.tensor(-0.05 / 1e-8, dtype=torch.float64), rtol=1e-3, atol=0)
    assert derivative[1].abs() < 1e-6


@pytest.mark.parametrize("make", [GradientDescent, HeavyBall, Nesterov])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_an_open_step_is_one_over_the_curvature_and_safe(make: Any, momentum: float) -> None:
    optimizer = make() if make is GradientDescent else make(momentum=momentum)
    assert optimizer.needs_curvature
    tuned = optimizer.tuned(torch.tensor(9.0, dtype=torch.float64))
    assert not tuned.needs_curvature
    assert isinstance(tuned, GradientDescent | HeavyBall | Nesterov)
    assert isinstance(tuned.step_size, Tensor)
    assert float(tuned.step_size) == pytest.approx(1 / 9, rel=1e-15)
    assert type(tuned) is type(optimizer)
    assert getattr(tuned, "momentum", None) == getattr(optimizer, "momentum", None)
    objective = Objective(lambda y: (CURVATURES * (y - 1).square()).sum(-1) / 2)
    solved = Iterate(optimizer, max_steps=6000, tol=1e-8).solve(objective, start())
    assert solved.status is Status.successful
    torch.testing.assert_close(solved.value, torch.ones(4, dtype=torch.float64), rtol=0, atol=2e-8)


def test_a_given_step_is_not_retuned() -> None:
    for optimizer in OPTIMIZERS:
        assert not optimizer.needs_curvature
        assert optimizer.tuned(torch.tensor(3.0)) is optimizer


def test_representations_rebuild_the_optimizer() -> None:
    for optimizer in DIFFERENTIABLE:
        assert eval(repr(optimizer)) == optimizer


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GradientDescent(0.0), "GradientDescent(step=...)"),
        (lambda: HeavyBall(-1.0), "HeavyBall(step=...)"),
        (lambda: HeavyBall(momentum=1.0), "HeavyBall(momentum=...)"),
        (lambda: Nesterov(float("nan")), "Nesterov(step=...)"),
        (lambda: Nesterov(momentum=-0.1), "Nesterov(momentum=...)"),
        (lambda: Adam(0.0), "Adam(step=...)"),
        (lambda: Adam(0.1, beta1=1.0), "Adam(beta1=...)"),
        (lambda: Adam(0.1, beta2=-0.1), "Adam(beta2=...)"),
        (lambda: Adam(0.1, eps_root=-1.0), "Adam(eps_root=...)"),
        (lambda: ScipyMinimize("Nelder-Mead"), "ScipyMinimize(method=...)"),
    ],
)
def test_wrong_settings_are_refused_by_name(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        make()


# torch.optim

FACTORIES: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.5),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
    "Rprop": lambda params: torch.optim.Rprop(params, lr=0.01),
}
SCHEDULERS: dict[str, Callable[[Any], Any] | None] = {
    "none": None,
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 3, gamma=0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 5], gamma=0.5),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 10),
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda k: 1 / (1 + k)),
    "sequential": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=3), lr_scheduler.ExponentialLR(opt, 0.9)], [3]
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("factory", FACTORIES)
def test_torch_optim_is_the_plain_loop_bit_for_bit_through_saving(factory: str, scheduler: str) -> None:
    optimizer = TorchOptim(FACTORIES[factory], SCHEDULERS[scheduler])
    y = start()
    state = optimizer.init(y)
    for _ in range(12):
        y, state = optimizer.step(gradient(y), y, state)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    assert torch.equal(y, torch_loop(FACTORIES[factory], 12, SCHEDULERS[scheduler]))


def test_torch_lbfgs_is_refused_and_ours_is_named() -> None:
    with pytest.raises(ValueError, match=r"`LBFGS` of bilevel\.solvers"):
        TorchOptim(lambda params: torch.optim.LBFGS(params)).init(start())


def test_a_scheduler_that_needs_a_metric_is_refused() -> None:
    plateau = TorchOptim(FACTORIES["SGD"], lambda opt: lr_scheduler.ReduceLROnPlateau(opt))
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        plateau.init(start())


def test_a_factory_must_optimize_what_it_is_given() -> None:
    other = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="must build an optimizer of the parameters it is given"):
        TorchOptim(lambda params: torch.optim.SGD([other], lr=0.1)).init(start())
    with pytest.raises(TypeError, match="TorchOptim"):
        TorchOptim(torch.optim.SGD([other], lr=0.1))  # type: ignore[arg-type]


def test_torch_optim_runs_inside_iterate_and_cannot_be_unrolled() -> None:
    inner = Iterate(TorchOptim(FACTORIES["SGD"]), max_steps=2000, tol=1e-9)
    solved = inner.solve(Objective(lambda y: (CURVATURES * (y - 1).square()).sum(-1) / 2), start())
    assert solved.status is Status.successful
    torch.testing.assert_close(solved.value, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match="cannot differentiate through TorchOptim"):
        inner.begin(start())


# scipy as the outer method


def tracking(target: Tensor) -> BilevelProblem:
    """Phi(x) = |x - target|^2 weighted by 1, 2, ..., by way of y*(x) = x."""
    weights = torch.arange(1, target.numel() + 1, dtype=target.dtype)
    return BilevelProblem(
        lambda x, y: (weights * (y - target).square()).sum() / 2, lambda x, y: (y - x).square().sum() / 2
    )


@pytest.mark.parametrize("method", ["L-BFGS-B", "BFGS", "CG", "SLSQP", "TNC"])
def test_scipy_minimizes_the_outer_objective(method: str) -> None:
    target = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    x0 = torch.zeros(3, dtype=torch.float64)
    solution = minimize(tracking(target), x0, x0, outer=ScipyMinimize(method), max_steps=50)
    torch.testing.assert_close(solution.x, target, rtol=0, atol=1e-5)
    assert solution.status is Status.successful
    assert torch.equal(x0, torch.zeros_like(x0))


@pytest.mark.parametrize("method", ["L-BFGS-B", "SLSQP", "TNC"])
def test_scipy_respects_bounds(method: str) -> None:
    target = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    x0 = torch.zeros(3, dtype=torch.float64)
    box = Box(-0.5, torch.tensor([2.0, 2.0, 2.5], dtype=torch.float64))
    solution = minimize(tracking(target), x0, x0, outer=ScipyMinimize(method), constraint=box, tol=1e-6)
    expected = torch.tensor([1.0, -0.5, 2.5], dtype=torch.float64)
    torch.testing.assert_close(solution.x, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="takes no bounds"):
        minimize(tracking(target), x0, x0, outer=ScipyMinimize("BFGS"), constraint=box)


@pytest.mark.parametrize("tol", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("method", ["L-BFGS-B", "BFGS", "SLSQP"])
def test_a_tolerance_on_the_norm_of_the_hypergradient_is_met_by_scipy(method: str, tol: float) -> None:
    instance = quadratic(p=6)
    exact = AID(LBFGS(tol=1e-12), CG(rtol=1e-12))
    outer = ScipyMinimize(method)
    solution = minimize(instance.problem, instance.x0, instance.y0, estimator=exact, outer=outer, tol=tol)
    assert solution.status is Status.successful
    assert instance.gradient is not None
    assert float(torch.linalg.vector_norm(instance.gradient(solution.x))) <= 1.01 * tol


def test_scipy_goes_on_from_no_step_that_meets_the_tolerance() -> None:
    """Else it goes on to where hypergradients are no more than their error, and line searches fail."""
    instance = quadratic(p=6)
    solution = minimize(instance.problem, instance.x0, instance.y0, outer=ScipyMinimize(), tol=1e-5)
    assert solution.status is Status.successful
    # and bounds count: the gradient at a bound does not vanish, its projection does
    box = torch.full((2,), -1.0, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    x, status = drive(rosenbrock, bounds=box, tol=1e-4)
    assert status is Status.successful
    assert float(x[0]) == 0.5 and float(torch.linalg.vector_norm(rosenbrock(x)[1])) > 0.1


def drive(evaluate: Callable[[Tensor], tuple[float, Tensor]], **settings: Any) -> tuple[Tensor, Status]:
    x0 = settings.pop("x0", torch.tensor([-1.2, 1.0], dtype=torch.float64))
    options = {"bounds": None, "max_steps": 200, "tol": 1e-6, **settings}
    return ScipyMinimize(options=options.pop("options", None)).drive(evaluate, x0, **options)


def rosenbrock(x: Tensor) -> tuple[float, Tensor]:
    return (
        float((1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2),
        torch.stack([-2 * (1 - x[0]) - 400 * x[0] * (x[1] - x[0] ** 2), 200 * (x[1] - x[0] ** 2)]),
    )


def test_scipy_says_how_it_ended() -> None:
    x, status = drive(rosenbrock)
    assert status is Status.successful
    assert float(torch.linalg.vector_norm(rosenbrock(x)[1])) <= 1e-6
    assert drive(rosenbrock, max_steps=3)[1] is Status.max_steps
    assert drive(rosenbrock, max_steps=3, tol=None)[1] is Status.steps_used_up
    assert drive(rosenbrock, max_steps=0)[1] is Status.max_steps
    assert drive(lambda x: (float("nan"), x * float("nan")))[1] is Status.nonfinite
    wrong = drive(lambda x: (rosenbrock(x)[0], -rosenbrock(x)[1]))
    assert wrong[1] is Status.line_search_failed
    loose = drive(rosenbrock, options={"ftol": 1e-2})
    assert loose[1] is Status.stagnated


@pytest.mark.parametrize("method", ["L-BFGS-B", "BFGS", "CG", "SLSQP", "TNC", "trust-constr"])
def test_a_step_budget_of_scipy_that_is_used_up_is_told_from_a_failure(method: str) -> None:
    x0 = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    for max_steps in (1, 2, 5):
        for tol, status in ((None, Status.steps_used_up), (1e-9, Status.max_steps)):
            found = ScipyMinimize(method).drive(rosenbrock, x0, bounds=None, max_steps=max_steps, tol=tol)
            assert found[1] is status


def test_scipy_keeps_the_dtype_of_x() -> None:
    seen: list[torch.dtype] = []

    def evaluate(x: Tensor) -> tuple[float, Tensor]:
        seen.append(x.dtype)
        return float(x.square().sum()), 2 * x

    x, status = drive(evaluate, x0=torch.ones(3, dtype=torch.float32))
    assert x.dtype == torch.float32
    assert set(seen) == {torch.float32}
    assert status is Status.successful


def test_a_callback_stops_scipy() -> None:
    x0 = torch.zeros(3, dtype=torch.float64)
    problem = tracking(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    solution = minimize(problem, x0, x0, outer=ScipyMinimize(), callback=lambda record, _: record.step == 1)
    assert len(solution.history) == 2


def test_a_missed_outer_tolerance_is_raised() -> None:
    x0 = torch.zeros(3, dtype=torch.float64)
    problem = tracking(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    with pytest.raises(BilevelError) as caught:
        minimize(problem, x0, x0, outer=ScipyMinimize(), max_steps=1, tol=1e-9)
    assert caught.value.status is Status.max_steps


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r'pip install "bilevel\[scipy\]"'):
        drive(rosenbrock)
