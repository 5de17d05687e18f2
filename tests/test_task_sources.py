"""Sources of tasks: functions of their arguments, with the distributions that they promise; no class in two splits."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image
from torch import Tensor

from bilevel import cli
from bilevel.commands import data as data_command
from bilevel.tasks import (
    AbstractTasks,
    Episodes,
    ImageClasses,
    LinearTasks,
    Sinusoid,
    Splits,
    _vinyals,
    batches,
    check_batch,
    convert_omniglot,
    digits,
    image_folder,
    mini_imagenet,
    omniglot,
    pad,
    split,
)
from bilevel.tasks._random import generator, seed_of_step, subsets


def labelled(classes: int, per_class: int, size: int = 4) -> ImageClasses:
    """Images whose corner pixels say the class, the member and which way is up."""
    images = torch.zeros(classes, per_class, size, size, dtype=torch.uint8)
    images[..., 0, 0] = torch.arange(1, classes + 1, dtype=torch.uint8).unsqueeze(1)
    images[..., 0, 1] = torch.arange(1, per_class + 1, dtype=torch.uint8)
    return ImageClasses(images, scale=1.0)


def what(images: Tensor) -> list[tuple[int, int, int]]:
    """Of images from `labelled`: class, member, quarter turns counter-clockwise."""
    found = []
    for image in images.flatten(0, -4).squeeze(1):
        (turned,) = [k for k in range(4) if image.rot90(-k)[0, 0] > 0 and image.rot90(-k)[0, 1] > 0]
        upright = image.rot90(-turned)
        found.append((int(upright[0, 0]) - 1, int(upright[0, 1]) - 1, turned))
    return found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


SOURCES: dict[str, Callable[..., AbstractTasks]] = {
    "sinusoid": lambda **options: Sinusoid(noise=0.1, **options),
    "linear": lambda **options: LinearTasks(condition=10.0, orthogonal=True, **options),
    "episodes": lambda **options: Episodes(labelled(7, 12), shots=2, queries=3, rotations=True, **options),
}


# What holds for every source


@pytest.mark.parametrize("name", SOURCES)
def test_a_batch_is_a_function_of_count_and_seed(name: str) -> None:
    source = SOURCES[name]()
    torch.manual_seed(3)
    one = source.sample(5, 11)
    torch.manual_seed(4)
    torch.rand(7)
    assert equal(one, SOURCES[name]().sample(5, 11))
    assert not equal(one, source.sample(5, 12))
    assert not equal(one, source.sample(5, 11 + 2**32)), "torch's own seeds end at 32 bits"


@pytest.mark.parametrize("name", SOURCES)
def test_sampling_leaves_the_global_generator_alone(name: str) -> None:
    before = torch.get_rng_state()
    SOURCES[name]().sample(2, 0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", SOURCES)
def test_a_batch_is_well_formed_and_has_the_dtype_that_was_asked_for(name: str) -> None:
    for dtype in (None, torch.float32, torch.float64):
        batch = SOURCES[name](dtype=dtype, device="cpu").sample(3, 0)
        check_batch(batch, tasks=3)
        assert batch["support_x"].dtype == batch["query_x"].dtype == (dtype or torch.float64)
        assert all(tensor.is_contiguous() for tensor in batch.values())


@pytest.mark.parametrize("name", ["sinusoid", "linear"])
def test_the_draws_do_not_depend_on_the_dtype(name: str) -> None:
    single, double = (SOURCES[name](dtype=dtype).sample(3, 5) for dtype in (torch.float32, torch.float64))
    for key in single:
        assert torch.equal(single[key], double[key].float())


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("count", [0, -1, True, 1.5])
def test_a_count_that_is_none_is_refused(name: str, count: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"\.sample\(count=.*must be (at least 1|an integer). Got"):
        SOURCES[name]().sample(count, 0)


def test_a_seed_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`Sinusoid.sample\(seed=...\)` must be an integer"):
        Sinusoid().sample(1, 1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="integer"):
        batches(Sinusoid(), 2, "a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"batches\(size=...\)"):
        batches(Sinusoid(), 0, 1)


# Batches of a training loop


def test_steps_have_different_batches_that_depend_on_nothing_else() -> None:
    data = batches(Sinusoid(shots=1, queries=1), 3, seed=0)
    run = [data(step)["amplitude"] for step in range(50)]
    assert torch.equal(data(17)["amplitude"], run[17])
    assert len(set(torch.cat(run).tolist())) == 150


@given(st.integers(-(2**40), 2**62))
def test_no_two_steps_share_a_seed(seed: int) -> None:
    seeds = [seed_of_step(seed, step) for step in range(3000)]
    assert len(set(seeds)) == 3000
    assert all(0 <= found < 2**32 for found in seeds)


def test_streams_with_different_seeds_are_unrelated() -> None:
    streams = [{seed_of_step(seed, step) for step in range(2000)} for seed in (0, 1, 2, 2**32, -1)]
    for one, other in itertools.combinations(streams, 2):
        assert len(one & other) <= 2  # of 4e6 pairs in 4e9, 0.001 are expected to be equal


def test_seeds_of_steps_are_spread_evenly() -> None:
    seeds = torch.tensor([seed_of_step(5, step) for step in range(16000)])
    for shift in (0, 14, 28):
        counts = ((seeds >> shift) & 15).bincount(minlength=16).double()
        assert float((counts - 1000).square().sum() / 1000) < 45  # chi^2 of 15 degrees of freedom: P = 1e-4


# Subsets


@given(st.integers(1, 6), st.integers(0, 30), st.integers(0, 2**63 - 1))
def test_subsets_have_no_repetitions_and_stay_in_range(count: int, more: int, seed: int) -> None:
    sizes = torch.arange(count, count + more + 1)
    found = subsets(sizes, count, generator(seed))
    assert found.shape == (more + 1, count)
    for row, size in zip(found.tolist(), sizes.tolist(), strict=True):
        assert len(set(row)) == count
        assert all(0 <= number < size for number in row)


def test_every_ordered_subset_is_equally_likely() -> None:
    rows = 24000
    found = subsets(torch.full((rows,), 4), 3, generator(0))
    counts = (found @ torch.tensor([16, 4, 1])).bincount(minlength=64).double()
    possible = counts[counts > 0]
    assert len(possible) == 24
    assert float((possible - 1000).square().sum() / 1000) < 56  # chi^2 of 23 degrees of freedom: P = 1e-4


# Sinusoids


def test_targets_are_sinusoids() -> None:
    batch = Sinusoid(shots=3, queries=4).sample(6, 0)
    for side in ("support", "query"):
        x, y = batch[f"{side}_x"], batch[f"{side}_y"]
        wanted = batch["amplitude"].view(-1, 1, 1) * torch.sin(x - batch["phase"].view(-1, 1, 1))
        assert torch.allclose(y, wanted, atol=1e-14)
    assert batch["support_x"].shape == (6, 3, 1)
    assert batch["query_y"].shape == (6, 4, 1)


def test_amplitudes_phases_and_inputs_are_uniform() -> None:
    batch = Sinusoid(amplitude=(1.0, 3.0), phase=(0.0, math.pi), inputs=(-5.0, 5.0)).sample(4000, 1)
    for name, low, high in (("amplitude", 1.0, 3.0), ("phase", 0.0, math.pi), ("support_x", -5.0, 5.0)):
        values = ((batch[name] - low) / (high - low)).flatten().sort().values
        n = len(values)
        assert float(values[0]) >= 0 and float(values[-1]) < 1
        deviation = float((values - torch.arange(n) / n).abs().max())
        assert deviation < 2.2 / math.sqrt(n)  # Kolmogorov-Smirnov: P = 1e-4


def test_noise_has_its_deviation_and_leaves_the_inputs_as_they_were() -> None:
    quiet, noisy = Sinusoid(shots=50).sample(200, 2), Sinusoid(shots=50, noise=0.3).sample(200, 2)
    assert torch.equal(quiet["support_x"], noisy["support_x"])
    noise = noisy["support_y"] - quiet["support_y"]
    assert float(noise.std()) == pytest.approx(0.3, rel=0.04)  # 4 standard errors of 10,000 draws
    assert abs(float(noise.mean())) < 4 * 0.3 / 100


@pytest.mark.parametrize(
    "options",
    [
        {"shots": 0},
        {"queries": -1},
        {"noise": -0.1},
        {"noise": math.nan},
        {"amplitude": (2.0, 1.0)},
        {"inputs": (0.0, math.inf)},
    ],
)
def test_a_sinusoid_without_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"`Sinusoid\({next(iter(options))}=...\)` must be"):
        Sinusoid(**options)


# Linear regressions


def test_weights_have_the_prior_and_targets_the_noise() -> None:
    mean, variance = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.1, 2.0, 1.0])
    batch = LinearTasks(3, mean, variance, noise=0.5).sample(20000, 0)
    weights = batch["weights"]
    assert torch.all((weights.mean(0) - mean).abs() < 4 * (variance / 20000).sqrt())
    assert torch.all((weights.var(0) / variance - 1).abs() < 4 * math.sqrt(2 / 20000))
    for side in ("support", "query"):
        noise = batch[f"{side}_y"] - batch[f"{side}_x"] @ weights.unsqueeze(-1)
        assert float(noise.std()) == pytest.approx(0.5, rel=4 / math.sqrt(2 * noise.numel()))


def test_the_prior_is_held_by_feature() -> None:
    source = LinearTasks(2, 1.0, (0.5, 2.0))
    assert torch.equal(torch.as_tensor(source.mean), torch.ones(2))
    assert torch.equal(torch.as_tensor(source.variance), torch.tensor([0.5, 2.0]))


@pytest.mark.parametrize("condition", [None, 1.0, 50.0])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_designs_have_the_spectrum_that_was_asked_for(condition: float | None, orthogonal: bool) -> None:
    X = LinearTasks(4, shots=9, orthogonal=orthogonal, condition=condition).sample(3, 0)["support_x"]
    gram = X.mT @ X
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    if condition is None and not orthogonal:
        X = LinearTasks(4, shots=500).sample(5, 0)["support_x"]  # 10,000 entries
        assert abs(float(X.mean())) < 0.04
        assert float(X.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / 10000))
        return
    steps = torch.linspace(-1, 0, 4)
    wanted = 9 * (condition or 1.0) ** steps
    assert torch.allclose(torch.linalg.eigvalsh(gram), wanted.expand(3, 4), rtol=1e-10)
    is_diagonal = torch.allclose(gram, torch.diag_embed(diagonal), atol=1e-12)
    assert is_diagonal == (orthogonal or condition == 1.0)


def test_the_posterior_is_stationary_and_has_the_curvature_as_its_precision() -> None:
    source = LinearTasks(3, (1.0, 0.0, -1.0), (0.5, 1.0, 2.0), shots=5, noise=0.7)
    batch = source.sample(1, 0)
    X, y = batch["support_x"][0], batch["support_y"][0, :, 0]

    def energy(w: Tensor) -> Tensor:  # minus the logarithm of likelihood times prior
        fit = (y - X @ w).square().sum() / (2 * 0.7**2)
        prior: Tensor = ((w - torch.as_tensor(source.mean)).square() / (2 * torch.as_tensor(source.variance))).sum()
        return fit + prior

    mean, covariance = source.posterior(batch)
    gradient = torch.func.grad(energy)(mean[0])
    assert float(gradient.abs().max()) < 1e-12
    curvature = torch.stack([torch.func.grad(energy)(mean[0] + e) for e in torch.eye(3)])  # of a quadratic: exact
    assert torch.allclose(curvature.inverse(), covariance[0], rtol=1e-12)


def test_posterior_intervals_cover_the_weights() -> None:
    source = LinearTasks(2, 0.3, (0.5, 2.0), shots=4, noise=0.5)
    batch = source.sample(4000, 7)
    mean, covariance = source.posterior(batch)
    deviations = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    covered = ((batch["weights"] - mean).abs() < 1.6449 * deviations).double().mean(0)
    assert torch.all((covered - 0.9).abs() < 4 * math.sqrt(0.09 / 4000))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"features": 0}, "features"),
        ({"mean": (1.0, 2.0)}, "mean"),
        ({"variance": (1.0, 1.0, math.nan, 1.0)}, "variance"),
        ({"variance": -1.0}, "variance"),
        ({"noise": -1.0}, "noise"),
        ({"condition": 0.5}, "condition"),
        ({"condition": 2.0, "shots": 3}, "shots"),
        ({"orthogonal": True, "shots": 3}, "shots"),
    ],
)
def test_a_regression_without_sense_is_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"`LinearTasks\({name}=...\)` must be"):
        LinearTasks(**options)


def test_a_degenerate_posterior_is_refused() -> None:
    for source in (LinearTasks(noise=0.0), LinearTasks(variance=0.0)):
        with pytest.raises(ValueError, match="noise > 0 and variance > 0"):
            source.posterior(source.sample(1, 0))


# Episodes


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 2**31))
def test_an_episode_is_what_it_says(way: int, shots: int, queries: int, rotations: bool, seed: int) -> None:
    source = Episodes(labelled(6, 7), way, shots, queries, rotations)
    batch = source.sample(3, seed)
    assert batch["support_x"].shape == (3, way * shots, 1, 4, 4)
    for task in range(3):
        kinds: dict[int, set[tuple[int, int]]] = {}
        members: list[tuple[int, tuple[int, int, int]]] = []
        for side, each in (("support", shots), ("query", queries)):
            labels = batch[f"{side}_y"][task]
            assert torch.equal(labels.bincount(minlength=way), torch.full((way,), each))
            for label, (kind, member, turned) in zip(labels.tolist(), what(batch[f"{side}_x"][task]), strict=True):
                kinds.setdefault(label, set()).add((kind, turned))
                members.append((label, (kind, member, turned)))
        assert all(len(found) == 1 for found in kinds.values()), "a label is one class, turned one way"
        assert len({next(iter(found)) for found in kinds.values()}) == way, "classes differ"
        assert len(set(members)) == way * (shots + queries), "support and query images differ"
        assert rotations or all(turned == 0 for _, (_, _, turned) in members)


def test_all_classes_rotations_and_members_are_drawn_equally_often() -> None:
    batch = Episodes(labelled(5, 4), way=2, shots=1, queries=1, rotations=True).sample(4000, 0)
    found = what(batch["support_x"]) + what(batch["query_x"])
    kinds = torch.tensor([kind * 4 + turned for kind, _, turned in found])[: 2 * 4000]  # one a class and task
    counts = kinds.bincount(minlength=20).double()
    assert float((counts - 400).square().sum() / 400) < 51  # chi^2 of 19 degrees of freedom: P = 1e-4
    members = torch.tensor([member for _, member, _ in found]).bincount(minlength=4).double()
    assert float((members - 4000).square().sum() / 4000) < 22  # of 3: P = 1e-4


def test_labels_are_given_to_classes_at_random() -> None:
    batch = Episodes(labelled(3, 4), way=3, shots=1, queries=1).sample(3000, 0)
    kinds = torch.tensor([kind for kind, _, _ in what(batch["support_x"])])
    counts = (kinds * 3 + batch["support_y"].flatten()).bincount(minlength=9).double()
    assert float((counts - 1000).square().sum() / 1000) < 32  # chi^2 of 8 degrees of freedom: P = 1e-4
    first = batch["query_y"][:, 0].bincount(minlength=3).double()
    assert float((first - 1000).square().sum() / 1000) < 18.5  # the order within a set, too; of 2: P = 1e-4


def test_bytes_are_scaled_and_floats_are_not() -> None:
    white = torch.full((2, 2, 3, 3), 255, dtype=torch.uint8)
    for images in (white, white / 255):
        batch = Episodes(ImageClasses(images), way=2, shots=1, queries=1).sample(1, 0)
        assert torch.allclose(batch["support_x"], torch.ones(()))


def test_colors_are_the_third_axis() -> None:
    classes = ImageClasses(torch.arange(3).view(1, 1, 3, 1, 1).expand(4, 5, 3, 2, 2))
    batch = Episodes(classes, way=3, shots=1, queries=1, rotations=True).sample(2, 0)
    assert classes.shape == (3, 2, 2)
    assert torch.equal(batch["query_x"][:, :, :, 0, 0], torch.arange(3.0).expand(2, 3, 3))


def test_classes_may_differ_in_size() -> None:
    sizes = (3, 9, 5)
    images = tuple(torch.full((size, 2, 2), float(k)) for k, size in enumerate(sizes))
    for k, image in enumerate(images):
        image[:, 0, 1] = torch.arange(sizes[k])
    batch = Episodes(ImageClasses(images), way=3, shots=1, queries=2).sample(200, 0)
    for k, size in enumerate(sizes):
        drawn = batch["query_x"].flatten(0, 2)
        assert set(drawn[drawn[:, 0, 0] == k][:, 0, 1].tolist()) == set(range(size))
    with pytest.raises(ValueError, match=r"at most 3 together, the images of class '0'"):
        Episodes(ImageClasses(images), way=3, shots=1, queries=3)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"way": 6}, r"`Episodes\(way=...\)` must be at most the number of classes, 5. Got 6"),
        ({"way": 21, "rotations": True}, r"classes and their rotations, 20. Got 21"),
        ({"shots": 2, "queries": 7}, r"at most 8 together.*Got 2 and 7"),
        ({"way": 0}, r"`Episodes\(way=...\)` must be at least 1. Got 0"),
    ],
)
def test_episodes_that_cannot_be_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Episodes(labelled(5, 8), **{"queries": 1, **options})


def test_rotations_of_images_that_are_not_square_are_refused() -> None:
    with pytest.raises(ValueError, match=r"square images. Got 3 by 4"):
        Episodes(ImageClasses(torch.zeros(5, 20, 3, 4)), rotations=True)


# Classes and splits


def test_a_subset_has_the_images_of_its_classes() -> None:
    classes = labelled(6, 3).subset([4, 1, 5]).subset([2, 0])
    assert classes.names == ("5", "4")
    pixels = classes.pixels(torch.tensor([0, 1]), torch.tensor([2, 1]))
    assert what(pixels.double()) == [(5, 2, 0), (4, 1, 0)]


@pytest.mark.parametrize("classes", [[], [0, 0], [6], [-1]])
def test_a_subset_that_cannot_be_is_refused(classes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"different numbers from 0 to 5"):
        labelled(6, 3).subset(classes)


@pytest.mark.parametrize(
    ("images", "names", "complaint"),
    [
        (torch.zeros(2, 3), (), "one shape. Got"),
        ((torch.zeros(2, 3, 3), torch.zeros(2, 4, 4)), (), "one shape. Got"),
        (torch.zeros(2, 1, 3, 3), ("a",), "different name for each of 2 classes. Got 1 names"),
        (torch.zeros(2, 1, 3, 3), ("a", "a"), "'a' more than once"),
        ((torch.zeros(2, 3, 3), torch.zeros(0, 3, 3)), (), "'1' has none"),
    ],
)
def test_images_that_do_not_fit_are_refused(images: Any, names: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ImageClasses(images, names)


def test_a_class_in_two_splits_is_refused() -> None:
    classes = labelled(6, 3)
    parts = [classes.subset(part) for part in ([0, 1], [2, 3], [4, 5])]
    assert Splits(*parts).parts == tuple(parts)
    for place, other in itertools.permutations(range(3), 2):
        overlapping = list(parts)
        overlapping[place] = classes.subset([2 * place, 2 * other + 1])
        with pytest.raises(ValueError, match=f"Both have '{2 * other + 1}'"):
            Splits(*overlapping)


def test_splits_of_different_shapes_are_refused() -> None:
    one, other = labelled(2, 3), ImageClasses(torch.zeros(1, 3, 5, 5), ("x",))
    with pytest.raises(ValueError, match="one shape"):
        Splits(one.subset([0]), one.subset([1]), other)


def test_random_splits_hold_every_class_once() -> None:
    splits = split(labelled(9, 2), validation=2, test=3, seed=1)
    assert [len(part) for part in splits.parts] == [4, 2, 3]
    assert sorted(name for part in splits.parts for name in part.names) == [str(k) for k in range(9)]
    assert split(labelled(9, 2), 2, 3, seed=1).test.names == splits.test.names
    assert len({split(labelled(9, 2), 2, 3, seed).test.names for seed in range(9)}) > 5
    for validation, test in ((0, 3), (4, 5)):
        with pytest.raises(ValueError, match="leave one of 9 classes for training"):
            split(labelled(9, 2), validation, test, seed=0)


def test_the_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    splits = digits()
    assert [part.names for part in splits.parts] == [tuple("0123"), tuple("456"), tuple("789")]
    three = splits.train.pixels(torch.full((5,), 3), torch.arange(5)) * splits.train.scale
    assert torch.equal(three.flatten(1), torch.as_tensor(pixels[labels == 3][:5] / 16))
    assert int(sum(part.counts.sum() for part in splits.parts)) == len(labels)


# Images on disk


def write(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k, name in enumerate(("cats/tabby", "dogs", "eels")):
        for member in range(4 + k):
            write(tmp_path / name / f"{member}.png", np.full((6, 6, 3), [10 * k, member, 200]))
    (tmp_path / "dogs" / "notes.txt").write_text("not an image")
    return tmp_path


@pytest.mark.parametrize("cache", [True, False])
def test_a_folder_with_images_is_a_class(folder: Path, cache: bool) -> None:
    images = image_folder(folder, 6, cache=cache)
    assert images.names == ("cats/tabby", "dogs", "eels")
    assert images.counts.tolist() == [4, 5, 6]
    for _ in range(2):  # from disk, then from memory
        pixels = images.pixels(torch.tensor([2, 0, 2]), torch.tensor([5, 1, 5]))
        assert pixels.shape == (3, 3, 6, 6)
        assert pixels[:, :, 3, 3].tolist() == [[20, 5, 200], [0, 1, 200], [20, 5, 200]]
    batch = Episodes(images, way=3, shots=1, queries=3).sample(2, 0)
    assert torch.allclose(batch["query_x"][:, :, 2], torch.tensor(200 / 255))


def test_files_are_read_when_they_are_drawn_and_once(folder: Path) -> None:
    kept, read_again = image_folder(folder, 6), image_folder(folder, 6, cache=False)
    first = [images.pixels(torch.tensor([0]), torch.tensor([0])) for images in (kept, read_again)]
    (folder / "cats/tabby/0.png").write_bytes(b"no longer an image")
    assert torch.equal(kept.pixels(torch.tensor([0]), torch.tensor([0])), first[0])
    with pytest.raises(ValueError, match=r"0.png' cannot be read as an image"):
        read_again.pixels(torch.tensor([0]), torch.tensor([0]))


def test_images_are_resized_made_gray_and_inverted(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 20)[:, None, None] * np.ones((20, 10, 3))
    write(tmp_path / "a" / "0.png", ramp)
    classes, members = torch.tensor([0]), torch.tensor([0])
    gray = image_folder(tmp_path, (4, 8), color=False).pixels(classes, members)
    assert gray.shape == (1, 1, 4, 8)
    assert gray[0, 0, :, 0].int().diff().sign().tolist() == [1, 1, 1]
    assert gray[0, 0, :, 0].tolist() == pytest.approx([20 * (r + 0.5) / 20 * 255 / 4 for r in range(4)], abs=8)
    inverted = image_folder(tmp_path, (4, 8), color=False, invert=True).pixels(classes, members)
    assert torch.equal(inverted, 255 - gray)


def test_folders_without_images_and_senseless_sizes_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is none at"):
        image_folder(folder / "nothing", 6)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no subfolder of"):
        image_folder(tmp_path / "empty", 6)
    for size in (0, (3,), (3, -1)):
        with pytest.raises(ValueError, match=r"height and width. Got"):
            image_folder(folder, size)


PARTS = {"train": ("n01", "n02"), "val": ("n03",), "test": ("n04", "n05")}


def write_mini_imagenet(root: Path, *, tables: bool) -> None:
    for part, labels in PARTS.items():
        rows = ["filename,label"]
        for label in labels:
            for member in range(3):
                name = f"{label}{member:08d}.jpg"
                write(root / "images" / name if tables else root / part / label / name, np.full((9, 7, 3), 100))
                rows.append(f"{name},{label}")
        if tables:
            (root / f"{part}.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("tables", [True, False])
def test_both_layouts_of_mini_imagenet_are_read(tmp_path: Path, tables: bool) -> None:
    write_mini_imagenet(tmp_path, tables=tables)
    splits = mini_imagenet(tmp_path, size=8)
    assert [part.names for part in splits.parts] == list(PARTS.values())
    assert splits.train.shape == (3, 8, 8)
    batch = Episodes(splits.test, way=2, shots=1, queries=2).sample(1, 0)
    assert torch.allclose(batch["query_x"], torch.tensor(100 / 255), atol=1e-2)


def test_an_incomplete_mini_imagenet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has none of them"):
        mini_imagenet(tmp_path)
    write_mini_imagenet(tmp_path, tables=True)
    (tmp_path / "images" / "n0300000001.jpg").unlink()
    with pytest.raises(ValueError, match=r"names 1 files that do not exist, among them .*n0300000001.jpg"):
        mini_imagenet(tmp_path)
    write_mini_imagenet(tmp_path, tables=True)
    (tmp_path / "test.csv").write_text("filename,label\nn0100000001.jpg,n01\n")
    with pytest.raises(ValueError, match=r"classes of train and test must be different. Both have 'n01'"):
        mini_imagenet(tmp_path)
    (tmp_path / "test.csv").write_text("file,label\n")
    with pytest.raises(ValueError, match="columns filename and label"):
        mini_imagenet(tmp_path)


# Omniglot

NAMES = ("A/character01", "A/character02", "V/character01", "E/character01", "E/character02")
PART = np.array([0, 0, 1, 2, 2], dtype=np.int8)


def drawings() -> Any:
    return (np.random.default_rng(0).random((5, 20, 28, 28)) < 0.2).astype(np.uint8)


@pytest.mark.parametrize("packed", [True, False])
def test_omniglot_is_read_from_bits_and_from_bytes(tmp_path: Path, packed: bool) -> None:
    ink = drawings()
    pixels = {"bits": np.packbits(ink.reshape(5, 20, 784), axis=-1)} if packed else {"images": ink * np.uint8(255)}
    np.savez(tmp_path / "o.npz", class_names=np.array(NAMES), split_vinyals=PART, allow_pickle=False, **pixels)
    splits = omniglot(tmp_path / "o.npz")
    assert [part.names for part in splits.parts] == [NAMES[:2], NAMES[2:3], NAMES[3:]]
    found = splits.test.pixels(torch.tensor([1, 0]), torch.tensor([19, 3])) * splits.test.scale
    assert torch.allclose(found[:, 0], torch.as_tensor(ink[[4, 3], [19, 3]], dtype=torch.float64))


def test_omniglot_without_names_is_all_classes_in_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "o.npz", images=np.zeros((1623, 1, 28, 28), np.uint8))
    splits = omniglot(tmp_path / "o.npz")
    assert [len(part) for part in splits.parts] == [1028, 172, 423]
    assert splits.train.names[0] == "Alphabet_of_the_Magi/character01"
    assert splits.train.names[-1] == "Gurmukhi/character41"
    assert splits.test.names[0] == "Gurmukhi/character42"
    assert {name.split("/")[0] for name in splits.validation.names} == {
        "Armenian",
        "Bengali",
        "Early_Aramaic",
        "Hebrew",
        "Mkhedruli_(Georgian)",
    }


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"X": np.zeros(3)}, "neither bits nor images"),
        ({"images": np.zeros((5, 20, 28, 28), np.uint8)}, "equally many classes"),
        ({"bits": np.zeros((5, 20, 97), np.uint8)}, "98 bytes. Got 97 bytes"),
        (
            {"images": np.zeros((5, 2, 28, 28)), "class_names": NAMES, "split_vinyals": [0, 0, 1, 1, 1]},
            r"each at least once. Got \[0, 1\]",
        ),
        ({"images": np.zeros((5, 2, 28, 28)), "class_names": ("no such",) * 5}, "not a class of Omniglot"),
    ],
)
def test_another_layout_is_refused(tmp_path: Path, arrays: dict[str, Any], complaint: str) -> None:
    np.savez(tmp_path / "o.npz", allow_pickle=False, **arrays)
    with pytest.raises(ValueError, match=complaint):
        omniglot(tmp_path / "o.npz")


def test_a_missing_file_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="bilevel data omniglot"):
        omniglot(tmp_path / "o.npz")


@pytest.fixture
def few_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """An Omniglot of five classes."""
    monkeypatch.setattr(_vinyals, "BACKGROUND", {"A": 2, "V": 1})
    monkeypatch.setattr(_vinyals, "EVALUATION", {"E": 2})
    monkeypatch.setattr(_vinyals, "_TEST", 2)
    monkeypatch.setattr(_vinyals, "_VALIDATION", {"V"})


def archives() -> dict[str, bytes]:
    """Its two archives: drawing d of class k has its ink in 30 columns, from column 3 d on, and row 10 k of 105."""
    found: dict[str, io.BytesIO] = {"images_background.zip": io.BytesIO(), "images_evaluation.zip": io.BytesIO()}
    for k, name in enumerate(NAMES):
        archive = "images_evaluation" if name.startswith("E") else "images_background"
        with zipfile.ZipFile(found[f"{archive}.zip"], "a") as opened:
            for d in reversed(range(20)):
                paper = np.full((105, 105), True)
                paper[10 * k : 10 * k + 10, 3 * d : 3 * d + 30] = False
                png = io.BytesIO()
                Image.fromarray(paper).save(png, "PNG")
                opened.writestr(f"{archive}/{name}/{k + 1:04d}_{d + 1:02d}.png", png.getvalue())
                opened.writestr(f"__MACOSX/{archive}/{name}/._{k + 1:04d}_{d + 1:02d}.png", b"junk")
    return {name: content.getvalue() for name, content in found.items()}


@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.usefixtures("few_characters")
def test_archives_become_the_file_that_is_read(tmp_path: Path, unpacked: bool) -> None:
    for name, content in archives().items():
        if unpacked:
            zipfile.ZipFile(io.BytesIO(content)).extractall(tmp_path)
        else:
            (tmp_path / name).write_bytes(content)
    splits = omniglot(convert_omniglot(tmp_path, tmp_path / "made" / "o.npz"))
    assert [part.names for part in splits.parts] == [NAMES[:2], NAMES[2:3], NAMES[3:]]
    rows, columns = torch.arange(28.0), torch.arange(28.0)
    for part, number, k in ((splits.train, 1, 1), (splits.validation, 0, 2), (splits.test, 1, 4)):
        for d in (0, 7, 19):
            ink = part.pixels(torch.tensor([number]), torch.tensor([d]))[0, 0].double() * part.scale
            assert float(ink.min()) >= 0 and float(ink.max()) > 0.9
            assert float(ink.sum()) == pytest.approx(300 * (28 / 105) ** 2, rel=0.03), "ink is 1, paper 0"
            center = float((ink.sum(1) * rows).sum() / ink.sum()), float((ink.sum(0) * columns).sum() / ink.sum())
            assert center[1] == pytest.approx((3 * d + 15) * 28 / 105 - 0.5, abs=0.15)
            assert center[0] == pytest.approx((10 * k + 5) * 28 / 105 - 0.5, abs=0.15)


@pytest.mark.usefixtures("few_characters")
def test_incomplete_archives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither images_background.zip nor a folder"):
        convert_omniglot(tmp_path, tmp_path / "o.npz")
    for name, content in archives().items():
        zipfile.ZipFile(io.BytesIO(content)).extractall(tmp_path)
        (tmp_path / name).write_bytes(b"junk")
    lost = tmp_path / "images_evaluation" / "E" / "character02" / "0005_03.png"
    kept = lost.read_bytes()
    lost.unlink()
    with pytest.raises(ValueError, match=r"20 drawings of 'E/character02'.*has 19"):
        convert_omniglot(tmp_path, tmp_path / "o.npz")
    lost.write_bytes(kept[:40])
    with pytest.raises(ValueError, match="is damaged"):
        convert_omniglot(tmp_path, tmp_path / "o.npz")
    (tmp_path / "images_evaluation").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="not a zip file"):
        convert_omniglot(tmp_path, tmp_path / "o.npz")
    assert not (tmp_path / "o.npz").exists()


# The command


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_characters: None) -> Path:
    """The archives at addresses that can be reached, and an empty current directory."""
    folder = tmp_path / "server"
    folder.mkdir()
    table = {}
    for name, content in archives().items():
        (folder / name).write_bytes(content)
        checksum = hashlib.md5(content, usedforsecurity=False).hexdigest()
        table[name] = data_command.Archive((folder / name).as_uri(), checksum)
    monkeypatch.setattr(data_command, "OMNIGLOT", table)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def test_the_command_downloads_once_and_converts(server: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "omniglot"]) == cli.SUCCESS
    assert capsys.readouterr().out.count("downloading") == 2
    assert sorted(path.name for path in Path("data").iterdir()) == [
        "images_background.zip",
        "images_evaluation.zip",
        "omniglot.npz",
    ]
    assert [len(part) for part in omniglot("data/omniglot.npz").parts] == [2, 1, 2]
    for file in server.iterdir():
        file.unlink()
    Path("data/omniglot.npz").unlink()
    assert cli.main(["data", "omniglot"]) == cli.SUCCESS
    assert capsys.readouterr().out.count("there already") == 2
    assert Path("data/omniglot.npz").exists()


def test_the_command_takes_archives_from_a_folder(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_command, "OMNIGLOT", {"x": data_command.Archive("file:///nowhere", "")})
    assert cli.main(["data", "omniglot", "--from", str(server), "--out", "made"]) == cli.SUCCESS
    assert [path.name for path in Path("made").iterdir()] == ["omniglot.npz"]


def test_a_wrong_checksum_leaves_no_file(server: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (server / "images_evaluation.zip").read_bytes()
    (server / "images_evaluation.zip").write_bytes(whole[:-1])
    assert cli.main(["data", "omniglot"]) == cli.FAILED
    assert "MD5 checksum" in capsys.readouterr().err
    assert [path.name for path in Path("data").iterdir()] == ["images_background.zip"]
    (server / "images_evaluation.zip").write_bytes(whole)
    Path("data/images_evaluation.zip").write_bytes(b"from an earlier attempt")
    assert cli.main(["data", "omniglot"]) == cli.SUCCESS
    output = capsys.readouterr().out
    assert output.count("there already") == output.count("downloading") == 1


def test_without_a_connection_it_says_what_to_do(server: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (server / "images_background.zip").unlink()
    assert cli.main(["data", "omniglot", "--out", "made"]) == cli.FAILED
    error = capsys.readouterr().err
    assert "could not be downloaded" in error and "--from" in error
    assert list(Path("made").iterdir()) == []


def test_the_official_addresses_are_those_of_the_author() -> None:
    assert {name: (archive.url, archive.md5) for name, archive in data_command.OMNIGLOT.items()} == {
        "images_background.zip": (
            "https://github.com/brendenlake/omniglot/raw/master/python/images_background.zip",
            "68d2efa1b9178cc56df9314c21c6e718",
        ),
        "images_evaluation.zip": (
            "https://github.com/brendenlake/omniglot/raw/master/python/images_evaluation.zip",
            "6b91aef0f799c5bb55b94e3f2daec811",
        ),
    }


# Ragged tasks


def ragged_task(shots: int, queries: int) -> dict[str, Tensor]:
    x = torch.arange(1.0, 1 + 2 * (shots + queries)).view(-1, 2)
    y = x.sum(1).long()
    return {"support_x": x[:shots], "support_y": y[:shots], "query_x": x[shots:], "query_y": y[shots:]}


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5))
def test_padding_can_be_undone_by_the_masks(sizes: list[tuple[int, int]]) -> None:
    tasks = [ragged_task(*size) for size in sizes]
    batch = pad(tasks)
    for number, task in enumerate(tasks):
        for side in ("support", "query"):
            mask = batch[f"{side}_mask"][number]
            for part in "xy":
                entry = batch[f"{side}_{part}"][number]
                assert torch.equal(entry[mask.bool()], task[f"{side}_{part}"])
                assert not bool(entry[~mask.bool()].any())
                assert entry.dtype == task[f"{side}_{part}"].dtype


def test_masks_of_the_tasks_are_kept_and_other_entries_stacked() -> None:
    tasks: list[dict[str, Tensor]] = [
        {**ragged_task(n, 1), "support_mask": torch.eye(n)[0], "weight": torch.tensor(float(n))} for n in (1, 3)
    ]
    batch = pad(tasks)
    assert batch["support_mask"].tolist() == [[1, 0, 0], [1, 0, 0]]
    assert batch["weight"].tolist() == [1, 3]


def test_tasks_that_do_not_fit_are_refused() -> None:
    good = ragged_task(2, 1)
    with pytest.raises(ValueError, match="at least one task"):
        pad([])
    with pytest.raises(ValueError, match=r"task 1 has no query_y. It has support_x \(2, 2\)"):
        pad([good, {name: tensor for name, tensor in good.items() if name != "query_y"}])
    with pytest.raises(ValueError, match=r"same entries. Task 0 has"):
        pad([good, {**good, "more": torch.ones(())}])
    with pytest.raises(ValueError, match=r"support_x must be of examples of one shape"):
        pad([good, {**good, "support_x": torch.ones(2, 3)}])
    with pytest.raises(ValueError, match="equally many axes"):
        pad([good, {**good, "support_x": torch.ones(2)}])
    with pytest.raises(ValueError, match=r"support_x \(2, 3, 2\), support_y \(2, 2\)"):
        pad([good, {**good, "support_x": torch.ones(3, 2)}])


def well_formed() -> dict[str, Any]:
    x = torch.zeros(3, 4, 2)
    mask = torch.ones(3, 4)
    return {"support_x": x, "support_y": x[..., 0], "query_x": x, "query_y": x, "query_mask": mask}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"support_x": None}, "support_x is NoneType"),
        ({"query_x": torch.zeros(3)}, r"first axes of query_x must be tasks and examples"),
        ({"support_x": torch.zeros(2, 4, 2)}, r"Got support_x \(2, 4, 2\)"),
        ({"support_y": torch.zeros(3, 5)}, r"support_x \(3, 4, 2\), support_y \(3, 5\)"),
        ({"query_mask": torch.ones(3, 5)}, r"query_mask must be \(3, 4\), as query_x. Got \(3, 5\)"),
        ({"query_mask": torch.full((3, 4), 0.5)}, "a value is neither"),
        ({"query_mask": torch.tensor([[1.0] * 4, [0.0] * 4, [1.0] * 4])}, "task 1 has no example"),
        ({"support_x": torch.zeros(3, 0, 2), "support_y": torch.zeros(3, 0)}, "has none"),
        ({"more": torch.zeros(2)}, r"first axis of every entry must be tasks, 3 .*more \(2,\)"),
    ],
)
def test_a_malformed_batch_is_refused_with_what_arrived(change: dict[str, Any], complaint: str) -> None:
    check_batch(well_formed())
    with pytest.raises((ValueError, TypeError), match=complaint):
        check_batch({**well_formed(), **change})


def test_what_is_no_batch_at_all_is_refused() -> None:
    with pytest.raises(TypeError, match="Got list"):
        check_batch([well_formed()])
    with pytest.raises(ValueError, match=r"needs support_x, support_y, query_x, query_y. Got x \(2,\)"):
        check_batch({"x": torch.zeros(2)})
    with pytest.raises(ValueError, match="must be tasks, 5 of them"):
        check_batch(well_formed(), tasks=5)
