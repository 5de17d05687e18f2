"""Recipes for networks: distillation, replay, a representation by forward passes.

The gates, on digits, five seeds each: `pytest -m slow tests/test_network_recipes_b.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import ESJ, Instance, hypergradient, minimize
from bilevel._tree import ravel
from bilevel.commands.plan import _KNOWN
from bilevel.outer.batches import first_batch
from bilevel.problems import distillation, replay, representation
from bilevel.problems.networks._loaders import Initializations, Shuffled
from bilevel.problems.networks._networks import Made
from bilevel.problems.networks.replay import Greedy
from bilevel.solvers.closed_form import ClosedForm

pytest.importorskip("sklearn")
DATA = torch.randn(48, 3, generator=torch.Generator().manual_seed(0)), torch.arange(48) % 4


def noisy() -> nn.Sequential:
    """With what a module in train mode does at each call otherwise."""
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 4))


def distilled(**options: Any) -> Instance:
    given: dict[str, Any] = {
        "inner_steps": 3,
        "networks": 2,
        "batch": 8,
        "n_train": 32,
        "data": DATA,
        "max_steps": 4,
        "double": True,
    }
    return distillation(**given | options)


def replayed(**options: Any) -> Instance:
    given: dict[str, Any] = {
        "inner_steps": 3,
        "n_train": 32,
        "learner_steps": 5,
        "batch": 4,
        "data": DATA,
        "double": True,
    }
    return replay(**given | options)


def represented(**options: Any) -> Instance:
    given: dict[str, Any] = {
        "width": 3,
        "features": 2,
        "support": 12,
        "batch": 8,
        "n_train": 24,
        "n_val": 12,
        "max_steps": 3,
    }
    return representation(**given | {"data": DATA, "double": True} | options)


SMALL: dict[str, Callable[..., Instance]] = {
    "distillation": distilled,
    "replay": replayed,
    "representation": represented,
}


def slopes(instance: Instance, estimator: Any, x: Tensor, v: Tensor, step: float) -> tuple[float, float]:
    """<h, v>, and the central difference of Phi along v, on the first batch."""
    structure, data = ravel(instance.x0)[1], first_batch(instance.settings["data"])

    def at(x: Tensor) -> Any:
        return hypergradient(instance.problem, structure.unravel(x), instance.y0, estimator=estimator, data=data)

    found = ravel(at(x).grad)[0] @ v
    return float(found), float(at(x + step * v).value - at(x - step * v).value) / (2 * step)


@pytest.mark.parametrize("name", ["distillation", "replay"])
@pytest.mark.parametrize("network", [None, noisy])
def test_hypergradients_are_those_of_the_steps(name: str, network: Any) -> None:
    instance = SMALL[name](network=network)
    generator = torch.Generator().manual_seed(3)
    x = ravel(instance.x0)[0] + 0.1 * torch.rand(ravel(instance.x0)[0].shape, generator=generator).double()
    v = torch.randn(x.shape, generator=generator).double()
    found, truth = slopes(instance, instance.settings["estimator"], x, v, 1e-5)
    assert abs(truth) > 1e-3
    assert found == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("network", [None, lambda: nn.Sequential(*list(noisy().children())[:3])])
def test_a_representation_s_hypergradient_is_that_of_a_head_which_follows(network: Any) -> None:
    """As many orthonormal directions as weights: the estimate is Phi's derivative but for the radius."""
    instance = represented(network=network)
    x = ravel(instance.x0)[0]
    esj = instance.settings["estimator"]
    assert isinstance(esj.inner, ClosedForm)
    whole = ESJ(esj.inner, len(x), 1e-5, "orthonormal")
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()
    found, truth = slopes(instance, whole, x, v, 1e-5)
    assert abs(truth) > 1e-3
    assert found == pytest.approx(truth, rel=1e-4)


def test_the_head_is_the_minimizer_of_its_ridge_regression() -> None:
    instance = represented()
    data = first_batch(instance.settings["data"])
    found = hypergradient(
        instance.problem, instance.x0, instance.y0, estimator=instance.settings["estimator"], data=data
    )
    z = instance.problem.encode(instance.x0, data.g)  # type: ignore[misc]
    y = found.y.clone().requires_grad_()
    slope = torch.autograd.grad(instance.problem.g(z, y, data.g), y)[0]
    assert float(slope.norm()) <= 1e-13


@pytest.mark.parametrize("name", SMALL)
def test_a_short_run_takes_its_steps_the_same_way_again(name: str) -> None:
    """Also after another run of the same instance, whose loaders have then been read; global numbers are untouched."""
    instance = SMALL[name]()
    assert set(instance.settings) <= _KNOWN
    state = torch.get_rng_state()
    runs = [minimize(instance.problem, instance.x0, instance.y0, **instance.settings) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*(ravel(run.x)[0] for run in runs))
    assert not torch.equal(ravel(runs[0].x)[0], ravel(instance.x0)[0])
    assert instance.metrics is not None
    told = instance.metrics(runs[0].x, runs[0].y)
    assert all(0 <= value <= 1 for key, value in told.items() if key.startswith(("test_accuracy", "accuracy")))
    assert told == SMALL[name]().metrics(runs[0].x, runs[0].y)  # type: ignore[misc]


