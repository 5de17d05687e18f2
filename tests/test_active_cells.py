"""Augmented tasks, dropout with held masks, and asking for labels.

`pytest -m slow tests/test_active_cells.py` runs the gates.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bilevel import AID, Instance, functional, hypergradient, minimize
from bilevel._tree import ravel
from bilevel.few_shot import evaluate, train
from bilevel.problems import maml
from bilevel.problems.networks.active_cells import active_cells
from bilevel.problems.networks.marker_cells import Augmented, MarkerCells, flipped, permuted, turned
from bilevel.problems.networks.masked_dropout import MaskedDropout, acquire, bald, predictive_entropy
from bilevel.solvers import CG, Newton

SIDES = ("support", "query")


def probabilities(seed: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return (5 * torch.randn(6, 4, 3, generator=draws, dtype=torch.float64)).softmax(-1)


# --- what a network is unsure of


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_the_entropy_of_the_mean_is_at_least_the_mean_entropy(seed: int) -> None:
    p = probabilities(seed)
    assert float(bald(p).min()) >= -1e-12
    expected = -(p.mean(0) * p.mean(0).log()).sum(-1)
    torch.testing.assert_close(predictive_entropy(p), expected)
    within = torch.stack([-(each * each.log()).sum(-1) for each in p]).mean(0)
    torch.testing.assert_close(bald(p), expected - within)


def test_draws_that_agree_say_nothing_of_each_other_and_sure_ones_have_no_entropy() -> None:
    p = probabilities(0)[:1].expand(5, -1, -1)
    assert float(bald(p).abs().max()) <= 1e-12 < float(predictive_entropy(p).max())
    sure = torch.eye(3)[torch.tensor([[0, 1]])]
    assert predictive_entropy(sure).tolist() == [0.0, 0.0] == bald(sure).tolist()


# --- transforms


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_transforms_are_undone_by_their_inverses(seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    x, y = torch.randn(3, 2, 5, 4, 4, generator=draws), torch.randint(2, (3, 6), generator=draws)
    which = torch.rand(3, generator=draws) < 0.5
    assert torch.equal(flipped(flipped(y, which), which), y)
    assert torch.equal(flipped(y, which) != y, which.unsqueeze(1).expand_as(y))
    orders = torch.rand(3, 5, generator=draws).argsort(1)
    assert torch.equal(permuted(permuted(x, orders), orders.argsort(1)), x)
    for k in range(3):
        assert torch.equal(permuted(x, orders)[k, 1, 2], x[k, 1, orders[k, 2]])
    quarters = torch.randint(4, (3,), generator=draws)
    assert torch.equal(turned(turned(x, quarters), (4 - quarters) % 4), x)


class Marked(MarkerCells.__mro__[1]):  # type: ignore[name-defined,misc]
    """Images that say what was done to them: pixel (0, 0) of channel c is c, and the rest -1; labels 0, 1, ..."""

    def sample(self, count: int, seed: int) -> dict[str, Tensor]:
        x = torch.full((count, 4, 3, 2, 2), -1.0)
        x[..., 0, 0] = torch.arange(3.0)
        return {
            f"{side}_{part}": t.clone()
            for side in SIDES
            for part, t in (("x", x), ("y", torch.arange(4) % 2 + 0 * x[:, :, 0, 0, 0].long()))
        }


def test_what_is_done_to_a_support_set_is_done_to_the_query_set() -> None:
    batch = Augmented(Marked(), flip=0.5).sample(60, seed=0)
    assert torch.equal(batch["support_x"], batch["query_x"]) and torch.equal(batch["support_y"], batch["query_y"])
    assert torch.equal(batch["support_x"], batch["support_x"][:, :1].expand(-1, 4, -1, -1, -1))  # of the whole task
    places = (batch["support_x"][:, 0, 0].flatten(1) >= 0).int().argmax(1)
    assert set(places.tolist()) == {0, 1, 2, 3} and set(batch["support_y"][:, 0].tolist()) == {0, 1}
    orders = {tuple(int(v) for v in each.amax((-1, -2)).tolist()) for each in batch["support_x"][:, 0]}
    assert len(orders) == 6 and "support_mask" not in batch
    same = Augmented(Marked(), flip=0.0, permute=False, rotate=False).sample(9, seed=0)
    assert all(torch.equal(part, Marked().sample(9, 0)[name]) for name, part in same.items())


def test_support_sets_have_sizes_of_their_own_from_the_least_to_all() -> None:
    batch = Augmented(Marked(), least=2).sample(80, seed=0)
    assert set(batch["support_mask"].sum(1).tolist()) == {2.0, 3.0, 4.0}
    assert bool((batch["support_mask"].sort(1, descending=True).values == batch["support_mask"]).all())


def test_half_of_the_cells_of_a_task_are_of_its_kind_and_the_others_of_the_other_kinds() -> None:
    source = MarkerCells((1, 4, 0), shots=30, queries=40, noise=0.0)
    batch = source.sample(20, seed=0)
    kinds = batch["query_x"][:, :, 2:].sum((-1, -2)).argmax(-1)
    for k in range(20):
        own = set(kinds[k][batch["query_y"][k] == 1].tolist())
        assert len(own) == 1 and set(kinds[k][batch["query_y"][k] == 0].tolist()) == {0, 1, 4} - own
        assert int(batch["query_y"][k].sum()) == 20
    with pytest.raises(ValueError, match="two different numbers"):
        MarkerCells((1, 1))
    with pytest.raises(ValueError, match="two different numbers"):
        MarkerCells((1, 7))
    with pytest.raises(ValueError, match="flip"):
        Augmented(Marked(), flip=1.5)


# --- dropout with masks that are held


def own(rate: float = 0.3) -> MaskedDropout:
    torch.manual_seed(0)
    body = functional(nn.Sequential(nn.Linear(3, 6), nn.Tanh()).double())
    return MaskedDropout(body, functional(nn.Linear(6, 2).double()), 6, rate, step=0.2, inner_steps=2)


def tasks(count: int = 3) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(1)
    found = {f"{side}_x": torch.randn(count, 5, 3, generator=draws, dtype=torch.float64) for side in SIDES}
    return found | {f"{side}_y": torch.randint(2, (count, 5), generator=draws) for side in SIDES}


def test_masks_are_zeros_and_the_inverse_of_what_is_left_and_are_drawn_by_the_seed() -> None:
    net, plain = own(), tasks(40)
    batch = net.prepare(plain, 3)
    for side in SIDES:
        mask = batch[f"{side}_dropout"]
        assert mask.shape == (40, 5, 6) and mask.dtype == torch.float64
        assert {round(value, 4) for value in set(mask.flatten().tolist())} == {0.0, round(1 / 0.7, 4)}
        assert float(mask.mean()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(net.prepare(plain, 3)["query_dropout"], batch["query_dropout"])
    assert not torch.equal(net.prepare(plain, 4)["query_dropout"], batch["query_dropout"])
    with pytest.raises(ValueError, match="below 1"):
        own(1.0)


def test_features_are_multiplied_by_the_mask_of_their_set() -> None:
    net, draws = own(), torch.Generator().manual_seed(5)
    data = net.prepare(tasks(1), 0)
    task = {name: part[0] for name, part in data.items()}
    for side, loss in (("support", net.g), ("query", net.f)):
        features = net.body(net.x0["body"], task[f"{side}_x"]) * task[f"{side}_dropout"]
        expected = cross_entropy(net.head(net.x0["head"], features), task[f"{side}_y"])
        torch.testing.assert_close(loss(net.x0, net.x0, task), expected)
    masks = net.masks((7, 5), draws)
    drawn = net.drawn(net.x0, task["query_x"], samples=7, seed=3)
    assert (
        masks.shape == (7, 5, 6)
        and drawn.shape == (7, 5, 2)
        and torch.equal(drawn, net.drawn(net.x0, task["query_x"], 7, 3))
    )
    assert float(drawn.std(0).min()) > 1e-4


@pytest.mark.parametrize("implicit", [False, True])
def test_with_held_masks_the_hypergradient_is_that_of_differences(implicit: bool) -> None:
    """Conjugate gradients too need one linear system: g with another mask at each product has none."""
    net = own()
    learner, data = net.learner, net.prepare(tasks(), 0)
    problem, estimator = learner.problem, learner.estimator
    if implicit:
        problem = type(problem)(
            net.f,
            lambda x, y, task: net.g(x, y, task) + (ravel(y)[0] - ravel(x)[0]).square().sum() / 2,
            init=problem.init,
            tasks=True,
        )
        estimator = AID(Newton(tol=1e-12), CG(rtol=1e-12))
    flat, structure = ravel(net.x0)
    direction, h = torch.randn(flat.shape, generator=torch.Generator().manual_seed(2), dtype=flat.dtype), 1e-5

    def at(x: Tensor) -> Any:
        return hypergradient(problem, structure.unravel(x), net.x0, estimator=estimator, data=data)

    up, down = (at(flat + s * h * direction).value for s in (1, -1))
    slope = float(ravel(at(flat).grad)[0] @ direction)
    assert slope == pytest.approx((up - down) / (2 * h), rel=1e-6, abs=1e-9) and abs(slope) > 1e-3


def test_without_masks_it_is_maml_and_without_dropout_draws_agree() -> None:
    net, data = own(), tasks()
    learner = net.learner
    found = hypergradient(learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=data)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 6), nn.Tanh()).double().append(nn.Linear(6, 2).double())
    plain = maml(functional(module), cross_entropy, step=0.2, inner_steps=2)
    expected = hypergradient(plain.problem, plain.x0, plain.y0, estimator=plain.estimator, data=data)
    assert found.value == pytest.approx(expected.value)
    torch.testing.assert_close(ravel(found.grad)[0], ravel(expected.grad)[0])
    inputs = data["query_x"][0]
    assert float(bald(own(0.0).drawn(net.x0, inputs, 7)).abs().max()) <= 1e-12
    assert float(bald(net.drawn(net.x0, inputs, 7)).max()) > 1e-4
    torch.testing.assert_close(own(0.0).drawn(net.x0, inputs, 2)[1], net.logits(net.x0, inputs).softmax(-1))


def test_the_learner_is_trained_and_evaluated_as_any_other() -> None:
    cells = MarkerCells(shots=4, queries=4, side=4)
    body = functional(nn.Sequential(nn.Flatten(), nn.Linear(7 * 16, 5), nn.Tanh()))
    net = MaskedDropout(body, functional(nn.Linear(5, 2)), 5)
    trained = train(net.learner, Augmented(cells, least=2), max_steps=2, batch=2)
    assert evaluate(net.learner, trained.x, cells, episodes=4).metric == "accuracy"
    assert isinstance(net.learner.export(trained.x), nn.Sequential)


# --- asking


def test_it_asks_for_the_highest_of_those_that_have_no_label_yet() -> None:
    told: list[list[int]] = []

    def adapt(rows: Tensor) -> Tensor:
        told.append(rows.tolist())
        return rows

    order = acquire(adapt, lambda y: torch.arange(10.0) + 100 * (len(y) > 4), 10, first=2, batch=3, count=7, seed=0)
    first = order[:2].tolist()
    left = [k for k in range(9, -1, -1) if k not in first]
    assert order.tolist() == first + left[:5] and told == [first, first + left[:3]]
    assert sorted(acquire(adapt, lambda y: torch.zeros(4), 4, first=9, batch=1, count=9).tolist()) == [0, 1, 2, 3]
    other = acquire(adapt, lambda y: torch.zeros(10), 10, first=2, batch=3, count=2, seed=1)
    assert len(other) == 2 and other.tolist() != first


# --- runs


def small(**given: Any) -> Instance:
    own: dict[str, Any] = {"filters": 2, "shots": 4, "queries": 4, "batch": 2, "plain_steps": 2, "max_steps": 2}
    return active_cells(**(own | given))


@pytest.mark.parametrize("rule", ["entropy", "bald"])
def test_a_run_repeats_itself_goes_on_to_the_bit_and_says_what_it_found(
    rule: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("bilevel.problems.networks.active_cells._TASKS", 2)
    whole, part = small(rule=rule), tmp_path / "checkpoint.pt"
    longer: dict[str, Any] = dict(whole.settings) | {"max_steps": 4}
    expected = minimize(whole.problem, whole.x0, whole.y0, throw=False, **longer)
    first, second = small(rule=rule), small(rule=rule)
    minimize(first.problem, first.x0, first.y0, throw=False, **first.settings, checkpoint=part)
    found = minimize(second.problem, second.x0, second.y0, throw=False, **longer, checkpoint=part, resume=True)
    assert torch.equal(ravel(found.x)[0], ravel(expected.x)[0])
    figures = pytest.importorskip("matplotlib.figure")
    assert whole.metrics is not None and whole.plot is not None
    numbers = whole.metrics(found.x, found.y)
    assert {"random_4", "active_10", "plain_20", "gain"} <= numbers.keys()
    assert all(math.isfinite(value) for value in numbers.values())
    assert numbers["active_4"] == numbers["random_4"]
    figure = figures.Figure(figsize=(9, 4))
    whole.plot(figure, found.x, found.y)
    assert all(axes.get_xlabel() for axes in figure.axes)


# --- the gates


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_augmented_tasks_teach_what_new_kinds_need_and_asking_does_no_harm(seed: int) -> None:
    instance = active_cells(seed=seed)
    solution = minimize(instance.problem, instance.x0, instance.y0, throw=False, **instance.settings)
    assert instance.metrics is not None
    found = instance.metrics(solution.x, solution.y)
    assert found["random_10"] >= 0.78 and found["random_10"] - found["plain_10"] >= 0.2
    assert found["gain"] >= -0.03
