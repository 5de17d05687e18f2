"""Settings of an optimizer that are functions of x: hypergradients against differences of Phi, and who refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import (
    AID,
    ESJ,
    ITD,
    KKT,
    BilevelError,
    BilevelProblem,
    FiniteDifference,
    Penalty,
    check,
    compare,
    hypergradient,
    minimize,
)
from bilevel._optimizer import AbstractOptimizer
from bilevel._result import Status
from bilevel._tree import ravel
from bilevel.algorithms import SOBA, Descent
from bilevel.few_shot import OuterLoop
from bilevel.hypergrad import Certified, FirstOrder
from bilevel.hypergrad.unrolling.checkpointed import Checkpointed
from bilevel.hypergrad.unrolling.form import AbstractUnrolling
from bilevel.hypergrad.unrolling.forward import Forward
from bilevel.hypergrad.unrolling.reverse import Reverse
from bilevel.hypergrad.unrolling.truncated import Truncated
from bilevel.solvers import (
    CG,
    Adam,
    Armijo,
    Clipped,
    Cosine,
    GradientDescent,
    HeavyBall,
    Iterate,
    Nesterov,
    Scheduled,
    WeightDecay,
)

STEPS = 5
FORMS: list[AbstractUnrolling] = [Reverse(), Forward(), Checkpointed(), Truncated(STEPS)]

# x is {"log_step": (), "raw": (2,), "factors": (3,), "reg": ()}


def step(x: Any) -> Any:
    return 0.3 * x["log_step"].exp()


def first(x: Any) -> Any:
    return x["raw"][0].sigmoid()


def second(x: Any) -> Any:
    return x["raw"][1].sigmoid()


def by_layer(x: Any) -> Any:
    return {"w": step(x), "b": x["raw"].exp()[:1] / 10}  # of keys in another order than those of y


def by_layer_and_k(x: Any, k: int) -> Any:
    return {"w": step(x) * (x["factors"][0] * k).cos().square(), "b": x["raw"].exp()[:1] / (10 + k)}


def by_entry(x: Any) -> Any:
    return {"b": 0.2, "w": 0.1 * (x["raw"][0] * torch.arange(6.0).double()).sin().square().reshape(2, 3) + 0.1}


def factors(x: Any) -> Any:
    return x["factors"].exp()


LEARNED: dict[str, AbstractOptimizer] = {
    "step": GradientDescent(step),
    "step of each layer": GradientDescent(by_layer),
    "step of each entry": GradientDescent(by_entry),
    "clipped": Clipped(GradientDescent(step), max_norm=0.5),
    "heavy ball": HeavyBall(step, first),
    "momentum of heavy ball": HeavyBall(0.2, first),
    "nesterov": Nesterov(step, first),
    "step of nesterov": Nesterov(step),
    "momentum of nesterov by layer": Nesterov(0.2, lambda x: {"w": first(x), "b": 0.5}),
    "adam": Adam(step, first, second),
    "decay of adam's squares": Adam(0.1, beta2=second),
    "step of each layer and of k": GradientDescent(by_layer_and_k),
    "heavy ball of k": HeavyBall(lambda x, k: step(x) / (1 + k), lambda x, k: first(x) ** (k + 1)),
    "momentum of nesterov of k": Nesterov(0.2, lambda x, k: (x["raw"][0] - k).sigmoid()),
    "adam of k": Adam(lambda x, k: step(x) / (1 + first(x) * k), lambda x, k: (x["raw"][0] + k).sigmoid(), second),
    "weight decay of k": WeightDecay(GradientDescent(by_layer_and_k), lambda x, k: 0.1 * first(x) * (k % 2)),
    "schedule": Scheduled(GradientDescent(0.2), factors=factors),  # of fewer entries than there are steps
    "schedule of a learned momentum": Scheduled(HeavyBall(step, first), factors=factors),
    "schedule in k of a learned step": Scheduled(Adam(step), Cosine(STEPS)),
    "weight decay": WeightDecay(GradientDescent(0.2), lambda x: 0.2 * first(x)),
    "weight decay of adam": Scheduled(WeightDecay(Adam(step, first), second), factors=factors),
}

INPUTS = torch.tensor([[0.5, -1.0, 0.3], [1.5, 0.2, -0.4], [-0.7, 0.9, 1.1], [0.1, -0.3, 0.8]]).double()
TARGETS = torch.tensor([0.3, -0.8, 1.2, 0.4]).double()


def quadratic(x: Any, y: Any) -> Any:
    curvature = torch.linspace(0.5, 2.0, 6).double().reshape(2, 3)
    return (curvature * (y["w"] - 0.7).square()).sum() / 2 + (y["b"] - y["w"].sum() / 6 + x["reg"]).square().sum()


def network(x: Any, y: Any) -> Any:
    outputs = (INPUTS @ y["w"].T).tanh().sum(1) * y["b"].sum() + y["b"][0]
    return (outputs - TARGETS).square().mean() + x["reg"].exp() * y["w"].square().mean()


PROBLEMS = {
    name: BilevelProblem(
        lambda x, y: (y["w"].sin() + y["w"].square()).sum() + y["b"].square().sum() * (1 + x["reg"] ** 2), g
    )
    for name, g in (("quadratic", quadratic), ("network", network))
}


def start() -> tuple[Any, Any]:
    x = {
        "log_step": torch.tensor(-0.4),
        "raw": torch.tensor([0.3, -0.6]),
        "factors": torch.tensor([0.2, -0.3, 0.1]),
        "reg": torch.tensor(0.15),
    }
    y = {"w": torch.tensor([[0.2, -0.4, 0.9], [0.5, 1.3, -0.6]]), "b": torch.tensor([0.4, -0.7])}
    return {name: leaf.double() for name, leaf in x.items()}, {name: leaf.double() for name, leaf in y.items()}


def off(a: Any, b: Any) -> float:
    a, b = ravel(a)[0], ravel(b)[0]
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("g", PROBLEMS)
@pytest.mark.parametrize("name", LEARNED)
def test_every_form_of_itd_gives_the_slopes_of_phi_in_learned_settings(name: str, g: str) -> None:
    (x, y0), inner = start(), Iterate(LEARNED[name], STEPS)
    expected = hypergradient(PROBLEMS[g], x, y0, estimator=FiniteDifference(inner), throw=False)
    for form in FORMS:
        found = hypergradient(PROBLEMS[g], x, y0, estimator=ITD(inner, form))
        assert off(found.grad, expected.grad) <= 1e-6
        assert off(found.y, expected.y) <= 1e-14
    learned = sum(float(expected.grad[name].norm()) for name in ("log_step", "raw", "factors"))
    assert learned > 1e-3  # these occur in the settings alone


@pytest.mark.parametrize("name", ["step of each layer", "adam", "weight decay of adam", "adam of k"])
def test_esj_solves_each_perturbed_problem_with_its_own_settings(name: str) -> None:
    (x, y0), inner = start(), Iterate(LEARNED[name], STEPS)
    p = ravel(x)[0].numel()
    exact = hypergradient(PROBLEMS["quadratic"], x, y0, estimator=ITD(inner))
    for chunk in (None, 3):
        esj = ESJ(inner, directions=p, radius=1e-6, chunk=chunk)
        assert off(hypergradient(PROBLEMS["quadratic"], x, y0, estimator=esj).grad, exact.grad) <= 1e-4


def test_the_derivative_in_a_learned_step_is_that_of_its_closed_form() -> None:
    problem = BilevelProblem(lambda x, y: y, lambda x, y: y.square() / 2)  # y_N = (1 - x)^N y_0
    x, y0 = torch.tensor(0.3).double(), torch.tensor(2.0).double()
    inner = Iterate(GradientDescent(lambda x: x), 4)
    for estimator in (*(ITD(inner, form) for form in (Reverse(), Forward(), Checkpointed())), FiniteDifference(inner)):
        found = hypergradient(problem, x, y0, estimator=estimator)
        torch.testing.assert_close(found.grad, -4 * (1 - x) ** 3 * y0, rtol=1e-9, atol=0)
        torch.testing.assert_close(found.y, (1 - x) ** 4 * y0)


def test_a_setting_of_x_and_k_is_told_the_number_of_the_step() -> None:
    """On y^2 / 2: y_N = y_0 prod_k (1 - x c_k), whose last factors alone truncated unrolling sees."""
    problem = BilevelProblem(lambda x, y: y, lambda x, y: y.square() / 2)
    x, y0 = torch.tensor(0.3).double(), torch.tensor(2.0).double()
    c, told = [1.0, 0.5, 2.0, 1.5], list[int]()

    def of_step(x: Tensor, k: int) -> Tensor:
        told.append(k)
        return x * c[k]

    def expected(seen: int) -> Tensor:
        leaf = x.clone().requires_grad_()
        y = y0
        for k in range(4):
            y = y * (1 - (leaf if k >= 4 - seen else x) * c[k])
        return torch.autograd.grad(y, leaf)[0]

    inner = Iterate(GradientDescent(of_step), 4)
    for form, seen in ((Reverse(), 4), (Forward(), 4), (Checkpointed(), 4), (Truncated(2), 2)):
        found = hypergradient(problem, x, y0, estimator=ITD(inner, form))
        torch.testing.assert_close(found.grad, expected(seen), rtol=1e-12, atol=0)
        assert set(told) == {0, 1, 2, 3}
    found = hypergradient(problem, x, y0, estimator=FiniteDifference(inner))
    torch.testing.assert_close(found.grad, expected(4), rtol=1e-7, atol=0)
    esj = ESJ(inner, directions=1, radius=1e-6, distribution="rademacher")
    torch.testing.assert_close(hypergradient(problem, x, y0, estimator=esj).grad, expected(4), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="step of its optimizer is a function of x"):
        hypergradient(problem, x, y0, estimator=AID(inner, CG()))
    with pytest.raises(ValueError, match=r"GradientDescent\(step=function\)\(x, k\)` must return a number, or the"):
        hypergradient(problem, x, y0, estimator=ITD(Iterate(GradientDescent(lambda x, k: "long"), 4)))


def test_a_default_of_a_function_of_x_is_not_taken_for_the_number_of_the_step() -> None:
    x, y0 = start()
    scale = 0.3
    inner = Iterate(GradientDescent(lambda x, scale=scale: scale * x["log_step"].exp()), STEPS)
    found, expected = (
        hypergradient(PROBLEMS["network"], x, y0, estimator=ITD(each)).grad
        for each in (inner, Iterate(LEARNED["step"], STEPS))
    )
    assert off(found, expected) <= 1e-14


def test_truncated_unrolling_sees_the_settings_of_the_last_steps_alone() -> None:
    x, y0 = start()
    problem, descent = PROBLEMS["network"], LEARNED["step of each layer"]
    found = hypergradient(problem, x, y0, estimator=ITD(Iterate(descent, STEPS), Truncated(2)))
    before = hypergradient(problem, x, y0, estimator=ITD(Iterate(descent, STEPS - 2))).y
    last = hypergradient(problem, x, before, estimator=ITD(Iterate(descent, 2)))
    assert off(found.grad, last.grad) <= 1e-12


@pytest.mark.parametrize("tasks", [True, "loop"])
@pytest.mark.parametrize("name", ["step of each layer", "heavy ball", "schedule", "step of each layer and of k"])
def test_tasks_side_by_side_share_the_settings(name: str, tasks: Any) -> None:
    x, y0 = start()

    def g(x: Any, y: Any, task: Tensor) -> Any:
        return quadratic(x, y) + (task * y["w"]).sum()

    def f(x: Any, y: Any, task: Tensor) -> Any:
        return (y["w"] - task).square().sum() + y["b"].sum()

    data = torch.linspace(-1, 1, 3).double().reshape(3, 1, 1)
    inner = Iterate(LEARNED[name], STEPS)
    found = hypergradient(BilevelProblem(f, g, tasks=tasks), x, y0, data=data, estimator=ITD(inner))
    alone = [hypergradient(BilevelProblem(f, g), x, y0, data=task, estimator=ITD(inner)).grad for task in data]
    mean = sum(ravel(grad)[0] for grad in alone) / 3
    assert off(ravel(found.grad)[0], mean) <= 1e-12
    esj = ESJ(inner, directions=7, radius=1e-6)
    assert off(hypergradient(BilevelProblem(f, g, tasks=tasks), x, y0, data=data, estimator=esj).grad, mean) <= 1e-4


def test_with_an_encoding_settings_are_functions_of_what_g_is_given() -> None:
    x, y0 = start()
    inner = Iterate(GradientDescent(lambda z: z["step"]), STEPS)
    problem = BilevelProblem(
        lambda z, y: y["w"].sum() + y["b"].square().sum(),
        lambda z, y: quadratic(z, y),
        encode=lambda x: {"step": step(x), "reg": x["reg"]},
    )
    plain = BilevelProblem(lambda x, y: y["w"].sum() + y["b"].square().sum(), quadratic)
    expected = hypergradient(plain, x, y0, estimator=ITD(Iterate(GradientDescent(step), STEPS)))
    for estimator in (ITD(inner), FiniteDifference(inner)):
        assert off(hypergradient(problem, x, y0, estimator=estimator).grad, expected.grad) <= 1e-7


def test_steps_to_a_tolerance_are_differentiated_as_they_are_taken() -> None:
    x, y0 = start()
    inner = Iterate(GradientDescent(step), 500, tol=1e-3)
    found = hypergradient(PROBLEMS["quadratic"], x, y0, estimator=ITD(inner))
    again = Iterate(GradientDescent(step), found.stats.inner_steps)
    assert off(found.grad, hypergradient(PROBLEMS["quadratic"], x, y0, estimator=ITD(again)).grad) <= 1e-12
    assert [report.part for report in found.reports] == ["inner solver"]  # nothing is said of y*
    assert not inner.forgets_start and Iterate(GradientDescent(0.1), 500, tol=1e-3).forgets_start


def test_first_order_sees_learned_settings_with_gradients_held_constant() -> None:
    x, y0 = start()
    problem = BilevelProblem(PROBLEMS["network"].f, network, init=lambda x: {"w": y0["w"] + x["reg"], "b": y0["b"]})
    inner = Iterate(HeavyBall(step, first), 3)
    found = hypergradient(problem, x, y0, estimator=FirstOrder(inner))
    leaf = {name: entry.clone().requires_grad_() for name, entry in x.items()}
    y: Any = problem.init(leaf)  # type: ignore[misc]
    move = {name: torch.zeros_like(entry) for name, entry in y.items()}
    for _ in range(3):
        held = {name: entry.detach().requires_grad_() for name, entry in y.items()}
        gradients = torch.autograd.grad(network(x, held), list(held.values()))
        move = {n: first(leaf) * move[n] - step(leaf) * g for n, g in zip(y, gradients, strict=True)}
        y = {n: y[n] + move[n] for n in y}
    expected = torch.autograd.grad(problem.f(leaf, y), list(leaf.values()), allow_unused=True, materialize_grads=True)
    assert off(found.grad, dict(zip(leaf, expected, strict=True))) <= 1e-12


def test_a_setting_out_of_its_range_is_a_status_of_that_solve_alone() -> None:
    problem = BilevelProblem(lambda x, y: y.square() / 2, lambda x, y: (y - 1).square() / 2)
    y0 = torch.tensor(0.0).double()

    def found(make: Callable[[Any], AbstractOptimizer], x: float) -> Status:
        itd = ITD(Iterate(make(lambda x: x), 3))
        return hypergradient(problem, torch.tensor(x).double(), y0, estimator=itd, throw=False).status

    ranges: list[tuple[Callable[[Any], AbstractOptimizer], tuple[float, ...], tuple[float, ...]]] = [
        (GradientDescent, (0.0, 0.5), (-0.1, float("inf"))),
        (lambda s: HeavyBall(0.5, s), (0.0, 0.9), (-0.1, 1.0)),
        (lambda s: Nesterov(0.5, s), (0.0, 0.9), (-0.1, 1.0)),
        (lambda s: Adam(0.5, s), (0.0, 0.9), (-0.1, 1.0)),
        (lambda s: Adam(0.5, 0.5, s), (0.0, 0.9), (-0.1, 1.0)),
        (lambda s: Scheduled(GradientDescent(0.5), factors=s), (0.0, 1.5), (-0.1,)),
        (lambda s: WeightDecay(GradientDescent(0.5), s), (0.0, 1.0), (-0.1, 1.1)),
    ]
    for make, inside, outside in ranges:
        assert [found(make, x) for x in inside] == [Status.successful] * len(inside)
        assert [found(make, x) for x in outside] == [Status.nonfinite] * len(outside)
    with pytest.raises(BilevelError, match="NaN or Inf"):
        hypergradient(
            problem, torch.tensor(-1.0), torch.tensor(0.0), estimator=ITD(Iterate(GradientDescent(lambda x: x), 3))
        )
    # A perturbed solve on one side of x = 0 fails, and the others of its batch do not.
    esj = ESJ(Iterate(GradientDescent(lambda x: x), 3), directions=1, radius=1e-3, distribution="rademacher", seed=1)
    found_there = hypergradient(problem, torch.zeros(1).double(), y0, estimator=esj, throw=False)
    assert found_there.y == 0 and found_there.value == 0


# Who refuses


def constant(name: str) -> AbstractOptimizer:
    return HeavyBall(0.5, 0.2) if name == "heavy ball" else GradientDescent(0.4)


@pytest.mark.parametrize(
    "make",
    [
        lambda inner: AID(inner, CG()),
        lambda inner: KKT(inner),
        lambda inner: Penalty(inner, weight=1e3),
        lambda inner: Certified(AID(inner, CG()), target_error=1e-3),
    ],
    ids=["AID", "KKT", "Penalty", "Certified"],
)
@pytest.mark.parametrize("name", ["step", "heavy ball", "schedule", "weight decay"])
def test_implicit_estimators_refuse_learned_settings_and_no_constant_ones(name: str, make: Any) -> None:
    x, y0 = start()
    with pytest.raises(ValueError, match=r"of its optimizer (is a|are) functions? of x, so that y is what the steps"):
        hypergradient(PROBLEMS["quadratic"], x, y0, estimator=make(Iterate(LEARNED[name], 200, tol=1e-9)))
    steps = Iterate(constant(name), 2000, tol=1e-9)
    estimator = make(steps)
    if not isinstance(estimator, KKT):  # whose systems are those of constraints
        assert hypergradient(PROBLEMS["quadratic"], x, y0, estimator=estimator, throw=False).grad["reg"].isfinite()


def test_constant_weight_decay_is_refused_as_well_since_y_minimizes_another_function() -> None:
    x, y0 = start()
    with pytest.raises(ValueError, match="the weight decay of its optimizer is no part of g"):
        hypergradient(
            PROBLEMS["quadratic"], x, y0, estimator=AID(Iterate(WeightDecay(GradientDescent(0.2), 0.1), 9), CG())
        )
    itd = ITD(Iterate(WeightDecay(GradientDescent(0.2), 0.1), 9))
    difference = FiniteDifference(itd.inner)
    found, expected = (hypergradient(PROBLEMS["quadratic"], x, y0, estimator=e) for e in (itd, difference))
    assert off(found.grad, expected.grad) <= 1e-6


def test_what_moves_x_has_no_settings_that_are_functions_of_it() -> None:
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - x).square().sum())
    at = torch.zeros(2)
    with pytest.raises(ValueError, match=r"`minimize\(outer=...\)`: the step of `Adam` must be a number"):
        minimize(problem, at, at, outer=Adam(lambda x: 0.1))
    with pytest.raises(ValueError, match=r"`Descent\(outer=...\)`: the momentum of `HeavyBall`"):
        Descent(AID(Iterate(GradientDescent(0.1), 3), CG()), HeavyBall(0.1, lambda x: 0.1))
    with pytest.raises(ValueError, match=r"`OuterLoop\(optimizer=...\)`: the step of `Adam`"):
        OuterLoop(Clipped(Adam(lambda x: 0.1), max_norm=1.0))
    with pytest.raises(ValueError, match=r"`SOBA\(inner_step=...\)`: the step of `GradientDescent`"):
        minimize(problem, at, at, algorithm=SOBA(GradientDescent(lambda x: 0.1), 0.1, 0.1))
    with pytest.raises(ValueError, match=r"`GradientDescent\(step=...\)` is a function of x"):
        GradientDescent(lambda x: x).step(at, at, {})
    with pytest.raises(ValueError, match="finds the step length itself"):
        Iterate(GradientDescent(lambda x: x), 3, line_search=Armijo())


def test_settings_of_another_form_than_y_are_refused_with_both_forms() -> None:
    x, y0 = start()
    for wrong in (lambda x: {"w": 0.1}, lambda x: torch.ones(2).double(), lambda x: {"w": torch.ones(2), "b": 0.1}):
        with pytest.raises(ValueError, match=r"GradientDescent\(step=function\)\(x\)` must return a number, or the"):
            hypergradient(PROBLEMS["network"], x, y0, estimator=ITD(Iterate(GradientDescent(wrong), 2)))
    schedule = Scheduled(GradientDescent(0.1), factors=lambda x: 0.1)
    with pytest.raises(ValueError, match="one number for each step"):
        hypergradient(PROBLEMS["network"], x, y0, estimator=ITD(Iterate(schedule, 2)))
    for given in ({}, {"schedule": Cosine(3), "factors": factors}):
        with pytest.raises(ValueError, match="takes one of `schedule=`"):
            Scheduled(GradientDescent(0.1), **given)  # type: ignore[arg-type]


def test_what_is_said_of_the_minimizer_is_not_said_of_the_end_of_steps() -> None:
    x, y0 = start()
    itd = ITD(Iterate(GradientDescent(step), STEPS))
    found = hypergradient(PROBLEMS["quadratic"], x, y0, estimator=itd)
    assert found.error_estimate != found.error_estimate
    table = compare(PROBLEMS["quadratic"], x, y0, estimators={"learned": itd})
    assert "its Phi is another" in table.rows[0].reason
    report = check(PROBLEMS["quadratic"], x, y0, inner=itd.inner)
    assert "through its steps" in str(report)
    # x occurs in the settings only, and the derivative is zero by its numbers.
    only = BilevelProblem(lambda x, y: y.square(), lambda x, y: y.square())
    at = torch.tensor(0.1)
    assert hypergradient(only, at, 0 * at, estimator=ITD(Iterate(GradientDescent(lambda x: x), 2))).grad == 0
    with pytest.raises(ValueError, match="no path of any graph"):
        hypergradient(only, at, 0 * at, estimator=ITD(Iterate(GradientDescent(0.1), 2)))


def test_a_step_is_learned_by_gradient_descent_on_the_loss_after_training() -> None:
    """On |y|^2 / 2 with N steps the best step is 1."""
    problem = BilevelProblem(lambda x, y: y.square().sum() / 2, lambda x, y: y.square().sum() / 2)
    itd = ITD(Iterate(GradientDescent(lambda x: x.exp()), 3))
    found = minimize(problem, torch.tensor(-1.0).double(), torch.ones(2).double(), estimator=itd, max_steps=200)
    assert float(found.x.exp()) == pytest.approx(1.0, abs=0.1)