def test_a_selection_adds_the_sample_of_least_slope_of_each_class_in_turn() -> None:
    groups = torch.tensor([[0, 0, 1, 1, -1, -1], [0, 0, 1, 1, 2, -1]])
    grad = torch.tensor([[3.0, 1.0, -1.0, -2.0, -9.0, -9.0], [0.0, 1.0, 5.0, 4.0, 7.0, -9.0]]).reshape(-1)
    greedy = Greedy(groups)
    once, _ = greedy.step(grad, torch.zeros(12), {})
    assert once.reshape(2, 6).tolist() == [[0, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0]]
    twice, _ = greedy.step(grad, once, {})
    assert twice.reshape(2, 6).tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert torch.equal(greedy.step(grad, twice, {})[0], twice)


def test_a_run_chooses_as_many_samples_of_each_earlier_class_as_were_asked_for_and_none_of_a_later_one() -> None:
    X, labels = torch.randn(70, 3, generator=torch.Generator().manual_seed(1)), torch.arange(70) % 6
    instance = replayed(data=(X, labels), n_train=60, memory=2)
    x = minimize(instance.problem, instance.x0, instance.y0, **instance.settings).x
    groups = instance.settings["outer"].groups
    for t, (row, group) in enumerate(zip(x, groups, strict=True), start=1):
        assert torch.bincount(group[row > 0]).tolist() == [2] * (2 * t)


def test_batches_go_through_all_samples_each_epoch_and_do_not_depend_on_what_was_drawn_before() -> None:
    batches = list(Shuffled(10, 5, seed=3, batches=6))
    assert [sorted(batches[k] + batches[k + 1]) for k in (0, 2, 4)] == [list(range(10))] * 3
    assert batches[:2] != batches[2:4]
    torch.rand(5)
    assert list(Shuffled(10, 5, seed=3, batches=6)) == batches
    assert list(Shuffled(10, 5, seed=4, batches=6)) != batches


def test_initializations_are_those_of_their_seeds() -> None:
    starts = Initializations(Made(None, (3, 2, 2), torch.float64), first=7)
    torch.manual_seed(8)
    expected = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double().state_dict()
    assert all(torch.equal(starts[1][name], value) for name, value in expected.items())
    assert not torch.equal(starts[0]["0.weight"], starts[1]["0.weight"])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: distilled(networks=40), "at least as many training samples as networks"),
        (lambda: distilled(inner_steps=0), r"distillation\(inner_steps=...\)` must be"),
        (lambda: replayed(data=(DATA[0], DATA[1] % 2)), "at least 3 classes"),
        (lambda: represented(radius=-1.0), r"representation\(radius=...\)` must be positive"),
    ],
)
def test_what_cannot_be_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", SMALL)
def test_a_network_is_made_by_a_function(name: str) -> None:
    with pytest.raises(TypeError, match=r"`network=` must make a torch.nn.Module. Got int"):
        SMALL[name](network=lambda: 3)


@pytest.mark.parametrize("name", SMALL)
def test_pictures_are_drawn(name: str) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    instance = SMALL[name](data=(torch.rand(48, 16), DATA[1]))
    assert instance.plot is not None
    instance.plot(figure, instance.x0, instance.y0)
    assert len(figure.axes) >= 2


# --- the gates


def result(instance: Instance) -> dict[str, float]:
    solution = minimize(instance.problem, instance.x0, instance.y0, **instance.settings)
    assert instance.metrics is not None
    return dict(instance.metrics(solution.x, solution.y))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_ten_synthetic_digits_train_fresh_networks_to_four_fifths(seed: int) -> None:
    found = result(distillation(seed=seed))
    assert found["test_accuracy_least"] >= 0.80
    assert found["test_accuracy"] > found["test_accuracy_real"]


@pytest.mark.slow
def test_less_is_forgotten_than_by_random_replay_of_the_same_size() -> None:
    found = [result(replay(seed=seed)) for seed in range(5)]
    gains = [each["forgetting_random"] - each["forgetting_learned"] for each in found]
    assert statistics.fmean(gains) > 0
    assert statistics.fmean(gains) > 2 * statistics.stdev(gains) / len(gains) ** 0.5
    assert statistics.fmean(each["accuracy_learned"] - each["accuracy_random"] for each in found) > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_ten_million_weights_learn_a_better_representation_than_they_began_with(seed: int) -> None:
    instance = representation(seed=seed)
    assert ravel(instance.x0)[0].numel() > 10_000_000
    found = result(instance)
    assert found["test_accuracy_learned"] > found["test_accuracy_initial"]
