"""The outer loop: where it ends, what it records, how it is interrupted and resumed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import PROBLEMS, bits, distance, flat
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bilevel import (
    AID,
    ESJ,
    ITD,
    BilevelError,
    BilevelProblem,
    Box,
    Estimate,
    Record,
    Simplex,
    Split,
    Stats,
    Status,
    check,
    hypergradient,
    hyperobjective,
    minimize,
)
from bilevel._tree import tree_leaves, tree_map
from bilevel.problems.quadratic import quadratic
from bilevel.solvers.adam import Adam
from bilevel.solvers.cg import CG
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.heavy_ball import HeavyBall
from bilevel.solvers.iterate import Iterate
from bilevel.solvers.jacobi import Jacobi
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.nesterov import Nesterov
from bilevel.solvers.scipy_minimize import ScipyMinimize
from bilevel.solvers.torch_optim import TorchOptim

AID_CG = AID(LBFGS(1e-10), CG(1e-10))
SQUARE = BilevelProblem(lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2)  # x* = 3
ZERO = torch.zeros(2)


def target(x: Tensor, y: Tensor, d: Tensor) -> Tensor:
    return (y - d).square().sum() / 2


STREAMED = BilevelProblem(target, lambda x, y, d: (y - x).square().sum() / 2)  # h = x - d


# Where it ends


@pytest.mark.parametrize(
    ("outer", "steps"),
    [
        (GradientDescent(0.4), 300),
        (HeavyBall(0.3, 0.5), 200),
        (Nesterov(0.2), 300),
        (Adam(0.1), 600),
        (TorchOptim(lambda params: torch.optim.SGD(params, lr=0.3, momentum=0.5)), 200),
    ],
    ids=lambda part: type(part).__name__,
)
@pytest.mark.parametrize("name", ["quadratic", "asinh"])
def test_known_minimizer_is_reached(outer: Any, steps: int, name: str) -> None:
    instance = PROBLEMS[name]()
    assert instance.minimizer is not None
    solution = minimize(
        instance.problem, instance.x0, instance.y0, estimator=AID_CG, outer=outer, max_steps=3 * steps, tol=1e-6
    )
    assert solution.status is Status.successful
    assert distance(solution.x, instance.minimizer) <= 1e-4
    assert instance.solution is not None
    assert distance(solution.y, instance.solution(solution.x)) <= 1e-7
    assert solution.value == pytest.approx(instance.value(solution.x), abs=1e-8)
    assert float(flat(solution.estimate.grad).norm()) <= 1e-6


def test_one_step_is_the_optimizer_on_the_hypergradient() -> None:
    instance = quadratic()
    h = hypergradient(instance.problem, instance.x0, instance.y0, estimator=AID_CG).grad
    solution = minimize(
        instance.problem, instance.x0, instance.y0, estimator=AID_CG, outer=GradientDescent(0.25), max_steps=1
    )
    assert torch.equal(solution.x, instance.x0 - 0.25 * h)


def test_defaults_make_progress_by_name() -> None:
    instance = quadratic()
    solution = minimize(instance.problem, instance.x0, instance.y0, max_steps=40)
    assert solution.status is Status.successful
    assert solution.value < 0.9 * solution.history[0].value


def test_start_where_the_inner_problem_is_already_solved() -> None:
    """At x0 = 0 the start y0 = 0 is the solution: its gradient, zero, says nothing of the scale of later ones."""
    A = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, 0.2], [0.1, 0.2, 0.7]])
    problem = BilevelProblem(
        lambda x, y: (y - 3).square().sum() / 2, lambda x, y: y @ A @ y / 2 + y.cosh().sum() - x @ y
    )
    for estimator in ("aid-cg", "penalty", "itd"):
        solution = minimize(problem, torch.zeros(3), torch.zeros(3), estimator=estimator, max_steps=5)
        assert solution.status is Status.steps_used_up
        reference = hypergradient(problem, solution.x, torch.zeros(3), estimator=AID(LBFGS(1e-12), CG(1e-12)))
        assert distance(solution.estimate.grad, reference.grad) <= 1e-4


def test_inputs_stay_untouched() -> None:
    instance = PROBLEMS["nested"]()
    x0 = tree_map(lambda leaf: leaf.clone().requires_grad_(), instance.x0)
    before = bits((x0, instance.y0))
    solution = minimize(instance.problem, x0, instance.y0, estimator=AID_CG, max_steps=3)
    assert bits((x0, instance.y0)) == before
    assert all(leaf.grad is None for leaf in tree_leaves(x0))
    assert not any(leaf.requires_grad for leaf in tree_leaves((solution.x, solution.y)))


def test_same_arguments_give_the_same_bits() -> None:
    instance = quadratic()
    esj = ESJ(Iterate(GradientDescent(0.1), 10), directions=2)
    runs = [minimize(instance.problem, instance.x0, instance.y0, estimator=esj, max_steps=6) for _ in range(2)]
    assert bits((runs[0].x, runs[0].y)) == bits((runs[1].x, runs[1].y))
    assert content(runs[0]) == content(runs[1])


def test_esj_draws_new_directions_at_each_step() -> None:
    instance = quadratic()
    grads: list[Tensor] = []
    esj = ESJ(Iterate(GradientDescent(0.1), 10), directions=1)
    minimize(
        instance.problem, instance.x0, instance.y0, estimator=esj, outer=GradientDescent(1e-12), max_steps=3,
        callback=lambda record, estimate: grads.append(estimate.grad), warm_start=False,
    )  # fmt: skip
    assert len({tuple((g / g.norm()).round(decimals=3).tolist()) for g in grads}) == 4


def test_warm_start_saves_inner_steps() -> None:
    instance = quadratic()
    warm, cold = (
        minimize(
            instance.problem, instance.x0, instance.y0, estimator=AID_CG, outer=GradientDescent(0.3), max_steps=60,
            warm_start=warm,
        )
        for warm in (True, False)
    )  # fmt: skip
    assert warm.stats.inner_steps < 0.8 * cold.stats.inner_steps
    assert distance(warm.x, cold.x) <= 1e-7


# History


def content(solution: Any) -> list[tuple[Any, ...]]:
    """The records without the wall-clock time."""
    return [(r.step, r.value, r.grad_norm, r.status, r.stats) for r in solution.history]


def test_history_has_a_record_a_step_and_one_of_the_point_returned() -> None:
    seen: list[tuple[Record, Estimate]] = []
    solution = minimize(
        SQUARE, ZERO, ZERO, estimator=AID_CG, outer=GradientDescent(0.5), max_steps=4,
        callback=lambda record, estimate: seen.append((record, estimate)),
    )  # fmt: skip
    assert [record.step for record in solution.history] == [0, 1, 2, 3, 4]
    assert [record for record, _ in seen] == list(solution.history)
    for k, (record, estimate) in enumerate(seen):
        assert record.value == pytest.approx(9 / 4**k)
        assert record.grad_norm == pytest.approx(3 * 2**0.5 / 2**k)
        assert record.value == estimate.value
        assert record.stats == estimate.stats
        assert record.status is estimate.status is Status.successful
        assert record.seconds > 0
        assert Record.from_dict(record.as_dict()) == record
    assert solution.stats == sum((record.stats for record in solution.history), Stats())
    assert solution.value == solution.history[-1].value
    assert distance(solution.x, torch.full((2,), 3 - 3 / 16)) <= 1e-9


def test_no_steps_is_one_estimate() -> None:
    solution = minimize(SQUARE, ZERO, ZERO, estimator=AID_CG, max_steps=0)
    assert len(solution.history) == 1
    assert torch.equal(solution.x, ZERO)
    assert distance(solution.estimate.grad, torch.full((2,), -3.0)) <= 1e-12


# Tolerance, callbacks, failures


def test_tolerance_stops_at_the_first_small_gradient() -> None:
    solution = minimize(SQUARE, ZERO, ZERO, estimator=AID_CG, outer=GradientDescent(0.5), max_steps=99, tol=1e-3)
    norms = [record.grad_norm for record in solution.history]
    assert norms[-1] <= 1e-3 < norms[-2]
    assert solution.status is Status.successful


def test_missed_tolerance_is_raised_or_reported() -> None:
    arguments: dict[str, Any] = {"estimator": AID_CG, "outer": GradientDescent(0.5), "max_steps": 3, "tol": 1e-3}
    with pytest.raises(BilevelError, match=r"stopped at step 3.*maximum number of steps") as caught:
        minimize(SQUARE, ZERO, ZERO, **arguments)
    solution = minimize(SQUARE, ZERO, ZERO, **arguments, throw=False)
    assert solution.status is caught.value.status is Status.max_steps
    assert solution.message != ""
    assert torch.equal(caught.value.partial.x, solution.x)
    assert len(solution.history) == 4


def test_callback_stops_the_run() -> None:
    solution = minimize(
        SQUARE, ZERO, ZERO,
        estimator=AID_CG, outer=Adam(0.05), max_steps=50, callback=lambda record, _: record.step == 7,
    )  # fmt: skip
    assert len(solution.history) == 8
    assert (solution.status, solution.converged) == (Status.stopped, False)
    assert solution.status.ok


def test_failed_estimate_raises_at_once_or_is_remembered() -> None:
    """The inner solver is cut off where x < 1: the first estimates fail, later ones do not."""
    estimator = AID(Iterate(GradientDescent(0.5), max_steps=12, tol=2e-3), CG(1e-8))
    arguments: dict[str, Any] = {"estimator": estimator, "outer": GradientDescent(0.3), "warm_start": False}
    far = torch.full((2,), 20.0)
    with pytest.raises(BilevelError, match=r"stopped at step 0\. inner solver: The maximum") as caught:
        minimize(SQUARE, far, ZERO, **arguments, max_steps=30)
    assert len(caught.value.partial.history) == 1
    solution = minimize(SQUARE, far, ZERO, **arguments, max_steps=30, throw=False)
    assert solution.history[0].status is Status.max_steps
    assert solution.history[-1].status is Status.successful
    assert solution.status is Status.max_steps
    assert "step 0" in solution.message
    assert len(solution.history) == 31


@pytest.mark.parametrize("throw", [True, False])
def test_nan_ends_the_run(throw: bool) -> None:
    """h = -1, so that x = 0, 1, 2, 3, where the root is NaN."""
    problem = BilevelProblem(lambda x, y: -y.sum() + 0 * (2.5 - x).sqrt().sum(), SQUARE.g)
    arguments: dict[str, Any] = {"estimator": AID_CG, "outer": GradientDescent(1.0)}
    if throw:
        with pytest.raises(BilevelError, match="NaN or Inf") as caught:
            minimize(problem, ZERO, ZERO, **arguments, max_steps=20)
        solution = caught.value.partial
    else:
        solution = minimize(problem, ZERO, ZERO, **arguments, max_steps=20, throw=False)
    assert solution.status is Status.nonfinite
    assert len(solution.history) == 4
    assert math.isnan(solution.value)


def test_outer_divergence_is_never_silent() -> None:
    with pytest.raises(BilevelError) as caught:
        minimize(SQUARE, ZERO + 1, ZERO, estimator=AID_CG, outer=GradientDescent(300.0), max_steps=500)
    assert not caught.value.status.ok


# Against torch and scipy


def test_torch_optimizer_with_scheduler_is_the_plain_torch_loop_bit_for_bit() -> None:
    instance = quadratic()
    solution = minimize(
        instance.problem, instance.x0, instance.y0, estimator=AID_CG, max_steps=25,
        outer=TorchOptim(
            lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.01),
            lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5),
        ),
    )  # fmt: skip
    x = instance.x0.clone().requires_grad_()
    phi = hyperobjective(instance.problem, instance.y0, estimator=AID_CG)
    optimizer = torch.optim.AdamW([x], lr=0.1, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)
    values = []
    for _ in range(25):
        optimizer.zero_grad()
        value = phi(x)
        values.append(value.item())
        torch.autograd.backward(value)
        optimizer.step()
        scheduler.step()
    assert torch.equal(solution.x, x.detach())
    assert [record.value for record in solution.history[:-1]] == values


def test_adam_is_torch_adam() -> None:
    instance = quadratic()
    ours, torchs = (
        minimize(instance.problem, instance.x0, instance.y0, estimator=AID_CG, outer=outer, max_steps=30)
        for outer in (Adam(0.1), TorchOptim(lambda params: torch.optim.Adam(params, lr=0.1)))
    )
    assert distance(ours.x, torchs.x) <= 1e-8


def test_scipy_reaches_the_constrained_minimizer() -> None:
    pytest.importorskip("scipy")
    instance = quadratic()
    free = minimize(instance.problem, instance.x0, instance.y0, estimator=AID_CG, outer=ScipyMinimize(), tol=1e-7)
    assert distance(free.x, instance.minimizer) <= 1e-6
    assert len(free.history) < 40
    box = Box(-0.5, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    arguments: dict[str, Any] = {"estimator": AID_CG, "constraint": box, "tol": 1e-6}
    found = minimize(instance.problem, instance.x0, instance.y0, outer=ScipyMinimize(), **arguments)
    projected = minimize(
        instance.problem, instance.x0, instance.y0, outer=GradientDescent(0.3), max_steps=900, **arguments
    )
    assert distance(found.x, projected.x) <= 1e-5
    assert instance.gradient is not None
    h = instance.gradient(found.x)
    assert float((found.x - box.project(found.x - h)).norm()) <= 1e-6
    assert float((free.x - found.x).norm()) > 0.1  # the bounds are active


def test_drivers_refuse_data() -> None:
    with pytest.raises(ValueError, match="runs its own loop on a deterministic problem: it takes no `data`"):
        minimize(STREAMED, ZERO, ZERO, estimator=AID_CG, outer=ScipyMinimize(), data=torch.ones(2))


# Constraints


def test_simplex_constraint_meets_the_optimality_conditions() -> None:
    """min |x - t|^2 / 2 over the simplex: x = P(t)."""
    t = torch.tensor([0.9, 0.4, -0.3])
    problem = BilevelProblem(lambda x, y: (y - t).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2)
    solution = minimize(
        problem, torch.tensor([5.0, 0.0, 0.0]), torch.zeros(3), estimator=AID_CG, outer=GradientDescent(0.5),
        constraint=Simplex(), max_steps=200, tol=1e-8,
    )  # fmt: skip
    assert float((solution.x - torch.tensor([0.75, 0.25, 0.0])).abs().max()) <= 1e-7


def test_constraints_hold_from_the_first_step_and_for_their_entries_only() -> None:
    problem = BilevelProblem(
        lambda x, y: (y["a"] - 5).square().sum() + (y["b"] - 5).square().sum(),
        lambda x, y: (y["a"] - x["a"]).square().sum() + (y["b"] - x["b"]).square().sum(),
    )
    start = {"a": torch.tensor([9.0, 0.0]), "b": torch.tensor(-9.0)}
    first = minimize(problem, start, start, estimator=AID_CG, constraint={"a": Box(0.0, 2.0)}, max_steps=0)
    assert first.x["a"].tolist() == [2.0, 0.0]
    assert first.x["b"] == -9.0
    solution = minimize(
        problem, start, start, estimator=AID_CG, outer=GradientDescent(0.25), constraint={"a": Box(0.0, 2.0)}, tol=1e-6
    )
    assert solution.x["a"].tolist() == [2.0, 2.0]
    assert float(solution.x["b"]) == pytest.approx(5.0)
    assert start["a"].tolist() == [9.0, 0.0]


# Data


def taken(data: Any, problem: BilevelProblem = STREAMED, steps: int = 5) -> list[float]:
    """The batch of each step, as h = x - d tells with x at zero."""
    seen: list[float] = []
    minimize(
        problem, torch.zeros(1), torch.zeros(1), estimator=AID_CG, outer=GradientDescent(1e-14), max_steps=steps,
        data=data, callback=lambda record, estimate: seen.append(round(-float(estimate.grad), 6)),
    )  # fmt: skip
    return seen


def test_every_kind_of_data() -> None:
    batches = [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)]
    assert taken(batches) == [1, 2, 3, 1, 2, 3]
    assert taken(lambda step: torch.tensor(10.0 * step)) == [0, 10, 20, 30, 40, 50]
    assert taken(torch.tensor(4.0)) == [4] * 6
    loader = DataLoader(TensorDataset(torch.tensor([1.0, 2.0, 3.0, 4.0])), batch_size=2)
    assert taken(loader, BilevelProblem(lambda x, y, b: target(x, y, b[0].sum()), STREAMED.g)) == [3, 7, 3, 7, 3, 7]
    pair = BilevelProblem(lambda x, y, d: target(x, y, d[0]), STREAMED.g)
    assert taken((torch.tensor(6.0), torch.tensor(7.0)), pair) == [6] * 6
    table = BilevelProblem(lambda x, y, d: target(x, y, d["t"]), STREAMED.g)
    assert taken({"t": torch.tensor(8.0)}, table) == [8] * 6


def test_split_streams_the_two_levels_on_their_own() -> None:
    problem = BilevelProblem(target, lambda x, y, d: (y - x - d).square().sum() / 2)  # h = x + d_g - d_f
    data = Split(f=[torch.tensor(100.0), torch.tensor(200.0)], g=lambda step: torch.tensor(float(step)))
    assert taken(data, problem) == [100 - 0, 200 - 1, 100 - 2, 200 - 3, 100 - 4, 200 - 5]


def test_iterator_that_cannot_be_started_again_is_refused() -> None:
    calls = []

    def once() -> Iterator[Tensor]:
        calls.append(1)
        yield from (torch.tensor(1.0), torch.tensor(2.0))

    for data in (once(), iter([torch.tensor(1.0)]), Split(f=torch.tensor(1.0), g=once())):
        with pytest.raises(TypeError, match=r"can be started again. Got an iterator \(\w+\). Pass a list of batches"):
            taken(data)
    assert not calls
    with pytest.raises(ValueError, match="yields no batch"):
        taken([])


def test_data_of_a_wrong_kind_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`minimize\(data=\.\.\.\)` must be a batch"):
        taken(3.0)
    with pytest.raises(TypeError, match=r"`minimize\(data=\.\.\.\)` must be a batch"):
        taken("train.npz")
    with pytest.raises(TypeError, match=r"Pass `data=\.\.\.`"):
        taken(None)


def test_arrays_are_not_taken_for_loaders_of_their_rows() -> None:
    numpy = pytest.importorskip("numpy")
    with pytest.raises(TypeError, match=r"must hold tensors. Got ndarray at data. Write `torch.as_tensor\(...\)`.$"):
        taken(numpy.ones(3))
    for entries in ([torch.ones(()), numpy.ones(3)], [torch.ones(()), 1.0]):
        with pytest.raises(TypeError, match=r"Got (ndarray|float) at data\[1\].*A list is a loader, one entry a step"):
            taken(entries)


@pytest.mark.parametrize("loader", [DataLoader(TensorDataset(torch.ones(4))), iter([torch.ones(2)])])
def test_a_loader_where_one_batch_is_needed_is_refused(loader: Any) -> None:
    for data in (loader, Split(f=torch.ones(2), g=loader)):
        for call in (hypergradient, check):
            with pytest.raises(TypeError, match=r"`data=...` must be one batch here.* Pass `next\(iter\(loader\)\)`"):
                call(STREAMED, torch.zeros(1), torch.zeros(1), data=data)
    estimate = hypergradient(STREAMED, torch.zeros(1), torch.zeros(1), estimator=AID_CG, data=next(iter(loader))[0])
    assert float(estimate.grad) == -1


# Checkpoints

ESTIMATORS = {
    "aid-cg": "aid-cg",
    "aid": AID_CG,
    "esj": ESJ(Iterate(GradientDescent(0.1), 10), directions=2, distribution="gaussian"),
    "itd": ITD(Iterate(HeavyBall(0.1, 0.5), 5)),
}
OUTERS = {
    "adam": Adam(0.1),
    "heavy-ball": HeavyBall(0.1, 0.5),
    "torch": TorchOptim(
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12),
    ),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("outer", OUTERS)
def test_resumed_run_is_the_whole_run_bit_for_bit(estimator: str, outer: str, tmp_path: Path) -> None:
    instance = PROBLEMS["nested"]()
    arguments: dict[str, Any] = {"estimator": ESTIMATORS[estimator], "outer": OUTERS[outer]}
    whole = minimize(instance.problem, instance.x0, instance.y0, **arguments, max_steps=12)
    file = tmp_path / "deep" / "state.pt"
    minimize(instance.problem, instance.x0, instance.y0, **arguments, max_steps=5, checkpoint=file)
    resumed = minimize(
        instance.problem, instance.x0, instance.y0, **arguments, max_steps=12, checkpoint=file, resume=True
    )
    assert bits((resumed.x, resumed.y, resumed.estimate.grad)) == bits((whole.x, whole.y, whole.estimate.grad))
    assert content(resumed) == content(whole)
    assert resumed.stats == whole.stats


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_run_resumes_bit_for_bit(error: type[BaseException], tmp_path: Path) -> None:
    instance, file = quadratic(), tmp_path / "state.pt"
    arguments: dict[str, Any] = {"estimator": ESTIMATORS["esj"], "max_steps": 11}
    whole = minimize(instance.problem, instance.x0, instance.y0, **arguments)

    def interrupt(record: Record, estimate: Estimate) -> None:
        if record.step == 7:
            raise error

    with pytest.raises(error):
        minimize(
            instance.problem, instance.x0, instance.y0, **arguments, callback=interrupt, checkpoint=file,
            checkpoint_every=100,
        )  # fmt: skip
    steps: list[int] = []
    resumed = minimize(
        instance.problem, instance.x0, instance.y0, **arguments, checkpoint=file, resume=True,
        callback=lambda record, _: steps.append(record.step),
    )  # fmt: skip
    assert steps[0] == 7
    assert bits((resumed.x, resumed.y)) == bits((whole.x, whole.y))
    assert content(resumed) == content(whole)


@pytest.mark.parametrize(("error", "times"), [(RuntimeError, 2), (KeyboardInterrupt, 1)])
def test_a_signal_while_the_state_after_an_error_is_written_waits_for_it_and_one_after_a_signal_does_not(
    error: type[BaseException], times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bilevel._files import write_atomically as original

    instance, file, written = quadratic(), tmp_path / "state.pt", list[int]()

    def write(path: Any, action: Any) -> None:
        written.append(1)
        if len(written) == 1:
            raise KeyboardInterrupt  # as of the signal that all ranks are sent when one has died
        original(path, action)

    def fail(record: Record, estimate: Estimate) -> None:
        if record.step == 7:
            raise error

    monkeypatch.setattr("bilevel.outer.saves.write_atomically", write)
    arguments: dict[str, Any] = {"estimator": ESTIMATORS["esj"], "max_steps": 11}
    with pytest.raises(KeyboardInterrupt):
        minimize(
            instance.problem, instance.x0, instance.y0, **arguments, callback=fail, checkpoint=file,
            checkpoint_every=100,
        )  # fmt: skip
    assert len(written) == times
    if times == 2:
        assert torch.load(file, weights_only=True)["step"] == 7


def test_error_inside_an_estimate_leaves_the_state_before_it(tmp_path: Path) -> None:
    file, calls = tmp_path / "state.pt", [0]

    def f(x: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 9:
            raise OSError("the disk is gone")
        return (y - 3).square().sum() / 2

    problem = BilevelProblem(f, SQUARE.g)
    with pytest.raises(OSError, match="the disk is gone"):
        minimize(problem, ZERO, ZERO, estimator=AID_CG, outer=Adam(0.05), max_steps=9, checkpoint=file)
    resumed = minimize(
        problem, ZERO, ZERO, estimator=AID_CG, outer=Adam(0.05), max_steps=9, checkpoint=file, resume=True
    )
    whole = minimize(SQUARE, ZERO, ZERO, estimator=AID_CG, outer=Adam(0.05), max_steps=9)
    assert torch.equal(resumed.x, whole.x)
    assert content(resumed) == content(whole)


def test_loaders_and_callables_go_on_where_they_were(tmp_path: Path) -> None:
    loader = [torch.full((2,), float(k)) for k in range(5)]
    for data in (loader, lambda step: torch.full((2,), math.sin(step)), Split(loader, loader[:3])):
        file = tmp_path / "state.pt"
        arguments: dict[str, Any] = {"estimator": AID_CG, "data": data, "outer": Adam(0.2)}
        whole = minimize(STREAMED, ZERO, ZERO, **arguments, max_steps=13)
        minimize(STREAMED, ZERO, ZERO, **arguments, max_steps=7, checkpoint=file)
        resumed = minimize(STREAMED, ZERO, ZERO, **arguments, max_steps=13, checkpoint=file, resume=True)
        assert torch.equal(resumed.x, whole.x)
        assert content(resumed) == content(whole)


def test_checkpoint_is_whole_or_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state.pt"
    minimize(SQUARE, ZERO, ZERO, estimator=AID_CG, max_steps=3, checkpoint=file)
    before = file.read_bytes()

    def half(content: Any, handle: Any) -> None:
        handle.write(b"half of a check")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(BilevelError, match="could not be written: no space left"):
        minimize(SQUARE, ZERO, ZERO, estimator=AID_CG, max_steps=6, checkpoint=file, checkpoint_every=1)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["state.pt"]


def test_checkpoint_is_written_on_time(tmp_path: Path) -> None:
    file, seen = tmp_path / "state.pt", []

    def look(record: Record, _: Estimate) -> None:
        seen.append(torch.load(file, weights_only=True)["step"] if file.exists() else None)

    minimize(
        SQUARE, ZERO, ZERO, estimator=AID_CG, outer=Adam(0.05), max_steps=7, checkpoint=file, checkpoint_every=3,
        callback=look,
    )  # fmt: skip
    assert seen == [None, None, None, 3, 3, 3, 6, 6]
    assert torch.load(file, weights_only=True)["step"] == 7
    assert [record["step"] for record in torch.load(file, weights_only=True)["history"]] == list(range(7))


def test_failed_run_can_be_resumed_with_more_patience(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    arguments: dict[str, Any] = {"estimator": AID_CG, "outer": GradientDescent(0.5), "tol": 1e-6, "checkpoint": file}
    with pytest.raises(BilevelError):
        minimize(SQUARE, ZERO, ZERO, **arguments, max_steps=5)
    resumed = minimize(SQUARE, ZERO, ZERO, **arguments, max_steps=100, resume=True)
    assert resumed.status is Status.successful
    assert [record.step for record in resumed.history] == list(range(len(resumed.history)))


def test_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    arguments: dict[str, Any] = {"estimator": AID_CG, "checkpoint": file, "resume": True, "outer": Adam(0.05)}
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        minimize(SQUARE, ZERO, ZERO, **arguments)
    minimize(SQUARE, ZERO, ZERO, estimator=AID_CG, outer=Adam(0.05), max_steps=2, checkpoint=file)
    for x0, y0 in ((torch.zeros(3), torch.zeros(2)), (ZERO, torch.zeros(3)), (ZERO.float(), ZERO.float())):
        with pytest.raises(ValueError, match="is of another problem"):
            minimize(SQUARE, x0, y0, **arguments)
    with pytest.raises(ValueError, match="written with another outer optimizer"):
        minimize(SQUARE, ZERO, ZERO, **{**arguments, "outer": HeavyBall(0.1)})
    with pytest.raises(ValueError, match=r"outer was Adam\(.*0.05.*\) and is Adam\(.*0.5.*\)\. Resume"):
        minimize(SQUARE, ZERO, ZERO, **{**arguments, "outer": Adam(0.5)})
    with pytest.raises(ValueError, match=r"other settings: estimator was AID\(.*\) and is one-step\. "):
        minimize(SQUARE, ZERO, ZERO, estimator="one-step", checkpoint=file, resume=True)
    with pytest.raises(ValueError, match="constraint was None and is Box"):
        minimize(SQUARE, ZERO, ZERO, **arguments, constraint=Box(0.0, 1.0))
    split = BilevelProblem(lambda x, y: SQUARE.f(x["a"], y), lambda x, y: SQUARE.g(x["a"], y))
    with pytest.raises(ValueError, match=r"x was \(2,\) and is \{'a': \(2,\)\}"):
        minimize(split, {"a": ZERO}, ZERO, **arguments)
    torch.save({"weights": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="not a checkpoint of this version"):
        minimize(SQUARE, ZERO, ZERO, **arguments)
    file.write_bytes(b"PK not a zip file at all")
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        minimize(SQUARE, ZERO, ZERO, **arguments)


def test_checkpoints_of_the_same_settings_and_of_earlier_versions_are_taken(tmp_path: Path) -> None:
    """Functions among the settings are the same although they are elsewhere in memory."""
    file = tmp_path / "state.pt"

    def arguments() -> dict[str, Any]:
        outer = TorchOptim(lambda params: torch.optim.SGD(params, lr=0.1))
        aid = AID(LBFGS(tol=1e-10), CG(rtol=1e-10, preconditioner=Jacobi(lambda: torch.ones(2))))
        return {"estimator": aid, "outer": outer, "checkpoint": file}

    minimize(SQUARE, ZERO, ZERO, **arguments(), max_steps=2)
    kept = [arguments() for _ in range(3)]  # so that none is where the first one was
    minimize(SQUARE, ZERO, ZERO, **kept[-1], max_steps=3, resume=True)
    content = torch.load(file, weights_only=True)
    assert not any("0x" in text for text in content["settings"].values())
    del content["settings"]
    torch.save(content, file)
    assert len(minimize(SQUARE, ZERO, ZERO, **arguments(), max_steps=5, resume=True).history) == 6


def test_checkpoint_executes_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    file = tmp_path / "state.pt"
    torch.save({"format": 1, "x": Evil()}, file)
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        minimize(SQUARE, ZERO, ZERO, estimator=AID_CG, checkpoint=file, resume=True)
    assert not (tmp_path / "executed").exists()


# Arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_steps": -1}, ValueError, r"max_steps=...\)` must be at least 0"),
        ({"max_steps": 2.5}, TypeError, r"`minimize\(max_steps=...\)` must be an integer. Got 2.5 \(float\)."),
        ({"checkpoint_every": "a"}, TypeError, r"`minimize\(checkpoint_every=...\)` must be an integer."),
        ({"tol": "a"}, TypeError, r"`minimize\(tol=...\)` must be a number or None."),
        (
            {"callback": 3},
            TypeError,
            r"`minimize\(callback=...\)` must be a function.* or None. Got 3 \(int\).",
        ),
        ({"checkpoint": 3}, TypeError, r"`minimize\(checkpoint=...\)` must be a path or None."),
        ({"checkpoint_every": 0}, ValueError, r"checkpoint_every=...\)` must be at least 1"),
        ({"resume": True}, ValueError, "needs `checkpoint=`"),
        ({"outer": torch.optim.SGD}, TypeError, "Wrap a torch optimizer as `TorchOptim"),
        ({"outer": GradientDescent()}, ValueError, r"needs a step size: pass `step=\.\.\.`"),
        ({"estimator": "aid-gc"}, ValueError, "Did you mean 'aid-cg'"),
        ({"estimator": AID}, TypeError, "must be an estimator such as"),
        ({"constraint": {"a": Box()}}, ValueError, "which x does not have"),
        ({"constraint": 3}, TypeError, r"must be a set such as `Box\(0, 1\)`"),
        ({"data": torch.ones(2)}, TypeError, "which it does not accept"),
    ],
)
def test_wrong_arguments_are_refused_in_words(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        minimize(SQUARE, ZERO, ZERO, **{"estimator": AID_CG, **options})


def test_mixed_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="one dtype and device"):
        minimize(SQUARE, ZERO, ZERO.float())


def test_float32_runs_stay_float32() -> None:
    solution = minimize(SQUARE, ZERO.float(), ZERO.float(), outer=GradientDescent(0.5), max_steps=40, tol=1e-4)
    assert solution.x.dtype == solution.y.dtype == torch.float32
    assert distance(solution.x, torch.full((2,), 3.0)) <= 1e-4
