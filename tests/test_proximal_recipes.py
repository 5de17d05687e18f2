"""Recipes with proximal algorithms: what is learned is better than what was not, and linear programs are solved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import AID, hypergradient, minimize
from bilevel.problems import catalogue
from bilevel.problems.proximal import EnergyPlanning
from bilevel.solvers import GMRES, Adam, FixedPointIteration
from bilevel.terms import ADMM, PDHG, adjoint_gap, box, equal, inner, variable

F64 = torch.float64
SMALL: dict[str, dict[str, Any]] = {
    "compressed-sensing-mri": {"side": 16, "train": 2, "test": 3, "pictures": "synthetic"},
    "deraining": {"side": 16, "train": 2, "test": 3, "steps": 8, "pictures": "synthetic"},
    "joint-optics": {"side": 16, "train": 3, "test": 4, "pictures": "synthetic"},
    "learned-prior": {"side": 16, "train": 3, "test": 3, "batch": 3, "filters": 3, "size": 3, "pictures": "synthetic"},
}


def trained(name: str, outer_steps: int, **options: Any) -> tuple[Any, Any]:
    instance = catalogue()[name].build(**options)
    solution = minimize(
        instance.problem,
        instance.x0,
        instance.y0,
        estimator=instance.settings["estimator"],
        outer=instance.settings.get("outer") or Adam(instance.settings["outer_step"]),
        data=instance.settings.get("data"),
        max_steps=outer_steps,
        throw=False,
    )
    assert solution.status.name in ("successful", "steps_used_up")
    return instance, solution


def test_a_learned_schedule_of_five_steps_beats_the_best_constant_one_on_held_out_images() -> None:
    instance, solution = trained("deblurring", 80, pictures="synthetic")
    found = instance.metrics(solution.x, solution.y)
    assert found["PSNR learned"] >= found["PSNR best constant"] + 0.1
    assert found["PSNR best constant"] >= found["PSNR blurred"] + 5


@pytest.mark.parametrize("name", SMALL)
def test_what_is_learned_lowers_the_outer_objective_and_metrics_and_pictures_are_made(name: str) -> None:
    instance, solution = trained(name, 6, **SMALL[name])
    data = instance.settings.get("data")
    batch = None if data is None else data(0)  # the first again, for each step has one of its own

    def value(x: Any) -> float:
        estimator = instance.settings["estimator"]
        return hypergradient(instance.problem, x, instance.y0, estimator=estimator, data=batch, throw=False).value

    assert value(solution.x) < value(instance.x0)
    found = instance.metrics(solution.x, solution.y)
    assert all(value == value for value in found.values())
    figure_module: Any = pytest.importorskip("matplotlib.figure")
    figure = figure_module.Figure()
    instance.plot(figure, solution.x, solution.y)
    assert figure.axes or figure.subfigs


def test_batches_of_a_learned_prior_are_new_parts_and_functions_of_their_number() -> None:
    draws = catalogue()["learned-prior"].build(**SMALL["learned-prior"]).settings["data"]
    (truth, seen), (again, _), (other, _) = draws(3), draws(3), draws(4)
    assert torch.equal(truth, again) and not torch.equal(truth, other) and truth.shape == seen.shape == (3, 16, 16)


def test_held_out_images_for_choosing_and_for_testing_are_different_ones() -> None:
    metrics: list[Any] = [
        catalogue()["learned-prior"].build(held_out=name, **SMALL["learned-prior"]).metrics
        for name in ("validation", "test")
    ]
    chosen, test = (each.__self__ for each in metrics)
    assert torch.equal(chosen.truth, test.truth) and not torch.equal(chosen.test_truth, test.test_truth)


def test_the_schedule_is_learned_without_derivatives_too() -> None:
    instance = catalogue()["deblurring"].build(side=16, train=4, test=2, pictures="synthetic")
    solution = minimize(
        instance.problem, instance.x0, instance.y0, estimator="esj", outer=Adam(0.1), max_steps=15, throw=False
    )
    assert solution.history[-1].value < 0.9 * solution.history[0].value


# Linear programs


def test_a_dispatch_costs_what_it_does_for_highs_and_moves_as_finite_differences_of_it_do() -> None:
    pytest.importorskip("scipy")
    instance: Any = catalogue()["energy-planning"].build(hours=24)
    plan: EnergyPlanning = instance.metrics.__self__
    assert adjoint_gap(plan.balances()) < 1e-15
    x = instance.x0
    found = plan.scheme(x).solve(instance.y0["y"], tol=1e-9, max_steps=10_000, every=50)
    assert found.status.ok
    metrics = instance.metrics(x, found.state)
    assert abs(metrics["cost over that of HiGHS - 1"]) <= 1e-6 and metrics["largest violation, MW"] <= 1e-4
    estimator = AID(FixedPointIteration(5000, tol=1e-6), GMRES(1e-8, max_steps=400))
    grad = hypergradient(instance.problem, x, found.state, estimator=estimator).grad
    build = torch.tensor([300.0, 900.0], dtype=F64)

    def value(x: Tensor) -> float:
        return float(build @ x.exp() + plan.highs(x)) / 1000

    for k in range(2):
        d = torch.zeros(2, dtype=F64)
        d[k] = 1e-3
        assert float(grad[k]) == pytest.approx((value(x + d) - value(x - d)) / 2e-3, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_random_linear_programs_cost_what_they_do_for_highs(seed: int) -> None:
    optimize: Any = pytest.importorskip("scipy.optimize")
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(8, 20, generator=generator, dtype=F64)
    c, feasible = torch.randn(20, generator=generator, dtype=F64), torch.rand(20, generator=generator, dtype=F64)
    b = A @ feasible
    exact = optimize.linprog(c.numpy(), A_eq=A.numpy(), b_eq=b.numpy(), bounds=(0, 1), method="highs").fun
    y = variable(20)
    objective = inner(c, y) + box(y, 0.0, 1.0) + equal(A @ y - b)
    for algorithm in (ADMM(1.0), PDHG(0.3)):
        found = algorithm.on(objective).solve(torch.zeros(20, dtype=F64), tol=1e-7, max_steps=10_000, every=50)
        assert found.status.ok
        assert float(c @ found.y) == pytest.approx(exact, abs=1e-3 * (1 + abs(exact)))
        assert float((A @ found.y - b).abs().max()) <= 1e-4


def test_your_own_pictures_are_read_and_small_ones_refused(tmp_path: Any) -> None:
    np: Any = pytest.importorskip("numpy")
    path = tmp_path / "mine.npz"
    np.savez(path, images=np.linspace(0, 255, 6 * 20 * 20).reshape(6, 20, 20))
    build = catalogue()["deblurring"].build
    assert "mine.npz" in build(side=16, train=2, test=2, data=str(path)).description
    with pytest.raises(ValueError, match="at least 32 pixels"):
        build(side=32, train=2, test=2, data=str(path))
    image: Any = pytest.importorskip("PIL.Image")
    image.new("L", (50, 40), 128).save(tmp_path / "mine.png")
    assert build(side=16, train=2, test=2, data=str(tmp_path / "mine.png")).y0["y"].mean() == pytest.approx(0.5, 0.02)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("compressed-sensing-mri", {"share": 2.0}, r"`compressed_sensing_mri\(share=...\)`.*at most 1"),
        ("joint-optics", {"side": 8}, r"`joint_optics\(side=...\)` must be at least 15"),
    ],
)
def test_settings_that_a_recipe_cannot_have_are_named(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        catalogue()[name].build(**options)
