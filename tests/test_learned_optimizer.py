"""Learning to optimize: steps, preconditioners and a network, learned through the steps they take.

`pytest -m slow tests/test_learned_optimizer.py` runs the gates.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import ITD, Checkpointed, Instance, Truncated, hypergradient, minimize
from bilevel._tree import ravel
from bilevel.problems.networks.learned_optimizer import LearnedOptimizer
from bilevel.problems.networks.learning_to_optimize import chebyshev, learning_to_optimize
from bilevel.problems.networks.optimizees import LogisticBatches, Quadratics, SmallNetworks
from bilevel.problems.networks.update_rules import AbstractRule, CoordinateLSTM, LearnedPreconditioner, LearnedSteps
from bilevel.solvers import OwnSteps

RULES: dict[str, AbstractRule] = {
    "step": LearnedSteps(3, start=(0.9, 0.2)),
    "layer": LearnedSteps(3, "layer", 0.3),
    "coordinate": LearnedSteps(3, "coordinate", 0.3),
    "preconditioner": LearnedPreconditioner(0.3),
    "lstm": CoordinateLSTM(hidden=3),
}
ON: dict[str, Any] = {
    "quadratics": Quadratics(size=3),
    "logistic": LogisticBatches(size=3, samples=8, batch=4),
    "networks": SmallNetworks(hidden=2, samples=8),
}


def estimate(own: LearnedOptimizer, x: Any, tasks: Any, form: Any = None) -> Any:
    y0 = own.start(tasks)[1]
    estimator = ITD(OwnSteps()) if form is None else ITD(OwnSteps(), form)
    return hypergradient(own.problem, x, y0, estimator=estimator, data=tasks)


def along(own: LearnedOptimizer, x: Any, tasks: Any) -> tuple[float, float]:
    """The derivative along a direction, by the hypergradient and by differences."""
    vector, structure = ravel(x)
    direction = torch.randn(vector.shape, generator=torch.Generator().manual_seed(4))
    h = 1e-5
    up, down = (estimate(own, structure.unravel(vector + s * h * direction), tasks).value for s in (1, -1))
    return float(ravel(estimate(own, x, tasks).grad)[0] @ direction), (up - down) / (2 * h)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("on", ON)
def test_gradients_in_the_parameters_of_a_rule_are_those_of_differences(rule: str, on: str) -> None:
    own = LearnedOptimizer(RULES[rule], ON[on].loss, steps=3, coefficients=(0.5, 0.0, 2.0), logarithm=on != "logistic")
    tasks = ON[on].sample(2, 0)
    found, expected = along(own, own.start(tasks)[0], tasks)
    assert found == pytest.approx(expected, rel=2e-6, abs=1e-9) and abs(found) > 1e-6


def test_steps_on_a_quadratic_are_the_product_of_their_factors() -> None:
    """f = |prod_k (1 - s_k a) u|^2 / |u|^2, and its derivative in log s_j."""
    own, tasks = LearnedOptimizer(RULES["step"], Quadratics.loss, steps=3), ON["quadratics"].sample(4, 1)
    x0 = own.start(tasks)[0]
    log_steps = x0["all"].clone().requires_grad_()
    factors = 1 - tasks["curvature"].unsqueeze(-1) * log_steps.exp()
    u = tasks["start"]["u"]
    value = ((factors.prod(-1) * u).square().sum(1) / u.square().sum(1)).mean()
    found = estimate(own, x0, tasks)
    assert found.value == pytest.approx(float(value.detach()), rel=1e-12)
    torch.testing.assert_close(found.grad["all"], torch.autograd.grad(value, log_steps)[0])


def test_a_trajectory_is_what_the_problem_sees_and_goes_on_beyond_it() -> None:
    for on, source in ON.items():
        for name, rule in RULES.items():
            own, tasks = LearnedOptimizer(rule, source.loss, steps=3), source.sample(2, 2)
            x0 = own.start(tasks)[0]
            losses = own.trajectory(x0, tasks, 5)
            assert losses.shape == (2, 6) and not losses.requires_grad, (on, name)
            assert float(losses[:, 3].mean()) == pytest.approx(estimate(own, x0, tasks).value, rel=1e-10)


def test_coefficients_of_the_steps_sum_the_losses_along_the_way() -> None:
    own = LearnedOptimizer(RULES["layer"], SmallNetworks.loss, steps=3, coefficients=(1.0, 0.0, 3.0))
    tasks = ON["networks"].sample(3, 0)
    x0 = own.start(tasks)[0]
    losses = own.trajectory(x0, tasks, 3)
    assert estimate(own, x0, tasks).value == pytest.approx(float((losses[:, 1] + 3 * losses[:, 3]).mean()), rel=1e-10)


def test_a_loss_that_is_zero_has_a_finite_logarithm() -> None:
    own = LearnedOptimizer(LearnedSteps(1, start=1.0), Quadratics.loss, steps=1, logarithm=True)
    tasks = {"start": {"u": torch.ones(1, 1)}, "curvature": torch.ones(1, 1)}
    found = estimate(own, own.start(tasks)[0], tasks)
    assert math.isfinite(found.value) and bool(found.grad["all"].isfinite().all())


def test_a_window_of_all_steps_is_the_whole_and_a_shorter_one_knows_the_last_steps_only() -> None:
    own, tasks = LearnedOptimizer(RULES["step"], Quadratics.loss, steps=3), ON["quadratics"].sample(4, 1)
    x0 = own.start(tasks)[0]
    whole = estimate(own, x0, tasks).grad["all"]
    torch.testing.assert_close(estimate(own, x0, tasks, Truncated(3)).grad["all"], whole)
    torch.testing.assert_close(estimate(own, x0, tasks, Checkpointed()).grad["all"], whole)
    last = estimate(own, x0, tasks, Truncated(1)).grad["all"]
    assert torch.equal(last[:2], torch.zeros(2))
    torch.testing.assert_close(last[2], whole[2])  # the last step's own derivative


def test_first_order_leaves_out_how_gradients_move_with_their_point() -> None:
    """u_2 = (1 - s_2 a)(1 - s_1 a) u: with gradients held, d u_2 / d s_1 = -a u."""
    tasks = {"start": {"u": torch.tensor([[1.0]])}, "curvature": torch.tensor([[0.5]])}

    def loss(point: dict[str, Tensor], task: Any, number: Tensor) -> Tensor:
        return torch.where(number < 0, point["u"].sum(), (task["curvature"] * point["u"].square()).sum() / 2)

    own = LearnedOptimizer(LearnedSteps(2, start=0.4), loss, steps=2, first_order=True)
    found = estimate(own, own.start(tasks)[0], tasks).grad["all"]
    torch.testing.assert_close(found, 0.4 * torch.tensor([-0.5, -0.5 * (1 - 0.4 * 0.5)]))


def test_a_gradient_step_sees_a_batch_of_its_own_and_f_sees_them_all() -> None:
    source = ON["logistic"]
    task = {name: each[0] for name, each in source.sample(1, 0).items() if name != "start"}
    point = {"u": torch.tensor([0.3, -0.2, 0.5])}
    parts = [float(source.loss(point, task, torch.tensor(k))) for k in range(3)]
    assert parts[0] == parts[2] != parts[1]
    whole = float(source.loss(point, task, torch.tensor(-1)))
    assert whole + float(task["least"]) == pytest.approx((parts[0] + parts[1]) / 2)
    tasks = source.sample(5, 0)
    start = {"u": torch.zeros(3)}
    above = [float(source.loss(start, {k: v[i] for k, v in tasks.items() if k != "start"}, torch.tensor(-1)))
             for i in range(5)]  # fmt: skip
    assert min(above) > 0


def test_the_memory_of_the_network_makes_it_another_map_than_that_of_one_gradient() -> None:
    rule, point = CoordinateLSTM(hidden=3), {"u": torch.tensor([1.0, 1.0])}
    x = rule.parameters(point)
    first, memory = rule.step(x, point, {"u": torch.tensor([2.0, -2.0])}, rule.memory(point), 0)
    again, _ = rule.step(x, point, {"u": torch.tensor([2.0, -2.0])}, memory, 1)
    assert first["u"][0] != first["u"][1] and not torch.equal(first["u"], again["u"])
    tiny = {"u": torch.tensor([1e-9, 0.0], requires_grad=True)}
    moved = rule.step(x, point, tiny, rule.memory(point), 0)[0]["u"].sum()
    assert bool(torch.autograd.grad(moved, tiny["u"])[0].isfinite().all())


def test_chebyshev_steps_reach_the_optimum_of_the_worst_case() -> None:
    low, high = 0.05, 1.0
    root = math.sqrt(high / low)
    z = (root + 1) / (root - 1)
    curvatures = torch.linspace(low, high, 4001).unsqueeze(1)
    for count in (1, 3, 8):
        worst = (1 - curvatures * chebyshev(low, high, count)).prod(1).abs().max()
        assert float(worst) == pytest.approx(2 / (z**count + z**-count), rel=1e-10)


def small(**settings: Any) -> Instance:
    given: dict[str, Any] = {"max_steps": 2} | settings
    return learning_to_optimize(steps=2, batch=2, **given)


@pytest.mark.parametrize("on", ON)
def test_a_run_goes_on_to_the_bit_and_reports_longer_horizons(on: Any, tmp_path: Path) -> None:
    rule: Any = {"quadratics": "step", "logistic": "preconditioner", "networks": "lstm"}[on]
    whole, part = small(on=on, rule=rule, max_steps=4), tmp_path / "checkpoint.pt"
    expected = minimize(whole.problem, whole.x0, whole.y0, **whole.settings)
    first, second = small(on=on, rule=rule), small(on=on, rule=rule, max_steps=4)
    minimize(first.problem, first.x0, first.y0, **first.settings, checkpoint=part)
    found = minimize(second.problem, second.x0, second.y0, **second.settings, checkpoint=part, resume=True)
    assert torch.equal(ravel(found.x)[0], ravel(expected.x)[0])
    assert whole.metrics is not None
    metrics = whole.metrics(found.x, found.y)
    assert {f"{name}_{k}" for name in ("learned", "constant") for k in (2, 4, 10)} <= metrics.keys()
    assert ("chebyshev_2" in metrics) == (on == "quadratics") == ("worst_learned" in metrics)


def test_a_run_draws_its_picture() -> None:
    figures = pytest.importorskip("matplotlib.figure")
    instance, figure = small(truncate=1, summed=True), figures.Figure()
    assert instance.plot is not None
    instance.plot(figure, instance.x0, instance.y0)
    assert figure.axes[0].get_xlabel() == "steps"


def test_coefficients_are_one_for_each_step() -> None:
    with pytest.raises(ValueError, match="one for each of the 3 steps"):
        LearnedOptimizer(RULES["step"], Quadratics.loss, steps=3, coefficients=(1.0,))
    assert LearnedOptimizer(RULES["step"], Quadratics.loss, steps=1, coefficients=(1.0,)).coefficients == (1.0,)
    with pytest.raises(ValueError, match="whole batches"):
        LogisticBatches(samples=10, batch=4)
    with pytest.raises(ValueError, match="in order"):
        Quadratics(low=2.0, high=1.0)


# --- the gates


def solved(**settings: Any) -> dict[str, float]:
    instance = learning_to_optimize(**settings)
    solution = minimize(instance.problem, instance.x0, instance.y0, throw=False, **instance.settings)
    assert not solution.failed and instance.metrics is not None
    return dict(instance.metrics(solution.x, solution.y))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_learned_steps_beat_those_of_chebyshev_in_the_mean_and_not_in_the_worst_case(seed: int) -> None:
    found = solved(seed=seed)
    assert found["learned_8"] <= 0.05 * found["constant_8"]
    assert found["learned_8"] <= found["chebyshev_8"]
    assert found["worst_learned"] >= found["worst_chebyshev"]
