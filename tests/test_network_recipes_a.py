"""Recipes for networks: noisy labels, learned augmentation, mixed operations.

`pytest -m slow tests/test_network_recipes_a.py` runs their gates, each with seeds of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import AID, BilevelProblem, Instance, Split, functional, hypergradient, minimize
from bilevel._tree import ravel
from bilevel.cli import main
from bilevel.commands.arguments import with_data
from bilevel.problems.networks._batches import loader
from bilevel.problems.networks._modules import as_images, convolutions, made, trained
from bilevel.problems.networks.learned_augmentation import Draws, LearnedAugmentation, augmented, learned_augmentation
from bilevel.problems.networks.mixed_operations import MixedOperations, Supernet, mixed_operations
from bilevel.problems.networks.noisy_labels import NoisyLabels, noisy_labels
from bilevel.solvers import LBFGS, Dense

Built = tuple[BilevelProblem, Tensor, Any, Any]  # f and g, x, the start of y, all the data


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny_labels() -> Built:
    net = made(lambda: functional(nn.Linear(3, 3).double()), 0)
    family = NoisyLabels(net, net, c=0.05)
    data = Split(f=(normal(7, 3), torch.arange(7) % 3), g=(normal(8, 3, seed=1), torch.arange(8) % 3, torch.arange(8)))
    return BilevelProblem(family.f, family.g), normal(8, seed=2), net.params, data


def tiny_augmentation() -> Built:
    module = made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double(), 0)
    net = functional(module)
    family = LearnedAugmentation(net, net)
    images = normal(6, 1, 4, 4)
    draws = Draws.of(torch.Generator().manual_seed(3), images)
    data = Split(f=(normal(6, 1, 4, 4, seed=1), torch.arange(6) % 3), g=(images, torch.arange(6) % 3, *draws))
    x = torch.tensor([0.2, 0.1, 0.3, 0.2, 0.1, 1.3, 0.05]).double().log()
    return BilevelProblem(family.f, family.g), x, net.params, data


def tiny_operations() -> Built:
    """A linear model on two features of the tokens, mixed by the softmax: g is strongly convex in y."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 1)

        def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
            mixed: Tensor = self.head(torch.stack([tokens * weights[0, 0], tokens**2 * weights[0, 1]], -1))
            return mixed

    net = made(lambda: functional(Mixture().double()), 0)
    family = MixedOperations(net, net, c=0.05)
    data = Split(f=(normal(9), normal(9, 1, seed=1)), g=(normal(8, seed=2), normal(8, 1, seed=3)))
    return BilevelProblem(family.f, family.g), normal(1, 2, seed=4), net.params, data


TINY: dict[str, Callable[[], Built]] = {
    "noisy labels": tiny_labels,
    "learned augmentation": tiny_augmentation,
    "mixed operations": tiny_operations,
}
SMALL: dict[str, Callable[[], Instance]] = {
    "noisy-labels": lambda: noisy_labels(n_train=40, n_val=20, channels=1, batch=10, max_steps=2, data=squares()),
    "learned-augmentation": lambda: learned_augmentation(
        n_train=40, n_val=20, channels=1, batch=10, max_steps=2, data=squares()
    ),
    "mixed-operations": lambda: mixed_operations(n_train=16, n_val=16, width=4, batch=8, max_steps=2),
}


def squares() -> tuple[Tensor, Tensor]:
    """Images of 4 x 4 pixels of three classes."""
    labels = torch.arange(90) % 3
    return normal(90, 16).float() + 2 * labels.unsqueeze(1), labels


