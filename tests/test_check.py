"""check finds what is wrong with a problem, says what to do, and finds nothing wrong with sound ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
import torch.nn.functional as F
from test_inner_problems import FixedPoint
from torch import Tensor

import bilevel
from bilevel import BilevelProblem, Check, Outcome, check
from bilevel.diagnostics.taylor import slope
from bilevel.inner_problems import Iteration, LinearlyConstrained, Polytope
from bilevel.problems.inverse_link import asinh
from bilevel.problems.nested import nested
from bilevel.problems.quadratic import quadratic
from bilevel.problems.ridge import ridge
from bilevel.problems.weighted_logit import weighted_logit
from bilevel.prox import L1

Objective: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def outcome(found: Check, name: str) -> Outcome:
    return next(v.outcome for v in found.verdicts if v.name == name)


def sound_g(x: Tensor, y: Tensor) -> Tensor:
    return (y - x).square().sum()


def sound_f(x: Tensor, y: Tensor) -> Tensor:
    return (y - 3).square().sum()


X, Y0 = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -0.5])


@pytest.mark.parametrize("build", [quadratic, nested, ridge, asinh, weighted_logit])
def test_nothing_is_wrong_with_a_sound_problem(build: Callable[[], Any]) -> None:
    instance = build()
    found = check(instance.problem, instance.x0, instance.y0)
    assert found.ok, str(found)
    assert found.dependence == "inner objective"
    assert [name for name, why in found.estimators.items() if why] == ["first-order"]  # of a start in x
    assert outcome(found, "hypergradient") is Outcome.passed


def test_resampled_dropout_is_found() -> None:
    found = check(BilevelProblem(sound_f, lambda x, y: F.dropout(y - x, 0.5).square().sum()), X, torch.ones(2))
    assert outcome(found, "same value twice") is Outcome.failed
    assert "functional" in next(v.remedy for v in found.verdicts if v.name == "same value twice")


def test_dropout_with_a_fixed_mask_is_sound() -> None:
    module = torch.nn.Sequential(
        torch.nn.Linear(3, 3), torch.nn.Dropout(0.5), torch.nn.Tanh(), torch.nn.Linear(3, 1)
    ).double()
    net = bilevel.functional(module, seed=1)
    inputs = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    problem = BilevelProblem(
        lambda x, y: net(y, inputs).square().mean(),
        lambda x, y: (net(y, inputs) - 1).square().mean() + x.exp() * sum(leaf.square().sum() for leaf in y.values()),
    )
    found = check(problem, torch.tensor(0.0), dict(net.params))
    assert outcome(found, "same value twice") is Outcome.passed
    assert outcome(found, "second derivatives") is Outcome.passed


def test_a_detached_part_makes_the_slope_wrong() -> None:
    problem = BilevelProblem(sound_f, lambda x, y: sound_g(x, y) + (y.detach() * y).sum())
    found = check(problem, X, Y0)
    assert outcome(found, "differentiable") is Outcome.failed
    assert "g in y" in next(v.found for v in found.verdicts if v.name == "differentiable")


def by_item(function: Objective) -> Objective:
    return lambda x, y: torch.tensor(float(function(x, y).detach()))


@pytest.mark.parametrize(
    "f", [lambda x, y: sound_f(x, y.detach()), lambda x, y: sound_f(x, y).detach(), by_item(sound_f)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_detached_f_fails_and_only_differences_of_phi_apply(f: Objective, dtype: torch.dtype) -> None:
    found = check(BilevelProblem(f, sound_g), X.to(dtype), Y0.to(dtype))
    verdict = next(v for v in found.verdicts if v.name == "differentiable")
    assert verdict.outcome is Outcome.failed
    assert "f in y: 0 against " in verdict.found
    assert "g in" not in verdict.found
    assert "write f in torch operations" in verdict.remedy
    assert [name for name, why in found.estimators.items() if not why] == ["finite-difference"]


def test_an_f_detached_from_x_fails() -> None:
    found = check(BilevelProblem(lambda x, y: sound_f(x, y) + x.detach().square().sum(), sound_g), X, Y0)
    assert "f in x: 0 against " in next(v.found for v in found.verdicts if v.outcome is Outcome.failed)


@pytest.mark.parametrize(
    "g", [lambda x, y: sound_g(x, y.detach()), lambda x, y: sound_g(x, y).detach(), by_item(sound_g)]
)
def test_a_detached_g_is_not_taken_for_one_without_curvature(g: Objective) -> None:
    found = check(BilevelProblem(sound_f, g), X, Y0)
    assert [v.name for v in found.verdicts] == ["values", "same value twice", "differentiable"]
    assert "g in y: 0 against " in found.verdicts[-1].found
    assert "write g in torch operations" in found.verdicts[-1].remedy
    assert all("derivative of g in y" in why for why in found.estimators.values())


def test_a_derivative_that_changes_within_the_difference_is_not_called_wrong() -> None:
    assert not slope(lambda t: math.atan(1e9 * t), 1e9, 1.0, torch.float64).wrong
    assert not slope(lambda t: max(t, 0.0), 1.0, 1.0, torch.float64).smooth
    assert slope(lambda t: 1e6 + 1e-9 * t, 0.0, 1.0, torch.float64).wrong is False  # lost in the rounding


@pytest.mark.parametrize("constant", [torch.tensor(1.0), torch.tensor(1e12)])
def test_a_constant_f_is_sound(constant: Tensor) -> None:
    assert check(BilevelProblem(lambda x, y: constant, sound_g), X, Y0).ok
    assert check(BilevelProblem(lambda x, y: sound_f(x, y) + constant, sound_g), X, Y0).ok


def test_a_term_of_g_in_a_detached_x_only_is_sound() -> None:
    found = check(BilevelProblem(sound_f, lambda x, y: sound_g(x, y) + x.detach().square().sum()), X, Y0)
    assert found.ok
    assert outcome(found, "hypergradient") is Outcome.passed


def test_an_x_that_is_detached_in_part_of_g_makes_the_hypergradient_wrong() -> None:
    g = lambda x, y: (y - x).square().sum() + (y - x.detach()).square().sum()  # noqa: E731
    assert outcome(check(BilevelProblem(sound_f, g), X, Y0), "hypergradient") is Outcome.failed


def test_a_kink_is_a_note_not_a_failure() -> None:
    rough = check(BilevelProblem(lambda x, y: y.abs().sum(), lambda x, y: sound_g(x, y) + y.abs().sum()), X, X)
    assert outcome(rough, "differentiable") is not Outcome.failed
    kink = slope(lambda t: abs(t), 0.0, 1.0, torch.float64)
    assert not kink.smooth
    assert kink.order == pytest.approx(1.0, abs=0.05)


def test_a_remainder_of_second_order_is_smooth() -> None:
    assert slope(lambda t: (1 + t) ** 4, 4.0, 1.0, torch.float64).order == pytest.approx(2.0, abs=0.1)
    assert slope(lambda t: 3 * t, 3.0, 1.0, torch.float64).smooth
    assert not slope(lambda t: (1 + t) ** 4, 4.1, 1.0, torch.float64).smooth


@pytest.mark.parametrize(
    ("g", "word"),
    [
        (lambda x, y: (y[0] - x[0]).square() + 0 * y[1], "no curvature"),
        (lambda x, y: ((y - x).square() - 1).square().sum(), "positive definite"),
        (lambda x, y: (y - x).square().sum() * 1e-3 + 1e4 * (y.sum() - x.sum()).square(), "condition number 2e+07"),
    ],
)
def test_the_curvature_at_the_solution_is_judged(g: Callable[[Tensor, Tensor], Tensor], word: str) -> None:
    found = check(BilevelProblem(sound_f, g), X, Y0)
    assert word in next(v.found for v in found.verdicts if v.name == "curvature")


def test_without_a_strict_minimum_definite_solvers_do_not_apply() -> None:
    found = check(BilevelProblem(sound_f, lambda x, y: (y.sum() - x.sum()).square()), X, Y0)
    assert not found.ok
    assert "not positive definite" in found.estimators["aid-cg"]
    assert not found.estimators["aid-minres"]


def test_y_that_does_not_depend_on_x_is_found() -> None:
    found = check(BilevelProblem(sound_f, lambda x, y: (y - x.detach()).square().sum()), X, Y0)
    verdict = next(v for v in found.verdicts if v.name == "y depends on x")
    assert found.dependence == "none"
    assert verdict.outcome is Outcome.failed
    assert "grad_y g changes with x, but its derivative in x is zero to autograd" in verdict.found
    assert [name for name, why in found.estimators.items() if not why] == ["esj", "finite-difference"]
    absent = check(BilevelProblem(sound_f, lambda x, y: (y - 1).square().sum() + x.sum()), X, Y0)
    assert "not at all" in next(v.found for v in absent.verdicts if v.name == "y depends on x")
    assert all("needs no estimator" in why for why in absent.estimators.values())


def test_y_that_depends_on_x_through_its_start_only_is_found() -> None:
    problem = BilevelProblem(sound_f, lambda x, y: (y - 1).square().sum(), init=lambda x: x)
    found = check(problem, X, Y0)
    assert found.dependence == "start"
    assert found.estimators["aid-cg"]
    assert found.estimators["penalty"]
    assert not found.estimators["itd"]
    assert check(BilevelProblem(sound_f, sound_g, init=lambda x: x), X, Y0).dependence == "both"


def test_where_y_depends_on_x_through_its_start_only_g_needs_no_strict_minimum() -> None:
    def flat(x: Tensor, y: Tensor) -> Tensor:
        return (y.sum() - 1).square()

    found = check(BilevelProblem(sound_f, flat, init=lambda x: x), X, Y0)
    assert outcome(found, "curvature") is Outcome.warning
    assert found.ok
    assert not found.estimators["itd"]


def test_an_operation_without_a_second_derivative_is_named() -> None:
    problem = BilevelProblem(sound_f, lambda x, y: torch.cdist(y[None], x[None]).square().sum())
    found = check(problem, X, Y0)
    verdict = next(v for v in found.verdicts if v.name == "second derivatives")
    assert "cdist" in verdict.found
    assert "FiniteDifferences" in verdict.remedy
    assert "second derivative" in found.estimators["aid-cg"]
    assert not found.estimators["penalty"]


def exponential(cut_off: bool) -> Any:
    """exp as a custom function, whose backward keeps its output in the graph or outside of it."""

    class Exponential(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = x.exp()
            ctx.save_for_backward(y.clone() if cut_off else y)
            return y

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            return g * ctx.saved_tensors[0]

    return Exponential.apply


@pytest.mark.parametrize("cut_off", [True, False])
def test_a_term_that_a_custom_function_drops_from_the_second_derivative_is_found(cut_off: bool) -> None:
    exp = exponential(cut_off)
    found = check(BilevelProblem(sound_f, lambda x, y: exp(y).sum() + sound_g(x, y)), X, Y0)
    verdict = next(v for v in found.verdicts if v.name == "second derivatives")
    assert verdict.outcome is (Outcome.failed if cut_off else Outcome.passed)
    assert not cut_off or ("by differences of gradients" in verdict.found and "drops a term" in verdict.remedy)
    assert bool(found.estimators["aid-cg"]) is cut_off and not found.estimators["penalty"]


def test_the_second_derivative_of_a_network_with_kinks_is_right() -> None:
    net = bilevel.functional(
        torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)).double()
    )
    inputs = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    problem = BilevelProblem(
        lambda x, y: net(y, inputs).square().mean(),
        lambda x, y: (net(y, inputs) - 1).square().mean() + x.exp() * sum(leaf.square().sum() for leaf in y.values()),
    )
    assert outcome(check(problem, torch.tensor(0.0), dict(net.params)), "second derivatives") is Outcome.passed


def test_a_value_that_is_not_finite_or_raises_is_the_only_verdict() -> None:
    assert [v.name for v in check(BilevelProblem(lambda x, y: y.sum() / 0, sound_g), X, Y0).verdicts] == ["values"]
    raising = check(BilevelProblem(sound_f, lambda x, y: y @ torch.ones(5)), X, Y0)
    assert not raising.ok
    assert "g raised RuntimeError" in raising.verdicts[0].found
    assert all("must run, and be finite" in why for why in raising.estimators.values())


def test_an_unbounded_inner_problem_is_not_called_solved() -> None:
    found = check(BilevelProblem(sound_f, lambda x, y: (y * x).sum()), X, Y0)
    assert outcome(found, "inner solution") is Outcome.failed


def test_uneven_scales_are_noted() -> None:
    found = check(BilevelProblem(sound_f, sound_g), torch.tensor([1e-9, 1.0]), Y0)
    assert outcome(found, "scales") is Outcome.warning


def test_tasks_are_checked_together() -> None:
    problem = BilevelProblem(
        lambda x, y, t: (y - t).square().sum(), lambda x, y, t: (y - x * t).square().sum(), tasks=True
    )
    data = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    found = check(problem, torch.tensor(2.0), torch.zeros(2), data=data)
    assert found.ok, str(found)


def test_a_check_is_plain_data_and_readable() -> None:
    found = check(BilevelProblem(sound_f, sound_g), X, Y0)
    assert found.as_dict()["ok"] is True
    assert {v["name"] for v in found.as_dict()["verdicts"]} >= {"values", "curvature", "hypergradient"}
    assert "estimators that apply: implicit, aid-cg" in str(found)


def test_a_check_leaves_its_arguments_alone() -> None:
    x, y = X.clone().requires_grad_(), Y0.clone().requires_grad_()
    check(BilevelProblem(sound_f, sound_g), x, y)
    assert x.grad is None
    assert y.grad is None
    assert torch.equal(x.detach(), X)


A = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGET = A @ torch.tensor([3.0, -2.0, 0.01], dtype=torch.float64)
WEIGHT, Y3 = torch.tensor(0.1, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)


def lasso(shift: float) -> BilevelProblem:
    def f(x: Tensor, y: Tensor) -> Tensor:
        return (y - 1).square().sum()

    def g(x: Tensor, y: Tensor) -> Tensor:
        return (A @ y - TARGET - shift * x).square().sum() / 2

    return BilevelProblem(f, g, prox=lambda x: L1(x.exp()))


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_x_in_a_non_smooth_term_is_seen_and_its_gradient_is_that_of_the_differences(shift: float) -> None:
    found = check(lasso(shift), WEIGHT, Y3)
    assert found.ok, str(found)
    assert found.dependence == "inner objective"
    assert outcome(found, "hypergradient") is Outcome.passed
    assert [name for name, why in found.estimators.items() if why] == ["first-order"]


def test_a_weight_that_is_detached_from_x_fails() -> None:
    smooth = lasso(0.0)
    problem = BilevelProblem(smooth.f, smooth.g, prox=lambda x: L1(x.detach().exp()))
    assert outcome(check(problem, WEIGHT, Y3), "graphs") is Outcome.failed


def test_a_non_smooth_term_needs_no_curvature_off_its_support() -> None:
    twice = torch.stack([A[:, 0], A[:, 1], 0 * A[:, 0]], dim=1)  # a column of zeros: H is singular
    problem = BilevelProblem(sound_f, lambda x, y: (twice @ y - TARGET).square().sum() / 2, prox=lambda x: L1(x.exp()))
    found = check(problem, WEIGHT, Y3)
    assert found.ok, str(found)
    assert not found.estimators["aid-cg"]


def test_constraints_are_checked_alike_whichever_way_they_are_given() -> None:
    def nonnegative(x: Tensor) -> Polytope:
        return Polytope(lower=0.0)

    x, y0 = torch.tensor([1.0, -2.0]), torch.zeros(2)
    given = check(BilevelProblem(sound_f, sound_g, constraints=nonnegative), x, y0)
    held = check(BilevelProblem(sound_f, inner=LinearlyConstrained(sound_g, nonnegative)), x, y0)
    assert given.ok, str(given)
    assert given.as_dict() == held.as_dict()


ITERATIONS = {
    "iterative": BilevelProblem(sound_f, sound_g, iterative=True),
    "steps on g": BilevelProblem(
        sound_f, inner=Iteration(lambda x, y, gradient, k: y - gradient / 10, steps=3, objective_function=sound_g)
    ),
    "no g": BilevelProblem(sound_f, inner=Iteration(lambda x, y, k: y / 2 + x, steps=3)),
}


@pytest.mark.parametrize("name", ITERATIONS)
def test_an_iteration_is_sound_and_its_steps_are_differentiated(name: str) -> None:
    found = check(ITERATIONS[name], X, Y0)
    assert found.ok, str(found)
    assert found.dependence == "inner objective"
    assert "through its steps" in str(found)
    assert [each for each, why in found.estimators.items() if not why] == [
        "itd",
        "itd-truncated",
        "itd-forward",
        "itd-checkpointed",
        "one-step",
        "esj",
        "finite-difference",
    ]


def test_steps_that_do_not_see_x_and_steps_that_raise_are_found() -> None:
    blind = check(BilevelProblem(sound_f, inner=Iteration(lambda x, y, k: y / 2, steps=3)), X, Y0)
    assert blind.dependence == "none"
    assert "the steps do not change with x" in str(blind)
    broken = check(BilevelProblem(sound_f, inner=Iteration(lambda x, y, k: y @ torch.ones(5), steps=3)), X, Y0)
    assert not broken.ok
    assert broken.verdicts[-1].found.startswith("the inner problem raised RuntimeError")


def test_an_equation_without_a_g_is_checked_by_its_solution() -> None:
    rotation = torch.tensor([[0.0, 0.5], [-0.4, 0.1]]).double()
    problem = BilevelProblem(sound_f, inner=FixedPoint(lambda x, y: rotation @ y + x.sin()))
    found = check(problem, X.double(), Y0.double())
    assert found.ok, str(found)
    assert found.dependence == "inner objective"
    assert not found.estimators["aid-gmres"]
    assert "y is a fixed point" in found.estimators["aid-cg"]
    assert "y is a fixed point" in found.estimators["penalty"]