@pytest.mark.parametrize("name", TINY)
def test_hypergradients_of_a_recipe_equal_finite_differences(name: str) -> None:
    problem, x, y0, data = TINY[name]()
    exact = AID(LBFGS(tol=1e-12), Dense())
    found = ravel(hypergradient(problem, x, y0, data=data, estimator=exact).grad)[0]
    direction, h = normal(x.numel(), seed=9), 1e-4
    step = h * direction.reshape(x.shape)
    up, down = (float(hypergradient(problem, x + s * step, y0, data=data, estimator=exact).value) for s in (1, -1))
    assert float(found @ direction) == pytest.approx((up - down) / (2 * h), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", TINY)
def test_f_and_g_are_means_over_samples(name: str) -> None:
    problem, x, y, data = TINY[name]()
    for function, whole in ((problem.f, data.f), (problem.g, data.g)):
        n = len(whole[0])
        parts = [tuple(tensor[i : i + 2] for tensor in whole) for i in range(0, n, 2)]
        mean = sum(len(part[0]) / n * function(x, y, part) for part in parts)
        torch.testing.assert_close(mean, function(x, y, whole))


@pytest.mark.parametrize("name", SMALL)
def test_a_run_takes_its_steps_by_loaders_at_both_levels_and_repeats_itself(name: str) -> None:
    instance = SMALL[name]()
    assert all(isinstance(side, torch.utils.data.DataLoader) for side in vars(instance.settings["data"]).values())
    runs = [minimize(instance.problem, instance.x0, instance.y0, **instance.settings) for _ in range(2)]
    assert torch.equal(runs[0].x, runs[1].x)
    found = instance.metrics(runs[0].x, runs[0].y) if instance.metrics is not None else {}
    assert found and all(isinstance(value, float) for value in found.values())
    assert "cannot" not in str(runs[0].message)


@pytest.mark.parametrize("name", SMALL)
def test_a_resumed_run_is_the_whole_run_to_the_bit(name: str, tmp_path: Path) -> None:
    whole, first, second = (SMALL[name]() for _ in range(3))  # each as a process of its own would build it
    settings: dict[str, Any] = dict(whole.settings) | {"max_steps": 4}
    expected = minimize(whole.problem, whole.x0, whole.y0, **settings)
    file = tmp_path / "checkpoint.pt"
    minimize(first.problem, first.x0, first.y0, **first.settings, checkpoint=file)
    settings = dict(second.settings) | {"max_steps": 4}
    resumed = minimize(second.problem, second.x0, second.y0, **settings, checkpoint=file, resume=True)
    assert torch.equal(resumed.x, expected.x)
    assert torch.equal(ravel(resumed.y)[0], ravel(expected.y)[0])


@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_draws_its_picture(name: str) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    instance, figure = SMALL[name](), figures.Figure(figsize=(9, 4.6))
    assert instance.plot is not None
    instance.plot(figure, instance.x0 + 0.1, instance.y0)
    assert all(axes.get_xlabel() or not axes.get_xticks().size for axes in figure.axes)


def test_batches_are_functions_of_the_seed_and_visit_each_sample_once_an_epoch() -> None:
    tensors = (torch.arange(10), 2 * torch.arange(10))
    batches = loader(tensors, 3, seed=1, draw=lambda g, samples: (torch.rand(len(samples[0]), generator=g),))
    once, again = ([*itertools.islice(batches, 7)] for _ in range(2))
    assert all(torch.equal(a, b) for one, two in zip(once, again, strict=True) for a, b in zip(one, two, strict=True))
    for epoch in (once[:3], once[3:6]):
        assert len(set(torch.cat([batch[0] for batch in epoch]).tolist())) == 9
    assert torch.equal(once[0][1], 2 * once[0][0])
    assert len({tuple(batch[2].tolist()) for batch in once}) == 7  # other draws for each
    assert len(next(iter(loader(tensors, 100, seed=0)))[0]) == 10


def test_augmentation_is_the_identity_at_strength_zero_and_turns_by_its_angle() -> None:
    images = normal(3, 1, 8, 8)
    draws = Draws.of(torch.Generator().manual_seed(0), images)
    torch.testing.assert_close(augmented(images, torch.zeros(4).double(), draws), images)
    quarter = Draws(torch.tensor([[torch.pi / 2, 0.0, 0.0, 0.0]]).double().expand(3, -1), draws.pixels)
    turned = augmented(images, torch.tensor([1.0, 0.0, 0.0, 0.0]).double(), quarter)
    torch.testing.assert_close(turned, images.rot90(1, (2, 3)))
    lit = augmented(images, torch.tensor([0.0, 0.0, 1.0, 0.0]).double(), draws)
    torch.testing.assert_close(lit, images * (1 + draws.whole[:, 3]).reshape(3, 1, 1, 1))


def test_a_supernet_with_one_weight_is_that_operation() -> None:
    """Other operations' parameters then make no difference, and theirs do."""
    net = functional(made(lambda: Supernet(5, 6, 4, 0.0).double(), 0))
    tokens, one = torch.arange(12).reshape(2, 6) % 5, torch.eye(4).double()[[0, 2, 3]]
    output = net(net.params, tokens, one)
    assert output.shape == (2, 6, 8)
    changed = {name: value + 1.0 if name.startswith("edges.0.2") else value for name, value in net.params.items()}
    assert torch.equal(net(changed, tokens, one), output)
    used = {name: value + 1.0 if name.startswith("edges.1.2") else value for name, value in net.params.items()}
    assert not torch.allclose(net(used, tokens, one), output)


def test_a_trained_module_normalizes_by_all_its_training_inputs() -> None:
    net = functional(made(lambda: convolutions(4, 3, 2, 0.5), 0))
    inputs = as_images(squares()[0], 4)
    module = trained(net, net.params, inputs)
    convolution, normalization = list(module.children())[:2]
    assert isinstance(normalization, nn.BatchNorm2d)
    torch.testing.assert_close(normalization.running_mean, convolution(inputs).mean((0, 2, 3)))
    assert torch.equal(module(inputs), module(inputs))  # nothing is dropped


def test_data_that_are_no_square_images_are_refused() -> None:
    X, labels = torch.randn(60, 15), torch.arange(60) % 3
    for recipe in (noisy_labels, learned_augmentation):
        with pytest.raises(ValueError, match="square images of one channel"):
            recipe(n_train=30, n_val=20, data=(X, labels))


def test_from_is_the_argument_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numpy = pytest.importorskip("numpy")
    X, labels = squares()
    numpy.savez(tmp_path / "mine.npz", images=X.reshape(-1, 4, 4).numpy(), labels=labels.numpy())
    words = ["run", "noisy-labels", "--from", str(tmp_path / "mine.npz"), "--out", str(tmp_path / "out"), "--quiet"]
    sizes = ["n_train=40", "n_val=20", "channels=2", "batch=10", "max_steps=2"]
    assert main([*words, *(word for size in sizes for word in ("--set", size))]) == 0
    assert torch.load(tmp_path / "out" / "solution.pt")["x"].shape == (40,)
    assert main(["run", "noisy-labels", "--from", "a.npz", "--set", "data=b.npz"]) == 2
    assert "given twice" in capsys.readouterr().err
    assert main(["run", "mixed-operations", "--from", "a.npz", "--out", str(tmp_path / "other")]) == 2
    assert "has no argument 'data'" in capsys.readouterr().err
    assert with_data(["p=1"], None) == ("p=1",)


# The gates


def solved(instance: Instance) -> dict[str, float]:
    solution = minimize(instance.problem, instance.x0, instance.y0, throw=False, **instance.settings)
    assert not solution.failed and instance.metrics is not None
    return dict(instance.metrics(solution.x, solution.y))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_learned_weights_find_wrong_labels_and_come_close_to_right_labels_alone(seed: int) -> None:
    pytest.importorskip("sklearn")
    found = solved(noisy_labels(seed=seed))
    assert found["auc"] >= 0.95
    assert found["test_accuracy_learned"] > found["test_accuracy_uniform"] + 0.02


@pytest.mark.slow
def test_learned_augmentation_beats_the_best_of_a_grid_of_twenty() -> None:
    pytest.importorskip("sklearn")
    found = solved(learned_augmentation(grid=True))
    assert found["test_loss_learned"] < found["test_loss_grid_least"] <= found["test_loss_grid_chosen"]
    assert found["test_loss_retrained"] < found["test_loss_grid_least"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_mixing_weights_find_the_planted_operation_on_every_edge(seed: int) -> None:
    found = solved(mixed_operations(seed=seed))
    assert found["edges_found"] == found["edges"] == 3
